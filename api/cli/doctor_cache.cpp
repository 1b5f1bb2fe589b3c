#include <sys/statvfs.h>

#include <algorithm>
#include <chrono>
#include <filesystem>

#include <fmt/format.h>

#include "api/cli/doctor.h"
#include "api/cli/output.h"
#include "cache/generations.h"
#include "cache/key_file.h"
#include "cache/signing.h"
#include "cache/trusted_directory.h"
#include "jit/os.h"

namespace kiln::cli {
namespace {

Result<TrustedDirectory> open_directory(const std::string& path) {
  return TrustedDirectory::open(path, TrustedDirectory::Owner::user, TrustedDirectory::Missing::leave);
}

/// Every directory above counts: the message of a bad one names it and what mends it.
void check_directories(Report& report, const Config& config) {
  const Result<TrustedDirectory> cache = open_directory(config.cache_dir);
  if (cache)
    report.ok("cache directory",
              fmt::format("{}: nobody else can write there, or put another in its place", cache->path()));
  else if (cache.status().code() == Code::not_found)
    report.ok("cache directory", fmt::format("{} (will be made)", config.cache_dir));
  else
    report.fail("cache directory", cache.status().message());

  const Result<Digest> key = read_key_file(config.key_dir, false);
  if (key)
    report.ok("cache key", fmt::format("in {}, closed to others", config.key_dir));
  else if (key.status().code() == Code::not_found)
    report.ok("cache key", fmt::format("in {} (will be made)", config.key_dir));
  else
    report.fail("cache key", key.status().message());
}

void check_file_system(Report& report, const Config& config) {
  const os::FileSystem file_system = os::file_system_of(config.cache_dir);
  const std::string at = fmt::format("{} at {}", file_system.name, config.cache_dir);
  if (file_system.over_network) // only where none of this machine's serves
    report.fail("file system",
                fmt::format("{}: shared between machines; set KILN_CACHE_DIR to a directory of this one", at));
  else if (file_system.read_only)
    report.warn("file system", fmt::format("{}: read-only; what is stored serves, and nothing is added", at));
  else if (file_system.in_memory)
    report.warn("file system",
                fmt::format("{}: the cache is gone after a restart; KILN_CACHE_DIR names another place", at));
  else
    report.ok("file system", at);
}

void check_room(Report& report, const Config& config) {
  // SQLite's journal needs room beside the database.
  constexpr std::int64_t least_free_bytes = 16 << 20;
  std::filesystem::path place = config.cache_dir;
  std::error_code error;
  while (!std::filesystem::exists(place, error) && place.has_relative_path())
    place = place.parent_path();
  struct statvfs info;
  if (::statvfs(place.c_str(), &info) != 0)
    return report.fail("free space", fmt::format("{}: the system does not tell", place.string()));
  const auto available = static_cast<std::int64_t>(
      std::min<unsigned long long>(static_cast<unsigned long long>(info.f_bavail) * info.f_frsize, INT64_MAX));
  if (available < least_free_bytes)
    report.fail("free space", fmt::format("{}: needed are {}", bytes_text(available), bytes_text(least_free_bytes)));
  else if (info.f_files > 0 && info.f_favail == 0)
    report.fail("free space",
                fmt::format("no file can be made at {}: its file system is out of inodes", place.string()));
  else if (available >> 20 < config.cache_max_mb)
    report.warn("free space",
                fmt::format("{}, less than KILN_CACHE_MAX_MB={}", bytes_text(available), config.cache_max_mb));
  else
    report.ok("free space", bytes_text(available));
}

/// Whose bundles this user takes.
void check_trusted_keys(Report& report, const Config& config) {
  if (config.trusted_keys.empty())
    return;
  const Result<TrustedKeys> keys = TrustedKeys::read(config.trusted_keys, Ownership::path);
  if (keys)
    report.ok("trusted keys", fmt::format("{} in {}", count_text(std::ssize(keys->keys), "key"), config.trusted_keys));
  else if (keys.status().code() == Code::not_found)
    report.ok("trusted keys", fmt::format("none: {} does not exist, so no bundle is taken unless its key is named",
                                          config.trusted_keys));
  else
    report.fail("trusted keys", keys.status().message());
}

} // namespace

void check_places(Report& report, const Config& config) {
  if (!config.cache_dir.empty() && !config.key_dir.empty() && !config.cache_unwanted) {
    check_directories(report, config);
    check_file_system(report, config);
    check_room(report, config);
  }
  check_trusted_keys(report, config);
}

void check_locks(Report& report, const Config& config) {
  if (config.cache == CacheMode::off)
    return;
  if (config.cache == CacheMode::read_only)
    return report.ok("locks", "only SQLite's (KILN_CACHE=ro)");
  Result<TrustedDirectory> directory = open_directory(config.cache_dir);
  const Status status = directory ? Generations(std::move(*directory)).check_locks() : directory.status();
  if (status)
    report.ok("locks", "what one holds keeps another out");
  else if (status.code() == Code::not_found)
    report.warn("locks", "not tried, as nothing could be stored");
  else
    report.fail("locks", fmt::format("{}: processes do not wait for each other's compiles; set KILN_CACHE_DIR to a "
                                     "directory where locks hold",
                                     status.message()));
}

void check_stored(Report& report, Store& store) {
  const Result<Store::Verified> verified = store.verify(false);
  if (!verified)
    return report.fail("stored kernels", verified.status().message());
  if (verified->bad > 0)
    return report.fail("stored kernels", fmt::format("{} of {} fail authentication: `kiln cache verify` removes them",
                                                     verified->bad, verified->ok + verified->bad));
  report.ok("stored kernels", fmt::format("{}, all authentic", verified->ok));

  // A clock that was ahead makes its kernels the last to go.
  constexpr std::int64_t tolerance_s = 60;
  const std::int64_t now = std::chrono::system_clock::to_time_t(std::chrono::system_clock::now());
  std::int64_t newest = 0;
  if (const Result<std::vector<Store::Listed>> rows = store.list())
    for (const Store::Listed& listed : *rows)
      newest = std::max({newest, listed.row.created_at, listed.row.last_hit_at});
  if (newest > now + tolerance_s)
    report.warn("clock", fmt::format("{} is before the last use of a stored kernel, {}: such kernels go last when the "
                                     "cache is full; set the clock, or `kiln cache clear`",
                                     local_time_text(now), local_time_text(newest)));
}

void check_system_cache(Report& report, const SystemCache& system) {
  const Result<SystemCache::Contents> contents = system.contents(true);
  if (!contents)
    return report.add(contents.status().code() == Code::not_found ? Report::State::warn : Report::State::fail,
                      "system cache", contents.status().message());
  if (contents->bad > 0)
    return report.fail("system cache", fmt::format("{} of {} in {} fail authentication", contents->bad,
                                                   count_text(contents->kernels, "kernel"), system.path()));
  report.ok("system cache", fmt::format("{}: {}, all authentic, signed by {}", system.path(),
                                        count_text(contents->kernels, "kernel"), contents->signer));
}

} // namespace kiln::cli
