// SGMV for every shape, rank, number of slices and type, with run-time dimensions: entry points.
//
// y[t] += scale[slot] * (x[t] @ A[slot].T) @ B[slot].T in two launches: shrink makes the partial sums
// v [splits, slices, tokens, rank] in float32, expand adds up the splits and updates y. Sums have one
// order, so results are the same in every run.
//
// Parameters are separate and in the order of `ARGUMENTS` in kernels.py.

#include "rows.cuh"

#define DOP_ROWS(name, T)                                                                          \
  extern "C" __global__ void __launch_bounds__(kRowThreads, 3) dop_shrink_rows_##name(                \
      const T* x, const T* a, long long a1_shift, long long a2_shift, const int* token_slot,       \
      const int* token_rank, float* v, int in_features, int rank, int slices, int x_stride,        \
      int indirect, int fill) {                                                                    \
    shrink_rows(x, a, a1_shift, a2_shift, token_slot, token_rank, v, in_features, rank, slices,    \
                x_stride, indirect, fill);                                                         \
  }                                                                                                \
  extern "C" __global__ void __launch_bounds__(kRowThreads, 3) dop_expand_rows_##name(                \
      const float* v, const T* b, long long b1_shift, long long b2_shift, const int* token_slot,   \
      const int* token_rank, const float* token_scale, const T* y_in, T* y, int rank, int slices,  \
      int splits, int out0, int out1, int out2, int y_stride, int lanes_log2, int indirect) {      \
    expand_rows(v, b, b1_shift, b2_shift, token_slot, token_rank, token_scale, y_in, y, rank,      \
                slices, splits, out0, out1, out2, y_stride, lanes_log2, indirect);                 \
  }

DOP_ROWS(f16, Half)
DOP_ROWS(bf16, Bfloat)
DOP_ROWS(f32, float)

#include "tiles.cuh"

#define DOP_TILES(name, T, rows)                                                                   \
  extern "C" __global__ void __launch_bounds__(kTileThreads, 5) dop_shrink_tiles##rows##_##name(      \
      const T* x, const T* a, long long a1_shift, long long a2_shift, const int* tile_slot,        \
      const int* tile_row0, const int* tile_rows, const int* tile_rank, const int* row_index,      \
      float* v, int tokens, int in_features, int rank, int slices, int x_stride, int indirect) {   \
    shrink_tiles<rows>(x, a, a1_shift, a2_shift, tile_slot, tile_row0, tile_rows, tile_rank,       \
                       row_index, v, tokens, in_features, rank, slices, x_stride, indirect);       \
  }                                                                                                \
  extern "C" __global__ void __launch_bounds__(kTileThreads, 5) dop_expand_tiles##rows##_##name(      \
      const float* v, const T* b, long long b1_shift, long long b2_shift, const int* tile_slot,    \
      const int* tile_row0, const int* tile_rows, const int* tile_rank, const float* tile_scale,   \
      const int* row_index, const T* y_in, T* y, int tokens, int rank, int slices, int splits,     \
      int out0, int out1, int out2, int y_stride, int run, int indirect) {                         \
    expand_tiles<rows>(v, b, b1_shift, b2_shift, tile_slot, tile_row0, tile_rows, tile_rank,       \
                       tile_scale, row_index, y_in, y, tokens, rank, slices, splits, out0, out1,   \
                       out2, y_stride, run, indirect);                                             \
  }

DOP_TILES(f16, Half, 16)
DOP_TILES(f16, Half, 64)
DOP_TILES(bf16, Bfloat, 16)
DOP_TILES(bf16, Bfloat, 64)
