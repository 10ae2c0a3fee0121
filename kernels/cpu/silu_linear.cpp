// `silu_linear`: Linear of the SiLU of few rows, and its gradients. The weight is read once, at memory bandwidth,
// where a GEMM would first repack it for many rows.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cmath>
#include <tuple>
#include <vector>

#include "../common/check.h"
#include "../common/simd.h"

namespace fastmask {
namespace {

constexpr int64_t kGrain = 32;         // minimum number of weight rows per thread
constexpr int64_t kRowsPerPart = 256;  // weight rows per partial sum of grad_h

// y[r * stride] = bias + <h[r], w> for R rows.
template <int R>
FASTMASK_INLINE void dot_rows(const float* __restrict h, const float* __restrict w, float bias, float* y,
                              int64_t stride, int64_t width) {
  float s0 = 0, s1 = 0, s2 = 0, s3 = 0;
#pragma omp simd reduction(+ : s0, s1, s2, s3)
  for (int64_t d = 0; d < width; ++d) {
    s0 += h[d] * w[d];
    if constexpr (R > 1) s1 += h[width + d] * w[d];
    if constexpr (R > 2) s2 += h[2 * width + d] * w[d];
    if constexpr (R > 3) s3 += h[3 * width + d] * w[d];
  }
  const float sums[4] = {s0, s1, s2, s3};
  for (int r = 0; r < R; ++r) y[r * stride] = sums[r] + bias;
}

// One row of the weight times all rows of h.
FASTMASK_SIMD void forward_row(const float* h, const float* w, float bias, float* y, int64_t stride, int64_t rows,
                               int64_t width) {
  int64_t r = 0;
  for (; r + 4 <= rows; r += 4) dot_rows<4>(h + r * width, w, bias, y + r * stride, stride, width);
  if (rows - r == 3) dot_rows<3>(h + r * width, w, bias, y + r * stride, stride, width);
  if (rows - r == 2) dot_rows<2>(h + r * width, w, bias, y + r * stride, stride, width);
  if (rows - r == 1) dot_rows<1>(h + r * width, w, bias, y + r * stride, stride, width);
}

// grad_w = sum over rows of g[r * stride] * h[r]; stored (first) or accumulated.
template <int R>
FASTMASK_INLINE void mix_rows(const float* __restrict h, const float* g, int64_t stride, float* __restrict grad_w,
                              int64_t width, bool first) {
  const float g0 = g[0], g1 = R > 1 ? g[stride] : 0, g2 = R > 2 ? g[2 * stride] : 0, g3 = R > 3 ? g[3 * stride] : 0;
  const auto mixed = [&](int64_t d) __attribute__((always_inline)) {
    float sum = g0 * h[d];
    if constexpr (R > 1) sum += g1 * h[width + d];
    if constexpr (R > 2) sum += g2 * h[2 * width + d];
    if constexpr (R > 3) sum += g3 * h[3 * width + d];
    return sum;
  };
  if (first) {
    for (int64_t d = 0; d < width; ++d) grad_w[d] = mixed(d);
  } else {
    for (int64_t d = 0; d < width; ++d) grad_w[d] += mixed(d);
  }
}

FASTMASK_SIMD void weight_gradient_row(const float* h, const float* g, int64_t stride, float* grad_w, int64_t rows,
                                       int64_t width) {
  int64_t r = 0;
  for (; r + 4 <= rows; r += 4) mix_rows<4>(h + r * width, g + r * stride, stride, grad_w, width, r == 0);
  if (rows - r == 3) mix_rows<3>(h + r * width, g + r * stride, stride, grad_w, width, r == 0);
  if (rows - r == 2) mix_rows<2>(h + r * width, g + r * stride, stride, grad_w, width, r == 0);
  if (rows - r == 1) mix_rows<1>(h + r * width, g + r * stride, stride, grad_w, width, r == 0);
}

// grad_h[r] += sum over C rows of the weight of g[r, c] * w[c], for all rows r.
template <int C>
FASTMASK_INLINE void add_columns(const float* __restrict w, const float* g, int64_t stride, float* __restrict grad_h,
                                 int64_t rows, int64_t width) {
  for (int64_t r = 0; r < rows; ++r) {
    const float* from = g + r * stride;
    float* __restrict to = grad_h + r * width;
    const float g0 = from[0], g1 = C > 1 ? from[1] : 0, g2 = C > 1 ? from[2] : 0, g3 = C > 1 ? from[3] : 0;
    for (int64_t d = 0; d < width; ++d) {
      float sum = g0 * w[d];
      if constexpr (C > 1) sum += g1 * w[width + d] + g2 * w[2 * width + d] + g3 * w[3 * width + d];
      to[d] += sum;
    }
  }
}

FASTMASK_SIMD void input_gradient_rows(const float* w, const float* g, int64_t stride, float* grad_h, int64_t rows,
                                       int64_t width, int64_t count) {
  if (count == 4) {
    add_columns<4>(w, g, stride, grad_h, rows, width);
  } else {
    for (int64_t c = 0; c < count; ++c) add_columns<1>(w + c * width, g + c, stride, grad_h, rows, width);
  }
}

float sigmoid(float x) { return 1.0f / (1.0f + std::exp(-x)); }

const float* floats(const Tensor& tensor) { return static_cast<const float*>(tensor.const_data_ptr()); }
float* new_floats(const Tensor& tensor) { return static_cast<float*>(tensor.mutable_data_ptr()); }

std::vector<float> silu(const Tensor& x) {
  const float* from = floats(x);
  std::vector<float> h(x.numel());
  for (size_t i = 0; i < h.size(); ++i) h[i] = from[i] * sigmoid(from[i]);
  return h;
}

void check_operands(const Tensor& x, const Tensor& weight) {
  check_dim("x", x, 2);
  check_dim("weight", weight, 2);
  check_fp32("x", x, x.sizes());
  check_fp32("weight", weight, {weight.size(0), x.size(1)});
}

Tensor silu_linear_fwd(const Tensor& x, const Tensor& weight, const Tensor& bias) {
  check_operands(x, weight);
  const int64_t rows = x.size(0), width = x.size(1), out = weight.size(0);
  check_fp32("bias", bias, {out});
  Tensor y = torch::stable::new_empty(x, {rows, out}, x.scalar_type());
  const std::vector<float> h = silu(x);
  const float *w = floats(weight), *b = floats(bias);
  float* to = new_floats(y);
  torch::stable::parallel_for(0, out, kGrain, [&](int64_t begin, int64_t end) {
    for (int64_t e = begin; e < end; ++e) forward_row(h.data(), w + e * width, b[e], to + e, out, rows, width);
  });
  return y;
}

std::tuple<Tensor, Tensor, Tensor> silu_linear_bwd(const Tensor& grad, const Tensor& x, const Tensor& weight) {
  check_operands(x, weight);
  const int64_t rows = x.size(0), width = x.size(1), out = weight.size(0);
  check_fp32("grad", grad, {rows, out});
  Tensor grad_x = torch::stable::new_empty(x, x.sizes(), x.scalar_type());
  Tensor grad_weight = torch::stable::new_empty(weight, weight.sizes(), weight.scalar_type());
  Tensor grad_bias = torch::stable::new_empty(weight, {out}, weight.scalar_type());
  const std::vector<float> h = silu(x);
  const float *w = floats(weight), *g = floats(grad);
  float *to_w = new_floats(grad_weight), *to_b = new_floats(grad_bias), *to_x = new_floats(grad_x);
  // Parts depend on the shape alone, so sums do not depend on the number of threads.
  const int64_t parts = (out + kRowsPerPart - 1) / kRowsPerPart, size = rows * width;
  std::vector<float> partial(parts * size, 0.0f);
  torch::stable::parallel_for(0, parts, 1, [&](int64_t begin, int64_t end) {
    for (int64_t part = begin; part < end; ++part) {
      const int64_t last = std::min(out, (part + 1) * kRowsPerPart);
      for (int64_t e = part * kRowsPerPart; e < last; e += 4) {
        const int64_t count = std::min<int64_t>(4, last - e);
        input_gradient_rows(w + e * width, g + e, out, partial.data() + part * size, rows, width, count);
        for (int64_t c = e; c < e + count; ++c) {
          weight_gradient_row(h.data(), g + c, out, to_w + c * width, rows, width);
          float sum = 0.0f;
          for (int64_t r = 0; r < rows; ++r) sum += g[r * out + c];
          to_b[c] = sum;
        }
      }
    }
  });
  const float* from = floats(x);
  for (int64_t i = 0; i < size; ++i) {
    float sum = 0.0f;
    for (int64_t part = 0; part < parts; ++part) sum += partial[part * size + i];
    const float gate = sigmoid(from[i]);
    to_x[i] = sum * gate * (1.0f + from[i] * (1.0f - gate));
  }
  return {grad_x, grad_weight, grad_bias};
}

}  // namespace
}  // namespace fastmask

STABLE_TORCH_LIBRARY_IMPL(fastmask, CPU, m) {
  m.impl("silu_linear_fwd", TORCH_BOX(&fastmask::silu_linear_fwd));
  m.impl("silu_linear_bwd", TORCH_BOX(&fastmask::silu_linear_bwd));
}
