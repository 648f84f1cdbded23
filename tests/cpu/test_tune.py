"""The tuning loop: records at once, resume, interrupts, failures, budgets."""

from __future__ import annotations

import dataclasses
import errno
import itertools
import json
import math
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import synthetic
from fake_measurer import FakeMeasurer

from dop.database.jsonl import Log, read_log
from dop.effort import FULL, QUICK, TRANSFER, effort_of
from dop.errors import ConfigError, Failure, LogError
from dop.family import Family
from dop.progress import Note, Progress
from dop.recorded import DEFAULT_MARK, alike
from dop.scenario import named
from dop.target import SM_90
from dop.tune import tune

HERE = Path(__file__).parent
SCENARIOS = (named("identical", 1), named("uniform", 32), named("distinct", 128))
SPACE = synthetic.space()
FAMILY = Family(synthetic.WORKLOAD, SM_90, SCENARIOS)


def run(path: Path, trials: int = 24, measurer: FakeMeasurer | None = None, **options):
    options.setdefault("families", [FAMILY])
    families = options.pop("families")
    measurer = measurer or FakeMeasurer(SPACE)
    with measurer, Log.open(path) as log:
        return tune(
            families,
            measurer=measurer,
            log=log,
            trials=trials,
            **{"budget_s": 60, "build": lambda w, t: SPACE, **options},
        )


def pairs(path: Path) -> Counter:
    return Counter((e.workload_key, e.trace_key, e.scenario_key) for e in read_log(path).entries)


def test_records_are_complete_and_defaults_come_first(tmp_path):
    result = run(tmp_path / "log.jsonl", 24)
    entries = read_log(tmp_path / "log.jsonl").entries
    assert len(entries) == 24 * len(SCENARIOS) == result.progress.records
    defaults = [c.trace.key for c in SPACE.defaults()]
    first = list(dict.fromkeys(e.trace_key for e in entries))[: len(defaults)]
    assert first == defaults
    marked = {e.trace_key for e in entries if e.sketch.endswith(DEFAULT_MARK)}
    assert marked == set(defaults)
    assert any(e.predicted_s for e in entries)
    for task in result.tasks:
        assert task.best_s <= task.default_s
        fastest = min(e.median_s for e in entries if e.scenario_key == task.scenario.key)
        assert task.best_s == fastest


def test_resume_measures_nothing_twice_and_keeps_everything(tmp_path):
    path = tmp_path / "log.jsonl"
    first = run(path, 16)
    before = path.read_bytes()
    measurer = FakeMeasurer(SPACE)
    second = run(path, 16, measurer)
    assert path.read_bytes().startswith(before)
    assert second.progress.resumed == first.progress.records
    assert second.progress.trials == 16
    assert max(pairs(path).values()) == 1
    for old, new in zip(first.tasks, second.tasks, strict=True):
        assert new.best_s <= old.best_s
        assert new.default_s == old.default_s


def test_resume_fills_in_scenarios_that_a_stopped_run_left_open(tmp_path):
    path = tmp_path / "log.jsonl"

    def stop(count: int) -> None:
        if count == 10:
            raise KeyboardInterrupt

    result = run(path, 16, FakeMeasurer(SPACE, before=stop))
    assert result.interrupted
    assert result.stopped_by == "interrupt"
    assert result.progress.records == 10
    run(path, 16)
    found = pairs(path)
    per_trace = Counter(trace for _, trace, _ in found)
    assert max(found.values()) == 1
    assert set(per_trace.values()) == {len(SCENARIOS)}


def test_kill_9_loses_no_finished_record(tmp_path):
    path = tmp_path / "log.jsonl"
    command = [sys.executable, str(HERE / "tune_process.py"), str(path), "20", "10000"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        deadline = time.monotonic() + 30
        while time.monotonic() < deadline and (
            not path.exists() or path.read_bytes().count(b"\n") < 30
        ):
            time.sleep(0.02)
        process.kill()
    before = path.read_bytes()
    finished = before.count(b"\n")
    assert finished >= 30
    result = run(path, 8)
    assert result.progress.resumed == finished
    assert path.read_bytes().startswith(before[: before.rindex(b"\n") + 1])
    assert max(pairs(path).values()) == 1
    assert not read_log(path).corrupt_count


def test_ctrl_c_keeps_the_best_and_ends_cleanly(tmp_path):
    path = tmp_path / "log.jsonl"
    command = [sys.executable, str(HERE / "tune_process.py"), str(path), "20", "10000"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        deadline = time.monotonic() + 30
        while time.monotonic() < deadline and (
            not path.exists() or path.read_bytes().count(b"\n") < 12
        ):
            time.sleep(0.02)
        process.send_signal(signal.SIGINT)
        out = process.communicate(timeout=20)[0]
        assert process.returncode == 0
    reason, records = out.split()[1:]
    assert reason == "interrupt"
    assert int(records) == len(read_log(path).entries) >= 12


@pytest.mark.parametrize("failure", [f for f in Failure if f is not Failure.NONE])
def test_every_failure_class_is_a_record_and_never_the_best(tmp_path, failure):
    path = tmp_path / "log.jsonl"
    clean = run(path, 16)
    broken = {task.best.trace.key: failure for task in clean.tasks}
    other = tmp_path / "other.jsonl"
    result = run(other, 16, FakeMeasurer(SPACE, failing=broken))
    entries = [e for e in read_log(other).entries if e.trace_key in broken]
    assert entries
    assert {e.failure for e in entries} == {failure}
    assert result.progress.failures[failure] >= len(entries)
    for task in result.tasks:
        assert task.best.trace.key not in broken
        assert task.best.measurement.ok


def test_a_space_where_all_fails_has_no_best(tmp_path):
    everything = {c.trace.key: Failure.BUILD for c in SPACE.defaults()}
    measurer = FakeMeasurer(SPACE, failing=everything)
    measurer._answer = lambda job, scenario, key: _failed()  # type: ignore[method-assign]
    result = run(tmp_path / "log.jsonl", 24, measurer)
    assert all(task.best is None and task.default_s is None for task in result.tasks)
    assert result.progress.failures == {Failure.COMPILE: 24 * len(SCENARIOS)}


def _failed():
    from dop.measurement import Measurement

    return Measurement.failed(Failure.COMPILE, "nothing compiles")


def test_a_full_disk_is_one_error_and_the_log_stays_whole(tmp_path, monkeypatch):
    path, real, count = tmp_path / "log.jsonl", os.write, [0]

    def full(descriptor: int, data: bytes) -> int:
        count[0] += 1
        if count[0] > 20:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(descriptor, data)

    monkeypatch.setattr("dop.database.jsonl.os.write", full)
    with pytest.raises(LogError, match="No space left"):
        run(path, 24)
    monkeypatch.undo()
    assert len(read_log(path).entries) == 20
    assert run(path, 8).progress.resumed == 20


def test_the_deadline_is_kept_and_a_late_batch_is_dropped(tmp_path):
    began = time.monotonic()
    result = run(tmp_path / "log.jsonl", 10_000, FakeMeasurer(SPACE, delay_s=0.03), budget_s=1.5)
    assert result.stopped_by == "budget"
    assert time.monotonic() - began < 4
    slow = FakeMeasurer(SPACE, delay_s=0.6)
    result = run(tmp_path / "slow.jsonl", 10_000, slow, budget_s=0.5)
    assert result.stopped_by == "budget"
    assert slow.closed_early == 1
    assert len(read_log(tmp_path / "slow.jsonl").entries) == len(slow.measured)


def test_runs_over_the_same_answers_are_the_same(tmp_path):
    one, two = FakeMeasurer(SPACE), FakeMeasurer(SPACE)
    run(tmp_path / "1.jsonl", 40, one, seed=5)
    run(tmp_path / "2.jsonl", 40, two, seed=5)
    assert one.measured == two.measured
    three = FakeMeasurer(SPACE)
    run(tmp_path / "3.jsonl", 40, three, seed=6)
    assert one.measured != three.measured


def test_families_share_the_budget_and_hints(tmp_path):
    wider = Family(synthetic.WIDER, SM_90, SCENARIOS)
    now = [0.0]

    class Steady(FakeMeasurer):
        """Every answer costs the same, whatever else this machine does."""

        def measure(self, jobs):
            for answer in super().measure(jobs):
                now[0] += 0.01
                yield answer

    measurer = Steady(SPACE)
    result = run(
        tmp_path / "log.jsonl", 80, measurer, families=[FAMILY, wider], clock=lambda: now[0]
    )
    trials = [family.trials for family in result.progress.families]
    assert sum(trials) == 80
    assert min(trials) >= 16
    first = list(dict.fromkeys(workload for workload, _, _ in measurer.measured[:72]))
    assert len(first) == 2, "both families' defaults come before a second visit"


def test_filling_in_a_stopped_run_is_no_visit(tmp_path):
    """New batches for old records, slow to measure: the family is still searched afterwards."""
    path = tmp_path / "log.jsonl"
    wider = Family(synthetic.WIDER, SM_90, SCENARIOS)
    run(path, 8, families=[Family(synthetic.WORKLOAD, SM_90, SCENARIOS[:1])])
    now, slow = [0.0], 30.0

    class Slow(FakeMeasurer):
        def measure(self, jobs):
            for answer in super().measure(jobs):
                # The first family's open batches take most of the time.
                now[0] += 0.01 if self.measured[-1][0] == synthetic.WIDER.key else slow
                yield answer

    result = run(
        path, 40, Slow(SPACE), families=[FAMILY, wider], budget_s=1e6, clock=lambda: now[0]
    )
    trials = [f.trials for f in result.progress.families]
    assert min(trials) > 0, trials


def test_a_neighbour_in_the_log_warms_the_start(tmp_path):
    path = tmp_path / "log.jsonl"
    known = run(path, 80)
    wider = Family(synthetic.WIDER, SM_90, SCENARIOS)
    measurer = FakeMeasurer(SPACE)
    run(path, 16, measurer, families=[wider])
    proposed = {trace for _, trace, _ in measurer.measured}
    best = {task.best.trace.key for task in known.tasks}
    assert best & proposed == best


def test_the_end_of_a_small_space_ends_the_run(tmp_path):
    small = dataclasses.replace(
        SPACE,
        sketches=(
            synthetic.sketch(
                "tiled/staged",
                {
                    **synthetic.SMALL,
                    "tokens.tile": (1,),
                    "shrink.split_k": (1, 2),
                    "expand.tile": (64,),
                },
            ),
        ),
    )
    result = run(tmp_path / "log.jsonl", 0, FakeMeasurer(small), build=lambda w, t: small)
    assert result.stopped_by == "exhausted"
    assert len(pairs(tmp_path / "log.jsonl")) == small.size() * len(SCENARIOS)


def test_a_log_of_another_device_is_refused_untouched(tmp_path):
    path = tmp_path / "log.jsonl"
    run(path, 8)
    before = path.read_bytes()
    elsewhere = Family(
        synthetic.WORKLOAD, dataclasses.replace(SM_90, device_name="NVIDIA A100"), SCENARIOS
    )
    with pytest.raises(LogError, match="was measured on NVIDIA H100") as caught:
        run(path, 8, families=[elsewhere])
    assert "another --log" in caught.value.action
    assert path.read_bytes() == before


def test_events_tell_the_state(tmp_path):
    events: list[object] = []
    run(tmp_path / "log.jsonl", 40, on_event=events.append)
    states = [e for e in events if isinstance(e, Progress)]
    told = [s.records for s in states]
    assert told == sorted(told)
    assert told[0] == 1  # at once, then now and then, and once more at the end of a batch
    assert told[-1] == 40 * len(SCENARIOS)
    assert states[-1].trials == 40
    assert states[-1].families[0].spearman is not None
    assert not [e for e in events if isinstance(e, Note)]
    whole = [s for s in states if all(t.best_s for t in s.families[0].tasks)]
    bests = [sum(math.log(t.best_s) for t in s.families[0].tasks) for s in whole]
    assert len(bests) > 2
    assert bests == sorted(bests, reverse=True)
    events.clear()
    run(tmp_path / "log.jsonl", 8, on_event=events.append)
    assert "continuing after 120 records" in next(e.text for e in events if isinstance(e, Note))


def test_what_makes_no_sense_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="no scenario"):
        Family(synthetic.WORKLOAD, SM_90, ())
    with pytest.raises(ConfigError, match="nothing to tune"):
        run(tmp_path / "log.jsonl", families=[])
    with pytest.raises(ConfigError, match="given twice"):
        run(tmp_path / "log2.jsonl", families=[FAMILY, FAMILY])
    with pytest.raises(ConfigError, match="effort 'max'"):
        effort_of("max")
    assert effort_of("quick") is QUICK
    assert effort_of("full") is FULL


class _SlowSpells(FakeMeasurer):
    """Every third first look at a pair takes three times as long as it should."""

    def _answer(self, job, scenario, key):
        answer = super()._answer(job, scenario, key)
        looks = self.measured.count((job.workload.key, key, scenario.key))
        if answer.ok and looks == 1 and len(self.measured) % 3 == 0:
            return dataclasses.replace(answer, seconds=tuple(3 * s for s in answer.seconds))
        return answer


def test_close_rivals_are_measured_again_on_a_cpu(tmp_path):
    host = dataclasses.replace(SM_90, kind="cpu")
    family = Family(synthetic.WORKLOAD, host, SCENARIOS)
    measurer = _SlowSpells(SPACE)
    result = run(tmp_path / "log.jsonl", 24, measurer, families=[family])
    again = {pair for pair, count in pairs(tmp_path / "log.jsonl").items() if count == 2}
    assert again
    for task in result.tasks:
        key = task.scenario.key
        entries = [e for e in read_log(tmp_path / "log.jsonl").entries if e.scenario_key == key]
        best = min(entries, key=lambda e: e.median_s)
        assert task.best_s == best.median_s
        assert (synthetic.WORKLOAD.key, best.trace_key, key) in again
    assert len(again) < len(measurer.measured) / 2


def test_nothing_is_measured_again_on_a_gpu(tmp_path):
    run(tmp_path / "log.jsonl", 24)
    assert max(pairs(tmp_path / "log.jsonl").values()) == 1


def test_transfer_measures_the_neighbours_winners_first(tmp_path):
    path = tmp_path / "log.jsonl"
    run(path, 40)
    other = dataclasses.replace(synthetic.WORKLOAD, in_features=synthetic.WORKLOAD.in_features * 2)
    before = len(read_log(path).entries)
    run(path, 8, families=[Family(other, SM_90, SCENARIOS)], effort=TRANSFER)
    entries = read_log(path).entries
    winners = {
        min(
            (e for e in entries[:before] if e.scenario_key == s.key), key=lambda e: e.median_s
        ).trace_key
        for s in SCENARIOS
    }
    tried = {e.trace_key for e in entries[before:]}
    assert winners <= tried


def test_the_next_visit_is_planned_while_one_is_measured(tmp_path):
    other = dataclasses.replace(synthetic.WORKLOAD, rank=32)
    families = [FAMILY, Family(other, SM_90, SCENARIOS)]
    measurer = FakeMeasurer(SPACE, overlaps=True)
    result = run(tmp_path / "log.jsonl", 64, measurer, families=families)
    assert result.stopped_by == "trials"
    assert result.progress.trials == 64
    assert max(pairs(tmp_path / "log.jsonl").values()) == 1
    order = list(dict.fromkeys((w, t) for w, t, _ in measurer.measured))
    ahead = [(job.workload.key, job.trace.key) for job in measurer.ahead]
    assert ahead
    assert set(ahead) <= set(order)
    # Planned ahead of the family that was measured: always the other one.
    visits = [w for w, _ in order]
    changes = sum(a != b for a, b in itertools.pairwise(visits))
    assert changes >= 64 // QUICK.batch - 2


def test_what_was_fast_on_another_device_is_tried_first(tmp_path):
    there, here = tmp_path / "there.jsonl", tmp_path / "here.jsonl"
    run(there, 60)
    entries = read_log(there).entries
    winner = min(
        (e for e in entries if e.scenario_key == SCENARIOS[1].key), key=lambda e: e.median_s
    )
    defaults = len(SPACE.defaults())
    result = run(here, defaults + 12, like=entries)
    tried = [e.trace_key for e in read_log(here).entries]
    assert winner.trace_key in tried
    again = tmp_path / "again.jsonl"  # also where a run is continued
    run(again, defaults + 2)
    run(again, 12, like=entries)
    assert winner.trace_key in [e.trace_key for e in read_log(again).entries]
    assert result.progress.resumed == 0
    without = tmp_path / "without.jsonl"
    run(without, defaults + 12)
    assert winner.trace_key not in [e.trace_key for e in read_log(without).entries]


def test_beside_a_matmul_what_is_fast_alone_is_tried_first(tmp_path):
    path = tmp_path / "log.jsonl"
    run(path, 60)
    entries = read_log(path).entries
    winners = {
        min((e for e in entries if e.scenario_key == s.key), key=lambda e: e.median_s).trace_key
        for s in SCENARIOS
    }
    beside = replace(FAMILY, workload=replace(FAMILY.workload, beside=True))
    count = len(SPACE.defaults()) + 6 * len(SCENARIOS)
    run(path, count, families=[beside])
    tried = {e.trace_key for e in read_log(path).entries if e.workload_key == beside.workload.key}
    assert winners <= tried
    without = tmp_path / "without.jsonl"
    run(without, count, families=[beside])
    assert not winners <= {e.trace_key for e in read_log(without).entries}


def test_a_line_of_an_older_form_gives_what_is_most_like_it(tmp_path):
    path = tmp_path / "log.jsonl"
    run(path, 30)
    entries = list({e.trace_key: e for e in read_log(path).entries}.values())
    older, gone = [], []
    for entry in entries:
        line = json.loads(entry.raw)
        del line["i"][1][1][-1]  # a step that was not there yet
        older.append(json.dumps(line))
        line["dop"]["sketch"] = "gone"
        gone.append(json.dumps(line))
    path.write_text("\n".join([*older, *gone]) + "\n")
    read = read_log(path).entries
    assert len(read) == len(older) + len(gone)
    resembled = 0
    for entry, was, unknown in zip(read[: len(older)], entries, read[len(older) :], strict=True):
        assert alike(SPACE, was).trace == was.trace()
        found, other = alike(SPACE, entry), alike(SPACE, unknown)
        if other is None:  # no sketch has just this form, so the name decides
            resembled += 1
            assert found.sketch.name == was.sketch.removesuffix(DEFAULT_MARK)
        else:
            assert found.trace == other.trace == entry.trace()
    assert resembled
