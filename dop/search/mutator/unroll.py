"""Unrolling."""

from __future__ import annotations

from dop.search.mutator.base import StepMutator


class UnrollMutator(StepMutator):
    """A neighbouring depth; further jumps are as likely, since unrolling acts in thresholds."""

    kind = "unroll"
    reach = 0.7
