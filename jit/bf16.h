#pragma once
#include <bit>
#include <cmath>
#include <cstdint>

namespace kiln {

/// bfloat16 as its bits: the high half of a float32. Denormals are kept.
inline float float_of_bf16(std::uint16_t bits) {
  return std::bit_cast<float>(static_cast<std::uint32_t>(bits) << 16);
}

/// Rounded to nearest even; beyond the range ±infinity; a NaN is 0x7FC0.
inline std::uint16_t bf16_of_float(float value) {
  if (std::isnan(value))
    return 0x7FC0;
  const std::uint32_t bits = std::bit_cast<std::uint32_t>(value);
  return static_cast<std::uint16_t>((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16);
}

/// Rounded once: through a float rounded to odd, whose last bit tells bf16's rounding that something followed.
inline std::uint16_t bf16_of_double(double value) {
  float toward_zero = static_cast<float>(value);
  if (std::isnan(value) || std::isinf(toward_zero))
    return bf16_of_float(toward_zero);
  if (std::fabs(static_cast<double>(toward_zero)) > std::fabs(value))
    toward_zero = std::nextafterf(toward_zero, 0.0f);
  std::uint32_t bits = std::bit_cast<std::uint32_t>(toward_zero);
  if (static_cast<double>(toward_zero) != value)
    bits |= 1;
  return bf16_of_float(std::bit_cast<float>(bits));
}

} // namespace kiln
