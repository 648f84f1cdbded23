"""Building kernels at run time: NVRTC where it is installed, and the cache everywhere."""

from __future__ import annotations

import multiprocessing
import os
import struct
import time
from types import SimpleNamespace

import pytest

from dop import ops, packs
from dop.errors import BuildError, DopError, MissingKernelError
from dop.measure import compile_cuda
from dop.measure.compile_cpu import CompilerError
from dop.measure.nvrtc_headers import STUBS
from dop.ops import cache, nvrtc, sources

KERNEL = """
#ifdef __CUDACC_RTC__
  #include <cuda/std/cstdint>
  using cuda::std::int32_t;
  #include <cuda/std/type_traits>
  namespace std { using cuda::std::is_same_v; using cuda::std::enable_if; }
#else
  #include <cuda.h>
#endif
#include <cuda_fp16.h>
#include <cuda_bf16.h>
static_assert(std::is_same_v<int32_t, int>, "types");
extern "C" __global__ void twice(const __nv_bfloat16* x, __half* y, int32_t n) {
  const int32_t i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i < n) y[i] = __float2half(__bfloat162float(x[i] + x[i]));
}
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv(cache.VARIABLE, str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def compiler():
    try:
        nvrtc._library()
        nvrtc._include_folders("sm_80")
    except DopError as error:
        pytest.skip(str(error))


@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "sm_90a"])
@pytest.mark.usefixtures("compiler")
def test_a_source_with_16_bit_types_becomes_a_cubin(folder, arch):
    cubin = nvrtc.compile_cubin(KERNEL, arch)
    assert cubin.startswith(b"\x7fELF")
    assert b"twice" in cubin
    assert len(list(folder.glob("*.bin"))) == 1


@pytest.mark.usefixtures("compiler", "folder")
def test_the_second_time_nothing_is_compiled(monkeypatch):
    first = nvrtc.compile_cubin(KERNEL, "sm_80")
    monkeypatch.setattr(nvrtc, "_compile", None)
    assert nvrtc.compile_cubin(KERNEL, "sm_80") == first


@pytest.mark.usefixtures("compiler", "folder")
def test_a_wrong_source_names_its_error():
    with pytest.raises(BuildError, match="nonsense"):
        nvrtc.compile_cubin('extern "C" __global__ void k() { nonsense; }', "sm_80")


@pytest.mark.parametrize("form", ["rows/", "tiles/", "/warpgroup_engine/"])
@pytest.mark.usefixtures("compiler", "folder")
def test_generated_kernels_compile(form):
    pytest.importorskip("tvm")
    from dop.lowering.codegen import generate
    from dop.space.generate import build_space
    from dop.target import SM_90
    from dop.workload import Workload

    workload = Workload.parse("sgmv/bfloat16/r16/512->512+256")
    defaults = build_space(workload, SM_90).defaults()
    trace = next(one.trace for one in defaults if form in one.sketch.name)
    code = generate(workload, trace, SM_90)
    for arch in ("sm_80", "sm_90a"):
        cubin = nvrtc.compile_cubin(code.source, arch)
        assert all(kernel.name.encode() in cubin for kernel in code.kernels)


def test_without_permission_nothing_is_built():
    with ops.allow_jit(False), pytest.raises(MissingKernelError, match="sm_90"):
        nvrtc.compile_cubin(KERNEL, "sm_90")


class FakeLibrary:
    path = "pack"

    def __init__(self, source):
        self.text = source

    def choose(self, key, tokens, adapters, slots):
        return SimpleNamespace(
            name="k", min_arch=80, tile_rows=0, sketch="rows", trace_key="t", launches=(),
            workspaces=(),
        )  # fmt: skip

    def source(self, info):
        return self.text


@pytest.fixture
def search(monkeypatch):
    """A search on an sm_86, with one pack whose sources may be built."""
    match = SimpleNamespace(how=packs.Match.SOURCE, library=lambda: FakeLibrary("text"))
    monkeypatch.setattr(packs, "find", lambda *_: (match,))
    monkeypatch.setattr(sources, "gpu", lambda device: ("GPU", "sm_86"))
    monkeypatch.setattr(nvrtc, "_BUILT", {})
    shape = SimpleNamespace(device=0, key="sgmv/float16/r16/64->64")
    return sources.Search(shape, 4, 8, None)


def test_a_packs_source_is_built_once_per_process(search, monkeypatch):
    asked = []
    monkeypatch.setattr(nvrtc, "compile_cubin", lambda *a: asked.append(a) or b"cubin")
    kernel = nvrtc.kernel(search)
    assert nvrtc.kernel(search) is kernel
    assert kernel.image() == b"cubin"
    assert asked == [("text", "sm_86")]


def test_a_source_that_does_not_build_is_tried_once(search, monkeypatch):
    asked = []

    def fail(*arguments):
        asked.append(arguments)
        raise BuildError("no")

    monkeypatch.setattr(nvrtc, "compile_cubin", fail)
    for _ in range(2):
        with pytest.raises(BuildError):
            nvrtc.kernel(search)
    assert len(asked) == 1


def test_without_sources_there_is_no_kernel(search, monkeypatch):
    monkeypatch.setattr(packs, "find", lambda *_: ())
    assert nvrtc.kernel(search) is None
    assert "source" in search.misses[0]


def test_stubs_are_whole():
    for name, text in STUBS.items():
        assert text.startswith("#pragma once"), name
        assert text.count("{") == text.count("}"), name


def test_cache_builds_once(folder):
    calls = []

    def build():
        calls.append(1)
        return b"binary"

    assert cache.get_or_build("k", build) == cache.get_or_build("k", build) == b"binary"
    assert len(calls) == 1
    assert not [path for path in folder.iterdir() if path.name.startswith(".")]


@pytest.mark.parametrize("damage", [b"", b"garbage", None])
def test_a_damaged_file_is_built_again(folder, damage):
    cache.get_or_build("k", lambda: b"first")
    path = folder / "k.bin"
    path.write_bytes(path.read_bytes()[:-1] if damage is None else damage)
    assert cache.get_or_build("k", lambda: b"second") == b"second"
    assert cache.get_or_build("k", lambda: b"third") == b"second"


def test_a_folder_that_cannot_be_made_is_tolerated(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("not a folder")
    monkeypatch.setenv(cache.VARIABLE, str(tmp_path / "file" / "cache"))
    assert cache.get_or_build("k", lambda: b"binary") == b"binary"


def test_a_read_only_folder_serves_what_it_holds(folder, monkeypatch):
    cache.get_or_build("old", lambda: b"binary")

    def refuse(*_, **__):
        raise PermissionError("read-only")

    monkeypatch.setattr(cache.tempfile, "mkstemp", refuse)
    monkeypatch.setattr(cache.os, "open", refuse)
    assert cache.get_or_build("old", lambda: b"other") == b"binary"
    assert cache.get_or_build("new", lambda: b"fresh") == b"fresh"


def test_what_the_build_raises_passes_and_nothing_is_kept(folder):
    def fail():
        raise BuildError("no")

    with pytest.raises(BuildError):
        cache.get_or_build("k", fail)
    assert not list(folder.glob("*.bin"))


def _build_slowly(counter):
    def build():
        with counter.get_lock():
            counter.value += 1
        time.sleep(0.2)
        return b"binary"

    assert cache.get_or_build("shared", build) == b"binary"


@pytest.mark.usefixtures("folder")
def test_processes_wait_for_the_one_that_builds():
    context = multiprocessing.get_context("fork")
    counter = context.Value("i", 0)
    workers = [context.Process(target=_build_slowly, args=(counter,)) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(30)
    assert [worker.exitcode for worker in workers] == [0] * 4
    assert counter.value == 1


def test_where_the_cache_is(monkeypatch, tmp_path):
    monkeypatch.delenv(cache.VARIABLE, raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache.folder() == tmp_path / "dop"
    monkeypatch.setenv(cache.VARIABLE, str(tmp_path / "own"))
    assert cache.folder() == tmp_path / "own"
    assert os.fspath(cache.folder())


def test_parts_of_a_key_are_kept_apart():
    assert cache.key_of("ab", "c") != cache.key_of("a", "bc")


@pytest.mark.skipif(compile_cuda.load_nvrtc() is None, reason="NVRTC is not installed")
def test_small_headers_give_the_machine_code_of_cudas_own():
    source = (
        "#include <cuda/std/cstdint>\n#include <cuda_bf16.h>\n"
        'extern "C" __global__ void k(nv_bfloat16* y, const nv_bfloat16* x) {\n'
        "  y[threadIdx.x] = __hadd(x[threadIdx.x], y[threadIdx.x]);\n}\n"
    )
    nvrtc = compile_cuda.load_nvrtc()
    small = compile_cuda._by_nvrtc(nvrtc, source, "sm_90a", STUBS)
    own = compile_cuda._by_nvrtc(nvrtc, source, "sm_90a", {})
    assert text_of(small) == text_of(own) != b""


def text_of(cubin: bytes) -> bytes:
    """Section .text.k of an ELF file."""
    offset = struct.unpack_from("<Q", cubin, 0x28)[0]
    size, count, names_at = struct.unpack_from("<HHH", cubin, 0x3A)
    heads = [struct.unpack_from("<IIQQQQIIQQ", cubin, offset + i * size) for i in range(count)]
    for head in heads:
        start = heads[names_at][4] + head[0]
        if cubin[start : cubin.index(b"\0", start)] == b".text.k":
            return cubin[head[4] : head[4] + head[5]]
    return b""


def test_what_small_headers_do_not_serve_gets_cudas_own(monkeypatch):
    seen = []

    def by_nvrtc(nvrtc, source, arch, headers):
        seen.append(bool(headers))
        if headers:
            raise CompilerError("NVRTC: cuda/std/complex is not there")
        return b"cubin"

    monkeypatch.setattr(compile_cuda, "_by_nvrtc", by_nvrtc)
    assert compile_cuda._compile_nvrtc(None, "source", "sm_90a") == b"cubin"
    assert seen == [True, False]
