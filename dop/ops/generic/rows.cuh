// The row form: a block per token, on plain cores. Meant for decode, where most rows have adapters of
// their own and time goes into reading weights: all loads are 16 bytes wide where alignment allows
// and are issued before the first is used.
#pragma once

#include "common.cuh"

namespace {

constexpr int kRowThreads = 128;
constexpr int kRanks = 8;    // ranks per block in shrink
constexpr int kColumns = 8;  // columns per lane in expand, before lanes share ranks

// Sums of 8 values over the warp: afterwards lanes 4 r .. 4 r + 3 hold the sum of sums[r] in sums[0].
__device__ __forceinline__ void add_over_warp(float (&sums)[kRanks], int lane) {
#pragma unroll
  for (int half = kRanks / 2, bit = 16; half >= 1; half /= 2, bit /= 2) {
    const bool upper = lane & bit;
#pragma unroll
    for (int i = 0; i < half; ++i) {
      const float other = __shfl_xor_sync(kAllLanes, upper ? sums[i] : sums[i + half], bit);
      sums[i] = (upper ? sums[i + half] : sums[i]) + other;
    }
  }
  sums[0] += __shfl_xor_sync(kAllLanes, sums[0], 2);
  sums[0] += __shfl_xor_sync(kAllLanes, sums[0], 1);
}

// Dot products of x[0, width) with up to 8 rows of A over groups [begin, end) of 128 packs.
template <bool kWide, class T>
__device__ __forceinline__ void dot_rows(float (&sums)[kRanks], const T* __restrict__ x,
                                         const T* __restrict__ a, int rows, int width, int begin,
                                         int end) {
  constexpr int kPack = Pack<T>::kElements, kUnroll = kWide ? 2 : 1;
#pragma unroll 1
  for (int group = begin; group < end; group += kUnroll) {
    Pack<T> in[kUnroll], weight[kUnroll][kRanks];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const int k = ((group + u) * kRowThreads + (int)threadIdx.x) * kPack;
      const int count = group + u < end ? width - k : 0;
#pragma unroll
      for (int r = 0; r < kRanks; ++r)
        weight[u][r] = load_pack<kWide>(a + (long long)r * width + k, r < rows ? count : 0);
      in[u] = load_pack<kWide>(x + k, count);
    }
#pragma unroll
    for (int u = 0; u < kUnroll; ++u)
#pragma unroll
      for (int r = 0; r < kRanks; ++r)
#pragma unroll
        for (int i = 0; i < kPack; ++i)
          sums[r] = __fmaf_rn(to_float(in[u].element[i]), to_float(weight[u][r].element[i]),
                              sums[r]);
  }
}

// v[split, slice, token, :] = x[token, part of split] @ A[slot].T. Grid: tokens, groups of 8 ranks x
// slices, splits. With `fill`, also zeros where there is no adapter or no rank.
template <class T>
__device__ __forceinline__ void shrink_rows(const T* x, const T* a, long long a1_shift,
                                            long long a2_shift, const int* token_slot,
                                            const int* token_rank, float* v, int in_features,
                                            int rank, int slices, int x_stride, int indirect,
                                            int fill) {
  __shared__ float partial[kRowThreads / 32][kRanks];
  let_next_start();
  const int token = blockIdx.x, tokens = gridDim.x, lane = threadIdx.x & 31;
  const int groups = (rank + kRanks - 1) / kRanks;
  const int slice = blockIdx.y / groups, first = (blockIdx.y - slice * groups) * kRanks;
  const int slot = token_slot[token], true_rank = min(token_rank[token], rank);
  const int rows = slot < 0 ? 0 : min(true_rank - first, kRanks);
  if (rows <= 0 && !fill) return;
  float* const to =
      v + (((long long)blockIdx.z * slices + slice) * tokens + token) * rank + first;
  float sums[kRanks] = {};
  if (rows > 0) {
    const T* const weights = weights_of(a, a1_shift, a2_shift, slice, slot,
                                        (long long)rank * in_features, indirect) +
                             (long long)first * in_features;
    const T* const row = x + (long long)token * x_stride;
    constexpr int kGroup = kRowThreads * Pack<T>::kElements;
    const int all = (in_features + kGroup - 1) / kGroup, splits = gridDim.z;
    const int begin = (int)((long long)all * blockIdx.z / splits);
    const int end = (int)((long long)all * (blockIdx.z + 1) / splits);
    const bool wide =
        in_features % Pack<T>::kElements == 0 && is_aligned(weights) && is_aligned(row);
    if (wide) dot_rows<true>(sums, row, weights, rows, in_features, begin, end);
    else dot_rows<false>(sums, row, weights, rows, in_features, begin, end);
  }
  add_over_warp(sums, lane);
  if ((lane & 3) == 0) partial[threadIdx.x >> 5][lane >> 2] = sums[0];
  __syncthreads();
  const int r = threadIdx.x;
  if (r >= kRanks || first + r >= rank || (r >= rows && !fill)) return;
  float sum = 0.0f;
#pragma unroll
  for (int w = 0; w < kRowThreads / 32; ++w) sum += partial[w][r];
  to[r] = r < rows ? sum : 0.0f;
}

// Sums over the lanes that share a column, and the columns spread over them: lane bit 0 keeps half
// of the columns, bit 1 half of those, and so on. Returns the first column kept.
__device__ __forceinline__ int spread_columns(float (&sums)[kColumns], int lane, int lanes_log2) {
  int first = 0;
#pragma unroll
  for (int step = 0, half = kColumns / 2; step < 3; ++step, half /= 2) {
    if (step >= lanes_log2) break;
    const bool upper = lane >> step & 1;
#pragma unroll
    for (int i = 0; i < half; ++i) {
      const float other = __shfl_xor_sync(kAllLanes, upper ? sums[i] : sums[i + half], 1 << step);
      sums[i] = (upper ? sums[i + half] : sums[i]) + other;
    }
    first += upper ? half : 0;
  }
  return first;
}

template <class T>
__device__ __forceinline__ void load_columns(Pack<T> (&weight)[kColumns], const T* __restrict__ b,
                                             int column, int step, int columns, int r,
                                             int true_rank, int rank) {
#pragma unroll
  for (int c = 0; c < kColumns; ++c) {
    const int n = column + c * step;
    // The stack goes on behind the true rank up to a whole pack, so a wide load is inside it.
    const bool there = n < columns && r < true_rank;
    weight[c] = load_pack<true>(b + (long long)n * rank + r, there ? Pack<T>::kElements : 0);
  }
}

// The same products from single elements, for what is not aligned.
template <class T>
__device__ __forceinline__ void add_elements(float (&sums)[kColumns], const float* shared,
                                             const T* __restrict__ b, int column, int step,
                                             int columns, int begin, int end, int rank) {
#pragma unroll 1
  for (int r = begin; r < end; ++r) {
    const float factor = shared[r];
#pragma unroll
    for (int c = 0; c < kColumns; ++c) {
      const int n = column + c * step;
      if (n < columns) sums[c] = __fmaf_rn(factor, to_float(b[(long long)n * rank + r]), sums[c]);
    }
  }
}

// y += scale * v @ B.T for 8 columns per group of lanes of one slice. v may be written while this
// runs (see wait_for_previous), so it is read by plain loads, not as read-only data.
template <bool kWide, class T>
__device__ __forceinline__ void expand_columns(const float* v, const T* __restrict__ b,
                                               const T* y_in, T* y, float* shared, int column,
                                               int columns, int rank, int true_rank, float scale,
                                               int lanes_log2, int splits, long long split_step) {
  constexpr int kPack = Pack<T>::kElements;
  const int lane = threadIdx.x & 31, mine = lane & ((1 << lanes_log2) - 1);
  const int step = 32 >> lanes_log2, kept = kColumns >> lanes_log2;
  const int at = column + (lane >> lanes_log2), width = kPack << lanes_log2;
  [[maybe_unused]] Pack<T> weight[kColumns];
  if constexpr (kWide) load_columns(weight, b, at, step, columns, mine * kPack, true_rank, rank);

  // Which columns this lane will keep follows from its bits, see spread_columns.
  int first = 0;
  for (int i = 0; i < lanes_log2; ++i) first += (lane >> i & 1) ? kColumns >> (i + 1) : 0;
  T old[kColumns];
#pragma unroll
  for (int i = 0; i < kColumns; ++i) {
    const int n = at + (first + i) * step;
    if (i < kept && n < columns) old[i] = y_in[n];
  }

  wait_for_previous();
  const int padded = (true_rank + width - 1) / width * width;
#pragma unroll 1
  for (int r = threadIdx.x; r < padded; r += kRowThreads) {
    float sum = 0.0f;
    if (r < true_rank)
#pragma unroll 4
      for (int split = 0; split < splits; ++split) sum += v[split * split_step + r];
    shared[r] = sum;
  }
  __syncthreads();

  float sums[kColumns] = {};
#pragma unroll 1
  for (int r = mine * kPack; r < padded; r += width) {
    if constexpr (kWide) {
#pragma unroll
      for (int i = 0; i < kPack; ++i) {
        const float factor = shared[r + i];
#pragma unroll
        for (int c = 0; c < kColumns; ++c)
          sums[c] = __fmaf_rn(factor, to_float(weight[c].element[i]), sums[c]);
      }
      if (r + width < padded)
        load_columns(weight, b, at, step, columns, r + width, true_rank, rank);
    } else {
      add_elements(sums, shared, b, at, step, columns, r, min(r + kPack, true_rank), rank);
    }
  }
  spread_columns(sums, lane, lanes_log2);
#pragma unroll
  for (int i = 0; i < kColumns; ++i) {
    const int n = at + (first + i) * step;
    if (i < kept && n < columns)
      from_float(__fmaf_rn(scale, sums[i], to_float(old[i])), y[n]);
  }
}

// y[token] += scale * (sum of splits of v[:, slice, token]) @ B[slot].T. Grid: tokens, blocks of
// 1024 >> lanes_log2 columns of all slices. Dynamic shared memory: v, padded.
template <class T>
__device__ __forceinline__ void expand_rows(const float* v, const T* b, long long b1_shift,
                                            long long b2_shift, const int* token_slot,
                                            const int* token_rank, const float* token_scale,
                                            const T* y_in, T* y, int rank, int slices, int splits,
                                            int out0, int out1, int out2, int y_stride,
                                            int lanes_log2, int indirect) {
  DOP_DYNAMIC_SHARED(shared);
  const int token = blockIdx.x, tokens = gridDim.x;
  const int slot = token_slot[token], true_rank = min(token_rank[token], rank);
  const float scale = token_scale[token];
  if (slot < 0) {
    wait_for_previous();
    return;
  }
  const int per_block = (kRowThreads * kColumns) >> lanes_log2;
  const auto [slice, block, offset, columns] = slice_of(blockIdx.y, per_block, out0, out1, out2);
  const T* const weights = weights_of(b, b1_shift, b2_shift, slice, slot,
                                      (long long)columns * rank, indirect);
  const long long split_step = (long long)slices * tokens * rank;
  const float* const from = v + ((long long)slice * tokens + token) * rank;
  const long long place = (long long)token * y_stride + offset;
  const int column = block * per_block + (int)(threadIdx.x >> 5) * (per_block / (kRowThreads / 32));
  const bool wide = rank % Pack<T>::kElements == 0 && is_aligned(weights);
  if (wide)
    expand_columns<true>(from, weights, y_in + place, y + place, (float*)shared, column, columns,
                         rank, true_rank, scale, lanes_log2, splits, split_step);
  else
    expand_columns<false>(from, weights, y_in + place, y + place, (float*)shared, column, columns,
                          rank, true_rank, scale, lanes_log2, splits, split_step);
}

}  // namespace
