#pragma once
#include <array>
#include <compare>
#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "cache/bytes.h"
#include "cache/status.h"
#include "cache/trusted_file.h"

namespace kiln {

/// Ed25519 (RFC 8032) by libsodium's crypto_sign. Nothing here aborts or needs sodium_init.

using Signature = std::array<std::uint8_t, 64>;

struct PublicKey {
  std::array<std::uint8_t, 32> bytes{};
  auto operator<=>(const PublicKey&) const = default;

  /// The first 8 bytes of its BLAKE2b digest as 16 hexadecimal digits: a name for people, never what is compared.
  std::string id() const;
  /// `ed25519 ID BASE64`, as a list of trusted keys has it.
  std::string line() const;
  /// Of such a line; what follows the key is a comment. Code::invalid_argument says what is wrong with it: the id must
  /// be that of the key, and the key a point of the curve's prime-order group.
  static Result<PublicKey> parse(std::string_view line);
};

/// Whether the holder of the secret key made the signature over exactly this message.
bool is_signed_by(const PublicKey& key, ByteSpan message, const Signature& signature);

/// Overwritten in memory when it goes.
class SecretKey {
public:
  /// A new one, from the system's random bytes.
  static Result<SecretKey> generate();
  /// Code::io when others may read or write the file (see Ownership::secret), Code::integrity when it is no key.
  static Result<SecretKey> load(const std::string& path);
  SecretKey(SecretKey&& other) noexcept;
  SecretKey& operator=(SecretKey&&) = delete;
  ~SecretKey();

  /// A new file of mode 0600. Code::io when there is a file already, whatever it is: no key is ever overwritten.
  Status save(const std::string& path) const;
  PublicKey public_key() const;
  /// Deterministic: the same message gives the same signature.
  Signature sign(ByteSpan message) const;

private:
  SecretKey() = default;
  static SecretKey from_seed(std::span<const std::uint8_t, 32> seed);
  std::array<std::uint8_t, 64> bytes_{}; ///< libsodium's form: the seed, then the public key
};

/// Whose signatures count.
struct TrustedKeys {
  std::vector<PublicKey> keys;
  bool contains(const PublicKey& key) const;

  void add(const TrustedKeys& more); ///< each once

  /// One key a line; empty lines and those that begin with # are comments. Code::invalid_argument names file and line,
  /// Code::not_found, and Code::io when others may have written the file. With Ownership::file it may also be a
  /// directory: then the keys of its files NAME.pub.
  static Result<TrustedKeys> read(const std::string& file, Ownership ownership);
};

} // namespace kiln
