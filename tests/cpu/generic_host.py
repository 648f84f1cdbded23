"""The generic kernels compiled for the host, once per test run; see cuda_on_host.h."""

from __future__ import annotations

import atexit
import ctypes
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path

import pytest

from dop.ops.generic.loader import FOLDER

HERE = Path(__file__).parent


@cache
def library() -> ctypes.CDLL:
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("there is no g++")
    folder = tempfile.mkdtemp(prefix="dop-generic-host-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    out = Path(folder) / "generic.so"
    command = [compiler, "-std=c++17", "-O1", "-w", "-shared", "-fPIC", f"-I{FOLDER}"]
    subprocess.run([*command, "-o", str(out), str(HERE / "generic_on_host.cc")], check=True)
    return ctypes.CDLL(str(out))


class Launch(ctypes.Structure):
    _fields_ = [
        ("grid", ctypes.c_uint * 3),
        ("threads", ctypes.c_uint),
        ("shared_bytes", ctypes.c_uint),
        ("seed", ctypes.c_uint),
    ]


def run(name, grid, threads, shared_bytes, values, seed=0) -> None:
    """A kernel; `values` are ctypes values, one per parameter."""
    how = Launch((ctypes.c_uint * 3)(*grid), threads, shared_bytes, seed)
    array = (ctypes.c_void_p * len(values))(*(ctypes.addressof(v) for v in values))
    assert library().host_run(name.encode(), ctypes.byref(how), array) == 0, name


def address(tensor) -> int:
    return 0 if tensor is None else tensor.data_ptr()
