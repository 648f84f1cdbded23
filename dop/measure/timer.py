"""How often to repeat a timing."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class TimerSettings:
    """Repeats of one (candidate, scenario).

    Attributes:
        repeats: samples of which the median counts.
        min_sample_s: least time of a sample; calls are repeated within it until it is reached.
        slow_repeats: samples of a candidate that is far behind.
        slow_factor: a first sample this many times slower than the best known is far behind.
        warm_up_s: time spent before the first sample.
    """

    repeats: int
    min_sample_s: float
    slow_repeats: int = 2
    slow_factor: float = 3.0
    warm_up_s: float = 1e-3


CPU_TIMER = TimerSettings(repeats=9, min_sample_s=2e-3)
"""About 25 ms per (candidate, scenario): the median of nine samples of 2 ms varied by 1 to 2 %
between runs on an idle two-core machine; one long sample of 20 ms varied more, because a single
interruption counts in full."""

CUDA_TIMER = TimerSettings(repeats=21, min_sample_s=0.0, slow_repeats=3)
"""A sample is one replay of a graph, 0.05 to 1 ms; 21 of them take 2 to 15 ms."""


def collect(
    sample: Callable[[], float], settings: TimerSettings, best_s: float | None
) -> tuple[float, ...]:
    """Seconds per call of each repeat; fewer repeats if the first is far behind `best_s`."""
    first = sample()
    far_behind = best_s is not None and first > settings.slow_factor * best_s
    count = settings.slow_repeats if far_behind else settings.repeats
    return (first, *(sample() for _ in range(count - 1)))


def calibrate(run: Callable[[int], float], settings: TimerSettings) -> int:
    """Calls per sample so that one lasts `min_sample_s`; `run(n)` returns the time of n calls."""
    calls, spent = 1, 0.0
    while True:
        seconds = run(calls)
        spent += seconds
        if seconds >= settings.min_sample_s / 2 and spent >= settings.warm_up_s:
            return max(1, round(calls * settings.min_sample_s / seconds))
        if seconds >= settings.min_sample_s:
            continue
        calls = min(calls * 4, max(calls + 1, int(calls * settings.min_sample_s / seconds)))


def spread(seconds: tuple[float, ...]) -> float:
    """Relative distance between the quartiles, a figure for the noise of a measurement."""
    if len(seconds) < 4:
        return 0.0
    low, _, high = statistics.quantiles(seconds, n=4)
    return (high - low) / statistics.median(seconds)
