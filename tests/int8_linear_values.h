#pragma once
#include <bit>
#include <cstdint>
#include <random>
#include <string_view>

#include "jit/bf16.h"
#include "jit/f16.h"
#include "jit/ops/int8_linear.h"

namespace kiln::test {

/// The kinds of X that every path of int8_linear is tested on. `specials`: rows in turn plain, with a NaN, with an
/// infinity, all zero, denormal, with one huge value.
enum class XValues { plain, any_bits, ties, specials };
inline constexpr XValues kAllXValues[] = {XValues::plain, XValues::any_bits, XValues::ties, XValues::specials};

inline std::string_view name_of(XValues values) {
  constexpr std::string_view names[] = {"plain", "any bits", "ties", "specials"};
  return names[static_cast<int>(values)];
}

inline void put(int8_linear::Float type, void* x, std::int64_t index, float value) {
  switch (type) {
  case int8_linear::Float::bf16:
    static_cast<std::uint16_t*>(x)[index] = bf16_of_float(value);
    break;
  case int8_linear::Float::f16:
    static_cast<std::uint16_t*>(x)[index] = f16_of_float(value);
    break;
  case int8_linear::Float::f32:
    static_cast<float*>(x)[index] = value;
    break;
  }
}

/// [m][ldx], the gaps too.
inline void fill_x(int8_linear::Float type, void* x, std::int64_t m, std::int64_t k, std::int64_t ldx, XValues values,
                   std::mt19937& random) {
  const auto in_unit = [&] { return static_cast<float>(static_cast<std::int32_t>(random())) * 0x1p-31f; };
  for (std::int64_t i = 0; i < m; ++i) {
    const int kind = values == XValues::specials ? static_cast<int>(random() % 6) : 0;
    const std::int64_t special = k > 0 ? static_cast<std::int64_t>(random()) % k : 0;
    const float scale = std::ldexp(1.0f, static_cast<int>(random() % 40) - 20);
    for (std::int64_t p = 0; p < (i + 1 < m ? ldx : k); ++p) {
      const std::int64_t at = i * ldx + p;
      if (p >= k) { // nobody's business
        put(type, x, at, std::numeric_limits<float>::quiet_NaN());
        continue;
      }
      switch (values) {
      case XValues::any_bits:
        if (int8_linear::bytes_of(type) == 4)
          static_cast<float*>(x)[at] = std::bit_cast<float>(static_cast<std::uint32_t>(random()));
        else
          static_cast<std::uint16_t*>(x)[at] = static_cast<std::uint16_t>(random());
        break;
      case XValues::ties: // r = 1 where 127 occurs: halves are ties
        put(type, x, at, p == special ? -127.0f : static_cast<float>(static_cast<int>(random() % 253) - 126) * 0.5f);
        break;
      case XValues::plain:
      case XValues::specials:
        const bool here = p == special;
        switch (kind) {
        case 1:
          put(type, x, at, here ? std::numeric_limits<float>::quiet_NaN() : in_unit());
          break;
        case 2:
          put(type, x, at, here ? -std::numeric_limits<float>::infinity() : in_unit());
          break;
        case 3:
          put(type, x, at, random() % 2 ? 0.0f : -0.0f);
          break;
        case 4:
          put(type, x, at, in_unit() * (random() % 2 ? 0x1p-130f : 0x1p-24f) * scale);
          break;
        case 5:
          put(type, x, at, here ? 0x1p15f : in_unit());
          break;
        default:
          put(type, x, at, in_unit() * scale);
        }
        break;
      }
    }
  }
}

/// ws or a bias: plain values, and some that are zero, denormal, huge, infinite or NaN.
inline void fill_floats(float* out, std::int64_t count, bool specials, std::mt19937& random) {
  constexpr std::uint32_t kSpecials[] = {0,          0x80000000, 1,          0x807FFFFF, 0x7F7FFFFF,
                                         0x7F800000, 0xFF800000, 0x7FC12345, 0xFF812345, 0x00800000};
  for (std::int64_t i = 0; i < count; ++i) {
    out[i] = static_cast<float>(static_cast<std::int32_t>(random())) * 0x1p-36f;
    if (specials && random() % 4 == 0)
      out[i] = std::bit_cast<float>(kSpecials[random() % std::size(kSpecials)]);
  }
}

} // namespace kiln::test
