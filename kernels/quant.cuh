// Tokens to e4m3 per 128 columns, bit by bit as the header says (and src/device/host/quant.rs does): the scale from the
// group's largest magnitude, IEEE divisions, rounding to nearest even.
//
// A lane has 16 columns, eight lanes a group; lanes past the row's end have zeroes.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "ptx.cuh"

namespace a2a {

constexpr uint32_t kGroupLanes = 8;
constexpr uint32_t kLaneColumns = 16;

// Tokens as they are given, sixteen bytes at a time: magnitudes, and the signs of four elements as e4m3 has them.
struct TokenBf16 {
  static constexpr uint32_t kBytes = 2;
  __device__ static void widen(const int4& v, float* x) {
    const uint32_t words[4] = {static_cast<uint32_t>(v.x), static_cast<uint32_t>(v.y), static_cast<uint32_t>(v.z),
                               static_cast<uint32_t>(v.w)};
#pragma unroll
    for (uint32_t i = 0; i < 4; ++i) {
      x[2 * i] = __uint_as_float(words[i] << 16 & 0x7fffffffu), x[2 * i + 1] = __uint_as_float(words[i] & 0x7fff0000u);
    }
  }
  __device__ static uint32_t signs(const int4* raw, uint32_t four) {
    const int4& v = raw[four / 2];
    return __byte_perm(four % 2 == 0 ? v.x : v.z, four % 2 == 0 ? v.y : v.w, 0x7531) & 0x80808080u;
  }
};
struct TokenF16 {
  static constexpr uint32_t kBytes = 2;
  __device__ static void widen(const int4& v, float* x) {
    const uint32_t words[4] = {static_cast<uint32_t>(v.x), static_cast<uint32_t>(v.y), static_cast<uint32_t>(v.z),
                               static_cast<uint32_t>(v.w)};
#pragma unroll
    for (uint32_t i = 0; i < 4; ++i) {
      x[2 * i] = __half2float(__ushort_as_half(static_cast<uint16_t>(words[i] & 0x7fffu)));
      x[2 * i + 1] = __half2float(__ushort_as_half(static_cast<uint16_t>(words[i] >> 16 & 0x7fffu)));
    }
  }
  __device__ static uint32_t signs(const int4* raw, uint32_t four) { return TokenBf16::signs(raw, four); }
};
struct TokenF32 {
  static constexpr uint32_t kBytes = 4;
  __device__ static void widen(const int4& v, float* x) {
    x[0] = fabsf(__int_as_float(v.x)), x[1] = fabsf(__int_as_float(v.y));
    x[2] = fabsf(__int_as_float(v.z)), x[3] = fabsf(__int_as_float(v.w));
  }
  __device__ static uint32_t signs(const int4* raw, uint32_t four) {
    const int4& v = raw[four];
    return __byte_perm(__byte_perm(v.x, v.y, 0x0073), __byte_perm(v.z, v.w, 0x0073), 0x5410) & 0x80808080u;
  }
};

// Quotients by one divisor, as IEEE division rounds them: a quotient and two corrections from its exact remainder. What is
// divided is no larger than 448 times a divisor of at least 2^-23, so nothing on the way overflows, and a quotient so small
// that its remainder is not exact becomes 0 in e4m3 either way.
struct Divisor {
  float value;
  float reciprocal;
  __device__ __forceinline__ float divide(float x) const {
    float quotient = __fmul_rn(x, reciprocal);
#pragma unroll
    for (uint32_t i = 0; i < 2; ++i) {
      quotient = __fmaf_rn(__fmaf_rn(-quotient, value, x), reciprocal, quotient);
    }
    return quotient;
  }
};

// A lane's columns as e4m3, and its group's scale, which `powers` rounds up to a power of two. A warp calls it.
template <class From>
__device__ __forceinline__ int4 quantise(const int4 (&raw)[From::kBytes], bool powers, float& scale) {
  constexpr uint32_t kElements = 16 / From::kBytes;
  float x[kLaneColumns];
#pragma unroll
  for (uint32_t i = 0; i < From::kBytes; ++i) From::widen(raw[i], x + kElements * i);
  // A maximum passes over NaN.
  float most = 1e-4f;
#pragma unroll
  for (uint32_t i = 0; i < kLaneColumns; ++i) most = fmaxf(most, x[i]);
#pragma unroll
  for (uint32_t step = kGroupLanes / 2; step > 0; step /= 2) most = fmaxf(most, __shfl_xor_sync(~0u, most, step));
  scale = __fdiv_rn(most, 448.0f);
  // Up to the next power of two, taken from the bits.
  if (powers) scale = __uint_as_float((__float_as_uint(scale) + 0x7fffffu) & 0x7f800000u);
  // Infinite where an element is: all others are 0 then, and it is NaN.
  const bool finite = scale < __int_as_float(0x7f800000);
  const float divisor = finite ? scale : 1.0f;
  const Divisor by{divisor, __frcp_rn(divisor)};
  uint32_t words[4];
#pragma unroll
  for (uint32_t i = 0; i < 4; ++i) {
    float quotients[4];
#pragma unroll
    for (uint32_t j = 0; j < 4; ++j) quotients[j] = by.divide(finite ? x[4 * i + j] : __fmul_rn(x[4 * i + j], 0.0f));
    words[i] = ptx::to_e4m3(quotients[0], quotients[1]) | ptx::to_e4m3(quotients[2], quotients[3]) << 16;
    // The sign of a NaN is the element's too.
    words[i] |= From::signs(raw, i);
  }
  return make_int4(words[0], words[1], words[2], words[3]);
}

// Of the scales of 512 columns, the word that a lane is to store, and where among a row's: float32 by group, or (`powers`)
// the exponents of four groups in one word, zero where there is no group. A warp calls it; false: the lane has none.
__device__ __forceinline__ bool take_scale(float scale, bool is_inside, bool powers, uint32_t unit, uint32_t words,
                                           uint32_t& element, uint32_t& word) {
  const uint32_t lane = threadIdx.x % 32, group = lane / kGroupLanes;
  if (!powers) {
    element = 4 * unit + group, word = __float_as_uint(scale);
    return lane % kGroupLanes == 0 && element < words;
  }
  const uint32_t exponent = is_inside ? __float_as_uint(scale) >> 23 : 0;
  element = unit;
  word = __reduce_or_sync(~0u, exponent << 8 * group);
  return lane == 0;
}

}  // namespace a2a
