#include <fmt/format.h>

#include <algorithm>

#include "backends/nvidia/fp8_block_bmm.h"

namespace kiln::nvidia::fp8 {

std::int64_t Config::shared_bytes() const {
  const std::int64_t x_rows = swapped ? columns : rows();
  const std::int64_t stage = (rows() + columns) * 128 + (x_rows + y_chunks() + 3) / 4 * 16;
  return 1024 + stages * stage + (split > 1 ? std::int64_t{4} * rows() * columns : 0);
}

} // namespace kiln::nvidia::fp8
