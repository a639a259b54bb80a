// Rows of any width, copied or filled by some threads: what travels beside the tokens, and what lands.
//
// `unit` is the widest access that every address allows; `start` this thread's number and `step` how many there are.
#pragma once
#include "ptx.cuh"
#include "window.cuh"

namespace a2a {

__device__ __forceinline__ void copy_bytes(uint8_t* to, const uint8_t* from, uint32_t bytes, uint32_t unit,
                                           uint32_t start, uint32_t step) {
  switch (unit) {
    case 16:
      for (uint32_t i = start; i < bytes / 16; i += step) ptx::st_row(to + 16ull * i, ptx::ld_stream(from + 16ull * i));
      break;
    case 8:
    case 4:
      for (uint32_t i = start; i < bytes / 4; i += step) {
        reinterpret_cast<uint32_t*>(to)[i] = reinterpret_cast<const uint32_t*>(from)[i];
      }
      break;
    default:
      for (uint32_t i = start; i < bytes; i += step) to[i] = from[i];
  }
}

__device__ __forceinline__ void fill_bytes(uint8_t* to, uint32_t bytes, uint32_t unit, uint32_t value, uint32_t start,
                                           uint32_t step) {
  switch (unit) {
    case 16:
      for (uint32_t i = start; i < bytes / 16; i += step) ptx::st_row(to + 16ull * i, make_int4(value, value, value, value));
      break;
    case 8:
    case 4:
      for (uint32_t i = start; i < bytes / 4; i += step) reinterpret_cast<uint32_t*>(to)[i] = value;
      break;
    default:
      for (uint32_t i = start; i < bytes; i += step) to[i] = static_cast<uint8_t>(value);
  }
}

// Copies a row of a plane beside the tokens to one place, by a warp.
__device__ __forceinline__ void copy_side(const Side& side, uint32_t token, uint8_t* window, uint64_t block,
                                          uint32_t row, uint64_t bound) {
  const uint32_t lane = threadIdx.x % 32;
  const uint8_t* from = side.from + token * side.stride;
  if (side.pitch == 0) {
    return copy_bytes(window + side.to + (block * bound + row) * side.bytes, from, side.bytes, side.unit, lane, 32);
  }
  // Scales by column: the elements of a row lie a pitch apart.
  const uint32_t elements = side.bytes / 4;
  auto* to = reinterpret_cast<uint32_t*>(window + side.to);
  for (uint32_t i = lane; i < elements; i += 32) {
    uint32_t word;
    if (side.unit >= 4) {
      word = reinterpret_cast<const uint32_t*>(from)[i];
    } else {
      memcpy(&word, from + 4 * i, 4);
    }
    to[(block * elements + i) * side.pitch + row] = word;
  }
}

}  // namespace a2a
