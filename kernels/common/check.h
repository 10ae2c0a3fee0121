// Argument checks of the ops, so that no call accesses memory out of bounds or leaves a result unwritten. The public
// functions check first, with better messages; these checks protect direct calls of registered ops.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdint>
#include <initializer_list>
#include <limits>
#include <optional>
#include <string>

namespace fastmask {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kNoLimit = std::numeric_limits<int64_t>::max(), kAnyNumber = -1;

template <typename Sizes>
std::string shape_text(const Sizes& sizes) {
  std::string text = "(";
  for (const int64_t size : sizes) text += (text.size() > 1 ? ", " : "") + std::to_string(size);
  return text + ")";
}

inline void check_dim(const char* name, const Tensor& tensor, int64_t dim) {
  STD_TORCH_CHECK(tensor.dim() == dim, name, " must have ", dim, " dimensions, not ", tensor.dim());
}

// Empty rows have no address to copy from.
inline void check_width(int64_t width) { STD_TORCH_CHECK(width > 0, "rows must have at least one value"); }

template <typename Sizes>
void check_sizes(const char* name, const Tensor& tensor, const Sizes& sizes) {
  const auto actual = tensor.sizes();
  bool same = actual.size() == sizes.size();
  auto size = sizes.begin();
  for (size_t i = 0; same && i < actual.size(); ++i) same = actual[i] == *size++;
  STD_TORCH_CHECK(same, name, " must have shape ", shape_text(sizes), ", not ", shape_text(actual));
}

inline void check_memory(const char* name, const Tensor& tensor) {
  STD_TORCH_CHECK(tensor.is_cpu(), name, " must be on the CPU");
  STD_TORCH_CHECK(tensor.numel() == 0 || tensor.const_data_ptr() != nullptr, name, " has no memory");
}

inline bool is_floating(ScalarType dtype) {
  return dtype == ScalarType::Float || dtype == ScalarType::BFloat16 || dtype == ScalarType::Half;
}

inline void check_dtype(const char* name, ScalarType dtype) {
  STD_TORCH_CHECK(is_floating(dtype), name, " must be float32, bfloat16 or float16");
}

template <typename Sizes = std::initializer_list<int64_t>>
void check_floats(const char* name, const Tensor& tensor, const Sizes& sizes) {
  check_memory(name, tensor);
  check_sizes(name, tensor, sizes);
  check_dtype(name, tensor.scalar_type());
  STD_TORCH_CHECK(tensor.is_contiguous(), name, " must be contiguous");
}

template <typename Sizes = std::initializer_list<int64_t>>
void check_fp32(const char* name, const Tensor& tensor, const Sizes& sizes) {
  check_floats(name, tensor, sizes);
  STD_TORCH_CHECK(tensor.scalar_type() == ScalarType::Float, name, " must be float32");
}

// One fp32 value, in any shape.
inline void check_value(const char* name, const Tensor& tensor) {
  check_memory(name, tensor);
  STD_TORCH_CHECK(tensor.numel() == 1, name, " must hold one value, not ", tensor.numel());
  STD_TORCH_CHECK(tensor.scalar_type() == ScalarType::Float, name, " must be float32");
}

// (groups, width), contiguous in the last dimension only.
inline void check_modulation(const char* name, const Tensor& tensor, int64_t groups, int64_t width) {
  check_memory(name, tensor);
  check_sizes(name, tensor, std::initializer_list<int64_t>{groups, width});
  check_dtype(name, tensor.scalar_type());
  STD_TORCH_CHECK(width < 2 || tensor.stride(1) == 1, name, " must be contiguous in its last dimension");
}

// Returns whether shift and scale of each sample are given.
inline bool check_modulations(const std::optional<Tensor>& shift, const std::optional<Tensor>& scale, int64_t samples,
                              int64_t width) {
  STD_TORCH_CHECK(shift.has_value() == scale.has_value(), "shift and scale belong together, and one is missing");
  if (!shift.has_value()) return false;
  check_modulation("shift", *shift, samples, width);
  check_modulation("scale", *scale, samples, width);
  return true;
}

template <typename Sizes = std::initializer_list<int64_t>>
void check_integers(const char* name, const Tensor& tensor, const Sizes& sizes) {
  check_memory(name, tensor);
  check_sizes(name, tensor, sizes);
  const bool integers = tensor.scalar_type() == ScalarType::Int || tensor.scalar_type() == ScalarType::Long;
  STD_TORCH_CHECK(integers, name, " must be int32 or int64");
  STD_TORCH_CHECK(tensor.is_contiguous(), name, " must be contiguous");
}

// Images (B, C, height, width) in patches of side x side pixels.
inline void check_patches(const Tensor& images, int64_t side) {
  const int64_t height = images.size(2), width = images.size(3);
  const bool divide = 0 < side && side <= height && side <= width && height % side == 0 && width % side == 0;
  STD_TORCH_CHECK(divide, "images of ", height, " x ", width, " do not divide into patches of ", side, " x ", side);
}

// Row boundaries of samples: non-decreasing from 0 to `rows` (or kAnyNumber), at most `most` rows per sample.
template <typename T>
void check_bounds(const T* cu_seqlens, int64_t samples, int64_t rows, int64_t most) {
  STD_TORCH_CHECK(cu_seqlens[0] == 0, "cu_seqlens must begin with 0, not ", cu_seqlens[0]);
  for (int64_t b = 0; b < samples; ++b) {
    const int64_t begin = cu_seqlens[b], end = cu_seqlens[b + 1];
    STD_TORCH_CHECK(begin <= end, "cu_seqlens must not fall, as from ", begin, " to ", end);
    STD_TORCH_CHECK(end - begin <= most, "cu_seqlens gives sample ", b, " ", end - begin, " rows, of at most ", most);
  }
  const bool ends = rows == kAnyNumber || cu_seqlens[samples] == rows;
  STD_TORCH_CHECK(ends, "cu_seqlens must end with ", rows, ", the number of rows, not ", cu_seqlens[samples]);
}

inline void check_cu_seqlens(const Tensor& cu_seqlens, int64_t samples, int64_t rows, int64_t most = kNoLimit) {
  check_integers("cu_seqlens", cu_seqlens, {samples + 1});
  if (cu_seqlens.scalar_type() == ScalarType::Int) {
    check_bounds(static_cast<const int32_t*>(cu_seqlens.const_data_ptr()), samples, rows, most);
  } else {
    check_bounds(static_cast<const int64_t*>(cu_seqlens.const_data_ptr()), samples, rows, most);
  }
}

}  // namespace fastmask
