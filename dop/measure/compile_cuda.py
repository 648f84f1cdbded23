"""From CUDA C++ to a cubin: NVRTC if it is there (in process), else nvcc.

Most of a build would go into reading headers (on one core, a kernel: nvcc 1.2 to 2.3 s, NVRTC with
CUDA's own headers 2.1 to 3.5 s, with small ones for cuda::std 0.4 to 1.7 s). So NVRTC gets the
small ones, as at run time; the machine code is the same. What they do not serve is built with the
real ones.

No fast math: SGMV has no division and no transcendental function, so it would gain nothing and
only flush denormals, and a header compiled by plain nvcc computes the same. Optimisation is the
compilers' default for device code (-O3).
"""

from __future__ import annotations

import ctypes
import glob
import importlib.util
import os
import shutil
import subprocess
import tempfile
from collections.abc import Collection, Iterator, Mapping
from functools import cache
from pathlib import Path

from dop.errors import MissingDependencyError
from dop.measure.artifact import Artifact, GeneratedLike, pack
from dop.measure.compile_cpu import CompilerError, first_error
from dop.measure.nvrtc_headers import STUBS

OPTIONS = ("-std=c++17",)
MAX_LOG_BYTES = 1 << 20


def compile_cuda(code: GeneratedLike, arch: str) -> Artifact:
    """Artifact with a cubin for `arch` ("sm_90a").

    Raises:
        CompilerError: the compiler refused the source; the message is its first error.
        MissingDependencyError: there is neither NVRTC nor nvcc.
    """
    cubin = compile_source(code.source, arch)
    return pack(code, cubin, {"code_bytes": float(len(cubin))})


def compile_source(source: str, arch: str) -> bytes:
    """Cubin of CUDA C++ source; raises as `compile_cuda`."""
    require_compiler()
    nvrtc = load_nvrtc()
    if nvrtc is not None and cuda_includes():
        return _compile_nvrtc(nvrtc, source, arch)
    return _compile_nvcc(source, arch)


def require_compiler() -> None:
    """Raises MissingDependencyError if there is neither NVRTC nor nvcc."""
    if not (load_nvrtc() and cuda_includes()) and find_nvcc() is None:
        raise MissingDependencyError(
            "there is no CUDA compiler: neither NVRTC with its headers nor nvcc.",
            "Install the CUDA toolkit or set CUDA_HOME.",
        )


def compiler_version() -> str:
    """Which compiler `compile_source` uses, e.g. "NVRTC 13.0"; "" if there is none."""
    nvrtc, nvcc = load_nvrtc(), find_nvcc()
    if nvrtc is not None and cuda_includes():
        major, minor = ctypes.c_int(), ctypes.c_int()
        _ok(nvrtc, nvrtc.nvrtcVersion(ctypes.byref(major), ctypes.byref(minor)))
        return f"NVRTC {major.value}.{minor.value}"
    if nvcc is None:
        return ""
    said = subprocess.run([nvcc, "--version"], capture_output=True, text=True, errors="replace")
    return " ".join(said.stdout.split())[-80:]


def find_nvcc() -> str | None:
    """Path of nvcc, or None."""
    for root in _toolkits():
        if (Path(root) / "bin" / "nvcc").exists():
            return str(Path(root) / "bin" / "nvcc")
    return shutil.which("nvcc")


@cache
def _toolkits() -> tuple[str, ...]:
    """Toolkit roots that exist, the user's choice first."""
    named = [os.environ.get(name, "") for name in ("CUDA_HOME", "CUDA_PATH")]
    found = [*named, "/usr/local/cuda", *sorted(glob.glob("/usr/local/cuda-*"), reverse=True)]
    return tuple(dict.fromkeys(root for root in found if root and os.path.isdir(root)))


@cache
def _pip_roots() -> tuple[str, ...]:
    """Folders of NVIDIA's pip packages, newest layout (nvidia/cu13) first."""
    spec = importlib.util.find_spec("nvidia")
    if spec is None or not spec.submodule_search_locations:
        return ()
    bases = spec.submodule_search_locations
    folders = [folder for base in bases for folder in sorted(glob.glob(f"{base}/*"))]
    return tuple(sorted(folders, key=lambda f: not os.path.basename(f).startswith("cu1")))


@cache
def cuda_includes() -> tuple[str, ...]:
    """Include folders with CUDA's headers, those of cuda::std among them."""
    roots = [*_toolkits(), *_pip_roots()]
    folders = [f"{root}/include" for root in roots]
    folders += glob.glob("/usr/local/cuda*/targets/*/include")
    with_headers = [f for f in folders if os.path.exists(f"{f}/cuda_fp16.h")][:1]
    candidates = [*(f"{f}/cccl" for f in folders), *folders]
    with_std = [f for f in candidates if os.path.exists(f"{f}/cuda/std/cstdint")][:1]
    return tuple(dict.fromkeys(with_headers + with_std)) if with_headers and with_std else ()


def _nvrtc_files() -> Iterator[str]:
    for root in [*_pip_roots(), *_toolkits()]:
        for folder in ("lib", "lib64", "targets/x86_64-linux/lib"):
            for path in sorted(glob.glob(f"{root}/{folder}/libnvrtc.so*"), reverse=True):
                if "alt" not in os.path.basename(path):
                    yield path
    yield from ("libnvrtc.so.13", "libnvrtc.so.12", "libnvrtc.so")


@cache
def load_nvrtc() -> ctypes.CDLL | None:
    """NVRTC, or None if it is not installed."""
    for path in _nvrtc_files():
        try:
            # NVRTC opens its second library by name, so that must be loaded already.
            folder = os.path.dirname(path)
            for builtins in glob.glob(f"{folder}/libnvrtc-builtins.so*") if folder else ():
                ctypes.CDLL(builtins)
            library = ctypes.CDLL(path)
        except OSError:
            continue
        library.nvrtcGetErrorString.restype = ctypes.c_char_p
        return library
    return None


def _compile_nvrtc(nvrtc: ctypes.CDLL, source: str, arch: str) -> bytes:
    try:
        return _by_nvrtc(nvrtc, source, arch, STUBS)
    except CompilerError:
        return _by_nvrtc(nvrtc, source, arch, {})


def _by_nvrtc(nvrtc: ctypes.CDLL, source: str, arch: str, headers: Mapping[str, str]) -> bytes:
    # NVRTC has no host headers; the source needs nothing of cuda.h on the device.
    text = source.replace("#include <cuda.h>", "").encode()
    program = ctypes.c_void_p()
    names, texts = _array(headers), _array(headers.values())
    create = nvrtc.nvrtcCreateProgram
    _ok(nvrtc, create(ctypes.byref(program), text, b"dop.cu", len(headers), texts, names))
    try:
        options = [f"--gpu-architecture={arch}", *OPTIONS, "-default-device", "-w"]
        options += [f"-I{folder}" for folder in cuda_includes()]
        if nvrtc.nvrtcCompileProgram(program, len(options), _array(options)):
            raise CompilerError(f"NVRTC: {first_error(_log(nvrtc, program))}")
        size = ctypes.c_size_t()
        _ok(nvrtc, nvrtc.nvrtcGetCUBINSize(program, ctypes.byref(size)))
        cubin = ctypes.create_string_buffer(size.value)
        _ok(nvrtc, nvrtc.nvrtcGetCUBIN(program, cubin))
        return cubin.raw
    finally:
        nvrtc.nvrtcDestroyProgram(ctypes.byref(program))


def _array(texts: Collection[str]) -> ctypes.Array[ctypes.c_char_p]:
    return (ctypes.c_char_p * max(1, len(texts)))(*(text.encode() for text in texts))


def _log(nvrtc: ctypes.CDLL, program: ctypes.c_void_p) -> str:
    size = ctypes.c_size_t()
    _ok(nvrtc, nvrtc.nvrtcGetProgramLogSize(program, ctypes.byref(size)))
    text = ctypes.create_string_buffer(max(1, size.value))
    _ok(nvrtc, nvrtc.nvrtcGetProgramLog(program, text))
    return text.value[:MAX_LOG_BYTES].decode(errors="replace")


def _ok(nvrtc: ctypes.CDLL, code: int) -> None:
    if code:
        raise CompilerError(f"NVRTC: {nvrtc.nvrtcGetErrorString(code).decode()}")


def _compile_nvcc(source: str, arch: str) -> bytes:
    nvcc = find_nvcc()
    assert nvcc is not None
    with tempfile.TemporaryDirectory(prefix="dop-nvcc-") as name:
        folder = Path(name)
        (folder / "dop.cu").write_text(source)
        command = [nvcc, "-cubin", f"-arch={arch}", "-O3", "-w", *OPTIONS]
        command += ["-o", str(folder / "dop.cubin"), str(folder / "dop.cu")]
        done = subprocess.run(command, capture_output=True, text=True, errors="replace")
        if done.returncode:
            raise CompilerError(f"nvcc: {first_error(done.stderr or done.stdout)}")
        return (folder / "dop.cubin").read_bytes()
