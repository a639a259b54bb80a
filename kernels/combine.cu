// Combine: a2a_stage copies the experts' rows to where peers can read them (not needed if they were written there),
// a2a_meet raises this rank's flags and waits for the peers', a2a_reduce reads and sums each token's rows.
//
// One block meets, so the blocks that sum wait for nobody: they are launched behind it, and it lets them onto the device
// only when every flag has come. Where few blocks sum they wait for themselves, behind one that meets (a2a_combine). Sums
// are as the header says: float32, from +0.0, separate multiplications and additions in rank or top-k order, one rounding
// at the end.
#include "meet.cuh"
#include "route.cuh"
#include "sums.cuh"

namespace a2a {

constexpr uint32_t kStageThreads = 1024;
constexpr uint32_t kMeetThreads = 128;
// At most: a token's row is split over smaller blocks, but where blocks are to be few.
constexpr uint32_t kSumThreads = 768;

// Copies a row, and what goes back beside it. A block calls it.
__device__ __forceinline__ void stage_row(const StageParams& p, uint8_t* window, uint64_t row) {
  if (p.rows != nullptr) {
    const uint8_t* from = p.rows + row * p.stride;
    uint8_t* to = window + p.to_rows + row * 16ull * p.vectors;
    uint32_t i = threadIdx.x;
    for (; i + 3 * blockDim.x < p.vectors; i += 4 * blockDim.x) {
      int4 v[4];
#pragma unroll
      for (uint32_t j = 0; j < 4; ++j) v[j] = ptx::ld_stream(from + 16ull * (i + j * blockDim.x));
#pragma unroll
      for (uint32_t j = 0; j < 4; ++j) ptx::st_row(to + 16ull * (i + j * blockDim.x), v[j]);
    }
    for (; i < p.vectors; i += blockDim.x) ptx::st_row(to + 16ull * i, ptx::ld_stream(from + 16ull * i));
  }
  if (p.weights != nullptr) {
    const auto* from = reinterpret_cast<const uint32_t*>(p.weights + row * p.weights_stride);
    auto* to = reinterpret_cast<uint32_t*>(window + p.to_weights + row * p.weight_bytes);
    for (uint32_t i = threadIdx.x; i < p.weight_bytes / 4; i += blockDim.x) to[i] = from[i];
  }
}

// Some blocks stage the rows of each block of rows. Gathered rows stand together: each is a block's.
extern "C" __global__ void __launch_bounds__(kStageThreads, 1) a2a_stage(const __grid_constant__ StageParams p) {
  ptx::launch_dependents();
  const Seat& seat = p.seat;
  const OnSm on_sm(seat);
  // The counts that say how many rows there are, are the routing's.
  const Standing at = standing_of(*seat.slot);
  if (at.closed != 0 || at.state != kDispatched || at.routing != seat.routing) return;
  uint8_t* window = window_of(seat, seat.rank);
  if (p.flags & kGathered) {
    uint64_t all = 0;
    for (uint32_t source = 0; source < seat.ranks; ++source) all += p.kept_counts[source];
    for (uint64_t row = blockIdx.x; row < all; row += gridDim.x) stage_row(p, window, row);
    return;
  }
  for (uint32_t unit = blockIdx.x; unit < p.units; unit += gridDim.x) {
    const uint32_t block = unit / p.spread, rows = p.kept_counts[block];
    const uint64_t start = p.starts != nullptr ? p.starts[block] : static_cast<uint64_t>(block) * p.block;
    for (uint32_t row = unit - block * p.spread; row < rows; row += p.spread) {
      stage_row(p, window, start + row);
    }
  }
}

extern "C" __global__ void __launch_bounds__(kMeetThreads, 4) a2a_meet(const __grid_constant__ MeetParams p) {
  __shared__ Meeting meeting;
  const bool carried = p.marks != nullptr;
  if (p.flags & kStaged || carried) ptx::wait_prerequisites();
  const OnSm on_sm(p.seat);
  if (carried && p.flags & kSends) return announce_results(p);
  // What sums waits for this kernel's end, so the rest is left to it.
  const bool went = carried ? meet_behind_collective(p, meeting) : meet(p, meeting);
  if (went && p.flags & kSettles) settle(p);
}

// ------------------------------------------------------------------------------------------------------------- sums

// Where a token's results are; the weight of each, where results are weighted.
struct Targets {
  uint32_t count;
  uint32_t rank[kMaxTopk];
  uint32_t row[kMaxTopk];
  float weight[kMaxTopk];
};

// The value that came back for a choice of a token, from the rank that owns the expert.
__device__ void pull_weights(const ReduceParams& p, uint32_t token, const Targets& targets, uint64_t base,
                             bool gathered) {
  auto* out = reinterpret_cast<float*>(p.out_weights + token * p.out_weights_stride);
  for (uint32_t k = threadIdx.x; k < p.topk; k += blockDim.x) {
    const int32_t id = p.ids[static_cast<uint64_t>(token) * p.topk + k];
    float value = 0.0f;
    if (id >= 0) {
      const uint32_t owner = owner_of(p.owners, id);
      for (uint32_t i = 0; i < targets.count; ++i) {
        if (targets.rank[i] != owner) continue;
        uint64_t row = base + (gathered ? token : targets.row[i]);
        if (p.flags & kReduceBrought) row = static_cast<uint64_t>(owner) * p.meet.seat.bound + token;
        value = reinterpret_cast<const float*>(window_of(p.meet.seat, owner) + p.from_weights)[row * p.topk + k];
      }
    }
    out[k] = value;
  }
}

// The same where an expert's result is a row of its own.
__device__ __forceinline__ void pull_pair_weights(const ReduceParams& p, uint32_t token) {
  auto* out = reinterpret_cast<float*>(p.out_weights + token * p.out_weights_stride);
  for (uint32_t k = threadIdx.x; k < p.topk; k += blockDim.x) {
    const uint64_t at = static_cast<uint64_t>(token) * p.topk + k;
    const int32_t id = p.ids[at], row = p.pair_rows[at];
    float value = 0.0f;
    if (id >= 0 && row >= 0) {
      const uint8_t* window = window_of(p.meet.seat, owner_of(p.owners, id));
      value = reinterpret_cast<const float*>(window + p.from_weights)[row];
    }
    out[k] = value;
  }
}

// Few blocks: each waits for the flags itself; the first raises this rank's own, looks for trouble, and owns the outcome.
// True if the sums may be made.
__device__ __forceinline__ bool await_flags(const Seat& seat) {
  const uint32_t epoch = *reinterpret_cast<volatile uint32_t*>(&seat.slot->epoch);
  for (;;) {
    bool here = true;
    for (uint32_t source = threadIdx.x; source < seat.ranks; source += blockDim.x) {
      if (source == seat.rank) continue;
      here &= reached(ptx::ld_acquire_sys(mail64(mailbox(seat, seat.rank, source), kCombineFlag)), epoch);
    }
    if (__syncthreads_and(here)) return true;
    // The first block says so if nothing will come of it.
    const bool over = threadIdx.x == 0 && (*reinterpret_cast<volatile uint32_t*>(&seat.slot->closed) != 0 ||
                                           *reinterpret_cast<volatile uint32_t*>(&seat.slot->whole) == 0);
    if (__syncthreads_or(over)) return false;
  }
}

// A token's result of a rank, where results were brought here.
__device__ __forceinline__ const uint8_t* brought(const ReduceParams& p, uint32_t rank, uint32_t token) {
  const Seat& seat = p.meet.seat;
  if (rank == seat.rank) return p.own + token * p.row_bytes;
  return window_of(seat, seat.rank) + p.from_rows + (static_cast<uint64_t>(rank) * seat.bound + token) * p.row_bytes;
}

// The token's results of the ranks that own one of its experts, rank ascending: found by its ids, for nobody had to know where its
// row went. A warp calls it.
__device__ __forceinline__ void find_brought(const ReduceParams& p, uint32_t token, const uint8_t** rows, Targets& targets) {
  const uint32_t lane = threadIdx.x % 32, ranks = p.meet.seat.ranks;
  const int32_t id = lane < p.topk ? p.ids[static_cast<uint64_t>(token) * p.topk + lane] : -1;
  const uint32_t owner = id >= 0 ? owner_of(p.owners, id) : kNone;
  uint32_t count = 0, rank = kNone;
#pragma unroll 1
  for (uint32_t base = 0; base < ranks; base += 32) {
    const uint32_t bits = __reduce_or_sync(~0u, owner - base < 32 ? 1u << (owner - base) : 0u);
#pragma unroll 1
    for (uint32_t rest = bits; rest != 0; rest &= rest - 1, ++count) {
      if (lane == count) rank = base + __ffs(rest) - 1;
    }
  }
  if (rank != kNone) {
    targets.rank[lane] = rank, targets.row[lane] = token;
    rows[lane] = brought(p, rank, token);
  }
  if (lane == 0) targets.count = count;
}

// Sums a part of a token's results. `few`: the block waits for itself, behind one that meets. `pairs`: results are weighted, one
// for each choice. A block calls it; `rows` and `targets` are its shared memory.
template <class From, class To, bool few, bool pairs>
__device__ __forceinline__ void sum_part(const ReduceParams& p, uint32_t unit, const uint8_t** rows, Targets& targets) {
  constexpr uint32_t kElements = 16 / From::kBytes;
  const Seat& seat = p.meet.seat;
  const uint32_t token = unit / p.splits, part = unit - token * p.splits;
  const uint32_t lane = threadIdx.x % 32;
  const bool gathered = p.flags & kReduceGathered, everyone = p.flags & kReduceEveryone;

  // The routing's memory is older than the kernel before this one.
  uint64_t base = static_cast<uint64_t>(seat.rank) * seat.bound;
  if (p.flags & kReducePacked) base = 0;
  if (gathered) {
    base = 0;
    for (uint32_t source = 0; source < seat.rank; ++source) base += p.kept_counts[source];
  }
  if (pairs) {
    if (threadIdx.x < 32) {
      const uint64_t at = static_cast<uint64_t>(token) * p.topk + lane;
      const int32_t id = lane < p.topk ? p.ids[at] : -1, row = id >= 0 ? p.pair_rows[at] : -1;
      const uint32_t found = __ballot_sync(~0u, row >= 0), number = __popc(found & ((1u << lane) - 1));
      if (row >= 0) {
        rows[number] = window_of(seat, owner_of(p.owners, id)) + p.from_rows + row * p.row_bytes;
        const auto* weights = reinterpret_cast<const float*>(p.weights + token * p.weights_stride);
        targets.weight[number] = p.weights != nullptr ? weights[lane] : 1.0f;
      }
      if (lane == 0) targets.count = __popc(found);
    }
  } else if (p.flags & kReduceSummed) {
    if (threadIdx.x == 0) rows[0] = p.own + token * p.row_bytes, targets.count = 1;
  } else if (everyone) {
    for (uint32_t rank = threadIdx.x; rank < seat.ranks; rank += blockDim.x) {
      uint32_t number = rank;
      if (seat.slot->absent) {
        const Absent& absent = seat.shared->absent;
        if (absent.has(rank)) continue;
        for (uint32_t before = 0; before < rank; ++before) number -= absent.has(before);
      }
      rows[number] = window_of(seat, rank) + p.from_rows + (base + token) * p.row_bytes;
      if (p.flags & kReduceBrought) rows[number] = brought(p, rank, token);
    }
  } else if (p.flags & kReduceBrought) {
    if (threadIdx.x < 32) find_brought(p, token, rows, targets);
  } else if (threadIdx.x < 32) {
    const uint64_t at = static_cast<uint64_t>(token) * p.fanout + lane;
    const int32_t rank = lane < p.fanout ? p.target_ranks[at] : -1;
    const uint32_t row = gathered || lane >= p.fanout ? token : p.target_rows[at];
    if (rank >= 0) {
      targets.rank[lane] = rank, targets.row[lane] = row;
      rows[lane] = window_of(seat, rank) + p.from_rows + (base + row) * p.row_bytes;
    }
    const uint32_t found = __ballot_sync(~0u, rank >= 0);
    if (lane == 0) targets.count = __popc(found);
  }
  __syncthreads();
  const uint32_t n = everyone && !(p.flags & kReduceSummed) ? present(seat) : targets.count;
  bool whole;
  if constexpr (few) {
    if (p.flags & kReduceBrought) ptx::wait_prerequisites();
    whole = await_flags(seat);
  } else {
    ptx::wait_prerequisites();
    whole = seat.slot->whole != 0;
  }

  for (uint32_t vector = part * blockDim.x + threadIdx.x; vector < p.vectors; vector += p.splits * blockDim.x) {
    const uint64_t at = 16ull * vector;
    float acc[kElements];
#pragma unroll
    for (uint32_t i = 0; i < kElements; ++i) acc[i] = 0.0f;
    add_all<From, pairs>(rows, targets.weight, n, at, acc);
    if (!whole) break;
    uint8_t* out = p.out + token * p.out_stride + static_cast<uint64_t>(vector) * kElements * To::kBytes;
    put_sum<To, kElements>(out, p.flags & kAccumulate, acc);
  }
  if (p.out_weights != nullptr && part == 0 && whole) {
    if (pairs) {
      pull_pair_weights(p, token);
    } else {
      pull_weights(p, token, targets, base, gathered);
    }
  }
  if (!few && unit == 0 && whole) settle(p.meet);
}

template <class From, class To, bool few, bool pairs>
__device__ __forceinline__ void reduce(const ReduceParams& p) {
  // [ranks or top-k]: where the rows of the token at hand start.
  extern __shared__ const uint8_t* rows[];
  __shared__ Targets targets;
  const OnSm on_sm(p.meet.seat);
  if constexpr (few) {
    __shared__ Meeting meeting;
    if (blockIdx.x != 0) return sum_part<From, To, few, pairs>(p, blockIdx.x - 1, rows, targets);
    const bool carried = p.flags & kReduceBrought;
    if (carried) ptx::wait_prerequisites();
    const bool went = carried ? meet_behind_collective(p.meet, meeting) : meet(p.meet, meeting);
    if (went) settle(p.meet);
  } else {
    // Blocks are as many as there are parts, or fewer.
#pragma unroll 1
    for (uint32_t unit = blockIdx.x; unit < p.tokens * p.splits; unit += gridDim.x) {
      // What was read of the one before is done with.
      if (unit != blockIdx.x) __syncthreads();
      sum_part<From, To, few, pairs>(p, unit, rows, targets);
    }
  }
}

#define A2A_SUMS(kernel, From, To, few, pairs)                                                           \
  extern "C" __global__ void __launch_bounds__(kSumThreads, 1) kernel(const __grid_constant__ ReduceParams p) { \
    reduce<From, To, few, pairs>(p);                                                                     \
  }
#define A2A_REDUCE(name, From, To)                          \
  A2A_SUMS(a2a_reduce_##name, From, To, false, false)       \
  A2A_SUMS(a2a_combine_##name, From, To, true, false)       \
  A2A_SUMS(a2a_weigh_##name, From, To, false, true)         \
  A2A_SUMS(a2a_combine_weigh_##name, From, To, true, true)
A2A_EACH_SUM(A2A_REDUCE)
#undef A2A_REDUCE
#undef A2A_SUMS

}  // namespace a2a
