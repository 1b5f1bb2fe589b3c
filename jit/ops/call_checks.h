#pragma once
#include <cstdint>
#include <string>
#include <string_view>

#include <fmt/format.h>

#include "cache/status.h"
#include "jit/kernel.h"

/// What the drivers of all ops check of a call. Each message names the op, the argument, its value and what is allowed.
namespace kiln {

/// What is said of an argument of one op: `constexpr BadArgument bad{"int8_mm"}` in its driver.
struct BadArgument {
  std::string_view op;
  Status operator()(std::string_view argument, std::string_view given, std::string_view allowed) const {
    return Status::error(Code::invalid_argument,
                         fmt::format("{}: {} is {}: allowed is {}", op, argument, given, allowed));
  }
  Status operator()(std::string_view argument, std::int64_t given, std::string_view allowed) const {
    return (*this)(argument, std::to_string(given), allowed);
  }
};

/// Of the kernel's class, and a size at all: what a driver computes from m then stays within an int64.
inline Status check_m(const Kernel& kernel, std::int64_t m, std::string_view rows = "rows") {
  const MRange range = kernel.m_range();
  if (m == 0 || (m >= range.min && m <= range.max))
    return {};
  return BadArgument{kernel.op().name}(
      "m", std::to_string(m),
      fmt::format("{} to {}, the {} that this kernel serves (or 0)", range.min, range.max, rows));
}

/// `alignment`: of the elements, in bytes. Null is aligned.
inline Status check_aligned(const BadArgument& bad, std::string_view name, const void* data, std::int64_t alignment) {
  if (reinterpret_cast<std::uintptr_t>(data) % static_cast<std::uintptr_t>(alignment) != 0)
    return bad(name, fmt::format("{}", data), fmt::format("an address that is a multiple of {}", alignment));
  return {};
}

inline Status check_threads(const Kernel& kernel, int threads) {
  return threads >= 0 ? Status() : BadArgument{kernel.op().name}("threads", std::to_string(threads), "0 or more");
}

/// Of a workspace in host memory that the caller gives.
inline Status check_workspace(const Kernel& kernel, const void* workspace, std::uint64_t given, std::int64_t needed) {
  constexpr std::uintptr_t kAlignment = 64;
  const BadArgument bad{kernel.op().name};
  if (reinterpret_cast<std::uintptr_t>(workspace) % kAlignment != 0)
    return bad("workspace", fmt::format("{}", workspace), "64-byte aligned memory");
  if (given < static_cast<std::uint64_t>(needed))
    return bad("workspace_bytes", std::to_string(given), fmt::format("{} or more", needed));
  return {};
}

} // namespace kiln
