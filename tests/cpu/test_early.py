"""Early kernels (dop/space/early.py): for small batches, and for those only."""

from __future__ import annotations

import hashlib

import pytest
import synthetic
from fake_measurer import FakeMeasurer

from dop.database.jsonl import Log, read_log
from dop.family import Family
from dop.measurement import Measurement
from dop.scenario import named
from dop.space import early
from dop.space.early import DEPENDENT, EARLY, EARLY_TOKENS, may_serve, plainly
from dop.space.generate import build_space
from dop.space.step import PragmaStep
from dop.target import SM_90
from dop.tune import tune

SPACE = build_space(synthetic.WORKLOAD, SM_90)
SMALL, LARGE = named("uniform", EARLY_TOKENS), named("identical", 4 * EARLY_TOKENS)
MANY = 160
"""Trials that meet several early kernels."""
USERS = ("dop.tune", "dop.search.history", "dop.search.strategy", "dop.search.evolutionary")


def is_early(trace) -> bool:
    return any(
        isinstance(step, PragmaStep) and (step.name, step.value) == ("dependent_launch", EARLY)
        for step in trace.steps
    )


class Overlapping(FakeMeasurer):
    """Early kernels take half the time of others, in every batch: as calls back to back do."""

    def _answer(self, job, scenario, key):
        noise = int(hashlib.sha256(f"{key}{scenario.key}".encode()).hexdigest()[:8], 16) / 2**32
        seconds = 1e-5 * (1 + noise) * (0.5 if is_early(job.trace) else 1.0)
        return Measurement((seconds,) * 3)


def run(path, scenarios, trials, like=()):
    measurer = Overlapping(SPACE)
    family = Family(synthetic.WORKLOAD, SM_90, scenarios)
    with measurer, Log.open(path) as log:
        result = tune(
            [family], measurer=measurer, log=log, trials=trials, budget_s=120,
            build=lambda w, t: SPACE, like=like,
        )  # fmt: skip
    return result, read_log(path).entries


def test_they_are_measured_in_small_batches_only(tmp_path):
    result, entries = run(tmp_path / "log.jsonl", (SMALL, LARGE), 80)
    found = [entry for entry in entries if is_early(entry.trace())]
    assert {entry.scenario_key for entry in found} == {SMALL.key}
    others = {e.trace_key for e in entries} - {e.trace_key for e in found}
    assert len(entries) == len(found) + 2 * len(others)
    best = {task.scenario.key: task.best for task in result.progress.families[0].tasks}
    fastest = min((e for e in entries if e.scenario_key == LARGE.key), key=lambda e: e.median_s)
    assert best[LARGE.key].measurement.median_s == fastest.median_s


def test_where_all_batches_are_large_none_is_proposed(tmp_path):
    _, entries = run(tmp_path / "log.jsonl", (LARGE,), 80)
    assert len(entries) == 80
    assert not any(is_early(entry.trace()) for entry in entries)


def test_an_older_log_gives_their_plain_twins(tmp_path, monkeypatch):
    """Such logs hold early kernels as the best of large batches: they do not count, and the same
    kernels without the early wait come first."""
    path = tmp_path / "log.jsonl"
    with monkeypatch.context() as older:
        for user in USERS:
            older.setattr(f"{user}.may_serve", lambda annotation, tokens: True)
        _, before = run(path, (LARGE,), MANY)
    ranked = sorted(before, key=lambda e: e.median_s)
    winners = [entry.trace() for entry in ranked if is_early(entry.trace())][:4]
    assert is_early(ranked[0].trace())
    assert len(winners) == 4
    result, entries = run(path, (LARGE,), 8)
    tried = {entry.trace_key for entry in entries}
    for trace in winners:
        assert plainly(SPACE.match(trace)).trace.key in tried
    assert not any(is_early(entry.trace()) for entry in entries[len(before) :])
    plain = min(e.median_s for e in entries if not is_early(e.trace()))
    assert result.progress.families[0].tasks[0].best.measurement.median_s == plain


def test_a_log_that_comes_first_gives_their_plain_twins_for_large_batches(tmp_path, monkeypatch):
    with monkeypatch.context() as older:
        for user in USERS:
            older.setattr(f"{user}.may_serve", lambda annotation, tokens: True)
        _, there = run(tmp_path / "there.jsonl", (LARGE,), MANY)
    winner = min(there, key=lambda e: e.median_s).trace()
    assert is_early(winner)
    # The small batch is one that the early kernel could serve, but it was chosen for the large one.
    first = len(SPACE.defaults()) + 2
    _, entries = run(tmp_path / "here.jsonl", (SMALL, LARGE), first, like=there)
    tried = {entry.trace_key for entry in entries}
    assert plainly(SPACE.match(winner)).trace.key in tried
    assert winner.key not in tried


@pytest.mark.parametrize("tokens", [1, EARLY_TOKENS, EARLY_TOKENS + 1])
def test_who_may_serve(tokens):
    sketch = next(s for s in SPACE.sketches for d in s.domains if EARLY in d.choices
                  and d.name == DEPENDENT)  # fmt: skip
    values = sketch.default()
    assert may_serve(values.items(), tokens)
    assert may_serve((values | {DEPENDENT: EARLY}).items(), tokens) == (tokens <= EARLY_TOKENS)
    assert early.EARLY_TOKENS == 16
