"""Padding of rows against bank conflicts."""

from __future__ import annotations

from dop.search.mutator.base import AnyMutator


class AlignMutator(AnyMutator):
    """Any other padding: conflicts come and go with the remainder, not with the size."""

    kind = "align"
