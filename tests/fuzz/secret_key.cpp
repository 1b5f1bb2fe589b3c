#include <array>
#include <optional>
#include <sodium.h>

#include <fmt/format.h>

#include "cache/signing.h"
#include "tests/fuzz/fuzz.h"

/// Files with the secret key that signs bundles. The id in such a file is a digest of the public key, which no fuzzer
/// guesses: each input is tried as it is and with the id put right.
namespace kiln::fuzz {
namespace {

constexpr std::string_view kBegin = "kiln-secret-key ed25519 ";

/// `kiln-secret-key ed25519 ANYTHING BASE64…` gets the id of its key.
std::string with_id(std::string_view text) {
  const std::size_t after_id = text.starts_with(kBegin) ? text.find(' ', kBegin.size()) : std::string_view::npos;
  if (after_id == std::string_view::npos)
    return std::string(text);
  const std::string_view word = text.substr(after_id + 1, 44);
  std::array<std::uint8_t, crypto_sign_SEEDBYTES> seed{};
  std::array<std::uint8_t, crypto_sign_SECRETKEYBYTES> secret;
  std::size_t size = 0;
  if (sodium_base642bin(seed.data(), seed.size(), word.data(), word.size(), nullptr, &size, nullptr,
                        sodium_base64_VARIANT_ORIGINAL) != 0 ||
      size != seed.size())
    return std::string(text);
  PublicKey key;
  crypto_sign_seed_keypair(key.bytes.data(), secret.data(), seed.data());
  return std::string(kBegin) + key.id() + std::string(text.substr(after_id));
}

bool loads(std::string_view text) {
  static MemoryFile file;
  const std::string& path = file.with({reinterpret_cast<const std::uint8_t*>(text.data()), text.size()});
  const Result<SecretKey> key = SecretKey::load(path);
  if (!key) {
    expect_refusal(key.status(), Code::integrity);
    // Nothing of the file: it may be half a secret.
    const std::string_view said = key.status().message();
    expect(said == path + ": no secret key of `kiln cache keygen`" ||
               said == fmt::format("{}: has {} bytes; allowed are at most 1024", path, text.size()),
           "a message tells the path, or the size, and no more");
    return false;
  }
  const PublicKey shown = key->public_key();
  expect(text.find(shown.id()) != std::string_view::npos, "a key is loaded under its id");
  const std::array<std::uint8_t, 5> message = {1, 2, 3, 4, 5};
  expect(is_signed_by(shown, message, key->sign(message)), "what it signs can be verified");
  return true;
}

bool accepts(ByteSpan input) {
  const bool as_it_is = loads(text_of(input));
  return loads(with_id(text_of(input))) || as_it_is;
}

std::vector<Seed> seeds() {
  const std::string zeros = std::string(43, 'A') + "=";
  const std::string line = with_id(std::string(kBegin) + "id " + zeros);
  return {accepted(line),
          accepted(line + "\r\n\t "),
          accepted(with_id(std::string(kBegin) + "id " + std::string(42, '/') + "8=")),
          refused(std::string(kBegin) + "id " + zeros.substr(1)),
          refused(line + " more"),
          refused("ed25519 " + line.substr(kBegin.size())),
          refused(std::string(kBegin)),
          refused(std::string(1100, ' ')),
          refused("")};
}

} // namespace
const Target target = {accepts, seeds};
} // namespace kiln::fuzz
