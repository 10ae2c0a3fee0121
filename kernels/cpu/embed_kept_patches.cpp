// `embed_kept_patches`: patch embedding of the kept patches, its norm, and the gradients.

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <tuple>

#include "../common/groups.h"
#include "../common/indices.h"
#include "../common/norm.h"
#include "../common/tile.h"

namespace fastmask {
namespace {

constexpr int64_t kTaskColumns = 64;  // columns of the weight gradient per task
constexpr int64_t kBlockRows = 64;    // rows of the token gradient copied together, for locality

// Tokens: patches (kTileRows, values) times the weight in tiles (values, kTileColumns), bias and position added.
FASTMASK_SIMD void embed_rows(const float* patches, const float* columns, int64_t values, const float* bias,
                              const float* const* positions, float* const* tokens, int64_t rows, int64_t width) {
  Lanes sums[kTileRows][2];
  for (int64_t d = 0; d < width; d += kTileColumns, columns += values * kTileColumns) {
    multiply_tile(patches, values, 1, columns, kTileColumns, values, sums);
    const int64_t halves = d + 8 < width ? 2 : 1;
    for (int64_t r = 0; r < rows; ++r) {
      for (int64_t half = 0, c = d; half < halves; ++half, c += 8) {
        lanes(tokens[r] + c) = sums[r][half] + lanes(bias + c) + lanes(positions[r] + c);
      }
    }
  }
}

// totals (padded, kTaskColumns) += patches^T (padded, rows) times a block (rows, kTaskColumns).
FASTMASK_SIMD void add_weight_gradient(const float* patches, int64_t padded, const float* block, int64_t rows,
                                       float* totals) {
  Lanes sums[kTileRows][2];
  for (int64_t v = 0; v < padded; v += kTileRows) {
    for (int64_t c = 0; c < kTaskColumns; c += kTileColumns) {
      multiply_tile(patches + v, 1, padded, block + c, kTaskColumns, rows, sums);
      for (int64_t r = 0; r < kTileRows; ++r) {
        float* total = totals + (v + r) * kTaskColumns + c;
        lanes(total) += sums[r][0];
        lanes(total + 8) += sums[r][1];
      }
    }
  }
}

// Adds the rows of a block to the total.
FASTMASK_SIMD void add_bias_gradient(const float* block, int64_t rows, float* total) {
  Lanes sums[kTaskColumns / 8] = {};
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t i = 0; i < kTaskColumns / 8; ++i) sums[i] += lanes(block + r * kTaskColumns + i * 8);
  }
  for (int64_t i = 0; i < kTaskColumns / 8; ++i) lanes(total + i * 8) += sums[i];
}

// Gradients of patches (kTileRows, padded): token gradients (kTileRows, width) times the weight (width, padded).
FASTMASK_SIMD void patch_gradients(const float* grad, const float* weight, int64_t width, int64_t padded,
                                   float* patches) {
  Lanes sums[kTileRows][2];
  for (int64_t v = 0; v < padded; v += kTileColumns) {
    multiply_tile(grad, width, 1, weight + v, padded, width, sums);
    for (int64_t r = 0; r < kTileRows; ++r) {
      lanes(patches + r * padded + v) = sums[r][0];
      lanes(patches + r * padded + v + 8) = sums[r][1];
    }
  }
}

FASTMASK_SIMD Statistics norm_far_row(const float* x, const float* shift, const float* scale, float* h, int64_t width,
                                      bool rms, float eps) {
  Statistics s = row_statistics(x, width, rms, eps);
  // A position table can move tokens far from zero, where the sum is inaccurate: add the mean of the residuals.
  float rest = 0.0f;
#pragma omp simd reduction(+ : rest)
  for (int64_t d = 0; d < width; ++d) rest += x[d] - s.mean;
  if (!rms) s.mean += rest / static_cast<float>(width);
  modulate_row(x, s, shift, scale, h, width);
  return s;
}

template <typename T>
void round_as(float* values, int64_t n) {
  for (int64_t i = 0; i < n; ++i) values[i] = static_cast<float>(static_cast<T>(values[i]));
}

// Rounds the operands of a matmul to its dtype.
void round_to(ScalarType dtype, float* values, int64_t n) {
  if (dtype == ScalarType::BFloat16) round_as<torch::headeronly::BFloat16>(values, n);
  if (dtype == ScalarType::Half) round_as<torch::headeronly::Half>(values, n);
}

// Kept patches of images (B, C, height, width): row i is position ids[i] of its sample; without ids, all positions.
class KeptPatches {
 public:
  KeptPatches(const Tensor& images, const Tensor& weight, const std::optional<Tensor>& ids_keep,
              const std::optional<Tensor>& image_scale, const std::optional<Tensor>& cu_seqlens, ScalarType dtype)
      : values(checked(images, weight, ids_keep, image_scale, cu_seqlens, dtype)),
        length(images.size(2) * images.size(3) / (weight.size(2) * weight.size(3))),
        rows(ids_keep.has_value() ? ids_keep->numel() : images.size(0) * length),
        samples(rows, images.size(0), cu_seqlens, length),
        scale_(image_scale),
        dtype_(dtype),
        side_(weight.size(3)),
        width_(images.size(3)),
        image_(images.size(1) * images.size(2) * width_) {
    if (ids_keep.has_value()) ids_.emplace("ids_keep", *ids_keep, length);
    for (int64_t c = 0; c < weight.size(1); ++c) {
      for (int64_t i = 0; i < side_; ++i) {
        for (int64_t j = 0; j < side_; ++j) offsets_.push_back((c * images.size(2) + i) * width_ + j);
      }
    }
  }

  int64_t position(int64_t row) const { return ids_.has_value() ? (*ids_)[row] : row % length; }

  float scale(int64_t sample) const { return scale_.has_value() ? *RowReader(*scale_, 1)(sample) : 1.0f; }

  // The patch values of a row, scaled and rounded to the matmul dtype.
  void read(const Tensor& images, int64_t sample, int64_t row, float factor, float* patch) const {
    switch (images.scalar_type()) {
      case ScalarType::BFloat16: return read<torch::headeronly::BFloat16>(images, sample, row, factor, patch);
      case ScalarType::Half: return read<torch::headeronly::Half>(images, sample, row, factor, patch);
      default: return read<float>(images, sample, row, factor, patch);
    }
  }

  void write(const Tensor& images, int64_t sample, int64_t row, float factor, const float* patch) const {
    switch (images.scalar_type()) {
      case ScalarType::BFloat16: return write<torch::headeronly::BFloat16>(images, sample, row, factor, patch);
      case ScalarType::Half: return write<torch::headeronly::Half>(images, sample, row, factor, patch);
      default: return write<float>(images, sample, row, factor, patch);
    }
  }

  const int64_t values, length, rows;
  const Groups samples;

 private:
  // Throws for inconsistent arguments; returns P, the number of values of a patch.
  static int64_t checked(const Tensor& images, const Tensor& weight, const std::optional<Tensor>& ids_keep,
                         const std::optional<Tensor>& image_scale, const std::optional<Tensor>& cu_seqlens,
                         ScalarType dtype) {
    check_dim("images", images, 4);
    check_dim("weight", weight, 4);
    const int64_t batch = images.size(0), channels = images.size(1), side = weight.size(3);
    check_floats("images", images, images.sizes());
    check_floats("weight", weight, {weight.size(0), channels, side, side});
    check_patches(images, side);
    STD_TORCH_CHECK(weight.size(0) % 8 == 0, "the width must be a multiple of 8, not ", weight.size(0));
    check_dtype("dtype", dtype);
    if (image_scale.has_value()) check_floats("image_scale", *image_scale, {batch});
    STD_TORCH_CHECK(ids_keep.has_value() || !cu_seqlens.has_value(), "cu_seqlens needs ids_keep");
    if (ids_keep.has_value()) {
      check_dim("ids_keep", *ids_keep, cu_seqlens.has_value() ? 1 : 2);
      const bool fits = cu_seqlens.has_value() || ids_keep->size(0) == batch;
      STD_TORCH_CHECK(fits, "ids_keep must have ", batch, " rows, not ", ids_keep->size(0));
    }
    return channels * side * side;
  }

  int64_t first_pixel(int64_t sample, int64_t row) const {
    const int64_t columns = width_ / side_, at = position(row);
    return sample * image_ + at / columns * side_ * width_ + at % columns * side_;
  }

  template <typename T>
  void read(const Tensor& images, int64_t sample, int64_t row, float factor, float* patch) const {
    const T* pixels = static_cast<const T*>(images.const_data_ptr()) + first_pixel(sample, row);
    for (int64_t v = 0; v < values; ++v) patch[v] = static_cast<float>(pixels[offsets_[v]]) * factor;
    round_to(dtype_, patch, values);
  }

  template <typename T>
  void write(const Tensor& images, int64_t sample, int64_t row, float factor, const float* patch) const {
    T* pixels = static_cast<T*>(images.mutable_data_ptr()) + first_pixel(sample, row);
    for (int64_t v = 0; v < values; ++v) pixels[offsets_[v]] = static_cast<T>(patch[v] * factor);
  }

  std::optional<Indices> ids_;
  std::optional<Tensor> scale_;
  std::vector<int64_t> offsets_;  // offsets of patch values, in the weight's order, from the first pixel
  ScalarType dtype_;
  int64_t side_, width_, image_;
};

int64_t padded_to(int64_t multiple, int64_t n) { return (n + multiple - 1) / multiple * multiple; }

// Buffer of fp32 values with torch's alignment.
Tensor scratch(const Tensor& like, int64_t size) { return torch::stable::new_empty(like, {size}, ScalarType::Float); }
float* floats(const Tensor& tensor) { return static_cast<float*>(tensor.mutable_data_ptr()); }

// Calls f(d, row) for the rows of the weight in fp32, rounded to the matmul dtype.
template <typename F>
void for_weight_rows(const Tensor& weight, int64_t values, ScalarType dtype, const F& f) {
  RowReader read(weight, values);
  std::vector<float> row(values);
  for (int64_t d = 0; d < weight.size(0); ++d) {
    std::copy_n(read(d), values, row.data());
    round_to(dtype, row.data(), values);
    f(d, row.data());
  }
}

// The columns of the weight in tiles (values, kTileColumns), the last one padded with zeros.
Tensor weight_tiles(const Tensor& weight, int64_t values, ScalarType dtype) {
  Tensor tiles = scratch(weight, padded_to(kTileColumns, weight.size(0)) * values);
  std::fill_n(floats(tiles), tiles.numel(), 0.0f);
  for_weight_rows(weight, values, dtype, [to = floats(tiles), values](int64_t d, const float* row) {
    float* column = to + d / kTileColumns * values * kTileColumns + d % kTileColumns;
    for (int64_t v = 0; v < values; ++v) column[v * kTileColumns] = row[v];
  });
  return tiles;
}

std::tuple<Tensor, Tensor, Tensor> embed_kept_patches_fwd(const Tensor& images, const Tensor& weight,
                                                          const Tensor& bias, const Tensor& position,
                                                          std::optional<Tensor> ids_keep,
                                                          std::optional<Tensor> image_scale,
                                                          std::optional<Tensor> cu_seqlens, ScalarType dtype,
                                                          ScalarType out_dtype, std::optional<Tensor> shift,
                                                          std::optional<Tensor> scale, bool rms, double eps) {
  const KeptPatches kept(images, weight, ids_keep, image_scale, cu_seqlens, dtype);
  const int64_t rows = kept.rows, values = kept.values, width = weight.size(0);
  check_floats("bias", bias, {width});
  check_floats("position", position, {kept.length, width});
  check_dtype("out_dtype", out_dtype);
  const bool normed = check_modulations(shift, scale, images.size(0), width);
  const Tensor tiles = weight_tiles(weight, values, dtype);
  Tensor tokens = torch::stable::new_empty(images, {rows, width}, out_dtype);
  Tensor h = normed ? torch::stable::new_empty(images, {rows, width}, out_dtype)
                    : torch::stable::new_empty(images, {0}, out_dtype);
  Tensor stats = normed ? torch::stable::new_empty(images, {2, rows}, ScalarType::Float)
                        : torch::stable::new_empty(images, {0}, ScalarType::Float);
  float* stat = floats(stats);
  kept.samples.for_parts([&](const auto& each) {
    RowReader read_bias(bias, width);
    std::vector<RowReader> read_position(kTileRows, RowReader(position, width));
    RowReader read_shift(shift.value_or(bias), normed ? shift->stride(0) : width, width);
    RowReader read_scale(scale.value_or(bias), normed ? scale->stride(0) : width, width);
    std::vector<RowWriter> write(kTileRows, RowWriter(tokens, width));
    RowWriter write_h(h, width);
    std::vector<float> patches(kTileRows * values);
    const float* positions[kTileRows];
    float* rows_of_tile[kTileRows];
    const float* b_bias = read_bias(0);
    each([&](int64_t sample, int64_t begin, int64_t end, int64_t) {
      const float factor = kept.scale(sample);
      const float *b_shift = normed ? read_shift(sample) : nullptr, *b_scale = normed ? read_scale(sample) : nullptr;
      for (int64_t first = begin; first < end; first += kTileRows) {
        const int64_t count = std::min(kTileRows, end - first);
        for (int64_t i = 0; i < count; ++i) {
          kept.read(images, sample, first + i, factor, patches.data() + i * values);
          positions[i] = read_position[i](kept.position(first + i));
          rows_of_tile[i] = write[i].row(first + i);
        }
        embed_rows(patches.data(), floats(tiles), values, b_bias, positions, rows_of_tile, count, width);
        for (int64_t i = 0, row = first; i < count; ++i, ++row) {
          if (!normed) {
            write[i].done(row);
            continue;
          }
          write[i].round(row);  // normalise the rounded tokens, as seen by backward
          const Statistics s =
              norm_far_row(write[i].row(row), b_shift, b_scale, write_h.row(row), width, rms, static_cast<float>(eps));
          write_h.done(row);
          stat[row] = s.mean;
          stat[rows + row] = s.rstd;
        }
      }
    });
  });
  return {tokens, h, stats};
}

// All patches in fp32, (rows, padded), padded with zeros.
Tensor kept_patches(const KeptPatches& kept, const Tensor& images, int64_t padded) {
  Tensor patches = scratch(images, kept.rows * padded);
  kept.samples.for_parts([&](const auto& each) {
    each([&](int64_t sample, int64_t begin, int64_t end, int64_t) {
      const float factor = kept.scale(sample);
      for (int64_t i = begin; i < end; ++i) {
        float* patch = floats(patches) + i * padded;
        kept.read(images, sample, i, factor, patch);
        std::fill(patch + kept.values, patch + padded, 0.0f);
      }
    });
  });
  return patches;
}

// Some columns of the gradients: of the weight, (padded, kTaskColumns), and of the bias in one more row.
class ColumnSums {
 public:
  ColumnSums(const Tensor& grad, const Tensor& patches, int64_t padded, ScalarType dtype)
      : grad_(grad),
        patches_(floats(patches)),
        padded_(padded),
        dtype_(dtype),
        totals_(scratch(grad, (padded + 1) * kTaskColumns)),
        block_(scratch(grad, kBlockRows * kTaskColumns)) {
    std::fill_n(floats(block_), block_.numel(), 0.0f);
  }

  const float* operator()(int64_t column, int64_t width) {
    float *totals = floats(totals_), *block = floats(block_);
    std::fill_n(totals, totals_.numel(), 0.0f);
    const int64_t rows = grad_.size(0);
    for (int64_t first = 0; first < rows; first += kBlockRows) {
      const int64_t count = std::min(kBlockRows, rows - first);
      copy_block(first, count, column, width);
      add_bias_gradient(block, count, totals + padded_ * kTaskColumns);
      round_to(dtype_, block, count * kTaskColumns);
      add_weight_gradient(patches_ + first * padded_, padded_, block, count, totals);
    }
    return totals;
  }

 private:
  void copy_block(int64_t first, int64_t count, int64_t column, int64_t width) {
    // In units of 8 values, since every width is a multiple of 8.
    RowReader read(grad_, 8, kTaskColumns);
    const int64_t row_units = grad_.size(1) / 8;
    for (int64_t i = 0; i < count; ++i) {
      std::copy_n(read((first + i) * row_units + column / 8, width), width, floats(block_) + i * kTaskColumns);
    }
  }

  const Tensor& grad_;
  const float* patches_;
  int64_t padded_;
  ScalarType dtype_;
  Tensor totals_, block_;
};

std::tuple<Tensor, Tensor> embed_kept_patches_bwd(const Tensor& grad, const Tensor& images, const Tensor& weight,
                                                  std::optional<Tensor> ids_keep, std::optional<Tensor> image_scale,
                                                  std::optional<Tensor> cu_seqlens, ScalarType dtype,
                                                  ScalarType bias_dtype) {
  const KeptPatches kept(images, weight, ids_keep, image_scale, cu_seqlens, dtype);
  const int64_t values = kept.values, width = weight.size(0);
  check_floats("grad", grad, {kept.rows, width});
  check_dtype("bias_dtype", bias_dtype);
  const int64_t padded = padded_to(kTileRows, values);
  const Tensor patches = kept_patches(kept, images, padded);
  Tensor grad_weight = torch::stable::new_empty(weight, weight.sizes(), weight.scalar_type());
  Tensor grad_bias = torch::stable::new_empty(weight, {width}, bias_dtype);
  RowWriter write_bias(grad_bias, width);
  float* bias_sums = write_bias.row(0);
  // The sum of a column is never split between threads.
  torch::stable::parallel_for(0, (width + kTaskColumns - 1) / kTaskColumns, 1, [&](int64_t begin, int64_t end) {
    ColumnSums sums(grad, patches, padded, dtype);
    RowWriter write(grad_weight, values);
    for (int64_t column = begin * kTaskColumns; column < std::min(width, end * kTaskColumns); column += kTaskColumns) {
      const int64_t count = std::min(kTaskColumns, width - column);
      const float* totals = sums(column, count);
      for (int64_t d = 0; d < count; ++d) {
        float* row = write.row(column + d);
        for (int64_t v = 0; v < values; ++v) row[v] = totals[v * kTaskColumns + d];
        write.done(column + d);
      }
      std::copy_n(totals + padded * kTaskColumns, count, bias_sums + column);
    }
  });
  write_bias.done(0);
  return {grad_weight, grad_bias};
}

Tensor embed_kept_patches_bwd_images(const Tensor& grad, const Tensor& images, const Tensor& weight,
                                     std::optional<Tensor> ids_keep, std::optional<Tensor> image_scale,
                                     std::optional<Tensor> cu_seqlens, ScalarType dtype) {
  const KeptPatches kept(images, weight, ids_keep, image_scale, cu_seqlens, dtype);
  const int64_t values = kept.values, width = weight.size(0);
  check_floats("grad", grad, {kept.rows, width});
  const int64_t padded = padded_to(kTileColumns, values);
  Tensor rows = scratch(weight, width * padded);
  std::fill_n(floats(rows), rows.numel(), 0.0f);
  for_weight_rows(weight, values, dtype, [to = floats(rows), values, padded](int64_t d, const float* row) {
    std::copy_n(row, values, to + d * padded);
  });
  Tensor grad_images = torch::stable::new_zeros(images, images.sizes());
  kept.samples.for_parts([&](const auto& each) {
    RowReader read(grad, width);
    std::vector<float> factors(kTileRows * width), patches(kTileRows * padded);
    each([&](int64_t sample, int64_t begin, int64_t end, int64_t) {
      const float factor = kept.scale(sample);
      for (int64_t first = begin; first < end; first += kTileRows) {
        const int64_t count = std::min(kTileRows, end - first);
        for (int64_t i = 0; i < count; ++i) std::copy_n(read(first + i), width, factors.data() + i * width);
        round_to(dtype, factors.data(), count * width);
        patch_gradients(factors.data(), floats(rows), width, padded, patches.data());
        for (int64_t i = 0; i < count; ++i) {
          kept.write(grad_images, sample, first + i, factor, patches.data() + i * padded);
        }
      }
    });
  });
  return grad_images;
}

}  // namespace
}  // namespace fastmask

STABLE_TORCH_LIBRARY_IMPL(fastmask, CPU, m) {
  m.impl("embed_kept_patches_fwd", TORCH_BOX(&fastmask::embed_kept_patches_fwd));
  m.impl("embed_kept_patches_bwd", TORCH_BOX(&fastmask::embed_kept_patches_bwd));
  m.impl("embed_kept_patches_bwd_images", TORCH_BOX(&fastmask::embed_kept_patches_bwd_images));
}
