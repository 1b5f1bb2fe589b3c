#include "cache/key_file.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>

#include "cache/file.h"
#include "tests/fuzz/fuzz.h"

/// The file with the secret that authenticates the cache.
namespace kiln::fuzz {
namespace {

bool accepts(ByteSpan input) {
  static const int file = [] {
    ::mkdir("keys", 0700);
    return ::open("keys/cache.key", O_RDWR | O_CREAT | O_CLOEXEC, 0600);
  }();
  expect(file >= 0 && ::ftruncate(file, 0) == 0 && ::lseek(file, 0, SEEK_SET) == 0 && write_all(file, input),
         "the key file can be written");
  const Result<Digest> key = read_key_file("keys", false);
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
