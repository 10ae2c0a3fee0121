// A step of AdamW and of averages of its weights on a GPU: a candidate beside the Triton kernel of `adamw_ema`.
//
// A launch takes a list of tensors, whose addresses travel in its arguments: nothing is copied to the device, and a
// CUDA graph keeps them. A block updates one chunk of one tensor, 16 bytes at a time where all addresses allow that;
// what changes from step to step is read on the device, and a thread of each block makes the corrections of it.

#include "../common/adamw.h"

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <launch.h>

#include <cstring>
#include <optional>
#include <vector>

namespace fastmask {
namespace {

constexpr int kThreads = 256, kVector = 4;
constexpr std::int64_t kChunk = 16 * kThreads * kVector;  // values of a block
constexpr int kMaxAverages = 4;

// Of a tensor in the table; then come its averages, and its copy.
enum Word { kEnd, kSize, kStep, kParam, kGrad, kExpAvg, kExpAvgSq, kAverage };

constexpr int kTable = 500;

struct Update {
  const float *lr, *rates, *factor, *found_inf;  // the last two may be null
  AdamwOptions options;
  ScalarType copies;  // Float: there are none
  int tensors, words;
  std::int64_t table[kTable];  // (tensors, words); kEnd is where its chunks end in the count of all chunks
};
static_assert(sizeof(Update) <= 4096, "more arguments than every driver takes");

__device__ __forceinline__ void read(const float* from, float (&to)[1]) { to[0] = __ldcs(from); }
__device__ __forceinline__ void read(const float* from, float (&to)[kVector]) {
  const float4 four = __ldcs(reinterpret_cast<const float4*>(from));
  to[0] = four.x, to[1] = four.y, to[2] = four.z, to[3] = four.w;
}
__device__ __forceinline__ void write(float* to, const float (&from)[1]) { __stcs(to, from[0]); }
__device__ __forceinline__ void write(float* to, const float (&from)[kVector]) {
  __stcs(reinterpret_cast<float4*>(to), make_float4(from[0], from[1], from[2], from[3]));
}

// Rounded to 16 bits.
template <typename T>
__device__ __forceinline__ void write_copy(std::int64_t copy, std::int64_t i, const float (&from)[1]) {
  reinterpret_cast<T*>(copy)[i] = T(from[0]);
}
template <typename T>
__device__ __forceinline__ void write_copy(std::int64_t copy, std::int64_t i, const float (&from)[kVector]) {
  const T rounded[kVector] = {T(from[0]), T(from[1]), T(from[2]), T(from[3])};
  uint2 bits;
  std::memcpy(&bits, rounded, sizeof(bits));
  __stcs(reinterpret_cast<uint2*>(reinterpret_cast<T*>(copy) + i), bits);
}

template <int kAverages, int kWidth>
__device__ __forceinline__ void update(const std::int64_t* words, std::int64_t i, const AdamwStep& step,
                                       const float (&rates)[kMaxAverages], ScalarType copies) {
  const auto array = [&](int word) { return reinterpret_cast<float*>(words[word]) + i; };
  float p[kWidth], grad[kWidth], m[kWidth], v[kWidth], averages[kMaxAverages][kWidth];
  read(array(kParam), p);
  read(array(kGrad), grad);
  read(array(kExpAvg), m);
  read(array(kExpAvgSq), v);
#pragma unroll
  for (int k = 0; k < kAverages; ++k) read(array(kAverage + k), averages[k]);
#pragma unroll
  for (int j = 0; j < kWidth; ++j) adamw(p[j], grad[j], m[j], v[j], step);
  write(array(kParam), p);
  write(array(kExpAvg), m);
  write(array(kExpAvgSq), v);
#pragma unroll
  for (int k = 0; k < kAverages; ++k) {
#pragma unroll
    for (int j = 0; j < kWidth; ++j) averages[k][j] = moved(averages[k][j], p[j], rates[k]);
    write(array(kAverage + k), averages[k]);
  }
  if (copies == ScalarType::BFloat16) write_copy<__nv_bfloat16>(words[kAverage + kAverages], i, p);
  if (copies == ScalarType::Half) write_copy<__half>(words[kAverage + kAverages], i, p);
}

template <int kAverages>
__global__ void __launch_bounds__(kThreads) adamw_ema_kernel(const __grid_constant__ Update a) {
  if (a.found_inf != nullptr && *a.found_inf != 0.0f) return;
  // The first tensor whose chunks end behind this block.
  int tensor = 0;
  for (int end = a.tensors - 1; tensor < end;) {
    const int middle = (tensor + end) / 2;
    if (a.table[middle * a.words + kEnd] > blockIdx.x) {
      end = middle;
    } else {
      tensor = middle + 1;
    }
  }
  const std::int64_t* words = a.table + tensor * a.words;

  __shared__ AdamwStep shared;
  if (threadIdx.x == 0) {
    const float t = *reinterpret_cast<const float*>(words[kStep]);
    shared = adamw_step(t, *a.lr, a.factor == nullptr ? 1.0f : *a.factor, a.options);
  }
  __syncthreads();
  const AdamwStep step = shared;
  float rates[kMaxAverages];
#pragma unroll
  for (int k = 0; k < kAverages; ++k) rates[k] = a.rates[k];

  const std::int64_t size = words[kSize], before = words[kEnd] - (size + kChunk - 1) / kChunk;
  const std::int64_t begin = (blockIdx.x - before) * kChunk, end = min(begin + kChunk, size);
  std::int64_t addresses = 0;
  for (int word = kParam; word < a.words; ++word) addresses |= words[word];
  const std::int64_t wide_end = addresses % 16 == 0 ? end - end % kVector : begin;
  for (std::int64_t i = begin + kVector * threadIdx.x; i < wide_end; i += kVector * kThreads) {
    update<kAverages, kVector>(words, i, step, rates, a.copies);
  }
  for (std::int64_t i = wide_end + threadIdx.x; i < end; i += kThreads) {
    update<kAverages, 1>(words, i, step, rates, a.copies);
  }
}

void launch(const Launcher& launcher, const Update& a, int averages) {
  constexpr void (*kKernels[])(Update) = {adamw_ema_kernel<0>, adamw_ema_kernel<1>, adamw_ema_kernel<2>,
                                          adamw_ema_kernel<3>, adamw_ema_kernel<4>};
  if (a.tensors > 0) launcher(kKernels[averages], a.table[(a.tensors - 1) * a.words + kEnd], kThreads, a);
}

void adamw_ema(const std::vector<Tensor>& params, const std::vector<Tensor>& grads, const std::vector<Tensor>& exp_avgs,
               const std::vector<Tensor>& exp_avg_sqs, const std::vector<Tensor>& averages,
               const std::vector<Tensor>& copies, const std::vector<Tensor>& steps, const Tensor& lr,
               const Tensor& rates, const std::optional<Tensor>& factor, const std::optional<Tensor>& found_inf,
               double beta1, double beta2, double eps, double weight_decay) {
  const std::size_t count = params.size(), num_averages = rates.numel();
  STD_TORCH_CHECK(num_averages <= kMaxAverages, "up to ", kMaxAverages, " averages, not ", num_averages);
  const auto pointer = [](const Tensor& tensor) { return static_cast<const float*>(tensor.const_data_ptr()); };
  const Launcher launcher(lr);
  Update a{pointer(lr),
           pointer(rates),
           factor ? pointer(*factor) : nullptr,
           found_inf ? pointer(*found_inf) : nullptr,
           {beta1, beta2, eps, weight_decay},
           copies.empty() ? ScalarType::Float : copies[0].scalar_type(),
           0,
           static_cast<int>(kAverage + num_averages + !copies.empty()),
           {}};
  std::int64_t chunks = 0;
  for (std::size_t i = 0; i < count; ++i) {
    const std::int64_t size = params[i].numel();
    if (size == 0) continue;
    if ((a.tensors + 1) * a.words > kTable) {
      launch(launcher, a, static_cast<int>(num_averages));
      a.tensors = 0, chunks = 0;
    }
    chunks += (size + kChunk - 1) / kChunk;
    std::int64_t* words = a.table + a.words * a.tensors++;
    const auto address = [](const Tensor& tensor) { return reinterpret_cast<std::int64_t>(tensor.mutable_data_ptr()); };
    words[kEnd] = chunks;
    words[kSize] = size;
    words[kStep] = reinterpret_cast<std::int64_t>(steps[i].const_data_ptr());
    words[kParam] = address(params[i]);
    words[kGrad] = reinterpret_cast<std::int64_t>(grads[i].const_data_ptr());
    words[kExpAvg] = address(exp_avgs[i]);
    words[kExpAvgSq] = address(exp_avg_sqs[i]);
    for (std::size_t k = 0; k < num_averages; ++k) words[kAverage + k] = address(averages[k * count + i]);
    if (!copies.empty()) words[kAverage + num_averages] = address(copies[i]);
  }
  launch(launcher, a, static_cast<int>(num_averages));
}

}  // namespace
}  // namespace fastmask

STABLE_TORCH_LIBRARY_FRAGMENT(fastmask_cuda, m) {
  m.def(
      "adamw_ema(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] exp_avgs, Tensor(c!)[] exp_avg_sqs, "
      "Tensor(d!)[] averages, Tensor(e!)[] copies, Tensor[] steps, Tensor lr, Tensor rates, Tensor? factor, "
      "Tensor? found_inf, float beta1, float beta2, float eps, float weight_decay) -> ()");
}
STABLE_TORCH_LIBRARY_IMPL(fastmask_cuda, FASTMASK_DEVICE, m) { m.impl("adamw_ema", TORCH_BOX(&fastmask::adamw_ema)); }
