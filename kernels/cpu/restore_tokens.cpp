// `gather_tokens` and `restore_tokens`: gathering kept tokens, restoring all positions, and the gradients.

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cstring>
#include <tuple>

#include "../common/groups.h"
#include "../common/indices.h"
#include "../common/norm.h"

namespace fastmask {
namespace {

FASTMASK_SIMD void add_row(const float* __restrict a, const float* __restrict b, float* __restrict out, int64_t width) {
  for (int64_t d = 0; d < width; ++d) out[d] = a[d] + b[d];
}

// out = grad + through_norm, which can be null.
FASTMASK_SIMD void set_gradient(const float* __restrict grad, const float* __restrict through_norm,
                                float* __restrict out, int64_t width) {
  if (!through_norm) {
    std::memcpy(out, grad, width * sizeof(float));
    return;
  }
  for (int64_t d = 0; d < width; ++d) out[d] = grad[d] + through_norm[d];
}

FASTMASK_SIMD void sum_gradient(const float* __restrict grad, const float* __restrict through_norm,
                                float* __restrict sum, int64_t width) {
  if (through_norm) {
    for (int64_t d = 0; d < width; ++d) sum[d] += grad[d] + through_norm[d];
  } else {
    for (int64_t d = 0; d < width; ++d) sum[d] += grad[d];
  }
}

// The mask token replaces rows of x and is rounded like them.
std::vector<float> rounded_token(const Tensor& mask_token, const Tensor& x) {
  const int64_t width = mask_token.size(0);
  const Tensor like_x = torch::stable::new_empty(x, {width}, x.scalar_type());
  RowReader read(mask_token, width), read_back(like_x, width);
  RowWriter write(like_x, width);
  std::copy_n(read(0), width, write.row(0));
  write.done(0);
  const float* token = read_back(0);
  return {token, token + width};
}

ScalarType promoted(ScalarType a, ScalarType b) { return a == b ? a : ScalarType::Float; }

std::tuple<Tensor, Tensor, Tensor> restore_tokens_fwd(const Tensor& x, const Tensor& mask_token, const Tensor& position,
                                                      const Tensor& ids_restore, std::optional<Tensor> cu_seqlens,
                                                      std::optional<Tensor> shift, std::optional<Tensor> scale,
                                                      bool rms, double eps) {
  check_dim("x", x, 2);
  check_dim("ids_restore", ids_restore, 2);
  const int64_t batch = ids_restore.size(0), length = ids_restore.size(1), rows = batch * length, width = x.size(1);
  check_floats("x", x, x.sizes());
  check_width(width);
  check_floats("mask_token", mask_token, {width});
  check_floats("position", position, {length, width});
  const Groups samples(rows, batch, std::nullopt), kept(x.size(0), batch, cu_seqlens, length);
  const Indices ids("ids_restore", ids_restore, length);
  const bool normed = check_modulations(shift, scale, batch, width);
  const std::vector<float> token = rounded_token(mask_token, x);
  Tensor restored = torch::stable::new_empty(x, {rows, width}, promoted(x.scalar_type(), position.scalar_type()));
  const auto if_normed = [&](std::initializer_list<int64_t> shape, ScalarType dtype) {
    return normed ? torch::stable::new_empty(x, shape, dtype) : torch::stable::new_empty(x, {0}, dtype);
  };
  Tensor h = if_normed({rows, width}, restored.scalar_type()), stats = if_normed({2, rows}, ScalarType::Float);
  float* stat = static_cast<float*>(stats.mutable_data_ptr());
  samples.for_parts([&](const auto& each) {
    RowReader read_x(x, width), read_position(position, width);
    RowReader read_shift(shift.value_or(x), normed ? shift->stride(0) : width, width);
    RowReader read_scale(scale.value_or(x), normed ? scale->stride(0) : width, width);
    RowWriter write(restored, width), write_h(h, width);
    each([&](int64_t sample, int64_t begin, int64_t end, int64_t) {
      const int64_t first = kept.begin(sample), count = kept.begin(sample + 1) - first;
      const float *b_shift = normed ? read_shift(sample) : nullptr, *b_scale = normed ? read_scale(sample) : nullptr;
      for (int64_t i = begin; i < end; ++i) {
        const float* source = ids[i] < count ? read_x(first + ids[i]) : token.data();
        add_row(source, read_position(i - sample * length), write.row(i), width);
        if (!normed) {
          write.done(i);
          continue;
        }
        write.round(i);  // normalise the rounded row, as seen by backward
        const Statistics s =
            norm_row(write.row(i), b_shift, b_scale, write_h.row(i), width, rms, static_cast<float>(eps));
        write_h.done(i);
        stat[i] = s.mean;
        stat[rows + i] = s.rstd;
      }
    });
  });
  return {restored, h, stats};
}

// Throws unless every kept row has exactly one position, from which it receives its gradient.
void check_rows_are_met_once(const Indices& ids, const Groups& kept, int64_t length) {
  std::vector<std::uint8_t> met(kept.rows, 0);
  int64_t count = 0;
  for (int64_t sample = 0; sample < kept.count; ++sample) {
    const int64_t first = kept.begin(sample), number = kept.begin(sample + 1) - first;
    for (int64_t i = sample * length; i < (sample + 1) * length; ++i) {
      if (ids[i] >= number) continue;
      STD_TORCH_CHECK(!met[first + ids[i]], "ids_restore holds ", ids[i], " twice for sample ", sample);
      met[first + ids[i]] = 1;
      ++count;
    }
  }
  STD_TORCH_CHECK(count == kept.rows, "ids_restore has places for ", count, " kept rows of ", kept.rows);
}

// Reduces partial sums, (samples * parts, width), over the parts of each sample, then over samples.
Tensor sum_of_parts(const std::vector<float>& partial, int64_t samples, int64_t parts, const Tensor& like) {
  const int64_t width = like.size(0);
  Tensor out = torch::stable::new_empty(like, {width}, like.scalar_type());
  RowWriter write(out, width);
  float* total = write.row(0);
  std::fill(total, total + width, 0.0f);
  std::vector<float> sum(width);
  for (int64_t sample = 0; sample < samples; ++sample) {
    std::fill(sum.begin(), sum.end(), 0.0f);
    for (int64_t part = 0; part < parts; ++part) {
      sum_gradient(partial.data() + (sample * parts + part) * width, nullptr, sum.data(), width);
    }
    sum_gradient(sum.data(), nullptr, total, width);
  }
  write.done(0);
  return out;
}

std::tuple<Tensor, Tensor> restore_tokens_bwd(const Tensor& grad_restored, std::optional<Tensor> grad_norm,
                                              const Tensor& mask_token, const Tensor& ids_restore,
                                              std::optional<Tensor> cu_seqlens, int64_t num_kept, ScalarType dtype) {
  check_dim("mask_token", mask_token, 1);
  check_dim("ids_restore", ids_restore, 2);
  const int64_t batch = ids_restore.size(0), length = ids_restore.size(1), width = mask_token.size(0);
  check_width(width);
  check_floats("mask_token", mask_token, {width});
  check_floats("grad_restored", grad_restored, {batch * length, width});
  if (grad_norm.has_value()) check_floats("grad_norm", *grad_norm, {batch * length, width});
  check_dtype("dtype", dtype);
  const Groups samples(batch * length, batch, std::nullopt), kept(num_kept, batch, cu_seqlens, length);
  const Indices ids("ids_restore", ids_restore, length);
  check_rows_are_met_once(ids, kept, length);
  Tensor grad_x = torch::stable::new_empty(grad_restored, {num_kept, width}, dtype);
  std::vector<float> partial(batch * samples.parts_per_group() * width);
  samples.for_parts([&](const auto& each) {
    RowReader read(grad_restored, width), read_norm(grad_norm.value_or(grad_restored), width);
    RowWriter write(grad_x, width);
    each([&](int64_t sample, int64_t begin, int64_t end, int64_t part) {
      const int64_t first = kept.begin(sample), count = kept.begin(sample + 1) - first;
      for (int64_t i = begin; i < end; ++i) {
        const float *grad = read(i), *through_norm = grad_norm.has_value() ? read_norm(i) : nullptr;
        if (ids[i] < count) {
          set_gradient(grad, through_norm, write.row(first + ids[i]), width);
          write.done(first + ids[i]);
        } else {
          sum_gradient(grad, through_norm, partial.data() + part * width, width);
        }
      }
    });
  });
  return {grad_x, sum_of_parts(partial, batch, samples.parts_per_group(), mask_token)};
}

// Kept rows of each sample, from (B, K) or packed (N,) indices.
Groups kept_rows(const Tensor& ids_keep, int64_t batch, int64_t length, const std::optional<Tensor>& cu_seqlens) {
  STD_TORCH_CHECK(batch >= 0 && length >= 0, "batch and length must be at least 0, not ", batch, " and ", length);
  check_dim("ids_keep", ids_keep, cu_seqlens.has_value() ? 1 : 2);
  if (!cu_seqlens.has_value())
    check_sizes("ids_keep", ids_keep, std::initializer_list<int64_t>{batch, ids_keep.size(1)});
  return Groups(ids_keep.numel(), batch, cu_seqlens, length);
}

Tensor gather_tokens_fwd(const Tensor& x, const Tensor& ids_keep, std::optional<Tensor> cu_seqlens) {
  check_dim("x", x, 3);
  const int64_t batch = x.size(0), length = x.size(1), width = x.size(2);
  check_width(width);
  check_floats("x", x, x.sizes());
  const Groups samples = kept_rows(ids_keep, batch, length, cu_seqlens);
  const Indices ids("ids_keep", ids_keep, length);
  Tensor kept = cu_seqlens.has_value() ? torch::stable::new_empty(x, {ids_keep.size(0), width}, x.scalar_type())
                                       : torch::stable::new_empty(x, {batch, ids_keep.size(1), width}, x.scalar_type());
  const int64_t bytes = width * static_cast<int64_t>(x.element_size());
  const char* from = static_cast<const char*>(x.const_data_ptr());
  char* to = static_cast<char*>(kept.mutable_data_ptr());
  samples.for_parts([&](const auto& each) {
    each([&](int64_t sample, int64_t begin, int64_t end, int64_t) {
      for (int64_t i = begin; i < end; ++i) {
        std::memcpy(to + i * bytes, from + (sample * length + ids[i]) * bytes, bytes);
      }
    });
  });
  return kept;
}

// Every row is written once, dropped rows with zeros.
Tensor gather_tokens_bwd(const Tensor& grad, const Tensor& ids_keep, std::optional<Tensor> cu_seqlens, int64_t batch,
                         int64_t length) {
  const Groups samples = kept_rows(ids_keep, batch, length, cu_seqlens);
  check_dim("grad", grad, ids_keep.dim() + 1);
  const int64_t width = grad.size(grad.dim() - 1);
  check_width(width);
  std::vector<int64_t> shape(ids_keep.sizes().begin(), ids_keep.sizes().end());
  shape.push_back(width);
  check_floats("grad", grad, shape);
  const Indices ids("ids_keep", ids_keep, length);
  Tensor grad_x = torch::stable::new_empty(grad, {batch, length, width}, grad.scalar_type());
  const Groups whole(batch * length, batch, std::nullopt);
  std::vector<int64_t> source(batch * length, -1);
  for (int64_t sample = 0; sample < batch; ++sample) {
    for (int64_t i = samples.begin(sample); i < samples.begin(sample + 1); ++i) {
      int64_t& place = source[sample * length + ids[i]];
      STD_TORCH_CHECK(place < 0, "ids_keep holds ", ids[i], " twice for sample ", sample);
      place = i;
    }
  }
  const int64_t bytes = width * static_cast<int64_t>(grad.element_size());
  const char* from = static_cast<const char*>(grad.const_data_ptr());
  char* to = static_cast<char*>(grad_x.mutable_data_ptr());
  whole.for_parts([&](const auto& each) {
    each([&](int64_t, int64_t begin, int64_t end, int64_t) {
      for (int64_t i = begin; i < end; ++i) {
        if (source[i] < 0) {
          std::memset(to + i * bytes, 0, bytes);
        } else {
          std::memcpy(to + i * bytes, from + source[i] * bytes, bytes);
        }
      }
    });
  });
  return grad_x;
}

}  // namespace
}  // namespace fastmask

STABLE_TORCH_LIBRARY_IMPL(fastmask, CPU, m) {
  m.impl("restore_tokens_fwd", TORCH_BOX(&fastmask::restore_tokens_fwd));
  m.impl("restore_tokens_bwd", TORCH_BOX(&fastmask::restore_tokens_bwd));
  m.impl("gather_tokens_fwd", TORCH_BOX(&fastmask::gather_tokens_fwd));
  m.impl("gather_tokens_bwd", TORCH_BOX(&fastmask::gather_tokens_bwd));
}
