"""A Gaussian process over the features: says something sensible after a handful of samples.

Trees need a few dozen samples before they can split at all; a smooth function through four points
already tells which side of a parameter is the slower one, and how little is known elsewhere.
Source: Rasmussen and Williams 2006, algorithm 2.1; Matern kernel with smoothness 3/2.
"""

from __future__ import annotations

import math

import numpy as np

from dop.cost_model.base import FloatArray

_SCALES = (0.5, 1.0, 2.0)
"""Length scales that are tried, in root mean squares of the distance of two samples."""

_NOISES = (0.003, 0.03, 0.2)
"""Shares of the variance that no feature explains."""


class SmoothModel:
    """Fitted to rows of features; length scale and noise have the largest marginal likelihood.

    Args:
        rows: [samples, features]; NaN is a feature that the sample lacks.
        targets: log times: [samples].
    """

    def __init__(self, rows: FloatArray, targets: FloatArray) -> None:
        logs = _logs(rows)
        deviation = logs.std(axis=0)
        self._varies = deviation > 1e-9
        self._center, self._scale = logs.mean(axis=0), np.where(self._varies, deviation, 1.0)
        self._known = self._places(rows)
        self._mean, self._unit = float(targets.mean()), float(targets.std() or 1.0)
        self._wanted = (targets - self._mean) / self._unit
        reach = math.sqrt(max(1, self._known.shape[1]))
        tried = [(self._fit(s * reach, n), s * reach, n) for s in _SCALES for n in _NOISES]
        _, scale, noise = max(tried)
        self._fit(scale, noise)

    def predict(self, rows: FloatArray) -> tuple[FloatArray, FloatArray]:
        """Mean and standard deviation of the log time of each row."""
        kernel = self._kernel(self._places(rows), self._known)
        mean = kernel @ self._weights * self._unit + self._mean
        explained = np.linalg.solve(self._root, kernel.T)
        left = np.maximum(1e-9, 1.0 - np.square(explained).sum(axis=0))
        return mean, np.sqrt(left) * self._amplitude * self._unit

    def least_known(self, rows: FloatArray, n: int) -> list[int]:
        """Indices of `n` groups of rows, each the least known after the samples and those before.

        What a group will measure does not matter, only where it lies: every pick takes what it
        explains from the variance of all others (a pivoted Cholesky factor of their covariance),
        so its neighbours are not picked too.

        Args:
            rows: a point under every scenario is a group: [groups, scenarios, features].
            n: how many to pick; all if there are fewer.
        """
        groups, size, _ = rows.shape
        n, known = min(n, groups), len(self._wanted)
        places = self._places(rows.reshape(groups * size, -1))
        explained = np.zeros((known + n * size, groups * size))
        explained[:known] = np.linalg.solve(self._root, self._kernel(places, self._known).T)
        left = 1.0 - np.square(explained).sum(axis=0)
        picks: list[int] = []
        for _ in range(n):
            unknown = np.maximum(left, 0.0).reshape(groups, size).sum(axis=1)
            unknown[picks] = -1.0
            picks.append(int(np.argmax(unknown)))
            for row in range(picks[-1] * size, (picks[-1] + 1) * size):
                shared = self._kernel(places, places[row : row + 1])[:, 0]
                shared -= explained[:known, row] @ explained[:known]
                explained[known] = shared / math.sqrt(max(1e-9, left[row]) + self._noise)
                left -= np.square(explained[known])
                known += 1
        return picks

    def _fit(self, length: float, noise: float) -> float:
        """Solve for the weights; returns the log marginal likelihood up to a constant."""
        count = len(self._wanted)
        self._length, self._noise = length, noise
        covariance = self._kernel(self._known, self._known) + noise * np.eye(count)
        self._root = np.linalg.cholesky(covariance)
        white = np.linalg.solve(self._root, self._wanted)
        variance = max(1e-12, float(white @ white) / count)
        self._amplitude = math.sqrt(variance)
        self._weights = np.linalg.solve(self._root.T, white)
        halves = float(np.log(np.diag(self._root)).sum())
        return -halves - count / 2 * math.log(variance)

    def _places(self, rows: FloatArray) -> FloatArray:
        scaled = (_logs(rows) - self._center) / self._scale
        return np.asarray(scaled[:, self._varies], dtype=np.float64)

    def _kernel(self, left: FloatArray, right: FloatArray) -> FloatArray:
        squares = np.square(left).sum(1)[:, None] + np.square(right).sum(1)[None]
        apart = np.sqrt(np.maximum(0.0, squares - 2 * left @ right.T))
        steps = apart * (math.sqrt(3.0) / self._length)
        return np.asarray((1.0 + steps) * np.exp(-steps), dtype=np.float64)


def _logs(rows: FloatArray) -> FloatArray:
    """Sizes act by their ratio; what a sketch lacks is 0."""
    return np.asarray(np.log2(1.0 + np.abs(np.nan_to_num(rows, nan=0.0))), dtype=np.float64)
