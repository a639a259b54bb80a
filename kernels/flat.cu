// A dispatch whose rows are (token, rank) pairs without gaps, on few multiprocessors: a2a_place, a2a_carry, then a2a_finish,
// then a2a_settle. a2a_carry also carries what contiguous.cu places.
//
// One block places: it tells this rank's counts, hears everybody's and writes down where each row goes, so that those that
// carry wait for nobody, and few of them can carry much: a warp has a row brought into shared memory and from there to all of
// its ranks by bulk copies, and is free for what travels beside it. A first half on its own must not wait for counts: its
// rows go into its source's bank at each rank, from where the second half settles them.
#include "arrivals.cuh"
#include "packed.cuh"
#include "places.cuh"

namespace a2a {

// In a build for tests few tokens at a time.
#ifdef A2A_JITTER
constexpr uint32_t kPlaceThreads = 64;
#else
constexpr uint32_t kPlaceThreads = 512;
#endif
constexpr uint32_t kCarryWarps = 14, kBesideWarps = 8, kCarryThreads = 32 * (kCarryWarps + kBesideWarps);
constexpr uint32_t kCarryStages = 2;
constexpr uint32_t kSettleThreads = 512;

struct Placing {
  Meeting meeting;
  Hearing heard;
  // By rank: tokens that go there, and a zero.
  uint32_t count[kMaxRanks + 1];
  uint32_t of_warp[kPlaceThreads / 32][32];
};

// Writes down where each token's rows go, those from `room` on nowhere. The block calls it; s.heard.next are the first rows.
__device__ __forceinline__ void place_tokens(const Route& route, uint32_t ranks, uint32_t room, Placing& s) {
  constexpr uint32_t kWarps = kPlaceThreads / 32;
  const uint32_t lane = threadIdx.x % 32, warp = threadIdx.x / 32;
#pragma unroll 1
  for (uint32_t first = 0; first < route.tokens; first += kPlaceThreads) {
    const uint32_t token = first + threadIdx.x;
    int32_t* const target_ranks = route.target_ranks + static_cast<uint64_t>(token) * route.fanout;
    int32_t* const target_rows = route.target_rows + static_cast<uint64_t>(token) * route.fanout;
    uint32_t found = 0;
#pragma unroll 1
    for (uint32_t base = 0; base < ranks; base += kAtOnce) {
      const uint32_t group = min(ranks - base, kAtOnce);
      const uint32_t to = token < route.tokens ? ranks_of(route, token, base) : 0;
      uint32_t mine = 0;
#pragma unroll 1
      for (uint32_t rank = 0; rank < group; ++rank) {
        const uint32_t votes = __popc(__ballot_sync(~0u, to >> rank & 1));
        if (lane == rank) mine = votes;
      }
      s.of_warp[warp][lane] = mine;
      __syncthreads();
      uint32_t row = lane < group ? s.heard.next[base + lane] : 0, all = row;
#pragma unroll
      for (uint32_t i = 0; i < kWarps; ++i) {
        const uint32_t tokens = s.of_warp[i][lane];
        if (i < warp) row += tokens;
        all += tokens;
      }
#pragma unroll 1
      for (uint32_t rank = 0; rank < group; ++rank) {
        const uint32_t votes = __ballot_sync(~0u, to >> rank & 1);
        const uint32_t at = __shfl_sync(~0u, row, rank) + __popc(votes & ((1u << lane) - 1));
        if (!(to >> rank & 1) || at >= room) continue;
        target_ranks[found] = base + rank, target_rows[found] = at;
        ++found;
      }
      // All have read what was before.
      __syncthreads();
      if (warp == 0 && lane < group) s.heard.next[base + lane] = all;
    }
    if (token < route.tokens) {
#pragma unroll 1
      for (; found < route.fanout; ++found) target_ranks[found] = -1;
    }
  }
}

extern "C" __global__ void __launch_bounds__(kPlaceThreads, 1) a2a_place(const __grid_constant__ PlaceParams p) {
  __shared__ Placing s;
  const Seat& seat = p.seat;
  const OnSm on_sm(seat);
  const Route& route = p.route;
  const bool tells = p.flags & kRaises, hears = p.flags & kWaits;
  const Standing at = standing_of(*seat.slot, p.flags & kAfterOpen);
  if (tells) {
    if (threadIdx.x == 0) s.count[seat.ranks] = 0;
    count_before(route, seat.ranks, route.tokens, s.count);
  }
  if (tells ? !at.opens() : !at.receives(seat.routing)) return;
  const uint32_t epoch = at.epoch + (tells ? 1 : 0);
  if (tells) tell_rows(p, epoch, s.count, at.absent);
  if (hears) {
    const uint64_t started = at.state == kOpened ? at.started : ptx::globaltimer();
    const Wait wait{kDispatch, epoch, at.sequence + (tells ? 1 : 0), true, kCountsFlag};
    // Who comes behind sees that the slot is closed.
    if (!await(seat, wait, s.meeting, started)) return;
    hear_rows(p, epoch, s.heard);
  } else {
#pragma unroll 1
    for (uint32_t rank = threadIdx.x; rank < seat.ranks; rank += kPlaceThreads) {
      s.heard.next[rank] = p.flags & kFromZero ? 0 : seat.rank * seat.bound, route.rows_for[rank] = s.count[rank];
    }
  }
  // Not before: large blocks that wait, if only for this one, could keep out what it waits for.
  ptx::launch_dependents();
  __syncthreads();
  place_tokens(route, seat.ranks, hears ? p.room : kNone, s);
}

// Most warps take pieces of rows by turns; `p.piece` is small enough for all stages to be in shared memory. The last ones take
// tokens, and move what is beside their rows.
extern "C" __global__ void __launch_bounds__(kCarryThreads, 1) a2a_carry(const __grid_constant__ PushParams p) {
  extern __shared__ __align__(128) uint8_t stages[];
  __shared__ uint64_t barriers[kCarryWarps][kCarryStages];
  const OnSm on_sm(p.seat);
  const Route& route = p.route;
  const uint32_t lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const Standing at = standing_of(*p.seat.slot, p.flags & kFollows);
  if (warp >= kCarryWarps) {
    ptx::wait_prerequisites();
    ptx::launch_dependents();
    if (!at.opens() || has_closed(p.seat)) return;
#pragma unroll 1
    for (uint32_t token = (warp - kCarryWarps) * gridDim.x + blockIdx.x; token < route.tokens;
         token += gridDim.x * kBesideWarps) {
      int32_t id;
      float weight;
      const bool is_bad = read_choice(route, token, id, weight);
      const Places to = read_places(p, token);
      if (p.bank_rows == nullptr) {
        store_beside<false>(p, token, id, weight, is_bad, to);
      } else {
        const uint32_t row = lane < to.count ? p.bank_rows[static_cast<uint64_t>(token) * route.fanout + lane] : 0;
        store_beside<true>(p, token, id, weight, is_bad, to, row);
      }
    }
    return;
  }

  // Two multiprocessors may share a way to memory that others have for themselves, so the warps take what they have time for.
  const uint64_t items = static_cast<uint64_t>(route.tokens) * p.jobs, firsts = gridDim.x * kCarryWarps;
  const uint32_t piece = 16 * p.piece;
  uint8_t* const stage = stages + warp * kCarryStages * piece;
  uint64_t* const barrier = barriers[warp];
  const auto bytes_of = [&](uint32_t job) { return 16 * min(p.piece, p.vectors - job * p.piece); };
  const auto load = [&](uint64_t item, uint32_t at) {
    if (item >= items || lane != 0) return;
    const uint32_t token = item / p.jobs, job = item - static_cast<uint64_t>(token) * p.jobs;
    ptx::load_bulk(stage + at * piece, p.tokens + token * p.token_stride + job * piece, bytes_of(job), barrier + at);
  };
  if (lane < kCarryStages) ptx::init_barrier(barrier + lane);
  ptx::fence_shared();
  __syncwarp();
  uint64_t item = static_cast<uint64_t>(warp) * gridDim.x + blockIdx.x;
  load(item, 0);
  ptx::wait_prerequisites();
  ptx::launch_dependents();
  // The kernel before may have closed the slot.
  const bool goes = at.opens() && !has_closed(p.seat);
#pragma unroll 1
  for (uint32_t turns = 0; item < items; ++turns) {
    const uint32_t token = item / p.jobs, job = item - static_cast<uint64_t>(token) * p.jobs, at = turns % kCarryStages;
    uint64_t next = 0;
    if (lane == 0) next = firsts + atomicAdd(&p.seat.slot->taken, 1);
    const Places to = read_places(p, token);
    ptx::await_bytes(barrier + at, turns / kCarryStages % 2);
    if (!goes) return;
    if (lane < to.count && to.row != kNone) {
      uint8_t* row = to.window + p.to_tokens + (p.row_base + to.row) * 16ull * p.vectors;
      ptx::store_bulk(row + job * piece, stage + at * piece, bytes_of(job));
    }
    ptx::close_group();
    // What was stored of the other stage is out of it.
    ptx::await_read<kCarryStages - 1>();
    __syncwarp();
    load(next, (turns + 1) % kCarryStages);
    item = __shfl_sync(~0u, next, 0);
  }
  ptx::await_stored();
}

extern "C" __global__ void __launch_bounds__(kSettleThreads, 1) a2a_settle(const __grid_constant__ SettleParams p) {
  __shared__ Arrivals s;
  const Seat& seat = p.seat;
  const OnSm on_sm(seat);
  if (seat.slot->whole == 0) return;
  const uint32_t tid = threadIdx.x, lane = tid % 32;
  const uint32_t warp = (blockIdx.x * kSettleThreads + tid) / 32, warps = gridDim.x * kSettleThreads / 32;
  read_arrivals(seat, p.kept_counts, s);
  const uint32_t all = s.start[seat.ranks];
  uint8_t* const own = window_of(seat, seat.rank);
  if (s.any) {
    uint32_t source = 0;
#pragma unroll 1
    for (uint32_t row = warp; row < all; row += warps) {
      while (row >= s.start[source + 1]) ++source;
      if (!s.is_banked(source)) continue;
      const uint64_t from = static_cast<uint64_t>(source) * seat.bound + row - s.start[source];
      copy_bytes(own + p.to_tokens + row * 16ull * p.vectors, own + p.bank_tokens + from * 16 * p.vectors,
                 16 * p.vectors, 16, lane, 32);
      copy_bytes(own + p.to_ids + row * 4ull * p.topk, own + p.bank_ids + from * 4 * p.topk, 4 * p.topk, 4, lane, 32);
      copy_bytes(own + p.to_weights + row * 4ull * p.topk, own + p.bank_weights + from * 4 * p.topk, 4 * p.topk, 4, lane,
                 32);
      copy_bytes(own + p.to_source + row * 8ull, own + p.bank_source + from * 8, 8, 4, lane, 32);
#pragma unroll 1
      for (uint32_t number = 0; number < p.sides; ++number) {
        Side side = p.side[number];
        side.from = own + side.bank, side.stride = side.bytes;
        copy_side(side, from, own, 0, row, 0);
      }
    }
  }
  const uint64_t thread = static_cast<uint64_t>(blockIdx.x) * kSettleThreads + tid, threads = gridDim.x * kSettleThreads;
  auto* ids = reinterpret_cast<int32_t*>(own + p.to_ids);
  auto* weights = reinterpret_cast<float*>(own + p.to_weights);
  auto* sources = reinterpret_cast<int2*>(own + p.to_source);
#pragma unroll 1
  for (uint64_t i = static_cast<uint64_t>(all) * p.topk + thread; i < p.rows * p.topk; i += threads) {
    if (p.flags & kPadIds) ids[i] = -1;
    if (p.flags & kPadWeights) weights[i] = 0.0f;
  }
#pragma unroll 1
  for (uint64_t i = all + thread; i < p.rows && p.flags & kPadSource; i += threads) sources[i] = make_int2(-1, -1);
}

}  // namespace a2a
