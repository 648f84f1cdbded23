"""The short path of add_lora: never a stale address, nothing leaks, and the build is optional."""

from __future__ import annotations

import ctypes
import gc
import os
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import fake_driver
import pytest
import torch
from sgmv_reference import reference, rows, stacks

from dop import ops
from dop.errors import DopError, ShapeError
from dop.measure.cuda_driver import CudaError
from dop.ops import api, eager, native, short
from dop.ops.stacks import STACKS

ROOT = Path(__file__).parents[2]
SLOTS, RANK, WIDTH, OUTS = 4, 8, 16, (8, 4)
IDS = [1, -1, 3, 0, 0, 2]
needs_extension = pytest.mark.skipif(not native.reads_tensors(), reason=fake_driver.NO_EXTENSION)


@pytest.fixture(params=fake_driver.WAYS)
def case(request, monkeypatch):
    fake_driver.choose_way(monkeypatch, request.param)
    return prepare(monkeypatch)


def prepare(monkeypatch):
    driver = fake_driver.install(monkeypatch, (len(OUTS), RANK, WIDTH, OUTS, SLOTS), 0)
    a, b = stacks(SLOTS, RANK, WIDTH, OUTS)
    x, y = rows(len(IDS), WIDTH, sum(OUTS))
    plan = ops.segment_plan(torch.tensor(IDS, dtype=torch.int32), slots=SLOTS)
    ops.add_lora(y.clone(), x, a, b, plan)
    return driver, a, b, x, y, plan


def near(got, want):
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-5)


def is_short(y, x, a, b, plan, scale=1.0, ranks=None):
    return api._short_path(y, x, a, b, plan, scale, ranks)


def test_lists_tuples_and_single_tensors(case):
    _, a, b, x, y, plan = case
    assert is_short(y.clone(), x, a, tuple(b), plan)
    assert not is_short(y.clone(), x, a, b[:1], plan)
    assert not is_short(y.clone(), x, a[:1], b, plan)
    assert not is_short(y.clone(), x, a * 2, b * 2, plan)
    assert not is_short(y.clone(), x, [], [], plan)
    assert not is_short(y.clone(), x, iter(a), iter(b), plan)


@pytest.mark.parametrize("side", [0, 1])
@pytest.mark.parametrize("one", [0, 1])
@pytest.mark.parametrize("how", ["data", "set", "grown", "item"])
def test_weights_that_moved(case, side, one, how):
    _, a, b, x, y, plan = case
    target = (a, b)[side]
    new = torch.randn_like(target[one])
    if how == "data":
        target[one].data = new
    elif how == "set":
        target[one].set_(new)
    elif how == "grown":
        size = target[one].shape
        target[one].resize_(100, *size[1:]).normal_()
    else:
        target[one] = new
    if how == "grown":  # the other stacks hold fewer slots now
        with pytest.raises(ShapeError):
            ops.add_lora(y.clone(), x, a, b, plan)
        return
    near(ops.add_lora(y.clone(), x, a, b, plan), reference(y, x, a, b, IDS))
    assert is_short(y.clone(), x, a, b, plan)


@pytest.mark.parametrize("change", ["transposed", "fewer_slots", "other_shape"])
def test_weights_whose_shape_changed_in_place(case, change):
    """The address is the same as before."""
    _, a, b, x, y, plan = case
    before = a[0].data_ptr()
    if change == "transposed":
        a[0].transpose_(1, 2)
    elif change == "fewer_slots":
        a[0].resize_(SLOTS - 1, RANK, WIDTH)
    else:
        a[0].resize_(SLOTS, WIDTH, RANK)
    assert a[0].data_ptr() == before
    assert not is_short(y.clone(), x, a, b, plan)
    with pytest.raises(ShapeError):
        ops.add_lora(y.clone(), x, a, b, plan)


def test_the_same_rows_elsewhere(case):
    _, a, b, x, y, plan = case
    for _ in range(3):
        x.data, y.data = torch.randn_like(x), torch.randn_like(y)
        want = reference(y, x, a, b, IDS)
        assert is_short(y, x, a, b, plan)
        near(y, want)
    x.set_(torch.randn(len(IDS) * WIDTH).view(len(IDS), WIDTH))
    want = reference(y, x, a, b, IDS)
    assert is_short(y, x, a, b, plan)
    near(y, want)


def unfit_rows(x, y):
    tokens = len(IDS)
    yield x[:-1], y
    yield x, y[:-1]
    yield x.T.contiguous().T, y
    yield x, y.T.contiguous().T
    yield x.double(), y
    yield x.half(), y.half()
    yield x, y.double()
    yield torch.randn(tokens * WIDTH + 1)[1:].view(tokens, WIDTH), y
    yield x, torch.randn(tokens * sum(OUTS) + 1)[1:].view(tokens, -1)
    yield x.view(-1), y
    yield x.view(tokens, 1, WIDTH), y
    yield torch.nn.Parameter(x, requires_grad=False), y
    yield x, None
    yield 3, y


def test_rows_that_do_not_fit_launch_nothing(case):
    driver, a, b, x, y, plan = case
    driver.launches.clear()
    for wrong_x, wrong_y in unfit_rows(x, y):
        assert not is_short(wrong_y, wrong_x, a, b, plan)
    assert not driver.launches


def test_surroundings_that_want_the_long_path(case, monkeypatch):
    driver, a, b, x, y, plan = case
    driver.launches.clear()
    with torch.enable_grad():
        for tensor in (x, y, a[1], b[0]):
            tensor.requires_grad_(True)
            assert not is_short(y, x, a, b, plan)
            tensor.requires_grad_(False)
    with ops.checked():
        assert not is_short(y, x, a, b, plan)
    for facts in ({"capturing": True}, {"current_device": 1}):
        with monkeypatch.context() as changed:
            fake_driver.set_surroundings(changed, **facts)
            assert not is_short(y, x, a, b, plan)
    more = ops.segment_plan(torch.tensor(IDS, dtype=torch.int32), slots=SLOTS + 1)
    more.batch = plan.batch
    assert not is_short(y, x, a, b, more)
    assert not is_short(y, x, a, b, None)
    assert not driver.launches
    assert is_short(y, x, a, b, plan)


def test_a_dispatch_mode_sees_the_call(case):
    from torch.utils._python_dispatch import TorchDispatchMode

    _, a, b, x, y, plan = case
    seen = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(str(func))
            return func(*args, **(kwargs or {}))

    with Watch():
        ops.add_lora(y, x, a, b, plan)
    assert any("dop.add_lora" in name for name in seen)


def test_an_error_of_the_call_is_the_callers(case):
    _, a, b, x, y, plan = case
    with pytest.raises(DopError):
        is_short(y, x, a, b, plan, ranks=[1])
    with pytest.raises(DopError):
        is_short(y, x, a, b, plan, scale=[1.0])


class Bad:
    """A plan whose attributes fail."""

    def __init__(self, plan, name, error):
        self._plan, self._name, self._error = plan, name, error

    def __getattr__(self, name):
        if name == self._name:
            raise self._error("planted")
        return getattr(self._plan, name)


@pytest.mark.parametrize("name", ["batch", "slots", "words"])
def test_errors_on_the_way(case, name):
    _, a, b, x, y, plan = case
    assert is_short(y, x, a, b, Bad(plan, "", KeyError))
    assert not is_short(y, x, a, b, Bad(plan, name, AttributeError))
    with pytest.raises(RuntimeError, match="planted"):
        is_short(y, x, a, b, Bad(plan, name, RuntimeError))


def allocated():
    gc.collect()
    return sys.getallocatedblocks()


def counts(objects):
    return [sys.getrefcount(one) for one in objects]


@needs_extension
def test_a_hundred_thousand_calls_leave_nothing_behind(monkeypatch):
    yields = ctypes.CDLL(None).sched_yield  # takes nothing, answers 0
    real = fake_driver.FakeDriver.__init__

    def init(self, sizes):
        real(self, sizes)
        self.entry = ctypes.cast(yields, ctypes.c_void_p).value

    monkeypatch.setattr(fake_driver.FakeDriver, "__init__", init)
    _, a, b, x, y, plan = prepare(monkeypatch)
    call = api._short_path
    wide = torch.randn(len(IDS), WIDTH + 1)[:, 1:]
    bad, worse = Bad(plan, "words", AttributeError), Bad(plan, "slots", RuntimeError)
    native_weights = STACKS[id(a[0])].native
    objects = (x, y, *a, *b, a, b, plan, native_weights, plan.words[0], wide, None, native.CAPSULE)

    def fails():
        with pytest.raises(RuntimeError):
            call(y, x, a, b, worse, 1.0, None)

    def many(times):
        for _ in range(times):
            call(y, x, a, b, plan, 1.0, None)
        for _ in range(times // 20):
            call(y, wide, a, b, plan, 1.0, None)
            call(y, x, a, b, bad, 1.0, None)
            call(y, x, a, wide, plan, 1.0, None)
            call(y, x, a, b, plan, 2.0, None)
        for _ in range(times // 50):
            fails()

    many(1000)
    gc.collect()  # what other tests left behind holds None thousands of times
    before, blocks, grown = counts(objects), allocated(), []
    for _ in range(4):
        many(25_000)
        blocks, last = allocated(), blocks
        grown.append(blocks - last)
    assert min(grown) < 200, grown  # what other tests left behind may end meanwhile
    for name, had, has in zip(objects, before, counts(objects), strict=True):
        # Everybody holds None; the rarest of these calls is made 2,000 times.
        assert abs(has - had) < (1000 if name is None else 50), type(name)


@needs_extension
def test_prepared_calls_are_freed():
    def many(times):
        for _ in range(times):
            native.EXTENSION.Call(*call_arguments())
            with pytest.raises(ValueError, match="outside"):
                native.EXTENSION.Call(*call_arguments(places=(17,)))
        return allocated()

    found = [many(100), many(10_000), many(10_000)]
    assert min(found[1] - found[0], found[2] - found[1]) < 200


def call_arguments(entry=1, fixed=bytes(16), figures=(1,) * 7, places=(0, 16), **rest):
    one = (
        rest.get("function", 5),
        struct.pack(f"={len(figures)}I", *figures),
        True,
        struct.pack(f"={len(places)}I", *places),
    )
    return entry, 0, fixed, rest.get("launches", (one,)), 0, 1, 1, 1


@needs_extension
@pytest.mark.parametrize(
    "wrong",
    [
        {"entry": 0},
        {"fixed": bytes(9)},
        {"fixed": bytes(8 << 13)},
        {"figures": (1,) * 6},
        {"places": (17,)},
        {"places": (1 << 31,)},
        {"places": (0,) * 2000},
        {"launches": [1]},
        {"launches": (1,)},
        {"launches": ((1, 2, 3),)},
    ],
    ids=str,
)
def test_a_call_that_would_leave_its_area_is_refused(wrong):
    with pytest.raises((ValueError, TypeError)):
        native.EXTENSION.Call(*call_arguments(**wrong))


@needs_extension
def test_wrong_arguments_of_a_prepared_call():
    call = native.EXTENSION.Call(*call_arguments(launches=()))
    assert call.run(1 << 63, 2, bytes(48), bytes(24)) == 0
    for wrong in (
        (1, 2, bytes(48)),
        (1, 2, bytes(47), b""),
        (1, 2, bytes(48), bytes(49)),
        (1, 2, "", b""),
        (1, 2, bytes(48), None),
        (-1, 2, bytes(48), b""),
        (1.5, 2, bytes(48), b""),
        (1, 1 << 64, bytes(48), b""),
    ):
        with pytest.raises((ValueError, TypeError, OverflowError)):
            call.run(*wrong)


@needs_extension
def test_wrong_arguments_of_weights_and_short():
    a = torch.zeros(2, 4, 8)
    weights, fine = native.EXTENSION.Weights, (native.CAPSULE, torch.Tensor, 0, -1, 2, bytes(48))
    weights(*fine, (a, a))
    for wrong in (
        (*fine, (a,)),
        (*fine, (a,) * 8),
        (*fine, (a, 3)),
        (*fine, (a, torch.zeros(()))),
        (*fine, (a, torch.zeros(1, 1, 1, 1, 1))),
        (*fine[:5], bytes(40), (a, a)),
        (None, *fine[1:], (a, a)),
    ):
        with pytest.raises((ValueError, TypeError)):
            weights(*wrong)
    for wrong in ((), (native.CAPSULE,), (None,) * 13, (native.CAPSULE, *(None,) * 12)):
        with pytest.raises((ValueError, TypeError)):
            native.EXTENSION.Short(*wrong)
    with pytest.raises(TypeError):
        short.short_path(short.Surroundings())(1, 2)


@needs_extension
def test_an_error_code_of_the_driver_in_the_compiled_path(monkeypatch):
    driver, a, b, x, y, plan = prepare(monkeypatch)
    driver.code = 719
    with pytest.raises(CudaError) as raised:
        is_short(y, x, a, b, plan)
    assert raised.value.code == 719


def test_a_driver_without_the_new_entry_point_is_served_by_ctypes(monkeypatch):
    real = fake_driver.FakeDriver.__init__

    def init(self, sizes):
        real(self, sizes)
        self.entry = 0

    monkeypatch.setattr(fake_driver.FakeDriver, "__init__", init)
    driver, a, b, x, y, plan = prepare(monkeypatch)
    near(ops.add_lora(y.clone(), x, a, b, plan), reference(y, x, a, b, IDS))
    assert len(driver.launches) == 4


def test_old_torch_still_launches_compiled(monkeypatch):
    monkeypatch.setattr(native, "CAPSULE", None)
    driver, a, b, x, y, plan = prepare(monkeypatch)
    monkeypatch.setattr(eager, "add_lora", None)
    near(ops.add_lora(y.clone(), x, a, b, plan), reference(y, x, a, b, IDS))
    assert len(driver.launches) == 4


def test_the_switch(monkeypatch):
    monkeypatch.setenv("DOP_NATIVE", "0")
    assert native._extension() is None
    monkeypatch.setenv("DOP_NATIVE", "1")
    assert native._extension() is native.EXTENSION
    assert native.description()


def build(tmp_path, **environment):
    """build_ext in a copy of what it needs; its output, and the binaries."""
    (tmp_path / "dop/ops").mkdir(parents=True)
    for name in ("setup.py", "dop/ops/_launch.c"):
        shutil.copy(ROOT / name, tmp_path / name)
    done = subprocess.run(
        [sys.executable, "setup.py", "-q", "build_ext", "--inplace"],
        cwd=tmp_path,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stderr, sorted(path.name for path in tmp_path.glob("dop/ops/*.so"))


def test_no_compiler_is_no_failure(tmp_path):
    said, found = build(tmp_path, CC="/no/such/compiler")
    assert found == []
    assert len(said.strip().splitlines()) <= 2, said


@pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler")
def test_one_binary_for_every_python(tmp_path):
    said, found = build(tmp_path, CFLAGS="-Wall -Wextra -Werror -Wno-cast-function-type")
    assert found == ["_launch.abi3.so"], said


def test_parameters_and_inference_tensors_stay_short(case):
    _, a, b, x, y, plan = case
    with torch.no_grad():
        learnt = [[torch.nn.Parameter(t.clone()) for t in side] for side in (a, b)]
        ops.add_lora(y.clone(), x, *learnt, plan)
        assert is_short(y.clone(), x, *learnt, plan)
    with torch.inference_mode():
        inside = torch.randn_like(x)
        got, want = y.clone(), reference(y, inside, a, b, IDS)
        assert is_short(got, inside, a, b, plan)
    near(got, want)


def test_a_tensor_without_memory_is_an_error(case):
    _, a, b, x, y, plan = case
    driver = case[0]
    driver.launches.clear()
    with pytest.raises((RuntimeError, DopError)):
        torch.vmap(lambda one: ops.add_lora(y, one, a, b, plan))(torch.stack([x, x]))
    assert not driver.launches
    nothing = torch.empty_like(x, device="meta")
    with pytest.raises(DopError):
        ops.add_lora(y, nothing, a, b, plan)
    assert not driver.launches


def test_swapped_rows(case):
    _, a, b, x, y, plan = case
    torch.utils.swap_tensors(x, torch.randn_like(x))
    want = reference(y, x, a, b, IDS)
    assert is_short(y, x, a, b, plan)
    near(y, want)
