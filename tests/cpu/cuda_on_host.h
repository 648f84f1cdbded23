// Runs CUDA kernels on the host, so that a test without a GPU executes the text that ships.
//
// Each thread of a block is a fiber; blocks run one after another. Barriers and warp collectives
// suspend a fiber until its partners have come; the order in which fibers run is drawn anew from a
// seed, so that a missing barrier shows in some run. Asynchronous copies happen when they are waited
// for, not before. What this cannot show: memory consistency, alignment faults of the hardware's
// wide loads (checked by assertion where the kernels use them) and time.
#pragma once

#include <ucontext.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <memory>
#include <random>
#include <vector>

#define DOP_ON_HOST 1
#define __global__
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __restrict__
#define __align__(n) alignas(n)
#define __shared__ static
#define DOP_DYNAMIC_SHARED(name) unsigned char* const name = host::shared

struct Index3 {
  unsigned x = 0, y = 0, z = 0;
};
struct alignas(16) int4 {
  int x, y, z, w;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(8) float2 {
  float x, y;
};
inline int4 make_int4(int x, int y, int z, int w) { return {x, y, z, w}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

namespace host {

constexpr size_t kStack = 256 << 10;
constexpr size_t kPayload = 128;

struct Copy {
  void* to;
  const void* from;
  int bytes, used;
};

struct Fiber {
  ucontext_t context;
  Index3 thread;
  int linear = 0;
  bool done = false;
  std::vector<Copy> open;
  std::deque<std::vector<Copy>> groups;
};

struct Meeting {  // of a warp, or of the block
  int arrived = 0;
  unsigned generation = 0;
  int kind = 0;
  unsigned char incoming[32][kPayload];
  unsigned char values[32][kPayload];
};

inline unsigned char* shared;
inline Fiber* current;
inline ucontext_t scheduler;
inline Index3 block_index, block_size, grid_size;
inline std::vector<Meeting> warps;
inline Meeting block;
inline int alive;
inline long progress;
inline std::function<void()> body;

[[noreturn]] inline void fail(const char* text) {
  std::fprintf(stderr, "cuda_on_host: %s (block %u %u %u, thread %d)\n", text, block_index.x,
               block_index.y, block_index.z, current ? current->linear : -1);
  std::abort();
}

inline void pause() { swapcontext(&current->context, &scheduler); }

inline void wait_for(Meeting& meeting, unsigned generation) {
  while (meeting.generation == generation) pause();
}

inline void sync_block() {
  const unsigned generation = block.generation;
  ++progress;
  if (++block.arrived == alive) {
    block.arrived = 0;
    ++block.generation;
  } else {
    wait_for(block, generation);
  }
}

// All 32 lanes bring a value; afterwards each may read everybody's.
template <class T>
const T* gather(const T& value, int kind) {
  static_assert(sizeof(T) <= kPayload, "payload");
  Meeting& warp = warps[current->linear / 32];
  const int lane = current->linear % 32;
  if (warp.arrived == 0) warp.kind = kind;
  if (warp.kind != kind) fail("lanes of a warp meet at different operations");
  std::memcpy(warp.incoming[lane], &value, sizeof(T));
  const unsigned generation = warp.generation;
  ++progress;
  if (++warp.arrived == 32) {
    std::memcpy(warp.values, warp.incoming, sizeof(warp.values));
    warp.arrived = 0;
    ++warp.generation;
  } else {
    wait_for(warp, generation);
  }
  return nullptr;
}

template <class T>
T brought_by(int lane) {
  T value;
  std::memcpy(&value, warps[current->linear / 32].values[lane], sizeof(T));
  return value;
}

inline int lane() { return current->linear % 32; }

inline void entry() {
  body();
  current->done = true;
  ++progress;
  --alive;
  if (alive > 0 && block.arrived == alive) {
    block.arrived = 0;
    ++block.generation;
  }
  pause();
}

inline void run_block(std::vector<std::unique_ptr<Fiber>>& fibers, std::vector<char>& stacks,
                      std::mt19937& random) {
  const int threads = (int)fibers.size();
  warps.assign((threads + 31) / 32, Meeting());
  block = Meeting();
  alive = threads;
  for (int i = 0; i < threads; ++i) {
    Fiber& fiber = *fibers[i];
    fiber.linear = i;
    fiber.done = false;
    fiber.open.clear();
    fiber.groups.clear();
    fiber.thread = {i % block_size.x, i / block_size.x % block_size.y,
                    i / block_size.x / block_size.y};
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = stacks.data() + i * kStack;
    fiber.context.uc_stack.ss_size = kStack;
    fiber.context.uc_link = &scheduler;
    makecontext(&fiber.context, entry, 0);
  }
  int offset = 0;
  while (alive > 0) {
    const long before = progress;
    const bool backwards = random() & 1;
    offset = (int)(random() % threads);
    for (int i = 0; i < threads; ++i) {
      const int which = ((backwards ? threads - 1 - i : i) + offset) % threads;
      if (fibers[which]->done) continue;
      current = fibers[which].get();
      swapcontext(&scheduler, &current->context);
    }
    if (progress == before) fail("deadlock: threads wait for others that never come");
  }
}

inline void launch(std::function<void()> kernel, Index3 grid, Index3 size, size_t shared_bytes,
                   unsigned seed) {
  const int threads = size.x * size.y * size.z;
  std::mt19937 random(seed);
  std::vector<char> stacks(threads * kStack);
  std::vector<std::unique_ptr<Fiber>> fibers;
  for (int i = 0; i < threads; ++i) fibers.push_back(std::make_unique<Fiber>());
  const size_t guard = 64;
  unsigned char* memory = (unsigned char*)std::aligned_alloc(128, (shared_bytes + guard + 127) / 128 * 128);
  shared = memory;
  grid_size = grid;
  block_size = size;
  body = std::move(kernel);
  for (unsigned z = 0; z < grid.z; ++z)
    for (unsigned y = 0; y < grid.y; ++y)
      for (unsigned x = 0; x < grid.x; ++x) {
        std::memset(memory, 0xff, shared_bytes + guard);  // NaN, and counters that start wrong
        block_index = {x, y, z};
        run_block(fibers, stacks, random);
        for (size_t i = 0; i < guard; ++i)
          if (memory[shared_bytes + i] != 0xff) fail("wrote behind the shared memory");
      }
  std::free(memory);
}

}  // namespace host

#define threadIdx (host::current->thread)
#define blockIdx (host::block_index)
#define blockDim (host::block_size)
#define gridDim (host::grid_size)

inline void __syncthreads() { host::sync_block(); }
inline void __syncwarp() { host::gather(0, 1); }
inline int __popc(unsigned value) { return __builtin_popcount(value); }
inline int __ffs(unsigned value) { return value ? __builtin_ctz(value) + 1 : 0; }
inline int __clz(unsigned value) { return value ? __builtin_clz(value) : 32; }
template <class T>
T min(T a, T b) {
  return a < b ? a : b;
}
template <class T>
T max(T a, T b) {
  return a < b ? b : a;
}
template <class T>
T __ldg(const T* from) {
  return *from;
}
inline float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }

inline unsigned __ballot_sync(unsigned, bool value) {
  host::gather((int)value, 2);
  unsigned mask = 0;
  for (int i = 0; i < 32; ++i) mask |= (unsigned)host::brought_by<int>(i) << i;
  return mask;
}
inline unsigned __match_any_sync(unsigned, int value) {
  host::gather(value, 3);
  unsigned mask = 0;
  for (int i = 0; i < 32; ++i) mask |= (unsigned)(host::brought_by<int>(i) == value) << i;
  return mask;
}
template <class T>
T __shfl_up_sync(unsigned, T value, int step) {
  host::gather(value, 4);
  return host::lane() >= step ? host::brought_by<T>(host::lane() - step) : value;
}
template <class T>
T __shfl_xor_sync(unsigned, T value, int bits) {
  host::gather(value, 5);
  return host::brought_by<T>(host::lane() ^ bits);
}
template <class T>
T __shfl_sync(unsigned, T value, int lane) {
  host::gather(value, 10);
  return host::brought_by<T>(lane);
}
inline unsigned __reduce_add_sync(unsigned, unsigned value) {
  host::gather(value, 6);
  unsigned sum = 0;
  for (int i = 0; i < 32; ++i) sum += host::brought_by<unsigned>(i);
  return sum;
}
inline int __reduce_max_sync(unsigned, int value) {
  host::gather(value, 7);
  int most = host::brought_by<int>(0);
  for (int i = 1; i < 32; ++i) most = max(most, host::brought_by<int>(i));
  return most;
}

// Asynchronous copies: nothing arrives before it is waited for.
inline void copy_async(void* to, const void* from, int used) {
  if (used < 0 || used > 16) host::fail("an asynchronous copy of a wrong size");
  if (used > 0 && ((uintptr_t)from & 15)) host::fail("an asynchronous copy that is not aligned");
  if ((uintptr_t)to & 15) host::fail("an asynchronous copy to what is not aligned");
  host::current->open.push_back({to, from, 16, used});
}
inline void copy_commit() {
  host::current->groups.push_back(std::move(host::current->open));
  host::current->open.clear();
}
template <int kLeft>
void copy_wait() {
  auto& groups = host::current->groups;
  while ((int)groups.size() > kLeft) {
    for (const host::Copy& copy : groups.front()) {
      std::memset(copy.to, 0, copy.bytes);
      std::memcpy(copy.to, copy.from, copy.used);
    }
    groups.pop_front();
  }
}

inline void load_matrices(unsigned (&m)[4], const void* row) {
  if ((uintptr_t)row & 15) host::fail("ldmatrix of a row that is not aligned");
  host::gather(row, 8);
  const int lane = host::lane();
  for (int i = 0; i < 4; ++i) {
    const unsigned* const from = (const unsigned*)host::brought_by<const void*>(8 * i + lane / 4);
    m[i] = from[lane % 4];
  }
}

struct Operands {
  unsigned a[4], b[2];
};

template <class T>
void multiply(float (&c)[4], const unsigned (&a)[4], unsigned b0, unsigned b1, T) {
  host::gather(Operands{{a[0], a[1], a[2], a[3]}, {b0, b1}}, 9);
  const int lane = host::lane();
  const auto element = [](unsigned word, int half) {
    return to_float(T{(unsigned short)(half ? word >> 16 : word)});
  };
  for (int i = 0; i < 4; ++i) {
    const int row = lane / 4, column = lane % 4 * 2 + (i & 1), down = i >> 1;
    double sum = c[i];
    for (int k = 0; k < 16; ++k) {
      const Operands left = host::brought_by<Operands>(row * 4 + k % 8 / 2);
      const Operands right = host::brought_by<Operands>(column * 4 + k % 8 / 2);
      sum += (double)element(left.a[k / 8 * 2 + down], k & 1) * element(right.b[k / 8], k & 1);
    }
    c[i] = (float)sum;
  }
}
