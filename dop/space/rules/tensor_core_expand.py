"""CUDA, tensor cores, expand half: a block multiplies a tile's v with a group of B's rows.

Block: one tile of 16 to 128 rows of one segment and a group of columns of y. The columns' rows of
B and the tile's v (summed over the split-K partials, converted to the operands' type) are staged in
shared memory; warps multiply 16 x 16 x 16 tiles; the fp32 result goes through shared memory, so
that y is read and written in 16-byte pieces of whole rows.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from dop.space.rule import SketchState
from dop.space.rules.numbers import dividing, round_up, vector_width
from dop.space.sketch import Annotation
from dop.space.stages import TOKEN_AXIS
from dop.space.step import Num, Param

EDGE = 16
"""Edge of the intrinsics' tiles."""

PIECE = 8
"""Elements of a 16-byte copy."""

INTRINSIC_TYPES = {"float16": "f16", "bfloat16": "bf16"}
MAX_RANK = 256

MAX_COPIES = 48
"""Copies that a thread may issue for a stage: they are unrolled, nvcc's time grows with them."""

PAD_FACTOR, PAD_OFFSET = 16, 8
"""Rows of staged operands are padded to an odd number of 16-byte pieces: ldmatrix then reads eight
rows without a bank conflict."""

TILE_ROWS, ROW_WARPS, COLUMN_WARPS = (
    Param("tokens.tile_rows"),
    Param("expand.row_warps"),
    Param("expand.column_warps"),
)
COLUMNS = 1
"""Loop position in accumulate: t, column block, ..."""


def padded_rank(state: SketchState) -> int:
    """The rank rounded up to whole tiles."""
    return round_up(state.workload.rank, EDGE)


def fetch(
    state: SketchState, stage: str, loops: tuple[int, ...], warps: tuple[Num, Num], vector: Num
) -> None:
    """All threads copy the stage's box together, `vector` neighbouring elements each."""
    first = loops[0]
    if len(loops) > 1:
        state.fuse(stage, *loops)
    state.split(stage, first, [*warps, 32, vector])
    for loop, thread in ((1, "threadIdx.z"), (2, "threadIdx.y"), (3, "threadIdx.x")):
        state.annotate(stage, first + loop, thread)
    state.annotate(stage, first, "unroll")
    if vector != 1:
        state.annotate(stage, first + 4, "vectorize")


def unrolled(state: SketchState, stage: str, loop: int) -> None:
    """Has the loop and those inside it unrolled by nvcc (#pragma unroll).

    Fragments are registers only if every index into them becomes a constant, but unrolling must be
    nvcc's: unrolled by TVM, indices are more than its LowerWarpMemory understands, and the
    accumulators end in local memory.
    """
    state.pragma(stage, loop, "auto_unroll_max_step", 4096)
    state.pragma(stage, loop, "unroll_explicit", 0)


def fragments(state: SketchState, stage: str, row_loop: int, intrinsic: str) -> None:
    """The copy's last two loops, `row_loop` and the next, in tiles handled by the intrinsic."""
    state.split(stage, row_loop + 1, [EDGE])
    state.split(stage, row_loop, [EDGE])
    outer = range(row_loop)
    state.reorder(stage, *outer, *(row_loop + p for p in (0, 2, 1, 3)))
    state.annotate(stage, row_loop + 2, "tensorize", intrinsic)
    unrolled(state, stage, row_loop)


@dataclass(frozen=True)
class MatrixTiles:
    """tokens: tiles of whole matrix rows of one segment.

    `wide` is for the form that keeps everything in registers: it wants more rows per tile. `few`
    is that form for batches of few rows: most tiles of the bound are empty, so the grid has only as
    many as one adapter needs, and some more (`workers`).
    """

    name: str = "matrix_tiles"
    wide: bool = False
    few: bool = False
    stage: str = "tokens"

    def apply(self, state: SketchState) -> list[SketchState]:
        w = state.workload
        fits = w.dtype in INTRINSIC_TYPES and w.rank <= MAX_RANK
        if state.target.kind != "cuda" or not fits:
            return []
        new = state.fork(self.name)
        default = 64 if self.wide else 16
        choices = (16, 32, 64) if self.few else (16, 32, 64, 128)
        rows = new.param("tokens.tile_rows", "tile", choices, default)
        source = new.split("gather_x", TOKEN_AXIS["gather_x"], [rows])
        for stage, axis in TOKEN_AXIS.items():
            if stage != "gather_x":
                new.follow_split(stage, axis, source, 1)
        new.notes["matrix"] = 1
        if self.wide:
            new.notes["wide"] = 1
        if self.few:
            new.notes["few"] = 1
        return [new]


@dataclass(frozen=True)
class MatrixColumns:
    """accumulate: a block updates a tile's rows in a group of columns, 16 bytes per access."""

    name: str = "matrix_columns"
    stage: str = "accumulate"

    def apply(self, state: SketchState) -> list[SketchState]:
        common = math.gcd(*state.workload.out_features)
        choices = dividing(common, (32, 64, 128, 256, 512))
        other = "wide" in state.notes or "fused" in state.notes
        if "matrix" not in state.notes or other or not choices:
            return []
        new = state.fork(self.name)
        new.notes["staged"] = 1
        columns = new.param("expand.columns", "tile", choices, 128)
        new.param(ROW_WARPS.name, "warps", (1, 2, 4), 1)
        new.param(COLUMN_WARPS.name, "warps", (1, 2, 4, 8), 4)
        new.split("accumulate", 2, [columns], new.workload.total_out)
        new.reorder("accumulate", 0, 2, 1, 3)
        new.annotate("accumulate", 0, "blockIdx.x")
        new.annotate("accumulate", COLUMNS, "blockIdx.y")
        fetch(new, "accumulate", (2, 3), (ROW_WARPS, COLUMN_WARPS), PIECE)
        # Rows of y are found through two tables: their loads start first, into registers.
        new.cache_read("accumulate", "local", "accumulate")
        new.compute_at("accumulate_in", "accumulate", COLUMNS)
        # t, column block; own loops: t, i, n
        fetch(new, "accumulate_in", (3, 4), (ROW_WARPS, COLUMN_WARPS), PIECE)
        self._limits(new)
        return [new]

    @staticmethod
    def _limits(new: SketchState) -> None:
        target, width = new.target, new.workload.total_out

        def threads(a: Annotation) -> int:
            return 32 * a[ROW_WARPS.name] * a[COLUMN_WARPS.name]

        def whole(a: Annotation) -> int:
            rows, columns = a[TILE_ROWS.name], a["expand.columns"]
            return (
                rows % (EDGE * a[ROW_WARPS.name])
                + columns % (EDGE * a[COLUMN_WARPS.name])
                + rows * columns % (PIECE * threads(a))
            )

        def registers(a: Annotation) -> int:
            rows = a[TILE_ROWS.name] // (EDGE * a[ROW_WARPS.name])
            columns = a["expand.columns"] // (EDGE * a[COLUMN_WARPS.name])
            # Accumulators, operand fragments, the old values of y, addresses.
            y_words = a[TILE_ROWS.name] * a["expand.columns"] // (2 * threads(a))
            return 8 * rows * columns + 4 * (rows + columns) + y_words + 24

        def smem(a: Annotation) -> int:
            rows, columns, rank = a[TILE_ROWS.name], a["expand.columns"], padded_rank(new)
            # The result takes the operands' place.
            return max(2 * (rows + columns) * (rank + PAD_OFFSET), 4 * rows * (columns + 8))

        new.limit("threads per expand block", target.max_threads, threads)
        new.limit("columns or rows left over by expand's warps", 0, whole)
        new.limit("expand registers per thread", 200, registers)
        new.limit(
            "expand registers per block", target.max_registers, lambda a: registers(a) * threads(a)
        )
        new.limit("expand shared memory bytes", target.max_smem_bytes, smem)
        new.estimate("expand.threads", threads)
        new.estimate("expand.registers", registers)
        new.estimate("expand.smem_bytes", smem)
        new.estimate("expand.blocks_per_tile", lambda a: width / a["expand.columns"])


@dataclass(frozen=True)
class MatrixExpand:
    """expand: warps multiply tiles; the accumulators are fragments."""

    name: str = "tensor_core_expand"
    stage: str = "expand"

    def apply(self, state: SketchState) -> list[SketchState]:
        if "staged" not in state.notes:
            return []
        new = state.fork(self.name)
        kind = INTRINSIC_TYPES[new.workload.dtype]
        new.cache_read("expand", "shared.dyn", "accumulate")
        new.compute_at("expand", "accumulate", COLUMNS)
        # t, column block; own loops: t, i, n, r
        new.split("expand", 5, [EDGE])
        new.split("expand", 4, [COLUMN_WARPS], inner=False)
        new.split("expand", 5, [EDGE])
        new.split("expand", 3, [ROW_WARPS], inner=False)
        new.split("expand", 4, [EDGE])
        new.reorder("expand", 0, 1, 2, 3, 6, 9, 4, 7, 5, 8, 10)
        new.annotate("expand", 3, "threadIdx.z")
        new.annotate("expand", 4, "threadIdx.y")
        new.annotate("expand", 5, "unroll")
        unrolled(new, "expand", 6)
        new.annotate("expand", 8, "tensorize", f"mma_{kind}")
        new.notes["expand_warp"], new.notes["expand_k"] = 4, 5
        return [new]


@dataclass(frozen=True)
class StagedB:
    """gather_b: the block's rows of B through shared memory into fragments."""

    name: str = "staged_b"
    stage: str = "gather_b"

    def apply(self, state: SketchState) -> list[SketchState]:
        if "staged" not in state.notes:
            return []
        new = state.fork(self.name)
        w = new.workload
        kind = INTRINSIC_TYPES[w.dtype]
        vector = vector_width(w.rank, w.element_bytes)
        new.cache_read("gather_b", "shared.dyn", "expand")
        new.cache_read("gather_b", "warp", "expand")
        new.compute_at("gather_b_in", "expand", new.notes["expand_k"])
        # t, column block, t, row warp, column warp, k; own loops: t, n, r
        fragments(new, "gather_b_in", 7, f"ldmatrix_b_{kind}")
        new.compute_at("gather_b", "accumulate", COLUMNS)
        # t, column block; own loops: t, n, r
        fetch(new, "gather_b", (3, 4), (ROW_WARPS, COLUMN_WARPS), vector)
        new.storage_align("gather_b", 1, PAD_FACTOR, PAD_OFFSET)
        rank = padded_rank(new)

        def left_over(a: Annotation) -> int:
            share = vector * 32 * a[ROW_WARPS.name] * a[COLUMN_WARPS.name]
            return a["expand.columns"] * rank % share

        new.limit("elements of B left over by the threads", 0, left_over)
        share = 32 * vector
        new.limit(
            "copies of B per thread",
            MAX_COPIES,
            lambda a: (
                a["expand.columns"] * rank // (share * a[ROW_WARPS.name] * a[COLUMN_WARPS.name])
            ),
        )
        return [new]
