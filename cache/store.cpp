#include "cache/store.h"

#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <filesystem>
#include <fmt/format.h>
#include <map>
#include <mutex>
#include <set>

#include "cache/database.h"
#include "cache/file_lock.h"
#include "cache/file_size_limit.h"
#include "cache/fork_gate.h"
#include "cache/generations.h"
#include "cache/key_file.h"
#include "cache/process.h"
#include "cache/trusted_directory.h"

namespace kiln {
namespace {

constexpr std::int64_t calls_per_flush = 64;
/// How many rows an eviction looks at that were used since the database heard of it.
constexpr std::size_t most_spared = 64;
constexpr std::chrono::milliseconds patience_in_turn{100};

double unix_seconds_now() {
  return std::chrono::duration<double>(std::chrono::system_clock::now().time_since_epoch()).count();
}

/// A row with the columns that only the store sees.
struct StoredRow {
  StoreRow row;
  std::int64_t code_bytes = 0;
  std::int64_t mac_key = 0;
  Bytes mac;
};

Digest mac_of(const Digest& secret, const StoreRow& row) {
  Writer writer;
  writer.u32(Database::schema_version);
  writer.blob(row.key.bytes);
  writer.string(row.op);
  writer.string(row.desc);
  writer.string(row.isa);
  writer.string(row.target);
  writer.string(row.generator);
  writer.i64(row.compile_us);
  writer.i64(row.created_at);
  writer.blob(row.signature);
  writer.blob(row.code);
  return keyed_digest_of(secret, writer.bytes());
}

std::optional<Digest> to_digest(ByteSpan bytes) {
  Digest out;
  if (bytes.size() != out.bytes.size())
    return std::nullopt;
  std::copy(bytes.begin(), bytes.end(), out.bytes.begin());
  return out;
}

/// Tells key files apart, and nothing about the secret.
std::int64_t mac_key_of(const Digest& secret) {
  return Reader(keyed_digest_of(secret, {}).bytes).i64();
}

using Reason = std::int64_t UsageCounts::*;

/// Why a row is refused; null when it is authentic.
Reason refusal_of(const Digest& secret, const StoredRow& stored) {
  if (stored.mac_key != mac_key_of(secret))
    return &UsageCounts::refused_key_file;
  const std::optional<Digest> mac = to_digest(stored.mac);
  const bool authentic = mac && stored.code_bytes == static_cast<std::int64_t>(stored.row.code.size()) &&
                         equal_in_constant_time(*mac, mac_of(secret, stored.row));
  return authentic ? nullptr : &UsageCounts::refused_mac;
}

/// A value that SQLite was told not to read: no row of Kiln's has one.
bool is_too_large(const Status& status) {
  return status.code() == Code::invalid_argument;
}

std::string_view text_of(Reason reason) {
  return reason == &UsageCounts::refused_key_file
             ? "fails authentication: it was stored under another key file (a cache that was copied, or a new key)"
         : reason == &UsageCounts::refused_size ? "is larger than any kernel"
                                                : "fails authentication: it was changed, or is that of another key";
}

#define KILN_READABLE_COLUMNS "op, desc, isa, target, generator, code_bytes, compile_us, created_at, last_hit_at"

/// Reads KILN_READABLE_COLUMNS; returns code_bytes.
std::int64_t read_readable_columns(const Query& query, int first, StoreRow& row) {
  row.op = query.text(first);
  row.desc = query.text(first + 1);
  row.isa = query.text(first + 2);
  row.target = query.text(first + 3);
  row.generator = query.text(first + 4);
  row.compile_us = query.integer(first + 6);
  row.created_at = query.integer(first + 7);
  row.last_hit_at = query.integer(first + 8);
  return query.integer(first + 5);
}

constexpr const char* select_by_key =
    "SELECT " KILN_READABLE_COLUMNS ", mac_key, mac, signature, code FROM kernels WHERE key = ?";
constexpr const char* select_by_id =
    "SELECT " KILN_READABLE_COLUMNS ", mac_key, mac, signature, code, key FROM kernels WHERE id = ?";
constexpr const char* select_all = "SELECT " KILN_READABLE_COLUMNS ", last_hit_at, key FROM kernels";
constexpr const char* select_ids = "SELECT id FROM kernels";
constexpr const char* select_keys = "SELECT key FROM kernels WHERE key BETWEEN ? AND ? ORDER BY key";
constexpr const char* select_totals = "SELECT count(*), coalesce(sum(code_bytes), 0) FROM kernels";
constexpr const char* insert_row =
    "INSERT OR REPLACE INTO kernels (op, desc, isa, target, generator, code_bytes, compile_us, created_at,"
    " last_hit_at, mac_key, mac, signature, code, key) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)";
constexpr const char* update_use = "UPDATE kernels SET last_hit_at = ? WHERE id = ?";
constexpr const char* delete_by_key = "DELETE FROM kernels WHERE key = ?";
constexpr const char* delete_by_id = "DELETE FROM kernels WHERE id = ?";
constexpr const char* select_least_recently_used =
    "SELECT id, key, last_hit_at, code_bytes FROM kernels WHERE key != ? ORDER BY last_hit_at";
constexpr const char* delete_all = "DELETE FROM kernels";
constexpr const char* pragma_page_count = "PRAGMA page_count";
constexpr const char* pragma_free_pages = "PRAGMA freelist_count";
constexpr const char* pragma_page_size = "PRAGMA page_size";
constexpr const char* pragma_shrink = "PRAGMA incremental_vacuum";

void read_whole_row(const Query& query, StoredRow& stored) {
  stored.code_bytes = read_readable_columns(query, 0, stored.row);
  const auto copy = [&](int column) {
    const ByteSpan bytes = query.blob(column);
    return Bytes(bytes.begin(), bytes.end());
  };
  stored.mac_key = query.integer(9);
  stored.mac = copy(10);
  stored.row.signature = copy(11);
  stored.row.code = copy(12);
}

Result<std::int64_t> integer_of(Database& database, const char* sql) {
  Query query = database.query(sql);
  if (!query.step())
    return query.status() ? Status::error(Code::internal, fmt::format("{} gives no row", sql)) : query.status();
  return query.integer(0);
}

struct DatabaseSize {
  std::int64_t file_bytes = 0;
  std::int64_t used_bytes = 0; ///< without free pages, which the next rows will take
};

Result<DatabaseSize> size_of(Database& database) {
  const Result<std::int64_t> pages = integer_of(database, pragma_page_count);
  const Result<std::int64_t> free_pages = integer_of(database, pragma_free_pages);
  const Result<std::int64_t> page_size = integer_of(database, pragma_page_size);
  for (const Result<std::int64_t>* result : {&pages, &free_pages, &page_size})
    if (!*result)
      return result->status();
  return DatabaseSize{*pages * *page_size, (*pages - *free_pages) * *page_size};
}

Result<Generations> generations_of(const StoreOptions& options, TrustedDirectory::Missing missing) {
  Result<TrustedDirectory> directory =
      TrustedDirectory::open(options.directory, TrustedDirectory::Owner::user, missing);
  return directory ? Result<Generations>(Generations(std::move(*directory))) : directory.status();
}

/// All that belongs to one process. A child made by fork leaves its parent's alone and makes its own.
struct Session {
  const ProcessId process = current_process();
  std::mutex mutex;
  // Below: guarded by the mutex.
  Status disabled; ///< why the store does nothing in this process; ok while it works
  std::unique_ptr<Database> database;
  std::int64_t generation = 0;    ///< of the database
  FileLock in_use_lock;           ///< on the generation; not held where there are no such locks
  std::string file;               ///< the last that was looked at
  std::set<std::int64_t> damaged; ///< generations whose pages were found damaged in use
  std::optional<Digest> secret;
  std::optional<UsageFile> usage;
  UsageCounts counts;    ///< of this process
  UsageCounts unwritten; ///< those that the usage file has not yet
  std::int64_t calls_since_flush = 0;
  std::set<std::string, std::less<>> warned_causes;

  void count(const UsageCounts& more) {
    counts += more;
    unwritten += more;
  }
  void count(std::int64_t UsageCounts::*what, std::int64_t more = 1) {
    counts.*what += more;
    unwritten.*what += more;
  }
  void close_database() {
    database.reset();
    in_use_lock.release();
  }
};

class SessionLock {
public:
  explicit SessionLock(Session& session) : lock_(session.mutex), region_(ForkRegion::database) {}

private:
  const std::lock_guard<std::mutex> lock_;
  const InForkRegion region_;
  FileSizeLimit file_size_limit_;
};

/// `attempt` (Status()), and again while it is Code::busy and others wait for the caller.
template <class Attempt> Status while_busy(Store::Call call, Attempt attempt) {
  const auto give_up = std::chrono::steady_clock::now() +
                       (call == Store::Call::in_turn ? patience_in_turn : std::chrono::milliseconds(0));
  for (;;) {
    Status status = attempt();
    if (status.code() != Code::busy || std::chrono::steady_clock::now() >= give_up)
      return status;
  }
}

class SqliteStore final : public Store {
public:
  SqliteStore(StoreOptions options, const Log& log) : options_(std::move(options)), log_(log), session_(new Session) {}

  ~SqliteStore() override {
    Session* session = session_;
    if (session->process != current_process()) // the parent's: closing it would write, and drop locks
      return;
    flush();
    const InForkRegion region(ForkRegion::database);
    delete session;
  }

  FileLock compile_turn(const Digest& key, std::chrono::milliseconds patience) override;
  std::optional<VerifiedRow> get(const Digest& key, Call call) override;
  void refuse(const Digest& key, std::int64_t UsageCounts::*why) override;
  Result<StoreRow> look(const Digest& key) override;
  Status put(const StoreRow& row, Call call) override { return put_rows({&row, 1}, call); }
  Status put_all(std::span<const StoreRow> rows) override { return put_rows(rows, Call::plain); }
  void count(const UsageCounts& more) override;
  void flush() override;
  Result<std::vector<Listed>> list() override;
  Result<std::vector<Digest>> find(std::string_view hex_prefix) override;
  Result<StoreStats> stats() override;
  UsageCounts counts() override;
  Result<UsageFile::Totals> totals() override;
  std::optional<UsageFile::Trace> trace(const Digest& key) override;
  Status remove(const Digest& key) override;
  Result<Verified> verify(bool repair) override;
  Result<Pruned> prune(std::int64_t max_bytes, bool dry_run) override;
  Result<Pruned> clear(bool dry_run) override;
  std::string path() override;

private:
  enum class Missing { create, leave };

  Session& current_session();
  Status open_database(Session& session, Missing missing);
  Status open_newest(Session& session, const Generations& generations, const Generations::Listing& listing,
                     Damage& damage);
  Status damaged(const Generations& generations, Damage damage, const Status& what) const;
  Status open_for_reading(Session& session) { return open_database(session, Missing::leave); }
  Status open_for_change(Session& session);
  Status load_secret(Session& session, Missing missing);
  Status put_rows(std::span<const StoreRow> rows, Call call);
  Status put_once(Session& session, std::span<const StoreRow> rows);
  Status read_row(Session& session, const Digest& key, StoredRow& stored);
  void remove_refused(Session& session, const Digest& key, Reason reason);
  void flush_after_call(Session& session);
  void flush(Session& session);
  double add_use(Session& session, StoreRow& row);
  UsageFile* usage_of(Session& session);
  std::int64_t usage_bytes(Session& session) { return usage_of(session) ? session.usage->fitted_bytes() : 0; }
  void note(Session& session, const Digest& key, UsageFile::Event event);
  Status insert(Session& session, std::span<const StoreRow> rows);
  Status insert_one(Session& session, const StoreRow& row, double now);
  Status check_all_are_there(Session& session, std::span<const StoreRow> rows);
  Result<Pruned> clear_database(Session& session, bool dry_run);
  struct Evicted {
    Pruned pruned;
    std::vector<Digest> keys;
  };
  Result<Evicted> evict(Session& session, std::int64_t max_bytes, ByteSpan kept_key);
  void count_evicted(Session& session, const Evicted& evicted);
  Status report(Session& session, Status status);
  void warn_once(Session& session, std::string_view cause, std::string_view message);

  const StoreOptions options_;
  const Log& log_;
  std::atomic<Session*> session_;
};

Session& SqliteStore::current_session() {
  Session* session = session_.load();
  while (session->process != current_process()) {
    auto fresh = std::make_unique<Session>();
    if (was_forked_inside(ForkRegion::database))
      fresh->disabled = Status::error(
          Code::io, fmt::format("{}: this process was forked while another thread used the cache; it goes on "
                                "without it",
                                options_.directory));
    if (session_.compare_exchange_strong(session, fresh.get()))
      session = fresh.release();
  }
  return *session;
}

/// Ok when a sound database is open. Code::not_found: there is none, and `missing` or the mode says to leave it so.
/// A damaged one: see damaged(). Nothing is remembered of a failure but pages found damaged: the next call tries again.
Status SqliteStore::open_database(Session& session, Missing missing) {
  if (options_.mode == CacheMode::off)
    return Status::error(Code::not_found, "the cache is off");
  if (!session.disabled || (session.database && !session.database->is_damaged()))
    return session.disabled;
  if (session.database) {
    session.damaged.insert(session.generation);
    session.close_database();
  }
  const bool create = missing == Missing::create && options_.mode == CacheMode::read_write;
  // Here and not on every call: what is open stays what it is.
  const Result<Generations> found =
      generations_of(options_, create ? TrustedDirectory::Missing::create : TrustedDirectory::Missing::leave);
  if (!found)
    return found.status();
  const Generations& generations = *found;
  // Again after each file that this process or another one made.
  Status status;
  for (int turn = 0; turn < 8; ++turn) {
    const Result<Generations::Listing> listing = generations.list();
    if (!listing)
      return listing.status();
    Damage damage = Damage::none;
    status = open_newest(session, generations, *listing, damage);
    if (status || (damage == Damage::none && status.code() != Code::not_found))
      return status;
    if (damage != Damage::none) {
      status = damaged(generations, damage, status);
      // What that says of a replacement may be about the one that another process made just now.
      if (const Result<Generations::Listing> now = generations.list(); now && now->next != listing->next)
        continue;
      if (status.code() != Code::integrity)
        return status;
    }
    if (!create)
      return status;
    if (Status made = generations.make(listing->next); !made)
      return made;
    if (damage == Damage::none)
      continue;
    (void)report(session, status);
    if (Status noted = generations.note_replaced(damage); !noted)
      return noted;
  }
  return status;
}

/// Code::integrity when a new generation may take the place of the damaged one, which is the next put's task;
/// Code::io when not.
Status SqliteStore::damaged(const Generations& generations, Damage damage, const Status& what) const {
  if (options_.mode != CacheMode::read_write)
    return Status::error(Code::io, fmt::format("{}: it is left alone, as the mode is read-only", what.message()));
  if (generations.replaced_lately(damage) != 0)
    return Status::error(Code::io, fmt::format("{}, and so was another within a day: what damages them? `kiln cache "
                                               "clear` begins anew",
                                               what.message()));
  return Status::error(
      Code::integrity,
      fmt::format("{}: it is left alone, and the next kernel that is stored begins a new file beside it",
                  what.message()));
}

/// The newest generation of this build's schema. Code::not_found when there is none; with `damage` when it is damaged.
Status SqliteStore::open_newest(Session& session, const Generations& generations, const Generations::Listing& listing,
                                Damage& damage) {
  const bool writes = options_.mode == CacheMode::read_write;
  for (const std::int64_t number : listing.databases) {
    const std::string file = session.file = generations.path(number);
    if (session.damaged.contains(number)) {
      damage = Damage::corrupt;
      return Status::error(Code::integrity, fmt::format("{} is corrupt", file));
    }
    const Result<FileIdentity> checked =
        generations.directory().check_file(Generations::name_of(number).c_str(), TrustedDirectory::Privacy::own);
    if (!checked)
      return checked.status();
    Result<FileLock> in_use = generations.use(number, writes ? FileLock::Missing::create : FileLock::Missing::leave);
    if (!in_use && in_use.status().code() == Code::busy)
      return in_use.status();
    Result<std::unique_ptr<Database>> opened = Database::open(
        file, *checked, writes ? Database::Access::write : Database::Access::read, options_.busy_timeout_ms, damage);
    if (!opened && opened.status().code() == Code::unsupported) {
      log_.debug(fmt::format("{}: it is left alone", opened.status().message()));
      continue;
    }
    if (!opened)
      return opened.status();
    session.database = std::move(*opened);
    session.generation = number;
    if (in_use)
      session.in_use_lock = std::move(*in_use);
    if (writes && number != listing.databases.back())
      generations.remove_before(number, listing, Generations::When::in_time);
    return {};
  }
  return Status::error(Code::not_found, fmt::format("{} holds no cache", options_.directory));
}

Status SqliteStore::open_for_change(Session& session) {
  if (options_.mode == CacheMode::read_only)
    return Status::error(
        Code::unsupported,
        fmt::format("{} was opened read-only; to change it, the mode must be read-write", options_.directory));
  return report(session, open_for_reading(session));
}

Status SqliteStore::load_secret(Session& session, Missing missing) {
  if (!session.disabled || session.secret)
    return session.disabled;
  const Result<Digest> secret = read_key_file(options_.key_directory, missing == Missing::create);
  if (secret)
    session.secret = *secret;
  return secret ? Status() : secret.status();
}

/// Counts and logs what is neither ok nor a plain miss; gives the status back.
Status SqliteStore::report(Session& session, Status status) {
  if (status || status.code() == Code::busy || status.code() == Code::not_found) {
    if (!status)
      log_.debug(status.message());
    if (status.code() == Code::busy)
      session.count(&UsageCounts::busy);
    return status;
  }
  session.count(&UsageCounts::errors);
  // A damaged file is one cause, whichever call finds it and whatever it finds there.
  const bool damaged = status.code() == Code::integrity && status.message().starts_with(session.file);
  warn_once(session, damaged ? session.file : status.message(),
            fmt::format("{}; going on without the cache", status.message()));
  return status;
}

void SqliteStore::warn_once(Session& session, std::string_view cause, std::string_view message) {
  if (session.warned_causes.emplace(cause).second)
    log_.warn(message);
}

FileLock SqliteStore::compile_turn(const Digest& key, std::chrono::milliseconds patience) {
  if (options_.mode != CacheMode::read_write)
    return {};
  const Result<Generations> generations = generations_of(options_, TrustedDirectory::Missing::create);
  if (!generations)
    return {};
  Result<FileLock> turn = generations->compile_turn(key, patience);
  if (turn)
    return std::move(*turn);
  log_.debug(fmt::format("{}: kernel {} is compiled here too", turn.status().message(), key.hex()));
  return {};
}

std::optional<VerifiedRow> SqliteStore::get(const Digest& key, Call call) {
  if (options_.mode == CacheMode::off)
    return std::nullopt;
  Session& session = current_session();
  StoredRow stored;
  Digest secret;
  const auto read = [&] {
    const SessionLock lock(session);
    Status status = read_row(session, key, stored);
    if (status)
      secret = *session.secret;
    return is_too_large(status) ? status : report(session, std::move(status));
  };
  const Status status = while_busy(call, read);
  // The longest part of a hit needs no lock.
  const Reason refused = is_too_large(status) ? &UsageCounts::refused_size
                         : status             ? refusal_of(secret, stored)
                                              : nullptr;

  const SessionLock lock(session);
  const bool hit = status && refused == nullptr;
  // A second look finds what the first one counted as a miss, or counts no other.
  session.count(&UsageCounts::misses, (call == Call::plain) - std::int64_t{hit});
  if (hit)
    session.count(&UsageCounts::disk_hits);
  if (refused != nullptr)
    remove_refused(session, key, refused);
  else if (hit && options_.mode == CacheMode::read_write)
    if (UsageFile* const usage = usage_of(session))
      usage->note_hit(key, unix_seconds_now());
  flush_after_call(session);
  return hit ? std::optional(verified(std::move(stored.row))) : std::nullopt;
}

Status SqliteStore::read_row(Session& session, const Digest& key, StoredRow& stored) {
  if (Status status = open_for_reading(session); !status)
    return status;
  if (Status status = load_secret(session, Missing::leave); !status) {
    if (status.code() == Code::not_found)
      warn_once(session, status.message(),
                fmt::format("{}: there is no key to authenticate {} with; kernels are compiled again", status.message(),
                            options_.directory));
    return status;
  }
  Query query = session.database->query(select_by_key);
  query.bind(ByteSpan(key.bytes));
  if (!query.step())
    return query.status() ? Status::error(Code::not_found, fmt::format("{} is not in {}", key.hex(), session.file))
                          : query.status();
  // The key asked for, not the one in the row: a row moved to another key fails.
  stored.row.key = key;
  read_whole_row(query, stored);
  return {};
}

void SqliteStore::remove_refused(Session& session, const Digest& key, Reason reason) {
  session.count(&UsageCounts::refused);
  session.count(reason);
  const bool writes = options_.mode == CacheMode::read_write;
  warn_once(session, text_of(reason),
            fmt::format("{}: the row of kernel {} {}. It is {}; the kernel is compiled again (further such rows are "
                        "counted, not logged)",
                        session.file, key.hex(), text_of(reason), writes ? "removed" : "not used"));
  if (!writes || !session.database)
    return;
  (void)report(session, session.database->query(delete_by_key).bind(ByteSpan(key.bytes)).run());
  note(session, key, UsageFile::Event::refused);
}

void SqliteStore::refuse(const Digest& key, Reason why) {
  Session& session = current_session();
  const SessionLock lock(session);
  session.count(&UsageCounts::disk_hits, -1);
  session.count(&UsageCounts::misses);
  session.count(&UsageCounts::refused);
  session.count(why);
  note(session, key, UsageFile::Event::refused);
  flush_after_call(session);
}

Result<StoreRow> SqliteStore::look(const Digest& key) {
  Session& session = current_session();
  const SessionLock lock(session);
  if (options_.mode == CacheMode::off)
    return Status::error(Code::not_found, "the cache is off");
  StoredRow stored;
  if (Status status = read_row(session, key, stored); !status)
    return status;
  if (const Reason reason = refusal_of(*session.secret, stored))
    return Status::error(Code::integrity,
                         fmt::format("{}: the row of kernel {} {}", session.file, key.hex(), text_of(reason)));
  add_use(session, stored.row);
  return std::move(stored.row);
}

void SqliteStore::count(const UsageCounts& more) {
  Session& session = current_session();
  const SessionLock lock(session);
  session.count(more);
  flush_after_call(session);
}

Status SqliteStore::put_rows(std::span<const StoreRow> rows, Call call) {
  if (options_.mode != CacheMode::read_write || rows.empty())
    return {};
  Session& session = current_session();
  return while_busy(call, [&] {
    const SessionLock lock(session);
    return put_once(session, rows);
  });
}

Status SqliteStore::put_once(Session& session, std::span<const StoreRow> rows) {
  Status status;
  // Once more, into a new file, when this one is found damaged or deleted.
  for (int turn = 0; turn < 2; ++turn) {
    status = session.disabled;
    // The directory first: where it is refused, nobody wants to hear of the key's too.
    if (status && !session.secret)
      if (const Result<Generations> place = generations_of(options_, TrustedDirectory::Missing::create); !place)
        status = place.status();
    // Then the secret: whoever finds the database finds it too.
    if (status)
      status = load_secret(session, Missing::create);
    if (status)
      status = open_database(session, Missing::create);
    if (status)
      status = insert(session, rows);
    if (status.code() == Code::not_found)
      session.close_database();
    else if (status || !session.database || !session.database->is_damaged())
      break;
  }
  return report(session, std::move(status));
}

Status SqliteStore::insert(Session& session, std::span<const StoreRow> rows) {
  Database& database = *session.database;
  const double now = unix_seconds_now();
  Transaction transaction(database);
  if (!transaction.begun())
    return transaction.begun();
  Status status;
  for (const StoreRow& row : rows)
    if (status = insert_one(session, row, now); !status)
      return status;
  const std::int64_t bound = options_.max_bytes - usage_bytes(session);
  const Result<Evicted> evicted = evict(session, bound, rows.back().key.bytes);
  if (!evicted)
    return evicted.status();
  const Result<DatabaseSize> size = size_of(database);
  if (!size)
    return size.status();
  if (size->used_bytes > bound)
    return Status::error(Code::unsupported,
                         fmt::format("{}: a kernel of {} bytes does not fit into the size bound of {} bytes",
                                     session.file, rows.back().code.size(), options_.max_bytes));
  if (evicted->pruned.rows > 0)
    if (status = check_all_are_there(session, rows); !status)
      return status;
  if (status = transaction.commit(); !status)
    return status;
  session.count(&UsageCounts::puts, std::ssize(rows));
  for (const StoreRow& row : rows)
    session.count(&UsageCounts::put_bytes, std::ssize(row.code));
  count_evicted(session, *evicted); // makes the usage file
  for (const StoreRow& row : rows)
    note(session, row.key, UsageFile::Event::used);
  return {};
}

/// Within a transaction.
Status SqliteStore::insert_one(Session& session, const StoreRow& given, double now) {
  StoreRow row = given;
  if (row.created_at == 0)
    row.created_at = static_cast<std::int64_t>(now);
  const Digest mac = mac_of(*session.secret, row);
  return session.database->query(insert_row)
      .bind(row.op)
      .bind(row.desc)
      .bind(row.isa)
      .bind(row.target)
      .bind(row.generator)
      .bind(static_cast<std::int64_t>(row.code.size()))
      .bind(row.compile_us)
      .bind(row.created_at)
      .bind(now)
      .bind(mac_key_of(*session.secret))
      .bind(ByteSpan(mac.bytes))
      .bind(ByteSpan(row.signature))
      .bind(ByteSpan(row.code))
      .bind(ByteSpan(row.key.bytes))
      .run();
}

/// Within a transaction, after evicting: rows that were put together may have made room for each other.
Status SqliteStore::check_all_are_there(Session& session, std::span<const StoreRow> rows) {
  for (const StoreRow& row : rows) {
    Query query = session.database->query(select_keys);
    query.bind(ByteSpan(row.key.bytes)).bind(ByteSpan(row.key.bytes));
    if (!query.step())
      return query.status() ? Status::error(Code::unsupported,
                                            fmt::format("{}: {} kernels do not fit together into the size bound of {} "
                                                        "bytes",
                                                        session.file, rows.size(), options_.max_bytes))
                            : query.status();
  }
  return {};
}

/// Within a transaction: deletes least recently used rows, but not `kept_key`, until the pages in use fit or no row is
/// left. Rows that the usage file saw in use since the database heard of it are told to it and spared; of very many
/// such the least recently used goes.
Result<SqliteStore::Evicted> SqliteStore::evict(Session& session, std::int64_t max_bytes, ByteSpan kept_key) {
  Database& database = *session.database;
  const double latest = unix_seconds_now() + 1; // a later time was written by a wrong clock
  struct Candidate {
    std::int64_t id, code_bytes;
    Digest key;
    double used_at;
  };
  Evicted out;
  while (true) {
    const Result<DatabaseSize> size = size_of(database);
    if (!size)
      return size.status();
    if (size->used_bytes <= max_bytes)
      return out;
    std::vector<Candidate> spared;
    std::optional<Candidate> victim;
    {
      Query query = database.query(select_least_recently_used);
      query.bind(kept_key);
      while (!victim && spared.size() < most_spared && query.step()) {
        Candidate candidate = {query.integer(0), query.integer(3), to_digest(query.blob(1)).value_or(Digest()),
                               query.real(2)};
        const std::optional<UsageFile::Trace> trace =
            session.usage ? session.usage->trace(candidate.key) : std::nullopt;
        if (trace && trace->event == UsageFile::Event::used && trace->at > candidate.used_at && trace->at <= latest) {
          candidate.used_at = trace->at;
          spared.push_back(candidate);
        } else {
          victim = candidate;
        }
      }
      if (Status status = query.status(); !status)
        return status;
    }
    if (!victim && spared.empty())
      return out;
    if (!victim) {
      const auto oldest = std::min_element(
          spared.begin(), spared.end(), [](const Candidate& a, const Candidate& b) { return a.used_at < b.used_at; });
      victim = *oldest;
      spared.erase(oldest);
    }
    for (const Candidate& one : spared)
      if (Status status = database.query(update_use).bind(one.used_at).bind(one.id).run(); !status)
        return status;
    if (Status status = database.query(delete_by_id).bind(victim->id).run(); !status)
      return status;
    ++out.pruned.rows;
    out.pruned.bytes += victim->code_bytes;
    out.keys.push_back(victim->key);
  }
}

/// Once the transaction is committed.
void SqliteStore::count_evicted(Session& session, const Evicted& evicted) {
  session.count(&UsageCounts::evictions, evicted.pruned.rows);
  session.count(&UsageCounts::evicted_bytes, evicted.pruned.bytes);
  flush(session);
  for (const Digest& key : evicted.keys)
    note(session, key, UsageFile::Event::evicted);
}

/// What is open, else what would be.
std::string SqliteStore::path() {
  Session& session = current_session();
  const SessionLock lock(session);
  std::int64_t generation = session.generation;
  if (!session.database) {
    const Result<Generations> generations = generations_of(options_, TrustedDirectory::Missing::leave);
    const Result<Generations::Listing> listing = generations ? generations->list() : generations.status();
    generation = listing && !listing->databases.empty() ? listing->databases.front() : 0;
  }
  return options_.directory + "/" + Generations::name_of(generation);
}

void SqliteStore::flush() {
  Session& session = current_session();
  const SessionLock lock(session);
  flush(session);
}

void SqliteStore::flush_after_call(Session& session) {
  if (++session.calls_since_flush >= calls_per_flush)
    flush(session);
}

/// What could not be written stays for the next time.
void SqliteStore::flush(Session& session) {
  session.calls_since_flush = 0;
  if (options_.mode != CacheMode::read_write || session.unwritten == UsageCounts())
    return;
  UsageFile* const usage = usage_of(session);
  if (usage == nullptr)
    return;
  if (Status status = usage->add(session.unwritten, unix_seconds_now()); !status)
    log_.debug(status.message());
  else
    session.unwritten = {};
}

/// To what the database knows of a row's use, what the usage file does. Returns the time of the last, or 0.
double SqliteStore::add_use(Session& session, StoreRow& row) {
  UsageFile* const usage = usage_of(session);
  const std::optional<UsageFile::Trace> trace = usage != nullptr ? usage->trace(row.key) : std::nullopt;
  if (!trace || trace->event != UsageFile::Event::used)
    return 0;
  row.hits = trace->hits;
  row.last_hit_at = std::max(row.last_hit_at, static_cast<std::int64_t>(trace->at));
  return trace->at;
}

/// Null where the directory is not there, or not ours alone.
UsageFile* SqliteStore::usage_of(Session& session) {
  if (!session.usage)
    if (TrustedDirectory::open(options_.directory, TrustedDirectory::Owner::user, TrustedDirectory::Missing::leave))
      session.usage.emplace(options_.directory, options_.max_bytes);
  return session.usage ? &*session.usage : nullptr;
}

void SqliteStore::note(Session& session, const Digest& key, UsageFile::Event event) {
  if (UsageFile* const usage = usage_of(session); usage != nullptr && options_.mode == CacheMode::read_write)
    usage->note(key, event, unix_seconds_now());
}

Result<std::vector<Store::Listed>> SqliteStore::list() {
  std::vector<Listed> out;
  Session& session = current_session();
  const SessionLock lock(session);
  if (Status status = report(session, open_for_reading(session)); !status)
    return status.code() == Code::not_found ? Result(std::move(out)) : status;
  std::vector<std::pair<double, Listed>> rows;
  Query query = session.database->query(select_all);
  while (query.step()) {
    auto& [used_at, listed] = rows.emplace_back();
    listed.code_bytes = read_readable_columns(query, 0, listed.row);
    listed.row.key = to_digest(query.blob(10)).value_or(Digest());
    used_at = std::max(query.real(9), add_use(session, listed.row));
  }
  if (Status status = report(session, query.status()); !status)
    return status;
  std::sort(rows.begin(), rows.end(), [](const auto& a, const auto& b) { return a.first > b.first; });
  for (auto& [used_at, listed] : rows)
    out.push_back(std::move(listed));
  return out;
}

Result<std::vector<Digest>> SqliteStore::find(std::string_view hex_prefix) {
  const std::size_t digits = 2 * sizeof(Digest);
  const std::string prefix(hex_prefix);
  if (prefix.size() > digits)
    return Status::error(Code::invalid_argument, fmt::format("key prefix '{}' has {} digits; allowed are up to {}",
                                                             prefix, prefix.size(), digits));
  const std::optional<Digest> first = Digest::from_hex(prefix + std::string(digits - prefix.size(), '0'));
  const std::optional<Digest> last = Digest::from_hex(prefix + std::string(digits - prefix.size(), 'f'));
  if (!first || !last)
    return Status::error(Code::invalid_argument,
                         fmt::format("key prefix '{}' is not hexadecimal; allowed are 0-9 and a-f", prefix));
  std::vector<Digest> out;
  Session& session = current_session();
  const SessionLock lock(session);
  if (Status status = report(session, open_for_reading(session)); !status)
    return status.code() == Code::not_found ? Result(std::move(out)) : status;
  Query query = session.database->query(select_keys);
  query.bind(ByteSpan(first->bytes)).bind(ByteSpan(last->bytes));
  while (query.step())
    out.push_back(to_digest(query.blob(0)).value_or(Digest()));
  if (Status status = report(session, query.status()); !status)
    return status;
  return out;
}

Result<StoreStats> SqliteStore::stats() {
  Session& session = current_session();
  const SessionLock lock(session);
  if (Status status = report(session, open_for_reading(session)); !status)
    return status.code() == Code::not_found ? Result(StoreStats{session.counts}) : status;
  StoreStats out{session.counts};
  Query query = session.database->query(select_totals);
  if (query.step()) {
    out.rows = query.integer(0);
    out.bytes = query.integer(1);
  }
  if (Status status = report(session, query.status()); !status)
    return status;
  const Result<DatabaseSize> size = size_of(*session.database);
  if (!size)
    return report(session, size.status());
  out.file_bytes = size->file_bytes;
  return out;
}

UsageCounts SqliteStore::counts() {
  Session& session = current_session();
  const SessionLock lock(session);
  return session.counts;
}

Result<UsageFile::Totals> SqliteStore::totals() {
  Session& session = current_session();
  const SessionLock lock(session);
  UsageFile* const usage = options_.mode != CacheMode::off ? usage_of(session) : nullptr;
  if (usage == nullptr)
    return Status::error(Code::not_found, fmt::format("{} holds no cache", options_.directory));
  Result<UsageFile::Totals> out = usage->totals();
  if (out)
    out->counts += session.unwritten;
  return out;
}

std::optional<UsageFile::Trace> SqliteStore::trace(const Digest& key) {
  Session& session = current_session();
  const SessionLock lock(session);
  UsageFile* const usage = options_.mode != CacheMode::off ? usage_of(session) : nullptr;
  return usage != nullptr ? usage->trace(key) : std::nullopt;
}

Status SqliteStore::remove(const Digest& key) {
  Session& session = current_session();
  const SessionLock lock(session);
  if (Status status = open_for_change(session); !status)
    return status;
  if (Status status = report(session, session.database->query(delete_by_key).bind(ByteSpan(key.bytes)).run()); !status)
    return status;
  if (session.database->changes() == 0)
    return Status::error(Code::not_found, fmt::format("{} is not in {}", key.hex(), session.file));
  note(session, key, UsageFile::Event::removed);
  return {};
}

Result<Store::Verified> SqliteStore::verify(bool repair) {
  Verified out;
  Session& session = current_session();
  const SessionLock lock(session);
  if (Status status = repair ? open_for_change(session) : report(session, open_for_reading(session)); !status)
    return status.code() == Code::not_found ? Result(std::move(out)) : status;
  if (Status status = report(session, load_secret(session, Missing::leave)); !status)
    return status;
  // One row at a time, so that other processes can write in between.
  std::vector<std::int64_t> ids;
  {
    Query query = session.database->query(select_ids);
    while (query.step())
      ids.push_back(query.integer(0));
    if (Status status = report(session, query.status()); !status)
      return status;
  }
  for (const std::int64_t id : ids) {
    StoredRow stored;
    std::string name = fmt::format("row {}", id);
    bool authentic = false;
    {
      Query query = session.database->query(select_by_id);
      query.bind(id);
      if (query.step()) {
        read_whole_row(query, stored);
        if (const std::optional<Digest> key = to_digest(query.blob(13))) {
          stored.row.key = *key;
          name = key->hex();
          authentic = refusal_of(*session.secret, stored) == nullptr;
        }
      } else if (query.status()) {
        continue; // evicted meanwhile
      } else if (query.status().code() != Code::integrity) {
        return report(session, query.status());
      }
    }
    if (authentic) {
      ++out.ok;
      continue;
    }
    ++out.bad;
    out.bad_keys.push_back(std::move(name));
    if (!repair)
      continue;
    if (Status status = report(session, session.database->query(delete_by_id).bind(id).run()); !status)
      return status;
  }
  return out;
}

Result<Store::Pruned> SqliteStore::prune(std::int64_t max_bytes, bool dry_run) {
  Session& session = current_session();
  const SessionLock lock(session);
  if (Status status = open_for_change(session); !status)
    return status.code() == Code::not_found ? Result(Pruned()) : status;
  // A dry run does the same and rolls it back: nothing else counts exactly.
  Transaction transaction(*session.database);
  if (!transaction.begun())
    return report(session, transaction.begun());
  const Result<Evicted> out = evict(session, max_bytes, {});
  if (!out)
    return report(session, out.status());
  if (dry_run)
    return out->pruned;
  Status status = session.database->run(pragma_shrink);
  if (status)
    status = transaction.commit();
  if (!status)
    return report(session, std::move(status));
  count_evicted(session, *out);
  return out->pruned;
}

Result<Store::Pruned> SqliteStore::clear(bool dry_run) {
  Session& session = current_session();
  const SessionLock lock(session);
  const Result<Generations> found = generations_of(options_, TrustedDirectory::Missing::leave);
  if (dry_run || options_.mode != CacheMode::read_write || !found)
    return clear_database(session, dry_run);
  // Whoever clears wants the room back, and to begin anew after any damage.
  const Generations& generations = *found;
  generations.forget_replaced();
  Result<Pruned> out = clear_database(session, false);
  if (!out && out.status().code() == Code::integrity) {
    if (Status status = open_database(session, Missing::create); !status)
      return report(session, std::move(status));
    generations.forget_replaced();
    out = clear_database(session, false); // another process may have filled it
  }
  if (const Result<Generations::Listing> listing = generations.list(); listing && session.database)
    generations.remove_before(session.generation, *listing, Generations::When::now);
  return out;
}

Result<Store::Pruned> SqliteStore::clear_database(Session& session, bool dry_run) {
  if (Status status = open_for_change(session); !status)
    return status.code() == Code::not_found ? Result(Pruned()) : status;
  Transaction transaction(*session.database);
  if (!transaction.begun())
    return report(session, transaction.begun());
  Pruned out;
  {
    Query totals = session.database->query(select_totals);
    if (!totals.step())
      return report(session, totals.status());
    out = {totals.integer(0), totals.integer(1)};
  }
  if (dry_run)
    return out;
  Status status = session.database->run(delete_all);
  if (status)
    status = session.database->run(pragma_shrink);
  if (status)
    status = transaction.commit();
  if (!status)
    return report(session, std::move(status));
  return out;
}

/// Without a slash at the end.
std::filesystem::path absolute_path(const std::string& path) {
  std::error_code error;
  const std::filesystem::path absolute = std::filesystem::absolute(path, error);
  return absolute.has_filename() ? absolute : absolute.parent_path();
}

/// With every link resolved as far as the path exists; as it is written where this user may not look.
std::filesystem::path resolved_path(const std::string& path) {
  std::error_code error;
  const std::filesystem::path absolute = absolute_path(path),
                              resolved = std::filesystem::weakly_canonical(absolute, error);
  return error ? absolute.lexically_normal() : resolved;
}

bool is_inside(const std::string& path, const std::string& directory) {
  const std::filesystem::path inner = resolved_path(path), outer = resolved_path(directory);
  return std::mismatch(outer.begin(), outer.end(), inner.begin(), inner.end()).first == outer.end();
}

Status check_options(const StoreOptions& options) {
  for (const auto& [name, path] :
       {std::pair("cache directory", &options.directory), std::pair("key directory", &options.key_directory)})
    if (path->empty() || path->find('\0') != std::string::npos)
      return Status::error(Code::invalid_argument, fmt::format("the {} '{}' is not a path", name, path->c_str()));
  if (options.max_bytes <= 0)
    return Status::error(Code::invalid_argument,
                         fmt::format("the cache's size bound is {} bytes; allowed is more than 0", options.max_bytes));
  if (options.busy_timeout_ms < 0)
    return Status::error(Code::invalid_argument, fmt::format("the cache's busy timeout is {} ms; allowed is 0 or more",
                                                             options.busy_timeout_ms));
  if (is_inside(options.key_directory, options.directory))
    return Status::error(
        Code::invalid_argument,
        fmt::format("the key directory {} lies inside the cache directory {}: whoever copies the cache would have the "
                    "key; it must lie outside",
                    options.key_directory, options.directory));
  return {};
}

} // namespace

Result<std::unique_ptr<Store>> Store::open(StoreOptions options, const Log& log) {
  if (options.mode != CacheMode::off) {
    if (Status status = check_options(options); !status)
      return status;
    // Once, here: the host may change its working directory.
    options.directory = absolute_path(options.directory).string();
    options.key_directory = absolute_path(options.key_directory).string();
  }
  return std::unique_ptr<Store>(std::make_unique<SqliteStore>(std::move(options), log));
}

} // namespace kiln
