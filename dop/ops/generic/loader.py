"""The generic kernels' binaries on a device: found, loaded once, launched through the driver."""

from __future__ import annotations

import ctypes
import json
import lzma
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from hashlib import sha256
from pathlib import Path
from typing import Any

from dop.errors import BuildError, MissingDependencyError
from dop.measure import cuda_driver as cuda

FOLDER = Path(__file__).parent
SOURCES = {
    "plan": ("plan.cu",),
    "generic": ("generic.cu", "common.cuh", "rows.cuh", "tiles.cuh"),
}
"""Translation units and the files of each."""
CUBINS = (80, 86, 89, 90, 100, 120)
"""Compute capabilities with a binary; any other runs that of its family, or the PTX."""
PTX = "compute_80"
INDEX = "index.json"

_CAPABILITY = (75, 76)
_MULTIPROCESSORS = 16
_OTHER_CONTEXT = (201, 400)
"""CUDA_ERROR_INVALID_CONTEXT and CUDA_ERROR_INVALID_HANDLE."""
_PARAMETER_BYTES = 512


def source_hash(unit: str) -> str:
    """sha256 of a translation unit's files."""
    return sha256(b"".join((FOLDER / file).read_bytes() for file in SOURCES[unit])).hexdigest()


@cache
def index() -> dict[str, Any]:
    """What `python -m dop.ops.generic.build` wrote beside the binaries.

    Raises:
        BuildError: the binaries are missing from the installation.
    """
    try:
        found: dict[str, Any] = json.loads((FOLDER / INDEX).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise BuildError(
            f"the binaries of the generic kernels are not in {FOLDER}.",
            "Install dop from a wheel, or run python -m dop.ops.generic.build (needs nvcc).",
        ) from error
    return found


def binary_for(capability: int) -> str:
    """Name of the binary for a compute capability (90 for 9.0): the newest cubin of the same
    major version that is not newer than the device, else PTX.

    Raises:
        MissingDependencyError: the GPU is older than sm_80.
    """
    if capability < 80:
        raise MissingDependencyError(
            f"the GPU is of compute capability {capability / 10:.1f}.",
            "Dop's kernels need 8.0 (Ampere) or newer.",
        )
    fitting = [c for c in CUBINS if c // 10 == capability // 10 and c <= capability]
    return f"sm_{max(fitting)}" if fitting else PTX


def read_binary(unit: str, name: str) -> bytes:
    """Image of a translation unit, unpacked and checked.

    Raises:
        BuildError: it is missing or damaged.
    """
    file = f"{unit}-{name}.bin"
    try:
        packed = (FOLDER / file).read_bytes()
        if sha256(packed).hexdigest() != index()["files"][file]["sha256"]:
            raise ValueError("its hash is not the one that the index names")
        return lzma.decompress(packed)
    except (OSError, ValueError, KeyError, lzma.LZMAError) as error:
        raise BuildError(
            f"{FOLDER / file} cannot be used: {error}.", "Install dop again."
        ) from error


@dataclass(frozen=True)
class Kernel:
    """A kernel of a loaded module. `handle` is its CUfunction."""

    name: str
    handle: int
    device: Device


class Device:
    """A GPU: its figures and the modules loaded on it. Thread-safe."""

    def __init__(self, ordinal: int) -> None:
        self.ordinal = ordinal
        self._lock = threading.Lock()
        self._modules: dict[str, cuda.Handle] = {}
        self._kernels: dict[tuple[str, str], Kernel] = {}
        handle = ctypes.c_int()
        _driver("cuDeviceGet", ctypes.byref(handle), ordinal)
        major, minor = (_attribute(which, handle) for which in _CAPABILITY)
        self.capability = major * 10 + minor
        self.multiprocessors = _attribute(_MULTIPROCESSORS, handle)
        self._context = cuda.Handle()
        _driver("cuDevicePrimaryCtxRetain", ctypes.byref(self._context), handle)

    @contextmanager
    def current(self) -> Iterator[None]:
        """Makes the device's primary context (torch's) the calling thread's for a while, and lets
        it load code while a stream is being captured."""
        _driver("cuCtxPushCurrent_v2", self._context)
        mode = ctypes.c_int(cuda.CAPTURE_RELAXED)
        _driver("cuThreadExchangeStreamCaptureMode", ctypes.byref(mode))
        try:
            yield
        finally:
            _driver("cuThreadExchangeStreamCaptureMode", ctypes.byref(mode))
            _driver("cuCtxPopCurrent_v2", ctypes.byref(cuda.Handle()))

    def kernel(self, unit: str, name: str, shared_bytes: int = 0) -> Kernel:
        """A kernel by name; its module is loaded at the first call.

        Args:
            shared_bytes: most dynamic shared memory a launch will ask for.

        Raises:
            BuildError: the binary is missing or damaged.
            cuda_driver.CudaError: the driver refused it.
        """
        found = self._kernels.get((unit, name))
        return found if found is not None else self._load(unit, name, shared_bytes)

    def _load(self, unit: str, name: str, shared_bytes: int) -> Kernel:
        with self._lock:
            if (unit, name) in self._kernels:
                return self._kernels[unit, name]
            with self.current():
                if unit not in self._modules:
                    image = read_binary(unit, binary_for(self.capability)) + b"\0"
                    module = cuda.Handle()
                    _driver("cuModuleLoadData", ctypes.byref(module), ctypes.c_char_p(image))
                    self._modules[unit] = module
                function = cuda.Function(self._modules[unit], name)
                # Asking for an attribute loads the code now: drivers load lazily otherwise.
                function.attribute(cuda.NUM_REGS)
                if shared_bytes > 48 << 10:
                    function.allow_dynamic_smem(shared_bytes)
            handle = function.handle.value
            assert handle is not None
            kernel = self._kernels[unit, name] = Kernel(name, handle, self)
            return kernel


def _driver(name: str, *arguments: object) -> None:
    library = cuda.driver()
    if library is None:
        raise MissingDependencyError("there is no NVIDIA driver on this machine.")
    cuda.check(name, getattr(library, name)(*arguments))


def _attribute(which: int, device: ctypes.c_int) -> int:
    value = ctypes.c_int()
    _driver("cuDeviceGetAttribute", ctypes.byref(value), which, device)
    return value.value


@cache
def device(ordinal: int) -> Device:
    """The device of an ordinal, as torch counts them."""
    return Device(ordinal)


class Parameters(threading.local):
    """Memory for a kernel's parameter struct; one per thread, reused, since a launch copies it."""

    def __init__(self) -> None:
        self.buffer = ctypes.create_string_buffer(_PARAMETER_BYTES)
        self.array = (ctypes.c_void_p * 1)(ctypes.addressof(self.buffer))


PARAMETERS = Parameters()


@cache
def _launcher() -> Any:
    library = cuda.driver()
    if library is None:
        raise MissingDependencyError("there is no NVIDIA driver on this machine.")
    # A prototype of its own: argument types set on the shared library would be everybody's.
    number, pointer = ctypes.c_uint, ctypes.c_void_p
    kind = ctypes.CFUNCTYPE(ctypes.c_int, pointer, *[number] * 7, pointer, pointer, pointer)
    return kind(("cuLaunchKernel", library))


def launch(
    kernel: Kernel,
    grid: tuple[int, int, int],
    threads: int,
    shared_bytes: int,
    stream: int,
) -> None:
    """Launches with the struct that lies in PARAMETERS.buffer.

    Args:
        stream: a CUstream as an integer, of the kernel's device.

    Raises:
        cuda_driver.CudaError: the driver refused the launch.
    """
    call, parameters = _launcher(), PARAMETERS.array
    code = call(kernel.handle, *grid, threads, 1, 1, shared_bytes, stream, parameters, None)
    if code in _OTHER_CONTEXT:  # a thread that torch has not touched yet, or is elsewhere with
        with kernel.device.current():
            code = call(kernel.handle, *grid, threads, 1, 1, shared_bytes, stream, parameters, None)
    if code:
        cuda.check(f"cuLaunchKernel({kernel.name})", code)
