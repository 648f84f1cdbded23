"""Kernels whose tile is an intrinsic: TVM's schedule says how large everything is, CUDA of our own
does it.

A trace that tensorizes `accumulate` with register_update and `shrink_rf` with pipelined_product
or warpgroup_product chooses two kernels; one with cluster_update and warpgroup_product, whose
shrink is placed inside accumulate's tile, chooses one that does both. The steps are applied to the
program like any others, so TVM has checked that stages are placed where they can be and regions are
what the intrinsics want; the intrinsics then read their numbers off the loops. Pragmas that only
they know: block_order and streaming (of accumulate), load_ahead (of accumulate and gather_b),
cluster, cluster_blocks, rank_blocks, l2_fetch, engine, sums_apart and l2_hints (of shrink_rf), and
those of batches of few rows: workers (of accumulate) and tile_blocks (of shrink_rf).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from dop.errors import TraceError
from dop.lowering.apply import Application
from dop.lowering.cuda_launch import HELPERS, WAIT, loads_in_place, release_first, wait_first
from dop.lowering.intrinsics import device_helpers, few_rows
from dop.lowering.intrinsics.engine_shrink import EngineShrink
from dop.lowering.intrinsics.fused_engine import DEPTH, FusedEngine
from dop.lowering.intrinsics.pipelined_shrink import PipelinedShrink
from dop.lowering.intrinsics.register_expand import RegisterExpand
from dop.space.early import EARLY

NAMES = ("main_kernel", "main_kernel_1")
INCLUDES = {"bfloat16": "#include <cuda_bf16.h>\n", "float16": "#include <cuda_fp16.h>\n"}
FRESH_TABLE = """\
__device__ __forceinline__ int dop_fresh_table(const int* at) {
  int value;
  asm volatile("ld.global.b32 %0, [%1];" : "=r"(value) : "l"(at) : "memory");
  return value;
}
"""
"""Reads a table behind a wait, when the kernel before may have written it."""
EARLY_TABLE = FRESH_TABLE.replace("fresh", "early").replace("ld.global.b32", "ld.global.cg.b32")
"""Reads a table in front of a wait: past the L1 cache, which may hold what it was before."""
FEW_ROWS = 32
EARLY_LOADS = {
    "const uint4 value = __ldg(static_cast<const uint4*>(at));": (
        'uint4 value;\n  asm volatile("ld.global.v4.u32 {%0,%1,%2,%3}, [%4];"\n'
        '               : "=r"(value.x), "=r"(value.y), "=r"(value.z), "=r"(value.w) : "l"(at));'
    ),
    "const uint2 value = __ldg(static_cast<const uint2*>(at));": (
        'uint2 value;\n  asm volatile("ld.global.v2.u32 {%0,%1}, [%2];"\n'
        '               : "=r"(value.x), "=r"(value.y) : "l"(at));'
    ),
}
"""B's loads of a dependent expand kernel: as loads of constants they would move behind the wait,
which costs a trip to memory where a tile has few rows (decode)."""


class TileKernel(Protocol):
    """A kernel's intrinsic."""

    @property
    def grid(self) -> tuple[str, str, str]: ...
    @property
    def block(self) -> tuple[int, int, int]: ...
    @property
    def smem_bytes(self) -> int: ...


@dataclass(frozen=True)
class Placed:
    """A kernel, how it follows the one before it in the stream.

    Attributes:
        dependent, early: as `codegen.KernelLaunch` has them.
    """

    kernel: TileKernel
    dependent: bool
    early: bool = False


@dataclass(frozen=True)
class TileKernels:
    """Both kernels of a trace.

    Attributes:
        dependent: value of PR dependent_launch.
    """

    shrink: PipelinedShrink
    expand: RegisterExpand
    dependent: int

    @property
    def kernels(self) -> tuple[Placed, ...]:
        """In the order of their launches."""
        first = Placed(self.shrink, self.dependent == 2, self.dependent == EARLY)
        return first, Placed(self.expand, self.dependent > 0)

    @property
    def v_elements(self) -> str:
        """Elements of the workspace v."""
        return self.shrink.v_elements

    @property
    def source(self) -> str:
        """CUDA C++ of both."""
        shrink, expand = self.shrink.source(NAMES[0]), self.expand.source(NAMES[1])
        helpers = device_helpers.HELPERS
        few = self.expand.tile_rows <= FEW_ROWS or self.expand.workers
        if self.dependent and few:
            for constant, plain in EARLY_LOADS.items():
                helpers = helpers.replace(constant, plain)
        if self.expand.workers:
            helpers += few_rows.LANE_HELPERS
        if self.dependent == 2:
            # No load through the read-only path may pass the wait.
            shrink = wait_first(shrink).replace(" dop_table(", " dop_fresh_table(")
        if self.dependent == EARLY:
            shrink = shrink.replace(" __restrict__", "").replace(" dop_table(", " dop_early_table(")
        if self.dependent > 1:
            expand = release_first(expand)
        return (
            INCLUDES[self.shrink.workload.dtype]
            + helpers
            + device_helpers.CLUSTER_HELPERS
            + (device_helpers.AHEAD_COPY if self.shrink.l2_fetch else "")
            + (device_helpers.ENGINE_HELPERS if isinstance(self.shrink, EngineShrink) else "")
            + (HELPERS if self.dependent > 1 else "")
            + {2: FRESH_TABLE, EARLY: EARLY_TABLE}.get(self.dependent, "")
            + shrink
            + expand
        )


@dataclass(frozen=True)
class FusedTile:
    """The kernel of a trace that has one for both halves.

    Attributes:
        dependent: value of PR dependent_launch.
    """

    fused: FusedEngine
    dependent: int

    @property
    def kernels(self) -> tuple[Placed, ...]:
        """The one."""
        return (Placed(self.fused, self.dependent == 2),)

    @property
    def v_elements(self) -> str:
        """v is no workspace."""
        return ""

    @property
    def source(self) -> str:
        """CUDA C++."""
        kernel = self.fused.source(NAMES[0], WAIT if self.dependent else "")
        return (
            INCLUDES[self.fused.workload.dtype]
            + device_helpers.HELPERS
            + device_helpers.CLUSTER_HELPERS
            + device_helpers.ENGINE_HELPERS
            + device_helpers.FUSED_HELPERS
            + (HELPERS if self.dependent else "")
            + (loads_in_place(kernel) if self.dependent else kernel)
        )


def read_tiles(app: Application) -> TileKernels | FusedTile:
    """The intrinsics' numbers.

    Raises:
        TraceError: only one of the two is there, or the loops around one are not as it wants.
    """
    if "cluster_update" in app.tiles:
        return _read_fused(app)
    product = "warpgroup_product" if "warpgroup_product" in app.tiles else "pipelined_product"
    if set(app.tiles) != {"register_update", product}:
        raise TraceError(f"{', '.join(app.tiles)} wants the other half's intrinsic beside it.")
    workload, rows, hints = app.program.workload, app.program.tile_rows, app.hints
    _, part, _, row_warps, rank_warps, _, k_tiles, *tiles = _loops(app, product, 12)
    workers = hints.get(("accumulate", "workers"), 0)
    cluster = hints.get(("shrink_rf", "cluster_blocks"), part)
    rank_blocks = hints.get(("shrink_rf", "rank_blocks"), 1)
    tile_blocks = hints.get(("shrink_rf", "tile_blocks"), 0)
    if min(workers, cluster - 1, rank_blocks - 1) < 0 or part % cluster or rank_warps % rank_blocks:
        raise TraceError(f"clusters of {cluster}, {rank_blocks} blocks of ranks do not fit.")
    engine = hints.get(("shrink_rf", "engine"), 0)
    shrink = (EngineShrink if engine else PipelinedShrink)(
        workload,
        rows,
        split_k=part,
        depth=16 * k_tiles,
        stages=hints.get(("shrink_rf", "pipeline_depth"), 2),
        row_warps=row_warps,
        rank_warps=rank_warps // rank_blocks,
        warpgroups=product == "warpgroup_product",
        cluster=cluster,
        rank_blocks=rank_blocks,
        workers=workers,
        tile_blocks=tile_blocks,
        early=app.dependent_launch == EARLY,
        l2_fetch=hints.get(("shrink_rf", "l2_fetch"), 0),
    )
    if shrink.l2_fetch not in (0, 256):
        raise TraceError("l2_fetch is 0 or 256.")
    if engine and (workers or shrink.parts > 1 or shrink.l2_fetch or not shrink.warpgroups):
        raise TraceError("engine wants warpgroup_product and one cluster a tile of many rows.")
    if tile_blocks < 0 or (tile_blocks and not workers):
        raise TraceError("tile_blocks wants workers, whose blocks go on to later tiles.")
    if shrink.early and not workers:
        raise TraceError("dependent_launch 3 wants workers: else A comes step by step with x.")
    if shrink.warpgroups and (tiles[0] != 1 or rows % 64 or k_tiles != 4):
        raise TraceError("warpgroup_product wants a warp per 16 rows and steps of 64 elements.")
    if tiles[0] * row_warps * 16 != rows or tiles[1] * rank_warps * 16 != shrink.ranks:
        raise TraceError(f"warps of {product} leave rows or ranks over.")
    _, blocks, row_warps, column_warps, steps, row_tiles, *edge = _loops(app, "register_update", 8)
    expand = RegisterExpand(
        workload,
        rows,
        row_warps=row_warps,
        column_warps=column_warps,
        row_tiles=row_tiles,
        steps=steps,
        ahead=hints.get(("accumulate", "load_ahead"), 1),
        b_ahead=hints.get(("gather_b", "load_ahead"), 0),
        tiles_first=not hints.get(("accumulate", "block_order"), 0),
        streaming=bool(hints.get(("accumulate", "streaming"), 0)),
        shared_b="gather_b_in" in app.stages.names,
        parts=shrink.parts,
        workers=workers,
    )
    whole = blocks == expand.blocks and row_warps * row_tiles * 16 == rows and edge == [16, 32]
    if not whole or any(width % expand.columns for width in workload.out_features):
        raise TraceError("warps of register_update leave rows or columns over.")
    return TileKernels(shrink, expand, app.dependent_launch)


def _read_fused(app: Application) -> FusedTile:
    """The numbers of the kernel that does both halves."""
    if set(app.tiles) != {"cluster_update", "warpgroup_product"}:
        raise TraceError("cluster_update wants warpgroup_product beside it.")
    workload, rows, hints = app.program.workload, app.program.tile_rows, app.hints
    _, blocks, chunks, *chunk = _loops(app, "cluster_update", 5)
    _, part, steps, *step = _loops(app, "warpgroup_product", 8)
    fused = FusedEngine(
        workload,
        rows,
        part,
        stages=hints.get(("shrink_rf", "pipeline_depth"), 2),
        apart=bool(hints.get(("shrink_rf", "sums_apart"), 0)),
        hints=bool(hints.get(("shrink_rf", "l2_hints"), 0)),
    )
    if fused.problem:
        raise TraceError(f"cluster_update: {fused.problem}.")
    if not hints.get(("shrink_rf", "engine"), 0) or app.dependent_launch not in (0, 2):
        raise TraceError("cluster_update wants engine, and dependent_launch 0 or 2.")
    whole = blocks == part and chunks == sum(fused.chunks) and chunk == [rows, DEPTH]
    if not whole or (steps, step) != (
        fused.steps,
        [workload.slices, 1, rows, app.program.rank, DEPTH],
    ):
        raise TraceError("blocks of cluster_update leave rows, ranks or columns over.")
    return FusedTile(fused, app.dependent_launch)


def _loops(app: Application, tile: str, count: int) -> tuple[int, ...]:
    extents = app.tiles[tile]
    if len(extents) != count:
        raise TraceError(f"{tile} wants {count} loops around it, not {len(extents)}.")
    return extents
