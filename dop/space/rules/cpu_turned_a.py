"""CPU, several rows of one adapter: both halves as blocks of rows x vectors in registers.

Shrink's vectors lie along the rank: a block of A is turned into the first-level cache, once for
all rows of a task, and x is broadcast. A row of x serves all ranks at once, so it needs no copy,
and no lanes are added up at the end. Expand keeps `rows` x `wide` vectors of the update in
registers and adds them to y from there. Rank and scale go into the turned block of B, not into
every product's v. Four rows of two vectors are what AVX2 holds: eight sums hide the latency of
its multiply-adds, and six loads for eight products keep up with them.

What shall become registers has the scope "global": TVM puts small buffers of that scope on the
stack, where LLVM finds them, and takes those of scope "local" from the heap, however small. With
the latter 8 rows of 2048 -> 2 x 8192 took 98 us, now 55.
"""

from __future__ import annotations

from dataclasses import dataclass

from dop.space.rule import SketchState
from dop.space.rules.cpu_columns import FLOAT_BYTES, column_lanes, lanes
from dop.space.rules.numbers import ceil_div, dividing
from dop.space.rules.tokens import TileForm
from dop.space.sketch import Annotation

MIN_LANES = 4
"""Narrower vectors do not pay for turning a block."""

ROWS = (1, 2, 4, 8)
SHARED_ROWS = 64
"""Tiles of so many rows are shared by all threads in the default of shrink too."""

MAX_CHUNK = 512
BLOCK_BYTES = 128 << 10
"""Most bytes of a turned block: a quarter of a common second-level cache."""


def rank_lanes(state: SketchState) -> int:
    """Lanes of a vector of ranks; squares of as many elements of A are turned."""
    return lanes(state.target, state.workload.rank, state.workload.in_features)


def turn(new: SketchState, stage: str, loop: int, width: int) -> None:
    """Has the copy `stage`_in turned, square by square, in registers.

    `loop` is the copy's second to last loop; the one behind it is contiguous in memory.
    """
    copy = f"{stage}_in"
    new.pragma(copy, 0, "transpose")
    new.split(copy, loop + 1, [width])
    new.split(copy, loop, [width])
    new.reorder(copy, *range(loop), loop, loop + 2, loop + 1, loop + 3)
    new.compute_at(stage, copy, loop + 1)
    row = loop + 2 + {"gather_a": 2, "gather_b": 1}[stage]  # behind slice and tile, or tile
    new.annotate(stage, row, "unroll")
    new.annotate(stage, row + 1, "vectorize")
    new.pragma(copy, loop + 2, "turn", width)


@dataclass(frozen=True)
class BlockTiles:
    """Tiles of several rows for register blocks.

    Heights are sketches of their own, so that each has an untuned default and the search begins
    with a good candidate for one, few, some and many rows of an adapter. Even for one row turning
    B pays: 1 row of 2048 -> 2 x 8192 took 35 us, with the sums written out 59."""

    name: str
    choices: tuple[int, ...]
    stage: str = "tokens"

    def apply(self, state: SketchState) -> list[SketchState]:
        """SP of the token axis, followed by the other stages."""
        fits = state.target.kind == "cpu" and state.workload.dtype == "float32"
        if not fits or min(rank_lanes(state), column_lanes(state)) < MIN_LANES:
            return []
        default = self.choices[-1] if self.choices[-1] >= SHARED_ROWS else self.choices[0]
        (new,) = TileForm(self.name, self.choices, default, "cpu").apply(state)
        new.notes["register_blocks"] = default
        return [new]


@dataclass(frozen=True)
class RegisterBlocks:
    """accumulate: a task is a tile and a block of columns."""

    name: str = "register_blocks"
    stage: str = "accumulate"

    def apply(self, state: SketchState) -> list[SketchState]:
        """Loops: task, row group, vector group, row, vector, lane."""
        if "register_blocks" not in state.notes:
            return []
        new = state.fork(self.name)
        width = column_lanes(new)
        vectors = new.workload.total_out // width
        wides = dividing(vectors, (1, 2, 4))
        wide = new.param("expand.wide", "vector", wides, 2)
        counts = dividing(vectors // min(2, max(wides)), (1, 2, 4, 8, 16, 32, 64))
        groups = new.param("expand.groups", "tile", counts, max(1, 256 // new.workload.rank))
        rows = new.param("expand.rows", "tile", ROWS, min(4, new.notes["register_blocks"]))
        new.split("accumulate", 2, [groups, wide, width], new.workload.total_out)
        new.split("accumulate", 1, [rows])
        # tile, row group, row, column block, vector group, vector, lane
        new.reorder("accumulate", 0, 3, 1, 4, 2, 5, 6)
        new.annotate("accumulate", 6, "vectorize")
        new.annotate("accumulate", 5, "unroll")
        new.annotate("accumulate", 4, "unroll")
        new.fuse("accumulate", 0, 1)
        new.annotate("accumulate", 0, "parallel")
        self._quantities(new, width, vectors)
        return [new]

    @staticmethod
    def _quantities(new: SketchState, width: int, vectors: int) -> None:
        def block(a: Annotation) -> int:
            return a["expand.groups"] * a["expand.wide"]

        def accumulators(a: Annotation) -> int:
            return a["expand.rows"] * a["expand.wide"]

        def block_bytes(a: Annotation) -> int:
            return block(a) * width * new.workload.rank * FLOAT_BYTES

        new.limit("registers of a block of expand", new.target.max_registers - 4, accumulators)
        new.limit("vectors behind the last whole block", 0, lambda a: vectors % block(a))
        new.limit(
            "rows behind expand's last group",
            0,
            lambda a: a["tokens.tile_rows"] % a["expand.rows"],
        )
        new.limit("bytes of a block of B", BLOCK_BYTES, block_bytes)
        new.estimate("regions", lambda a: 2)
        new.estimate("expand.blocks_per_tile", lambda a: ceil_div(vectors, block(a)))
        new.estimate("expand.accumulators", accumulators)
        new.estimate("expand.block_bytes", block_bytes)
        new.estimate(
            "expand.loads_per_product",
            lambda a: (a["expand.rows"] + a["expand.wide"]) / accumulators(a),
        )


@dataclass(frozen=True)
class RegisterSums:
    """expand: rows x vectors of sums in registers, v broadcast."""

    name: str = "register_sums"
    stage: str = "expand"

    def apply(self, state: SketchState) -> list[SketchState]:
        """Loops: task, row group, vector group | tile, rank, row, vector, lane."""
        if "register_blocks" not in state.notes:
            return []
        new = state.fork(self.name)
        new.cache_read("expand", "global", "accumulate")
        new.compute_at("expand", "accumulate", 2)
        new.split("expand", 5, [column_lanes(new)])
        new.reorder("expand", 0, 1, 2, 3, 7, 4, 5, 6)  # rank in front of row, vector, lane
        new.annotate("expand", 7, "vectorize")
        new.annotate("expand", 6, "unroll")
        new.annotate("expand", 5, "unroll")
        return [new]


@dataclass(frozen=True)
class SquaresOfB:
    """gather_b: a task's block of B, turned, times the adapter's scale."""

    name: str = "squares_of_b"
    stage: str = "gather_b"

    def apply(self, state: SketchState) -> list[SketchState]:
        """Loops of the copy: task | tile, column group, rank group | square."""
        if "register_blocks" not in state.notes:
            return []
        new = state.fork(self.name)
        new.cache_read("gather_b", "global", "expand")
        new.cache_read("gather_b", "local", "expand")
        new.compute_at("gather_b_in", "expand", 0)
        new.pragma("gather_b", 0, "scaled_b")
        turn(new, "gather_b", 2, min(column_lanes(new), rank_lanes(new)))
        new.pragma("expand", 4, "decompose_reduction")
        return [new]


@dataclass(frozen=True)
class TurnedRanks:
    """shrink: a task is a slice, a tile and a block of its rows; k in chunks."""

    name: str = "turned_ranks"
    stage: str = "shrink"

    def apply(self, state: SketchState) -> list[SketchState]:
        """Loops: task, chunk, row group, rank group, row, vector, lane; shrink_rf per group."""
        if "register_blocks" not in state.notes:
            return []
        new = state.fork(self.name)
        w, width = new.workload, rank_lanes(new)
        rows = new.param("shrink.rows", "tile", ROWS, min(4, new.notes["register_blocks"]))
        tile = new.notes["register_blocks"]
        tasks = new.target.units if tile >= SHARED_ROWS else 1
        groups = new.param(
            "shrink.groups", "tile", (1, 2, 4, 8, 16, 32), max(1, tile // 4 // tasks)
        )
        longest = min(MAX_CHUNK, w.in_features)
        lengths = dividing(w.in_features, range(width, longest + 1, width))[-5:]
        chunk = new.param("shrink.chunk", "tile", lengths, 128 if w.rank <= 16 else 64)
        wide = new.param("shrink.wide", "vector", dividing(w.rank // width, (1, 2, 4)), 2)
        new.compute_root("shrink")
        new.split("shrink", 4, [chunk], w.in_features)
        new.rfactor("shrink", 4, 0)  # slice, tile, row, rank, chunk
        new.split("shrink", 3, [wide, width], w.rank)
        new.split("shrink", 2, [groups, rows])
        # slice, tile, row block, row group, row, rank group, vector, lane, chunk
        new.reorder("shrink", 0, 1, 2, 8, 3, 5, 4, 6, 7)
        new.annotate("shrink", 8, "vectorize")
        new.annotate("shrink", 7, "unroll")
        new.annotate("shrink", 6, "unroll")
        new.fuse("shrink", 0, 1, 2)
        new.annotate("shrink", 0, "parallel")
        self._partial(new, width)
        self._quantities(new, width)
        return [new]

    @staticmethod
    def _groups(new: SketchState) -> int:
        """Row groups of a task by default: a tile's, or a thread's share of a tall one."""
        tile = new.notes["register_blocks"]
        tasks = new.target.units if tile >= SHARED_ROWS else 1
        return max(1, tile // 4 // tasks)

    @staticmethod
    def _partial(new: SketchState, width: int) -> None:
        """shrink_rf: sums of one chunk in registers; chunk, slice, tile, k, row, vector, lane."""
        new.cache_read("shrink_rf", "global", "shrink")
        new.compute_at("shrink_rf", "shrink", 3)
        new.split("shrink_rf", 8, [width])
        new.reorder("shrink_rf", 0, 1, 2, 3, 4, 5, 6, 10, 7, 8, 9)
        new.annotate("shrink_rf", 10, "vectorize")
        new.annotate("shrink_rf", 9, "unroll")
        new.annotate("shrink_rf", 8, "unroll")

    @staticmethod
    def _quantities(new: SketchState, width: int) -> None:
        w = new.workload

        def accumulators(a: Annotation) -> int:
            return a["shrink.rows"] * a["shrink.wide"]

        def task_rows(a: Annotation) -> int:
            return a["shrink.rows"] * a["shrink.groups"]

        def chunk_bytes(a: Annotation) -> int:
            return a["shrink.chunk"] * w.rank * FLOAT_BYTES

        new.limit("accumulators", new.target.max_registers - 4, accumulators)
        new.limit(
            "rows behind shrink's last task", 0, lambda a: a["tokens.tile_rows"] % task_rows(a)
        )
        new.limit("bytes of a block of A", BLOCK_BYTES, chunk_bytes)
        new.estimate("shrink.accumulators", accumulators)
        new.estimate("shrink.chunk_bytes", chunk_bytes)
        new.estimate("shrink.lanes", lambda a: width)
        new.estimate(
            "shrink.tasks", lambda a: w.slices * ceil_div(a["tokens.tile_rows"], task_rows(a))
        )
        new.estimate(
            "shrink.loads_per_product",
            lambda a: (a["shrink.rows"] + a["shrink.wide"]) / accumulators(a),
        )


@dataclass(frozen=True)
class SquaresOfA:
    """gather_a: a chunk of A, turned."""

    name: str = "squares_of_a"
    stage: str = "gather_a"

    def apply(self, state: SketchState) -> list[SketchState]:
        """Loops of the copy: task, chunk | slice, tile, rank group, k group | square."""
        if "register_blocks" not in state.notes:
            return []
        new = state.fork(self.name)
        new.cache_read("gather_a", "global", "shrink_rf")
        new.cache_read("gather_a", "local", "shrink_rf")
        new.compute_at("gather_a_in", "shrink_rf", 1)
        turn(new, "gather_a", 4, rank_lanes(new))
        return [new]


@dataclass(frozen=True)
class BroadcastX:
    """gather_x: read where it is used; rows behind the tile's end repeat its last one."""

    name: str = "broadcast_x"
    stage: str = "gather_x"

    def apply(self, state: SketchState) -> list[SketchState]:
        """Inlines the gather and clears both sums in front of their loops."""
        if "register_blocks" not in state.notes:
            return []
        new = state.fork(self.name)
        new.compute_inline("gather_x")
        new.pragma("gather_x", 0, "near_rows")
        new.pragma("shrink_rf", 7, "decompose_reduction")
        new.pragma("shrink", 1, "decompose_reduction")
        return [new]
