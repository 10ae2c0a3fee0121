// Division of group rows into parts, by the shapes alone, so that partial sums do not depend on the number of threads.
#pragma once

#include "simd.h"

namespace fastmask {

// Number of parts per group, each of about `rows_per_part` rows.
FASTMASK_INLINE std::int64_t parts_per_group(std::int64_t rows, std::int64_t groups, std::int64_t rows_per_part) {
  if (groups == 0) return 1;
  const std::int64_t parts = (rows + groups * rows_per_part - 1) / (groups * rows_per_part);
  return parts > 1 ? parts : 1;
}

// First row of a part of a group of `length` rows that begins at `start`.
FASTMASK_INLINE std::int64_t part_begin(std::int64_t start, std::int64_t length, std::int64_t part,
                                        std::int64_t parts) {
  return start + part * length / parts;
}

}  // namespace fastmask
