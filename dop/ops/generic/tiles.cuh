// The tile form: a block per tile of at most 16 or 64 rows of one adapter, on tensor cores
// (mma m16n8k16, sm_80 on), fp16 and bf16. Tiles in shared memory are rows of 64 elements, their
// groups of 16 bytes swizzled, and are filled ahead by asynchronous copies.
#pragma once

#include "common.cuh"

namespace {

constexpr int kTileThreads = 128;
constexpr int kDepth = 64;           // elements of a row of a tile in shared memory
constexpr int kRowBytes = kDepth * 2;
constexpr int kBlockRanks = 64;      // ranks per block in shrink
constexpr int kBlockColumns = 64;    // columns at a time in expand
constexpr int kShrinkStages = 4;
constexpr int kExpandStages = 3;
constexpr int kOutPitch = kBlockColumns + 4;  // floats; rows of the result in shared memory

#ifndef DOP_ON_HOST
__device__ __forceinline__ unsigned shared_address(const void* pointer) {
  return (unsigned)__cvta_generic_to_shared(pointer);
}
// 16 bytes to shared memory, of which the first `used` are read and the others zero.
__device__ __forceinline__ void copy_async(void* to, const void* from, int used) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)),
               "l"(from), "r"(used)
               : "memory");
}
__device__ __forceinline__ void copy_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int kLeft>
__device__ __forceinline__ void copy_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kLeft) : "memory");
}
// Four 8 x 8 matrices; lane l gives the address of row l % 8 of matrix l / 8.
__device__ __forceinline__ void load_matrices(unsigned (&m)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(m[0]), "=r"(m[1]), "=r"(m[2]), "=r"(m[3])
               : "r"(shared_address(row))
               : "memory");
}
__device__ __forceinline__ void multiply(float (&c)[4], const unsigned (&a)[4], unsigned b0,
                                         unsigned b1, Half) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
__device__ __forceinline__ void multiply(float (&c)[4], const unsigned (&a)[4], unsigned b0,
                                         unsigned b1, Bfloat) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
#endif

// Where group `group` (16 bytes) of a row lies in a swizzled tile.
__device__ __forceinline__ unsigned char* in_tile(unsigned char* tile, int row, int group) {
  return tile + row * kRowBytes + ((group ^ (row & 7)) << 4);
}

// 8 elements into a tile: `count` of them at `from`, the others zero.
template <class T>
__device__ __forceinline__ void fill_group(unsigned char* to, const T* from, int count, bool wide) {
  count = count < 0 ? 0 : count < 8 ? count : 8;
  if (wide) {
    copy_async(to, from, count * 2);
  } else {
    Pack<T> pack = load_pack<false>(from, count);
    *(uint4*)to = pack.words;
  }
}

// Operand A of a product: 16 rows from `row`, 16 elements from group 2 * step of a tile.
__device__ __forceinline__ void load_rows(unsigned (&m)[4], unsigned char* tile, int row, int step,
                                          int lane) {
  load_matrices(m, in_tile(tile, row + (lane & 15), 2 * step + (lane >> 4)));
}

// Operand B of two products: 16 columns, each a row of the tile. The first takes m[0] and m[1].
__device__ __forceinline__ void load_columns16(unsigned (&m)[4], unsigned char* tile, int column,
                                               int step, int lane) {
  load_matrices(m, in_tile(tile, column + (lane & 7) + ((lane >> 4) << 3),
                           2 * step + ((lane >> 3) & 1)));
}

// v[split, slice, token, :] for the rows of a tile. Grid: tiles, groups of 64 ranks x slices, splits.
// Dynamic shared memory: kShrinkStages x (kRows + ranks, a multiple of 16) x kRowBytes.
template <int kRows, class T>
__device__ __forceinline__ void shrink_tiles(const T* x, const T* a, long long a1_shift,
                                             long long a2_shift, const int* tile_slot,
                                             const int* tile_row0, const int* tile_rows,
                                             const int* tile_rank, const int* row_index, float* v,
                                             int tokens, int in_features, int rank, int slices,
                                             int x_stride, int indirect) {
  constexpr int kWarpsDown = kRows / 16, kWarpsDeep = 4 / kWarpsDown, kLoads = kRows / 16;
  DOP_DYNAMIC_SHARED(shared);
  const int thread = threadIdx.x, lane = thread & 31, warp = thread >> 5;
  let_next_start();
  const int tile = blockIdx.x, rows = tile_rows[tile];
  const int slot = tile_slot[tile], row0 = tile_row0[tile];
  const int groups = (rank + kBlockRanks - 1) / kBlockRanks;
  const int slice = blockIdx.y / groups, first = (blockIdx.y - slice * groups) * kBlockRanks;
  const int ranks = min(min(tile_rank[tile], rank) - first, kBlockRanks);
  if (rows <= 0 || ranks <= 0) return;
  const int pairs = (ranks + 15) / 16;
  const int stage_bytes = (kRows + pairs * 16) * kRowBytes;
  const T* const weights = weights_of(a, a1_shift, a2_shift, slice, slot,
                                      (long long)rank * in_features, indirect) +
                           (long long)first * in_features;
  const bool wide =
      in_features % 8 == 0 && x_stride % 8 == 0 && is_aligned(weights) && is_aligned(x);
  const int load_row = thread >> 3, load_group = thread & 7;
  const T* source[kLoads];
#pragma unroll
  for (int i = 0; i < kLoads; ++i) {
    const int row = load_row + 16 * i;
    source[i] = row < rows ? x + (long long)row_index[row0 + row] * x_stride : nullptr;
  }
  const int all = (in_features + kDepth - 1) / kDepth, splits = gridDim.z;
  const int begin = (int)((long long)all * blockIdx.z / splits);
  const int end = (int)((long long)all * (blockIdx.z + 1) / splits);

  const auto fill = [&](int chunk) {
    unsigned char* const stage = shared + (chunk - begin) % kShrinkStages * stage_bytes;
    const int k = chunk * kDepth + load_group * 8;
#pragma unroll
    for (int i = 0; i < kLoads; ++i)
      fill_group(in_tile(stage, load_row + 16 * i, load_group),
                 source[i] == nullptr || k >= in_features ? x : source[i] + k,
                 source[i] == nullptr ? 0 : in_features - k, wide);
#pragma unroll 1
    for (int i = 0; i < pairs; ++i) {
      const int r = load_row + 16 * i;
      const bool there = r < ranks && k < in_features;
      fill_group(in_tile(stage, kRows + r, load_group),
                 there ? weights + (long long)r * in_features + k : weights,
                 there ? in_features - k : 0, wide);
    }
  };

  float sums[kBlockRanks / 8][4] = {};
  for (int i = 0; i < kShrinkStages - 1; ++i) {
    if (begin + i < end) fill(begin + i);
    copy_commit();
  }
  const int down = warp % kWarpsDown, deep = warp / kWarpsDown;
#pragma unroll 1
  for (int chunk = begin; chunk < end; ++chunk) {
    copy_wait<kShrinkStages - 2>();
    __syncthreads();
    if (chunk + kShrinkStages - 1 < end) fill(chunk + kShrinkStages - 1);
    copy_commit();
    unsigned char* const stage = shared + (chunk - begin) % kShrinkStages * stage_bytes;
#pragma unroll
    for (int i = 0; i < 4 / kWarpsDeep; ++i) {
      const int step = i * kWarpsDeep + deep;
      unsigned left[4];
      load_rows(left, stage, down * 16, step, lane);
#pragma unroll
      for (int p = 0; p < kBlockRanks / 16; ++p) {
        if (p >= pairs) break;
        unsigned right[4];
        load_columns16(right, stage + kRows * kRowBytes, p * 16, step, lane);
        multiply(sums[2 * p], left, right[0], right[1], T());
        multiply(sums[2 * p + 1], left, right[2], right[3], T());
      }
    }
  }
  copy_wait<0>();

  // The warps that shared the depth add up, in the order of their steps.
  float* const partial = (float*)shared;
  const int pitch = pairs * 16;
  __syncthreads();
#pragma unroll
  for (int n = 0; n < kBlockRanks / 8; ++n) {
    if (n >= 2 * pairs) break;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int row = down * 16 + (lane >> 2) + (i >> 1) * 8;
      partial[(deep * kRows + row) * pitch + n * 8 + (lane & 3) * 2 + (i & 1)] = sums[n][i];
    }
  }
  __syncthreads();
  float* const to = v + ((long long)blockIdx.z * slices + slice) * tokens * rank + first;
  const int column = thread & 15;
  for (int part = thread >> 4; part < kRows * pairs; part += kTileThreads / 16) {
    const int row = part % kRows, r = part / kRows * 16 + column;
    if (row >= rows || r >= ranks) continue;
    float sum = 0.0f;
#pragma unroll
    for (int d = 0; d < kWarpsDeep; ++d) sum += partial[(d * kRows + row) * pitch + r];
    to[(long long)row_index[row0 + row] * rank + r] = sum;
  }
}

// v of a tile's rows, summed over the splits, as high + low parts of the operand type (16 more bits
// than one operand holds), rows of `pitch` bytes. Plain loads, as in expand_columns.
template <int kRows, class T>
__device__ __forceinline__ void stage_v(unsigned char* high, unsigned char* low, int pitch,
                                        const float* v, const int* row_index, int rows,
                                        int true_rank, int depth, int rank, int splits,
                                        long long split_step) {
  const int within = threadIdx.x & 15;
#pragma unroll 4
  for (int part = threadIdx.x >> 4; part < kRows * (depth >> 4); part += kTileThreads / 16) {
    const int row = part % kRows, r = part / kRows * 16 + within;
    float sum = 0.0f;
    if (row < rows && r < true_rank) {
      const float* const from = v + (long long)row_index[row] * rank + r;
      for (int split = 0; split < splits; ++split) sum += from[split * split_step];
    }
    T upper, lower;
    from_float(sum, upper);
    const float rest = sum - to_float(upper);
    from_float(rest - rest == 0.0f ? rest : 0.0f, lower);  // an infinite v stays infinite
    *(T*)(high + row * pitch + r * 2) = upper;
    *(T*)(low + row * pitch + r * 2) = lower;
  }
}

// Elements of y, 8 at once where they lie so; plain loads, since y is written as well.
template <class T>
__device__ __forceinline__ Pack<T> load_y(const T* from, int count, bool wide) {
  Pack<T> pack;
  if (wide && count >= 8) {
    pack.words = *(const uint4*)from;
    return pack;
  }
  pack.words = make_uint4(0, 0, 0, 0);
#pragma unroll
  for (int i = 0; i < 8; ++i)
    if (i < count) pack.element[i] = from[i];
  return pack;
}

template <class T>
__device__ __forceinline__ void store_y(T* to, const Pack<T>& pack, int count, bool wide) {
  if (wide && count >= 8) {
    *(uint4*)to = pack.words;
    return;
  }
#pragma unroll
  for (int i = 0; i < 8; ++i)
    if (i < count) to[i] = pack.element[i];
}

// y of a tile's rows += scale * v @ B.T. Grid: tiles, runs of `run` columns (a multiple of 64) of all
// slices. Dynamic shared memory: v twice, kExpandStages tiles of B, 64 columns of results.
template <int kRows, class T>
__device__ __forceinline__ void expand_tiles(const float* v, const T* b, long long b1_shift,
                                             long long b2_shift, const int* tile_slot,
                                             const int* tile_row0, const int* tile_rows,
                                             const int* tile_rank, const float* tile_scale,
                                             const int* row_index, const T* y_in, T* y, int tokens,
                                             int rank, int slices, int splits, int out0, int out1,
                                             int out2, int y_stride, int run, int indirect) {
  constexpr int kWarpsDown = kRows / 16, kWarpsAcross = 4 / kWarpsDown;
  constexpr int kPairs = kBlockColumns / 16 / kWarpsAcross, kGroups = kRows / 16;
  constexpr int kStageBytes = kBlockColumns * kRowBytes;
  DOP_DYNAMIC_SHARED(shared);
  const int thread = threadIdx.x, lane = thread & 31, warp = thread >> 5;
  const int tile = blockIdx.x, rows = tile_rows[tile], slot = tile_slot[tile];
  const int* const index = row_index + tile_row0[tile];
  const int true_rank = min(tile_rank[tile], rank);
  const float scale = tile_scale[tile];
  if (rows <= 0) {
    wait_for_previous();
    return;
  }
  const auto [slice, block, offset, columns] = slice_of(blockIdx.y, run, out0, out1, out2);
  const T* const weights = weights_of(b, b1_shift, b2_shift, slice, slot,
                                      (long long)columns * rank, indirect);
  const bool wide_b = rank % 8 == 0 && is_aligned(weights);
  const bool wide_y = y_stride % 8 == 0 && is_aligned(y_in + offset) && is_aligned(y + offset);
  const int depth = (true_rank + 15) & ~15, pitch = depth * 2 + 16;
  const int chunks = (depth + kDepth - 1) / kDepth;
  unsigned char* const stages = shared;
  float* const result = (float*)(stages + kExpandStages * kStageBytes);
  unsigned char* const high = (unsigned char*)(result + kRows * kOutPitch);
  unsigned char* const low = high + kRows * pitch;
  const int first = block * run, last = min(first + run, columns);
  const int steps = (last - first + kBlockColumns - 1) / kBlockColumns * chunks;

  const auto fill = [&](int step) {
    unsigned char* const stage = stages + step % kExpandStages * kStageBytes;
    const int column = first + step / chunks * kBlockColumns, group = thread & 7;
    const int k = step % chunks * kDepth + group * 8;
#pragma unroll
    for (int i = 0; i < kBlockColumns / 16; ++i) {
      const int n = (thread >> 3) + 16 * i;
      const bool there = column + n < last && k < true_rank;
      fill_group(in_tile(stage, n, group),
                 there ? weights + (long long)(column + n) * rank + k : weights,
                 there ? true_rank - k : 0, wide_b);
    }
  };
  for (int i = 0; i < kExpandStages - 1; ++i) {
    if (i < steps) fill(i);
    copy_commit();
  }
  wait_for_previous();
  stage_v<kRows, T>(high, low, pitch, v + (long long)slice * tokens * rank, index, rows, true_rank,
                    depth, rank, splits, (long long)slices * tokens * rank);

  const int down = warp % kWarpsDown, across = warp / kWarpsDown;
  const int my_row = thread >> 3, my_column = (thread & 7) * 8;
  float sums[kPairs * 2][4] = {};
  Pack<T> old[kGroups];
#pragma unroll 1
  for (int step = 0; step < steps; ++step) {
    const int chunk = step % chunks, column = first + step / chunks * kBlockColumns + my_column;
    copy_wait<kExpandStages - 2>();
    __syncthreads();
    if (step + kExpandStages - 1 < steps) fill(step + kExpandStages - 1);
    copy_commit();
    if (chunk == 0) {
#pragma unroll
      for (int i = 0; i < kGroups; ++i) {
        const int row = my_row + 16 * i;
        const bool there = row < rows && column < last;
        const long long place = there ? (long long)index[row] * y_stride + offset + column : 0;
        old[i] = load_y(y_in + place, there ? last - column : 0, wide_y);
      }
    }
    unsigned char* const stage = stages + step % kExpandStages * kStageBytes;
    const int deep = min(kDepth, depth - chunk * kDepth) / 16;
#pragma unroll
    for (int k = 0; k < kDepth / 16; ++k) {
      if (k >= deep) break;
      unsigned upper[4], lower[4];
      const int at = (down * 16 + (lane & 15)) * pitch + (chunk * 8 + 2 * k + (lane >> 4)) * 16;
      load_matrices(upper, high + at);
      load_matrices(lower, low + at);
#pragma unroll
      for (int p = 0; p < kPairs; ++p) {
        unsigned right[4];
        load_columns16(right, stage, (across * kPairs + p) * 16, k, lane);
        multiply(sums[2 * p], upper, right[0], right[1], T());
        multiply(sums[2 * p + 1], upper, right[2], right[3], T());
        multiply(sums[2 * p], lower, right[0], right[1], T());
        multiply(sums[2 * p + 1], lower, right[2], right[3], T());
      }
    }
    if (chunk < chunks - 1) continue;

#pragma unroll
    for (int n = 0; n < kPairs * 2; ++n) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int row = down * 16 + (lane >> 2) + half * 8;
        float* const to =
            result + row * kOutPitch + across * kPairs * 16 + n * 8 + (lane & 3) * 2;
        to[0] = sums[n][2 * half];
        to[1] = sums[n][2 * half + 1];
        sums[n][2 * half] = sums[n][2 * half + 1] = 0.0f;
      }
    }
    __syncthreads();
#pragma unroll
    for (int i = 0; i < kGroups; ++i) {
      const int row = my_row + 16 * i;
      if (row >= rows || column >= last) continue;
      const float* const from = result + row * kOutPitch + my_column;
      Pack<T> fresh;
#pragma unroll
      for (int e = 0; e < 8; ++e)
        from_float(__fmaf_rn(scale, from[e], to_float(old[i].element[e])), fresh.element[e]);
      store_y(y + (long long)index[row] * y_stride + offset + column, fresh, last - column, wide_y);
    }
  }
  copy_wait<0>();
}

}  // namespace
