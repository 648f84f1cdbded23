"""Block-level intrinsic: a whole add_lora of tiles of many rows in one kernel (sm_90a).

A cluster of blocks does one tile and one slice. Each block computes shrink over its part of k and
sends its sums, as they lie in registers, to the block of the cluster that adds up those ranks
(st.async into distributed shared memory, 8 or 16 ranks at a time); that block sends what it has
made of v to all others. Each then has the tile's v in its shared memory, and does expand for its
part of the slice's columns, 64 at a time. The copy engine (TMA) brings everything through one ring
of stages: x and A for a step of shrink, B and y's old values for a chunk of columns, which have as
many bytes; so B and y are on their way while v is being made. The sums have a place of their own,
or that of the ring's first `overlay` stages, which shrink's last steps leave.

wgmma has ranks (shrink) or columns (expand) as its 64 rows and tokens as its columns: a tile may
have any multiple of 8 or 16 rows. A warpgroup takes some of the 64-rank groups and some of the
tokens in shrink, and the chunks of every other stage in expand.

Three things are as they are for compute-sanitizer 2025.3 (docs/performance.md, 52). Under it the
cluster's barrier lets nobody on before every warp stands at it: so no warp waits for another one
between the barrier's two halves, and it is used once; that a block's ranks of v have come its peers
say by 8 bytes each. Racecheck sees order between two threads only where one itself arrives at the
mbarrier that the other waits at: before `cp.async` writes where y or sums were read, every thread
that read arrives. And a cluster of one block sends nothing to itself.

How fast the engine is asked decides how much is on its way: one warp asks for weights and another
for rows, each by a lane of which the compiler knows that it is one (`elect`); else it writes a loop
over lanes around each request. Rows of a box lie one behind the other. In a tile whose rows do not
(`straight` is false) all four warps that copy gather those of x and y by 16 bytes. y is written by
rows in any case, and never beyond the tile's: 128 bytes of each, which is faster than the engine's
way with a fence in front of it. What an adapter of less than the stack's rank has beyond its rank
may be anything: such ranks of v are set to zero, and so are B's in shared memory. A stack's rank
may be any multiple of 8: boxes hold whole groups of 64, and the engine fills them up with zeros.

The maps that the kernel takes: dop/measure/tensor_map.py.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from dop.lowering.intrinsics.engine_shrink import COPY_WARPS, MAX_BOX_ROWS
from dop.workload import Workload

WARPGROUP = 128
"""Threads of a warpgroup."""
DEPTH = 64
"""Elements of k of a step, columns of a chunk, and ranks of a group: 128 bytes."""
ROW_BYTES = 2 * DEPTH
MAX_RANK = MAX_ROWS = MAX_BOX_ROWS
"""Rows of a box, and columns of wgmma."""
RANK_UNIT = 8
"""Ranks of 16 bytes: rows of B are a multiple of it apart in a tensor map."""
MAX_CLUSTER = 16
BARRIERS, STAGE_BARRIERS = 48 + 8 * MAX_CLUSTER, 24
"""Bytes of the barriers that no stage has, with what peers write, and of those that each has."""


@dataclass(frozen=True)
class FusedEngine:
    """Numbers of the intrinsic.

    Attributes:
        tile_rows: rows of a tile: a multiple of 8, of 16 where warpgroups share them in shrink.
        cluster: blocks of a cluster; parts of k and of a slice's columns.
        stages: steps or chunks in flight.
        apart: the sums do not wait for the stages whose place they would take.
        hints: L2 is told to keep A and to forget x and y.
        warpgroups: that multiply.
    """

    workload: Workload
    tile_rows: int
    cluster: int
    stages: int
    apart: bool = False
    hints: bool = False
    warpgroups: int = 2

    @property
    def ranks(self) -> int:
        """Ranks that are computed: whole groups of 64. The engine fills up with zeros."""
        return -(-self.workload.rank // DEPTH) * DEPTH

    @property
    def rank_groups(self) -> int:
        """Warpgroups along the ranks in shrink; the others are along the tokens."""
        return math.gcd(self.ranks // DEPTH, self.warpgroups)

    @property
    def group_ranks(self) -> int:
        """Groups of 64 ranks of a warpgroup in shrink."""
        return self.ranks // (DEPTH * self.rank_groups)

    @property
    def shrink_rows(self) -> int:
        """Tokens of a warpgroup in shrink."""
        return self.tile_rows * self.rank_groups // self.warpgroups

    @property
    def share(self) -> int:
        """Ranks that a block adds up."""
        return self.ranks // self.cluster

    @property
    def unit(self) -> int:
        """Ranks that are sent at a time."""
        return 16 if self.share % 16 == 0 else 8

    @property
    def steps(self) -> int:
        """Steps of a block along k."""
        return self.workload.in_features // (DEPTH * self.cluster)

    @property
    def chunks(self) -> tuple[int, ...]:
        """Chunks of 64 columns of a block, for each slice."""
        return tuple(n // (DEPTH * self.cluster) for n in self.workload.out_features)

    @property
    def stage_bytes(self) -> int:
        """Bytes of a stage."""
        return ROW_BYTES * (self.tile_rows + self.ranks)

    @property
    def overlay(self) -> int:
        """Stages whose place the sums take."""
        return 0 if self.apart else -(-self._sums_bytes // self.stage_bytes)

    @property
    def _sums_bytes(self) -> int:
        return 4 * self.tile_rows * self.ranks

    @property
    def threads(self) -> int:
        """Threads of a block."""
        return WARPGROUP * self.warpgroups + 32 * COPY_WARPS

    @property
    def tile_blocks(self) -> int:
        """Blocks of a tile."""
        return self.workload.slices * self.cluster

    @property
    def grid(self) -> tuple[str, str, str]:
        """Blocks."""
        return (f"tiles * {self.tile_blocks}", "1", "1")

    @property
    def block(self) -> tuple[int, int, int]:
        """Threads."""
        return (32, 1, self.threads // 32)

    @property
    def _v_at(self) -> int:
        return self.stages * self.stage_bytes + (self._sums_bytes if self.apart else 0)

    @property
    def _barriers_at(self) -> int:
        return self._v_at + 2 * self.tile_rows * self.ranks

    @property
    def smem_bytes(self) -> int:
        """Dynamic shared memory: the ring, v, and barriers."""
        return self._barriers_at + STAGE_BARRIERS * self.stages + BARRIERS

    @property
    def problem(self) -> str:
        """Why there is no such kernel; empty if there is."""
        w, unit = self.workload, DEPTH * self.cluster
        if w.rank % RANK_UNIT or w.rank > MAX_RANK:
            return f"rank {w.rank}"
        if any(n % unit for n in (w.in_features, *w.out_features)):
            return "columns left over by the cluster"
        if self.tile_rows % 8 or self.shrink_rows % 8 or self.tile_rows > MAX_ROWS:
            return "rows left over by the warpgroups"
        if self.share % 8:
            return "ranks left over by the cluster"
        if self.steps < self.overlay or self.stages <= self.overlay:
            return "sums that no steps leave room for"
        return ""

    def source(self, name: str, wait: str) -> str:
        """The kernel (its helpers: device_helpers.py).

        Args:
            wait: what lets it wait for its predecessor; empty if it is launched plainly.
        """
        text = _KERNEL
        for key, value in {**self._values(), "NAME": name, "WAIT": wait}.items():
            text = text.replace(f"@{key}@", str(value))
        return text

    @property
    def maps(self) -> tuple[str, ...]:
        """Names of the tensor maps."""
        slices = ["", *map(str, range(1, self.workload.slices))]
        a = (f"a{s}_box{self.ranks}" for s in slices)
        b = (f"b{s}_box{DEPTH}" for s in slices)
        return (f"x_box{self.tile_rows}", *a, *b, f"y_box{self.tile_rows}")

    def _values(self) -> dict[str, str | int]:
        """What stands for the names in the text."""
        w, maps = self.workload, self.maps
        kind = {"bfloat16": "bf16", "float16": "f16"}[w.dtype]
        return {
            "BRING_X": _bring_rows(maps[0], "k", "x_ptr", w.in_features),
            "BRING_Y": _bring_rows(maps[-1], "offset + column", "y_ptr", w.total_out),
            "SHRINK": _wgmma("DOP_SHRINK", self.shrink_rows, kind),
            "EXPAND": _wgmma("DOP_EXPAND", self.tile_rows, kind),
            "MAPS": ",\n    ".join(f"const __grid_constant__ dop_tensor_map {m}" for m in maps),
            "FETCH_MAPS": "".join(f"    dop_prefetch_map({m});\n" for m in maps),
            "A_MAP": _of_slice(maps[1 : 1 + w.slices]),
            "B_MAP": _of_slice(maps[1 + w.slices : -1]),
            "CHUNKS": _of_slice(self.chunks),
            "OFFSET": _of_slice(w.offsets),
            "TYPE": {"bfloat16": "__nv_bfloat16", "float16": "__half"}[w.dtype],
            "KIND": kind,
            "CLUSTER": self.cluster,
            "SLICES": w.slices,
            "THREADS": self.threads,
            "MULTIPLYING": WARPGROUP * self.warpgroups,
            "GROUPS": self.warpgroups,
            "COPYING": 32 * COPY_WARPS,
            "STAGES": self.stages,
            "STAGE_BYTES": self.stage_bytes,
            "X_BYTES": ROW_BYTES * self.tile_rows,
            "V_AT": self._v_at,
            "BARRIERS_AT": self._barriers_at,
            "TM": self.tile_rows,
            "R": self.ranks,
            "RANK": w.rank,
            "N": w.total_out,
            "STEPS": self.steps,
            "FIRST": min(self.steps, self.stages),
            "OVERLAY": self.overlay,
            "SHIFT": (self.overlay - self.steps) % self.stages,
            "SUMS_AT": self.stages * self.stage_bytes if self.apart else 0,
            "SHARE": self.share,
            "UNIT": self.unit,
            "SUBS": self.share // self.unit,
            "FILLED": -(-w.rank // self.unit),
            "USED": -(-w.rank // 16) * 16,
            "RANK_GROUPS": self.rank_groups,
            "MI": self.group_ranks,
            "SHRINK_ROWS": self.shrink_rows,
            "ROW_COPIES": -(-self.tile_rows // (4 * COPY_WARPS)),
            "KEPT": "_kept" if self.hints else "",
            "ONCE": "_once" if self.hints else "",
        }


def _of_slice(values: tuple[object, ...]) -> str:
    """A choice by `slice`."""
    text = str(values[0])
    for s in range(1, len(values)):
        text = f"slice == {s} ? {values[s]} : {text}"
    return text


def _bring_rows(tensor_map: str, column: str, tensor: str, width: int) -> str:
    """What brings 64 columns of the tile's rows to a stage: those of a tensor from a column on."""
    named = {"MAP": tensor_map, "COLUMN": column, "TENSOR": tensor, "WIDTH": width}
    text = _BRING_ROWS
    for key, value in named.items():
        text = text.replace(f"@{key}@", str(value))
    return text


def _wgmma(name: str, columns: int, kind: str) -> str:
    """wgmma of 64 rows, 16 of k and so many columns, as a macro of its sums and two descriptors."""
    count = columns // 2
    registers = ", ".join(f"%{n}" for n in range(count))
    sums = ", ".join(f'"+f"(sum[{n // 4}][{n % 4}])' for n in range(count))
    return (
        f"#ifdef __CUDA_ARCH_FEAT_SM90_ALL\n#define {name}(sum, rows_at, columns_at) "
        f'asm volatile("wgmma.mma_async.sync.aligned.m64n{columns}k16.f32.{kind}.{kind} '
        f'{{{registers}}}, %{count}, %{count + 1}, 1, 1, 1, 0, 0;" '
        f': {sums} : "l"(rows_at), "l"(columns_at) : "memory")'
        f"\n#else\n#define {name}(sum, rows_at, columns_at) __trap()\n#endif"
    )


_BRING_ROWS = """\
      if (asks_for_rows && dop_elected()) {
        dop_barrier_arrive_times(ready, @COPYING@ - 1);  // nobody else does
        dop_barrier_arrive_with(ready, @X_BYTES@);
        dop_copy_box@ONCE@(at, @MAP@, @COLUMN@, token0, 0, ready);
      }
      if (!straight) {
#pragma unroll
        for (int c = 0; c < @ROW_COPIES@; ++c) {
          const int row = copier / 8 + c * (@COPYING@ / 8);
          if (row < @TM@)
            dop_copy(at + row * 128 + (piece ^ (row & 7)) * 16,
                     @TENSOR@ + (@COLUMN@) + max(token[c], 0) * (long long)@WIDTH@ + piece * 8,
                     token[c] < 0 ? 0 : 16);
        }
        dop_barrier_arrive_behind_copies(ready);
      }
"""
"""64 columns of the tile's rows of x or y: asked for, or gathered."""

_KERNEL = """\
extern "C" __global__ void dop__cluster_dims__(@CLUSTER@, 1, 1) __launch_bounds__(@THREADS@) @NAME@(
    const int* __restrict__ row_index_ptr, const int* __restrict__ tile_rank_ptr,
    const int* __restrict__ tile_row0_ptr, const int* __restrict__ tile_rows_ptr,
    const float* __restrict__ tile_scale_ptr, const int* __restrict__ tile_slot_ptr,
    @TYPE@* y_ptr, const @TYPE@* __restrict__ x_ptr,
    @MAPS@) {
  extern __shared__ __align__(1024) unsigned char dop_shared[];
  const int lane = threadIdx.x, warp = threadIdx.z, thread = warp * 32 + lane;
  const unsigned base = dop_shared_address(dop_shared), v_shared = base + @V_AT@;
  const unsigned full = base + @BARRIERS_AT@, empty = full + @STAGES@ * 8;
  const unsigned used = empty + @STAGES@ * 8, first_a = used + @STAGES@ * 8;
  const unsigned sums_ready = first_a + 8, v_ready = first_a + 16, all_shrunk = first_a + 24;
  const unsigned sums_read = first_a + 32, all_have_v = first_a + 40, had = first_a + 48;
  const int part = blockIdx.x % @CLUSTER@, slice = blockIdx.x / @CLUSTER@ % @SLICES@;
  const int tile = blockIdx.x / (@CLUSTER@ * @SLICES@);
  // Units of this block's ranks that the stack has; of the others nobody sends sums.
  const int mine_filled = min(max(@FILLED@ - part * @SUBS@, 0), @SUBS@);
  // What needs nothing of the kernel before this one.
  if (warp == @MULTIPLYING@ / 32 + 3 && dop_elected()) {
@FETCH_MAPS@  }
  if (dop_elected()) {
    // A stage's by a warp of its own: one thread after the other would take a microsecond.
#pragma unroll 1
    for (int stage = warp; stage < @STAGES@; stage += @THREADS@ / 32) {
      dop_barrier_init(full + stage * 8, 1 + @COPYING@);
      dop_barrier_init(empty + stage * 8, @GROUPS@ * 4);
      dop_barrier_init(used + stage * 8, 128);
    }
    if (warp == @MULTIPLYING@ / 32) {
      dop_barrier_init(first_a, 1);
      dop_barrier_arrive_with(first_a, @FIRST@ * @R@ * 128);
    }
    if (warp == @MULTIPLYING@ / 32 + 1) {
      dop_barrier_init(sums_ready, 1);
      dop_barrier_init(v_ready, 1);
      dop_barrier_init(sums_read, @MULTIPLYING@);
      dop_barrier_arrive_with(sums_ready, mine_filled * (@TM@ * @UNIT@ * 4 * @CLUSTER@));
      dop_barrier_arrive_with(v_ready, (@CLUSTER@ - 1) * (@TM@ * @SHARE@ * 2));
    }
    if (warp == @MULTIPLYING@ / 32 + 2) {
      dop_barrier_init(all_shrunk, 1);
      dop_barrier_init(all_have_v, 1);
      dop_barrier_arrive_with(all_shrunk, @CLUSTER@ * 8);
      dop_barrier_arrive_with(all_have_v, @CLUSTER@ * 8);
    }
    dop_barriers_are_ready();
  }
  __syncwarp();
@WAIT@  dop_dependents_may_start();
  // The tables' entries are read side by side; a table that is not given reads as another one.
  const int rows = dop_table(tile_rows_ptr + tile), row0 = dop_table(tile_row0_ptr + tile);
  const int slot = dop_table(tile_slot_ptr + tile);
  const int given_rank = dop_table((tile_rank_ptr ? tile_rank_ptr : tile_rows_ptr) + tile);
  const float given_scale = dop_table(
      (tile_scale_ptr ? tile_scale_ptr : reinterpret_cast<const float*>(tile_rows_ptr)) + tile);
  // Loads that the branch does not need would be moved behind it, and wait for those it needs.
  if (rows <= 0 | row0 < 0 | slot < 0) return;
  // Beyond the stack's rank the engine fills in zeros: no need to say where a full adapter ends.
  const int rank = tile_rank_ptr && given_rank < @RANK@ ? given_rank : @R@;
  const float scale = tile_scale_ptr ? given_scale : 1.0f;
  const int chunks = @CHUNKS@, offset = @OFFSET@;
  const int token0 = dop_table(row_index_ptr + row0);
  const int token_here = dop_table(row_index_ptr + row0 + (thread < rows ? thread : 0));
#if @CLUSTER@ > 1
  dop_cluster_arrive();
#endif
  if (warp == @MULTIPLYING@ / 32 && dop_elected()) {
    // The first steps' A does not wait for the rows' tokens.
    for (int step = 0; step < @FIRST@; ++step) {
      const unsigned stage = (unsigned)(step + @SHIFT@) % @STAGES@;
      dop_copy_box@KEPT@(base + stage * @STAGE_BYTES@ + @X_BYTES@, @A_MAP@,
                         (part * @STEPS@ + step) * 64, 0, slot, first_a);
    }
  }
  // Whether the tile's rows of x and y lie one behind the other.
  const bool straight = dop_all_of_block(thread >= rows || token_here == token0 + thread);
  if (warp >= @MULTIPLYING@ / 32) {
    // Steps of shrink, then chunks of expand, are brought as their places become free: by a warp
    // that asks for weights and one that asks for rows, or, where rows lie apart, by all four.
    const int copier = thread - @MULTIPLYING@, piece = copier % 8;
    const bool asks_for_weights = warp == @MULTIPLYING@ / 32;
    const bool asks_for_rows = straight && warp == @MULTIPLYING@ / 32 + 1;
    const int boxes = (rank + 63) / 64;
    int token[@ROW_COPIES@];
    if (!straight) {
#pragma unroll
      for (int c = 0; c < @ROW_COPIES@; ++c) {
        const int row = copier / 8 + c * (@COPYING@ / 8);
        token[c] = row < rows ? dop_table(row_index_ptr + row0 + row) : -1;
      }
    }
#pragma unroll 1
    for (int step = 0; step < @STEPS@ && (!straight || asks_for_weights || asks_for_rows); ++step) {
      const unsigned stage = (unsigned)(step + @SHIFT@) % @STAGES@;
      const unsigned at = base + stage * @STAGE_BYTES@, ready = full + stage * 8;
      const int k = (part * @STEPS@ + step) * 64;
      if (step >= @STAGES@)
        dop_barrier_wait(empty + stage * 8, (unsigned)(step - @STAGES@) / @STAGES@ & 1);
      if (asks_for_weights && dop_elected()) {
        dop_barrier_arrive_with(ready, step < @FIRST@ ? 0 : @R@ * 128);
        if (step >= @FIRST@) dop_copy_box@KEPT@(at + @X_BYTES@, @A_MAP@, k, 0, slot, ready);
      }
@BRING_X@    }
    __syncwarp();
#if @CLUSTER@ > 1
    // Here for the sanitizer alone: chunks' stages come from warps that stand at it, too.
    dop_cluster_wait();
#endif
#pragma unroll 1
    for (int chunk = 0; chunk < chunks && (!straight || asks_for_weights || asks_for_rows);
         ++chunk) {
      const unsigned stage = (unsigned)(chunk + @STEPS@ + @SHIFT@) % @STAGES@;
      const unsigned at = base + stage * @STAGE_BYTES@, ready = full + stage * 8;
      const int column = (part * chunks + chunk) * 64;
      // Who had the stage before: a step of shrink, sums, or a chunk.
      const int before = chunk + @STEPS@ - @STAGES@;
      if (before >= @STEPS@) {
        dop_barrier_wait(used + stage * 8, (unsigned)(before - @STEPS@) / @STAGES@ & 1);
      } else if (before >= @STEPS@ - @OVERLAY@) {
        dop_barrier_wait(sums_read, 0);
      } else if (before >= 0) {
        dop_barrier_wait(empty + stage * 8, (unsigned)before / @STAGES@ & 1);
      }
      if (asks_for_weights && dop_elected()) {
        dop_barrier_arrive_with(ready, boxes * 8192);
#pragma unroll
        for (int box = 0; box < @R@ / 64; ++box)
          if (box < boxes)
            dop_copy_box(at + @X_BYTES@ + box * 8192, @B_MAP@, box * 64, column, slot, ready);
      }
@BRING_Y@    }
    dop_commit();
    dop_wait_but<0>();
    return;
  }
@SHRINK@
@EXPAND@
  // Rows of 128 bytes with swizzled pieces, in groups of eight: 1024 bytes.
  const unsigned long long layout = 1ull << 62 | 64ull << 32 | 1ull << 16;
  // v: 128 bytes are eight tokens by eight ranks; then come the next tokens, then the next ranks.
  const unsigned long long v_layout = 8ull << 32 | (unsigned long long)@TM@ << 16;
  const int group = warp / 4, quarter = warp % 4, g = lane >> 2;
  {
    const int first_rank = group % @RANK_GROUPS@ * (@MI@ * 64);
    const int first_row = group / @RANK_GROUPS@ * @SHRINK_ROWS@;
    float sum[@MI@][@SHRINK_ROWS@ / 8][4];
#pragma unroll
    for (int m = 0; m < @MI@; ++m) {
#pragma unroll
      for (int n = 0; n < @SHRINK_ROWS@ / 8; ++n) {
#pragma unroll
        for (int e = 0; e < 4; ++e) sum[m][n][e] = 0.0f;
      }
    }
    dop_barrier_wait(first_a, 0);
#pragma unroll 1
    for (int step = 0; step < @STEPS@; ++step) {
      const unsigned stage = (unsigned)(step + @SHIFT@) % @STAGES@;
      const unsigned x_box = base + stage * @STAGE_BYTES@ + first_row * 128;
      const unsigned a_box = base + stage * @STAGE_BYTES@ + @X_BYTES@ + first_rank * 128;
      dop_barrier_wait(full + stage * 8, step / @STAGES@ & 1);
      if (!straight) dop_fence_copies();
      dop_wgmma_begin();
#pragma unroll
      for (int k = 0; k < 4; ++k) {
#pragma unroll
        for (int m = 0; m < @MI@; ++m)
          DOP_SHRINK(sum[m], layout | ((a_box + m * 8192 + k * 32) & 0x3ffff) >> 4,
                     layout | ((x_box + k * 32) & 0x3ffff) >> 4);
      }
      dop_wgmma_commit();
      dop_wgmma_wait_but_one();
      if (step > 0 && step <= @STEPS@ - @OVERLAY@ && lane == 0)
        dop_barrier_arrive(empty + (unsigned)(step - 1 + @SHIFT@) % @STAGES@ * 8);
    }
    dop_wgmma_wait();
#if !@OVERLAY@
    if (lane == 0) dop_barrier_arrive(empty + (unsigned)(@STEPS@ - 1 + @SHIFT@) % @STAGES@ * 8);
#endif
#if @CLUSTER@ > 1
    dop_cluster_wait();  // peers' barriers are there
#endif
#if @OVERLAY@
    // No block's last steps are in the place of the sums any more.
    dop_sync_some(1, @MULTIPLYING@);
#if @CLUSTER@ > 1
    // Said by 8 bytes to where v will be. An arrival at a peer's barrier waits for all memory.
    if (thread < @CLUSTER@)
      dop_push(dop_peer(v_shared + part * 8, thread), dop_peer(all_shrunk, thread), 0.0f, 0.0f);
    __syncwarp();
    dop_barrier_wait_peers(all_shrunk, 0);
#endif
#endif
    // To the block that adds up these ranks: [part][@UNIT@ ranks][8 tokens][lane].
#pragma unroll
    for (int m = 0; m < @MI@; ++m) {
#pragma unroll
      for (int h = 0; h < 16 / @UNIT@; ++h) {
        const int unit = (first_rank / 16 + m * 4 + quarter) * (16 / @UNIT@) + h;
#if @FILLED@ * @UNIT@ < @R@
        if (unit >= @FILLED@) continue;
#endif
        const int place = (part * @SUBS@ + unit % @SUBS@) * (@TM@ / 8) + first_row / 8;
        const unsigned at = @SUMS_AT@ + place * (@UNIT@ * 32) + lane * @UNIT@;
#if @CLUSTER@ > 1
        const unsigned to = dop_peer(base + at, unit / @SUBS@);
        const unsigned there = dop_peer(sums_ready, unit / @SUBS@);
#endif
#pragma unroll
        for (int n = 0; n < @SHRINK_ROWS@ / 8; ++n) {
#if @CLUSTER@ == 1
          *reinterpret_cast<float4*>(dop_shared + at + n * 512) =
              make_float4(sum[m][n][0], sum[m][n][1], sum[m][n][2], sum[m][n][3]);
#elif @UNIT@ == 16
          dop_push(to + n * 512, there, sum[m][n][0], sum[m][n][1], sum[m][n][2], sum[m][n][3]);
#else
          dop_push(to + n * 256, there, sum[m][n][2 * h], sum[m][n][2 * h + 1]);
#endif
        }
      }
    }
  }
#if @CLUSTER@ > 1
  dop_barrier_wait_peers(sums_ready, 0);
#else
  dop_sync_some(1, @MULTIPLYING@);
#endif
  // This block's ranks of v.
  const unsigned mine = v_shared + part * (@TM@ * @SHARE@ * 2);
  for (int i = warp; i < @SUBS@ * (@TM@ / 8); i += @GROUPS@ * 4) {
    const unsigned char* from = dop_shared + @SUMS_AT@ + i * (@UNIT@ * 32) + lane * @UNIT@;
    const int sub = i / (@TM@ / 8), row = i % (@TM@ / 8) * 8 + (lane & 7);
    const int r = part * @SHARE@ + sub * @UNIT@ + g;
#if @UNIT@ == 16
    float4 total = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
    if (@FILLED@ * @UNIT@ == @R@ || sub < mine_filled) {
#pragma unroll
      for (int p = 0; p < @CLUSTER@; ++p) {
        const float4 next = *reinterpret_cast<const float4*>(from + p * (@TM@ * @SHARE@ * 4));
        total.x += next.x; total.y += next.y; total.z += next.z; total.w += next.w;
      }
    }
    if (r >= rank) total.x = total.y = 0.0f;  // what lies beyond the adapter's rank
    if (r + 8 >= rank) total.z = total.w = 0.0f;
    dop_stmatrix_turned(mine + (sub * 2 + ((lane >> 3) & 1)) * (@TM@ * 16) + row * 16,
                        dop_pack_@KIND@(total.x, total.y), dop_pack_@KIND@(total.z, total.w));
#else
    float2 total = make_float2(0.0f, 0.0f);
    if (@FILLED@ * @UNIT@ == @R@ || sub < mine_filled) {
#pragma unroll
      for (int p = 0; p < @CLUSTER@; ++p) {
        const float2 next = *reinterpret_cast<const float2*>(from + p * (@TM@ * @SHARE@ * 4));
        total.x += next.x; total.y += next.y;
      }
    }
    if (r >= rank) total.x = total.y = 0.0f;  // what lies beyond the adapter's rank
    dop_stmatrix_turned(mine + sub * (@TM@ * 16) + row * 16, dop_pack_@KIND@(total.x, total.y));
#endif
  }
  dop_fence_copies();
#if @OVERLAY@
  dop_barrier_arrive(sums_read);
#endif
  dop_sync_some(1, @MULTIPLYING@);
#if @CLUSTER@ > 1
#pragma unroll
  for (int n = 0; n < @CLUSTER@; n += @GROUPS@ * 4) {  // a warp after the other would take longer
    const int peer = n + warp;
    if (peer < @CLUSTER@ && peer != part && dop_elected())
      dop_copy_to_peer(dop_peer(mine, peer), mine, @TM@ * @SHARE@ * 2, dop_peer(v_ready, peer));
  }
  __syncwarp();
  dop_barrier_wait_peers(v_ready, 0);
  if (thread < @CLUSTER@)
    dop_push(dop_peer(had + part * 8, thread), dop_peer(all_have_v, thread), 0.0f, 0.0f);
  __syncwarp();
#endif
#pragma unroll 1
  for (int step = @STEPS@; step < @STEPS@ + chunks; ++step) {
    const unsigned stage = (unsigned)(step + @SHIFT@) % @STAGES@;
    // A stage is always the same warpgroup's: who has not seen a phase of a barrier end cannot tell
    // it from the one after the next.
    if ((int)stage % @GROUPS@ != group) continue;
    const unsigned at = base + stage * @STAGE_BYTES@, b_box = at + @X_BYTES@;
    const int column = offset + (part * chunks + step - @STEPS@) * 64;
    float sum[@TM@ / 8][4];
#pragma unroll
    for (int n = 0; n < @TM@ / 8; ++n) {
#pragma unroll
      for (int e = 0; e < 4; ++e) sum[n][e] = 0.0f;
    }
    dop_barrier_wait(full + stage * 8, step / @STAGES@ & 1);
    if (rank < @R@) {
      // B beyond the adapter's rank, which need not be numbers.
      for (int p = thread % 128; p < 64 * (@USED@ / 8 - rank / 8); p += 128) {
        const int row = p % 64, piece = rank / 8 + p / 64;
        unsigned char* b = dop_shared + stage * @STAGE_BYTES@ + @X_BYTES@ + piece / 8 * 8192
            + row * 128 + ((piece & 7) ^ (row & 7)) * 16;
        if (piece * 8 >= rank) {
          *reinterpret_cast<uint4*>(b) = make_uint4(0, 0, 0, 0);
        } else {
          for (int e = rank % 8; e < 8; ++e) reinterpret_cast<unsigned short*>(b)[e] = 0;
        }
      }
      dop_fence_copies();
      dop_sync_some(2 + group, 128);
    }
    dop_wgmma_begin();
#pragma unroll
    for (int k = 0; k < @USED@ / 16; ++k)
      DOP_EXPAND(sum, layout | ((b_box + k / 4 * 8192 + k % 4 * 32) & 0x3ffff) >> 4,
                 v_layout | ((v_shared + k * (@TM@ * 32)) & 0x3ffff) >> 4);
    dop_wgmma_commit();
    dop_wgmma_wait();
#pragma unroll
    for (int n = 0; n < @TM@ / 8; ++n) {
      const int row = n * 8 + (lane & 7), piece = quarter * 2 + ((lane >> 3) & 1);
      const unsigned place = at + row * 128 + (piece ^ (row & 7)) * 16;
      unsigned old[2];
      dop_ldmatrix_turned(old, place);
      const unsigned upper = dop_pack_@KIND@(fmaf(scale, sum[n][0], dop_low_@KIND@(old[0])),
                                             fmaf(scale, sum[n][1], dop_high_@KIND@(old[0])));
      const unsigned lower = dop_pack_@KIND@(fmaf(scale, sum[n][2], dop_low_@KIND@(old[1])),
                                             fmaf(scale, sum[n][3], dop_high_@KIND@(old[1])));
      dop_stmatrix_turned(place, upper, lower);
    }
    dop_sync_some(2 + group, 128);
#pragma unroll
    for (int c = 0; c < @ROW_COPIES@; ++c) {
      const int row = c * 16 + thread % 128 / 8, piece = thread % 8;
      if (row < rows) {
        const long long token = straight ? token0 + row : dop_table(row_index_ptr + row0 + row);
        *reinterpret_cast<uint4*>(y_ptr + token * @N@ + column + piece * 8) =
            *reinterpret_cast<const uint4*>(dop_shared + stage * @STAGE_BYTES@ + row * 128
                                            + (piece ^ (row & 7)) * 16);
      }
    }
    if (step + @STAGES@ < @STEPS@ + chunks) {  // a later chunk takes this one's place
      dop_fence_copies();
      __syncwarp();
      if (!straight) {
        dop_barrier_arrive(used + stage * 8);
      } else if (lane == 0) {
        dop_barrier_arrive_times(used + stage * 8, 32);
      }
    }
  }
#if @CLUSTER@ > 1
  dop_barrier_wait_peers(all_have_v, 0);  // what this block's memory holds for them is read
#endif
#undef DOP_SHRINK
#undef DOP_EXPAND
}
"""
