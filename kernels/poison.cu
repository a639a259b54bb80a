// a2a_poison, of a jitter build alone: overwrites memory of this rank that is about to be written anew.
//
// The state of the slot decides, because only it knows what a replayed graph comes upon. Blocks wait for nobody.
#include "ptx.cuh"
#include "window.cuh"

#ifdef A2A_JITTER
namespace a2a {

constexpr uint32_t kPoisonThreads = 256;

extern "C" __global__ void __launch_bounds__(kPoisonThreads) a2a_poison(const __grid_constant__ PoisonParams p) {
  const Slot& slot = *p.slot;
  const bool is_due = slot.closed == 0 && slot.whole != 0 && (p.states >> slot.state & 1);
  if (!is_due || (p.routing != 0 && p.routing != slot.routing)) return;
  const int4 word = make_int4(p.word, p.word, p.word, p.word);
  const uint64_t step = static_cast<uint64_t>(gridDim.x) * kPoisonThreads;
  for (uint64_t i = blockIdx.x * kPoisonThreads + threadIdx.x; i < p.vectors; i += step) {
    ptx::st_row(p.to + 16 * i, word);
  }
}

}  // namespace a2a
#endif
