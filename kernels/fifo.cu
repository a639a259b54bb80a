// A dispatch or a combine through FIFOs (fifo.cuh), or either half of it: a2a_stream, behind a2a_place, and a2a_stream_*.
//
// Block 0 keeps: it raises flags, hears the peers', says that rows may move, and waits for them. The others move: a few
// warps of each send, the others take what comes. Where there are several slots, block 1 helps: it sends what they have on offer, for
// their peers may be in their second halves while this one is in another's. For the same reason a second half does not wait
// until all that it sends is in FIFOs, if a slot's is still to come: its peers may come to this one only after that. The last
// second half leaves nothing.
//
// Blocks wait, so they are few enough for those of all slots and of all ranks of a device to be on it at the same time.
#include "fifo.cuh"
#include "finish.cuh"
#include "meet.cuh"
#include "packed.cuh"
#include "sums.cuh"

namespace a2a {

constexpr uint32_t kStreamThreads = 192, kStreamsPerSm = 2;
constexpr uint32_t kStreamWarps = kStreamThreads / 32;
// Of a block, those that send; sequences of a warp that takes, about.
constexpr uint32_t kSendWarps = 2, kTakes = 8;
// Stages of shared memory of a warp.
constexpr uint32_t kSendStages = 3, kTakeStages = 2;
constexpr uint32_t kStages = kSendWarps * kSendStages + (kStreamWarps - kSendWarps) * kTakeStages;

// Who a warp of the blocks behind the first is. The first warps of a block send: few have the releases that they cost at a
// time. The others take.
struct Streamer {
  bool helps;
  bool is_idle;
  bool sends;
  uint32_t number;
  uint32_t of;
};
__device__ __forceinline__ Streamer streamer(const Fifos& fifos) {
  const uint32_t warp = threadIdx.x / 32, helpers = fifos.slots > 1 ? 1 : 0;
  const bool helps = blockIdx.x == helpers && helpers != 0, sends = warp < kSendWarps;
  const uint32_t blocks = gridDim.x - 1 - helpers, block = blockIdx.x - 1 - helpers;
  const uint32_t first = sends ? 0 : kSendWarps, warps = sends ? kSendWarps : kStreamWarps - kSendWarps;
  return Streamer{helps, helps && warp != 0, sends, block * warps + warp - first, blocks * warps};
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

// A warp's own, in the block's shared memory.
__device__ __forceinline__ Carrier carrier_of(const Fifos& fifos, uint8_t* room, Stage* stages) {
  const uint32_t warp = threadIdx.x / 32;
  const bool sends = warp < kSendWarps;
  const uint32_t first = sends ? warp * kSendStages : kSendWarps * kSendStages + (warp - kSendWarps) * kTakeStages;
  return Carrier(room + first * fifos.stage, stages + first, fifos.stage, sends ? kSendStages : kTakeStages);
}

// ----------------------------------------------------------------------------------------------------------- dispatch

// Brings what is beside a row to where it is wanted, or what says that there is none (`from` null). Some threads do it, `thread`
// of `threads`.
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
    copy_bytes(to, from + out.region, out.bytes, out.unit, thread, threads);
  }
}

// A token counts once for each of this rank's experts that it names. A thread does it.
__device__ __forceinline__ void count_token(const StreamParams& p, const uint8_t* entry) {
  const auto* ids = reinterpret_cast<const uint32_t*>(entry + p.offer.ids_at);
#pragma unroll 1
  for (uint32_t k = 0; k < p.offer.route.topk; ++k) {
    const uint32_t id = ids[k];
    bool first = id < p.owners.experts && owner_of(p.owners, id) == p.place.seat.rank;
    for (uint32_t before = 0; before < k; ++before) first &= ids[before] != id;
    if (!first) continue;
    const uint32_t local = place_of(p.owners, id, p.place.seat.rank);
    if (p.expert_counts != nullptr) atomicAdd(p.expert_counts + local, 1);
    if (p.expert_stats != nullptr) atomicAdd(p.expert_stats + local, 1ull);
  }
}

// Takes what comes, some sequences of pieces, a lane's each. A warp calls it.
__device__ __forceinline__ void take_rows(const StreamParams& p, const Line& line, uint32_t taker, uint32_t takers,
                                          Carrier& carrier) {
  const Seat& seat = line.seat;
  const Offer& offer = p.offer;
  const uint32_t lane = threadIdx.x % 32, ranks = seat.ranks, pieces = offer.pieces;
  // Some for each warp: a look at many costs as much as at one.
  const uint32_t lanes = max(kTakes * takers / ranks, 1u), sequences = lanes * ranks;
  const Out* tokens = nullptr;
  for (uint32_t i = 0; i < p.outs; ++i) {
    if (p.out[i].kind % kOutInPlace == kOutTokens) tokens = p.out + i;
  }
#pragma unroll 1
  for (uint32_t group = taker; group < sequences; group += 32 * takers) {
    const uint32_t which = group + lane * takers, source = which % ranks;
    const bool is_one = which < sequences;
    uint32_t next = which / ranks, end = 0, start = 0;
    uint64_t base = 0;
    if (is_one) {
      base = line.from()[source], end = p.place.kept_counts[source] * pieces;
#pragma unroll 1
      for (uint32_t before = 0; before < source; ++before) start += p.place.kept_counts[before];
    }
    const uint32_t base_entry = base % line.fifos.rows;
    while (__any_sync(~0u, is_one && next < end)) {
      uint32_t n = 0, piece = 0, entry = 0;
      bool can = false;
      if (is_one && next < end) {
        n = next / pieces, piece = next - n * pieces, entry = (base_entry + n) % line.fifos.rows;
        can = ptx::ld_acquire_sys(line.full(seat.rank, source, entry, piece)) > base + n;
      }
      const uint32_t all = __ballot_sync(~0u, can);
      if (all == 0 && __any_sync(~0u, has_closed(seat))) return;
      if (all == 0) continue;
      const uint8_t* const at = can ? line.entry(seat.rank, source, entry) : nullptr;
      const uint32_t row = start + n;
      if (lane == 0) ptx::fence_bulk();
#pragma unroll 1
      for (uint32_t rest = all; rest != 0; rest &= rest - 1) {
        const uint32_t from = __ffs(rest) - 1;
        auto* its_entry = reinterpret_cast<const uint8_t*>(__shfl_sync(~0u, reinterpret_cast<uint64_t>(at), from));
        const uint32_t first = __shfl_sync(~0u, piece, from) * offer.piece;
        const uint64_t its_row = __shfl_sync(~0u, row, from);
        if (lane == 0 && tokens != nullptr) {
          carrier.carry(tokens->to + its_row * tokens->stride + 16ull * first, its_entry + 16ull * first,
                        16 * min(offer.piece, offer.vectors - first));
        }
      }
      // Meanwhile what is beside the rows, a row a thread.
      if (can && piece == pieces - 1) {
#pragma unroll 1
        for (uint32_t i = 0; i < p.outs; ++i) {
          if (p.out + i != tokens) put_beside(p, p.out[i], row, at, 0, 1);
        }
        if (p.expert_counts != nullptr || p.expert_stats != nullptr) count_token(p, at);
      }
      __syncwarp();
      if (lane == 0) carrier.empty();
      __syncwarp();
      if (can) {
        line.say_taken(source, entry, base + n, piece, pieces);
        next += lanes;
      }
    }
  }
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
    if (threadIdx.x >= blockDim.x - 32) tell_shape(seat, p.finish.receive, finish.epoch);
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
  expect_rows(line, p.place.kept_counts, p.offer.pieces);
  __syncthreads();
  if (threadIdx.x == 0) state.offer[0].ready = 1;
  say_go(state, go);
  const Wait wait{finish.wait.operation, finish.epoch, finish.sequence, true, kDispatchPair};
  if (keep_streams(line, wait, s.end.meeting, started, go, warps)) return;
  if (threadIdx.x == 0) seat.slot->whole = 0;
  void_status(seat, p.finish.receive.status);
}

extern "C" __global__ void __launch_bounds__(kStreamThreads, kStreamsPerSm) a2a_stream(const __grid_constant__ StreamParams p) {
  extern __shared__ __align__(128) uint8_t stages[];
  __shared__ Stage table[kStages];
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
  const Streamer me = streamer(p.fifos);
  const uint32_t helpers = p.fifos.slots > 1 ? 1 : 0, of = (gridDim.x - 1 - helpers) * kStreamWarps;
  const uint32_t number = (blockIdx.x - 1 - helpers) * kStreamWarps + threadIdx.x / 32;
  // What a half on its own goes by is on offer: its own parameters have no tokens. Before the step's status is written.
  if (!me.helps && goes) keep_choices(seat, raises ? p.offer.route : state.offer[0].route, number, of);
  arrive(state.arrived);
  Carrier carrier = carrier_of(p.fifos, stages, table);
  if (me.helps && !me.is_idle && goes) {
    help(seat, p.fifos, go, 0, carrier);
  } else if (!me.helps && goes && __syncthreads_and(await_go(seat, state, go))) {
    const Offer& offer = take_offer(state, 0, s.offer);
    if (me.sends) {
      send_all(line, 0, offer, me.number, me.of, go, carrier);
    } else {
      take_rows(p, line, me.number, me.of, carrier);
      if (threadIdx.x % 32 == 0) carrier.finish();
    }
    pad_outs(p, number, of);
  }
  arrive(state.ended);
}

// ------------------------------------------------------------------------------------------------------------ combine

// Where a token's results are; one a warp.
struct Results {
  const uint8_t* row[kMaxTopk];
  uint32_t rank[kMaxTopk];
};

// Takes results and sums them, a piece of a token at a time: a token's results stand at the front of their FIFOs together, for
// every rank sends its own in token order. A warp calls it.
template <class From, class To>
__device__ __forceinline__ void take_results(const StreamResultsParams& p, const Line& line, uint32_t taker, uint32_t takers,
                                             Results& s) {
  constexpr uint32_t kElements = 16 / From::kBytes;
  const Seat& seat = line.seat;
  const Offer& offer = p.offer;
  const uint32_t lane = threadIdx.x % 32, pieces = offer.pieces;
  const uint64_t units = static_cast<uint64_t>(p.tokens) * pieces;
#pragma unroll 1
  for (uint64_t unit = taker; unit < units; unit += takers) {
    const uint32_t token = unit / pieces, piece = unit - static_cast<uint64_t>(token) * pieces;
    const uint64_t at = static_cast<uint64_t>(token) * p.fanout + lane;
    const int32_t rank = lane < p.fanout ? p.target_ranks[at] : -1;
    const uint32_t row = rank >= 0 ? p.target_rows[at] : 0;
    // Rows that others had no room for have no results.
    const bool comes = rank >= 0 && row < static_cast<uint32_t>(p.rows_for[rank]);
    uint64_t number = 0;
    uint32_t entry = 0;
    if (comes) number = line.from()[rank] + row, entry = number % line.fifos.rows;
    const uint32_t all = __ballot_sync(~0u, comes), n = __popc(all), place = __popc(all & ((1u << lane) - 1));
    bool closed = false;
    if (comes) {
      const uint64_t* word = line.full(seat.rank, rank, entry, piece);
      for (uint32_t polls = 1; ptx::ld_acquire_sys(word) <= number; ++polls) {
        closed = polls % kPollsPerLook == 0 && has_closed(seat);
        if (closed) break;
      }
      s.row[place] = line.entry(seat.rank, rank, entry), s.rank[place] = rank;
    }
    if (__any_sync(~0u, closed)) return;
    // What all lanes wrote is seen by all.
    __syncwarp();
    const uint32_t first = piece * offer.piece;
    uint8_t* const out = p.out + token * p.out_stride;
#pragma unroll 1
    for (uint32_t vector = first + lane; vector < min(first + offer.piece, offer.vectors); vector += 32) {
      float acc[kElements];
#pragma unroll
      for (uint32_t i = 0; i < kElements; ++i) acc[i] = 0.0f;
      add_all<From, false>(s.row, nullptr, n, 16ull * vector, acc);
      put_sum<To, kElements>(out + static_cast<uint64_t>(vector) * kElements * To::kBytes, p.flags & kAccumulate, acc);
    }
    if (piece == pieces - 1 && p.out_weights != nullptr && lane < p.topk) {
      const int32_t id = p.ids[static_cast<uint64_t>(token) * p.topk + lane];
      float value = 0.0f;
      for (uint32_t i = 0; i < n && id >= 0; ++i) {
        if (s.rank[i] == owner_of(p.owners, id)) value = reinterpret_cast<const float*>(s.row[i] + p.weights_at)[lane];
      }
      reinterpret_cast<float*>(p.out_weights + token * p.out_weights_stride)[lane] = value;
    }
    __syncwarp();
    if (comes) {
      line.say_taken(rank, entry, number, piece, pieces);
    }
    __syncwarp();
  }
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
  expect_rows(line, p.rows_for, p.offer.pieces);
  say_go(state, go);
  const Wait wait{kCombine, at.epoch, at.sequence, true, kCombineFlag};
  if (keep_streams(line, wait, meeting, started, go, warps)) return settle(p.meet);
  if (threadIdx.x == 0) seat.slot->whole = 0;
  void_status(seat, p.meet.status);
}

template <class From, class To>
__device__ __forceinline__ void stream_results(const StreamResultsParams& p) {
  extern __shared__ __align__(128) uint8_t room[];
  __shared__ Stage table[kStages];
  __shared__ Meeting meeting;
  __shared__ Results results[kStreamWarps];
  __shared__ Offer offer;
  const Seat& seat = p.meet.seat;
  const OnSm on_sm(seat);
  if (blockIdx.x == 0) return keep_results(p, meeting);
  const Line line{seat, p.fifos, p.fifos.slot};
  FifoState& state = line.state();
  const Standing at = standing_of(*seat.slot);
  const bool sends = p.meet.flags & kSends;
  const bool goes = at.closed == 0 & at.state == (sends ? kDispatched : kCombineSent) & at.routing == seat.routing;
  const uint64_t go = pack(at.epoch, kGoResults);
  const Streamer me = streamer(p.fifos);
  arrive(state.arrived);
  Carrier carrier = carrier_of(p.fifos, room, table);
  if (me.helps && !me.is_idle && goes) {
    help(seat, p.fifos, go, 1, carrier);
  } else if (!me.helps && goes && __syncthreads_and(await_go(seat, state, go))) {
    take_offer(state, 1, offer);
    if (me.sends) {
      send_all(line, 1, offer, me.number, me.of, go, carrier);
    } else {
      take_results<From, To>(p, line, me.number, me.of, results[threadIdx.x / 32]);
    }
  }
  arrive(state.ended);
}

#define A2A_STREAM(name, From, To)                                                                                       \
  extern "C" __global__ void __launch_bounds__(kStreamThreads, kStreamsPerSm)                                                       \
      a2a_stream_##name(const __grid_constant__ StreamResultsParams p) {                                                \
    stream_results<From, To>(p);                                                                                        \
  }
A2A_STREAM(bf16_bf16, Bf16, Bf16)
A2A_STREAM(bf16_f16, Bf16, F16)
A2A_STREAM(bf16_f32, Bf16, F32)
A2A_STREAM(f16_bf16, F16, Bf16)
A2A_STREAM(f16_f16, F16, F16)
A2A_STREAM(f16_f32, F16, F32)
A2A_STREAM(f32_bf16, F32, Bf16)
A2A_STREAM(f32_f16, F32, F16)
A2A_STREAM(f32_f32, F32, F32)
#undef A2A_STREAM

}  // namespace a2a
