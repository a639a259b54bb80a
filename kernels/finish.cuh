// The end of a dispatch, by one block: this rank's flags up once all that they cover is stored, the peers' awaited, shapes
// compared, counts handed out.
#pragma once
#include "wait.cuh"

namespace a2a {

// All but the flag, which says that the rows are there: a peer looks at the rest once the flag has come. A warp calls it.
__device__ __forceinline__ void tell_shape(const Seat& seat, const Receive& receive, uint32_t epoch, bool absent) {
  const uint32_t operation = seat.replays ? kReplay : kDispatch;
  const auto tell = [&](uint8_t* box) {
    auto* shape = reinterpret_cast<uint4*>(box + kDispatchShape);
#pragma unroll
    for (uint32_t i = 0; i < kShapeWords / 4; ++i) {
      const uint32_t* words = receive.shape + 4 * i;
      shape[i] = make_uint4(words[0], words[1], words[2], words[3]);
    }
    *reinterpret_cast<uint2*>(box + kTokens) = make_uint2(receive.tokens, seat.replays);
    ptx::st_relaxed_sys(mail64(box, kDispatchPair) + 1, pack(epoch, receive.digest));
    ptx::st_relaxed_sys(mail64(box, kProgress), progress(epoch, operation, seat.bound));
  };
#pragma unroll 1
  for (uint32_t peer = threadIdx.x % 32; peer < seat.ranks; peer += 32) tell(mailbox(seat, peer, seat.rank));
  if (absent) for_absent(seat, threadIdx.x % 32, 32, [&](uint32_t rank) { tell(mailbox(seat, seat.rank, rank)); });
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
  if (replays != seat.replays) {
    return Loss{kMismatch, kCauseReplay, source, 0, seat.rank, min(seat.replays, 1u), min(replays, 1u), 0};
  }
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
__device__ __forceinline__ void count_sent(const Seat& seat, const Receive& receive, const uint32_t* sent,
                                           uint64_t row_bytes, uint32_t moved) {
  uint64_t* counters = seat.shared->counters;
  ptx::add_relaxed_gpu(counters + kDispatches, 1);
  if (sent == nullptr) {
    ptx::add_relaxed_gpu(counters + kRowsCopied, receive.tokens);
    ptx::add_relaxed_gpu(counters + kBytesCopied, receive.tokens * row_bytes);
    return;
  }
  uint64_t rows = 0;
#pragma unroll 1
  for (uint32_t peer = 0; peer < seat.ranks; ++peer) rows += sent[peer];
  ptx::add_relaxed_gpu(counters + moved, rows);
  ptx::add_relaxed_gpu(counters + moved + 1, rows * row_bytes);
  ptx::add_relaxed_gpu(counters + kBytesRemote, (rows - sent[seat.rank]) * row_bytes);
}

// What everybody's counts come to, where rows are (token, expert) pairs.
struct Totals {
  // Rows of the fullest of this rank's experts; rows that this rank receives, and that are dropped here; rows of this
  // rank's that are dropped elsewhere.
  uint32_t demand;
  uint32_t rows;
  uint32_t dropped;
  uint32_t missing;
  // Ranks that would receive too many, and if there is one.
  uint32_t over[kMaxRanks / 32];
  uint32_t exceeded;
  // What the first of them would receive.
  uint32_t over_demand;
};

// The first rank that would receive too many rows; there is one.
__device__ __forceinline__ uint32_t first_over(const Totals& totals) {
  uint32_t rank = 0;
  while (!(totals.over[rank / 32] >> rank % 32 & 1)) ++rank;
  return rank;
}

// The same from the lists of a routing, if they are those of this step. The block calls it. A step that was void for its rows
// is so again; `over_demand` is what the first such rank would have received, where the lists say that.
__device__ __forceinline__ void read_totals(const Seat& seat, const int32_t* summary, const int32_t* kept_counts,
                                            Totals& totals) {
  const uint32_t tid = threadIdx.x;
#pragma unroll 1
  for (uint32_t i = tid; i < kMaxRanks / 32; i += blockDim.x) totals.over[i] = 0;
  __syncthreads();
  if (tid == 0) {
    totals.rows = totals.exceeded = 0;
    totals.demand = summary[0], totals.dropped = summary[1], totals.missing = summary[2];
    const int32_t dropped = summary[1];
    if (dropped < 0) {
      totals.exceeded = 1, totals.over[~dropped / 32] = 1u << ~dropped % 32, totals.over_demand = totals.missing;
    }
  }
  __syncthreads();
#pragma unroll 1
  for (uint32_t rank = tid; rank < seat.ranks; rank += blockDim.x) {
    atomicAdd(&totals.rows, static_cast<uint32_t>(kept_counts[rank]));
  }
  __syncthreads();
}

// What was found by counts by rank, and the outputs that follow from it alone. The block calls it.
__device__ __forceinline__ void hand_out_sums(const FinishParams& p, Totals& totals) {
  const Seat& seat = p.seat;
  const Receive& receive = p.receive;
  read_totals(seat, p.summary, receive.kept_counts, totals);
  if (threadIdx.x == 0 && p.flags & kEnds) totals.rows = p.summary[3];
#pragma unroll 1
  for (uint32_t rank = threadIdx.x; rank < seat.ranks && totals.exceeded; rank += blockDim.x) {
    const uint32_t demand = p.demands[rank];
    if (demand > p.limit) atomicOr(&totals.over[rank / 32], 1u << rank % 32);
    if (rank == static_cast<uint32_t>(~p.summary[1])) totals.over_demand = demand;
  }
#pragma unroll 1
  for (uint32_t rank = threadIdx.x; rank < seat.ranks && receive.rank_counts != nullptr; rank += blockDim.x) {
    receive.rank_counts[rank] = receive.kept_counts[rank];
  }
#pragma unroll 1
  for (uint32_t i = threadIdx.x; receive.expert_counts != nullptr && i < receive.local; i += blockDim.x) {
    receive.expert_counts[i] = 0;
  }
  __syncthreads();
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
  // Not null: the rest follows from these, and flags carry what is in banks alone.
  const Totals* totals;
  Ending& end;
  const Standing& at;
  const bool raises;
  const bool waits;
  const uint32_t epoch;
  const uint64_t sequence;
  const Wait wait;
  const Roles role;
  // What this rank's flags carry beside the rows; how they are counted that are sent; what a row takes of the link.
  uint32_t mark = 0;
  uint32_t moved = kRowsPushed;
  uint64_t row_bytes;

  __device__ __forceinline__ Finish(const Seat& seat, const Receive& receive, uint32_t flags, const uint32_t* sent,
                                    const Standing& at, Ending& end, const Totals* totals = nullptr)
      : seat(seat),
        receive(receive),
        sent(sent),
        totals(totals),
        end(end),
        at(at),
        raises(flags & kRaises),
        waits(flags & kWaits),
        epoch(at.epoch + (raises ? 1 : 0)),
        sequence(at.sequence + (raises ? 1 : 0)),
        wait{seat.replays ? kReplay : kDispatch, epoch, sequence, true, kDispatchPair},
        role(roles_of(seat.ranks)),
        row_bytes(receive.wire_bytes) {
  }

  __device__ __forceinline__ bool first_raiser() const { return threadIdx.x == blockDim.x - 32; }
  __device__ __forceinline__ bool is_absent(uint32_t peer) const { return at.absent && seat.shared->absent.has(peer); }
  __device__ __forceinline__ uint32_t rows_for(uint32_t peer) const {
    return sent != nullptr ? sent[peer] : receive.tokens;
  }
  __device__ __forceinline__ bool has_come(const ulonglong2& pair) const {
    return reached(pair.x, epoch) && reached(pair.y, epoch);
  }
  // If the first look saw everybody's flags. The block calls it.
  __device__ __forceinline__ bool all_came(ulonglong2 first) const {
    const bool is_one = role.looks && role.looker < seat.ranks;
    return __syncthreads_and(seat.ranks <= role.lookers && (!is_one || has_come(first)));
  }
  // Moves the slot on. One thread.
  __device__ __forceinline__ void advance(uint32_t state) const {
    Slot& slot = *seat.slot;
    slot.state = state;
    if (!raises) return;
    slot.epoch = epoch, slot.sequence = sequence, slot.routing = seat.routing, slot.whole = 0;
  }
  __device__ __forceinline__ void hand_out(uint32_t source, uint32_t rows) const {
    if (totals != nullptr) {
      if (receive.status != nullptr) receive.status[4 + source] = totals->over[source / 32] >> source % 32 & 1;
      return;
    }
    receive.kept_counts[source] = rows;
    if (receive.rank_counts != nullptr) receive.rank_counts[source] = rows;
    if (receive.status != nullptr) receive.status[4 + source] = 0;
  }

  // For a host that waits: that there are too many rows, and of the first rank that would receive them.
  __device__ __forceinline__ uint64_t too_many() const {
    return kTooMany | static_cast<uint64_t>(first_over(*totals)) << 32 | totals->over_demand;
  }

  __device__ __forceinline__ void raise() const {
#pragma unroll 1
    for (uint32_t peer = threadIdx.x % 32; peer < seat.ranks; peer += 32) {
      ptx::st_release_sys(mail64(mailbox(seat, peer, seat.rank), kDispatchPair), pack(epoch, rows_for(peer) | mark));
    }
    if (at.absent) {
      for_absent(seat, threadIdx.x % 32, 32, [&](uint32_t rank) {
        ptx::st_release_sys(mail64(mailbox(seat, seat.rank, rank), kDispatchPair), pack(epoch, 0));
      });
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
        if (source == seat.rank && raises) continue;
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
      const ulonglong2 pair = source == role.looker ? mine : look(seat, source);
      if (static_cast<uint32_t>(pair.y) != receive.digest) differs = min(differs, 2 * source);
      if (receive.flags & (kTold | kUniform) && !is_absent(source)) {
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
    const bool goes = raises ? at.opens() : at.receives(seat.routing);
    if ((raises || totals != nullptr) && role.raises) ready();
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
      if (tid == 0) count_sent(seat, receive, sent, row_bytes, moved);
      if (first_raiser()) advance(kDispatchSent);
      return;
    }
#pragma unroll 1
    for (uint32_t i = tid; totals == nullptr && receive.expert_counts != nullptr && i < receive.local; i += blockDim.x) {
      receive.expert_counts[i] = 0;
    }
    bool lost = receive.marks != nullptr && lose_if_broken(seat, wait, receive.marks, end.meeting);
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
    const bool exceeded = totals != nullptr && totals->exceeded;
    if (tid == 0 && raises && !exceeded) count_sent(seat, receive, sent, row_bytes, moved);
    if (!first_raiser()) return;
    const uint32_t rows = totals != nullptr ? totals->rows : end.demand + (raises ? rows_for(seat.rank) : 0);
    const uint32_t demand = totals != nullptr ? totals->demand : rows;
    const uint32_t dropped = totals != nullptr && !exceeded ? totals->dropped : 0;
    if (receive.status != nullptr) {
      receive.status[0] = (bad != 0 ? kStepBadId : 0) | (dropped != 0 ? kStepDropped : 0) |
                          (exceeded ? kStepVoid | kStepOverflow : 0);
      receive.status[1] = bad, receive.status[2] = dropped, receive.status[3] = demand;
    }
    if (receive.rows != nullptr) *receive.rows = exceeded ? too_many() : rows;
    advance(exceeded ? kOverflowed : kDispatched);
    slot.whole = !exceeded, slot.bad_ids = 0;
    if (exceeded) return;
    // A second dispatch completes the first step of a comm that never combines.
    if (sequence > 1) seat.shared->first_step_done = 1;
    ptx::add_relaxed_gpu(&seat.shared->counters[kHops], 1);
    if (receive.flags & kGathers) ptx::add_relaxed_gpu(&seat.shared->counters[kRowsGathered], demand);
  }
};

}  // namespace a2a
