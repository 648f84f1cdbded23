"""What earlier searches found, and which of it a family tries first.

A prior is a kernel with its time in one batch, of this device or another. Times of other devices,
workloads and days compare with each other at most, never with what is measured now.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from dop.scenario import Scenario
from dop.space.trace import Trace
from dop.workload import Workload

EACH = 2
"""Fastest kernels of each batch that are tried."""


@dataclass(frozen=True, slots=True)
class Prior:
    """A kernel that was measured for a workload in one batch.

    Attributes:
        workload: in the element type in which it is wanted now.
        scenario: the batch.
        device_name: where it was measured.
        sketch: name of its sketch.
        trace: its steps.
        seconds: its time there.
        origin: where it comes from, for people; what was measured there compares with each other.
    """

    workload: Workload
    scenario: Scenario
    device_name: str
    sketch: str
    trace: Trace
    seconds: float
    origin: str = ""


@dataclass(slots=True)
class _Votes:
    """A kernel, the first batch that it was chosen for, and the traffic that it was chosen for."""

    prior: Prior
    scenario: Scenario
    weight: float = 0.0


@dataclass(slots=True)
class _Column:
    """What was measured in one batch on the devices in question: the fastest time of each trace."""

    scenario: Scenario
    priors: dict[Trace, Prior] = field(default_factory=dict)

    def add(self, prior: Prior) -> None:
        held = self.priors.get(prior.trace)
        if held is None or prior.seconds < held.seconds:
            self.priors[prior.trace] = prior

    def fastest(self, count: int) -> list[Prior]:
        return sorted(self.priors.values(), key=lambda p: (p.seconds, p.trace.key))[:count]


def in_order(
    priors: Iterable[Prior], scenarios: Sequence[Scenario], device_name: str
) -> list[tuple[Prior, Scenario]]:
    """The kernels of one workload in the order in which they are to be tried, each once.

    From every origin, for every batch of the family, the two that were fastest in it, or in the
    nearest batch of which something is known. Origins do not compare: what was timed on another
    day may only look faster. So all those of this device come before any of another, the fastest
    before the second ones, one origin's before the next one's, and among them those that were
    fastest for the largest part of the traffic.

    Args:
        priors: of one workload; the first origin is trusted most.
        scenarios: batches of the family.
        device_name: the device of the family.

    Returns:
        Kernels, each with the first batch that it was chosen for.
    """
    groups: dict[tuple[bool, str], dict[str, _Column]] = {}
    for prior in priors:
        columns = groups.setdefault((prior.device_name != device_name, prior.origin), {})
        columns.setdefault(prior.scenario.key, _Column(prior.scenario)).add(prior)
    found: dict[Trace, tuple[Prior, Scenario]] = {}
    for elsewhere, place in itertools.product((False, True), range(EACH)):
        for columns in (c for (away, _), c in groups.items() if away is elsewhere):
            votes: dict[Trace, _Votes] = {}
            for scenario in scenarios:
                for prior in _nearest(scenario, columns).fastest(EACH)[place : place + 1]:
                    vote = votes.setdefault(prior.trace, _Votes(prior, scenario))
                    vote.weight += scenario.weight
            for trace, chosen in sorted(votes.items(), key=lambda item: -item[1].weight):
                found.setdefault(trace, (chosen.prior, chosen.scenario))
    return list(found.values())


def _nearest(scenario: Scenario, columns: dict[str, _Column]) -> _Column:
    """The batch itself, else the one most like it in tokens and in rows of a segment, of two alike
    the one whose x and y come from where this one's do."""
    if scenario.key in columns:
        return columns[scenario.key]

    def distance(column: _Column) -> tuple[float, bool, str]:
        other = column.scenario
        tokens = abs(math.log2(scenario.tokens / other.tokens))
        rows = abs(math.log2(_rows(scenario) / _rows(other)))
        return tokens + rows, other.cold != scenario.cold, other.key

    return min(columns.values(), key=distance)


def _rows(scenario: Scenario) -> float:
    """Mean rows of a segment."""
    return scenario.tokens / max(1, scenario.adapters)
