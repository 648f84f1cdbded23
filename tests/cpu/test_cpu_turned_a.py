"""Register blocks on a CPU: turned blocks of A and B, odd shapes, and what stays in registers."""

from __future__ import annotations

import os
import random
import re
from collections.abc import Iterator
from dataclasses import replace

import pytest

from dop.errors import ConstraintError, Failure, TraceError
from dop.space.generate import build_space
from dop.space.rule import SketchState
from dop.space.rules.cpu_turned_a import rank_lanes
from dop.space.sketch import Candidate, Sketch
from dop.space.step import PragmaStep
from dop.space.trace import Trace
from dop.target import Target
from dop.workload import Workload

TARGET = Target("cpu", "x86-64-v3", "test", 2, 1, 0, 16, 1 << 20, 32, "+avx2,+fma")
SLICES = Workload.parse("sgmv/float32/r16/256->64+32")
NARROW = Workload.parse("sgmv/float32/r12/200->96+40")
WIDE_RANK = Workload.parse("sgmv/float32/r32/96->48")
HALF = Workload.parse("sgmv/float16/r16/256->64")
RANK_13 = Workload.parse("sgmv/float32/r13/256->64")
FORMS = ("flat_tiles", "low_tiles", "middle_tiles", "tall_tiles")


def _sketches(workload: Workload) -> list[Sketch]:
    space = build_space(workload, TARGET)
    return [s for s in space.sketches if s.name.split("/")[0] in FORMS]


@pytest.mark.parametrize("workload", [SLICES, NARROW, WIDE_RANK], ids=lambda w: w.key)
def test_each_height_has_a_default_within_its_limits(workload: Workload) -> None:
    sketches = _sketches(workload)
    assert [s.name.split("/")[0] for s in sketches] == list(FORMS)
    assert [s.broken_limit(s.default()) for s in sketches] == [None] * 4


def test_ranks_that_fill_no_vector_and_half_precision_are_left_to_lane_sums() -> None:
    assert not _sketches(RANK_13)
    assert not _sketches(HALF)
    assert rank_lanes(SketchState(SLICES, TARGET)) == 8
    assert rank_lanes(SketchState(NARROW, TARGET)) == 4


def test_a_tall_tile_is_shared_by_the_threads() -> None:
    for units, groups in ((2, 16), (8, 4)):
        space = build_space(SLICES, replace(TARGET, units=units))
        tall = next(s for s in space.sketches if s.name.startswith("tall_tiles"))
        assert tall.default()["shrink.groups"] == groups


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"shrink.rows": 8}, "accumulators"),
        ({"expand.rows": 8}, "registers"),
        ({"shrink.groups": 8}, "shrink's last task"),
        ({"expand.groups": 2, "expand.wide": 4, "expand.rows": 2}, "last whole block"),
    ],
)
def test_limits(change: dict[str, int], message: str) -> None:
    sketch = _sketches(SLICES)[1]
    with pytest.raises(ConstraintError, match=message):
        Candidate.of(sketch, {**sketch.default(), **change})


@pytest.fixture(scope="module")
def cores() -> Iterator[list[int]]:
    """A core to run on; building needs TVM and gcc."""
    pytest.importorskip("tvm")
    before = os.sched_getaffinity(0)
    yield [min(before)]
    os.sched_setaffinity(0, before)


def _valid(sketch: Sketch, rng: random.Random) -> Candidate:
    while sketch.broken_limit(annotation := sketch.sample(rng)) is not None:
        pass
    return Candidate.of(sketch, annotation)


@pytest.mark.parametrize(
    ("workload", "form", "sampled"),
    [
        (SLICES, 0, False),
        (SLICES, 3, True),
        (NARROW, 1, False),
        (NARROW, 2, True),
        (WIDE_RANK, 2, True),
    ],
)
def test_results_are_right(workload: Workload, form: int, sampled: bool, cores: list[int]) -> None:
    """Tiles with fewer rows than they hold, tokens without adapter, mixed ranks and scales."""
    from dop.lowering.codegen import generate
    from dop.measure.builder import BuildTask, build
    from dop.measure.inputs import awkward
    from dop.measure.runner_cpu import Calls, Library
    from dop.measure.tensors_cpu import TensorCache

    sketch, cache = _sketches(workload)[form], TensorCache(TARGET)
    candidate = _valid(sketch, random.Random(5)) if sampled else None
    candidate = candidate or Candidate.of(sketch, sketch.default())
    built = build(generate, BuildTask(workload, candidate.trace), TARGET)
    assert built.artifact is not None, (candidate.values, built.message)
    odd = awkward(built.artifact.tile_rows)
    weights = cache.weights(workload, (odd,), odd.adapters)
    batch = cache.batch(workload, odd, timed=False)
    with Library(built.artifact.binary, cores) as library:
        failure, message, _ = Calls(library, built.artifact, weights).check(batch, "float32")
    assert failure is Failure.NONE, (candidate.values, message)


def test_sums_and_squares_stay_in_registers() -> None:
    pytest.importorskip("tvm")
    from dop.lowering.codegen import generate

    sketch = _sketches(SLICES)[1]
    source = generate(SLICES, sketch.bind(sketch.default()), TARGET).source
    assert "shufflevector" in source
    assert not re.search(r"alloca \[\d+ x float\]|alloca <", source)
    # v, a chunk of A and a block of B; sums and squares are on the stack and become values.
    assert len(re.findall(r"load ptr, ptr @__TVMBackendAllocWorkspace", source)) == 3


@pytest.mark.parametrize("lanes", [4, 8, 16])
def test_shuffles_turn_a_square(lanes: int) -> None:
    pytest.importorskip("tvm")
    from dop.lowering.intrinsics.turn import shuffles

    vectors = {f"v{i}": [(i, j) for j in range(lanes)] for i in range(lanes)}
    steps, results = shuffles(lanes)
    for name, (first, second), order in steps:
        both = vectors[first] + vectors[second]
        vectors[name] = [both[j] for j in order]
    for j, name in enumerate(results):
        assert vectors[name] == [(i, j) for i in range(lanes)]
    assert len(steps) == lanes * (lanes.bit_length() - 1)


def test_a_square_of_another_size_is_refused() -> None:
    pytest.importorskip("tvm")
    from dop.lowering.apply import apply_trace

    sketch = _sketches(SLICES)[1]
    steps = tuple(
        replace(s, value=5) if isinstance(s, PragmaStep) and s.name == "turn" else s
        for s in sketch.bind(sketch.default()).steps
    )
    with pytest.raises(TraceError, match="turn wants"):
        apply_trace(SLICES, Trace(steps))
