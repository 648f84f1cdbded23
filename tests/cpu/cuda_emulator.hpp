// Just enough CUDA on host threads to run one kernel text: a thread per CUDA thread, collective
// operations by exchange through a barrier per warp, block and cluster. Numbers are bf16.
#pragma once
#include <algorithm>
#include <barrier>
#include <cmath>
#include <condition_variable>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <string_view>
#include <thread>
#include <vector>

#define __device__
#define __global__
#define __forceinline__ inline
#define __launch_bounds__(n)
#define dop__cluster_dims__(x, y, z)
#define __align__(n)
#define __restrict__
struct uint2 { unsigned x, y; };
struct uint4 { unsigned x, y, z, w; };
struct float2 { float x, y; };
struct float4 { float x, y, z, w; };
struct dim3 { unsigned x, y, z; };
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
using std::max;
using std::min;
using __nv_bfloat16 = uint16_t;

struct Warp {
  std::barrier<> barrier{32};
  unsigned words[32][8];
};
struct Arrivals {  // an mbarrier: a phase ends when all have arrived and no bytes are due
  int wanted, due, bytes, phase;
};
struct Block {
  Block(int threads, int smem) : barrier(threads), warps(threads / 32), shared(smem, 0xff) {
    for (auto& w : warps) w = std::make_unique<Warp>();
  }
  std::barrier<> barrier;
  std::mutex lock;
  std::condition_variable moved;
  std::map<unsigned, Arrivals> arrivals;
  std::map<int, std::unique_ptr<std::barrier<>>> some;  // barriers of some of the threads
  bool all;
  std::vector<std::unique_ptr<Warp>> warps;
  std::vector<unsigned char> shared;
};
struct Cluster {
  Cluster(int blocks, int threads, int smem) : barrier(blocks * threads) {
    for (int b = 0; b < blocks; ++b) this->blocks.push_back(std::make_unique<Block>(threads, smem));
  }
  std::barrier<> barrier;
  std::vector<std::unique_ptr<Block>> blocks;
};
thread_local dim3 threadIdx, blockIdx, gridDim;
thread_local Warp* warp;
thread_local Block* block;
thread_local Cluster* cluster;
thread_local unsigned char* dop_shared_memory;
thread_local int warp_of_four;  // in its warpgroup
inline void __syncthreads() { block->barrier.arrive_and_wait(); }
inline float as_float(unsigned bits) { float f; std::memcpy(&f, &bits, 4); return f; }
inline unsigned as_bits(float f) { unsigned bits; std::memcpy(&bits, &f, 4); return bits; }
inline float low(unsigned w) { return as_float(w << 16); }
inline float high(unsigned w) { return as_float(w & 0xffff0000u); }
inline unsigned round_bf16(float f) {
  unsigned bits = as_bits(f);
  if (f != f) return 0x7fc0;
  return (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
}
template <class T> T __ldcs(const T* at) { return *at; }
template <class T> T __ldcg(const T* at) { return *at; }
template <class T> void __stcs(T* at, T value) { *at = value; }
inline unsigned dop_pack_bf16(float a, float b) { return round_bf16(a) | round_bf16(b) << 16; }
inline float dop_low_bf16(unsigned w) { return low(w); }
inline float dop_high_bf16(unsigned w) { return high(w); }
template <int N> void copy_words(unsigned (&words)[N], const void* at) { std::memcpy(words, at, 4 * N); }
template <int N> void dop_read_v(unsigned (&words)[N], const void* at) { copy_words(words, at); }
template <int N> void dop_read_b(unsigned (&words)[N], const void* at) { copy_words(words, at); }
template <int N> void dop_read_shared(unsigned (&words)[N], const void* at) { copy_words(words, at); }
template <class T> T dop_table(const T* at) { return *at; }
inline void dop_wait_at_most(int) {}
inline void dop_wait_for_v() {}
thread_local bool waited;
thread_local const void *x_begin, *x_end;  // what may be read behind the wait only
inline void dop_wait_for_predecessor() { waited = true; }
inline void dop_release_successor() { if (!waited) std::abort(); }
inline void dop_dependents_may_start() {}
inline void dop_commit() {}
template <int N> void dop_wait_but() {}
inline unsigned dop_shared_address(const void*) { return 0; }
inline void dop_copy(unsigned to, const void* from, int bytes) {
  if (from >= x_begin && from < x_end && !waited) std::abort();
  std::memset(block->shared.data() + to, 0, 16);
  std::memcpy(block->shared.data() + to, from, bytes);
}
inline void dop_copy_ahead(unsigned to, const void* from, int bytes) { dop_copy(to, from, bytes); }
// Arrival barriers and the copy engine.
inline void __syncwarp() { warp->barrier.arrive_and_wait(); }
inline bool dop_elected() {
  __syncwarp();
  return threadIdx.x == 0;
}
inline bool dop_all_of_block(bool here) {
  __atomic_store_n(&block->all, true, __ATOMIC_RELAXED);
  __syncthreads();
  if (!here) __atomic_store_n(&block->all, false, __ATOMIC_RELAXED);
  __syncthreads();
  const bool all = block->all;
  __syncthreads();
  return all;
}
inline void dop_barrier_init(unsigned at, int wanted) {
  std::lock_guard<std::mutex> held(block->lock);
  if (at % 8 || at + 8 > block->shared.size() || block->arrivals.count(at)) std::abort();
  block->arrivals[at] = {wanted, wanted, 0, 0};
}
inline void dop_barriers_are_ready() {}
inline void dop_barrier_change(unsigned at, int arrived, int bytes, Block* of = block) {
  std::lock_guard<std::mutex> held(of->lock);
  Arrivals& one = of->arrivals.at(at);
  one.due -= arrived;
  one.bytes += bytes;
  if (one.due < 0) std::abort();
  if (one.due == 0 && one.bytes == 0) {
    one.due = one.wanted;
    one.phase ^= 1;
    of->moved.notify_all();
  }
}
inline void dop_barrier_arrive(unsigned at) { dop_barrier_change(at, 1, 0); }
inline void dop_barrier_arrive_times(unsigned at, int times) { dop_barrier_change(at, times, 0); }
inline void dop_barrier_arrive_with(unsigned at, int bytes) { dop_barrier_change(at, 1, bytes); }
inline void dop_barrier_arrive_behind_copies(unsigned at) { dop_barrier_change(at, 1, 0); }
inline void dop_barrier_wait(unsigned at, int parity) {
  std::unique_lock<std::mutex> held(block->lock);
  block->moved.wait(held, [&] { return block->arrivals.at(at).phase != parity; });
}
inline void dop_barrier_wait_peers(unsigned at, int parity) { dop_barrier_wait(at, parity); }
inline void dop_sync_some(int barrier, int threads) {
  std::barrier<>* one;
  {
    std::lock_guard<std::mutex> held(block->lock);
    auto& found = block->some[barrier];
    if (!found) found = std::make_unique<std::barrier<>>(threads);
    one = found.get();
  }
  one->arrive_and_wait();
}
thread_local std::optional<std::barrier<>::arrival_token> arrived_in_cluster;
// What its halves wait for under compute-sanitizer (docs/performance.md, 52): memcheck lets nobody on
// from the first one before all have come to it, racecheck from the second one.
inline bool under(const char* tool) {
  const char* name = std::getenv("EMULATED_TOOL");
  return name && std::string_view(name) == tool;
}
inline void dop_cluster_arrive() {
  if (under("memcheck")) cluster->barrier.arrive_and_wait();
  else if (!under("racecheck")) arrived_in_cluster.emplace(cluster->barrier.arrive());
}
inline void dop_cluster_wait() {
  if (under("racecheck")) cluster->barrier.arrive_and_wait();
  else if (!under("memcheck")) cluster->barrier.wait(std::move(*arrived_in_cluster));
}
#define __grid_constant__
// As the test fills it in; a real one has no fields.
struct alignas(64) dop_tensor_map {
  const char* from;
  long long columns, rows, planes, box_rows, unused[11];
};
inline void dop_prefetch_map(const dop_tensor_map& map) {
  if ((size_t)&map % 64) std::abort();
}
inline void dop_copy_box(unsigned to, const dop_tensor_map& map, int column, int row, int plane,
                         unsigned barrier) {
  if (!waited || to % 1024 || column % 8 || plane < 0 || plane >= map.planes) std::abort();
  for (int r = 0; r < map.box_rows; ++r)
    for (int c = 0; c < 64; ++c) {
      uint16_t value = 0;
      if (row + r < map.rows && column + c < map.columns)
        std::memcpy(&value, map.from + 2 * ((plane * map.rows + row + r) * map.columns + column + c),
                    2);
      std::memcpy(block->shared.data() + to + r * 128 + (c / 8 ^ r % 8) * 16 + c % 8 * 2, &value, 2);
    }
  dop_barrier_change(barrier, 0, -128 * (int)map.box_rows);
}
inline void dop_copy_box_once(unsigned to, const dop_tensor_map& map, int column, int row, int plane,
                              unsigned barrier) {
  dop_copy_box(to, map, column, row, plane, barrier);
}
inline void dop_copy_box_kept(unsigned to, const dop_tensor_map& map, int column, int row, int plane,
                              unsigned barrier) {
  dop_copy_box(to, map, column, row, plane, barrier);
}
// wgmma of 64 rows, 16 of k and 8 * N ranks, both sides in shared memory, rows of 128 bytes.
inline void dop_fence_copies() {}
inline void dop_wgmma_begin() {}
inline void dop_wgmma_commit() {}
inline void dop_wgmma_wait() {}
// All four warps have multiplied what was in front of the last group.
inline void dop_wgmma_wait_but_one() { dop_sync_some(100 + threadIdx.z / 4, 128); }
// As the descriptors say, eight rows of eight may be 128 bytes instead.
template <int N>
void emulated_wgmma(float (&sum)[N][4], unsigned long long x, unsigned long long a) {
  auto at = [](unsigned long long box, int row, int k) {
    unsigned place = (unsigned)(box & 0x3fff) * 16;
    if (box >> 62) {
      place += row * 128 + k * 2;
      place ^= (place >> 7 & 7) << 4;
    } else {
      place += (box >> 16 & 0x3fff) * 16 * (k / 8) + (box >> 32 & 0x3fff) * 16 * (row / 8);
      place += row % 8 * 16 + k % 8 * 2;
    }
    uint16_t value;
    std::memcpy(&value, block->shared.data() + place, 2);
    return low(value);
  };
  const int lane = threadIdx.x;
  for (int n = 0; n < N; ++n)
    for (int e = 0; e < 4; ++e)
      for (int k = 0; k < 16; ++k)
        sum[n][e] += at(x, warp_of_four * 16 + lane / 4 + e / 2 * 8, k) *
                     at(a, n * 8 + lane % 4 * 2 + e % 2, k);
}
inline void dop_cluster_sync() { cluster->barrier.arrive_and_wait(); }
inline float4 dop_read_peer(unsigned at, int peer) {
  float4 value;
  std::memcpy(&value, cluster->blocks[peer]->shared.data() + at, 16);
  return value;
}
// Addresses of other blocks of the cluster: their number above 24 bits.
inline unsigned dop_peer(unsigned at, int peer) {
  cluster->blocks.at(peer);
  return at | (unsigned)peer << 24;
}
inline void dop_send(unsigned to, unsigned barrier, const void* from, int bytes) {
  Block* there = cluster->blocks.at(to >> 24).get();
  if (to >> 24 != barrier >> 24 || (to & 0xffffff) + bytes > there->shared.size()) std::abort();
  std::memcpy(there->shared.data() + (to & 0xffffff), from, bytes);
  dop_barrier_change(barrier & 0xffffff, 0, -bytes, there);
}
inline void dop_push(unsigned to, unsigned barrier, float x, float y) {
  const float words[2] = {x, y};
  dop_send(to, barrier, words, 8);
}
inline void dop_push(unsigned to, unsigned barrier, float x, float y, float z, float w) {
  const float words[4] = {x, y, z, w};
  dop_send(to, barrier, words, 16);
}
inline void dop_copy_to_peer(unsigned to, unsigned from, int bytes, unsigned barrier) {
  dop_send(to, barrier, block->shared.data() + from, bytes);
}
// Every lane gives its words, all of them see all.
inline void exchange(const unsigned* words, int count, unsigned (&all)[32][8]) {
  warp->barrier.arrive_and_wait();
  for (int i = 0; i < count; ++i) warp->words[threadIdx.x][i] = words[i];
  warp->barrier.arrive_and_wait();
  std::memcpy(all, warp->words, sizeof(all));
}
inline unsigned dop_lanes_with(bool here) {
  unsigned all[32][8], lanes = 0;
  const unsigned mine = here;
  exchange(&mine, 1, all);
  for (int i = 0; i < 32; ++i) lanes |= (all[i][0] & 1u) << i;
  return lanes;
}
inline int dop_first_lane(unsigned lanes) { return __builtin_ffs(lanes) - 1; }
template <class T> T dop_of_lane(T value, int lane) {
  unsigned all[32][8], bits;
  std::memcpy(&bits, &value, 4);
  exchange(&bits, 1, all);
  std::memcpy(&value, &all[lane][0], 4);
  return value;
}
inline void dop_ldmatrix(unsigned (&words)[4], unsigned at) {
  unsigned all[32][8];
  exchange(&at, 1, all);
  const int lane = threadIdx.x;
  for (int m = 0; m < 4; ++m)
    std::memcpy(&words[m], block->shared.data() + all[m * 8 + lane / 4][0] + lane % 4 * 4, 4);
}
// Two boxes of eight rows of eight, whose rows are the lanes' columns.
inline void dop_ldmatrix_turned(unsigned (&words)[2], unsigned at) {
  unsigned all[32][8];
  exchange(&at, 1, all);
  const int lane = threadIdx.x;
  for (int m = 0; m < 2; ++m)
    for (int e = 0; e < 2; ++e)
      std::memcpy((char*)&words[m] + 2 * e,
                  block->shared.data() + all[m * 8 + lane % 4 * 2 + e][0] + lane / 4 * 2, 2);
}
inline void dop_stmatrix_turned(unsigned at, const unsigned* words, int boxes) {
  unsigned all[32][8];
  exchange(&at, 1, all);
  const int lane = threadIdx.x;
  for (int m = 0; m < boxes; ++m)
    for (int e = 0; e < 2; ++e)
      std::memcpy(block->shared.data() + all[m * 8 + lane % 4 * 2 + e][0] + lane / 4 * 2,
                  (const char*)&words[m] + 2 * e, 2);
}
inline void dop_stmatrix_turned(unsigned at, unsigned x) { dop_stmatrix_turned(at, &x, 1); }
inline void dop_stmatrix_turned(unsigned at, unsigned x, unsigned y) {
  const unsigned words[2] = {x, y};
  dop_stmatrix_turned(at, words, 2);
}
// PTX ISA, "Matrix Fragments for mma.m16n8k16": element (row, k) of A, (k, column) of B.
inline void dop_mma_bf16(float* c, unsigned a0, unsigned a1, unsigned a2, unsigned a3, unsigned b0,
                         unsigned b1) {
  const unsigned mine[6] = {a0, a1, a2, a3, b0, b1};
  unsigned all[32][8];
  exchange(mine, 6, all);
  auto half = [](unsigned w, int odd) { return odd ? high(w) : low(w); };
  const int lane = threadIdx.x, g = lane / 4, q = lane % 4;
  for (int e = 0; e < 4; ++e) {
    const int row = g + e / 2 * 8, column = q * 2 + e % 2;
    for (int k = 0; k < 16; ++k) {
      const unsigned a = all[row % 8 * 4 + k % 8 / 2][row / 8 + k / 8 * 2];
      const unsigned b = all[column * 4 + k % 8 / 2][4 + k / 8];
      c[e] += half(a, k % 2) * half(b, k % 2);
    }
  }
}
// Runs one block per (x, y); `size` neighbours along y (all of them if 0) are a cluster.
template <class F>
void launch(int grid_x, int grid_y, dim3 shape, int smem, F kernel, int size = 0) {
  const int threads = shape.x * shape.y * shape.z;
  size = size ? size : grid_y;
  for (int at = 0; at < grid_x * grid_y; at += size) {
    const int x = at / grid_y, first = at % grid_y;
    Cluster together(size, threads, smem);
    std::vector<std::thread> running;
    for (int y = first; y < first + size; ++y)
      for (int t = 0; t < threads; ++t)
        running.emplace_back([&, x, y, t] {
          cluster = &together;
          gridDim = {unsigned(grid_x), unsigned(grid_y), 1};
          block = together.blocks[y - first].get();
          warp = block->warps[t / 32].get();
          warp_of_four = t / 32 % 4;
          dop_shared_memory = block->shared.data();
          threadIdx = {t % shape.x, t / shape.x % shape.y, t / (shape.x * shape.y)};
          blockIdx = {unsigned(x), unsigned(y), 0};
          kernel();
        });
    for (auto& thread : running) thread.join();
  }
}
