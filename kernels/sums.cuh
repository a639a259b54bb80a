// Element types, and sums of results: float32, separate multiplications and additions, one rounding at the end.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "ptx.cuh"
#include "window.cuh"

namespace a2a {

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

// Expands to what `X` makes of each pair of what results are and what their sum becomes.
#define A2A_EACH_SUM(X)     \
  X(bf16_bf16, Bf16, Bf16)  \
  X(bf16_f16, Bf16, F16)    \
  X(bf16_f32, Bf16, F32)    \
  X(f16_bf16, F16, Bf16)    \
  X(f16_f16, F16, F16)      \
  X(f16_f32, F16, F32)      \
  X(f32_bf16, F32, Bf16)    \
  X(f32_f16, F32, F16)      \
  X(f32_f32, F32, F32)

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

// Rounds a sum into an output, behind what stands there if that is to be added (last, as the header says).
template <class To, uint32_t n>
__device__ __forceinline__ void put_sum(uint8_t* out, bool accumulates, float* sum) {
  if (accumulates) {
    float x[n];
    load_out<To, n>(out, x);
#pragma unroll
    for (uint32_t j = 0; j < n; ++j) sum[j] = __fadd_rn(sum[j], x[j]);
  }
  store_out<To, n>(out, sum);
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

// Adds vectors of rows that a warp's lanes have, those of `all`, in their order: of each row `abreast`, every 32nd from `first`
// on, of `vectors`. A warp calls it. Some rows are on their way at once.
template <class From, uint32_t abreast>
__device__ __forceinline__ void add_abreast(const uint8_t* row, uint32_t all, uint32_t first, uint32_t vectors,
                                            float (&acc)[abreast][16 / From::kBytes]) {
  constexpr uint32_t kElements = 16 / From::kBytes, kInFlight = 6;
#pragma unroll 1
  while (all != 0) {
    int4 v[kInFlight][abreast];
    const uint32_t n = __popc(all);
#pragma unroll
    for (uint32_t i = 0; i < kInFlight; ++i) {
      const auto* from = reinterpret_cast<const uint8_t*>(__shfl_sync(~0u, reinterpret_cast<uint64_t>(row), __ffs(all) - 1));
      all &= all - 1;
#pragma unroll
      for (uint32_t j = 0; j < abreast; ++j) {
        if (i < n && first + 32 * j < vectors) v[i][j] = ptx::ld_stream(from + 16ull * (first + 32 * j));
      }
    }
#pragma unroll
    for (uint32_t i = 0; i < kInFlight; ++i) {
      if (i >= n) break;
#pragma unroll
      for (uint32_t j = 0; j < abreast; ++j) {
        float x[kElements];
        From::unpack(v[i][j], x);
#pragma unroll
        for (uint32_t e = 0; e < kElements; ++e) acc[j][e] = __fadd_rn(acc[j][e], x[e]);
      }
    }
  }
}

// The same of all of a token's rows, in their order.
template <class From, bool weighs>
__device__ __forceinline__ void add_all(const uint8_t* const* rows, const float* weights, uint32_t n, uint64_t at,
                                        float* acc) {
  constexpr uint32_t kInFlight = 8;
  uint32_t first = 0;
  for (; first + kInFlight <= n; first += kInFlight) {
    add_rows<From, weighs, kInFlight>(rows + first, weights + first, at, acc);
  }
  switch (n - first) {
    case 1: add_rows<From, weighs, 1>(rows + first, weights + first, at, acc); break;
    case 2: add_rows<From, weighs, 2>(rows + first, weights + first, at, acc); break;
    case 3: add_rows<From, weighs, 3>(rows + first, weights + first, at, acc); break;
    case 4: add_rows<From, weighs, 4>(rows + first, weights + first, at, acc); break;
    case 5: add_rows<From, weighs, 5>(rows + first, weights + first, at, acc); break;
    case 6: add_rows<From, weighs, 6>(rows + first, weights + first, at, acc); break;
    case 7: add_rows<From, weighs, 7>(rows + first, weights + first, at, acc); break;
    default: break;
  }
}

}  // namespace a2a
