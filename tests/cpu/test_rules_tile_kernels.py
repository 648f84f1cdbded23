"""The register form: its sketch, the kernels that come out of it, and that they fit registers."""

from __future__ import annotations

import contextlib
import random
import re
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from dop.errors import ConstraintError, TraceError
from dop.space.generate import build_space
from dop.space.sketch import Sketch
from dop.space.step import AnnotationStep, PragmaStep
from dop.space.trace import Trace
from dop.target import SM_90, Target
from dop.workload import Workload

pytest.importorskip("tvm")

from dop.lowering.codegen import Generated, evaluate, generate

O_16 = Workload("o_proj", 4096, (4096,), 16, "bfloat16")
QKV_64 = Workload("qkv_proj", 4096, (4096, 1024, 1024), 64, "float16")
SM_80 = Target("cuda", "sm_80", "NVIDIA A100", 108, 1024, 166912, 65536, 40 << 20, 16)


def sketch_of(workload: Workload, target: Target = SM_90) -> Sketch | None:
    found = [s for s in build_space(workload, target).sketches if s.name.startswith("wide_tiles")]
    return found[0] if found else None


def build(workload: Workload, target: Target = SM_90, **numbers: int) -> Generated:
    sketch = sketch_of(workload, target)
    assert sketch is not None
    values = {**sketch.default(), **{k.replace("__", "."): v for k, v in numbers.items()}}
    return generate(workload, sketch.bind(values), target)


def with_pragma(trace: Trace, name: str, value: int) -> Trace:
    """The trace with another value for a pragma."""
    found = [s for s in trace.steps if isinstance(s, PragmaStep) and s.name == name]
    assert found
    return Trace(tuple(replace(s, value=value) if s in found else s for s in trace.steps))


@pytest.mark.parametrize("widths", [(4096,), (4096, 1024, 1024), (14336, 14336), (2048, 512, 512)])
@pytest.mark.parametrize("rank", [8, 16, 32, 64, 128])
@pytest.mark.parametrize("k", [2048, 4096, 14336])
def test_default_fits(widths: tuple[int, ...], rank: int, k: int) -> None:
    sketch = sketch_of(Workload("w", k, widths, rank, "bfloat16"))
    assert sketch is not None
    assert sketch.broken_limit(sketch.default()) is None


def test_shapes_that_it_cannot_treat_have_no_sketch() -> None:
    for workload in (
        Workload("w", 4096, (4096,), 13, "bfloat16"),
        Workload("w", 4096, (4096,), 256, "bfloat16"),
        Workload("w", 4096, (4104,), 16, "bfloat16"),
        Workload("w", 4128, (4096,), 16, "bfloat16"),
        Workload("w", 4096, (4096,), 16, "float32"),
    ):
        with contextlib.suppress(ConstraintError):  # raised where no rule fits at all
            assert sketch_of(workload) is None


def test_numbers_come_from_the_loops() -> None:
    code = build(
        *(QKV_64,),
        tokens__tile_rows=128,
        expand__row_tiles=2,
        expand__steps=4,
        expand__column_warps=2,
        expand__ahead=2,
        shrink__split_k=4,
        shrink__row_warps=4,
        shrink__rank_warps=2,
        shrink__k_tiles=4,
        shrink__stages=3,
        expand__dependent=1,
    )
    shrink, expand = code.kernels
    assert shrink.grid == ("tiles", "4", "1")
    assert shrink.block == (32, 2, 4)
    assert shrink.dynamic_smem_bytes == max(3 * 128 * (128 + 192), 4 * 128 * (192 + 4))
    assert evaluate(expand.grid[0], tokens=1, tiles=3) == 3 * 6144 // (2 * 4 * 32)
    assert expand.block == (32, 2, 4)
    assert expand.dependent
    assert not shrink.dependent
    (v,) = code.workspaces
    assert (v.dtype, evaluate(v.elements, tokens=1, tiles=3)) == ("float16", 3 * 128 * 192)
    assert "__cluster_dims__(1, 4, 1)" in code.source
    assert "@" not in code.source
    assert shrink.arguments[-2:] == ("a1_shift", "a2_shift")


def test_traces_survive_the_log() -> None:
    sketch = sketch_of(QKV_64)
    assert sketch is not None
    rng, found = random.Random(0), 0
    while found < 5:
        values = sketch.sample(rng)
        if sketch.broken_limit(values) is None:
            trace = Trace.from_json(sketch.bind(values).to_json())
            assert sketch.match(trace) == values
            found += 1


def test_before_hopper_there_are_no_clusters() -> None:
    code = build(O_16, SM_80)
    assert "main_kernel" in code.source
    assert "__cluster_dims__(1" not in code.source
    assert not any(kernel.dependent for kernel in code.kernels)


def test_one_half_alone_is_refused() -> None:
    sketch = sketch_of(O_16)
    assert sketch is not None
    steps = sketch.bind(sketch.default()).steps
    last = [s for s in steps if isinstance(s, AnnotationStep) and s.intrinsic][-1]
    with pytest.raises(TraceError, match="other half"):
        generate(O_16, Trace(tuple(s for s in steps if s is not last)), SM_90)


def test_shared_b_and_warpgroups_are_sketches_of_their_own() -> None:
    sketches = [s for s in build_space(QKV_64, SM_90).sketches if s.name.startswith("wide_tiles")]
    assert len(sketches) == 10
    for sketch in sketches:
        code = generate(QKV_64, sketch.bind(sketch.default()), SM_90)
        shrink, expand = code.kernels
        assert (expand.dynamic_smem_bytes > 0) == ("shared_b" in sketch.name)
        parts = ("warpgroup_split_k", "warpgroup_clusters", "warpgroup_engine")
        whole = any(part in sketch.name for part in parts)
        assert ("m64n192k16" in code.source) == whole
        assert ("m64n96k16" in code.source) == ("warpgroup_rank_blocks" in sketch.name)
        assert shrink.dynamic_smem_bytes > 0


def test_a_tile_may_have_several_clusters_along_k() -> None:
    sketches = {s.name: s for s in build_space(QKV_64, SM_90).sketches}
    sketch = next(s for n, s in sketches.items() if "register_b/warpgroup_clusters" in n)
    values = sketch.default()
    assert values["shrink.split_k"] == 2 * values["shrink.cluster"]
    code = generate(QKV_64, sketch.bind(values), SM_90)
    assert code.kernels[0].grid[:2] == ("tiles", str(values["shrink.split_k"]))
    assert f"__cluster_dims__(1, {values['shrink.cluster']}, 1)" in code.source
    (v,) = [space for space in code.workspaces if space.name == "v"]
    assert evaluate(v.elements, tokens=64, tiles=1) == 2 * 64 * QKV_64.slices * QKV_64.rank
    for split_k, cluster, why in ((8, 8, "lone"), (16, 2, "sums of v"), (2, 4, "left over")):
        wrong = {**values, "shrink.split_k": split_k, "shrink.cluster": cluster}
        assert why in (sketch.broken_limit(wrong) or ""), (split_k, cluster)
    assert "L2::256B" not in code.source
    lone = {"shrink.split_k": 1, "shrink.cluster": 1, "shrink.l2_fetch": 256}
    ahead = generate(QKV_64, sketch.bind({**values, **lone}), SM_90)
    shrink = ahead.source[ahead.source.index('extern "C" __global__') :]
    assert shrink.count("dop_copy_ahead(") == 2
    assert "L2::256B" in ahead.source
    with pytest.raises(TraceError, match="l2_fetch is 0 or 256"):
        generate(QKV_64, with_pragma(sketch.bind(values), "l2_fetch", 128), SM_90)
    few_columns = Workload("w", 256, (4096,), 64, "bfloat16")
    assert not any("clusters" in s.name for s in build_space(few_columns, SM_90).sketches)


def test_blocks_that_share_ranks_are_neighbours() -> None:
    sketches = {s.name: s for s in build_space(QKV_64, SM_90).sketches}
    name = next(n for n in sketches if "register_b/warpgroup_rank_blocks" in n)
    values = sketches[name].default()
    shrink = generate(QKV_64, sketches[name].bind(values), SM_90).kernels[0]
    assert values["shrink.rank_blocks"] == 2
    assert shrink.grid[:2] == ("tiles * 2", str(values["shrink.split_k"]))


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc")
@pytest.mark.parametrize(("workload", "which"), [(O_16, 0), (QKV_64, -1)])
def test_compiles_without_spills(workload: Workload, which: int, tmp_path: Path) -> None:
    sketches = [s for s in build_space(workload, SM_90).sketches if s.name.startswith("wide_tiles")]
    trace = sketches[which].bind(sketches[which].default())
    (tmp_path / "k.cu").write_text(generate(workload, trace, SM_90).source)
    command = ["nvcc", "-cubin", "-arch=sm_90a", "-std=c++17", "-Xptxas", "-v"]
    done = subprocess.run(
        [*command, "-o", str(tmp_path / "k.cubin"), str(tmp_path / "k.cu")],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    spilled = re.findall(r"(\d+) bytes (?:stack frame|spill stores|spill loads)", done.stderr)
    assert len(spilled) == 6
    assert set(spilled) == {"0"}


FEW = "small_tiles/"


@pytest.mark.parametrize("widths", [(4096,), (4096, 1024, 1024), (14336, 14336), (2048, 512, 512)])
@pytest.mark.parametrize("rank", [8, 16, 32, 64, 128])
@pytest.mark.parametrize("k", [2048, 4096, 14336])
def test_default_for_few_rows_fits(widths: tuple[int, ...], rank: int, k: int) -> None:
    workload = Workload("w", k, widths, rank, "bfloat16")
    sketches = [s for s in build_space(workload, SM_90).sketches if s.name.startswith(FEW)]
    assert len(sketches) == (2 if rank % 32 == 0 else 1)
    for sketch in sketches:
        assert sketch.broken_limit(sketch.default()) is None


def build_few(workload: Workload, which: str, **numbers: int) -> Generated:
    found = [s for s in build_space(workload, SM_90).sketches if s.name.startswith(FEW)]
    sketch = next(s for s in found if f"/{which}/" in s.name)
    values = {**sketch.default(), **{k.replace("__", "."): v for k, v in numbers.items()}}
    trace = Trace.from_json(sketch.bind(values).to_json())
    assert sketch.match(trace) == values
    return generate(workload, trace, SM_90)


def test_few_rows_are_spread_over_clusters_and_blocks_of_ranks() -> None:
    code = build_few(
        *(QKV_64, "shared_b"),
        tokens__tile_rows=16,
        tokens__workers=3,
        shrink__split_k=16,
        shrink__cluster=4,
        shrink__rank_blocks=3,
        shrink__rank_warps=6,
        shrink__row_warps=1,
        expand__column_warps=2,
        expand__steps=1,
    )
    shrink, expand = code.kernels
    assert shrink.grid[0] == str(16 * 3)
    assert evaluate(shrink.grid[1], tokens=64, tiles=64) == 7
    assert shrink.block == (32, 2, 1)
    assert evaluate(expand.grid[0], tokens=64, tiles=64) == 7 * 6144 // 64
    assert "__cluster_dims__(4, 1, 1)" in code.source
    (v,) = code.workspaces
    assert evaluate(v.elements, tokens=64, tiles=64) == 4 * 64 * 3 * 16 * 64
    assert "@" not in code.source
    assert code.source.endswith("  dop_wait_for_v();\n}\n")  # blocks without a tile wait too


def test_beside_a_matmul_a_few_blocks_of_shrink_go_through_all_tiles() -> None:
    """And both kernels are launched plainly."""
    beside = replace(QKV_64, beside=True)
    for blocks, grid in ((0, 7), (2, 2)):
        code = build_few(
            *(beside, "shared_b"),
            tokens__tile_rows=16,
            tokens__workers=3,
            shrink__row_warps=1,
            shrink__tile_blocks=blocks,
        )
        shrink, expand = code.kernels
        assert evaluate(shrink.grid[1], tokens=64, tiles=64) == grid
        assert evaluate(expand.grid[0], tokens=64, tiles=64) % 7 == 0
        assert "for (int base = blockIdx.y; base < tiles; base += 32 * workers)" in code.source
        assert not any(kernel.dependent for kernel in code.kernels)
    names = {name for s in build_space(QKV_64, SM_90).sketches for name in s.default()}
    assert "shrink.tile_blocks" not in names


def test_few_rows_ask_for_all_of_b_before_they_wait() -> None:
    source = build_few(O_16, "register_b", expand__steps=2).source
    waited = source.rindex("  dop_wait_for_v();\n  unsigned vw")
    assert source.index("DOP_LOAD_B(step, step)") < waited
    assert source.count("DOP_LOAD_B(") == 2  # its definition and that


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("cluster_blocks", 3, "fit"),
        ("rank_blocks", 5, "fit"),
        ("workers", 0, "tile_blocks wants"),
        ("tile_blocks", -1, "tile_blocks wants"),
    ],
)
def test_clusters_and_blocks_that_leave_something_over_are_refused(
    name: str, value: int, message: str
) -> None:
    beside = replace(O_16, beside=True)
    sketch = next(s for s in build_space(beside, SM_90).sketches if s.name.startswith(FEW))
    with pytest.raises(TraceError, match=message):
        generate(beside, with_pragma(sketch.bind(sketch.default()), name, value), SM_90)


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc")
def test_few_rows_compile_without_spills(tmp_path: Path) -> None:
    (tmp_path / "k.cu").write_text(build_few(QKV_64, "shared_b").source)
    command = ["nvcc", "-cubin", "-arch=sm_90a", "-std=c++17", "-Xptxas", "-v"]
    done = subprocess.run(
        [*command, "-o", str(tmp_path / "k.cubin"), str(tmp_path / "k.cu")],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    spilled = re.findall(r"(\d+) bytes (?:stack frame|spill stores|spill loads)", done.stderr)
    assert set(spilled) == {"0"}


def test_a_trace_of_an_older_sketch_is_still_told_apart():
    """A pragma that was not there, one that stood elsewhere: the other numbers are read off."""
    space = build_space(Workload("down", 14336, (4096,), 64, "bfloat16"), SM_90)
    sketch = next(s for s in space.sketches if s.name.startswith("small_tiles"))
    rng = random.Random(3)
    draws = (sketch.sample(rng) for _ in range(5000))
    valid = [values for values in draws if sketch.broken_limit(values) is None][:20]
    assert len(valid) == 20
    for values in valid:
        steps = list(sketch.bind(values).steps)
        workers = next(
            i for i, s in enumerate(steps) if isinstance(s, PragmaStep) and s.name == "workers"
        )
        moved = steps.pop(workers)
        older = Trace((*steps[:6], moved, *steps[6:]))
        assert sketch.match(older) is None
        found = sketch.resembling(older)
        assert found is not None
        differing = {n for n in values if found[n] != values[n]}
        assert differing <= {"tokens.workers"}
    other = next(s for s in space.sketches if s.name.startswith("rows/"))
    assert other.resembling(older) is None
