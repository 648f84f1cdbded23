"""How good the search is, on sub-spaces of which every point was measured.

The made-up table is always there; tables recorded on real devices (tests/data/space_*.json.gz,
made by benchmarks/record_space.py) are judged by the same bars. One is left out where it cannot
tell searches apart: if more than 3 % of the points are within 5 % of the best, random search needs
about twenty measurements or fewer, and a third of that is hardly more than the default and the
first draws. Such a table is judged by the other bars only.
"""

from __future__ import annotations

import math
import multiprocessing
import os
import random
import statistics
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from functools import cache, partial
from pathlib import Path

import pytest
import synthetic

from dop.cost_model.gbdt import GbdtModel
from dop.cost_model.metric import spearman, top_k_regret
from dop.effort import FULL, QUICK
from dop.search.evolutionary import EvolutionaryStrategy
from dop.search.strategy import Strategy
from dop.search.table import SpaceTable, load_table
from dop.space.sketch import Candidate

RECORDED = sorted((Path(__file__).parents[1] / "data").glob("space_*.json.gz"))
MADE_UP = {"T64/identical": (3, 64, "identical")}
NAMES = [*MADE_UP, *(path.name for path in RECORDED)]
BATCH = QUICK.batch
"""What is asked for; the strategy itself gives fewer while little is known."""
SLACK = 0.05
SEEDS = range(10)
RANKED = range(5)
"""Seeds of the searches whose models are judged."""


@pytest.fixture(scope="module")
def cores():
    """Processes for searches that differ in their seed."""
    count = min(4, len(os.sched_getaffinity(0)))
    with ProcessPoolExecutor(count, multiprocessing.get_context("spawn")) as pool:
        yield pool


@cache
def table(name: str) -> SpaceTable:
    if name in MADE_UP:
        return synthetic.table(*MADE_UP[name])
    return load_table(next(path for path in RECORDED if path.name == name))


def evolutionary(found: SpaceTable, seed: int) -> EvolutionaryStrategy:
    """The search; without the untuned default where that is as good as what is sought."""
    space, rng = found.space(), random.Random(seed)
    model = GbdtModel(space, found.workload, found.target, QUICK.model, seed)
    effort = replace(QUICK.search, max_defaults=0) if default_is_near(found) else QUICK.search
    return EvolutionaryStrategy(
        space, found.workload, found.target, (found.scenario,), rng, model, effort
    )


def default_is_near(found: SpaceTable) -> bool:
    """Whether the untuned default is within 5 % of the best (on the H100's table it is)."""
    (default,) = found.space().defaults()
    return found.measure(default).median_s <= found.best_s() * (1 + SLACK)


def near_best(found: SpaceTable) -> int:
    """Points within 5 % of the best."""
    goal = found.best_s() * (1 + SLACK)
    return sum(r.seconds is not None and r.seconds <= goal for r in found.rows.values())


def drawn_median(found: SpaceTable) -> int:
    """Median of the measurements that random search needs: the default, which misses, then uniform
    draws; where the default is near the best it has none, as the other search.

    Computed, not drawn: the chance that none of the first draws without replacement is near the
    best.
    """
    begun = 0 if default_is_near(found) else 1
    left, near, missed, count = len(found.rows) - begun, near_best(found), 1.0, begun
    while missed > 0.5:
        missed *= (left - near) / left
        left, count = left - 1, count + 1
    return count


def needed(found: SpaceTable, strategy: Strategy, most: int) -> float:
    """Measurements until one is within 5 % of the table's best; infinite beyond `most`."""
    goal, count = found.best_s() * (1 + SLACK), 0
    while count < most:
        candidates = strategy.ask(min(BATCH, most - count))
        if not candidates:
            break
        measured = [found.measure(c) for c in candidates]
        for place, measurement in enumerate(measured):
            if measurement.median_s <= goal:
                return count + place + 1
        count += len(candidates)
        results = zip(candidates, measured, strict=True)
        strategy.tell([(c, found.scenario, m) for c, m in results])
    return math.inf


@pytest.mark.parametrize("name", NAMES)
def test_evolution_is_near_the_best_within_200_and_three_times_faster_than_random(name, cores):
    found = table(name)
    assert len(found.rows) >= 1000
    evolved = list(cores.map(partial(_evolved, name), SEEDS))
    assert sum(count <= 200 for count in evolved) >= 9, evolved
    if near_best(found) <= 0.03 * len(found.rows):
        assert 3 * statistics.median(evolved) <= drawn_median(found), evolved


def test_some_table_can_tell_searches_apart():
    assert any(near_best(table(name)) <= 0.02 * len(table(name).rows) for name in NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_after_100_measurements_the_model_ranks_the_whole_space(name, cores):
    """Over several searches: on the CPU tables one is at 0.79 now and then, the mean at 0.82."""
    correlations, regrets = zip(*cores.map(partial(_quality, name), RANKED), strict=True)
    assert statistics.mean(correlations) >= 0.8, correlations
    assert statistics.mean(regrets) <= 0.03, regrets


@pytest.mark.parametrize("name", [name for name in NAMES if name not in MADE_UP])
def test_a_model_of_100_random_points_ranks_the_others(name):
    """The model alone, without a search: what it was not shown, in its order."""
    found = table(name)
    sketch = found.recorded_sketch()
    points = [Candidate.of(sketch, dict(point)) for point in found.rows]
    random.Random(0).shuffle(points)
    strategy = evolutionary(found, 0)
    strategy.tell([(c, found.scenario, found.measure(c)) for c in points[:100]])
    predicted = strategy.model.predict(points[100:], (found.scenario,))[:, 0]
    seconds = [found.measure(point).median_s for point in points[100:]]
    assert spearman(predicted, seconds) >= 0.8


def _evolved(name: str, seed: int) -> float:
    """Measurements that a search needs, of 200."""
    return needed(table(name), evolutionary(table(name), seed), 200)


def _quality(name: str, seed: int) -> tuple[float, float]:
    """Spearman and top-8 regret over the whole table of the model of a search after 100."""
    found = table(name)
    strategy, count = evolutionary(found, seed), 0
    while count < 100:
        candidates = strategy.ask(min(FULL.batch, 100 - count))
        strategy.tell([(c, found.scenario, found.measure(c)) for c in candidates])
        count += len(candidates)
    sketch = found.recorded_sketch()
    points = [Candidate.of(sketch, dict(point)) for point in found.rows]
    predicted = strategy.model.predict(points, (found.scenario,))[:, 0]
    seconds = [found.measure(point).median_s for point in points]
    return spearman(predicted, seconds), top_k_regret(predicted, seconds, 8)
