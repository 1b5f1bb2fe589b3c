#pragma once
#include <array>
#include <cstdint>
#include <string>
#include <string_view>

#include "cache/status.h"

namespace kiln {

/// Values are those of the C API's `kiln_op`.
enum class OpId : std::uint8_t { none = 0, int8_mm = 1, int8_linear = 2, int4_mm = 3, fp8_block_bmm = 4, attention = 5 };

enum class DeviceKind : std::uint8_t { cpu, cuda };
struct Device {
  DeviceKind kind = DeviceKind::cpu;
  std::uint8_t index = 0;
  bool operator==(const Device&) const = default;
};

/// Stands for "any" in a size whose kernel takes the value at run time (`m=any`).
inline constexpr std::int64_t kAny = -1;

/// What to compute: a plain value. `value[i]` is field i of the op's field table (jit/op.h); those beyond it are 0.
struct KernelDesc {
  static constexpr int kMaxFields = 14;
  OpId op = OpId::none;
  Device device;
  std::array<std::int64_t, kMaxFields> value{};
  bool operator==(const KernelDesc&) const = default;

  /// `int8_mm m=16 n=4096 k=4096 a_dtype=s8 c_dtype=s32`: op, then every field of the table in order, device only when not cpu.
  /// Two descs are equal exactly when their texts are.
  std::string text() const;
  /// Over the whole value; not stable between versions. Inline: it is on the path of every get.
  std::uint64_t hash() const {
    std::uint64_t h = static_cast<std::uint64_t>(op) << 16 | static_cast<std::uint64_t>(device.kind) << 8 | device.index;
    for (const std::int64_t v : value)
      h = (h ^ static_cast<std::uint64_t>(v)) * 0x9E3779B97F4A7C15ull ^ (h >> 29);
    return h ^ (h >> 32);
  }
};

} // namespace kiln
