"""Maps of tensors for the copy engine: their names, what reaches the driver, who is refused."""

from __future__ import annotations

import ctypes
import itertools
from types import SimpleNamespace

import fake_driver
import pytest
import torch
from sgmv_reference import rows, stacks

from dop import ops
from dop.errors import ExportError, Failure
from dop.export.cuda_text import take_apart
from dop.measure import cuda_driver, runner_cuda, tensor_map
from dop.measure.artifact import Buffer, Launch, is_pair
from dop.measure.cuda_driver import CudaError
from dop.ops import eager, launch, native, sources
from dop.ops.launch import DeviceKernel
from dop.ops.plan import fill_by_torch
from dop.ops.sources import Choice
from dop.workload import Workload

W = Workload("two", 64, (32, 16), 24, "bfloat16")
STACK_SLOTS, SLOTS, TOKENS = 9, 6, 40
MAPS = ("x_box16", "a_box8", "a1_box8")
SHRINK = Launch("mapped", ("tiles", "1", "1"), (128, 1, 1), 0, ("v", *MAPS, "x", "tokens"))
EXPAND = Launch("plain", ("tiles", "1", "1"), (128, 1, 1), 0, ("v", "b", "y", "b1_shift"))


def test_names():
    for name, found in {
        "x_box128": ("x", 128),
        "a_box64": ("a", 64),
        "a1_box8": ("a1", 8),
        "a2_box256": ("a2", 256),
        "b_box64": ("b", 64),
        "b2_box64": ("b2", 64),
        "y_box72": ("y", 72),
    }.items():
        assert tensor_map.parse(name) == found
        assert tensor_map.tensor_of(name) == found[0]
        assert tensor_map.wanted(["y", name])
    for name in ("x", "a1_shift", "x_box", "x_box0", "x_box08", "a3_box64", "y1_box8", "xx_box8"):
        assert tensor_map.parse(name) is None
        assert tensor_map.tensor_of(name) == name
        assert not tensor_map.wanted([name])


def test_everything_but_the_address_follows_from_the_call_and_the_batch():
    sizes = {"tokens": 40, "slots": 6}
    x = tensor_map.of_workload("x_box128", W, **sizes)
    assert (x.tensor, x.kind, x.dims, x.strides, x.box_rows) == (
        "x",
        9,
        (64, 40, 1),
        (128, 5120),
        128,
    )
    three = Workload("o", 64, (32, 24, 40), 24, "float16")
    a = tensor_map.of_workload("a2_box8", three, **sizes)
    assert (a.tensor, a.kind, a.dims, a.strides, a.box_rows) == (
        "a2",
        6,
        (64, 24, 6),
        (128, 3072),
        8,
    )
    for name, dims, strides in (
        ("b_box64", (24, 32, 6), (48, 48 * 32)),
        ("b1_box64", (24, 24, 6), (48, 48 * 24)),
        ("b2_box64", (24, 40, 6), (48, 48 * 40)),
        ("y_box64", (96, 40, 1), (192, 192 * 40)),
    ):
        found = tensor_map.of_workload(name, three, **sizes)
        assert (found.tensor, found.dims, found.strides) == (name.split("_")[0], dims, strides)
    refused = (
        ("x_box512", "float16"),
        ("x", "float16"),
        ("x_box8", "float32"),
        ("b1_box8", "float16"),
    )
    for name, dtype in refused:
        with pytest.raises(ExportError):
            tensor_map.of_workload(name, Workload("o", 64, (32,), 24, dtype), **sizes)


@pytest.mark.parametrize("warpgroups", [False, True])
def test_kernels_with_maps_are_of_one_architecture(warpgroups):
    """Those without wgmma too: what copies boxes is empty elsewhere."""
    pytest.importorskip("tvm")
    from dop.lowering.cuda_source import signatures
    from dop.lowering.intrinsics.engine_shrink import EngineShrink

    kernel = EngineShrink(W, 64, 1, 64, 2, 4, 1, warpgroups=warpgroups)
    text = take_apart(kernel.source("kernel"))
    assert (text.min_arch, text.alone) == (90, True)
    ((_, arguments),) = signatures(kernel.source("kernel"))
    assert [n for n in arguments if tensor_map.parse(n)] == ["x_box64", "a_box32", "a1_box32"]
    for rank, box in ((256, 256), (512, 256), (272, 16), (384, 192)):
        many = EngineShrink(Workload("o", 512, (512,), rank, "bfloat16"), 64, 1, 64, 2, 4, 2)
        assert many.box_rows == box <= tensor_map.MAX_BOX_ROWS


def test_a_map_of_x_counts_as_x():
    assert is_pair((SHRINK, EXPAND))
    again = Launch("again", ("1", "1", "1"), (1, 1, 1), 0, ("v", "x_box16", "y"))
    assert not is_pair((SHRINK, again))


class Library:
    """libcuda, as far as a map goes."""

    def __init__(self, code: int = 0) -> None:
        self.maps: list[dict] = []
        self.cuTensorMapEncodeTiled = fake_driver.encoder(self.maps, lambda: code)

    def cuGetErrorName(self, code, text):
        text._obj.value = b"CUDA_ERROR_INVALID_VALUE"

    def cuGetErrorString(self, code, text):
        text._obj.value = b"invalid argument"


def test_encode(monkeypatch):
    what = tensor_map.of_workload("a1_box8", W, tokens=40, slots=6)
    library = Library()
    monkeypatch.setattr(cuda_driver, "driver", lambda: library)
    first, second = (tensor_map.encode(what, address) for address in (1 << 40, (1 << 63) + 16))
    for i, made in enumerate((first, second)):
        assert ctypes.addressof(made) % 64 == 0
        assert ctypes.sizeof(made) == 128
        assert list(made) == [i, ((1 << 40), (1 << 63) + 16)[i], *range(14)]
    assert library.maps[1] == {
        "aligned": True,
        "kind": 9,
        "axes": 3,
        "address": (1 << 63) + 16,
        "dims": (64, 24, 6),
        "strides": (128, 128 * 24),
        "box": (64, 8, 1),
        "steps": (1, 1, 1),
        "flags": (0, 3, 3, 0),
    }
    monkeypatch.setattr(cuda_driver, "driver", lambda: Library(1))
    with pytest.raises(
        CudaError, match=r"a1 \[6, 24, 64\], boxes of 8 rows, at 0x11.*INVALID_VALUE"
    ):
        tensor_map.encode(what, 0x11)
    for old in (None, object()):
        monkeypatch.setattr(cuda_driver, "driver", lambda old=old: old)
        with pytest.raises(ExportError, match="CUDA 12"):
            tensor_map.encode(what, 16)


def test_the_tuner_gives_maps_of_whole_stacks(monkeypatch):
    library = Library()
    monkeypatch.setattr(cuda_driver, "driver", lambda: library)
    pointers = {"x": 16, "a": 32, "a0": 32, "a1": 48}
    counts = {"tokens": 40, "tiles": 9, "slots": 99}
    for name in MAPS:
        value = runner_cuda._value(name, pointers, counts, W)
        assert ctypes.sizeof(value) == 128
    assert [(m["address"], m["dims"]) for m in library.maps] == [
        (16, (64, 40, 1)),
        (32, (64, 24, 99)),
        (48, (64, 24, 99)),
    ]
    monkeypatch.setattr(cuda_driver, "driver", lambda: object())
    with pytest.raises(runner_cuda._Refused, match="CUDA 12") as refused:
        runner_cuda._value("x_box16", pointers, counts, W)
    assert refused.value.failure is Failure.CONSTRAINT


# ------------------------------------------------------------------------------ dop.ops


def mapped_kernel() -> DeviceKernel:
    spaces = (Buffer("v", "bfloat16", "tiles * 16"),)
    name = "mapped"
    return DeviceKernel(name, "test", "", 16, (SHRINK, EXPAND), spaces, lambda: b"cubin")


class World:
    """Calls of a kernel with maps; `shrinks` and `expands` are the parameters they got."""

    def __init__(self, monkeypatch) -> None:
        monkeypatch.setattr(eager, "fill", fill_by_torch)
        sizes = (2, W.rank, W.in_features, W.out_features, STACK_SLOTS)
        self.driver = fake_driver.install(monkeypatch, sizes, 16)
        self.shrinks: list[dict] = []
        self.expands: list[dict] = []
        self.driver.mapped, self.driver.plain = self.shrinks.append, self.expands.append
        choice = Choice("key", "fake", 0, None, mapped_kernel(), "")
        monkeypatch.setattr(sources, "choose", lambda *_: choice)
        self.a, self.b = stacks(STACK_SLOTS, W.rank, W.in_features, W.out_features, torch.bfloat16)
        self.y = rows(TOKENS, W.in_features, W.total_out, torch.bfloat16)[1]
        ids = torch.arange(TOKENS, dtype=torch.int32) % SLOTS
        self.plan = ops.segment_plan(ids, slots=SLOTS)

    def x(self) -> torch.Tensor:
        return torch.zeros(TOKENS, W.in_features, dtype=torch.bfloat16)

    def check(self, x: torch.Tensor, a: list[torch.Tensor]) -> None:
        """The last call's kernel got maps of these tensors."""
        first = 3 * (len(self.shrinks) - 1)
        got = self.shrinks[-1]
        tensors = (x, *a)
        dims = ((64, TOKENS, 1), (64, 24, SLOTS), (64, 24, SLOTS))
        for i, (name, tensor, size, box) in enumerate(
            zip(MAPS, tensors, dims, (16, 8, 8), strict=True)
        ):
            at = tensor.data_ptr()
            assert got[name] == (first + i, at, *range(14))
            assert self.driver.maps[first + i] == {
                "aligned": True,
                "kind": 9,
                "axes": 3,
                "address": at,
                "dims": size,
                "strides": (128, 128 * size[1]),
                "box": (64, box, 1),
                "steps": (1, 1, 1),
                "flags": (0, 3, 3, 0),
            }
        assert (got["x"], got["tokens"]) == (x.data_ptr(), TOKENS)


@pytest.fixture(params=fake_driver.WAYS)
def world(request, monkeypatch):
    fake_driver.choose_way(monkeypatch, request.param)
    yield World(monkeypatch)
    launch.forget()


def refuse(*_):
    raise AssertionError("the long path")


def test_every_call_makes_the_maps_of_its_tensors(world, monkeypatch):
    others = stacks(STACK_SLOTS, W.rank, W.in_features, W.out_features, torch.bfloat16, seed=3)
    kept = []
    for a, b in ((world.a, world.b), others):  # the first call of each is a long one
        kept.append(world.x())
        ops.add_lora(world.y, kept[-1], a, b, world.plan)
        world.check(kept[-1], a)
    monkeypatch.setattr(eager, "add_lora", refuse)
    for (a, b), _ in itertools.product(((world.a, world.b), others), range(3)):
        kept.append(world.x())
        ops.add_lora(world.y, kept[-1], a, b, world.plan)
        world.check(kept[-1], a)
    assert len(world.expands) == len(world.shrinks) == len(kept) == 8
    assert len({x.data_ptr() for x in kept}) == 8
    assert world.expands[-1]["y"] == world.y.data_ptr()


def test_a_refused_map_is_an_error_and_nothing_is_launched(world, monkeypatch):
    x = world.x()
    ops.add_lora(world.y, x, world.a, world.b, world.plan)
    world.driver.map_code = 1
    for path in (eager.add_lora, refuse):
        monkeypatch.setattr(eager, "add_lora", path)
        with pytest.raises(CudaError, match="cuTensorMapEncodeTiled") as error:
            ops.add_lora(world.y, x, world.a, world.b, world.plan)
        assert error.value.code == 1
    assert len(world.driver.launches) == 2
    world.driver.map_code, world.driver.code = 0, 1
    with pytest.raises(CudaError, match="cuLaunchKernelEx"):
        ops.add_lora(world.y, x, world.a, world.b, world.plan)


def test_pieces_make_their_own_maps(world):
    checked = eager.checked_stacks(world.x(), world.a, world.b, world.plan)
    block = eager.block_for(checked.shape, world.plan)
    assert block.is_pair
    x = world.x()
    words = checked.words, bytes(48)
    shrink, expand = block.pieces(5)
    assert shrink.run(x.data_ptr(), 0, *words) == 0
    world.check(x, world.a)
    assert expand.run(0, world.y.data_ptr(), *words) == 0
    assert len(world.driver.maps) == 3
    assert [stream for _, _, stream, _ in world.driver.launches] == [5, fake_driver.STREAM]


FUSED_MAPS = ("x_box48", "a_box24", "a1_box24", "b_box64", "b1_box64", "y_box24")
FUSED = Launch(
    *("mapped", ("tiles * 4", "1", "1"), (32, 1, 12), 0),
    ("row_index", "tile_rank", "tile_slot", "y", "x", *FUSED_MAPS),
    dependent=True,
)


def test_one_kernel_gets_maps_of_all_tensors(world, monkeypatch):
    """And no workspace; y is another one in every call."""
    kernel = DeviceKernel("fused", "test", "", 48, (FUSED,), (), lambda: b"cubin")
    choice = Choice("key", "fake", 0, None, kernel, "")
    monkeypatch.setattr(sources, "choose", lambda *_: choice)
    launch.forget()
    kept = []
    for path in (eager.add_lora, refuse, refuse):
        monkeypatch.setattr(eager, "add_lora", path)
        x, y = world.x(), world.y.clone()
        kept.append((x, y))
        ops.add_lora(y, x, world.a, world.b, world.plan)
        first, got = 6 * (len(world.shrinks) - 1), world.shrinks[-1]
        tensors = (x, *world.a, *world.b, y)
        dims = (64, TOKENS, 1), *((64, 24, SLOTS),) * 2, *((24, n, SLOTS) for n in W.out_features)
        boxes = (48, 24, 24, 64, 64, 24)
        every = zip(FUSED_MAPS, tensors, (*dims, (W.total_out, TOKENS, 1)), boxes, strict=True)
        for i, (name, tensor, size, box) in enumerate(every):
            assert got[name] == (first + i, tensor.data_ptr(), *range(14))
            made = world.driver.maps[first + i]
            assert (made["dims"], made["box"]) == (size, (64, box, 1))
            assert made["strides"] == (2 * size[0], 2 * size[0] * size[1])
        assert (got["x"], got["y"]) == (x.data_ptr(), y.data_ptr())
        assert got["row_index"] == world.plan.table("row_index").data_ptr()
        assert got["tile_slot"] == world.plan.table("tile_slot", 48).data_ptr()
    assert len(world.shrinks) == 3
    assert not world.expands
    tiles = world.plan.table("tile_slot", 48).shape[0]
    assert world.driver.launches[-1][1][:6] == (4 * tiles, 1, 1, 32, 1, 12)


def test_kernels_with_maps_may_have_large_clusters(monkeypatch):
    done: list[tuple] = []
    function = SimpleNamespace(
        attribute=lambda which: 0,
        allow_dynamic_smem=lambda size: done.append(("smem", size)),
        allow_large_clusters=lambda: done.append(("clusters",)),
        handle=SimpleNamespace(value=5),
    )
    monkeypatch.setattr(cuda_driver, "Function", lambda module, name: function)
    driver = object.__new__(launch.Driver)
    for one in (EXPAND, SHRINK, FUSED):
        assert driver._function(ctypes.c_void_p(1), one) == 5
    assert done == [("clusters",)] * 2


def test_a_driver_without_maps_refuses_the_kernel(world):
    world.driver.encode, world.driver.encode_entry = None, 0
    with pytest.raises(ExportError, match=r"mapped of test .*CUDA 12.*Update"):
        ops.add_lora(world.y, world.x(), world.a, world.b, world.plan)


def test_a_pack_s_kernel_with_maps_is_passed_over_where_it_cannot_run(monkeypatch):
    from test_ops_sources import GPU, SHAPE, Pack, match, ready

    from dop import packs

    pack = Pack()
    for info in pack.kernels:
        object.__setattr__(info, "launches", (SHRINK, EXPAND))
    monkeypatch.setattr(sources, "gpu", lambda device: GPU)
    monkeypatch.setattr(packs, "find", lambda *args: (match(pack),))
    monkeypatch.setattr(sources, "optional", lambda module, name: lambda search: ready("generic"))
    monkeypatch.setattr(sources, "_KERNELS", {})
    for encode, room, name in ((None, True, "generic"), (1, False, "generic"), (1, True, "small")):
        sources.forget()
        monkeypatch.setattr(launch, "driver", lambda encode=encode: SimpleNamespace(encode=encode))
        monkeypatch.setattr(launch, "has_room", lambda kernel, device, room=room: room)
        choice = sources.choose(SHAPE, 4, 8, None)
        assert choice.name == name
        assert ("CUDA 12" in "".join(choice.passed_over)) == (encode is None)
        assert ("larger clusters" in "".join(choice.passed_over)) == (not room)
    sources.forget()


class Occupancy:
    """A driver that knows one kernel's cluster, and how many of it run at once."""

    def __init__(self, width: int, at_once: int, code: int = 0) -> None:
        self.width, self.at_once, self.code = width, at_once, code
        self.asked: list[tuple] = []

    def cuFuncGetAttribute(self, out, which, function):
        assert (which, function.value) == (cuda_driver.REQUIRED_CLUSTER_WIDTH, 5)
        out._obj.value = self.width
        return 0

    def cuOccupancyMaxActiveClusters(self, out, function, config):
        config = config._obj
        (attribute,) = config.attributes[: config.attribute_count]
        assert attribute.kind == cuda_driver.CLUSTER_DIMENSION
        self.asked.append(
            (*config.grid, *config.block, config.smem_bytes, *attribute.value[:3], function.value)
        )
        out._obj.value = self.at_once
        return self.code


@pytest.mark.parametrize(
    ("driver", "room", "asked"),
    [
        (Occupancy(8, 0), True, False),
        (Occupancy(16, 7), True, True),
        (Occupancy(16, 0), False, True),
        (Occupancy(16, 0, code=1), True, True),  # it cannot tell
        (SimpleNamespace(), True, False),
    ],
)
def test_room_for_clusters(monkeypatch, driver, room, asked):
    monkeypatch.setattr(cuda_driver, "driver", lambda: driver)
    one = Launch("fused", ("tiles * 16", "1", "1"), (32, 1, 12), 1000, ("y", "y_box16"))
    kernel = DeviceKernel("fused", "test", "test", 16, (one,), (), lambda: b"fused")
    monkeypatch.setattr(launch, "functions_of", lambda kernel, device: [5])
    mine = object.__new__(launch.Driver)
    mine.ensure_context = lambda device: None
    monkeypatch.setattr(launch, "driver", lambda: mine)
    assert launch.has_room(kernel, 0) == room
    want = [(16, 1, 1, 32, 1, 12, 1000, 16, 1, 1, 5)]
    assert getattr(driver, "asked", []) == (want if asked else [])


needs_extension = pytest.mark.skipif(native.EXTENSION is None, reason=fake_driver.NO_EXTENSION)


@needs_extension
@pytest.mark.parametrize(
    ("encode", "figures"),
    [
        (0, [15, 0, 0, 9, 64, 8, 1, 8]),  # no entry point
        (1, [15, 0, 0, 9, 64, 8, 1]),
        (1, [14, 0, 0, 9, 64, 8, 1, 8]),  # over what is not a map's
        (1, [16, 0, 0, 9, 64, 8, 1, 8]),  # beyond the area
        (1, [1 << 63, 0, 0, 9, 64, 8, 1, 8]),
        (1, [15, 31, 0, 9, 64, 8, 1, 8]),
        (1, [15, 0, 31, 9, 64, 8, 1, 8]),
    ],
    ids=str,
)
def test_a_map_that_would_leave_the_area_is_refused(encode, figures):
    data = b"".join(n.to_bytes(8, "little") for n in figures)
    with pytest.raises(ValueError, match="map"):
        native.EXTENSION.Call(1, 0, bytes(128), (), 16, 1, 1, 1, encode, data)


@needs_extension
def test_a_map_may_fill_the_area():
    data = b"".join(n.to_bytes(8, "little") for n in [15, 0, 0, 9, 64, 8, 1, 8])
    native.EXTENSION.Call(1, 0, bytes(128), (), 16, 1, 1, 1, 1, data)
