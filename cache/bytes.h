#pragma once
#include <cstdint>
#include <cstring>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace kiln {

using Bytes = std::vector<std::uint8_t>;
using ByteSpan = std::span<const std::uint8_t>;

/// Appends little-endian integers and length-prefixed strings: the one serialised form in Kiln.
class Writer {
public:
  void u8(std::uint8_t v) { bytes_.push_back(v); }
  void u32(std::uint32_t v) { little_endian(v); }
  void u64(std::uint64_t v) { little_endian(v); }
  void i64(std::int64_t v) { little_endian(static_cast<std::uint64_t>(v)); }
  void string(std::string_view s) { blob({reinterpret_cast<const std::uint8_t*>(s.data()), s.size()}); }
  void blob(ByteSpan b) {
    u64(b.size());
    raw(b);
  }
  /// Without a length: the reader must know it.
  void raw(ByteSpan b) { bytes_.insert(bytes_.end(), b.begin(), b.end()); }
  const Bytes& bytes() const { return bytes_; }
  Bytes take() { return std::move(bytes_); }

private:
  template <class T> void little_endian(T v) {
    for (std::size_t i = 0; i < sizeof(T); ++i)
      bytes_.push_back(static_cast<std::uint8_t>(v >> (8 * i)));
  }
  Bytes bytes_;
};

/// Reads what Writer wrote. Distrusts its input: after any overrun `ok()` is false and every read gives zero or empty.
class Reader {
public:
  explicit Reader(ByteSpan bytes) : bytes_(bytes) {}
  std::uint8_t u8() { return little_endian<std::uint8_t>(); }
  std::uint32_t u32() { return little_endian<std::uint32_t>(); }
  std::uint64_t u64() { return little_endian<std::uint64_t>(); }
  std::int64_t i64() { return static_cast<std::int64_t>(u64()); }
  /// A view into the input; valid as long as the input is.
  ByteSpan blob() { return raw(u64()); }
  /// Likewise, of a length that the input does not tell; empty when it is not there.
  ByteSpan raw(std::uint64_t size) {
    if (!ok_ || size > bytes_.size()) {
      ok_ = false;
      return {};
    }
    const ByteSpan out = bytes_.first(static_cast<std::size_t>(size));
    bytes_ = bytes_.subspan(static_cast<std::size_t>(size));
    return out;
  }
  std::string string() {
    const ByteSpan b = blob();
    return {reinterpret_cast<const char*>(b.data()), b.size()};
  }
  bool ok() const { return ok_; }
  /// True when every byte was read and nothing was missing.
  bool finished() const { return ok_ && bytes_.empty(); }

private:
  template <class T> T little_endian() {
    if (!ok_ || bytes_.size() < sizeof(T)) {
      ok_ = false;
      return 0;
    }
    T v = 0;
    for (std::size_t i = 0; i < sizeof(T); ++i)
      v = static_cast<T>(v | (static_cast<T>(bytes_[i]) << (8 * i)));
    bytes_ = bytes_.subspan(sizeof(T));
    return v;
  }
  ByteSpan bytes_;
  bool ok_ = true;
};

} // namespace kiln
