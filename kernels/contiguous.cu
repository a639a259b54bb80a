// A dispatch whose rows are (token, expert) pairs in one list, expert after expert: a2a_place_experts (where tokens are many,
// between a2a_count_part and a2a_place_part), then a2a_carry (flat.cu), a2a_finish (dispatch.cu), and a2a_spread.
//
// A token crosses a link once for each of its ranks, into the first of its rows there; what follows from its experts, into its
// source's bank, with the rows that were found for it: a2a_spread copies the token from the first to the others.
//
// What went into a bank altogether, because its source did not wait for counts, has no rows yet. The tokens of all banks,
// source after source, are in the order that every expert's rows have: so a2a_spread then finds all tokens' rows by counting
// those before them, and copies a token from its bank.
//
// All count alike: each warp counts a run of tokens by itself, then it is known where each run's rows start, and each warp
// goes through its run once more.
#include "arrivals.cuh"
#include "counts.cuh"
#include "places.cuh"

namespace a2a {

// A block of any of them takes half of a multiprocessor at most: the other half may be full of what waits for it. In a build for
// tests few tokens at a time.
#ifdef A2A_JITTER
constexpr uint32_t kPlaceExpertsThreads = 64, kSpreadThreads = 64;
#else
constexpr uint32_t kPlaceExpertsThreads = 512, kSpreadThreads = 384;
#endif
// Vectors of a lane that are on their way at a time.
constexpr uint32_t kSpreadVectors = 4;

// A warp's run of `count` things from `first` on.
struct Run {
  uint32_t first;
  uint32_t last;
};
__device__ __forceinline__ Run run_of(uint32_t first, uint32_t count, uint32_t part, uint32_t parts) {
  const uint64_t n = count;
  return Run{first + static_cast<uint32_t>(n * part / parts), first + static_cast<uint32_t>(n * (part + 1) / parts)};
}

// From what each warp counted, [warps][keys], to what is before each warp's; the sums go to `all`. The block calls it.
__device__ __forceinline__ void add_up_runs(uint32_t* counts, uint32_t warps, uint32_t keys, uint32_t* all) {
#pragma unroll 1
  for (uint32_t key = threadIdx.x; key < keys; key += blockDim.x) {
    uint32_t before = 0;
#pragma unroll 1
    for (uint32_t warp = 0; warp < warps; ++warp) {
      uint32_t& count = counts[warp * keys + key];
      const uint32_t its = count;
      count = before, before += its;
    }
    all[key] = before;
  }
}

// The lanes of a group of rows that have the same value: all; one of each row; those of earlier rows, one of each.
struct Alike {
  uint32_t all;
  bool leads;
  uint32_t before;
  uint32_t rows;
};
__device__ __forceinline__ Alike alike(uint32_t value, uint32_t row, uint32_t topk_bits) {
  const uint32_t lane = threadIdx.x % 32;
  const uint32_t all = __match_any_sync(~0u, value == kNone ? 1u << 31 | lane : value);
  // All lanes vote.
  const bool leads = first_alike(value, row) == lane && value != kNone;
  const uint32_t leaders = all & __ballot_sync(~0u, leads), row_start = lane >> topk_bits << topk_bits;
  return Alike{all, leads, static_cast<uint32_t>(__popc(leaders & ((1u << row_start) - 1))),
               static_cast<uint32_t>(__popc(leaders))};
}
// The next number of a value, for a lane of a row that has it. A warp calls it; values of no lane are left alone.
__device__ __forceinline__ uint32_t take_numbers(uint32_t* next, uint32_t value, const Alike& like) {
  const uint32_t first = value != kNone ? next[value] : 0;
  __syncwarp();
  if (value != kNone && __ffs(like.all) - 1 == threadIdx.x % 32) next[value] = first + like.rows;
  __syncwarp();
  return first + like.before;
}

struct Placement {
  Meeting meeting;
  // By source, of rows here; by rank, of this rank's rows there: those that there is room for.
  uint32_t kept_from[kMaxRanks];
  uint32_t kept_at[kMaxRanks];
  uint32_t missing;
  uint32_t dropped;
  uint32_t exceeded;
};

// Where experts' rows start at their ranks, by the experts' numbers, in `p.ends`, which has how many rows each has; and what
// each rank demands. A warp for each rank. The block calls it.
__device__ __forceinline__ void start_blocks(const PlaceExpertsParams& p, Placement& s) {
  const Seat& seat = p.place.seat;
  const uint32_t lane = threadIdx.x % 32, align = p.blocks.alignment;
#pragma unroll 1
  for (uint32_t rank = threadIdx.x / 32; rank < seat.ranks; rank += kPlaceExpertsThreads / 32) {
    const uint32_t first = p.blocks.firsts[rank], end = p.blocks.firsts[rank + 1];
    uint32_t next = 0;
#pragma unroll 1
    for (uint32_t base = first; base < end; base += 32) {
      const uint32_t number = base + lane;
      const uint32_t rows = number < end ? (p.ends[number] + align - 1) / align * align : 0;
      uint32_t sum = rows;
#pragma unroll
      for (uint32_t step = 1; step < 32; step *= 2) {
        const uint32_t other = __shfl_up_sync(~0u, sum, step);
        if (lane >= step) sum += other;
      }
      if (number < end) p.ends[number] = next + sum - rows;
      next += __shfl_sync(~0u, sum, 31);
    }
    if (lane != 0) continue;
    p.place.demands[rank] = next;
    if (p.place.limit != 0 && next > p.place.limit) atomicMin(&s.exceeded, rank);
  }
}

// What everybody's counts come to: where this rank's rows of each expert start, into `bases`; what is received here. The
// block calls it.
__device__ __forceinline__ void hear_experts(const PlaceExpertsParams& p, uint32_t epoch, uint32_t* bases, Placement& s) {
  const PlaceParams& place = p.place;
  const Seat& seat = place.seat;
  const Owners& owners = place.route.owners;
  const uint32_t tid = threadIdx.x, room = place.room;
  clear(s.kept_from, seat.ranks), clear(s.kept_at, seat.ranks);
  if (tid == 0) s.missing = s.dropped = 0, s.exceeded = kNone;
  const auto number_of = [&](uint32_t expert) {
    const uint32_t owner = owner_of(owners, expert);
    return p.blocks.firsts[owner] + place_of(owners, expert, owner);
  };
#pragma unroll 1
  for (uint32_t expert = tid; expert < owners.experts; expert += kPlaceExpertsThreads) {
    p.ends[number_of(expert)] = add_sources(seat, place.counts, expert, epoch, kNone, [](uint32_t, uint32_t) {}).all;
  }
  __syncthreads();
  start_blocks(p, s);
  __syncthreads();
#pragma unroll 1
  for (uint32_t expert = tid; expert < owners.experts; expert += kPlaceExpertsThreads) {
    const uint32_t owner = owner_of(owners, expert), start = p.ends[number_of(expert)];
    const bool own = owner == seat.rank;
    // Of the rows that there is room for, those from this block's start on.
    const uint32_t left = room - min(start, room);
    const auto keep = [&](uint32_t source, uint32_t kept) {
      if (own && kept != 0) atomicAdd(&s.kept_from[source], kept);
    };
    const Shares shares = add_sources(seat, place.counts, expert, epoch, left, keep);
    const uint32_t kept = shares.kept_of_mine(left), here = min(shares.all, left);
    bases[expert] = start + shares.before;
    if (kept != 0) atomicAdd(&s.kept_at[owner], kept);
    if (shares.mine != kept) atomicAdd(&s.missing, shares.mine - kept);
    if (!own) continue;
    const uint32_t local = place_of(owners, expert, owner);
    p.starts[local] = min(start, room), place.received[local] = here;
    if (shares.all != here) atomicAdd(&s.dropped, shares.all - here);
  }
  __syncthreads();
#pragma unroll 1
  for (uint32_t rank = tid; rank < seat.ranks; rank += kPlaceExpertsThreads) {
    place.kept_counts[rank] = s.kept_from[rank], p.pairs_for[rank] = s.kept_at[rank];
  }
  if (tid != 0) return;
  const uint32_t demand = place.demands[seat.rank];
  place.summary[0] = demand, place.summary[1] = s.exceeded != kNone ? ~s.exceeded : s.dropped;
  place.summary[2] = s.missing, place.summary[3] = min(demand, room);
}

// What a block that counts shares, of words for ranks and then for experts: what is before each warp's run, [warps][ranks] and
// [warps][experts]; what all come to, [ranks], [experts, an even number].
struct Tallies {
  uint32_t* by_rank;
  uint32_t* by_expert;
  uint32_t* to_rank;
  uint32_t* of_expert;
};
__device__ __forceinline__ Tallies tallies_of(const PlaceExpertsParams& p, uint32_t* words) {
  const uint32_t ranks = p.place.seat.ranks, experts = p.place.route.owners.experts;
  uint32_t* const all = words + p.warps * (ranks + experts);
  return Tallies{words, words + p.warps * ranks, all, all + ranks};
}

// Adds a run's tokens to those of the experts that they name, and of their ranks. Some warps call it.
__device__ __forceinline__ void count_run(const PlaceExpertsParams& p, const Choices& choices, const Run& run, uint32_t warp,
                                          uint32_t warps, uint32_t* ranks, uint32_t* experts) {
  const uint32_t lane = threadIdx.x % 32, row = lane >> p.topk_bits;
  const Owners& owners = p.place.route.owners;
  each_group(choices, owners, p.topk_bits, run.first, run.last, warp, warps, [&](uint32_t, uint32_t id) {
    const uint32_t owner = id != kNone ? owner_of(owners, id) : kNone;
    if (first_alike(id, row) == lane && id != kNone) atomicAdd(&experts[id], 1);
    if (first_alike(owner, row) == lane && owner != kNone) atomicAdd(&ranks[owner], 1);
  });
}

// Counts some tokens, each warp a run of its own, which is the result. The block calls it.
__device__ __forceinline__ Run count_runs(const PlaceExpertsParams& p, const Choices& choices, const Run& tokens,
                                          const Tallies& to) {
  const uint32_t ranks = p.place.seat.ranks, experts = p.place.route.owners.experts, warp = threadIdx.x / 32;
  clear(to.by_rank, p.warps * (ranks + experts));
  if (threadIdx.x == 0) to.of_expert[experts] = 0;
  __syncthreads();
  const Run part = run_of(0, tokens.last - tokens.first, warp, p.warps);
  const Run run{tokens.first + part.first, tokens.first + part.last};
  if (warp < p.warps) count_run(p, choices, run, 0, 1, to.by_rank + warp * ranks, to.by_expert + warp * experts);
  __syncthreads();
  add_up_runs(to.by_rank, p.warps, ranks, to.to_rank);
  add_up_runs(to.by_expert, p.warps, experts, to.of_expert);
  __syncthreads();
  return run;
}

// Writes down where each token's rows are. `before`: by rank, of this rank's tokens there, those before the block's; `bases`:
// where this rank's rows of each expert start, without those before the block's, or null: rows go into banks. The warp calls
// it with its run; `experts` and `ranks` are the numbers that the next rows have in the block.
__device__ __forceinline__ void place_run(const PlaceExpertsParams& p, const Choices& choices, const Run& run,
                                          uint32_t* experts, uint32_t* ranks, const uint32_t* before, const uint32_t* bases) {
  const Route& route = p.place.route;
  const Seat& seat = p.place.seat;
  const uint32_t lane = threadIdx.x % 32, row = lane >> p.topk_bits, k = lane & ((1u << p.topk_bits) - 1);
  const uint32_t row_start = row << p.topk_bits;
  each_group(choices, route.owners, p.topk_bits, run.first, run.last, 0, 1, [&](uint32_t first, uint32_t id) {
    const uint32_t token = first + row, owner = id != kNone ? owner_of(route.owners, id) : kNone;
    const Alike same_rank = alike(owner, row, p.topk_bits);
    const uint32_t number = take_numbers(ranks, owner, same_rank);
    const uint32_t bank_row = seat.rank * seat.bound + number + (owner != kNone ? before[owner] : 0);
    uint32_t at = kNone;
    if (bases != nullptr) {
      const Alike same = alike(id, row, p.topk_bits);
      const uint32_t its = take_numbers(experts, id, same);
      if (id != kNone) at = bases[id] + its;
      if (at >= p.place.room) at = kNone;
    }
    // The first of the token's rows at the same rank.
    uint32_t least = at;
#pragma unroll 1
    for (uint32_t other = 0; other < choices.topk; ++other) {
      const uint32_t its_owner = __shfl_sync(~0u, owner, row_start + other);
      const uint32_t its_row = __shfl_sync(~0u, at, row_start + other);
      if (its_owner == owner) least = min(least, its_row);
    }
    const uint32_t leaders = __ballot_sync(~0u, same_rank.leads) >> row_start;
    const uint32_t of_row = p.topk_bits == 5 ? leaders : leaders & ((1u << (1u << p.topk_bits)) - 1);
    if (token >= run.last || k >= choices.topk) return;
    if (bases != nullptr) route.pair_rows[static_cast<uint64_t>(token) * choices.topk + k] = at;
    const uint64_t targets = static_cast<uint64_t>(token) * route.fanout;
    if (same_rank.leads) {
      const uint64_t target = targets + __popc(of_row & ((1u << k) - 1));
      route.target_ranks[target] = owner, p.bank_rows[target] = bank_row;
      route.target_rows[target] = bases != nullptr ? least : bank_row;
    }
    // A step may have fewer choices than a token can have ranks.
#pragma unroll 1
    for (uint32_t i = __popc(of_row) + k; i < route.fanout; i += choices.topk) route.target_ranks[targets + i] = -1;
  });
}

// Where tokens are many, blocks count and place a part of them each: before a2a_place_experts, and behind it.
__device__ __forceinline__ Run part_of(const PlaceExpertsParams& p) {
  return run_of(0, p.place.route.tokens, blockIdx.x, gridDim.x);
}
// A part's words: [ranks], [experts]. First how many of its tokens there are, then where the first of them goes.
__device__ __forceinline__ uint32_t* words_of(const PlaceExpertsParams& p, uint32_t part) {
  return p.parts + static_cast<uint64_t>(part) * (p.place.seat.ranks + p.place.route.owners.experts);
}

extern "C" __global__ void __launch_bounds__(kPlaceExpertsThreads, 2)
    a2a_count_part(const __grid_constant__ PlaceExpertsParams p) {
  extern __shared__ uint32_t words[];
  const OnSm on_sm(p.place.seat);
  const uint32_t ranks = p.place.seat.ranks, keys = ranks + p.place.route.owners.experts;
  ptx::launch_dependents();
  clear(words, keys);
  __syncthreads();
  count_run(p, own_choices(p.place.route), part_of(p), threadIdx.x / 32, kPlaceExpertsThreads / 32, words, words + ranks);
  __syncthreads();
  uint32_t* const to = words_of(p, blockIdx.x);
#pragma unroll 1
  for (uint32_t key = threadIdx.x; key < keys; key += kPlaceExpertsThreads) to[key] = words[key];
}

// What all parts come to.
__device__ __forceinline__ void add_up_parts(const PlaceExpertsParams& p, uint32_t* all) {
  const uint32_t keys = p.place.seat.ranks + p.place.route.owners.experts;
#pragma unroll 1
  for (uint32_t key = threadIdx.x; key < keys; key += kPlaceExpertsThreads) {
    uint32_t sum = 0;
#pragma unroll 8
    for (uint32_t part = 0; part < p.num_parts; ++part) sum += words_of(p, part)[key];
    all[key] = sum;
  }
  if (threadIdx.x == 0) all[keys] = 0;
  __syncthreads();
}

// Where the tokens of each start. `bases` as place_run has it.
__device__ __forceinline__ void start_parts(const PlaceExpertsParams& p, const uint32_t* bases) {
  const uint32_t ranks = p.place.seat.ranks, keys = ranks + p.place.route.owners.experts;
#pragma unroll 1
  for (uint32_t key = threadIdx.x; key < keys; key += kPlaceExpertsThreads) {
    uint32_t next = key < ranks || bases == nullptr ? 0 : bases[key - ranks];
#pragma unroll 8
    for (uint32_t part = 0; part < p.num_parts; ++part) {
      uint32_t& word = words_of(p, part)[key];
      const uint32_t its = word;
      word = next, next += its;
    }
  }
}

extern "C" __global__ void __launch_bounds__(kPlaceExpertsThreads, 2)
    a2a_place_experts(const __grid_constant__ PlaceExpertsParams p) {
  extern __shared__ uint32_t words[];
  __shared__ Placement s;
  const PlaceParams& place = p.place;
  const Seat& seat = place.seat;
  const OnSm on_sm(seat);
  const Route& route = place.route;
  const uint32_t experts = route.owners.experts, warp = threadIdx.x / 32;
  const Tallies tallies = tallies_of(p, words);
  const bool tells = place.flags & kRaises, hears = place.flags & kWaits, parts = p.num_parts != 0;
  if (parts) ptx::wait_prerequisites();
  const Standing at = standing_of(*seat.slot, place.flags & kAfterOpen);
  const Choices choices = own_choices(route);
  Run run{0, 0};
  if (parts) {
    add_up_parts(p, tallies.to_rank);
  } else {
    run = count_runs(p, choices, Run{0, route.tokens}, tallies);
  }
  if (tells ? !at.opens() : !at.receives(seat.routing)) return;
  const uint32_t epoch = at.epoch + (tells ? 1 : 0);
  if (tells) {
    store_counts(seat, place.counts, epoch, 0, experts, tallies.of_expert, at.absent);
    if (threadIdx.x >= kPlaceExpertsThreads - 32) say_counted(seat, epoch, at.absent);
  }
#pragma unroll 1
  for (uint32_t rank = threadIdx.x; rank < seat.ranks; rank += kPlaceExpertsThreads) {
    route.rows_for[rank] = tallies.to_rank[rank], tallies.to_rank[rank] = 0;
  }
  if (hears) {
    const uint64_t started = at.state == kOpened ? at.started : ptx::globaltimer();
    const Wait wait{kDispatch, epoch, at.sequence + (tells ? 1 : 0), true, kCountsFlag};
    // Who comes behind sees that the slot is closed.
    if (!await(seat, wait, s.meeting, started)) return;
    // What was told is in the windows.
    hear_experts(p, epoch, tallies.of_expert, s);
  }
  // Not before: large blocks that wait, if only for this one, could keep out what it waits for.
  ptx::launch_dependents();
  __syncthreads();
  const uint32_t* bases = hears ? tallies.of_expert : nullptr;
  if (parts) return start_parts(p, bases);
  if (warp >= p.warps) return;
  place_run(p, choices, run, tallies.by_expert + warp * experts, tallies.by_rank + warp * seat.ranks, tallies.to_rank, bases);
}

extern "C" __global__ void __launch_bounds__(kPlaceExpertsThreads, 2)
    a2a_place_part(const __grid_constant__ PlaceExpertsParams p) {
  extern __shared__ uint32_t words[];
  const PlaceParams& place = p.place;
  const Seat& seat = place.seat;
  const OnSm on_sm(seat);
  const Tallies tallies = tallies_of(p, words);
  const uint32_t experts = place.route.owners.experts, warp = threadIdx.x / 32;
  const Choices choices = own_choices(place.route);
  const Run run = count_runs(p, choices, part_of(p), tallies);
  ptx::wait_prerequisites();
  ptx::launch_dependents();
  const Standing at = standing_of(*seat.slot);
  if (place.flags & kRaises ? !at.opens() : !at.receives(seat.routing)) return;
  const uint32_t* const starts = words_of(p, blockIdx.x);
#pragma unroll 1
  for (uint32_t key = threadIdx.x; key < seat.ranks + experts; key += kPlaceExpertsThreads) tallies.to_rank[key] = starts[key];
  __syncthreads();
  if (warp >= p.warps) return;
  place_run(p, choices, run, tallies.by_expert + warp * experts, tallies.by_rank + warp * seat.ranks, tallies.to_rank,
            place.flags & kWaits ? tallies.of_expert : nullptr);
}

// Of the tokens of all banks, source after source, some: calls `act` with a source, and which of its tokens they are.
template <class Act>
__device__ __forceinline__ void each_source(const Seat& seat, const Arrivals& s, uint32_t first, uint32_t last,
                                            const Act& act) {
#pragma unroll 1
  for (uint32_t source = 0; source < seat.ranks && first < last; ++source) {
    const uint32_t end = min(s.start[source + 1], last);
    if (first >= end) continue;
    act(source, first - s.start[source], end - s.start[source]);
    first = end;
  }
}

// A source's ids in its bank, those of this rank's experts.
__device__ __forceinline__ Choices bank_choices(const SpreadParams& q, uint32_t source) {
  const SettleParams& p = q.settle;
  const uint64_t stride = 4ull * p.topk;
  const uint8_t* ids = window_of(p.seat, p.seat.rank) + p.bank_ids + static_cast<uint64_t>(source) * p.seat.bound * stride;
  return Choices{ids, stride, p.topk, q.owners.experts, 1, p.seat.rank, nullptr};
}

// Adds the tokens of banks from `first` to `last` to those of this rank's experts that they name. Some warps call it.
__device__ __forceinline__ void count_banks(const SpreadParams& q, const Arrivals& s, uint32_t first, uint32_t last,
                                            uint32_t warp, uint32_t warps, uint32_t* experts) {
  const uint32_t lane = threadIdx.x % 32, row = lane >> q.topk_bits;
  each_source(q.settle.seat, s, first, last, [&](uint32_t source, uint32_t start, uint32_t end) {
    const Choices choices = bank_choices(q, source);
    each_group(choices, q.owners, q.topk_bits, start, end, warp, warps, [&](uint32_t, uint32_t id) {
      const bool leads = first_alike(id, row) == lane && id != kNone;
      if (leads) atomicAdd(&experts[place_of(q.owners, id, q.settle.seat.rank)], 1);
    });
  });
}

// Copies some of a token's vectors to the rows of those lanes that are in `lanes`. A warp calls it.
__device__ __forceinline__ void spread_token(const SettleParams& p, const Run& vectors, const uint8_t* from, uint32_t row,
                                             uint32_t lanes) {
  uint8_t* const tokens = window_of(p.seat, p.seat.rank) + p.to_tokens;
#pragma unroll 1
  for (uint32_t base = vectors.first; base < vectors.last; base += 32 * kSpreadVectors) {
    const uint32_t first = base + threadIdx.x % 32;
    int4 value[kSpreadVectors];
#pragma unroll
    for (uint32_t u = 0; u < kSpreadVectors; ++u) {
      if (first + 32 * u < vectors.last) value[u] = ptx::ld_stream(from + 16ull * (first + 32 * u));
    }
#pragma unroll 1
    for (uint32_t rest = lanes; rest != 0; rest &= rest - 1) {
      uint8_t* to = tokens + __shfl_sync(~0u, row, __ffs(rest) - 1) * 16ull * p.vectors + 16ull * first;
#pragma unroll
      for (uint32_t u = 0; u < kSpreadVectors; ++u) {
        if (first + 32 * u < vectors.last) ptx::st_row(to + 512ull * u, value[u]);
      }
    }
  }
}

// The same of a plane beside the tokens: from a bank, or from the first row.
__device__ __forceinline__ void spread_side(const SettleParams& p, Side side, bool banked, uint64_t bank_row, uint32_t first,
                                            uint32_t row, uint32_t lanes) {
  uint8_t* const own = window_of(p.seat, p.seat.rank);
  const uint32_t lane = threadIdx.x % 32;
  side.from = own + (banked ? side.bank : side.to), side.stride = side.bytes;
#pragma unroll 1
  for (uint32_t rest = lanes; rest != 0; rest &= rest - 1) {
    const uint32_t its_row = __shfl_sync(~0u, row, __ffs(rest) - 1);
    if (banked || side.pitch == 0) {
      copy_side(side, banked ? bank_row : first, own, 0, its_row, 0);
      continue;
    }
    auto* words = reinterpret_cast<uint32_t*>(own + side.to);
#pragma unroll 1
    for (uint32_t e = lane; e < side.bytes / 4; e += 32) {
      words[static_cast<uint64_t>(e) * side.pitch + its_row] = words[static_cast<uint64_t>(e) * side.pitch + first];
    }
  }
}

// Brings some vectors of a run of the tokens of all banks to their rows; with the first, what is beside a token. `next`: the
// next row of each of this rank's experts, or null: rows are those that sources have found. A warp calls it.
__device__ __forceinline__ void spread_run(const SpreadParams& q, const Arrivals& s, const Run& run, const Run& vectors,
                                           uint32_t* next) {
  const SettleParams& p = q.settle;
  const Seat& seat = p.seat;
  const uint32_t lane = threadIdx.x % 32;
  uint8_t* const own = window_of(seat, seat.rank);
  uint32_t source = 0;
#pragma unroll 1
  for (uint32_t token = run.first; token < run.last; ++token) {
    while (token >= s.start[source + 1]) ++source;
    const bool banked = s.is_banked(source);
    const uint64_t bank_row = static_cast<uint64_t>(source) * seat.bound + token - s.start[source];
    const uint64_t at = bank_row * p.topk + lane;
    uint32_t id = lane < p.topk ? reinterpret_cast<const uint32_t*>(own + p.bank_ids)[at] : kNone;
    float weight = lane < p.topk ? reinterpret_cast<const float*>(own + p.bank_weights)[at] : 0.0f;
    uint32_t place = next == nullptr && lane < p.topk ? reinterpret_cast<const uint32_t*>(own + q.bank_places)[at] : kNone;
    const int2 pair = reinterpret_cast<const int2*>(own + p.bank_source)[bank_row];
    if (id >= q.owners.experts) id = kNone;
    const uint32_t leader = first_alike(id, 0);
    weight = sum_alike(weight, leader, p.topk);
    const bool goes = id != kNone && leader == lane && owner_of(q.owners, id) == seat.rank;
    if (goes && next != nullptr) place = next[place_of(q.owners, id, seat.rank)]++;
    // What a peer wrote is bounded before it is an index.
    const uint32_t row = goes && place < p.rows ? place : kNone;
    if (row != kNone && vectors.first == 0) {
      reinterpret_cast<uint32_t*>(own + p.to_ids)[row] = id;
      reinterpret_cast<float*>(own + p.to_weights)[row] = weight;
      reinterpret_cast<int2*>(own + p.to_source)[row] = pair;
    }
    // A token without a first row has none at all: the others lie behind it.
    const uint32_t first = __reduce_min_sync(~0u, row);
    if (first == kNone) continue;
    const uint32_t lanes = __ballot_sync(~0u, row != kNone && (banked || row != first));
    if (lanes == 0) continue;
    const uint8_t* from = banked ? own + p.bank_tokens + bank_row * 16 * p.vectors
                                 : own + p.to_tokens + first * 16ull * p.vectors;
    spread_token(p, vectors, from, row, lanes);
#pragma unroll 1
    for (uint32_t number = 0; number < p.sides && vectors.first == 0; ++number) {
      spread_side(p, p.side[number], banked, bank_row, first, row, lanes);
    }
    __syncwarp();
  }
}

// What says that rows are none: between blocks, and behind the last. All threads of all blocks call it.
__device__ __forceinline__ void pad_lists(const SpreadParams& q) {
  const SettleParams& p = q.settle;
  const uint32_t lane = threadIdx.x % 32, warp = (blockIdx.x * kSpreadThreads + threadIdx.x) / 32;
  const uint32_t warps = gridDim.x * kSpreadThreads / 32;
  uint8_t* const own = window_of(p.seat, p.seat.rank);
  const auto pad = [&](uint64_t row) {
    if (p.flags & kPadIds) reinterpret_cast<int32_t*>(own + p.to_ids)[row] = -1;
    if (p.flags & kPadWeights) reinterpret_cast<float*>(own + p.to_weights)[row] = 0.0f;
    if (p.flags & kPadSource) reinterpret_cast<int2*>(own + p.to_source)[row] = make_int2(-1, -1);
  };
#pragma unroll 1
  for (uint32_t block = warp; block + 1 < q.local; block += warps) {
#pragma unroll 1
    for (uint32_t row = q.starts[block] + q.block_counts[block] + lane; row < q.starts[block + 1]; row += 32) pad(row);
  }
  const uint64_t end = q.local == 0 ? 0 : q.starts[q.local - 1] + q.block_counts[q.local - 1];
#pragma unroll 1
  for (uint64_t row = end + 32ull * warp + lane; row < p.rows; row += 32ull * warps) pad(row);
}

// The small outputs. A block calls it.
__device__ __forceinline__ void hand_out_blocks(const SpreadParams& q) {
#pragma unroll 1
  for (uint32_t block = threadIdx.x; block < q.local; block += kSpreadThreads) {
    const int32_t rows = q.block_counts[block];
    if (q.expert_counts != nullptr) q.expert_counts[block] = rows;
    if (q.expert_stats != nullptr) q.expert_stats[block] += rows;
    if (q.expert_offsets != nullptr) q.expert_offsets[block] = q.starts[block];
  }
  if (threadIdx.x == 0 && q.expert_offsets != nullptr) q.expert_offsets[q.local] = q.summary[3];
}

extern "C" __global__ void __launch_bounds__(kSpreadThreads, 2) a2a_spread(const __grid_constant__ SpreadParams q) {
  // [warps][local], then of what is before the block: [local].
  extern __shared__ uint32_t words[];
  __shared__ Arrivals s;
  const SettleParams& p = q.settle;
  const OnSm on_sm(p.seat);
  if (p.seat.slot->whole == 0) return;
  constexpr uint32_t kWarps = kSpreadThreads / 32;
  const uint32_t warp = threadIdx.x / 32;
  read_arrivals(p.seat, nullptr, s);
  const uint32_t tokens = s.start[p.seat.ranks];
  pad_lists(q);
  if (blockIdx.x == 0) hand_out_blocks(q);
  const uint32_t number = blockIdx.x * kWarps + warp, all_warps = gridDim.x * kWarps;
  Run run, vectors{0, p.vectors};
  uint32_t* next = nullptr;
  if (!s.any) {
    // Where there are more warps than tokens, some share one.
    const uint32_t parts = min(max(all_warps / max(tokens, 1), 1), max(p.vectors / (32 * kSpreadVectors), 1));
    const uint32_t runs = all_warps / parts;
    if (number / parts >= runs) return;
    run = run_of(0, tokens, number / parts, runs), vectors = run_of(0, p.vectors, number % parts, parts);
  } else {
    uint32_t* const before = words + q.warps * q.local;
    clear(words, (q.warps + 1) * q.local);
    __syncthreads();
    const Run here = run_of(0, tokens, blockIdx.x, gridDim.x);
    run = run_of(here.first, here.last - here.first, warp, q.warps);
    next = words + warp * q.local;
    count_banks(q, s, 0, here.first, warp, kWarps, before);
    if (warp < q.warps) count_banks(q, s, run.first, run.last, 0, 1, next);
    __syncthreads();
#pragma unroll 1
    for (uint32_t block = threadIdx.x; block < q.local; block += kSpreadThreads) {
      uint32_t row = q.starts[block] + before[block];
#pragma unroll 1
      for (uint32_t i = 0; i < q.warps; ++i) {
        uint32_t& rows = words[i * q.local + block];
        const uint32_t its = rows;
        rows = row, row += its;
      }
    }
    __syncthreads();
    if (warp >= q.warps) return;
  }
  spread_run(q, s, run, vectors, next);
}

}  // namespace a2a
