#include "cache/signing.h"

#include "tests/fuzz/fuzz.h"

/// Lists of public keys whose signatures count.
namespace kiln::fuzz {
namespace {

bool accepts(ByteSpan input) {
  static MemoryFile file;
  const std::string& path = file.with(input);
  const Result<TrustedKeys> keys = TrustedKeys::read(path, Ownership::any);
  if (!keys) {
    expect_refusal(keys.status(), Code::invalid_argument);
    expect(keys.status().message().starts_with(path + ":"), "a message begins with path and line");
    return false;
  }
  TrustedKeys again;
  std::string lines;
  for (const PublicKey& key : keys->keys) {
    expect(!again.contains(key), "each key is there once");
    again.add({{key}});
    lines += key.line() + "\n";
  }
  const Result<TrustedKeys> shown =
      TrustedKeys::read(file.with({reinterpret_cast<const std::uint8_t*>(lines.data()), lines.size()}), Ownership::any);
  expect(shown && shown->keys == keys->keys, "what is shown of keys is taken, and means the same");
  return true;
}

std::vector<Seed> seeds() {
  const std::string key = "ed25519 82c7069441bc9c62 K4u8nyXvtRwdJgzDCazESQPOsicZork+VyFyAtStY3Y=";
  return {accepted(key),
          accepted("# ours\n\n" + key + " of CI\r\n" + key),
          accepted(""),
          refused("ed25519 0000000000000000 K4u8nyXvtRwdJgzDCazESQPOsicZork+VyFyAtStY3Y="),
          refused("kiln-secret-key " + key),
          refused(key.substr(0, key.size() - 1)),
          refused("ed25519 82c7069441bc9c62 AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA=")};
}

} // namespace
const Target target = {accepts, seeds};
} // namespace kiln::fuzz
