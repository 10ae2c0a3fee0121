// Launches on the CPU, in place of kernels/cuda/launch.h; see cuda_runtime.h.
#pragma once

#include <cuda_runtime.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#define FASTMASK_DEVICE CPU

namespace fastmask {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

class Launcher {
 public:
  explicit Launcher(const Tensor&) {}

  template <typename Arguments>
  void operator()(void (*kernel)(Arguments), std::int64_t blocks, int threads, const Arguments& arguments) const {
    emulated::launch(blocks, threads, [&] { kernel(arguments); });
  }
};

}  // namespace fastmask
