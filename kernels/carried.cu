// Where collectives carry rows, in the place of windows that peers address. a2a_announce: what they carry of a dispatch beside the
// tokens, which go as they are, and this rank's words; a2a_receive: what came of it; a2a_mark: tells the host that a collective has
// ended whose second half comes later.
//
// Words, and beside them ids and weights if those are few, are this rank's box; a collective puts every rank's one behind the
// other, this rank's among them.
#include "finish.cuh"
#include "places.cuh"

namespace a2a {

constexpr uint32_t kAnnounceThreads = 512;
constexpr uint32_t kReceiveThreads = 256;

// If there is a word of a dispatch at the lane's place in a mailbox.
__device__ __forceinline__ bool has_word(uint32_t lane) {
  constexpr uint32_t kAt = 1u << kProgress / 8 | 1u << kLoss / 8 | 1u << kLossOrigin / 8 | 1u << kTokens / 8 |
                           3u << kDispatchPair / 8;
  return (kAt | 0xffu << kDispatchShape / 8) >> lane & 1;
}
static_assert(kMailBytes == 32 * 8 && kShapeWords == 16 && kReplays == kTokens + 4);

// The words of a dispatch, and of a loss if there was one, which lie in this rank's own mailbox. A warp calls it.
__device__ __forceinline__ void write_words(const Seat& seat, const Receive& receive, uint8_t* box, uint32_t epoch) {
  const uint32_t lane = threadIdx.x % 32, shape = lane - kDispatchShape / 8;
  uint64_t word = static_cast<uint64_t>(epoch) << 32 | (lane == kDispatchPair / 8 ? receive.tokens : receive.digest);
  if (shape < kShapeWords / 2) {
    word = static_cast<uint64_t>(receive.shape[2 * shape + 1]) << 32 | receive.shape[2 * shape];
  } else if (lane == kTokens / 8) {
    word = static_cast<uint64_t>(seat.replays) << 32 | receive.tokens;
  } else if (lane == kProgress / 8) {
    word = progress(epoch, seat.replays ? kReplay : kDispatch, seat.bound);
  } else if (lane == kLoss / 8 || lane == kLossOrigin / 8) {
    word = mail64(mailbox(seat, seat.rank, seat.rank), 0)[lane];
  }
  if (has_word(lane)) mail64(box, 0)[lane] = word;
}

// A warp a token at a time. The slot moves on by the block that is done last: all have then read where it stands. What they store
// is there for the collective when the kernel ends.
extern "C" __global__ void __launch_bounds__(kAnnounceThreads, 1)
    a2a_announce(const __grid_constant__ AnnounceParams q) {
  constexpr uint32_t kWarps = kAnnounceThreads / 32;
  __shared__ bool is_last;
  const PushParams& p = q.push;
  const Seat& seat = p.seat;
  // Launched while the kernel before it ends, whoever's it is.
  ptx::wait_prerequisites();
  const OnSm on_sm(seat);
  const uint32_t tid = threadIdx.x, warp = tid / 32;
  Slot& slot = *seat.slot;
  const bool marks = blockIdx.x == 0 && tid == kAnnounceThreads - 64;
  if (marks) mark_begin(seat, q.receive.marks);
  const Standing at = standing_of(slot);
  if (marks && at.opens()) slot.begun = ticks();
#pragma unroll 1
  for (uint32_t token = blockIdx.x * kWarps + warp; token < p.route.tokens; token += gridDim.x * kWarps) {
    int32_t id;
    float weight;
    const bool bad = read_choice(p.route, token, id, weight);
    if (at.opens()) store_beside<false>(p, token, id, weight, bad, own_place(p, token));
  }
  // A box lies where others lay, and says no more than that this rank is not there yet if it does not open.
  uint8_t* box = window_of(seat, seat.rank) + q.box;
  const bool boxed = box != mailbox(seat, seat.rank, seat.rank);
  if (blockIdx.x == 0 && warp == kWarps - 1 && (at.opens() || boxed)) {
    write_words(seat, q.receive, box, at.epoch + (at.opens() ? 1 : 0));
  }
  __syncthreads();
  if (gridDim.x > 1) {
    if (tid == 0) is_last = atomicAdd(&slot.arrived, 1) == gridDim.x - 1;
    __syncthreads();
    if (!is_last) return;
  }
  if (tid != 0) return;
  slot.arrived = 0, slot.whole = 0;
  if (at.opens()) {
    slot.state = kDispatchSent, slot.epoch = at.epoch + 1, slot.sequence = at.sequence + 1, slot.routing = seat.routing;
    count_sent(seat, q.receive, nullptr, q.receive.wire_bytes, kRowsPushed);
  } else if (at.closed == 0) {
    refuse_order(seat, kDispatch, at.state);
  }
}

// Ids and weights out of every rank's box, if the half `goes`: they are on their way before that is known. The block calls it.
template <class Unit>
__device__ __forceinline__ void unpack(const ReceiveParams& p, const uint8_t* boxes, bool goes) {
  constexpr uint32_t kAtOnce = 4;
  const uint32_t units = p.beside_bytes / sizeof(Unit), all = p.seat.ranks * units;
#pragma unroll 1
  for (uint32_t first = threadIdx.x; first < all; first += kAtOnce * kReceiveThreads) {
    Unit ids[kAtOnce], weights[kAtOnce];
#pragma unroll
    for (uint32_t j = 0; j < kAtOnce; ++j) {
      const uint32_t i = first + j * kReceiveThreads, source = i / units;
      if (i >= all) break;
      const uint8_t* box = boxes + source * p.box_bytes;
      ids[j] = reinterpret_cast<const Unit*>(box + kMailBytes)[i - source * units];
      weights[j] = reinterpret_cast<const Unit*>(box + p.weights_at)[i - source * units];
    }
#pragma unroll
    for (uint32_t j = 0; j < kAtOnce; ++j) {
      const uint32_t i = first + j * kReceiveThreads;
      if (i >= all || !goes) break;
      reinterpret_cast<Unit*>(p.ids)[i] = ids[j];
      reinterpret_cast<Unit*>(p.weights)[i] = weights[j];
    }
  }
}

// What is not as it should be is looked at as where ranks address each other's windows: it finds out what. Apart, because code that
// does not run takes time where it lies in between.
__device__ __noinline__ void receive_slowly(const ReceiveParams& p, const uint8_t* boxes, Ending& end) {
  const Seat& seat = p.seat;
  const uint32_t lane = threadIdx.x % 32;
  const Standing at = standing_of(*seat.slot);
  // Boxes of another step may have other places.
  const bool goes = at.receives(seat.routing);
#pragma unroll 1
  for (uint32_t source = threadIdx.x / 32; source < seat.ranks && goes; source += blockDim.x / 32) {
    const auto* words = reinterpret_cast<const uint64_t*>(boxes + source * p.box_bytes);
    if (has_word(lane)) mail64(mailbox(seat, seat.rank, source), 0)[lane] = words[lane];
  }
  __syncthreads();
  Finish(seat, p.receive, kWaits, nullptr, at, end).run([] {}, look_early(seat));
}

// By one block, behind the collective, which waited: everything has come that will.
extern "C" __global__ void __launch_bounds__(kReceiveThreads, 1)
    a2a_receive(const __grid_constant__ ReceiveParams p) {
  __shared__ Ending end;
  const Seat& seat = p.seat;
  const Receive& receive = p.receive;
  ptx::wait_prerequisites();
  ptx::launch_dependents();
  const OnSm on_sm(seat);
  const uint32_t tid = threadIdx.x;
  Slot& slot = *seat.slot;
  const uint8_t* boxes = window_of(seat, seat.rank) + p.boxes;
  // One load waits for none of the others: what a warp stores of what it has read holds up all that it reads behind that.
  const Standing at = standing_of(slot);
  const uint32_t bad = tid == 0 ? slot.bad_ids : 0;
  const bool goes = at.receives(seat.routing);
  bool fine = goes;
  if (tid == kReceiveThreads - 32) fine &= mark_end(slot, receive.marks);
#pragma unroll 1
  for (uint32_t source = tid; source < seat.ranks; source += kReceiveThreads) {
    const uint8_t* box = boxes + source * p.box_bytes;
    const auto pair = *reinterpret_cast<const ulonglong2*>(box + kDispatchPair);
    const uint32_t tokens = *reinterpret_cast<const uint32_t*>(box + kTokens);
    fine &= reached(pair.x, at.epoch) & reached(pair.y, at.epoch) & static_cast<uint32_t>(pair.y) == receive.digest;
    // Where collectives carry rows, the host was told. Counts say how much is looked at, in steps that come to nothing too: they are
    // the host's, and of a half that is in order.
    const uint32_t told = told_tokens(receive, source);
    fine &= tokens == told;
    if (!goes) continue;
    receive.kept_counts[source] = told;
    if (receive.rank_counts != nullptr) receive.rank_counts[source] = told;
    if (receive.status != nullptr) receive.status[4 + source] = 0;
  }
#pragma unroll 1
  for (uint32_t i = tid; goes && receive.expert_counts != nullptr && i < receive.local; i += kReceiveThreads) {
    receive.expert_counts[i] = 0;
  }
  if (p.vectors != 0) {
    unpack<int4>(p, boxes, goes);
  } else {
    unpack<uint32_t>(p, boxes, goes);
  }
  if (!__syncthreads_and(fine)) return receive_slowly(p, boxes, end);
  if (tid != 0) return;
  if (receive.status != nullptr) {
    receive.status[0] = bad != 0 ? kStepBadId : 0;
    receive.status[1] = bad, receive.status[2] = 0, receive.status[3] = p.rows;
  }
  if (receive.rows != nullptr) *receive.rows = p.rows;
  slot.state = kDispatched, slot.whole = 1, slot.bad_ids = 0;
  // A second dispatch completes the first step of a comm that never combines.
  if (at.sequence > 1) seat.shared->first_step_done = 1;
  ptx::add_relaxed_gpu(&seat.shared->counters[kHops], 1);
  ptx::add_relaxed_gpu(&seat.shared->counters[kRowsGathered], p.rows);
}

extern "C" __global__ void __launch_bounds__(32) a2a_mark(const __grid_constant__ MarkParams p) {
  if (threadIdx.x == 0) mark_end(*p.slot, p.marks);
}

}  // namespace a2a
