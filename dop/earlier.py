"""Kernels of earlier searches as candidates for a family: of its own workload, else of the nearest
ones. Which of them, and in what order: prior.py."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

from dop.errors import DopError
from dop.family import Family, adapted, neighbours
from dop.prior import Prior, in_order
from dop.recorded import alike_trace
from dop.scenario import Scenario
from dop.space.early import may_serve, plainly
from dop.space.sketch import Candidate, Space
from dop.space.trace import Trace
from dop.target import Target
from dop.workload import Workload

NEAREST = 3
"""Workloads that are near a family's: so many."""

_OWN = 16
"""Most kernels of earlier searches for its own workload that a family tries first."""

_NEAR = 8
"""Likewise, of the nearest workloads where nothing is known of its own."""

Known = tuple[Candidate, Prior]
"""A candidate, and what it was in an earlier search."""


class Earlier:
    """What earlier searches found.

    Args:
        priors: of any workload and device.
        build: the space of a workload.

    Attributes:
        pools: candidates of near workloads in their own spaces, of those that a family asked for.
    """

    def __init__(self, priors: Iterable[Prior], build: Callable[[Workload, Target], Space]) -> None:
        self._build = build
        self._known: dict[str, list[Prior]] = {}
        self._spaces: dict[str, Space] = {}
        for prior in priors:
            self._known.setdefault(prior.workload.key, []).append(prior)
        self.pools: dict[Workload, list[Candidate]] = {}

    def of(self, space: Space, family: Family) -> list[Known]:
        """Candidates in a family's space, in the order in which they are to be tried."""
        return self._own(space, family) or self._near(space, family)

    def _own(self, space: Space, family: Family) -> list[Known]:
        """Kernels of a family's own workload; of calls beside a matmul also those without it."""
        keys = (family.workload.key, replace(family.workload, beside=False).key)
        priors = next((self._known[key] for key in keys if key in self._known), ())
        return _candidates(space, priors, family)[:_OWN]

    def _near(self, space: Space, family: Family) -> list[Known]:
        """Kernels of the nearest workloads, with the nearest numbers that this one allows; those of
        this device first, and of each device the nearest workload's."""
        workloads = [priors[0].workload for priors in self._known.values()]
        workloads.sort(key=lambda w: (w.beside != family.workload.beside, w.key))
        found: dict[Trace, Known] = {}
        for workload in neighbours(family, workloads)[:NEAREST]:
            if workload.key not in self._spaces:
                with contextlib.suppress(DopError):
                    self._spaces[workload.key] = self._build(workload, family.target)
            if workload.key not in self._spaces:
                continue
            theirs = _candidates(self._spaces[workload.key], self._known[workload.key], family)
            for candidate, prior in theirs:
                for mine in adapted(space, [candidate], repair=True):
                    found.setdefault(mine.trace, (mine, prior))
            if theirs:
                self.pools.setdefault(workload, [c for c, _ in theirs[:_NEAR]])
        here = family.target.device_name
        return sorted(found.values(), key=lambda item: item[1].device_name != here)[:_NEAR]


def serving(candidate: Candidate, scenario: Scenario) -> Candidate | None:
    """The candidate, or its plain twin where it may not serve a batch; None if there is none."""
    if may_serve(candidate.annotation, scenario.tokens):
        return candidate
    try:
        return plainly(candidate)
    except DopError:
        return None


def _candidates(space: Space, priors: Sequence[Prior], family: Family) -> list[Known]:
    """Candidates of one workload's priors in its space, as `in_order` has them, each once."""
    found: dict[Trace, Known] = {}
    for prior, scenario in in_order(priors, family.scenarios, family.target.device_name):
        candidate = alike_trace(space, prior.trace, prior.sketch)
        if candidate is not None:
            candidate = serving(candidate, scenario)
        if candidate is not None:
            found.setdefault(candidate.trace, (candidate, prior))
    return list(found.values())
