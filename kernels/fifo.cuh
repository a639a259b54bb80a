// FIFOs: rows from the caller's tensors to the caller's tensors, through a few entries in the receiver's window.
//
// A rank has a FIFO for each source and slot. Rows are numbered, from when the comm began; row n is in entry n % rows. A row is
// some pieces, and each piece of an entry has a word in the receiver's window, by which its source says which row's piece is
// there; each entry has one in the source's, by which the receiver says which row it has taken altogether. So any warp may write
// any piece for whose row there is room, or take any that is there, and no two wait for each other: what is sent to one rank
// does not wait for what is sent to another.
//
// What a rank has to send to another is cut into some sequences, each of which has its place in memory: a second half that ends
// before all is sent (fifo.cu says when) leaves them as they are, to whoever goes on. A slot's sequences are moved on by those
// who hold its lock.
#pragma once
#include "copy.cuh"
#include "counts.cuh"

namespace a2a {

// Private memory, one a slot; lists are behind it. A word is {epoch, which half}.
struct FifoState {
  uint32_t lock;
  // Warps of the kernel at work that have read where the slot stands.
  uint32_t arrived;
  // Rows may be moved, or not (kStop); those that send are to end.
  uint64_t go;
  uint64_t leave;
  // Those that have ended.
  uint32_t ended;
  uint32_t reserved;
  Offer offer[kOffers];
};
constexpr uint32_t kGoRows = 1, kGoResults = 2, kStop = 4;
static_assert(sizeof(FifoState) == 32 + kOffers * sizeof(Offer));

// What the pieces of a row add up to, a power of two.
constexpr uint32_t kRow = 1024;

// A slot's FIFOs, as one rank sees them.
struct Line {
  const Seat& seat;
  const Fifos& fifos;
  uint32_t slot;

  __device__ __forceinline__ FifoState& state() const {
    return *reinterpret_cast<FifoState*>(fifos.states + slot * fifos.state_bytes);
  }
  __device__ __forceinline__ uint32_t sequences() const { return seat.ranks * fifos.lanes; }
  // Lists: by rank, rows sent and taken since the comm began, the first row to take; pieces to be taken, and to be sent.
  __device__ __forceinline__ uint64_t* sent() const { return reinterpret_cast<uint64_t*>(&state() + 1); }
  __device__ __forceinline__ uint64_t* taken() const { return sent() + seat.ranks; }
  __device__ __forceinline__ uint64_t* from() const { return sent() + 2 * seat.ranks; }
  __device__ __forceinline__ uint32_t* left() const { return reinterpret_cast<uint32_t*>(sent() + 3 * seat.ranks); }
  __device__ __forceinline__ uint32_t* unsent() const { return left() + seat.ranks; }
  // Of an offer: by rank, the first row's number, how many, and where they start; by sequence, the next piece.
  __device__ __forceinline__ uint64_t* base(uint32_t offer) const {
    return sent() + 4 * seat.ranks + offer * (2 * seat.ranks + sequences());
  }
  __device__ __forceinline__ uint32_t* count(uint32_t offer) const {
    return reinterpret_cast<uint32_t*>(base(offer) + seat.ranks);
  }
  __device__ __forceinline__ uint32_t* start(uint32_t offer) const { return count(offer) + seat.ranks; }
  __device__ __forceinline__ uint64_t* cursor(uint32_t offer) const { return base(offer) + 2 * seat.ranks; }

  // The entry of a source in a rank's window.
  __device__ __forceinline__ uint8_t* entry(uint32_t window, uint32_t source, uint32_t number) const {
    const uint64_t at = static_cast<uint64_t>(source) * fifos.rows + number;
    return window_of(seat, window) + fifos.entries + slot * fifos.slot_bytes + at * fifos.entry_bytes;
  }
  // By a piece of an entry, in a rank's window: the row that a source has written there. By an entry: the row that a receiver
  // has taken. Both + 1.
  __device__ __forceinline__ uint64_t* words(uint32_t window) const {
    return reinterpret_cast<uint64_t*>(window_of(seat, window) + fifos.words + slot * fifos.slot_bytes);
  }
  __device__ __forceinline__ uint64_t* full(uint32_t window, uint32_t source, uint32_t number, uint32_t piece) const {
    return words(window) + (static_cast<uint64_t>(source) * fifos.rows + number) * kFifoPieces + piece;
  }
  __device__ __forceinline__ uint64_t* freed(uint32_t window, uint32_t receiver, uint32_t number) const {
    const uint64_t all = static_cast<uint64_t>(seat.ranks) * fifos.rows;
    return words(window) + all * kFifoPieces + static_cast<uint64_t>(receiver) * fifos.rows + number;
  }
  // By entry: what has been taken, a row adding kRow.
  __device__ __forceinline__ uint32_t* pieces_taken(uint32_t source, uint32_t number) const {
    auto* lists = reinterpret_cast<uint32_t*>(base(kOffers));
    return lists + static_cast<uint64_t>(source) * fifos.rows + number;
  }
  // A thread of a warp that has taken a piece says so; the last of a row lets its source have the entry. What was read has been
  // used, or is in shared memory, so that no store can come before it, and no fence is needed for those that read (as NCCL's
  // receivers do without).
  __device__ __forceinline__ void say_taken(uint32_t source, uint32_t number, uint64_t row, uint32_t piece, uint32_t pieces) const {
    A2A_JITTER_HERE;
    // Every row adds kRow, however many its pieces are, and the list need never be set back.
    const uint32_t share = piece == 0 ? kRow - (pieces - 1) : 1;
    const uint32_t taken = atomicAdd(pieces_taken(source, number), share) + share;
    if (taken % kRow == 0) ptx::st_relaxed_sys(freed(source, seat.rank, number), row + 1);
    atomicSub(left() + source, 1);
  }
};

// A word that others write while it is looked at.
template <class T>
__device__ __forceinline__ T look_at(const T* word) {
  return *reinterpret_cast<const volatile T*>(word);
}

// One thread. Who has the lock sees what was done under it before.
__device__ __forceinline__ bool try_lock(FifoState& state) {
  A2A_JITTER_HERE;
  if (ptx::cas_relaxed_gpu(&state.lock, 0, 1) != 0) return false;
  __threadfence();
  return true;
}
__device__ __forceinline__ void lock(FifoState& state) {
  while (!try_lock(state)) {
  }
}
__device__ __forceinline__ void unlock(FifoState& state) {
  __threadfence();
  *reinterpret_cast<volatile uint32_t*>(&state.lock) = 0;
}

// What one sequence is at: pieces to one rank, every so many of them.
struct Sequence {
  uint32_t peer;
  uint32_t next;
  uint32_t end;
  // Of the rank's rows: the first one's number, where that is in its FIFO, and where they start in the offer's order.
  uint64_t base;
  uint32_t entry;
  uint32_t start;
};
__device__ __forceinline__ Sequence read_sequence(const Line& line, uint32_t offer, uint32_t pieces, uint32_t number) {
  const uint32_t peer = number % line.seat.ranks;
  const uint64_t base = line.base(offer)[peer];
  return Sequence{peer,
                  static_cast<uint32_t>(line.cursor(offer)[number]),
                  line.count(offer)[peer] * pieces,
                  base,
                  static_cast<uint32_t>(base % line.fifos.rows),
                  line.start(offer)[peer]};
}

// A part of shared memory that something is in on its way: where it goes, and how long it is.
struct Stage {
  uint64_t barrier;
  uint8_t* to;
  uint32_t size;
};

// Copies one thing after another through shared memory, by bulk copies, for a warp: what is to come is on its way in while what is
// there is on its way out. One thread's.
struct Carrier {
  uint8_t* const room;
  Stage* const stages;
  // Bytes of a stage, and how many there are.
  const uint32_t bytes;
  const uint32_t count;
  // Things that are on their way in, or were; of which so many are on their way out, or were.
  uint32_t loaded;
  uint32_t stored;

  __device__ __forceinline__ Carrier(uint8_t* room, Stage* stages, uint32_t bytes, uint32_t count)
      : room(room), stages(stages), bytes(bytes), count(count), loaded(0), stored(0) {
    if (threadIdx.x % 32 < count) ptx::init_barrier(&stages[threadIdx.x % 32].barrier);
    ptx::fence_barriers();
    __syncwarp();
  }
  __device__ __forceinline__ void send_on() {
    const uint32_t at = stored % count;
    const Stage& stage = stages[at];
    ptx::await_bytes(const_cast<uint64_t*>(&stage.barrier), stored / count % 2);
    ptx::store_bulk(stage.to, room + at * bytes, stage.size);
    ptx::close_group();
    ++stored;
  }
  __device__ __forceinline__ void carry(uint8_t* to, const uint8_t* from, uint32_t all) {
#pragma unroll 1
    for (uint32_t start = 0; start < all; start += bytes) {
      const uint32_t at = loaded % count;
      Stage& stage = stages[at];
      // What went out of this stage is out of it.
      ptx::await_read<0>();
      stage.to = to + start, stage.size = min(bytes, all - start);
      ptx::load_bulk(room + at * bytes, from + start, stage.size, &stage.barrier);
      if (++loaded - stored == count) send_on();
    }
  }
  // All is in, and on its way out.
  __device__ __forceinline__ void empty() {
    while (stored != loaded) send_on();
  }
  // All is where it goes.
  __device__ __forceinline__ void finish() {
    empty();
    ptx::await_stored();
  }
};

// What is beside a row: ids, weights and source of a dispatch, other planes. A thread does it: others have other rows.
__device__ __forceinline__ void write_beside(const Seat& seat, const Offer& offer, uint8_t* entry, uint32_t row) {
  if (offer.flags & kHasChoices) {
    const Route& route = offer.route;
    auto* ids = reinterpret_cast<int32_t*>(entry + offer.ids_at);
    auto* weights = reinterpret_cast<float*>(entry + offer.weights_at);
    const uint64_t kept = static_cast<uint64_t>(row) * route.topk;
    const auto* given = reinterpret_cast<const float*>(route.weights_in + row * route.weights_stride);
    bool bad;
#pragma unroll 4
    for (uint32_t k = 0; k < route.topk; ++k) {
      ids[k] = route.flags & kHasIds ? read_id(route, row, k, bad) : route.ids[kept + k];
      // As read_choice has it.
      const bool is_one = route.flags & kHasIds;
      weights[k] = route.flags & kHasWeights ? __ldg(given + k) : is_one ? 1.0f : route.weights[kept + k];
    }
    *reinterpret_cast<int2*>(entry + offer.source_at) = make_int2(seat.rank, row);
  }
#pragma unroll 1
  for (uint32_t number = 0; number < offer.sides; ++number) {
    const Side& side = offer.side[number];
    copy_bytes(entry + side.to, side.from + row * side.stride, side.bytes, side.unit, 0, 1);
  }
}

// Sends what some sequences, a lane's each, have room for, a piece of each; true if that is anything. A warp calls it, for an
// offer that is ready. `is_one`: the lane has a sequence.
__device__ __forceinline__ bool send_some(const Line& line, const Offer& offer, Carrier& carrier, bool is_one, Sequence& mine) {
  const Seat& seat = line.seat;
  const uint32_t lane = threadIdx.x % 32, pieces = offer.pieces;
  const bool has = is_one && mine.next < mine.end;
  uint32_t n = 0, piece = 0, entry = 0, row = 0;
  bool can = false;
  if (has) {
    n = mine.next / pieces, piece = mine.next - n * pieces;
    entry = (mine.entry + n) % line.fifos.rows;
    const uint64_t taken = ptx::ld_acquire_sys(line.freed(seat.rank, mine.peer, entry));
    row = offer.order != nullptr ? offer.order[mine.start + n] : mine.start + n;
    can = taken + line.fifos.rows > mine.base + n;
  }
  const uint32_t all = __ballot_sync(~0u, can);
  if (all == 0) return false;
  uint8_t* const to = can ? line.entry(mine.peer, seat.rank, entry) : nullptr;
  // What is beside a row goes with its last piece.
  if (can && piece == pieces - 1) write_beside(seat, offer, to, row);
  __syncwarp();
#pragma unroll 1
  for (uint32_t rest = all; rest != 0; rest &= rest - 1) {
    const uint32_t from = __ffs(rest) - 1;
    auto* its_entry = reinterpret_cast<uint8_t*>(__shfl_sync(~0u, reinterpret_cast<uint64_t>(to), from));
    const uint32_t first = __shfl_sync(~0u, piece, from) * offer.piece, its_row = __shfl_sync(~0u, row, from);
    if (lane != 0) continue;
    carrier.carry(its_entry + 16ull * first, offer.rows + its_row * offer.stride + 16ull * first,
                  16 * min(offer.piece, offer.vectors - first));
  }
  if (lane == 0) carrier.finish();
  // One release for all of them.
  __syncwarp();
  if (can) {
    ptx::st_release_sys(line.full(mine.peer, seat.rank, entry, piece), mine.base + n + 1);
    atomicSub(line.unsent() + mine.peer, 1);
    mine.next += line.fifos.lanes;
  }
  return true;
}

// From here on there are lists of what an offer comes to, if there is room for its rows. `kept`: rows for a rank. Under the
// lock; `thread` of `threads`.
template <class Kept>
__device__ __forceinline__ void make_ready(const Line& line, uint32_t number, const Kept& kept, uint32_t thread,
                                           uint32_t threads) {
  Offer& offer = line.state().offer[number];
#pragma unroll 1
  for (uint32_t rank = thread; rank < line.seat.ranks; rank += threads) {
    const uint32_t rows = kept(rank);
    line.base(number)[rank] = line.sent()[rank], line.count(number)[rank] = rows;
    line.sent()[rank] += rows;
    uint32_t start = 0;
    if (offer.order != nullptr) {
      start = offer.order_starts[rank];
    } else {
#pragma unroll 1
      for (uint32_t before = 0; before < rank; ++before) start += offer.rows_for[before];
    }
    line.start(number)[rank] = start;
    atomicAdd(line.unsent() + rank, rows * offer.pieces);
  }
#pragma unroll 1
  for (uint32_t i = thread; i < line.sequences(); i += threads) line.cursor(number)[i] = i / line.seat.ranks;
}

// Puts something on offer, as yet without numbers. The block calls it; by one that holds the lock.
__device__ __forceinline__ void put_on_offer(const Line& line, uint32_t number, const Offer& offer, uint32_t epoch) {
  const auto* from = reinterpret_cast<const uint32_t*>(&offer);
  auto* to = reinterpret_cast<uint32_t*>(line.state().offer + number);
  for (uint32_t i = threadIdx.x; i < offsetof(Offer, epoch) / 4; i += blockDim.x) to[i] = from[i];
  Offer& there = line.state().offer[number];
  if (threadIdx.x == 0) there.epoch = epoch, there.live = 1, there.ready = 0;
  __syncthreads();
}

// Finds the numbers of another slot's offer, if everybody's counts have come. A warp calls it, which holds the lock.
__device__ __forceinline__ bool find_numbers(const Line& line, uint32_t number) {
  const Seat& seat = line.seat;
  const Counts counts{line.fifos.counts.region + line.slot * line.fifos.slot_bytes, line.fifos.counts.stride};
  Offer& offer = line.state().offer[number];
  const uint32_t lane = threadIdx.x % 32;
  const auto word = [&](uint32_t source, uint32_t to) {
    const uint8_t* row = window_of(seat, seat.rank) + counts.region + source * counts.stride;
    return ptx::ld_relaxed_sys(reinterpret_cast<const uint64_t*>(row) + to);
  };
  bool fine = true;
#pragma unroll 1
  for (uint32_t to = lane; to < seat.ranks && offer.rows_for == nullptr; to += 32) {
    uint64_t all = 0;
#pragma unroll 1
    for (uint32_t source = 0; source < seat.ranks; ++source) {
      const uint64_t rows = word(source, to);
      fine &= reached(rows, offer.epoch);
      all += min(static_cast<uint32_t>(rows), offer.bound);
    }
    // Its own second half says so.
    if (offer.limit != 0 && all > offer.limit) fine = false;
  }
  if (!__all_sync(~0u, fine)) return false;
  make_ready(line, number, [&](uint32_t to) {
    if (offer.rows_for != nullptr) return static_cast<uint32_t>(offer.rows_for[to]);
    uint64_t before = 0;
#pragma unroll 1
    for (uint32_t source = 0; source < seat.rank; ++source) before += min(static_cast<uint32_t>(word(source, to)), offer.bound);
    const uint64_t mine = min(static_cast<uint32_t>(word(seat.rank, to)), offer.bound), room = offer.room;
    return static_cast<uint32_t>(min(before + mine, room) - min(before, room));
  }, lane, 32);
  __syncwarp();
  if (lane == 0) offer.ready = 1;
  __syncwarp();
  return true;
}

// Sends what offers of other slots (and what of this one's is older than what its kernel sends) have room for, so that ranks may
// complete slots in different orders. One warp, until it is to leave.
__device__ __forceinline__ void help(const Seat& seat, const Fifos& fifos, uint64_t go, uint32_t current,
                                     Carrier& carrier) {
  const uint32_t lane = threadIdx.x % 32;
  const Line own{seat, fifos, fifos.slot};
  while (look_at(&own.state().leave) != go && !has_closed(seat)) {
#pragma unroll 1
    for (uint32_t slot = 0; slot < fifos.slots; ++slot) {
      const Line line{seat, fifos, slot};
      FifoState& state = line.state();
      const bool is_own = slot == fifos.slot;
      uint32_t waits = look_at(&fifos.all[slot].closed) == 0 && (look_at(&state.offer[0].live) | look_at(&state.offer[1].live));
      if (!__shfl_sync(~0u, waits, 0)) continue;
      if (is_own) {
        // Once this kernel has what it sends.
        waits = look_at(&state.go) == go;
      } else if (lane == 0) {
        waits = try_lock(state);
      }
      if (!__shfl_sync(~0u, waits, 0)) continue;
#pragma unroll 1
      for (uint32_t number = 0; number < kOffers; ++number) {
        const Offer& offer = state.offer[number];
        if ((is_own && number == current) || offer.live == 0) continue;
        if (offer.ready == 0 && !find_numbers(line, number)) continue;
#pragma unroll 1
        for (uint32_t first = 0; first < line.sequences(); first += 32) {
          const bool is_one = first + lane < line.sequences();
          Sequence mine = read_sequence(line, number, offer.pieces, is_one ? first + lane : 0);
          if (send_some(line, offer, carrier, is_one, mine) && is_one) line.cursor(number)[first + lane] = mine.next;
          __syncwarp();
        }
      }
      __syncwarp();
      if (!is_own && lane == 0) unlock(state);
    }
  }
}

// Sends a warp's sequences of the offer at hand, until all is sent or what is left is left to others. Some warps call it.
__device__ __forceinline__ void send_all(const Line& line, uint32_t number, const Offer& offer, uint32_t sender,
                                         uint32_t senders, uint64_t go, Carrier& carrier) {
  const uint32_t lane = threadIdx.x % 32, all = line.sequences();
  // Mostly a warp has no more sequences than lanes.
  for (bool over = false, left = true; left && !over;) {
    left = false;
    bool sent = false;
#pragma unroll 1
    for (uint32_t first = sender; first < all; first += 32 * senders) {
      const uint32_t which = first + lane * senders;
      const bool is_one = which < all, is_only = first == sender && first + 32 * senders >= all;
      Sequence mine = read_sequence(line, number, offer.pieces, is_one ? which : 0);
      bool goes_on;
      do {
        goes_on = send_some(line, offer, carrier, is_one, mine);
        sent |= goes_on;
        if (!goes_on && is_only) {
          over = __any_sync(~0u, look_at(&line.state().leave) == go || has_closed(line.seat));
          goes_on = !over && __any_sync(~0u, is_one && mine.next < mine.end);
        }
      } while (goes_on);
      if (is_one) line.cursor(number)[which] = mine.next;
      left |= __any_sync(~0u, is_one && mine.next < mine.end);
      __syncwarp();
    }
    if (!sent && left && !over) over = __any_sync(~0u, look_at(&line.state().leave) == go || has_closed(line.seat));
  }
}

// --------------------------------------------------------------------------------------------------- the block that keeps

// Not all pieces of a list have been moved. The block calls it.
__device__ __forceinline__ bool is_left(const uint32_t* list, uint32_t ranks) {
  bool left = false;
#pragma unroll 1
  for (uint32_t rank = threadIdx.x; rank < ranks; rank += blockDim.x) left |= look_at(list + rank) != 0;
  return __syncthreads_or(left);
}

// The warps of other blocks have all come to the same point; one thread.
__device__ __forceinline__ void await_warps(uint32_t& count, uint32_t warps) {
  while (ptx::ld_acquire_sys(&count) != warps) {
  }
  count = 0;
}

// Waits until the step's rows have come, and until what is on offer has been sent, or is left to another slot's second half
// that is still to come. False if the step is lost. The block calls it, after it said `go`.
__device__ __forceinline__ bool keep_streams(const Line& line, Wait wait, Meeting& meeting, uint64_t started, uint64_t go,
                                             uint32_t warps) {
  const Seat& seat = line.seat;
  FifoState& state = line.state();
  bool fine = true;
  if (threadIdx.x == 0) meeting.gone_since = 0;
  wait.left = line.left();
  for (uint32_t polls = 1; fine && is_left(line.left(), seat.ranks); ++polls) {
    if (polls % kPollsPerLook == 0) fine = look_for_trouble(seat, wait, meeting, started);
  }
  // Whoever is the last to receive sends what all have left.
  bool last = false;
  if (threadIdx.x == 0) last = atomicSub(&seat.shared->pending, 1) == 1;
  last = __syncthreads_or(last);
  wait.left = line.unsent();
  for (uint32_t polls = 1; fine && last; ++polls) {
    const bool mine = is_left(line.unsent(), seat.ranks);
    bool others = false;
#pragma unroll 1
    for (uint32_t slot = 0; slot < line.fifos.slots; ++slot) {
      if (slot == line.slot || look_at(&line.fifos.all[slot].closed) != 0) continue;
      others |= is_left(Line{seat, line.fifos, slot}.unsent(), seat.ranks);
    }
    if (!mine && !others) break;
    if (polls % kPollsPerLook != 0) continue;
    fine = look_for_trouble(seat, wait, meeting, started);
    // Another slot's rows are none of this one's failure.
    const uint64_t budget = seat.control->step_ns;
    if (!mine && __syncthreads_or(threadIdx.x == 0 && ptx::globaltimer() - started >= budget)) break;
  }
  if (threadIdx.x == 0) {
    *reinterpret_cast<volatile uint64_t*>(&state.leave) = go;
    await_warps(state.ended, warps);
    unlock(state);
  }
  __syncthreads();
  return fine;
}

// The others may move rows from now on (or have nothing to do). The block calls it.
__device__ __forceinline__ void say_go(FifoState& state, uint64_t go) {
  __syncthreads();
  if (threadIdx.x != 0) return;
  __threadfence();
  *reinterpret_cast<volatile uint64_t*>(&state.go) = go;
}

// What is to be taken from each source: so many rows, of so many pieces. The block calls it.
__device__ __forceinline__ void expect_rows(const Line& line, const int32_t* rows, uint32_t pieces) {
#pragma unroll 1
  for (uint32_t source = threadIdx.x; source < line.seat.ranks; source += blockDim.x) {
    line.from()[source] = line.taken()[source];
    line.taken()[source] += rows[source];
    line.left()[source] = rows[source] * pieces;
  }
}

// Nothing comes of the half: what waits for the block is to end. The block calls it, which holds the lock.
__device__ __forceinline__ void give_up(const Line& line, uint64_t go, uint32_t warps, bool counted) {
  FifoState& state = line.state();
  say_go(state, go | kStop);
  if (threadIdx.x != 0) return;
  if (counted) atomicSub(&line.seat.shared->pending, 1);
  *reinterpret_cast<volatile uint64_t*>(&state.leave) = go;
  await_warps(state.ended, warps);
  unlock(state);
}

// Waits for the block that keeps; false if there is nothing to do. A warp calls it.
__device__ __forceinline__ bool await_go(const Seat& seat, const FifoState& state, uint64_t go) {
  for (;;) {
    const uint64_t word = ptx::ld_acquire_sys(&state.go);
    if ((word & ~static_cast<uint64_t>(kStop)) == go) return (word & kStop) == 0;
    if (has_closed(seat)) return false;
  }
}

}  // namespace a2a
