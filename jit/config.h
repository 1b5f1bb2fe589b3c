#pragma once
#include <cstdint>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "cache/log.h"
#include "cache/remote_url.h"
#include "cache/status.h"
#include "cache/store.h"
#include "jit/cache_place.h"
#include "jit/implementation.h"

namespace kiln {

enum class MissPolicy : std::uint8_t { compile, error, fallback };
enum class PerfMode : std::uint8_t { off, map, jitdump };

/// Settings that a host may make in place of the environment's.
struct HostSettings {
  std::optional<std::string> cache_dir; ///< absolute
  std::optional<CacheMode> cache;
  std::optional<int> threads; ///< the smaller of it and KILN_THREADS holds
};

/// DESIGN's environment table as a value. `from_environment` is the only reader of the environment in Kiln.
struct Config {
  // KILN_DISABLE
  std::vector<IsaPath> disabled_paths;
  std::vector<BackendId> disabled_backends;
  std::vector<GeneratorId> disabled_generators;
  bool disk_disabled = false, remote_disabled = false;
  // KILN_FORCE: `path` for every op that has it, or `op:path`
  struct Force {
    OpId op = OpId::none; ///< none: every op that has the path
    IsaPath path;
  };
  std::vector<Force> forced;

  CacheMode cache = CacheMode::read_write;
  bool cache_unwanted = false; ///< KILN_CACHE=off; without, the mode is also off where there is no place for a cache
  /// The first two are where the cache really is, which may be another place than was asked for: see CachePlace.
  std::string cache_dir, key_dir, cache_system_dir, trusted_keys;
  std::optional<RemoteUrl> remote;
  std::string remote_signing_key; ///< a file; empty: nothing is written to the remote tier
  std::int64_t cache_max_mb = 512;
  MissPolicy miss = MissPolicy::compile;
  int threads = 0; ///< 0: every core this process may use
  LogLevel log = LogLevel::warn;
  std::string dump_dir;
  std::string program_path; ///< PATH: where `ptxas` is looked for
  PerfMode perf = PerfMode::off;

  /// One row a variable, for `kiln info`: name, value in force, where it came from (`default`, `environment`, `host`,
  /// or `moved` for a cache directory that is another than any of them said).
  struct Origin {
    std::string name, value, origin;
  };
  std::vector<Origin> origins;
  /// Said once by the engine: unknown names in KILN_DISABLE with the valid ones, and the like.
  std::vector<std::string> warnings;

  /// Reads through `get` (as ::getenv). Errors (a malformed KILN_FORCE, KILN_CACHE, KILN_THREADS…) name variable, value
  /// and what is allowed. What the host sets itself goes over the environment.
  static Result<Config> from_environment(const char* (*get)(const char* name), const HostSettings& host = {},
                                         FileSystemOf file_system_of = os::file_system_of);

  /// Also where there is no place for a cache of the user's own.
  bool serves_system_cache() const { return !cache_system_dir.empty() && !cache_unwanted && !disk_disabled; }
  /// With the disk or without.
  bool serves_remote_cache() const { return remote && !cache_unwanted && !remote_disabled; }
  bool disables(const Implementation& implementation) const;
  /// The path forced for this op: its own, else the one for every op that has it (the caller knows which have). False
  /// when there is none.
  bool forced_path(OpId op, IsaPath& path) const;
  /// The path that these rows must take for the op on a device: `op:path` holds in any case, unless the op has it on
  /// another device only; a path alone for the ops that have it there.
  std::optional<IsaPath> forced_path(OpId op, DeviceKind device, std::span<const Implementation> rows) const;
};

} // namespace kiln
