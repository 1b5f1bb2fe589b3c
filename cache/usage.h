#pragma once
#include <cstdint>
#include <optional>
#include <string>

#include "cache/bytes.h"
#include "cache/digest.h"
#include "cache/file_lock.h"
#include "cache/status.h"

namespace kiln {

/// What became of the kernels that were asked for. Of one process or, in the usage file, of all that shared a cache.
struct UsageCounts {
  std::int64_t memory_hits = 0;
  std::int64_t disk_hits = 0;   ///< in the user's cache
  std::int64_t system_hits = 0; ///< in KILN_CACHE_SYSTEM_DIR
  std::int64_t misses = 0;      ///< looked for on disk and found in no tier
  std::int64_t compiles = 0, compile_us = 0, compile_failures = 0;
  std::int64_t fallbacks = 0; ///< a built-in kernel served where there was no compiled one
  std::int64_t puts = 0, put_bytes = 0;
  std::int64_t evictions = 0, evicted_bytes = 0;
  std::int64_t refused = 0;          ///< rows not used; those named refused_ are its parts
  std::int64_t refused_mac = 0;      ///< changed since it was stored, or stored under another key
  std::int64_t refused_key_file = 0; ///< authenticated with another key file: a copied cache, or a new key
  std::int64_t refused_code = 0;     ///< authentic, but no code object or plan that this build understands
  std::int64_t refused_features = 0; ///< authentic, but for another machine
  std::int64_t refused_size = 0;     ///< larger than any kernel
  std::int64_t refused_system = 0;   ///< kernels of the system cache whose digest is wrong
  std::int64_t busy = 0;             ///< calls that went without the cache because others held its lock
  std::int64_t errors = 0;           ///< calls that went without it for another reason
  std::int64_t remote_hits = 0;      ///< in KILN_REMOTE
  std::int64_t refused_remote = 0;   ///< rows of KILN_REMOTE that are not trusted, or not what they say
  std::int64_t remote_errors = 0;    ///< calls to KILN_REMOTE that failed

  UsageCounts& operator+=(const UsageCounts& more);
  bool operator==(const UsageCounts&) const = default;
};

/// Every field of UsageCounts, for those who print or store them all. The order is that of the file: new fields go to
/// the end.
struct UsageField {
  const char* name;
  std::int64_t UsageCounts::*value;
};
inline constexpr UsageField usage_fields[] = {
    {"memory_hits", &UsageCounts::memory_hits},
    {"disk_hits", &UsageCounts::disk_hits},
    {"system_hits", &UsageCounts::system_hits},
    {"misses", &UsageCounts::misses},
    {"compiles", &UsageCounts::compiles},
    {"compile_us", &UsageCounts::compile_us},
    {"compile_failures", &UsageCounts::compile_failures},
    {"fallbacks", &UsageCounts::fallbacks},
    {"puts", &UsageCounts::puts},
    {"put_bytes", &UsageCounts::put_bytes},
    {"evictions", &UsageCounts::evictions},
    {"evicted_bytes", &UsageCounts::evicted_bytes},
    {"refused", &UsageCounts::refused},
    {"refused_mac", &UsageCounts::refused_mac},
    {"refused_key_file", &UsageCounts::refused_key_file},
    {"refused_code", &UsageCounts::refused_code},
    {"refused_features", &UsageCounts::refused_features},
    {"refused_size", &UsageCounts::refused_size},
    {"refused_system", &UsageCounts::refused_system},
    {"busy", &UsageCounts::busy},
    {"errors", &UsageCounts::errors},
    {"remote_hits", &UsageCounts::remote_hits},
    {"refused_remote", &UsageCounts::refused_remote},
    {"remote_errors", &UsageCounts::remote_errors},
};

/// When each kernel was last used, and UsageCounts summed over all processes: a file of fixed size, `kernels.usage`,
/// beside the databases of a cache.
///
/// It informs people and decides which row is evicted first; nothing else is taken from it. So it is not authenticated
/// and not synced, a damaged one begins anew, and processes that write at once may lose a use of each other's. In
/// return a use costs three system calls on 80 bytes (1 µs) and survives the death of its process, where an update in
/// the database takes a journal and two syncs. No mapping: a file that others shorten must raise no SIGBUS.
///
/// Not thread-safe. Not to be touched by a child that inherited it through fork. Writes beyond the process's limit on
/// file sizes need the caller's FileSizeLimit.
class UsageFile {
public:
  /// In this directory, which need not exist yet, for a cache of this bound. Opens nothing.
  UsageFile(const std::string& directory, std::int64_t max_cache_bytes);
  ~UsageFile();
  UsageFile(const UsageFile&) = delete;
  UsageFile& operator=(const UsageFile&) = delete;

  enum class Event : std::uint8_t { used, evicted, refused, removed };
  /// The last that happened to a kernel.
  struct Trace {
    Event event = Event::used;
    std::int64_t hits = 0; ///< since it was stored, as far as the file remembers
    double at = 0;         ///< Unix seconds
  };
  /// Nothing when the file does not remember: it keeps the latest of some kernels for each few KiB of the cache's
  /// bound.
  std::optional<Trace> trace(const Digest& key);
  /// Writes nothing when there is no file: add() makes it.
  void note(const Digest& key, Event event, double now);
  void note_hit(const Digest& key, double now);

  struct Totals {
    UsageCounts counts;
    std::int64_t since = 0; ///< Unix seconds
  };
  /// Adds to the sums. Makes the file, also in the place of a damaged one. Code::not_found without the directory,
  /// Code::busy, Code::io.
  Status add(const UsageCounts& counts, double now);
  /// Code::not_found: there is no file, or nothing that can be read in it. Changes nothing.
  Result<Totals> totals();

  /// 0 without a file. One that was made for a much larger bound begins anew, small, but for its sums.
  std::int64_t fitted_bytes();
  const std::string& path() const { return path_; }

private:
  struct Slot;
  struct Place { ///< of a kernel's slot
    std::uint64_t offset = 0;
    bool is_the_kernels = false; ///< else free, or that of the kernel longest not used
  };
  bool is_open() const;
  bool open();
  void close();
  std::optional<Totals> read_header();
  Status write_header(const Totals& totals);
  bool resize();
  std::int64_t bytes() const;
  std::optional<Place> find(const Digest& key, Slot& slot);
  void write(const Digest& key, Event event, std::int64_t hits, double now, std::uint64_t offset);

  const std::string path_;
  const std::int64_t max_cache_bytes_;
  int file_ = -1;
  std::uint64_t device_ = 0, inode_ = 0; ///< of it: a host may close descriptors that it did not open
  std::uint32_t buckets_ = 0;            ///< of the file; 0 until a sound header was read
};

} // namespace kiln
