#pragma once
#include <atomic>
#include <cstdint>
#include <optional>
#include <string>

#include "cache/digest.h"
#include "cache/log.h"
#include "cache/status.h"
#include "cache/store.h"

namespace kiln {

/// The read-only cache under the user's: a bundle, `kernels.bundle`, in a directory that an administrator or an image
/// fills. It is used when a trusted key signed it, and when nobody but the superuser or this process's user could have
/// put it there (Ownership::path). Nothing is ever written, no file is locked or mapped.
///
/// The bundle is replaced only by renaming another over it. A process goes on with the one that it has open until it
/// notices, at most `look_again` later and never more often; then it reads bundle and trusted keys anew. What does not
/// come up to this is a miss, and one warning for each cause; it is tried again after `retry`.
///
/// Thread-safe; no call throws but for want of memory. A child made by fork opens the bundle for itself.
class SystemCache {
public:
  static constexpr std::int64_t look_again_ms = 1000, retry_ms = 60'000;

  /// Absolute paths. Opens nothing yet. `log` must outlive the cache.
  SystemCache(std::string directory, std::string trusted_keys_file, const Log& log);
  ~SystemCache();
  SystemCache(const SystemCache&) = delete;
  SystemCache& operator=(const SystemCache&) = delete;

  /// The row with this key, authenticated, or nothing. A row that fails is counted and treated as a miss.
  std::optional<VerifiedRow> get(const Digest& key);

  struct Stats { ///< of this process
    std::int64_t hits = 0, misses = 0, refused = 0;
  };
  Stats stats();

  struct Contents {
    std::int64_t kernels = 0;
    std::int64_t file_bytes = 0;
    std::int64_t bad = 0; ///< kernels that fail authentication
    std::string signer;   ///< PublicKey::id
  };
  /// What a get would find now, opened anew; `bad` is counted when `read_every_kernel`. Code::not_found: there is none;
  /// else why it is not used.
  Result<Contents> contents(bool read_every_kernel) const;

  const std::string& path() const { return path_; } ///< of the bundle

private:
  struct Session;
  Session& current_session();

  const std::string path_, trusted_keys_file_;
  const Log& log_;
  std::atomic<Session*> session_;
};

} // namespace kiln
