#include <algorithm>
#include <optional>
#include <set>
#include <sodium.h>

#include "cache/signing.h"
#include "tests/fuzz/fuzz.h"

/// Lists of trusted keys. The id of a key is a digest of it, which no fuzzer guesses: each input is tried as it is and
/// with the ids put right.
namespace kiln::fuzz {
namespace {

/// Lines, each with what ends it.
std::vector<std::string_view> lines_of(std::string_view text) {
  std::vector<std::string_view> lines;
  while (!text.empty()) {
    const std::size_t end = std::min(text.find('\n'), text.size() - 1) + 1;
    lines.push_back(text.substr(0, end));
    text.remove_prefix(end);
  }
  return lines;
}

std::optional<PublicKey> key_in(std::string_view word) {
  PublicKey key;
  std::size_t size = 0;
  const bool is_key = sodium_base642bin(key.bytes.data(), key.bytes.size(), word.data(), word.size(), nullptr, &size,
                                        nullptr, sodium_base64_VARIANT_ORIGINAL) == 0 &&
                      size == key.bytes.size();
  return is_key ? std::optional(key) : std::nullopt;
}

/// `ed25519 ANYTHING BASE64…` gets the id of its key.
std::string with_ids(std::string_view text) {
  constexpr std::string_view begin = "ed25519 ";
  std::string out;
  for (const std::string_view line : lines_of(text)) {
    const std::size_t after_id = line.find(' ', begin.size());
    const std::optional<PublicKey> key = line.starts_with(begin) && after_id != std::string_view::npos
                                             ? key_in(line.substr(after_id + 1, 44))
                                             : std::nullopt;
    out += key ? std::string(begin) + key->id() + std::string(line.substr(after_id)) : std::string(line);
  }
  return out;
}

bool reads(std::string_view text) {
  static MemoryFile file;
  const std::string& path = file.with({reinterpret_cast<const std::uint8_t*>(text.data()), text.size()});
  const Result<TrustedKeys> keys = TrustedKeys::read(path, Ownership::file);
  if (!keys) {
    expect_refusal(keys.status(), Code::invalid_argument);
    expect(keys.status().message().starts_with(path + ":"), "a message begins with the path");
    return false;
  }
  std::set<PublicKey> each_once;
  for (const PublicKey& key : keys->keys) {
    expect(each_once.insert(key).second, "each key is there once");
    expect(keys->contains(key), "a key of the list is trusted");
    expect(crypto_core_ed25519_is_valid_point(key.bytes.data()) == 1, "a key is a point of the prime-order group");
    expect(text.find(key.id()) != std::string_view::npos, "a key is trusted under its id");
    const Result<PublicKey> again = PublicKey::parse(key.line());
    expect(again && *again == key, "a key's line is that key");
  }
  expect(static_cast<std::size_t>(std::count(text.begin(), text.end(), '\n')) + 1 >= keys->keys.size(),
         "a line has one key");
  return true;
}

bool accepts(ByteSpan input) {
  const bool as_it_is = reads(text_of(input));
  return reads(with_ids(text_of(input))) || as_it_is;
}

std::vector<Seed> seeds() {
  const std::string a = SecretKey::generate()->public_key().line(), b = SecretKey::generate()->public_key().line();
  std::string wrong = a;
  wrong.back() = '!';
  PublicKey neutral; // a point of order 1: signatures under it fit any message
  neutral.bytes[0] = 1;
  return {accepted(""),
          accepted("# nobody\n\n  \t\r\n"),
          accepted(a),
          accepted(a + "\n" + b + " of the build machine\r\n# and\n" + a + "\n"),
          accepted("\t" + a + "\n"),
          refused(wrong),
          refused(neutral.line()),
          refused("ed25519"),
          refused("kiln-secret-key " + a),
          refused("rsa" + a.substr(7)),
          refused(a.substr(0, a.size() - 1))};
}

} // namespace
const Target target = {accepts, seeds};
} // namespace kiln::fuzz
