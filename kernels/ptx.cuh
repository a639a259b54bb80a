// Every access that another block, kernel or GPU may see at the same time, its scope in its name; and what else C++ has no word
// for.
//
// Orders follow the PTX memory model. A release by one thread covers what the whole block stored if the block met at
// a barrier before it (the barrier orders the block's stores before the release, and causality is transitive), so one
// release a block is enough and none is not: the last of several blocks cannot publish what the others stored unless
// each of them released its own.
//
// No fence.proxy.alias is needed: within a process a window is mapped once (thread ranks share the mapping), and two
// processes each see one address of it.
//
// Bulk copies go by another proxy. What is copied into shared memory is read by bulk copies alone, so no fence.proxy.async is
// needed before it is copied over; a bulk store is finished only when its group is waited for without `.read`, and a fence
// lets what comes after it by ordinary stores follow it.
#pragma once
#include <cstdint>

#ifdef A2A_JITTER
#define A2A_JITTER_HERE ::a2a::ptx::jitter()
#else
#define A2A_JITTER_HERE ((void)0)
#endif

namespace a2a::ptx {

__device__ __forceinline__ uint64_t globaltimer() {
  uint64_t now;
  asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(now)::"memory");
  return now;
}

#ifdef A2A_JITTER
// Up to a few microseconds, now and then much longer, different for every thread and time.
__device__ __forceinline__ void jitter() {
  uint32_t x = static_cast<uint32_t>(clock64()) ^ (threadIdx.x * 0x9e3779b9u) ^ (blockIdx.x * 0x85ebca6bu);
  x ^= x >> 16, x *= 0x7feb352du, x ^= x >> 15, x *= 0x846ca68bu, x ^= x >> 16;
  __nanosleep((x & 0xff) == 0 ? 50000 : (x >> 8) & 0xfff);
}
#endif

__device__ __forceinline__ uint64_t ld_acquire_sys(const uint64_t* at) {
  A2A_JITTER_HERE;
  uint64_t value;
  asm volatile("ld.acquire.sys.global.u64 %0, [%1];" : "=l"(value) : "l"(at) : "memory");
  return value;
}
// Two words beside each other, each of them whole.
__device__ __forceinline__ ulonglong2 ld_acquire_sys(const ulonglong2* at) {
  A2A_JITTER_HERE;
  ulonglong2 value;
  asm volatile("ld.acquire.sys.global.v2.u64 {%0,%1}, [%2];" : "=l"(value.x), "=l"(value.y) : "l"(at) : "memory");
  return value;
}
__device__ __forceinline__ uint32_t ld_acquire_sys(const uint32_t* at) {
  A2A_JITTER_HERE;
  uint32_t value;
  asm volatile("ld.acquire.sys.global.u32 %0, [%1];" : "=r"(value) : "l"(at) : "memory");
  return value;
}
__device__ __forceinline__ uint32_t ld_relaxed_sys(const uint32_t* at) {
  uint32_t value;
  asm volatile("ld.relaxed.sys.global.u32 %0, [%1];" : "=r"(value) : "l"(at) : "memory");
  return value;
}
__device__ __forceinline__ uint64_t ld_relaxed_sys(const uint64_t* at) {
  uint64_t value;
  asm volatile("ld.relaxed.sys.global.u64 %0, [%1];" : "=l"(value) : "l"(at) : "memory");
  return value;
}
__device__ __forceinline__ ulonglong2 ld_relaxed_sys(const ulonglong2* at) {
  ulonglong2 value;
  asm volatile("ld.relaxed.sys.global.v2.u64 {%0,%1}, [%2];" : "=l"(value.x), "=l"(value.y) : "l"(at) : "memory");
  return value;
}
__device__ __forceinline__ void st_relaxed_sys(uint32_t* at, uint32_t value) {
  asm volatile("st.relaxed.sys.global.u32 [%0], %1;" ::"l"(at), "r"(value) : "memory");
}
__device__ __forceinline__ void st_relaxed_sys(uint64_t* at, uint64_t value) {
  asm volatile("st.relaxed.sys.global.u64 [%0], %1;" ::"l"(at), "l"(value) : "memory");
}
// Of a store before it and a load behind it, and another's the other way round, one sees what the other has stored.
__device__ __forceinline__ void fence_sc_sys() { asm volatile("fence.sc.sys;" ::: "memory"); }
// Words beside each other, each of which speaks for itself.
__device__ __forceinline__ void st_relaxed_sys(ulonglong2* at, ulonglong2 value) {
  asm volatile("st.relaxed.sys.global.v2.u64 [%0], {%1,%2};" ::"l"(at), "l"(value.x), "l"(value.y) : "memory");
}
__device__ __forceinline__ void st_release_sys(uint64_t* at, uint64_t value) {
  A2A_JITTER_HERE;
  asm volatile("st.release.sys.global.u64 [%0], %1;" ::"l"(at), "l"(value) : "memory");
  A2A_JITTER_HERE;
}
__device__ __forceinline__ void st_release_sys(uint32_t* at, uint32_t value) {
  A2A_JITTER_HERE;
  asm volatile("st.release.sys.global.u32 [%0], %1;" ::"l"(at), "r"(value) : "memory");
}

// What the block stored before a barrier is seen, in any window, by whoever sees this and publishes it in turn.
__device__ __forceinline__ void add_release_sys(uint32_t* counter, uint32_t value) {
  A2A_JITTER_HERE;
  asm volatile("red.release.sys.global.add.u32 [%0], %1;" ::"l"(counter), "r"(value) : "memory");
}

// The number before it.
__device__ __forceinline__ uint32_t count_gpu(uint32_t* counter) {
  uint32_t before;
  asm volatile("atom.relaxed.gpu.global.add.u32 %0, [%1], 1;" : "=r"(before) : "l"(counter) : "memory");
  return before;
}
__device__ __forceinline__ uint32_t cas_relaxed_gpu(uint32_t* at, uint32_t compare, uint32_t value) {
  uint32_t before;
  asm volatile("atom.relaxed.gpu.global.cas.b32 %0, [%1], %2, %3;"
               : "=r"(before)
               : "l"(at), "r"(compare), "r"(value)
               : "memory");
  return before;
}
__device__ __forceinline__ void add_relaxed_gpu(uint64_t* at, uint64_t value) {
  asm volatile("red.relaxed.gpu.global.add.u64 [%0], %1;" ::"l"(at), "l"(value) : "memory");
}
__device__ __forceinline__ void add_relaxed_gpu(uint32_t* at, uint32_t value) {
  asm volatile("red.relaxed.gpu.global.add.u32 [%0], %1;" ::"l"(at), "r"(value) : "memory");
}

// The multiprocessor that a thread is on.
__device__ __forceinline__ uint32_t sm_id() {
  uint32_t id;
  asm volatile("mov.u32 %0, %%smid;" : "=r"(id));
  return id;
}

// Sixteen bytes that are read once.
__device__ __forceinline__ int4 ld_stream(const void* at) {
  int4 v;
  asm volatile("ld.global.L1::no_allocate.v4.s32 {%0,%1,%2,%3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(at));
  return v;
}
__device__ __forceinline__ void st_row(void* at, int4 v) {
  asm volatile("st.global.v4.s32 [%0], {%1,%2,%3,%4};" ::"l"(at), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w)
               : "memory");
}

// Two magnitudes to e4m3, the first in the lower byte: to nearest even, past the largest the largest; NaN stays NaN.
__device__ __forceinline__ uint32_t to_e4m3(float low, float high) {
  uint16_t codes;
  asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(codes) : "f"(high), "f"(low));
  return codes;
}

// A barrier of some warps of a block, apart from that of all: true if all their `threads` threads say so.
__device__ __forceinline__ bool all_of(uint32_t threads, bool mine) {
  uint32_t all;
  asm volatile(
      "{\n\t.reg .pred mine, all;\n\t"
      "setp.ne.u32 mine, %2, 0;\n\t"
      "barrier.cta.red.and.pred all, 1, %1, mine;\n\t"
      "selp.u32 %0, 1, 0, all;\n\t}"
      : "=r"(all)
      : "r"(threads), "r"(static_cast<uint32_t>(mine))
      : "memory");
  return all;
}

// A barrier for which one warp of a block waits while the others only say that they have come.
__device__ __forceinline__ void have_come() { asm volatile("barrier.cta.arrive 2, %0;" ::"r"(blockDim.x) : "memory"); }
__device__ __forceinline__ void wait_for_others() {
  asm volatile("barrier.cta.sync 2, %0;" ::"r"(blockDim.x) : "memory");
}

// A barrier of all threads of a cluster's blocks; what they stored before it is seen after it.
__device__ __forceinline__ void cluster_sync() {
  asm volatile("barrier.cluster.arrive.release.aligned;\n\tbarrier.cluster.wait.acquire.aligned;" ::: "memory");
}
__device__ __forceinline__ uint32_t cluster_block() {
  uint32_t rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}
// A word of another block's shared memory, at the place that `at` has in this one's.
__device__ __forceinline__ uint32_t ld_cluster(const uint32_t* at, uint32_t block) {
  uint32_t value;
  asm volatile(
      "{\n\t.reg .u32 there;\n\t"
      "mapa.shared::cluster.u32 there, %1, %2;\n\t"
      "ld.shared::cluster.u32 %0, [there];\n\t}"
      : "=r"(value)
      : "r"(static_cast<uint32_t>(__cvta_generic_to_shared(at))), "r"(block)
      : "memory");
  return value;
}

// Programmatic dependent launch: the kernel behind may start; everything before it has ended and can be seen.
__device__ __forceinline__ void launch_dependents() { asm volatile("griddepcontrol.launch_dependents;" ::: "memory"); }
__device__ __forceinline__ void wait_prerequisites() { asm volatile("griddepcontrol.wait;" ::: "memory"); }

// A barrier in shared memory that counts bytes of bulk copies; one thread arrives.
__device__ __forceinline__ uint32_t shared_address(const void* at) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(at));
}
__device__ __forceinline__ void init_barrier(uint64_t* barrier) {
  asm volatile("mbarrier.init.shared.b64 [%0], 1;" ::"r"(shared_address(barrier)) : "memory");
}
// What this thread wrote to shared memory is seen by bulk copies too.
__device__ __forceinline__ void fence_shared() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}
__device__ __forceinline__ void await_bytes(uint64_t* barrier, uint32_t parity) {
  asm volatile(
      "{\n\t.reg .pred done;\n"
      "again:\n\t"
      "mbarrier.try_wait.parity.shared.b64 done, [%0], %1;\n\t"
      "@!done bra again;\n\t}" ::"r"(shared_address(barrier)),
      "r"(parity)
      : "memory");
}

// What was seen by ordinary loads may be read by bulk copies.
__device__ __forceinline__ void fence_bulk() { asm volatile("fence.proxy.async;" ::: "memory"); }

// Bulk copies, of multiples of sixteen bytes between addresses that are: into shared memory, whose barrier then counts them;
// out of it, in groups.
__device__ __forceinline__ void load_bulk(void* to, const void* from, uint32_t bytes, uint64_t* barrier) {
  const uint32_t at = shared_address(barrier);
  asm volatile("mbarrier.arrive.expect_tx.shared.b64 _, [%0], %1;" ::"r"(at), "r"(bytes) : "memory");
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                   shared_address(to)),
               "l"(from), "r"(bytes), "r"(at)
               : "memory");
}
__device__ __forceinline__ void store_bulk(void* to, const void* from, uint32_t bytes) {
  asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;" ::"l"(to), "r"(shared_address(from)), "r"(bytes)
               : "memory");
}
// The same of what nobody reads again soon: it is to leave the cache before others.
__device__ __forceinline__ uint64_t evict_first() {
  uint64_t policy;
  asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
  return policy;
}
__device__ __forceinline__ void load_bulk_once(void* to, const void* from, uint32_t bytes, uint64_t* barrier) {
  const uint32_t at = shared_address(barrier);
  asm volatile("mbarrier.arrive.expect_tx.shared.b64 _, [%0], %1;" ::"r"(at), "r"(bytes) : "memory");
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1], %2, [%3], %4;" ::"r"(
          shared_address(to)),
      "l"(from), "r"(bytes), "r"(at), "l"(evict_first())
      : "memory");
}
__device__ __forceinline__ void store_bulk_once(void* to, const void* from, uint32_t bytes) {
  asm volatile("cp.async.bulk.global.shared::cta.bulk_group.L2::cache_hint [%0], [%1], %2, %3;" ::"l"(to),
               "r"(shared_address(from)), "r"(bytes), "l"(evict_first())
               : "memory");
}
__device__ __forceinline__ void close_group() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }
// All but the last `n` groups have been read from shared memory.
template <int n>
__device__ __forceinline__ void await_read() {
  asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(n) : "memory");
}
// All but the last `n` groups are where they go.
template <int n = 0>
__device__ __forceinline__ void await_stored() {
  asm volatile("cp.async.bulk.wait_group %0;\n\tfence.proxy.async;" ::"n"(n) : "memory");
}

}  // namespace a2a::ptx
