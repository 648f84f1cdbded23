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

from dop.errors import BuildError, ExportError
from dop.export.cuda_header import early_ones, header, header_of, of_one_gpu
from dop.export.cuda_text import cxx, take_apart
from dop.export.select import read_measured, select, takes_maps
from dop.measure.compile_cuda import find_nvcc
from dop.measure.cuda_driver import driver
from dop.measure.plan import make_plan, tile_bound
from dop.scenario import MIXES, named
from dop.space.step import ANNOTATIONS, AnnotationStep, PragmaStep, SplitStep
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
WGMMA = AnnotationStep(0, 0, ANNOTATIONS.index("tensorize"), "warpgroup_product_bf16")
ALONE = Trace((SplitStep(0, 0, 64, (9,), True), WGMMA))
EARLY = Trace((SplitStep(0, 0, 64, (11,), True), PragmaStep(0, 0, "dependent_launch", 3)))
MORE = {**TRACES, "alone": ALONE, "early": EARLY}

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
    """Small kernels of TVM's form; the split's length decides on form, shared memory, arch and
    launch: 9 is of sm_90a alone, 11 early."""
    number = trace.steps[0].lengths[0]
    half, include = {
        "bfloat16": ("nv_bfloat16", "cuda_bf16.h"),
        "float16": ("half", "cuda_fp16.h"),
    }[workload.dtype]
    shifts = ", ".join(f"long long a{s}_shift" for s in range(1, workload.slices))
    args = f"{half}* __restrict__ x_ptr, float* __restrict__ v_ptr, int tokens"
    args += f", {shifts}" if shifts else ""
    waits = 'asm volatile("griddepcontrol.wait;");'
    wgmma = 'asm volatile("wgmma.fence.sync.aligned;");  // wgmma.mma_async'
    extra = {7: waits, 9: wgmma}.get(number, "")
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
        dependent=smem == 1024 and number != 11,
        early=number == 11,
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
        times = {s.key: {n: 1 + rng.random() for n in MORE} for s in scenarios}
        records += records_of(workload, MORE, times)
    measured = read_measured(write_log(folder / "log.jsonl", records), kind="cuda")
    found = header_of(measured, 0.05, fake_generate)
    (folder / "sgmv.cuh").write_text(found.text)
    (folder / "second.cu").write_text(
        '#include "sgmv.cuh"\n#include "sgmv.cuh"\n'
        "int workloads_seen_elsewhere() { return dop::sgmv::detail::kWorkloads; }\n"
    )
    return SimpleNamespace(folder=folder, selection=found.selection, own=found.own)


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
    done = subprocess.run([str(program), *mode.split()], input=text, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.splitlines()


@pytest.mark.parametrize("own", [False, True])
def test_dispatch_in_the_header_matches_the_table(fake, program, own):
    table = (fake.own if own else fake.selection).table
    assert any(ALONE.key in found.trace_keys for found in table.workloads.values()) is own
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
    got = run(program, "choose own" if own else "choose", "\n".join(cases))
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
    assert "wgmma" in text
    main = fake.folder / "second.cu"
    for arch in ("80", "90a"):  # 90: the program
        compile_(fake.folder, [main], f"-arch=sm_{arch}", "-c", "-o", str(fake.folder / "other.o"))


@needs_nvcc
def test_a_kernel_tells_what_it_was_compiled_for(fake):
    """`compiled_for_own` reads its bound, which must differ only for sm_90a."""
    text = (fake.folder / "sgmv.cuh").read_text()
    found = re.search(r"#ifdef __CUDA_ARCH_FEAT_SM90_ALL.*? own_kernel\(\) \{\}\n", text, re.S)
    source = fake.folder / "own.cu"
    source.write_text(f"{found[0]}const void* used() {{ return (const void*)&own_kernel; }}\n")
    for arch, bound in (("80", 32), ("90", 32), ("90a", 64)):
        ptx = source.with_suffix(".ptx")
        compile_(fake.folder, [source], f"-arch=sm_{arch}", "-ptx", "-o", str(ptx))
        assert f".maxntid {bound}," in ptx.read_text()


def test_the_header_is_the_same_for_the_same_log_and_says_where_it_is_from(fake):
    text = (fake.folder / "sgmv.cuh").read_text()
    assert header(fake.selection, fake_generate, fake.own) == text
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
ONE_SLICE = Workload(
    "o", 512, (512,), 128, "bfloat16"
)  # wgmma, B in shared memory, the copy engine


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    """A header with the default kernel of every sketch, and of those of tiles for one slice; but
    for those that take tensor maps."""
    pytest.importorskip("tvm")
    folder = tmp_path_factory.mktemp("real")
    tiles = [c for c in defaults(ONE_SLICE) if "/register_product/" in c.sketch.name]
    assert any("warpgroup" in c.sketch.name for c in tiles)
    records = [
        record(workload, named("uniform", tokens), c.trace, 1e-6 * (1 + abs(i - j)))
        for workload, found in ((REAL, defaults(REAL)), (ONE_SLICE, tiles))
        for i, c in enumerate(found)
        for j, tokens in enumerate(range(2, 2 + len(found)))
    ]
    made = header_of(read_measured(write_log(folder / "log.jsonl", records), kind="cuda"), 0.05)
    assert made.own is not None
    every = {(r.workload_key, r.trace.key): r.trace for r in records}
    fitting = {key for key, trace in every.items() if not any(map(takes_maps, trace.steps))}
    left_out = len(every) - len(fitting)
    assert left_out
    (note,) = made.notes
    assert note.startswith(f"{left_out} kernels take tensor maps")
    keys = [(kernel.workload.key, kernel.trace_key) for kernel in made.kernels]
    assert sorted(keys) == sorted(fitting)
    (folder / "sgmv.cuh").write_text(made.text)
    (folder / "second.cu").write_text(
        '#include "sgmv.cuh"\nint f(const dop::sgmv::Problem& p) '
        "{ return (int)dop::sgmv::sgmv(p, nullptr, 0); }\n"
        "int workloads_seen_elsewhere() { return 1; }\n"
    )
    return folder


@needs_nvcc
def test_generated_kernels_compile_for_all_architectures(real):
    every = [f"-gencode=arch=compute_{n},code=sm_{n}" for n in ("80", "90", "90a")]
    compile_(real, [real / "second.cu"], *every, "-c", "-o", str(real / "all.o"))


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


def measured_of(tmp_path: Path, traces: dict[str, Trace], *times: dict[str, float]):
    keys = ("T8/distinct/8", "T64/identical/1")
    log = write_log(
        tmp_path / "log.jsonl", records_of(FAKE[0], traces, dict(zip(keys, times, strict=True)))
    )
    return read_measured(log)


def keys_of(selection) -> list[str]:
    return [kernel.trace_key for kernel in selection.kernels]


@pytest.mark.parametrize("by_trace", [True, False])
def test_kernels_of_one_gpu_alone_have_a_table_of_their_own(tmp_path, by_trace):
    """A header is compiled for any architecture; wgmma built for another one would trap. The trace
    tells, so that one choice is enough; where it does not, the text does."""
    made = []

    def with_wgmma(workload, trace, target):
        made.append(trace.key)
        code = fake_generate(workload, trace, target)
        if trace.key == TRACES["4"].key:
            code.source = code.source.replace("uint one", 'asm("wgmma.mma_async;"); uint one')
        return code

    name = "alone" if by_trace else "4"
    times = {name: 1.0, "3": 2.0, "5": 2.01}
    measured = measured_of(tmp_path, MORE, times, times)
    assert of_one_gpu(measured) == ({(FAKE[0].key, ALONE.key)} if by_trace else set())
    found = header_of(measured, 0.05, with_wgmma)
    alone, portable = MORE[name].key, TRACES["3"].key
    assert sorted(made) == sorted((alone, portable))  # also those that were chosen twice
    assert keys_of(found.selection) == [portable]
    assert keys_of(found.own) == [alone]
    assert [kernel.trace_key for kernel in found.kernels] == [portable, alone]
    assert not found.notes
    kernel = found.text[found.text.index(f"namespace k_{alone} {{") :]
    guard = "#if !defined(__CUDA_ARCH__) || defined(__CUDA_ARCH_FEAT_SM90_ALL)\n"
    assert 0 < kernel.index(guard) < kernel.index("wgmma")
    assert found.text.count(guard) == 1


def test_few_kernels_of_one_gpu_join_the_others(tmp_path):
    slow, fast = {"3": 1.0, "alone": 2.0, "2": 2.0}, {"3": 2.0, "alone": 1.0, "2": 1.02}
    found = header_of(measured_of(tmp_path, MORE, slow, fast), 0.05, fake_generate)
    assert found.own is None  # no batch wins more than the regret
    assert ALONE.key not in found.text
    fast["alone"] = 0.9
    found = header_of(measured_of(tmp_path / "b", MORE, slow, fast), 0.05, fake_generate)
    assert set(keys_of(found.selection)) == {TRACES["3"].key, TRACES["2"].key}
    assert set(keys_of(found.own)) == {TRACES["3"].key, ALONE.key}
    assert len(found.kernels) == 3


def test_a_workload_with_kernels_of_one_gpu_alone_is_left_out(tmp_path):
    records = [record(FAKE[0], named("distinct", 8), ALONE, 1e-6)]
    records += [record(FAKE[1], named("distinct", 8), TRACES["3"], 1e-6)]
    log = write_log(tmp_path / "log.jsonl", records)
    found = header_of(read_measured(log), 0.05, fake_generate)
    assert list(found.selection.table.workloads) == [FAKE[1].key]
    assert [kernel.workload.key for kernel in found.kernels] == [FAKE[1].key]
    assert ALONE.key not in found.text
    assert len(found.notes) == 1
    assert FAKE[0].key in found.notes[0]


def test_kernels_that_cannot_be_generated_are_passed_over(tmp_path):
    made = []

    def fails(workload, trace, target):
        made.append(trace.key)
        if trace.key == TRACES["4"].key:
            raise BuildError("no.")
        return fake_generate(workload, trace, target)

    times = {"4": 1.0, "3": 2.0}
    found = header_of(measured_of(tmp_path, MORE, times, times), 0.05, fails)
    assert keys_of(found.selection) == [TRACES["3"].key]
    assert len(made) == 2
    assert len(found.notes) == 1
    assert "cannot be generated: no." in found.notes[0]


def launches_of(text: str, trace: Trace) -> list[str]:
    """Shared memory and `dependent` of a kernel's launches."""
    kernel = text[text.index(f"namespace k_{trace.key} {{") :]
    kernel = kernel[: kernel.index(f"::k_{trace.key}\n")]
    return re.findall(r"^ +(\d+, (?:true|false)), arguments", kernel, re.MULTILINE)


def test_early_kernels_are_left_out_or_launched_plainly(tmp_path):
    """They read weights before they wait; a header cannot know when those were written."""
    times = {"early": 1.0, "3": 2.0}
    measured = measured_of(tmp_path, MORE, times, times)
    assert early_ones(measured, set()) == {(FAKE[0].key, EARLY.key)}
    found = header_of(measured, 0.05, fake_generate)
    assert keys_of(found.selection) == [TRACES["3"].key]
    assert launches_of(found.text, TRACES["3"]) == ["1024, true"]
    assert len(found.notes) == 1
    assert "1 kernels read weights" in found.notes[0]
    for lacking in ({"early": 1.0}, {"early": 1.0, "alone": 3.0}):  # one batch has no other
        measured = measured_of(tmp_path / str(len(lacking)), MORE, times, lacking)
        assert not early_ones(measured, of_one_gpu(measured))
        found = header_of(measured, 0.05, fake_generate)
        assert launches_of(found.text, EARLY) == ["1024, false"]
        assert "launched plainly here" in found.text


MAPPED = Trace((SplitStep(0, 0, 64, (9,), True), WGMMA, PragmaStep(0, 0, "engine", 1)))


def test_kernels_that_take_tensor_maps_are_left_out(tmp_path):
    """The driver's interface makes the maps, and a header's user has none."""
    every = {**MORE, "mapped": MAPPED}
    times = {"mapped": 1.0, "early": 1.5, "3": 2.0}
    found = header_of(measured_of(tmp_path, every, times, times), 0.05, fake_generate)
    assert keys_of(found.selection) == [TRACES["3"].key]
    assert found.own is None
    assert "1 kernels take tensor maps" in found.notes[1]
    lacking = measured_of(tmp_path / "early", every, times, {"mapped": 1.0, "early": 2.0})
    found = header_of(lacking, 0.05, fake_generate)  # one batch has no other than the early one
    assert launches_of(found.text, EARLY) == ["1024, false"]
    only = records_of(FAKE[1], {"mapped": MAPPED}, {"T8/distinct/8": {"mapped": 1.0}})
    both = [*records_of(FAKE[0], TRACES, {"T8/distinct/8": {"3": 1.0}}), *only]
    log = write_log(tmp_path / "both.jsonl", both)
    found = header_of(read_measured(log), 0.05, fake_generate)
    assert list(found.selection.table.workloads) == [FAKE[0].key]
    assert any(note.startswith(FAKE[1].key) for note in found.notes)


def test_a_kernel_that_turns_out_to_take_tensor_maps_is_passed_over(tmp_path):
    def mapped(workload, trace, target):
        made = fake_generate(workload, trace, target)
        if trace == TRACES["4"]:
            made.kernels[0].arguments = (*made.kernels[0].arguments, "x_box64")
        return made

    times = {"4": 1.0, "3": 2.0}
    found = header_of(measured_of(tmp_path, MORE, times, times), 0.05, mapped)
    assert keys_of(found.selection) == [TRACES["3"].key]
    assert "takes tensor maps" in found.notes[0]


def test_a_real_early_kernel_is_launched_plainly(tmp_path):
    pytest.importorskip("tvm")
    from dop.space.generate import build_space

    sketches = build_space(REAL, SM_90).sketches
    sketch = next(s for s in sketches if s.name.startswith("rows/") and "/early_b/" in s.name)
    traces = {str(n): sketch.bind({**sketch.default(), "expand.dependent": n}) for n in (2, 3)}
    for number, first in (("2", "true"), ("3", "false")):
        entry = record(REAL, named("uniform", 8), traces[number], 1e-6)
        log = write_log(tmp_path / f"{number}.jsonl", [entry])
        text = header_of(read_measured(log), 0.05).text
        assert launches_of(text, traces[number]) == [f"0, {first}", "0, true"]
