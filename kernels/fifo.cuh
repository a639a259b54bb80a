// FIFOs: rows from the caller's tensors to the caller's tensors, through a few entries in the receiver's window.
//
// A rank has a FIFO for each source and slot. Rows are numbered, from when the comm began; row n is in entry n % rows. A row is
// some pieces, and each piece of an entry has two words: one in the receiver's window, by which its source says which row's
// piece is there, and one in the source's, by which the receiver says which row's it has taken. So any warp may write any piece
// for which there is room, or take any that is there. What is beside a row (ids, weights, other planes) is behind its last
// piece, and goes with it.
//
// What a rank sends is cut into sequences, each of which sends every so many of the pieces to every rank; how far it is for
// each rank stands in memory. A sequence of a dispatch has each token's piece in shared memory once, and sends it to all of the
// token's ranks at a time. A rank that has no room for a while is left behind, and is sent its rows apart, so that no two wait
// for each other: what goes to one rank does not wait for what goes to another. A second half that ends before all is sent
// (fifo.cu says when) leaves sequences as they are, to whoever goes on. A slot's sequences are moved on by those who hold its
// lock.
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
  // Those that have ended; blocks of it that have taken all that they are to take.
  uint32_t ended;
  uint32_t taken;
  Offer offer[kOffers];
};
constexpr uint32_t kGoRows = 1, kGoResults = 2, kStop = 4;
static_assert(sizeof(FifoState) == 32 + kOffers * sizeof(Offer));

// A slot's FIFOs, as one rank sees them.
struct Line {
  const Seat& seat;
  const Fifos& fifos;
  uint32_t slot;

  __device__ __forceinline__ FifoState& state() const {
    return *reinterpret_cast<FifoState*>(fifos.states + slot * fifos.state_bytes);
  }
  // Lists: by rank, rows sent and taken since the comm began, the first row to take; that rows have not come, sequences that have
  // not sent all; the next piece to take.
  __device__ __forceinline__ uint64_t* sent() const { return reinterpret_cast<uint64_t*>(&state() + 1); }
  __device__ __forceinline__ uint64_t* taken() const { return sent() + seat.ranks; }
  __device__ __forceinline__ uint64_t* from() const { return sent() + 2 * seat.ranks; }
  __device__ __forceinline__ uint32_t* left() const { return reinterpret_cast<uint32_t*>(sent() + 3 * seat.ranks); }
  __device__ __forceinline__ uint32_t* unsent() const { return left() + seat.ranks; }
  __device__ __forceinline__ uint32_t* next() const { return left() + 2 * seat.ranks; }
  // Of an offer: by rank, the first row's number, how many, and where they start among results; by sequence and rank, the
  // sequence's next piece, or kNone when all is sent.
  __device__ __forceinline__ uint64_t* base(uint32_t offer) const {
    return sent() + 5 * seat.ranks + offer * (2 * seat.ranks + fifos.cursors / 2);
  }
  __device__ __forceinline__ uint32_t* count(uint32_t offer) const {
    return reinterpret_cast<uint32_t*>(base(offer) + seat.ranks);
  }
  __device__ __forceinline__ uint32_t* start(uint32_t offer) const { return count(offer) + seat.ranks; }
  __device__ __forceinline__ uint32_t* cursor(uint32_t offer, uint32_t sequence) const {
    return start(offer) + seat.ranks + sequence * seat.ranks;
  }

  // The entry of a source in a rank's window.
  __device__ __forceinline__ uint8_t* entry(uint32_t window, uint32_t source, uint32_t number) const {
    const uint64_t at = static_cast<uint64_t>(source) * fifos.rows + number;
    return window_of(seat, window) + fifos.entries + slot * fifos.slot_bytes + at * fifos.entry_bytes;
  }
  // By a piece of an entry, in a rank's window: the row that a source has written there; the row that a receiver has taken from
  // there. Both + 1.
  __device__ __forceinline__ uint64_t* full(uint32_t window, uint32_t source, uint32_t number, uint32_t piece) const {
    auto* words = reinterpret_cast<uint64_t*>(window_of(seat, window) + fifos.words + slot * fifos.slot_bytes);
    return words + (static_cast<uint64_t>(source) * fifos.rows + number) * fifos.words_each + piece;
  }
  __device__ __forceinline__ uint64_t* freed(uint32_t window, uint32_t receiver, uint32_t number, uint32_t piece) const {
    return full(window, seat.ranks + receiver, number, piece);
  }
  // There is room for a piece of a row, the n-th of its offer, which goes to an entry of a rank.
  __device__ __forceinline__ bool has_room(uint32_t peer, uint32_t entry, uint32_t piece, uint64_t row, uint32_t n) const {
    A2A_JITTER_HERE;
    const uint64_t* word = freed(seat.rank, peer, entry, piece);
    if (n >= fifos.rows) return ptx::ld_relaxed_sys(word) + fifos.rows > row;
    // Another offer's row was there, which may have been cut otherwise.
    const auto* words = reinterpret_cast<const ulonglong2*>(word - piece);
    unsigned long long least = ~0ull;
#pragma unroll 2
    for (uint32_t i = 0; i < fifos.words_each / 2; ++i) {
      const ulonglong2 two = ptx::ld_relaxed_sys(words + i);
      least = min(least, min(two.x, two.y));
    }
    return least + fifos.rows > row;
  }
  // A thread whose piece is where it goes lets the receiver have it.
  __device__ __forceinline__ void say_sent(uint32_t peer, uint32_t entry, uint32_t piece, uint64_t row) const {
    ptx::st_release_sys(full(peer, seat.rank, entry, piece), row + 1);
  }
  // A sequence has sent a rank all. (Not a piece at a time: words that many count in, while others look at them, are slow, and
  // a release waits for them.)
  __device__ __forceinline__ void say_all_sent(uint32_t offer, uint32_t sequence, uint32_t peer) const {
    cursor(offer, sequence)[peer] = kNone;
    atomicSub(unsent() + peer, 1);
  }
  // A thread lets the source have the room of a piece, one of `pieces`: the last is all that follows. What was read has been used,
  // or is in shared memory, so that no store can come before it, and no fence is needed for those that read (as NCCL's
  // receivers do without).
  __device__ __forceinline__ void say_taken(uint32_t source, uint32_t entry, uint32_t piece, uint32_t pieces, uint64_t row) const {
    A2A_JITTER_HERE;
    uint64_t* const word = freed(source, seat.rank, entry, 0);
    const uint32_t end = piece == pieces - 1 ? fifos.words_each : piece + 1;
#pragma unroll 1
    for (; piece < end; ++piece) ptx::st_relaxed_sys(word + piece, row + 1);
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

// ----------------------------------------------------------------------------------------------------------- what is sent

// Which of a sequence's pieces is which.
__device__ __forceinline__ uint32_t unit_of(const Offer& offer, uint32_t sequence, uint32_t next) {
  return sequence + next * offer.sequences;
}

// A piece of a row: 16-byte vectors, and bytes with what is beside the row.
__device__ __forceinline__ uint32_t vectors_of(const Offer& offer, uint32_t piece) {
  return min(offer.piece, offer.vectors - piece * offer.piece);
}
__device__ __forceinline__ uint32_t bytes_of(const Offer& offer, uint32_t piece) {
  return 16 * vectors_of(offer, piece) + (piece == offer.pieces - 1 ? offer.beside : 0);
}

// Copies to or from shared memory; `unit` as copy_bytes has it.
__device__ __forceinline__ void copy_here(uint8_t* to, const uint8_t* from, uint32_t bytes, uint32_t unit, uint32_t thread,
                                          uint32_t threads) {
  if (unit == 16) {
    for (uint32_t i = thread; i < bytes / 16; i += threads) {
      reinterpret_cast<int4*>(to)[i] = reinterpret_cast<const int4*>(from)[i];
    }
  } else if (unit >= 4) {
    for (uint32_t i = thread; i < bytes / 4; i += threads) {
      reinterpret_cast<uint32_t*>(to)[i] = reinterpret_cast<const uint32_t*>(from)[i];
    }
  } else {
    for (uint32_t i = thread; i < bytes; i += threads) to[i] = from[i];
  }
}

// Writes planes beside a row to where an entry is put together in shared memory; some threads do it.
__device__ __forceinline__ void write_sides(const Offer& offer, uint32_t row, uint8_t* entry, uint32_t thread,
                                            uint32_t threads) {
#pragma unroll 1
  for (uint32_t number = 0; number < offer.sides; ++number) {
    const Side& side = offer.side[number];
    copy_here(entry + side.to, side.from + row * side.stride, side.bytes, side.unit, thread, threads);
  }
}

// A token's choice, the lane's.
struct Choice {
  int32_t id;
  float weight;
};
__device__ __forceinline__ Choice choice_of(const Offer& offer, uint32_t row) {
  Choice choice{-1, 0.0f};
  if (offer.flags & kHasChoices) read_choice(offer.route, row, choice.id, choice.weight);
  return choice;
}

// Parts of shared memory that pieces go through one after another: a warp's.
struct Ring {
  uint8_t* const room;
  uint64_t* const barriers;
  // Bytes of a stage, and how many there are.
  const uint32_t bytes;
  const uint32_t count;
  // Pieces that were loaded, and that were waited for.
  uint32_t loaded;
  uint32_t seen;

  __device__ __forceinline__ uint8_t* stage(uint32_t number) const { return room + number % count * bytes; }
  // Has a piece brought into the next stage, out of which all is that was there. A warp calls it; of a dispatch, with the row's
  // choices.
  __device__ __forceinline__ void load(const Seat& seat, const Offer& offer, uint32_t row, uint32_t piece, const Choice& choice) {
    const uint32_t lane = threadIdx.x % 32, vectors = vectors_of(offer, piece), first = piece * offer.piece;
    uint8_t* const to = stage(loaded);
    if (lane == 0) {
      ptx::load_bulk_once(to, offer.rows + row * offer.stride + 16ull * first, 16 * vectors, barriers + loaded % count);
    }
    ++loaded;
    if (piece != offer.pieces - 1) return;
    // Where the entry would start.
    uint8_t* const entry = to - 16 * first;
    if (offer.flags & kHasChoices) {
      if (lane < offer.route.topk) {
        reinterpret_cast<int32_t*>(entry + offer.ids_at)[lane] = choice.id;
        reinterpret_cast<float*>(entry + offer.weights_at)[lane] = choice.weight;
      }
      if (lane == 0) *reinterpret_cast<int2*>(entry + offer.source_at) = make_int2(seat.rank, row);
    }
    write_sides(offer, row, entry, lane, 32);
    ptx::fence_shared();
    __syncwarp();
  }
  // The first piece that has not been waited for is there.
  __device__ __forceinline__ const uint8_t* await() {
    ptx::await_bytes(barriers + seen % count, seen / count % 2);
    return stage(seen++);
  }
  // Nothing is on its way in any more.
  __device__ __forceinline__ void drain() {
    while (seen != loaded) await();
  }
};

// Finds a sequence's next piece for a rank, from `next` on; false if there is none. A thread's.
struct Piece {
  uint32_t next;
  // Among the rank's rows; where it comes from; which piece.
  uint32_t n;
  uint32_t row;
  uint32_t piece;
};
__device__ __forceinline__ bool find_piece(const Line& line, uint32_t number, const Offer& offer, uint32_t sequence,
                                           uint32_t peer, Piece& found) {
  const Route& route = offer.route;
  const uint32_t count = line.count(number)[peer];
  const uint32_t units = (offer.flags & kHasChoices ? route.tokens : count) * offer.pieces;
#pragma unroll 1
  for (;; ++found.next) {
    const uint32_t unit = unit_of(offer, sequence, found.next);
    if (unit >= units) return false;
    const uint32_t row = unit / offer.pieces;
    found.piece = unit - row * offer.pieces;
    if (!(offer.flags & kHasChoices)) {
      found.n = row, found.row = line.start(number)[peer] + row;
      return true;
    }
    const uint64_t at = static_cast<uint64_t>(row) * route.fanout;
#pragma unroll 1
    for (uint32_t k = 0; k < route.fanout; ++k) {
      if (route.target_ranks[at + k] != static_cast<int32_t>(peer)) continue;
      found.n = route.target_rows[at + k], found.row = row;
      if (found.n < count) return true;
    }
  }
}

// Sends what there is room for of a sequence, a piece to each rank. A warp calls it, for an offer that is ready.
struct Sent {
  bool any;
  bool left;
};
__device__ __forceinline__ Sent send_some(const Line& line, uint32_t number, const Offer& offer, uint32_t sequence, Ring& ring) {
  const Seat& seat = line.seat;
  const uint32_t lane = threadIdx.x % 32;
  Sent sent{false, false};
#pragma unroll 1
  for (uint32_t first = 0; first < seat.ranks; first += 32) {
    const uint32_t peer = first + lane;
    uint32_t* const cursor = line.cursor(number, sequence) + peer;
    Piece mine{};
    bool has = false, can = false;
    uint64_t row = 0;
    uint32_t entry = 0;
    const uint32_t next = mine.next = peer < seat.ranks ? *cursor : kNone;
    if (next != kNone) {
      has = find_piece(line, number, offer, sequence, peer, mine);
      if (!has) {
        line.say_all_sent(number, sequence, peer);
      } else if (mine.next != next) {
        *cursor = mine.next;
      }
    }
    if (has) {
      row = line.base(number)[peer] + mine.n, entry = row % line.fifos.rows;
      can = line.has_room(peer, entry, mine.piece, row, mine.n);
    }
    sent.left |= __any_sync(~0u, has);
    const uint32_t all = __ballot_sync(~0u, can);
    if (all == 0) continue;
    sent.any = true;
    uint8_t* const to = can ? line.entry(peer, seat.rank, entry) : nullptr;
#pragma unroll 1
    for (uint32_t rest = all; rest != 0;) {
      // As many as there are stages.
      const uint32_t lot = rest;
#pragma unroll 1
      for (uint32_t i = 0; i < ring.count && rest != 0; ++i, rest &= rest - 1) {
        const uint32_t from = __ffs(rest) - 1;
        const uint32_t its_row = __shfl_sync(~0u, mine.row, from);
        ring.load(seat, offer, its_row, __shfl_sync(~0u, mine.piece, from), choice_of(offer, its_row));
      }
#pragma unroll 1
      for (uint32_t left = lot; left != rest; left &= left - 1) {
        const uint32_t from = __ffs(left) - 1, piece = __shfl_sync(~0u, mine.piece, from);
        auto* its_entry = reinterpret_cast<uint8_t*>(__shfl_sync(~0u, reinterpret_cast<uint64_t>(to), from));
        const uint8_t* const stage = ring.await();
        if (lane == 0) ptx::store_bulk(its_entry + 16ull * piece * offer.piece, stage, bytes_of(offer, piece));
      }
      if (lane == 0) ptx::close_group(), ptx::await_stored();
      __syncwarp();
    }
    if (can) {
      line.say_sent(peer, entry, mine.piece, row);
      *cursor = mine.next + 1;
    }
    __syncwarp();
  }
  return sent;
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
#pragma unroll 1
    for (uint32_t before = 0; before < rank && !(offer.flags & kHasChoices); ++before) start += offer.rows_for[before];
    line.start(number)[rank] = start;
    atomicAdd(line.unsent() + rank, offer.sequences);
  }
#pragma unroll 1
  for (uint32_t i = thread; i < offer.sequences * line.seat.ranks; i += threads) line.cursor(number, 0)[i] = 0;
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
__device__ __forceinline__ void help(const Seat& seat, const Fifos& fifos, uint64_t go, uint32_t current, Ring& ring) {
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
        bool left = false;
#pragma unroll 1
        for (uint32_t rank = lane; rank < seat.ranks; rank += 32) left |= look_at(line.unsent() + rank) != 0;
        if (!__any_sync(~0u, left)) continue;
#pragma unroll 1
        for (uint32_t sequence = 0; sequence < offer.sequences; ++sequence) send_some(line, number, offer, sequence, ring);
      }
      __syncwarp();
      if (!is_own && lane == 0) unlock(state);
    }
  }
}

// Those that send are to end; a warp calls it.
__device__ __forceinline__ bool is_to_leave(const Line& line, uint64_t go) {
  return __any_sync(~0u, look_at(&line.state().leave) == go || has_closed(line.seat));
}

// Sends sequences, every so many of them, until all is sent or what is left is left to others. A warp calls it.
__device__ __forceinline__ void send_rest(const Line& line, uint32_t number, const Offer& offer, uint32_t first, uint32_t step,
                                          uint64_t go, Ring& ring) {
  for (;;) {
    Sent sent{false, false};
#pragma unroll 1
    for (uint32_t sequence = first; sequence < offer.sequences; sequence += step) {
      const Sent some = send_some(line, number, offer, sequence, ring);
      sent.any |= some.any, sent.left |= some.left;
    }
    if (!sent.left) return;
    if (sent.any) continue;
    if (is_to_leave(line, go)) return;
  }
}

// By rank, in shared memory: the number of the first row, where that is in its FIFO, and how many there are.
struct Toward {
  uint64_t base;
  uint32_t entry;
  uint32_t count;
};

// Sends a sequence's tokens, a piece at a time to all ranks that a token goes to, as far as they have room. A warp calls it.
// Three pieces are on their way at a time: one into shared memory, one out of it, one to where it goes.
constexpr uint32_t kSendStages = 3;
// A rank that has no room for so long is left behind: 100 us, in a build for tests often.
#ifdef A2A_JITTER
constexpr uint64_t kPatienceNs = 2'000;
#else
constexpr uint64_t kPatienceNs = 100'000;
#endif
struct Token {
  bool is_one;
  uint32_t row;
  uint32_t piece;
  // A rank a lane, or -1, and the row's place among the rank's.
  int32_t rank;
  uint32_t n;
  Choice choice;
};
__device__ __forceinline__ void send_tokens(const Line& line, uint32_t number, const Offer& offer, const Toward* toward,
                                            uint32_t sequence, uint64_t go, Ring& ring) {
  const Seat& seat = line.seat;
  const Route& route = offer.route;
  const uint32_t lane = threadIdx.x % 32, units = route.tokens * offer.pieces;
  uint32_t* const cursor = line.cursor(number, sequence);
  // Where the foremost rank is. The others are behind, or have all: bits, of 32 ranks a lane.
  uint32_t next = 0, behind = 0;
#pragma unroll 1
  for (uint32_t rank = lane; rank < seat.ranks; rank += 32) next = max(next, cursor[rank] + 1);
  // kNone + 1 is 0.
  next = max(__reduce_max_sync(~0u, next), 1) - 1;
#pragma unroll 1
  for (uint32_t first = 0; first < seat.ranks; first += 32) {
    const uint32_t bits = __ballot_sync(~0u, first + lane < seat.ranks && cursor[first + lane] != next);
    if (lane == first / 32) behind = bits;
  }
  const auto read = [&](uint32_t at) {
    const uint32_t unit = unit_of(offer, sequence, at);
    Token token{unit < units, 0, 0, -1, 0, {}};
    token.row = unit / offer.pieces, token.piece = unit - token.row * offer.pieces;
    if (!token.is_one) return token;
    if (token.piece == offer.pieces - 1) token.choice = choice_of(offer, token.row);
    if (lane >= route.fanout) return token;
    const uint64_t place = static_cast<uint64_t>(token.row) * route.fanout + lane;
    token.rank = route.target_ranks[place], token.n = route.target_rows[place];
    return token;
  };
  // What was sent last: to which rank, where, and which row.
  int32_t peer = -1;
  uint32_t entry = 0, piece = 0;
  uint64_t row = 0;
  const auto say_sent = [&] {
    if (peer >= 0) line.say_sent(peer, entry, piece, row);
    peer = -1;
  };
  // What is read is used two turns later.
  Token token = read(next), coming = read(next + 1);
  if (token.is_one) ring.load(seat, offer, token.row, token.piece, token.choice);
  bool leaves = false;
#pragma unroll 1
  while (token.is_one) {
    const Token later = read(next + 2);
    if (coming.is_one) {
      ptx::await_read<kSendStages - 2>();
      __syncwarp();
      ring.load(seat, offer, coming.row, coming.piece, coming.choice);
    }
    const uint32_t bits = __shfl_sync(~0u, behind, max(token.rank, 0) / 32);
    bool goes = token.rank >= 0 && !(bits >> token.rank % 32 & 1);
    uint64_t its_row = 0;
    uint32_t its_entry = 0;
    if (goes) {
      const Toward& to = toward[token.rank];
      goes = token.n < to.count;
      its_row = to.base + token.n, its_entry = (to.entry + token.n) % line.fifos.rows;
    }
    bool can = !goes || line.has_room(token.rank, its_entry, token.piece, its_row, token.n);
    if (!__all_sync(~0u, can)) {
      // Nothing that is there is kept back meanwhile.
      ptx::await_stored();
      say_sent();
      const uint64_t since = ptx::globaltimer();
#pragma unroll 1
      for (uint32_t polls = 1; !__all_sync(~0u, can); ++polls) {
        if (!can) can = line.has_room(token.rank, its_entry, token.piece, its_row, token.n);
        if (polls % 16 != 0) continue;
        leaves = is_to_leave(line, go);
        if (leaves) break;
        if (!__any_sync(~0u, ptx::globaltimer() - since > kPatienceNs)) continue;
        uint32_t slow = __ballot_sync(~0u, !can);
        if (!can) cursor[token.rank] = next, goes = false, can = true;
#pragma unroll 1
        for (; slow != 0; slow &= slow - 1) {
          const uint32_t rank = __shfl_sync(~0u, token.rank, __ffs(slow) - 1);
          if (lane == rank / 32) behind |= 1u << rank % 32;
        }
      }
    }
    if (leaves) break;
    const uint8_t* const stage = ring.await();
    if (goes) {
      uint8_t* const to = line.entry(token.rank, seat.rank, its_entry);
      ptx::store_bulk(to + 16ull * token.piece * offer.piece, stage, bytes_of(offer, token.piece));
    }
    ptx::close_group();
    if (__any_sync(~0u, peer >= 0)) {
      ptx::await_stored<1>();
      say_sent();
    }
    if (goes) peer = token.rank, entry = its_entry, piece = token.piece, row = its_row;
    token = coming, coming = later, ++next;
  }
  ptx::await_stored();
  say_sent();
  ring.drain();
#pragma unroll 1
  for (uint32_t first = 0; first < seat.ranks; first += 32) {
    const uint32_t bits = __shfl_sync(~0u, behind, first / 32);
    if (first + lane >= seat.ranks || (bits >> lane & 1)) continue;
    if (leaves) {
      cursor[first + lane] = next;
    } else {
      line.say_all_sent(number, sequence, first + lane);
    }
  }
  __syncwarp();
}

// Sends results: a lane has a sequence to one rank, and a stage. Some warps call it, if they have a lane for every sequence.
__device__ __forceinline__ void send_results(const Line& line, uint32_t number, const Offer& offer, uint32_t sender,
                                             uint64_t go, Ring& ring) {
  const Seat& seat = line.seat;
  const uint32_t lane = threadIdx.x % 32, which = sender * ring.count + lane;
  bool is_one = lane < ring.count && which < offer.sequences * seat.ranks;
  // Ranks begin with different peers.
  const uint32_t sequence = which / seat.ranks, peer = (which + seat.rank) % seat.ranks;
  uint8_t* const stage = ring.room + lane * ring.bytes;
  uint64_t* const barrier = ring.barriers + lane;
  uint32_t units = 0, start = 0, base_entry = 0, turns = 0;
  uint64_t base = 0;
  Piece mine{};
  if (is_one) {
    units = line.count(number)[peer] * offer.pieces, start = line.start(number)[peer];
    base = line.base(number)[peer], base_entry = base % line.fifos.rows;
    mine.next = line.cursor(number, sequence)[peer];
    is_one = mine.next != kNone;
  }
  bool has = false;
  const auto load = [&] {
    const uint32_t unit = unit_of(offer, sequence, mine.next);
    has = is_one && unit < units;
    if (!has) return;
    mine.n = unit / offer.pieces, mine.piece = unit - mine.n * offer.pieces, mine.row = start + mine.n;
    const uint32_t first = mine.piece * offer.piece;
    ptx::load_bulk_once(stage, offer.rows + mine.row * offer.stride + 16ull * first, 16 * vectors_of(offer, mine.piece),
                        barrier);
    if (mine.piece != offer.pieces - 1) return;
    write_sides(offer, mine.row, stage - 16 * first, 0, 1);
    ptx::fence_shared();
  };
  load();
#pragma unroll 1
  for (uint32_t polls = 1; __any_sync(~0u, has);) {
    const uint32_t entry = has ? (base_entry + mine.n) % line.fifos.rows : 0;
    const bool can = has && line.has_room(peer, entry, mine.piece, base + mine.n, mine.n);
    if (!__any_sync(~0u, can)) {
      if (polls++ % 16 != 0) continue;
      if (is_to_leave(line, go)) break;
      continue;
    }
    if (can) {
      ptx::await_bytes(barrier, turns++ % 2);
      ptx::store_bulk(line.entry(peer, seat.rank, entry) + 16ull * mine.piece * offer.piece, stage,
                      bytes_of(offer, mine.piece));
      ptx::close_group();
      ptx::await_stored();
    }
    __syncwarp();
    if (can) {
      line.say_sent(peer, entry, mine.piece, base + mine.n);
      ++mine.next;
      load();
    }
    __syncwarp();
  }
  // What is still on its way in.
  if (has) {
    ptx::await_bytes(barrier, turns % 2);
    line.cursor(number, sequence)[peer] = mine.next;
  } else if (is_one) {
    line.say_all_sent(number, sequence, peer);
  }
  __syncwarp();
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

// Looking for trouble reads the host's memory, and while it does every release on the device takes longer: seldom.
constexpr uint64_t kLookNs = 1'000'000;

// Marks the sources that have not sent all: `rows` of each, of so many pieces. The block calls it.
__device__ __forceinline__ void look_for_missing(const Line& line, const int32_t* rows, uint32_t pieces) {
  const uint32_t each = line.fifos.rows * pieces;
#pragma unroll 1
  for (uint32_t source = threadIdx.x; source < line.seat.ranks; source += blockDim.x) line.left()[source] = 0;
  __syncthreads();
#pragma unroll 1
  for (uint32_t i = threadIdx.x; i < line.seat.ranks * each; i += blockDim.x) {
    const uint32_t source = i / each, at = i - source * each, back = at / pieces, piece = at - back * pieces;
    if (back >= static_cast<uint32_t>(rows[source])) continue;
    // The last ones: what was in their entries before has been taken.
    const uint64_t row = line.taken()[source] - 1 - back;
    const uint64_t* word = line.full(line.seat.rank, source, row % line.fifos.rows, piece);
    if (ptx::ld_relaxed_sys(word) <= row) line.left()[source] = 1;
  }
  __syncthreads();
}

// Waits until the step's rows have come (`rows` of each source, of so many pieces; `takers` blocks take them), and until what is
// on offer has been sent, or is left to another slot's second half that is still to come. False if the step is lost. The block
// calls it, after it said `go`.
__device__ __forceinline__ bool keep_streams(const Line& line, Wait wait, Meeting& meeting, uint64_t started, uint64_t go,
                                             uint32_t warps, const int32_t* rows, uint32_t pieces, uint32_t takers) {
  const Seat& seat = line.seat;
  FifoState& state = line.state();
  bool fine = true;
  if (threadIdx.x == 0) meeting.gone_since = 0;
  wait.left = line.left();
  uint64_t looked = ptx::globaltimer();
  const auto is_to_look = [&] {
    const bool is_time = __syncthreads_or(threadIdx.x == 0 && ptx::globaltimer() - looked > kLookNs);
    if (is_time) looked = ptx::globaltimer();
    return is_time;
  };
  while (fine && __syncthreads_or(threadIdx.x == 0 && look_at(&state.taken) != takers)) {
    if (!is_to_look()) continue;
    look_for_missing(line, rows, pieces);
    fine = look_for_trouble(seat, wait, meeting, started);
  }
  // Whoever is the last to receive sends what all have left.
  bool last = false;
  if (threadIdx.x == 0) last = atomicSub(&seat.shared->pending, 1) == 1;
  last = __syncthreads_or(last);
  wait.left = line.unsent();
  while (fine && last) {
    const bool mine = is_left(line.unsent(), seat.ranks);
    bool others = false;
#pragma unroll 1
    for (uint32_t slot = 0; slot < line.fifos.slots; ++slot) {
      if (slot == line.slot || look_at(&line.fifos.all[slot].closed) != 0) continue;
      others |= is_left(Line{seat, line.fifos, slot}.unsent(), seat.ranks);
    }
    if (!mine && !others) break;
    if (!is_to_look()) continue;
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

// What is to be taken from each source: so many rows. The block calls it.
__device__ __forceinline__ void expect_rows(const Line& line, const int32_t* rows) {
  if (threadIdx.x == 0) line.state().taken = 0;
#pragma unroll 1
  for (uint32_t source = threadIdx.x; source < line.seat.ranks; source += blockDim.x) {
    line.from()[source] = line.taken()[source];
    line.taken()[source] += rows[source];
    line.next()[source] = 0;
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
