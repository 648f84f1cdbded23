#pragma once
// SGMV: the multi-LoRA operator, tuned. Made by Dop; do not edit.
//
//   y[t] += scale(t) * (x[t] @ A[slot(t)].T) @ B[slot(t)].T
//   for every token t; slot -1: y[t] is not touched
//
@PROVENANCE@
//
// Use (nvcc 12 or newer, C++17, sm_80 or newer, no other dependency):
//
//   dop::sgmv::Problem p;
//   p.shape = {4096, {4096, 1024, 1024}, 3, 16, dop::sgmv::Dtype::bf16};   // in, outs, slices, rank
//   p.x = x;  p.y = y;                    // [tokens, in], [tokens, sum of outs], row-major
//   p.a[s] = a_s;  p.b[s] = b_s;          // [slots, rank, in] and [slots, outs[s], rank] per slice
//   p.tokens = tokens;  p.slots = slots;
//   p.token_slot = token_slot;            // device, int32 [tokens]: slot of each token, or -1
//   p.rows_per_segment = 4;               // hint: tokens per adapter, 0 if not known
//   size_t bytes = dop::sgmv::workspace_bytes(p);
//   cudaError_t error = dop::sgmv::sgmv(p, workspace, stream);
//
// - x, y, every a[s] and b[s] and the workspace must be 16-byte aligned; `check` says what is wrong.
// - A call launches kernels on `stream` and nothing else: no synchronisation, no allocation. What
//   it launches depends only on the shape, tokens, slots, max_adapters and the hint, so a CUDA
//   graph captured once is right for every later batch of that size; token_slot's content may
//   change between replays. Make one call before capturing: it sets kernel attributes.
// - Adapters of lower rank than their stack's: token_rank (device, int32 [tokens]: rank of each
//   token's adapter) makes a call read and count the first ranks only. token_scale (float [tokens])
//   multiplies the update. Both may stay null: full ranks, scale 1.
// - Kernels that take row tiles need tables made from token_slot. Make them once per forward pass
//   and share them between layers (`tile_rows_of`, `tile_bound`, `make_tables`, Problem::tables);
//   without them every call makes its own in the workspace.
// - Results do not depend on which kernel is chosen beyond rounding, and not on the run: no atomics.
//
// - Compile for sm_90a on an H100 or H200: kernels with wgmma are used only then.
//
// The header can be included by several translation units; each gets its own copy of the kernels.

#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>
#include <limits>
#include <vector>
@INCLUDES@

namespace dop {
namespace sgmv {

enum class Dtype { f16, bf16, f32 };

/// One call site of a model: what `supports` knows by heart.
struct Shape {
  int in_features = 0;
  int out_features[3] = {0, 0, 0};
  int slices = 1;
  int rank = 0;
  Dtype dtype = Dtype::bf16;
};

/// Tables of row tiles: rows of one adapter, at most `rows` each. All arrays on the device.
struct Tables {
  int rows = 0;                   ///< rows per tile
  int tiles = 0;                  ///< length of the three tile arrays, see `tile_bound`
  int* tile_slot = nullptr;       ///< [tiles] slot of the tile's adapter
  int* tile_row0 = nullptr;       ///< [tiles] first position in row_index
  int* tile_rows = nullptr;       ///< [tiles] rows in use; 0: an empty tile
  int* row_index = nullptr;       ///< [tokens] tokens sorted by slot, those without adapter last
  int* tile_rank = nullptr;       ///< [tiles] rank of the tile's adapter, or null: full ranks
  float* tile_scale = nullptr;    ///< [tiles] scale of the tile's adapter, or null: 1
};

struct Problem {
  Shape shape;
  int tokens = 0;
  int slots = 0;                  ///< matrices in each stack; ids in token_slot are below it
  const void* x = nullptr;        ///< [tokens, in_features]
  void* y = nullptr;              ///< [tokens, sum of out_features], read and written
  const void* a[3] = {nullptr, nullptr, nullptr};  ///< per slice [slots, rank, in_features]
  const void* b[3] = {nullptr, nullptr, nullptr};  ///< per slice [slots, out_features[s], rank]
  const int* token_slot = nullptr;                 ///< [tokens], device; -1: no adapter
  const int* token_rank = nullptr;                 ///< [tokens], device, 1 or more; null: full ranks
  const float* token_scale = nullptr;              ///< [tokens], device; null: 1
  double rows_per_segment = 0;    ///< hint: tokens per adapter in the batch; 0: not known
  int max_adapters = 0;           ///< adapters that a batch can hold; 0: as many as slots. A batch
                                  ///< with more gives wrong results; a smaller bound is faster.
  const Tables* tables = nullptr; ///< ready tables, or none
  int table_count = 0;
};

namespace detail {

constexpr int kMaxWorkspaces = 8;

struct Call {
  const void *x, *a, *b;
  void *y, *y_in;
  const int *token_slot, *tile_slot, *tile_row0, *tile_rows, *row_index;
  const int *token_rank, *tile_rank;       // null: full ranks
  const float *token_scale, *tile_scale;   // null: 1
  long long a1_shift, a2_shift, b1_shift, b2_shift;
  int tokens, tiles, slots;
  void* workspace[kMaxWorkspaces];
};

struct Kernel {
  const char* name;
  int tile_rows;     // 0: one token per block row, takes token_slot only
  int min_arch;      // 80, 90, ...
  int max_smem;      // dynamic shared memory per block, bytes
  cudaError_t (*launch)(Call&, cudaStream_t);
  size_t (*workspace)(Call&, char*);
};

struct Row {
  int tokens;
  double rows_upto;
  int kernel;
};

struct Workload {
  Shape shape;
  int first_row, rows;            // of every GPU
  int own_row, own_rows;          // where compiled for sm_90a, if any
  int first_kernel, kernels;      // of every GPU
};

inline size_t padded(long long bytes) { return ((size_t)bytes + 255) / 256 * 256; }

inline char* at(char* base, size_t offset) { return base ? base + offset : nullptr; }

// A dependent launch may start before its predecessor ends; its kernel waits for what it needs.
inline cudaError_t launch(const void* kernel, long long gx, long long gy, long long gz, int bx,
                          int by, int bz, int smem, bool dependent, void** arguments,
                          cudaStream_t stream) {
  if (gx < 1 || gy < 1 || gz < 1) return cudaSuccess;
  if (gx > 2147483647LL || gy > 65535 || gz > 65535) return cudaErrorInvalidConfiguration;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3((unsigned)gx, (unsigned)gy, (unsigned)gz);
  config.blockDim = dim3(bx, by, bz);
  config.dynamicSmemBytes = (size_t)smem;
  config.stream = stream;
  cudaLaunchAttribute attribute = {};
  if (dependent) {
    int device = 0, major = 0;
    cudaError_t error = cudaGetDevice(&device);
    if (error == cudaSuccess)
      error = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
    if (error != cudaSuccess) return error;
    attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attribute.val.programmaticStreamSerializationAllowed = 1;
    config.attrs = &attribute;
    config.numAttrs = major >= 9 ? 1 : 0;
  }
  return cudaLaunchKernelExC(&config, kernel, arguments);
}

constexpr int kMaxDevices = 64;

// Code of sm_90a alone (wgmma) is there only if the header was compiled for sm_90a: this kernel's
// bound, which the driver knows of the code that it loads, tells.
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
#define DOP_SGMV_OWN_BOUND 64
#else
#define DOP_SGMV_OWN_BOUND 32
#endif
static __global__ void __launch_bounds__(DOP_SGMV_OWN_BOUND) own_kernel() {}
#undef DOP_SGMV_OWN_BOUND

static inline bool compiled_for_own(int device) {
  static signed char known[kMaxDevices] = {};  // 1: no, 2: yes
  if (device < kMaxDevices && known[device]) return known[device] == 2;
  cudaFuncAttributes found = {};
  if (cudaFuncGetAttributes(&found, (const void*)&own_kernel) != cudaSuccess) return false;
  const bool own = found.maxThreadsPerBlock == 64;
  if (device < kMaxDevices) known[device] = own ? 2 : 1;
  return own;
}

// Dynamic shared memory above 48 KB must be asked for, once per device and kernel.
inline cudaError_t allow_smem(const void* kernel, int smem, bool (&done)[kMaxDevices]) {
  int device = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error != cudaSuccess || smem <= 48 * 1024) return error;
  if (device < kMaxDevices && done[device]) return cudaSuccess;
  error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, smem);
  if (error == cudaSuccess && device < kMaxDevices) done[device] = true;
  return error;
}

// ---- tables of row tiles -------------------------------------------------------------------

constexpr int kPlanWarps = 32;
constexpr int kAnyRank = 1 << 30;  // an adapter that fills its stack

inline size_t counter_ints(int slots) { return (size_t)(slots + 1) * (kPlanWarps + 3); }

__device__ __forceinline__ int plan_key(int slot, int slots) {
  return slot >= 0 && slot < slots ? slot : slots;
}

// A stable counting sort of the tokens by slot in one block, and the tiles of each segment. Warp w
// owns the w-th range of tokens and counters of its own, so no atomics: the tables are the same in
// every run, and equal to make_tables_host's.
static __global__ void __launch_bounds__(kPlanWarps * 32)
    plan_kernel(const int* token_slot, const int* token_rank, const float* token_scale, int tokens,
                int slots, int rows, int tiles, int* tile_slot, int* tile_row0, int* tile_rows,
                int* row_index, int* tile_rank, float* tile_scale, int* counters) {
  constexpr int kThreads = kPlanWarps * 32;
  __shared__ int sum_rows[kThreads], sum_tiles[kThreads];
  const int thread = (int)threadIdx.x, lane = thread & 31, warp = thread >> 5;
  const int keys = slots + 1;  // the last key: tokens without adapter
  int* const segment_start = counters + (size_t)keys * kPlanWarps;
  int* const segment_tile = segment_start + keys;
  int* const segment_rows = segment_tile + keys;
  const int share = (tokens + kThreads - 1) / kThreads * 32;
  const int begin = warp * share, end = min(begin + share, tokens);

  for (int i = thread; i < keys * kPlanWarps; i += kThreads) counters[i] = 0;
  __syncthreads();
  for (int first = begin; first < end; first += 32) {
    const int token = first + lane;
    const int key = token < end ? plan_key(token_slot[token], slots) : -1;
    const unsigned same = __match_any_sync(0xffffffffu, key);
    if (key >= 0 && lane == __ffs(same) - 1) counters[key * kPlanWarps + warp] += __popc(same);
    __syncwarp();
  }
  __syncthreads();

  const int each = (keys + kThreads - 1) / kThreads;
  const int key0 = min(thread * each, keys), key1 = min(key0 + each, keys);
  int my_rows = 0, my_tiles = 0;
  for (int key = key0; key < key1; ++key) {
    int count = 0;
    for (int w = 0; w < kPlanWarps; ++w) count += counters[key * kPlanWarps + w];
    segment_rows[key] = count;
    my_rows += count;
    my_tiles += key < slots ? (count + rows - 1) / rows : 0;
  }
  sum_rows[thread] = my_rows;
  sum_tiles[thread] = my_tiles;
  __syncthreads();
  for (int step = 1; step < kThreads; step *= 2) {
    const int left_rows = thread >= step ? sum_rows[thread - step] : 0;
    const int left_tiles = thread >= step ? sum_tiles[thread - step] : 0;
    __syncthreads();
    sum_rows[thread] += left_rows;
    sum_tiles[thread] += left_tiles;
    __syncthreads();
  }
  int start = sum_rows[thread] - my_rows, tile = sum_tiles[thread] - my_tiles;
  for (int key = key0; key < key1; ++key) {
    segment_start[key] = start;
    segment_tile[key] = tile;
    tile += key < slots ? (segment_rows[key] + rows - 1) / rows : 0;
    for (int w = 0; w < kPlanWarps; ++w) {
      const int count = counters[key * kPlanWarps + w];
      counters[key * kPlanWarps + w] = start;
      start += count;
    }
  }
  __syncthreads();

  for (int i = sum_tiles[kThreads - 1] + thread; i < tiles; i += kThreads)
    tile_slot[i] = tile_row0[i] = tile_rows[i] = 0;
  for (int first = begin; first < end; first += 32) {
    const int token = first + lane;
    const int key = token < end ? plan_key(token_slot[token], slots) : -1;
    const unsigned same = __match_any_sync(0xffffffffu, key);
    const int place = key >= 0 ? counters[key * kPlanWarps + warp] : 0;
    __syncwarp();
    if (key >= 0 && lane == __ffs(same) - 1) counters[key * kPlanWarps + warp] += __popc(same);
    __syncwarp();
    if (key < 0) continue;
    const int position = place + __popc(same & ((1u << lane) - 1));
    row_index[position] = token;
    const int row = position - segment_start[key];
    if (key == slots || row % rows != 0) continue;
    const int mine = segment_tile[key] + row / rows;
    if (mine < tiles) {
      tile_slot[mine] = key;
      tile_row0[mine] = position;
      tile_rows[mine] = min(segment_rows[key] - row, rows);
      if (tile_rank) tile_rank[mine] = token_rank ? token_rank[token] : kAnyRank;
      if (tile_scale) tile_scale[mine] = token_scale ? token_scale[token] : 1.0f;
    }
  }
}

}  // namespace detail

/// Most tiles that a batch of `tokens` tokens and at most `adapters` adapters can need: the length
/// of the tile arrays. It does not depend on the batch, so a graph's grid can be fixed.
inline int tile_bound(int tokens, int rows, int adapters) {
  const long long bound =
      ((long long)tokens + rows - 1) / rows + (adapters < tokens ? adapters : tokens);
  return (int)(bound < tokens ? bound : tokens);
}

/// Bytes of scratch memory for `make_tables`.
inline size_t make_tables_bytes(int slots) { return detail::counter_ints(slots) * sizeof(int); }

/// Fills the arrays of `out` (rows, tiles and pointers set by the caller) from token_slot, on the
/// device, by one kernel of one block; deterministic. Meant for up to 65536 tokens. Ranks and
/// scales [tokens] may be null.
static inline cudaError_t make_tables(const int* token_slot, int tokens, int slots,
                                      const Tables& out, void* scratch, cudaStream_t stream,
                                      const int* token_rank = nullptr,
                                      const float* token_scale = nullptr) {
  if (tokens < 0 || slots < 0 || out.rows < 1 || out.tiles < 0) return cudaErrorInvalidValue;
  if (tokens == 0 && out.tiles == 0) return cudaSuccess;
  detail::plan_kernel<<<1, detail::kPlanWarps * 32, 0, stream>>>(
      token_slot, token_rank, token_scale, tokens, slots, out.rows, out.tiles, out.tile_slot,
      out.tile_row0, out.tile_rows, out.row_index, out.tile_rank, out.tile_scale, (int*)scratch);
  return cudaPeekAtLastError();
}

/// The same on the host, into host arrays; returns the tiles needed (more than out.tiles: the
/// arrays are too short and what did not fit is missing).
inline int make_tables_host(const int* token_slot, int tokens, int slots, const Tables& out) {
  std::vector<int> count((size_t)slots + 2, 0), tile((size_t)slots + 2, 0);
  auto key_of = [&](int t) {
    return token_slot[t] >= 0 && token_slot[t] < slots ? token_slot[t] : slots;
  };
  for (int t = 0; t < tokens; ++t) ++count[(size_t)key_of(t) + 1];
  for (int s = 0; s < slots; ++s) {
    const int rows = count[(size_t)s + 1];
    for (int done = 0, i = tile[(size_t)s]; done < rows; done += out.rows, ++i)
      if (i < out.tiles) {
        out.tile_slot[i] = s;
        out.tile_row0[i] = count[(size_t)s] + done;
        out.tile_rows[i] = rows - done < out.rows ? rows - done : out.rows;
      }
    tile[(size_t)s + 1] = tile[(size_t)s] + (rows + out.rows - 1) / out.rows;
    count[(size_t)s + 1] += count[(size_t)s];
  }
  const int needed = tile[(size_t)slots];
  for (int i = needed; i < out.tiles; ++i)
    out.tile_slot[i] = out.tile_row0[i] = out.tile_rows[i] = 0;
  for (int t = 0; t < tokens; ++t) out.row_index[count[(size_t)key_of(t)]++] = t;
  return needed;
}

}  // namespace sgmv

// ---- generated kernels ---------------------------------------------------------------------

#ifdef __NVCC__
#pragma nv_diagnostic push
#pragma nv_diag_suppress 177  // a variable that one form of a kernel does not need
#if __CUDACC_VER_MAJOR__ >= 13
#pragma nv_diag_suppress 1444  // ulonglong4 is deprecated there: generated 32-byte copies use it
#endif
#endif

