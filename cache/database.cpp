#include "cache/database.h"

#include <sqlite3.h>
#include <sys/stat.h>

#include <algorithm>
#include <array>
#include <chrono>
#include <cstring>
#include <fmt/format.h>
#include <thread>

namespace kiln {
namespace {

/// STRICT keeps every value in its column's type. `code` is last: reading the others then never walks its overflow
/// pages. The second index orders rows by use and answers their number and sum of sizes without the table.
constexpr const char* schema = R"(
CREATE TABLE kernels (
  id INTEGER PRIMARY KEY,
  key BLOB NOT NULL UNIQUE CHECK (length(key) = 32),
  op TEXT NOT NULL,
  desc TEXT NOT NULL,
  isa TEXT NOT NULL,
  target TEXT NOT NULL,
  generator TEXT NOT NULL,
  code_bytes INTEGER NOT NULL,
  compile_us INTEGER NOT NULL,
  created_at INTEGER NOT NULL, -- Unix seconds
  last_hit_at REAL NOT NULL,   -- Unix seconds; the usage file may know a later time
  mac_key INTEGER NOT NULL,    -- which key file `mac` was made with
  mac BLOB NOT NULL,
  signature BLOB,
  code BLOB NOT NULL
) STRICT;
CREATE INDEX kernels_by_use ON kernels (last_hit_at, code_bytes);
)";

/// A damaged header must not make SQLite allocate more than this for one value.
constexpr int largest_value_bytes = 256 << 20;

Status sqlite_error(const std::string& path, sqlite3* handle, int code) {
  const int primary = code & 0xff;
  const Code kind = primary == SQLITE_BUSY || primary == SQLITE_LOCKED ? Code::busy
                    : primary == SQLITE_NOMEM                          ? Code::out_of_memory
                    : primary == SQLITE_CORRUPT || primary == SQLITE_NOTADB || primary == SQLITE_CONSTRAINT ||
                            primary == SQLITE_MISMATCH // no row of Kiln's can break one
                        ? Code::integrity
                        : primary == SQLITE_TOOBIG          ? Code::invalid_argument
                          : code == SQLITE_READONLY_DBMOVED ? Code::not_found
                                                            : Code::io;
  // The handle's message tells more than the code's, but only while it is about the same error.
  const char* text = handle && sqlite3_extended_errcode(handle) == code ? sqlite3_errmsg(handle) : sqlite3_errstr(code);
  return Status::error(kind, fmt::format("{}: {} (SQLite error {})", path, text, code));
}

std::uint32_t big_endian(const std::uint8_t* bytes) {
  return std::uint32_t{bytes[0]} << 24 | std::uint32_t{bytes[1]} << 16 | std::uint32_t{bytes[2]} << 8 | bytes[3];
}

/// Kiln's statements are right: where SQLite refuses one, the file has another schema or format than its header says.
int known_statement_failed(int code) {
  return code == SQLITE_ERROR ? SQLITE_CORRUPT : code;
}

constexpr std::size_t header_bytes = 100; // section 1.3 of SQLite's file format

Database::Header parse(ByteSpan header) {
  if (header.size() < header_bytes || std::memcmp(header.data(), "SQLite format 3", 16) != 0)
    return {.damage = Damage::not_a_database};
  const bool rollback_journal = header[18] == 1 && header[19] == 1;
  if (!rollback_journal || big_endian(&header[68]) != Database::application_id)
    return {.damage = Damage::foreign};
  return {.schema = big_endian(&header[60])};
}

std::int64_t steady_ns() {
  return std::chrono::steady_clock::now().time_since_epoch() / std::chrono::nanoseconds(1);
}

} // namespace

Result<std::string> sqlite_version() {
  // STRICT tables came with 3.37.0 (sqlite.org/stricttables.html).
  if (sqlite3_libversion_number() >= 3'037'000 && sqlite3_threadsafe() != 0)
    return std::string(sqlite3_libversion());
  return Status::error(Code::unsupported,
                       fmt::format("SQLite {}{}: needed is 3.37 or newer, built thread-safe", sqlite3_libversion(),
                                   sqlite3_threadsafe() != 0 ? "" : ", not thread-safe"));
}

bool sqlite_may_lose_wal() {
  return sqlite3_libversion_number() < 3'051'003;
}

const char* name_of(Damage damage) {
  switch (damage) {
  case Damage::not_a_database:
    return "not-a-database";
  case Damage::foreign:
    return "foreign";
  case Damage::corrupt:
    return "corrupt";
  case Damage::none:
    break;
  }
  return "none";
}

Query::Query(Database& database, sqlite3_stmt* statement, int code)
    : database_(database), statement_(statement), code_(code) {}

Query::~Query() {
  if (!statement_)
    return;
  sqlite3_reset(statement_);
  sqlite3_clear_bindings(statement_);
}

Query& Query::bind(ByteSpan bytes) {
  if (code_ == SQLITE_OK) // a null pointer would bind NULL
    code_ = sqlite3_bind_blob64(statement_, ++bound_,
                                bytes.empty() ? reinterpret_cast<const std::uint8_t*>("") : bytes.data(), bytes.size(),
                                SQLITE_STATIC);
  return *this;
}

Query& Query::bind(std::string_view text) {
  if (code_ == SQLITE_OK)
    code_ = sqlite3_bind_text64(statement_, ++bound_, text.empty() ? "" : text.data(), text.size(), SQLITE_STATIC,
                                SQLITE_UTF8);
  return *this;
}

Query& Query::bind(std::int64_t integer) {
  if (code_ == SQLITE_OK)
    code_ = sqlite3_bind_int64(statement_, ++bound_, integer);
  return *this;
}

Query& Query::bind(double real) {
  if (code_ == SQLITE_OK)
    code_ = sqlite3_bind_double(statement_, ++bound_, real);
  return *this;
}

bool Query::step() {
  if (code_ == SQLITE_OK || code_ == SQLITE_ROW)
    code_ = sqlite3_step(statement_);
  return code_ == SQLITE_ROW;
}

Status Query::run() {
  while (step()) {
  }
  return status();
}

Status Query::status() const {
  if (code_ == SQLITE_OK || code_ == SQLITE_ROW || code_ == SQLITE_DONE)
    return {};
  return database_.failure(code_);
}

ByteSpan Query::blob(int column) const {
  const void* bytes = sqlite3_column_blob(statement_, column);
  return {static_cast<const std::uint8_t*>(bytes), static_cast<std::size_t>(sqlite3_column_bytes(statement_, column))};
}

std::string Query::text(int column) const {
  const ByteSpan bytes = blob(column);
  return {reinterpret_cast<const char*>(bytes.data()), bytes.size()};
}

std::int64_t Query::integer(int column) const {
  return sqlite3_column_int64(statement_, column);
}

double Query::real(int column) const {
  return sqlite3_column_double(statement_, column);
}

Transaction::~Transaction() {
  // Some errors roll back by themselves.
  if (begun_ && database_.in_transaction())
    (void)database_.run("ROLLBACK");
}

Database::Database(const std::string& path, int busy_timeout_ms)
    : path_(path), vfs_(std::make_unique<LockVfs>()), busy_timeout_ms_(busy_timeout_ms) {}

Database::~Database() {
  if (handle_ != nullptr && !vfs_->is_intact()) {
    static_cast<void>(vfs_.release()); // with the handle: to close it would close files of the host's
    return;
  }
  for (const auto& [sql, statement] : prepared_)
    sqlite3_finalize(statement);
  sqlite3_close_v2(handle_);
}

Result<Bytes> Database::empty_file() {
  struct Handle {
    sqlite3* handle = nullptr;
    ~Handle() { sqlite3_close_v2(handle); }
  } memory;
  sqlite3*& handle = memory.handle;
  int code = sqlite3_open_v2(":memory:", &handle, SQLITE_OPEN_READWRITE | SQLITE_OPEN_NOMUTEX, nullptr);
  // auto_vacuum is fixed when the first page is made.
  const std::string script =
      fmt::format("PRAGMA auto_vacuum=INCREMENTAL; PRAGMA application_id={}; PRAGMA user_version={}; {}",
                  application_id, schema_version, schema);
  if (code == SQLITE_OK)
    code = sqlite3_exec(handle, script.c_str(), nullptr, nullptr, nullptr);
  if (code != SQLITE_OK)
    return sqlite_error("a new cache", handle, code);
  sqlite3_int64 size = 0;
  unsigned char* image = sqlite3_serialize(handle, "main", &size, 0);
  if (!image)
    return Status::error(Code::out_of_memory, "no memory for a new cache");
  Bytes out(image, image + size);
  sqlite3_free(image);
  return out;
}

Result<Database::Header> Database::read_header(const FileDescriptor& file, const std::string& path) {
  struct stat info;
  if (!file || ::fstat(file.get(), &info) != 0 || !S_ISREG(info.st_mode))
    return Status::error(Code::io, fmt::format("{}: cannot be opened as a file", path));
  const auto size = static_cast<std::size_t>(std::min<std::uint64_t>(size_of(file), header_bytes));
  const Result<Bytes> start = read_at(file, path, 0, size);
  return start ? Result<Header>(parse(*start)) : start.status();
}

Result<std::unique_ptr<Database>> Database::open(const std::string& path, const FileIdentity& expected, Access access,
                                                 int busy_timeout_ms, Damage& damage) {
  damage = Damage::none;
  const int flags = (access == Access::write ? SQLITE_OPEN_READWRITE : SQLITE_OPEN_READONLY) | SQLITE_OPEN_NOMUTEX |
                    SQLITE_OPEN_PRIVATECACHE | SQLITE_OPEN_NOFOLLOW | SQLITE_OPEN_EXRESCODE;
  std::unique_ptr<Database> database(new Database(path, busy_timeout_ms));
  const int code = database->vfs_->open(path, expected, flags, &database->handle_);
  Status status = code == SQLITE_OK ? database->configure() : sqlite_error(path, database->handle_, code);
  damage = database->damage_;
  if (!status)
    return status;
  return database;
}

Status Database::configure() {
  sqlite3_busy_handler(handle_, &wait_for_lock, this);
  sqlite3_limit(handle_, SQLITE_LIMIT_LENGTH, largest_value_bytes);
  // The file is not trusted to hold nothing but what this class put there.
  sqlite3_db_config(handle_, SQLITE_DBCONFIG_DEFENSIVE, 1, nullptr);
  sqlite3_db_config(handle_, SQLITE_DBCONFIG_TRUSTED_SCHEMA, 0, nullptr);
  sqlite3_db_config(handle_, SQLITE_DBCONFIG_ENABLE_TRIGGER, 0, nullptr);
  sqlite3_db_config(handle_, SQLITE_DBCONFIG_ENABLE_VIEW, 0, nullptr);

  if (Status status = check_header(); !status)
    return status;
  // Why a rollback journal and no mmap: SQLite 3.40's write-ahead log can lose a race that corrupts the file, and both
  // map memory that a shortened file turns into SIGBUS. NORMAL: a power cut may cost the newest rows, and each row is
  // authenticated anyway. secure_delete would write zeros over every evicted kernel.
  const char* pragmas =
      "PRAGMA mmap_size=0; PRAGMA cell_size_check=ON; PRAGMA temp_store=MEMORY; PRAGMA secure_delete=OFF;"
      "PRAGMA synchronous=NORMAL; PRAGMA journal_mode=TRUNCATE;";
  return execute(pragmas);
}

/// Looks at the header through SQLite's own file handle before SQLite does: a file that says it has a write-ahead log
/// would be mapped as soon as it is read.
Status Database::check_header() {
  sqlite3_file* file = nullptr;
  std::array<std::uint8_t, header_bytes> header;
  int code = sqlite3_file_control(handle_, "main", SQLITE_FCNTL_FILE_POINTER, &file);
  if (code == SQLITE_OK)
    code = file->pMethods->xRead(file, header.data(), static_cast<int>(header.size()), 0);
  if (code != SQLITE_OK && code != SQLITE_IOERR_SHORT_READ)
    return failure(code);
  const Header parsed = parse(code == SQLITE_OK ? ByteSpan(header) : ByteSpan());
  damage_ = parsed.damage;
  if (damage_ == Damage::not_a_database)
    return Status::error(Code::integrity, fmt::format("{} is not a database", path_));
  if (damage_ == Damage::foreign)
    return Status::error(Code::integrity, fmt::format("{} is not a Kiln cache but another program's", path_));
  if (parsed.schema != schema_version)
    return Status::error(Code::unsupported, fmt::format("{} has schema version {}, this build of Kiln needs {}", path_,
                                                        parsed.schema, schema_version));
  return {};
}

/// The error of a call on this connection; remembers that the file is damaged.
Status Database::failure(int code) {
  if (!vfs_->is_intact())
    return Status::error(Code::not_found, fmt::format("{}: its descriptor was closed by someone else", path_));
  Status status = sqlite_error(path_, handle_, code);
  if (status.code() == Code::integrity)
    damage_ = Damage::corrupt;
  return status;
}

Status Database::execute(const char* script) {
  if (const int code = sqlite3_exec(handle_, script, nullptr, nullptr, nullptr); code != SQLITE_OK)
    return failure(known_statement_failed(code));
  return {};
}

/// SQLite's own waiting sleeps for whole seconds when it was built without usleep.
int Database::wait_for_lock(void* context, int tries) {
  Database& self = *static_cast<Database*>(context);
  const std::int64_t now = steady_ns();
  if (tries == 0)
    self.busy_deadline_ns_ = now + self.busy_timeout_ms_ * std::int64_t{1'000'000};
  if (now >= self.busy_deadline_ns_)
    return 0;
  std::this_thread::sleep_for(std::chrono::microseconds(tries < 10 ? 100 : 1000));
  return 1;
}

Query Database::query(const char* sql) {
  sqlite3_stmt*& statement = prepared_[sql];
  int code = SQLITE_OK;
  if (!statement)
    code = sqlite3_prepare_v3(handle_, sql, -1, SQLITE_PREPARE_PERSISTENT, &statement, nullptr);
  if (!statement)
    code = known_statement_failed(code);
  return Query(*this, statement, code);
}

Status Database::run(const char* sql) {
  return query(sql).run();
}

std::int64_t Database::changes() const {
  return sqlite3_changes64(handle_);
}

bool Database::in_transaction() const {
  return sqlite3_get_autocommit(handle_) == 0;
}

} // namespace kiln
