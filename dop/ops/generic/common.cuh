// What the generic kernels share: element types, wide loads, where a slice's weights lie.
// No header of CUDA or of the host is needed.
#pragma once

#ifndef DOP_ON_HOST
#define DOP_DYNAMIC_SHARED(name) extern __shared__ __align__(128) unsigned char name[]
#endif

namespace {

constexpr unsigned kAllLanes = 0xffffffffu;

struct Half {
  unsigned short bits;
};
struct Bfloat {
  unsigned short bits;
};

#ifndef DOP_ON_HOST
__device__ __forceinline__ float to_float(Half h) {
  float f;
  asm("cvt.f32.f16 %0, %1;" : "=f"(f) : "h"(h.bits));
  return f;
}
__device__ __forceinline__ float to_float(Bfloat b) {
  return __uint_as_float((unsigned)b.bits << 16);
}
__device__ __forceinline__ void from_float(float f, Half& h) {
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(h.bits) : "f"(f));
}
__device__ __forceinline__ void from_float(float f, Bfloat& b) {
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(b.bits) : "f"(f));
}
#else
inline float to_float(Half h) {
  _Float16 value;
  std::memcpy(&value, &h, 2);
  return (float)value;
}
inline float to_float(Bfloat b) {
  const unsigned bits = (unsigned)b.bits << 16;
  float f;
  std::memcpy(&f, &bits, 4);
  return f;
}
inline void from_float(float f, Half& h) {
  const _Float16 value = (_Float16)f;
  std::memcpy(&h, &value, 2);
}
inline void from_float(float f, Bfloat& b) {
  unsigned bits;
  std::memcpy(&bits, &f, 4);
  b.bits = (unsigned short)(f != f ? 0x7fff : (bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}
#endif
// Dependent launches (sm_90 on, see `Launch.dependent`): shrink lets expand start early, expand loads
// weights meanwhile and waits before it reads v. Every block of expand waits, also one that has
// nothing to do, so that expand never ends before shrink. Older GPUs run the two in turn.
__device__ __forceinline__ void let_next_start() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;");
#endif
}
__device__ __forceinline__ void wait_for_previous() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

__device__ __forceinline__ float to_float(float f) { return f; }
__device__ __forceinline__ void from_float(float f, float& to) { to = f; }

// 16 bytes of elements.
template <class T>
struct Pack {
  static constexpr int kElements = 16 / sizeof(T);
  union {
    uint4 words;
    T element[kElements];
  };
};

template <class T>
__device__ __forceinline__ bool is_aligned(const T* pointer) {
  return ((unsigned long long)pointer & 15) == 0;
}

// Elements [0, count) at `from`; the others are zero. With kWide all of them or none are there, and
// `from` is aligned to 16 bytes.
template <bool kWide, class T>
__device__ __forceinline__ Pack<T> load_pack(const T* __restrict__ from, int count) {
  Pack<T> pack;
  pack.words = make_uint4(0, 0, 0, 0);
  if (kWide) {
#ifdef DOP_ON_HOST
    if (count > 0 && !is_aligned(from)) host::fail("a wide load that is not aligned");
    if (count > 0 && count < Pack<T>::kElements) host::fail("a wide load behind the end");
#endif
    // Said to be global: the compiler cannot know it of a pointer that it finds in an array.
    if (count > 0) pack.words = __ldg((const uint4*)from);
  } else {
#pragma unroll
    for (int i = 0; i < Pack<T>::kElements; ++i)
      if (i < count) pack.element[i] = from[i];
  }
  return pack;
}

// Weights of one slot in one slice. `stack` is slice 0's [slots, rows, width]; a shift is the
// distance of a slice's stack in groups of 16 bytes. With `indirect`, stacks are arrays of device
// pointers instead, one [rows, width] per slot.
template <class T>
__device__ __forceinline__ const T* weights_of(const T* stack, long long shift1, long long shift2,
                                               int slice, int slot, long long size, int indirect) {
  const long long shift = slice == 0 ? 0 : slice == 1 ? shift1 : shift2;
  const char* const first = (const char*)stack + shift * 16;
  if (indirect) return ((const T* const*)first)[slot];
  return (const T*)first + slot * size;
}

// Which slice of y a block belongs to, where blocks of `per_block` columns go through all slices.
struct Slice {
  int slice, block;     // the slice; the block within it
  int offset, columns;  // its first column in y, and how many it has
};
__device__ __forceinline__ Slice slice_of(int block, int per_block, int out0, int out1, int out2) {
  const int blocks0 = (out0 + per_block - 1) / per_block;
  if (block < blocks0) return {0, block, 0, out0};
  block -= blocks0;
  const int blocks1 = (out1 + per_block - 1) / per_block;
  if (block < blocks1) return {1, block, out0, out1};
  return {2, block - blocks1, out0 + out1, out2};
}

}  // namespace
