#pragma once
#include <algorithm>
#include <cstddef>
#include <cstring>
#include <string_view>

#include <fmt/format.h>

#include "cache/status.h"

namespace kiln {

/// A struct that a caller filled, by the header's growth rule: a smaller one is taken with its missing tail as zero, a
/// larger one only when the tail that this version does not know is zero. `least`: the bytes without which it means
/// nothing. `out` is the caller's own struct when its size is ours, else `copy`.
template <class T>
Status read_sized(std::string_view what, const void* given, std::size_t size, std::size_t least, T& copy,
                  const T*& out) {
  if (size == sizeof(T)) {
    out = static_cast<const T*>(given);
    return {};
  }
  if (size < least)
    return Status::error(
        Code::invalid_argument,
        fmt::format("{}.size is {}: allowed is {} or more; set it with its _INIT macro", what, size, least));
  const auto* const bytes = static_cast<const unsigned char*>(given);
  constexpr std::size_t kMost = 1 << 16; // no struct of any version is larger: a size beyond it is not one
  if (size > kMost)
    return Status::error(Code::invalid_argument,
                         fmt::format("{}.size is {}: allowed is at most {}", what, size, kMost));
  for (std::size_t i = sizeof(T); i < size; ++i)
    if (bytes[i] != 0)
      return Status::error(
          Code::invalid_argument,
          fmt::format("{} has a field at byte {} that this version ({} bytes) does not know: allowed there is 0", what,
                      i, sizeof(T)));
  std::memset(&copy, 0, sizeof(T));
  std::memcpy(&copy, given, std::min(size, sizeof(T)));
  out = &copy;
  return {};
}

/// Whether write_sized would take a caller's struct: for calls that work long before they fill it.
template <class T> Status check_sized(std::string_view what, const T* out) {
  if (out == nullptr)
    return Status::error(Code::invalid_argument,
                         fmt::format("{} is null: allowed is a struct of {} bytes", what, sizeof(T)));
  const std::size_t size = out->size;
  if (size < sizeof(std::size_t) || size > (1 << 16))
    return Status::error(Code::invalid_argument, fmt::format("{}.size is {}: set it with its _INIT macro", what, size));
  return {};
}

/// Fills as much of a caller's struct as it has room for; its size field stays the caller's.
template <class T> Status write_sized(std::string_view what, T value, T* out) {
  if (Status s = check_sized(what, out); !s)
    return s;
  value.size = out->size;
  std::memcpy(out, &value, std::min(out->size, sizeof(T)));
  return {};
}

} // namespace kiln
