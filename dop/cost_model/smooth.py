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

    def _fit(self, length: float, noise: float) -> float:
        """Solve for the weights; returns the log marginal likelihood up to a constant."""
        count = len(self._wanted)
        self._length = length
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
