"""CUDA, tensor cores, one kernel for tiles of many rows: v never leaves the chip (sm_90a).

A cluster of blocks does one tile and one slice: each block computes shrink over its part of k, all
of them exchange their sums, and each does expand for its part of the columns, in chunks of 64. The
copy engine brings all of x, A, B and y through one ring (lowering/intrinsics/fused_engine.py).

As a schedule: v of a tile is computed inside accumulate's loop over tiles (CA instead of CR), in
front of the loop over blocks, so it belongs to the cluster; shrink's parts of k and accumulate's
parts of the columns are both blocks along y. The slices of a tile, which the stages loop over, are
clusters of their own in the grid. TVM checks that stages can be placed so; the kernel is the
intrinsic's text, which reads its numbers off the loops (lowering/tile_kernels.py).

Ranks are computed in groups of 64: a stack of another rank is treated as one of the next multiple,
whose missing ranks the copy engine fills with zeros and nobody reads from memory. Where more than
half of them are missing there is no such kernel: it gained 5 % at most, for one layer in one batch,
and lost up to 70 % (docs/performance.md, 51).

Clusters that run at once are the GPU's affair: an H100 holds seven of 16 blocks, 15 of eight, 30
of four. Tiles of 80 rows treat 512 rows of one adapter in one round of clusters of 16, and 2,048
in one of clusters of four, where tiles of 64 or 128 take two.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from dop.space.rule import SketchState
from dop.space.rules.launches import dependent_launch
from dop.space.rules.numbers import ceil_div, dividing, round_up
from dop.space.rules.tensor_core_expand import INTRINSIC_TYPES, TILE_ROWS
from dop.space.sketch import Annotation
from dop.space.stages import TOKEN_AXIS
from dop.space.step import Param

DEPTH = 64
"""Elements of k of a step, columns of a chunk, and ranks of a group."""

MAX_RANK = 256
WARPGROUPS, COPY_WARPS = 2, 4
"""That multiply; that ask the copy engine or gather rows."""

BARRIER_BYTES, OTHER_BARRIERS = 24, 176
"""Shared memory for the barriers of a stage, and for the others."""

UNIT = 8
"""Ranks that go to one block of a cluster are a multiple of it, and so are those of a stack."""

LEAST_STEPS = 3
"""What the sums of tiles of 128 rows take the place of."""

CLUSTER, STAGES = Param("shrink.split_k"), Param("shrink.stages")
APART, HINTS = Param("shrink.sums_apart"), Param("shrink.l2_hints")
SPARE_REGISTERS = 56
"""Of a thread, beside its sums."""

BLOCK, CHUNK = 1, 2
"""Loop positions in accumulate: tile, block of the cluster, chunk of columns, row, column."""
PART, STEP = 1, 2
"""Loop positions in shrink_rf: tile, block of the cluster, step, slice, tile, row, rank, k."""


@dataclass(frozen=True)
class FusedTiles:
    """tokens: tiles of rows of one segment, for a kernel that does all of add_lora."""

    name: str = "fused_tiles"
    stage: str = "tokens"

    def apply(self, state: SketchState) -> list[SketchState]:
        w = state.workload
        clusters = clusters_of(state)
        fits = w.dtype in INTRINSIC_TYPES and w.rank % UNIT == 0 and w.rank <= MAX_RANK
        fits = fits and 2 * w.rank >= _ranks(state)
        if state.target.arch != "sm_90a" or w.beside or not fits or not clusters:
            return []
        new = state.fork(self.name)
        wide = 128 if _ranks(new) <= 128 else 32
        rows = new.param(TILE_ROWS.name, "tile", (16, 32, 48, 64, 80, 128), wide)
        source = new.split("gather_x", TOKEN_AXIS["gather_x"], [rows])
        for stage, axis in TOKEN_AXIS.items():
            if stage != "gather_x":
                new.follow_split(stage, axis, source, 1)
        new.notes["matrix"] = new.notes["fused"] = 1
        return [new]


def clusters_of(state: SketchState) -> tuple[int, ...]:
    """Blocks that a cluster may have, each with whole chunks, whole units of ranks and enough
    steps."""
    w = state.workload
    units = math.gcd(w.in_features, *w.out_features)
    if units % DEPTH:
        return ()
    found = dividing(units // DEPTH, (1, 2, 4, 8, 16))
    found = tuple(n for n in found if _ranks(state) % (UNIT * n) == 0)
    return tuple(n for n in found if w.in_features // (DEPTH * n) >= LEAST_STEPS)


def _ranks(state: SketchState) -> int:
    """Ranks that are computed: whole groups."""
    return round_up(state.workload.rank, DEPTH)


@dataclass(frozen=True)
class FusedColumns:
    """accumulate: a block's part of the columns, 64 at a time; y comes and goes by the engine."""

    name: str = "cluster_columns"
    stage: str = "accumulate"

    def apply(self, state: SketchState) -> list[SketchState]:
        if "fused" not in state.notes:
            return []
        new = state.fork(self.name)
        new.param(CLUSTER.name, "split_k", clusters_of(new), 8)
        new.split("accumulate", 2, [CLUSTER], new.workload.total_out, inner=False)
        new.split("accumulate", 3, [DEPTH])
        # t, row, block, chunk, column
        new.reorder("accumulate", 0, 2, 3, 1, 4)
        new.annotate("accumulate", 0, "blockIdx.x")
        new.annotate("accumulate", BLOCK, "blockIdx.y")
        new.cache_read("accumulate", "shared.dyn", "accumulate")
        new.compute_at("accumulate_in", "accumulate", CHUNK)
        dependent_launch(new, (0, 2), kernels=1)
        return [new]


@dataclass(frozen=True)
class FusedProduct:
    """expand: a chunk's products, whose sums are registers."""

    name: str = "chunk_product"
    stage: str = "expand"

    def apply(self, state: SketchState) -> list[SketchState]:
        if "fused" not in state.notes:
            return []
        new = state.fork(self.name)
        new.cache_read("expand", "local", "accumulate")
        new.compute_at("expand", "accumulate", CHUNK)
        return [new]


@dataclass(frozen=True)
class FusedB:
    """gather_b: a chunk's rows of B through the ring."""

    name: str = "engine_b"
    stage: str = "gather_b"

    def apply(self, state: SketchState) -> list[SketchState]:
        if "fused" not in state.notes:
            return []
        new = state.fork(self.name)
        new.cache_read("gather_b", "shared.dyn", "expand")
        new.compute_at("gather_b", "accumulate", CHUNK)
        kind = INTRINSIC_TYPES[new.workload.dtype]
        new.annotate("accumulate", CHUNK, "tensorize", f"cluster_update_{kind}")
        return [new]


@dataclass(frozen=True)
class FusedShrink:
    """shrink: in the cluster of the tile; parts of k are summed within it."""

    name: str = "cluster_v"
    stage: str = "shrink"

    def apply(self, state: SketchState) -> list[SketchState]:
        if "fused" not in state.notes:
            return []
        new = state.fork(self.name)
        new.split("shrink", 4, [new.reopen(CLUSTER.name)], new.workload.in_features, inner=False)
        new.rfactor("shrink", 4)
        new.cache_read("shrink_rf", "shared.dyn", "shrink")
        new.cache_read("shrink", "shared.dyn", "expand")
        new.cache_read("shrink", "shared.dyn", "expand")
        new.compute_at("shrink_in", "accumulate", BLOCK)
        new.compute_at("shrink", "accumulate", 0)
        new.compute_at("shrink_rf", "accumulate", 0)
        # t; own loops part, s, t, i, r, k
        new.split("shrink_rf", 6, [DEPTH])
        new.reorder("shrink_rf", 0, 1, 6, 2, 3, 4, 5, 7)
        new.annotate("shrink_rf", PART, "blockIdx.y")
        new.pragma("shrink_rf", PART, "cluster")
        new.pragma("shrink_rf", PART, "engine", 1)
        new.param(APART.name, "pipeline", (0, 1), 0)
        new.pragma("shrink_rf", PART, "sums_apart", APART)
        new.param(HINTS.name, "pipeline", (0, 1), 0)
        new.pragma("shrink_rf", PART, "l2_hints", HINTS)
        return [new]


@dataclass(frozen=True)
class FusedA:
    """gather_a: A's rows of a slice through the ring."""

    name: str = "engine_a"
    stage: str = "gather_a"

    def apply(self, state: SketchState) -> list[SketchState]:
        if "fused" not in state.notes:
            return []
        new = state.fork(self.name)
        new.cache_read("gather_a", "shared.dyn", "shrink_rf")
        new.compute_at("gather_a", "shrink_rf", STEP)
        return [new]


@dataclass(frozen=True)
class FusedX:
    """gather_x: the tile's rows of x through the ring."""

    name: str = "engine_x"
    stage: str = "gather_x"

    def apply(self, state: SketchState) -> list[SketchState]:
        if "fused" not in state.notes:
            return []
        new = state.fork(self.name)
        new.cache_read("gather_x", "shared.dyn", "shrink_rf")
        new.compute_at("gather_x", "shrink_rf", STEP)
        new.param(STAGES.name, "pipeline", (2, 3, 4, 5, 6, 8, 10), 4)
        new.pragma("shrink_rf", STEP, "pipeline_depth", STAGES)
        kind = INTRINSIC_TYPES[new.workload.dtype]
        new.annotate("shrink_rf", STEP, "tensorize", f"warpgroup_product_{kind}")
        _limits(new)
        return [new]


def _limits(new: SketchState) -> None:
    w, target, ranks = new.workload, new.target, _ranks(new)
    rank_groups = math.gcd(ranks // DEPTH, WARPGROUPS)
    threads = 32 * (4 * WARPGROUPS + COPY_WARPS)

    def stage_bytes(a: Annotation) -> int:
        return 2 * DEPTH * (a[TILE_ROWS.name] + ranks)

    def steps(a: Annotation) -> int:
        return w.in_features // (DEPTH * a[CLUSTER.name])

    def chunks(a: Annotation) -> int:
        return max(w.out_features) // (DEPTH * a[CLUSTER.name])

    def sums_bytes(a: Annotation) -> int:
        return 4 * a[TILE_ROWS.name] * ranks

    def overlay(a: Annotation) -> int:
        return 0 if a[APART.name] else ceil_div(sums_bytes(a), stage_bytes(a))

    def smem(a: Annotation) -> int:
        ring = a[STAGES.name] * (stage_bytes(a) + BARRIER_BYTES)
        v = 2 * a[TILE_ROWS.name] * ranks
        return ring + a[APART.name] * sums_bytes(a) + v + OTHER_BARRIERS

    def registers(a: Annotation) -> int:
        rows = a[TILE_ROWS.name]
        shrink = ranks // (DEPTH * rank_groups) * (rows * rank_groups // WARPGROUPS)
        return max(shrink, rows) // 2 + SPARE_REGISTERS

    def lacking(a: Annotation) -> int:
        """Steps or stages that the place of the sums takes and that are not there."""
        return max(overlay(a) - steps(a), overlay(a) + 1 - a[STAGES.name], 0)

    new.limit("fused shared memory bytes", target.max_smem_bytes, smem)
    new.limit("fused registers per thread", target.max_registers // threads, registers)
    new.limit("stages or steps that the sums lack", 0, lacking)
    new.limit(
        "pipeline stages without a step",
        0,
        lambda a: max(a[STAGES.name] - steps(a) - chunks(a), 0),
    )
    new.estimate("expand.threads", lambda a: threads)
    new.estimate("expand.registers", registers)
    new.estimate("expand.smem_bytes", smem)
    new.estimate("shrink.steps", steps)
    new.estimate("expand.chunks", lambda a: w.total_out / (DEPTH * w.slices * a[CLUSTER.name]))
    new.estimate("expand.blocks_per_tile", lambda a: w.slices * a[CLUSTER.name])
    new.estimate("shrink.bytes_in_flight", lambda a: (a[STAGES.name] - 1) * stage_bytes(a))
