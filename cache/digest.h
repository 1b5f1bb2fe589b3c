#pragma once
#include <array>
#include <compare>
#include <cstdint>
#include <optional>
#include <string>
#include <string_view>

#include "cache/bytes.h"

namespace kiln {

/// 32 bytes of BLAKE2b (RFC 7693), by libsodium's crypto_generichash.
struct Digest {
  std::array<std::uint8_t, 32> bytes{};
  auto operator<=>(const Digest&) const = default;

  std::string hex() const; ///< 64 lower-case digits
  static std::optional<Digest> from_hex(std::string_view text);
};

Digest digest_of(ByteSpan data);
/// Keyed BLAKE2b: a MAC over `data`.
Digest keyed_digest_of(const Digest& key, ByteSpan data);
/// Takes the same time wherever the two differ.
bool equal_in_constant_time(const Digest& a, const Digest& b);

} // namespace kiln
