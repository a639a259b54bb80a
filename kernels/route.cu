// a2a_route: tokens counted by rank, a chunk a block, where they are many; beside it the "rows read" words of a dispatch
// that follows a dispatch.
//
// Block 0 waits for peers if the slot holds a dispatch that nobody combined; the others wait for nobody. The kernel
// that moves rows is launched behind this one and waits for its end.
#include "route.cuh"
#include "wait.cuh"

namespace a2a {

// A dispatch follows a dispatch: nothing of the former one may be overwritten before all have read it. The state says
// if it does: a host decides wrongly when a captured dispatch is replayed. Block 0 calls it.
__device__ void open_slot(const Seat& seat, Meeting& meeting) {
  Slot& slot = *seat.slot;
  const uint32_t state = slot.state, epoch = slot.epoch;
  const uint64_t started = ptx::globaltimer();
  if (threadIdx.x == 0) slot.started = started;
  if (slot.closed != 0 || state != kDispatched) return;
  for (uint32_t peer = threadIdx.x; peer < seat.ranks; peer += blockDim.x) {
    uint8_t* box = mailbox(seat, peer, seat.rank);
    ptx::st_relaxed_sys(mail64(box, kProgress), progress(epoch, kRead, 0));
    ptx::st_release_sys(mail64(box, kReadFlag), pack(epoch, 0));
  }
  const Wait wait{kRead, epoch, slot.sequence, false};
  if (await(seat, wait, meeting, started) && threadIdx.x == 0) slot.state = kOpened;
}

extern "C" __global__ void __launch_bounds__(kChunk) a2a_route(const __grid_constant__ RouteParams p) {
  extern __shared__ uint32_t count[];
  __shared__ Meeting meeting;
  const Route& route = p.route;
  const uint32_t ranks = p.seat.ranks;
  // What moves rows may come onto the device at once, unless a wait for peers stands between: it would hold the device
  // while they need it.
  if (p.flags & kOpens && blockIdx.x == 0) {
    open_slot(p.seat, meeting);
    __syncthreads();
  }
  ptx::launch_dependents();
  if (!(p.flags & kRoutes)) return;
  for (uint32_t rank = threadIdx.x; rank < ranks; rank += kChunk) count[rank] = 0;
  __syncthreads();
  const uint32_t first = blockIdx.x * kChunk;
  count_tokens(route, ranks, first, min(first + kChunk, route.tokens), count);
  __syncthreads();
  for (uint32_t rank = threadIdx.x; rank < ranks; rank += kChunk) {
    route.chunks[blockIdx.x * ranks + rank] = count[rank];
  }
}

}  // namespace a2a
