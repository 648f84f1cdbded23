"""How often to repeat a timing."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class TimerSettings:
    """Repeats of one (candidate, scenario).

    Attributes:
        repeats: samples of which the median counts.
        min_sample_s: least time of a sample; calls are repeated within it until it is reached.
        tiers: (factor, samples): a candidate whose fastest sample is more than `factor` times the
            best known gets so many samples only; the first tier that applies counts.
        agree: where the median of the samples is further than this share above the fastest, more
            are taken, whatever the tier; 0 is never.
        budget_s: no further sample starts once the samples have taken this long.
        warm_up_s: time spent before the first sample.
    """

    repeats: int
    min_sample_s: float
    tiers: tuple[tuple[float, int], ...] = ((3.0, 2),)
    agree: float = 0.0
    budget_s: float = 0.06
    warm_up_s: float = 1e-3

    def wanted(self, fastest_s: float, best_s: float | None) -> int:
        """Samples of a candidate whose fastest one took `fastest_s`."""
        if best_s is not None:
            for factor, samples in self.tiers:
                if fastest_s > factor * best_s:
                    return samples
        return self.repeats

    def far_behind(self, seconds: float, best_s: float | None) -> bool:
        """Whether a time is beyond the first tier."""
        return best_s is not None and bool(self.tiers) and seconds > self.tiers[0][0] * best_s


CPU_TIMER = TimerSettings(repeats=9, min_sample_s=2e-3)
"""About 25 ms per (candidate, scenario). Short samples and their median, because a single
interruption counts in full in one long sample."""

CUDA_TIMER = TimerSettings(repeats=21, min_sample_s=0.0, tiers=((1.5, 3), (1.1, 7)), budget_s=0.03)
"""A sample is one replay of a graph, 0.05 to 1 ms. Samples of one kernel differ by about 1 %, so
the 21 are for those that may be the best; most candidates are told apart by three. All of them 21
times took two thirds of a tuning run. A host that is kept from queueing a graph in time makes a
sample ten times too long, now and then three in a row."""


def collect(
    sample: Callable[[], float], calls: int, settings: TimerSettings, best_s: float | None
) -> tuple[float, ...]:
    """Seconds per call of each repeat; fewer repeats if the fastest is behind `best_s`.

    `sample` runs `calls` calls and returns their time.
    """
    spent = sample()
    seconds = [spent / calls]
    while spent < settings.budget_s and len(seconds) < settings.repeats:
        enough = len(seconds) >= settings.wanted(min(seconds), best_s)
        if enough and not _disagree(seconds, settings.agree):
            break
        sampled = sample()
        seconds.append(sampled / calls)
        spent += sampled
    return tuple(seconds)


def _disagree(seconds: Sequence[float], share: float) -> bool:
    return share > 0 and statistics.median(seconds) > (1 + share) * min(seconds)


def time_calls(
    run: Callable[[int], float], settings: TimerSettings, best_s: float | None
) -> tuple[float, ...]:
    """Seconds per call of each repeat; `run(n)` returns the time of n calls.

    A candidate whose calls are so long that a few of them use up the budget is not warmed up.
    """
    first = run(1)
    far_behind = settings.far_behind(first / 2, best_s)
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
