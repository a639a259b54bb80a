// Combine: a2a_stage copies the experts' rows to where peers can read them (not needed if they were written there),
// a2a_meet raises this rank's flags and waits for the peers', a2a_reduce reads and sums each token's rows.
//
// One block meets, so the blocks that sum wait for nobody: they are launched behind it, and it lets them onto the device
// only when every flag has come. Where few blocks sum they wait for themselves, behind one that meets (a2a_combine). Sums
// are as the header says: float32, from +0.0, separate multiplications and additions in rank or top-k order, one rounding
// at the end.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "route.cuh"
#include "wait.cuh"

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
  if (seat.slot->closed != 0 || seat.slot->state != kDispatched) return;
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
#pragma unroll 1
    for (uint32_t peer = tid % 32; peer < seat.ranks && sends; peer += 32) {
      uint8_t* box = mailbox(seat, peer, seat.rank);
      *reinterpret_cast<uint4*>(box + kCombineShape) = make_uint4(p.shape[0], p.shape[1], p.shape[2], p.shape[3]);
      ptx::st_relaxed_sys(mail64(box, kProgress), progress(epoch, kCombine, seat.bound));
      ptx::st_release_sys(mail64(box, kCombineFlag), pack(epoch, p.digest));
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

// What a combine came to, once its flags have come.
__device__ __forceinline__ void settle(const MeetParams& p) {
  const Seat& seat = p.seat;
  const int32_t missing = p.summary != nullptr ? p.summary[2] : 0;
  write_status(p.status, seat.ranks, make_int4(missing != 0 ? kStepDropped : 0, 0, missing, 0), nullptr);
  if (threadIdx.x != 0) return;
  seat.shared->first_step_done = 1;
  uint64_t rows = static_cast<uint64_t>(p.tokens) * seat.ranks, mine = p.tokens;
  if (!(p.flags & kEveryone)) {
    rows = 0, mine = p.rows_for[seat.rank];
    for (uint32_t peer = 0; peer < seat.ranks; ++peer) rows += p.rows_for[peer];
  }
  uint64_t* counters = seat.shared->counters;
  ptx::add_relaxed_gpu(counters + kCombines, 1);
  ptx::add_relaxed_gpu(counters + kHops, 1);
  ptx::add_relaxed_gpu(counters + kRowsPulled, rows);
  ptx::add_relaxed_gpu(counters + kBytesPulled, rows * p.result_bytes);
  ptx::add_relaxed_gpu(counters + kBytesRemote, (rows - mine) * p.result_bytes);
  if (p.staged_bytes == 0) return;
  uint64_t staged = 0;
  for (uint32_t source = 0; source < seat.ranks; ++source) staged += p.kept_counts[source];
  ptx::add_relaxed_gpu(counters + kRowsCopied, staged);
  ptx::add_relaxed_gpu(counters + kBytesCopied, staged * p.staged_bytes);
}

extern "C" __global__ void __launch_bounds__(kMeetThreads, 4) a2a_meet(const __grid_constant__ MeetParams p) {
  __shared__ Meeting meeting;
  if (p.flags & kStaged) ptx::wait_prerequisites();
  const OnSm on_sm(p.seat);
  // What sums waits for this kernel's end, so the rest is left to it.
  const bool went = meet(p, meeting);
  if (went && p.flags & kSettles) settle(p);
}

// ------------------------------------------------------------------------------------------------------------- sums

struct Bf16 {
  static constexpr uint32_t kBytes = 2;
  __device__ static void unpack(int4 v, float* x) {
    const uint32_t words[4] = {static_cast<uint32_t>(v.x), static_cast<uint32_t>(v.y), static_cast<uint32_t>(v.z),
                               static_cast<uint32_t>(v.w)};
#pragma unroll
    for (uint32_t i = 0; i < 4; ++i) {
      x[2 * i] = __uint_as_float(words[i] << 16), x[2 * i + 1] = __uint_as_float(words[i] & 0xffff0000u);
    }
  }
  __device__ static uint16_t round(float x) { return __bfloat16_as_ushort(__float2bfloat16_rn(x)); }
  __device__ static float widen(uint16_t bits) { return __uint_as_float(static_cast<uint32_t>(bits) << 16); }
};
struct F16 {
  static constexpr uint32_t kBytes = 2;
  __device__ static void unpack(int4 v, float* x) {
    const uint32_t words[4] = {static_cast<uint32_t>(v.x), static_cast<uint32_t>(v.y), static_cast<uint32_t>(v.z),
                               static_cast<uint32_t>(v.w)};
#pragma unroll
    for (uint32_t i = 0; i < 4; ++i) {
      x[2 * i] = widen(static_cast<uint16_t>(words[i])), x[2 * i + 1] = widen(static_cast<uint16_t>(words[i] >> 16));
    }
  }
  __device__ static uint16_t round(float x) { return __half_as_ushort(__float2half_rn(x)); }
  __device__ static float widen(uint16_t bits) { return __half2float(__ushort_as_half(bits)); }
};
struct F32 {
  static constexpr uint32_t kBytes = 4;
  __device__ static void unpack(int4 v, float* x) {
    x[0] = __int_as_float(v.x), x[1] = __int_as_float(v.y), x[2] = __int_as_float(v.z), x[3] = __int_as_float(v.w);
  }
};

// `n` elements of an output, side by side: 8 or 4.
template <class To, uint32_t n>
__device__ __forceinline__ void load_out(const uint8_t* at, float* x) {
  if constexpr (To::kBytes == 4) {
#pragma unroll
    for (uint32_t i = 0; i < n / 4; ++i) F32::unpack(*reinterpret_cast<const int4*>(at + 16 * i), x + 4 * i);
  } else if constexpr (n == 8) {
    To::unpack(*reinterpret_cast<const int4*>(at), x);
  } else {
    const uint2 v = *reinterpret_cast<const uint2*>(at);
    x[0] = To::widen(static_cast<uint16_t>(v.x)), x[1] = To::widen(static_cast<uint16_t>(v.x >> 16));
    x[2] = To::widen(static_cast<uint16_t>(v.y)), x[3] = To::widen(static_cast<uint16_t>(v.y >> 16));
  }
}
template <class To, uint32_t n>
__device__ __forceinline__ void store_out(uint8_t* at, const float* x) {
  if constexpr (To::kBytes == 4) {
#pragma unroll
    for (uint32_t i = 0; i < n / 4; ++i) {
      reinterpret_cast<float4*>(at)[i] = make_float4(x[4 * i], x[4 * i + 1], x[4 * i + 2], x[4 * i + 3]);
    }
  } else {
    uint32_t words[n / 2];
#pragma unroll
    for (uint32_t i = 0; i < n / 2; ++i) {
      words[i] = To::round(x[2 * i]) | static_cast<uint32_t>(To::round(x[2 * i + 1])) << 16;
    }
    if constexpr (n == 8) {
      *reinterpret_cast<uint4*>(at) = make_uint4(words[0], words[1], words[2], words[3]);
    } else {
      *reinterpret_cast<uint2*>(at) = make_uint2(words[0], words[1]);
    }
  }
}

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
        const uint64_t row = base + (gathered ? token : targets.row[i]);
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

// Adds a vector of each of `n` rows, all of them on their way at once; `weighs`: each times its weight, rounded.
template <class From, bool weighs, uint32_t n>
__device__ __forceinline__ void add_rows(const uint8_t* const* rows, const float* weights, uint64_t at, float* acc) {
  constexpr uint32_t kElements = 16 / From::kBytes;
  int4 v[n];
#pragma unroll
  for (uint32_t i = 0; i < n; ++i) v[i] = ptx::ld_stream(rows[i] + at);
#pragma unroll
  for (uint32_t i = 0; i < n; ++i) {
    float x[kElements];
    From::unpack(v[i], x);
#pragma unroll
    for (uint32_t j = 0; j < kElements; ++j) acc[j] = __fadd_rn(acc[j], weighs ? __fmul_rn(weights[i], x[j]) : x[j]);
  }
}

// Sums a part of a token's results. `few`: the block waits for itself, behind one that meets. `pairs`: results are weighted, one
// for each choice. A block calls it; `rows` and `targets` are its shared memory.
template <class From, class To, bool few, bool pairs>
__device__ __forceinline__ void sum_part(const ReduceParams& p, uint32_t unit, const uint8_t** rows, Targets& targets) {
  constexpr uint32_t kElements = 16 / From::kBytes;
  constexpr uint32_t kInFlight = 8;
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
  } else if (everyone) {
    for (uint32_t rank = threadIdx.x; rank < seat.ranks; rank += blockDim.x) {
      rows[rank] = window_of(seat, rank) + p.from_rows + (base + token) * p.row_bytes;
    }
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
  const uint32_t n = everyone ? seat.ranks : targets.count;
  bool whole;
  if constexpr (few) {
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
    uint32_t first = 0;
    for (; first + kInFlight <= n; first += kInFlight) {
      add_rows<From, pairs, kInFlight>(rows + first, targets.weight + first, at, acc);
    }
    switch (n - first) {
      case 1: add_rows<From, pairs, 1>(rows + first, targets.weight + first, at, acc); break;
      case 2: add_rows<From, pairs, 2>(rows + first, targets.weight + first, at, acc); break;
      case 3: add_rows<From, pairs, 3>(rows + first, targets.weight + first, at, acc); break;
      case 4: add_rows<From, pairs, 4>(rows + first, targets.weight + first, at, acc); break;
      case 5: add_rows<From, pairs, 5>(rows + first, targets.weight + first, at, acc); break;
      case 6: add_rows<From, pairs, 6>(rows + first, targets.weight + first, at, acc); break;
      case 7: add_rows<From, pairs, 7>(rows + first, targets.weight + first, at, acc); break;
      default: break;
    }
    if (!whole) break;
    uint8_t* out = p.out + token * p.out_stride + static_cast<uint64_t>(vector) * kElements * To::kBytes;
    if (p.flags & kAccumulate) {
      float x[kElements];
      load_out<To, kElements>(out, x);
#pragma unroll
      for (uint32_t j = 0; j < kElements; ++j) acc[j] = __fadd_rn(acc[j], x[j]);
    }
    store_out<To, kElements>(out, acc);
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
    if (meet(p.meet, meeting)) settle(p.meet);
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
A2A_REDUCE(bf16_bf16, Bf16, Bf16)
A2A_REDUCE(bf16_f16, Bf16, F16)
A2A_REDUCE(bf16_f32, Bf16, F32)
A2A_REDUCE(f16_bf16, F16, Bf16)
A2A_REDUCE(f16_f16, F16, F16)
A2A_REDUCE(f16_f32, F16, F32)
A2A_REDUCE(f32_bf16, F32, Bf16)
A2A_REDUCE(f32_f16, F32, F16)
A2A_REDUCE(f32_f32, F32, F32)
#undef A2A_REDUCE
#undef A2A_SUMS

}  // namespace a2a
