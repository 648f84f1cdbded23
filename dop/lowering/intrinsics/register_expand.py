"""Block-level intrinsic: a tile's rows of y plus v times B, in registers only (sm_80 and later).

A warp owns 16 * `row_tiles` rows and `steps` groups of 32 columns of y. Rank and columns are given
to mma.m16n8k16 in an order of our own, which a product does not see but memory does: a thread's
share of y, B and v is then 16 neighbouring bytes (8 of B and v where the rank is no multiple of
32), four threads cover 64 bytes of a row, and nothing passes through shared memory.

    columns of n-tile j (of 4):  n -> 8 * (n // 2) + 2 * j + n % 2
    ranks of 16-rank tile:       thread q of 4 holds 4 neighbouring ones instead of 2 + 2

y's old values for `ahead` groups of columns and the first group of B are on their way before the
kernel waits for v (programmatic dependent launch), so that only v's own way is left.

With `workers` the kernel is for batches of few rows: a grid of tokens // tile_rows + workers tiles,
whose blocks go on to later tiles if there are more. v may come in `parts`, which are added up in
fp32 before the product; the sum goes into it as two numbers of the operands' type, so that v is
rounded once on its way, where the parts were written.
"""

from __future__ import annotations

from dataclasses import dataclass

from dop.lowering.intrinsics import few_rows
from dop.workload import Workload

ALL_AHEAD = 2
"""`b_ahead` by which all of B is loaded before v is waited for."""


@dataclass(frozen=True)
class RegisterExpand:
    """Numbers of the intrinsic, as the loops that it replaces have them.

    Attributes:
        tile_rows: rows of a tile; row_warps * row_tiles * 16.
        row_warps, column_warps: warps along rows and columns of a block.
        row_tiles: 16-row tiles of a warp.
        steps: groups of 32 columns that a warp works through.
        ahead: groups whose old values are loaded ahead.
        b_ahead: groups of B loaded ahead, 0 or 1; 2: all of them, before v is waited for.
        tiles_first: neighbouring blocks have neighbouring tiles, else neighbouring columns.
        streaming: y is marked as used once (evict first).
        shared_b: the block's rows of B come through shared memory, once for all its rows.
        parts: sums that make up v.
        workers: tiles of the grid beyond tokens // tile_rows; 0: the grid has all tiles.
    """

    workload: Workload
    tile_rows: int
    row_warps: int
    column_warps: int
    row_tiles: int
    steps: int
    ahead: int
    b_ahead: int = 1
    tiles_first: bool = True
    streaming: bool = False
    shared_b: bool = False
    parts: int = 1
    workers: int = 0

    @property
    def smem_bytes(self) -> int:
        """Dynamic shared memory."""
        return 2 * self.columns * self.workload.rank if self.shared_b else 0

    @property
    def columns(self) -> int:
        """Columns of a block."""
        return 32 * self.steps * self.column_warps

    @property
    def blocks(self) -> int:
        """Blocks per tile."""
        return self.workload.total_out // self.columns

    @property
    def wide(self) -> bool:
        """Whether B and v are read in 16-byte pieces."""
        return self.workload.rank % 32 == 0

    @property
    def padded_rank(self) -> int:
        """Ranks of a row of v."""
        return -(-self.workload.rank // 16) * 16

    @property
    def grid(self) -> tuple[str, str, str]:
        """Blocks."""
        if self.workers:
            return (f"(tokens // {self.tile_rows} + {self.workers}) * {self.blocks}", "1", "1")
        return (f"tiles * {self.blocks}", "1", "1")

    @property
    def block(self) -> tuple[int, int, int]:
        """Threads."""
        return (32, self.column_warps, self.row_warps)

    @property
    def _buffers(self) -> int:
        """Groups of B in registers."""
        if self.shared_b:
            return 1
        if self.b_ahead == ALL_AHEAD:
            return self.steps
        return 1 + min(self.b_ahead, self.steps - 1)

    def source(self, name: str) -> str:
        """The kernel (its helpers: device_helpers.py)."""
        w = self.workload
        count = "workers" if self.workers else "tiles"
        all_b = self.b_ahead == ALL_AHEAD and not self.shared_b
        threads = 32 * self.row_warps * self.column_warps
        shifts = "".join(f", long long b{s}_shift" for s in range(1, w.slices))
        values = {
            "OPEN": few_rows.EXPAND_OPEN if self.workers else _OPEN_TILE,
            "CLOSE": few_rows.expand_close(self.shared_b) if self.workers else "",
            "LEAVE": "continue" if self.workers else "return",
            "READ_V": _READ_V if self.parts == 1 else few_rows.EXPAND_ADD_V,
            "REST": few_rows.EXPAND_REST if self.parts > 1 else "",
            "FIRST_B": few_rows.EXPAND_ALL_B if all_b else _FIRST_B,
            "NEXT_B": "" if all_b else _NEXT_B,
            "COPIES": few_rows.EXPAND_COPIES if self.workers else _COPIES_UNBOUND,
            "STEP_COPIES": -(-4 * self.column_warps * w.rank // threads),
            "NAME": name,
            "THREADS": threads,
            "SHIFTS": shifts,
            "TYPE": {"bfloat16": "__nv_bfloat16", "float16": "__half"}[w.dtype],
            "KIND": {"bfloat16": "bf16", "float16": "f16"}[w.dtype],
            "TM": self.tile_rows,
            "MI": self.row_tiles,
            "STEPS": self.steps,
            "AHEAD": min(self.ahead, self.steps),
            "BUFFERS": self._buffers,
            "PARTS": self.parts,
            "SLICES": w.slices,
            "SHARED_B": int(self.shared_b),
            "ROW_WARPS": self.row_warps,
            "STEP_PIECES": 4 * self.column_warps * w.rank,
            "SWIZZLE": "(n & 1) * 4" if w.rank % 64 == 0 else "0",
            "COLUMN_WARPS": self.column_warps,
            "BLOCKS": self.blocks,
            "COLUMNS": self.columns,
            "N": w.total_out,
            "RANK": w.rank,
            "PADDED": self.padded_rank,
            "PIECE": 8 if self.wide else 4,
            "PIECE_TYPE": "uint4" if self.wide else "uint2",
            "WORDS": 4 if self.wide else 2,
            "KB": self.padded_rank // (32 if self.wide else 16),
            "KK": 2 if self.wide else 1,
            "TILE": f"blockIdx.x % {count}" if self.tiles_first else f"blockIdx.x / {self.blocks}",
            "PART": f"blockIdx.x / {count}" if self.tiles_first else f"blockIdx.x % {self.blocks}",
            "LOAD_Y": "__ldcs(at)" if self.streaming else "__ldcg(at)",
            "STORE_Y": "__stcs(at, value)" if self.streaming else "*at = value",
            "SLICE": _slice(w),
        }
        text = _KERNEL
        for key, value in values.items():
            text = text.replace(f"@{key}@", str(value))
        return text


def _slice(w: Workload) -> str:
    """Statements that find the block's slice: `slice`, `offset`, `width`, and b of the slice."""
    lines = [f"  int slice = 0, offset = 0, width = {w.out_features[0]};", "  long long shift = 0;"]
    for s in range(1, w.slices):
        lines.append(
            f"  if (first >= {w.offsets[s]}) {{ slice = {s}; offset = {w.offsets[s]}; "
            f"width = {w.out_features[s]}; shift = b{s}_shift; }}"
        )
    return "\n".join(lines)


_OPEN_TILE = """\
  const int tile = @TILE@;
  // The tables' entries are read side by side; a table that is not given reads as another one.
  const int all_rows = dop_table(tile_rows_ptr + tile);
  const int row_0 = dop_table(tile_row0_ptr + tile), slot = dop_table(tile_slot_ptr + tile);
  const int given_rank = dop_table((tile_rank_ptr ? tile_rank_ptr : tile_rows_ptr) + tile);
  const float given_scale = dop_table(
      (tile_scale_ptr ? tile_scale_ptr : reinterpret_cast<const float*>(tile_rows_ptr)) + tile);
"""


_READ_V = """\
#pragma unroll
  for (int p = 0; p < @KB@; ++p) {
#pragma unroll
    for (int m = 0; m < @MI@; ++m) {
#pragma unroll
      for (int h = 0; h < 2; ++h)
        dop_read_v(vw[p][m][h], v + (m * 16 + h * 8) * @PADDED@ + p * (4 * @PIECE@));
    }
  }
"""

_FIRST_B = "  if (@BUFFERS@ > 1) { DOP_LOAD_B(0, 0) }\n"
_NEXT_B = """\
    if (@BUFFERS@ == 1) { DOP_LOAD_B(0, step) }
    if (@BUFFERS@ > 1 && step + 1 < @STEPS@) { DOP_LOAD_B((step + 1) % @BUFFERS@, step + 1) }
"""

_COPIES_UNBOUND = """\
    for (int piece = thread; piece < @STEP_PIECES@; piece += @THREADS@) {
"""


_KERNEL = """\
extern "C" __global__ void __launch_bounds__(@THREADS@) @NAME@(
    const @TYPE@* __restrict__ b_ptr, const int* __restrict__ row_index_ptr,
    const int* __restrict__ tile_rank_ptr, const int* __restrict__ tile_row0_ptr,
    const int* __restrict__ tile_rows_ptr, const float* __restrict__ tile_scale_ptr,
    const int* __restrict__ tile_slot_ptr, int tiles, const @TYPE@* v_ptr,
    @TYPE@* y_ptr@SHIFTS@) {
@OPEN@  const int rows = all_rows - (int)threadIdx.z * @MI@ * 16;
  if ((@SHARED_B@ ? all_rows : rows) <= 0) {
    dop_wait_for_v();  // every block waits: a later kernel must find both kernels complete
    @LEAVE@;
  }
  const int first = (@PART@) * @COLUMNS@, lane = threadIdx.x, g = lane >> 2, q = lane & 3;
  const int column = first + (int)threadIdx.y * (@STEPS@ * 32);
  const int row0 = row_0 + (int)threadIdx.z * @MI@ * 16;
  const int rank = tile_rank_ptr ? min(given_rank, @RANK@) : @RANK@;
  const float scale = tile_scale_ptr ? given_scale : 1.0f;
@SLICE@
  const @TYPE@* block_b = b_ptr + shift * 8 + (long long)slot * ((long long)width * @RANK@)
      + (long long)(first - offset) * @RANK@;
  const @TYPE@* b = block_b + (long long)(column - first) * @RANK@;
  // Old values of y.
  @TYPE@* y[@MI@][2];
  uint4 old[@AHEAD@][@MI@][2];
#pragma unroll
  for (int m = 0; m < @MI@; ++m) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int i = m * 16 + h * 8 + g;
      const int row = i < rows ? row_index_ptr[row0 + i] : 0;
      y[m][h] = y_ptr + (long long)row * @N@ + (column + q * 8);
    }
  }
#pragma unroll
  for (int d = 0; d < @AHEAD@; ++d) {
#pragma unroll
    for (int m = 0; m < @MI@; ++m) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const uint4* at = reinterpret_cast<const uint4*>(y[m][h] + d * 32);
        old[d][m][h] = make_uint4(0, 0, 0, 0);
        if (m * 16 + h * 8 + g < rows) old[d][m][h] = @LOAD_Y@;
      }
    }
  }
#if @SHARED_B@
  // B: a group of copies per step, row n of the block's columns at n * rank, pieces swizzled.
  extern __shared__ __align__(128) unsigned char dop_shared[];
  const unsigned b_shared = dop_shared_address(dop_shared);
  const int thread = ((int)threadIdx.z * @COLUMN_WARPS@ + (int)threadIdx.y) * 32 + lane;
#pragma unroll
  for (int step = 0; step < @STEPS@; ++step) {
#pragma unroll
@COPIES@      const int row = piece / (@RANK@ / 8), c = piece % (@RANK@ / 8);
      const int n = row / 32 * (@STEPS@ * 32) + step * 32 + row % 32;
      dop_copy(b_shared + (n * (@RANK@ / 8) + (c ^ (@SWIZZLE@))) * 16,
               block_b + n * @RANK@ + c * 8, c * 8 < rank ? 16 : 0);
    }
    dop_commit();
  }
#endif
  // B: fragment (rank block p, n-tile j) of the next groups of columns.
  unsigned bw[@BUFFERS@][@KB@][4][@WORDS@];
#define DOP_LOAD_B(buffer, step)                                                              \\
  _Pragma("unroll") for (int p = 0; p < @KB@; ++p) {                                          \\
    _Pragma("unroll") for (int j = 0; j < 4; ++j) {                                           \\
      const int n = (step) * 32 + 8 * (g >> 1) + 2 * j + (g & 1);                             \\
      const int k = p * (4 * @PIECE@) + q * @PIECE@;                                          \\
      _Pragma("unroll") for (int e = 0; e < @WORDS@; ++e) bw[buffer][p][j][e] = 0;            \\
      if ((k & ~7) < rank) dop_read_b(bw[buffer][p][j], b + n * @RANK@ + k);                  \\
    }                                                                                         \\
  }
@FIRST_B@  dop_wait_for_v();
  unsigned vw[@KB@][@MI@][2][@WORDS@];
  const @TYPE@* v = v_ptr + (((long long)slice * tiles + tile) * @TM@
      + ((int)threadIdx.z * @MI@ * 16 + g)) * @PADDED@ + q * @PIECE@;
@READ_V@#pragma unroll
  for (int step = 0; step < @STEPS@; ++step) {
#if @SHARED_B@
    dop_wait_at_most(@STEPS@ - 1 - step);
    __syncthreads();
#pragma unroll
    for (int p = 0; p < @KB@; ++p) {
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const int in_group = 8 * (g >> 1) + 2 * j + (g & 1), c = p * 4 + q;
        const int n = ((int)threadIdx.y * @STEPS@ + step) * 32 + in_group;
        dop_read_shared(bw[0][p][j], dop_shared + (n * (@RANK@ / 8) + (c ^ (@SWIZZLE@))) * 16);
      }
    }
#else
@NEXT_B@#endif
#pragma unroll
    for (int m = 0; m < @MI@; ++m) {
      float c[4][4];
#pragma unroll
      for (int j = 0; j < 4; ++j) {
#pragma unroll
        for (int e = 0; e < 4; ++e) c[j][e] = 0.0f;
#pragma unroll
        for (int p = 0; p < @KB@; ++p) {
#pragma unroll
@REST@          for (int k = 0; k < @KK@; ++k)
            dop_mma_@KIND@(c[j], vw[p][m][0][2 * k], vw[p][m][1][2 * k], vw[p][m][0][2 * k + 1],
                           vw[p][m][1][2 * k + 1], bw[step % @BUFFERS@][p][j][2 * k],
                           bw[step % @BUFFERS@][p][j][2 * k + 1]);
        }
      }
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const uint4 was = old[step % @AHEAD@][m][h];
        const unsigned words[4] = {was.x, was.y, was.z, was.w};
        unsigned sum[4];
#pragma unroll
        for (int j = 0; j < 4; ++j)
          sum[j] = dop_pack_@KIND@(fmaf(scale, c[j][2 * h], dop_low_@KIND@(words[j])),
                                   fmaf(scale, c[j][2 * h + 1], dop_high_@KIND@(words[j])));
        if (m * 16 + h * 8 + g < rows) {
          const uint4 value = make_uint4(sum[0], sum[1], sum[2], sum[3]);
          uint4* at = reinterpret_cast<uint4*>(y[m][h] + step * 32);
          @STORE_Y@;
          if (step + @AHEAD@ < @STEPS@) {
            at = reinterpret_cast<uint4*>(y[m][h] + (step + @AHEAD@) * 32);
            old[step % @AHEAD@][m][h] = @LOAD_Y@;
          }
        }
      }
    }
  }
#undef DOP_LOAD_B
@CLOSE@}
"""
