// The tanh form of GELU: x / 2 (1 + tanh(u)) with u = sqrt(2 / pi) (x + 0.044715 x^3), which is x / (1 + e^(-2 u)).
// Beyond +-9.9 it is x or 0 to all digits of fp32, so that x is cut off there before it is cubed.
#pragma once

#include "simd.h"

namespace fastmask {

constexpr float kGeluEnd = 9.9f;
constexpr float kGeluTwo = 1.5957691216057308f;  // 2 sqrt(2 / pi)
constexpr float kGeluCubic = 0.044715f;

// 1 + e^(-2 u) for |x| <= 9.9.
FASTMASK_INLINE float gelu_divisor(float x) {
  return 1.0f + fast_exp(x * (x * x * (-kGeluTwo * kGeluCubic) - kGeluTwo));
}

FASTMASK_INLINE float gelu(float x) {
  const float low = at_least(-kGeluEnd, x);
  return low * (1.0f / gelu_divisor(at_most(kGeluEnd, low)));  // not one division: the same bits as below
}

// Both the value and the derivative by x.
FASTMASK_INLINE void gelu_with_slope(float x, float& value, float& slope) {
  const float low = at_least(-kGeluEnd, x), cut = at_most(kGeluEnd, low);
  const float gate = 1.0f / gelu_divisor(cut);
  value = low * gate;
  slope = gate + cut * gate * (1.0f - gate) * (kGeluTwo + 3.0f * kGeluTwo * kGeluCubic * cut * cut);
}

}  // namespace fastmask
