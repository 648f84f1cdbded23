"""CPU, shrink half for tiles of rows: in_features in chunks that fit the first-level cache.

Rows of x and of A lie a power of two apart in most models, so that a tile's rows compete for the
same few sets of the cache. A chunk of x is copied into a compact block (rows behind the segment's
end become zero), used for all ranks, then the next one follows.
"""

from __future__ import annotations

from dataclasses import dataclass

from dop.space.rule import SketchState
from dop.space.rules.cpu_columns import FLOAT_BYTES, feature_lanes, tile_rows
from dop.space.rules.cpu_lane_sums import place_and_split, rank_choices, register_limits
from dop.space.rules.numbers import ceil_div

X_BYTES = 128 << 10
"""Most bytes of a chunk of x: a quarter of a common second-level cache."""


@dataclass(frozen=True)
class ChunkedLaneSums:
    """shrink of a tile: rows x ranks partial sums in registers, chunk by chunk."""

    name: str = "chunked_lane_sums"
    stage: str = "shrink"

    def apply(self, state: SketchState) -> list[SketchState]:
        """shrink: [outer], s, t | rank group, row group, row, rank, lane; shrink_rf per (s, t)."""
        if "regions" not in state.notes or max(tile_rows(state)) == 1:
            return []
        new = state.fork(self.name)
        width = feature_lanes(new)
        w = new.workload
        rows = new.param("shrink.rows", "tile", (1, 2, 4), 2)
        ranks = new.param("shrink.ranks", "tile", rank_choices(w.rank), 4)
        longest = ceil_div(w.in_features, width)
        lengths = [c for c in (8, 16, 32, 64, 128, 256) if c <= longest] or [longest]
        chunk = new.param("shrink.chunk", "tile", lengths, 16)
        own = place_and_split(new, width)  # s, t, i, r, lane
        row_split = new.split("shrink", own + 2, [rows])
        rank_split = new.split("shrink", own + 4, [ranks], w.rank)
        # s, t, row group, row, rank group, rank, lane
        new.reorder("shrink", *range(own + 2), own + 4, own + 2, own + 3, own + 5, own + 6)
        at = own + 1
        if new.notes["regions"] == 2:
            new.fuse("shrink", 0, 1)
            new.annotate("shrink", 0, "parallel")
            at = 0
        self._partial(new, at, (row_split, rank_split), chunk)
        self._quantities(new, width)
        return [new]

    @staticmethod
    def _partial(new: SketchState, at: int, splits: tuple[int, int], chunk: object) -> None:
        """shrink_rf: lane, s, t, i, r, k -> s, t, chunk, rank and row groups, k, i, r, lane."""
        new.cache_read("shrink_rf", "local", "shrink")
        new.compute_at("shrink_rf", "shrink", at)
        q = at + 1
        new.split("shrink_rf", q + 5, [chunk])  # type: ignore[list-item]
        new.follow_split("shrink_rf", q + 3, splits[0], 1)
        new.follow_split("shrink_rf", q + 5, splits[1], 1)
        # lane, s, t, row group, row, rank group, rank, chunk, k
        order = (q + 1, q + 2, q + 7, q + 5, q + 3, q + 8, q + 4, q + 6, q)
        new.reorder("shrink_rf", *range(q), *order)
        new.annotate("shrink_rf", q + 8, "vectorize")
        new.annotate("shrink_rf", q + 7, "unroll")
        new.annotate("shrink_rf", q + 6, "unroll")
        new.notes["shrink_sum"] = q + 2
        new.notes["chunked"] = 1

    @staticmethod
    def _quantities(new: SketchState, width: int) -> None:
        register_limits(new)
        new.limit(
            "rows in registers that no tile has",
            0,
            lambda a: max(0, a["shrink.rows"] - a["tokens.tile_rows"]),
        )
        row = width * FLOAT_BYTES
        new.limit(
            "bytes of a chunk of x",
            X_BYTES,
            lambda a: a["tokens.tile_rows"] * a["shrink.chunk"] * row,
        )
        new.estimate(
            "shrink.chunk_bytes",
            lambda a: (a["tokens.tile_rows"] + a["shrink.ranks"]) * a["shrink.chunk"] * row,
        )
        rank = new.workload.rank
        new.estimate("shrink.tasks", lambda a: ceil_div(rank, a["shrink.ranks"]))
        new.estimate("shrink.lanes", lambda a: width)


@dataclass(frozen=True)
class StagedX:
    """gather_x: a chunk of the tile's rows, side by side in the cache."""

    name: str = "staged_x"
    stage: str = "gather_x"

    def apply(self, state: SketchState) -> list[SketchState]:
        """Copies vectors at the chunk loop of shrink_rf."""
        if state.target.kind != "cpu" or "chunked" not in state.notes:
            return []
        new = state.fork(self.name)
        at = new.notes["shrink_sum"]
        new.cache_read("gather_x", "local", "shrink_rf")
        new.compute_at("gather_x", "shrink_rf", at)
        own = at + 1  # t, i, k
        new.split("gather_x", own + 2, [feature_lanes(new)])
        new.annotate("gather_x", own + 3, "vectorize")
        new.pragma("shrink_rf", at, "decompose_reduction")
        return [new]
