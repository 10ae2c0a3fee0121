// Tanh GELU: x / 2 (1 + tanh(u)) with u = sqrt(2 / pi) (x + 0.044715 x^3), which equals x / (1 + e^(-2 u)).
// Beyond +-9.9 it is x or 0 in fp32, so x is clamped there before it is cubed.
#pragma once

#include "simd.h"

namespace fastmask {

constexpr float kGeluEnd = 9.9f;
constexpr float kGeluTwo = 1.5957691216057308f;  // 2 sqrt(2 / pi)
constexpr float kGeluCubic = 0.044715f;

// e^(-2 u) for |x| <= 9.9.
FASTMASK_INLINE float gelu_power(float x) { return fast_exp(x * (x * x * (-kGeluTwo * kGeluCubic) - kGeluTwo)); }

FASTMASK_INLINE float gelu(float x) {
  const float low = at_least(-kGeluEnd, x);
  return low * (1.0f / (1.0f + gelu_power(at_most(kGeluEnd, low))));  // not one division, to match the bits below
}

// Value and derivative. With gate = 1 / (1 + power), 1 - gate is computed as power * gate, without cancellation for a
// gate close to 1.
FASTMASK_INLINE void gelu_with_slope(float x, float& value, float& slope) {
  const float low = at_least(-kGeluEnd, x), cut = at_most(kGeluEnd, low);
  const float power = gelu_power(cut), gate = 1.0f / (1.0f + power);
  value = low * gate;
  slope = gate + cut * gate * (power * gate) * (kGeluTwo + 3.0f * kGeluTwo * kGeluCubic * cut * cut);
}

}  // namespace fastmask
