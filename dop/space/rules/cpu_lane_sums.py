"""CPU, shrink half: a vector of partial sums per (row, rank), added up at the end.

in_features is contiguous in x and in A, so the lanes of a vector share the reduction: an RF over
the lanes makes them a spatial axis that can be vectorised. `rows` x `ranks` such vectors stay in
registers; every load of x is used for `ranks` products and every load of A for `rows`.
"""

from __future__ import annotations

from dataclasses import dataclass

from dop.space.rule import SketchState
from dop.space.rules.cpu_columns import FLOAT_BYTES, feature_lanes, tile_rows
from dop.space.rules.numbers import ceil_div, dividing
from dop.space.sketch import Annotation
from dop.space.step import Param


def rank_choices(rank: int) -> tuple[int, ...]:
    """Ranks held at once: those that divide the rank, small powers of two for odd ranks."""
    exact = dividing(rank, (1, 2, 3, 4, 5, 6, 7, 8, 13))
    return exact if len(exact) > 1 else tuple(c for c in (1, 2, 4) if c <= rank)


def place_and_split(new: SketchState, width: Param | int) -> int:
    """Places shrink by the number of regions and factors its lanes out into shrink_rf.

    Returns the position of shrink's own first loop: slice, tile, row, rank, lane.
    """
    own = 0
    if new.notes["regions"] == 1:
        new.cache_read("shrink", "local", "expand")
        new.compute_at("shrink", "accumulate", 0)
        own = 1
    else:
        new.compute_root("shrink")
    new.split("shrink", own + 4, [width], new.workload.in_features)
    new.rfactor("shrink", own + 5, 4)
    return own


def register_limits(new: SketchState) -> None:
    """Accumulators, a load of x and the loads of A must fit the vector registers."""
    width = feature_lanes(new)

    def accumulators(a: Annotation) -> int:
        return a.get("shrink.rows", 1) * a["shrink.ranks"] * a.get("shrink.lanes", width) // width

    new.limit("accumulators", max(4, new.target.max_registers - 4), accumulators)
    new.estimate("shrink.accumulators", accumulators)
    new.estimate(
        "shrink.loads_per_product",
        lambda a: (
            (a.get("shrink.rows", 1) + a["shrink.ranks"])
            / (a.get("shrink.rows", 1) * a["shrink.ranks"])
        ),
    )


@dataclass(frozen=True)
class RowLaneSums:
    """shrink of one row: x and A straight from memory."""

    name: str = "lane_sums"
    stage: str = "shrink"

    def apply(self, state: SketchState) -> list[SketchState]:
        """shrink: [outer], s, t, rank group | row, rank, lane; shrink_rf in the rank group."""
        if state.target.kind != "cpu" or max(tile_rows(state)) > 1:
            return []
        new = state.fork(self.name)
        vector, features = feature_lanes(new), new.workload.in_features
        widths = dividing(features, [vector * v for v in (1, 2, 4)])
        width = new.param("shrink.lanes", "vector", widths, 2 * vector)
        ranks = new.param("shrink.ranks", "tile", rank_choices(new.workload.rank), 4)
        own = place_and_split(new, width)  # s, t, i, r, lane
        new.split("shrink", own + 3, [ranks], new.workload.rank)
        new.reorder("shrink", *range(own + 2), own + 3, own + 2, own + 4, own + 5)
        group = own + 2
        if new.notes["regions"] == 2:
            new.fuse("shrink", 0, 1, 2)
            new.annotate("shrink", 0, "parallel")
            group = 0
        else:
            new.annotate("shrink", own, "unroll")  # slices
        self._partial(new, group)
        register_limits(new)
        groups = new.workload.rank
        new.estimate("shrink.tasks", lambda a: ceil_div(groups, a["shrink.ranks"]))
        new.estimate("shrink.lanes", lambda a: a["shrink.lanes"])
        return [new]

    @staticmethod
    def _partial(new: SketchState, group: int) -> None:
        """shrink_rf: lane, s, t, i, r, k -> s, t, k, i, r, lane."""
        new.cache_read("shrink_rf", "local", "shrink")
        new.compute_at("shrink_rf", "shrink", group)
        own = group + 1
        order = (own + 1, own + 2, own + 5, own + 3, own + 4, own)
        new.reorder("shrink_rf", *range(own), *order)
        new.annotate("shrink_rf", own + 5, "vectorize")
        new.annotate("shrink_rf", own + 4, "unroll")
        new.annotate("shrink_rf", own + 3, "unroll")
        new.notes["shrink_sum"] = own + 2
        new.notes["direct_x"] = 1


@dataclass(frozen=True)
class InlineA:
    """gather_a: read where it is used."""

    name: str = "direct_a"
    stage: str = "gather_a"

    def apply(self, state: SketchState) -> list[SketchState]:
        """Inlines the gather."""
        if state.target.kind != "cpu" or "shrink_sum" not in state.notes:
            return []
        new = state.fork(self.name)
        new.compute_inline("gather_a")
        weights = new.workload.rank * new.workload.in_features * FLOAT_BYTES
        new.estimate("shrink.weight_bytes", lambda a: weights)
        return [new]


@dataclass(frozen=True)
class InlineX:
    """gather_x: read where it is used; one row needs no copy."""

    name: str = "direct_x"
    stage: str = "gather_x"

    def apply(self, state: SketchState) -> list[SketchState]:
        """Inlines the gather."""
        if state.target.kind != "cpu" or "direct_x" not in state.notes:
            return []
        new = state.fork(self.name)
        new.compute_inline("gather_x")
        new.pragma("shrink_rf", new.notes["shrink_sum"], "decompose_reduction")
        return [new]
