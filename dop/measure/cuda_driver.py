"""CUDA's driver interface by ctypes: modules, launches, graphs, events. No TVM, no torch.

Calls act on the current context; torch makes its own (the device's primary one) current when it
allocates first.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache

from dop.errors import DopError

Handle = ctypes.c_void_p

MAX_THREADS_PER_BLOCK = 0
SHARED_SIZE_BYTES = 1
LOCAL_SIZE_BYTES = 3
NUM_REGS = 4
MAX_DYNAMIC_SHARED_SIZE_BYTES = 8
REQUIRED_CLUSTER_WIDTH = 11
NON_PORTABLE_CLUSTER_SIZE_ALLOWED = 14
PORTABLE_CLUSTER = 8
"""Blocks of a cluster that every GPU with clusters can place."""

CAPTURE_RELAXED = 2

INVALID_VALUE = 1
OUT_OF_MEMORY = 2
INVALID_IMAGE = 200
NO_BINARY_FOR_GPU = 209
OUT_OF_RESOURCES = 701


class CudaError(DopError):
    """A driver call failed; `code` is the CUresult."""

    def __init__(self, call: str, code: int, name: str, text: str) -> None:
        self.code = code
        super().__init__(f"{call}: {name}: {text}")


@cache
def driver() -> ctypes.CDLL | None:
    """The driver library, initialised, or None on a machine without an NVIDIA driver."""
    try:
        library = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    return library if library.cuInit(0) == 0 else None


def check(call: str, code: int) -> None:
    """Raises CudaError unless `code` is 0."""
    if code == 0:
        return
    library = driver()
    texts = []
    for function in ("cuGetErrorName", "cuGetErrorString"):
        text = ctypes.c_char_p()
        if library is not None:
            getattr(library, function)(code, ctypes.byref(text))
        texts.append((text.value or b"unknown").decode())
    raise CudaError(call, code, texts[0], texts[1])


def _call(name: str, *arguments: object) -> None:
    library = driver()
    if library is None:
        raise CudaError(name, 3, "CUDA_ERROR_NOT_INITIALIZED", "no NVIDIA driver")
    check(name, getattr(library, name)(*arguments))


CLUSTER_DIMENSION, PROGRAMMATIC_STREAM_SERIALIZATION = 4, 6
COMPUTE_CAPABILITY_MAJOR = 75
HOPPER = 9


class _Attribute(ctypes.Structure):
    """A CUlaunchAttribute: its kind, and the value in a union of 64 bytes."""

    _fields_ = [("kind", ctypes.c_int), ("_pad", ctypes.c_int), ("value", ctypes.c_int * 16)]


class _Config(ctypes.Structure):
    """A CUlaunchConfig."""

    _fields_ = [
        ("grid", ctypes.c_uint * 3),
        ("block", ctypes.c_uint * 3),
        ("smem_bytes", ctypes.c_uint),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.POINTER(_Attribute)),
        ("attribute_count", ctypes.c_uint),
    ]


@cache
def _dependent_attribute() -> _Attribute | None:
    """The attribute of a dependent launch, or None if the current device has no such launches."""
    device, major = ctypes.c_int(), ctypes.c_int()
    _call("cuCtxGetDevice", ctypes.byref(device))
    which = COMPUTE_CAPABILITY_MAJOR
    _call("cuDeviceGetAttribute", ctypes.byref(major), which, device)
    if major.value < HOPPER:
        return None
    return _Attribute(PROGRAMMATIC_STREAM_SERIALIZATION, 0, (ctypes.c_int * 16)(1))


class Function:
    """A kernel in a loaded module."""

    def __init__(self, module: Handle, name: str) -> None:
        self.name = name
        self.handle = Handle()
        _call("cuModuleGetFunction", ctypes.byref(self.handle), module, name.encode())
        self._launch = driver().cuLaunchKernel  # type: ignore[union-attr]

    def attribute(self, which: int) -> int:
        """A CUfunction_attribute."""
        value = ctypes.c_int()
        _call("cuFuncGetAttribute", ctypes.byref(value), which, self.handle)
        return value.value

    def allow_dynamic_smem(self, size_bytes: int) -> None:
        """Raises the limit of dynamic shared memory; needed above 48 KiB."""
        _call("cuFuncSetAttribute", self.handle, MAX_DYNAMIC_SHARED_SIZE_BYTES, size_bytes)

    def allow_large_clusters(self) -> None:
        """Allows clusters of more than `PORTABLE_CLUSTER` blocks."""
        _call("cuFuncSetAttribute", self.handle, NON_PORTABLE_CLUSTER_SIZE_ALLOWED, 1)

    def launch(
        self,
        grid: Sequence[int],
        block: Sequence[int],
        smem_bytes: int,
        stream: int,
        parameters: ctypes.Array[ctypes.c_void_p],
        dependent: bool = False,
    ) -> None:
        """Launches on a stream (a CUstream as an integer).

        Args:
            parameters: pointers to the kernel's parameters (see `pack_parameters`).
            dependent: may start before its predecessor ends, where the device can do so.
        """
        attribute = _dependent_attribute() if dependent else None
        if attribute is not None:
            attributes = ctypes.pointer(attribute)
            config = _Config(
                (ctypes.c_uint * 3)(*grid), (ctypes.c_uint * 3)(*block), smem_bytes, stream
            )
            config.attributes, config.attribute_count = attributes, 1
            _call("cuLaunchKernelEx", ctypes.byref(config), self.handle, parameters, None)
            return
        code = self._launch(
            self.handle, *grid, *block, smem_bytes, Handle(stream), parameters, None
        )
        check("cuLaunchKernel", code)


def clusters_at_once(function: Handle, block: Sequence[int], smem_bytes: int) -> int | None:
    """How many of a kernel's clusters of more than `PORTABLE_CLUSTER` blocks the current device
    holds at once: a small GPU, or a slice of one, may hold none. None where its clusters are not so
    large, or the driver cannot tell.

    Args:
        function: a kernel whose large clusters are allowed, if it has such, lying along x.
        block: threads.
        smem_bytes: dynamic shared memory.
    """
    library, width, count = driver(), ctypes.c_int(), ctypes.c_int()
    if not hasattr(library, "cuOccupancyMaxActiveClusters"):  # before CUDA 11.8: no clusters either
        return None
    read = library.cuFuncGetAttribute  # type: ignore[union-attr]
    if read(ctypes.byref(width), REQUIRED_CLUSTER_WIDTH, function):
        return None
    if width.value <= PORTABLE_CLUSTER:
        return None
    size = _Attribute(CLUSTER_DIMENSION, 0, (ctypes.c_int * 16)(width.value, 1, 1))
    config = _Config(
        (ctypes.c_uint * 3)(width.value, 1, 1), (ctypes.c_uint * 3)(*block), smem_bytes, None
    )
    config.attributes, config.attribute_count = ctypes.pointer(size), 1
    ask = library.cuOccupancyMaxActiveClusters  # type: ignore[union-attr]
    failed = ask(ctypes.byref(count), function, ctypes.byref(config))
    return None if failed else count.value


Parameter = ctypes.c_void_p | ctypes.c_int32 | ctypes.c_int64 | ctypes.Array[ctypes.c_uint64]
"""A kernel's parameter: an address, a number, or a tensor map (tensor_map.py)."""


def pack_parameters(values: Sequence[Parameter]) -> ctypes.Array[ctypes.c_void_p]:
    """Array of pointers to the values; it keeps them alive."""
    array = (ctypes.c_void_p * max(1, len(values)))(*(ctypes.addressof(v) for v in values))
    array.values = list(values)  # type: ignore[attr-defined]
    return array


def load(image: bytes) -> Handle:
    """A cubin or PTX loaded into the current context for good."""
    handle = Handle()
    _call("cuModuleLoadData", ctypes.byref(handle), ctypes.c_char_p(image))
    return handle


@contextmanager
def module(image: bytes) -> Iterator[Handle]:
    """A cubin loaded into the current context, unloaded at the end."""
    handle = load(image)
    try:
        yield handle
    finally:
        driver().cuModuleUnload(handle)  # type: ignore[union-attr]


class Graph:
    """Launches captured from a stream, to be replayed at once."""

    def __init__(self) -> None:
        self._exec = Handle()

    @contextmanager
    def capture(self, stream: int) -> Iterator[None]:
        """Records what is launched on the stream meanwhile instead of running it."""
        graph = Handle()
        _call("cuStreamBeginCapture_v2", Handle(stream), CAPTURE_RELAXED)
        try:
            yield
        except BaseException:
            driver().cuStreamEndCapture(Handle(stream), ctypes.byref(graph))  # type: ignore[union-attr]
            raise
        _call("cuStreamEndCapture", Handle(stream), ctypes.byref(graph))
        try:
            flags = ctypes.c_ulonglong(0)
            _call("cuGraphInstantiateWithFlags", ctypes.byref(self._exec), graph, flags)
            _call("cuGraphUpload", self._exec, Handle(stream))
        finally:
            driver().cuGraphDestroy(graph)  # type: ignore[union-attr]

    def replay(self, stream: int) -> None:
        """Runs everything that was captured."""
        _call("cuGraphLaunch", self._exec, Handle(stream))

    def close(self) -> None:
        """Frees the graph."""
        if self._exec:
            driver().cuGraphExecDestroy(self._exec)  # type: ignore[union-attr]
            self._exec = Handle()


class Event:
    """A point in a stream; two of them measure time."""

    def __init__(self) -> None:
        self.handle = Handle()
        _call("cuEventCreate", ctypes.byref(self.handle), 0)

    def record(self, stream: int) -> None:
        """Marks this point of the stream."""
        _call("cuEventRecord", self.handle, Handle(stream))

    def seconds_since(self, earlier: Event) -> float:
        """Waits for this event; device time since an earlier one, in seconds (0.5 us steps)."""
        _call("cuEventSynchronize", self.handle)
        elapsed = ctypes.c_float()
        name = "cuEventElapsedTime"
        _call(name, ctypes.byref(elapsed), earlier.handle, self.handle)
        return elapsed.value * 1e-3


def synchronize(stream: int) -> None:
    """Waits for a stream; raises what its kernels did wrong."""
    _call("cuStreamSynchronize", Handle(stream))
