// A dispatch or a combine through FIFOs (fifo.cuh), or either half of it: a2a_stream, behind a2a_place, and a2a_stream_*.
//
// Block 0 keeps: it raises flags, hears the peers', says that rows may move, and waits for them. The others move: the first
// warps of each send, the others take what comes. Where there are several slots, block 1 helps: it sends what they have on
// offer, for their peers may be in their second halves while this one is in another's. For the same reason a second half does
// not wait until all that it sends is in FIFOs, if a slot's is still to come: its peers may come to this one only after that. The
// last second half leaves nothing.
//
// Blocks wait, so they are few enough for those of all slots and of all ranks of a device to be on it at the same time.
#include "fifo.cuh"
#include "finish.cuh"
#include "meet.cuh"
#include "packed.cuh"
#include "sums.cuh"

namespace a2a {

constexpr uint32_t kStreamThreads = 256, kStreamsPerSm = 2;
constexpr uint32_t kStreamWarps = kStreamThreads / 32;
// Stages of a block's shared memory, at most.
constexpr uint32_t kStages = 14;
// Warps that sum results, together; one sends.
constexpr uint32_t kTeam = kStreamWarps - 1;

// Who a block behind the first is: the one that helps, or one that moves, of so many.
struct StreamBlock {
  bool helps;
  uint32_t number;
  uint32_t of;
};
__device__ __forceinline__ uint32_t helpers(const Fifos& fifos) { return fifos.slots > 1 ? 1 : 0; }
__device__ __forceinline__ uint32_t movers(const Fifos& fifos) { return gridDim.x - 1 - helpers(fifos); }
__device__ __forceinline__ StreamBlock stream_block(const Fifos& fifos) {
  return StreamBlock{helpers(fifos) != 0 && blockIdx.x == 1, blockIdx.x - 1 - helpers(fifos), movers(fifos)};
}
__device__ __forceinline__ uint32_t other_warps() { return (gridDim.x - 1) * kStreamWarps; }

__device__ __forceinline__ void arrive(uint32_t& count) {
  __syncwarp();
  if (threadIdx.x % 32 == 0) ptx::add_release_sys(&count, 1);
}

// What is on offer, where a block that moves has it at hand. The block calls it, once it may move.
__device__ __forceinline__ const Offer& take_offer(const FifoState& state, uint32_t number, Offer& here) {
  const auto* from = reinterpret_cast<const uint32_t*>(state.offer + number);
  auto* to = reinterpret_cast<uint32_t*>(&here);
  for (uint32_t i = threadIdx.x; i < sizeof(Offer) / 4; i += kStreamThreads) to[i] = from[i];
  __syncthreads();
  return here;
}

// The block's stages from `first` on. A block that helps takes all, as few and large ones, for any slot's pieces.
__device__ __forceinline__ Ring ring_of(const Fifos& fifos, uint8_t* room, uint64_t* barriers, uint32_t first, uint32_t count) {
  return Ring{room + first * fifos.stage, barriers + first, fifos.stage, count, 0, 0};
}
__device__ __forceinline__ Ring helping_ring(const Fifos& fifos, uint8_t* room, uint64_t* barriers) {
  return Ring{room, barriers, fifos.stage * fifos.stages / (kStages / 2) / 16 * 16, kStages / 2, 0, 0};
}
// The block calls it.
__device__ __forceinline__ void init_stages(uint64_t* barriers) {
  if (threadIdx.x < kStages) ptx::init_barrier(barriers + threadIdx.x);
  ptx::fence_shared();
  __syncthreads();
}

// ----------------------------------------------------------------------------------------------------------- dispatch

// Brings what is beside a row to where it is wanted, or what says that there is none (`from`, where the entry would start, is
// null). Some threads do it, `thread` of `threads`.
__device__ __forceinline__ void put_beside(const StreamParams& p, const Out& out, uint64_t row, const uint8_t* from,
                                           uint32_t thread, uint32_t threads) {
  const uint32_t kind = out.kind % kOutInPlace;
  const bool marks = kind == kOutIds || kind == kOutSource;
  if (from == nullptr && !marks && kind != kOutWeights && !(p.flags & kZeroPadding)) return;
  const uint32_t none = marks ? ~0u : 0u;
  if (out.pitch != 0) {
    auto* to = reinterpret_cast<uint32_t*>(out.to) + row;
    for (uint32_t i = thread; i < out.bytes / 4; i += threads) {
      to[i * out.pitch] = from != nullptr ? reinterpret_cast<const uint32_t*>(from + out.region)[i] : none;
    }
    return;
  }
  uint8_t* to = out.to + row * out.stride;
  if (kind == kOutIds && p.flags & kWideIds) {
    for (uint32_t i = thread; i < out.bytes / 2; i += threads) {
      const int32_t id = from != nullptr ? reinterpret_cast<const int32_t*>(from + out.region)[i / 2] : -1;
      reinterpret_cast<int32_t*>(to)[i] = i % 2 == 0 ? id : id >> 31;
    }
  } else if (from == nullptr) {
    fill_bytes(to, out.bytes, out.unit, none, thread, threads);
  } else {
    copy_here(to, from + out.region, out.bytes, out.unit, thread, threads);
  }
}

// Tokens count once for each of this rank's experts that they name. A warp does it, `threads` lanes a token; `entry` is null
// where there is none.
__device__ __forceinline__ void count_tokens(const StreamParams& p, const uint8_t* entry, uint32_t threads) {
  const uint32_t lane = threadIdx.x % 32, thread = lane % threads;
  const bool is_one = entry != nullptr && thread < p.offer.route.topk;
  const uint32_t id = is_one ? reinterpret_cast<const uint32_t*>(entry + p.offer.ids_at)[thread] : kNone;
  const bool is_here = id < p.owners.experts && owner_of(p.owners, id) == p.place.seat.rank;
  const uint32_t same = __match_any_sync(~0u, static_cast<unsigned long long>(lane / threads) << 32 | (is_here ? id : kNone));
  if (!is_here || (same & ((1u << lane) - 1)) != 0) return;
  const uint32_t local = place_of(p.owners, id, p.place.seat.rank);
  if (p.expert_counts != nullptr) atomicAdd(p.expert_counts + local, 1);
  if (p.expert_stats != nullptr) atomicAdd(p.expert_stats + local, 1ull);
}

// Takes what comes: a lane takes every so many of a source's pieces, and has a stage. Where sources are more than lanes, a lane
// goes from one to the next while nothing comes. Some warps call it.
__device__ __forceinline__ void take_rows(const StreamParams& p, const Line& line, uint32_t taker, uint32_t takers, Ring& ring) {
  const Seat& seat = line.seat;
  const Offer& offer = p.offer;
  const uint32_t lane = threadIdx.x % 32, ranks = seat.ranks, pieces = offer.pieces;
  const uint32_t all = takers * ring.count, each = max(all / ranks, 1u), which = taker * ring.count + lane;
  const bool turns_round = all < ranks;
  uint32_t source = turns_round ? which : (which + seat.rank) % ranks;
  const uint32_t first = turns_round ? 0 : which / ranks;
  uint32_t sources = 0;
  if (lane < ring.count && which < ranks * each) sources = turns_round ? (ranks - which + all - 1) / all : 1;
  const Out* tokens = nullptr;
  for (uint32_t i = 0; i < p.outs; ++i) {
    if (p.out[i].kind % kOutInPlace == kOutTokens) tokens = p.out + i;
  }
  const bool counts = p.expert_counts != nullptr || p.expert_stats != nullptr;
  const uint32_t beside = offer.route.topk <= 8 ? 8 : 32;
  uint8_t* const stage = ring.room + lane * ring.bytes;
  uint64_t* const barrier = ring.barriers + lane;
  uint32_t next = 0, units = 0, start = 0, base_entry = 0, turns = 0;
  uint64_t base = 0;
  const auto turn_to = [&] {
    base = line.from()[source], base_entry = base % line.fifos.rows, units = p.place.kept_counts[source] * pieces;
    start = 0, next = turns_round ? line.next()[source] : 0;
#pragma unroll 1
    for (uint32_t before = 0; before < source; ++before) start += p.place.kept_counts[before];
  };
  if (sources != 0) turn_to();
  bool closed = false;
#pragma unroll 1
  for (uint32_t polls = 1; __any_sync(~0u, sources != 0);) {
    const uint32_t unit = first + next * each;
    bool can = false;
    uint32_t n = 0, piece = 0, entry = 0;
    if (sources != 0 && unit < units) {
      n = unit / pieces, piece = unit - n * pieces, entry = (base_entry + n) % line.fifos.rows;
      can = ptx::ld_acquire_sys(line.full(seat.rank, source, entry, piece)) > base + n;
    } else if (sources != 0 && next != kNone) {
      // All of this one has come.
      --sources, next = kNone;
    }
    if (turns_round && sources != 0 && !can) {
      line.next()[source] = next;
      source = source + all < ranks ? source + all : which;
      turn_to();
      if (next == kNone) units = 0;
    }
    if (!__any_sync(~0u, can)) {
      if (polls++ % 16 != 0) continue;
      closed = __any_sync(~0u, has_closed(seat));
      if (closed) break;
      continue;
    }
    const uint32_t vector = piece * offer.piece;
    if (can) {
      ptx::fence_bulk();
      ptx::await_read<0>();
      ptx::load_bulk(stage, line.entry(seat.rank, source, entry) + 16ull * vector, bytes_of(offer, piece), barrier);
    }
    __syncwarp();
    if (can) {
      ptx::await_bytes(barrier, turns++ % 2);
      line.say_taken(source, entry, piece, pieces, base + n);
      if (tokens != nullptr) {
        ptx::store_bulk_once(tokens->to + static_cast<uint64_t>(start + n) * tokens->stride + 16ull * vector, stage,
                             16 * vectors_of(offer, piece));
      }
      ptx::close_group();
      ++next;
    }
    // What is beside the rows: some rows at a time, each by some lanes.
#pragma unroll 1
    for (uint32_t rest = __ballot_sync(~0u, can && piece == pieces - 1); rest != 0;) {
      uint32_t from = kNone;
#pragma unroll 1
      for (uint32_t i = 0; i < 32 / beside && rest != 0; ++i, rest &= rest - 1) {
        if (lane / beside == i) from = __ffs(rest) - 1;
      }
      const uint64_t row = __shfl_sync(~0u, start + n, from % 32);
      const uint32_t its_vector = __shfl_sync(~0u, vector, from % 32);
      const uint8_t* const its_entry = from != kNone ? ring.room + from * ring.bytes - 16 * its_vector : nullptr;
#pragma unroll 1
      for (uint32_t i = 0; i < p.outs && from != kNone; ++i) {
        if (p.out + i != tokens) put_beside(p, p.out[i], row, its_entry, lane % beside, beside);
      }
      __syncwarp();
      if (counts) count_tokens(p, its_entry, beside);
    }
    __syncwarp();
  }
  ptx::await_stored();
  if (lane == 0 && !closed) atomicAdd(&line.state().taken, 1);
}

// Keeps what this rank's tokens chose. Warps take turns.
__device__ __forceinline__ void keep_choices(const Seat& seat, const Route& route, uint32_t warp, uint32_t warps) {
#pragma unroll 1
  for (uint32_t token = warp; token < route.tokens; token += warps) {
    int32_t id;
    float weight;
    const bool bad = read_choice(route, token, id, weight);
    keep_choice(seat, route, token, id, weight, bad);
  }
}

// Rows that are none, behind those that come. Warps take turns.
__device__ __forceinline__ void pad_outs(const StreamParams& p, uint32_t warp, uint32_t warps) {
#pragma unroll 1
  for (uint64_t row = p.place.received[0] + warp; row < p.rows; row += warps) {
#pragma unroll 1
    for (uint32_t i = 0; i < p.outs; ++i) put_beside(p, p.out[i], row, nullptr, threadIdx.x % 32, 32);
  }
}

struct Stream {
  Ending end;
  Totals totals;
  Hearing heard;
  uint32_t count[kMaxRanks];
};

__device__ __forceinline__ void keep_rows(const StreamParams& p, Stream& s) {
  const Seat& seat = p.finish.seat;
  const Line line{seat, p.fifos, p.fifos.slot};
  FifoState& state = line.state();
  const Standing at = standing_of(*seat.slot);
  const ulonglong2 first = look_early(seat);
  const bool raises = p.finish.flags & kRaises, waits = p.finish.flags & kWaits;
  const bool goes = raises ? at.opens() : at.receives(seat.routing);
  const uint64_t started = at.state == kOpened ? at.started : ptx::globaltimer();
  const uint32_t warps = other_warps();
#pragma unroll 1
  for (uint32_t peer = threadIdx.x; peer < seat.ranks; peer += blockDim.x) s.count[peer] = p.place.route.rows_for[peer];
  if (threadIdx.x == 0) lock(state);
  if (threadIdx.x == 0 && waits) await_warps(state.arrived, warps);
  __syncthreads();
  Finish finish(seat, p.finish.receive, p.finish.flags, raises ? s.count : nullptr, at, s.end, waits ? &s.totals : nullptr);
  finish.moved = kRowsFifo;
  const uint64_t go = pack(finish.epoch, kGoRows);
  if (raises && goes) {
    put_on_offer(line, 0, p.offer, finish.epoch);
    if (threadIdx.x == 0) atomicAdd(&seat.shared->pending, 1);
    if (threadIdx.x >= blockDim.x - 32) tell_shape(seat, p.finish.receive, finish.epoch, at.absent);
  }
  if (waits && goes) {
    bool lost = false;
    if (!seat.replays) {
      const Wait wait{kDispatch, finish.epoch, finish.sequence, true, kCountsFlag};
      lost = !await(seat, wait, s.end.meeting, started);
      if (!lost) hear_rows(p.place, finish.epoch, s.heard);
    }
    __syncthreads();
    if (lost) {
      if (finish.first_raiser()) finish.advance(kDispatchSent);
      give_up(line, go, warps, true);
      return void_status(seat, p.finish.receive.status);
    }
    hand_out_sums(p.finish, s.totals);
  }
  finish.run([] {}, first);
  __syncthreads();
  if (!waits) {
    if (threadIdx.x == 0) unlock(state);
    return;
  }
  const bool whole = __syncthreads_or(threadIdx.x == 0 && look_at(&seat.slot->whole) != 0);
  if (!goes || !whole) {
    if (goes && threadIdx.x == 0) state.offer[0].live = 0;
    return give_up(line, go, warps, goes);
  }
  if (!state.offer[0].ready) {
    make_ready(line, 0, [&](uint32_t rank) { return p.place.route.rows_for[rank]; }, threadIdx.x, blockDim.x);
  }
  expect_rows(line, p.place.kept_counts);
  __syncthreads();
  if (threadIdx.x == 0) state.offer[0].ready = 1;
  say_go(state, go);
  const Wait wait{finish.wait.operation, finish.epoch, finish.sequence, true, kDispatchPair};
  if (keep_streams(line, wait, s.end.meeting, started, go, warps, p.place.kept_counts, p.offer.pieces, movers(p.fifos))) return;
  if (threadIdx.x == 0) seat.slot->whole = 0;
  void_status(seat, p.finish.receive.status);
}

extern "C" __global__ void __launch_bounds__(kStreamThreads, kStreamsPerSm) a2a_stream(const __grid_constant__ StreamParams p) {
  extern __shared__ __align__(128) uint8_t stages[];
  __shared__ uint64_t barriers[kStages];
  __shared__ union {
    Stream keeper;
    Offer offer;
  } s;
  const Seat& seat = p.finish.seat;
  const OnSm on_sm(seat);
  if (blockIdx.x == 0) return keep_rows(p, s.keeper);
  const Line line{seat, p.fifos, p.fifos.slot};
  FifoState& state = line.state();
  const Standing at = standing_of(*seat.slot);
  const bool raises = p.finish.flags & kRaises, goes = raises ? at.opens() : at.receives(seat.routing);
  const uint64_t go = pack(at.epoch + (raises ? 1 : 0), kGoRows);
  const StreamBlock me = stream_block(p.fifos);
  const uint32_t warp = threadIdx.x / 32, number = me.number * kStreamWarps + warp, of = me.of * kStreamWarps;
  // What a half on its own goes by is on offer: its own parameters have no tokens. Before the step's status is written.
  if (!me.helps && goes) keep_choices(seat, raises ? p.offer.route : state.offer[0].route, number, of);
  init_stages(barriers);
  arrive(state.arrived);
  if (me.helps) {
    Ring ring = helping_ring(p.fifos, stages, barriers);
    if (warp == 0 && goes) help(seat, p.fifos, go, 0, ring);
  } else if (goes && __syncthreads_and(await_go(seat, state, go))) {
    const Offer& offer = take_offer(state, 0, s.offer);
    auto* toward = reinterpret_cast<Toward*>(stages + p.fifos.stage * p.fifos.stages);
    for (uint32_t rank = threadIdx.x; rank < seat.ranks; rank += kStreamThreads) {
      const uint64_t base = line.base(0)[rank];
      toward[rank] = Toward{base, static_cast<uint32_t>(base % p.fifos.rows), line.count(0)[rank]};
    }
    __syncthreads();
    const uint32_t senders = p.fifos.senders;
    if (warp < senders) {
      const uint32_t sequence = me.number * senders + warp, all = me.of * senders;
      Ring ring = ring_of(p.fifos, stages, barriers, warp * kSendStages, kSendStages);
      if (offer.sequences <= all && sequence < offer.sequences) send_tokens(line, 0, offer, toward, sequence, go, ring);
      send_rest(line, 0, offer, sequence, all, go, ring);
    } else if (warp == senders) {
      const uint32_t first = senders * kSendStages;
      Ring ring = ring_of(p.fifos, stages, barriers, first, p.fifos.stages - first);
      take_rows(p, line, me.number, me.of, ring);
    } else {
      const uint32_t others = kStreamWarps - senders - 1;
      pad_outs(p, me.number * others + warp - senders - 1, me.of * others);
    }
  }
  arrive(state.ended);
}

// ------------------------------------------------------------------------------------------------------------ combine

// Takes results and sums them, a token at a time: its results stand at the front of their FIFOs together, for every rank sends
// its own in token order. A team of warps calls it; each sums some of the vectors, and whichever is the last to have read a
// token's results lets their sources have the room.
constexpr uint32_t kTurns = 8;
// A result, a lane's: where it is, and which row of which rank.
struct Result {
  int32_t rank;
  uint32_t entry;
  uint64_t row;
};
template <class From, class To>
__device__ __forceinline__ void take_results(const StreamResultsParams& p, const Line& line, const Toward* from, uint32_t taker,
                                             uint32_t takers, uint32_t warp, uint32_t* readers) {
  constexpr uint32_t kElements = 16 / From::kBytes, kAbreast = 2;
  const Seat& seat = line.seat;
  const Offer& offer = p.offer;
  const uint32_t lane = threadIdx.x % 32, pieces = offer.pieces;
  int32_t coming_rank = -1;
  uint32_t coming_row = 0;
  const auto look = [&](uint64_t token) {
    coming_rank = -1;
    if (token >= p.tokens || lane >= p.fanout) return;
    const uint64_t at = token * p.fanout + lane;
    coming_rank = p.target_ranks[at], coming_row = p.target_rows[at];
  };
  look(taker);
  bool closed = false;
#pragma unroll 1
  for (uint32_t token = taker, turn = 0; token < p.tokens; token += takers, ++turn) {
    Result mine{coming_rank, 0, 0};
    const uint32_t row = coming_row;
    // Those of the next token are on their way meanwhile.
    look(static_cast<uint64_t>(token) + takers);
    if (mine.rank >= 0) {
      const Toward& source = from[mine.rank];
      mine.entry = (source.entry + row) % line.fifos.rows, mine.row = source.base + row;
      // Rows that others had no room for have no results.
      if (row >= source.count) mine.rank = -1;
    }
    const bool comes = mine.rank >= 0;
    const uint8_t* const result = comes ? line.entry(seat.rank, mine.rank, mine.entry) : nullptr;
    const uint32_t all = __ballot_sync(~0u, comes);
    const auto* words = reinterpret_cast<const ulonglong2*>(line.full(seat.rank, comes ? mine.rank : 0, mine.entry, 0));
#pragma unroll 1
    for (uint32_t piece = 0, polls = 1; comes && !closed && piece < pieces; ++polls) {
      const ulonglong2 two = ptx::ld_acquire_sys(words + piece / 2);
      if (two.x > mine.row && (two.y > mine.row || piece + 1 == pieces)) piece += 2;
      if (polls % kPollsPerLook == 0) closed = has_closed(seat);
    }
    closed = __any_sync(~0u, closed);
    uint8_t* const out = p.out + token * p.out_stride;
#pragma unroll 1
    for (uint32_t first = warp * 32 * kAbreast; first < offer.vectors && !closed; first += kTeam * 32 * kAbreast) {
      float acc[kAbreast][kElements];
#pragma unroll
      for (uint32_t i = 0; i < kAbreast * kElements; ++i) acc[i / kElements][i % kElements] = 0.0f;
      add_abreast<From, kAbreast>(result, all, first + lane, offer.vectors, acc);
#pragma unroll
      for (uint32_t i = 0; i < kAbreast; ++i) {
        const uint64_t vector = first + 32 * i + lane;
        if (vector < offer.vectors) {
          put_sum<To, kElements>(out + vector * kElements * To::kBytes, p.flags & kAccumulate, acc[i]);
        }
      }
    }
    if (warp == 0 && p.out_weights != nullptr && !closed) {
      // Each from the result of the rank that has the lane's expert.
      const int32_t id = lane < p.topk ? p.ids[static_cast<uint64_t>(token) * p.topk + lane] : -1;
      const int32_t owner = id >= 0 ? static_cast<int32_t>(owner_of(p.owners, id)) : -1;
      float value = 0.0f;
#pragma unroll 1
      for (uint32_t rest = all; rest != 0; rest &= rest - 1) {
        const uint32_t which = __ffs(rest) - 1;
        const int32_t its_rank = __shfl_sync(~0u, mine.rank, which);
        auto* its_row = reinterpret_cast<const uint8_t*>(__shfl_sync(~0u, reinterpret_cast<uint64_t>(result), which));
        if (owner == its_rank) value = reinterpret_cast<const float*>(its_row + p.weights_at)[lane];
      }
      if (lane < p.topk) reinterpret_cast<float*>(p.out_weights + token * p.out_weights_stride)[lane] = value;
    }
    __syncwarp();
    uint32_t before = 0;
    if (lane == 0) before = atomicAdd(readers + turn % kTurns, 1);
    before = __shfl_sync(~0u, before, 0);
    if (comes && !closed && before % kTeam == kTeam - 1) {
#pragma unroll 1
      for (uint32_t piece = 0; piece < pieces; ++piece) line.say_taken(mine.rank, mine.entry, piece, pieces, mine.row);
    }
    // None is so far ahead of another that they count in one word.
    if (turn % kTurns == kTurns - 1) closed = !ptx::all_of(32 * kTeam, !closed);
    if (closed && turn % kTurns == kTurns - 1) return;
  }
  closed = !ptx::all_of(32 * kTeam, !closed);
  if (warp == 0 && lane == 0 && !closed) atomicAdd(&line.state().taken, 1);
}

__device__ __forceinline__ void keep_results(const StreamResultsParams& p, Meeting& meeting) {
  const Seat& seat = p.meet.seat;
  const Line line{seat, p.fifos, p.fifos.slot};
  FifoState& state = line.state();
  const bool sends = p.meet.flags & kSends, waits = p.meet.flags & kMeetWaits;
  const Standing at = standing_of(*seat.slot);
  const bool goes = at.closed == 0 & at.state == (sends ? kDispatched : kCombineSent) & at.routing == seat.routing;
  const uint64_t started = ptx::globaltimer();
  const uint64_t go = pack(at.epoch, kGoResults);
  const uint32_t warps = other_warps();
  if (threadIdx.x == 0) lock(state);
  if (threadIdx.x == 0 && waits) await_warps(state.arrived, warps);
  __syncthreads();
  if (sends && goes) {
    put_on_offer(line, 1, p.offer, at.epoch);
    make_ready(line, 1, [&](uint32_t rank) { return p.offer.rows_for[rank]; }, threadIdx.x, blockDim.x);
    __syncthreads();
    if (threadIdx.x == 0) state.offer[1].ready = 1, atomicAdd(&seat.shared->pending, 1);
  }
  // Moves the slot on; what it comes to follows.
  const bool went = meet(p.meet, meeting);
  __syncthreads();
  if (!waits) {
    if (threadIdx.x == 0) unlock(state);
    return;
  }
  if (!went) return give_up(line, go, warps, goes);
  expect_rows(line, p.rows_for);
  say_go(state, go);
  const Wait wait{kCombine, at.epoch, at.sequence, true, kCombineFlag};
  if (keep_streams(line, wait, meeting, started, go, warps, p.rows_for, p.offer.pieces, movers(p.fifos))) return settle(p.meet);
  if (threadIdx.x == 0) seat.slot->whole = 0;
  void_status(seat, p.meet.status);
}

template <class From, class To>
__device__ __forceinline__ void stream_results(const StreamResultsParams& p) {
  extern __shared__ __align__(128) uint8_t room[];
  __shared__ uint64_t barriers[kStages];
  __shared__ uint32_t readers[kTurns];
  __shared__ Meeting meeting;
  __shared__ Offer here;
  const Seat& seat = p.meet.seat;
  const OnSm on_sm(seat);
  if (blockIdx.x == 0) return keep_results(p, meeting);
  const Line line{seat, p.fifos, p.fifos.slot};
  FifoState& state = line.state();
  const Standing at = standing_of(*seat.slot);
  const bool sends = p.meet.flags & kSends;
  const bool goes = at.closed == 0 & at.state == (sends ? kDispatched : kCombineSent) & at.routing == seat.routing;
  const uint64_t go = pack(at.epoch, kGoResults);
  const StreamBlock me = stream_block(p.fifos);
  const uint32_t warp = threadIdx.x / 32;
  init_stages(barriers);
  arrive(state.arrived);
  if (me.helps) {
    Ring ring = helping_ring(p.fifos, room, barriers);
    if (warp == 0 && goes) help(seat, p.fifos, go, 1, ring);
  } else if (goes && __syncthreads_and(await_go(seat, state, go))) {
    const Offer& offer = take_offer(state, 1, here);
    auto* from = reinterpret_cast<Toward*>(room + p.fifos.stage * p.fifos.stages);
    for (uint32_t rank = threadIdx.x; rank < seat.ranks; rank += kStreamThreads) {
      const uint64_t base = line.from()[rank];
      from[rank] = Toward{base, static_cast<uint32_t>(base % p.fifos.rows), static_cast<uint32_t>(p.rows_for[rank])};
    }
    if (threadIdx.x < kTurns) readers[threadIdx.x] = 0;
    __syncthreads();
    if (warp == 0) {
      Ring ring = ring_of(p.fifos, room, barriers, 0, p.fifos.stages);
      if (offer.sequences * seat.ranks <= me.of * ring.count) {
        send_results(line, 1, offer, me.number, go, ring);
      } else {
        send_rest(line, 1, offer, me.number, me.of, go, ring);
      }
    } else {
      take_results<From, To>(p, line, from, me.number, me.of, warp - 1, readers);
    }
  }
  arrive(state.ended);
}

#define A2A_STREAM(name, From, To)                                            \
  extern "C" __global__ void __launch_bounds__(kStreamThreads, kStreamsPerSm) \
      a2a_stream_##name(const __grid_constant__ StreamResultsParams p) {      \
    stream_results<From, To>(p);                                              \
  }
A2A_EACH_SUM(A2A_STREAM)
#undef A2A_STREAM

}  // namespace a2a
