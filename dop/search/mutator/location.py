"""Compute locations and scopes."""

from __future__ import annotations

from dop.search.mutator.base import AnyMutator


class LocationMutator(AnyMutator):
    """Any other place: places have no order."""

    kind = "location"
