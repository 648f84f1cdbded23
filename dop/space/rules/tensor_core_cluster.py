"""CUDA, tensor cores, shrink half of the register form: v is written once, in the operands' type.

Block: one tile of rows, one of the split-K parts, the ranks of all slices. The parts of a tile are
one thread-block cluster, whose blocks add their sums through distributed shared memory, so that
expand reads v and not its parts (lowering/intrinsics/pipelined_shrink.py).

How many clusters run at once is the GPU's affair: an H100 holds 15 of seven or eight blocks that
need a multiprocessor each, 30 of four, 66 of two (docs/performance.md 43, 45). Several clusters
along k, whose sums expand adds up, occupy a GPU with the tiles of a few hundred rows. Tiles for few
rows (note "few") are also spread over several blocks along the ranks.
"""

from __future__ import annotations

from dataclasses import dataclass

from dop.space.rule import SketchState
from dop.space.rules.launches import A_FIRST, dependent_launch
from dop.space.rules.numbers import ceil_div, dividing
from dop.space.rules.tensor_core_expand import EDGE, INTRINSIC_TYPES, PIECE, TILE_ROWS
from dop.space.rules.tensor_core_registers import WARP, padded, sums_of_v
from dop.space.sketch import Annotation
from dop.space.step import Param

ROW_WARPS, RANK_WARPS = Param("shrink.row_warps"), Param("shrink.rank_warps")
SPLIT_K, K_TILES = Param("shrink.split_k"), Param("shrink.k_tiles")
CLUSTER_BLOCKS, RANK_BLOCKS = Param("shrink.cluster"), Param("shrink.rank_blocks")
L2_FETCH = Param("shrink.l2_fetch")
HOPPER = "90"
CLUSTER = 8
"""Blocks of a cluster that every Hopper GPU can place."""

PART_DEPTH = 256
"""Elements of k that a block of many rows has at least: four steps."""

MAX_PARTS = 8
"""Sums of v that expand adds up at most."""

WIDE_PARTS = 4
"""Likewise, for tiles of many rows."""

FEW_BYTES = 1 << 16
"""What a block loads by default where rows are few: about a microsecond's worth."""

MANY_RANKS = 8
"""16-rank tiles of all slices from which on blocks may share them, and the copy engine may pay."""

COPY_WARPS, BARRIER_BYTES = 4, 16
"""Warps that ask the copy engine or gather rows, and shared memory for the barriers of a step."""

MIN_WGMMA_TILES = 2
"""16-rank tiles of all slices from which on wgmma may pay."""

PART, STEP = 1, 5
"""Loop positions in shrink_rf: tile, part, tile, row warp, rank warp, pipeline step, k tile, ..."""


@dataclass(frozen=True)
class ClusterSplitK:
    """shrink: its own kernel; parts of k are summed within a cluster.

    `warpgroups`: wgmma, which reads both operands from shared memory once for 64 rows.
    `rank_blocks`: blocks share the ranks of all slices, so that tiles of 128 rows fit beside many
    ranks: A then comes from L2 once for 128 rows, x once for each of the blocks.
    `several`: a tile may have several clusters along k, and copies have L2 read ahead.
    `engine`: the copy engine brings x and A, on warps of its own; blocks may share the ranks.
    """

    name: str = "cluster_split_k"
    warpgroups: bool = False
    rank_blocks: bool = False
    several: bool = False
    engine: bool = False
    stage: str = "shrink"

    def apply(self, state: SketchState) -> list[SketchState]:
        w = state.workload
        if "registers" not in state.notes or w.in_features % 64:
            return []
        ranks = w.slices * padded(w.rank) // EDGE
        few = "few" in state.notes
        if self.warpgroups and (few or state.target.arch != "sm_90a" or ranks < MIN_WGMMA_TILES):
            return []
        shared = (2, 3, 4, 6) if self.rank_blocks else (2, 3, 4, 6, 8) if self.engine else ()
        blocks = dividing(ranks, shared)
        if (self.rank_blocks or self.engine) and ranks < MANY_RANKS:
            return []
        if self.rank_blocks and not blocks:
            return []
        several = dividing(w.in_features // 64, (2, 4, 8, 16, 32)) if self.several else ()
        several = tuple(n for n in several if n <= w.in_features // PART_DEPTH)
        if self.several and not several:
            return []
        new = state.fork(self.name)
        clusters = new.target.arch.removeprefix("sm_")[:2] >= HOPPER
        most = min(CLUSTER, max(1, w.in_features // PART_DEPTH))
        parts = tuple(n for n in (1, 2, 4, CLUSTER) if n == 1 or clusters)
        if few:
            _spread(new, parts, ranks)
        elif self.several:
            _several_clusters(new, several, parts)
        else:
            if self.engine:
                parts = tuple(range(1, most + 1))
                new.param(RANK_BLOCKS.name, "split_k", (1, *blocks), 1)
            new.param(SPLIT_K.name, "split_k", dividing(w.in_features // 64, parts), most)
        depths = dividing(w.in_features // EDGE, (4,) if self.warpgroups else (4, 8))
        new.param(K_TILES.name, "tile", depths, 4)
        if few:
            new.param(ROW_WARPS.name, "warps", (1, 2, 4), 4)
        elif self.warpgroups:
            new.notes["warpgroups"] = 1
            new.param(ROW_WARPS.name, "warps", (4, 8), 4)
            choices = {1, 2, 3, 4, *blocks, *(2 * n for n in blocks)}
            groups = dividing(ranks, sorted(choices))
            groups = tuple(n for n in groups if ranks // n <= 16)
            first = groups[0]
            if self.rank_blocks:
                first = next(n for n in groups if n % blocks[0] == 0)
                new.param(RANK_BLOCKS.name, "split_k", blocks, blocks[0])
            if blocks:
                new.limit("warps left over", 0, lambda a: a[RANK_WARPS.name] % a[RANK_BLOCKS.name])
            new.param(RANK_WARPS.name, "warps", groups, first)
        else:
            new.param(ROW_WARPS.name, "warps", (1, 2, 4, 8), 4)
            groups = dividing(ranks, (1, 2, 3, 4))
            new.param(RANK_WARPS.name, "warps", groups, max(1, ranks // 4))
        new.split("shrink", 4, [SPLIT_K], w.in_features, inner=False)
        new.rfactor("shrink", 4)
        new.cache_read("shrink_rf", "shared.dyn", "shrink")
        new.cache_read("shrink", "global", "expand")
        new.compute_root("shrink")
        new.cache_read("shrink", "local", "expand")
        new.compute_at("shrink_in", "accumulate", WARP)
        dependent_launch(new, A_FIRST if few else (0, 1, 2))
        new.reorder("shrink", 1, 0, 2, 3, 4)
        new.annotate("shrink", 0, "blockIdx.x")
        new.compute_at("shrink_rf", "shrink", 0)
        self._product(new)
        return [new]

    def _product(self, new: SketchState) -> None:
        """shrink_rf: t; own loops part, s, t, i, r, k -> blocks, warps, pipeline, tiles."""
        new.reorder("shrink_rf", 0, 1, 3, 4, 2, 5, 6)
        new.fuse("shrink_rf", 4, 5)
        # t, part, t, row, rank of all slices, k
        new.split("shrink_rf", 5, [K_TILES, EDGE])
        new.split("shrink_rf", 4, [RANK_WARPS], inner=False)
        new.split("shrink_rf", 5, [EDGE])
        new.split("shrink_rf", 3, [ROW_WARPS], inner=False)
        new.split("shrink_rf", 4, [EDGE])
        new.reorder("shrink_rf", 0, 1, 2, 3, 6, 9, 10, 4, 7, 5, 8, 11)
        new.annotate("shrink_rf", PART, "blockIdx.y")
        new.pragma("shrink_rf", PART, "cluster")
        if "few" in new.notes or self.several:
            new.pragma("shrink_rf", PART, "cluster_blocks", CLUSTER_BLOCKS)
        if self.several:
            new.pragma("shrink_rf", PART, "l2_fetch", L2_FETCH)
        if self.engine:
            new.notes["engine"] = 1
            new.pragma("shrink_rf", PART, "engine", 1)
        if "few" in new.notes or self.rank_blocks or self.engine:
            new.pragma("shrink_rf", PART, "rank_blocks", RANK_BLOCKS)
        if "few" in new.notes and new.workload.beside:
            # A base matmul leaves few multiprocessors, on which even empty blocks take their turn.
            blocks = new.param("shrink.tile_blocks", "binding", (0, 1, 2, 4, 8), 4)
            new.pragma("shrink_rf", PART, "tile_blocks", blocks)
        new.annotate("shrink_rf", 3, "threadIdx.z")
        new.annotate("shrink_rf", 4, "threadIdx.y")


def _spread(new: SketchState, clusters: tuple[int, ...], rank_tiles: int) -> None:
    """Blocks of a tile of few rows: clusters along k and along the ranks."""
    w = new.workload
    groups = dividing(rank_tiles, (1, 2, 3, 4, 6, 8, 12, 16))
    wide = min((n for n in groups if rank_tiles // n <= 4), default=groups[-1])
    new.param(RANK_BLOCKS.name, "split_k", groups, wide)
    new.param(RANK_WARPS.name, "warps", groups, wide)
    counts = [n * c for n in (1, 2, 4, 7, 8) for c in clusters]
    splits = dividing(w.in_features // 64, sorted({*counts}))
    row_bytes = 2 * (64 + EDGE * rank_tiles // wide)
    enough = [n for n in splits if w.in_features // n * row_bytes <= FEW_BYTES] or [splits[-1]]
    new.param(SPLIT_K.name, "split_k", splits, enough[0])
    fits = dividing(enough[0], clusters)
    new.param(CLUSTER_BLOCKS.name, "split_k", clusters, fits[-1])
    # The grid's empty blocks should fit beside those of one tile, at three per multiprocessor.
    spare = 3 * new.target.units // (enough[0] * wide) - 1
    workers = new.param("tokens.workers", "binding", (1, 3, 7, 15, 31), 7 if spare >= 7 else 3)
    new.pragma("accumulate", 0, "workers", workers)
    _sums_of_clusters(new, MAX_PARTS)
    new.limit("warps left over", 0, lambda a: a[RANK_WARPS.name] % a["shrink.rank_blocks"])


def _several_clusters(new: SketchState, splits: tuple[int, ...], clusters: tuple[int, ...]) -> None:
    """Blocks of a tile of many rows: clusters along k, or one that L2 reads ahead for."""
    some = max(n for n in splits if n <= 2 * CLUSTER)
    new.param(SPLIT_K.name, "split_k", (1, *splits), some)
    new.param(CLUSTER_BLOCKS.name, "split_k", clusters, some // 2)
    _sums_of_clusters(new, WIDE_PARTS)
    new.param(L2_FETCH.name, "vector", (0, 256), 0)

    def lone(a: Annotation) -> int:
        return int(a[SPLIT_K.name] == a[CLUSTER_BLOCKS.name] and not a[L2_FETCH.name])

    new.limit("lone clusters without a fetch, which are another sketch", 0, lone)


def _sums_of_clusters(new: SketchState, most: int) -> None:
    """Clusters along k, each with a sum of its own."""
    cluster = CLUSTER_BLOCKS.name
    new.limit("parts of a cluster left over", 0, lambda a: a[SPLIT_K.name] % a[cluster])
    new.limit("sums of v", most, sums_of_v)
    new.estimate("shrink.parts", sums_of_v)


@dataclass(frozen=True)
class ClusterA:
    """gather_a: A's rows of all slices through the pipeline."""

    name: str = "swizzled_a"
    stage: str = "gather_a"

    def apply(self, state: SketchState) -> list[SketchState]:
        if "registers" not in state.notes:
            return []
        new = state.fork(self.name)
        new.cache_read("gather_a", "shared.dyn", "shrink_rf")
        new.compute_at("gather_a", "shrink_rf", STEP)
        return [new]


@dataclass(frozen=True)
class ClusterX:
    """gather_x: the tile's rows of x through the pipeline."""

    name: str = "swizzled_x"
    stage: str = "gather_x"

    def apply(self, state: SketchState) -> list[SketchState]:
        if "registers" not in state.notes:
            return []
        new = state.fork(self.name)
        new.cache_read("gather_x", "shared.dyn", "shrink_rf")
        new.compute_at("gather_x", "shrink_rf", STEP)
        deep = 4 if "few" in new.notes else 3  # few rows: nearly all steps at once
        stages = new.param("shrink.stages", "pipeline", (2, 3, 4, 6, 8), deep)
        new.pragma("shrink_rf", STEP, "pipeline_depth", stages)
        kind = INTRINSIC_TYPES[new.workload.dtype]
        tile = "warpgroup_product" if "warpgroups" in new.notes else "pipelined_product"
        new.annotate("shrink_rf", STEP, "tensorize", f"{tile}_{kind}")
        if "warpgroups" in new.notes:
            new.limit(
                "row warps beside the tile's rows",
                0,
                lambda a: abs(a[TILE_ROWS.name] - EDGE * a[ROW_WARPS.name]),
            )
        _limits(new)
        return [new]


def _limits(new: SketchState) -> None:
    w, target = new.workload, new.target
    all_ranks = w.slices * padded(w.rank)
    copy_warps = COPY_WARPS if "engine" in new.notes else 0

    def ranks_of(a: Annotation) -> int:
        return all_ranks // a.get(RANK_BLOCKS.name, 1)

    def rank_warps(a: Annotation) -> int:
        return max(a[RANK_WARPS.name] // a.get(RANK_BLOCKS.name, 1), 1)

    def cluster(a: Annotation) -> int:
        return a.get(CLUSTER_BLOCKS.name, a[SPLIT_K.name])

    def threads(a: Annotation) -> int:
        return 32 * (a[ROW_WARPS.name] * rank_warps(a) + copy_warps)

    def depth(a: Annotation) -> int:
        return EDGE * a[K_TILES.name]

    def steps(a: Annotation) -> int:
        return ceil_div(w.in_features, a[SPLIT_K.name] * depth(a))

    def left_over(a: Annotation) -> int:
        return (
            a[TILE_ROWS.name] % (EDGE * a[ROW_WARPS.name])
            + w.in_features % (a[SPLIT_K.name] * depth(a))
            + all_ranks % (EDGE * a[RANK_WARPS.name])
        )

    def copies(a: Annotation) -> int:
        if copy_warps:  # a tile whose rows lie apart: x alone
            return ceil_div(a[TILE_ROWS.name], PIECE * copy_warps // 2)
        share = PIECE * threads(a)
        pieces = (a[TILE_ROWS.name] * depth(a), ranks_of(a) * depth(a))
        return sum(ceil_div(n, share) for n in pieces)

    def registers(a: Annotation) -> int:
        rows = a[TILE_ROWS.name] // (EDGE * a[ROW_WARPS.name])
        tiles = ranks_of(a) // (EDGE * rank_warps(a))
        if "warpgroups" in new.notes:  # operands stay in shared memory
            return 8 * rows * tiles + 2 * copies(a) + 16
        return 8 * rows * tiles + 4 * (rows + 1) + 4 * copies(a) + 32

    def smem(a: Annotation) -> int:
        pipeline = 2 * a["shrink.stages"] * depth(a) * (a[TILE_ROWS.name] + ranks_of(a))
        sums = 4 * a[TILE_ROWS.name] * (ranks_of(a) + 4) if cluster(a) > 1 else 0
        barriers = BARRIER_BYTES * a["shrink.stages"] if copy_warps else 0
        return max(pipeline, sums) + barriers

    new.limit("threads per shrink block", target.max_threads, threads)
    new.limit("elements left over by shrink's tiles", 0, left_over)
    new.limit("copies per thread and step", 24, copies)
    new.limit("shrink registers per thread", 232, registers)
    new.limit(
        "shrink registers per block", target.max_registers, lambda a: registers(a) * threads(a)
    )
    new.limit("shrink shared memory bytes", target.max_smem_bytes, smem)
    new.limit("pipeline stages without a step", 0, lambda a: max(a["shrink.stages"] - steps(a), 0))
    new.estimate("shrink.threads", threads)
    new.estimate("shrink.registers", registers)
    new.estimate("shrink.steps", steps)
    new.estimate("shrink.smem_bytes", smem)
    new.estimate("shrink.blocks_per_tile", lambda a: a[SPLIT_K.name] * a.get(RANK_BLOCKS.name, 1))
    new.estimate(
        "shrink.bytes_in_flight",
        lambda a: 2 * (a["shrink.stages"] - 1) * depth(a) * (a[TILE_ROWS.name] + ranks_of(a)),
    )
