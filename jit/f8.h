#pragma once
#include <array>
#include <bit>
#include <cmath>
#include <cstdint>

#include "jit/f16.h"

namespace kiln {

/// e5m2 (OCP 8-bit Floating Point Specification 1.0): the high byte of a binary16, so with infinities. Exact.
inline float float_of_e5m2(std::uint8_t bits) {
  return float_of_f16(static_cast<std::uint16_t>(bits << 8));
}

/// e4m3 (same source): bias 7, no infinities, NaN is 0x7F and 0xFF, the largest value 448. Exact.
inline float float_of_e4m3(std::uint8_t bits) {
  const std::uint32_t sign = std::uint32_t{bits & 0x80u} << 24, magnitude = bits & 0x7Fu;
  if (magnitude == 0x7F)
    return std::bit_cast<float>(sign | 0x7FC00000u);
  // As a binary16: exponents are rebiased from 7 to 15 by a product, exact and right for denormals too.
  const float value = float_of_f16(static_cast<std::uint16_t>(magnitude << 7)) * 0x1p8f;
  return std::bit_cast<float>(std::bit_cast<std::uint32_t>(value) | sign);
}

/// All values of a type, by their bits.
template <float (*of)(std::uint8_t)> const std::array<float, 256>& f8_table() {
  static const std::array<float, 256> table = [] {
    std::array<float, 256> values;
    for (int bits = 0; bits < 256; ++bits)
      values[static_cast<std::size_t>(bits)] = of(static_cast<std::uint8_t>(bits));
    return values;
  }();
  return table;
}

} // namespace kiln
