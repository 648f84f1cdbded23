"""CUDA, plain cores, one kernel: a block computes v for its tile, then its columns of y.

No workspace and one launch instead of two; every column block of a tile repeats the shrink, so it
pays where a tile's columns fit few blocks, or where launches cost more than reading A again.
"""

from __future__ import annotations

from dataclasses import dataclass

from dop.space.rule import SketchState
from dop.space.rules.cuda_shrink import LANES, groups_of
from dop.space.rules.launches import dependent_launch
from dop.space.rules.numbers import ceil_div, dividing, powers_of_two, vector_width
from dop.space.sketch import Annotation


@dataclass(frozen=True)
class BlockColumns:
    """accumulate: columns over blocks, steps, warps and lanes."""

    name: str = "block_columns"
    stage: str = "accumulate"

    def apply(self, state: SketchState) -> list[SketchState]:
        w = state.workload
        if state.target.kind != "cuda" or "matrix" in state.notes:
            return []
        new = state.fork(self.name)
        steps = new.param("expand.steps", "tile", (1, 2, 4, 8, 16, 32, 64), 8)
        # Exact shares of the ranks: see SplitKShrink.
        warps = new.param("expand.warps", "warps", dividing(w.rank, powers_of_two(1, 16)), 8)
        new.split("accumulate", 2, [steps, warps, LANES], w.total_out)
        # t, i, block, step, warp, lane -> t, block, warp, lane, step, i
        new.reorder("accumulate", 0, 2, 4, 5, 3, 1)
        new.annotate("accumulate", 0, "blockIdx.x")
        new.annotate("accumulate", 1, "blockIdx.y")
        new.annotate("accumulate", 2, "threadIdx.y")
        new.annotate("accumulate", 3, "threadIdx.x")
        new.annotate("accumulate", 5, "unroll")
        new.notes["one_kernel"] = 1
        dependent_launch(new, (0, 2), kernels=1)

        def columns(a: Annotation) -> int:
            return a["expand.steps"] * a["expand.warps"] * LANES

        new.limit("columns of a block", 2 * w.total_out + LANES, columns)
        new.estimate("expand.threads", lambda a: LANES * a["expand.warps"])
        new.estimate("expand.columns", columns)
        new.estimate("expand.blocks_per_tile", lambda a: ceil_div(w.total_out, columns(a)))
        return [new]


@dataclass(frozen=True)
class ExpandInSteps:
    """expand: registers, inside the step loop."""

    name: str = "registers"
    stage: str = "expand"

    def apply(self, state: SketchState) -> list[SketchState]:
        if state.target.kind != "cuda" or "one_kernel" not in state.notes:
            return []
        new = state.fork(self.name)
        new.cache_read("expand", "local", "accumulate")
        new.compute_at("expand", "accumulate", 4)
        # behind t, block, warp, lane, step: t, i, n, r
        for loop in (6, 7, 8):
            new.annotate("expand", loop, "unroll")
        return [new]


@dataclass(frozen=True)
class StepB:
    """gather_b: a column's row of B to registers in every step."""

    name: str = "direct_b"
    stage: str = "gather_b"

    def apply(self, state: SketchState) -> list[SketchState]:
        if state.target.kind != "cuda" or "one_kernel" not in state.notes:
            return []
        new = state.fork(self.name)
        w = new.workload
        widest = vector_width(w.rank, w.element_bytes)
        new.cache_read("gather_b", "local", "expand")
        new.compute_at("gather_b", "accumulate", 4)
        # behind t, block, warp, lane, step: t, n, r
        new.split("gather_b", 7, [widest], w.rank)
        new.annotate("gather_b", 8, "vectorize")
        new.annotate("gather_b", 7, "unroll")
        new.pragma("expand", 6, "decompose_reduction")
        new.limit("registers for B", 160, lambda a: w.rank * w.element_bytes // 4)
        return [new]


@dataclass(frozen=True)
class ShrinkInBlock:
    """shrink: computed in shared memory by the block that needs it (CA instead of CR)."""

    name: str = "one_kernel"
    stage: str = "shrink"

    def apply(self, state: SketchState) -> list[SketchState]:
        if state.target.kind != "cuda" or "one_kernel" not in state.notes:
            return []
        new = state.fork(self.name)
        w = new.workload
        load = vector_width(w.in_features, w.element_bytes)
        new.pragma("shrink", 0, "pack_k", (LANES, load))
        # s, t, i, r, group, lane, element
        new.rfactor("shrink", 5)
        new.cache_read("shrink", "shared", "expand")
        new.compute_at("shrink", "accumulate", 1)
        # behind t, block: lane, s, t, i, r -> warp, (s, t, i, r), lane
        new.fuse("shrink", 3, 4, 5, 6)
        new.split("shrink", 3, [new.reopen("expand.warps")])
        new.reorder("shrink", 0, 1, 4, 3, 2)
        new.annotate("shrink", 2, "threadIdx.y")
        new.annotate("shrink", 4, "threadIdx.x")
        new.cache_read("shrink_rf", "local", "shrink")
        new.compute_at("shrink_rf", "shrink", 3)
        # behind t, block, warp, value: lane, s, t, i, r, group, element
        groups = dividing(groups_of(new, load), (1, 2, 4, 7, 8, 16))
        new.split("shrink_rf", 9, [new.param("shrink.unroll", "unroll", groups, 4)])
        new.annotate("shrink_rf", 4, "threadIdx.x")
        new.annotate("shrink_rf", 10, "unroll")
        new.annotate("shrink_rf", 11, "unroll")
        new.notes["gather_depth"] = 9
        new.estimate("shrink.repeats", new.estimates["expand.blocks_per_tile"])
        return [new]


@dataclass(frozen=True)
class StreamA:
    """gather_a: a few loads ahead, inside the loop over groups."""

    name: str = "stream_a"
    stage: str = "gather_a"

    def apply(self, state: SketchState) -> list[SketchState]:
        if state.target.kind != "cuda" or "gather_depth" not in state.notes:
            return []
        new = state.fork(self.name)
        new.cache_read("gather_a", "local", "shrink_rf")
        new.compute_at("gather_a", "shrink_rf", new.notes["gather_depth"])
        # behind t .. outer group: s, t, r, group, lane, element
        new.annotate("gather_a", 15, "vectorize")
        new.annotate("gather_a", 13, "unroll")
        return [new]


@dataclass(frozen=True)
class StreamX:
    """gather_x: as StreamA."""

    name: str = "stream_x"
    stage: str = "gather_x"

    def apply(self, state: SketchState) -> list[SketchState]:
        if state.target.kind != "cuda" or "gather_depth" not in state.notes:
            return []
        new = state.fork(self.name)
        depth = new.notes["gather_depth"]
        new.cache_read("gather_x", "local", "shrink_rf")
        new.compute_at("gather_x", "shrink_rf", depth)
        # behind t .. outer group: t, i, group, lane, element
        new.annotate("gather_x", 14, "vectorize")
        new.annotate("gather_x", 12, "unroll")
        new.pragma("shrink_rf", depth, "decompose_reduction")
        return [new]
