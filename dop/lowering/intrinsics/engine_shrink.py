"""Block-level intrinsic: pipelined_shrink whose copies the copy engine (TMA) makes.

Four more warps bring what the others multiply. One thread of them asks for a whole step, a box of
x's rows and boxes of A's, and an arrival barrier in shared memory counts the bytes; the warps that
multiply wait for it, and for nothing else. Where each thread copies 16 bytes at a time, as
pipelined_shrink does, the copies' own instructions and the fence between them and the tensor cores
take 4 of 36 us (docs/performance.md 47).

The engine wants a map of each tensor. Who launches the kernel makes them, from the parameters'
names alone (dop/measure/tensor_map.py): `x_box128` is x's with boxes of 128 rows, `a_box64`,
`a1_box64` and `a2_box64` are the stacks'. Blocks that make their own take 1 to 3 us longer. Rows
of a box lie one behind the other. So do a long prefill's; in a tile whose rows do not, the four
warps gather x's by 16 bytes, and the engine brings A alone.

A's boxes are read up to the stack's rank. An adapter of less has what it likes beyond, so those
sums are set to zero behind the last step.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from dop.lowering.intrinsics.pipelined_shrink import OPEN_TILE, STORE, PipelinedShrink

COPY_WARPS = 4
MAX_BOX_ROWS = 256
STRAIGHT = """\
  const int token0 = dop_table(row_index_ptr + row0);
  bool straight = true;
  for (int row = thread; row < rows; row += @THREADS@)
    straight = straight && dop_table(row_index_ptr + row0 + row) == token0 + row;
  straight = dop_all_of_block(straight);
"""
"""By all threads: whether the tile's rows lie one behind the other, and the first one's token."""


@dataclass(frozen=True)
class EngineShrink(PipelinedShrink):
    """Numbers of the intrinsic; those of `PipelinedShrink`, of which `warpgroups` is true, `depth`
    64, and `workers`, `tile_blocks`, `early` and `l2_fetch` are not for it."""

    @property
    def threads(self) -> int:
        """Threads of a block."""
        return super().threads + 32 * COPY_WARPS

    @property
    def block(self) -> tuple[int, int, int]:
        """Threads."""
        return (32, 1, self.threads // 32)

    @property
    def box_rows(self) -> int:
        """Rows of A that the engine brings at once: of one slice, and no more than a box holds."""
        rows = math.gcd(self.block_ranks, self.padded_rank)
        return max(n for n in range(16, MAX_BOX_ROWS + 1, 16) if rows % n == 0)

    @property
    def smem_bytes(self) -> int:
        """Dynamic shared memory: the pipeline, whose place the sums take later, and two barriers
        of 8 bytes for each step in flight."""
        return super().smem_bytes + 16 * self.stages

    def _text(self) -> str:
        return _KERNEL + STORE

    def _values(self) -> dict[str, str | int]:
        values, multiplying, slices = super()._values(), super().threads, self.workload.slices
        names = [f"a{s or ''}_box{self.box_rows}" for s in range(slices)]
        of_slice = names[0]
        for s in range(1, slices):
            of_slice = f"slice == {s} ? {names[s]} : {of_slice}"
        maps = [f"x_box{self.tile_rows}", *names]
        return {
            **values,
            "OPEN": OPEN_TILE,
            "STRAIGHT": STRAIGHT.replace("@THREADS@", str(self.threads)),
            "MULTIPLYING": multiplying // 32,
            "SUM_ROWS": f"(warp < {multiplying // 32} ? 1 : 0)",  # warps that copy have none
            "COPYING": 32 * COPY_WARPS,
            "MAPS": ",\n    ".join(f"const __grid_constant__ dop_tensor_map {m}" for m in maps),
            "FETCH_MAPS": "".join(f"    dop_prefetch_map({m});\n" for m in maps),
            "X_MAP": maps[0],
            "A_MAP": of_slice,
            "SLICE": f", slice = {values['ROW']} / {self.padded_rank}" if slices > 1 else "",
            "BARRIERS_AT": super().smem_bytes,
            "BOX_ROWS": self.box_rows,
            "BOXES": self.block_ranks // self.box_rows,
            "STEP_BYTES": 128 * (self.tile_rows + self.block_ranks),
            "A_BYTES": 128 * self.block_ranks,
            "X_COPIES": self.tile_rows // (4 * COPY_WARPS),
        }


_KERNEL = """\
extern "C" __global__ void @CLUSTER@__launch_bounds__(@THREADS@) @NAME@(
    const int* __restrict__ row_index_ptr, const int* __restrict__ tile_rank_ptr,
    const int* __restrict__ tile_row0_ptr, const int* __restrict__ tile_rows_ptr,
    const int* __restrict__ tile_slot_ptr, int tiles, @TYPE@* __restrict__ v_ptr,
    const @TYPE@* __restrict__ x_ptr,
    @MAPS@) {
  extern __shared__ __align__(1024) unsigned char dop_shared[];
  const int lane = threadIdx.x, warp = threadIdx.z, thread = warp * 32 + lane;
  const unsigned x_shared = dop_shared_address(dop_shared);
  const unsigned a_shared = x_shared + @STAGES@ * @TM@ * 128;
  const unsigned full = x_shared + @BARRIERS_AT@, empty = full + @STAGES@ * 8;
  if (thread == @MULTIPLYING@ * 32) {
@FETCH_MAPS@  }
@OPEN@  const int rank = tile_rank_ptr ? min(given_rank, @RANK@) : @RANK@;
  // Whether the tile's rows of x lie one behind the other.
@STRAIGHT@  if (thread == 0) {
#pragma unroll
    for (int stage = 0; stage < @STAGES@; ++stage) {
      dop_barrier_init(full + stage * 8, straight ? 1 : 1 + @COPYING@);
      dop_barrier_init(empty + stage * 8, @MULTIPLYING@);
    }
    dop_barriers_are_ready();
  }
  __syncthreads();
  const int row_warp = warp / 4 % @ROW_GROUPS@ * 4 + warp % 4;
  const int rank_warp = warp / (@ROW_GROUPS@ * 4);
  float sum[1][2 * @NI@][4];
#pragma unroll
  for (int n = 0; n < 2 * @NI@; ++n) {
#pragma unroll
    for (int e = 0; e < 4; ++e) sum[0][n][e] = 0.0f;
  }
  if (warp >= @MULTIPLYING@) {
    // Steps are brought as their places become free.
    const int copier = thread - @MULTIPLYING@ * 32, column = copier % 8;
    const @TYPE@* x_from[@X_COPIES@];
    int x_bytes[@X_COPIES@];
    if (!straight) {
#pragma unroll
      for (int c = 0; c < @X_COPIES@; ++c) {
        const int row = copier / 8 + c * (@COPYING@ / 8);
        x_bytes[c] = row < rows ? 16 : 0;
        const int token = row < rows ? dop_table(row_index_ptr + row0 + row) : 0;
        x_from[c] = x_ptr + (long long)token * @K@ + (part * (@STEPS@ * 64) + column * 8);
      }
    }
    for (int step = 0; step < (straight && copier > 0 ? 0 : @STEPS@); ++step) {
      const unsigned stage = (unsigned)(step % @STAGES@);
      const int k = (part * @STEPS@ + step) * 64;
      if (step >= @STAGES@) dop_barrier_wait(empty + stage * 8, (step / @STAGES@ - 1) & 1);
      if (copier == 0) {
        dop_barrier_arrive_with(full + stage * 8, straight ? @STEP_BYTES@ : @A_BYTES@);
#pragma unroll
        for (int box = 0; box < @BOXES@; ++box) {
          const int row = box * @BOX_ROWS@@SLICE@;
          dop_copy_box(a_shared + stage * @A_BYTES@ + box * (@BOX_ROWS@ * 128), @A_MAP@,
                       k, @ROW@ % @PADDED@, (int)slot, full + stage * 8);
        }
        if (straight)
          dop_copy_box(x_shared + stage * (@TM@ * 128), @X_MAP@, k, token0, 0, full + stage * 8);
      }
      if (!straight) {
#pragma unroll
        for (int c = 0; c < @X_COPIES@; ++c) {
          const int row = copier / 8 + c * (@COPYING@ / 8);
          dop_copy(x_shared + stage * (@TM@ * 128) + row * 128 + (column ^ (row & 7)) * 16,
                   x_from[c] + step * 64, x_bytes[c]);
        }
        dop_barrier_arrive_behind_copies(full + stage * 8);
      }
    }
    dop_commit();
    dop_wait_but<0>();
  } else {
@WGMMA@
    // Rows of 128 bytes with swizzled pieces, in groups of eight: 1024 bytes.
    const unsigned long long layout = 1ull << 62 | 64ull << 32 | 1ull << 16;
    const unsigned x_box = x_shared + row_warp / 4 * 8192;
    const unsigned a_box = a_shared + rank_warp * (@NI@ * 16 * 128);
#pragma unroll 1
    for (int step = 0; step < @STEPS@; ++step) {
      const unsigned stage = (unsigned)(step % @STAGES@);
      dop_barrier_wait(full + stage * 8, step / @STAGES@ & 1);
      if (!straight) dop_fence_copies();
      dop_wgmma_begin();
#pragma unroll
      for (int k = 0; k < 4; ++k)
        DOP_WGMMA(layout | ((x_box + stage * (@TM@ * 128) + k * 32) & 0x3ffff) >> 4,
                  layout | ((a_box + stage * @A_BYTES@ + k * 32) & 0x3ffff) >> 4);
      dop_wgmma_commit();
      dop_wgmma_wait_but_one();
      if (step > 0 && lane == 0) dop_barrier_arrive(empty + (unsigned)((step - 1) % @STAGES@) * 8);
    }
    dop_wgmma_wait();
#undef DOP_WGMMA
    // What lies beyond the adapter's rank.
#pragma unroll
    for (int n = 0; n < 2 * @NI@; ++n) {
      const int r = rank_warp * (@NI@ * 16) + n * 8 + (lane & 3) * 2, column = @R@ % @PADDED@;
#pragma unroll
      for (int e = 0; e < 4; ++e)
        if (column + (e & 1) >= rank) sum[0][n][e] = 0.0f;
    }
  }
"""
