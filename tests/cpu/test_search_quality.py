"""How good the search is, on sub-spaces of which every point was measured.

The made-up tables are always there; tables recorded on real devices (tests/data/space_*.json.gz,
made by benchmarks/record_space.py) are judged by the same bars.
"""

from __future__ import annotations

import math
import random
import statistics
from functools import cache
from pathlib import Path

import pytest
import synthetic

from dop.cost_model.gbdt import GbdtModel
from dop.cost_model.metric import spearman, top_k_regret
from dop.effort import QUICK
from dop.search.evolutionary import EvolutionaryStrategy
from dop.search.random import RandomStrategy
from dop.search.strategy import Strategy
from dop.search.table import SpaceTable, load_table
from dop.space.sketch import Candidate

RECORDED = sorted((Path(__file__).parents[1] / "data").glob("space_*.json.gz"))
MADE_UP = {"T128/skewed": (1, 128, "skewed"), "T64/identical": (3, 64, "identical")}
NAMES = [*MADE_UP, *(path.name for path in RECORDED)]
BATCH = 8
SEEDS = range(10)


@cache
def table(name: str) -> SpaceTable:
    if name in MADE_UP:
        return synthetic.table(*MADE_UP[name])
    return load_table(next(path for path in RECORDED if path.name == name))


def evolutionary(found: SpaceTable, seed: int) -> EvolutionaryStrategy:
    space, rng = found.space(), random.Random(seed)
    model = GbdtModel(space, found.workload, found.target, QUICK.model, seed)
    return EvolutionaryStrategy(
        space, found.workload, found.target, (found.scenario,), rng, model, QUICK.search
    )


def random_search(found: SpaceTable, seed: int) -> RandomStrategy:
    space, rng = found.space(), random.Random(seed)
    return RandomStrategy(space, found.workload, found.target, (found.scenario,), rng)


def needed(found: SpaceTable, strategy: Strategy, most: int, slack: float = 0.05) -> float:
    """Measurements until one is within `slack` of the table's best; infinite beyond `most`."""
    goal, count = found.best_s() * (1 + slack), 0
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
def test_evolution_is_near_the_best_within_200_and_three_times_faster_than_random(name):
    found = table(name)
    assert len(found.rows) >= 1000
    evolved = [needed(found, evolutionary(found, seed), 200) for seed in SEEDS]
    drawn = [needed(found, random_search(found, seed), len(found.rows)) for seed in range(40)]
    assert sum(count <= 200 for count in evolved) >= 9, evolved
    assert 3 * statistics.median(evolved) <= statistics.median(drawn), (evolved, drawn)


@pytest.mark.parametrize("name", NAMES)
def test_after_100_measurements_the_model_ranks_the_whole_space(name):
    found = table(name)
    figures = [_quality(found, seed) for seed in range(3)]
    assert statistics.median(f[0] for f in figures) >= 0.8, figures
    assert statistics.median(f[1] for f in figures) <= 0.03, figures


def _quality(found: SpaceTable, seed: int) -> tuple[float, float]:
    """Spearman and top-8 regret over the whole table of the model of a search after 100."""
    strategy, count = evolutionary(found, seed), 0
    while count < 100:
        candidates = strategy.ask(min(BATCH, 100 - count))
        strategy.tell([(c, found.scenario, found.measure(c)) for c in candidates])
        count += len(candidates)
    sketch = found.recorded_sketch()
    points = [Candidate.of(sketch, dict(point)) for point in found.rows]
    predicted = strategy.model.predict(points, (found.scenario,))[:, 0]
    seconds = [found.measure(point).median_s for point in points]
    return spearman(predicted, seconds), top_k_regret(predicted, seconds, 8)
