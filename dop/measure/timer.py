"""How often to repeat a timing."""

from __future__ import annotations

import math
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
        budget_s: no further sample starts once the samples have taken this long.
        warm_up_s: time spent before the first sample.
    """

    repeats: int
    min_sample_s: float
    slow_repeats: int = 2
    slow_factor: float = 3.0
    budget_s: float = 0.06
    warm_up_s: float = 1e-3


CPU_TIMER = TimerSettings(repeats=9, min_sample_s=2e-3)
"""About 25 ms per (candidate, scenario). Short samples and their median, because a single
interruption counts in full in one long sample."""

CUDA_TIMER = TimerSettings(repeats=21, min_sample_s=0.0, slow_repeats=3)
"""A sample is one replay of a graph, 0.05 to 1 ms; 21 of them take 2 to 15 ms."""


def collect(
    sample: Callable[[], float], calls: int, settings: TimerSettings, best_s: float | None
) -> tuple[float, ...]:
    """Seconds per call of each repeat; fewer repeats if the first is far behind `best_s`.

    `sample` runs `calls` calls and returns their time.
    """
    spent = sample()
    seconds = [spent / calls]
    far_behind = best_s is not None and seconds[0] > settings.slow_factor * best_s
    count = settings.slow_repeats if far_behind else settings.repeats
    while len(seconds) < count and spent < settings.budget_s:
        sampled = sample()
        seconds.append(sampled / calls)
        spent += sampled
    return tuple(seconds)


def time_calls(
    run: Callable[[int], float], settings: TimerSettings, best_s: float | None
) -> tuple[float, ...]:
    """Seconds per call of each repeat; `run(n)` returns the time of n calls.

    A candidate whose calls are so long that a few of them use up the budget is not warmed up.
    """
    first = run(1)
    far_behind = best_s is not None and first > 2 * settings.slow_factor * best_s
    if first >= settings.budget_s / 2 or (far_behind and first >= settings.min_sample_s):
        return collect(lambda: run(1), 1, settings, best_s)
    calls, spent = 1, first
    while spent < settings.warm_up_s or first < settings.min_sample_s / 2:
        if first < settings.min_sample_s / 2:
            calls = min(calls * 4, math.ceil(calls * settings.min_sample_s / first))
        first = run(calls)
        spent += first
    calls = max(1, round(calls * settings.min_sample_s / first))
    return collect(lambda: run(calls), calls, settings, best_s)


def spread(seconds: tuple[float, ...]) -> float:
    """Relative distance between the quartiles, a figure for the noise of a measurement."""
    if len(seconds) < 4:
        return 0.0
    low, _, high = statistics.quantiles(seconds, n=4)
    return (high - low) / statistics.median(seconds)
