"""Kernels that read A while their predecessor still runs, and the batches they are for.

Tuning times calls back to back: there such a kernel reads A while the call before it computes.
In a model a matmul stands before it that keeps the GPU busy to its end, and what is left is 1 % of
a step up to 8 rows and nothing from 32 on (docs/performance.md 26). So the times of larger batches,
where they looked best by far, say nothing about a model; they are neither measured nor shipped.
"""

from __future__ import annotations

from collections.abc import Iterable

from dop.space.sketch import Candidate

DEPENDENT = "expand.dependent"
"""The parameter; values in rules/launches.py."""

EARLY = 3
"""Its value for such kernels, and that of PR dependent_launch."""

EARLY_TOKENS = 16
"""Most tokens of a batch that they serve."""


def may_serve(annotation: Iterable[tuple[str, int]], tokens: int) -> bool:
    """Whether a point's times say something about batches of so many tokens in a model."""
    return tokens <= EARLY_TOKENS or (DEPENDENT, EARLY) not in annotation


def plainly(candidate: Candidate) -> Candidate:
    """The same kernel, but waiting for its predecessor before it reads anything.

    Raises:
        ConstraintError: that breaks a limit.
    """
    return Candidate.of(candidate.sketch, candidate.values | {DEPENDENT: EARLY - 1})
