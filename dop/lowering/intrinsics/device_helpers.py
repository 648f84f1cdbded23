"""Device functions that the block-level intrinsics share: products, conversions, copies, waits."""

from __future__ import annotations

HELPERS = """\
__device__ __forceinline__ void dop_mma_bf16(float* c, unsigned a0, unsigned a1, unsigned a2,
                                             unsigned a3, unsigned b0, unsigned b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
      "{%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}
__device__ __forceinline__ void dop_mma_f16(float* c, unsigned a0, unsigned a1, unsigned a2,
                                            unsigned a3, unsigned b0, unsigned b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
      "{%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}
__device__ __forceinline__ unsigned dop_pack_bf16(float low, float high) {
  unsigned word;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
  return word;
}
__device__ __forceinline__ unsigned dop_pack_f16(float low, float high) {
  unsigned word;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
  return word;
}
__device__ __forceinline__ float dop_low_bf16(unsigned word) { return __uint_as_float(word << 16); }
__device__ __forceinline__ float dop_high_bf16(unsigned word) {
  return __uint_as_float(word & 0xffff0000u);
}
__device__ __forceinline__ float dop_low_f16(unsigned word) {
  float value;
  asm("{.reg .b16 l, h; mov.b32 {l, h}, %1; cvt.f32.f16 %0, l;}" : "=f"(value) : "r"(word));
  return value;
}
__device__ __forceinline__ float dop_high_f16(unsigned word) {
  float value;
  asm("{.reg .b16 l, h; mov.b32 {l, h}, %1; cvt.f32.f16 %0, h;}" : "=f"(value) : "r"(word));
  return value;
}
__device__ __forceinline__ int dop_table(const int* at) {
  int value;
  asm volatile("ld.global.b32 %0, [%1];" : "=r"(value) : "l"(at) : "memory");
  return value;
}
__device__ __forceinline__ float dop_table(const float* at) {
  float value;
  asm volatile("ld.global.f32 %0, [%1];" : "=f"(value) : "l"(at) : "memory");
  return value;
}
template <int N>
__device__ __forceinline__ void dop_read_shared(unsigned (&words)[N], const void* at) {
  const uint4 value = *static_cast<const uint4*>(at);
  words[0] = value.x; words[1] = value.y; words[2] = value.z; words[3] = value.w;
}
__device__ __forceinline__ unsigned dop_shared_address(const void* pointer) {
  return static_cast<unsigned>(__cvta_generic_to_shared(pointer));
}
__device__ __forceinline__ void dop_copy(unsigned to, const void* from, int bytes) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(bytes)
               : "memory");
}
__device__ __forceinline__ void dop_commit() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}
template <int N> __device__ __forceinline__ void dop_wait_but() {
  asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
}
__device__ __forceinline__ void dop_wait_at_most(int groups) {
  switch (groups) {  // a constant wherever it is used
    case 0: dop_wait_but<0>(); break;
    case 1: dop_wait_but<1>(); break;
    case 2: dop_wait_but<2>(); break;
    case 3: dop_wait_but<3>(); break;
    case 4: dop_wait_but<4>(); break;
    case 5: dop_wait_but<5>(); break;
    case 6: dop_wait_but<6>(); break;
    default: dop_wait_but<7>(); break;
  }
}
__device__ __forceinline__ void dop_read_v(unsigned (&words)[4], const void* at) {
  asm volatile("ld.global.v4.u32 {%0,%1,%2,%3}, [%4];"
               : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
               : "l"(at) : "memory");
}
__device__ __forceinline__ void dop_read_v(unsigned (&words)[2], const void* at) {
  asm volatile("ld.global.v2.u32 {%0,%1}, [%2];"
               : "=r"(words[0]), "=r"(words[1]) : "l"(at) : "memory");
}
__device__ __forceinline__ void dop_read_b(unsigned (&words)[4], const void* at) {
  const uint4 value = __ldg(static_cast<const uint4*>(at));
  words[0] = value.x; words[1] = value.y; words[2] = value.z; words[3] = value.w;
}
__device__ __forceinline__ void dop_read_b(unsigned (&words)[2], const void* at) {
  const uint2 value = __ldg(static_cast<const uint2*>(at));
  words[0] = value.x; words[1] = value.y;
}
__device__ __forceinline__ void dop_dependents_may_start() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}
__device__ __forceinline__ void dop_wait_for_v() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
"""

AHEAD_COPY = """\
__device__ __forceinline__ void dop_copy_ahead(unsigned to, const void* from, int bytes) {
  asm volatile("cp.async.cg.shared.global.L2::256B [%0], [%1], 16, %2;" ::"r"(to), "l"(from),
               "r"(bytes)
               : "memory");
}
"""
"""`dop_copy` that has L2 read 256 bytes of memory at a time: the next steps' pieces of the row."""

CLUSTER_HELPERS = """\
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
#define dop__cluster_dims__(...) __cluster_dims__(__VA_ARGS__)
#else
#define dop__cluster_dims__(...)
#endif
__device__ __forceinline__ void dop_ldmatrix(unsigned (&words)[4], unsigned at) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3]) : "r"(at)
               : "memory");
}
__device__ __forceinline__ float4 dop_read_peer(unsigned at, int block) {
  float4 value = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  unsigned there;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(at), "r"(block));
  asm volatile("ld.shared::cluster.v4.f32 {%0,%1,%2,%3}, [%4];"
               : "=f"(value.x), "=f"(value.y), "=f"(value.z), "=f"(value.w)
               : "r"(there) : "memory");
#endif
  return value;
}
__device__ __forceinline__ void dop_cluster_sync() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.arrive.release.aligned;\\nbarrier.cluster.wait.acquire.aligned;"
               ::: "memory");
#endif
}
__device__ __forceinline__ void dop_fence_copies() {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#endif
}
__device__ __forceinline__ void dop_wgmma_begin() {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#endif
}
__device__ __forceinline__ void dop_wgmma_commit() {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
#endif
}
__device__ __forceinline__ void dop_wgmma_wait() {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
#endif
}
"""
"""ldmatrix, clusters and wgmma: what shrink uses besides."""

ENGINE_HELPERS = """\
__device__ __forceinline__ void dop_wgmma_wait_but_one() {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  asm volatile("wgmma.wait_group.sync.aligned 1;" ::: "memory");
#endif
}
__device__ __forceinline__ bool dop_all_of_block(bool here) { return __syncthreads_and(here); }
__device__ __forceinline__ void dop_barrier_init(unsigned at, int arrivals) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(at), "r"(arrivals) : "memory");
#endif
}
__device__ __forceinline__ void dop_barriers_are_ready() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
#endif
}
__device__ __forceinline__ void dop_barrier_arrive(unsigned at) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("mbarrier.arrive.shared.b64 _, [%0];" ::"r"(at) : "memory");
#endif
}
__device__ __forceinline__ void dop_barrier_arrive_with(unsigned at, int bytes) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("mbarrier.arrive.expect_tx.shared.b64 _, [%0], %1;" ::"r"(at), "r"(bytes)
               : "memory");
#endif
}
__device__ __forceinline__ void dop_barrier_arrive_behind_copies(unsigned at) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("cp.async.mbarrier.arrive.noinc.shared.b64 [%0];" ::"r"(at) : "memory");
#endif
}
__device__ __forceinline__ void dop_barrier_wait(unsigned at, int parity) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  unsigned done;
  do {
    asm volatile("{.reg .pred p; mbarrier.try_wait.parity.shared.b64 p, [%1], %2; "
                 "selp.u32 %0, 1, 0, p;}" : "=r"(done) : "r"(at), "r"(parity) : "memory");
  } while (!done);
#endif
}
// As cuTensorMapEncodeTiled makes it.
struct __align__(64) dop_tensor_map { unsigned long long words[16]; };
__device__ __forceinline__ void dop_prefetch_map(const dop_tensor_map& map) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  asm volatile("prefetch.tensormap [%0];" ::"l"(&map) : "memory");
#endif
}
__device__ __forceinline__ void dop_copy_box(unsigned to, const dop_tensor_map& map, int column,
                                             int row, int plane, unsigned barrier) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  asm volatile("cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes "
               "[%0], [%1, {%2, %3, %4}], [%5];" ::"r"(to), "l"(&map), "r"(column), "r"(row),
               "r"(plane), "r"(barrier) : "memory");
#endif
}
"""
"""What a kernel whose copies the copy engine makes uses besides (sm_90a)."""

FUSED_HELPERS = """\
// The two halves of a barrier that orders no memory.
__device__ __forceinline__ void dop_cluster_arrive() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
#endif
}
__device__ __forceinline__ void dop_cluster_wait() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
#endif
}
__device__ __forceinline__ void dop_sync_some(int barrier, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
}
__device__ __forceinline__ void dop_barrier_wait_peers(unsigned at, int parity) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  unsigned done;
  do {
    asm volatile("{.reg .pred p; mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 "
                 "p, [%1], %2; selp.u32 %0, 1, 0, p;}" : "=r"(done) : "r"(at), "r"(parity)
                 : "memory");
  } while (!done);
#endif
}
// One lane of a whole warp, and the compiler knows that it is one.
__device__ __forceinline__ bool dop_elected() {
  unsigned elected = 0;
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("{.reg .pred p; elect.sync _|p, 0xffffffff; selp.u32 %0, 1, 0, p;}"
               : "=r"(elected)::"memory");
#endif
  return elected;
}
__device__ __forceinline__ void dop_barrier_arrive_times(unsigned at, int times) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("mbarrier.arrive.shared.b64 _, [%0], %1;" ::"r"(at), "r"(times) : "memory");
#endif
}
__device__ __forceinline__ unsigned dop_peer(unsigned at, int block) {
  unsigned there = 0;
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(at), "r"(block));
#endif
  return there;
}
// Sums to a peer's shared memory, and their bytes to its barrier.
__device__ __forceinline__ void dop_push(unsigned to, unsigned barrier, float x, float y) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v2.f32 "
               "[%0], {%2, %3}, [%1];" ::"r"(to), "r"(barrier), "f"(x), "f"(y) : "memory");
#endif
}
__device__ __forceinline__ void dop_push(unsigned to, unsigned barrier, float x, float y, float z,
                                         float w) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v4.f32 "
               "[%0], {%2, %3, %4, %5}, [%1];" ::"r"(to), "r"(barrier), "f"(x), "f"(y), "f"(z),
               "f"(w) : "memory");
#endif
}
__device__ __forceinline__ void dop_copy_to_peer(unsigned to, unsigned from, int bytes,
                                                 unsigned barrier) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("cp.async.bulk.shared::cluster.shared::cta.mbarrier::complete_tx::bytes "
               "[%0], [%1], %2, [%3];" ::"r"(to), "r"(from), "r"(bytes), "r"(barrier) : "memory");
#endif
}
__device__ __forceinline__ void dop_ldmatrix_turned(unsigned (&words)[2], unsigned at) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];"
               : "=r"(words[0]), "=r"(words[1]) : "r"(at) : "memory");
}
__device__ __forceinline__ void dop_stmatrix_turned(unsigned at, unsigned x) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("stmatrix.sync.aligned.m8n8.x1.trans.shared.b16 [%0], {%1};" ::"r"(at), "r"(x)
               : "memory");
#endif
}
__device__ __forceinline__ void dop_stmatrix_turned(unsigned at, unsigned x, unsigned y) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("stmatrix.sync.aligned.m8n8.x2.trans.shared.b16 [%0], {%1, %2};" ::"r"(at), "r"(x),
               "r"(y) : "memory");
#endif
}
// Boxes that L2 forgets first, or last: createpolicy's evict_first and evict_last for all of them.
__device__ __forceinline__ void dop_copy_hinted_box(
    unsigned to, const dop_tensor_map& map, int column, int row, int plane, unsigned barrier,
    unsigned long long policy) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  asm volatile("cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes"
               ".L2::cache_hint [%0], [%1, {%2, %3, %4}], [%5], %6;" ::"r"(to), "l"(&map),
               "r"(column), "r"(row), "r"(plane), "r"(barrier), "l"(policy) : "memory");
#endif
}
__device__ __forceinline__ void dop_copy_box_once(unsigned to, const dop_tensor_map& map,
                                                  int column, int row, int plane,
                                                  unsigned barrier) {
  dop_copy_hinted_box(to, map, column, row, plane, barrier, 0x12f0000000000000ull);
}
__device__ __forceinline__ void dop_copy_box_kept(unsigned to, const dop_tensor_map& map,
                                                  int column, int row, int plane,
                                                  unsigned barrier) {
  dop_copy_hinted_box(to, map, column, row, plane, barrier, 0x14f0000000000000ull);
}
"""
"""What a kernel that fuses both products uses besides those of the copy engine (sm_90a)."""
