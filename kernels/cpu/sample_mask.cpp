// `sample_mask`: random keys of each sample, the K-th smallest key, and index lists sorted by position.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstdint>
#include <limits>
#include <optional>
#include <tuple>
#include <vector>

#include "../common/check.h"
#include "../common/philox.h"

namespace fastmask {
namespace {

constexpr int64_t kGrain = 8192;  // minimum number of positions per thread

FASTMASK_SIMD void random_keys(std::uint64_t seed, std::uint64_t sample, std::uint32_t stream,
                               std::uint32_t* __restrict keys, int64_t counters) {
  for (int64_t q = 0; q < counters; ++q) {
    const PhiloxWords words = philox(seed, sample, stream, static_cast<std::uint32_t>(q));
    keys[4 * q] = words.w0;
    keys[4 * q + 1] = words.w1;
    keys[4 * q + 2] = words.w2;
    keys[4 * q + 3] = words.w3;
  }
}

FASTMASK_INLINE int64_t count_below(const std::uint32_t* keys, int64_t length, std::uint32_t limit) {
  std::uint32_t below = 0;
  for (int64_t l = 0; l < length; ++l) below += keys[l] < limit;
  return below;
}

struct Threshold {
  std::uint32_t key;
  int64_t ties;  // number of kept keys equal to it
};

// The num_kept-th smallest key, by a bitwise search from the top: a bit stays set if fewer than num_kept keys are below
// the candidate.
FASTMASK_SIMD Threshold find_threshold(const std::uint32_t* keys, int64_t length, int64_t num_kept) {
  std::uint32_t key = 0;
  for (std::uint32_t bit = 1u << 31; bit != 0; bit >>= 1) {
    if (count_below(keys, length, key | bit) < num_kept) key |= bit;
  }
  return {key, num_kept - count_below(keys, length, key)};
}

// Writes ids_restore and the kept positions (at most `length`); returns their number. Branch-free, since half of the
// branches would be mispredicted.
int64_t write_lists(const std::uint32_t* keys, Threshold threshold, int64_t length, int64_t num_kept,
                    int32_t* positions, int32_t* ids_restore) {
  int64_t count = 0;
  for (int64_t l = 0; l < length; ++l) {
    const bool equal = keys[l] == threshold.key;
    const bool kept = (keys[l] < threshold.key) | (equal & (threshold.ties > 0));
    threshold.ties -= equal;
    positions[count] = static_cast<int32_t>(l);  // overwritten by the next position unless this one is kept
    ids_restore[l] = static_cast<int32_t>(kept ? count : num_kept + l - count);
    count += kept;
  }
  return count;
}

std::tuple<Tensor, Tensor> sample_mask_fwd(const Tensor& seed, const Tensor& offset, std::optional<Tensor> cu_seqlens,
                                           int64_t batch, int64_t length, int64_t keep, int64_t stream) {
  check_integers("seed", seed, {});
  check_integers("offset", offset, {});
  const bool wide = seed.scalar_type() == ScalarType::Long && offset.scalar_type() == ScalarType::Long;
  STD_TORCH_CHECK(wide, "seed and offset must be int64");
  const bool fits = batch >= 0 && 0 <= length && length <= std::numeric_limits<int32_t>::max();
  STD_TORCH_CHECK(fits, "masks of batch ", batch, " and length ", length, " cannot be drawn");
  if (cu_seqlens) {
    check_cu_seqlens(*cu_seqlens, batch, keep, length);
    STD_TORCH_CHECK(cu_seqlens->scalar_type() == ScalarType::Int, "cu_seqlens must be int32");
  } else {
    STD_TORCH_CHECK(0 <= keep && keep <= length, "keep must be between 0 and ", length, ", not ", keep);
  }
  Tensor ids_keep = cu_seqlens ? torch::stable::new_empty(seed, {keep}, ScalarType::Int)
                               : torch::stable::new_empty(seed, {batch, keep}, ScalarType::Int);
  Tensor ids_restore = torch::stable::new_empty(seed, {batch, length}, ScalarType::Int);
  const int32_t* ends = cu_seqlens ? static_cast<const int32_t*>(cu_seqlens->const_data_ptr()) : nullptr;
  const std::uint64_t key = *static_cast<const std::uint64_t*>(seed.const_data_ptr());
  const std::uint64_t first_sample = *static_cast<const std::uint64_t*>(offset.const_data_ptr());
  int32_t* kept = static_cast<int32_t*>(ids_keep.mutable_data_ptr());
  int32_t* restore = static_cast<int32_t*>(ids_restore.mutable_data_ptr());
  const int64_t counters = (length + 3) / 4;
  const int64_t grain = std::max<int64_t>(1, kGrain / std::max<int64_t>(1, length));
  torch::stable::parallel_for(0, batch, grain, [&](int64_t begin, int64_t end) {
    std::vector<std::uint32_t> keys(4 * counters);
    std::vector<int32_t> positions(length);
    for (int64_t b = begin; b < end; ++b) {
      const int64_t first = ends ? ends[b] : b * keep, num_kept = ends ? ends[b + 1] - first : keep;
      random_keys(key, first_sample + b, static_cast<std::uint32_t>(stream), keys.data(), counters);
      const Threshold threshold = find_threshold(keys.data(), length, num_kept);
      const int64_t count =
          write_lists(keys.data(), threshold, length, num_kept, positions.data(), restore + b * length);
      std::copy_n(positions.data(), count, kept + first);
    }
  });
  return {ids_keep, ids_restore};
}

}  // namespace
}  // namespace fastmask

STABLE_TORCH_LIBRARY_IMPL(fastmask, CPU, m) { m.impl("sample_mask_fwd", TORCH_BOX(&fastmask::sample_mask_fwd)); }
