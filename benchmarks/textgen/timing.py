"""From the times of tokens to the figures of a case."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from statistics import fmean, median


@dataclass(frozen=True)
class Timing:
    """One request: when it was handed over and when each token was known (seconds)."""

    start_s: float
    token_s: list[float]


@dataclass(frozen=True)
class Stats:
    """Mean and two percentiles, in milliseconds."""

    mean: float
    p50: float
    p99: float


@dataclass(frozen=True)
class Run:
    """One arm serving one case once.

    Attributes:
        seconds: from the first request to the last token.
        tokens: generated.
        tokens_per_s: generated per second.
        ttft_ms: time to first token.
        tpot_ms: time per output token after the first, None if no request has two.
        step_ms: per decode step while the whole batch decodes; None unless lengths are fixed.
        decode_tokens_per_s: batch / step; None unless lengths are fixed.
    """

    seconds: float
    tokens: int
    tokens_per_s: float
    ttft_ms: Stats
    tpot_ms: Stats | None
    step_ms: float | None
    decode_tokens_per_s: float | None

    @property
    def pace(self) -> float:
        """Tokens per second that arms are compared by: of decoding where lengths are fixed."""
        return self.decode_tokens_per_s or self.tokens_per_s

    @property
    def token_ms(self) -> float | None:
        """Milliseconds of a decode step: measured, or the mean time per output token."""
        return self.step_ms or (self.tpot_ms.mean if self.tpot_ms else None)

    def as_dict(self) -> dict[str, object]:
        """For the JSON lines."""
        return asdict(self)


def percentile(values: Sequence[float], share: float) -> float:
    """Linear between the sorted values."""
    ordered = sorted(values)
    place = share * (len(ordered) - 1)
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


def stats_ms(seconds: Sequence[float]) -> Stats:
    """Of durations in seconds."""
    ms = [s * 1e3 for s in seconds]
    return Stats(fmean(ms), percentile(ms, 0.5), percentile(ms, 0.99))


def step_ms(wave: Sequence[Timing]) -> float | None:
    """Milliseconds per decode step of a batch, None if its requests have one token each.

    Measured between the last first token and the first last token: the whole batch decodes. If
    its requests never all decode at once (one adapter after the other), the time in which any
    of them decodes, by the steps that one takes: what a step of the batch costs in effect.
    """
    latest = max(wave, key=lambda t: t.token_s[0])
    begin, end = latest.token_s[0], min(t.token_s[-1] for t in wave)
    steps = sum(begin < t <= end for t in latest.token_s)
    if steps:
        return (end - begin) * 1e3 / steps
    longest = max(len(t.token_s) for t in wave) - 1
    return (
        _covered([(t.token_s[0], t.token_s[-1]) for t in wave]) * 1e3 / longest if longest else None
    )


def _covered(spans: Sequence[tuple[float, float]]) -> float:
    """Length of the union of intervals."""
    total, reached = 0.0, float("-inf")
    for begin, end in sorted(spans):
        total += max(0.0, end - max(begin, reached))
        reached = max(reached, end)
    return total


def summarise(waves: Sequence[Sequence[Timing]], fixed: bool) -> Run:
    """Figures of the groups of requests that one arm served for a case."""
    every = [t for wave in waves for t in wave]
    seconds = sum(max(t.token_s[-1] for t in wave) - min(t.start_s for t in wave) for wave in waves)
    tokens = sum(len(t.token_s) for t in every)
    tpot = [
        (t.token_s[-1] - t.token_s[0]) / (len(t.token_s) - 1) for t in every if len(t.token_s) > 1
    ]
    steps = [s for wave in waves if (s := step_ms(wave)) is not None] if fixed else []
    step = median(steps) if steps else None
    return Run(
        seconds,
        tokens,
        tokens / seconds,
        stats_ms([t.token_s[0] - t.start_s for t in every]),
        stats_ms(tpot) if tpot else None,
        step,
        len(waves[0]) / step * 1e3 if step else None,
    )
