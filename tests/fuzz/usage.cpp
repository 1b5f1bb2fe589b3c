#include "cache/usage.h"

#include <fcntl.h>

#include <algorithm>

#include "cache/file.h"
#include "tests/fuzz/fuzz.h"

/// The usage file of a cache, each input as it is and with the digest of its header put right.
namespace kiln::fuzz {
namespace {

constexpr std::size_t kHeaderBytes = 1024, kDigestBytes = 16;
/// With the smallest number of buckets.
constexpr std::size_t kFewestBytes = kHeaderBytes + 16 * 64;

Bytes with_digest(ByteSpan input) {
  Bytes file(input.begin(), input.end());
  if (file.size() < kHeaderBytes)
    return file;
  const Digest digest = digest_of(ByteSpan(file).first(kHeaderBytes - kDigestBytes));
  std::copy_n(digest.bytes.begin(), kDigestBytes, file.begin() + (kHeaderBytes - kDigestBytes));
  return file;
}

const std::string& directory() {
  static const TemporaryDirectory directory;
  return directory.path();
}

/// Of a bucket of its own, and one of three kernels.
Digest key_of(std::uint8_t number) {
  Digest key;
  key.bytes[0] = number;
  key.bytes[5] = number % 3;
  return key;
}

bool reads(ByteSpan input) {
  static const int content = ::open((directory() + "/kernels.usage").c_str(), O_RDWR | O_CREAT | O_CLOEXEC, 0600);
  expect(content >= 0, "a usage file can be made");
  overwrite(content, input);
  constexpr double now = 1.8e9;
  UsageFile file(directory(), 1 << 20);
  const Result<UsageFile::Totals> before = file.totals();
  const bool has_all_slots =
      input.size() >= kFewestBytes && Reader(input.subspan(8)).u32() == (kFewestBytes - kHeaderBytes) / 64;
  Digest key;
  for (std::uint8_t i = 0; i < 8; ++i) {
    key = key_of(i);
    if (const std::optional<UsageFile::Trace> trace = file.trace(key))
      expect(trace->hits >= 0 && trace->at > 0 && trace->event <= UsageFile::Event::removed, "a trace is one");
    file.note_hit(key, now);
    const std::optional<UsageFile::Trace> noted = file.trace(key);
    expect(before.is_ok() || !noted, "a damaged file remembers nothing");
    expect(noted || !before || !has_all_slots, "a sound file remembers");
    expect(!noted || (noted->event == UsageFile::Event::used && noted->hits > 0), "a use is remembered");
  }
  const Status added = file.add({.memory_hits = 3, .errors = 1}, now);
  expect(added.is_ok(), "a damaged file begins anew");
  const Result<UsageFile::Totals> after = file.totals();
  expect(after.is_ok(), "what was added can be read");
  UsageCounts sum = before ? before->counts : UsageCounts();
  sum += {.memory_hits = 3, .errors = 1};
  expect(after->counts == sum, "sums are added to");
  file.note(key, UsageFile::Event::evicted, now);
  expect(file.trace(key) && file.trace(key)->event == UsageFile::Event::evicted, "the last event is remembered");
  const std::int64_t bytes = file.fitted_bytes();
  expect(bytes <= (1 << 20) + static_cast<std::int64_t>(kHeaderBytes), "a usage file is of bounded size");
  return before.is_ok();
}

bool accepts(ByteSpan input) {
  const bool as_it_is = reads(input);
  return reads(with_digest(input)) || as_it_is;
}

std::vector<Seed> seeds() {
  const TemporaryDirectory fresh;
  UsageFile file(fresh.path(), 1);
  const Status made = file.add({.disk_hits = 5}, 1.7e9);
  expect(made.is_ok(), "a usage file can be made");
  for (std::uint8_t i = 0; i < 8; ++i)
    file.note_hit(key_of(i), 1.7e9);
  const Bytes sound = *read_file(fresh.path() + "/kernels.usage");
  Bytes other = sound;
  other[0] ^= 1;
  return {{sound, true},
          {Bytes(sound.begin(), sound.begin() + 1024), true},
          {other, false},
          {Bytes(3000), false},
          refused("")};
}

} // namespace
const Target target = {accepts, seeds};
} // namespace kiln::fuzz
