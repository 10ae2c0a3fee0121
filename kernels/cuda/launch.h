// What the launches of all kernels share: the device and the stream of their tensors, and the report of what failed.
#pragma once

#include <cuda_runtime.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdint>

#define FASTMASK_DEVICE CUDA

namespace fastmask {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Makes the device of a tensor the current one, and launches on the stream that PyTorch uses there.
class Launcher {
 public:
  explicit Launcher(const Tensor& tensor) : guard_(tensor.get_device_index()) {
    void* stream = nullptr;
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream));
    stream_ = static_cast<cudaStream_t>(stream);
  }

  template <typename Arguments>
  void operator()(void (*kernel)(Arguments), std::int64_t blocks, int threads, const Arguments& arguments) const {
    if (blocks == 0) return;
    STD_TORCH_CHECK(blocks <= 0x7fffffff, "a grid of ", blocks, " blocks: more than a GPU takes");
    kernel<<<static_cast<unsigned>(blocks), threads, 0, stream_>>>(arguments);
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  }

 private:
  torch::stable::accelerator::DeviceGuard guard_;
  cudaStream_t stream_ = nullptr;
};

}  // namespace fastmask
