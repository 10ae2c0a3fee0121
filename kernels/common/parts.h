// How the rows of groups are divided into parts: by the shapes alone, so that sums over a part depend on nothing else.
#pragma once

#include "simd.h"

namespace fastmask {

// As many parts for each group, of about `rows_per_part` rows.
FASTMASK_INLINE std::int64_t parts_per_group(std::int64_t rows, std::int64_t groups, std::int64_t rows_per_part) {
  if (groups == 0) return 1;
  const std::int64_t parts = (rows + groups * rows_per_part - 1) / (groups * rows_per_part);
  return parts > 1 ? parts : 1;
}

// The first row of a part of a group of `length` rows from `start` on.
FASTMASK_INLINE std::int64_t part_begin(std::int64_t start, std::int64_t length, std::int64_t part,
                                        std::int64_t parts) {
  return start + part * length / parts;
}

}  // namespace fastmask
