"""Tensor-core candidates on a real GPU: right for every shape, for full, short and missing rows."""

from __future__ import annotations

import random

import pytest

pytest.importorskip("tvm")

from dop.measure.base import Job
from dop.measure.local import Limits, LocalMeasurer
from dop.scenario import Scenario, named
from dop.space.generate import build_space
from dop.space.sketch import Candidate
from dop.workload import Workload

WORKLOADS = (
    Workload("qkv", 4096, (4096, 1024, 1024), 13, "float16"),
    Workload("gate_up", 2048, (2048, 2048), 8, "bfloat16"),
    Workload("o", 4096, (4096,), 64, "bfloat16"),
    Workload("narrow", 896, (896, 128, 128), 48, "bfloat16"),
)
SCENARIOS = (
    named("distinct", 8),
    named("skewed", 100),
    Scenario("recorded", (130, 33, 17, 16, 1), 3),
)
SAMPLES = 4
DRAWS = 400


SKETCHES = ("matrix_tiles/", "wide_tiles/", "small_tiles/")


def candidates(workload: Workload, target: object) -> list[Candidate]:
    """The defaults of the tensor-core sketches, where they are valid, and a few random ones."""
    found = []
    for sketch in build_space(workload, target).sketches:  # type: ignore[arg-type]
        if not sketch.name.startswith(SKETCHES):
            continue
        rng = random.Random(workload.rank)
        draws = (sketch.default(), *(sketch.sample(rng) for _ in range(DRAWS)))
        valid = [values for values in draws if sketch.broken_limit(values) is None]
        found += [Candidate.of(sketch, values) for values in valid[: SAMPLES + 1]]
    return found


@pytest.fixture(scope="module")
def results(gpu_target):
    jobs = [
        Job(candidate.trace, workload, SCENARIOS)
        for workload in WORKLOADS
        for candidate in candidates(workload, gpu_target)
    ]
    limits = Limits(build_s=120.0, prepare_s=120.0, run_s=5.0)
    with LocalMeasurer(gpu_target, limits=limits) as measurer:
        found = list(measurer.measure(jobs))
    assert len(found) == len(jobs) * len(SCENARIOS)
    return found


@pytest.mark.parametrize("workload", WORKLOADS, ids=lambda w: w.key)
def test_right_for_every_batch(results, workload, gpu_target):
    mine = [(job, s, m) for job, s, m in results if job.workload == workload]
    given = candidates(workload, gpu_target)
    found = {prefix for c in given for prefix in SKETCHES if c.sketch.name.startswith(prefix)}
    assert len(found) == (1 if workload.rank % 8 else len(SKETCHES))
    assert len(mine) == len(given) * len(SCENARIOS)
    for job, scenario, m in mine:
        assert m.ok, f"{scenario.key} {job.trace.key}: {m.message}"
        assert m.accuracy < 1e-2


def test_no_candidate_uses_local_memory_by_default(results):
    firsts = {job.workload: m for job, _, m in reversed(results)}
    assert all(m.resources["spill_bytes"] == 0 for m in firsts.values())
