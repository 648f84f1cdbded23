"""Every way in which a candidate can fail becomes a record with its failure class; the run goes on.

All candidates are measured in one run; each test looks at one of them. The first and the last
candidate are sound: what the others did must not have touched them.
"""

import os
import signal
import threading
import time
from dataclasses import replace

import fake_codegen
import pytest

from dop.errors import Failure
from dop.measure.base import Job
from dop.measure.local import Limits, LocalMeasurer
from dop.measure.timer import TimerSettings
from dop.scenario import named
from dop.target import Target
from dop.workload import Workload

TARGET = Target("cpu", "generic", "test", 2, 1, 0, 16, 1 << 20, 32)
WORKLOAD = Workload("kv", 64, (32, 16), 4, "float32")
SCENARIOS = (named("uniform", 8), named("identical", 3))
FAST = TimerSettings(repeats=3, min_sample_s=1e-4)
LIMITS = Limits(build_s=4.0, prepare_s=20.0, run_s=0.7)

EXPECTED = {
    "constraint": (Failure.CONSTRAINT, "too much"),
    "build_error": (Failure.BUILD, "TVM refused"),
    "trace_error": (Failure.BUILD, "step 3"),
    "build_bug": (Failure.BUILD, "KeyError"),
    "build_crash": (Failure.BUILD, "SIGSEGV"),
    "build_killed": (Failure.BUILD, "SIGKILL"),
    "build_hang": (Failure.TIMEOUT, "build stopped"),
    "compile_error": (Failure.COMPILE, "object file"),
    "undefined": (Failure.COMPILE, "undefined reference"),
    "crash": (Failure.LAUNCH, "SIGSEGV"),
    "exit": (Failure.LAUNCH, "exit code 7"),
    "killed": (Failure.LAUNCH, "SIGKILL"),
    "refuse": (Failure.LAUNCH, "entry failed"),
    "hang": (Failure.TIMEOUT, "run stopped"),
    "wrong": (Failure.CORRECTNESS, "wrong result"),
    "unwritten": (Failure.CORRECTNESS, "wrong result"),
    "everything_unwritten": (Failure.CORRECTNESS, "wrong result"),
    "poisoned": (Failure.CORRECTNESS, "NaN"),
    "overrun": (Failure.CORRECTNESS, "outside y"),
    "underrun": (Failure.CORRECTNESS, "outside y"),
    "bare": (Failure.CORRECTNESS, "without adapter"),
}


def job(what, value=0):
    return Job(fake_codegen.trace(what, value), WORKLOAD, SCENARIOS)


def measurer(**options):
    return LocalMeasurer(
        TARGET, generate="fake_codegen:generate", limits=LIMITS, timer=FAST, **options
    )


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    flag = tmp_path_factory.mktemp("flag") / "killed"
    jobs = [job("tile_rows", 0), *(job(what) for what in EXPECTED)]
    jobs += [job("hang_at", 3), job("wrong_at", 3), job("build_killed_once", str(flag))]
    jobs += [job("tile_rows", 4)]
    found = {}
    with measurer() as local:
        for done, scenario, measurement in local.measure(jobs):
            step = done.trace.steps[0]
            key = (f"{step.name}{step.value}" if step.name == "tile_rows" else step.name, scenario)
            assert key not in found
            found[key] = measurement
    assert len(found) == len(jobs) * len(SCENARIOS)
    return found


@pytest.mark.parametrize("what", EXPECTED)
@pytest.mark.parametrize("scenario", SCENARIOS)
def test_failure_class_and_cause(results, what, scenario):
    failure, words = EXPECTED[what]
    measurement = results[what, scenario]
    assert measurement.failure is failure, measurement.message
    assert words in measurement.message
    assert "\n" not in measurement.message
    assert not measurement.seconds


@pytest.mark.parametrize("what", ["tile_rows0", "tile_rows4", "build_killed_once"])
def test_sound_candidates_are_untouched(results, what):
    for scenario in SCENARIOS:
        assert results[what, scenario].ok, results[what, scenario].message


def test_a_fault_in_one_scenario_leaves_the_others(results):
    assert results["wrong_at", SCENARIOS[0]].ok
    assert results["wrong_at", SCENARIOS[1]].failure is Failure.CORRECTNESS
    assert results["hang_at", SCENARIOS[0]].ok
    assert results["hang_at", SCENARIOS[1]].failure is Failure.TIMEOUT


def test_wrong_results_carry_their_accuracy(results):
    assert results["wrong", SCENARIOS[0]].accuracy > 1e-2


def test_workers_killed_from_outside_cost_no_result():
    jobs = [job("slow", n) for n in range(1, 9)]
    with measurer(builders=1) as local:
        stop = threading.Event()

        def kill_twice():
            for pool in (local.builders, local.runners):
                while not (pool.pids and any(w.task for w in pool._workers)) and not stop.is_set():
                    time.sleep(0.005)
                for pid in pool.pids:
                    os.kill(pid, signal.SIGKILL)

        killer = threading.Thread(target=kill_twice)
        killer.start()
        found = list(local.measure(jobs))
        stop.set()
        killer.join()
    assert len(found) == len(jobs) * len(SCENARIOS)
    assert all(m.ok for _, _, m in found), [m.message for _, _, m in found if not m.ok]


def test_leaving_early_ends_what_runs_and_the_next_batch_works():
    with measurer() as local:
        results = local.measure([job("tile_rows", 1), job("hang"), job("tile_rows", 2)])
        next(results)
        results.close()
        again = [m for _, _, m in local.measure([job("tile_rows", 8)])]
        assert all(m.ok for m in again)
        pids = [*local.builders.pids, *local.runners.pids]
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


def test_builds_ahead_are_waited_for_by_their_own_batch_only():
    now = [job("slow", n) for n in range(1, 4)]
    following = [job("tile_rows", 2), job("build_error"), job("tile_rows", 4)]
    with measurer(builders=1) as local:
        local.prefetch(following)  # this CPU's cores are timed: nothing happens
        assert not local.overlaps
        assert not local.builders.busy
        local._overlap = True
        results = local.measure(now)
        found = [next(results)]
        local.prefetch(following)
        found += results
        assert all(m.ok for _, _, m in local.measure([job("tile_rows", 8)]))  # another in between
        assert {j.trace for j, _, _ in found} == {j.trace for j in now}
        submitted = local._next_id
        then = list(local.measure(following))
        assert local._next_id == submitted  # nothing was built again
    assert len(then) == len(following) * len(SCENARIOS)
    failures = {j.trace.steps[0].name: m.failure for j, _, m in then}
    assert failures == {"tile_rows": Failure.NONE, "build_error": Failure.BUILD}


def test_a_batch_dropped_halfway_forgets_what_was_built_ahead():
    following = [job("tile_rows", 2)]
    with measurer(builders=1) as local:
        local._overlap = True
        results = local.measure([job("slow", 1), job("slow", 2)])
        next(results)
        local.prefetch(following)
        results.close()
        assert all(m.ok for _, _, m in local.measure(following))


def test_nothing_is_timed_while_builders_use_the_same_cores(monkeypatch):
    building = []
    jobs = [job("tile_rows", 1), job("slow", 1), job("slow", 2)]
    with measurer(builders=1) as local:
        submit = local.runners.submit

        def note(*task):
            building.append(local.builders.backlog)
            submit(*task)

        monkeypatch.setattr(local.runners, "submit", note)
        assert all(m.ok for _, _, m in local.measure(jobs))
    assert building == [0, 0, 0]


def test_a_run_is_told_how_fast_those_before_it_were(monkeypatch):
    told = []
    known = replace(job("tile_rows", 0), best_s=(1.0, None))
    with measurer(builders=1) as local:  # builds end in order
        submit = local.runners.submit

        def note(task, run, *rest):
            told.append(run.best_s)
            submit(task, run, *rest)

        monkeypatch.setattr(local.runners, "submit", note)
        found = list(local.measure([known, *(job("tile_rows", n) for n in range(1, 7))]))
    assert len(told) == 7
    assert told[0] == (1.0, None)
    for place, best in enumerate(told[2:], 2):  # two runs are under way at most
        for n, scenario in enumerate(SCENARIOS):
            seen = [m.median_s for _, s, m in found if s == scenario][: place - 1]
            assert best[n] is not None
            assert best[n] <= min(seen)
