// Small matmul with accumulators in registers; the compiler alone would keep them in memory.
#pragma once

#include "simd.h"

namespace fastmask {

constexpr std::int64_t kTileRows = 4, kTileColumns = 16;
constexpr std::int64_t kTileSum = 64;  // block size of the accumulation; block sums are then added

// Eight values; two or more instructions on processors with narrower vectors.
using Lanes = float __attribute__((vector_size(32), aligned(4), may_alias));

FASTMASK_INLINE Lanes& lanes(float* values) { return *reinterpret_cast<Lanes*>(values); }
FASTMASK_INLINE const Lanes& lanes(const float* values) { return *reinterpret_cast<const Lanes*>(values); }

// sums = left right, with left (kTileRows, count) and right (count, kTileColumns) given by their strides.
FASTMASK_INLINE void multiply_tile(const float* left, std::int64_t left_row, std::int64_t left_column,
                                   const float* right, std::int64_t right_row, std::int64_t count,
                                   Lanes (&sums)[kTileRows][2]) {
  for (auto& row : sums) row[0] = row[1] = Lanes{};
  for (std::int64_t begin = 0; begin < count; begin += kTileSum) {
    const std::int64_t end = begin + kTileSum < count ? begin + kTileSum : count;
    Lanes piece[kTileRows][2] = {};
    for (std::int64_t k = begin; k < end; ++k) {
      const Lanes low = lanes(right + k * right_row), high = lanes(right + k * right_row + 8);
      for (std::int64_t r = 0; r < kTileRows; ++r) {
        const float factor = left[r * left_row + k * left_column];
        piece[r][0] += factor * low;
        piece[r][1] += factor * high;
      }
    }
    for (std::int64_t r = 0; r < kTileRows; ++r) {
      sums[r][0] += piece[r][0];
      sums[r][1] += piece[r][1];
    }
  }
}

}  // namespace fastmask
