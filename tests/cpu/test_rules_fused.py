"""The sketch of one kernel for tiles of many rows: where it is offered, what comes out of it."""

from __future__ import annotations

import random
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from dop.database.step_words import LoopTracker
from dop.errors import ConstraintError, TraceError
from dop.export.cuda_text import take_apart
from dop.export.select import takes_maps
from dop.measure.artifact import is_pair
from dop.measure.tensor_map import parse
from dop.ops.plan import TILE_SIZES
from dop.space.generate import build_space
from dop.space.sketch import Sketch
from dop.space.step import PragmaStep, SplitStep
from dop.space.trace import Trace
from dop.target import SM_90, Target
from dop.workload import Workload

pytest.importorskip("tvm")

from dop.lowering.codegen import evaluate, generate

DOWN = Workload("down_proj", 14336, (4096,), 128, "bfloat16")
QKV = Workload("qkv_proj", 4096, (4096, 1024, 1024), 64, "float16")
SM_100 = replace(SM_90, arch="sm_100")


def sketch_of(workload: Workload, target: Target = SM_90) -> Sketch | None:
    try:
        space = build_space(workload, target)
    except ConstraintError:  # no rule fits at all
        return None
    found = [s for s in space.sketches if s.name.startswith("fused_tiles/")]
    assert len(found) < 2
    return found[0] if found else None


def valid(sketch: Sketch, count: int) -> list[dict[str, int]]:
    rng = random.Random(7)
    draws = (sketch.sample(rng) for _ in range(1000))
    return [values for values in draws if sketch.broken_limit(values) is None][:count]


@pytest.mark.parametrize(
    "widths", [(4096,), (4096, 1024, 1024), (14336, 14336), (1024,), (128, 64)]
)
@pytest.mark.parametrize("rank", [32, 40, 64, 96, 128, 192, 256])
@pytest.mark.parametrize("k", [1024, 4096, 14336])
def test_default_fits(widths: tuple[int, ...], rank: int, k: int) -> None:
    if rank > min(widths):
        pytest.skip("no such adapter")
    sketch = sketch_of(Workload("w", k, widths, rank, "bfloat16"))
    assert sketch is not None
    assert sketch.broken_limit(sketch.default()) is None


def test_shapes_that_it_cannot_treat_have_no_sketch() -> None:
    for workload in (
        replace(DOWN, rank=36),
        replace(DOWN, rank=24),
        replace(DOWN, rank=320),
        replace(DOWN, out_features=(4128,)),
        replace(DOWN, in_features=4128),
        replace(DOWN, in_features=128),
        replace(DOWN, dtype="float32"),
        replace(DOWN, beside=True),
    ):
        assert sketch_of(workload) is None, workload.key
    assert sketch_of(DOWN, SM_100) is None


def test_clusters_have_whole_steps_and_chunks() -> None:
    def clusters(workload: Workload) -> tuple[int, ...]:
        sketch = sketch_of(workload)
        assert sketch is not None
        return next(d.choices for d in sketch.domains if d.name == "shrink.split_k")

    assert clusters(DOWN) == (1, 2, 4, 8, 16)
    assert clusters(replace(DOWN, out_features=(4096, 512))) == (1, 2, 4, 8)
    assert clusters(replace(DOWN, in_features=1024)) == (1, 2, 4)
    assert clusters(replace(DOWN, out_features=(192,))) == (1,)


def test_limits() -> None:
    sketch = sketch_of(DOWN)
    assert sketch is not None
    base = {**sketch.default(), "tokens.tile_rows": 128, "shrink.stages": 5}
    assert sketch.broken_limit(base) is None
    for wrong, why in (
        ({"shrink.stages": 2}, "sums"),
        ({"shrink.stages": 8}, "shared memory"),
        ({"shrink.sums_apart": 1}, "shared memory"),
        ({"shrink.split_k": 16, "shrink.stages": 10, "tokens.tile_rows": 128}, "shared memory"),
    ):
        assert why in (sketch.broken_limit({**base, **wrong}) or ""), wrong
    high = sketch_of(replace(DOWN, rank=256))
    assert high is not None
    assert "registers" in (
        high.broken_limit({**high.default(), "tokens.tile_rows": 128, "shrink.stages": 3}) or ""
    )


@pytest.mark.parametrize(
    "workload",
    [DOWN, QKV, replace(DOWN, rank=256), replace(DOWN, rank=32), replace(QKV, rank=40)],
    ids=lambda w: w.key,
)
def test_one_kernel_and_no_workspace(workload: Workload) -> None:
    sketch = sketch_of(workload)
    assert sketch is not None
    draws = valid(sketch, 12)
    assert len(draws) == 12
    heights = set()
    for values in (sketch.default(), *draws):
        trace = Trace.from_json(sketch.bind(values).to_json())
        assert sketch.match(trace) == values
        code = generate(workload, trace, SM_90)
        (kernel,) = code.kernels
        assert code.workspaces == ()
        blocks = workload.slices * values["shrink.split_k"]
        assert evaluate(kernel.grid[0], tokens=64, tiles=5) == 5 * blocks
        assert kernel.block == (32, 1, 12)
        assert kernel.dynamic_smem_bytes == int(sketch.estimates["expand.smem_bytes"](values))
        assert kernel.dependent == (values["expand.dependent"] == 2)
        body = code.source[code.source.index('extern "C" __global__') :]
        statements = body[body.index("{\n") :]
        before, *waits = statements.split("dop_wait_for_predecessor();")
        assert len(waits) == kernel.dependent
        assert ("__restrict__" in body) != kernel.dependent
        if waits:  # what stands in front of it neither reads, nor leaves, nor lets others begin
            for other in ("_ptr", "dop_copy_box", "return", "dop_dependents_may_start"):
                assert other not in before
                assert other in waits[0]
        assert f"dop__cluster_dims__({values['shrink.split_k']}, 1, 1)" in body
        assert "@" not in body
        assert not is_pair(code.kernels)  # type: ignore[arg-type]
        heights.add(code.tile_rows)
    assert heights <= set(TILE_SIZES)


@pytest.mark.parametrize("rank", [64, 40])
def test_its_maps_are_of_all_four_tensors(rank: int) -> None:
    """Boxes hold 64 ranks, whatever the stack's are."""
    workload = replace(QKV, rank=rank)
    sketch = sketch_of(workload)
    assert sketch is not None
    values = {**sketch.default(), "tokens.tile_rows": 48}
    trace = sketch.bind(values)
    code = generate(workload, trace, SM_90)
    maps = [name for name in code.kernels[0].arguments if parse(name)]
    a, b = (["a_box64", "a1_box64", "a2_box64"], ["b_box64", "b1_box64", "b2_box64"])
    assert maps == ["x_box48", *a, *b, "y_box48"]
    assert any(map(takes_maps, trace.steps))
    text = take_apart(code.source)
    assert (text.min_arch, text.alone) == (90, True)


def test_traces_that_do_not_fit_are_refused() -> None:
    sketch = sketch_of(DOWN)
    assert sketch is not None
    steps = sketch.bind(sketch.default()).steps

    def changed(name: str, value: int) -> Trace:
        found = [s for s in steps if isinstance(s, PragmaStep) and s.name == name]
        assert found
        return Trace(tuple(replace(s, value=value) if s in found else s for s in steps))

    for name, value, message in (
        ("pipeline_depth", 2, "sums"),
        ("dependent_launch", 1, "dependent_launch 0 or 2"),
        ("engine", 0, "wants engine"),
    ):
        with pytest.raises(TraceError, match=message):
            generate(DOWN, changed(name, value), SM_90)
    other = [
        replace(s, lengths=(4,)) if isinstance(s, SplitStep) and s.lengths == (8,) else s
        for s in steps
    ]
    halves = [s for s, t in zip(steps, other, strict=True) if s != t]
    assert len(halves) == 2  # columns and k
    lone = tuple(t if s == halves[0] else s for s, t in zip(steps, other, strict=True))
    with pytest.raises(TraceError, match="leave rows, ranks or columns over"):
        generate(DOWN, Trace(lone), SM_90)


def test_its_steps_have_words() -> None:
    sketch = sketch_of(DOWN)
    assert sketch is not None
    said = LoopTracker(sketch.bind(sketch.default()).steps).walk()
    words = " ".join(one.words for one in said)
    assert "pragma" not in words
    assert "cluster_update_bf16" in words
    assert "?" not in words


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc")
@pytest.mark.parametrize(
    ("workload", "rows", "cluster", "stages"),
    [
        (DOWN, 128, 8, 5),
        (QKV, 16, 8, 8),
        (replace(DOWN, rank=256), 64, 8, 4),
        (replace(DOWN, rank=40), 80, 4, 8),
    ],
)
def test_compiles_without_spills(
    workload: Workload, rows: int, cluster: int, stages: int, tmp_path: Path
) -> None:
    sketch = sketch_of(workload)
    assert sketch is not None
    numbers = {"tokens.tile_rows": rows, "shrink.split_k": cluster, "shrink.stages": stages}
    values = {**sketch.default(), **numbers}
    assert sketch.broken_limit(values) is None
    (tmp_path / "k.cu").write_text(generate(workload, sketch.bind(values), SM_90).source)
    command = ["nvcc", "-cubin", "-arch=sm_90a", "-std=c++17", "-Xptxas", "-v"]
    done = subprocess.run(
        [*command, "-o", str(tmp_path / "k.cubin"), str(tmp_path / "k.cu")],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "0 bytes spill stores, 0 bytes spill loads" in done.stderr
