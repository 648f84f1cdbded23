"""The CPU's rules: the sketches they derive, and that what they build is right for odd shapes."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from dataclasses import replace

import pytest

from dop.errors import ConstraintError, Failure
from dop.space.generate import build_space
from dop.space.rules.cpu_columns import lanes
from dop.space.rules.cpu_lane_sums import rank_choices
from dop.space.sketch import Candidate
from dop.space.trace import Trace
from dop.target import Target
from dop.workload import Workload

TARGET = Target("cpu", "x86-64-v3", "test", 2, 1, 0, 16, 1 << 20, 32, "+avx2,+fma")
QKV = Workload.parse("sgmv/float32/r16/2048->2048+512+512")
ODD = Workload.parse("sgmv/float32/r13/200->96+40")
RAGGED = Workload.parse("sgmv/float32/r5/77->33+19+50")
SINGLE = Workload.parse("sgmv/float32/r1/64->32")
WORKLOADS = (QKV, ODD, RAGGED, SINGLE, Workload.parse("sgmv/float32/r64/256->128+128"))


@pytest.mark.parametrize("workload", WORKLOADS, ids=lambda w: w.key)
def test_every_form_and_both_region_counts_have_a_default(workload: Workload) -> None:
    space = build_space(workload, TARGET)
    kinds = {(c.sketch.name.split("/")[0], c.sketch.name.split("/")[1]) for c in space.defaults()}
    assert {rows for rows, _ in kinds} >= {"few_rows", "many_rows"}
    assert {regions for _, regions in kinds} >= {"one_region"}
    assert len({s.name for s in space.sketches}) == len(space.sketches)


def test_the_sketches_of_a_model_projection() -> None:
    sketches = [s.name for s in build_space(QKV, TARGET).sketches]
    assert len(sketches) == 10
    forms = {name.split("/")[0] for name in sketches}
    assert forms == {
        *("single_rows", "few_rows", "many_rows"),
        *("flat_tiles", "low_tiles", "middle_tiles", "tall_tiles"),
    }


@pytest.mark.parametrize("workload", WORKLOADS, ids=lambda w: w.key)
def test_samples_round_trip_through_the_log_form(workload: Workload) -> None:
    space, rng = build_space(workload, TARGET), random.Random(3)
    for _ in range(50):
        candidate = space.sample(rng)
        again = space.match(Trace.from_json(candidate.trace.to_json()))
        assert again.annotation == candidate.annotation
        assert again.sketch.name == candidate.sketch.name


def test_limits_refuse_more_accumulators_than_registers() -> None:
    space = build_space(QKV, TARGET)
    sketch = next(s for s in space.sketches if s.name.startswith("many_rows"))
    with pytest.raises(ConstraintError, match="accumulators"):
        Candidate.of(sketch, {**sketch.default(), "shrink.rows": 4, "shrink.ranks": 8})


def test_vectors_end_where_an_axis_ends() -> None:
    assert lanes(TARGET, 2048) == 8
    assert lanes(TARGET, 96, 36) == 4
    assert lanes(TARGET, 33) == 1
    assert lanes(replace(TARGET, vector_bytes=64), 96, 40) == 8
    assert rank_choices(16) == (1, 2, 4, 8)
    assert rank_choices(17) == (1, 2, 4)


@pytest.fixture(scope="module")
def cores() -> Iterator[list[int]]:
    """A core to run on; building needs TVM and gcc."""
    pytest.importorskip("tvm")
    before = os.sched_getaffinity(0)
    yield [min(before)]
    os.sched_setaffinity(0, before)


def _samples(workload: Workload, every: int, count: int) -> list[Candidate]:
    """The default of every, or every second, sketch, and `count` random candidates."""
    space, rng = build_space(workload, TARGET), random.Random(11)
    return [*space.defaults()[::every], *(space.sample(rng) for _ in range(count))]


@pytest.mark.parametrize(
    ("workload", "every", "count"),
    [(ODD, 1, 2), (RAGGED, 1, 0), (SINGLE, 2, 0)],
    ids=["odd", "ragged", "rank 1"],
)
def test_odd_shapes_are_right(workload: Workload, every: int, count: int, cores: list[int]) -> None:
    from dop.lowering.codegen import generate
    from dop.measure.builder import BuildTask, build
    from dop.measure.inputs import awkward
    from dop.measure.runner_cpu import Calls, Library
    from dop.measure.tensors_cpu import TensorCache

    cache = TensorCache(TARGET)
    for candidate in _samples(workload, every, count):
        built = build(generate, BuildTask(workload, candidate.trace), TARGET)
        assert built.artifact is not None, (candidate.sketch.name, built.message)
        odd = awkward(built.artifact.tile_rows)
        weights = cache.weights(workload, (odd,), odd.adapters)
        batch = cache.batch(workload, odd, timed=False)
        with Library(built.artifact.binary, cores) as library:
            failure, message, _ = Calls(library, built.artifact, weights).check(batch, "float32")
        assert failure is Failure.NONE, (candidate.sketch.name, candidate.values, message)
