// a2a_push: each token's rows into the windows of its ranks (or into the own window, to be read from there), and the padding
// behind them; a2a_finish: the flags, out and in.
//
// A warp's job is a piece of one token's row, or what travels beside the row: it reads 16 bytes a lane and stores them to
// every destination, and meets no other warp. What moves waits for nobody: the end of the kernel, for which a2a_finish
// waits, says that all is stored. The blocks of the first tokens count for themselves where rows go, so that a2a_route is not
// needed, or not waited for at once; where tokens are very few one block does it all (a2a_dispatch). The padding of a
// source's rows is written by the source, which knows how many there are before anybody else.
//
// What one block does once is not unrolled: that would be more code and no speed.
#include "copy.cuh"
#include "route.cuh"
#include "wait.cuh"

namespace a2a {

constexpr uint32_t kMoveThreads = 256;
constexpr uint32_t kMoveWarps = kMoveThreads / 32;
constexpr uint32_t kLaneVectors = 4;
constexpr uint32_t kFinishThreads = 128;
constexpr uint32_t kOneThreads = 672;
constexpr uint32_t kOneVectors = 2;

// All but the flag, which says that the rows are there: a peer looks at the rest once the flag has come. A warp calls it.
__device__ __forceinline__ void tell_shape(const Seat& seat, const Receive& receive, uint32_t epoch) {
  const uint32_t operation = seat.replays ? kReplay : kDispatch;
#pragma unroll 1
  for (uint32_t peer = threadIdx.x % 32; peer < seat.ranks; peer += 32) {
    uint8_t* box = mailbox(seat, peer, seat.rank);
    auto* shape = reinterpret_cast<uint4*>(box + kDispatchShape);
#pragma unroll
    for (uint32_t i = 0; i < kShapeWords / 4; ++i) {
      const uint32_t* words = receive.shape + 4 * i;
      shape[i] = make_uint4(words[0], words[1], words[2], words[3]);
    }
    *reinterpret_cast<uint2*>(box + kTokens) = make_uint2(receive.tokens, seat.replays);
    ptx::st_relaxed_sys(mail64(box, kDispatchPair) + 1, pack(epoch, receive.digest));
    ptx::st_relaxed_sys(mail64(box, kProgress), progress(epoch, operation, seat.bound));
  }
}

// The tokens that a rank has, as the host was told.
__device__ __forceinline__ uint32_t told_tokens(const Receive& receive, uint32_t source) {
  if (!(receive.flags & kTold)) return receive.tokens;
  return receive.told_more != nullptr ? receive.told_more[source] : receive.told[source % kToldRanks];
}

// Finds what a source's words differ in; the digests did.
__device__ __forceinline__ Loss difference(const Seat& seat, const Receive& receive, uint32_t source) {
  const uint8_t* box = mailbox(seat, seat.rank, source);
  const auto* words = reinterpret_cast<const uint32_t*>(box + kDispatchShape);
  const uint32_t replays = *reinterpret_cast<const uint32_t*>(box + kReplays);
  if (replays != seat.replays) return Loss{kMismatch, kCauseReplay, source, 0, seat.rank, seat.replays, replays, 0};
  for (uint32_t i = 0; i < kShapeWords; ++i) {
    if (words[i] != receive.shape[i]) {
      return Loss{kMismatch, kCauseDispatchShape, source, i, seat.rank, receive.shape[i], words[i], 0};
    }
  }
  return Loss{kMismatch, kCauseNone, source, 0, seat.rank, 0, 0, 0};
}

// The flag of a source, and the digest beside it.
__device__ __forceinline__ ulonglong2 look(const Seat& seat, uint32_t source) {
  return ptx::ld_acquire_sys(reinterpret_cast<const ulonglong2*>(mailbox(seat, seat.rank, source) + kDispatchPair));
}
// The first look is on its way while other things are done.
__device__ __forceinline__ ulonglong2 look_early(const Seat& seat) {
  const Roles role = roles_of(seat.ranks);
  return role.looks && role.looker < seat.ranks ? look(seat, role.looker) : make_ulonglong2(0, 0);
}

// What this rank sends, for the statistics. One thread.
__device__ __forceinline__ void count_sent(const Seat& seat, const Receive& receive, const uint32_t* sent) {
  uint64_t* counters = seat.shared->counters;
  ptx::add_relaxed_gpu(counters + kDispatches, 1);
  if (sent == nullptr) {
    ptx::add_relaxed_gpu(counters + kRowsCopied, receive.tokens);
    ptx::add_relaxed_gpu(counters + kBytesCopied, receive.tokens * receive.wire_bytes);
    return;
  }
  uint64_t rows = 0;
#pragma unroll 1
  for (uint32_t peer = 0; peer < seat.ranks; ++peer) rows += sent[peer];
  ptx::add_relaxed_gpu(counters + kRowsPushed, rows);
  ptx::add_relaxed_gpu(counters + kBytesPushed, rows * receive.wire_bytes);
  ptx::add_relaxed_gpu(counters + kBytesRemote, (rows - sent[seat.rank]) * receive.wire_bytes);
}

// What the block of a dispatch's end shares.
struct Ending {
  Meeting meeting;
  // The first source whose words differ from this rank's, twice, + 1 if it is its tokens; ~0: none.
  uint32_t differs;
  // Rows of the peers.
  uint32_t demand;
};

// The end of a dispatch, by one block: raises this rank's flags when what was before it is done, and waits for every rank's
// rows, checks that shapes agree and hands out the counts. The last warp raises; others look meanwhile, and do all that can
// be done before the flags are up.
struct Finish {
  const Seat& seat;
  const Receive& receive;
  // Rows for each rank; null: `receive.tokens` for each.
  const uint32_t* sent;
  Ending& end;
  const Standing& at;
  const bool raises;
  const bool waits;
  const uint32_t epoch;
  const uint64_t sequence;
  const Wait wait;
  const Roles role;

  __device__ __forceinline__ Finish(const Seat& seat, const Receive& receive, uint32_t flags, const uint32_t* sent,
                                    const Standing& at, Ending& end)
      : seat(seat),
        receive(receive),
        sent(sent),
        end(end),
        at(at),
        raises(flags & kRaises),
        waits(flags & kWaits),
        epoch(at.epoch + (raises ? 1 : 0)),
        sequence(at.sequence + (raises ? 1 : 0)),
        wait{seat.replays ? kReplay : kDispatch, epoch, sequence, true},
        role(roles_of(seat.ranks)) {}

  __device__ __forceinline__ bool first_raiser() const { return threadIdx.x == blockDim.x - 32; }
  __device__ __forceinline__ uint32_t rows_for(uint32_t peer) const {
    return sent != nullptr ? sent[peer] : receive.tokens;
  }
  __device__ __forceinline__ bool has_come(const ulonglong2& pair) const {
    return reached(pair.x, epoch) && reached(pair.y, epoch);
  }
  // Moves the slot on. One thread.
  __device__ __forceinline__ void advance(uint32_t state) const {
    Slot& slot = *seat.slot;
    slot.state = state;
    if (!raises) return;
    slot.epoch = epoch, slot.sequence = sequence, slot.routing = seat.routing, slot.whole = 0;
  }
  __device__ __forceinline__ void hand_out(uint32_t source, uint32_t rows) const {
    receive.kept_counts[source] = rows;
    if (receive.rank_counts != nullptr) receive.rank_counts[source] = rows;
    if (receive.status != nullptr) receive.status[4 + source] = 0;
  }

  __device__ __forceinline__ void raise() const {
#pragma unroll 1
    for (uint32_t peer = threadIdx.x % 32; peer < seat.ranks; peer += 32) {
      ptx::st_release_sys(mail64(mailbox(seat, peer, seat.rank), kDispatchPair), pack(epoch, rows_for(peer)));
    }
    if (waits && first_raiser()) hand_out(seat.rank, rows_for(seat.rank));
  }

  // Those that look: true once all peers' flags have come; what these say is then handed out. `first`: what the first look
  // saw, if it `is_new`.
  __device__ __forceinline__ bool look_for_flags(ulonglong2 first, bool is_new) const {
    if (role.looker == 0) end.differs = ~0u, end.demand = 0;
    ulonglong2 mine = make_ulonglong2(0, 0);
    bool here = false;
    for (uint32_t looks = 0; looks < kPollsPerLook && !here; ++looks) {
      here = true;
#pragma unroll 1
      for (uint32_t source = role.looker; source < seat.ranks; source += role.lookers) {
        if (source == seat.rank) continue;
        const bool seen = looks == 0 && is_new && source == role.looker;
        const ulonglong2 pair = seen ? first : look(seat, source);
        if (source == role.looker) mine = pair;
        here &= has_come(pair);
      }
      here = ptx::all_of(role.lookers, here);
    }
    if (!here) return false;
    uint32_t rows = 0, differs = ~0u;
#pragma unroll 1
    for (uint32_t source = role.looker; source < seat.ranks; source += role.lookers) {
      if (source == seat.rank && raises) continue;
      const ulonglong2 pair = source == role.looker && source != seat.rank ? mine : look(seat, source);
      if (static_cast<uint32_t>(pair.y) != receive.digest) differs = min(differs, 2 * source);
      if (receive.flags & (kTold | kUniform)) {
        const uint32_t tokens = *mail32(mailbox(seat, seat.rank, source), kTokens);
        if (tokens != told_tokens(receive, source)) differs = min(differs, 2 * source + 1);
      }
      // What a peer wrote is bounded before it is an index.
      const uint32_t count = min(static_cast<uint32_t>(pair.x) & 0x7fffffffu, seat.bound);
      hand_out(source, count);
      rows += count;
    }
    if (differs != ~0u) atomicMin(&end.differs, differs);
    // Counts are few: they are added through shared memory.
    if (rows != 0) atomicAdd(&end.demand, rows);
    return true;
  }

  // All look, and look for trouble: false if the step is lost.
  __device__ __forceinline__ bool await_flags(uint64_t started) const {
    for (uint32_t polls = 1;; ++polls) {
      bool here = true;
#pragma unroll 1
      for (uint32_t source = threadIdx.x; source < seat.ranks; source += blockDim.x) {
        if (source != seat.rank) here &= has_come(look(seat, source));
      }
      if (__syncthreads_and(here)) return true;
      if (polls % kPollsPerLook == 0 && !look_for_trouble(seat, wait, end.meeting, started)) return false;
    }
  }

  // A source's words differ: the step is lost.
  __device__ __forceinline__ void lose_for_words() const {
    const uint32_t source = end.differs / 2;
    Loss loss{};
    if (threadIdx.x == 0 && end.differs % 2 == 1) {
      const uint32_t tokens = *mail32(mailbox(seat, seat.rank, source), kTokens);
      loss = Loss{kMismatch, kCauseTold, source, 0, seat.rank, told_tokens(receive, source), tokens, 0};
    } else if (threadIdx.x == 0) {
      loss = difference(seat, receive, source);
    }
    lose_for(seat, wait, end.meeting, threadIdx.x == 0 ? source : ~0ull, loss);
  }

  // `ready` returns, in the warp that raises, when all is stored. `first`: what the first look saw.
  template <class Ready>
  __device__ __forceinline__ void run(const Ready& ready, ulonglong2 first) const {
    // A call's first wait may have been a2a_open's.
    const uint64_t started = at.state == kOpened ? at.started : ptx::globaltimer();
    Slot& slot = *seat.slot;
    const uint32_t tid = threadIdx.x;
    const bool goes = raises ? at.opens()
                             : at.closed == 0 && at.state == kDispatchSent && at.routing == seat.routing;
    if (raises && role.raises) ready();
    if (!goes) {
      // All have read where the slot stands before that changes.
      __syncthreads();
      if (tid == 0) slot.whole = 0;
      if (at.closed == 0 && tid == 0) refuse_order(seat, kDispatch, at.state);
      if (waits) void_status(seat, receive.status);
      return;
    }
    const uint32_t bad = first_raiser() ? slot.bad_ids : 0;
    if (raises && role.raises) raise();
    if (!waits) {
      __syncthreads();
      if (tid == 0) count_sent(seat, receive, sent);
      if (first_raiser()) advance(kDispatchSent);
      return;
    }
#pragma unroll 1
    for (uint32_t i = tid; receive.expert_counts != nullptr && i < receive.local; i += blockDim.x) {
      receive.expert_counts[i] = 0;
    }
    bool lost = false;
    for (bool is_new = true; !lost; is_new = false) {
      const bool here = !role.looks || look_for_flags(first, is_new);
      if (__syncthreads_and(here)) break;
      lost = !await_flags(started);
    }
    if (lost || end.differs != ~0u) {
      if (!lost) lose_for_words();
      if (first_raiser()) advance(kDispatchSent);
      return void_status(seat, receive.status);
    }
    if (tid == 0 && raises) count_sent(seat, receive, sent);
    if (!first_raiser()) return;
    const int32_t demand = static_cast<int32_t>(end.demand + (raises ? rows_for(seat.rank) : 0));
    if (receive.status != nullptr) {
      receive.status[0] = bad != 0 ? kStepBadId : 0, receive.status[1] = bad;
      receive.status[2] = 0, receive.status[3] = demand;
    }
    if (receive.rows != nullptr) *receive.rows = demand;
    advance(kDispatched);
    slot.whole = 1, slot.bad_ids = 0;
    // A second dispatch completes the first step of a comm that never combines.
    if (sequence > 1) seat.shared->first_step_done = 1;
    ptx::add_relaxed_gpu(&seat.shared->counters[kHops], 1);
    if (receive.flags & kGathers) ptx::add_relaxed_gpu(&seat.shared->counters[kRowsGathered], demand);
  }
};

// Copies a row of a plane beside the tokens to one place, by a warp.
__device__ __forceinline__ void copy_side(const Side& side, uint32_t token, uint8_t* window, uint64_t block,
                                          uint32_t row, uint64_t bound) {
  const uint32_t lane = threadIdx.x % 32;
  const uint8_t* from = side.from + token * side.stride;
  if (side.pitch == 0) {
    return copy_bytes(window + side.to + (block * bound + row) * side.bytes, from, side.bytes, side.unit, lane, 32);
  }
  // Scales by column: the elements of a row lie a pitch apart.
  const uint32_t elements = side.bytes / 4;
  auto* to = reinterpret_cast<uint32_t*>(window + side.to);
  for (uint32_t i = lane; i < elements; i += 32) {
    uint32_t word;
    if (side.unit >= 4) {
      word = reinterpret_cast<const uint32_t*>(from)[i];
    } else {
      memcpy(&word, from + 4 * i, 4);
    }
    to[(block * elements + i) * side.pitch + row] = word;
  }
}

// What says that a row is none: id -1, source -1, weight 0, behind this rank's rows at a peer. By `threads` threads, of
// which this is one.
__device__ __forceinline__ void pad_rows(const PushParams& p, uint32_t peer, uint32_t used, uint32_t thread,
                                         uint32_t threads) {
  if (used >= p.seat.bound) return;
  const uint64_t topk = p.route.topk;
  uint8_t* window = window_of(p.seat, peer);
  const uint64_t first = p.row_base + used, count = p.seat.bound - used;
  auto* ids = reinterpret_cast<int32_t*>(window + p.to_ids) + first * topk;
  auto* weights = reinterpret_cast<float*>(window + p.to_weights) + first * topk;
  auto* source = reinterpret_cast<int2*>(window + p.to_source) + first;
#pragma unroll 1
  for (uint64_t i = thread; i < count * topk; i += threads) ids[i] = -1, weights[i] = 0.0f;
#pragma unroll 1
  for (uint64_t i = thread; i < count; i += threads) source[i] = make_int2(-1, -1);
}

// The blocks behind those that move, and all their parts. `sent`: rows for each rank.
__device__ __forceinline__ void pad_rows(const PushParams& p, const uint32_t* sent) {
  const uint32_t block = (blockIdx.x - p.route.tokens) * gridDim.y + blockIdx.y;
  const uint32_t blocks = (gridDim.x - p.route.tokens) * gridDim.y;
  for (uint32_t peer = 0; peer < p.seat.ranks; ++peer) {
    pad_rows(p, peer, sent[peer], block * blockDim.x + threadIdx.x, blocks * blockDim.x);
  }
}

// A warp's job: a piece of a token's row, `n` vectors a lane, or (the last part) what travels beside it.
template <uint32_t n>
struct Job {
  uint32_t token;
  uint32_t begin;
  uint32_t end;
  bool beside;
  // Of what is beside the row, a choice a lane: the id (with `bad` if it is neither an expert nor -1) and the weight.
  bool bad;
  int32_t id;
  float weight;
  int4 value[n];
};

// What a job reads is on its way while the routing is looked at.
template <uint32_t n>
__device__ __forceinline__ Job<n> take_job(const PushParams& p, uint32_t token, uint32_t part) {
  Job<n> job;
  job.token = token, job.begin = part * p.piece, job.beside = part == p.jobs - 1;
  job.end = min(job.begin + p.piece, p.vectors);
  if (job.beside) {
    job.bad = read_choice(p.route, token, job.id, job.weight);
    return job;
  }
  const uint8_t* from = p.tokens + token * p.token_stride + 16ull * (job.begin + threadIdx.x % 32);
#pragma unroll
  for (uint32_t u = 0; u < n; ++u) {
    if (job.begin + 32 * u + threadIdx.x % 32 < job.end) job.value[u] = ptx::ld_stream(from + 512 * u);
  }
  return job;
}

// Where a token goes, a destination a lane: its window, the row there among this rank's, and the rank (-1: none).
struct Places {
  uint32_t count;
  uint8_t* window;
  uint32_t row;
  int32_t rank;
};

// As they were found before.
__device__ __forceinline__ Places read_places(const PushParams& p, uint32_t token) {
  const Route& route = p.route;
  const uint32_t lane = threadIdx.x % 32;
  const uint64_t at = static_cast<uint64_t>(token) * route.fanout + lane;
  const int32_t rank = lane < route.fanout ? route.target_ranks[at] : -1;
  const uint32_t row = lane < route.fanout ? route.target_rows[at] : 0;
  return Places{static_cast<uint32_t>(__popc(__ballot_sync(~0u, rank >= 0))),
                rank >= 0 ? window_of(p.seat, rank) : nullptr, row, rank};
}

// Where a token goes that is the first of this rank's, or comes behind few: by a warp, from the ids.
__device__ __forceinline__ Places find_places(const PushParams& p, uint32_t token) {
  const Route& route = p.route;
  Places places{0, nullptr, 0, -1};
#pragma unroll 1
  for (uint32_t base = 0; base < p.seat.ranks; base += kAtOnce) {
#pragma unroll 1
    for (uint32_t rest = ranks_by_lanes(route, token, base); rest != 0; rest &= rest - 1, ++places.count) {
      if (threadIdx.x % 32 == places.count) places.rank = base + __ffs(rest) - 1;
    }
#pragma unroll 1
    for (uint32_t earlier = 0; earlier < token; ++earlier) {
      const uint32_t theirs = ranks_by_lanes(route, earlier, base), bit = places.rank - base;
      if (places.rank >= 0 && bit < kAtOnce) places.row += theirs >> bit & 1;
    }
  }
  if (places.rank >= 0) places.window = window_of(p.seat, places.rank);
  return places;
}

// What a block that counts shares.
struct Counting {
  // Of each token up to the block's own: the ranks that it goes to, some at a time.
  uint32_t ranks[kMostCounted];
  // Of each warp: earlier tokens that go where lane i's row goes.
  uint32_t rows[kMoveWarps][32];
};

// The same by a block whose warps all move the same token.
__device__ __forceinline__ Places count_places(const PushParams& p, uint32_t token, Counting& shared) {
  const uint32_t tid = threadIdx.x, lane = tid % 32;
  Places places{0, nullptr, 0, -1};
  uint32_t mine = 0;
  for (uint32_t base = 0; base < p.seat.ranks; base += kAtOnce) {
    for (uint32_t i = tid; i <= token; i += blockDim.x) shared.ranks[i] = 0;
    __syncthreads();
    ranks_of_all(p.route, token + 1, base, shared.ranks);
    __syncthreads();
    const uint32_t own = shared.ranks[token];
    for (uint32_t first = tid - lane; first == tid - lane || first < token; first += blockDim.x) {
      const uint32_t theirs = first + lane < token ? shared.ranks[first + lane] : 0;
      uint32_t i = places.count;
      for (uint32_t rest = own; rest != 0; rest &= rest - 1, ++i) {
        const uint32_t bit = __ffs(rest) - 1;
        const uint32_t votes = __popc(__ballot_sync(~0u, theirs >> bit & 1));
        if (lane == i) places.rank = base + bit, mine += votes;
      }
    }
    places.count += __popc(own);
    if (base + kAtOnce < p.seat.ranks) __syncthreads();
  }
  shared.rows[tid / 32][lane] = mine;
  __syncthreads();
  for (uint32_t i = 0; i < blockDim.x / 32; ++i) places.row += shared.rows[i][lane];
  if (places.rank >= 0) places.window = window_of(p.seat, places.rank);
  return places;
}

// The routing is to know where a token went. A warp calls it.
__device__ __forceinline__ void keep_places(const Route& route, uint32_t token, const Places& places) {
  const uint32_t lane = threadIdx.x % 32;
  if (lane >= route.fanout) return;
  const uint64_t at = static_cast<uint64_t>(token) * route.fanout + lane;
  route.target_ranks[at] = places.rank;
  if (route.target_rows != nullptr) route.target_rows[at] = places.row;
}

// Stores what a job has to every place. A warp calls it.
template <uint32_t n>
__device__ __forceinline__ void do_job(const PushParams& p, const Job<n>& job, const Places& to) {
  const Seat& seat = p.seat;
  const Route& route = p.route;
  const uint32_t lane = threadIdx.x % 32;
  if (!job.beside) {
    uint8_t* row = to.window + p.to_tokens + (p.row_base + to.row) * 16ull * p.vectors + 16ull * job.begin;
    for (uint32_t i = 0; i < to.count; ++i) {
      auto* at = reinterpret_cast<uint8_t*>(__shfl_sync(~0u, reinterpret_cast<uint64_t>(row), i)) + 16 * lane;
#pragma unroll
      for (uint32_t u = 0; u < n; ++u) {
        if (job.begin + 32 * u + lane < job.end) ptx::st_row(at + 512 * u, job.value[u]);
      }
    }
    return;
  }

  const bool publishes = p.flags & kPublishes;
  keep_choice(seat, route, job.token, job.id, job.weight, job.bad);
  const uint64_t row = p.row_base + to.row;
  uint8_t* ids = to.window + p.to_ids + row * route.topk * 4;
  const uint64_t to_weights = p.to_weights - p.to_ids;
#pragma unroll 1
  for (uint32_t i = 0; i < to.count; ++i) {
    auto* at = reinterpret_cast<uint8_t*>(__shfl_sync(~0u, reinterpret_cast<uint64_t>(ids), i)) + 4 * lane;
    if (lane >= route.topk) continue;
    *reinterpret_cast<int32_t*>(at) = job.id;
    *reinterpret_cast<float*>(at + to_weights) = job.weight;
  }
  if (lane < to.count && !publishes) {
    reinterpret_cast<int2*>(to.window + p.to_source)[row] = make_int2(seat.rank, job.token);
  }
  for (uint32_t number = 0; number < p.sides; ++number) {
    const Side& side = p.side[number];
    const uint64_t block = publishes ? 0 : seat.rank;
    // A row that a warp can hold is read once.
    const uint32_t vectors = side.bytes / 16;
    const bool held = side.pitch == 0 && side.unit == 16 && vectors <= 32;
    int4 value = make_int4(0, 0, 0, 0);
    if (held && lane < vectors) value = ptx::ld_stream(side.from + job.token * side.stride + 16 * lane);
#pragma unroll 1
    for (uint32_t i = 0; i < to.count; ++i) {
      auto* window = reinterpret_cast<uint8_t*>(__shfl_sync(~0u, reinterpret_cast<uint64_t>(to.window), i));
      const uint32_t its_row = __shfl_sync(~0u, to.row, i);
      if (!held) {
        copy_side(side, job.token, window, block, its_row, seat.bound);
      } else if (lane < vectors) {
        ptx::st_row(window + side.to + (block * seat.bound + its_row) * side.bytes + 16 * lane, value);
      }
    }
  }
}

// Where a published row lies: in the own window, at the token's number.
__device__ __forceinline__ Places own_place(const PushParams& p, uint32_t token) {
  return Places{1, window_of(p.seat, p.seat.rank), token, static_cast<int32_t>(p.seat.rank)};
}

// Blocks are tokens, then those that write padding; a token's jobs past a block's warps are in the next part of the grid.
// Places take a2a_route a while; the first blocks do not wait for it.
extern "C" __global__ void __launch_bounds__(kMoveThreads, 4) a2a_push(const __grid_constant__ PushParams p) {
  __shared__ union {
    Counting counting;
    uint32_t count[kMaxRanks];
  } shared;
  const Route& route = p.route;
  const uint32_t token = blockIdx.x, part = (blockIdx.y * blockDim.x + threadIdx.x) / 32;
  const bool pads = token >= route.tokens;
  // Padding lies behind all rows.
  const bool counts = pads ? !(p.flags & kRouted) && !p.seat.replays : token < p.counted;
  Job<kLaneVectors> job;
  if (!pads && part < p.jobs) job = take_job<kLaneVectors>(p, token, part);
  // A dispatch that the slot does not allow stores nothing.
  const Standing at = standing_of(*p.seat.slot, p.flags & kFollows);
  if (p.flags & kRouted && !counts) ptx::wait_prerequisites();
  ptx::launch_dependents();
  if (pads) {
    if (counts) count_before(route, p.seat.ranks, route.tokens, shared.count);
    if (at.opens()) pad_rows(p, counts ? shared.count : reinterpret_cast<const uint32_t*>(route.rows_for));
    return;
  }
  const bool publishes = p.flags & kPublishes;
  Places places;
  if (counts) {
    places = count_places(p, token, shared.counting);
    // a2a_route keeps all of them.
    if (job.beside && part < p.jobs && at.opens() && !(p.flags & kRouted)) keep_places(route, token, places);
  } else if (!publishes && part < p.jobs) {
    places = read_places(p, token);
  }
  if (publishes) places = own_place(p, token);
  if (part < p.jobs && at.opens()) do_job(p, job, places);
}

extern "C" __global__ void __launch_bounds__(kFinishThreads, 4) a2a_finish(const __grid_constant__ FinishParams p) {
  __shared__ Ending end;
  __shared__ uint32_t count[kMaxRanks];
  const Seat& seat = p.seat;
  const uint32_t tid = threadIdx.x;
  const Standing at = standing_of(*seat.slot);
  const ulonglong2 first = look_early(seat);
  if (p.flags & kRaises && tid >= kFinishThreads - 32 && at.opens()) tell_shape(seat, p.receive, at.epoch + 1);
  if (p.flags & kRaises && p.flags & kCounts) {
    count_before(p.route, seat.ranks, p.route.tokens, count);
    for (uint32_t peer = tid; peer < seat.ranks && at.opens(); peer += kFinishThreads) {
      p.route.rows_for[peer] = count[peer];
    }
  } else if (p.flags & kRaises) {
    for (uint32_t peer = tid; peer < seat.ranks; peer += kFinishThreads) count[peer] = p.route.rows_for[peer];
  }
  __syncthreads();
  const uint32_t* sent = p.flags & kRaises && !(p.receive.flags & kGathers) ? count : nullptr;
  Finish(seat, p.receive, p.flags, sent, at, end).run([] { ptx::wait_prerequisites(); }, first);
}

extern "C" __global__ void __launch_bounds__(kOneThreads, 1) a2a_dispatch(const __grid_constant__ DispatchParams q) {
  // Warps that move, with a job each where tokens are fewest; that count and pad; one that looks (others help it where ranks
  // are many); one that raises.
  constexpr uint32_t kMovers = 15, kCounting = 4;
  static_assert(kMovers + kCounting + 2 == kOneThreads / 32);
  __shared__ Ending end;
  __shared__ uint32_t count[kMaxRanks];
  const PushParams& p = q.push;
  const Seat& seat = p.seat;
  const Route& route = p.route;
  const bool publishes = p.flags & kPublishes, replays = seat.replays;
  const uint32_t tid = threadIdx.x, lane = tid % 32, warp = tid / 32, jobs = route.tokens * p.jobs;
  const Standing at = standing_of(*seat.slot, p.flags & kFollows);
  const ulonglong2 first = look_early(seat);
  if (warp < kMovers) {
#pragma unroll 1
    for (uint32_t number = warp; number < jobs; number += kMovers) {
      const uint32_t token = number / p.jobs;
      const auto job = take_job<kOneVectors>(p, token, number - token * p.jobs);
      Places places;
      if (!replays) {
        places = find_places(p, token);
      } else if (!publishes) {
        places = read_places(p, token);
      }
      if (!at.opens()) break;
      if (job.beside && !replays) keep_places(route, token, places);
      if (publishes) places = own_place(p, token);
      do_job(p, job, places);
    }
  } else if (warp < kMovers + kCounting) {
#pragma unroll 1
    for (uint32_t peer = warp - kMovers; peer < seat.ranks; peer += kCounting) {
      uint32_t tokens = 0;
#pragma unroll 1
      for (uint32_t token = 0; token < route.tokens && !replays; ++token) {
        tokens += ranks_by_lanes(route, token, peer / kAtOnce * kAtOnce) >> peer % kAtOnce & 1;
      }
      if (replays) tokens = route.rows_for[peer];
      if (!at.opens()) break;
      if (lane == 0) count[peer] = route.rows_for[peer] = tokens;
      if (!publishes) pad_rows(p, peer, tokens, lane, 32);
    }
  } else if (tid >= kOneThreads - 32 && at.opens()) {
    tell_shape(seat, q.receive, at.epoch + 1);
  }
  const uint32_t* sent = publishes ? nullptr : count;
  if (tid < kOneThreads - 32) ptx::have_come();
  Finish(seat, q.receive, q.flags, sent, at, end).run([] { ptx::wait_for_others(); }, first);
}

extern "C" __global__ void a2a_tell(const __grid_constant__ TellParams p) {
  for (uint32_t i = threadIdx.x; i < p.count; i += blockDim.x) p.to[p.first + i] = p.values[i];
}

}  // namespace a2a
