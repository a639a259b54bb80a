// a2a_mark: tells the host which step's collective has begun, or has ended.
#include "ptx.cuh"
#include "window.cuh"

namespace a2a {

extern "C" __global__ void __launch_bounds__(32) a2a_mark(const __grid_constant__ MarkParams p) {
  if (threadIdx.x != 0) return;
  // A combine has the sequence of its dispatch.
  const uint64_t combines = p.slot->state == kDispatchSent || p.slot->state == kDispatched ? 0 : 1;
  ptx::st_relaxed_sys(p.to, p.slot->sequence << 1 | combines);
}

}  // namespace a2a
