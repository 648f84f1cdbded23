"""How good a ranking is: rank correlation and regret."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from dop.cost_model.base import FloatArray


def ranks(values: ArrayLike) -> FloatArray:
    """Ranks from 0, ties sharing their mean; infinities are ordinary (largest) values."""
    array = np.asarray(values, dtype=np.float64)
    _, inverse, counts = np.unique(array, return_inverse=True, return_counts=True)
    ends = np.cumsum(counts)
    means = ends - (counts + 1) / 2.0
    return np.asarray(means[inverse.reshape(array.shape)], dtype=np.float64)


def spearman(predicted: ArrayLike, measured: ArrayLike) -> float:
    """Spearman's rank correlation in [-1, 1]; NaN for fewer than two or constant values."""
    left, right = ranks(predicted), ranks(measured)
    if left.size < 2 or left.std() == 0 or right.std() == 0:
        return float("nan")
    return float(np.corrcoef(left, right)[0, 1])


def top_k_regret(predicted: ArrayLike, measured: ArrayLike, k: int = 8) -> float:
    """How much slower than the best the best of the k points ranked first is (0.03 is 3 %).

    Args:
        predicted: one figure per point, lower is better.
        measured: seconds per point, positive; infinite for a failure.
        k: how many points would be measured.
    """
    guess = np.asarray(predicted, dtype=np.float64)
    truth = np.asarray(measured, dtype=np.float64)
    if truth.size == 0 or not np.isfinite(truth).any():
        return float("nan")
    picked = np.argsort(guess, kind="stable")[:k]
    return float(truth[picked].min() / truth.min() - 1.0)
