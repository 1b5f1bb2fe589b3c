#include "jit/cache_place.h"

#include <unistd.h>

#include <filesystem>
#include <utility>
#include <vector>

#include <fmt/format.h>

#include "cache/trusted_directory.h"

namespace kiln {
namespace {

/// Whether this user has the directory to himself, or can make it so.
bool is_fit(const std::string& directory, FileSystemOf file_system_of) {
  if (file_system_of(directory).over_network)
    return false;
  const Result<TrustedDirectory> opened =
      TrustedDirectory::open(directory, TrustedDirectory::Owner::user, TrustedDirectory::Missing::leave);
  return opened || (opened.status().code() == Code::not_found &&
                    ::access(std::filesystem::path(directory).parent_path().c_str(), W_OK | X_OK) == 0);
}

} // namespace

CachePlace place_cache(std::string directory, std::string key_directory, const std::string& runtime_directory,
                       FileSystemOf file_system_of) {
  CachePlace place{std::move(directory), std::move(key_directory), {}, false};
  const os::FileSystem file_system = file_system_of(place.directory);
  if (!file_system.over_network)
    return place;
  const std::string reason =
      fmt::format("{} is on {}, where locks between machines may not hold", place.directory, file_system.name);
  std::vector<std::string> candidates = {fmt::format("/var/tmp/kiln-{}", ::geteuid()),
                                         fmt::format("/tmp/kiln-{}", ::geteuid())};
  if (runtime_directory.starts_with('/'))
    candidates.insert(candidates.begin() + 1, runtime_directory + "/kiln");
  for (const std::string& candidate : candidates)
    if (is_fit(candidate, file_system_of)) {
      place.directory = candidate + "/cache";
      if (file_system_of(place.key_directory).over_network)
        place.key_directory = candidate + "/key";
      place.moved = fmt::format("{}: the kernel cache is in {} instead (KILN_CACHE_DIR names another directory of this "
                                "machine, KILN_CACHE_SYSTEM_DIR a cache for many)",
                                reason, place.directory);
      return place;
    }
  place.none = true;
  place.moved = fmt::format("{}, and no directory of this machine serves instead: the kernel cache is off; set "
                            "KILN_CACHE_DIR",
                            reason);
  return place;
}

} // namespace kiln
