// `masked_loss`: MaskDiT's two losses from raw tokens, and their gradient. The work is divided into bands: a band is a
// row of patches of one sample, whose pixels are first reordered to tokens.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cmath>
#include <optional>
#include <tuple>
#include <vector>

#include "../common/check.h"
#include "../common/norm.h"
#include "../common/rows.h"

namespace fastmask {
namespace {

constexpr double kEps = 1e-6;     // EPS of fastmask/kernels/masked_loss.py
constexpr int64_t kGrain = 4096;  // minimum number of values per thread

struct Sizes {
  int64_t batch, channels, height, width, patch, bands, columns, values;

  Sizes(const Tensor& images, int64_t patch_size)
      : batch(images.size(0)),
        channels(images.size(1)),
        height(images.size(2)),
        width(images.size(3)),
        patch(patch_size),
        bands(height / patch),
        columns(width / patch),
        values(patch * patch * channels) {}
  int64_t band_values() const { return columns * values; }
};

// An optional list of int32 or int64 numbers.
class OptionalIndices {
 public:
  explicit OptionalIndices(const std::optional<Tensor>& ids)
      : data_(ids ? ids->const_data_ptr() : nullptr), wide_(ids && ids->scalar_type() == ScalarType::Long) {}

  explicit operator bool() const { return data_ != nullptr; }
  int64_t operator[](int64_t i) const {
    return wide_ ? static_cast<const int64_t*>(data_)[i] : static_cast<const int32_t*>(data_)[i];
  }

 private:
  const void* data_;
  bool wide_;
};

// Constants of a sample; the shares are the weights of squared errors in the losses.
struct Sample {
  int64_t kept;
  float c_skip, c_out;
  double share_kept, share_dropped;
};

struct Inputs {
  const Tensor &raw, &images, &noised, &c_skip, &c_out, &weight;
  OptionalIndices ids_restore, cu_seqlens;
  int64_t num_kept;
  Sizes sizes;

  Sample sample(int64_t b) const {
    const auto at = [b](const Tensor& values) { return static_cast<const float*>(values.const_data_ptr())[b]; };
    const int64_t kept = cu_seqlens ? cu_seqlens[b + 1] - cu_seqlens[b] : num_kept;
    const int64_t dropped = sizes.bands * sizes.columns - kept;
    const auto values_of = [&](int64_t patches) {
      return static_cast<double>(sizes.values * std::max<int64_t>(1, patches));
    };
    return {kept, at(c_skip), at(c_out), at(weight) / values_of(kept), 1.0 / values_of(dropped)};
  }
};

void check_inputs(const Tensor& raw, const Tensor& images, const Tensor& noised, const Tensor& c_skip,
                  const Tensor& c_out, const Tensor& weight, const std::optional<Tensor>& ids_restore,
                  const std::optional<Tensor>& cu_seqlens, int64_t num_kept, int64_t patch_size) {
  check_dim("images", images, 4);
  check_patches(images, patch_size);
  const Sizes sizes(images, patch_size);
  const int64_t length = sizes.bands * sizes.columns;
  check_floats("images", images, images.sizes());
  check_floats("noised", noised, images.sizes());
  check_floats("raw", raw, {sizes.batch, length, sizes.values});
  check_fp32("c_skip", c_skip, {sizes.batch});
  check_fp32("c_out", c_out, {sizes.batch});
  check_fp32("weight", weight, {sizes.batch});
  if (ids_restore.has_value()) check_integers("ids_restore", *ids_restore, {sizes.batch, length});
  if (cu_seqlens.has_value()) {
    STD_TORCH_CHECK(ids_restore.has_value(), "cu_seqlens needs ids_restore");
    check_cu_seqlens(*cu_seqlens, sizes.batch, kAnyNumber, length);
  } else {
    STD_TORCH_CHECK(0 <= num_kept && num_kept <= length, "num_kept must be between 0 and ", length, ", not ", num_kept);
  }
}

// Scatters a row of pixels to the tokens of a band, which are laid out (p, p, C), channels fastest.
FASTMASK_SIMD void spread_row(const float* __restrict pixels, float* __restrict tokens, const Sizes& sizes) {
  const Sizes s = sizes;
  for (int64_t column = 0; column < s.patch; ++column) {
    float* __restrict to = tokens + column * s.channels;
    for (int64_t j = 0; j < s.columns; ++j) to[j * s.values] = pixels[j * s.patch + column];
  }
}

// The targets of dropped patches are the noised patches, normalised with the unbiased variance.
FASTMASK_SIMD void norm_dropped(const float* __restrict noised, const std::uint8_t* kept, float* __restrict target,
                                int64_t columns, int64_t values) {
  // row_statistics has the biased variance, which is this fraction of the unbiased one.
  const double share = static_cast<double>(values - 1) / static_cast<double>(values);
  const float eps = static_cast<float>(kEps * share), unbiased = static_cast<float>(std::sqrt(share));
  for (int64_t j = 0; j < columns; ++j) {
    if (kept[j]) continue;
    const Statistics s = row_statistics(noised + j * values, values, false, eps);
    const float rstd = s.rstd * unbiased;
    for (int64_t v = j * values; v < (j + 1) * values; ++v) target[v] = (noised[v] - s.mean) * rstd;
  }
}

// Adds the squared errors of kept patches to sums[1], of dropped patches to sums[0].
FASTMASK_SIMD void add_squares(const float* __restrict raw, const float* __restrict noised,
                               const float* __restrict target, const std::uint8_t* kept, float c_skip, float c_out,
                               int64_t columns, int64_t values, double* sums) {
  for (int64_t j = 0; j < columns; ++j) {
    float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
    for (int64_t v = j * values; v < (j + 1) * values; ++v) {
      const float error = c_skip * noised[v] + c_out * raw[v] - target[v];
      sum += error * error;
    }
    sums[kept[j]] += sum;
  }
}

// The errors times factors[1] in kept patches, times factors[0] in dropped patches.
FASTMASK_SIMD void scale_errors(const float* __restrict raw, const float* __restrict noised,
                                const float* __restrict target, const std::uint8_t* kept, float c_skip, float c_out,
                                const float* factors, int64_t columns, int64_t values, float* __restrict grad_raw) {
  for (int64_t j = 0; j < columns; ++j) {
    const float factor = factors[kept[j]];
    for (int64_t v = j * values; v < (j + 1) * values; ++v) {
      grad_raw[v] = factor * (c_skip * noised[v] + c_out * raw[v] - target[v]);
    }
  }
}

// Reads the bands of one thread in sequence. The pointers are valid until the next band.
class BandReader {
 public:
  explicit BandReader(const Inputs& in)
      : in_(in),
        s_(in.sizes),
        read_raw_(in.raw, s_.band_values()),
        read_images_(in.images, s_.width),
        read_noised_(in.noised, s_.width),
        noised_(s_.band_values()),
        target_(s_.band_values()),
        kept_(s_.columns, 1) {}

  void read(int64_t band, const Sample& sample) {
    raw_ = read_raw_(band);
    gather(read_noised_, band, noised_.data());
    gather(read_images_, band, target_.data());
    if (!in_.ids_restore) return;
    for (int64_t j = 0; j < s_.columns; ++j) kept_[j] = in_.ids_restore[band * s_.columns + j] < sample.kept;
    norm_dropped(noised_.data(), kept_.data(), target_.data(), s_.columns, s_.values);
  }

  const float* raw() const { return raw_; }
  const float* noised() const { return noised_.data(); }
  const float* target() const { return target_.data(); }
  const std::uint8_t* kept() const { return kept_.data(); }

 private:
  void gather(RowReader& read, int64_t band, float* tokens) const {
    const int64_t sample = band / s_.bands, top = band % s_.bands * s_.patch;
    for (int64_t channel = 0; channel < s_.channels; ++channel) {
      for (int64_t row = 0; row < s_.patch; ++row) {
        const float* pixels = read((sample * s_.channels + channel) * s_.height + top + row);
        spread_row(pixels, tokens + row * s_.patch * s_.channels + channel, s_);
      }
    }
  }

  const Inputs& in_;
  const Sizes& s_;
  RowReader read_raw_, read_images_, read_noised_;
  std::vector<float> noised_, target_;
  std::vector<std::uint8_t> kept_;
  const float* raw_ = nullptr;
};

// Calls f(first band, end band) in parallel over the bands of all samples.
template <typename F>
void for_bands(const Sizes& s, const F& f) {
  const int64_t grain = std::max<int64_t>(1, kGrain / std::max<int64_t>(1, s.band_values()));
  torch::stable::parallel_for(0, s.batch * s.bands, grain, f);
}

std::tuple<Tensor, Tensor> masked_loss_fwd(const Tensor& raw, const Tensor& images, const Tensor& noised,
                                           const Tensor& c_skip, const Tensor& c_out, const Tensor& weight,
                                           std::optional<Tensor> ids_restore, std::optional<Tensor> cu_seqlens,
                                           int64_t num_kept, int64_t patch_size) {
  check_inputs(raw, images, noised, c_skip, c_out, weight, ids_restore, cu_seqlens, num_kept, patch_size);
  const Inputs in{raw,
                  images,
                  noised,
                  c_skip,
                  c_out,
                  weight,
                  OptionalIndices(ids_restore),
                  OptionalIndices(cu_seqlens),
                  num_kept,
                  Sizes(images, patch_size)};
  const Sizes& s = in.sizes;
  std::vector<double> sums(s.batch * s.bands * 2);
  for_bands(s, [&](int64_t begin, int64_t end) {
    BandReader reader(in);
    for (int64_t band = begin; band < end; ++band) {
      const Sample sample = in.sample(band / s.bands);
      reader.read(band, sample);
      add_squares(reader.raw(), reader.noised(), reader.target(), reader.kept(), sample.c_skip, sample.c_out, s.columns,
                  s.values, sums.data() + 2 * band);
    }
  });
  Tensor denoising = torch::stable::new_empty(weight, weight.sizes(), ScalarType::Float);
  Tensor reconstruction = torch::stable::new_empty(weight, weight.sizes(), ScalarType::Float);
  for (int64_t b = 0; b < s.batch; ++b) {
    const Sample sample = in.sample(b);
    double kept = 0.0, dropped = 0.0;
    for (int64_t band = b * s.bands; band < (b + 1) * s.bands; ++band) {
      dropped += sums[2 * band];
      kept += sums[2 * band + 1];
    }
    static_cast<float*>(denoising.mutable_data_ptr())[b] = static_cast<float>(kept * sample.share_kept);
    static_cast<float*>(reconstruction.mutable_data_ptr())[b] = static_cast<float>(dropped * sample.share_dropped);
  }
  return {denoising, reconstruction};
}

Tensor masked_loss_bwd(const Tensor& grad_denoising, const Tensor& grad_reconstruction, const Tensor& raw,
                       const Tensor& images, const Tensor& noised, const Tensor& c_skip, const Tensor& c_out,
                       const Tensor& weight, std::optional<Tensor> ids_restore, std::optional<Tensor> cu_seqlens,
                       int64_t num_kept, int64_t patch_size) {
  check_inputs(raw, images, noised, c_skip, c_out, weight, ids_restore, cu_seqlens, num_kept, patch_size);
  const Inputs in{raw,
                  images,
                  noised,
                  c_skip,
                  c_out,
                  weight,
                  OptionalIndices(ids_restore),
                  OptionalIndices(cu_seqlens),
                  num_kept,
                  Sizes(images, patch_size)};
  const Sizes& s = in.sizes;
  check_fp32("grad_denoising", grad_denoising, {s.batch});
  check_fp32("grad_reconstruction", grad_reconstruction, {s.batch});
  const float* grad_kept = static_cast<const float*>(grad_denoising.const_data_ptr());
  const float* grad_dropped = static_cast<const float*>(grad_reconstruction.const_data_ptr());
  Tensor grad_raw = torch::stable::new_empty(raw, raw.sizes(), raw.scalar_type());
  for_bands(s, [&](int64_t begin, int64_t end) {
    BandReader reader(in);
    RowWriter write(grad_raw, s.band_values());
    for (int64_t band = begin; band < end; ++band) {
      const int64_t b = band / s.bands;
      const Sample sample = in.sample(b);
      const double twice = 2.0 * sample.c_out;
      const float factors[2] = {static_cast<float>(twice * sample.share_dropped * grad_dropped[b]),
                                static_cast<float>(twice * sample.share_kept * grad_kept[b])};
      reader.read(band, sample);
      scale_errors(reader.raw(), reader.noised(), reader.target(), reader.kept(), sample.c_skip, sample.c_out, factors,
                   s.columns, s.values, write.row(band));
      write.done(band);
    }
  });
  return grad_raw;
}

}  // namespace
}  // namespace fastmask

STABLE_TORCH_LIBRARY_IMPL(fastmask, CPU, m) {
  m.impl("masked_loss_fwd", TORCH_BOX(&fastmask::masked_loss_fwd));
  m.impl("masked_loss_bwd", TORCH_BOX(&fastmask::masked_loss_bwd));
}
