"""The number of parts that a reduction is split into."""

from __future__ import annotations

from dop.search.mutator.base import StepMutator


class SplitKMutator(StepMutator):
    """A neighbouring number of parts: its effect (blocks against a second pass) is smooth."""

    kind = "split_k"
