"""CUDA, tensor cores, shrink half: split-K over blocks, a software pipeline of 16-byte copies.

Block: one tile of rows and one of the split-K parts, all slices (x is read once for them). A step
of the pipeline copies the rows' piece of x and the adapters' piece of A to shared memory (cp.async,
zeros behind the last row and the last rank); warps own rows and ranks. The fp32 partial sums go to
a workspace [part, slice, tile, row, rank], which the expand kernel adds up.
"""

from __future__ import annotations

from dataclasses import dataclass

from dop.space.rule import SketchState
from dop.space.rules.numbers import ceil_div, dividing
from dop.space.rules.tensor_core_expand import (
    COLUMN_WARPS,
    COLUMNS,
    EDGE,
    INTRINSIC_TYPES,
    MAX_COPIES,
    PAD_FACTOR,
    PAD_OFFSET,
    PIECE,
    ROW_WARPS,
    TILE_ROWS,
    fetch,
    fragments,
    padded_rank,
    unrolled,
)
from dop.space.sketch import Annotation
from dop.space.step import Param

SHRINK_ROW_WARPS, RANK_WARPS = Param("shrink.row_warps"), Param("shrink.rank_warps")
WARP, STEP, INNER = 3, 4, 5
"""Loop positions in shrink_rf: part, t, row warp, rank warp, pipeline step, k tile, slice, ..."""


def _start(
    width: int, ranks: int, parts: tuple[int, ...], warps: tuple[int, ...]
) -> tuple[int, int, int]:
    """Split-K parts, k tiles per step and rank warps to start from: near 8 parts, at least two
    steps each, and few enough copies per thread (16 rows of x must feed all threads)."""
    for k_tiles in (8, 4):
        depth = EDGE * k_tiles
        few = [n for n in warps if ranks * depth <= MAX_COPIES * PIECE * 32 * n and n <= k_tiles]
        for split_k in sorted(parts, key=lambda part: abs(part - 8)):
            if few and width % (split_k * depth) == 0 and width >= 2 * split_k * depth:
                return split_k, k_tiles, few[0]
    return 1, 4, 1


@dataclass(frozen=True)
class MatrixSplitK:
    """shrink: two kernels; the partial sums are added where expand stages v."""

    name: str = "tensor_core_split_k"
    stage: str = "shrink"

    def apply(self, state: SketchState) -> list[SketchState]:
        w = state.workload
        parts = dividing(w.in_features // 64, (1, 2, 4, 7, 8, 14, 16, 28, 32))
        if "staged" not in state.notes or w.in_features % 64 or not parts:
            return []
        new = state.fork(self.name)
        rank = padded_rank(new)
        warps = dividing(rank // EDGE, (1, 2, 4, 8))
        start = _start(w.in_features, w.slices * rank, parts, warps)
        split_k = new.param("shrink.split_k", "split_k", parts, start[0])
        steps = new.param("shrink.k_tiles", "tile", (4, 8, 16), start[1])
        new.param(SHRINK_ROW_WARPS.name, "warps", (1, 2, 4, 8), 1)
        new.param(RANK_WARPS.name, "warps", warps, start[2])
        new.split("shrink", 4, [split_k], w.in_features, inner=False)
        new.rfactor("shrink", 4)
        new.compute_root("shrink_rf")
        self._product(new, steps)
        self._sum_of_parts(new)
        new.pragma("expand", new.notes["expand_k"], "decompose_reduction")
        self._limits(new)
        return [new]

    @staticmethod
    def _product(new: SketchState, steps: Param) -> None:
        """shrink_rf: s, t, i, r, part, k -> blocks, warps, pipeline, tiles."""
        kind = INTRINSIC_TYPES[new.workload.dtype]
        new.split("shrink_rf", 5, [steps, EDGE])
        new.split("shrink_rf", 3, [RANK_WARPS], inner=False)
        new.split("shrink_rf", 4, [EDGE])
        new.split("shrink_rf", 2, [SHRINK_ROW_WARPS], inner=False)
        new.split("shrink_rf", 3, [EDGE])
        new.reorder("shrink_rf", 8, 1, 2, 5, 9, 10, 0, 3, 6, 4, 7, 11)
        new.annotate("shrink_rf", 0, "blockIdx.y")
        new.annotate("shrink_rf", 1, "blockIdx.x")
        new.annotate("shrink_rf", 2, "threadIdx.z")
        new.annotate("shrink_rf", WARP, "threadIdx.y")
        new.annotate("shrink_rf", INNER, "unroll")
        unrolled(new, "shrink_rf", 6)
        new.annotate("shrink_rf", 9, "tensorize", f"mma_{kind}")

    @staticmethod
    def _sum_of_parts(new: SketchState) -> None:
        """shrink and its converted copy: once per block of the expand kernel."""
        kind = INTRINSIC_TYPES[new.workload.dtype]
        new.cache_read("shrink", "local", "expand")
        new.cache_read("shrink", "shared.dyn", "expand")
        new.cache_read("shrink_in", "warp", "expand")
        new.compute_at("shrink_in_in", "expand", new.notes["expand_k"])
        # t, column block, t, row warp, column warp, k; own loops: t, g, i, r
        fragments(new, "shrink_in_in", 8, f"ldmatrix_a_{kind}")
        new.compute_at("shrink_in", "accumulate", COLUMNS)
        # t, column block; own loops: t, g, i, r
        # Not 2: with larger ranks TVM then no longer sees that a vector stays in its row.
        vector = new.param("expand.sum_vector", "vector", (1, 4), 4)
        fetch(new, "shrink_in", (4, 5), (ROW_WARPS, COLUMN_WARPS), vector)
        new.storage_align("shrink_in", 2, PAD_FACTOR, PAD_OFFSET)
        new.compute_at("shrink", "shrink_in", 7)
        # t, column block, t, g, step, row warp, column warp, lane; own loops: part, s, t, i, r
        new.annotate("shrink", 12, "vectorize")
        new.pragma("shrink", 8, "decompose_reduction")
        new.annotate("shrink", 8, "unroll")
        new.cache_write("expand", "warp")
        new.compute_at("expand_out", "expand", new.notes["expand_warp"])
        # t, column block, t, row warp, column warp; own loops: t, i, n
        fragments(new, "expand_out", 6, "store_shared")
        new.storage_align("expand_out", 1, 32, 8)

    @staticmethod
    def _limits(new: SketchState) -> None:
        w, target, rank = new.workload, new.target, padded_rank(new)

        def threads(a: Annotation) -> int:
            return 32 * a[SHRINK_ROW_WARPS.name] * a[RANK_WARPS.name]

        def depth(a: Annotation) -> int:
            return EDGE * a["shrink.k_tiles"]

        def part_steps(a: Annotation) -> float:
            return w.in_features / (a["shrink.split_k"] * depth(a))

        def whole(a: Annotation) -> int:
            rows = a[TILE_ROWS.name]
            share = PIECE * threads(a)
            return (
                rows % (EDGE * a[SHRINK_ROW_WARPS.name])
                + w.in_features % (a["shrink.split_k"] * depth(a))
                + rows * depth(a) % share
                + rank * depth(a) % share
            )

        def registers(a: Annotation) -> int:
            rows = a[TILE_ROWS.name] // (EDGE * a[SHRINK_ROW_WARPS.name])
            ranks = w.slices * rank // (EDGE * a[RANK_WARPS.name])
            return 8 * rows * ranks + 4 * (rows + ranks) + 32

        new.limit("threads per shrink block", target.max_threads, threads)
        new.limit(
            "copies of x or A per thread",
            MAX_COPIES,
            lambda a: max(a[TILE_ROWS.name], w.slices * rank) * depth(a) // (PIECE * threads(a)),
        )
        new.limit("elements left over by shrink's tiles", 0, whole)
        new.limit("shrink registers per thread", 224, registers)
        new.limit(
            "shrink registers per block", target.max_registers, lambda a: registers(a) * threads(a)
        )
        new.estimate("shrink.threads", threads)
        new.estimate("shrink.registers", registers)
        new.estimate("shrink.steps", part_steps)
        new.estimate("shrink.blocks_per_tile", lambda a: a["shrink.split_k"])
        row_bytes = 4.0 * w.slices * rank
        new.estimate(
            "shrink.partial_bytes",
            lambda a: row_bytes * a["shrink.split_k"] * a[TILE_ROWS.name],
        )


@dataclass(frozen=True)
class StagedA:
    """gather_a: all slices' rows of A through the pipeline into fragments."""

    name: str = "staged_a"
    stage: str = "gather_a"

    def apply(self, state: SketchState) -> list[SketchState]:
        if "staged" not in state.notes:
            return []
        new = state.fork(self.name)
        kind = INTRINSIC_TYPES[new.workload.dtype]
        new.cache_read("gather_a", "shared.dyn", "shrink_rf")
        new.cache_read("gather_a", "warp", "shrink_rf")
        new.compute_at("gather_a_in", "shrink_rf", INNER)
        # part, t, row warp, rank warp, step, k tile; own loops: s, t, r, k
        fragments(new, "gather_a_in", 8, f"ldmatrix_b_{kind}")
        unrolled(new, "gather_a_in", 6)
        new.compute_at("gather_a", "shrink_rf", STEP)
        # part, t, row warp, rank warp, step; own loops: s, t, r, k
        new.annotate("gather_a", 5, "unroll")
        fetch(new, "gather_a", (7, 8), (SHRINK_ROW_WARPS, RANK_WARPS), PIECE)
        new.storage_align("gather_a", 2, PAD_FACTOR, PAD_OFFSET)
        return [new]


@dataclass(frozen=True)
class PipelinedX:
    """gather_x: the tile's rows of x through the pipeline into fragments."""

    name: str = "pipelined_x"
    stage: str = "gather_x"

    def apply(self, state: SketchState) -> list[SketchState]:
        if "staged" not in state.notes:
            return []
        new = state.fork(self.name)
        kind = INTRINSIC_TYPES[new.workload.dtype]
        stages = new.param("shrink.stages", "pipeline", (2, 3, 4), 2)
        new.cache_read("gather_x", "shared.dyn", "shrink_rf")
        new.cache_read("gather_x", "warp", "shrink_rf")
        new.compute_at("gather_x_in", "shrink_rf", INNER)
        # part, t, row warp, rank warp, step, k tile; own loops: t, i, k
        fragments(new, "gather_x_in", 7, f"ldmatrix_a_{kind}")
        new.compute_at("gather_x", "shrink_rf", STEP)
        # part, t, row warp, rank warp, step; own loops: t, i, k
        fetch(new, "gather_x", (6, 7), (SHRINK_ROW_WARPS, RANK_WARPS), PIECE)
        new.storage_align("gather_x", 1, PAD_FACTOR, PAD_OFFSET)
        new.cache_write("shrink_rf", "warp")
        new.compute_at("shrink_rf_out", "shrink_rf", WARP)
        # part, t, row warp, rank warp; own loops: part, s, t, i, r
        fragments(new, "shrink_rf_out", 7, "store_global")
        unrolled(new, "shrink_rf_out", 5)
        new.pragma("shrink_rf", STEP, "decompose_reduction")
        new.pragma("shrink_rf", STEP, "pipeline_depth", stages)
        self._limits(new)
        return [new]

    @staticmethod
    def _limits(new: SketchState) -> None:
        w, rank = new.workload, padded_rank(new)

        def smem(a: Annotation) -> int:
            rows = a[TILE_ROWS.name] + w.slices * rank
            row_bytes = 2 * (EDGE * a["shrink.k_tiles"] + PAD_OFFSET)
            return a["shrink.stages"] * rows * row_bytes

        def missing_steps(a: Annotation) -> int:
            steps = ceil_div(w.in_features, a["shrink.split_k"] * EDGE * a["shrink.k_tiles"])
            return max(a["shrink.stages"] - steps, 0)

        new.limit("shrink shared memory bytes", new.target.max_smem_bytes, smem)
        new.limit("pipeline stages without a step", 0, missing_steps)
        new.estimate("shrink.smem_bytes", smem)
