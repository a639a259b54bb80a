// a2a_push: each token's rows into the windows of its ranks (or into the own window, to be read from there), and the padding
// behind them; a2a_finish: the flags, out and in.
//
// A warp's job is a piece of one token's row, or what travels beside the row: it reads 16 bytes a lane and stores them to
// every destination, and meets no other warp. What moves waits for nobody: the end of the kernel, for which a2a_finish
// waits, says that all is stored. The blocks of the first tokens count for themselves where rows go, so that a2a_route is not
// needed, or not waited for at once; where tokens are very few one block does it all (a2a_dispatch). The padding of a
// source's rows is written by the source, which knows how many there are before anybody else.
//
// What one block does once is not unrolled: that would be more code and no speed.
#include "finish.cuh"
#include "places.cuh"
#include "wait.cuh"

namespace a2a {

constexpr uint32_t kMoveThreads = 256;
constexpr uint32_t kMoveWarps = kMoveThreads / 32;
constexpr uint32_t kLaneVectors = 4;
constexpr uint32_t kFinishThreads = 128;
constexpr uint32_t kOneThreads = 672;
constexpr uint32_t kOneVectors = 2;

// What says that a row is none: id -1, source -1, weight 0, behind this rank's rows at a peer. By `threads` threads, of
// which this is one.
__device__ __forceinline__ void pad_rows(const PushParams& p, uint32_t peer, uint32_t used, uint32_t thread,
                                         uint32_t threads) {
  if (used >= p.seat.bound) return;
  const uint64_t topk = p.route.topk;
  // Ranks that take part no more have no rows here, and nobody else says so.
  const bool absent = p.seat.slot->absent && p.seat.shared->absent.has(peer);
  uint8_t* window = window_of(p.seat, absent ? p.seat.rank : peer);
  const uint64_t base = absent ? static_cast<uint64_t>(peer) * p.seat.bound : p.row_base;
  const uint64_t first = base + used, count = p.seat.bound - used;
  auto* ids = reinterpret_cast<int32_t*>(window + p.to_ids) + first * topk;
  auto* weights = reinterpret_cast<float*>(window + p.to_weights) + first * topk;
  auto* source = reinterpret_cast<int2*>(window + p.to_source) + first;
#pragma unroll 1
  for (uint64_t i = thread; i < count * topk; i += threads) ids[i] = -1, weights[i] = 0.0f;
#pragma unroll 1
  for (uint64_t i = thread; i < count; i += threads) source[i] = make_int2(-1, -1);
}

// The blocks behind those that move, and all their parts. `sent`: rows for each rank.
__device__ __forceinline__ void pad_rows(const PushParams& p, const uint32_t* sent) {
  const uint32_t block = (blockIdx.x - p.route.tokens) * gridDim.y + blockIdx.y;
  const uint32_t blocks = (gridDim.x - p.route.tokens) * gridDim.y;
  for (uint32_t peer = 0; peer < p.seat.ranks; ++peer) {
    pad_rows(p, peer, sent[peer], block * blockDim.x + threadIdx.x, blocks * blockDim.x);
  }
}

// A warp's job: a piece of a token's row, `n` vectors a lane, or (the last part) what travels beside it.
template <uint32_t n>
struct Job {
  uint32_t token;
  uint32_t begin;
  uint32_t end;
  bool beside;
  // Of what is beside the row, a choice a lane: the id (with `bad` if it is neither an expert nor -1) and the weight.
  bool bad;
  int32_t id;
  float weight;
  int4 value[n];
};

// What a job reads is on its way while the routing is looked at.
template <uint32_t n>
__device__ __forceinline__ Job<n> take_job(const PushParams& p, uint32_t token, uint32_t part) {
  Job<n> job;
  job.token = token, job.begin = part * p.piece, job.beside = part == p.jobs - 1;
  job.end = min(job.begin + p.piece, p.vectors);
  if (job.beside) {
    job.bad = read_choice(p.route, token, job.id, job.weight);
    return job;
  }
  const uint8_t* from = p.tokens + token * p.token_stride + 16ull * (job.begin + threadIdx.x % 32);
#pragma unroll
  for (uint32_t u = 0; u < n; ++u) {
    if (job.begin + 32 * u + threadIdx.x % 32 < job.end) job.value[u] = ptx::ld_stream(from + 512 * u);
  }
  return job;
}

// Where a token goes that is the first of this rank's, or comes behind few, or whose row's place is not asked for: by a warp,
// from the ids.
__device__ __forceinline__ Places find_places(const PushParams& p, uint32_t token) {
  const Route& route = p.route;
  Places places{0, nullptr, 0, -1};
#pragma unroll 1
  for (uint32_t base = 0; base < p.seat.ranks; base += kAtOnce) {
#pragma unroll 1
    for (uint32_t rest = ranks_by_lanes(route, token, base); rest != 0; rest &= rest - 1, ++places.count) {
      if (threadIdx.x % 32 == places.count) places.rank = base + __ffs(rest) - 1;
    }
#pragma unroll 1
    for (uint32_t earlier = 0; earlier < token && route.target_rows != nullptr; ++earlier) {
      const uint32_t theirs = ranks_by_lanes(route, earlier, base), bit = places.rank - base;
      if (places.rank >= 0 && bit < kAtOnce) places.row += theirs >> bit & 1;
    }
  }
  if (places.rank >= 0) places.window = window_of(p.seat, places.rank);
  return places;
}

// What a block that counts shares.
struct Counting {
  // Of each token up to the block's own: the ranks that it goes to, some at a time.
  uint32_t ranks[kMostCounted];
  // Of each warp: earlier tokens that go where lane i's row goes.
  uint32_t rows[kMoveWarps][32];
};

// The same by a block whose warps all move the same token.
__device__ __forceinline__ Places count_places(const PushParams& p, uint32_t token, Counting& shared) {
  const uint32_t tid = threadIdx.x, lane = tid % 32;
  Places places{0, nullptr, 0, -1};
  uint32_t mine = 0;
  for (uint32_t base = 0; base < p.seat.ranks; base += kAtOnce) {
    for (uint32_t i = tid; i <= token; i += blockDim.x) shared.ranks[i] = 0;
    __syncthreads();
    ranks_of_all(p.route, token + 1, base, shared.ranks);
    __syncthreads();
    const uint32_t own = shared.ranks[token];
    for (uint32_t first = tid - lane; first == tid - lane || first < token; first += blockDim.x) {
      const uint32_t theirs = first + lane < token ? shared.ranks[first + lane] : 0;
      uint32_t i = places.count;
      for (uint32_t rest = own; rest != 0; rest &= rest - 1, ++i) {
        const uint32_t bit = __ffs(rest) - 1;
        const uint32_t votes = __popc(__ballot_sync(~0u, theirs >> bit & 1));
        if (lane == i) places.rank = base + bit, mine += votes;
      }
    }
    places.count += __popc(own);
    if (base + kAtOnce < p.seat.ranks) __syncthreads();
  }
  shared.rows[tid / 32][lane] = mine;
  __syncthreads();
  for (uint32_t i = 0; i < blockDim.x / 32; ++i) places.row += shared.rows[i][lane];
  if (places.rank >= 0) places.window = window_of(p.seat, places.rank);
  return places;
}

// The routing is to know where a token went. A warp calls it.
__device__ __forceinline__ void keep_places(const Route& route, uint32_t token, const Places& places) {
  const uint32_t lane = threadIdx.x % 32;
  if (lane >= route.fanout) return;
  const uint64_t at = static_cast<uint64_t>(token) * route.fanout + lane;
  route.target_ranks[at] = places.rank;
  if (route.target_rows != nullptr) route.target_rows[at] = places.row;
}

// Stores what a job has to every place. A warp calls it.
template <uint32_t n>
__device__ __forceinline__ void do_job(const PushParams& p, const Job<n>& job, const Places& to) {
  const uint32_t lane = threadIdx.x % 32;
  if (!job.beside) {
    uint8_t* row = to.window + p.to_tokens + (p.row_base + to.row) * 16ull * p.vectors + 16ull * job.begin;
    for (uint32_t i = 0; i < to.count; ++i) {
      auto* at = reinterpret_cast<uint8_t*>(__shfl_sync(~0u, reinterpret_cast<uint64_t>(row), i)) + 16 * lane;
#pragma unroll
      for (uint32_t u = 0; u < n; ++u) {
        if (job.begin + 32 * u + lane < job.end) ptx::st_row(at + 512 * u, job.value[u]);
      }
    }
    return;
  }

  store_beside<false>(p, job.token, job.id, job.weight, job.bad, to);
}

// Blocks are tokens, then those that write padding; a token's jobs past a block's warps are in the next part of the grid.
// Places take a2a_route a while; the first blocks do not wait for it.
extern "C" __global__ void __launch_bounds__(kMoveThreads, 4) a2a_push(const __grid_constant__ PushParams p) {
  __shared__ union {
    Counting counting;
    uint32_t count[kMaxRanks];
  } shared;
  const Route& route = p.route;
  const uint32_t token = blockIdx.x, part = (blockIdx.y * blockDim.x + threadIdx.x) / 32;
  const bool pads = token >= route.tokens;
  // Padding lies behind all rows.
  const bool counts = pads ? !(p.flags & kRouted) && !p.seat.replays : token < p.counted;
  Job<kLaneVectors> job;
  if (!pads && part < p.jobs) job = take_job<kLaneVectors>(p, token, part);
  // A dispatch that the slot does not allow stores nothing.
  const Standing at = standing_of(*p.seat.slot, p.flags & kFollows);
  if (p.flags & kRouted && !counts) ptx::wait_prerequisites();
  ptx::launch_dependents();
  if (pads) {
    if (counts) count_before(route, p.seat.ranks, route.tokens, shared.count);
    if (at.opens()) pad_rows(p, counts ? shared.count : reinterpret_cast<const uint32_t*>(route.rows_for));
    return;
  }
  const bool publishes = p.flags & kPublishes;
  Places places;
  if (counts) {
    places = route.target_rows == nullptr ? find_places(p, token) : count_places(p, token, shared.counting);
    // a2a_route keeps all of them.
    if (job.beside && part < p.jobs && at.opens() && !(p.flags & kRouted)) keep_places(route, token, places);
  } else if (!publishes && part < p.jobs) {
    places = read_places(p, token);
  }
  if (publishes) places = own_place(p, token);
  if (part < p.jobs && at.opens()) do_job(p, job, places);
}

extern "C" __global__ void __launch_bounds__(kFinishThreads, 4) a2a_finish(const __grid_constant__ FinishParams p) {
  __shared__ Ending end;
  __shared__ Totals totals;
  __shared__ uint32_t count[kMaxRanks];
  const Seat& seat = p.seat;
  const OnSm on_sm(seat);
  const uint32_t tid = threadIdx.x;
  const Standing at = standing_of(*seat.slot);
  const ulonglong2 first = look_early(seat);
  if (p.flags & kRaises && tid >= kFinishThreads - 32 && at.opens()) tell_shape(seat, p.receive, at.epoch + 1, at.absent);
  if (p.flags & kRaises && p.flags & kCounts) {
    count_before(p.route, seat.ranks, p.route.tokens, count);
    for (uint32_t peer = tid; peer < seat.ranks && at.opens(); peer += kFinishThreads) {
      p.route.rows_for[peer] = count[peer];
    }
  } else if (p.flags & kRaises) {
    for (uint32_t peer = tid; peer < seat.ranks; peer += kFinishThreads) count[peer] = p.route.rows_for[peer];
  }
  __syncthreads();
  const uint32_t* sent = p.flags & kRaises && !(p.receive.flags & kGathers) ? count : nullptr;
  const bool sums = p.summary != nullptr && p.flags & kWaits;
  if (sums) hand_out_sums(p, totals);
  Finish finish(seat, p.receive, p.flags, sent, at, end, sums ? &totals : nullptr);
  if (p.flags & kBanked) finish.mark = 1u << 31;
  finish.run(
      [&] {
        ptx::wait_prerequisites();
        if (finish.first_raiser()) seat.slot->taken = 0;
      },
      first);
}

extern "C" __global__ void __launch_bounds__(kOneThreads, 1) a2a_dispatch(const __grid_constant__ DispatchParams q) {
  // Warps that move, with a job each where tokens are fewest; that count and pad; one that looks (others help it where ranks
  // are many); one that raises.
  constexpr uint32_t kMovers = 15, kCounting = 4;
  static_assert(kMovers + kCounting + 2 == kOneThreads / 32);
  __shared__ Ending end;
  __shared__ uint32_t count[kMaxRanks];
  const PushParams& p = q.push;
  const Seat& seat = p.seat;
  const Route& route = p.route;
  const bool publishes = p.flags & kPublishes, replays = seat.replays;
  const uint32_t tid = threadIdx.x, lane = tid % 32, warp = tid / 32, jobs = route.tokens * p.jobs;
  const Standing at = standing_of(*seat.slot, p.flags & kFollows);
  const ulonglong2 first = look_early(seat);
  if (warp < kMovers) {
#pragma unroll 1
    for (uint32_t number = warp; number < jobs; number += kMovers) {
      const uint32_t token = number / p.jobs;
      const auto job = take_job<kOneVectors>(p, token, number - token * p.jobs);
      Places places;
      if (!replays) {
        places = find_places(p, token);
      } else if (!publishes) {
        places = read_places(p, token);
      }
      if (!at.opens()) break;
      if (job.beside && !replays) keep_places(route, token, places);
      if (publishes) places = own_place(p, token);
      do_job(p, job, places);
    }
  } else if (warp < kMovers + kCounting) {
#pragma unroll 1
    for (uint32_t peer = warp - kMovers; peer < seat.ranks; peer += kCounting) {
      uint32_t tokens = 0;
#pragma unroll 1
      for (uint32_t token = 0; token < route.tokens && !replays; ++token) {
        tokens += ranks_by_lanes(route, token, peer / kAtOnce * kAtOnce) >> peer % kAtOnce & 1;
      }
      if (replays) tokens = route.rows_for[peer];
      if (!at.opens()) break;
      if (lane == 0) count[peer] = route.rows_for[peer] = tokens;
      if (!publishes) pad_rows(p, peer, tokens, lane, 32);
    }
  } else if (tid >= kOneThreads - 32 && at.opens()) {
    tell_shape(seat, q.receive, at.epoch + 1, at.absent);
  }
  const uint32_t* sent = publishes ? nullptr : count;
  if (tid < kOneThreads - 32) ptx::have_come();
  Finish(seat, q.receive, q.flags, sent, at, end).run([] { ptx::wait_for_others(); }, first);
}

extern "C" __global__ void a2a_tell(const __grid_constant__ TellParams p) {
  for (uint32_t i = threadIdx.x; i < p.count; i += blockDim.x) p.to[p.first + i] = p.values[i];
}

}  // namespace a2a
