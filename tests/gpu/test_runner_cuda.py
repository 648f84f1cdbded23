"""The CUDA path on a real GPU: NVRTC or nvcc, driver launches, accuracy gate, graph timing, faults.

The code generator is a plain one (fake_cuda); candidates of TVM take the same path.
"""

from dataclasses import replace

import fake_cuda
import pytest

from dop.errors import Failure
from dop.measure.base import Job
from dop.measure.local import Limits, LocalMeasurer
from dop.scenario import Scenario, named
from dop.workload import Workload

WORKLOAD = Workload("qkv", 512, (256, 64, 64), 16, "bfloat16")
SCENARIOS = (named("uniform", 32), named("identical", 1), Scenario("recorded", (9, 4), 3))
LIMITS = Limits(build_s=60.0, prepare_s=120.0, run_s=5.0)

EXPECTED = {
    "build_error": (Failure.BUILD, "TVM refused"),
    "compile_error": (Failure.COMPILE, "expected an expression"),
    "smem": (Failure.CONSTRAINT, "shared memory"),
    "threads": (Failure.CONSTRAINT, "2048 threads"),
    "no_such_kernel": (Failure.LAUNCH, "NOT_FOUND"),
    "wrong": (Failure.CORRECTNESS, "wrong result"),
    "unwritten": (Failure.CORRECTNESS, "wrong result"),
    "poisoned": (Failure.CORRECTNESS, "NaN"),
    "overrun": (Failure.CORRECTNESS, "outside y"),
    "bare": (Failure.CORRECTNESS, "without adapter"),
    "illegal": (Failure.LAUNCH, "ILLEGAL_ADDRESS"),
    "hang": (Failure.TIMEOUT, "run stopped"),
}
SOUND = [("tile_rows", 0), ("tile_rows", 1), ("tile_rows", 16), ("big_smem", 0)]


@pytest.fixture(scope="module")
def results(gpu_target):
    last = ("tile_rows", 8)
    wanted = [*SOUND, *((what, 0) for what in EXPECTED), last]
    jobs = [Job(fake_cuda.trace(*w), WORKLOAD, SCENARIOS) for w in wanted]
    found = {}
    options = {"generate": "fake_cuda:generate", "limits": LIMITS, "builders": 4}
    with LocalMeasurer(gpu_target, **options) as measurer:
        for job, scenario, measurement in measurer.measure(jobs):
            step = job.trace.steps[0]
            found[step.name, step.value, scenario] = measurement
    assert len(found) == len(jobs) * len(SCENARIOS)
    return found


@pytest.mark.parametrize("what", [*SOUND, ("tile_rows", 8)])
@pytest.mark.parametrize("scenario", SCENARIOS)
def test_sound_candidates_are_right_and_timed(results, what, scenario):
    m = results[(*what, scenario)]
    assert m.ok, m.message
    assert m.accuracy < 1e-2
    assert 1e-6 < m.median_s < 1e-2
    assert 5e-7 < m.floor_s <= m.median_s * 1.05
    assert m.resources["kernels"] == 2
    assert m.resources["registers"] > 8
    assert m.resources["blocks"] > 0


@pytest.mark.parametrize("what", EXPECTED)
@pytest.mark.parametrize("scenario", SCENARIOS)
def test_failure_class_and_cause(results, what, scenario):
    failure, words = EXPECTED[what]
    measurement = results[what, 0, scenario]
    assert measurement.failure is failure, measurement.message
    assert words in measurement.message


@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize("rank", [1, 5, 24])
def test_other_types_odd_ranks_and_odd_widths(gpu_target, dtype, rank):
    workload = Workload("odd", 333, (65, 31), rank, dtype)
    jobs = [Job(fake_cuda.trace("tile_rows", n), workload, SCENARIOS) for n in (0, 4)]
    options = {"generate": "fake_cuda:generate", "limits": LIMITS, "builders": 2}
    with LocalMeasurer(gpu_target, **options) as measurer:
        for _, _, m in measurer.measure(jobs):
            assert m.ok, m.message


@pytest.mark.timed
def test_repeated_timings_agree(gpu_target):
    """Two measurements of one candidate differ by little: the method's own noise."""
    job = Job(fake_cuda.trace("tile_rows", 0), WORKLOAD, SCENARIOS[:1])
    options = {"generate": "fake_cuda:generate", "limits": LIMITS, "builders": 1}
    with LocalMeasurer(gpu_target, **options) as measurer:
        times = [m.median_s for _ in range(5) for _, _, m in measurer.measure([job])]
    assert max(times) / min(times) < 1.1


@pytest.mark.timed
def test_a_cold_batch_is_right_and_takes_longer_than_its_twin(gpu_target):
    """Of 512 rows there is little to compute: threads wait for y, from the cache or memory."""
    workload = Workload("wide", 64, (8192,), 1, "bfloat16")
    warm = named("identical", 512)
    cold = replace(warm, cold=True)
    jobs = [Job(fake_cuda.trace(*w), workload, (warm, cold)) for w in (SOUND[0], ("wrong", 0))]
    options = {"generate": "fake_cuda:generate", "limits": LIMITS, "builders": 2}
    found = {}
    with LocalMeasurer(gpu_target, **options) as measurer:
        for job, scenario, m in measurer.measure(jobs):
            found[job.trace.steps[0].name, scenario.cold] = m
    for is_cold in (False, True):
        assert found["tile_rows", is_cold].ok, found["tile_rows", is_cold].message
        assert found["wrong", is_cold].failure is Failure.CORRECTNESS
    seconds = [found["tile_rows", is_cold].median_s for is_cold in (False, True)]
    assert 1.1 * seconds[0] < seconds[1] < 10 * seconds[0]


def test_cold_batches_of_any_size_are_right(gpu_target):
    """Small ones take another copy for each call, large ones few."""
    scenarios = tuple(replace(s, cold=True) for s in (*SCENARIOS, named("uniform", 2048)))
    job = Job(fake_cuda.trace("tile_rows", 16), WORKLOAD, scenarios)
    options = {"generate": "fake_cuda:generate", "limits": LIMITS, "builders": 1}
    with LocalMeasurer(gpu_target, **options) as measurer:
        for _, scenario, m in measurer.measure([job]):
            assert m.ok, (scenario.key, m.message)
            assert m.floor_s <= m.median_s * 1.05 < 1e-2


def test_beside_a_matmul_a_call_is_checked_alike(gpu_target):
    """What the two pieces add to the base layer's matmul: no less than nothing, but it may be more
    than behind it. A matmul leaves four multiprocessors, and these threads ask for one number of A
    after the other."""
    alone = Workload("o", 4096, (4096,), 16, "bfloat16")
    scenarios = (named("identical", 64), named("distinct", 8))
    found = {}
    options = {"generate": "fake_cuda:generate", "limits": LIMITS, "builders": 2}
    with LocalMeasurer(gpu_target, **options) as measurer:
        for workload in (alone, replace(alone, beside=True)):
            jobs = [Job(fake_cuda.trace(*w), workload, scenarios) for w in (SOUND[0], ("wrong", 0))]
            for job, scenario, m in measurer.measure(jobs):
                found[workload.beside, job.trace.steps[0].name, scenario] = m
    for scenario in scenarios:
        behind, beside = (found[two, "tile_rows", scenario] for two in (False, True))
        assert beside.ok, beside.message
        # Inputs are random: the worst of a result's elements is not the same one.
        assert 1 / 3 < beside.accuracy / behind.accuracy < 3
        assert 1e-7 < beside.median_s < 5e-3
        assert found[True, "wrong", scenario].failure is Failure.CORRECTNESS
