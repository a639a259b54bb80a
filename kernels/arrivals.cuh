// What sources have sent here, for kernels that run once all flags have come.
#pragma once
#include "counts.cuh"

namespace a2a {

// Where the rows of each source start in the order of sources, and which sources have all theirs in banks.
struct Arrivals {
  uint32_t start[kMaxRanks + 1];
  uint32_t banked[kMaxRanks / 32];
  uint32_t any;
  __device__ __forceinline__ bool is_banked(uint32_t source) const { return banked[source / 32] >> source % 32 & 1; }
};

// `counts`: rows of each source, or null: those that its flag says. A block calls it.
__device__ __forceinline__ void read_arrivals(const Seat& seat, const int32_t* counts, Arrivals& s) {
  clear(s.banked, kMaxRanks / 32);
  if (threadIdx.x == 0) s.any = 0;
  __syncthreads();
#pragma unroll 1
  for (uint32_t source = threadIdx.x; source < seat.ranks; source += blockDim.x) {
    const uint32_t flag = ptx::ld_relaxed_sys(mail64(mailbox(seat, seat.rank, source), kDispatchPair));
    // What a peer wrote is bounded before it is an index.
    s.start[source + 1] = counts != nullptr ? counts[source] : min(flag & 0x7fffffffu, seat.bound);
    if (flag >> 31) atomicOr(&s.banked[source / 32], 1u << source % 32), s.any = 1;
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    s.start[0] = 0;
#pragma unroll 1
    for (uint32_t source = 0; source < seat.ranks; ++source) s.start[source + 1] += s.start[source];
  }
  __syncthreads();
}

}  // namespace a2a
