"""CUDA, tensor cores, expand half in registers: nothing of it passes through shared memory.

A warp updates 16 to 64 rows of a tile in groups of 32 columns. Products are computed with their
columns and ranks in an order that gives every thread 16 neighbouring bytes of y and of B
(lowering/intrinsics/register_expand.py). y's old values for several groups are loaded before the
kernel needs v, so that they overlap with the shrink kernel (programmatic dependent launch).

Tiles for few rows (note "few"): many small blocks, all of whose loads are on their way at once.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from dop.space.rule import SketchState
from dop.space.rules.numbers import dividing, round_up
from dop.space.rules.tensor_core_expand import EDGE, INTRINSIC_TYPES, TILE_ROWS
from dop.space.sketch import Annotation
from dop.space.step import Param

GROUP = 32
"""Columns that a warp updates at once."""

MAX_REGISTER_RANK = 128
MAX_DIRECT_RANK = 64
"""Above, reading B once per 16 to 64 rows is hopeless; where there are few rows, it is not."""

ALL_AHEAD = 2
"""Value of load_ahead of gather_b: all of it."""

ROW_TILES, COLUMN_WARPS, STEPS = (
    Param("expand.row_tiles"),
    Param("expand.column_warps"),
    Param("expand.steps"),
)
BLOCK, WARP, STEP, TILE = 1, 3, 4, 5
"""Loop positions in accumulate: tile, column block, row warp, column warp, step, 16-row tile."""


def padded(rank: int) -> int:
    """The rank rounded up to whole matrix tiles."""
    return round_up(rank, EDGE)


def sums_of_v(a: Annotation) -> int:
    """Sums that make up v: one of each cluster along k."""
    split_k = a.get("shrink.split_k", 1)
    return split_k // a.get("shrink.cluster", split_k)


@dataclass(frozen=True)
class RegisterColumns:
    """accumulate: warps own rows and columns; the old values of y are loaded steps ahead."""

    name: str = "register_columns"
    stage: str = "accumulate"

    def apply(self, state: SketchState) -> list[SketchState]:
        w = state.workload
        common = math.gcd(*w.out_features)
        fits = w.rank % 8 == 0 and w.rank <= MAX_REGISTER_RANK and common % GROUP == 0
        if "wide" not in state.notes or not fits:
            return []
        new = state.fork(self.name)
        few = "few" in new.notes
        tiles = (1, 2) if few else (1, 2, 4)
        new.param(ROW_TILES.name, "tile", tiles, 1 if few or w.rank > 32 else 2)
        steps = dividing(common // GROUP, (1, 2, 4) if few else (1, 2, 4, 8, 16))
        new.param(STEPS.name, "tile", steps, 1 if few else 4)
        warps = dividing(common // GROUP, (1, 2, 4, 8))
        new.param(COLUMN_WARPS.name, "warps", warps, 1 if few and w.total_out < 8192 else 2)
        # Few rows: all of a warp's steps, of which there are four at most.
        ahead = new.param("expand.ahead", "pipeline", (4,) if few else (1, 2, 4, 8), 4)
        order = new.param("expand.block_order", "binding", (0, 1), int(few))
        streaming = new.param("expand.streaming", "binding", (0, 1), 0)
        new.split("accumulate", 2, [COLUMN_WARPS, STEPS, GROUP], w.total_out)
        new.split("accumulate", 1, [ROW_TILES, EDGE])
        # t, row warp, row tile, row, column block, column warp, step, column
        new.reorder("accumulate", 0, 4, 1, 5, 6, 2, 3, 7)
        new.annotate("accumulate", 0, "blockIdx.x")
        new.annotate("accumulate", 1, "blockIdx.y")
        new.pragma("accumulate", 0, "block_order", order)
        new.annotate("accumulate", 2, "threadIdx.z")
        new.annotate("accumulate", WARP, "threadIdx.y")
        new.pragma("accumulate", STEP, "load_ahead", ahead)
        new.pragma("accumulate", STEP, "streaming", streaming)
        new.cache_read("accumulate", "local", "accumulate")
        new.compute_at("accumulate_in", "accumulate", WARP)
        new.notes["registers"] = 1
        self._limits(new, common)
        return [new]

    @staticmethod
    def _limits(new: SketchState, common: int) -> None:
        w, target = new.workload, new.target
        rank, few = padded(w.rank), "few" in new.notes

        def row_warps(a: Annotation) -> int:
            return max(a[TILE_ROWS.name] // (EDGE * a[ROW_TILES.name]), 1)

        def threads(a: Annotation) -> int:
            return 32 * row_warps(a) * a[COLUMN_WARPS.name]

        def left_over(a: Annotation) -> int:
            columns = GROUP * a[STEPS.name] * a[COLUMN_WARPS.name]
            return common % columns + a[TILE_ROWS.name] % (EDGE * a[ROW_TILES.name])

        def registers(a: Annotation) -> int:
            old = 8 * min(a["expand.ahead"], a[STEPS.name]) * a[ROW_TILES.name]
            ahead = a.get("expand.b_ahead", 0)
            groups = a[STEPS.name] if ahead == ALL_AHEAD else 1 + ahead
            parts = sums_of_v(a)
            v_words = a[ROW_TILES.name] * rank // 4 * (2 if parts > 1 else 1)
            operands = v_words + groups * rank // 2
            adding = 4 * parts + 4 if parts > 1 else 0  # the parts of one piece, and their sum
            return old + operands + adding + 4 * a[ROW_TILES.name] + EDGE + 32

        new.limit("threads per expand block", target.max_threads, threads)
        new.limit("columns or rows left over by expand's warps", 0, left_over)
        if not few:
            new.limit(
                "groups of columns loaded ahead without a step",
                0,
                lambda a: max(a["expand.ahead"] - a[STEPS.name], 0),
            )
        new.limit("expand registers per thread", 240, registers)
        new.limit(
            "expand registers per block", target.max_registers, lambda a: registers(a) * threads(a)
        )
        new.estimate("expand.threads", threads)
        new.estimate("expand.registers", registers)
        new.estimate("expand.row_warps", row_warps)
        new.estimate(
            "expand.bytes_ahead",
            lambda a: 32 * min(a["expand.ahead"], a[STEPS.name]) * a[ROW_TILES.name],
        )
        new.estimate(
            "expand.blocks_per_tile",
            lambda a: w.total_out / (GROUP * a[STEPS.name] * a[COLUMN_WARPS.name]),
        )


@dataclass(frozen=True)
class RegisterProduct:
    """expand: 16 x 32 products whose sums stay where y's old values are."""

    name: str = "register_product"
    stage: str = "expand"

    def apply(self, state: SketchState) -> list[SketchState]:
        if "registers" not in state.notes:
            return []
        new = state.fork(self.name)
        new.cache_read("expand", "local", "accumulate")
        new.compute_at("expand", "accumulate", TILE)
        return [new]


@dataclass(frozen=True)
class RegisterB:
    """gather_b: straight to fragments, 8 or 16 bytes per load, one step ahead or not."""

    name: str = "register_b"
    stage: str = "gather_b"

    def apply(self, state: SketchState) -> list[SketchState]:
        few = "few" in state.notes
        if "registers" not in state.notes or (state.workload.rank > MAX_DIRECT_RANK and not few):
            return []
        new = state.fork(self.name)
        ahead = new.param(
            "expand.b_ahead", "pipeline", (0, ALL_AHEAD) if few else (0, 1), ALL_AHEAD if few else 1
        )
        new.cache_read("gather_b", "local", "expand")
        new.compute_at("gather_b", "accumulate", STEP)
        new.pragma("gather_b", STEP, "load_ahead", ahead)
        kind = INTRINSIC_TYPES[new.workload.dtype]
        new.annotate("accumulate", STEP, "tensorize", f"register_update_{kind}")
        return [new]


@dataclass(frozen=True)
class SharedB:
    """gather_b: the block's rows of B through shared memory, read from memory once for all rows
    of the tile; all copies are on their way before v is waited for."""

    name: str = "shared_b"
    stage: str = "gather_b"

    def apply(self, state: SketchState) -> list[SketchState]:
        if "registers" not in state.notes or state.workload.rank % GROUP:
            return []
        new = state.fork(self.name)
        new.cache_read("gather_b", "shared.dyn", "expand")
        new.cache_read("gather_b", "local", "expand")
        new.compute_at("gather_b_in", "accumulate", STEP)
        new.compute_at("gather_b", "accumulate", BLOCK)
        kind = INTRINSIC_TYPES[new.workload.dtype]
        new.annotate("accumulate", STEP, "tensorize", f"register_update_{kind}")
        row_bytes = 2 * new.workload.rank

        def smem(a: Annotation) -> int:
            return row_bytes * GROUP * a[STEPS.name] * a[COLUMN_WARPS.name]

        new.limit("expand shared memory bytes", new.target.max_smem_bytes, smem)
        new.estimate("expand.smem_bytes", smem)
        return [new]
