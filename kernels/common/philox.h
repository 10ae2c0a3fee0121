// Counter-based random numbers of (seed, sample, stream, position): Philox4x32-10, bitwise equal to
// fastmask/kernels/philox.py.
#pragma once

#include "simd.h"

namespace fastmask {

constexpr int kPhiloxRounds = 10;

// The counter before the rounds, four random words after them.
struct PhiloxWords {
  std::uint32_t w0, w1, w2, w3;
};

// The rounds are unrolled by recursion: an inner loop would prevent vectorisation of the loop over counters.
template <int Rounds>
FASTMASK_INLINE PhiloxWords philox_rounds(PhiloxWords c, std::uint32_t key0, std::uint32_t key1) {
  const std::uint64_t product0 = std::uint64_t{c.w0} * 0xD2511F53u, product1 = std::uint64_t{c.w2} * 0xCD9E8D57u;
  const PhiloxWords next{static_cast<std::uint32_t>(product1 >> 32) ^ c.w1 ^ key0, static_cast<std::uint32_t>(product1),
                         static_cast<std::uint32_t>(product0 >> 32) ^ c.w3 ^ key1,
                         static_cast<std::uint32_t>(product0)};
  if constexpr (Rounds > 1) {
    return philox_rounds<Rounds - 1>(next, key0 + 0x9E3779B9u, key1 + 0xBB67AE85u);
  } else {
    return next;
  }
}

// The words of positions 4 q to 4 q + 3.
FASTMASK_INLINE PhiloxWords philox(std::uint64_t seed, std::uint64_t sample, std::uint32_t stream, std::uint32_t q) {
  const PhiloxWords counter{q, static_cast<std::uint32_t>(sample), static_cast<std::uint32_t>(sample >> 32), stream};
  return philox_rounds<kPhiloxRounds>(counter, static_cast<std::uint32_t>(seed),
                                      static_cast<std::uint32_t>(seed >> 32));
}

}  // namespace fastmask
