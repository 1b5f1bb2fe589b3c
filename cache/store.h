#pragma once
#include <chrono>
#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "cache/bytes.h"
#include "cache/digest.h"
#include "cache/file_lock.h"
#include "cache/log.h"
#include "cache/status.h"
#include "cache/usage.h"

namespace kiln {

/// One kernel on disk. Everything but `hits` and the time of use is covered by the row's authentication.
struct StoreRow {
  Digest key;
  std::string op;        ///< readable columns: what the key was made of
  std::string desc;      ///< canonical desc text
  std::string isa;       ///< ISA path
  std::string target;    ///< the features (and vector length or SM) the code uses
  std::string generator; ///< generator id, hex
  Bytes code;            ///< serialised CodeObject
  Bytes signature;       ///< of a row from a remote tier: who vouched for it (see signer_of); empty for others
  std::int64_t compile_us = 0;
  std::int64_t created_at = 0;  ///< Unix seconds
  std::int64_t last_hit_at = 0; ///< Unix seconds; not authenticated. Of get(): as of the last eviction that looked
  std::int64_t hits = 0;        ///< as far as the usage file remembers (UsageFile); 0 from get()
};

/// A row that was authenticated, by this user's MAC (Store) or a trusted signature (SystemCache, RemoteCache), and is
/// as it was then: the only form in which stored code gets to LoadableCode, and so to executable memory. Nothing else
/// makes one.
class VerifiedRow {
public:
  const StoreRow& operator*() const { return row_; }
  const StoreRow* operator->() const { return &row_; }
  operator const StoreRow&() const { return row_; }

private:
  friend class Store;
  friend class SystemCache;
  friend class RemoteCache;
  explicit VerifiedRow(StoreRow row) : row_(std::move(row)) {}
  StoreRow row_;
};

enum class CacheMode : std::uint8_t { read_write, read_only, off };

struct StoreOptions {
  std::string directory;     ///< made with mode 0700 when it does not exist
  std::string key_directory; ///< where the MAC key file lives: outside `directory`; made 0700, the key file 0600
  CacheMode mode = CacheMode::read_write;
  /// Bound on the database's pages in use (codes, their columns, indexes) and the usage file; holds after each put.
  std::int64_t max_bytes = 512ll << 20;
  int busy_timeout_ms = 20; ///< a longer wait for SQLite's lock is a miss
};

/// The counts are of this process; Store::totals has those of all.
struct StoreStats : UsageCounts {
  std::int64_t rows = 0;
  std::int64_t bytes = 0;      ///< sum of code sizes
  std::int64_t file_bytes = 0; ///< of the database, free pages included
};

/// L2: the kernels on disk, in one SQLite database (`kernels.db`) per cache directory.
///
/// Thread-safe (one mutex; SQLite's own locks between processes). No call throws. After any error that is not a plain
/// miss the store logs one warning per cause and the call behaves as a miss; the caller compiles and goes on, and the
/// next call tries again. A damaged database is left as it is: the next put begins another file beside it, at most once
/// a day for each cause (see generations.h). A child made by fork never uses the parent's connection: it opens its own.
/// A write beyond the process's limit on file sizes is an error, never a signal.
class Store {
public:
  /// Opens lazily: nothing is created on disk before the first put. Fails (Code::invalid_argument) only on unusable
  /// options; among them a key directory inside the cache directory. `log` must outlive the store.
  static Result<std::unique_ptr<Store>> open(StoreOptions options, const Log& log);
  virtual ~Store() = default;

  /// The turn to compile the kernel of this key, which one holder at a time has among all processes that share the
  /// cache (single-flight; the kernel of the operating system ends it when its holder dies). Waits up to `patience`.
  /// Whoever gets it looks once more, with Call::in_turn, before it compiles. Not held when the time is over, when the
  /// mode is not read_write, or where there are no locks: then the caller compiles for itself.
  virtual FileLock compile_turn(const Digest& key, std::chrono::milliseconds patience) = 0;

  /// `in_turn`: by a holder of the key's turn. Others wait for it, so that a lock of SQLite's is waited for longer (100
  /// ms), and a get is a second look, which does not count as another miss.
  enum class Call : std::uint8_t { plain, in_turn };

  /// The row with this key, authenticated, or nothing. A row that fails authentication is deleted, counted and treated
  /// as a miss.
  virtual std::optional<VerifiedRow> get(const Digest& key, Call call = Call::plain) = 0;
  /// The caller cannot use the row that get() gave it: no hit, but refused. `why` is UsageCounts::refused_code or
  /// refused_features.
  virtual void refuse(const Digest& key, std::int64_t UsageCounts::*why) = 0;
  /// The same for whoever only wants to see it: nothing is counted, noted or deleted. Code::not_found, or why a
  /// get would not have it: Code::integrity when it fails authentication.
  virtual Result<StoreRow> look(const Digest& key) = 0;
  /// Stores or replaces (hits from 0, last hit now, `created_at` now when it is 0); evicts least recently used rows
  /// until the bound holds. Errors are logged and returned, never fatal. Ok without doing anything when the mode is not
  /// read_write.
  virtual Status put(const StoreRow& row, Call call = Call::plain) = 0;
  /// Likewise, all of them or none: in one transaction. An error, and no change, when they do not all fit into the
  /// bound.
  virtual Status put_all(std::span<const StoreRow> rows) = 0;

  /// Adds to this process's counts and to those of all processes what happened to kernels beside the store: in memory,
  /// in the compiler, in other tiers.
  virtual void count(const UsageCounts& more) = 0;
  /// Writes pending counts (batched; also done with each put, every 64 calls and at destruction).
  virtual void flush() = 0;

  // The calls below return the error that keeps the database from being used, if one does; without a database, or with
  // the mode off, they find nothing. Those that change rows are Code::unsupported when the mode is read_only.

  /// Every row without its code (`code` empty), most recently used first. Not authenticated.
  struct Listed {
    StoreRow row;
    std::int64_t code_bytes = 0;
  };
  virtual Result<std::vector<Listed>> list() = 0;
  /// Keys that begin with `hex_prefix` (for the command).
  virtual Result<std::vector<Digest>> find(std::string_view hex_prefix) = 0;
  virtual Result<StoreStats> stats() = 0;
  /// Of this process, whatever the state of the database.
  virtual UsageCounts counts() = 0;
  /// Of all processes, pending counts of this one included. Code::not_found: nothing is known.
  virtual Result<UsageFile::Totals> totals() = 0;
  /// What last happened to this kernel, stored or not; nothing when that is not remembered.
  virtual std::optional<UsageFile::Trace> trace(const Digest& key) = 0;
  virtual Status remove(const Digest& key) = 0;
  struct Verified {
    std::int64_t ok = 0, bad = 0;
    std::vector<std::string> bad_keys;
  };
  /// Authenticates every row; removes the bad ones when `repair`.
  virtual Result<Verified> verify(bool repair) = 0;
  /// Rows removed and the sum of their code sizes.
  struct Pruned {
    std::int64_t rows = 0, bytes = 0;
  };
  /// Evicts least recently used rows until at most `max_bytes` of the database's pages are in use, and shrinks the
  /// file; `dry_run` only counts.
  virtual Result<Pruned> prune(std::int64_t max_bytes, bool dry_run) = 0;
  /// Removes every row; `dry_run` only counts. In the place of a damaged database it makes an empty one, and it removes
  /// older generations that nobody has open.
  virtual Result<Pruned> clear(bool dry_run) = 0;

  virtual std::string path() = 0; ///< of the database file in use, or of the one that would be

protected:
  static VerifiedRow verified(StoreRow row) { return VerifiedRow(std::move(row)); }
};

} // namespace kiln
