"""Gradient-boosted trees (LightGBM) as a cost model: small, quick to train, good at ranking."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from dop.cost_model.base import CostModel, FloatArray, Point, Sample
from dop.cost_model.feature import FeatureExtractor
from dop.cost_model.smooth import SmoothModel
from dop.effort import ModelEffort
from dop.errors import ConfigError, MissingDependencyError
from dop.scenario import Scenario
from dop.space.sketch import Space
from dop.target import Target
from dop.workload import Workload

OBJECTIVES = ("mixed", "lambdarank", "regression")
"""mixed: every second member of the ensemble, from the second on, is trained with lambdarank."""

_FAILURE_MARGIN = math.log(2.0)
"""A failure ranks behind the slowest success by this much (a factor of two)."""

_LEAST_SMOOTH = 3
"""Successful candidates from which a smooth function is worth more than a draw."""

_GRADES = 31
"""Grades of lambdarank; LightGBM's gain table ends there."""


class GbdtModel(CostModel):
    """An ensemble of boosted trees over FeatureExtractor's rows, with a smooth start.

    Until there are enough samples for trees a Gaussian process predicts alone; then the mean of
    both, until there are so many samples that the trees need no help.

    The same samples in the same order give the same model: one thread, fixed seeds, and a bound
    on work instead of time.

    Raises:
        MissingDependencyError: LightGBM is not installed.
        ConfigError: the objective is unknown.
    """

    def __init__(
        self, space: Space, workload: Workload, target: Target, effort: ModelEffort, seed: int = 0
    ) -> None:
        if effort.objective not in OBJECTIVES:
            raise ConfigError(
                f"objective {effort.objective!r} is unknown.", f"Use one of {OBJECTIVES}."
            )
        self._lightgbm = _lightgbm()
        self._effort = effort
        self._seed = seed
        self._features = FeatureExtractor(space, workload, target)
        self._members: list[_Member] = []
        self._smooth: SmoothModel | None = None

    @property
    def trained(self) -> bool:
        return bool(self._members) or self._smooth is not None

    def update(self, samples: Sequence[Sample]) -> None:
        """Train anew on what there is; does nothing with too few successful candidates."""
        good = {s.point.annotation for s in samples if math.isfinite(s.seconds)}
        targets = relative_times(samples, self._effort.worst_ratio)
        if len(good) >= self._effort.min_samples:
            self._grow(samples, targets)
        self._smooth = None
        rows = self._effort.smooth_rows
        if len(good) >= _LEAST_SMOOTH and (len(samples) <= rows or (rows and not self._members)):
            kept = thinned(targets, rows)
            chosen = [(samples[i].point, samples[i].scenario) for i in kept]
            self._smooth = SmoothModel(self._features.pair_rows(chosen), targets[kept])

    def _grow(self, samples: Sequence[Sample], targets: FloatArray) -> None:
        """Train the trees."""
        effort = self._effort
        kept = thinned(targets, max(64, effort.max_work // (effort.rounds * effort.ensemble)))
        chosen = [samples[i] for i in kept]
        rows = self._features.pair_rows([(s.point, s.scenario) for s in chosen])
        wanted = targets[kept]
        keys = [s.scenario_key for s in chosen]
        self._members = [
            self._ranking(rows, wanted, keys, member)
            if self._ranks(member)
            else self._regression(rows, wanted, member)
            for member in range(self._effort.ensemble)
        ]

    def predict(self, points: Sequence[Point], scenarios: Sequence[Scenario]) -> FloatArray:
        shape = (len(points), len(scenarios))
        if not self.trained or 0 in shape:
            return np.zeros(shape)
        rows = self._features.rows(points, scenarios)
        found: list[FloatArray] = []
        if self._members:
            total = sum(member.predict(rows) for member in self._members)
            found.append(np.asarray(total / len(self._members), dtype=np.float64))
        if self._smooth is not None:
            found.append(self._smooth.predict(rows)[0])
        return np.asarray(sum(found) / len(found), dtype=np.float64).reshape(shape)

    def deviation(self, points: Sequence[Point], scenarios: Sequence[Scenario]) -> FloatArray:
        shape = (len(points), len(scenarios))
        if self._smooth is None or 0 in shape:
            return np.zeros(shape)
        return self._smooth.predict(self._features.rows(points, scenarios))[1].reshape(shape)

    def least_known(
        self, points: Sequence[Point], scenarios: Sequence[Scenario], n: int
    ) -> list[int]:
        if self._smooth is None or not points or not scenarios:
            return []
        rows = self._features.rows(points, scenarios)
        return self._smooth.least_known(rows.reshape(len(points), len(scenarios), -1), n)

    def _ranks(self, member: int) -> bool:
        """Whether a member of the ensemble is trained with lambdarank."""
        objective = self._effort.objective
        return objective == "lambdarank" or (objective == "mixed" and member % 2 == 1)

    def _params(self, member: int) -> dict[str, Any]:
        effort = self._effort
        return {
            "num_leaves": effort.leaves,
            "learning_rate": effort.learning_rate,
            "min_data_in_leaf": effort.leaf_samples,
            "min_sum_hessian_in_leaf": 1e-6,
            "feature_fraction": effort.feature_share,
            "bagging_fraction": 0.9,
            "bagging_freq": 1,
            "max_bin": 255,
            "min_data_in_bin": 1,
            "feature_pre_filter": False,
            "seed": self._seed + 7919 * member,
            "deterministic": True,
            "force_col_wise": True,
            "num_threads": 1,
            "verbosity": -1,
        }

    def _regression(self, rows: FloatArray, targets: FloatArray, member: int) -> _Member:
        data = self._lightgbm.Dataset(rows, label=targets)
        return _Member(self._fit(data, member, {"objective": "regression"}))

    def _ranking(
        self, rows: FloatArray, targets: FloatArray, keys: list[str], member: int
    ) -> _Member:
        """LambdaRank with one group per scenario; a line then maps scores to log times."""
        names = list(dict.fromkeys(keys))
        order = sorted(range(len(keys)), key=lambda i: names.index(keys[i]))
        groups = [sum(key == name for key in keys) for name in names]
        rows, targets = rows[order], targets[order]
        data = self._lightgbm.Dataset(rows, label=_grades(targets, groups), group=groups)
        extra = {
            "objective": "lambdarank",
            "label_gain": [float(g) for g in range(_GRADES)],
            "lambdarank_truncation_level": max(groups),
        }
        found = _Member(self._fit(data, member, extra))
        scores = found.predict(rows)
        if scores.std() == 0:
            return _Member(found.booster, 0.0, float(targets.mean()))
        slope, offset = np.polyfit(scores, targets, 1)
        return _Member(found.booster, min(float(slope), -1e-9), float(offset))

    def _fit(self, data: Any, member: int, extra: dict[str, Any]) -> Any:
        params = {**self._params(member), **extra}
        return self._lightgbm.train(params, data, num_boost_round=self._effort.rounds)


@dataclass(frozen=True, slots=True)
class _Member:
    """A trained model, and the line that turns its output into log times."""

    booster: Any
    slope: float = 1.0
    offset: float = 0.0

    def predict(self, rows: FloatArray) -> FloatArray:
        raw = np.asarray(self.booster.predict(rows, num_threads=1), dtype=np.float64)
        return raw * self.slope + self.offset


def relative_times(samples: Sequence[Sample], worst_ratio: float) -> FloatArray:
    """log(time / best of the scenario) per sample; failures lie behind the slowest success."""
    best: dict[str, float] = {}
    for sample in samples:
        if math.isfinite(sample.seconds):
            key = sample.scenario_key
            best[key] = min(best.get(key, math.inf), sample.seconds)
    cap = math.log(worst_ratio)
    times = np.array(
        [
            min(cap, math.log(s.seconds / best[s.scenario_key]))
            if math.isfinite(s.seconds)
            else math.inf
            for s in samples
        ]
    )
    finite = times[np.isfinite(times)]
    slowest = float(finite.max()) if finite.size else 0.0
    times[~np.isfinite(times)] = slowest + _FAILURE_MARGIN
    return times


def thinned(targets: FloatArray, bound: int) -> list[int]:
    """Indices to train on: all, or the fastest of them and an even share of the rest."""
    if len(targets) <= bound:
        return list(range(len(targets)))
    order = np.argsort(targets, kind="stable")
    fast, rest = order[: bound // 2], order[bound // 2 :]
    spread = np.linspace(0, len(rest) - 1, bound - bound // 2).astype(int)
    return sorted({*map(int, fast), *map(int, rest[spread])})


def _grades(targets: FloatArray, groups: Sequence[int]) -> FloatArray:
    """LambdaRank's grades, larger is better: each group's ranks spread over the grades."""
    out = np.empty(len(targets))
    start = 0
    for size in groups:
        part = targets[start : start + size]
        order = np.argsort(np.argsort(part, kind="stable"), kind="stable")
        out[start : start + size] = (_GRADES - 1) - order * (_GRADES - 1) // max(1, size - 1)
        start += size
    return out


def _lightgbm() -> Any:
    try:
        import lightgbm
    except ImportError as error:
        raise MissingDependencyError(
            "LightGBM is not installed; the cost model needs it.", "pip install 'dop[tune]'"
        ) from error
    return lightgbm
