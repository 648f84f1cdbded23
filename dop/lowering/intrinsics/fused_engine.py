"""Block-level intrinsic: a whole add_lora of tiles of many rows in one kernel (sm_90a).

A cluster of blocks does one tile and one slice. Each block computes shrink over its part of k, the
blocks add up their sums through distributed shared memory, each keeps all of the tile's v in its
own, and then does expand for its part of the slice's columns, 64 at a time. The copy engine (TMA)
brings everything through one ring of stages: x and A for a step of shrink, B and y's old values for
a chunk of columns, which have as many bytes; so B and y are on their way while v is being made.
Sums are exchanged where the ring's first `overlay` stages are, which shrink's last steps leave.

wgmma has ranks (shrink) or columns (expand) as its 64 rows and tokens as its columns: a tile may
have any multiple of 16 rows. A warpgroup takes some of the 64-rank groups and some of the tokens in
shrink, and some of the tokens in expand.

Rows of a box lie one behind the other. In a tile whose rows do not (`straight` is false) the four
warps that ask the engine gather those of x and y by 16 bytes, and y is written by rows; so it is
where a tile ends within a warpgroup's tokens. What an adapter of less than the stack's rank has
beyond its rank may be anything: such ranks of v are set to zero, and so are B's in shared memory.

The maps that the kernel takes: dop/measure/tensor_map.py.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from dop.workload import Workload

COPY_WARPS = 4
WARPGROUP = 128
"""Threads of a warpgroup."""
DEPTH = 64
"""Elements of k of a step, columns of a chunk, and ranks of a group: 128 bytes."""
ROW_BYTES = 2 * DEPTH
MAX_RANK = 256
"""Rows of a box."""
SUM_PAD = 4
"""Floats between the rows of sums, against bank conflicts."""


@dataclass(frozen=True)
class FusedEngine:
    """Numbers of the intrinsic.

    Attributes:
        tile_rows: rows of a tile, a multiple of 16.
        cluster: blocks of a cluster; parts of k and of a slice's columns.
        stages: steps or chunks in flight.
        warpgroups: that multiply.
    """

    workload: Workload
    tile_rows: int
    cluster: int
    stages: int
    warpgroups: int = 2

    @property
    def rank_groups(self) -> int:
        """Warpgroups along the ranks in shrink; the others are along the tokens."""
        return math.gcd(self.workload.rank // DEPTH, self.warpgroups)

    @property
    def group_ranks(self) -> int:
        """Groups of 64 ranks of a warpgroup in shrink."""
        return self.workload.rank // (DEPTH * self.rank_groups)

    @property
    def shrink_rows(self) -> int:
        """Tokens of a warpgroup in shrink."""
        return self.tile_rows * self.rank_groups // self.warpgroups

    @property
    def expand_rows(self) -> int:
        """Tokens of a warpgroup in expand."""
        return self.tile_rows // self.warpgroups

    @property
    def sums(self) -> int:
        """Sums of a thread: those of shrink, which are more."""
        return self.group_ranks * self.shrink_rows // 2

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
        return ROW_BYTES * (self.tile_rows + self.workload.rank)

    @property
    def overlay(self) -> int:
        """Stages whose place the sums take."""
        return -(-4 * self.tile_rows * (self.workload.rank + SUM_PAD) // self.stage_bytes)

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
        return self.stages * self.stage_bytes

    @property
    def _barriers_at(self) -> int:
        return self._v_at + 2 * self.tile_rows * self.workload.rank

    @property
    def smem_bytes(self) -> int:
        """Dynamic shared memory: the ring, v, two barriers of 8 bytes for each stage, and two
        more."""
        return self._barriers_at + 16 * self.stages + 16

    @property
    def problem(self) -> str:
        """Why there is no such kernel; empty if there is."""
        w, unit = self.workload, DEPTH * self.cluster
        if w.rank % DEPTH or w.rank > MAX_RANK:
            return f"rank {w.rank}"
        if any(n % unit for n in (w.in_features, *w.out_features)):
            return "columns left over by the cluster"
        if self.tile_rows % (8 * self.warpgroups) or self.tile_rows % 16:
            return "rows left over by the warpgroups"
        if self.steps < self.overlay or self.stages <= self.overlay:
            return "sums that no steps leave room for"
        return ""

    def source(self, name: str) -> str:
        """The kernel (its helpers: device_helpers.py)."""
        text = _KERNEL
        for key, value in {**self._values(), "NAME": name}.items():
            text = text.replace(f"@{key}@", str(value))
        return text

    @property
    def maps(self) -> tuple[str, ...]:
        """Names of the tensor maps."""
        slices = ["", *map(str, range(1, self.workload.slices))]
        a = (f"a{s}_box{self.workload.rank}" for s in slices)
        b = (f"b{s}_box{DEPTH}" for s in slices)
        return (f"x_box{self.tile_rows}", *a, *b, f"y_box{self.expand_rows}")

    def _values(self) -> dict[str, str | int]:
        """What stands for the names in the text."""
        w, maps = self.workload, self.maps
        kind = {"bfloat16": "bf16", "float16": "f16"}[w.dtype]
        return {
            "SHRINK": _wgmma("DOP_SHRINK", self.shrink_rows, kind),
            "EXPAND": _wgmma("DOP_EXPAND", self.expand_rows, kind),
            "MAPS": ",\n    ".join(f"const __grid_constant__ dop_tensor_map {m}" for m in maps),
            "FETCH_MAPS": "".join(f"    dop_prefetch_map({m});\n" for m in maps),
            "X_MAP": maps[0],
            "A_MAP": _of_slice(maps[1 : 1 + w.slices]),
            "B_MAP": _of_slice(maps[1 + w.slices : -1]),
            "Y_MAP": maps[-1],
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
            "R": w.rank,
            "K": w.in_features,
            "N": w.total_out,
            "STEPS": self.steps,
            "OVERLAY": self.overlay,
            "SHIFT": (self.overlay - self.steps) % self.stages,
            "SUM_ROW": w.rank + SUM_PAD,
            "RANK_GROUPS": self.rank_groups,
            "MI": self.group_ranks,
            "SHRINK_ROWS": self.shrink_rows,
            "EXPAND_ROWS": self.expand_rows,
            "ROW_COPIES": self.tile_rows // (4 * COPY_WARPS),
        }


def _of_slice(values: tuple[object, ...]) -> str:
    """A choice by `slice`."""
    text = str(values[0])
    for s in range(1, len(values)):
        text = f"slice == {s} ? {values[s]} : {text}"
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
  const unsigned sums_ready = empty + @STAGES@ * 8, v_ready = sums_ready + 8;
  if (thread == @MULTIPLYING@) {
@FETCH_MAPS@  }
  dop_dependents_may_start();
  const int part = blockIdx.x % @CLUSTER@, slice = blockIdx.x / @CLUSTER@ % @SLICES@;
  const int tile = blockIdx.x / (@CLUSTER@ * @SLICES@);
  // The tables' entries are read side by side; a table that is not given reads as another one.
  const int rows = dop_table(tile_rows_ptr + tile), row0 = dop_table(tile_row0_ptr + tile);
  const int slot = dop_table(tile_slot_ptr + tile);
  const int given_rank = dop_table((tile_rank_ptr ? tile_rank_ptr : tile_rows_ptr) + tile);
  const float given_scale = dop_table(
      (tile_scale_ptr ? tile_scale_ptr : reinterpret_cast<const float*>(tile_rows_ptr)) + tile);
  if (rows <= 0) return;
  const int rank = tile_rank_ptr ? min(given_rank, @R@) : @R@;
  const float scale = tile_scale_ptr ? given_scale : 1.0f;
  const int chunks = @CHUNKS@, offset = @OFFSET@;
  // Whether the tile's rows of x and y lie one behind the other.
  const int token0 = dop_table(row_index_ptr + row0);
  bool straight = true;
  for (int row = thread; row < rows; row += @THREADS@)
    straight = straight && dop_table(row_index_ptr + row0 + row) == token0 + row;
  straight = dop_all_of_block(straight);
  if (thread == 0) {
#pragma unroll
    for (int stage = 0; stage < @STAGES@; ++stage) {
      dop_barrier_init(full + stage * 8, straight ? 1 : 1 + @COPYING@);
      dop_barrier_init(empty + stage * 8, @GROUPS@);
    }
    dop_barrier_init(sums_ready, @CLUSTER@);
    dop_barrier_init(v_ready, @CLUSTER@);
    dop_barriers_are_ready();
  }
  __syncthreads();
  dop_cluster_arrive();
  if (warp >= @MULTIPLYING@ / 32) {
    // Steps of shrink, then chunks of expand, are brought as their places become free.
    const int copier = thread - @MULTIPLYING@, piece = copier % 8;
    int token[@ROW_COPIES@];
    if (!straight) {
#pragma unroll
      for (int c = 0; c < @ROW_COPIES@; ++c) {
        const int row = copier / 8 + c * (@COPYING@ / 8);
        token[c] = row < rows ? dop_table(row_index_ptr + row0 + row) : -1;
      }
    }
    const int boxes = (rank + 63) / 64;
    for (int step = 0; step < (straight && copier > 0 ? 0 : @STEPS@ + chunks); ++step) {
      const unsigned stage = (unsigned)(step + @SHIFT@) % @STAGES@;
      const unsigned at = base + stage * @STAGE_BYTES@, ready = full + stage * 8;
      const int k = (part * @STEPS@ + step) * 64;
      const int column = (part * chunks + step - @STEPS@) * 64;
      if (step >= @STAGES@) dop_barrier_wait(empty + stage * 8, (step / @STAGES@ - 1) & 1);
      if (copier == 0) {
        const int weights = step < @STEPS@ ? @R@ * 128 : boxes * 8192;
        dop_barrier_arrive_with(ready, straight ? weights + @X_BYTES@ : weights);
        if (step < @STEPS@) {
          dop_copy_box_kept(at + @X_BYTES@, @A_MAP@, k, 0, slot, ready);
          if (straight) dop_copy_box_once(at, @X_MAP@, k, token0, 0, ready);
        } else {
          for (int box = 0; box < boxes; ++box)
            dop_copy_box(at + @X_BYTES@ + box * 8192, @B_MAP@, box * 64, column, slot, ready);
          if (straight) {
#pragma unroll
            for (int group = 0; group < @GROUPS@; ++group)
              dop_copy_box(at + group * (@EXPAND_ROWS@ * 128), @Y_MAP@, offset + column,
                           token0 + group * @EXPAND_ROWS@, 0, ready);
          }
        }
      }
      if (!straight) {
        const @TYPE@* from = step < @STEPS@ ? x_ptr + k : y_ptr + (offset + column);
        const long long width = step < @STEPS@ ? @K@ : @N@;
#pragma unroll
        for (int c = 0; c < @ROW_COPIES@; ++c) {
          const int row = copier / 8 + c * (@COPYING@ / 8);
          dop_copy(at + row * 128 + (piece ^ (row & 7)) * 16,
                   from + max(token[c], 0) * width + piece * 8, token[c] < 0 ? 0 : 16);
        }
        dop_barrier_arrive_behind_copies(ready);
      }
    }
    dop_commit();
    dop_wait_but<0>();
    __syncwarp();
    dop_cluster_wait();
    return;
  }
@SHRINK@
@EXPAND@
  // Rows of 128 bytes with swizzled pieces, in groups of eight: 1024 bytes.
  const unsigned long long layout = 1ull << 62 | 64ull << 32 | 1ull << 16;
  const int group = warp / 4, quarter = warp % 4, g = lane >> 2, q = lane & 3;
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
      if (step > 0 && step <= @STEPS@ - @OVERLAY@ && thread % 128 == 0)
        dop_barrier_arrive(empty + (unsigned)(step - 1 + @SHIFT@) % @STAGES@ * 8);
    }
    dop_wgmma_wait();
    dop_sync_some(1, @MULTIPLYING@);
    // The last steps' places are the ring's first.
    float* sums = reinterpret_cast<float*>(dop_shared);
#pragma unroll
    for (int m = 0; m < @MI@; ++m) {
#pragma unroll
      for (int n = 0; n < @SHRINK_ROWS@ / 8; ++n) {
        const int row = first_row + n * 8 + q * 2, r = first_rank + m * 64 + quarter * 16 + g;
        float* to = sums + row * @SUM_ROW@ + r;
        to[0] = sum[m][n][0];
        to[@SUM_ROW@] = sum[m][n][1];
        to[8] = sum[m][n][2];
        to[@SUM_ROW@ + 8] = sum[m][n][3];
      }
    }
  }
  dop_sync_some(1, @MULTIPLYING@);
  dop_cluster_wait();
  if (thread < @CLUSTER@) dop_barrier_arrive_peer(sums_ready, thread);
  dop_barrier_wait_peers(sums_ready, 0);
  // Each block adds up its share of the tile, for all blocks.
  for (int i = part * @MULTIPLYING@ + thread; i < @TM@ * (@R@ / 4);
       i += @CLUSTER@ * @MULTIPLYING@) {
    const int row = i / (@R@ / 4), r = i % (@R@ / 4) * 4;
    if (row >= rows) break;
    float4 parts[@CLUSTER@];
#pragma unroll
    for (int p = 0; p < @CLUSTER@; ++p)
      parts[p] = dop_read_peer(base + (row * @SUM_ROW@ + r) * 4, p);
    float4 total = parts[0];
#pragma unroll
    for (int p = 1; p < @CLUSTER@; ++p) {
      total.x += parts[p].x; total.y += parts[p].y; total.z += parts[p].z; total.w += parts[p].w;
    }
    if (r >= rank) total.x = 0.0f;  // what lies beyond the adapter's rank
    if (r + 1 >= rank) total.y = 0.0f;
    if (r + 2 >= rank) total.z = 0.0f;
    if (r + 3 >= rank) total.w = 0.0f;
    const unsigned low = dop_pack_@KIND@(total.x, total.y);
    const unsigned high = dop_pack_@KIND@(total.z, total.w);
    const unsigned to = v_shared + r / 64 * (@TM@ * 128) + row * 128
        + ((r % 64 / 8) ^ (row & 7)) * 16 + (r & 4) * 2;
#pragma unroll
    for (int p = 0; p < @CLUSTER@; ++p)
      dop_write_peer(to, (p + part) % @CLUSTER@, low, high);
  }
  dop_fence_all_copies();
  dop_sync_some(1, @MULTIPLYING@);
  if (thread < @CLUSTER@) dop_barrier_arrive_peer(v_ready, thread);
  dop_barrier_wait_peers(v_ready, 0);
  dop_fence_all_copies();
  if (thread % 128 == 0) {
#pragma unroll
    for (int step = @STEPS@ - @OVERLAY@; step < @STEPS@; ++step)
      dop_barrier_arrive(empty + (unsigned)(step + @SHIFT@) % @STAGES@ * 8);
  }
  // Whether the engine writes this warpgroup's rows of y.
  const bool whole = straight && group * @EXPAND_ROWS@ + @EXPAND_ROWS@ <= rows;
  int leaving = -1;  // the stage that it reads
#pragma unroll 1
  for (int step = @STEPS@; step < @STEPS@ + chunks; ++step) {
    const unsigned stage = (unsigned)(step + @SHIFT@) % @STAGES@;
    const unsigned at = base + stage * @STAGE_BYTES@, b_box = at + @X_BYTES@;
    const unsigned v_box = v_shared + group * (@EXPAND_ROWS@ * 128);
    const int column = offset + (part * chunks + step - @STEPS@) * 64;
    float sum[@EXPAND_ROWS@ / 8][4];
#pragma unroll
    for (int n = 0; n < @EXPAND_ROWS@ / 8; ++n) {
#pragma unroll
      for (int e = 0; e < 4; ++e) sum[n][e] = 0.0f;
    }
    dop_barrier_wait(full + stage * 8, step / @STAGES@ & 1);
    if (rank < @R@) {
      // B beyond the adapter's rank, which need not be numbers.
      for (int p = thread; p < 64 * (@R@ / 8 - rank / 8); p += @MULTIPLYING@) {
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
      dop_sync_some(1, @MULTIPLYING@);
    }
    dop_wgmma_begin();
#pragma unroll
    for (int k = 0; k < @R@ / 16; ++k)
      DOP_EXPAND(sum, layout | ((b_box + k / 4 * 8192 + k % 4 * 32) & 0x3ffff) >> 4,
                 layout | ((v_box + k / 4 * (@TM@ * 128) + k % 4 * 32) & 0x3ffff) >> 4);
    dop_wgmma_commit();
    if (leaving >= 0) {
      dop_boxes_are_read();
      dop_barrier_arrive(empty + leaving * 8);
    }
    dop_wgmma_wait();
#pragma unroll
    for (int n = 0; n < @EXPAND_ROWS@ / 8; ++n) {
      const int row = group * @EXPAND_ROWS@ + n * 8 + (lane & 7);
      const int piece = quarter * 2 + ((lane >> 3) & 1);
      const unsigned place = at + row * 128 + (piece ^ (row & 7)) * 16;
      unsigned old[2];
      dop_ldmatrix_turned(old, place);
      const unsigned upper = dop_pack_@KIND@(fmaf(scale, sum[n][0], dop_low_@KIND@(old[0])),
                                             fmaf(scale, sum[n][1], dop_high_@KIND@(old[0])));
      const unsigned lower = dop_pack_@KIND@(fmaf(scale, sum[n][2], dop_low_@KIND@(old[1])),
                                             fmaf(scale, sum[n][3], dop_high_@KIND@(old[1])));
      dop_stmatrix_turned(place, upper, lower);
    }
    dop_fence_copies();
    dop_sync_some(2 + group, 128);
    if (whole) {
      if (thread % 128 == 0) {
        dop_store_box(@Y_MAP@, column, token0 + group * @EXPAND_ROWS@, 0,
                      at + group * (@EXPAND_ROWS@ * 128));
        leaving = (int)stage;
      }
    } else {
      for (int p = thread % 128; p < @EXPAND_ROWS@ * 8; p += 128) {
        const int row = group * @EXPAND_ROWS@ + p / 8, piece = p % 8;
        if (row >= rows) break;
        const long long token = dop_table(row_index_ptr + row0 + row);
        *reinterpret_cast<uint4*>(y_ptr + token * @N@ + column + piece * 8) =
            *reinterpret_cast<const uint4*>(dop_shared + stage * @STAGE_BYTES@ + row * 128
                                            + (piece ^ (row & 7)) * 16);
      }
      dop_sync_some(2 + group, 128);
      if (thread % 128 == 0) dop_barrier_arrive(empty + stage * 8);
    }
  }
  if (leaving >= 0) dop_boxes_are_read();
#undef DOP_SHRINK
#undef DOP_EXPAND
}
"""
