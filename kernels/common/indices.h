// Lists of indices, int32 or int64.
#pragma once

#include <cstdint>

#include "check.h"

namespace fastmask {

class Indices {
 public:
  // Throws for another dtype, or an index outside [0, limit).
  Indices(const char* name, const torch::stable::Tensor& tensor, int64_t limit) {
    check_integers(name, tensor, tensor.sizes());
    const void* data = tensor.const_data_ptr();
    const bool wide = tensor.scalar_type() == ScalarType::Long;
    wide_ = wide ? static_cast<const int64_t*>(data) : nullptr;
    narrow_ = wide ? nullptr : static_cast<const int32_t*>(data);
    for (int64_t i = 0, count = tensor.numel(); i < count; ++i) {
      const int64_t index = (*this)[i];
      STD_TORCH_CHECK(0 <= index && index < limit, name, " holds ", index, ", which is outside 0 .. ", limit - 1);
    }
  }

  int64_t operator[](int64_t i) const { return wide_ ? wide_[i] : narrow_[i]; }

 private:
  const int64_t* wide_;
  const int32_t* narrow_;
};

}  // namespace fastmask
