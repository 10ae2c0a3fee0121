// The gradients of `add_gated_norm` on a GPU: a candidate beside its Triton kernel.
//
// A warp walks over rows of one group, each in its registers, so that the two means over a row take shuffles and no
// barrier. Each lane keeps the sums of its own columns for the gradients of gate, shift and scale; at the end those of
// a block's warps are added up in shared memory, in the order of the warps, and where several blocks share a group a
// second kernel adds up what they leave. No atomics: two runs give the same bits.

#include "../common/norm.h"

#include <launch.h>

#include <optional>
#include <tuple>

#include "../common/parts.h"
#include "eight.h"

namespace fastmask {
namespace {

constexpr int kWarps = 4, kLanes = 32;
constexpr std::int64_t kRowsPerPart = 32;
constexpr int kSums = 3, kMaxVectors = 5;
constexpr int kFinishThreads = 256;

// X is the dtype of the residual, L that of all else; shapes are those of fastmask/kernels/add_gated_norm.py.
template <typename X, typename L>
struct Backward {
  const X *grad_new, *x;  // the first may be null
  const L *grad_h, *branch, *gate, *shift, *scale;
  const float* stats;
  const int* cu_seqlens;  // or null
  X* grad_x;
  L *grad_branch, *h;  // h is null unless it is computed again
  L* sums[kSums];      // gradients of gate, shift and scale, (G, D)
  float* partial;      // (G, parts, 3, D), or null where there is one part per group
  std::int64_t rows, groups, parts, gate_stride, shift_stride, scale_stride;
  int width;
  bool rms;
};

__device__ __forceinline__ float warp_sum(float x) {
#pragma unroll
  for (int distance = kLanes / 2; distance > 0; distance /= 2) x += __shfl_xor_sync(0xffffffffu, x, distance);
  return x;
}

template <typename T>
__device__ __forceinline__ T converted(float x) {
  if constexpr (sizeof(T) == 2) {
    return __float2bfloat16_rn(x);
  } else {
    return x;
  }
}

// A lane has kVectors times eight columns, of which the last ones may lie behind the row's end.
template <typename X, typename L, int kVectors>
__global__ void __launch_bounds__(kWarps* kLanes, 2)
    add_gated_norm_bwd_kernel(const __grid_constant__ Backward<X, L> a) {
  constexpr int kStride = 8 * kLanes;
  const int lane = threadIdx.x % kLanes, warp = threadIdx.x / kLanes;
  const std::int64_t group = blockIdx.x / a.parts, part = blockIdx.x % a.parts, each = a.rows / a.groups;
  const std::int64_t start = a.cu_seqlens ? a.cu_seqlens[group] : group * each;
  const std::int64_t length = a.cu_seqlens ? a.cu_seqlens[group + 1] - start : each;
  const std::int64_t begin = part_begin(start, length, part, a.parts);
  const std::int64_t end = part_begin(start, length, part + 1, a.parts);
  const L *gate = a.gate + group * a.gate_stride, *shift = a.shift + group * a.shift_stride,
          *scale = a.scale + group * a.scale_stride;
  const auto column = [&](int vector) { return vector * kStride + 8 * lane; };
  const auto inside = [&](int vector) { return vector < kVectors - 1 || column(vector) < a.width; };

  // Registers do not hold three sums beside a row: those of grad_h and of grad_h xhat lie in shared memory.
  __shared__ float4 sums[2][kWarps][kVectors][2][kLanes];
  enum { kShift, kScale };
  float grad_gate[kVectors][8] = {};
#pragma unroll
  for (int i = 0; i < 4 * kVectors; ++i) sums[i % 2][warp][i / 4][i / 2 % 2][lane] = make_float4(0, 0, 0, 0);

  for (std::int64_t row = begin + warp; row < end; row += kWarps) {
    const std::int64_t offset = row * a.width;
    const Statistics s{__ldg(a.stats + row), __ldg(a.stats + a.rows + row)};
    Eight<X> x[kVectors];
    Eight<L> grad_h[kVectors];
#pragma unroll
    for (int k = 0; k < kVectors; ++k) {
      x[k] = inside(k) ? Eight<X>::once(a.x + offset + column(k)) : Eight<X>::zeros();
      grad_h[k] = inside(k) ? Eight<L>::once(a.grad_h + offset + column(k)) : Eight<L>::zeros();
    }
    float g[kVectors][8], sum_g = 0.0f, sum_gx = 0.0f;
#pragma unroll
    for (int k = 0; k < kVectors; ++k) {
      const Eight<L> b_scale = inside(k) ? Eight<L>::again(scale + column(k)) : Eight<L>::zeros();
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float shift_sum[4], scale_sum[4];
        unpack(sums[kShift][warp][k][half][lane], shift_sum);
        unpack(sums[kScale][warp][k][half][lane], scale_sum);
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          const int d = 4 * half + j;
          const float xhat = normalized(x[k][d], s);
          g[k][d] = xhat_gradient(grad_h[k][d], b_scale[d]);
          shift_sum[j] += grad_h[k][d];
          scale_sum[j] += grad_h[k][d] * xhat;
          sum_g += g[k][d];
          sum_gx += g[k][d] * xhat;
        }
        sums[kShift][warp][k][half][lane] = packed(shift_sum);
        sums[kScale][warp][k][half][lane] = packed(scale_sum);
      }
      if (a.h && inside(k)) {
        const Eight<L> b_shift = Eight<L>::again(shift + column(k));
        float h[8];
#pragma unroll
        for (int j = 0; j < 8; ++j) h[j] = modulated(normalized(x[k][j], s), b_shift[j], b_scale[j]);
        Eight<L>::write(a.h + offset + column(k), h);
      }
    }
    const float mean_g = a.rms ? 0.0f : warp_sum(sum_g) / static_cast<float>(a.width);
    const float mean_gx = warp_sum(sum_gx) / static_cast<float>(a.width);
    // From here on g is the gradient of the residual, and x leaves its registers to what is read next.
#pragma unroll
    for (int k = 0; k < kVectors; ++k) {
#pragma unroll
      for (int j = 0; j < 8; ++j) g[k][j] = x_gradient(g[k][j], normalized(x[k][j], s), s.rstd, mean_g, mean_gx);
    }
    Eight<X> residual[kVectors];
    Eight<L> b_branch[kVectors];
#pragma unroll
    for (int k = 0; k < kVectors; ++k) {
      residual[k] = a.grad_new && inside(k) ? Eight<X>::once(a.grad_new + offset + column(k)) : Eight<X>::zeros();
      b_branch[k] = inside(k) ? Eight<L>::once(a.branch + offset + column(k)) : Eight<L>::zeros();
    }
#pragma unroll
    for (int k = 0; k < kVectors; ++k) {
      if (!inside(k)) continue;
      const Eight<L> b_gate = Eight<L>::again(gate + column(k));
      float grad_branch[8];
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        g[k][j] += residual[k][j];
        grad_gate[k][j] += g[k][j] * b_branch[k][j];
        grad_branch[j] = g[k][j] * b_gate[j];
      }
      Eight<X>::write(a.grad_x + offset + column(k), g[k]);
      Eight<L>::write(a.grad_branch + offset + column(k), grad_branch);
    }
  }

  const auto finish = [&](int which, const float4(&of_warps)[kWarps][kVectors][2][kLanes]) {
    __syncthreads();
    for (int d = threadIdx.x; d < a.width; d += kWarps * kLanes) {
      float sum = 0.0f;
      for (int w = 0; w < kWarps; ++w) sum += (&of_warps[w][d / kStride][d % 8 / 4][d % kStride / 8].x)[d % 4];
      if (a.partial) {
        a.partial[(blockIdx.x * static_cast<std::int64_t>(kSums) + which) * a.width + d] = sum;
      } else {
        a.sums[which][group * a.width + d] = converted<L>(sum);
      }
    }
    __syncthreads();
  };
  finish(1, sums[kShift]);
  finish(2, sums[kScale]);
#pragma unroll
  for (int i = 0; i < 2 * kVectors; ++i) sums[kShift][warp][i / 2][i % 2][lane] = packed(grad_gate[i / 2] + i % 2 * 4);
  finish(0, sums[kShift]);
}

template <typename L>
struct Finish {
  const float* partial;  // (G, parts, 3, D)
  L* sums[kSums];
  std::int64_t groups, parts;
  int width;
};

// A thread adds up one value of a result, part after part.
template <typename L>
__global__ void __launch_bounds__(kFinishThreads) finish_sums_kernel(const __grid_constant__ Finish<L> a) {
  const std::int64_t i = blockIdx.x * static_cast<std::int64_t>(kFinishThreads) + threadIdx.x;
  const std::int64_t values = static_cast<std::int64_t>(kSums) * a.width;  // of a group
  if (i >= a.groups * values) return;
  const std::int64_t group = i / values, which = i % values / a.width, d = i % a.width;
  float sum = 0.0f;
  for (std::int64_t part = 0; part < a.parts; ++part) sum += a.partial[(group * a.parts + part) * values + i % values];
  a.sums[which][group * a.width + d] = converted<L>(sum);
}

template <typename X, typename L>
constexpr void (*kKernels[])(Backward<X, L>) = {add_gated_norm_bwd_kernel<X, L, 1>, add_gated_norm_bwd_kernel<X, L, 2>,
                                                add_gated_norm_bwd_kernel<X, L, 3>, add_gated_norm_bwd_kernel<X, L, 4>,
                                                add_gated_norm_bwd_kernel<X, L, kMaxVectors>};

template <typename T>
T* pointer(const Tensor& tensor) {
  return static_cast<T*>(tensor.mutable_data_ptr());
}

using Results = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

template <typename X, typename L>
Results backward(const std::optional<Tensor>& grad_new, const Tensor& grad_h, const Tensor& x_new, const Tensor& stats,
                 const Tensor& branch, const Tensor& gate, const Tensor& shift, const Tensor& scale,
                 const std::optional<Tensor>& cu_seqlens, bool rms, bool recompute) {
  const std::int64_t rows = x_new.size(0), width = x_new.size(1), groups = gate.size(0);
  const std::int64_t parts = parts_per_group(rows, groups, kRowsPerPart);
  const Launcher launch(x_new);
  const auto like = [](const Tensor& t) { return torch::stable::new_empty(t, t.sizes(), t.scalar_type()); };
  Tensor grad_x = like(x_new), grad_branch = like(branch), sums[kSums] = {like(gate), like(shift), like(scale)};
  Tensor h = recompute ? like(grad_h) : torch::stable::new_empty(grad_h, {0}, grad_h.scalar_type());
  const bool whole = parts == 1;
  Tensor partial = torch::stable::new_empty(stats, {whole ? 0 : groups * parts, kSums, width}, ScalarType::Float);
  L* const results[kSums] = {pointer<L>(sums[0]), pointer<L>(sums[1]), pointer<L>(sums[2])};
  launch(
      kKernels<X, L>[(width + 255) / 256 - 1], groups * parts, kWarps * kLanes, Backward<X, L> {
        grad_new ? static_cast<const X*>(grad_new->const_data_ptr()) : nullptr,
            static_cast<const X*>(x_new.const_data_ptr()), static_cast<const L*>(grad_h.const_data_ptr()),
            static_cast<const L*>(branch.const_data_ptr()), static_cast<const L*>(gate.const_data_ptr()),
            static_cast<const L*>(shift.const_data_ptr()), static_cast<const L*>(scale.const_data_ptr()),
            static_cast<const float*>(stats.const_data_ptr()),
            cu_seqlens ? static_cast<const int*>(cu_seqlens->const_data_ptr()) : nullptr, pointer<X>(grad_x),
            pointer<L>(grad_branch), recompute ? pointer<L>(h) : nullptr, {results[0], results[1], results[2]},
            whole ? nullptr : pointer<float>(partial), rows, groups, parts, gate.stride(0), shift.stride(0),
            scale.stride(0), static_cast<int>(width), rms
      });
  if (!whole) {
    launch(finish_sums_kernel<L>, (groups * kSums * width + kFinishThreads - 1) / kFinishThreads, kFinishThreads,
           Finish<L>{
               pointer<float>(partial), {results[0], results[1], results[2]}, groups, parts, static_cast<int>(width)});
  }
  return {grad_x, grad_branch, sums[0], sums[1], sums[2], h};
}

Results add_gated_norm_bwd(const std::optional<Tensor>& grad_new, const Tensor& grad_h, const Tensor& x_new,
                           const Tensor& stats, const Tensor& branch, const Tensor& gate, const Tensor& shift,
                           const Tensor& scale, const std::optional<Tensor>& cu_seqlens, bool rms, bool recompute) {
  const std::int64_t width = x_new.size(1);
  STD_TORCH_CHECK(width % 8 == 0 && 0 < width && width <= 256 * kMaxVectors, "a width that is a multiple of 8 up to ",
                  256 * kMaxVectors, ", not ", width);
  for (const Tensor& t : {grad_h, branch, gate, shift, scale}) {
    STD_TORCH_CHECK(t.scalar_type() == branch.scalar_type(), "one dtype for the branch, the modulations and h");
  }
  for (const Tensor& t : {grad_new.value_or(x_new), grad_h, x_new, branch, gate, shift, scale}) {
    STD_TORCH_CHECK(t.stride(0) % 8 == 0 && reinterpret_cast<std::uintptr_t>(t.const_data_ptr()) % 16 == 0,
                    "rows that begin at a multiple of 16 bytes");
  }
  const auto run = [&](auto x, auto low) {
    return backward<decltype(x), decltype(low)>(grad_new, grad_h, x_new, stats, branch, gate, shift, scale, cu_seqlens,
                                                rms, recompute);
  };
  const ScalarType wide = x_new.scalar_type(), low = branch.scalar_type();
  if (wide == ScalarType::Float && low == ScalarType::Float) return run(float{}, float{});
  if (wide == ScalarType::Float && low == ScalarType::BFloat16) return run(float{}, __nv_bfloat16{});
  STD_TORCH_CHECK(wide == ScalarType::BFloat16 && low == ScalarType::BFloat16,
                  "float32 and bfloat16, and a residual that is no narrower than the branch");
  return run(__nv_bfloat16{}, __nv_bfloat16{});
}

}  // namespace
}  // namespace fastmask

STABLE_TORCH_LIBRARY_FRAGMENT(fastmask_cuda, m) {
  m.def(
      "add_gated_norm_bwd(Tensor? grad_new, Tensor grad_h, Tensor x_new, Tensor stats, Tensor branch, Tensor gate, "
      "Tensor shift, Tensor scale, Tensor? cu_seqlens, bool rms, bool recompute) "
      "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
}
STABLE_TORCH_LIBRARY_IMPL(fastmask_cuda, FASTMASK_DEVICE, m) {
  m.impl("add_gated_norm_bwd", TORCH_BOX(&fastmask::add_gated_norm_bwd));
}
