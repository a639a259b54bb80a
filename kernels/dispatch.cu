// a2a_push: each token's rows into the windows of its ranks (or into the own window, to be read from there), the
// padding behind them, and the flags; a2a_receive: the wait for the peers' flags alone.
//
// A warp's job is a piece of one token's row, or what travels beside the row: it reads 16 bytes a lane and stores them to
// every destination, and meets no other warp. A block that has done its jobs counts itself; block 0 waits for the count
// (it alone waits, and holds one place), raises this rank's flags and, if the halves are not split, waits for the
// peers'. The padding of a source's rows is written by the source, which knows how many there are before anybody else.
#include "route.cuh"
#include "wait.cuh"

namespace a2a {

constexpr uint32_t kMoveThreads = 256;
constexpr uint32_t kMoveWarps = kMoveThreads / 32;
constexpr uint32_t kLaneVectors = 4;
constexpr uint32_t kReceiveThreads = 128;

// What a rank tells its peers of its rows.
struct Sent {
  // [ranks]; null: the same for all.
  const uint32_t* rows_for;
  uint32_t rows;
};

__device__ __forceinline__ uint32_t rows_of(const Sent& sent, uint32_t peer) {
  return sent.rows_for != nullptr ? sent.rows_for[peer] : sent.rows;
}

// All but the flag, which says that the rows are there: a peer looks at the rest once the flag has come.
__device__ __forceinline__ void tell_shape(const Seat& seat, const Receive& receive, uint32_t epoch) {
  const uint32_t operation = seat.replays ? kReplay : kDispatch;
  for (uint32_t peer = threadIdx.x; peer < seat.ranks; peer += blockDim.x) {
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

// The end of a dispatch, by one block: raises this rank's flags when the other `blocks` of the kernel are done (unless
// they are up: not `raises`), and (`waits`) waits for every rank's rows, checks that shapes agree and hands out the counts.
__device__ __forceinline__ void end_dispatch(const Seat& seat, const Receive& receive, Meeting& meeting,
                                             const Sent& sent, bool raises, uint32_t blocks, bool waits,
                                             uint32_t epoch,
                                             uint64_t sequence, uint64_t started) {
  Slot& slot = *seat.slot;
  const uint32_t tid = threadIdx.x;
  const Wait wait{seat.replays ? kReplay : kDispatch, epoch, sequence, true};
  const ulonglong2* mine = reinterpret_cast<const ulonglong2*>(mailbox(seat, seat.rank, tid) + kDispatchPair);
  ulonglong2 first = make_ulonglong2(0, 0);
  bool raised = !raises;
  // The last warps raise flags, and look at the count, while the first look at the peers' flags.
  const uint32_t from_end = blockDim.x - 1 - tid;
  const auto raise = [&] {
    for (uint32_t peer = from_end; peer < seat.ranks; peer += blockDim.x) {
      ptx::st_release_sys(mail64(mailbox(seat, peer, seat.rank), kDispatchPair), pack(epoch, rows_of(sent, peer)));
    }
    if (from_end == 0) {
      slot.arrived = 0;
      slot.epoch = epoch, slot.sequence = sequence, slot.routing = seat.routing;
      slot.state = kDispatchSent, slot.whole = 0;
    }
    raised = true;
  };
  uint32_t bad = 0;
  if (!raised) {
    // What the blocks stored is acquired by one thread, ordered for all by the barrier, released by each of those that
    // raise a flag.
    while (!__syncthreads_or(from_end == 0 && ptx::ld_acquire_gpu(&slot.arrived) == blocks)) {
    }
    if (tid == 0) bad = slot.bad_ids;
    raise();
  }
  if (!waits) return;
  for (uint32_t polls = 1;; ++polls) {
    bool here = true;
    for (uint32_t source = tid; source < seat.ranks; source += blockDim.x) {
      if (source == seat.rank) continue;
      const ulonglong2 pair = ptx::ld_acquire_sys(
          source == tid ? mine
                        : reinterpret_cast<const ulonglong2*>(mailbox(seat, seat.rank, source) + kDispatchPair));
      if (source == tid) first = pair;
      here &= reached(pair.x, epoch) && reached(pair.y, epoch);
    }
    if (__syncthreads_and(here)) break;
    if (polls % 64 == 0 && !look_for_trouble(seat, wait, meeting, started)) return void_status(seat, receive.status);
  }
  if (tid == 0 && !raises) bad = slot.bad_ids;

  unsigned long long key = ~0ull;
  uint32_t rows = 0;
  bool tells = false;
  for (uint32_t source = tid; source < seat.ranks && key == ~0ull; source += blockDim.x) {
    ulonglong2 pair = first;
    if (source == seat.rank && sent.rows_for != nullptr) {
      pair = make_ulonglong2(sent.rows_for[source], receive.digest);
    } else if (source == seat.rank && raises) {
      pair = make_ulonglong2(sent.rows, receive.digest);
    } else if (source != tid || source == seat.rank) {
      pair = ptx::ld_acquire_sys(
          reinterpret_cast<const ulonglong2*>(mailbox(seat, seat.rank, source) + kDispatchPair));
    }
    if (static_cast<uint32_t>(pair.y) != receive.digest) key = source;
    if (receive.flags & (kTold | kUniform)) {
      uint32_t told = receive.tokens;
      if (receive.flags & kTold) {
        told = receive.told_more != nullptr ? receive.told_more[source] : receive.told[source % kToldRanks];
      }
      if (key == ~0ull && *mail32(mailbox(seat, seat.rank, source), kTokens) != told) key = source, tells = true;
    }
    // What a peer wrote is bounded before it is an index.
    const uint32_t count = min(static_cast<uint32_t>(pair.x) & 0x7fffffffu, seat.bound);
    receive.kept_counts[source] = count;
    if (receive.rank_counts != nullptr) receive.rank_counts[source] = count;
    rows += count;
  }
  if (tid == 0) meeting.best = 0;
  if (__syncthreads_or(key != ~0ull)) {
    Loss loss{};
    if (key != ~0ull && tells) {
      const uint32_t source = static_cast<uint32_t>(key);
      const uint32_t told = !(receive.flags & kTold)          ? receive.tokens
                            : receive.told_more != nullptr ? receive.told_more[source]
                                                           : receive.told[source % kToldRanks];
      const uint32_t tokens = *mail32(mailbox(seat, seat.rank, source), kTokens);
      loss = Loss{kMismatch, kCauseTold, source, 0, seat.rank, told, tokens, 0};
    } else if (key != ~0ull) {
      loss = difference(seat, receive, static_cast<uint32_t>(key));
    }
    lose_for(seat, wait, meeting, key, loss);
    return void_status(seat, receive.status);
  }

  // Counts are few: they are added through shared memory.
  if (rows != 0) atomicAdd(&meeting.best, rows);
  if (receive.expert_counts != nullptr) {
    for (uint32_t i = tid; i < receive.local; i += blockDim.x) receive.expert_counts[i] = 0;
  }
  __syncthreads();
  const int32_t demand = static_cast<int32_t>(meeting.best);
  // Thread 0 writes the words, and it alone knows `bad`.
  write_status(receive.status, seat.ranks,
               make_int4(bad != 0 ? kStepBadId : 0, static_cast<int32_t>(bad), 0, demand), nullptr);
  if (tid == 0) {
    slot.state = kDispatched, slot.whole = 1, slot.bad_ids = 0;
    // A second dispatch completes the first step of a comm that never combines.
    if (sequence > 1) seat.shared->first_step_done = 1;
    ptx::add_relaxed_gpu(&seat.shared->counters[kHops], 1);
    if (receive.flags & kGathers) ptx::add_relaxed_gpu(&seat.shared->counters[kRowsGathered], demand);
    if (receive.rows != nullptr) *receive.rows = demand;
  }
}

// Copies a row of a plane beside the tokens to one place, by a warp.
__device__ __forceinline__ void copy_side(const Side& side, uint32_t token, uint8_t* window, uint64_t block,
                                          uint32_t row, uint64_t bound, uint32_t lane) {
  const uint8_t* from = side.from + token * side.stride;
  if (side.pitch != 0) {
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
    return;
  }
  uint8_t* to = window + side.to + (block * bound + row) * side.bytes;
  switch (side.unit) {
    case 16:
      for (uint32_t i = lane; i < side.bytes / 16; i += 32) ptx::st_row(to + 16 * i, ptx::ld_stream(from + 16 * i));
      break;
    case 8:
    case 4:
      for (uint32_t i = lane; i < side.bytes / 4; i += 32) {
        reinterpret_cast<uint32_t*>(to)[i] = reinterpret_cast<const uint32_t*>(from)[i];
      }
      break;
    default:
      for (uint32_t i = lane; i < side.bytes; i += 32) to[i] = from[i];
  }
}

// What says that a row is none: id -1, source -1, weight 0, behind this rank's rows at every rank.
__device__ void pad_rows(const PushParams& p, const uint32_t* rows_for) {
  const uint64_t topk = p.route.topk;
  for (uint32_t peer = 0; peer < p.seat.ranks; ++peer) {
    const uint32_t used = rows_for[peer];
    if (used >= p.seat.bound) continue;
    uint8_t* window = window_of(p.seat, peer);
    const uint64_t first = p.row_base + used, count = p.seat.bound - used;
    auto* ids = reinterpret_cast<int32_t*>(window + p.to_ids) + first * topk;
    auto* weights = reinterpret_cast<float*>(window + p.to_weights) + first * topk;
    auto* source = reinterpret_cast<int2*>(window + p.to_source) + first;
    const uint64_t start = blockIdx.x * kMoveThreads + threadIdx.x, step = p.pad_blocks * kMoveThreads;
    for (uint64_t i = start; i < count * topk; i += step) ids[i] = -1, weights[i] = 0.0f;
    for (uint64_t i = start; i < count; i += step) source[i] = make_int2(-1, -1);
  }
}

// Where a token goes, a destination a lane: its window, and the row there among this rank's.
struct Lane {
  uint8_t* window;
  uint32_t row;
};

// A warp's job: a piece of a token's row, or the rows beside it.
struct Job {
  uint32_t token;
  uint32_t part;
  int4 value[kLaneVectors];
};

__device__ __forceinline__ Job take_job(const PushParams& p, uint32_t number) {
  Job job;
  job.token = number / p.jobs;
  job.part = number - job.token * p.jobs;
  const uint32_t begin = job.part * p.piece, end = job.part == p.jobs - 1 ? 0 : min(begin + p.piece, p.vectors);
  const uint8_t* from = p.tokens + job.token * p.token_stride;
#pragma unroll
  for (uint32_t u = 0; u < kLaneVectors; ++u) {
    const uint32_t vector = begin + 32 * u + threadIdx.x % 32;
    if (vector < end) job.value[u] = ptx::ld_stream(from + 16ull * vector);
  }
  return job;
}

// The row is on its way while the routing is looked at. `count`: tokens before `counted`.
__device__ __forceinline__ void move_job(const PushParams& p, const Job& job, const uint32_t* count, uint32_t counted) {
  const Seat& seat = p.seat;
  const Route& route = p.route;
  const uint32_t lane = threadIdx.x % 32, token = job.token, part = job.part;
  const bool publishes = p.flags & kPublishes, routes = p.flags & kPlaces;
  const bool beside = part == p.jobs - 1;
  const uint32_t begin = part * p.piece, end = beside ? 0 : min(begin + p.piece, p.vectors);

  uint32_t n = 1;
  Lane to{nullptr, 0};
  if (routes) {
    uint32_t found = 0;
    for (uint32_t base = 0; base < seat.ranks; base += 32) {
      const uint32_t ranks = ranks_of(route, token, base);
      // This lane's rank, and its row there: the block's count of earlier tokens, and those since.
      const uint32_t rank = base + lane;
      uint32_t row = token;
      if (count != nullptr && rank < seat.ranks) {
        row = count[rank];
        for (uint32_t since = counted; since < token; ++since) row += ranks_of(route, since, base) >> lane & 1;
      }
      // The i-th of the token's ranks goes to lane i.
      uint32_t i = found;
      for (uint32_t rest = ranks; rest != 0; rest &= rest - 1, ++i) {
        const uint32_t bit = __ffs(rest) - 1;
        const uint32_t its_row = __shfl_sync(~0u, row, bit);
        if (lane != i) continue;
        to = Lane{window_of(seat, base + bit), its_row};
        if (beside) {
          const uint64_t at = static_cast<uint64_t>(token) * route.fanout + lane;
          route.target_ranks[at] = base + bit;
          if (route.target_rows != nullptr) route.target_rows[at] = its_row;
        }
      }
      found += __popc(ranks);
    }
    n = found;
    if (beside && lane >= n && lane < route.fanout) {
      route.target_ranks[static_cast<uint64_t>(token) * route.fanout + lane] = -1;
    }
  } else if (!publishes) {
    const uint64_t at = static_cast<uint64_t>(token) * route.fanout + lane;
    const int32_t rank = lane < route.fanout ? route.target_ranks[at] : -1;
    const int32_t row = lane < route.fanout ? route.target_rows[at] : 0;
    if (rank >= 0) to = Lane{window_of(seat, rank), static_cast<uint32_t>(row)};
    n = __popc(__ballot_sync(~0u, rank >= 0));
  }
  if (publishes) n = 1, to = Lane{window_of(seat, seat.rank), token};

  if (!beside) {
    const uint64_t row_bytes = 16ull * p.vectors;
    uint8_t* row = to.window + p.to_tokens + (p.row_base + to.row) * row_bytes + 16ull * (begin + lane);
    for (uint32_t i = 0; i < n; ++i) {
      auto* at = reinterpret_cast<uint8_t*>(__shfl_sync(~0u, reinterpret_cast<uint64_t>(row), i));
      // The address is lane i's; every lane is its own number of vectors from there.
      at += 16 * (static_cast<int32_t>(lane) - static_cast<int32_t>(i));
#pragma unroll
      for (uint32_t u = 0; u < kLaneVectors; ++u) {
        if (begin + 32 * u + lane < end) ptx::st_row(at + 512 * u, job.value[u]);
      }
    }
    return;
  }

  int32_t id = -1;
  float weight = 0.0f;
  const uint32_t bad = keep_choices(route, token, id, weight);
  if (bad != 0 && lane == 0) {
    ptx::add_relaxed_gpu(&seat.slot->bad_ids, bad);
    ptx::add_relaxed_gpu(&seat.shared->counters[kBadIds], bad);
  }
  const uint32_t topk = route.topk;
  for (uint32_t first = 0; first < n * topk; first += 32) {
    const uint32_t j = first + lane, i = j / max(topk, 1u), k = j - i * topk;
    auto* window = reinterpret_cast<uint8_t*>(__shfl_sync(~0u, reinterpret_cast<uint64_t>(to.window), i % 32));
    const uint32_t row = __shfl_sync(~0u, to.row, i % 32);
    const int32_t its_id = __shfl_sync(~0u, id, k % 32);
    const float its_weight = __shfl_sync(~0u, weight, k % 32);
    if (j >= n * topk) continue;
    const uint64_t at = (p.row_base + row) * topk + k;
    reinterpret_cast<int32_t*>(window + p.to_ids)[at] = its_id;
    reinterpret_cast<float*>(window + p.to_weights)[at] = its_weight;
  }
  if (lane < n && !publishes) {
    reinterpret_cast<int2*>(to.window + p.to_source)[p.row_base + to.row] = make_int2(seat.rank, token);
  }
  for (uint32_t copy = 0; copy < n * p.sides; ++copy) {
    const uint32_t i = copy % n;
    auto* window = reinterpret_cast<uint8_t*>(__shfl_sync(~0u, reinterpret_cast<uint64_t>(to.window), i));
    const uint32_t row = __shfl_sync(~0u, to.row, i);
    copy_side(p.side[copy / n], token, window, publishes ? 0 : seat.rank, row, seat.bound, lane);
  }
}

// count[r] = tokens before `end` that go to rank r. A block calls it. What follows a2a_route waits for it in here, and
// counts its own chunk meanwhile.
__device__ __forceinline__ void count_before(const PushParams& p, uint32_t end, uint32_t* count) {
  const Route& route = p.route;
  const uint32_t ranks = p.seat.ranks;
  for (uint32_t rank = threadIdx.x; rank < ranks; rank += kMoveThreads) count[rank] = 0;
  __syncthreads();
  const uint32_t chunks = route.chunks != nullptr ? end / kChunk : 0;
  count_tokens(route, ranks, chunks * kChunk, end, count);
  if (p.flags & kFollows) ptx::wait_prerequisites();
  count_chunks(route, ranks, chunks, count);
  __syncthreads();
}

extern "C" __global__ void __launch_bounds__(kMoveThreads, 4) a2a_push(const __grid_constant__ PushParams p) {
  extern __shared__ uint32_t count[];
  __shared__ Meeting meeting;
  const Seat& seat = p.seat;
  const Route& route = p.route;
  Slot& slot = *seat.slot;
  const uint32_t tid = threadIdx.x;
  const bool publishes = p.flags & kPublishes, places = p.flags & kPlaces, waits = p.flags & kWaits;
  const bool pads = blockIdx.x < p.pad_blocks;

  // Jobs of a block follow one another, those of its warps alternate.
  const uint32_t start = (blockIdx.x - p.pad_blocks) * p.block_jobs;
  const uint32_t end = pads ? 0 : min(start + p.block_jobs, route.tokens * p.jobs);
  uint32_t number = pads ? 0 : start + tid / 32;
  Job job;
  if (number < end) job = take_job(p, number);
  const uint32_t counted = pads ? 0 : start / p.jobs;

  // Where rows have places already, and where blocks write padding, which needs all counts, this is not needed.
  const bool counts = places && !publishes && !pads;
  if (counts && counted != 0) {
    count_before(p, counted, count);
  } else {
    if (counts) {
      for (uint32_t rank = tid; rank < seat.ranks; rank += kMoveThreads) count[rank] = 0;
      __syncthreads();
    }
    if (p.flags & kFollows) ptx::wait_prerequisites();
  }
  const uint32_t closed = slot.closed, state = slot.state;
  const bool goes = closed == 0 && (state == kIdle || state == kOpened);
  if (goes) {
    while (number < end) {
      move_job(p, job, publishes ? nullptr : count, counted);
      number += kMoveWarps;
      if (number < end) job = take_job(p, number);
    }
  }
  __syncthreads();
  if (!pads) {
    if (tid == 0) ptx::arrive_gpu(&slot.arrived);
    return;
  }

  const uint32_t epoch = slot.epoch + 1;
  const uint64_t sequence = slot.sequence + 1;
  if (goes) {
    if (blockIdx.x == 0) tell_shape(seat, p.receive, epoch);
    if (places) {
      count_before(p, route.tokens, count);
      if (blockIdx.x == 0) {
        for (uint32_t peer = tid; peer < seat.ranks; peer += kMoveThreads) route.rows_for[peer] = count[peer];
      }
    } else if (!publishes) {
      for (uint32_t peer = tid; peer < seat.ranks; peer += kMoveThreads) count[peer] = route.rows_for[peer];
    }
    __syncthreads();
    // Only pushed rows have padding that the source writes.
    if (!publishes) pad_rows(p, count);
  }
  __syncthreads();
  if (blockIdx.x != 0) {
    if (tid == 0) ptx::arrive_gpu(&slot.arrived);
    return;
  }
  if (!goes) {
    // Nothing was stored; the count is taken back once it is whole.
    while (!__syncthreads_or(tid == 0 && ptx::ld_acquire_gpu(&slot.arrived) == gridDim.x - 1)) {
    }
    if (tid == 0) slot.arrived = 0, slot.whole = 0;
    if (closed == 0 && tid == 0) refuse_order(seat, kDispatch, state);
    if (waits) void_status(seat, p.receive.status);
    return;
  }
  const uint64_t started = p.flags & kWasOpened ? slot.started : ptx::globaltimer();
  const Sent sent{publishes ? nullptr : count, route.tokens};
  if (tid == 0) {
    uint64_t rows = 0;
    for (uint32_t peer = 0; peer < seat.ranks && !publishes; ++peer) rows += count[peer];
    uint64_t* counters = seat.shared->counters;
    ptx::add_relaxed_gpu(counters + kDispatches, 1);
    if (publishes) {
      ptx::add_relaxed_gpu(counters + kRowsCopied, route.tokens);
      ptx::add_relaxed_gpu(counters + kBytesCopied, route.tokens * p.receive.wire_bytes);
    } else {
      ptx::add_relaxed_gpu(counters + kRowsPushed, rows);
      ptx::add_relaxed_gpu(counters + kBytesPushed, rows * p.receive.wire_bytes);
      ptx::add_relaxed_gpu(counters + kBytesRemote, (rows - count[seat.rank]) * p.receive.wire_bytes);
    }
  }
  end_dispatch(seat, p.receive, meeting, sent, true, gridDim.x - 1, waits, epoch, sequence, started);
}

extern "C" __global__ void __launch_bounds__(kReceiveThreads, 4) a2a_receive(const __grid_constant__ ReceiveParams p) {
  __shared__ Meeting meeting;
  const Seat& seat = p.seat;
  Slot& slot = *seat.slot;
  const uint32_t closed = slot.closed, state = slot.state;
  if (threadIdx.x == 0) slot.whole = 0;
  if (closed != 0 || state != kDispatchSent || slot.routing != seat.routing) {
    if (closed == 0 && threadIdx.x == 0) refuse_order(seat, kDispatch, state);
    return void_status(seat, p.receive.status);
  }
  end_dispatch(seat, p.receive, meeting, Sent{nullptr, 0}, false, 0, true, slot.epoch, slot.sequence, ptx::globaltimer());
}

extern "C" __global__ void a2a_tell(const __grid_constant__ TellParams p) {
  for (uint32_t i = threadIdx.x; i < p.count; i += blockDim.x) p.to[p.first + i] = p.values[i];
}

}  // namespace a2a
