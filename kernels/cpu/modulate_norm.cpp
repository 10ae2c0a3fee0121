// `modulate_norm`: adaptive norm and its gradients.

#include "../common/norm.h"

#include <torch/csrc/stable/library.h>

#include <tuple>

#include "../common/groups.h"

namespace fastmask {
namespace {

FASTMASK_SIMD void backward_row(const float* __restrict grad_h, const float* __restrict x, Statistics s,
                                const float* __restrict scale, float* __restrict grad_x, float* grad_shift,
                                float* grad_scale, int64_t width, bool rms) {
  float mean_g, mean_gx;
  gradient_means(grad_h, x, s, scale, grad_shift, grad_scale, width, mean_g, mean_gx);
  if (rms) mean_g = 0.0f;
  for (int64_t d = 0; d < width; ++d) {
    const float xhat = normalized(x[d], s);
    grad_x[d] = x_gradient(xhat_gradient(grad_h[d], scale[d]), xhat, s.rstd, mean_g, mean_gx);
  }
}

FASTMASK_SIMD void again_row(const float* x, Statistics s, const float* shift, const float* scale, float* h,
                             int64_t width) {
  modulate_row(x, s, shift, scale, h, width);
}

Groups check_norm(const Tensor& x, const Tensor& shift, const Tensor& scale, const std::optional<Tensor>& cu_seqlens) {
  check_dim("x", x, 2);
  check_dim("shift", shift, 2);
  check_floats("x", x, x.sizes());
  check_modulation("shift", shift, shift.size(0), x.size(1));
  check_modulation("scale", scale, shift.size(0), x.size(1));
  return Groups(x.size(0), shift.size(0), cu_seqlens);
}

std::tuple<Tensor, Tensor> modulate_norm_fwd(const Tensor& x, const Tensor& shift, const Tensor& scale,
                                             std::optional<Tensor> cu_seqlens, bool rms, double eps,
                                             ScalarType out_dtype) {
  const Groups groups = check_norm(x, shift, scale, cu_seqlens);
  check_dtype("out_dtype", out_dtype);
  const int64_t rows = groups.rows, width = x.size(1);
  Tensor h = torch::stable::new_empty(x, x.sizes(), out_dtype);
  Tensor stats = torch::stable::new_empty(x, {2, rows}, ScalarType::Float);
  float* stat = static_cast<float*>(stats.mutable_data_ptr());
  groups.for_parts([&](const auto& each) {
    RowReader read_x(x, width), read_shift(shift, shift.stride(0), width), read_scale(scale, scale.stride(0), width);
    RowWriter write_h(h, width);
    each([&](int64_t group, int64_t begin, int64_t end, int64_t) {
      const float *b_shift = read_shift(group), *b_scale = read_scale(group);
      for (int64_t i = begin; i < end; ++i) {
        const Statistics s = norm_row(read_x(i), b_shift, b_scale, write_h.row(i), width, rms, static_cast<float>(eps));
        write_h.done(i);
        stat[i] = s.mean;
        stat[rows + i] = s.rstd;
      }
    });
  });
  return {h, stats};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> modulate_norm_bwd(const Tensor& grad_h, const Tensor& x, const Tensor& stats,
                                                             const Tensor& shift, const Tensor& scale,
                                                             std::optional<Tensor> cu_seqlens, bool rms,
                                                             bool recompute) {
  const Groups groups = check_norm(x, shift, scale, cu_seqlens);
  const int64_t rows = groups.rows, width = x.size(1);
  check_floats("grad_h", grad_h, x.sizes());
  check_fp32("stats", stats, {2, rows});
  Tensor grad_x = torch::stable::new_empty(x, x.sizes(), x.scalar_type());
  Tensor sums[2] = {torch::stable::new_empty(shift, shift.sizes(), shift.scalar_type()),
                    torch::stable::new_empty(scale, scale.sizes(), scale.scalar_type())};
  Tensor h = recompute ? torch::stable::new_empty(grad_h, grad_h.sizes(), grad_h.scalar_type())
                       : torch::stable::new_empty(grad_h, {0}, grad_h.scalar_type());
  const float* stat = static_cast<const float*>(stats.const_data_ptr());
  std::vector<float> partial(groups.count * groups.parts_per_group() * 2 * width);
  groups.for_parts([&](const auto& each) {
    RowReader read_grad(grad_h, width), read_x(x, width), read_shift(shift, shift.stride(0), width),
        read_scale(scale, scale.stride(0), width);
    RowWriter write_grad(grad_x, width), write_h(h, width);
    each([&](int64_t group, int64_t begin, int64_t end, int64_t part) {
      const float *b_shift = read_shift(group), *b_scale = read_scale(group);
      float* sum = partial.data() + part * 2 * width;
      for (int64_t i = begin; i < end; ++i) {
        const Statistics s{stat[i], stat[rows + i]};
        const float* b_x = read_x(i);
        backward_row(read_grad(i), b_x, s, b_scale, write_grad.row(i), sum, sum + width, width, rms);
        write_grad.done(i);
        if (recompute) {
          again_row(b_x, s, b_shift, b_scale, write_h.row(i), width);
          write_h.done(i);
        }
      }
    });
  });
  finish_sums(groups, partial, width, sums);
  return {grad_x, sums[0], sums[1], h};
}

}  // namespace
}  // namespace fastmask

STABLE_TORCH_LIBRARY_IMPL(fastmask, CPU, m) {
  m.impl("modulate_norm_fwd", TORCH_BOX(&fastmask::modulate_norm_fwd));
  m.impl("modulate_norm_bwd", TORCH_BOX(&fastmask::modulate_norm_bwd));
}
