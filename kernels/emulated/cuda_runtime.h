// The part of CUDA that kernels/cuda uses, on a CPU: `cmake -DFASTMASK_CUDA=EMULATED` compiles its files with this in
// place of the toolkit. The threads of a block take turns, each with a stack of its own, and change over where they
// wait; blocks run one after the other. It tells whether a kernel computes the right thing, and nothing of its speed.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <exception>
#include <functional>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <vector>

#define __global__
#define __device__
#define __forceinline__ inline
#define __grid_constant__
#define __launch_bounds__(...)
#define __shared__ static

using std::min;

struct float4 {
  float x, y, z, w;
};
struct uint2 {
  unsigned x, y;
};
struct uint4 {
  unsigned x, y, z, w;
};

namespace emulated {

constexpr int kWarp = 32, kMostThreads = 1024;
constexpr std::size_t kStack = 1 << 17;

struct Index {
  unsigned x = 0;
};

struct Barrier {
  int threads = 0, arrived = 0, turn = 0;
};

struct Thread {
  ucontext_t context;
  std::unique_ptr<char[]> stack;
  Index index;
  bool done = false;
};

inline ucontext_t scheduler;
inline Thread* current;
inline Index block;
inline Barrier of_block, of_warps[kMostThreads / kWarp];
inline float exchanged[kMostThreads];
inline std::function<void()> kernel;
inline std::exception_ptr error;

inline void wait(Barrier& barrier) {
  const int turn = barrier.turn;
  if (++barrier.arrived == barrier.threads) {
    barrier.arrived = 0;
    ++barrier.turn;
  }
  while (barrier.turn == turn) swapcontext(&current->context, &scheduler);
}

inline void start() {
  try {
    kernel();
  } catch (...) {
    error = std::current_exception();
  }
  current->done = true;  // then the context's link leads back to the scheduler
}

inline void run_block(int count) {
  of_block = {count};
  for (Barrier& barrier : of_warps) barrier = {kWarp};
  std::vector<Thread> threads(count);
  for (int i = 0; i < count; ++i) {
    Thread& thread = threads[i];
    thread.index.x = i;
    thread.stack = std::make_unique<char[]>(kStack);
    getcontext(&thread.context);
    thread.context.uc_stack.ss_sp = thread.stack.get();
    thread.context.uc_stack.ss_size = kStack;
    thread.context.uc_link = &scheduler;
    makecontext(&thread.context, start, 0);
  }
  // Backward and forward by turns, so that a barrier that is missing shows.
  for (int left = count, round = 0; left > 0 && !error; ++round) {
    for (int i = 0; i < count && !error; ++i) {
      current = &threads[round % 2 == 0 ? count - 1 - i : i];
      if (current->done) continue;
      swapcontext(&scheduler, &current->context);
      left -= current->done;
    }
  }
}

inline void launch(std::int64_t blocks, int threads, std::function<void()> body) {
  static std::mutex one_at_a_time;
  const std::lock_guard lock(one_at_a_time);
  kernel = std::move(body);
  error = nullptr;
  for (std::int64_t i = 0; i < blocks && !error; ++i) {
    block.x = static_cast<unsigned>(i);
    run_block(threads);
  }
  if (error) std::rethrow_exception(error);
}

// A GPU refuses what is not aligned.
template <typename T>
T* aligned(T* address) {
  if (reinterpret_cast<std::uintptr_t>(address) % sizeof(T)) throw std::runtime_error("a misaligned address");
  return address;
}

}  // namespace emulated

#define threadIdx (emulated::current->index)
#define blockIdx (emulated::block)

inline void __syncthreads() { emulated::wait(emulated::of_block); }

inline float __shfl_xor_sync(unsigned, float value, int mask) {
  const unsigned i = threadIdx.x;
  emulated::Barrier& barrier = emulated::of_warps[i / emulated::kWarp];
  emulated::exchanged[i] = value;
  emulated::wait(barrier);
  const float other = emulated::exchanged[i ^ mask];
  emulated::wait(barrier);
  return other;
}

template <typename T>
T __ldcs(const T* from) {
  return *emulated::aligned(from);
}
template <typename T>
T __ldg(const T* from) {
  return *emulated::aligned(from);
}
template <typename T>
void __stcs(T* to, T value) {
  *emulated::aligned(to) = value;
}

inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
inline float __uint_as_float(unsigned bits) {
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}
