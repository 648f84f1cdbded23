"""Vector widths."""

from __future__ import annotations

from dop.search.mutator.base import StepMutator


class VectorMutator(StepMutator):
    """A neighbouring width."""

    kind = "vector"
