// Where couriers carry rows and words, in the place of windows that peers address. Of a dispatch a2a_pairs stores counts, rows and words
// for each peer into this rank's own memory, which the host sends when the flags are up; a2a_arrive waits until the host has stored
// everybody's flags, and a2a_fetch brings what has come to where peers would have stored it, where a2a_pairs goes on. Of a combine
// a2a_order finds where this rank's results will lie, a2a_return packs those for the peers, and a2a_bring fetches them.
//
// What the host sends and receives is pinned memory: a desk for each peer, and an inbox. Results for a rank lie one behind the other, by
// expert and then by position among that rank's rows, and behind them the values that go back beside them.
#include "counts.cuh"

namespace a2a {

constexpr uint32_t kPostedThreads = 256;
constexpr uint32_t kArriveThreads = 128;
constexpr uint32_t kOrderThreads = 1024;

// Parts of boxes begin at multiples of this (map.rs).
__device__ __forceinline__ uint64_t aligned(uint64_t bytes) { return (bytes + 15) / 16 * 16; }

// Copies bytes that lie together, by threads from `start` on, a step of `step`. `unit`: the widest access that all allows.
__device__ __forceinline__ void copy_run(uint8_t* to, const uint8_t* from, uint64_t bytes, uint32_t unit, uint64_t start,
                                         uint64_t step) {
  if (unit == 16) {
#pragma unroll 4
    for (uint64_t i = start; i < bytes / 16; i += step) ptx::st_row(to + 16 * i, ptx::ld_stream(from + 16 * i));
  } else if (unit >= 4) {
#pragma unroll 4
    for (uint64_t i = start; i < bytes / 4; i += step) {
      reinterpret_cast<uint32_t*>(to)[i] = reinterpret_cast<const volatile uint32_t*>(from)[i];
    }
  } else {
#pragma unroll 1
    for (uint64_t i = start; i < bytes; i += step) to[i] = reinterpret_cast<const volatile uint8_t*>(from)[i];
  }
}

// By one block. A step that is lost is closed when it ends.
extern "C" __global__ void __launch_bounds__(kArriveThreads) a2a_arrive(const __grid_constant__ OpenParams p) {
  __shared__ Meeting meeting;
  const Seat& seat = p.seat;
  const OnSm on_sm(seat);
  const Standing at = standing_of(*seat.slot);
  // What is behind it says so.
  if (!at.receives(seat.routing)) return;
  const Wait wait{seat.replays ? kReplay : kDispatch, at.epoch, at.sequence, true, kDispatchPair};
  await(seat, wait, meeting, ptx::globaltimer());
}

// A block takes a part of what a source has sent.
extern "C" __global__ void __launch_bounds__(kPostedThreads, 2) a2a_fetch(const __grid_constant__ FetchParams p) {
  const Seat& seat = p.seat;
  const OnSm on_sm(seat);
  const Standing at = standing_of(*seat.slot);
  if (!at.receives(seat.routing)) return;
#pragma unroll 1
  for (uint32_t unit = blockIdx.x; unit < seat.ranks * p.parts; unit += gridDim.x) {
    const uint32_t source = unit / p.parts, part = unit - source * p.parts;
    const bool absent = at.absent && seat.shared->absent.has(source);
    const uint32_t flag = ptx::ld_relaxed_sys(mail64(mailbox(seat, seat.rank, source), kDispatchPair));
    // What a peer wrote is bounded before it is an index.
    const uint64_t rows = absent ? 0 : min(flag & 0x7fffffffu, seat.bound);
    const uint8_t* inbox = p.inboxes[source];
    const uint64_t start = part * kPostedThreads + threadIdx.x, step = static_cast<uint64_t>(p.parts) * kPostedThreads;
    auto* counts = reinterpret_cast<ulonglong2*>(count_at(seat, p.counts, seat.rank, source, 0));
    const auto* told = reinterpret_cast<const int4*>(inbox + p.counts_at);
#pragma unroll 1
    for (uint64_t i = start; i < p.counts.stride / 16; i += step) {
      if (absent) {
        counts[i] = make_ulonglong2(pack(at.epoch, 0), pack(at.epoch, 0));
      } else {
        *reinterpret_cast<int4*>(counts + i) = ptx::ld_stream(told + i);
      }
    }
    const uint8_t* from = inbox + p.rows_at;
#pragma unroll 1
    for (uint32_t number = 0; number < p.planes; ++number) {
      const Plane& plane = p.plane[number];
      const uint64_t bytes = rows * plane.bytes, before = static_cast<uint64_t>(source) * seat.bound * plane.bytes;
      copy_run(window_of(seat, seat.rank) + plane.bank + before, from, bytes, plane.unit, start, step);
      // The host sends planes one behind the other; this rank's own rows it leaves where a2a_pairs has put them.
      from += aligned(source == seat.rank ? static_cast<uint64_t>(seat.bound) * plane.bytes : bytes);
    }
  }
}

// This rank's count of an expert, of the step that the slot is at.
__device__ __forceinline__ uint32_t own_count(const OrderParams& p, uint32_t expert) {
  return count_of(p.seat, p.counts, p.seat.rank, expert);
}

// Where this rank's results of each expert start, experts by owner and place. By one block.
extern "C" __global__ void __launch_bounds__(kOrderThreads) a2a_order(const __grid_constant__ OrderParams p) {
  __shared__ uint32_t of_warp[32];
  const OnSm on_sm(p.seat);
  const uint32_t lane = threadIdx.x % 32, warp = threadIdx.x / 32;
#pragma unroll 1
  for (uint32_t expert = threadIdx.x; expert < p.owners.experts; expert += kOrderThreads) {
    const uint32_t owner = owner_of(p.owners, expert);
    p.starts[p.firsts[owner] + place_of(p.owners, expert, owner)] = own_count(p, expert);
  }
  uint32_t carried = 0;
#pragma unroll 1
  for (uint32_t base = 0; base <= p.owners.experts; base += kOrderThreads) {
    __syncthreads();
    const uint32_t key = base + threadIdx.x;
    const uint32_t rows = key < p.owners.experts ? p.starts[key] : 0;
    uint32_t sum = rows;
#pragma unroll
    for (uint32_t apart = 1; apart < 32; apart *= 2) {
      const uint32_t before = __shfl_up_sync(~0u, sum, apart);
      if (lane >= apart) sum += before;
    }
    if (lane == 31) of_warp[warp] = sum;
    __syncthreads();
    uint32_t before = carried, all = 0;
#pragma unroll
    for (uint32_t i = 0; i < kOrderThreads / 32; ++i) {
      if (i < warp) before += of_warp[i];
      all += of_warp[i];
    }
    // The last one is behind all experts.
    if (key <= p.owners.experts) p.starts[key] = before + sum - rows;
    carried += all;
  }
}

// Adds up, by a block.
__device__ __forceinline__ uint32_t block_sum(uint32_t value, uint32_t* of_warp) {
  value = __reduce_add_sync(~0u, value);
  __syncthreads();
  if (threadIdx.x % 32 == 0) of_warp[threadIdx.x / 32] = value;
  __syncthreads();
  uint32_t sum = 0;
#pragma unroll
  for (uint32_t i = 0; i < kPostedThreads / 32; ++i) sum += of_warp[i];
  return sum;
}

// Blocks share the rows that an expert has of a source. This rank's own go straight to where they are summed.
extern "C" __global__ void __launch_bounds__(kPostedThreads, 2) a2a_return(const __grid_constant__ ReturnParams p) {
  __shared__ uint32_t of_warp[kPostedThreads / 32];
  const Seat& seat = p.seat;
  const OnSm on_sm(seat);
  const Standing at = standing_of(*seat.slot);
  if (at.closed != 0 || at.state != kDispatched || at.routing != seat.routing) return;
  const uint64_t size = 16ull * p.vectors;
#pragma unroll 1
  for (uint32_t unit = blockIdx.x; unit < seat.ranks * p.local * p.spread; unit += gridDim.x) {
    const uint32_t run = unit / p.spread, source = run / p.local, place = run - source * p.local;
    const uint32_t mine = count_of(seat, p.counts, source, p.own[place]);
    if (mine == 0) continue;
    uint32_t before = 0, packed = 0, all = 0;
#pragma unroll 1
    for (uint32_t rank = threadIdx.x; rank < source; rank += kPostedThreads) {
      before += count_of(seat, p.counts, rank, p.own[place]);
    }
#pragma unroll 1
    for (uint32_t other = threadIdx.x; other < p.local; other += kPostedThreads) {
      const uint32_t rows = count_of(seat, p.counts, source, p.own[other]);
      all += rows;
      if (other < place) packed += rows;
    }
    before = block_sum(before, of_warp), packed = block_sum(packed, of_warp), all = block_sum(all, of_warp);
    // Dropped rows leave gaps behind those that are kept. What a peer wrote is bounded before it is an index.
    const uint64_t free = p.room - min(static_cast<uint64_t>(packed), p.room);
    const uint32_t kept = min(static_cast<uint64_t>(min(before + mine, p.block) - min(before, p.block)), free);
    const uint64_t first = static_cast<uint64_t>(place) * p.block + before;
    uint8_t* window = window_of(seat, source);
    uint8_t *to = window + p.results, *values = to + aligned(min(static_cast<uint64_t>(all), p.room) * size);
    if (source == seat.rank) {
      const uint64_t start = p.starts[p.firsts[seat.rank]];
      to = window + p.brought + start * size, values = window + p.brought_weights + start * 4;
    }
#pragma unroll 1
    for (uint32_t row = unit - run * p.spread; row < kept; row += p.spread) {
      const uint8_t* from = p.rows + (first + row) * p.stride;
      copy_run(to + (packed + row) * size, from, size, 16, threadIdx.x, kPostedThreads);
      if (p.weights == nullptr || threadIdx.x != 0) continue;
      const auto* value = reinterpret_cast<const float*>(p.weights + (first + row) * p.weights_stride);
      reinterpret_cast<float*>(values)[packed + row] = *value;
    }
  }
}

// A block takes a part of what an owner has sent back; and of the choices, which of the results that have come is whose.
extern "C" __global__ void __launch_bounds__(kPostedThreads, 2) a2a_bring(const __grid_constant__ BringParams p) {
  const Seat& seat = p.order.seat;
  const OnSm on_sm(seat);
  if (seat.slot->whole == 0) return;
  uint8_t* window = window_of(seat, seat.rank);
  const uint64_t size = 16ull * p.vectors;
#pragma unroll 1
  for (uint32_t unit = blockIdx.x; unit < seat.ranks * p.parts; unit += gridDim.x) {
    const uint32_t owner = unit / p.parts, part = unit - owner * p.parts;
    const uint64_t first = p.order.starts[p.order.firsts[owner]], end = p.order.starts[p.order.firsts[owner + 1]];
    if (owner == seat.rank || first == end || (seat.slot->absent && seat.shared->absent.has(owner))) continue;
    const uint8_t* from = p.inboxes[owner] + p.results;
    const uint64_t start = part * kPostedThreads + threadIdx.x, step = static_cast<uint64_t>(p.parts) * kPostedThreads;
    copy_run(window + p.brought + first * size, from, (end - first) * size, 16, start, step);
    if (p.has_weights == 0) continue;
    copy_run(window + p.brought_weights + first * 4, from + aligned((end - first) * size), (end - first) * 4, 4, start, step);
  }
  const uint64_t choices = static_cast<uint64_t>(p.tokens) * p.topk;
#pragma unroll 1
  for (uint64_t i = blockIdx.x * kPostedThreads + threadIdx.x; i < choices; i += gridDim.x * kPostedThreads) {
    const int32_t id = p.ids[i], row = p.pair_rows[i];
    int32_t result = -1;
    if (id >= 0 && row >= 0) {
      const uint32_t owner = owner_of(p.order.owners, id), place = place_of(p.order.owners, id, owner);
      uint32_t before = 0;
#pragma unroll 1
      for (uint32_t rank = 0; rank < seat.rank; ++rank) before += count_of(seat, p.order.counts, rank, id);
      result = p.order.starts[p.order.firsts[owner] + place] + row - place * p.block - before;
    }
    p.result_rows[i] = result;
  }
}

}  // namespace a2a
