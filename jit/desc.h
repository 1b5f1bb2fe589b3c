#pragma once
#include <array>
#include <cstdint>
#include <string>
#include <string_view>

#include "cache/status.h"

namespace kiln {

/// Values are those of the C API's `kiln_op`.
enum class OpId : std::uint8_t {
  none = 0,
  int8_mm = 1,
  int8_linear = 2,
  int4_mm = 3,
  fp8_block_bmm = 4,
  attention = 5
};

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
  static constexpr int kMaxFields = 16;
  OpId op = OpId::none;
  Device device;
  std::array<std::int64_t, kMaxFields> value{};
  bool operator==(const KernelDesc&) const = default;

  /// `int8_mm m=16 n=4096 k=4096 a_dtype=s8 c_dtype=s32`: op, then every field of the table in order, device only when
  /// not cpu. Two descs are equal exactly when their texts are.
  std::string text() const;
  /// Over the whole value; not stable between versions. On the path of every get: the products do not wait for one
  /// another.
  std::uint64_t hash() const {
    std::uint64_t sum =
        static_cast<std::uint64_t>(op) << 16 | static_cast<std::uint64_t>(device.kind) << 8 | device.index;
    std::uint64_t odd =
        0x9E3779B97F4A7C15ull; // 2^64 / golden ratio, stepped by twice that to another odd number per field
    for (const std::int64_t v : value) {
      sum += (static_cast<std::uint64_t>(v) ^ (static_cast<std::uint64_t>(v) >> 32)) * odd;
      odd += 0x3C6EF372FE94F82Aull;
    }
    sum *= 0xD6E8FEB86659FD93ull;
    return sum ^ (sum >> 32);
  }
};

} // namespace kiln
