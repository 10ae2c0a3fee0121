// float16 as CUDA names it; see cuda_runtime.h.
#pragma once

#include <torch/headeronly/util/Half.h>

using __half = torch::headeronly::Half;
