#pragma once
#include <map>
#include <memory>
#include <string>
#include <string_view>

#include "cache/bytes.h"
#include "cache/file_descriptor.h"
#include "cache/lock_vfs.h"
#include "cache/status.h"

struct sqlite3;
struct sqlite3_stmt;

namespace kiln {

/// The version of the SQLite library in use (`3.40.1`), or Code::unsupported when the cache cannot work with it.
Result<std::string> sqlite_version();
/// Whether this version has the race that can damage a file with a write-ahead log (sqlite.org/wal.html#walresetbug),
/// which Kiln's have not.
bool sqlite_may_lose_wal();

class Database;

/// One use of a prepared statement: bind in order, step, read columns. Ends the statement (and so its read lock) when
/// it goes.
class Query {
public:
  Query(Database& database, sqlite3_stmt* statement, int code);
  ~Query();
  Query(const Query&) = delete;
  Query& operator=(const Query&) = delete;

  /// The next parameter. Bytes and text are not copied: they must live as long as the query.
  Query& bind(ByteSpan bytes);
  Query& bind(std::string_view text);
  Query& bind(std::int64_t integer);
  Query& bind(double real);

  /// True when there is a (further) row; false at the end and on any error, which status() tells apart.
  bool step();
  /// Runs to the end.
  Status run();
  Status status() const;

  /// Columns of the present row, counted from 0; views are valid until the next step. NULL reads as empty or 0.
  ByteSpan blob(int column) const;
  std::string text(int column) const;
  std::int64_t integer(int column) const;
  double real(int column) const;

private:
  Database& database_;
  sqlite3_stmt* statement_;
  int code_;
  int bound_ = 0;
};

/// What is wrong with a file that should be a cache.
enum class Damage : std::uint8_t {
  none,
  not_a_database, ///< no header of SQLite's: empty, zeroed, overwritten
  foreign,        ///< a sound header that Kiln did not write: another program's
  corrupt,        ///< Kiln's header, but pages that SQLite finds wrong or missing
};
/// `not-a-database`, `foreign`, `corrupt`; `none`.
const char* name_of(Damage damage);

/// A connection to a cache database. Not thread-safe, and not to be touched by a child that inherited it through fork.
class Database {
public:
  /// Changed whenever a table or the serialised form of a row changes.
  static constexpr int schema_version = 2;
  /// Fixed for ever in the files: "kiln" in ASCII.
  static constexpr int application_id = 0x6b696c6e;

  enum class Access { read, write };

  /// What the first bytes of a file say it is.
  struct Header {
    Damage damage = Damage::none; ///< never `corrupt`
    std::uint32_t schema = 0;     ///< of a Kiln cache
  };
  /// `path` is for messages. To close the file drops the locks of this process on it, where SQLite's own serve (see
  /// lock_vfs.h): for files that nobody here has open. Code::io.
  static Result<Header> read_header(const FileDescriptor& file, const std::string& path);

  /// The content of a cache without rows. A new file begins with all of it, so that no process ever sees half a schema.
  static Result<Bytes> empty_file();

  /// Opens an existing file whose path has no link in it, if it is the `expected` one (else Code::io): nobody can put
  /// another there between the look at it and this. Code::unsupported when it is a cache of another schema
  /// version. Of all calls here: Code::integrity when the file is damaged (`damage` says how), Code::busy when a lock
  /// was not free within `busy_timeout_ms`, Code::not_found when the file was deleted since it was opened,
  /// Code::out_of_memory, Code::io for other trouble. A file that is no cache of this version is never written to.
  static Result<std::unique_ptr<Database>> open(const std::string& path, const FileIdentity& expected, Access access,
                                                int busy_timeout_ms, Damage& damage);
  ~Database();
  Database(const Database&) = delete;
  Database& operator=(const Database&) = delete;

  /// `sql` is kept prepared under its address: give string constants only.
  Query query(const char* sql);
  /// query(sql).run()
  Status run(const char* sql);
  /// Rows changed by the last statement.
  std::int64_t changes() const;
  bool in_transaction() const;
  /// Whether SQLite has found the file damaged since it was opened.
  bool is_damaged() const { return damage_ != Damage::none; }

private:
  friend class Query;
  Database(const std::string& path, int busy_timeout_ms);
  Status configure();
  Status check_header();
  Status execute(const char* script);
  Status failure(int code);
  static int wait_for_lock(void* context, int tries);

  std::string path_;
  std::unique_ptr<LockVfs> vfs_; ///< outlives the handle
  sqlite3* handle_ = nullptr;
  int busy_timeout_ms_;
  Damage damage_ = Damage::none;
  std::int64_t busy_deadline_ns_ = 0;
  std::map<const char*, sqlite3_stmt*> prepared_;
};

/// A write transaction, rolled back unless committed.
class Transaction {
public:
  explicit Transaction(Database& database) : database_(database), begun_(database.run("BEGIN IMMEDIATE")) {}
  ~Transaction();
  Transaction(const Transaction&) = delete;
  Transaction& operator=(const Transaction&) = delete;

  /// Whether the transaction could begin.
  const Status& begun() const { return begun_; }
  Status commit() { return database_.run("COMMIT"); }

private:
  Database& database_;
  Status begun_;
};

} // namespace kiln
