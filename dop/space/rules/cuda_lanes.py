"""CUDA, plain cores, expand half: lanes share the reduction over rank.

For larger ranks a thread that owns a column reads a long row of B on its own, and neighbouring
threads' loads lie far apart. Here the lanes of a group each read one 16-byte piece of the same row,
so a warp's load is one contiguous stretch; the lanes' sums meet in a cross-thread reduction (RF),
and the group then writes its columns side by side. Source: measured, docs/performance.md.
"""

from __future__ import annotations

from dataclasses import dataclass

from dop.space.rule import SketchState
from dop.space.rules.launches import A_FIRST, dependent_launch
from dop.space.rules.numbers import ceil_div, vector_width
from dop.space.sketch import Annotation

LANE_COUNTS = (2, 4, 8, 16, 32)
LEAST_THREADS = 64
GROUP_COUNTS = (4, 8, 16, 32, 64, 128)


def lanes_of(state: SketchState) -> int:
    """Lanes that share one row of B with 16-byte loads."""
    w = state.workload
    return w.rank // vector_width(w.rank, w.element_bytes)


@dataclass(frozen=True)
class LaneColumns:
    """accumulate: a group of lanes owns as many neighbouring columns as it has lanes.

    Attributes:
        early: B and y are asked for before v is there (see EarlyLaneB).
    """

    name: str = "lanes"
    early: bool = False
    stage: str = "accumulate"

    def apply(self, state: SketchState) -> list[SketchState]:
        lanes = lanes_of(state)
        if state.target.kind != "cuda" or lanes not in LANE_COUNTS:
            return []
        if "matrix" in state.notes or state.workload.total_out % lanes:
            return []
        width = state.workload.total_out
        if not self.early and width < max(LEAST_THREADS, GROUP_COUNTS[0] * lanes):
            return []  # no block is small enough for the limit below
        new = state.fork(self.name)
        groups = new.param("expand.groups", "warps", GROUP_COUNTS, 32)
        new.notes["split_lanes"] = new.split("accumulate", 2, [lanes], new.workload.total_out)
        new.notes["split_groups"] = new.split("accumulate", 2, [groups])
        # t, i, block, group, lane -> t, block, group, lane, i
        new.reorder("accumulate", 0, 2, 3, 4, 1)
        new.annotate("accumulate", 0, "blockIdx.x")
        new.annotate("accumulate", 1, "blockIdx.y")
        new.annotate("accumulate", 2, "threadIdx.y")
        new.annotate("accumulate", 3, "threadIdx.x")
        new.annotate("accumulate", 4, "unroll")
        if self.early:
            self._early_y(new)

        def threads(a: Annotation) -> int:
            return lanes * a["expand.groups"]

        new.limit("threads per block", new.target.max_threads, threads)
        new.limit("idle threads", 0, lambda a: max(0, LEAST_THREADS - threads(a)))
        if not self.early:
            # In a block that holds all columns and more, TVM puts no condition around the loads of
            # B and the sums of threads behind the last one.
            new.limit("columns of a block", width, threads)
        new.estimate("expand.threads", threads)
        new.estimate("expand.columns", threads)
        new.estimate("expand.blocks_per_tile", lambda a: ceil_div(width, threads(a)))
        return [new]

    @staticmethod
    def _early_y(new: SketchState) -> None:
        new.cache_read("accumulate", "local", "accumulate")
        new.compute_at("accumulate_in", "accumulate", 1)
        # behind t, block: t, i, n -> t, i, group, lane
        new.follow_split("accumulate_in", 4, new.notes["split_lanes"], 1)
        new.reorder("accumulate_in", 0, 1, 4, 5, 2, 3)
        new.annotate("accumulate_in", 2, "threadIdx.y")
        new.annotate("accumulate_in", 3, "threadIdx.x")
        new.annotate("accumulate_in", 5, "unroll")
        dependent_launch(new, A_FIRST)
        new.notes["early_lanes"] = 1


@dataclass(frozen=True)
class ExpandInLanes:
    """expand: factor the rank over lanes, reduce across threads into shared memory."""

    name: str = "lane_sums"
    stage: str = "expand"

    def apply(self, state: SketchState) -> list[SketchState]:
        if state.target.kind != "cuda" or "split_lanes" not in state.notes:
            return []
        new = state.fork(self.name)
        lanes = lanes_of(new)
        # t, i, n, r -> t, i, n, lane, element
        new.split("expand", 3, [lanes], inner=False)
        new.rfactor("expand", 3)
        new.cache_read("expand", "shared", "accumulate")
        new.compute_at("expand", "accumulate", 1)
        # behind t, block: lane, t, i, n -> group, t, i, column, lane
        new.follow_split("expand", 5, new.notes["split_lanes"], 1)
        new.reorder("expand", 0, 1, 5, 3, 4, 6, 2)
        new.annotate("expand", 2, "threadIdx.y")
        new.annotate("expand", 6, "threadIdx.x")
        new.cache_read("expand_rf", "local", "expand")
        new.compute_at("expand_rf", "expand", 2)
        # behind t, block, group: lane, t, i, n, element
        new.annotate("expand_rf", 3, "threadIdx.x")
        for loop in (5, 6, 7):
            new.annotate("expand_rf", loop, "unroll")
        return [new]


@dataclass(frozen=True)
class LaneB:
    """gather_b: each lane loads its piece of every column of the group before the first use."""

    name: str = "direct_b"
    stage: str = "gather_b"

    def apply(self, state: SketchState) -> list[SketchState]:
        if state.target.kind != "cuda" or "split_lanes" not in state.notes:
            return []
        if "early_lanes" in state.notes:
            return []
        new = state.fork(self.name)
        new.cache_read("gather_b", "local", "expand_rf")
        new.compute_at("gather_b", "expand_rf", 3)
        # behind t, block, group, lane: t, n, element
        new.annotate("gather_b", 6, "vectorize")
        new.annotate("gather_b", 5, "unroll")
        new.pragma("expand_rf", 4, "decompose_reduction")
        return [new]


@dataclass(frozen=True)
class EarlyLaneB:
    """gather_b: each lane's pieces of B before anything waits for v; a stage with thread loops of
    its own in front of the sum over v's parts."""

    name: str = "early_b"
    stage: str = "gather_b"

    def apply(self, state: SketchState) -> list[SketchState]:
        if state.target.kind != "cuda" or "early_lanes" not in state.notes:
            return []
        new = state.fork(self.name)
        new.cache_read("gather_b", "local", "expand_rf")
        new.compute_at("gather_b", "accumulate", 1)
        # behind t, block: t, n, r -> t, group, column, lane, element
        new.split("gather_b", 4, [lanes_of(new)], inner=False)
        new.follow_split("gather_b", 3, new.notes["split_lanes"], 1)
        new.reorder("gather_b", 0, 1, 3, 5, 2, 4, 6)
        new.annotate("gather_b", 2, "threadIdx.y")
        new.annotate("gather_b", 3, "threadIdx.x")
        new.annotate("gather_b", 6, "vectorize")
        new.annotate("gather_b", 5, "unroll")
        new.pragma("expand_rf", 4, "decompose_reduction")
        return [new]
