// Rows of a tensor of any supported dtype, read and written as fp32.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <cstdint>
#include <vector>

namespace fastmask {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Reads rows: fp32 rows in place, others converted into the reader's scratch buffer.
class RowReader {
 public:
  RowReader(const Tensor& tensor, int64_t stride, int64_t width)
      : data_(tensor.const_data_ptr()), type_(tensor.scalar_type()), stride_(stride), width_(width) {
    if (type_ != ScalarType::Float) scratch_.resize(width);
  }
  RowReader(const Tensor& tensor, int64_t width) : RowReader(tensor, width, width) {}

  const float* operator()(int64_t row) { return (*this)(row, width_); }
  // The first n values of a row: the last row of a flat tensor can be shorter.
  const float* operator()(int64_t row, int64_t n) {
    switch (type_) {
      case ScalarType::BFloat16: return convert<torch::headeronly::BFloat16>(row, n);
      case ScalarType::Half: return convert<torch::headeronly::Half>(row, n);
      default: return static_cast<const float*>(data_) + row * stride_;
    }
  }

 private:
  template <typename T>
  const float* convert(int64_t row, int64_t n) {
    const T* from = static_cast<const T*>(data_) + row * stride_;
    for (int64_t d = 0; d < n; ++d) scratch_[d] = static_cast<float>(from[d]);
    return scratch_.data();
  }

  const void* data_;
  ScalarType type_;
  int64_t stride_, width_;
  std::vector<float> scratch_;
};

// Writes rows of a contiguous tensor: `row` returns the buffer for fp32 values, `done` rounds them to the dtype of the
// tensor.
class RowWriter {
 public:
  RowWriter(const Tensor& tensor, int64_t width)
      : data_(tensor.mutable_data_ptr()), type_(tensor.scalar_type()), width_(width) {
    if (type_ != ScalarType::Float) scratch_.resize(width);
  }

  float* row(int64_t row) {
    return type_ == ScalarType::Float ? static_cast<float*>(data_) + row * width_ : scratch_.data();
  }
  void done(int64_t row) { done(row, width_); }
  void done(int64_t row, int64_t n) {
    if (type_ == ScalarType::BFloat16) convert<torch::headeronly::BFloat16>(row, n);
    if (type_ == ScalarType::Half) convert<torch::headeronly::Half>(row, n);
  }
  // The last written row, rounded.
  void round(int64_t row) {
    done(row);
    if (type_ == ScalarType::BFloat16) back<torch::headeronly::BFloat16>(row);
    if (type_ == ScalarType::Half) back<torch::headeronly::Half>(row);
  }

 private:
  template <typename T>
  void convert(int64_t row, int64_t n) {
    T* to = static_cast<T*>(data_) + row * width_;
    for (int64_t d = 0; d < n; ++d) to[d] = static_cast<T>(scratch_[d]);
  }
  template <typename T>
  void back(int64_t row) {
    const T* from = static_cast<const T*>(data_) + row * width_;
    for (int64_t d = 0; d < width_; ++d) scratch_[d] = static_cast<float>(from[d]);
  }

  void* data_;
  ScalarType type_;
  int64_t width_;
  std::vector<float> scratch_;
};

}  // namespace fastmask
