#pragma once
#include <chrono>
#include <cstdint>
#include <string>
#include <vector>

#include "cache/bytes.h"
#include "cache/database.h"
#include "cache/digest.h"
#include "cache/file_lock.h"
#include "cache/status.h"
#include "cache/trusted_directory.h"

namespace kiln {

/// The databases of one cache directory, by generation: `kernels.db` is generation 0, `kernels-N.db` generation N. A
/// database that is found damaged is never renamed or unlinked, as others may have it open: the next generation is made
/// beside it, and the newest that is sound and of this build's schema is the cache.
///
/// Processes that find the damage at once agree without a lock: each makes exactly the number after the highest that it
/// saw, a file appears under its name whole, and whoever comes second goes on with the first one's. No number is used
/// again while a file (or a journal) of that or of a higher number exists, and the newest generation is never removed.
class Generations {
public:
  explicit Generations(TrustedDirectory directory) : directory_(std::move(directory)) {}

  const TrustedDirectory& directory() const { return directory_; }
  /// `kernels.db`, `kernels-1.db`.
  static std::string name_of(std::int64_t number);
  std::string path(std::int64_t number) const { return directory_.path_of(name_of(number)); }

  struct Listing {
    std::vector<std::int64_t> databases; ///< newest first
    std::int64_t next = 0;               ///< free, and higher than all that were seen
  };
  /// Code::not_found when the directory is gone; Code::io.
  Result<Listing> list() const;

  /// Makes an empty database of this number, or leaves the one that is there by now.
  Status make(std::int64_t number) const;

  /// That the caller has this generation open: it is not removed meanwhile. Code::busy while it is being removed; other
  /// errors when there are no locks here, where nothing is removed either. `missing`: of the lock file.
  Result<FileLock> use(std::int64_t number, FileLock::Missing missing) const;

  /// Databases are replaced at most once in this time for each cause: what damages the second is no accident.
  static constexpr std::chrono::hours between_replacements{24};
  /// When a database was last replaced for this cause (Unix seconds), or 0: not within `between_replacements`.
  std::int64_t replaced_lately(Damage cause) const;
  /// To be called once the next generation is there.
  Status note_replaced(Damage cause) const;
  /// As if none had been replaced.
  void forget_replaced() const;

  /// Removes the generations before `newest` that nobody has open and nobody has changed for a day, or at once with
  /// `now`: Kiln's own and those without a header. A cache of an older schema is kept for 30 days, one of a newer
  /// schema and another program's database for ever.
  enum class When : std::uint8_t { in_time, now };
  void remove_before(std::int64_t newest, const Listing& listing, When when) const;

  /// Whether a lock that one holder has keeps another out, tried on the lock file. Code::not_found when there is none
  /// yet, Code::io when the file system has no such locks or they do not hold.
  Status check_locks() const;

  /// See Store::compile_turn.
  Result<FileLock> compile_turn(const Digest& key, std::chrono::milliseconds patience) const;

private:
  /// A lock on a byte of the file whose bytes stand for keys and generations.
  Result<FileLock> lock(std::uint64_t byte, FileLock::Kind kind, std::chrono::milliseconds patience,
                        FileLock::Missing missing) const {
    return FileLock::take(directory_, "kernels.lock", byte, kind, patience, missing);
  }
  /// 0 when there is no such file.
  std::int64_t changed_at(const std::string& name) const;
  void remove(const std::string& name) const;

  TrustedDirectory directory_;
};

} // namespace kiln
