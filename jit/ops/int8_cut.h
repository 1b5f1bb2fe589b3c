#pragma once
#include <algorithm>
#include <cstdint>

#include "jit/op.h"

/// How the drivers of int8_mm and int8_linear cut a call into ranges of rows and columns.
namespace kiln::int8_mm {

constexpr std::int64_t round_up(std::int64_t v, std::int64_t step) {
  return (v + step - 1) / step * step;
}

/// Part i of `parts` nearly equal parts of [0, size), cut at multiples of `step`.
struct Range {
  std::int64_t begin, end;
  std::int64_t size() const { return end - begin; }
};
inline Range part(std::int64_t size, std::int64_t step, std::int64_t parts, std::int64_t i) {
  if (parts == 1) // the usual case, without its divisions
    return {0, size};
  const std::int64_t units = (size + step - 1) / step;
  return {std::min(size, units * i / parts * step), std::min(size, units * (i + 1) / parts * step)};
}

/// A second thread pays when the call takes longer than a few times the pool's hand-over; rates are those of one recent
/// core.
inline bool worth_threads(std::int64_t m, std::int64_t n, std::int64_t k) {
  constexpr double kOperationsPerMicrosecond = 1e6, kBytesPerMicrosecond = 1e5, kFewestMicroseconds = 8;
  const double microseconds_per_weight =
      std::max(2 * static_cast<double>(m) / kOperationsPerMicrosecond, 1 / kBytesPerMicrosecond);
  return static_cast<double>(n) * static_cast<double>(k) * microseconds_per_weight > kFewestMicroseconds;
}

/// The most parts of m rows that all stay within a kernel's class.
inline std::int64_t most_row_parts(MRange served, std::int64_t m_step, std::int64_t m) {
  return std::max<std::int64_t>(1, m / (std::max<std::int64_t>(served.min, 1) + m_step));
}

/// Columns and rows of a call that has work for `threads`.
struct Parts {
  std::int64_t n = 1, m = 1;
};
inline Parts parts_for(int threads, std::int64_t m, std::int64_t most_m, std::int64_t n, std::int64_t n_step) {
  Parts parts;
  const std::int64_t most_n = std::min<std::int64_t>(threads, (n + n_step - 1) / n_step);
  most_m = std::min<std::int64_t>(threads, most_m);
  // What is not cut, every thread goes through: all of B, or all of A, which costs a row's bytes about three times
  // (read, converted, written to workspace).
  if (3 * m > n) {
    parts.m = most_m;
    parts.n = std::min(threads / parts.m, most_n);
  } else {
    parts.n = most_n;
    parts.m = std::min(threads / parts.n, most_m);
  }
  return parts;
}

} // namespace kiln::int8_mm
