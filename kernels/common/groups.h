// Groups of rows that share a modulation: equal sizes, or boundaries in cu_seqlens.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <optional>

#include "check.h"
#include "parts.h"
#include "rows.h"

namespace fastmask {

struct Groups {
  int64_t count, rows;
  const int32_t* cu_seqlens;  // count + 1 values, or null

  // Throws unless the groups cover all rows, with at most `most` rows each.
  Groups(int64_t num_rows, int64_t num_groups, const std::optional<Tensor>& cu, int64_t most = kNoLimit)
      : count(num_groups), rows(num_rows), cu_seqlens(nullptr) {
    if (cu.has_value()) {
      check_cu_seqlens(*cu, count, rows, most);
      STD_TORCH_CHECK(cu->scalar_type() == ScalarType::Int, "cu_seqlens must be int32");
      cu_seqlens = static_cast<const int32_t*>(cu->const_data_ptr());
      return;
    }
    const bool even = count > 0 ? rows >= 0 && rows % count == 0 : rows == 0;
    STD_TORCH_CHECK(even, rows, " rows cannot be shared among ", count, " groups");
    STD_TORCH_CHECK(rows == 0 || rows / count <= most, rows / count, " rows to a sample are more than ", most);
  }

  int64_t begin(int64_t group) const { return cu_seqlens ? cu_seqlens[group] : rows / count * group; }

  // Calls f(group, first row, end row, part) in parallel; sums over a part do not depend on the number of threads.
  template <typename F>
  void for_parts(const F& f) const {
    const int64_t parts = parts_per_group(),
                  grain = std::max<int64_t>(1, kRowsPerPart * count / std::max<int64_t>(1, rows));
    torch::stable::parallel_for(0, count * parts, grain, [&](int64_t from, int64_t to) {
      f([&](const auto& task) {
        for (int64_t i = from; i < to; ++i) {
          const int64_t group = i / parts, part = i % parts, start = begin(group), length = begin(group + 1) - start;
          task(group, part_begin(start, length, part, parts), part_begin(start, length, part + 1, parts), i);
        }
      });
    });
  }

  int64_t parts_per_group() const { return fastmask::parts_per_group(rows, count, kRowsPerPart); }

 private:
  static constexpr int64_t kRowsPerPart = 16;
};

// Reduces partial sums, (groups * parts, sums, D) in fp32, to tensors of shape (groups, D).
template <size_t N>
void finish_sums(const Groups& groups, const std::vector<float>& partial, int64_t width, Tensor (&outs)[N]) {
  const int64_t parts = groups.parts_per_group();
  torch::stable::parallel_for(0, groups.count, 1, [&](int64_t from, int64_t to) {
    for (size_t which = 0; which < N; ++which) {
      RowWriter write(outs[which], width);
      for (int64_t group = from; group < to; ++group) {
        float* out = write.row(group);
        std::fill(out, out + width, 0.0f);
        for (int64_t part = 0; part < parts; ++part) {
          const float* from_part = partial.data() + ((group * parts + part) * N + which) * width;
          for (int64_t d = 0; d < width; ++d) out[d] += from_part[d];
        }
        write.done(group);
      }
    }
  });
}

}  // namespace fastmask
