"""Depth of the software pipeline."""

from __future__ import annotations

from dop.search.mutator.base import StepMutator


class PipelineMutator(StepMutator):
    """One stage more or less, seldom two."""

    kind = "pipeline"
    reach = 0.25
