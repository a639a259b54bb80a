// a2a_pairs_*: a dispatch whose rows are (token, expert) pairs, each stored straight into its expert's block at the expert's
// rank; or either half of it.
//
// Block 0 keeps: it tells this rank's counts, hears everybody's, raises the flags once all is stored, hears the peers' and
// hands out. The others move, and wait for it in nothing: a row's place is made of the ids of earlier tokens and of the
// counts of lower ranks, for which a block looks itself, while what it is to store is on its way. A first half on its own
// must not wait for counts. Those of ranks that are at the same step are there in a moment; where they are not, it stores
// a token once into its source's bank at each of its ranks, and the other half lays it out. Block 0 says which.
//
// Blocks wait, so they are few enough for those of all slots and of all ranks of a device to be on it at the same time. A
// row is some jobs, of a warp each; a block takes an even share of them, and so mostly parts of the first and the last row.
#include "copy.cuh"
#include "counts.cuh"
#include "finish.cuh"
#include "quant.cuh"

namespace a2a {

constexpr uint32_t kPairThreads = 256;
constexpr uint32_t kPairWarps = kPairThreads / 32;
// Tokens that a block has at hand; blocks of a multiprocessor.
#ifdef A2A_JITTER
constexpr uint32_t kLot = 2, kPairsPerSm = 2;
#else
constexpr uint32_t kLot = 16, kPairsPerSm = 3;
#endif
// How long a first half looks for counts.
constexpr uint64_t kCountsNs = 10000;

// Where a row goes: its token's bytes and its first scale; the window, the row among all there, and its block.
struct __align__(16) Place {
  uint8_t* token;
  uint32_t* scales;
  uint8_t* window;
  uint32_t row;
  uint32_t local;
};

// The tokens at hand: a choice's expert, and its row at the owner (or, as long as that is being made, its position there);
// the distinct places of a token.
struct Lot {
  uint32_t id[kLot][kMaxTopk];
  uint32_t row[kLot][kMaxTopk];
  Place to[kLot][kMaxTopk];
  uint32_t places[kLot];
};

// Rows that are to be moved, and where from: the caller's tensors, or a bank in this rank's own window.
struct Feed {
  Choices choices;
  const uint8_t* tokens;
  uint64_t stride;
  uint32_t source;
  // Of a bank: where its rows start among those of all banks.
  uint64_t start;
  bool landed;
};

// Rows go to the places that they had.
__device__ __forceinline__ bool is_replay(const Seat& seat) { return seat.replays == 1; }

// A block's share of jobs, of which each row has some.
struct Share {
  uint64_t first;
  uint64_t last;
};
__device__ __forceinline__ Share share_of(uint64_t jobs, uint32_t block, uint32_t blocks) {
  return Share{jobs * block / blocks, jobs * (block + 1) / blocks};
}

struct PairShared {
  // What a block is at: registers are for rows.
  Feed feed;
  Share share;
  // Of all jobs of rows in banks, those that are still to be done.
  Share banked;
  // Rows go into the banks of the ranks, not to the experts. Until that is decided: they may.
  bool to_banks;
  uint32_t experts[kExpertsAtOnce];
  // By rank: rows so far; what flags say; rows sent.
  uint32_t ranks[kMaxRanks];
  union {
    Lot lot;
    struct {
      Ending end;
      Totals totals;
      uint32_t kept[kMaxRanks];
    } keeper;
  };
};

// What a warp moves at a time of rows that travel as they are: two vectors a lane.
struct AsTheyAre {
  static constexpr uint32_t kVectors = 2;
  static constexpr bool kMakesScales = false;
  int4 raw[kVectors];
  __device__ __forceinline__ void load(const uint8_t* row, uint32_t first, uint32_t vectors, bool) {
#pragma unroll
    for (uint32_t u = 0; u < kVectors; ++u) {
      const uint32_t vector = first + 32 * u + threadIdx.x % 32;
      if (vector < vectors) raw[u] = ptx::ld_stream(row + 16ull * vector);
    }
  }
  __device__ __forceinline__ float make(const PairsParams&, bool, int4 (&value)[kVectors]) const {
#pragma unroll
    for (uint32_t u = 0; u < kVectors; ++u) value[u] = raw[u];
    return 0.0f;
  }
};

// Rows that are quantised on their way (those that come from a bank were): a vector of e4m3 a lane.
template <class From>
struct Quantised {
  static constexpr uint32_t kVectors = 1;
  static constexpr bool kMakesScales = true;
  int4 raw[From::kBytes];
  __device__ __forceinline__ void load(const uint8_t* row, uint32_t first, uint32_t vectors, bool landed) {
    const uint32_t vector = first + threadIdx.x % 32;
    const uint8_t* at = row + 16ull * vector * (landed ? 1 : From::kBytes);
#pragma unroll
    for (uint32_t i = 0; i < From::kBytes; ++i) {
      raw[i] = vector < vectors && (i == 0 || !landed) ? ptx::ld_stream(at + 16 * i) : make_int4(0, 0, 0, 0);
    }
  }
  // A warp calls it; the group's scale.
  __device__ __forceinline__ float make(const PairsParams& p, bool landed, int4 (&value)[kVectors]) const {
    float scale = 0.0f;
    value[0] = landed ? raw[0] : quantise<From>(raw, p.flags & kPairPowers, scale);
    return scale;
  }
};

// Moves rows, lot by lot. A block calls its functions as one.
template <class In>
struct Mover {
  const PairsParams& p;
  PairShared& s;
  const Feed& feed;
  // The step may be made; its epoch.
  const bool goes;
  const uint32_t epoch;

  __device__ __forceinline__ const Route& route() const { return p.route; }
  __device__ __forceinline__ bool replays() const { return is_replay(p.seat) && !feed.landed; }

  __device__ __forceinline__ Place place(uint8_t* window, uint32_t row, uint32_t local) const {
    const uint64_t words = p.scale_words;
    uint64_t first_scale = row * words;
    if (scale_step() != 1) first_scale = local * words * p.scale_pitch + row - local * p.block;
    const bool banks = s.to_banks;
    const uint64_t tokens = banks ? p.bank_tokens : p.to_tokens, scales = banks ? p.bank_scales : p.to_scales;
    return Place{window + tokens + row * 16ull * p.vectors, reinterpret_cast<uint32_t*>(window + scales) + first_scale,
                 window, row, local};
  }
  // From one scale of a row to the next.
  __device__ __forceinline__ uint32_t scale_step() const { return s.to_banks || p.scale_pitch == 0 ? 1 : p.scale_pitch; }

  // A warp's work on a row: pieces of it, and then what travels beside it.
  __device__ __forceinline__ uint32_t jobs() const {
    return (p.vectors + 32 * In::kVectors - 1) / (32 * In::kVectors) + 1;
  }

  __device__ __forceinline__ void load(In& in, uint32_t first, uint32_t item) const {
    const uint32_t token = item / jobs(), job = item - token * jobs();
    if (job == jobs() - 1) return;
    in.load(feed.tokens + (first + token) * feed.stride, job * 32 * In::kVectors, p.vectors, feed.landed);
  }

  // What each token of the lot chose, and (in a replay) where that went.
  __device__ __forceinline__ void read_lot(uint32_t first, uint32_t n) const {
    Lot& lot = s.lot;
    const uint32_t topk = feed.choices.topk;
#pragma unroll 1
    for (uint32_t i = threadIdx.x; i < n * topk; i += kPairThreads) {
      const uint32_t t = i / topk, k = i - t * topk;
      lot.id[t][k] = choice_of(feed.choices, route().owners, first + t, k);
      lot.row[t][k] = replays() ? route().pair_rows[static_cast<uint64_t>(first + t) * topk + k] : kNone;
    }
  }

  // The position of each choice among the source's rows of its expert, those of earlier rows first. `counted`: the rows
  // before the lot are counted already. A block's first lot counts what comes before it, and all count themselves.
  __device__ __forceinline__ void find_positions(uint32_t first, uint32_t n, bool counted) const {
    Lot& lot = s.lot;
    const Choices& choices = feed.choices;
    const uint32_t lane = threadIdx.x % 32;
#pragma unroll 1
    for (uint32_t base = 0; base < choices.experts; base += kExpertsAtOnce) {
      if (!counted || choices.experts > kExpertsAtOnce) {
        clear(s.experts, min(choices.experts - base, kExpertsAtOnce));
        __syncthreads();
        count_choices(choices, route().owners, p.topk_bits, base, 0, first, s.experts, nullptr);
        __syncthreads();
      }
      // In order, so by one warp.
#pragma unroll 1
      for (uint32_t t = 0; t < n && threadIdx.x < 32; ++t) {
        const uint32_t id = lane < choices.topk ? lot.id[t][lane] : kNone;
        const bool here = id != kNone && id - base < kExpertsAtOnce, leads = first_alike(id, 0) == lane;
        const uint32_t position = here ? s.experts[id - base] : 0;
        __syncwarp();
        if (here) lot.row[t][lane] = position;
        if (here && leads) s.experts[id - base] = position + 1;
        __syncwarp();
      }
      __syncthreads();
    }
  }

  // The same for rows in banks: where each token goes, by its ranks.
  __device__ __forceinline__ void find_banks(uint32_t first, uint32_t n, bool counted) const {
    Lot& lot = s.lot;
    const Choices& choices = feed.choices;
    const uint32_t lane = threadIdx.x % 32;
    if (!counted) {
      clear(s.ranks, p.seat.ranks);
      __syncthreads();
      count_choices(choices, route().owners, p.topk_bits, 0, 0, first, nullptr, s.ranks);
      __syncthreads();
    }
#pragma unroll 1
    for (uint32_t t = 0; t < n && threadIdx.x < 32; ++t) {
      const uint32_t id = lane < choices.topk ? lot.id[t][lane] : kNone;
      const uint32_t owner = id != kNone ? owner_of(route().owners, id) : kNone;
      const bool goes = first_alike(owner, 0) == lane && owner != kNone;
      const uint32_t row = goes ? s.ranks[owner] : 0;
      const uint32_t all = __ballot_sync(~0u, goes), number = __popc(all & ((1u << lane) - 1));
      __syncwarp();
      if (goes) {
        s.ranks[owner] = row + 1;
        lot.to[t][number] = place(window_of(p.seat, owner), p.seat.rank * p.seat.bound + row, 0);
      }
      if (lane == 0) lot.places[t] = __popc(all);
      __syncwarp();
    }
    __syncthreads();
  }

  // Adds where the source's rows of each expert start: behind those of lower ranks. False if the step is lost.
  __device__ __forceinline__ bool add_bases(uint32_t n) const {
    Lot& lot = s.lot;
    const uint32_t topk = feed.choices.topk, choices = n * topk;
    bool lost = false;
#pragma unroll 1
    for (uint32_t i = threadIdx.x; i < choices * feed.source; i += kPairThreads) {
      const uint32_t rank = i / choices, choice = i - rank * choices, t = choice / topk, k = choice - t * topk;
      const uint32_t id = lot.id[t][k];
      if (id == kNone) continue;
      const uint32_t rows = await_count(p.seat, p.counts, rank, id, epoch);
      if (rows == kNone) {
        lost = true;
        break;
      }
      atomicAdd(&lot.row[t][k], rows);
    }
    return !__syncthreads_or(lost);
  }

  // Waits for block 0's word on where rows go, which comes soon.
  __device__ __forceinline__ void await_decision() const {
    __syncthreads();
    if (threadIdx.x == 0) {
      uint64_t word;
      do {
        word = ptx::ld_relaxed_sys(&p.seat.slot->placed);
      } while (word >> 32 != epoch || static_cast<uint32_t>(word) == 0);
      s.to_banks = static_cast<uint32_t>(word) == kInBanks;
    }
    __syncthreads();
  }

  // From rows of blocks to rows of all, and the distinct ones of each token.
  __device__ __forceinline__ void list_places(uint32_t n) const {
    Lot& lot = s.lot;
    const uint32_t lane = threadIdx.x % 32;
#pragma unroll 1
    for (uint32_t t = threadIdx.x / 32; t < n; t += kPairWarps) {
      const uint32_t id = lane < feed.choices.topk ? lot.id[t][lane] : kNone;
      uint32_t row = id != kNone ? lot.row[t][lane] : kNone, owner = 0, local = 0;
      if (id != kNone) owner = owner_of(route().owners, id), local = place_of(route().owners, id, owner);
      if (!replays() && row != kNone) row = row < p.block ? local * p.block + row : kNone;
      if (lane < feed.choices.topk) lot.row[t][lane] = row;
      const bool goes = first_alike(id, 0) == lane && row != kNone;
      const uint32_t all = __ballot_sync(~0u, goes), number = __popc(all & ((1u << lane) - 1));
      if (goes) lot.to[t][number] = place(window_of(p.seat, owner), row, local);
      if (lane == 0) lot.places[t] = __popc(all);
    }
  }

  // What travels beside a row: weights, where the row is from, the other planes. A warp calls it.
  __device__ __forceinline__ void move_beside(uint32_t token, uint32_t t) const {
    const Lot& lot = s.lot;
    const Seat& seat = p.seat;
    const uint32_t lane = threadIdx.x % 32, topk = feed.choices.topk;
    uint8_t* own = window_of(seat, seat.rank);
    const uint64_t at = (feed.start + token) * topk + lane;
    int32_t id = -1;
    float weight = 1.0f;
    int2 pair = make_int2(seat.rank, token);
    if (feed.landed) {
      if (lane < topk) id = lot.id[t][lane];
      if (lane < topk) weight = reinterpret_cast<const float*>(own + p.bank_weights)[at];
      pair = reinterpret_cast<const int2*>(own + p.bank_source)[feed.start + token];
    } else {
      const bool bad = read_choice(route(), token, id, weight);
      keep_choice(seat, route(), token, id, weight, bad);
      if (!replays() && lane < topk) route().pair_rows[at] = lot.row[t][lane];
    }
    const bool banks = s.to_banks;
    if (banks) {
#pragma unroll 1
      for (uint32_t i = 0; i < lot.places[t]; ++i) {
        const Place& to = lot.to[t][i];
        const uint64_t choice = static_cast<uint64_t>(to.row) * topk + lane;
        if (lane < topk) reinterpret_cast<int32_t*>(to.window + p.bank_ids)[choice] = id;
        if (lane < topk) reinterpret_cast<float*>(to.window + p.bank_weights)[choice] = weight;
        if (lane == 0) reinterpret_cast<int2*>(to.window + p.bank_source)[to.row] = pair;
      }
    } else {
      const uint32_t leader = first_alike(id, 0);
      weight = sum_alike(weight, leader, topk);
      const uint32_t row = id >= 0 && leader == lane ? lot.row[t][lane] : kNone;
      if (row != kNone) {
        uint8_t* window = feed.landed ? own : window_of(seat, owner_of(route().owners, id));
        reinterpret_cast<float*>(window + p.to_weights)[row] = weight;
        reinterpret_cast<int2*>(window + p.to_source)[row] = pair;
      }
    }
#pragma unroll 1
    for (uint32_t number = 0; number < p.sides; ++number) {
      Side side = p.side[number];
      // Scales that are made on the way stand in a bank, and nowhere before.
      if (feed.landed) {
        side.from = own + side.bank + feed.start * side.bytes, side.stride = side.bytes;
      } else if (side.from == nullptr) {
        continue;
      }
      if (banks) side.to = side.bank, side.pitch = 0;
#pragma unroll 1
      for (uint32_t i = 0; i < lot.places[t]; ++i) {
        const Place& to = lot.to[t][i];
        const uint32_t block = banks ? 0 : to.local, start = block * p.block;
        copy_side(side, token, to.window, block, to.row - start, p.block);
      }
    }
  }

  // Stores a piece to all of its token's places; what is to be stored next is on its way meanwhile.
  template <class Next>
  __device__ __forceinline__ void store(In& in, uint32_t t, uint32_t job, const Next& load_next) const {
    const Lot& lot = s.lot;
    const uint32_t lane = threadIdx.x % 32, first = job * 32 * In::kVectors;
    int4 value[In::kVectors];
    const float scale = in.make(p, feed.landed, value);
    load_next();
    uint32_t element = 0, word = 0;
    bool has_scale = false;
    if (In::kMakesScales && !feed.landed) {
      has_scale = take_scale(scale, first + lane < p.vectors, p.flags & kPairPowers, job, p.scale_words, element, word);
    }
    const uint32_t at = 16 * (first + lane), scale_at = element * scale_step(), places = lot.places[t];
#pragma unroll 4
    for (uint32_t i = 0; i < places; ++i) {
      uint8_t* token = lot.to[t][i].token + at;
#pragma unroll
      for (uint32_t u = 0; u < In::kVectors; ++u) {
        if (first + 32 * u + lane < p.vectors) ptx::st_row(token + 512 * u, value[u]);
      }
      if (In::kMakesScales && has_scale) lot.to[t][i].scales[scale_at] = word;
    }
  }

  // False if the step is lost, or not to be.
  __device__ __forceinline__ bool run(const Share& share) const {
    const uint32_t warp = threadIdx.x / 32, first_row = share.first / jobs(), rows = (share.last + jobs() - 1) / jobs();
#pragma unroll 1
    for (uint32_t row = first_row; share.first < share.last && row < rows; row += kLot) {
      const uint32_t n = min(rows - row, kLot);
      const uint64_t start = static_cast<uint64_t>(row) * jobs();
      const uint32_t begin = share.first > start ? share.first - start : 0;
      const uint32_t end = min(share.last - start, static_cast<uint64_t>(n) * jobs());
      In in;
      if (begin + warp < end) load(in, row, begin + warp);
      read_lot(row, n);
      __syncthreads();
      if (!replays()) find_positions(row, n, row != first_row);
      // Not before: the slot and the ids are on their way at the same time.
      if (!goes) return false;
      if (s.to_banks && row == first_row) await_decision();
      if (s.to_banks) {
        find_banks(row, n, row != first_row);
      } else {
        if (!replays() && !add_bases(n)) return false;
        list_places(n);
        __syncthreads();
      }
#pragma unroll 1
      for (uint32_t item = begin + warp; item < end; item += kPairWarps) {
        const uint32_t t = item / jobs(), job = item - t * jobs();
        const auto load_next = [&] {
          if (item + kPairWarps < end) load(in, row, item + kPairWarps);
        };
        if (job == jobs() - 1) {
          move_beside(row + t, t);
          load_next();
        } else {
          store(in, t, job, load_next);
        }
      }
      __syncthreads();
    }
    return true;
  }
};

// ------------------------------------------------------------------------------------------------- the block that keeps

// Adds a lane's number for a rank: at once for the warp, if it is the same rank for all, as it mostly is. A warp calls it.
__device__ __forceinline__ void add_for(uint32_t* ranks, uint32_t rank, uint32_t number) {
  if (__all_sync(~0u, rank == __shfl_sync(~0u, rank, 0))) {
    const uint32_t sum = __reduce_add_sync(~0u, number);
    if (threadIdx.x % 32 == 0 && sum != 0) atomicAdd(&ranks[rank], sum);
  } else if (number != 0) {
    atomicAdd(&ranks[rank], number);
  }
}
__device__ __forceinline__ void add_to(uint32_t* sum, uint32_t number) {
  number = __reduce_add_sync(~0u, number);
  if (threadIdx.x % 32 == 0 && number != 0) atomicAdd(sum, number);
}

// What everybody's counts come to, handed out as far as it is this rank's. The block calls it.
__device__ __forceinline__ void add_up(const PairsParams& p, PairShared& s, uint32_t epoch) {
  const Seat& seat = p.seat;
  const Receive& receive = p.receive;
  Totals& totals = s.keeper.totals;
  const uint32_t tid = threadIdx.x;
  clear(s.keeper.kept, seat.ranks);
  clear(s.ranks, seat.ranks);
  clear(totals.over, kMaxRanks / 32);
  if (tid == 0) totals.demand = totals.rows = totals.dropped = totals.missing = totals.exceeded = totals.over_demand = 0;
  __syncthreads();
  const uint32_t room = p.block;
  // A lane takes an expert; a warp goes through as many as any of its lanes.
#pragma unroll 1
  for (uint32_t base = tid / 32 * 32; base < p.route.owners.experts; base += kPairThreads) {
    const bool is_one = base + tid % 32 < p.route.owners.experts;
    const uint32_t expert = is_one ? base + tid % 32 : base;
    const uint32_t owner = owner_of(p.route.owners, expert);
    const bool is_own = is_one && owner == seat.rank, any_own = __any_sync(~0u, is_own);
    const Shares shares = add_sources(seat, p.counts, expert, epoch, room, [&](uint32_t source, uint32_t kept) {
      if (any_own) add_to(&s.keeper.kept[source], is_own ? kept : 0);
    });
    const uint32_t all = shares.all, kept_of_mine = shares.kept_of_mine(room);
    add_for(s.ranks, owner, is_one ? kept_of_mine : 0);
    add_to(&totals.missing, is_one ? shares.mine - kept_of_mine : 0);
    if (p.limit != 0 && all > p.limit) atomicOr(&totals.over[owner / 32], 1u << owner % 32), totals.exceeded = 1;
    if (!any_own) continue;
    const uint32_t kept = min(all, room), most = __reduce_max_sync(~0u, is_own ? all : 0);
    if (tid % 32 == 0) atomicMax(&totals.demand, most);
    add_to(&totals.rows, is_own ? kept : 0);
    add_to(&totals.dropped, is_own ? all - kept : 0);
    if (is_own) p.block_counts[place_of(p.route.owners, expert, owner)] = kept;
  }
  __syncthreads();
  if (totals.exceeded) {
    // Of the first such rank, what its fullest expert would get.
    const uint32_t rank = first_over(totals);
#pragma unroll 1
    for (uint32_t expert = tid; expert < p.route.owners.experts; expert += kPairThreads) {
      if (owner_of(p.route.owners, expert) != rank) continue;
      uint32_t all = 0;
#pragma unroll 1
      for (uint32_t source = 0; source < seat.ranks; ++source) all += count_of(seat, p.counts, source, expert);
      atomicMax(&totals.over_demand, all);
    }
  }
#pragma unroll 1
  for (uint32_t rank = tid; rank < seat.ranks; rank += kPairThreads) {
    p.route.rows_for[rank] = s.ranks[rank];
    receive.kept_counts[rank] = s.keeper.kept[rank];
  }
  if (tid == 0) {
    p.summary[0] = totals.demand, p.summary[1] = totals.dropped, p.summary[2] = totals.missing;
    if (totals.exceeded) p.summary[1] = ~first_over(totals), p.summary[2] = totals.over_demand;
  }
  __syncthreads();
}

// If the counts of the ranks below `end` are here, or come before `is_late` says (of one thread) that it is. The block calls
// it.
template <class IsLate>
__device__ __forceinline__ bool look_for_counts(const PairsParams& p, uint32_t epoch, uint32_t end, const IsLate& is_late) {
  constexpr uint32_t kSources = 8;
  for (;;) {
    bool here = true;
#pragma unroll 1
    for (uint32_t expert = threadIdx.x; expert < p.route.owners.experts; expert += kPairThreads) {
#pragma unroll 1
      for (uint32_t first = 0; first < end && here; first += kSources) {
        uint32_t rows[kSources];
        here = look_at_counts(p.seat, p.counts, first, end, expert, epoch, rows);
      }
    }
    if (__syncthreads_and(here)) return true;
    if (__syncthreads_or(threadIdx.x == 0 && is_late())) return false;
  }
}

// Of this rank's rows those that are kept, by rank, into s.ranks: what is known from the counts of lower ranks. The block
// calls it.
__device__ __forceinline__ void count_kept(const PairsParams& p, PairShared& s) {
  const uint64_t room = p.block;
  clear(s.ranks, p.seat.ranks);
  __syncthreads();
#pragma unroll 1
  for (uint32_t expert = threadIdx.x; expert < p.route.owners.experts; expert += kPairThreads) {
    uint64_t before = 0;
#pragma unroll 1
    for (uint32_t rank = 0; rank < p.seat.rank; ++rank) before += count_of(p.seat, p.counts, rank, expert);
    const uint64_t all = before + count_of(p.seat, p.counts, p.seat.rank, expert);
    const uint32_t kept = static_cast<uint32_t>(min(all, room) - min(before, room));
    if (kept != 0) atomicAdd(&s.ranks[owner_of(p.route.owners, expert)], kept);
  }
  __syncthreads();
}

// The same of a dispatch that is replayed, or whose first half added up.
__device__ __forceinline__ void recall(const PairsParams& p, PairShared& s) {
#pragma unroll 1
  for (uint32_t rank = threadIdx.x; rank < p.seat.ranks; rank += kPairThreads) s.ranks[rank] = p.route.rows_for[rank];
  read_totals(p.seat, p.summary, p.receive.kept_counts, s.keeper.totals);
}

// The small outputs that a step's counts are, once it is known to be one. By all warps but the last, which raises flags.
__device__ __forceinline__ void hand_out_counts(const PairsParams& p) {
  constexpr uint32_t kThreads = kPairThreads - 32;
  const Receive& receive = p.receive;
  if (threadIdx.x >= kThreads) return;
#pragma unroll 1
  for (uint32_t rank = threadIdx.x; rank < p.seat.ranks && receive.rank_counts != nullptr; rank += kThreads) {
    receive.rank_counts[rank] = receive.kept_counts[rank];
  }
#pragma unroll 1
  for (uint32_t place = threadIdx.x; place < receive.local; place += kThreads) {
    const int32_t rows = p.block_counts[place];
    if (receive.expert_counts != nullptr) receive.expert_counts[place] = rows;
    if (p.expert_stats != nullptr) p.expert_stats[place] += rows;
  }
#pragma unroll 1
  for (uint32_t place = threadIdx.x; place <= receive.local && p.expert_offsets != nullptr; place += kThreads) {
    p.expert_offsets[place] = place * p.block;
  }
}

// Decides where the rows of a half on its own go. The counts of lower ranks, behind whose rows this rank's come, are here if
// those are at the same step, or come in a moment. The block calls it.
__device__ __forceinline__ void decide(const PairsParams& p, PairShared& s, Finish& finish) {
  const Seat& seat = p.seat;
  uint64_t& placed = seat.slot->placed;
  const uint64_t started = ptx::globaltimer();
#ifdef A2A_JITTER
  const uint64_t patience = started / 32 % 3 == 0 ? 0 : 50 * kCountsNs;
#else
  const uint64_t patience = kCountsNs;
#endif
  const auto is_late = [&] { return ptx::globaltimer() - started >= patience; };
  const auto is_stored = [&] { return ptx::ld_relaxed_sys(&seat.slot->arrived) == gridDim.x - 1; };
  const bool in_place = !(p.flags & kPosted) && look_for_counts(p, finish.epoch, seat.rank, is_late);
  if (threadIdx.x == 0) ptx::st_relaxed_sys(&placed, pack(finish.epoch, in_place ? kInPlace : kInBanks));
  if (!in_place) {
    finish.mark = 1u << 31, finish.row_bytes = p.bank_bytes;
    clear(s.ranks, seat.ranks);
    __syncthreads();
    count_choices(own_choices(p.route), p.route.owners, p.topk_bits, 0, 0, p.route.tokens, nullptr, s.ranks);
    __syncthreads();
  } else if (look_for_counts(p, finish.epoch, seat.ranks, is_stored)) {
    // While rows are on their way, and so that the other half need not.
    add_up(p, s, finish.epoch);
    // What of too many rows is to be said, the other half finds again.
    if (threadIdx.x == 0 && !s.keeper.totals.exceeded) {
      ptx::st_relaxed_sys(&placed, pack(finish.epoch, kInPlace | kAddedUp));
      ptx::add_relaxed_gpu(&seat.shared->counters[kHops], 1);
    }
    return;
  } else {
    count_kept(p, s);
  }
#pragma unroll 1
  for (uint32_t rank = threadIdx.x; rank < seat.ranks; rank += kPairThreads) p.route.rows_for[rank] = s.ranks[rank];
}

__device__ __forceinline__ void keep(const PairsParams& p, PairShared& s) {
  const Seat& seat = p.seat;
  Slot& slot = *seat.slot;
  const Standing at = standing_of(slot, p.flags & kAfterOpen);
  const ulonglong2 first = look_early(seat);
  const uint64_t placed = slot.placed;
  const bool raises = p.flags & kRaises, waits = p.flags & kWaits;
  const uint64_t started = at.state == kOpened ? at.started : ptx::globaltimer();
  Ending& end = s.keeper.end;
  const Totals* totals = &s.keeper.totals;
  Finish finish(seat, p.receive, p.flags, s.ranks, at, end, totals);
  // A second half may start when the movers have stored.
  if (!waits) ptx::launch_dependents();
  if (raises && !is_replay(seat)) {
    // What couriers bring of counts has the absent's too (a2a_fetch).
    const bool absent = at.absent && !(p.flags & kPosted);
    tell_counts(seat, at, p.route, p.counts, own_choices(p.route), p.topk_bits, s.experts, absent);
  }
  bool lost = false;
  if (raises ? at.opens() : at.receives(seat.routing)) {
    if (raises && threadIdx.x >= kPairThreads - 32) tell_shape(seat, p.receive, finish.epoch, at.absent);
    if (is_replay(seat) || (!raises && placed == pack(finish.epoch, kInPlace | kAddedUp))) {
      recall(p, s);
    } else if (waits) {
      const Wait wait{kDispatch, finish.epoch, finish.sequence, true, kCountsFlag};
      // A dispatch flag comes after its rank's counts.
      const bool here = !raises && finish.all_came(first);
      if (here && threadIdx.x == 0) ptx::add_relaxed_gpu(&seat.shared->counters[kHops], 1);
      lost = !here && !await(seat, wait, end.meeting, started);
      if (!lost) add_up(p, s, finish.epoch);
    } else {
      decide(p, s, finish);
    }
    if (lost) {
      if (finish.first_raiser()) finish.advance(kDispatchSent);
      return void_status(seat, p.receive.status);
    }
    if (waits && !totals->exceeded) hand_out_counts(p);
  }
  // The blocks that move come to an end by themselves, now that all counts are there.
  const auto ready = [&] {
    const bool goes = raises ? at.opens() : at.receives(seat.routing);
    if (goes && finish.first_raiser()) {
      while (ptx::ld_acquire_sys(&slot.arrived) != gridDim.x - 1) {
      }
      slot.arrived = 0;
    }
    __syncwarp();
  };
  finish.run(ready, first);
}

// --------------------------------------------------------------------------------------------------- blocks that move

// What sources say of their rows, once they have all spoken, into s.ranks: how many, and (the top bit) if they are in banks.
// False if the step is lost.
__device__ __forceinline__ bool await_sources(const Seat& seat, uint32_t epoch, bool raises, uint32_t* ranks) {
  bool lost = false;
#pragma unroll 1
  for (uint32_t source = threadIdx.x; source < seat.ranks && !lost; source += kPairThreads) {
    // A rank that waits has none of its own in a bank.
    if (raises && source == seat.rank) {
      ranks[source] = 0;
      continue;
    }
#pragma unroll 1
    for (uint32_t polls = 1;; ++polls) {
      const ulonglong2 pair = look(seat, source);
      if (reached(pair.x, epoch)) {
        ranks[source] = static_cast<uint32_t>(pair.x);
        break;
      }
      if (polls % kPollsPerLook == 0 && has_closed(seat)) {
        lost = true;
        break;
      }
    }
  }
  return !__syncthreads_or(lost);
}

// Of rows behind an expert's, what says that they are none.
__device__ __forceinline__ void pad_blocks(const PairsParams& p, uint32_t mover, uint32_t movers, uint32_t epoch) {
  if (!(p.flags & (kPadsWeights | kPadsSource))) return;
  const Seat& seat = p.seat;
  const uint32_t lane = threadIdx.x % 32;
  uint8_t* window = window_of(seat, seat.rank);
  auto* weights = reinterpret_cast<float*>(window + p.to_weights);
  auto* source = reinterpret_cast<int2*>(window + p.to_source);
  // Warps take turns at experts; where they are more than experts, some share one.
  const uint32_t warp = mover * kPairWarps + threadIdx.x / 32, warps = movers * kPairWarps, local = p.receive.local;
  const uint32_t parts = max(warps / max(local, 1u), 1u);
#pragma unroll 1
  for (uint32_t i = warp; i < parts * local; i += warps) {
    const uint32_t part = i / local, place = i - part * local;
    uint32_t rows = 0;
    if (is_replay(seat)) {
      rows = p.block_counts[place];
    } else {
#pragma unroll 1
      for (uint32_t rank = lane; rank < seat.ranks; rank += 32) {
        rows += min(await_count(seat, p.counts, rank, p.own[place], epoch), p.block);
      }
      rows = __reduce_add_sync(~0u, rows);
    }
#pragma unroll 1
    for (uint32_t row = rows + part * 32 + lane; row < p.block; row += parts * 32) {
      const uint64_t at = static_cast<uint64_t>(place) * p.block + row;
      if (p.flags & kPadsWeights) weights[at] = 0.0f;
      if (p.flags & kPadsSource) source[at] = make_int2(-1, -1);
    }
  }
}

// A half that did not wait for counts kept positions; now they become rows.
__device__ __forceinline__ void find_rows(const PairsParams& p, uint32_t mover, uint32_t movers) {
  const Route& route = p.route;
  const uint64_t choices = static_cast<uint64_t>(route.tokens) * route.topk;
#pragma unroll 1
  for (uint64_t i = mover * kPairThreads + threadIdx.x; i < choices; i += movers * kPairThreads) {
    const int32_t id = route.ids[i];
    if (id < 0) continue;
    uint64_t row = static_cast<uint32_t>(route.pair_rows[i]);
#pragma unroll 1
    for (uint32_t rank = 0; rank < p.seat.rank; ++rank) row += count_of(p.seat, p.counts, rank, id);
    const uint32_t owner = owner_of(route.owners, id);
    route.pair_rows[i] = row < p.block ? static_cast<int32_t>(place_of(route.owners, id, owner) * p.block + row) : -1;
  }
}

// What a source has in its bank, by what it said.
__device__ __forceinline__ uint32_t banked_by(const Seat& seat, uint32_t said) {
  return said >> 31 ? min(said & 0x7fffffffu, seat.bound) : 0;
}
__device__ __forceinline__ uint32_t banked_rows(const Seat& seat, const uint32_t* ranks) {
  uint32_t rows = 0;
#pragma unroll 1
  for (uint32_t source = 0; source < seat.ranks; ++source) rows += banked_by(seat, ranks[source]);
  return rows;
}

// Of the block's share of all banks, counted source by source, what is in one: the next share. `jobs`: of a row. One thread.
__device__ __forceinline__ void next_bank(const PairsParams& p, PairShared& s, uint32_t jobs) {
  const Seat& seat = p.seat;
  uint32_t source = 0;
  uint64_t before = 0, here = 0;
  while (s.banked.first >= before + (here = static_cast<uint64_t>(banked_by(seat, s.ranks[source])) * jobs)) {
    before += here, ++source;
  }
  const uint64_t last = min(s.banked.last, before + here);
  s.share = Share{s.banked.first - before, last - before};
  s.banked.first = last;
  const uint64_t start = static_cast<uint64_t>(source) * seat.bound;
  const uint8_t* own = window_of(seat, seat.rank);
  const uint32_t topk = p.route.topk;
  const Choices choices{own + p.bank_ids + start * topk * 4, 4ull * topk, topk, p.route.owners.experts, 1, seat.rank, nullptr};
  s.feed = Feed{choices, own + p.bank_tokens + start * p.vectors * 16, p.vectors * 16ull, source, start, true};
}

template <class In>
__device__ __forceinline__ void move(const PairsParams& p, PairShared& s) {
  const Seat& seat = p.seat;
  const Route& route = p.route;
  const uint32_t number = blockIdx.x - 1, movers = gridDim.x - 1;
  const Standing at = standing_of(*seat.slot, p.flags & kAfterOpen);
  const bool raises = p.flags & kRaises;
  const bool goes = raises ? at.opens() : at.receives(seat.routing);
  const uint32_t epoch = at.epoch + (raises ? 1 : 0);
  const Mover<In> mover{p, s, s.feed, goes, epoch};
  const uint64_t jobs = mover.jobs();
  if (threadIdx.x == 0) {
    s.share = share_of(raises ? route.tokens * jobs : 0, number, movers);
    s.to_banks = p.flags & kBanks;
    s.feed = Feed{own_choices(p.route), p.tokens, p.token_stride, seat.rank, 0, false};
  }
  // First this rank's rows, then this block's of those that came into banks.
  for (bool landing = false;;) {
    __syncthreads();
    if (!mover.run(s.share) || !goes) return;
    if (!landing) {
      __syncthreads();
      if (!(p.flags & kWaits)) ptx::launch_dependents();
      if (threadIdx.x == 0) {
        // What has stored nothing says only that it has seen the slot.
        if (raises) {
          ptx::add_release_sys(&seat.slot->arrived, 1);
        } else {
          ptx::add_relaxed_gpu(&seat.slot->arrived, 1);
        }
      }
      if (!(p.flags & kWaits)) return;
      // While rows are on their way.
      pad_blocks(p, number, movers, epoch);
      if (is_replay(seat)) return;
      if (!await_sources(seat, epoch, raises, s.ranks)) return;
      if (threadIdx.x == 0) s.banked = share_of(banked_rows(seat, s.ranks) * jobs, number, movers);
      landing = true;
    }
    __syncthreads();
    const bool more = s.banked.first < s.banked.last;
    // All have looked before it changes.
    __syncthreads();
    if (!more) break;
    if (threadIdx.x == 0) next_bank(p, s, jobs);
  }
  if (s.ranks[seat.rank] >> 31) find_rows(p, number, movers);
}

template <class In>
__device__ __forceinline__ void pairs(const PairsParams& p) {
  __shared__ PairShared s;
  const OnSm on_sm(p.seat);
  // A second half starts while what is before it ends.
  if (!(p.flags & kRaises)) ptx::wait_prerequisites();
  if (blockIdx.x == 0) {
    keep(p, s);
  } else {
    move<In>(p, s);
  }
}

#define A2A_PAIRS(name, In, per_sm)                                                         \
  extern "C" __global__ void __launch_bounds__(kPairThreads, per_sm)                        \
      a2a_pairs##name(const __grid_constant__ PairsParams p) {                              \
    pairs<In>(p);                                                                           \
  }
A2A_PAIRS(, AsTheyAre, kPairsPerSm)
A2A_PAIRS(_bf16, Quantised<TokenBf16>, kPairsPerSm)
A2A_PAIRS(_f16, Quantised<TokenF16>, kPairsPerSm)
A2A_PAIRS(_f32, Quantised<TokenF32>, 2)
#undef A2A_PAIRS

}  // namespace a2a
