"""Mutators: one per kind of parameter; adding a kind is one file and one line here."""

from __future__ import annotations

from dop.search.mutator.align import AlignMutator
from dop.search.mutator.base import Mutator
from dop.search.mutator.binding import BindingMutator
from dop.search.mutator.location import LocationMutator
from dop.search.mutator.pipeline import PipelineMutator
from dop.search.mutator.split_k import SplitKMutator
from dop.search.mutator.tile import TileMutator
from dop.search.mutator.unroll import UnrollMutator
from dop.search.mutator.vector import VectorMutator
from dop.search.mutator.warps import WarpsMutator

MUTATORS: dict[str, Mutator] = {
    mutator.kind: mutator
    for mutator in (
        TileMutator(),
        SplitKMutator(),
        VectorMutator(),
        UnrollMutator(),
        LocationMutator(),
        PipelineMutator(),
        WarpsMutator(),
        AlignMutator(),
        BindingMutator(),
    )
}
"""The mutator of every kind of parameter."""
