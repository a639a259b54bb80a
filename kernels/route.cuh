// Routing maths: which ranks a token goes to, and at which position among its source's rows there.
//
// A position is the number of earlier tokens that go to the same rank, so a row's place depends on the routing alone.
// It is counted, not handed out: whoever needs it reads the ids of all earlier tokens rather than wait for another block.
// Ranks are taken some at a time: a token's ranks are then bits of a word, and a warp counts 32 tokens by votes.
#pragma once
#include "ptx.cuh"
#include "window.cuh"

namespace a2a {

// Ranks that are looked at together; in a build for tests few, so that groups of few ranks take turns too.
#ifdef A2A_JITTER
constexpr uint32_t kAtOnce = 3;
#else
constexpr uint32_t kAtOnce = 32;
#endif

// The owner of an expert.
__device__ __forceinline__ uint32_t owner_of(const Owners& owners, uint32_t expert) {
  if (owners.reciprocal == 0) return __ldg(owners.owner + expert);
  const bool larger = expert < owners.split;
  const uint32_t before = larger ? __umulhi(expert, owners.reciprocal_larger)
                                 : __umulhi(expert - owners.split, owners.reciprocal);
  return larger ? before : owners.larger + before;
}

// The place of an expert among its owner's.
__device__ __forceinline__ uint32_t place_of(const Owners& owners, uint32_t expert, uint32_t owner) {
  if (owners.reciprocal == 0) return __ldg(owners.place + expert);
  const uint32_t quotient = owners.quotient;
  return owner < owners.larger ? expert - owner * (quotient + 1)
                               : expert - owners.split - (owner - owners.larger) * quotient;
}

// The bits of ranks from `base` on that take part no more. `any`: Absent::any, which is on its way together with the ids.
__device__ __forceinline__ uint32_t absent_bits(const Route& route, uint32_t any, uint32_t base) {
  if (any == 0) return 0;
  const uint32_t* ranks = route.absent->ranks + base / 32;
  return __funnelshift_r(ranks[0], base / 32 + 1 < kMaxRanks / 32 ? ranks[1] : 0, base % 32);
}

// One choice of a token; -1 if it is no expert, or one whose owner takes part no more. `bad`: it is neither an expert nor -1.
__device__ __forceinline__ int32_t read_id(const Route& route, uint32_t token, uint32_t k, bool& bad) {
  const uint8_t* row = route.ids_in + token * route.ids_stride;
  const uint32_t any = __ldg(&route.absent->any);
  int64_t id;
  if (route.flags & kIdsAre64) {
    // C and numpy may align them to less than their size.
    const auto* words = reinterpret_cast<const uint32_t*>(row) + 2 * k;
    id = static_cast<int64_t>(static_cast<uint64_t>(__ldg(words + 1)) << 32 | __ldg(words));
  } else {
    id = __ldg(reinterpret_cast<const int32_t*>(row) + k);
  }
  bool known = static_cast<uint64_t>(id) < route.owners.experts;
  if (any != 0 && known) known = !route.absent->has(owner_of(route.owners, static_cast<uint32_t>(id)));
  bad = !known && id != -1;
  return known ? static_cast<int32_t>(id) : -1;
}

// The bit of an expert's owner among the ranks from `base` on; none if the id is no expert, or its owner another rank.
__device__ __forceinline__ uint32_t owner_bit(const Route& route, int32_t id, uint32_t base) {
  const uint32_t expert = id;
  if (expert >= route.owners.experts) return 0;
  const uint32_t bit = owner_of(route.owners, expert) - base;
  // A shift by 32 and more leaves nothing.
  return kAtOnce == 32 || bit < kAtOnce ? __funnelshift_lc(0u, 1u, bit) : 0;
}

// Which of the ranks from `base` on each of `n` tokens goes to; what they read is on its way at the same time.
template <uint32_t n>
__device__ __forceinline__ void ranks_of(const Route& route, const uint32_t (&token)[n], uint32_t base,
                                         uint32_t (&ranks)[n]) {
#pragma unroll
  for (uint32_t i = 0; i < n; ++i) ranks[i] = 0;
  if (route.flags & kIdsAreVectors) {
    const uint32_t any = __ldg(&route.absent->any);
    for (uint32_t k = 0; k < route.topk; k += 8) {
      int4 ids[n][2];
#pragma unroll
      for (uint32_t i = 0; i < n; ++i) {
        const auto* row = reinterpret_cast<const int4*>(route.ids_in + token[i] * route.ids_stride + 4 * k);
        ids[i][0] = __ldg(row);
        ids[i][1] = k + 4 < route.topk ? __ldg(row + 1) : make_int4(-1, -1, -1, -1);
      }
#pragma unroll
      for (uint32_t i = 0; i < n; ++i) {
#pragma unroll
        for (uint32_t half = 0; half < 2; ++half) {
          ranks[i] |= owner_bit(route, ids[i][half].x, base);
          ranks[i] |= owner_bit(route, ids[i][half].y, base);
          ranks[i] |= owner_bit(route, ids[i][half].z, base);
          ranks[i] |= owner_bit(route, ids[i][half].w, base);
        }
      }
    }
    const uint32_t absent = absent_bits(route, any, base);
#pragma unroll
    for (uint32_t i = 0; i < n; ++i) ranks[i] &= ~absent;
    return;
  }
#pragma unroll
  for (uint32_t i = 0; i < n; ++i) {
    for (uint32_t k = 0; k < route.topk; ++k) {
      bool bad;
      ranks[i] |= owner_bit(route, read_id(route, token[i], k, bad), base);
    }
  }
}
__device__ __forceinline__ uint32_t ranks_of(const Route& route, uint32_t token, uint32_t base) {
  const uint32_t tokens[1] = {token};
  uint32_t ranks[1];
  ranks_of(route, tokens, base, ranks);
  return ranks[0];
}

// Adds to count[r] the tokens from `start` to `end` that go to rank base + r, `n` tokens of a thread at a time. A block calls
// it, and meets afterwards.
template <uint32_t n>
__device__ __forceinline__ void count_tokens(const Route& route, uint32_t ranks, uint32_t base, uint32_t start,
                                             uint32_t end, uint32_t* count) {
  const uint32_t lane = threadIdx.x % 32, group = min(ranks - base, kAtOnce);
  uint32_t mine = 0;
  for (uint32_t first = start + threadIdx.x - lane; first < end; first += n * blockDim.x) {
    uint32_t token[n], to[n];
#pragma unroll
    for (uint32_t i = 0; i < n; ++i) token[i] = min(first + i * blockDim.x + lane, end - 1);
    ranks_of(route, token, base, to);
#pragma unroll
    for (uint32_t i = 0; i < n; ++i) {
      if (first + i * blockDim.x + lane >= end) to[i] = 0;
    }
    for (uint32_t rank = 0; rank < group; ++rank) {
      uint32_t votes = 0;
#pragma unroll
      for (uint32_t i = 0; i < n; ++i) votes += __popc(__ballot_sync(~0u, to[i] >> rank & 1));
      if (lane == rank) mine += votes;
    }
  }
  if (mine != 0) atomicAdd(&count[lane], mine);
}

// count[r] = tokens before `end` that go to rank r. A block calls it.
__device__ __forceinline__ void count_before(const Route& route, uint32_t ranks, uint32_t end, uint32_t* count) {
  for (uint32_t rank = threadIdx.x; rank < ranks; rank += blockDim.x) count[rank] = 0;
  __syncthreads();
  for (uint32_t base = 0; base < ranks; base += kAtOnce) count_tokens<1>(route, ranks, base, 0, end, count + base);
  __syncthreads();
}

// Which of the ranks from `base` on a token goes to. A warp calls it; a lane looks at a choice.
__device__ __forceinline__ uint32_t ranks_by_lanes(const Route& route, uint32_t token, uint32_t base) {
  bool bad;
  const uint32_t lane = threadIdx.x % 32;
  return __reduce_or_sync(~0u, lane < route.topk ? owner_bit(route, read_id(route, token, lane, bad), base) : 0);
}

// The same of all tokens before `end`, into ranks[token], which were zero. A block calls it, and meets afterwards. A thread
// looks at four choices and not at a token's: a warp then has half the instructions.
__device__ __forceinline__ void ranks_of_all(const Route& route, uint32_t end, uint32_t base, uint32_t* ranks) {
  const uint32_t any = __ldg(&route.absent->any);
#pragma unroll 1
  for (uint32_t i = threadIdx.x; i < end * route.fours; i += blockDim.x) {
    const uint32_t token = route.reciprocal == 0 ? i : __umulhi(i, route.reciprocal);
    const uint32_t first = 4 * (i - token * route.fours);
    uint32_t bits = 0;
    if (route.flags & kIdsAreVectors) {
      const int4 ids = __ldg(reinterpret_cast<const int4*>(route.ids_in + token * route.ids_stride + 4 * first));
      bits = owner_bit(route, ids.x, base) | owner_bit(route, ids.y, base) | owner_bit(route, ids.z, base) |
             owner_bit(route, ids.w, base);
      bits &= ~absent_bits(route, any, base);
    } else {
      for (uint32_t k = first; k < min(first + 4, route.topk); ++k) {
        bool bad;
        bits |= owner_bit(route, read_id(route, token, k, bad), base);
      }
    }
    atomicOr(&ranks[token], bits);
  }
}

// A choice of a token, the lane's: its id (-1: none) and its weight. True if the id is neither an expert nor -1.
__device__ __forceinline__ bool read_choice(const Route& route, uint32_t token, int32_t& id, float& weight) {
  const uint32_t lane = threadIdx.x % 32;
  bool bad = false;
  id = -1, weight = 1.0f;
  if (lane >= route.topk) return false;
  const uint64_t at = static_cast<uint64_t>(token) * route.topk + lane;
  // The weight is on its way when the id is waited for.
  if (route.flags & kHasWeights) {
    weight = __ldg(reinterpret_cast<const float*>(route.weights_in + token * route.weights_stride) + lane);
  } else if (!(route.flags & kHasIds)) {
    weight = route.weights[at];
  }
  if (route.flags & kHasIds) {
    id = read_id(route, token, lane, bad);
  } else {
    id = route.ids[at];
  }
  return bad;
}

// Keeps a token's choices in the routing's memory, and counts those that are none. A warp calls it.
__device__ __forceinline__ void keep_choice(const Seat& seat, const Route& route, uint32_t token, int32_t id,
                                            float weight, bool is_bad) {
  const uint32_t lane = threadIdx.x % 32;
  if (lane < route.topk) {
    const uint64_t at = static_cast<uint64_t>(token) * route.topk + lane;
    if (route.flags & kHasIds) route.ids[at] = id;
    if (route.flags & (kHasIds | kHasWeights)) route.weights[at] = weight;
  }
  const uint32_t bad = __popc(__ballot_sync(~0u, is_bad));
  if (bad != 0 && lane == 0) {
    ptx::add_relaxed_gpu(&seat.slot->bad_ids, bad);
    ptx::add_relaxed_gpu(&seat.shared->counters[kBadIds], bad);
  }
}

}  // namespace a2a
