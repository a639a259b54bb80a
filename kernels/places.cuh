// Where a token's rows go, and what travels beside them.
#pragma once
#include "copy.cuh"
#include "route.cuh"
#include "wait.cuh"

namespace a2a {

// Where a token goes, a destination a lane: its window, the row there among this rank's (kNone: there is no room for it), and
// the rank (-1: none).
struct Places {
  uint32_t count;
  uint8_t* window;
  uint32_t row;
  int32_t rank;
};

// From one column to the next of scales at a rank, where rows are (token, expert) pairs in one list: as many as the rank has room
// for (Grid::capacity in grid.rs), rounded up (COLUMN_PAD in map.rs).
__device__ __forceinline__ uint32_t pitch_of(const Blocks& blocks, uint32_t rank) {
  const uint64_t local = blocks.firsts[rank + 1] - blocks.firsts[rank], align = blocks.alignment;
  const uint64_t most = blocks.tokens * min(local, static_cast<uint64_t>(blocks.topk)) + local * (align - 1);
  uint64_t rows = (most + align - 1) / align * align;
  if (blocks.limit != 0) rows = min(rows, static_cast<uint64_t>(blocks.limit));
  return static_cast<uint32_t>((rows + 3) / 4 * 4);
}

// As they were found before.
__device__ __forceinline__ Places read_places(const PushParams& p, uint32_t token) {
  const Route& route = p.route;
  const uint32_t lane = threadIdx.x % 32;
  const uint64_t at = static_cast<uint64_t>(token) * route.fanout + lane;
  const int32_t rank = lane < route.fanout ? route.target_ranks[at] : -1;
  const uint32_t row = lane < route.fanout ? route.target_rows[at] : 0;
  return Places{static_cast<uint32_t>(__popc(__ballot_sync(~0u, rank >= 0))),
                rank >= 0 ? window_of(p.seat, rank) : nullptr, row, rank};
}

// Where a published row lies: in the own window, at the token's number.
__device__ __forceinline__ Places own_place(const PushParams& p, uint32_t token) {
  return Places{1, window_of(p.seat, p.seat.rank), token, static_cast<int32_t>(p.seat.rank)};
}

// Stores what is beside a token's row to every place. A warp calls it; a choice a lane. `pairs`: rows are (token, expert)
// pairs, some of which may be left out, and what follows from the expert goes to the token's row in a bank, the lane's
// `bank_row`, with the rows of all its choices.
template <bool pairs>
__device__ __forceinline__ void store_beside(const PushParams& p, uint32_t token, int32_t id, float weight, bool is_bad,
                                             const Places& to, uint32_t bank_row = 0) {
  const Seat& seat = p.seat;
  const Route& route = p.route;
  const uint32_t lane = threadIdx.x % 32;
  const bool publishes = p.flags & kPublishes;
  keep_choice(seat, route, token, id, weight, is_bad);
  const uint64_t row = p.row_base + (pairs ? bank_row : to.row);
  uint8_t* ids = to.window + p.to_ids + row * route.topk * 4;
  const uint64_t to_weights = p.to_weights - p.to_ids, to_places = p.to_places - p.to_ids;
  int32_t place = -1;
  if (pairs && lane < route.topk) place = route.pair_rows[static_cast<uint64_t>(token) * route.topk + lane];
#pragma unroll 1
  for (uint32_t i = 0; i < to.count; ++i) {
    auto* at = reinterpret_cast<uint8_t*>(__shfl_sync(~0u, reinterpret_cast<uint64_t>(ids), i)) + 4 * lane;
    if (lane >= route.topk) continue;
    *reinterpret_cast<int32_t*>(at) = id;
    *reinterpret_cast<float*>(at + to_weights) = weight;
    if (pairs) *reinterpret_cast<int32_t*>(at + to_places) = place;
  }
  if (lane < to.count && !publishes) {
    reinterpret_cast<int2*>(to.window + p.to_source)[row] = make_int2(seat.rank, token);
  }
  for (uint32_t number = 0; number < p.sides; ++number) {
    const Side& side = p.side[number];
    const uint64_t block = p.flags & (kPublishes | kPacked) ? 0 : seat.rank;
    // A row that a warp can hold is read once.
    const uint32_t vectors = side.bytes / 16;
    const bool held = side.pitch == 0 && side.unit == 16 && vectors <= 32;
    int4 value = make_int4(0, 0, 0, 0);
    if (held && lane < vectors) value = ptx::ld_stream(side.from + token * side.stride + 16 * lane);
#pragma unroll 1
    for (uint32_t i = 0; i < to.count; ++i) {
      auto* window = reinterpret_cast<uint8_t*>(__shfl_sync(~0u, reinterpret_cast<uint64_t>(to.window), i));
      const uint32_t its_row = __shfl_sync(~0u, to.row, i);
      if (pairs && its_row == kNone) continue;
      if (held) {
        if (lane < vectors) ptx::st_row(window + side.to + (block * seat.bound + its_row) * side.bytes + 16 * lane, value);
      } else if constexpr (pairs) {
        Side its = side;
        if (its.pitch != 0) its.pitch = pitch_of(p.blocks, __shfl_sync(~0u, to.rank, i));
        copy_side(its, token, window, block, its_row, seat.bound);
      } else {
        copy_side(side, token, window, block, its_row, seat.bound);
      }
    }
  }
}

}  // namespace a2a
