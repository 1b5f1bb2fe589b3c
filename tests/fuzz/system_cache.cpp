#include "cache/system_cache.h"

#include <fcntl.h>

#include <optional>
#include <set>

#include "cache/file.h"
#include "cache/log.h"
#include "tests/fuzz/bundle_bytes.h"

/// The system cache: what a process does with a bundle that lies there, each input as it is and signed by the trusted
/// key.
namespace kiln::fuzz {
namespace {

struct Place {
  Place()
      : log(
            LogLevel::warn, [](void* self, LogLevel, const char*) { ++static_cast<Place*>(self)->warnings; }, this) {
    Result<SecretKey> made = SecretKey::generate();
    expect(made.is_ok(), "there are random bytes");
    key.emplace(std::move(*made));
    const std::string line = key->public_key().line();
    overwrite(open("trusted.keys"), {reinterpret_cast<const std::uint8_t*>(line.data()), line.size()});
    bundle = open("kernels.bundle");
  }
  int open(const char* name) const {
    const int file = ::open((directory.path() + "/" + name).c_str(), O_RDWR | O_CREAT | O_CLOEXEC, 0600);
    expect(file >= 0, "a file can be made");
    return file;
  }
  TemporaryDirectory directory; ///< below ones that the superuser guards
  std::optional<SecretKey> key;
  int bundle = -1;
  int warnings = 0;
  Log log;
};

bool serves(Place& place, ByteSpan input, bool is_signed) {
  overwrite(place.bundle, input); // each cache opens it anew
  place.warnings = 0;
  SystemCache cache(place.directory.path(), place.directory.path() + "/trusted.keys", place.log);
  // The keys of the first entries, wherever they may be.
  std::set<Digest> keys = {Digest()};
  for (std::size_t at = kHeaderBytes; at + kIndexEntryBytes <= input.size() && keys.size() < 4;
       at += kIndexEntryBytes) {
    Digest key;
    std::copy_n(input.begin() + static_cast<std::ptrdiff_t>(at), 32, key.bytes.begin());
    keys.insert(key);
  }
  std::int64_t hits = 0;
  for (const Digest& key : keys)
    if (const std::optional<StoreRow> row = cache.get(key)) {
      ++hits;
      expect(row->key == key, "a row has the key that was asked for");
    }
  const SystemCache::Stats stats = cache.stats();
  expect(stats.hits == hits && stats.hits + stats.misses == std::ssize(keys), "every get is counted once");
  expect(place.warnings <= 1 + stats.refused, "one warning for each cause");
  const Result<SystemCache::Contents> contents = cache.contents(true);
  if (!contents) {
    expect_refusal(contents.status(),
                   contents.status().code() == Code::unsupported ? Code::unsupported : Code::integrity);
    expect(hits == 0, "what is not used serves nothing");
    return false;
  }
  expect(is_signed, "only what a trusted key signed is used");
  expect(contents->bad >= stats.refused && contents->kernels >= contents->bad, "contents tells what is bad");
  return contents->bad == 0;
}

bool accepts(ByteSpan input) {
  static Place place;
  serves(place, input, false);
  return serves(place, resealed(bundle_in(input), *place.key), true);
}

std::vector<Seed> seeds() {
  const Result<SecretKey> other = SecretKey::generate();
  const Bytes one = *make_bundle(std::vector{row_of(1, 64)}, &*other);
  const Bytes three = *make_bundle(std::vector{row_of(1, 64), row_of(2, 0), row_of(7, 500)}, &*other);
  Bytes cut = three;
  cut.pop_back();
  Bytes frame = one;
  frame[frame.size() - 20] ^= 1;
  return {{one, true}, {three, true}, {plain(row_of(5, 20)), true}, {cut, false}, {frame, false}};
}

} // namespace
const Target target = {.accepts = accepts, .seeds = seeds, .largest_allocation_mb = 80}; // an entry may have 64 MiB
} // namespace kiln::fuzz
