"""Where kernels come from: the order of the sources, the memory of choices, the no-JIT switch."""

from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from dop import ops, packs
from dop.errors import BuildError, MissingKernelError
from dop.export.index import KernelInfo
from dop.measure.artifact import Launch
from dop.ops import eager, launch, sources
from dop.ops.launch import DeviceKernel
from dop.ops.shapes import shape_of
from dop.workload import Workload

WORKLOAD = Workload("o", 64, (64,), 16, "bfloat16")
SHAPE = shape_of(64, (64,), 16, torch.bfloat16, 0)
GPU = ("NVIDIA Test", "sm_90")


class Pack:
    """A pack with two kernels: for up to 8 tokens, and above."""

    path = Path("/packs/test.doppack")
    table = SimpleNamespace(device_name="NVIDIA Test")

    def __init__(self, tile_rows=16):
        common = (WORKLOAD, "trace", "file", "", tile_rows, (), (), ())
        self.kernels = [KernelInfo("small", *common), KernelInfo("large", *common)]
        self.asked = []

    def choose(self, key, tokens, adapters, slots):
        assert key == WORKLOAD.key == SHAPE.key
        self.asked.append((tokens, adapters, slots))
        return self.kernels[tokens > 8]

    def binary(self, info):
        return info.name.encode()


@pytest.fixture
def world(monkeypatch):
    """No GPU needed: what packs are found, and what NVRTC and the generic kernels answer."""
    state = SimpleNamespace(matches=[], nvrtc=None, generic=None)

    def optional(module, name):
        return state.nvrtc if module == "dop.ops.nvrtc" else state.generic

    monkeypatch.setattr(sources, "gpu", lambda device: GPU)
    monkeypatch.setattr(packs, "find", lambda *args: tuple(state.matches))
    monkeypatch.setattr(sources, "optional", optional)
    monkeypatch.setattr(sources, "_KERNELS", {})
    sources.forget()
    yield state
    sources.forget()


def match(pack, how=packs.Match.DEVICE, note=""):
    return SimpleNamespace(
        how=how, note=note, library=lambda: pack, entry=SimpleNamespace(path=pack.path)
    )


def ready(name):
    return DeviceKernel(name, name, "because", 0, (), (), lambda: b"")


def test_a_pack_decides_and_the_choice_is_remembered(world):
    pack = Pack()
    world.matches = [match(pack, note="a sibling")]
    one = sources.choose(SHAPE, 4, 8, 2)
    assert (one.name, one.origin) == ("small", "/packs/test.doppack")
    assert one.kernel.image() == b"small"
    assert "2 rows a segment" in one.reason
    assert "a sibling" in one.reason
    assert sources.choose(SHAPE, 4, 8, 2) is one
    assert pack.asked == [(4, 2, 8)]
    assert sources.choose(SHAPE, 9, 8, None).name == "large"
    assert sources.choose(SHAPE, 5, 8, 2).kernel is one.kernel


def test_order_of_sources(world):
    world.generic = lambda search: ready("generic")
    assert sources.choose(SHAPE, 4, 8, None).name == "generic"
    world.matches = [match(Pack(), packs.Match.SOURCE)]
    world.nvrtc = lambda search: ready("nvrtc")
    sources.forget()
    assert sources.choose(SHAPE, 4, 8, None).name == "nvrtc"
    world.matches.append(match(Pack()))
    sources.forget()
    assert sources.choose(SHAPE, 4, 8, None).name == "small"


def test_a_failed_build_falls_back_and_says_so(world):
    def broken(search):
        raise BuildError("no headers.")

    world.matches = [match(Pack(), packs.Match.SOURCE)]
    world.nvrtc, world.generic = broken, lambda search: ready("generic")
    choice = sources.choose(SHAPE, 4, 8, None)
    assert choice.name == "generic"
    assert "no headers" in str(choice)


def test_without_jit_what_needs_a_build_raises(world):
    world.matches = [match(Pack(), packs.Match.SOURCE)]
    world.nvrtc, world.generic = lambda search: ready("nvrtc"), lambda search: ready("generic")
    assert sources.choose(SHAPE, 4, 8, None).name == "nvrtc"
    with ops.allow_jit(False), pytest.raises(MissingKernelError) as caught:
        sources.choose(SHAPE, 4, 8, None)
    text = str(caught.value)
    for part in (SHAPE.key, "NVIDIA Test", "sm_90", str(packs.SHIPPED), "DOP_JIT=1"):
        assert part in text
    world.matches = []
    with ops.allow_jit(False):
        sources.forget()
        assert sources.choose(SHAPE, 4, 8, None).name == "generic"


def test_nothing_at_all_names_what_was_searched(world):
    with pytest.raises(MissingKernelError, match=r"no pack with this shape.*no generic kernels"):
        sources.choose(SHAPE, 4, 8, None)


def test_a_pack_with_other_tiles_is_passed_over(world):
    world.matches = [match(Pack(tile_rows=24))]
    world.generic = lambda search: ready("generic")
    choice = sources.choose(SHAPE, 4, 8, None)
    assert choice.name == "generic"
    assert "24 rows" in choice.passed_over[0]


def test_switches_restore():
    before = bool(sources.JIT)
    with ops.allow_jit(not before):
        assert bool(sources.JIT) is not before
    assert bool(sources.JIT) is before


def test_an_explained_choice_is_made_on_its_own_gpu(world, monkeypatch):
    """A kernel may be loaded to see whether the GPU has room for it: not into another one's
    context."""
    current = [0]

    @contextmanager
    def guard(device):
        before, current[0] = current[0], device
        yield
        current[0] = before

    def has_room(kernel, device):
        assert device == current[0] == 1
        return True

    pack = Pack()
    for info in pack.kernels:
        one = Launch("k", ("tiles", "1", "1"), (32, 1, 1), 0, ("x_box16",))
        object.__setattr__(info, "launches", (one,))
    world.matches = [match(pack)]
    monkeypatch.setattr(eager, "device_guard", guard)
    monkeypatch.setattr(launch, "has_room", has_room)
    monkeypatch.setattr(launch, "driver", lambda: SimpleNamespace(encode=1))
    choice = ops.explain_choice(WORKLOAD.key, tokens=4, adapters=2, device="cuda:1")
    assert choice.name == "small"
    assert current == [0]
