// `adamw_ema`: AdamW step and EMA update in one pass over memory.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <cstdint>
#include <optional>
#include <vector>

#include "../common/adamw.h"
#include "../common/check.h"

namespace fastmask {
namespace {

constexpr int64_t kPiece = 1024;  // values per piece: new weights stay in the L1 cache for EMAs and copies
constexpr int64_t kGrain = 32;    // minimum number of pieces per thread

FASTMASK_SIMD void adamw_piece(float* __restrict p, const float* __restrict grad, float* __restrict m,
                               float* __restrict v, int64_t n, const AdamwStep& step) {
  const AdamwStep s = step;
  for (int64_t i = 0; i < n; ++i) adamw(p[i], grad[i], m[i], v[i], s);
}

FASTMASK_SIMD void average_piece(float* __restrict average, const float* __restrict p, int64_t n, float rate) {
  for (int64_t i = 0; i < n; ++i) average[i] = moved(average[i], p[i], rate);
}

// bfloat16 is the upper half of fp32, here rounded to nearest even; NaN stays NaN.
FASTMASK_SIMD void bfloat16_piece(std::uint16_t* __restrict to, const float* __restrict p, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    std::uint32_t bits;
    std::memcpy(&bits, &p[i], 4);
    const std::uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    to[i] = static_cast<std::uint16_t>(p[i] == p[i] ? rounded : 0x7fc0);
  }
}

void half_piece(torch::headeronly::Half* to, const float* p, int64_t n) {
  for (int64_t i = 0; i < n; ++i) to[i] = static_cast<torch::headeronly::Half>(p[i]);
}

// The arrays of a tensor, and the cumulative number of pieces.
struct Arrays {
  float *p, *m, *v;
  const float* grad;
  std::vector<float*> averages;
  void* copy;
  int64_t size, end;
  AdamwStep step;
};

void update_piece(const Arrays& a, int64_t start, const float* rates, bool bfloat16) {
  const int64_t n = std::min(kPiece, a.size - start);
  float* p = a.p + start;
  adamw_piece(p, a.grad + start, a.m + start, a.v + start, n, a.step);
  for (size_t k = 0; k < a.averages.size(); ++k) average_piece(a.averages[k] + start, p, n, rates[k]);
  if (a.copy == nullptr) return;
  if (bfloat16) {
    bfloat16_piece(static_cast<std::uint16_t*>(a.copy) + start, p, n);
  } else {
    half_piece(static_cast<torch::headeronly::Half*>(a.copy) + start, p, n);
  }
}

float* floats(const Tensor& tensor) { return static_cast<float*>(tensor.mutable_data_ptr()); }
float value(const Tensor& tensor) { return *static_cast<const float*>(tensor.const_data_ptr()); }

// Throws unless there are `lists` tensors with the shape of each parameter, fp32 or all of one 16-bit dtype.
void check_list(const char* name, const std::vector<Tensor>& params, const std::vector<Tensor>& tensors, size_t lists,
                bool low = false) {
  STD_TORCH_CHECK(tensors.size() == lists * params.size(), name, " must hold ", lists * params.size(), " tensors, not ",
                  tensors.size());
  for (size_t i = 0; i < tensors.size(); ++i) {
    check_floats(name, tensors[i], params[i % params.size()].sizes());
    const ScalarType dtype = tensors[i].scalar_type();
    const bool fits =
        low ? dtype != ScalarType::Float && dtype == tensors[0].scalar_type() : dtype == ScalarType::Float;
    STD_TORCH_CHECK(fits, name, low ? " must be all bfloat16 or all float16" : " must be float32");
  }
}

void adamw_ema(const std::vector<Tensor>& params, const std::vector<Tensor>& grads, const std::vector<Tensor>& exp_avgs,
               const std::vector<Tensor>& exp_avg_sqs, const std::vector<Tensor>& averages,
               const std::vector<Tensor>& copies, const std::vector<Tensor>& steps, const Tensor& lr,
               const Tensor& rates, const std::optional<Tensor>& factor, const std::optional<Tensor>& found_inf,
               double beta1, double beta2, double eps, double weight_decay) {
  check_dim("rates", rates, 1);
  check_fp32("rates", rates, rates.sizes());
  check_list("params", params, params, 1);
  check_list("grads", params, grads, 1);
  check_list("exp_avgs", params, exp_avgs, 1);
  check_list("exp_avg_sqs", params, exp_avg_sqs, 1);
  check_list("averages", params, averages, rates.numel());
  if (!copies.empty()) check_list("copies", params, copies, 1, true);
  STD_TORCH_CHECK(steps.size() == params.size(), "steps must hold ", params.size(), " tensors, not ", steps.size());
  for (const Tensor& step : steps) check_value("steps", step);
  check_value("lr", lr);
  if (factor) check_value("factor", *factor);
  if (found_inf) check_value("found_inf", *found_inf);
  if (found_inf && value(*found_inf) != 0.0f) return;
  const size_t count = params.size(), num_averages = rates.numel();
  const float* rate = static_cast<const float*>(rates.const_data_ptr());

  std::vector<Arrays> tensors;
  int64_t pieces = 0;
  for (size_t i = 0; i < count; ++i) {
    const int64_t size = params[i].numel();
    if (size == 0) continue;
    pieces += (size + kPiece - 1) / kPiece;
    std::vector<float*> means;
    for (size_t k = 0; k < num_averages; ++k) means.push_back(floats(averages[k * count + i]));
    const AdamwStep step =
        adamw_step(value(steps[i]), value(lr), factor ? value(*factor) : 1.0f, {beta1, beta2, eps, weight_decay});
    tensors.push_back({floats(params[i]), floats(exp_avgs[i]), floats(exp_avg_sqs[i]),
                       static_cast<const float*>(grads[i].const_data_ptr()), means,
                       copies.empty() ? nullptr : copies[i].mutable_data_ptr(), size, pieces, step});
  }
  const bool bfloat16 = !copies.empty() && copies[0].scalar_type() == ScalarType::BFloat16;

  torch::stable::parallel_for(0, pieces, kGrain, [&](int64_t begin, int64_t end) {
    auto a = std::upper_bound(tensors.begin(), tensors.end(), begin,
                              [](int64_t piece, const Arrays& arrays) { return piece < arrays.end; });
    for (int64_t piece = begin; piece < end; ++piece) {
      if (piece == a->end) ++a;
      const int64_t first = a->end - (a->size + kPiece - 1) / kPiece;
      update_piece(*a, (piece - first) * kPiece, rate, bfloat16);
    }
  });
}

}  // namespace
}  // namespace fastmask

STABLE_TORCH_LIBRARY_IMPL(fastmask, CPU, m) { m.impl("adamw_ema", TORCH_BOX(&fastmask::adamw_ema)); }
