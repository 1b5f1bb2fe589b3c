#pragma once
#include <cstdint>
#include <random>
#include <string_view>

namespace kiln::test {

/// The kinds of s8 inputs that every path is tested on.
enum class Values { random, all_lowest, all_highest, alternating };
inline constexpr Values kAllValues[] = {Values::random, Values::all_lowest, Values::all_highest, Values::alternating};

inline std::string_view name_of(Values values) {
  constexpr std::string_view names[] = {"random", "all -128", "all 127", "alternating"};
  return names[static_cast<int>(values)];
}

inline void fill(std::int8_t* data, std::int64_t count, Values values, std::mt19937& random) {
  for (std::int64_t i = 0; i < count; ++i)
    switch (values) {
    case Values::random:
      data[i] = static_cast<std::int8_t>(random());
      break;
    case Values::all_lowest:
      data[i] = -128;
      break;
    case Values::all_highest:
      data[i] = 127;
      break;
    case Values::alternating:
      data[i] = i % 2 == 0 ? -128 : 127;
      break;
    }
}

} // namespace kiln::test
