#pragma once
#include <algorithm>
#include <cstdint>

#include "jit/ops/int8_mm.h"

/// What generators of int8_mm kernels for CPUs share. In a header, whose text is part of every generator's id.
namespace kiln::int8_mm {

/// Heights of the row tiles that serve a class of m, in units of `unit_rows` rows: the units of m rows become
/// ⌈units / max⌉ tiles whose heights differ by at most one, so that no row is computed in vain and no tile is much
/// lower than its neighbours.
struct Heights {
  int min = 1, max = 1;
  bool single_tile = true; ///< every m of the class is one tile
};
inline Heights heights_for(std::int64_t m_class, int unit_rows, int max_height) {
  std::int64_t first = 1;
  for (const std::int64_t bound : kMClasses) {
    if (bound == m_class)
      break;
    first = bound + 1;
  }
  const auto units = [&](std::int64_t rows) { return (rows + unit_rows - 1) / unit_rows; };
  // The lowest tile of an unbounded class occurs within one period of the split from its first m.
  const std::int64_t last = m_class == kAny ? units(first) + max_height * max_height : units(m_class);
  Heights heights{max_height, 1, true};
  for (std::int64_t u = units(first); u <= last; ++u) {
    const std::int64_t tiles = (u + max_height - 1) / max_height;
    heights.min = static_cast<int>(std::min<std::int64_t>(heights.min, u / tiles));
    heights.max = static_cast<int>(std::max<std::int64_t>(heights.max, (u + tiles - 1) / tiles));
    heights.single_tile = heights.single_tile && tiles == 1;
  }
  return heights;
}

} // namespace kiln::int8_mm
