// Forward and backward of one row of an adaptive norm, h = norm(x) * (1 + scale) + shift. Rows fit into the L1 cache,
// so each step is a separate pass over the row.
#pragma once

#include <cmath>

#include "simd.h"

namespace fastmask {

struct Statistics {
  float mean, rstd;
};

// One value. With the gradient g of xhat, the gradient of x is rstd (g - mean(g) - xhat mean(g xhat)).
FASTMASK_INLINE float normalized(float x, Statistics s) { return (x - s.mean) * s.rstd; }
FASTMASK_INLINE float modulated(float xhat, float shift, float scale) { return xhat * (1.0f + scale) + shift; }
FASTMASK_INLINE float xhat_gradient(float grad_h, float scale) { return grad_h * (1.0f + scale); }
FASTMASK_INLINE float x_gradient(float g, float xhat, float rstd, float mean_g, float mean_gx) {
  return rstd * (g - mean_g - xhat * mean_gx);
}

// Block size of row sums; block sums are then added. Rounding errors grow with the longer of the two sums.
constexpr std::int64_t kSumPiece = 256;

FASTMASK_INLINE std::int64_t piece_end(std::int64_t begin, std::int64_t width) {
  return begin + kSumPiece < width ? begin + kSumPiece : width;
}

FASTMASK_INLINE Statistics row_statistics(const float* __restrict x, std::int64_t width, bool rms, float eps) {
  float mean = 0.0f, squares = 0.0f;
  for (std::int64_t begin = 0; begin < width && !rms; begin += kSumPiece) {
    float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
    for (std::int64_t d = begin; d < piece_end(begin, width); ++d) sum += x[d];
    mean += sum;
  }
  mean /= static_cast<float>(width);
  for (std::int64_t begin = 0; begin < width; begin += kSumPiece) {
    float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
    for (std::int64_t d = begin; d < piece_end(begin, width); ++d) sum += (x[d] - mean) * (x[d] - mean);
    squares += sum;
  }
  return {mean, 1.0f / std::sqrt(squares / static_cast<float>(width) + eps)};
}

FASTMASK_INLINE void modulate_row(const float* __restrict x, Statistics s, const float* __restrict shift,
                                  const float* __restrict scale, float* __restrict h, std::int64_t width) {
  for (std::int64_t d = 0; d < width; ++d) h[d] = modulated(normalized(x[d], s), shift[d], scale[d]);
}

// Mean and rstd; not every file that includes this header needs it.
[[maybe_unused]] static FASTMASK_SIMD Statistics norm_row(const float* x, const float* shift, const float* scale,
                                                          float* h, std::int64_t width, bool rms, float eps) {
  const Statistics s = row_statistics(x, width, rms, eps);
  modulate_row(x, s, shift, scale, h, width);
  return s;
}

// mean(g) and mean(g * xhat) of g = grad_h * (1 + scale); also accumulates the sums of grad_h and grad_h * xhat.
FASTMASK_INLINE void gradient_means(const float* __restrict grad_h, const float* __restrict x, Statistics s,
                                    const float* __restrict scale, float* __restrict grad_shift,
                                    float* __restrict grad_scale, std::int64_t width, float& mean_g, float& mean_gx) {
  float sum_g = 0.0f, sum_gx = 0.0f;
  for (std::int64_t begin = 0; begin < width; begin += kSumPiece) {
    float piece_g = 0.0f, piece_gx = 0.0f;
#pragma omp simd reduction(+ : piece_g, piece_gx)
    for (std::int64_t d = begin; d < piece_end(begin, width); ++d) {
      const float xhat = normalized(x[d], s), g = xhat_gradient(grad_h[d], scale[d]);
      grad_shift[d] += grad_h[d];
      grad_scale[d] += grad_h[d] * xhat;
      piece_g += g;
      piece_gx += g * xhat;
    }
    sum_g += piece_g;
    sum_gx += piece_gx;
  }
  mean_g = sum_g / static_cast<float>(width);
  mean_gx = sum_gx / static_cast<float>(width);
}

}  // namespace fastmask
