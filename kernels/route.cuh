// Routing maths: which ranks a token goes to, and at which position among its source's rows there.
//
// A position is the number of earlier tokens that go to the same rank, so a row's place depends on the routing alone.
// It is counted, not handed out: a block reads the ids of earlier tokens again (of all, or of its chunk, if a kernel
// before it has counted the chunks) rather than wait for another block. Ranks are taken 32 at a time: a token's ranks
// are then bits of a word, and a warp counts 32 tokens by votes.
#pragma once
#include "ptx.cuh"
#include "window.cuh"

namespace a2a {

// The owner of an expert.
__device__ __forceinline__ uint32_t owner_of(const Owners& owners, uint32_t expert) {
  if (owners.reciprocal == 0) return __ldg(owners.owner + expert);
  const bool larger = expert < owners.split;
  const uint32_t before = larger ? __umulhi(expert, owners.reciprocal_larger)
                                 : __umulhi(expert - owners.split, owners.reciprocal);
  return larger ? before : owners.larger + before;
}

// One choice of a token; -1 if it is no expert. `bad`: it is neither an expert nor -1.
__device__ __forceinline__ int32_t read_id(const Route& route, uint32_t token, uint32_t k, bool& bad) {
  const uint8_t* row = route.ids_in + token * route.ids_stride;
  int64_t id;
  if (route.flags & kIdsAre64) {
    // C and numpy may align them to less than their size.
    const auto* words = reinterpret_cast<const uint32_t*>(row) + 2 * k;
    id = static_cast<int64_t>(static_cast<uint64_t>(__ldg(words + 1)) << 32 | __ldg(words));
  } else {
    id = __ldg(reinterpret_cast<const int32_t*>(row) + k);
  }
  const bool known = static_cast<uint64_t>(id) < route.owners.experts;
  bad = !known && id != -1;
  return known ? static_cast<int32_t>(id) : -1;
}

__device__ __forceinline__ void add_owner(const Route& route, int64_t id, uint32_t base, uint32_t& ranks) {
  if (static_cast<uint64_t>(id) >= route.owners.experts) return;
  const uint32_t bit = owner_of(route.owners, static_cast<uint32_t>(id)) - base;
  if (bit < 32) ranks |= 1u << bit;
}

// Which of the ranks `base` to `base + 31` a token goes to.
__device__ __forceinline__ uint32_t ranks_of(const Route& route, uint32_t token, uint32_t base) {
  uint32_t ranks = 0;
  if (route.flags & kIdsAreVectors) {
    const auto* row = reinterpret_cast<const int4*>(route.ids_in + token * route.ids_stride);
    for (uint32_t k = 0; k < route.topk / 4; ++k) {
      const int4 ids = __ldg(row + k);
      add_owner(route, ids.x, base, ranks);
      add_owner(route, ids.y, base, ranks);
      add_owner(route, ids.z, base, ranks);
      add_owner(route, ids.w, base, ranks);
    }
    return ranks;
  }
  for (uint32_t k = 0; k < route.topk; ++k) {
    bool bad;
    const int32_t id = read_id(route, token, k, bad);
    if (id >= 0) add_owner(route, id, base, ranks);
  }
  return ranks;
}

// Adds to count[r] the tokens from `start` to `end` that go to rank r. A block calls it, and meets afterwards.
__device__ __forceinline__ void count_tokens(const Route& route, uint32_t ranks, uint32_t start, uint32_t end,
                                             uint32_t* count) {
  const uint32_t lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  for (uint32_t base = 0; base < ranks; base += 32) {
    const uint32_t group = min(ranks - base, 32u);
    uint32_t mine = 0;
    for (uint32_t first = start + warp * 32; first < end; first += blockDim.x) {
      const uint32_t token = first + lane;
      const uint32_t to = token < end ? ranks_of(route, token, base) : 0;
      for (uint32_t rank = 0; rank < group; ++rank) {
        const uint32_t votes = __popc(__ballot_sync(~0u, to >> rank & 1));
        if (lane == rank) mine += votes;
      }
    }
    if (mine != 0) atomicAdd(&count[base + lane], mine);
  }
}

// Adds to count[r] the tokens of whole chunks. A block calls it, and meets afterwards.
__device__ __forceinline__ void count_chunks(const Route& route, uint32_t ranks, uint32_t chunks, uint32_t* count) {
  for (uint32_t i = threadIdx.x; i < chunks * ranks; i += blockDim.x) {
    const uint32_t tokens = route.chunks[i];
    if (tokens != 0) atomicAdd(&count[i % ranks], tokens);
  }
}

// Keeps a token's ids and weights in the routing's memory, a choice a lane, and leaves the lane's in `id` and `weight`;
// returns how many ids are neither experts nor -1. A warp calls it.
__device__ __forceinline__ uint32_t keep_choices(const Route& route, uint32_t token, int32_t& id, float& weight) {
  const uint32_t lane = threadIdx.x % 32;
  bool bad = false;
  if (lane < route.topk) {
    const uint64_t at = static_cast<uint64_t>(token) * route.topk + lane;
    if (route.flags & kHasIds) {
      id = read_id(route, token, lane, bad);
      route.ids[at] = id;
    } else {
      id = route.ids[at];
    }
    if (route.flags & kHasWeights) {
      weight = __ldg(reinterpret_cast<const float*>(route.weights_in + token * route.weights_stride) + lane);
      route.weights[at] = weight;
    } else if (route.flags & kHasIds) {
      weight = 1.0f;
      route.weights[at] = weight;
    } else {
      weight = route.weights[at];
    }
  }
  return __popc(__ballot_sync(~0u, bad));
}

}  // namespace a2a
