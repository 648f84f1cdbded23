"""Strategies: what is proposed, in which order, and never twice."""

from __future__ import annotations

import math
import random
import sys
from dataclasses import replace

import numpy as np
import pytest
import synthetic

from dop.cost_model.base import CostModel, NoModel
from dop.cost_model.gbdt import GbdtModel
from dop.effort import QUICK
from dop.errors import ConfigError
from dop.family import adapted
from dop.measurement import Measurement
from dop.scenario import Scenario, named
from dop.search.evolutionary import Draft, EvolutionaryStrategy
from dop.search.random import RandomStrategy
from dop.search.replay import ReplayStrategy
from dop.search.selection import acquisition, diverse, expected_gain, tournament
from dop.search.table import SpaceTable, load_table, restricted, save_table
from dop.space.sketch import Candidate, Limit, Space
from dop.space.trace import Trace
from dop.target import SM_90

SPACE = synthetic.space()
DEVICE = synthetic.Device(2)
SCENARIOS = (named("identical", 1), named("uniform", 32), named("distinct", 128))
ARGUMENTS = (SPACE, synthetic.WORKLOAD, SM_90, SCENARIOS)


def evolutionary(seed: int = 0, space: Space = SPACE, scenarios=SCENARIOS, model=None):
    model = model or GbdtModel(space, synthetic.WORKLOAD, SM_90, QUICK.model, seed)
    return EvolutionaryStrategy(
        space, synthetic.WORKLOAD, SM_90, scenarios, random.Random(seed), model, QUICK.search
    )


def random_search(seed: int = 0):
    return RandomStrategy(*ARGUMENTS, random.Random(seed))


def answers(candidates, scenarios=SCENARIOS):
    return [(c, s, DEVICE.measure(c, s)) for c in candidates for s in scenarios]


def drive(strategy, count: int, batch: int = 8) -> list[Candidate]:
    proposed: list[Candidate] = []
    while len(proposed) < count:
        chosen = strategy.ask(min(batch, count - len(proposed)))
        strategy.tell(answers(chosen, strategy.scenarios))
        proposed += chosen
    return proposed


@pytest.mark.parametrize("make", [evolutionary, random_search])
def test_defaults_first_no_trace_twice_all_valid(make):
    proposed = drive(make(), 80)
    assert proposed[: len(SPACE.sketches)] == list(SPACE.defaults())
    assert len({c.trace.key for c in proposed}) == 80
    assert all(c.sketch.broken_limit(c.values) is None for c in proposed)


@pytest.mark.parametrize("make", [evolutionary, random_search])
def test_the_same_seed_and_answers_give_the_same_sequence(make):
    one, two, other = ([c.trace.key for c in drive(make(seed), 48)] for seed in (4, 4, 5))
    assert one == two
    assert one != other


def test_what_was_told_is_not_proposed_again():
    first = drive(random_search(), 60)
    resumed = evolutionary()
    resumed.tell(answers(first))
    again = drive(resumed, 40)
    assert not {c.trace.key for c in first} & {c.trace.key for c in again}
    assert resumed.predicted_s(again[-1], SCENARIOS[0]) is not None, "it trained on the log"


def test_telling_twice_changes_nothing():
    strategy = evolutionary()
    results = answers(strategy.ask(8))
    strategy.tell(results)
    best = strategy.history.best_s(SCENARIOS[1].key)
    strategy.tell(results)
    assert len(strategy.history.samples) == len(results)
    assert strategy.history.best_s(SCENARIOS[1].key) == best


def test_without_a_model_it_draws_at_random_and_goes_on():
    assert len(drive(evolutionary(model=NoModel()), 60)) == 60


def test_predictions_are_kept_and_judged():
    strategy = evolutionary()
    drive(strategy, 24)
    assert strategy.rank_correlation() is None or strategy.rank_correlation() <= 1
    drive(strategy, 72)
    assert 0.3 < strategy.rank_correlation() <= 1
    assert 0.01 < strategy.sigma < 0.5


def test_hints_are_measured_during_the_warm_up():
    hints = [SPACE.sample(random.Random(i)) for i in range(3)]
    strategy = evolutionary()
    strategy.hint(hints)
    strategy.hint(hints)
    proposed = [c.trace.key for c in drive(strategy, 16)]
    assert {c.trace.key for c in hints} <= set(proposed)


class Against(NoModel):
    """Expects the worst of one candidate, and the same of all others."""

    def __init__(self, candidate: Candidate) -> None:
        self.point = candidate.annotation

    @property
    def trained(self) -> bool:
        return True

    def predict(self, points, scenarios):
        bad = [3.0 if point.annotation == self.point else 0.0 for point in points]
        return np.repeat(np.array(bad)[:, None], len(scenarios), axis=1)


@pytest.mark.parametrize("adopted", [QUICK.search.adopted, 0.0])
def test_what_a_neighbour_finds_later_is_measured_whatever_the_model_thinks(adopted):
    found = SPACE.sample(random.Random(7))
    strategy = EvolutionaryStrategy(
        SPACE, synthetic.WORKLOAD, SM_90, SCENARIOS, random.Random(1), Against(found),
        replace(QUICK.search, adopted=adopted, epsilon=0.0, explore=0.0),
    )  # fmt: skip
    before = drive(strategy, 48)
    assert found.trace.key not in {c.trace.key for c in before}
    strategy.hint([SPACE.sample(random.Random(8))])
    strategy.hint([found])  # instead of the other one
    behind = {c.trace.key for c in drive(strategy, 40)}
    assert (found.trace.key in behind) == (adopted > 0)


def test_a_neighbours_point_is_repaired_where_it_breaks_a_limit():
    sketch = synthetic.sketch()
    space = Space((sketch,))
    candidates = [space.sample(random.Random(i)) for i in range(40)]
    narrow = replace(
        sketch, limits=(*sketch.limits, Limit("split", 4, lambda a: a["shrink.split_k"]))
    )
    fits = [c for c in candidates if narrow.broken_limit(c.values) is None]
    assert [c.annotation for c in adapted(Space((narrow,)), candidates)] == [
        c.annotation for c in fits
    ]
    moved = list(adapted(Space((narrow,)), candidates, repair=True))
    assert len(fits) < len(moved) <= len(candidates)
    assert all(narrow.broken_limit(c.values) is None for c in moved)
    assert [c.annotation for c in moved] == [
        c.annotation for c in adapted(Space((narrow,)), candidates, repair=True)
    ]


def test_a_small_space_is_proposed_whole_and_then_nothing():
    sketch = synthetic.sketch(
        "tiled/staged",
        {**synthetic.SMALL, "shrink.split_k": (1,), "shrink.tile": (128,), "tokens.tile": (1, 4)},
    )
    small = Space((sketch,))
    valid = {c.annotation for c in (Candidate.of(sketch, v) for v in _all_values(sketch))}
    for strategy in (
        evolutionary(space=small),
        RandomStrategy(small, synthetic.WORKLOAD, SM_90, SCENARIOS, random.Random(0)),
    ):
        proposed = drive(strategy, len(valid))
        assert {c.annotation for c in proposed} == valid
        assert strategy.ask(8) == []


def _all_values(sketch):
    from itertools import product

    names = [d.name for d in sketch.domains]
    for values in product(*(d.choices for d in sketch.domains)):
        annotation = dict(zip(names, values, strict=True))
        if sketch.broken_limit(annotation) is None:
            yield annotation


def test_replay_proposes_the_given_traces_in_order():
    wanted = [SPACE.sample(random.Random(i)) for i in range(5)]
    traces = [c.trace for c in wanted] + [wanted[0].trace, Trace(())]
    strategy = ReplayStrategy(*ARGUMENTS, random.Random(0), traces)
    assert strategy.skipped == 1
    assert [c.trace for c in strategy.ask(3) + strategy.ask(9)] == [c.trace for c in wanted]
    assert strategy.ask(1) == []


def test_expected_gain_is_right_and_falls_with_the_prediction():
    rng = np.random.default_rng(0)
    for mean, sigma in ((-0.2, 0.1), (0.0, 0.2), (0.3, 0.3)):
        drawn = np.maximum(0, 1 - np.exp(mean + sigma * rng.standard_normal(400_000))).mean()
        assert expected_gain(np.array([mean]), sigma)[0] == pytest.approx(drawn, abs=2e-3)
    line = acquisition(np.linspace(-1, 5, 400)[:, None], [2.5], 0.1)
    assert (np.diff(line) < 0).all(), "one scenario: the order is the model's"


def test_acquisition_weighs_scenarios_and_values_a_win_in_one():
    predicted = np.array([[-0.5, 2.0], [0.05, 0.05], [0.5, 0.5]])
    scores = acquisition(predicted, [1, 1], 0.05)
    assert scores[0] > scores[1] > scores[2]
    only_second = acquisition(predicted, [1e-6, 1], 0.05)
    assert only_second[1] > only_second[0]


def test_a_weighted_scenario_is_served_better():
    def best(weights) -> float:
        scenarios = (
            Scenario("identical", (1,), 0, weights[0]),
            Scenario("distinct", (1,) * 128, 0, weights[1]),
        )
        found = []
        for seed in range(2):
            strategy = evolutionary(seed, scenarios=scenarios)
            drive(strategy, 40)
            found.append(strategy.history.best_s(scenarios[1].key))
        return float(np.mean(found))

    assert best((0.001, 1)) <= best((1, 0.001)) * 1.005


def test_diverse_spreads_and_tournament_prefers_high_scores():
    marks = [frozenset({("a", i), ("b", 0)}) for i in range(3)] + [frozenset({("a", 9), ("b", 9)})]
    scores = np.array([1.0, 0.99, 0.98, 0.9])
    assert diverse(marks, scores, 2, 0.0) == [0, 1]
    assert diverse(marks, scores, 2, 5.0) == [0, 3]
    rng = random.Random(0)
    drawn = [tournament([0, 1, 2], np.array([0.0, 5.0, 1.0]), rng, 4) for _ in range(200)]
    assert drawn.count(1) > 140


class Oracle(CostModel):
    """Predicts `ahead` for every point, sure of itself; notes what it is asked to explore."""

    def __init__(self, ahead: float) -> None:
        self.ahead = ahead
        self.explored: list[int] = []

    @property
    def trained(self) -> bool:
        return True

    def update(self, samples) -> None:
        del samples

    def predict(self, points, scenarios):
        return np.full((len(points), len(scenarios)), self.ahead)

    def deviation(self, points, scenarios):
        return np.full((len(points), len(scenarios)), 0.05)

    def least_known(self, points, scenarios, n):
        self.explored.append(n)
        return list(range(min(n, len(points))))


def explored_after_the_start(ahead: float) -> tuple[list[int], int]:
    """Sizes of the requests to explore, and how many candidates the model could pick."""
    model = Oracle(ahead)
    strategy = evolutionary(model=model)
    drive(strategy, 24)
    model.explored.clear()
    return model.explored, len(drive(strategy, 160))


def test_it_explores_where_nothing_promises_a_gain():
    requests, count = explored_after_the_start(ahead=0.5)
    expected = QUICK.search.epsilon + (1 - QUICK.search.epsilon) * QUICK.search.explore
    assert sum(requests) / count == pytest.approx(expected, abs=0.1)


def test_it_does_not_explore_while_points_promise_a_gain():
    requests, _ = explored_after_the_start(ahead=-0.5)
    assert requests == []


def test_exploring_ends_when_a_gain_is_in_sight_again():
    model = Oracle(0.5)
    strategy = evolutionary(model=model)
    drive(strategy, 40)
    assert model.explored
    model.ahead = -0.5
    model.explored.clear()
    drive(strategy, 40)
    assert model.explored == []


class Partial(Oracle):
    """Sees a gain in one sketch and none in the others."""

    def __init__(self, name: str) -> None:
        super().__init__(0.0)
        self.name = name

    def predict(self, points, scenarios):
        ahead = [-0.3 if p.sketch.name == self.name else 0.3 for p in points]
        return np.repeat(np.array(ahead)[:, None], len(scenarios), axis=1)


def tried(slow: float, **effort) -> dict[str, int]:
    """Candidates by sketch, where the model believes in the first one only, and all others take
    `slow` times as long as it."""
    favourite = SPACE.sketches[0].name
    strategy = EvolutionaryStrategy(
        SPACE, synthetic.WORKLOAD, SM_90, SCENARIOS, random.Random(3), Partial(favourite),
        replace(QUICK.search, warm_up=0, epsilon=0.0, **effort),
    )  # fmt: skip
    counts = dict.fromkeys((sketch.name for sketch in SPACE.sketches), 0)
    for _ in range(25):
        chosen = strategy.ask(8)
        results = []
        for candidate in chosen:
            counts[candidate.sketch.name] += 1
            seconds = 1e-5 * (1.0 if candidate.sketch.name == favourite else slow)
            results += [(candidate, s, Measurement((seconds,) * 3)) for s in SCENARIOS]
        strategy.tell(results)
    return counts


def test_sketches_that_came_close_have_their_try_whatever_the_model_thinks():
    others = [sketch.name for sketch in SPACE.sketches[1:]]
    assert others
    close, far, off = tried(1.2), tried(5.0), tried(1.2, try_out=0.0)
    for name in others:
        assert close[name] >= QUICK.search.trials > off[name]
        assert far[name] < QUICK.search.trials
    assert max(close[name] for name in others) <= QUICK.search.trials + 8


def mixed(scenarios) -> tuple[EvolutionaryStrategy, Oracle]:
    """Two candidates, each twice as slow as the other under one of the scenarios."""
    model = Oracle(0.1)
    strategy = evolutionary(scenarios=scenarios, model=model)
    one, two = (SPACE.sample(random.Random(i)) for i in range(2))
    times = ((one, (1e-5, 2e-5)), (two, (2e-5, 1e-5)))
    strategy.tell(
        [
            (candidate, scenario, Measurement((seconds,) * 3))
            for candidate, row in times
            for scenario, seconds in zip(scenarios, row, strict=True)
        ]
    )
    return strategy, model


def test_a_compromise_is_worth_something_where_the_mix_is_not_known():
    draft = Draft.of(SPACE.sketches[0], SPACE.sketches[0].default())
    one_count, _ = mixed((named("identical", 32), named("distinct", 32)))
    two_counts, _ = mixed((named("identical", 32), named("distinct", 64)))
    # ten percent slower than the best of each, where the best compromise takes 1.5 times as long
    assert one_count._scores([draft])[0] > 0.05
    assert two_counts._scores([draft])[0] < 0.01
    best = one_count.history.compromises([s.key for s in one_count.scenarios], 5)
    assert [lost for lost, _ in best] == pytest.approx([math.log(1.5)] * 2)


def test_a_table_survives_its_file(tmp_path):
    table = synthetic.table(0)
    path = tmp_path / "space.json.gz"
    save_table(path, table)
    again = load_table(path)
    assert again.rows == table.rows
    assert (again.workload.key, again.target, again.scenario.key) == (
        table.workload.key,
        table.target,
        table.scenario.key,
    )
    point = dict(next(iter(table.rows)))
    old, new = table.recorded_sketch(), again.recorded_sketch()
    assert old.bind(point).key == new.bind(point).key == table.sketch.bind(point).key
    assert new.estimates["smem_bytes"](point) == table.sketch.estimates["smem_bytes"](point)
    point["shrink.tile"] = 7
    assert new.broken_limit(point)
    first = path.read_bytes()
    save_table(path, again)
    assert path.read_bytes() == first


def test_a_table_that_is_none_is_one_error(tmp_path):
    path = tmp_path / "space.json.gz"
    for content in (b"", b"{}", b"\x1f\x8b\x08"):
        path.write_bytes(content)
        with pytest.raises(ConfigError, match="not a recorded space"):
            load_table(path)
    with pytest.raises(ConfigError, match="not a recorded space"):
        load_table(tmp_path / "none.json.gz")
    with pytest.raises(ConfigError, match="tile = 5"):
        restricted(SPACE.sketches[0], {"tokens.tile": 5})
    fixed = restricted(SPACE.sketches[0], {"tokens.tile": 4})
    assert isinstance(SpaceTable(synthetic.WORKLOAD, SM_90, SCENARIOS[0], fixed, ()), SpaceTable)
    assert fixed.default()["tokens.tile"] == 4


def test_search_and_cost_model_import_neither_tvm_nor_torch():
    import subprocess

    code = (
        "import sys, dop.search.evolutionary, dop.search.replay, dop.search.table, "
        "dop.cost_model.gbdt; sys.exit(any(m in sys.modules for m in ('tvm', 'torch')))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
