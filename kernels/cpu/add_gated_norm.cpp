// `add_gated_norm`: gated residual addition, the norm that follows, and the gradients.

#include "../common/norm.h"

#include <torch/csrc/stable/library.h>

#include <tuple>

#include "../common/groups.h"

namespace fastmask {
namespace {

FASTMASK_SIMD void add_row(const float* __restrict x, const float* __restrict branch, const float* __restrict gate,
                           float* __restrict x_new, int64_t width) {
  for (int64_t d = 0; d < width; ++d) x_new[d] = x[d] + gate[d] * branch[d];
}

// h_again is written if it is not null; grad_new is added if it is not null.
FASTMASK_SIMD void backward_row(const float* __restrict grad_new, const float* __restrict grad_h,
                                const float* __restrict x, Statistics s, const float* __restrict branch,
                                const float* __restrict gate, const float* __restrict shift,
                                const float* __restrict scale, float* __restrict grad_x, float* __restrict grad_branch,
                                float* __restrict h_again, float* __restrict sums, int64_t width, bool rms) {
  float mean_g, mean_gx;
  float* __restrict grad_gate = sums;
  gradient_means(grad_h, x, s, scale, sums + width, sums + 2 * width, width, mean_g, mean_gx);
  if (rms) mean_g = 0.0f;
  const auto gradient = [&](int64_t d, float residual) __attribute__((always_inline)) {
    const float xhat = normalized(x[d], s);
    const float g = residual + x_gradient(xhat_gradient(grad_h[d], scale[d]), xhat, s.rstd, mean_g, mean_gx);
    grad_gate[d] += g * branch[d];
    grad_branch[d] = g * gate[d];
    grad_x[d] = g;
  };
  if (grad_new) {
    for (int64_t d = 0; d < width; ++d) gradient(d, grad_new[d]);
  } else {
    for (int64_t d = 0; d < width; ++d) gradient(d, 0.0f);
  }
  if (h_again) modulate_row(x, s, shift, scale, h_again, width);
}

Groups check_norm(const Tensor& x, const Tensor& branch, const Tensor& gate, const Tensor& shift, const Tensor& scale,
                  const std::optional<Tensor>& cu_seqlens) {
  check_dim("x", x, 2);
  check_dim("gate", gate, 2);
  check_floats("x", x, x.sizes());
  check_floats("branch", branch, x.sizes());
  check_modulation("gate", gate, gate.size(0), x.size(1));
  check_modulation("shift", shift, gate.size(0), x.size(1));
  check_modulation("scale", scale, gate.size(0), x.size(1));
  return Groups(x.size(0), gate.size(0), cu_seqlens);
}

std::tuple<Tensor, Tensor, Tensor> add_gated_norm_fwd(const Tensor& x, const Tensor& branch, const Tensor& gate,
                                                      const Tensor& shift, const Tensor& scale,
                                                      std::optional<Tensor> cu_seqlens, bool rms, double eps,
                                                      ScalarType out_dtype) {
  const Groups groups = check_norm(x, branch, gate, shift, scale, cu_seqlens);
  check_dtype("out_dtype", out_dtype);
  const int64_t rows = groups.rows, width = x.size(1);
  Tensor x_new = torch::stable::new_empty(x, x.sizes(), x.scalar_type());
  Tensor h = torch::stable::new_empty(x, x.sizes(), out_dtype);
  Tensor stats = torch::stable::new_empty(x, {2, rows}, ScalarType::Float);
  float* stat = static_cast<float*>(stats.mutable_data_ptr());
  groups.for_parts([&](const auto& each) {
    RowReader read_x(x, width), read_branch(branch, width), read_gate(gate, gate.stride(0), width),
        read_shift(shift, shift.stride(0), width), read_scale(scale, scale.stride(0), width);
    RowWriter write_x(x_new, width), write_h(h, width);
    each([&](int64_t group, int64_t begin, int64_t end, int64_t) {
      const float *b_gate = read_gate(group), *b_shift = read_shift(group), *b_scale = read_scale(group);
      for (int64_t i = begin; i < end; ++i) {
        add_row(read_x(i), read_branch(i), b_gate, write_x.row(i), width);
        write_x.round(i);  // normalise the rounded residual, as seen by backward
        const Statistics s =
            norm_row(write_x.row(i), b_shift, b_scale, write_h.row(i), width, rms, static_cast<float>(eps));
        write_h.done(i);
        stat[i] = s.mean;
        stat[rows + i] = s.rstd;
      }
    });
  });
  return {x_new, h, stats};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> add_gated_norm_bwd(
    std::optional<Tensor> grad_new, const Tensor& grad_h, const Tensor& x_new, const Tensor& stats,
    const Tensor& branch, const Tensor& gate, const Tensor& shift, const Tensor& scale,
    std::optional<Tensor> cu_seqlens, bool rms, bool recompute) {
  const Groups groups = check_norm(x_new, branch, gate, shift, scale, cu_seqlens);
  const int64_t rows = groups.rows, width = x_new.size(1);
  check_floats("grad_h", grad_h, x_new.sizes());
  if (grad_new.has_value()) check_floats("grad_new", *grad_new, x_new.sizes());
  check_fp32("stats", stats, {2, rows});
  Tensor grad_x = torch::stable::new_empty(x_new, x_new.sizes(), x_new.scalar_type());
  Tensor grad_branch = torch::stable::new_empty(branch, branch.sizes(), branch.scalar_type());
  Tensor sums[3] = {torch::stable::new_empty(gate, gate.sizes(), gate.scalar_type()),
                    torch::stable::new_empty(shift, shift.sizes(), shift.scalar_type()),
                    torch::stable::new_empty(scale, scale.sizes(), scale.scalar_type())};
  Tensor h = recompute ? torch::stable::new_empty(grad_h, grad_h.sizes(), grad_h.scalar_type())
                       : torch::stable::new_empty(grad_h, {0}, grad_h.scalar_type());
  const float* stat = static_cast<const float*>(stats.const_data_ptr());
  std::vector<float> partial(groups.count * groups.parts_per_group() * 3 * width);
  groups.for_parts([&](const auto& each) {
    RowReader read_new(grad_new.value_or(grad_h), width), read_grad(grad_h, width), read_x(x_new, width),
        read_branch(branch, width), read_gate(gate, gate.stride(0), width), read_shift(shift, shift.stride(0), width),
        read_scale(scale, scale.stride(0), width);
    RowWriter write_x(grad_x, width), write_branch(grad_branch, width), write_h(h, width);
    each([&](int64_t group, int64_t begin, int64_t end, int64_t part) {
      const float *b_gate = read_gate(group), *b_shift = read_shift(group), *b_scale = read_scale(group);
      float* sum = partial.data() + part * 3 * width;
      for (int64_t i = begin; i < end; ++i) {
        backward_row(grad_new.has_value() ? read_new(i) : nullptr, read_grad(i), read_x(i), {stat[i], stat[rows + i]},
                     read_branch(i), b_gate, b_shift, b_scale, write_x.row(i), write_branch.row(i),
                     recompute ? write_h.row(i) : nullptr, sum, width, rms);
        write_x.done(i);
        write_branch.done(i);
        if (recompute) write_h.done(i);
      }
    });
  });
  finish_sums(groups, partial, width, sums);
  return {grad_x, grad_branch, sums[0], sums[1], sums[2], h};
}

}  // namespace
}  // namespace fastmask

STABLE_TORCH_LIBRARY_IMPL(fastmask, CPU, m) {
  m.impl("add_gated_norm_fwd", TORCH_BOX(&fastmask::add_gated_norm_fwd));
  m.impl("add_gated_norm_bwd", TORCH_BOX(&fastmask::add_gated_norm_bwd));
}
