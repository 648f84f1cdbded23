"""CUDA text that only the tile kernels for few rows (`workers`) have, see pipelined_shrink.py and
register_expand.py: a block finds the tiles that it works through, whatever their number."""

from __future__ import annotations

from dop.lowering.cuda_launch import RELEASE, WAIT

LANE_HELPERS = """\
__device__ __forceinline__ unsigned dop_lanes_with(bool here) {
  return __ballot_sync(0xffffffffu, here);
}
__device__ __forceinline__ int dop_first_lane(unsigned lanes) { return __ffs((int)lanes) - 1; }
__device__ __forceinline__ int dop_of_lane(int value, int lane) {
  return __shfl_sync(0xffffffffu, value, lane);
}
__device__ __forceinline__ float dop_of_lane(float value, int lane) {
  return __shfl_sync(0xffffffffu, value, lane);
}
"""
"""What kernels with `workers` use besides."""

SHRINK_OPEN = """\
  const int share = blockIdx.x % @SPLIT@, outer = blockIdx.x / @SPLIT@ % @PARTS@;
  const int part = outer * @SPLIT@ + share, first_rank = blockIdx.x / @ALL_PARTS@ * @RANKS@;
  const int workers = gridDim.y;
@MAY_START@
  // A lane reads the entries of one of this block's tiles: one trip for 32 of them, empty or not.
  for (int base = blockIdx.y; base < tiles; base += 32 * workers) {
  const int mine = base + (int)threadIdx.x * workers, at_table = min(mine, tiles - 1);
  const int mine_rows = dop_table(tile_rows_ptr + at_table);
  const int mine_row0 = dop_table(tile_row0_ptr + at_table);
  const int mine_slot = dop_table(tile_slot_ptr + at_table);
  const int mine_rank = dop_table((tile_rank_ptr ? tile_rank_ptr : tile_rows_ptr) + at_table);
  // Empty: no rows. All entries are asked (none is negative), or some would be read later.
  const bool full = mine < tiles && (mine_rows - 1 | mine_row0 | mine_slot | mine_rank) >= 0;
  for (unsigned live = dop_lanes_with(full); live; live &= live - 1) {
  const int from = dop_first_lane(live), tile = base + from * workers;
  const int rows = dop_of_lane(mine_rows, from), row0 = dop_of_lane(mine_row0, from);
  const long long slot = dop_of_lane(mine_slot, from);
  const int given_rank = dop_of_lane(mine_rank, from);
"""

SHRINK_CLOSE = "  }\n  }\n"
EARLY_WAIT = WAIT + RELEASE
EARLY_CLOSE = WAIT
"""An early kernel (cuda_launch.py) waits behind A's first copies, in its first tile, and at its end
if it had no tile: waiting again costs nothing."""
SHRINK_SYNC = "  __syncthreads();\n"
"""Before the next tile, where no cluster waits for all of its blocks."""

MAY_START = "  dop_dependents_may_start();"

SHRINK_PRELOAD = """\
  // A of all stages first: nothing of it depends on the table of rows.
#pragma unroll
  for (int step = 0; step < @AHEAD@ && step < @STEPS@; ++step) {
#pragma unroll
    for (int c = 0; c < @A_COPIES@; ++c)
      if ((c + 1) * @THREADS@ <= @A_PIECES@ || thread + c * @THREADS@ < @A_PIECES@)
        dop_copy(a_shared + (unsigned)step * (@RANKS@ * @DEPTH@ * 2) + a_to[c],
                 a_from[c] + step * @DEPTH@, a_bytes[c]);
  }
@WAIT@#pragma unroll
  for (int step = 0; step < @AHEAD@; ++step) {
#pragma unroll
    for (int c = 0; c < @X_COPIES@; ++c)
      if (step < @STEPS@ &&
          ((c + 1) * @THREADS@ <= @X_PIECES@ || thread + c * @THREADS@ < @X_PIECES@))
        dop_copy(x_shared + (unsigned)step * (@TM@ * @DEPTH@ * 2) + x_to[c],
                 x_from[c] + step * @DEPTH@, x_bytes[c]);
    dop_commit();
  }
"""

EXPAND_OPEN = """\
  const int workers = (int)gridDim.x / @BLOCKS@, worker = @TILE@;
  // A lane reads the entries of one of this block's tiles: one trip for 32 of them, empty or not.
  for (int base = worker; base < tiles; base += 32 * workers) {
  const int mine = base + (int)threadIdx.x * workers, at_table = min(mine, tiles - 1);
  const int mine_rows = dop_table(tile_rows_ptr + at_table);
  const int mine_row0 = dop_table(tile_row0_ptr + at_table);
  const int mine_slot = dop_table(tile_slot_ptr + at_table);
  const int mine_rank = dop_table((tile_rank_ptr ? tile_rank_ptr : tile_rows_ptr) + at_table);
  const float mine_scale = dop_table((tile_scale_ptr
      ? tile_scale_ptr : reinterpret_cast<const float*>(tile_rows_ptr)) + at_table);
  // Empty: no rows. All entries are asked (none is negative), or some would be read later.
  const bool full = mine < tiles && (mine_rows - 1 | mine_row0 | mine_slot | mine_rank) >= 0;
  for (unsigned live = dop_lanes_with(full); live; live &= live - 1) {
  const int from = dop_first_lane(live), tile = base + from * workers;
  const int all_rows = dop_of_lane(mine_rows, from), row_0 = dop_of_lane(mine_row0, from);
  const int slot = dop_of_lane(mine_slot, from), given_rank = dop_of_lane(mine_rank, from);
  const float given_scale = dop_of_lane(mine_scale, from);
"""


def expand_close(shared_b: bool) -> str:
    """The ends of the loops over tiles; every block waits, whatever it had to do."""
    sync = "  __syncthreads();\n" if shared_b else ""
    return f"{sync}  }}\n  }}\n  dop_wait_for_v();\n"


EXPAND_ALL_B = """\
#pragma unroll
  for (int step = 0; step < @STEPS@; ++step) { DOP_LOAD_B(step, step) }
"""
"""Loads of B, all before v is waited for."""

EXPAND_COPIES = """\
    for (int copy = 0; copy < @STEP_COPIES@; ++copy) {
      const int piece = thread + copy * @THREADS@;
      if ((copy + 1) * @THREADS@ > @STEP_PIECES@ && piece >= @STEP_PIECES@) break;
"""
"""A known number of rounds: nvcc unrolls these without branches."""

EXPAND_ADD_V = """\
  unsigned v_rest[@KB@][@MI@][2][@WORDS@];
  const long long v_part = (long long)(@SLICES@ * @TM@ * @PADDED@) * tiles;
#pragma unroll
  for (int p = 0; p < @KB@; ++p) {
#pragma unroll
    for (int m = 0; m < @MI@; ++m) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        unsigned words[@PARTS@][@WORDS@];
#pragma unroll
        for (int e = 0; e < @PARTS@; ++e)
          dop_read_v(words[e], v + e * v_part + (m * 16 + h * 8) * @PADDED@ + p * (4 * @PIECE@));
#pragma unroll
        for (int k = 0; k < @WORDS@; ++k) {
          float low = dop_low_@KIND@(words[0][k]), high = dop_high_@KIND@(words[0][k]);
#pragma unroll
          for (int e = 1; e < @PARTS@; ++e) {
            low += dop_low_@KIND@(words[e][k]);
            high += dop_high_@KIND@(words[e][k]);
          }
          const unsigned word = dop_pack_@KIND@(low, high);
          vw[p][m][h][k] = word;
          v_rest[p][m][h][k] =
              dop_pack_@KIND@(low - dop_low_@KIND@(word), high - dop_high_@KIND@(word));
        }
      }
    }
  }
"""
"""v as the sum of its parts, and what rounding that sum leaves over: the parts were rounded
already, so a second rounding made errors up to 1.24 times those of kernels that round once."""

EXPAND_REST = """\
          for (int k = 0; k < @KK@; ++k)
            dop_mma_@KIND@(c[j], v_rest[p][m][0][2 * k], v_rest[p][m][1][2 * k],
                           v_rest[p][m][0][2 * k + 1], v_rest[p][m][1][2 * k + 1],
                           bw[step % @BUFFERS@][p][j][2 * k],
                           bw[step % @BUFFERS@][p][j][2 * k + 1]);
#pragma unroll
"""
"""The product of the rest: tensor cores wait for memory anyway."""
