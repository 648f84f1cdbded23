"""What measuring a candidate under a scenario gave."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from dataclasses import dataclass, field

from dop.errors import Failure


@dataclass(frozen=True, slots=True)
class Measurement:
    """Times of one candidate under one scenario, or why there are none.

    Attributes:
        seconds: time of one call (shrink + expand), one figure per repeat; empty on failure.
        failure: failure class; NONE if the times count.
        message: what went wrong, one line; empty on success.
        accuracy: max |got - want| / max |want| against the reference; None if not reached.
        floor_s: bytes that must move over the measured copy bandwidth, in seconds.
        resources: registers, smem_bytes, threads, blocks, spill_bytes, ... as the build gave them.
        cost_s: wall time that building and measuring took.
    """

    seconds: tuple[float, ...]
    failure: Failure = Failure.NONE
    message: str = ""
    accuracy: float | None = None
    floor_s: float | None = None
    resources: Mapping[str, float] = field(default_factory=dict)
    cost_s: float = 0.0

    def __post_init__(self) -> None:
        if (self.failure is Failure.NONE) != bool(self.seconds):
            raise ValueError("a measurement has times or a failure, not both and not neither")
        if any(not s > 0 for s in self.seconds):
            raise ValueError(f"times {self.seconds} must be positive")

    @property
    def ok(self) -> bool:
        """Whether the candidate ran and was right."""
        return self.failure is Failure.NONE

    @property
    def median_s(self) -> float:
        """Median time in seconds; infinite for a failure."""
        if len(self.seconds) == 3:  # as usual; a resumed log asks 200,000 times
            return sorted(self.seconds)[1]
        return statistics.median(self.seconds) if self.seconds else float("inf")

    @staticmethod
    def failed(failure: Failure, message: str, cost_s: float = 0.0) -> Measurement:
        """A measurement without times."""
        return Measurement((), failure, " ".join(message.split())[:500], cost_s=cost_s)
