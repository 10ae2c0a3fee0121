// Loops vectorised by the compiler, once per x86 level, selected when the library is loaded. A build with
// FASTMASK_LEVEL has a single level, so that tests can run each of them on one processor.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(FASTMASK_LEVEL)
#define FASTMASK_SIMD __attribute__((target("arch=" FASTMASK_LEVEL), noinline))
#elif defined(__x86_64__) && defined(__linux__) && !defined(FASTMASK_SANITIZE)
#define FASTMASK_SIMD __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default"), noinline))
#else
#define FASTMASK_SIMD __attribute__((noinline))
#endif
#define FASTMASK_INLINE inline __attribute__((always_inline))

namespace fastmask {

// Both propagate NaN and compile to one instruction.
FASTMASK_INLINE float at_least(float low, float x) { return low > x ? low : x; }
FASTMASK_INLINE float at_most(float high, float x) { return high < x ? high : x; }

// e^x for |x| <= 87, within 2 units in the last place.
FASTMASK_INLINE float fast_exp(float x) {
  // Adding 1.5 * 2^23 rounds to an integer n, which is then in the low bits.
  const float shifted = x * 1.44269504f + 12582912.0f;
  const float n = shifted - 12582912.0f;
  const float r = (x - n * 0.693147182f) + n * 1.90465421e-9f;  // x - n ln 2, in two steps
  float p = 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  std::uint32_t bits, exponent;
  std::memcpy(&bits, &p, 4);
  std::memcpy(&exponent, &shifted, 4);
  bits += exponent << 23;
  std::memcpy(&p, &bits, 4);
  return p;
}

}  // namespace fastmask
