// a2a_route: where each token's rows go, where tokens are many; a2a_open: the "rows read" words of a dispatch that follows a
// dispatch.
//
// A block places the tokens of its threads. The blocks of a cluster tell each other what they counted; what lies before the
// cluster they count together: to read 32 bytes of each token again costs less than a second kernel, or than blocks that
// wait for others that may not be there yet.
#include "route.cuh"
#include "wait.cuh"

namespace a2a {

constexpr uint32_t kOpenThreads = 128;

// Nothing of the former dispatch may be overwritten before all have read it. The state says if there is one: a host decides
// wrongly when a captured dispatch is replayed.
extern "C" __global__ void __launch_bounds__(kOpenThreads) a2a_open(const __grid_constant__ OpenParams p) {
  __shared__ Meeting meeting;
  const Seat& seat = p.seat;
  const OnSm on_sm(seat);
  Slot& slot = *seat.slot;
  const uint32_t state = slot.state, epoch = slot.epoch;
  const uint64_t started = ptx::globaltimer();
  if (threadIdx.x == 0) slot.started = started;
  if (slot.closed != 0 || (state != kDispatched && state != kOverflowed)) return;
  if (p.flags & kAlone) {
    if (threadIdx.x == 0) slot.state = kOpened;
    return;
  }
  const auto tell = [&](uint8_t* box) {
    ptx::st_relaxed_sys(mail64(box, kProgress), progress(epoch, kRead, 0));
    ptx::st_release_sys(mail64(box, kReadFlag), pack(epoch, 0));
  };
  for (uint32_t peer = threadIdx.x; peer < seat.ranks; peer += kOpenThreads) tell(mailbox(seat, peer, seat.rank));
  if (slot.absent) {
    for_absent(seat, threadIdx.x, kOpenThreads, [&](uint32_t rank) { tell(mailbox(seat, seat.rank, rank)); });
  }
  const Wait wait{kRead, epoch, slot.sequence, false, kReadFlag};
  if (await(seat, wait, meeting, started) && threadIdx.x == 0) slot.state = kOpened;
}

extern "C" __global__ void __cluster_dims__(kRouteBlocks, 1, 1) __launch_bounds__(kRouteTokens, 1)
    a2a_route(const __grid_constant__ RouteParams p) {
  constexpr uint32_t kWarps = kRouteTokens / 32;
  // Of the ranks at hand: tokens that a warp of the block has; that the block has; of those before the cluster, that the block
  // counted; all before the block.
  __shared__ uint32_t of_warp[kWarps][32];
  __shared__ uint32_t of_block[32];
  __shared__ uint32_t counted[32];
  __shared__ uint32_t before[32];
  const Route& route = p.route;
  const Standing at = standing_of(*p.slot, p.flags & kFollows);
  // What moves rows may come onto the device at once.
  ptx::launch_dependents();
  // What a dispatch goes by that the slot does not allow is that of another step.
  if (!at.opens()) return;
  const uint32_t lane = threadIdx.x % 32, warp = threadIdx.x / 32, here = ptx::cluster_block();
  const uint32_t token = blockIdx.x * kRouteTokens + threadIdx.x;
  const uint32_t share = (blockIdx.x - here) / kRouteBlocks * kRouteTokens;
  int32_t* const target_ranks = route.target_ranks + static_cast<uint64_t>(token) * route.fanout;
  int32_t* const target_rows = route.target_rows + static_cast<uint64_t>(token) * route.fanout;
  uint32_t found = 0;
  for (uint32_t base = 0; base < p.ranks; base += kAtOnce) {
    const uint32_t group = min(p.ranks - base, kAtOnce);
    const uint32_t to = token < route.tokens ? ranks_of(route, token, base) : 0;
    if (share != 0) {
      if (warp == 0) counted[lane] = 0;
      __syncthreads();
      count_tokens<2>(route, p.ranks, base, here * share, (here + 1) * share, counted);
    }
    uint32_t mine = 0;
    for (uint32_t rank = 0; rank < group; ++rank) {
      const uint32_t votes = __popc(__ballot_sync(~0u, to >> rank & 1));
      if (lane == rank) mine = votes;
    }
    of_warp[warp][lane] = mine;
    __syncthreads();
    uint32_t row = 0, all = 0;
#pragma unroll
    for (uint32_t i = 0; i < kWarps; ++i) {
      const uint32_t tokens = of_warp[i][lane];
      if (i < warp) row += tokens;
      all += tokens;
    }
    if (warp == 0) of_block[lane] = all;
    ptx::cluster_sync();
    if (warp == 0) {
      uint32_t earlier = 0;
      for (uint32_t block = 0; block < kRouteBlocks; ++block) {
        if (block < here) earlier += ptx::ld_cluster(&of_block[lane], block);
        if (share != 0) earlier += ptx::ld_cluster(&counted[lane], block);
      }
      before[lane] = earlier;
      if (blockIdx.x == gridDim.x - 1 && lane < group) route.rows_for[base + lane] = earlier + all;
    }
    // Also: counts were read before they are those of the next ranks, or their block is gone.
    ptx::cluster_sync();
    row += before[lane];
    for (uint32_t rank = 0; rank < group; ++rank) {
      const uint32_t votes = __ballot_sync(~0u, to >> rank & 1);
      const uint32_t start = __shfl_sync(~0u, row, rank);
      if (!(to >> rank & 1)) continue;
      target_ranks[found] = base + rank;
      if (route.target_rows != nullptr) target_rows[found] = start + __popc(votes & ((1u << lane) - 1));
      ++found;
    }
  }
  if (token < route.tokens) {
    for (; found < route.fanout; ++found) target_ranks[found] = -1;
  }
}

}  // namespace a2a
