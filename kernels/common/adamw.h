// AdamW step and EMA update of one value, with the formulas of fastmask/kernels/adamw_ema.py.
#pragma once

#include <cmath>

#include "simd.h"

namespace fastmask {

// Constants of a tensor.
struct AdamwStep {
  float factor, beta1, beta2, rest1, rest2, shrink, step_size, correction, eps;
};

struct AdamwOptions {
  double beta1, beta2, eps, weight_decay;
};

// For step t, counted from 1; in double, since 1 - beta2^t is a small difference.
FASTMASK_INLINE AdamwStep adamw_step(double t, double lr, float factor, const AdamwOptions& o) {
  return {factor,
          static_cast<float>(o.beta1),
          static_cast<float>(o.beta2),
          static_cast<float>(1.0 - o.beta1),
          static_cast<float>(1.0 - o.beta2),
          static_cast<float>(lr * o.weight_decay),
          static_cast<float>(lr / (1.0 - std::pow(o.beta1, t))),
          static_cast<float>(1.0 / std::sqrt(1.0 - std::pow(o.beta2, t))),
          static_cast<float>(o.eps)};
}

FASTMASK_INLINE void adamw(float& p, float grad, float& m, float& v, const AdamwStep& s) {
  const float g = grad * s.factor;
  m = s.beta1 * m + s.rest1 * g;
  v = s.beta2 * v + s.rest2 * g * g;
  p -= s.shrink * p + s.step_size * (m / (std::sqrt(v) * s.correction + s.eps));
}

FASTMASK_INLINE float moved(float average, float p, float rate) { return average + rate * (p - average); }

}  // namespace fastmask
