"""The loader of the generic kernels and its calls into a driver that only takes notes."""

from __future__ import annotations

import ctypes

import pytest

from dop.errors import ConfigError
from dop.measure import cuda_driver
from dop.ops.generic import loader, plan


class NotingDriver:
    """Answers every driver call with success, and keeps what was asked."""

    def __init__(self):
        self.calls = []
        self.attributes = {75: 8, 76: 9, 16: 58}

    def __getattr__(self, name):
        if not name.startswith("cu"):
            raise AttributeError(name)

        def call(*arguments):
            self.calls.append((name, arguments))
            if name == "cuDeviceGetAttribute":
                arguments[0]._obj.value = self.attributes[arguments[1]]
            if name in ("cuModuleLoadData", "cuModuleGetFunction", "cuDevicePrimaryCtxRetain"):
                arguments[0]._obj.value = 0x1000 + len(self.calls)
            return 0

        return call

    def names(self):
        return [name for name, _ in self.calls]


class Launches:
    """Stands for cuLaunchKernel; answers with the codes given, then with success."""

    def __init__(self, codes=()):
        self.codes, self.seen = list(codes), []

    def __call__(self, handle, *rest):
        struct = bytes(loader.PARAMETERS.buffer)
        self.seen.append((handle, rest[:8], struct))
        return self.codes.pop(0) if self.codes else 0


@pytest.fixture
def driver(monkeypatch):
    fake = NotingDriver()
    monkeypatch.setattr(cuda_driver, "driver", lambda: fake)
    loader.device.cache_clear()
    yield fake
    loader.device.cache_clear()


def fill(**changes):
    arguments = {
        "tables": 4096, "ids": 64, "ids_are_64_bit": True, "tokens": 200, "slots": 70,
        "ordinal": 0, "stream": 5, "ranks": 7, "scale": 0.5,
    }  # fmt: skip
    plan.fill_plan(**(arguments | changes))


def test_a_plan_is_one_launch_with_its_parameters(driver, monkeypatch):
    launches = Launches()
    monkeypatch.setattr(loader, "_launcher", lambda: launches)
    fill()
    fill(tokens=100)
    assert driver.names().count("cuModuleLoadData") == 1
    (_, shape, struct), (_, second, _) = launches.seen
    assert shape == (1, 1, 1, 256, 1, 1, plan.shared_bytes(200, 256), 5)
    assert second[3] == 128
    values = plan.PLAN_PARAMS.unpack_from(struct)
    assert values == (64, 7, 0, 4096, 1, 200, 70, plan.ANY_RANK, 0.5)


def test_a_fence_is_a_launch_that_has_nothing_to_do(driver, monkeypatch):
    launches = Launches()
    monkeypatch.setattr(loader, "_launcher", lambda: launches)
    fill()
    plan.fence(0, 5)
    (handle, shape, struct) = launches.seen[1]
    assert handle != launches.seen[0][0]
    assert shape == (1, 1, 1, 32, 1, 1, 0, 5)
    assert plan.ANNOTATE_PARAMS.unpack_from(struct) == (0, 0, 0, 0, 0, 0, 1.0)


def test_the_binary_is_the_devices(driver, monkeypatch):
    read = []
    monkeypatch.setattr(loader, "read_binary", lambda unit, name: read.append((unit, name)) or b"")
    device = loader.device(0)
    device.kernel("plan", "dop_plan", 99 << 10)
    device.kernel("plan", "dop_plan", 99 << 10)
    device.kernel("plan", "dop_plan_annotate")
    assert read == [("plan", "sm_89")]
    assert device.multiprocessors == 58
    allowed = [a for name, a in driver.calls if name == "cuFuncSetAttribute"]
    assert [arguments[2] for arguments in allowed] == [99 << 10]
    assert driver.names().count("cuCtxPushCurrent_v2") == driver.names().count("cuCtxPopCurrent_v2")


@pytest.mark.parametrize("code", [201, 400])
def test_another_context_is_left_as_it_was(driver, monkeypatch, code):
    launches = Launches([code])
    monkeypatch.setattr(loader, "_launcher", lambda: launches)
    fill()
    assert len(launches.seen) == 2
    assert driver.names()[-1] == "cuCtxPopCurrent_v2"


def test_a_refused_launch_is_named(driver, monkeypatch):
    monkeypatch.setattr(loader, "_launcher", lambda: Launches([701]))
    with pytest.raises(cuda_driver.CudaError, match="dop_plan"):
        fill()


@pytest.mark.usefixtures("driver")
def test_nothing_is_launched_for_no_tokens(monkeypatch):
    monkeypatch.setattr(loader, "_launcher", None)
    fill(tokens=0)


@pytest.mark.parametrize("changes", [{"tokens": (1 << 19) + 1}, {"slots": 65_536}])
def test_what_is_too_large_is_named(changes):
    with pytest.raises(ConfigError, match="split"):
        fill(**changes)


def test_parameters_are_as_large_as_the_structs():
    assert plan.PLAN_PARAMS.size == 56
    assert plan.ANNOTATE_PARAMS.size == 48
    assert ctypes.sizeof(loader.PARAMETERS.buffer) >= plan.PLAN_PARAMS.size


def test_shared_memory_fits_every_gpu():
    static = 6 * 32 * 4
    for tokens in (1, 128, 1024, 16_384, 16_385, plan.MAX_TOKENS):
        for slots in (1, 4096):
            needed = plan.shared_bytes(tokens, plan.threads(tokens, slots))
            assert needed <= plan.MOST_SHARED_BYTES
    assert plan.MOST_SHARED_BYTES + static <= 99 << 10
