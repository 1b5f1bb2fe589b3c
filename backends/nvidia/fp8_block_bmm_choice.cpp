#include <fmt/format.h>

#include <algorithm>

#include "backends/nvidia/fp8_block_bmm.h"

namespace kiln::nvidia::fp8 {

std::int64_t Config::shared_bytes() const {
  const std::int64_t scales = (x_scales() + y_chunks() + 3) / 4 * 16 * (copying_warp ? 1 : 4 * warpgroups);
  const std::int64_t stage = (rows() + columns) * 128 + scales;
  return 1024 + stages * stage + (split > 1 ? split * rank_units() * 64 * warpgroups * (swapped ? 32 : 64) : 0);
}

} // namespace kiln::nvidia::fp8
