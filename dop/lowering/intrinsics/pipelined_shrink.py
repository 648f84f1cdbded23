"""Block-level intrinsic: v of a tile for all slices, one product with a cp.async pipeline.

A block multiplies the tile's rows of x with A's rows of all slices over one of `split_k` parts of
k. Both come through shared memory, `stages` steps of `depth` elements deep, rows of 128 bytes and
more with their 16-byte pieces swizzled so that ldmatrix meets no bank conflict. The parts of a tile
are one thread-block cluster (sm_90): its blocks add their sums through distributed shared memory,
in the parts' order, and v is written once, in the operands' type: v[slice, tile, row, rank]. Where
a tile has more parts than a cluster holds, each cluster writes a v of its own, v[part, slice, tile,
row, rank], which expand adds up.

The copy engine (TMA) instead of threads' copies: engine_shrink.py.

With `workers` the kernel is for batches of few rows, where a tile or two must occupy the whole GPU
and where most tiles of the bound are empty: ranks spread over blocks, all of A asked for before x,
whose rows are found through one more table, and a grid of tokens // tile_rows + workers tiles,
whose blocks go on to later tiles if there are more. Beside a matmul that leaves four
multiprocessors even empty blocks queue up, so that the grid may have only `tile_blocks` tiles,
however many rows there are.
"""

from __future__ import annotations

from dataclasses import dataclass

from dop.lowering.intrinsics import few_rows
from dop.workload import Workload


@dataclass(frozen=True)
class PipelinedShrink:
    """Numbers of the intrinsic.

    Attributes:
        tile_rows: rows of a tile.
        split_k: parts of k.
        depth: elements of k per step, 64 or 128.
        stages: steps in flight, 2 or more.
        row_warps, rank_warps: warps along rows and along ranks of all slices.
        warpgroups: wgmma instead of mma (sm_90a): four row warps multiply 64 rows with all ranks
            of their rank warp, straight from shared memory. Wants depth 64, a row warp per 16 rows.
        cluster: parts of a cluster, at most 8; 0: all of them.
        rank_blocks: blocks that share the ranks of all slices; neighbours in the grid.
        workers: tiles of the grid beyond tokens // tile_rows; 0: the grid has all tiles.
        tile_blocks: with workers: tiles of the grid altogether; 0: as expand has them.
        early: it waits for its predecessor between A's first copies and x's (needs workers).
        l2_fetch: bytes that L2 reads for a copy, 256; 0: what the copy wants.
    """

    workload: Workload
    tile_rows: int
    split_k: int
    depth: int
    stages: int
    row_warps: int
    rank_warps: int
    warpgroups: bool = False
    cluster: int = 0
    rank_blocks: int = 1
    workers: int = 0
    tile_blocks: int = 0
    early: bool = False
    l2_fetch: int = 0

    @property
    def cluster_blocks(self) -> int:
        """Blocks of a cluster."""
        return self.cluster or self.split_k

    @property
    def parts(self) -> int:
        """Sums of v that are written: one per cluster of a tile."""
        return self.split_k // self.cluster_blocks

    @property
    def steps(self) -> int:
        """Steps of a block along k."""
        return self.workload.in_features // (self.split_k * self.depth)

    @property
    def block_ranks(self) -> int:
        """Ranks of a block, of all slices together."""
        return self.ranks // self.rank_blocks

    @property
    def padded_rank(self) -> int:
        """Ranks of a row of v."""
        return -(-self.workload.rank // 16) * 16

    @property
    def ranks(self) -> int:
        """Ranks of all slices."""
        return self.workload.slices * self.padded_rank

    @property
    def row_tiles(self) -> int:
        """Groups of 16 rows of a warp."""
        return self.tile_rows // (16 * self.row_warps)

    @property
    def threads(self) -> int:
        """Threads of a block."""
        return 32 * self.row_warps * self.rank_warps

    @property
    def grid(self) -> tuple[str, str, str]:
        """Blocks."""
        blocks = str(self.split_k * self.rank_blocks)
        if self.workers:  # tiles with rows come first, all of their blocks
            tiles = f"tokens // {self.tile_rows} + {self.workers}"
            return (blocks, str(self.tile_blocks or tiles), "1")
        if self.rank_blocks > 1:  # those of a tile read the same rows of x
            return (f"tiles * {self.rank_blocks}", str(self.split_k), "1")
        return ("tiles", blocks, "1")

    @property
    def block(self) -> tuple[int, int, int]:
        """Threads."""
        return (32, self.rank_warps, self.row_warps)

    @property
    def smem_bytes(self) -> int:
        """Dynamic shared memory: the pipeline, whose place the sums take later."""
        pipeline = 2 * self.stages * self.depth * (self.tile_rows + self.block_ranks)
        sums = 4 * self.tile_rows * (self.block_ranks + 4) if self.cluster_blocks > 1 else 0
        return max(pipeline, sums)

    @property
    def v_elements(self) -> str:
        """Elements of v."""
        count = self.parts * self.workload.slices * self.tile_rows * self.padded_rank
        return f"tiles * {count}"

    def source(self, name: str) -> str:
        """The kernel (its helpers: device_helpers.py)."""
        text = self._text()
        for key, value in {**self._values(), "NAME": name}.items():
            text = text.replace(f"@{key}@", str(value))
        return text.replace("dop_copy(", "dop_copy_ahead(") if self.l2_fetch else text

    def _text(self) -> str:
        return _KERNEL + STORE

    def _values(self) -> dict[str, str | int]:
        """What stands for the names in the text."""
        w, threads = self.workload, self.threads
        cluster, ranks = self.cluster_blocks, self.block_ranks
        pieces = self.depth // 8
        at_once = self.workers > 0 and self.stages * self.depth * self.split_k == w.in_features
        shared = self.workers > 0 or self.rank_blocks > 1
        shape = f"{cluster}, 1, 1" if self.workers else f"1, {cluster}, 1"
        close = (
            few_rows.SHRINK_CLOSE if cluster > 1 else few_rows.SHRINK_SYNC + few_rows.SHRINK_CLOSE
        )
        return {
            "OPEN": few_rows.SHRINK_OPEN if self.workers else OPEN_TILE,
            "WHERE": _RANK_BLOCK if self.rank_blocks > 1 else _WHOLE_TILE,
            "RANK_BLOCKS": self.rank_blocks,
            "CLOSE": (close if self.workers else "") + (few_rows.EARLY_CLOSE if self.early else ""),
            "MAY_START": "" if self.early else few_rows.MAY_START,
            "PRELOAD": few_rows.SHRINK_PRELOAD if self.workers else _PRELOAD,
            "WAIT": few_rows.EARLY_WAIT if self.early else "",
            "AHEAD": self.stages if at_once else f"{self.stages} - 1",
            "LATER": self.stages - 1 if at_once else f"{self.stages} - 2",
            "THREADS": threads,
            "CLUSTER": f"dop__cluster_dims__({shape}) " if cluster > 1 else "",
            "SHARE": "share" if self.workers else self._of_part("%", "part"),
            "ROW": "(first_rank + row)" if shared else "row",
            "R": "(first_rank + r)" if shared else "r",
            "V_SLICE": self._v_slice(),
            "PARTS": self.parts,
            "ALL_PARTS": self.split_k,
            "SHIFTS": "".join(f", long long a{s}_shift" for s in range(1, w.slices)),
            "SHIFT_OF": _shift_of(w),
            "TYPE": {"bfloat16": "__nv_bfloat16", "float16": "__half"}[w.dtype],
            "KIND": {"bfloat16": "bf16", "float16": "f16"}[w.dtype],
            "TM": self.tile_rows,
            "K": w.in_features,
            "RANK": w.rank,
            "PADDED": self.padded_rank,
            "RANKS": ranks,
            "SPLIT": cluster,
            "DEPTH": self.depth,
            "PIECES": pieces,
            "X_PIECES": self.tile_rows * pieces,
            "A_PIECES": ranks * pieces,
            "STAGES": self.stages,
            "STEPS": self.steps,
            "RANK_WARPS": self.rank_warps,
            "MI": self.row_tiles,
            "SUM_ROWS": self.row_tiles,
            "NI": ranks // (16 * self.rank_warps),
            "WARPGROUPS": int(self.warpgroups),
            "ROW_GROUPS": self.tile_rows // 64,
            "WGMMA": self._wgmma() if self.warpgroups else "",
            "X_COPIES": -(-self.tile_rows * pieces // threads),
            "A_COPIES": -(-ranks * pieces // threads),
        }

    def _of_part(self, operator: str, alone: str) -> str:
        """Place in the cluster (%) or number of the cluster (/) of a block that knows its part."""
        return f"part {operator} {self.cluster_blocks}" if self.parts > 1 else alone

    def _v_slice(self) -> str:
        outer = "outer" if self.workers else self._of_part("/", "")
        return f"({outer} * {self.workload.slices} + slice)" if outer else "slice"

    def _wgmma(self) -> str:
        """wgmma of 64 rows, 16 of k and the warpgroup's ranks, as a macro of two descriptors."""
        ranks = self.block_ranks // self.rank_warps
        count = ranks // 2
        registers = ", ".join(f"%{n}" for n in range(count))
        sums = ", ".join(f'"+f"(sum[0][{n // 4}][{n % 4}])' for n in range(count))
        kind = {"bfloat16": "bf16", "float16": "f16"}[self.workload.dtype]
        return (
            "#ifdef __CUDA_ARCH_FEAT_SM90_ALL\n#define DOP_WGMMA(x_at, a_at) "
            f'asm volatile("wgmma.mma_async.sync.aligned.m64n{ranks}k16.f32.{kind}.{kind} '
            f'{{{registers}}}, %{count}, %{count + 1}, 1, 1, 1, 0, 0;" '
            f': {sums} : "l"(x_at), "l"(a_at) : "memory")'
            "\n#else\n#define DOP_WGMMA(x_at, a_at) __trap()\n#endif"
        )


def _shift_of(w: Workload) -> str:
    """The slice's distance from the first one's stack, in elements, as a choice by `slice`."""
    text = "0LL"
    for s in range(1, w.slices):
        text = f"(slice == {s} ? a{s}_shift * 8 : {text})"
    return text


_WHOLE_TILE = "  const int tile = blockIdx.x, part = blockIdx.y;"

_RANK_BLOCK = """\
  const int tile = blockIdx.x / @RANK_BLOCKS@, part = blockIdx.y;
  const int first_rank = blockIdx.x % @RANK_BLOCKS@ * @RANKS@;"""

OPEN_TILE = """\
@WHERE@
  dop_dependents_may_start();
  // The tables' entries are read side by side; a table that is not given reads as another one.
  const int rows = dop_table(tile_rows_ptr + tile), row0 = dop_table(tile_row0_ptr + tile);
  const long long slot = dop_table(tile_slot_ptr + tile);
  const int given_rank = dop_table((tile_rank_ptr ? tile_rank_ptr : tile_rows_ptr) + tile);
  if (rows <= 0) return;
"""

_PRELOAD = """\
#pragma unroll
  for (int step = 0; step < @STAGES@ - 1; ++step) {
    if (step < @STEPS@) {
      DOP_COPY(step)
    } else {
      dop_commit();
    }
  }
"""

_KERNEL = """\
extern "C" __global__ void @CLUSTER@__launch_bounds__(@THREADS@) @NAME@(
    const @TYPE@* __restrict__ a_ptr, const int* __restrict__ row_index_ptr,
    const int* __restrict__ tile_rank_ptr, const int* __restrict__ tile_row0_ptr,
    const int* __restrict__ tile_rows_ptr, const int* __restrict__ tile_slot_ptr, int tiles,
    @TYPE@* __restrict__ v_ptr, const @TYPE@* __restrict__ x_ptr@SHIFTS@) {
  extern __shared__ __align__(1024) unsigned char dop_shared[];
@OPEN@  const int rank = tile_rank_ptr ? min(given_rank, @RANK@) : @RANK@;
  const int lane = threadIdx.x;
  const int warp = (int)threadIdx.z * @RANK_WARPS@ + (int)threadIdx.y, thread = warp * 32 + lane;
#if @WARPGROUPS@
  const int row_warp = warp / 4 % @ROW_GROUPS@ * 4 + warp % 4;
  const int rank_warp = warp / (@ROW_GROUPS@ * 4);
#else
  const int row_warp = threadIdx.z, rank_warp = threadIdx.y;
#endif
  const unsigned x_shared = dop_shared_address(dop_shared);
  const unsigned a_shared = x_shared + @STAGES@ * @TM@ * @DEPTH@ * 2;
  // What this thread copies: 16-byte pieces of rows of x and of A.
  const @TYPE@* x_from[@X_COPIES@];
  const @TYPE@* a_from[@A_COPIES@];
  int x_bytes[@X_COPIES@], a_bytes[@A_COPIES@];
  unsigned x_to[@X_COPIES@], a_to[@A_COPIES@];
#pragma unroll
  for (int c = 0; c < @A_COPIES@; ++c) {
    const int piece = thread + c * @THREADS@, row = piece / @PIECES@, column = piece % @PIECES@;
    const int slice = @ROW@ / @PADDED@, r = @ROW@ % @PADDED@;
    a_bytes[c] = r < rank ? 16 : 0;
    a_from[c] = a_ptr + @SHIFT_OF@ + (slot * @RANK@ + (r < rank ? r : 0)) * @K@
        + (part * (@STEPS@ * @DEPTH@) + column * 8);
    a_to[c] = row * (@DEPTH@ * 2) + (column ^ (row & 7)) * 16;
  }
#pragma unroll
  for (int c = 0; c < @X_COPIES@; ++c) {
    const int piece = thread + c * @THREADS@, row = piece / @PIECES@, column = piece % @PIECES@;
    x_bytes[c] = row < rows ? 16 : 0;
    const int token = row < rows ? dop_table(row_index_ptr + row0 + row) : 0;
    x_from[c] = x_ptr + (long long)token * @K@ + (part * (@STEPS@ * @DEPTH@) + column * 8);
    x_to[c] = row * (@DEPTH@ * 2) + (column ^ (row & 7)) * 16;
  }
  // Copies of a step; the last round of them may be for some threads only.
#define DOP_COPY(step)                                                              \\
  {                                                                                 \\
    const unsigned stage = (unsigned)((step) % @STAGES@);                           \\
    const unsigned a_stage = a_shared + stage * (@RANKS@ * @DEPTH@ * 2);            \\
    const unsigned x_stage = x_shared + stage * (@TM@ * @DEPTH@ * 2);               \\
    _Pragma("unroll") for (int c = 0; c < @A_COPIES@; ++c)                          \\
      if ((c + 1) * @THREADS@ <= @A_PIECES@ || thread + c * @THREADS@ < @A_PIECES@) \\
        dop_copy(a_stage + a_to[c], a_from[c] + (step) * @DEPTH@, a_bytes[c]);      \\
    _Pragma("unroll") for (int c = 0; c < @X_COPIES@; ++c)                          \\
      if ((c + 1) * @THREADS@ <= @X_PIECES@ || thread + c * @THREADS@ < @X_PIECES@) \\
        dop_copy(x_stage + x_to[c], x_from[c] + (step) * @DEPTH@, x_bytes[c]);      \\
  }                                                                                 \\
  dop_commit();
@PRELOAD@  float sum[@MI@][2 * @NI@][4];
#pragma unroll
  for (int m = 0; m < @MI@; ++m) {
#pragma unroll
    for (int n = 0; n < 2 * @NI@; ++n) {
#pragma unroll
      for (int e = 0; e < 4; ++e) sum[m][n][e] = 0.0f;
    }
  }
  // Lane's row and piece of the 16 x 16 boxes that ldmatrix reads: rows first for x, k for A.
  const int x_row = row_warp * (@MI@ * 16) + (lane & 15), x_piece = lane >> 4;
  const int a_row = rank_warp * (@NI@ * 16) + (lane >> 4) * 8 + (lane & 7);
  const int a_piece = (lane >> 3) & 1;
#if @WARPGROUPS@
@WGMMA@
  // Rows of 128 bytes with swizzled pieces, in groups of eight: 1024 bytes.
  const unsigned long long layout = 1ull << 62 | 64ull << 32 | 1ull << 16;
  const unsigned x_box = x_shared + row_warp / 4 * 8192;
  const unsigned a_box = a_shared + rank_warp * (@NI@ * 16 * 128);
#endif
#pragma unroll 1
  for (int step = 0; step < @STEPS@; ++step) {
    dop_wait_but<@LATER@>();
#if @WARPGROUPS@
    dop_fence_copies();
    __syncthreads();
    dop_wgmma_begin();
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      const unsigned stage = (unsigned)(step % @STAGES@);
      DOP_WGMMA(layout | ((x_box + stage * (@TM@ * @DEPTH@ * 2) + k * 32) & 0x3ffff) >> 4,
                layout | ((a_box + stage * (@RANKS@ * @DEPTH@ * 2) + k * 32) & 0x3ffff) >> 4);
    }
    dop_wgmma_commit();
#else
    __syncthreads();
#endif
    if (step + @AHEAD@ < @STEPS@) {
      DOP_COPY(step + @AHEAD@)
    } else {
      dop_commit();
    }
#if @WARPGROUPS@
    dop_wgmma_wait();
#else
    const unsigned stage = (unsigned)(step % @STAGES@);
    const unsigned xs = x_shared + stage * (@TM@ * @DEPTH@ * 2) + x_row * (@DEPTH@ * 2);
    const unsigned as = a_shared + stage * (@RANKS@ * @DEPTH@ * 2) + a_row * (@DEPTH@ * 2);
#pragma unroll
    for (int k = 0; k < @DEPTH@ / 16; ++k) {
      unsigned xw[@MI@][4];
#pragma unroll
      for (int m = 0; m < @MI@; ++m)
        dop_ldmatrix(xw[m], xs + m * (32 * @DEPTH@) + ((2 * k + x_piece) ^ (x_row & 7)) * 16);
#pragma unroll
      for (int n = 0; n < @NI@; ++n) {
        unsigned aw[4];
        dop_ldmatrix(aw, as + n * (32 * @DEPTH@) + ((2 * k + a_piece) ^ (a_row & 7)) * 16);
#pragma unroll
        for (int m = 0; m < @MI@; ++m) {
          dop_mma_@KIND@(sum[m][2 * n], xw[m][0], xw[m][1], xw[m][2], xw[m][3], aw[0], aw[1]);
          dop_mma_@KIND@(sum[m][2 * n + 1], xw[m][0], xw[m][1], xw[m][2], xw[m][3], aw[2], aw[3]);
        }
      }
    }
#endif
  }
#undef DOP_COPY
#if @WARPGROUPS@
#undef DOP_WGMMA
#endif
"""

STORE = """\
  const int g = lane >> 2, q = lane & 3;
#if @SPLIT@ == 1
#pragma unroll
  for (int m = 0; m < @SUM_ROWS@; ++m) {
#pragma unroll
    for (int n = 0; n < 2 * @NI@; ++n) {
      const int r = rank_warp * (@NI@ * 16) + n * 8 + q * 2, slice = @R@ / @PADDED@;
      const int row = row_warp * (@MI@ * 16) + m * 16 + g;
      const long long at = ((long long)@V_SLICE@ * tiles + tile) * @TM@ + row;
      unsigned* to = reinterpret_cast<unsigned*>(v_ptr + at * @PADDED@ + @R@ % @PADDED@);
      to[0] = dop_pack_@KIND@(sum[m][n][0], sum[m][n][1]);
      to[8 * @PADDED@ / 2] = dop_pack_@KIND@(sum[m][n][2], sum[m][n][3]);
    }
  }
#else
  dop_wait_but<0>();
  __syncthreads();
  float* sums = reinterpret_cast<float*>(dop_shared);
#pragma unroll
  for (int m = 0; m < @SUM_ROWS@; ++m) {
#pragma unroll
    for (int n = 0; n < 2 * @NI@; ++n) {
      const int r = rank_warp * (@NI@ * 16) + n * 8 + q * 2;
      const int row = row_warp * (@MI@ * 16) + m * 16 + g;
      float2* to = reinterpret_cast<float2*>(sums + row * (@RANKS@ + 4) + r);
      to[0] = make_float2(sum[m][n][0], sum[m][n][1]);
      to[8 * (@RANKS@ + 4) / 2] = make_float2(sum[m][n][2], sum[m][n][3]);
    }
  }
  dop_cluster_sync();
  // Each block adds up its share of the tile.
  for (int i = @SHARE@ * @THREADS@ + thread; i < @TM@ * (@RANKS@ / 4); i += @SPLIT@ * @THREADS@) {
    const int row = i / (@RANKS@ / 4), r = i % (@RANKS@ / 4) * 4, slice = @R@ / @PADDED@;
    if (row >= rows) break;
    float4 parts[@SPLIT@];
#pragma unroll
    for (int p = 0; p < @SPLIT@; ++p)
      parts[p] = dop_read_peer(x_shared + (row * (@RANKS@ + 4) + r) * 4, p);
    float4 total = parts[0];
#pragma unroll
    for (int p = 1; p < @SPLIT@; ++p) {
      total.x += parts[p].x; total.y += parts[p].y; total.z += parts[p].z; total.w += parts[p].w;
    }
    const long long at = ((long long)@V_SLICE@ * tiles + tile) * @TM@ + row;
    *reinterpret_cast<uint2*>(v_ptr + at * @PADDED@ + @R@ % @PADDED@) =
        make_uint2(dop_pack_@KIND@(total.x, total.y), dop_pack_@KIND@(total.z, total.w));
  }
  dop_cluster_sync();
#endif
@CLOSE@}
"""
"""Behind the products: v of the tile, by all threads of its blocks."""
