"""Who becomes a parent, and what is worth measuring."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import TypeVar

import numpy as np

from dop.cost_model.base import FloatArray

T = TypeVar("T")

_TIE = 0.01
"""Weight of the plain prediction beside the expected gain: orders points that promise nothing."""


def tournament(items: Sequence[T], scores: FloatArray, rng: random.Random, size: int) -> T:
    """The best-scored of `size` random contestants (higher is better)."""
    contestants = [rng.randrange(len(items)) for _ in range(max(1, size))]
    return items[max(contestants, key=lambda i: (scores[i], -i))]


def expected_gain(predicted: FloatArray, sigma: float | FloatArray) -> FloatArray:
    """Expected share of the best time that a point saves.

    Args:
        predicted: log(time / best time), any shape.
        sigma: standard deviation of the prediction's error, one or of each point.

    The time is taken as log-normal: E[max(0, 1 - exp(m + sigma z))]
    = Phi(-m / sigma) - exp(m + sigma^2 / 2) Phi(-m / sigma - sigma).
    Source: expected improvement (Jones, Schonlau and Welch 1998), in relative time.
    """
    sigma = np.maximum(sigma, 1e-6)
    z = -predicted / sigma
    spared = np.exp(np.minimum(predicted + sigma * sigma / 2, 50.0)) * _phi(z - sigma)
    return np.asarray(np.maximum(_phi(z) - spared, 0.0), dtype=np.float64)


def acquisition(
    predicted: FloatArray, weights: Sequence[float], sigma: float | FloatArray
) -> FloatArray:
    """How much a point promises over all scenarios: [points], higher is better.

    The weighted sum of the expected gains, so a candidate that wins in one scenario only is worth
    that scenario's share. With one scenario and one sigma it falls strictly with the prediction,
    so the order is simply the model's.

    Args:
        predicted: log(time / best time): [points, scenarios].
        weights: share of each scenario, any positive scale: [scenarios].
        sigma: standard deviation of the prediction's error, one or [points, scenarios].
    """
    shares = np.asarray(weights, dtype=np.float64)
    shares = shares / shares.sum()
    promise = expected_gain(predicted, sigma) - _TIE * predicted
    return np.asarray(promise @ shares, dtype=np.float64)


def diverse(
    annotations: Sequence[frozenset[object]], scores: FloatArray, n: int, spread: float
) -> list[int]:
    """Indices of `n` high scores that are not all neighbours of each other.

    Every pick lowers the score of points that differ from it in at most one value by `spread`
    standard deviations of the scores.
    """
    left = np.array(scores, dtype=np.float64)
    penalty = spread * float(left.std() or 1.0)
    picks: list[int] = []
    while len(picks) < min(n, len(annotations)):
        chosen = int(np.argmax(left))
        picks.append(chosen)
        left[chosen] = -np.inf
        mine = annotations[chosen]
        for i, other in enumerate(annotations):
            if len(mine ^ other) <= 2:
                left[i] -= penalty
    return picks


def _phi(z: FloatArray) -> FloatArray:
    """Distribution function of the standard normal. Source: Abramowitz and Stegun 7.1.26."""
    x = np.abs(z) / np.sqrt(2.0)
    t = 1.0 / (1.0 + 0.3275911 * x)
    poly = t * (
        0.254829592 + t * (-0.284496736 + t * (1.421413741 + t * (-1.453152027 + t * 1.061405429)))
    )
    erf = 1.0 - poly * np.exp(-np.minimum(x * x, 700.0))
    return np.asarray(np.where(z >= 0, 0.5 * (1 + erf), 0.5 * (1 - erf)), dtype=np.float64)
