"""CUDA, plain cores, shrink half: a warp's lanes share the reduction over in_features.

Block: one tile, one slice, one of the split-K parts, one group of ranks. Warps (threadIdx.y) own
ranks, lanes own 16-byte pieces of k. Split-K is an RF over blocks, the lanes' share another RF;
the partial sums go to a workspace that the expand kernel adds up.
"""

from __future__ import annotations

from dataclasses import dataclass

from dop.space.rule import SketchState
from dop.space.rules.numbers import ceil_div, dividing, vector_width
from dop.space.sketch import Annotation

LANES = 32
MAX_WRITTEN_OUT = 4096
"""Products of a thread that are unrolled: nvcc takes minutes over more."""

BLOCK, RANKS, WARP = 0, 1, 2
"""Loop positions in shrink_rf: t, (slice, part, rank block), warp, row, rank, lane."""


def groups_of(state: SketchState, load: int) -> int:
    """How many times the lanes with their loads step through k."""
    return ceil_div(state.workload.in_features, LANES * load)


@dataclass(frozen=True)
class SplitKShrink:
    """shrink: two kernels; split-K partials in a workspace, summed where expand reads them."""

    name: str = "split_k"
    stage: str = "shrink"

    def apply(self, state: SketchState) -> list[SketchState]:
        notes = state.notes
        if state.target.kind != "cuda" or not {"expand_split", "split_lanes"} & set(notes):
            return []
        new = state.fork(self.name)
        w = new.workload
        load = vector_width(w.in_features, w.element_bytes)
        steps = groups_of(new, load)
        parts = dividing(steps, range(1, 65))
        # About four steps a lane: more parts start sooner at one token, but every block of expand
        # reads all of them (measured, docs/performance.md).
        short = [n for n in parts if steps // n <= 8] or [parts[-1]]
        wanted = min(short, key=lambda n: abs(n - steps / 4))
        split_k = new.param("shrink.split_k", "split_k", parts, wanted)
        # Exact factors: TVM's cross-thread reduction writes back without the split's predicate.
        factors = dividing(w.rank, range(1, 17))
        warps = new.param("shrink.warps", "warps", factors, 4 if w.rank <= 16 else 8)
        ranks = new.param("shrink.ranks", "tile", factors, 1 if w.rank <= 16 else 2)
        new.pragma("shrink", 0, "pack_k", (LANES, load))
        # s, t, i, r, group, lane, element -> s, t, i, r, part, group, lane, element
        new.split("shrink", 4, [split_k], inner=False)
        new.rfactor("shrink", 4)
        new.rfactor("shrink_rf", 6)
        new.compute_root("shrink_rf")
        self._lane_sum(new, warps, ranks)
        self._partials(new)
        self._sum_of_parts(new)
        new.notes["load_x"] = load
        return [self._quantities(new, load)]

    @staticmethod
    def _lane_sum(new: SketchState, warps: object, ranks: object) -> None:
        """shrink_rf: s, t, i, r, part, lane -> t, (s, part, rank block), warp, i, r, lane."""
        new.split("shrink_rf", 3, [warps, ranks], new.workload.rank)  # type: ignore[list-item]
        new.reorder("shrink_rf", 1, 0, 6, 3, 4, 2, 5, 7)
        new.fuse("shrink_rf", 1, 2, 3)
        new.annotate("shrink_rf", BLOCK, "blockIdx.x")
        new.annotate("shrink_rf", RANKS, "blockIdx.y")
        new.annotate("shrink_rf", WARP, "threadIdx.y")
        new.annotate("shrink_rf", 5, "threadIdx.x")

    @staticmethod
    def _partials(new: SketchState) -> None:
        """shrink_rf_rf: each lane's own sum, in registers."""
        new.cache_read("shrink_rf_rf", "local", "shrink_rf")
        new.compute_at("shrink_rf_rf", "shrink_rf", WARP)
        # behind t, ranks, warp: lane, part, s, t, i, r, group, load
        new.annotate("shrink_rf_rf", 3, "threadIdx.x")
        for loop in range(7, 11):
            new.annotate("shrink_rf_rf", loop, "unroll")

    @staticmethod
    def _sum_of_parts(new: SketchState) -> None:
        """shrink: once per block of the expand kernel, into shared memory."""
        new.cache_read("shrink", "shared", "expand_rf" if "split_lanes" in new.notes else "expand")
        new.compute_at("shrink", "accumulate", 1)
        # behind t, column block: part, s, t, i, r
        new.reorder("shrink", 0, 1, 3, 4, 5, 6, 2)
        new.fuse("shrink", 2, 3, 4, 5)
        if "split_lanes" in new.notes:
            groups, lanes = new.notes["split_groups"], new.notes["split_lanes"]
            new.follow_fused_split("shrink", 2, [groups, lanes])
            new.follow_split("shrink", 3, lanes, 1)
            new.annotate("shrink", 3, "threadIdx.y")
            new.annotate("shrink", 4, "threadIdx.x")
            new.annotate("shrink", 5, "unroll")
        else:
            level = new.notes["thread_level"]
            new.follow_fused_split("shrink", 2, [new.notes["expand_split"]], level)
            new.annotate("shrink", 3, "threadIdx.x")
            new.annotate("shrink", 4, "unroll")

    @staticmethod
    def _quantities(new: SketchState, load: int) -> SketchState:
        w = new.workload

        def threads(a: Annotation) -> int:
            return LANES * a["shrink.warps"]

        def rank_blocks(a: Annotation) -> int:
            return ceil_div(w.rank, a["shrink.warps"] * a["shrink.ranks"])

        def ranks(a: Annotation) -> int:
            return rank_blocks(a) * a["shrink.warps"] * a["shrink.ranks"]

        def groups(a: Annotation) -> int:
            return groups_of(new, load) // a["shrink.split_k"]

        def registers(a: Annotation) -> int:
            rows = a.get("tokens.tile_rows", 1)
            held = (a["shrink.ranks"] + rows) * groups(a) * load * w.element_bytes // 4
            return held + rows * a["shrink.ranks"]

        new.limit("threads per block", new.target.max_threads, threads)

        def products(a: Annotation) -> int:
            return a.get("tokens.tile_rows", 1) * a["shrink.ranks"] * groups(a) * load

        new.limit("registers per thread", 220, registers)
        new.limit("products written out by shrink", MAX_WRITTEN_OUT, products)
        new.limit("ranks beyond the last", w.rank, ranks)
        new.estimate("shrink.threads", threads)
        new.estimate("shrink.registers", registers)
        new.estimate("shrink.groups", groups)
        new.estimate(
            "shrink.blocks_per_tile", lambda a: w.slices * a["shrink.split_k"] * rank_blocks(a)
        )
        return new


@dataclass(frozen=True)
class DirectA:
    """gather_a: a lane's pieces of A straight to registers, all loads before the first use."""

    name: str = "direct_a"
    stage: str = "gather_a"

    def apply(self, state: SketchState) -> list[SketchState]:
        if state.target.kind != "cuda" or "load_x" not in state.notes:
            return []
        new = state.fork(self.name)
        new.cache_read("gather_a", "local", "shrink_rf_rf")
        new.compute_at("gather_a", "shrink_rf_rf", 3)
        # behind t, ranks, warp, lane: s, t, r, group, lane, element
        new.annotate("gather_a", 9, "vectorize")
        new.annotate("gather_a", 7, "unroll")
        new.annotate("gather_a", 6, "unroll")
        return [new]


@dataclass(frozen=True)
class DirectX:
    """gather_x: as DirectA for the rows of x."""

    name: str = "direct_x"
    stage: str = "gather_x"

    def apply(self, state: SketchState) -> list[SketchState]:
        if state.target.kind != "cuda" or "load_x" not in state.notes:
            return []
        new = state.fork(self.name)
        new.cache_read("gather_x", "local", "shrink_rf_rf")
        new.compute_at("gather_x", "shrink_rf_rf", 3)
        # behind t, ranks, warp, lane: t, i, group, lane, element
        new.annotate("gather_x", 8, "vectorize")
        new.annotate("gather_x", 6, "unroll")
        new.annotate("gather_x", 5, "unroll")
        new.pragma("shrink_rf_rf", 4, "decompose_reduction")
        return [new]
