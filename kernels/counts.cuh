// Everybody's rows by expert, told in one hop, and what follows from them: where a source's rows of an expert start.
//
// A count travels with its epoch in one word. A reader needs no flag for it and a writer no release, so a block that moves
// rows waits for just the counts that its rows' places are made of. Experts are taken some at a time: their counters are in
// a block's shared memory.
#pragma once
#include "route.cuh"
#include "wait.cuh"

namespace a2a {

// Experts that are counted together; in a build for tests few, so that groups of few experts take turns too. Even, because
// counts are stored by twos.
#ifdef A2A_JITTER
constexpr uint32_t kExpertsAtOnce = 6;
#else
constexpr uint32_t kExpertsAtOnce = 2048;
#endif
// Rows of ids: the caller's, a routing's, or those in a bank.
struct Choices {
  const uint8_t* ids;
  uint64_t stride;
  uint32_t topk;
  uint32_t experts;
  // Words of an id.
  uint32_t words;
  // Of which rank the experts are looked for, or kNone: of all.
  uint32_t owner;
  // Not null: experts of these ranks are none.
  const Absent* absent;
};

// A choice of a row; kNone if it is no expert that is looked for.
__device__ __forceinline__ uint32_t choice_of(const Choices& choices, const Owners& owners, uint32_t row, uint32_t k) {
  const auto* at = reinterpret_cast<const uint32_t*>(choices.ids + row * choices.stride) + k * choices.words;
  const uint32_t id = at[0], high = choices.words == 2 ? at[1] : 0;
  if (id >= choices.experts || high != 0) return kNone;
  if (choices.absent != nullptr && choices.absent->has(owner_of(owners, id))) return kNone;
  return choices.owner == kNone || owner_of(owners, id) == choices.owner ? id : kNone;
}

// The first lane below `width` lanes of this one's row that has the same value; lanes without a value are alone.
__device__ __forceinline__ uint32_t first_alike(uint32_t value, uint32_t row) {
  const uint32_t lane = threadIdx.x % 32;
  // Experts are fewer than 2^20 and rows of a warp fewer than 2^6.
  const uint32_t key = value == kNone ? 1u << 31 | lane : row << 24 | value;
  return __ffs(__match_any_sync(~0u, key)) - 1;
}

// This rank's ids: the caller's, or those that a replay goes by.
__device__ __forceinline__ Choices own_choices(const Route& route) {
  const bool given = route.flags & kHasIds;
  return Choices{given ? route.ids_in : reinterpret_cast<const uint8_t*>(route.ids),
                 given ? route.ids_stride : 4ull * route.topk,
                 route.topk,
                 route.owners.experts,
                 given && route.flags & kIdsAre64 ? 2u : 1u,
                 kNone,
                 __ldg(&route.absent->any) != 0 ? route.absent : nullptr};
}

// An expert that a token names twice has one row, whose weight is the sum, k ascending. A warp calls it, a choice a lane;
// `leader`: the first lane with the same expert, whose sum counts.
__device__ __forceinline__ float sum_alike(float weight, uint32_t leader, uint32_t topk) {
  const uint32_t lane = threadIdx.x % 32;
  if (__ballot_sync(~0u, leader != lane) == 0) return weight;
  float sum = weight;
#pragma unroll 1
  for (uint32_t k = 1; k < topk; ++k) {
    const float other = __shfl_sync(~0u, weight, k);
    const uint32_t its_leader = __shfl_sync(~0u, leader, k);
    if (k > lane && its_leader == lane) sum = __fadd_rn(sum, other);
  }
  return sum;
}

// Adds the rows from `start` to `end`: to experts[e - base] those that name expert e (once, if they name it twice), to
// ranks[r] those that go to rank r; either may be null. A block calls it, and meets afterwards.
__device__ __forceinline__ void count_choices(const Choices& choices, const Owners& owners, uint32_t topk_bits, uint32_t base,
                                              uint32_t start, uint32_t end, uint32_t* experts, uint32_t* ranks) {
  const uint32_t lane = threadIdx.x % 32, warp = threadIdx.x / 32, rows = 32u >> topk_bits;
  const uint32_t row = lane >> topk_bits, k = lane & ((1u << topk_bits) - 1);
#pragma unroll 1
  for (uint32_t first = start + warp * rows; first < end; first += blockDim.x / 32 * rows) {
    const bool inside = first + row < end && k < choices.topk;
    const uint32_t id = inside ? choice_of(choices, owners, first + row, k) : kNone;
    if (experts != nullptr && first_alike(id, row) == lane && id - base < kExpertsAtOnce && id != kNone) {
      atomicAdd(&experts[id - base], 1);
    }
    if (ranks == nullptr) continue;
    const uint32_t owner = id != kNone ? owner_of(owners, id) : kNone;
    if (first_alike(owner, row) == lane && owner != kNone) atomicAdd(&ranks[owner], 1);
  }
}

// Choices of some groups of rows from `first` on, a choice a lane, all of them on their way at once; kNone past `last`.
template <uint32_t n>
__device__ __forceinline__ void read_groups(const Choices& choices, const Owners& owners, uint32_t topk_bits, uint32_t first,
                                            uint32_t last, uint32_t (&ids)[n]) {
  const uint32_t lane = threadIdx.x % 32, rows = 32u >> topk_bits, row = lane >> topk_bits;
  const uint32_t k = lane & ((1u << topk_bits) - 1);
  uint32_t words[n][2];
#pragma unroll
  for (uint32_t i = 0; i < n; ++i) {
    const uint32_t at = first + i * rows + row;
    const bool inside = at < last && k < choices.topk;
    const auto* id = reinterpret_cast<const uint32_t*>(choices.ids + at * choices.stride) + k * choices.words;
    words[i][0] = kNone, words[i][1] = 0;
    if (inside) words[i][0] = id[0];
    if (inside && choices.words == 2) words[i][1] = id[1];
  }
#pragma unroll
  for (uint32_t i = 0; i < n; ++i) {
    const bool known = words[i][0] < choices.experts && words[i][1] == 0;
    const bool wanted = known && (choices.owner == kNone || owner_of(owners, words[i][0]) == choices.owner);
    ids[i] = wanted ? words[i][0] : kNone;
  }
}

// Calls `act` with the choices of all groups of rows from `start` to `end` that are a warp's of some.
template <class Act>
__device__ __forceinline__ void each_group(const Choices& choices, const Owners& owners, uint32_t topk_bits, uint32_t start,
                                           uint32_t end, uint32_t warp, uint32_t warps, const Act& act) {
  constexpr uint32_t kGroups = 4;
  const uint32_t rows = 32u >> topk_bits;
#pragma unroll 1
  for (uint32_t first = start + warp * kGroups * rows; first < end; first += warps * kGroups * rows) {
    uint32_t ids[kGroups];
    read_groups(choices, owners, topk_bits, first, end, ids);
#pragma unroll 1
    for (uint32_t i = 0; i < kGroups && first + i * rows < end; ++i) {
      uint32_t id = ids[0];
#pragma unroll
      for (uint32_t j = 1; j < kGroups; ++j) id = i == j ? ids[j] : id;
      if (choices.absent != nullptr && id != kNone && choices.absent->has(owner_of(owners, id))) id = kNone;
      act(first + i * rows, id);
      // Lanes that had nothing to do wait for the others, with which they vote.
      __syncwarp();
    }
  }
}

__device__ __forceinline__ void clear(uint32_t* words, uint32_t count) {
#pragma unroll 1
  for (uint32_t i = threadIdx.x; i < count; i += blockDim.x) words[i] = 0;
}

// A source's count of an expert, in a rank's window.
__device__ __forceinline__ uint64_t* count_at(const Seat& seat, const Counts& counts, uint32_t window, uint32_t source,
                                              uint32_t expert) {
  uint8_t* row = window_of(seat, window) + counts.region + source * counts.stride;
  return reinterpret_cast<uint64_t*>(row) + expert;
}

// A slot that closes while a kernel is at work.
__device__ __forceinline__ bool has_closed(const Seat& seat) {
  return *reinterpret_cast<volatile uint32_t*>(&seat.slot->closed) != 0;
}

// A count that is known to be there. What a peer wrote is bounded before it becomes a place.
__device__ __forceinline__ uint32_t count_of(const Seat& seat, const Counts& counts, uint32_t source, uint32_t expert) {
  return min(static_cast<uint32_t>(ptx::ld_relaxed_sys(count_at(seat, counts, seat.rank, source, expert))), seat.bound);
}

// A count, once it is there; kNone if the slot closes first.
__device__ __forceinline__ uint32_t await_count(const Seat& seat, const Counts& counts, uint32_t source, uint32_t expert,
                                                uint32_t epoch) {
  const uint64_t* at = count_at(seat, counts, seat.rank, source, expert);
  for (uint32_t polls = 1;; ++polls) {
    A2A_JITTER_HERE;
    const uint64_t word = ptx::ld_relaxed_sys(at);
    if (reached(word, epoch)) return min(static_cast<uint32_t>(word), seat.bound);
    if (polls % kPollsPerLook == 0 && has_closed(seat)) return kNone;
  }
}

// A look at the counts of sources from `first` to `end`, `n` at most, all of them on their way at once; 0 past the last. False
// if one is not there yet.
template <uint32_t n>
__device__ __forceinline__ bool look_at_counts(const Seat& seat, const Counts& counts, uint32_t first, uint32_t end,
                                               uint32_t expert, uint32_t epoch, uint32_t (&rows)[n]) {
  A2A_JITTER_HERE;
  const auto* at = reinterpret_cast<const uint8_t*>(count_at(seat, counts, seat.rank, first, expert));
  uint64_t words[n];
#pragma unroll
  for (uint32_t i = 0; i < n; ++i, at += counts.stride) {
    words[i] = pack(epoch, 0);
    if (first + i < end) words[i] = ptx::ld_relaxed_sys(reinterpret_cast<const uint64_t*>(at));
  }
  bool here = true;
#pragma unroll
  for (uint32_t i = 0; i < n; ++i) {
    here &= reached(words[i], epoch);
    rows[i] = min(static_cast<uint32_t>(words[i]), seat.bound);
  }
  return here;
}

// The same of all sources, once they are there, or the slot closes.
template <uint32_t n>
__device__ __forceinline__ void await_counts(const Seat& seat, const Counts& counts, uint32_t first, uint32_t expert,
                                             uint32_t epoch, uint32_t (&rows)[n]) {
  for (uint32_t polls = 1; !look_at_counts(seat, counts, first, seat.ranks, expert, epoch, rows); ++polls) {
    if (polls % kPollsPerLook == 0 && has_closed(seat)) return;
  }
}

// Rows with one key, of all sources, of this one, and of those before it. Sums stay below 2^31, as their terms are.
struct Shares {
  uint32_t all;
  uint32_t mine;
  uint32_t before;
  __device__ uint32_t kept_of_mine(uint32_t room) const { return min(before + mine, room) - min(before, room); }
};

// Adds up the counts of one key, once they are there. `keep` is told of each source, and of some behind the last, how many of
// its rows there is room for.
template <class Keep>
__device__ __forceinline__ Shares add_sources(const Seat& seat, const Counts& counts, uint32_t key, uint32_t epoch,
                                              uint32_t room, const Keep& keep) {
  constexpr uint32_t kSources = 8, kMost = 0x7fffffff;
  Shares shares{0, 0, 0};
#pragma unroll 1
  for (uint32_t first = 0; first < seat.ranks; first += kSources) {
    uint32_t rows[kSources];
    await_counts(seat, counts, first, key, epoch, rows);
#pragma unroll
    for (uint32_t i = 0; i < kSources; ++i) {
      if (first + i == seat.rank) shares.before = shares.all, shares.mine = rows[i];
      const uint32_t kept = min(shares.all, room);
      shares.all = min(shares.all + rows[i], kMost);
      keep(first + i, min(shares.all, room) - kept);
    }
  }
  return shares;
}

// Tells every rank this rank's counts of some experts (and of one more, if they are odd); in the place of those that take part
// no more, itself that they have none. A block calls it.
__device__ __forceinline__ void store_counts(const Seat& seat, const Counts& counts, uint32_t epoch, uint32_t base,
                                             uint32_t some, const uint32_t* experts, bool absent) {
#pragma unroll 1
  for (uint32_t i = threadIdx.x; i < (some + 1) / 2; i += blockDim.x) {
    const ulonglong2 words = make_ulonglong2(pack(epoch, experts[2 * i]), pack(epoch, experts[2 * i + 1]));
#pragma unroll 4
    for (uint32_t peer = 0; peer < seat.ranks; ++peer) {
      A2A_JITTER_HERE;
      auto* to = reinterpret_cast<ulonglong2*>(count_at(seat, counts, peer, seat.rank, base));
      ptx::st_relaxed_sys(to + i, words);
    }
  }
  if (!absent) return;
  for_absent(seat, threadIdx.x / 32, blockDim.x / 32, [&](uint32_t rank) {
    auto* to = reinterpret_cast<ulonglong2*>(count_at(seat, counts, seat.rank, rank, base));
    const ulonglong2 none = make_ulonglong2(pack(epoch, 0), pack(epoch, 0));
    for (uint32_t i = threadIdx.x % 32; i < (some + 1) / 2; i += 32) ptx::st_relaxed_sys(to + i, none);
  });
}

// For those that look for trouble: counts themselves say that they are there. A warp calls it.
__device__ __forceinline__ void say_counted(const Seat& seat, uint32_t epoch, bool absent) {
#pragma unroll 1
  for (uint32_t peer = threadIdx.x % 32; peer < seat.ranks; peer += 32) {
    ptx::st_relaxed_sys(mail64(mailbox(seat, peer, seat.rank), kCountsFlag), pack(epoch, 0));
  }
  if (!absent) return;
  for_absent(seat, threadIdx.x % 32, 32, [&](uint32_t rank) {
    ptx::st_relaxed_sys(mail64(mailbox(seat, seat.rank, rank), kCountsFlag), pack(epoch, 0));
  });
}

// Tells every rank this rank's counts of the step that a slot is to begin, and that they are on their way, if the slot may. A
// block calls it; `experts` is its shared memory. `absent`: in the place of those that take part no more too.
__device__ __forceinline__ void tell_counts(const Seat& seat, const Standing& at, const Route& route, const Counts& counts,
                                            const Choices& choices, uint32_t topk_bits, uint32_t* experts,
                                            bool absent) {
  const uint32_t epoch = at.epoch + 1;
#pragma unroll 1
  for (uint32_t base = 0; base < choices.experts; base += kExpertsAtOnce) {
    const uint32_t some = min(choices.experts - base, kExpertsAtOnce);
    clear(experts, some + some % 2);
    __syncthreads();
    count_choices(choices, route.owners, topk_bits, base, 0, route.tokens, experts, nullptr);
    __syncthreads();
    // Not before: the slot and the ids are on their way at the same time.
    if (!at.opens()) return;
    store_counts(seat, counts, epoch, base, some, experts, absent);
    __syncthreads();
  }
  if (threadIdx.x >= blockDim.x - 32) say_counted(seat, epoch, at.absent);
}

}  // namespace a2a
