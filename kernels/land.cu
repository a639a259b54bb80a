// a2a_land: received rows to where the caller wants them, from the own window (pushed rows) or from the peers' (gathered
// ones); the padding that the receiver writes; tokens counted by expert.
//
// Blocks wait for nobody: the flags have come before the kernel runs. Row b of the outputs is block b's.
#include "copy.cuh"
#include "route.cuh"
#include "wait.cuh"

namespace a2a {

constexpr uint32_t kLandThreads = 512;

// The last block that starts at a row or before it. The first starts at 0.
__device__ __forceinline__ uint32_t block_of(const LandParams& p, uint32_t row) {
  uint32_t first = 0, last = p.blocks;
  while (last - first > 1) {
    const uint32_t middle = (first + last) / 2;
    (static_cast<uint32_t>(p.starts[middle]) <= row ? first : last) = middle;
  }
  return first;
}

// Brings a part of a row to where it is wanted. A block calls it; `where` is its shared memory.
__device__ __forceinline__ void land(const LandParams& p, uint64_t row, uint32_t part, uint32_t* where) {
  const Seat& seat = p.seat;
  const bool gathered = p.flags & kGathered;
  const uint32_t tid = threadIdx.x;

  // Where the row comes from: its source, and its place among the source's rows; no source: padding.
  if (tid == 0) {
    uint32_t source = seat.ranks, place = 0;
    if (gathered) {
      uint64_t before = 0;
      for (uint32_t rank = 0; rank < seat.ranks; ++rank) {
        const uint32_t count = p.kept_counts[rank];
        if (row < before + count) {
          source = rank, place = row - before;
          break;
        }
        before += count;
      }
    } else {
      const uint32_t block = p.starts != nullptr ? block_of(p, row) : row / p.block;
      place = row - (p.starts != nullptr ? p.starts[block] : static_cast<uint64_t>(block) * p.block);
      // Any but `ranks` says that there is a row.
      if (place < static_cast<uint32_t>(p.kept_counts[block])) source = 0;
    }
    where[0] = source, where[1] = place;
  }
  __syncthreads();
  const uint32_t source = where[0], place = where[1];
  const bool pads = source == seat.ranks;
  const bool apart = gathered && !(p.flags & kTogether);
  const uint8_t* window = window_of(seat, apart && !pads ? source : seat.rank);
  const uint64_t from_row = apart ? place : row;
  // The block of rows, and the row in it, where outputs have blocks.
  const uint64_t block = gathered ? 0 : row / p.block, inside = gathered ? row : row % p.block;
  const uint32_t start = part * blockDim.x + tid, step = p.splits * blockDim.x;

  for (uint32_t i = 0; i < p.outs; ++i) {
    const Out& out = p.out[i];
    const uint32_t kind = out.kind % kOutInPlace;
    // Only tokens are wide enough to be worth splitting.
    if (part != 0 && kind != kOutTokens) continue;
    const uint32_t begin = kind == kOutTokens ? start : tid, stride = kind == kOutTokens ? step : blockDim.x;
    const bool marks = kind == kOutIds || kind == kOutSource;
    const bool zeroes = kind == kOutWeights || p.flags & kZeroPadding;
    if (pads ? !marks && !zeroes : out.kind >= kOutInPlace) continue;
    const uint32_t value = marks ? ~0u : 0u;
    if (out.pitch != 0) {
      const uint32_t elements = out.bytes / 4;
      auto* to = reinterpret_cast<uint32_t*>(out.to + block * out.block_stride) + inside;
      const auto* rows = reinterpret_cast<const uint32_t*>(window + out.region);
      for (uint32_t e = begin; e < elements; e += stride) {
        uint32_t word = value;
        if (!pads && out.from_pitch != 0) {
          word = rows[(block * elements + e) * out.from_pitch + inside];
        } else if (!pads) {
          word = rows[from_row * elements + e];
        }
        to[e * out.pitch] = word;
      }
      continue;
    }
    uint8_t* to = out.to + row * out.stride;
    const uint8_t* from = window + out.region + from_row * out.bytes;
    if (kind == kOutIds && p.flags & kWideIds) {
      auto* ids = reinterpret_cast<int32_t*>(to);
      for (uint32_t i = begin; i < out.bytes / 2; i += stride) {
        const int32_t id = pads ? -1 : reinterpret_cast<const int32_t*>(from)[i / 2];
        ids[i] = i % 2 == 0 ? id : id >> 31;
      }
    } else if (kind == kOutSource && gathered && !pads) {
      if (tid < 2) reinterpret_cast<uint32_t*>(to)[tid] = where[tid];
    } else if (pads) {
      fill_bytes(to, out.bytes, out.unit, value, begin, stride);
    } else {
      copy_bytes(to, from, out.bytes, out.unit, begin, stride);
    }
  }

  // A token counts once for each of this rank's experts that it names.
  if (part == 0 && !pads && tid < 32 && (p.expert_counts != nullptr || p.expert_stats != nullptr)) {
    const auto* ids = reinterpret_cast<const int32_t*>(window + p.ids_region) + from_row * p.topk;
    const int32_t id = tid < p.topk ? ids[tid] : -1;
    const uint32_t same = __match_any_sync(~0u, id);
    const bool first = (same & ((1u << tid) - 1)) == 0;
    if (static_cast<uint32_t>(id) < p.owners.experts && first && owner_of(p.owners, id) == seat.rank) {
      const uint32_t local = place_of(p.owners, id, seat.rank);
      if (p.expert_counts != nullptr) atomicAdd(p.expert_counts + local, 1);
      if (p.expert_stats != nullptr) atomicAdd(p.expert_stats + local, 1ull);
    }
  }
}

// Blocks are as many as there are parts of rows, or fewer. Rows that lie with their ranks are fetched from all of them in turn:
// in the rows' own order everybody would read from the first rank, then from the second, each over that one's links alone.
extern "C" __global__ void __launch_bounds__(kLandThreads, 1) a2a_land(const __grid_constant__ LandParams p) {
  __shared__ uint32_t where[2];
  const OnSm on_sm(p.seat);
  if (p.flags & kTogether) ptx::wait_prerequisites();
  if (p.seat.slot->whole == 0) return;
  // The launch has seen to it that parts are fewer than 2^31.
  const bool in_turn = p.flags & kGathered && !(p.flags & kTogether);
  const uint32_t rows = p.rows, ranks = in_turn ? p.seat.ranks : 1, each = (rows + ranks - 1) / ranks;
#pragma unroll 1
  for (uint32_t unit = blockIdx.x; unit < ranks * each * p.splits; unit += gridDim.x) {
    const uint32_t number = unit / p.splits, row = number % ranks * each + number / ranks;
    if (row >= rows) continue;
    // What was read of the one before is done with.
    if (unit != blockIdx.x) __syncthreads();
    land(p, row, unit % p.splits, where);
  }
}

}  // namespace a2a
