// Signals, and the one wait of all kernels.
//
// A flag is {epoch, number} in a mailbox of the waiting rank's window, written by its source with release after the
// rows it covers. A wait asks if flag - epoch >= 0 in wrapped arithmetic. A wait that lasts looks now and then for the
// ways it can end without its flags: an abort, ranks at something else, another rank's loss, a dead peer, the deadline
// (the order of src/device/protocol.rs). A step that is given up is told to every rank, its slot closes, and the
// record says why; nothing traps.
#pragma once
#include "ptx.cuh"
#include "window.cuh"

namespace a2a {

// In a build for tests, counts the multiprocessors that a rank's kernels are on at a time, for a call may bound them. A block's
// first thread stands for it.
struct OnSm {
#ifdef A2A_JITTER
  Shared& shared;
  const uint32_t sm;
  __device__ explicit OnSm(const Seat& seat) : shared(*seat.shared), sm(ptx::sm_id() % kSms) {
    if (threadIdx.x != 0 || atomicAdd(&shared.on_sm[sm], 1) != 0) return;
    atomicMax(&shared.most_sms, atomicAdd(&shared.sms, 1) + 1);
  }
  __device__ ~OnSm() {
    if (threadIdx.x == 0 && atomicSub(&shared.on_sm[sm], 1) == 1) atomicSub(&shared.sms, 1);
  }
#else
  __device__ explicit OnSm(const Seat&) {}
#endif
};

// Why a step is given up.
struct Loss {
  uint32_t status;
  uint32_t cause;
  uint32_t peer;
  uint32_t detail;
  uint32_t origin;
  uint64_t expected;
  uint64_t seen;
  uint64_t aux;
};

// Where a slot stands: read at once, and before anything is waited for.
struct Standing {
  uint32_t closed;
  uint32_t state;
  uint32_t epoch;
  uint64_t sequence;
  uint64_t routing;
  uint64_t started;
  uint32_t absent;
  // A dispatch may begin.
  __device__ bool opens() const { return closed == 0 & (state == kIdle | state == kOpened); }
  // A dispatch that has been sent may be received.
  __device__ bool receives(uint64_t by) const { return closed == 0 & state == kDispatchSent & routing == by; }
};
__device__ __forceinline__ Standing standing_of(const Slot& slot) {
  return Standing{slot.closed, slot.state, slot.epoch, slot.sequence, slot.routing, slot.started, slot.absent};
}

// The same behind a2a_open (`follows`), which is waited for only if it may have something to wait for: it has read the slot
// when what follows it starts, and leaves one that is idle as it is.
__device__ __forceinline__ Standing standing_of(const Slot& slot, bool follows) {
  Standing at = standing_of(slot);
  if (follows && at.state != kIdle) {
    ptx::wait_prerequisites();
    at = standing_of(slot);
  }
  return at;
}

// What is being waited for.
struct Wait {
  uint32_t operation;
  uint32_t epoch;
  uint64_t sequence;
  // Peers in the same operation must have the same bound.
  bool compares_bound;
  // The word of a mailbox.
  uint32_t flag;
  // Not null: flags have come, and rows are waited for, as many as this list says of each rank.
  const uint32_t* left = nullptr;
};

// Looking for trouble costs more than a look at the flags.
constexpr uint32_t kPollsPerLook = 64;

// What a block shares while it waits.
struct Meeting {
  unsigned long long best;
  uint64_t word;
  Loss loss;
  uint32_t lost[kMaxRanks / 32];
  uint32_t aborted;
  uint32_t first;
  // Since when rows of ranks that are gone have been missing, or 0.
  uint64_t gone_since;
};

// Rows that a rank sent before it went may still be in FIFOs; to take them is a matter of moments.
constexpr uint64_t kGoneNs = 200'000'000;

__device__ __forceinline__ uint8_t* window_of(const Seat& seat, uint32_t rank) {
  return rank < kNearRanks ? seat.near[rank] : seat.windows[rank];
}
__device__ __forceinline__ uint8_t* mailbox(const Seat& seat, uint32_t window, uint32_t source) {
  return window_of(seat, window) + seat.mailboxes + static_cast<uint64_t>(source) * kMailBytes;
}
// Ranks that take part no more write nothing here, so this rank writes in their place, into its own window: whoever waits there
// waits as ever. `act` is given each of them. What is stored to them beside that goes nowhere, and costs no look at who they
// are while all are there. Threads from `thread` on, a step of `threads`, share it.
template <class Act>
__device__ __forceinline__ void for_absent(const Seat& seat, uint32_t thread, uint32_t threads, const Act& act) {
  const Absent& absent = seat.shared->absent;
#pragma unroll 1
  for (uint32_t rank = thread; rank < seat.ranks; rank += threads) {
    if (absent.has(rank)) act(rank);
  }
}
__device__ __forceinline__ uint64_t* mail64(uint8_t* box, uint32_t field) {
  return reinterpret_cast<uint64_t*>(box + field);
}
__device__ __forceinline__ uint32_t* mail32(uint8_t* box, uint32_t field) {
  return reinterpret_cast<uint32_t*>(box + field);
}

__device__ __forceinline__ uint64_t pack(uint32_t epoch, uint32_t number) {
  return static_cast<uint64_t>(epoch) << 32 | number;
}
__device__ __forceinline__ bool reached(uint64_t flag, uint32_t epoch) {
  return static_cast<int32_t>(static_cast<uint32_t>(flag >> 32) - epoch) >= 0;
}
__device__ __forceinline__ uint64_t progress(uint32_t epoch, uint32_t operation, uint32_t bound) {
  return static_cast<uint64_t>(bound) << 32 | static_cast<uint64_t>(operation) << 28 | (epoch & 0x0fffffffu);
}
// How far a progress word's step is ahead of an epoch: a 28-bit difference, sign-extended.
__device__ __forceinline__ int32_t steps_ahead(uint64_t word, uint32_t epoch) {
  return static_cast<int32_t>((static_cast<uint32_t>(word) - epoch) << 4) >> 4;
}

// A replay is a kind of dispatch, and a record says dispatch.
__device__ __forceinline__ uint32_t recorded(uint32_t operation) { return operation == kReplay ? kDispatch : operation; }

__device__ __forceinline__ bool has_come(const Seat& seat, const Wait& wait, uint32_t source) {
  if (wait.left != nullptr) return *reinterpret_cast<const volatile uint32_t*>(wait.left + source) == 0;
  return reached(ptx::ld_acquire_sys(mail64(mailbox(seat, seat.rank, source), wait.flag)), wait.epoch);
}

__device__ __forceinline__ uint32_t mask_words(uint32_t ranks) { return (ranks + 63) / 64; }

// Gives the step up: closes the slot, tells every rank, writes the record. The whole block calls it; `meeting` holds
// why, and the ranks that are given up on.
__device__ __forceinline__ void lose(const Seat& seat, const Wait& wait, Meeting& meeting) {
  __syncthreads();
  const Loss& loss = meeting.loss;
  if (threadIdx.x == 0) meeting.first = ptx::cas_relaxed_gpu(&seat.slot->closed, 0, loss.status) == 0;
  __syncthreads();
  if (!meeting.first) return;
  const uint32_t words = mask_words(seat.ranks);
#pragma unroll 1
  for (uint32_t peer = threadIdx.x; peer < seat.ranks; peer += blockDim.x) {
    uint8_t* window = window_of(seat, peer);
    auto* mask = reinterpret_cast<uint64_t*>(window + seat.loss_masks) + static_cast<uint64_t>(seat.rank) * words;
#pragma unroll 1
    for (uint32_t i = 0; i < words; ++i) {
      ptx::st_relaxed_sys(mask + i, static_cast<uint64_t>(meeting.lost[2 * i + 1]) << 32 | meeting.lost[2 * i]);
    }
    uint8_t* box = mailbox(seat, peer, seat.rank);
    ptx::st_relaxed_sys(mail32(box, kLossOrigin), loss.origin);
    ptx::st_release_sys(mail64(box, kLoss),
                        kGeneration << 48 | static_cast<uint64_t>(loss.status) << 32 | wait.epoch);
  }
#pragma unroll 1
  for (uint32_t i = threadIdx.x; i < kMaxRanks / 32; i += blockDim.x) {
    seat.slot->lost[i] = meeting.lost[i];
    ptx::st_relaxed_sys(&seat.record->lost[i], meeting.lost[i]);
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    ptx::add_relaxed_gpu(&seat.shared->counters[kStepsLost], 1);
    Record& record = *seat.record;
    record.order = ptx::count_gpu(&seat.shared->records);
    record.status = loss.status;
    record.cause = loss.cause;
    record.operation = recorded(wait.operation);
    record.peer = loss.peer;
    record.detail = loss.detail;
    record.origin = loss.origin;
    record.sequence = wait.sequence;
    record.expected = loss.expected;
    record.seen = loss.seen;
    record.aux = loss.aux;
    ptx::st_release_sys(&record.valid, 1);
  }
}

__device__ __forceinline__ void mark(Meeting& meeting, uint32_t rank) {
  atomicOr(&meeting.lost[rank / 32], 1u << rank % 32);
}

// A peer in one of the two kinds of dispatch waits for a peer in the other.
__device__ __forceinline__ bool replay_differs(uint32_t mine, uint32_t theirs) {
  return (mine == kDispatch && theirs == kReplay) || (mine == kReplay && theirs == kDispatch);
}

// What a look for trouble finds.
enum class Trouble { kNone, kAborted, kLoss };

// Ranks that do something else, and in what, into `meeting`.
__device__ __forceinline__ bool find_disagreement(const Seat& seat, const Wait& wait, Meeting& meeting) {
  const uint64_t none = ~0ull;
  uint64_t key = none, word = 0;
#pragma unroll 1
  for (uint32_t peer = threadIdx.x; peer < seat.ranks && wait.left == nullptr; peer += blockDim.x) {
    const uint64_t now = ptx::ld_acquire_sys(mail64(mailbox(seat, seat.rank, peer), kProgress));
    const int32_t ahead = steps_ahead(now, wait.epoch);
    const uint32_t operation = now >> 28 & 0xf, theirs = now >> 32;
    const bool here = !has_come(seat, wait, peer);
    const bool bound = wait.compares_bound && ahead == 0 && operation == wait.operation && theirs != seat.bound;
    const bool elsewhere = (operation == kCombine || operation == kRead) && operation != wait.operation;
    const bool differs = ahead == 0 && replay_differs(wait.operation, operation);
    if (bound || differs || (here && (ahead > 0 || (ahead == 0 && elsewhere)))) {
      key = 2ull * peer + (bound ? 0 : 1), word = now;
      break;
    }
  }
  if (!__syncthreads_or(key != none)) return false;
  if (threadIdx.x == 0) meeting.best = none;
#pragma unroll 1
  for (uint32_t i = threadIdx.x; i < kMaxRanks / 32; i += blockDim.x) meeting.lost[i] = 0;
  __syncthreads();
  if (key != none) atomicMin(&meeting.best, key);
  __syncthreads();
  if (key == meeting.best) meeting.word = word;
  const uint32_t peer = meeting.best / 2;
  __syncthreads();
  if (threadIdx.x == 0) {
    mark(meeting, peer);
    const uint64_t at = meeting.word;
    const int64_t ahead = steps_ahead(at, wait.epoch);
    if (meeting.best % 2 == 0) {
      meeting.loss = {kMismatch, kCauseBound, peer, 0, seat.rank, seat.bound, at >> 32, 0};
    } else {
      meeting.loss = {kMismatch, kCauseElsewhere, peer, 0, seat.rank, wait.operation, at >> 28 & 0xf,
                      static_cast<uint64_t>(ahead)};
    }
  }
  return true;
}

// Nobody is marked in `meeting` yet. True if the comm was aborted: the host knows why, and later kernels of the slot end at once.
__device__ __forceinline__ bool begin_looking(const Seat& seat, Meeting& meeting) {
  __syncthreads();
  if (threadIdx.x == 0) {
    meeting.best = ~0ull;
    meeting.aborted = ptx::ld_acquire_sys(&seat.control->aborted);
  }
#pragma unroll 1
  for (uint32_t i = threadIdx.x; i < kMaxRanks / 32; i += blockDim.x) meeting.lost[i] = 0;
  __syncthreads();
  if (meeting.aborted && threadIdx.x == 0) ptx::cas_relaxed_gpu(&seat.slot->closed, 0, kAborted);
  return meeting.aborted != 0;
}

// How long a call of the comm may take by now.
__device__ __forceinline__ uint64_t budget_of(const Seat& seat) {
  const bool first_step = ptx::ld_relaxed_sys(&seat.shared->first_step_done) == 0;
  return ptx::ld_relaxed_sys(first_step ? &seat.control->first_step_ns : &seat.control->step_ns);
}

// Every other way a wait can end without its flags, and why, into `meeting`. The cause is read before the flag is looked at
// once more: a rank that left, died or went on *after* its flag is no loss.
__device__ __forceinline__ Trouble find_cause(const Seat& seat, const Wait& wait, Meeting& meeting, uint64_t started) {
  const uint64_t none = ~0ull;
  if (begin_looking(seat, meeting)) return Trouble::kAborted;

  // Somebody else gave up on the step or an earlier one; a loss of a later step leaves this one to its own flags.
  uint64_t key = none, word = 0;
#pragma unroll 1
  for (uint32_t peer = threadIdx.x; peer < seat.ranks; peer += blockDim.x) {
    if (peer == seat.rank) continue;
    const uint64_t loss = ptx::ld_acquire_sys(mail64(mailbox(seat, seat.rank, peer), kLoss));
    const bool later = static_cast<int32_t>(static_cast<uint32_t>(loss) - wait.epoch) > 0;
    if (loss >> 48 == kGeneration && !later) {
      key = peer, word = loss;
      break;
    }
  }
  if (key != none) atomicMin(&meeting.best, key);
  bool missing = false;
#pragma unroll 1
  for (uint32_t peer = threadIdx.x; peer < seat.ranks; peer += blockDim.x) missing |= !has_come(seat, wait, peer);
  missing = __syncthreads_or(missing);
  if (!missing) return Trouble::kNone;
  if (meeting.best != none) {
    if (key == meeting.best) meeting.word = word;
    const uint32_t observer = meeting.best;
    const uint32_t words = mask_words(seat.ranks);
    const auto* mask = reinterpret_cast<const uint64_t*>(window_of(seat, seat.rank) + seat.loss_masks) +
                       static_cast<uint64_t>(observer) * words;
#pragma unroll 1
    for (uint32_t i = threadIdx.x; i < words; i += blockDim.x) {
      const uint64_t lost = ptx::ld_relaxed_sys(mask + i);
      meeting.lost[2 * i] = static_cast<uint32_t>(lost), meeting.lost[2 * i + 1] = static_cast<uint32_t>(lost >> 32);
    }
    __syncthreads();
    uint32_t first = observer;
#pragma unroll 1
    for (uint32_t i = 0; i < 2 * words; ++i) {
      if (meeting.lost[i] != 0) {
        first = 32 * i + __ffs(meeting.lost[i]) - 1;
        break;
      }
    }
    // Word may have come through a third rank: the first is the one to ask.
    const uint32_t origin = ptx::ld_relaxed_sys(mail32(mailbox(seat, seat.rank, observer), kLossOrigin));
    const uint64_t seen = ptx::ld_relaxed_sys(mail64(mailbox(seat, seat.rank, first), wait.flag)) >> 32;
    if (threadIdx.x == 0) {
      const uint32_t status = meeting.word >> 32 & 0xffff;
      meeting.loss = {status, kCauseGaveUp, first, 0, origin, wait.epoch, seen, 0};
    }
    return Trouble::kLoss;
  }

  // Ranks that can send nothing more, then the deadline.
  __syncthreads();
  const auto* gone = reinterpret_cast<const uint32_t*>(window_of(seat, seat.rank));
#pragma unroll 1
  for (uint32_t peer = threadIdx.x; peer < seat.ranks; peer += blockDim.x) {
    uint32_t why = ptx::ld_acquire_sys(gone + peer);
    if (why == 0) why = ptx::ld_acquire_sys(&seat.control->dead[peer]);
    if (why != 0 && !has_come(seat, wait, peer)) {
      mark(meeting, peer);
      atomicMin(&meeting.best, 8ull * peer + why);
    }
  }
  __syncthreads();
  if (meeting.best != none && wait.left != nullptr) {
    if (threadIdx.x == 0 && meeting.gone_since == 0) meeting.gone_since = ptx::globaltimer();
    const bool waits = __syncthreads_or(threadIdx.x == 0 && ptx::globaltimer() - meeting.gone_since < kGoneNs);
    if (waits) return Trouble::kNone;
  }
  if (meeting.best != none) {
    const uint32_t peer = meeting.best / 8;
    const uint64_t seen = ptx::ld_relaxed_sys(mail64(mailbox(seat, seat.rank, peer), wait.flag)) >> 32;
    if (threadIdx.x == 0) {
      const uint32_t why = meeting.best % 8;
      meeting.loss = {kPeerLost, kCauseGone, peer, why, seat.rank, wait.epoch, seen, 0};
    }
    return Trouble::kLoss;
  }
  const uint64_t budget = budget_of(seat);
  const bool late = __syncthreads_or(threadIdx.x == 0 && ptx::globaltimer() - started >= budget);
  if (!late) return Trouble::kNone;
#pragma unroll 1
  for (uint32_t peer = threadIdx.x; peer < seat.ranks; peer += blockDim.x) {
    if (!has_come(seat, wait, peer)) {
      mark(meeting, peer);
      atomicMin(&meeting.best, static_cast<unsigned long long>(peer));
    }
  }
  __syncthreads();
  if (meeting.best == none) return Trouble::kNone;
  const uint32_t peer = meeting.best;
  const uint64_t seen = ptx::ld_relaxed_sys(mail64(mailbox(seat, seat.rank, peer), wait.flag)) >> 32;
  if (threadIdx.x == 0) meeting.loss = {kTimeout, kCauseLate, peer, 0, seat.rank, wait.epoch, seen, budget};
  return Trouble::kLoss;
}

// What ends a wait. Ranks that do something else are named before any loss, so that each side of a disagreement says it, and
// looked for behind it, because a rank that gave up or left for it had said before what it was at.
__device__ __forceinline__ Trouble find_trouble(const Seat& seat, const Wait& wait, Meeting& meeting, uint64_t started) {
  const Trouble cause = find_cause(seat, wait, meeting, started);
  if (cause == Trouble::kAborted) return cause;
  __syncthreads();
  return find_disagreement(seat, wait, meeting) ? Trouble::kLoss : cause;
}

// The same; false if there is trouble, for which the step is then given up.
__device__ __forceinline__ bool look_for_trouble(const Seat& seat, const Wait& wait, Meeting& meeting, uint64_t started) {
  const Trouble trouble = find_trouble(seat, wait, meeting, started);
  if (trouble == Trouble::kLoss) lose(seat, wait, meeting);
  __syncthreads();
  return trouble == Trouble::kNone;
}

// What an operation's age is counted in.
__device__ __forceinline__ uint32_t ticks() { return static_cast<uint32_t>(ptx::globaltimer() >> 20); }
// Of 1.05 ms: half of what the host gives every operation at least (SPARED, transport/nccl/watch.rs).
constexpr uint32_t kYoung = 10;

// Tells the host that the slot's next operation may begin to wait for the peers: an operation's word
// is its number, twice, + 1 before the comm's first step is done. One thread.
__device__ __forceinline__ void mark_begin(const Seat& seat, uint64_t* marks) {
  Slot& slot = *seat.slot;
  const bool first = ptx::ld_relaxed_sys(&seat.shared->first_step_done) == 0;
  slot.operation = static_cast<uint64_t>((slot.operation >> 1) + 1) << 1 | first;
  ptx::st_relaxed_sys(marks, slot.operation);
}
// If the host has ended the operation that began last, or one before: it says which, and for good once it is done.
__device__ __forceinline__ bool is_broken(const Slot& slot, const uint64_t* marks) {
  const uint64_t broken = ptx::ld_relaxed_sys(marks + 2);
  return broken == slot.operation || broken == ~0ull;
}
// The operation that began last has come to its end: false if because the host has ended it, and nothing of what it brought
// counts. The host ends none that is young, which saves fetching its word: an operation is as old as its half, which a kernel
// says that goes (`begun`). At least one of the two sees what the other has done. One thread.
__device__ __forceinline__ bool mark_end(const Slot& slot, uint64_t* marks) {
  ptx::st_relaxed_sys(marks + 1, slot.operation);
  if (ticks() - slot.begun < kYoung) return true;
  ptx::fence_sc_sys();
  return !is_broken(slot, marks);
}

// Where collectives carry the flags, the host ends one that does not come to its end, and nothing of the step counts then,
// whatever part of it has come: gives the step up, if so. A whole block calls it.
__device__ __forceinline__ bool lose_if_broken(const Seat& seat, const Wait& wait, const uint64_t* marks, Meeting& meeting) {
  if (!__syncthreads_or(is_broken(*seat.slot, marks))) return false;
  if (begin_looking(seat, meeting)) return true;
#pragma unroll 1
  for (uint32_t peer = threadIdx.x; peer < seat.ranks; peer += blockDim.x) {
    if (ptx::ld_acquire_sys(&seat.control->dead[peer]) == 0) continue;
    mark(meeting, peer);
    atomicMin(&meeting.best, static_cast<unsigned long long>(peer));
  }
  __syncthreads();
  const bool gone = meeting.best != ~0ull;
  // A collective does not say whom it waited for.
#pragma unroll 1
  for (uint32_t peer = threadIdx.x; peer < seat.ranks && !gone; peer += blockDim.x) {
    if (peer != seat.rank) mark(meeting, peer);
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    const uint32_t peer = gone ? meeting.best : seat.rank == 0 ? 1 : 0;
    if (gone) {
      meeting.loss = {kPeerLost, kCauseGone, peer, 5, seat.rank, wait.epoch, 0, 0};
    } else {
      meeting.loss = {kTimeout, kCauseLate, peer, 0, seat.rank, wait.epoch, 0, budget_of(seat)};
    }
  }
  lose(seat, wait, meeting);
  return true;
}

// Waits, as a block, until every rank's flag has reached the epoch; false if the step is lost. `started`: when the
// call's first wait began.
__device__ __forceinline__ bool await(const Seat& seat, const Wait& wait, Meeting& meeting, uint64_t started) {
  for (uint32_t polls = 1;; ++polls) {
    bool here = true;
#pragma unroll 1
    for (uint32_t source = threadIdx.x; source < seat.ranks; source += blockDim.x) {
      here &= has_come(seat, wait, source);
    }
    if (__syncthreads_and(here)) break;
    if (polls % kPollsPerLook == 0 && !look_for_trouble(seat, wait, meeting, started)) return false;
  }
  if (threadIdx.x == 0) ptx::add_relaxed_gpu(&seat.shared->counters[kHops], 1);
  return true;
}

// While a block's last warp raises this rank's flags, the warps before it look for those of the peers. A block has two warps
// at least.
struct Roles {
  bool raises;
  bool looks;
  // Those that look: how many, and this one's number.
  uint32_t lookers;
  uint32_t looker;
};
__device__ __forceinline__ Roles roles_of(uint32_t ranks) {
  const uint32_t lookers = min(blockDim.x - 32, (ranks + 31) / 32 * 32), first = blockDim.x - 32 - lookers;
  const bool raises = threadIdx.x >= blockDim.x - 32;
  return Roles{raises, !raises && threadIdx.x >= first, lookers, threadIdx.x - first};
}

// A loss for a difference that one peer's words show; the first peer's, if several threads found one. The whole block
// calls it with what each thread found (`key` of none: nothing); true if anybody did.
__device__ __forceinline__ bool lose_for(const Seat& seat, const Wait& wait, Meeting& meeting, unsigned long long key,
                                      const Loss& mine) {
  __syncthreads();
  if (threadIdx.x == 0) meeting.best = ~0ull;
#pragma unroll 1
  for (uint32_t i = threadIdx.x; i < kMaxRanks / 32; i += blockDim.x) meeting.lost[i] = 0;
  __syncthreads();
  if (key != ~0ull) atomicMin(&meeting.best, key);
  __syncthreads();
  if (meeting.best == ~0ull) return false;
  if (key == meeting.best) {
    meeting.loss = mine;
    mark(meeting, mine.peer);
  }
  lose(seat, wait, meeting);
  return true;
}

// The status of a step: four words, then the ranks that are marked in `lost` (null: none).
__device__ __forceinline__ void write_status(int32_t* status, uint32_t ranks, int4 words, const uint32_t* lost) {
  if (status == nullptr) return;
  if (threadIdx.x == 0) status[0] = words.x, status[1] = words.y, status[2] = words.z, status[3] = words.w;
#pragma unroll 1
  for (uint32_t rank = threadIdx.x; rank < ranks; rank += blockDim.x) {
    status[4 + rank] = lost != nullptr && (lost[rank / 32] >> rank % 32 & 1);
  }
}

__device__ __forceinline__ void void_status(const Seat& seat, int32_t* status) {
  __syncthreads();
  write_status(status, seat.ranks, make_int4(kStepVoid, 0, 0, 0), seat.slot->lost);
}

// Says once, in the slot's second record, that its state does not allow a half; nothing else happens. One thread.
__device__ __forceinline__ void refuse_order(const Seat& seat, uint32_t operation, uint32_t state) {
  Record& record = seat.record[1];
  if (record.valid != 0) return;
  record.order = ptx::count_gpu(&seat.shared->records);
  record.status = kInvalidArgument;
  record.cause = kCauseOrder;
  record.operation = recorded(operation);
  record.peer = seat.rank;
  record.detail = state;
  record.origin = seat.rank;
  record.sequence = seat.slot->sequence;
  ptx::st_release_sys(&record.valid, 1);
}

}  // namespace a2a
