// a2a_quantise: tokens to e4m3 in private memory, for dispatches that do not quantise on the way (quant.cuh).
//
// A warp takes 512 columns of a token.
#include "quant.cuh"
#include "window.cuh"

namespace a2a {

constexpr uint32_t kQuantThreads = 1024;

template <class From>
__device__ __forceinline__ void quantise_rows(const QuantParams& p) {
  const uint32_t lane = threadIdx.x % 32;
  const uint32_t vectors = p.hidden / kLaneColumns, units = (vectors + 31) / 32;
  const uint64_t jobs = static_cast<uint64_t>(p.tokens) * units;
  // Blocks may be fewer than the jobs.
#pragma unroll 1
  for (uint64_t job = (static_cast<uint64_t>(blockIdx.x) * blockDim.x + threadIdx.x) / 32; job < jobs;
       job += gridDim.x * (blockDim.x / 32)) {
    const uint64_t token = job / units;
    const uint32_t unit = job % units, vector = 32 * unit + lane;
    int4 raw[From::kBytes];
#pragma unroll
    for (uint32_t i = 0; i < From::kBytes; ++i) {
      const uint8_t* from = p.from + token * p.stride + 16ull * (vector * From::kBytes + i);
      raw[i] = vector < vectors ? ptx::ld_stream(from) : make_int4(0, 0, 0, 0);
    }
    float scale;
    const int4 codes = quantise<From>(raw, p.flags & kPowers, scale);
    if (vector < vectors) ptx::st_row(p.to + token * p.hidden + 16ull * vector, codes);
    auto* scales = reinterpret_cast<uint32_t*>(p.scales + token * p.scale_bytes);
    uint32_t element, word;
    if (take_scale(scale, vector < vectors, p.flags & kPowers, unit, p.scale_bytes / 4, element, word)) {
      scales[element] = word;
    }
  }
}

extern "C" __global__ void __launch_bounds__(kQuantThreads, 1) a2a_quantise(const __grid_constant__ QuantParams p) {
  switch (p.flags & 3) {
    case 0: return quantise_rows<TokenBf16>(p);
    case 1: return quantise_rows<TokenF16>(p);
    default: return quantise_rows<TokenF32>(p);
  }
}

}  // namespace a2a
