// The flags of a combine, out and in, by one block.
#pragma once
#include "wait.cuh"

namespace a2a {

// Raises this rank's flags and waits for the peers'; true if what the experts wrote may be summed. By one block: it owns
// the slot's state, and says what became of the step.
__device__ __forceinline__ bool meet(const MeetParams& p, Meeting& meeting) {
  const Seat& seat = p.seat;
  Slot& slot = *seat.slot;
  const uint32_t tid = threadIdx.x;
  const Standing at = standing_of(slot);
  const uint32_t epoch = at.epoch;
  const bool sends = p.flags & kSends, waits = p.flags & kMeetWaits;
  // The first look is on its way while the slot is looked at.
  uint64_t early = 0;
  const auto look = [&](uint32_t source) {
    return ptx::ld_acquire_sys(mail64(mailbox(seat, seat.rank, source), kCombineFlag));
  };
  const Roles role = roles_of(seat.ranks);
  if (waits && role.looks && role.looker < seat.ranks) early = look(role.looker);
  const bool goes =
      at.closed == 0 & at.state == (sends ? kDispatched : kCombineSent) & at.routing == seat.routing;
  if (!goes) {
    // All have read where the slot stands before that changes.
    __syncthreads();
    if (at.closed == 0 && tid == 0) refuse_order(seat, kCombine, at.state);
    if (tid == 0) slot.whole = 0;
    if (waits) void_status(seat, p.status);
    return false;
  }
  const Wait wait{kCombine, epoch, at.sequence, true, kCombineFlag};
  const uint64_t started = ptx::globaltimer();
  bool here = true;
  unsigned long long key = ~0ull;
  const auto take = [&](uint32_t source, uint64_t flag) {
    here &= reached(flag, epoch);
    if (reached(flag, epoch) && static_cast<uint32_t>(flag) != p.digest && key == ~0ull) key = source;
  };
  if (role.raises) {
    const auto tell = [&](uint8_t* box) {
      *reinterpret_cast<uint4*>(box + kCombineShape) = make_uint4(p.shape[0], p.shape[1], p.shape[2], p.shape[3]);
      ptx::st_relaxed_sys(mail64(box, kProgress), progress(epoch, kCombine, seat.bound));
      ptx::st_release_sys(mail64(box, kCombineFlag), pack(epoch, p.digest));
    };
#pragma unroll 1
    for (uint32_t peer = tid % 32; peer < seat.ranks && sends; peer += 32) tell(mailbox(seat, peer, seat.rank));
    if (at.absent && sends) {
      for_absent(seat, tid % 32, 32, [&](uint32_t rank) { tell(mailbox(seat, seat.rank, rank)); });
    }
  } else if (waits && role.looks) {
    for (uint32_t looks = 0; looks < kPollsPerLook; ++looks) {
      here = true;
#pragma unroll 1
      for (uint32_t source = role.looker; source < seat.ranks; source += role.lookers) {
        if (source == seat.rank && sends) continue;
        take(source, looks != 0 || source != role.looker ? look(source) : early);
      }
      if (ptx::all_of(role.lookers, here)) {
        // What sums may have the device, whether or not this rank's flags are up.
        ptx::launch_dependents();
        break;
      }
    }
  }
  if (!waits) {
    __syncthreads();
    if (tid == 0) slot.state = kCombineSent;
    return true;
  }
  if (p.marks != nullptr && lose_if_broken(seat, wait, p.marks, meeting)) {
    if (tid == 0) slot.whole = 0;
    void_status(seat, p.status);
    return false;
  }
  if (!__syncthreads_and(here)) {
    for (uint32_t polls = 1;; ++polls) {
      here = true;
#pragma unroll 1
      for (uint32_t source = tid; source < seat.ranks; source += blockDim.x) {
        if (source != seat.rank || !sends) take(source, look(source));
      }
      if (__syncthreads_and(here)) break;
      if (polls % kPollsPerLook == 0 && !look_for_trouble(seat, wait, meeting, started)) {
        if (tid == 0) slot.whole = 0;
        void_status(seat, p.status);
        return false;
      }
    }
  }
  if (__syncthreads_or(key != ~0ull)) {
    Loss loss{};
    if (key != ~0ull) {
      const uint32_t peer = static_cast<uint32_t>(key);
      const auto* theirs = reinterpret_cast<const uint32_t*>(mailbox(seat, seat.rank, peer) + kCombineShape);
      loss = Loss{kMismatch, kCauseCombineShape, peer, 0, seat.rank, 0, 0, 0};
      for (uint32_t i = 0; i < 4 && loss.expected == loss.seen; ++i) {
        loss.detail = i, loss.expected = p.shape[i], loss.seen = theirs[i];
      }
    }
    lose_for(seat, wait, meeting, key, loss);
    if (tid == 0) slot.whole = 0;
    void_status(seat, p.status);
    return false;
  }
  if (tid == 0) slot.whole = 1, slot.state = kIdle;
  return true;
}

// Where collectives carry the flags: this rank's, to be carried behind the kernel. By one block.
__device__ __forceinline__ void announce_results(const MeetParams& p) {
  const Seat& seat = p.seat;
  Slot& slot = *seat.slot;
  if (threadIdx.x == 32) mark_begin(seat, p.marks);
  if (threadIdx.x != 0) return;
  const Standing at = standing_of(slot);
  if (!(at.closed == 0 & at.state == kDispatched & at.routing == seat.routing)) {
    if (at.closed == 0) refuse_order(seat, kCombine, at.state);
    slot.whole = 0;
    return;
  }
  uint8_t* box = mailbox(seat, seat.rank, seat.rank);
  *reinterpret_cast<uint4*>(box + kCombineShape) = make_uint4(p.shape[0], p.shape[1], p.shape[2], p.shape[3]);
  *mail64(box, kProgress) = progress(at.epoch, kCombine, seat.bound);
  *mail64(box, kCombineFlag) = pack(at.epoch, p.digest);
  slot.state = kCombineSent, slot.begun = ticks();
}

// What is not as it should be is looked at by who waits elsewhere too: it finds out what. Apart, because code that does not run
// takes time where it lies in between.
__device__ __noinline__ bool meet_slowly(const MeetParams& p, Meeting& meeting) { return meet(p, meeting); }

// The same as `meet` behind the collective, which waited: everything has come that will. By one block.
__device__ __forceinline__ bool meet_behind_collective(const MeetParams& p, Meeting& meeting) {
  const Seat& seat = p.seat;
  Slot& slot = *seat.slot;
  const uint32_t tid = threadIdx.x;
  // One load waits for none of the others: what a warp stores of what it has read holds up all that it reads behind that.
  const Standing at = standing_of(slot);
  bool fine = true;
  if (tid == blockDim.x - 32) fine = mark_end(slot, p.marks);
#pragma unroll 1
  for (uint32_t source = tid; source < seat.ranks; source += blockDim.x) {
    const uint64_t flag = ptx::ld_relaxed_sys(mail64(mailbox(seat, seat.rank, source), kCombineFlag));
    fine &= reached(flag, at.epoch) & static_cast<uint32_t>(flag) == p.digest;
  }
  fine &= at.closed == 0 & at.state == kCombineSent & at.routing == seat.routing;
  if (!__syncthreads_and(fine)) return meet_slowly(p, meeting);
  if (tid == 0) slot.whole = 1, slot.state = kIdle;
  return true;
}

// Ranks that take part.
__device__ __forceinline__ uint32_t present(const Seat& seat) {
  uint32_t ranks = seat.ranks;
#pragma unroll 1
  for (uint32_t i = 0; i < kMaxRanks / 32 && seat.slot->absent; ++i) ranks -= __popc(seat.shared->absent.ranks[i]);
  return ranks;
}

// What a combine came to, once its flags have come.
__device__ __forceinline__ void settle(const MeetParams& p) {
  const Seat& seat = p.seat;
  const int32_t missing = p.summary != nullptr ? p.summary[2] : 0;
  write_status(p.status, seat.ranks, make_int4(missing != 0 ? kStepDropped : 0, 0, missing, 0), nullptr);
  if (threadIdx.x != 0) return;
  seat.shared->first_step_done = 1;
  // Collectives carry rows of all.
  uint64_t rows = static_cast<uint64_t>(p.tokens) * (p.marks != nullptr ? seat.ranks : present(seat)), mine = p.tokens;
  // Those that go through FIFOs count where they come from.
  const bool sends = p.flags & (kThroughFifos | kResultsPosted);
  const int32_t* moved = sends ? p.kept_counts : p.rows_for;
  // Messages bring every rank's rows.
  if (!(p.flags & kEveryone) && p.marks == nullptr) {
    rows = 0, mine = moved[seat.rank];
    for (uint32_t peer = 0; peer < seat.ranks; ++peer) rows += moved[peer];
  }
  uint64_t* counters = seat.shared->counters;
  ptx::add_relaxed_gpu(counters + kCombines, 1);
  ptx::add_relaxed_gpu(counters + kHops, 1);
  const uint32_t way = !sends ? kRowsPulled : p.flags & kThroughFifos ? kRowsFifo : kRowsPushed;
  ptx::add_relaxed_gpu(counters + way, rows);
  ptx::add_relaxed_gpu(counters + way + 1, rows * p.result_bytes);
  ptx::add_relaxed_gpu(counters + kBytesRemote, (rows - mine) * p.result_bytes);
  if (p.staged_bytes == 0) return;
  uint64_t staged = 0;
  for (uint32_t source = 0; source < seat.ranks; ++source) staged += p.kept_counts[source];
  ptx::add_relaxed_gpu(counters + kRowsCopied, staged);
  ptx::add_relaxed_gpu(counters + kBytesCopied, staged * p.staged_bytes);
}

}  // namespace a2a
