// Just enough CUDA to run the text of a plain kernel one thread after another. Values are wrong,
// since nothing is exchanged between threads, but addresses do not depend on values: built with
// -fsanitize=address, this says whether a kernel reads or writes beside its arrays.
#pragma once
#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include <sanitizer/asan_interface.h>
#include <sys/mman.h>

#define __global__
#define __device__
#define __launch_bounds__(n)
#define __restrict__
using std::min;
typedef unsigned int uint;
typedef unsigned short ushort;

struct dim3 { unsigned x, y, z; };
static dim3 blockIdx, threadIdx;
struct uint2 { unsigned x, y; };
struct alignas(16) uint4 { unsigned x, y, z, w; };
struct float2 { float x, y; };
struct alignas(16) float4 { float x, y, z, w; };
struct int2 { int x, y; };
struct int4 { int x, y, z, w; };
struct ushort2 { ushort x, y; };
struct ushort4 { ushort x, y, z, w; };
inline int2 make_int2(int x, int y) { return {x, y}; }
inline int4 make_int4(int x, int y, int z, int w) { return {x, y, z, w}; }
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

struct nv_bfloat16 {
  unsigned short bits;
  nv_bfloat16() = default;
  explicit nv_bfloat16(float f) {
    unsigned word;
    std::memcpy(&word, &f, 4);
    bits = word >> 16;
  }
  explicit operator float() const {
    const unsigned word = unsigned(bits) << 16;
    float f;
    std::memcpy(&f, &word, 4);
    return f;
  }
};
struct nv_bfloat162 { nv_bfloat16 x, y; };
struct nv_bfloat164 { nv_bfloat16 x, y, z, w; };
inline nv_bfloat16 __float2bfloat16_rn(float f) { return nv_bfloat16(f); }
inline nv_bfloat162 make_nv_bfloat162(nv_bfloat16 x, nv_bfloat16 y) { return {x, y}; }
inline nv_bfloat164 make_nv_bfloat164(nv_bfloat16 x, nv_bfloat16 y, nv_bfloat16 z, nv_bfloat16 w) {
  return {x, y, z, w};
}
inline unsigned __pack_nv_bfloat162(nv_bfloat16 x, nv_bfloat16 y) { return x.bits | y.bits << 16; }

inline unsigned __activemask() { return ~0u; }
template <class T> T __shfl_down_sync(unsigned, T value, int, int) { return value; }
template <class T> T __shfl_sync(unsigned, T value, int, int) { return value; }
inline void __syncthreads() {}
inline void dop_wait_for_predecessor() {}
inline void dop_release_successor() {}
template <class T> T dop_past_l1(const T* at) { return *at; }

// An array of exactly so many elements: what is beside it, the sanitizer knows.
template <class T> T* room(long long count) {
  void* found = nullptr;
  if (posix_memalign(&found, 64, count * sizeof(T))) std::abort();
  std::memset(found, 0, count * sizeof(T));
  return static_cast<T*>(found);
}
// As room, but gigabytes away from any other array: from one of these to the next, 32 bits of an
// offset lead to where nothing is.
template <class T> T* far_room(long long count) {
  const long long apart = 9ll << 30, page = 4096, bytes = count * sizeof(T);
  const long long used = (bytes + page - 1) / page * page;
  const int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
  void* all = mmap(nullptr, apart, PROT_NONE, flags, -1, 0);
  if (all == MAP_FAILED) std::abort();
  char* found = static_cast<char*>(all) + apart / 2;
  if (mprotect(found, used, PROT_READ | PROT_WRITE)) std::abort();
  ASAN_POISON_MEMORY_REGION(found + bytes, used - bytes);
  return reinterpret_cast<T*>(found);
}
template <class F> void each_thread(dim3 grid, dim3 block, F kernel) {
  for (blockIdx.y = 0; blockIdx.y < grid.y; ++blockIdx.y)
    for (blockIdx.x = 0; blockIdx.x < grid.x; ++blockIdx.x)
      for (threadIdx.y = 0; threadIdx.y < block.y; ++threadIdx.y)
        for (threadIdx.x = 0; threadIdx.x < block.x; ++threadIdx.x) kernel();
}
