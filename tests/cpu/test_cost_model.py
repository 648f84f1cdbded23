"""Metrics, features and the boosted model."""

from __future__ import annotations

import dataclasses
import math
import random

import numpy as np
import pytest
import synthetic
from scipy import stats

from dop.cost_model.base import NoModel, Sample
from dop.cost_model.feature import FeatureExtractor
from dop.cost_model.gbdt import GbdtModel, relative_times, thinned
from dop.cost_model.metric import ranks, spearman, top_k_regret
from dop.effort import QUICK
from dop.errors import ConfigError
from dop.scenario import named
from dop.target import SM_90

SPACE = synthetic.space()
DEVICE = synthetic.Device(1)
SCENARIOS = (named("identical", 1), named("uniform", 32), named("skewed", 128))


def model(**changes) -> GbdtModel:
    effort = dataclasses.replace(QUICK.model, **changes)
    return GbdtModel(SPACE, synthetic.WORKLOAD, SM_90, effort, seed=3)


def samples(count: int, seed: int = 0) -> list[Sample]:
    rng = random.Random(seed)
    found = []
    for _ in range(count):
        candidate = SPACE.sample(rng)
        for scenario in SCENARIOS:
            measured = DEVICE.measure(candidate, scenario)
            seconds = measured.median_s if measured.ok else math.inf
            found.append(Sample(candidate, scenario, seconds))
    return found


def test_spearman_agrees_with_scipy_ties_included():
    rng = np.random.default_rng(0)
    for _ in range(50):
        a, b = rng.integers(0, 8, 30), rng.integers(0, 8, 30)
        assert spearman(a, b) == pytest.approx(stats.spearmanr(a, b).statistic)
        assert ranks(a).tolist() == (stats.rankdata(a) - 1).tolist()
    assert spearman([1, 2, 3], [1, 2, math.inf]) == pytest.approx(1)
    assert math.isnan(spearman([1, 1], [1, 2]))
    assert math.isnan(spearman([1], [1]))


def test_regret_is_what_measuring_the_top_k_would_miss():
    seconds = [4.0, 1.0, 2.0, math.inf, 3.0]
    assert top_k_regret([0, 1, 2, 3, 4], seconds, 2) == 0
    assert top_k_regret([0, 9, 9, 1, 2], seconds, 1) == 3
    assert top_k_regret([0, 9, 8, 1, 2], seconds, 3) == 2
    assert top_k_regret([9, 9, 9, 0, 9], seconds, 1) == math.inf
    assert math.isnan(top_k_regret([1], [math.inf]))


def test_features_have_a_name_each_and_nan_where_a_sketch_lacks_something():
    extractor = FeatureExtractor(SPACE, synthetic.WORKLOAD, SM_90)
    rng = random.Random(0)
    points = [SPACE.sample(rng) for _ in range(40)]
    rows = extractor.rows(points, SCENARIOS)
    assert rows.shape == (120, len(extractor.names))
    assert len(set(extractor.names)) == len(extractor.names)
    column = {name: i for i, name in enumerate(extractor.names)}
    for i, point in enumerate(points):
        values = point.values
        for j, scenario in enumerate(SCENARIOS):
            row = rows[3 * i + j]
            assert row[column["tokens"]] == scenario.tokens
            assert row[column["shrink.split_k"]] == values["shrink.split_k"]
            stages = row[column["shrink.stages"]]
            assert math.isnan(stages) == ("shrink.stages" not in values)
            tile = values["tokens.tile"]
            tiles = sum(-(-n // tile) for n in scenario.segments)
            assert row[column["tiles"]] == tiles
            assert row[column["padding"]] == tiles * tile / scenario.tokens
            assert row[column["steps.SP"]] == sum(s.code == "SP" for s in point.sketch.steps)
    twins = extractor.rows(points, [dataclasses.replace(s, cold=True) for s in SCENARIOS])
    assert (rows[:, column["cold"]].any(), twins[:, column["cold"]].all()) == (False, True)
    twins[:, column["cold"]] = 0
    assert np.array_equal(twins, rows, equal_nan=True)
    vectorised = rows[:, column["length.vectorize"]]
    assert vectorised.tolist() == [p.values["shrink.vector"] for p in points for _ in SCENARIOS]
    pairs = [(p, s) for p in points for s in SCENARIOS]
    assert np.array_equal(extractor.pair_rows(pairs), rows, equal_nan=True)


@pytest.mark.parametrize("objective", ["regression", "lambdarank", "mixed"])
def test_the_model_ranks_unseen_points_and_failures_last(objective):
    trained = model(objective=objective)
    assert not trained.trained
    trained.update(samples(120))
    assert trained.trained
    test = samples(150, seed=9)
    for scenario in SCENARIOS:
        held = [s for s in test if s.scenario is scenario]
        guess = trained.predict([s.point for s in held], [scenario])[:, 0]
        assert spearman(guess, [s.seconds for s in held]) > 0.75
        failed = [g for g, s in zip(guess, held, strict=True) if math.isinf(s.seconds)]
        right = [g for g, s in zip(guess, held, strict=True) if math.isfinite(s.seconds)]
        assert failed
        assert np.median(failed) > np.quantile(right, 0.75)


def test_the_same_samples_give_the_same_model():
    points = [SPACE.sample(random.Random(5)) for _ in range(20)]
    guesses = []
    for _ in range(2):
        trained = model()
        trained.update(samples(60))
        guesses.append(trained.predict(points, SCENARIOS))
    assert np.array_equal(*guesses)


def test_it_waits_for_data_and_survives_odd_data():
    trained = model()
    trained.update(samples(2))
    assert not trained.trained
    point = SPACE.sample(random.Random(0))
    assert trained.predict([point], SCENARIOS).tolist() == [[0.0, 0.0, 0.0]]
    failures = [dataclasses.replace(s, seconds=math.inf) for s in samples(30)]
    trained.update(failures)
    assert not trained.trained
    same = [dataclasses.replace(s, seconds=1e-6) for s in samples(30)]
    for objective in ("regression", "lambdarank", "mixed"):
        flat = model(objective=objective)
        flat.update(same)
        assert np.isfinite(flat.predict([point], SCENARIOS)).all()
    assert NoModel().predict([point], SCENARIOS).shape == (1, 3)
    with pytest.raises(ConfigError, match="lambdarank"):
        model(objective="magic")


def test_a_handful_of_samples_already_ranks_and_knows_how_little_it_knows():
    trained = model()
    trained.update(samples(12))
    known = [s.point for s in samples(12)]
    others = [SPACE.sample(random.Random(1000 + i)) for i in range(200)]
    scenario = SCENARIOS[1]
    guess = trained.predict(others, [scenario])[:, 0]
    truth = [DEVICE.measure(c, scenario).median_s for c in others]
    assert spearman(guess, truth) > 0.3
    there, elsewhere = (trained.deviation(p, [scenario]) for p in (known, others))
    assert 0 < np.median(there) < np.median(elsewhere)
    without = model(smooth_rows=0)
    without.update(samples(12))
    assert not without.trained


def test_the_least_known_are_neither_the_measured_nor_neighbours_of_each_other():
    trained = model()
    trained.update(samples(12))
    known = [s.point for s in samples(12)]
    twins = [SPACE.sample(random.Random(1000 + i)) for i in range(30)] * 2
    picks = trained.least_known([*known, *twins], SCENARIOS, 5)
    assert len(set(picks)) == 5
    assert min(picks) >= len(known)
    assert len({twins[i - len(known)].annotation for i in picks}) == 5, "no point and its twin"
    first = trained.deviation([*known, *twins], SCENARIOS)
    assert picks[0] == np.square(first).sum(axis=1).argmax()
    assert trained.least_known(twins[:2], SCENARIOS, 5) in ([0, 1], [1, 0])
    assert trained.least_known([], SCENARIOS, 5) == []
    assert model(smooth_rows=0).least_known(twins, SCENARIOS, 5) == []
    assert NoModel().least_known(twins, SCENARIOS, 5) == []


def test_relative_times_are_per_scenario_capped_and_put_failures_last():
    point = SPACE.sample(random.Random(0))
    a, b = SCENARIOS[:2]
    given = [(a, 1.0), (a, math.e), (b, 100.0), (b, math.inf), (a, 1e9)]
    times = relative_times([Sample(point, s, t) for s, t in given], worst_ratio=20)
    assert times[:3] == pytest.approx([0, 1, 0])
    assert times[4] == pytest.approx(math.log(20))
    assert times[3] > times[4]


def test_training_stays_within_its_bound_of_work():
    small = model(max_work=200 * 80 * 4)
    many = samples(400)
    kept = thinned(relative_times(many, 20), 200)
    assert 150 <= len(kept) <= 200
    times = relative_times(many, 20)
    assert set(np.argsort(times, kind="stable")[:90]) <= set(kept)
    small.update(many)
    assert small.trained
