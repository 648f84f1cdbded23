"""CPU, tiles of rows: B turned once per tile and column block, then vectors of columns.

B's rows are short (rank elements) and lie side by side, so a vector of columns is a strided load.
A block of B is copied transposed into the first-level cache, once for all rows of the tile; the
sums then run over whole vectors of columns with v broadcast.
"""

from __future__ import annotations

from dataclasses import dataclass

from dop.space.rule import SketchState
from dop.space.rules.cpu_columns import block_loop, column_lanes, tile_rows
from dop.space.sketch import Annotation

UNROLLED_RANK = 16
"""Up to this rank the sum is unrolled whole."""


@dataclass(frozen=True)
class VectorColumns:
    """expand: `wide` vectors of columns times `rows` rows in registers, v broadcast.

    A product needs 1/wide loads of v and 1/rows of B: with one vector the loads of v, not the
    products, set the pace (174 against 150 us, 128 rows of 64 -> 2048)."""

    name: str = "vector_columns"
    stage: str = "expand"

    def apply(self, state: SketchState) -> list[SketchState]:
        """Loops: block, tile, vector group, row group, rank, row, vector (both unrolled), lane."""
        if "regions" not in state.notes or max(tile_rows(state)) == 1:
            return []
        new = state.fork(self.name)
        at = block_loop(new)
        new.cache_read("expand", "local", "accumulate")
        new.compute_at("expand", "accumulate", at)
        tile = at + 1  # t, i, n, r
        rows = new.param("expand.rows", "tile", (1, 2, 4, 8), 4)
        wide = new.param("expand.wide", "tile", (1, 2, 4), 2)
        new.split("expand", tile + 2, [wide, column_lanes(new)])
        new.split("expand", tile + 1, [rows])
        # t, row group, row, vector group, vector, lane, r
        inner = (tile + 3, tile + 1, tile + 6, tile + 2, tile + 4, tile + 5)
        new.reorder("expand", *range(tile + 1), *inner)
        new.annotate("expand", tile + 6, "vectorize")
        new.annotate("expand", tile + 5, "unroll")
        new.annotate("expand", tile + 4, "unroll")
        if new.workload.rank <= UNROLLED_RANK:
            new.annotate("expand", tile + 3, "unroll")
        new.notes["expand_rank"] = tile + 3
        new.notes["vector_columns"] = 1
        self._quantities(new)
        return [new]

    @staticmethod
    def _quantities(new: SketchState) -> None:
        def accumulators(a: Annotation) -> int:
            return a["expand.rows"] * a["expand.wide"]

        def spare(a: Annotation) -> int:
            rows = max(0, a["expand.rows"] - a["tokens.tile_rows"])
            return rows + max(0, a["expand.wide"] - a["expand.vectors"])

        new.limit(
            "registers of a block of expand", max(4, new.target.max_registers - 4), accumulators
        )
        new.limit("rows or vectors in registers that no block has", 0, spare)
        new.estimate("expand.accumulators", accumulators)
        new.estimate(
            "expand.loads_per_product",
            lambda a: (a["expand.rows"] + a["expand.wide"]) / accumulators(a),
        )


@dataclass(frozen=True)
class TurnedB:
    """gather_b: a block of B, transposed into the cache."""

    name: str = "turned_b"
    stage: str = "gather_b"

    def apply(self, state: SketchState) -> list[SketchState]:
        """Loops: block, tile, tile, vector, rank, lane (vector)."""
        if state.target.kind != "cpu" or "vector_columns" not in state.notes:
            return []
        new = state.fork(self.name)
        tile = block_loop(new) + 1
        new.cache_read("gather_b", "local", "expand")
        new.compute_at("gather_b", "expand", tile)
        new.pragma("gather_b", 0, "transpose")
        own = tile + 1  # t, n, r
        new.split("gather_b", own + 1, [column_lanes(new)])
        new.reorder("gather_b", *range(own + 2), own + 3, own + 2)
        new.annotate("gather_b", own + 3, "vectorize")
        new.pragma("expand", new.notes["expand_rank"], "decompose_reduction")
        block = column_lanes(new) * new.workload.rank * new.workload.element_bytes
        new.estimate("expand.block_bytes", lambda a: a["expand.vectors"] * block)
        return [new]
