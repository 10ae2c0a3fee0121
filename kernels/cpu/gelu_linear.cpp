// `gelu_linear`: GELU and its gradient.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <optional>
#include <tuple>

#include "../common/check.h"
#include "../common/gelu.h"
#include "../common/rows.h"

namespace fastmask {
namespace {

constexpr int64_t kPiece = 1024;  // values per piece: input and output stay in the L1 cache

FASTMASK_SIMD void gelu_piece(const float* __restrict x, float* __restrict y, int64_t n) {
  for (int64_t i = 0; i < n; ++i) y[i] = gelu(x[i]);
}

FASTMASK_SIMD void gelu_gradient_piece(const float* __restrict grad, const float* __restrict x,
                                       float* __restrict grad_x, float* __restrict y, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    float value, slope;
    gelu_with_slope(x[i], value, slope);
    grad_x[i] = grad[i] * slope;
    y[i] = value;
  }
}

// Calls f(piece, length) in parallel for all pieces of n values.
template <typename F>
void for_pieces(int64_t n, const F& f) {
  torch::stable::parallel_for(0, (n + kPiece - 1) / kPiece, 8, f);
}

Tensor gelu_fwd(const Tensor& x, std::optional<ScalarType> out_dtype) {
  check_floats("x", x, x.sizes());
  check_dtype("out_dtype", out_dtype.value_or(x.scalar_type()));
  const int64_t n = x.numel();
  Tensor y = torch::stable::new_empty(x, x.sizes(), out_dtype.value_or(x.scalar_type()));
  for_pieces(n, [&](int64_t begin, int64_t end) {
    RowReader read_x(x, kPiece);
    RowWriter write_y(y, kPiece);
    for (int64_t piece = begin; piece < end; ++piece) {
      const int64_t length = std::min(kPiece, n - piece * kPiece);
      gelu_piece(read_x(piece, length), write_y.row(piece), length);
      write_y.done(piece, length);
    }
  });
  return y;
}

std::tuple<Tensor, Tensor> gelu_bwd(const Tensor& grad, const Tensor& x) {
  check_floats("x", x, x.sizes());
  check_floats("grad", grad, x.sizes());
  const int64_t n = x.numel();
  Tensor grad_x = torch::stable::new_empty(x, x.sizes(), x.scalar_type());
  Tensor y = torch::stable::new_empty(grad, grad.sizes(), grad.scalar_type());
  for_pieces(n, [&](int64_t begin, int64_t end) {
    RowReader read_grad(grad, kPiece), read_x(x, kPiece);
    RowWriter write_grad(grad_x, kPiece), write_y(y, kPiece);
    for (int64_t piece = begin; piece < end; ++piece) {
      const int64_t length = std::min(kPiece, n - piece * kPiece);
      gelu_gradient_piece(read_grad(piece, length), read_x(piece, length), write_grad.row(piece), write_y.row(piece),
                          length);
      write_grad.done(piece, length);
      write_y.done(piece, length);
    }
  });
  return {grad_x, y};
}

}  // namespace
}  // namespace fastmask

STABLE_TORCH_LIBRARY_IMPL(fastmask, CPU, m) {
  m.impl("gelu_fwd", TORCH_BOX(&fastmask::gelu_fwd));
  m.impl("gelu_bwd", TORCH_BOX(&fastmask::gelu_bwd));
}
