#pragma once
#include <bit>
#include <cmath>
#include <cstdint>

namespace kiln {

/// IEEE 754 binary16 as its bits. Exact; denormals are kept.
inline float float_of_f16(std::uint16_t bits) {
  const std::uint32_t sign = std::uint32_t{bits & 0x8000u} << 16, magnitude = bits & 0x7FFFu;
  if (magnitude >= 0x7C00) // infinity, or a NaN that keeps its payload
    return std::bit_cast<float>(sign | 0x7F800000u | (magnitude & 0x3FFu) << 13);
  // Exponents are rebiased from 15 to 127 by a product: exact, and right for denormals too.
  const float value = std::bit_cast<float>(magnitude << 13) * 0x1p112f;
  return std::bit_cast<float>(std::bit_cast<std::uint32_t>(value) | sign);
}

/// Rounded to nearest even; beyond the range ±infinity; a NaN is 0x7E00. Needs the default rounding mode.
inline std::uint16_t f16_of_float(float value) {
  if (std::isnan(value))
    return 0x7E00;
  const std::uint32_t bits = std::bit_cast<std::uint32_t>(value);
  const std::uint16_t sign = static_cast<std::uint16_t>((bits & 0x80000000u) >> 16);
  const std::uint32_t magnitude = bits & 0x7FFFFFFFu;
  if (magnitude >= 0x47800000u) // 2^16 and more
    return sign | 0x7C00;
  if (magnitude < 0x38800000u) { // below 2^-14: a multiple of 2^-24, which the sum with 0.5 rounds to
    const float sum = std::bit_cast<float>(magnitude) + 0.5f;
    return static_cast<std::uint16_t>(sign | (std::bit_cast<std::uint32_t>(sum) - 0x3F000000u));
  }
  // May carry into the exponent, up to infinity's.
  const std::uint32_t rounded = magnitude + 0xFFF + ((magnitude >> 13) & 1) - ((127u - 15u) << 23);
  return static_cast<std::uint16_t>(sign | rounded >> 13);
}

} // namespace kiln
