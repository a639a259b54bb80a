// Where collectives carry rows, in the place of windows that peers address: a2a_announce leaves in this rank's own window what they
// carry of a dispatch beside the tokens, which go as they are; a2a_mark tells the host that one has ended whose second half comes
// later.
#include "finish.cuh"
#include "places.cuh"

namespace a2a {

constexpr uint32_t kAnnounceThreads = 512;

// A warp a token at a time. The slot moves on, and this rank's words are said, by the block that is done last: all have then read
// where the slot stands. What they store is there for the collective when the kernel ends.
extern "C" __global__ void __launch_bounds__(kAnnounceThreads, 1)
    a2a_announce(const __grid_constant__ DispatchParams q) {
  constexpr uint32_t kWarps = kAnnounceThreads / 32;
  __shared__ Ending end;
  __shared__ bool is_last;
  const PushParams& p = q.push;
  const Seat& seat = p.seat;
  const OnSm on_sm(seat);
  const uint32_t tid = threadIdx.x, warp = tid / 32;
  // The host is told first, for that takes longest.
  if (blockIdx.x == 0 && tid == kAnnounceThreads - 1) mark_begin(seat, q.receive.marks);
  const Standing at = standing_of(*seat.slot, p.flags & kFollows);
#pragma unroll 1
  for (uint32_t token = blockIdx.x * kWarps + warp; token < p.route.tokens; token += gridDim.x * kWarps) {
    int32_t id;
    float weight;
    const bool bad = read_choice(p.route, token, id, weight);
    if (!at.opens()) continue;
    store_beside<false>(p, token, id, weight, bad, own_place(p, token));
  }
  if (blockIdx.x == 0 && warp == kWarps - 1 && at.opens()) tell_shape(seat, q.receive, at.epoch + 1, at.absent);
  __syncthreads();
  if (tid == 0) {
    is_last = gridDim.x == 1 || atomicAdd(&seat.slot->arrived, 1) == gridDim.x - 1;
    if (is_last) seat.slot->arrived = 0;
  }
  __syncthreads();
  if (!is_last) return;
  Finish(seat, q.receive, q.flags, nullptr, at, end).run([] {}, make_ulonglong2(0, 0));
}

extern "C" __global__ void __launch_bounds__(32) a2a_mark(const __grid_constant__ MarkParams p) {
  if (threadIdx.x == 0) mark_end(*p.slot, p.marks);
}

}  // namespace a2a
