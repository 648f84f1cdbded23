"""CPU, few rows: B straight from memory into the sums.

A block's sums are written out in full (rank x lanes products); LLVM's straight-line vectoriser then
loads whole rows of B and turns them by shuffles. This pays while a row of B is used once or twice;
for taller tiles cpu_turned_b.py turns B once per tile, and cpu_turned_a.py for any tile where the
rank fills vectors.
"""

from __future__ import annotations

from dataclasses import dataclass

from dop.space.rule import SketchState
from dop.space.rules.cpu_columns import block_loop, column_lanes, tile_rows

MAX_RANK = 32
"""Above it the written-out sums make too much code (rank 32: 256 products)."""


@dataclass(frozen=True)
class WrittenOutSums:
    """expand: all products of a vector of columns written out, for LLVM to vectorise."""

    name: str = "written_out"
    stage: str = "expand"

    def apply(self, state: SketchState) -> list[SketchState]:
        """Loops: block, tile, vector, row, rank (unrolled), lane (unrolled)."""
        fits = state.target.kind == "cpu" and max(tile_rows(state)) == 1
        if not fits or state.workload.rank > MAX_RANK:
            return []
        new = state.fork(self.name)
        at = block_loop(new)
        new.cache_read("expand", "local", "accumulate")
        new.compute_at("expand", "accumulate", at)
        tile = at + 1  # t, i, n, r
        new.split("expand", tile + 2, [column_lanes(new)])
        outer = range(tile)
        new.reorder("expand", *outer, tile, tile + 2, tile + 1, tile + 4, tile + 3)
        new.annotate("expand", tile + 4, "unroll")
        new.annotate("expand", tile + 3, "unroll")
        new.notes["expand_rank"] = tile + 3
        new.notes["written_out"] = 1
        return [new]


@dataclass(frozen=True)
class InlineB:
    """gather_b: read where it is used."""

    name: str = "direct_b"
    stage: str = "gather_b"

    def apply(self, state: SketchState) -> list[SketchState]:
        """Inlines the gather."""
        if state.target.kind != "cpu" or "written_out" not in state.notes:
            return []
        new = state.fork(self.name)
        new.compute_inline("gather_b")
        new.pragma("expand", new.notes["expand_rank"], "decompose_reduction")
        return [new]
