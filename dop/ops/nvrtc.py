"""Kernels built on the user's machine: generated CUDA text to a cubin by NVRTC, kept in a cache.

NVRTC and the headers cuda_fp16.h and cuda_bf16.h come with torch's CUDA wheels, or with a toolkit.
No nvcc and no host compiler is needed.
"""

from __future__ import annotations

import ctypes
import glob
import importlib.util
import os
from collections.abc import Iterable, Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from dop.errors import BuildError, DopError, MissingDependencyError, MissingKernelError
from dop.measure.nvrtc_headers import STUBS
from dop.ops.cache import get_or_build, key_of
from dop.ops.switches import JIT

if TYPE_CHECKING:
    from dop.export.index import KernelInfo
    from dop.ops.launch import DeviceKernel
    from dop.ops.sources import Search

OPTIONS = ("-std=c++17", "-default-device", "-w")
_NEEDED_HEADERS = ("cuda_fp16.h", "cuda_bf16.h")
_DROPPED = "#include <cuda.h>"
"""The driver's header; generated code includes it and uses nothing of it on the device."""


def compile_cubin(source: str, arch: str, *, options: Sequence[str] = OPTIONS) -> bytes:
    """The cubin of CUDA C++ text, from the cache if it was built before.

    Args:
        source: kernels as `extern "C" __global__`.
        arch: e.g. "sm_90" or "sm_90a".
        options: of NVRTC.

    Raises:
        MissingKernelError: building is forbidden (DOP_JIT=0 or ops.allow_jit(False)).
        MissingDependencyError: NVRTC or its headers are not installed.
        BuildError: NVRTC refused the source.
    """
    if not JIT:
        raise MissingKernelError(
            f"a kernel for {arch} would have to be built, which is not allowed here.",
            "Allow it (DOP_JIT=1, ops.allow_jit()), or install a pack for this GPU.",
        )
    library, folders = _library(), _include_folders(arch)
    version = "{}.{}".format(*_version(library))
    headers = key_of(*(text for pair in STUBS.items() for text in pair))
    key = key_of(source, arch, *options, version, headers, _header_version(folders))
    return get_or_build(key, lambda: _compile(library, source, arch, options, folders))


def _roots() -> Iterator[str]:
    """Folders that may hold CUDA: the user's choice, NVIDIA's wheels, toolkits."""
    for name in ("CUDA_HOME", "CUDA_PATH"):
        if os.environ.get(name):
            yield os.environ[name]
    spec = importlib.util.find_spec("nvidia")
    for base in (spec.submodule_search_locations or ()) if spec else ():
        # nvidia/cu13 holds everything; before CUDA 13 each library had a folder of its own.
        yield from sorted(glob.glob(f"{base}/cu[0-9]*"), reverse=True)
        yield from (f"{base}/cuda_nvrtc", f"{base}/cuda_runtime")
    yield "/usr/local/cuda"
    yield from sorted(glob.glob("/usr/local/cuda-*"), reverse=True)


def _candidates() -> Iterator[str]:
    for root in _roots():
        for folder in ("lib", "lib64", "targets/x86_64-linux/lib", "targets/sbsa-linux/lib"):
            files = sorted(glob.glob(f"{root}/{folder}/libnvrtc.so*"), reverse=True)
            yield from (file for file in files if ".alt" not in file)
    yield from ("libnvrtc.so.13", "libnvrtc.so.12", "libnvrtc.so")


@cache
def _library() -> ctypes.CDLL:
    """NVRTC, loaded.

    Raises:
        MissingDependencyError: it is not installed.
    """
    for path in _candidates():
        try:
            # NVRTC opens its second library by name, which is found if it is loaded already.
            for builtins in glob.glob(f"{os.path.dirname(path)}/libnvrtc-builtins.so*"):
                if os.path.dirname(path) and ".alt" not in builtins:
                    ctypes.CDLL(builtins)
            library = ctypes.CDLL(path)
        except OSError:
            continue
        library.nvrtcGetErrorString.restype = ctypes.c_char_p
        return library
    raise MissingDependencyError(
        "NVRTC (libnvrtc.so) is not on this machine.",
        "It comes with torch for CUDA; or pip install nvidia-cuda-nvrtc.",
    )


@cache
def _version(library: ctypes.CDLL) -> tuple[int, int]:
    major, minor = ctypes.c_int(), ctypes.c_int()
    _check(library, library.nvrtcVersion(ctypes.byref(major), ctypes.byref(minor)))
    return major.value, minor.value


@cache
def _include_folders(arch: str) -> tuple[str, ...]:
    """The folder with CUDA's headers for 16-bit types.

    Raises:
        MissingDependencyError: there is none.
    """
    for root in _roots():
        for folder in (f"{root}/include", *glob.glob(f"{root}/targets/*/include")):
            if all(os.path.exists(f"{folder}/{name}") for name in _NEEDED_HEADERS):
                return (folder,)
    raise MissingDependencyError(
        f"{' and '.join(_NEEDED_HEADERS)} are not on this machine; building for {arch} needs them.",
        "They come with torch for CUDA; or pip install nvidia-cuda-runtime, or set CUDA_HOME.",
    )


@cache
def _header_version(folders: tuple[str, ...]) -> str:
    """What tells the headers of one CUDA version from another's."""
    return key_of(
        *(
            f"{name} {(Path(folder) / name).stat().st_size}"
            for folder in folders
            for name in _NEEDED_HEADERS
        )
    )


def _compile(
    library: ctypes.CDLL, source: str, arch: str, options: Sequence[str], folders: Sequence[str]
) -> bytes:
    names, texts = _array(STUBS), _array(STUBS.values())
    program = ctypes.c_void_p()
    text = source.replace(_DROPPED, "").encode()
    create = library.nvrtcCreateProgram
    code = create(ctypes.byref(program), text, b"dop.cu", len(STUBS), texts, names)
    _check(library, code)
    try:
        every = [f"--gpu-architecture={arch}", *options, *(f"-I{folder}" for folder in folders)]
        if library.nvrtcCompileProgram(program, len(every), _array(every)):
            raise BuildError(
                f"NVRTC refused a kernel for {arch}: {_first_error(_log(library, program))}",
                "Report it with the output of python -m dop.collect_env.",
            )
        size = ctypes.c_size_t()
        _check(library, library.nvrtcGetCUBINSize(program, ctypes.byref(size)))
        cubin = ctypes.create_string_buffer(size.value)
        _check(library, library.nvrtcGetCUBIN(program, cubin))
        return cubin.raw
    finally:
        library.nvrtcDestroyProgram(ctypes.byref(program))


def _array(texts: Iterable[str]) -> ctypes.Array[ctypes.c_char_p]:
    encoded = [text.encode() for text in texts]
    return (ctypes.c_char_p * max(1, len(encoded)))(*encoded)


def _check(library: ctypes.CDLL, code: int) -> None:
    if code:
        raise BuildError(f"NVRTC: {library.nvrtcGetErrorString(code).decode()}.")


def _log(library: ctypes.CDLL, program: ctypes.c_void_p) -> str:
    size = ctypes.c_size_t()
    _check(library, library.nvrtcGetProgramLogSize(program, ctypes.byref(size)))
    text = ctypes.create_string_buffer(max(1, size.value))
    _check(library, library.nvrtcGetProgramLog(program, text))
    return text.value.decode(errors="replace")


def _first_error(log: str) -> str:
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    return next((line for line in lines if "error" in line), lines[0] if lines else "no message")


def kernel(search: Search) -> DeviceKernel | None:
    """A pack's kernel of another GPU, built here from its source; None if no pack has one.

    Args:
        search: a call's shapes and batch.

    Raises:
        MissingDependencyError, BuildError: it cannot be built on this machine.
    """
    from dop import packs
    from dop.ops.plan import TILE_SIZES
    from dop.ops.sources import gpu

    arch = gpu(search.shape.device)[1]
    for key, match in search.matches():
        if match.how != packs.Match.SOURCE:
            continue
        library = match.library()
        info = library.choose(key, search.tokens, search.adapters, search.slots)
        source = library.source(info)
        if not source or info.min_arch > int(arch.removeprefix("sm_")):
            search.misses.append(f"{info.name} of {library.path} does not build for {arch}")
            continue
        if info.tile_rows and info.tile_rows not in TILE_SIZES:
            search.misses.append(f"{info.name} of {library.path} wants tiles of {info.tile_rows}")
            continue
        return _built(source, arch, str(library.path), info)
    search.misses.append("no pack carries the source of a kernel for this shape")
    return None


_BUILT: dict[tuple[str, str, str], DeviceKernel | DopError] = {}
"""By pack, kernel and architecture: what was built, or why it could not be; asked once each."""


def _built(source: str, arch: str, path: str, info: KernelInfo) -> DeviceKernel:
    key = (path, info.name, arch)
    found = _BUILT.get(key)
    if found is None:
        try:
            found = _device_kernel(compile_cubin(source, arch), arch, path, info)
        except (BuildError, MissingDependencyError) as error:
            found = error
        _BUILT[key] = found
    if isinstance(found, DopError):
        raise found
    return found


def _device_kernel(cubin: bytes, arch: str, path: str, info: KernelInfo) -> DeviceKernel:
    from dop.ops.launch import DeviceKernel

    return DeviceKernel(
        info.name,
        f"nvrtc ({path})",
        f"tuned on another GPU, built here for {arch} ({info.sketch or info.trace_key})",
        info.tile_rows,
        info.launches,
        info.workspaces,
        lambda: cubin,
    )
