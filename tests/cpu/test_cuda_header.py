"""The CUDA header: compiles alone, in several files, and decides as the table does."""

from __future__ import annotations

import itertools
import random
import re
import subprocess
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from export_logs import SM_90, defaults, record, records_of, write_log

from dop.errors import ExportError
from dop.export.cuda_header import header
from dop.export.cuda_text import cxx, take_apart
from dop.export.select import select
from dop.measure.compile_cuda import find_nvcc
from dop.measure.cuda_driver import driver
from dop.measure.plan import make_plan, tile_bound
from dop.scenario import MIXES, named
from dop.space.step import SplitStep
from dop.space.trace import Trace
from dop.workload import Workload

HERE = Path(__file__).parent
needs_nvcc = pytest.mark.skipif(find_nvcc() is None, reason="nvcc is not installed")
FAKE = (
    Workload("o", 64, (64,), 8, "bfloat16"),
    Workload("qkv", 64, (64, 32, 16), 8, "float16"),
)
DTYPES = ("float16", "bfloat16", "float32")
TRACES = {str(n): Trace((SplitStep(0, 0, 64, (n,), True),)) for n in (2, 3, 4, 5, 6, 7)}

PREAMBLE = """
#ifdef __CUDACC_RTC__
  #include <cuda/std/cstdint>
#else
  #include <cstdint>
  #include <cuda.h>
#endif
#include <{include}>
__device__ {half} max({half} a, {half} b)
{{
  return __hgt(a, b) ? a : b;
}}
#define LEFT_OVER 1
#ifdef _WIN32
  using uint = unsigned int;
#else
  #define uint unsigned int
#endif
"""

KERNEL = """extern "C" __global__ void __launch_bounds__(64) main_kernel({args});
extern "C" __global__ void __launch_bounds__(64) main_kernel({args}) {{
  extern __shared__ __align__(64) float buf_dyn_shmem[];
  uint one = LEFT_OVER;
  buf_dyn_shmem[threadIdx.x] = (float)max((int)one, tokens);
  {extra}
  v_ptr[blockIdx.x] = (float)max({half}(1.0f), x_ptr[0]) + buf_dyn_shmem[0];
}}
"""


def fake_generate(workload, trace, target):
    """Small kernels of TVM's form; the split's length decides on form, shared memory and arch."""
    number = trace.steps[0].lengths[0]
    half, include = {
        "bfloat16": ("nv_bfloat16", "cuda_bf16.h"),
        "float16": ("half", "cuda_fp16.h"),
    }[workload.dtype]
    shifts = ", ".join(f"long long a{s}_shift" for s in range(1, workload.slices))
    args = f"{half}* __restrict__ x_ptr, float* __restrict__ v_ptr, int tokens"
    args += f", {shifts}" if shifts else ""
    extra = 'asm volatile("griddepcontrol.wait;");' if number == 7 else ""
    source = PREAMBLE.format(half=half, include=include)
    source += KERNEL.format(args=args, half=half, extra=extra)
    names = ("x", "v", "tokens", *(f"a{s}_shift" for s in range(1, workload.slices)))
    grid = "(tokens + 7) // 8" if number % 2 else "tiles"
    smem = 96 << 10 if number == 5 else 1024
    kernel = SimpleNamespace(
        name="main_kernel",
        grid=(grid, "2", "1"),
        block=(64, 1, 1),
        dynamic_smem_bytes=smem,
        arguments=names,
        dependent=smem == 1024,
    )
    return SimpleNamespace(
        kind="cuda",
        workload_key=workload.key,
        tile_rows=0 if number % 2 else number,
        source=source,
        kernels=(kernel,),
        workspaces=(SimpleNamespace(name="v", dtype="float32", elements="(tokens * 3)"),),
        object_code=b"",
        arguments=(),
    )


def compile_(folder: Path, sources: list[Path], *options: str) -> None:
    command = [find_nvcc(), "-std=c++17", "-Xcompiler", "-Wall,-Wextra", f"-I{folder}", *options]
    done = subprocess.run([*command, *map(str, sources)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "warning" not in done.stderr, done.stderr


@pytest.fixture(scope="module")
def fake(tmp_path_factory):
    """A selection with many rows over small kernels."""
    folder = tmp_path_factory.mktemp("fake")
    rng = random.Random(3)
    records = []
    for workload in FAKE:
        scenarios = [named(m, t) for t in (2, 8, 64) for m in MIXES]
        times = {s.key: {n: 1 + rng.random() for n in TRACES} for s in scenarios}
        records += records_of(workload, TRACES, times)
    selection = select(write_log(folder / "log.jsonl", records), kind="cuda")
    (folder / "sgmv.cuh").write_text(header(selection, fake_generate))
    (folder / "second.cu").write_text(
        '#include "sgmv.cuh"\n#include "sgmv.cuh"\n'
        "int workloads_seen_elsewhere() { return dop::sgmv::detail::kWorkloads; }\n"
    )
    return SimpleNamespace(folder=folder, selection=selection)


@pytest.fixture(scope="module")
def program(fake):
    """The check program, from two translation units that both include the header."""
    if find_nvcc() is None:
        pytest.skip("nvcc is not installed")
    out = fake.folder / "check"
    sources = [HERE / "sgmv_check.cu", fake.folder / "second.cu"]
    compile_(fake.folder, sources, "-arch=sm_90", "-o", str(out))
    return out


def run(program: Path, mode: str, text: str = "") -> list[str]:
    done = subprocess.run([str(program), mode], input=text, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.splitlines()


def test_dispatch_in_the_header_matches_the_table(fake, program):
    table = fake.selection.table
    limits = {r.rows_upto for w in table.workloads.values() for r in w.rows if r.rows_upto < 1e9}
    hints = sorted({0.0, 1.0, 1.5, 3.0, 17.25, 1e6, *limits, *(x * 1.0001 for x in limits)})
    cases, want = [], []
    for workload, tokens, rows in itertools.product(FAKE, (1, 2, 3, 8, 9, 64, 65, 4096), hints):
        outs = (*workload.out_features, 0, 0)[:3]
        shape = (workload.in_features, workload.slices, *outs, workload.rank)
        cases.append(
            f"{' '.join(map(str, shape))} {DTYPES.index(workload.dtype)} {tokens} {rows!r}"
        )
        trace = table.workloads[workload.key].choose_by_rows(tokens, rows)
        want.append(trace)
    assert len(set(want)) > 3
    got = run(program, "choose", "\n".join(cases))
    assert [line.split()[0] for line in got] == ["1"] * len(cases)
    assert [line.rsplit("_", 1)[1] for line in got] == want
    unknown = ["64 1 64 0 0 16 1 8 1", "64 2 64 32 0 8 0 8 1", "64 1 64 0 0 8 0 8 1"]
    assert run(program, "choose", "\n".join(unknown)) == ["0 -"] * 3


def test_tables_made_in_cpp_match_the_plan(program):
    rng = np.random.default_rng(1)
    for tokens, slots, rows in ((1, 1, 4), (37, 5, 4), (300, 40, 16), (64, 64, 1)):
        slot_of = rng.integers(-1, slots, tokens).astype(np.int32)
        plan = make_plan(slot_of, rows, max_adapters=slots)
        assert plan.tiles == tile_bound(tokens, rows, slots)
        text = f"{tokens} {slots} {rows} {plan.tiles} " + " ".join(map(str, slot_of))
        needed, *tables = run(program, "tables", text)
        assert int(needed) == int((plan.tables["tile_rows"] > 0).sum())
        for name, line in zip(
            ("tile_slot", "tile_row0", "tile_rows", "row_index"), tables, strict=True
        ):
            assert [int(n) for n in line.split()] == plan.tables[name].tolist(), name


def test_problems_are_named(program):
    *found, last = run(program, "problems")
    words = "ok slices shape negative slots rows_per_segment null aligned null aligned 2^31 tables"
    assert all(word in line for word, line in zip(words.split(), found, strict=True)), found
    assert last == "1 2"  # cudaErrorInvalidValue; both translation units see both workloads


@needs_nvcc
def test_kernels_for_newer_devices_are_guarded(fake):
    text = (fake.folder / "sgmv.cuh").read_text()
    assert "griddepcontrol" in text
    main = fake.folder / "second.cu"
    compile_(fake.folder, [main], "-arch=sm_80", "-c", "-o", str(fake.folder / "sm_80.o"))


def test_the_header_is_the_same_for_the_same_log_and_says_where_it_is_from(fake):
    text = (fake.folder / "sgmv.cuh").read_text()
    assert header(fake.selection, fake_generate) == text
    assert fake.selection.provenance.log_sha256 in text
    assert SM_90.device_name in text
    assert "dop 0.1.0" in text
    for kernel in fake.selection.kernels:
        assert f"namespace k_{kernel.trace_key} {{" in text
        assert all(fit.scenario_key in text for fit in kernel.fits)
    assert not re.search(r"@[A-Z_]+@", text)
    assert 'extern "C"' not in text
    # Every preamble once, and none of its macros survives.
    assert text.count("#define LEFT_OVER") == 2 == text.count("#undef LEFT_OVER")


def test_a_log_cannot_put_code_into_the_header(tmp_path):
    evil = "name\n#error evil\r*/ int x; \\"
    entry = record(FAKE[0], named("distinct", 8), TRACES["3"], 1e-6)
    entry = replace(entry, device_name=evil, sketch=evil, versions={evil: evil})
    selection = select(write_log(tmp_path / "log.jsonl", [entry]), kind="cuda")
    text = header(selection, fake_generate)
    places = [line for line in text.splitlines() if "evil" in line]
    assert len(places) == 3  # device, versions, sketch
    assert all(line.startswith("//") and not line.endswith("\\") for line in places)
    assert "*/" not in text


def test_a_source_is_taken_apart():
    code = fake_generate(FAKE[0], TRACES["2"], SM_90)
    parts = take_apart(code.source)
    assert parts.includes == ("<cstdint>", "<cuda_bf16.h>")
    assert parts.macros == ("LEFT_OVER",)
    assert parts.min_arch == 80
    assert parts.kernels.count("static __global__") == 1
    assert "static inline __device__ nv_bfloat16 max" in parts.preamble
    helper = "__device__ void copy(void* to, int dst_off, void* from, int src_off) {}\n"
    wide = take_apart(code.source.replace('extern "C"', helper + 'extern "C"', 1)).preamble
    assert "int dst_off, void* from, long long src_off" in wide
    with pytest.raises(ExportError):
        take_apart("int main() {}")


def test_expressions_in_cpp():
    assert cxx("(tokens + 7) // 8 * 3") == "(((tokens + 7LL) / 8LL) * 3LL)"
    for bad in ("slots", "tokens % 2", "f(tokens)", "tokens +", "1.5", "True"):
        with pytest.raises(ExportError):
            cxx(bad)


REAL = Workload("o", 128, (64, 32), 16, "bfloat16")


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    """A header with the default kernel of every sketch."""
    pytest.importorskip("tvm")
    folder = tmp_path_factory.mktemp("real")
    found = defaults(REAL)
    records = [
        record(REAL, named("uniform", tokens), c.trace, 1e-6 * (1 + abs(i - j)))
        for i, c in enumerate(found)
        for j, tokens in enumerate(range(2, 2 + len(found)))
    ]
    selection = select(write_log(folder / "log.jsonl", records), kind="cuda")
    assert len(selection.kernels) == len({c.trace.key for c in found})
    (folder / "sgmv.cuh").write_text(header(selection))
    (folder / "second.cu").write_text(
        '#include "sgmv.cuh"\nint f(const dop::sgmv::Problem& p) '
        "{ return (int)dop::sgmv::sgmv(p, nullptr, 0); }\n"
        "int workloads_seen_elsewhere() { return 1; }\n"
    )
    return folder


@needs_nvcc
def test_generated_kernels_compile_for_both_architectures(real):
    both = [f"-gencode=arch=compute_{n},code=sm_{n}" for n in (80, 90)]
    compile_(real, [real / "second.cu"], *both, "-c", "-o", str(real / "both.o"))


@needs_nvcc
@pytest.mark.skipif(driver() is None, reason="no GPU")
def test_generated_kernels_are_right_on_a_gpu(real):
    compile_(
        real,
        [HERE / "sgmv_check.cu", real / "second.cu"],
        "-arch=native",
        "-o",
        str(real / "check"),
    )
    done = subprocess.run([str(real / "check"), "gpu"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_kernels_of_one_gpu_alone_are_passed_over(tmp_path):
    """A header is compiled for any architecture; wgmma built for another one would trap."""
    from dop.export.cuda_header import header_of
    from dop.export.select import read_measured

    made = []

    def with_wgmma(workload, trace, target):
        made.append(trace.key)
        code = fake_generate(workload, trace, target)
        if trace.key == TRACES["4"].key:
            code.source = code.source.replace("uint one", 'asm("wgmma.mma_async;"); uint one')
        return code

    times = {"T8/distinct/8": {"4": 1.0, "3": 2.0}, "T64/identical/1": {"4": 1.0, "3": 2.0}}
    log = write_log(tmp_path / "log.jsonl", records_of(FAKE[0], TRACES, times))
    text, selection, notes = header_of(read_measured(log), 0.05, with_wgmma)
    assert "wgmma" not in text
    assert len(made) == len(set(made))  # also those that were chosen twice
    assert [k.trace_key for k in selection.kernels] == [TRACES["3"].key]
    assert len(notes) == 1
    assert "sm_90a alone" in notes[0]
