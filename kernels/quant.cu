// a2a_quantise: tokens to e4m3 per 128 columns, bit by bit as the header says (and src/device/host/quant.rs does): the
// scale from the group's largest magnitude, IEEE divisions, rounding to nearest even.
//
// A warp takes a group: four elements a lane.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "ptx.cuh"
#include "window.cuh"

namespace a2a {

constexpr uint32_t kQuantThreads = 256;
constexpr uint32_t kGroup = 128;

// The nearest e4m3 magnitude, ties to even; past the largest, the largest; NaN stays NaN. `value` has no sign.
__device__ __forceinline__ uint32_t to_e4m3(float value) {
  const uint32_t bits = __float_as_uint(value);
  // Three bits of mantissa stay; the exponent's bias falls from 127 to 7.
  const uint32_t rounded = bits + 0x7ffffu + (bits >> 20 & 1);
  const uint32_t normal = (rounded >> 20) - (120u << 3);
  // Below 2^-6, multiples of 2^-9: adding 1.5 * 2^23 rounds to an integer, which then stands in the last bits.
  const uint32_t small = __float_as_uint(__fadd_rn(__fmul_rn(value, 512.0f), 12582912.0f)) & 0xff;
  uint32_t code = value < 1.0f / 64.0f ? small : normal;
  if (bits >= 0x43e00000u) code = 0x7e;
  return (bits > 0x7f800000u ? 0x7f : code) & 0xff;
}

__device__ __forceinline__ float element(const uint8_t* row, uint32_t column, uint32_t type) {
  switch (type) {
    case 0:
      return __uint_as_float(static_cast<uint32_t>(reinterpret_cast<const uint16_t*>(row)[column]) << 16);
    case 1: {
      // A conversion makes every NaN the same; its sign is the element's.
      const __half half = reinterpret_cast<const __half*>(row)[column];
      const uint32_t sign = static_cast<uint32_t>(__half_as_ushort(half) & 0x8000) << 16;
      return __uint_as_float((__float_as_uint(__half2float(half)) & 0x7fffffff) | sign);
    }
    default:
      return reinterpret_cast<const float*>(row)[column];
  }
}

extern "C" __global__ void __launch_bounds__(kQuantThreads) a2a_quantise(const __grid_constant__ QuantParams p) {
  const uint32_t lane = threadIdx.x % 32;
  const uint32_t groups = (p.hidden + kGroup - 1) / kGroup;
  const uint64_t job = (static_cast<uint64_t>(blockIdx.x) * kQuantThreads + threadIdx.x) / 32;
  const uint64_t token = job / groups;
  const uint32_t group = job % groups;
  if (token >= p.tokens) return;
  const uint8_t* row = p.from + token * p.stride;
  const uint32_t first = group * kGroup + 4 * lane;
  float x[4];
  float most = 1e-4f;
#pragma unroll
  for (uint32_t i = 0; i < 4; ++i) {
    x[i] = first + i < p.hidden ? element(row, first + i, p.flags & 3) : 0.0f;
    // A comparison with NaN is false: it does not count.
    if (fabsf(x[i]) > most) most = fabsf(x[i]);
  }
#pragma unroll
  for (uint32_t step = 16; step > 0; step /= 2) most = fmaxf(most, __shfl_xor_sync(~0u, most, step));
  float scale = __fdiv_rn(most, 448.0f);
  const bool powers = p.flags & 4;
  // Up to the next power of two, taken from the bits.
  if (powers) scale = __uint_as_float((__float_as_uint(scale) + 0x7fffffu) & 0x7f800000u);
  uint32_t codes = 0;
#pragma unroll
  for (uint32_t i = 0; i < 4; ++i) {
    // The sign is the element's: that of a NaN from a division is the processor's choice.
    const uint32_t code = to_e4m3(__fdiv_rn(fabsf(x[i]), scale)) | (__float_as_uint(x[i]) >> 24 & 0x80);
    codes |= code << 8 * i;
  }
  // Rows of a byte a column are multiples of 16 bytes, so a lane's four columns are all there or none is.
  if (first < p.hidden) reinterpret_cast<uint32_t*>(p.to + token * p.hidden)[first / 4] = codes;
  uint8_t* scales = p.scales + token * p.scale_bytes;
  if (lane == 0) {
    if (powers) {
      scales[group] = static_cast<uint8_t>(__float_as_uint(scale) >> 23);
    } else {
      reinterpret_cast<float*>(scales)[group] = scale;
    }
  }
  // UE8M0 scales are packed by four; those past the last group are zero.
  if (powers && group == groups - 1) {
    for (uint32_t i = groups + lane; i < p.scale_bytes; i += 32) scales[i] = 0;
  }
}

}  // namespace a2a
