#include "cache/key_file.h"

#include <fcntl.h>

#include <algorithm>

#include "tests/fuzz/fuzz.h"

/// The file with the secret that authenticates the cache.
namespace kiln::fuzz {
namespace {

bool accepts(ByteSpan input) {
  static const TemporaryDirectory directory;
  static const int file = ::open((directory.path() + "/cache.key").c_str(), O_RDWR | O_CREAT | O_CLOEXEC, 0600);
  expect(file >= 0, "a key file can be made");
  overwrite(file, input);
  const Result<Digest> key = read_key_file(directory.path(), false);
  expect(key.is_ok() == (input.size() == sizeof(Digest::bytes)), "a key has 32 bytes");
  if (!key) {
    expect_refusal(key.status(), Code::integrity);
    return false;
  }
  expect(std::equal(input.begin(), input.end(), key->bytes.begin()), "a key is what the file holds");
  return true;
}

std::vector<Seed> seeds() {
  return {accepted(std::string(32, 'k')), refused(std::string(31, 'k')), refused(std::string(33, 'k')), refused("")};
}

} // namespace
const Target target = {accepts, seeds};
} // namespace kiln::fuzz
