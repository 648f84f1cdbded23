// Punica's calling convention: one weight pointer per segment of rows, B as [rank, out].
//
//   y[s[i]:s[i+1]] += (x[s[i]:s[i+1]] @ A_i) @ B_i      A_i: [rank, in] transposed, or [in, rank]
//
// Two launches: shrink makes v [tokens, rank] in float32, expand updates y. Each block finds the
// segment of its row itself, so nothing is prepared on the host. Sums have one order.
// Parameters are in the order of SHRINK and EXPAND in punica.py.

#ifndef DOP_ON_HOST
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#endif

namespace {

constexpr int kThreads = 128;
constexpr int kRanks = 8;

// The segment i with ends[i] <= row < ends[i + 1]; segments may be empty. -1: the row is in none.
__device__ int segment_of(const int* ends, int segments, int row) {
  if (row < ends[0] || row >= ends[segments]) return -1;
  int low = 0, high = segments;
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    if (ends[middle] <= row) low = middle;
    else high = middle;
  }
  return low;
}

template <class T>
__device__ const T* matrix(const long long* pointers, int segment, int layer, int rows, int columns) {
  return (const T*)pointers[segment] + (long long)layer * rows * columns;
}

template <class T>
__device__ void shrink(const T* x, const long long* a, const int* ends, float* v, int in_features,
                       int rank, int segments, int layer, int transposed) {
  __shared__ float partial[kThreads / 32][kRanks];
  const int row = blockIdx.x, first = blockIdx.y * kRanks, lane = threadIdx.x % 32;
  const int segment = segment_of(ends, segments, row);
  if (segment < 0) return;
  const T* const weights = matrix<T>(a, segment, layer, in_features, rank);
  const int count = min(kRanks, rank - first);
  float sums[kRanks] = {};
  for (int k = threadIdx.x; k < in_features; k += kThreads) {
    const float value = (float)x[(long long)row * in_features + k];
    for (int r = 0; r < kRanks; ++r) {
      if (r >= count) break;
      const long long at = transposed ? (long long)(first + r) * in_features + k
                                      : (long long)k * rank + first + r;
      sums[r] += value * (float)weights[at];
    }
  }
  for (int r = 0; r < kRanks; ++r) {
    for (int step = 16; step; step /= 2) sums[r] += __shfl_xor_sync(~0u, sums[r], step);
    if (lane == 0) partial[threadIdx.x / 32][r] = sums[r];
  }
  __syncthreads();
  if (threadIdx.x < count) {
    float sum = 0;
    for (int w = 0; w < kThreads / 32; ++w) sum += partial[w][threadIdx.x];
    v[(long long)row * rank + first + threadIdx.x] = sum;
  }
}

template <class T>
__device__ void expand(const float* v, const long long* b, const int* ends, T* y, int out, int rank,
                       int segments, int layer) {
  const int row = blockIdx.x, column = blockIdx.y * kThreads + threadIdx.x;
  const int segment = segment_of(ends, segments, row);
  if (segment < 0 || column >= out) return;
  const T* const weights = matrix<T>(b, segment, layer, rank, out) + column;
  const float* const from = v + (long long)row * rank;
  float sum = 0;
#pragma unroll 8
  for (int r = 0; r < rank; ++r) sum += from[r] * (float)weights[(long long)r * out];
  T* const to = y + (long long)row * out + column;
  *to = (T)((float)*to + sum);
}

}  // namespace

#define DOP_PUNICA(name, T)                                                                      \
  extern "C" __global__ void __launch_bounds__(kThreads) dop_punica_shrink_##name(               \
      const T* x, const long long* a, const int* ends, float* v, int in_features, int rank,      \
      int segments, int layer, int transposed) {                                                 \
    shrink(x, a, ends, v, in_features, rank, segments, layer, transposed);                       \
  }                                                                                              \
  extern "C" __global__ void __launch_bounds__(kThreads) dop_punica_expand_##name(               \
      const float* v, const long long* b, const int* ends, T* y, int out, int rank,              \
      int segments, int layer) {                                                                 \
    expand(v, b, ends, y, out, rank, segments, layer);                                           \
  }

#ifndef DOP_ON_HOST
DOP_PUNICA(f16, __half)
DOP_PUNICA(bf16, __nv_bfloat16)
#endif
DOP_PUNICA(f32, float)
