#include <doctest/doctest.h>

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cerrno>
#include <chrono>
#include <csignal>
#include <cstdarg>
#include <cstring>
#include <fstream>
#include <iterator>
#include <set>
#include <thread>

#include <sqlite3.h>

#include "cache/store.h"
#include "tests/emulator.h"
#include "tests/store_fixture.h"

/// Faults of every kind under a store: killed writers, rot, and an SQLite whose every call fails once. What must hold:
/// no crash, no wrong row, and afterwards a cache that works. With KILN_TEST_TORTURE=1 (scripts/cache-torture) as often
/// as the figures in api/doc/threat-model.md say; KILN_TEST_SEED chooses other random numbers, KILN_TEST_DIRECTORY
/// another file system.

using namespace kiln;
using namespace kiln::test;
namespace fs = std::filesystem;

namespace {

bool tortures() {
  return std::getenv("KILN_TEST_TORTURE") != nullptr;
}

/// How often a test does what it does; seldom where the machine is emulated.
int times(int usual, int torture) {
  const char* samples = std::getenv("KILN_TEST_SAMPLES");
  return tortures() ? torture : samples != nullptr ? std::min(usual, std::max(1, std::atoi(samples))) : usual;
}

std::mt19937_64 random_numbers() {
  const char* seed = std::getenv("KILN_TEST_SEED");
  return std::mt19937_64(seed != nullptr ? std::strtoull(seed, nullptr, 10) : 1);
}

/// Of the calls that fail one after another, and of flips, one in so many is tried where everything takes longer.
long slower() {
#if defined(__SANITIZE_ADDRESS__)
  return 4;
#else
  return is_emulated() ? 4 : 1;
#endif
}

/// Row `number` from the store, or nothing; a wrong one counts.
enum class Found { no, yes, wrong };
Found find(Store& store, std::uint64_t number, std::size_t code_bytes) {
  const std::optional<StoreRow> row = store.get(key_of(number));
  return !row ? Found::no : same(*row, row_of(number, code_bytes)) ? Found::yes : Found::wrong;
}

Bytes read_whole(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  return Bytes(std::istreambuf_iterator<char>(file), {});
}

void write_whole(const std::string& path, const Bytes& content) {
  std::ofstream(path, std::ios::binary | std::ios::trunc)
      .write(reinterpret_cast<const char*>(content.data()), static_cast<long>(content.size()));
  REQUIRE(::chmod(path.c_str(), 0600) == 0);
}

std::int64_t bytes_in(const std::string& directory) {
  std::int64_t sum = 0;
  for (const fs::directory_entry& entry : fs::directory_iterator(directory))
    sum += static_cast<std::int64_t>(entry.file_size());
  return sum;
}

// ---------------------------------------------------------------- an SQLite whose calls fail

enum class Fault { io_error, full, access, short_read, busy, no_memory };
constexpr std::array all_faults = {Fault::io_error,   Fault::full, Fault::access,
                                   Fault::short_read, Fault::busy, Fault::no_memory};
const char* name_of(Fault fault) {
  constexpr std::array names = {"I/O error", "full", "access", "short read", "busy", "no memory"};
  return names[static_cast<std::size_t>(fault)];
}

/// The call that is to fail: the `at`-th of those that can fail so, from 0; and all after it when it stays.
struct Plan {
  bool armed = false;
  Fault fault{};
  long at = 0;
  bool stays = false;
  long calls = 0; ///< that could have failed so
  long failed = 0;

  bool strikes(Fault kind) {
    if (!armed || kind != fault)
      return false;
    const long call = calls++;
    const bool hit = stays ? call >= at : call == at;
    failed += hit;
    return hit;
  }
} plan;

/// As a sandbox may be: without the locks of open file descriptions.
bool knows_locks_of_descriptions = true;

bool takes_lock_of_description(int command, const void* argument) {
  return command == F_OFD_SETLK && static_cast<const struct flock*>(argument)->l_type != F_UNLCK;
}

} // namespace

/// Before the C library's: Kiln's own locks fail by plan too.
extern "C" int fcntl(int file, int command, ...) {
  va_list arguments;
  va_start(arguments, command);
  void* const argument = va_arg(arguments, void*);
  va_end(arguments);
  const bool of_descriptions = command == F_OFD_SETLK || command == F_OFD_GETLK;
  errno = 0;
  if (of_descriptions && !knows_locks_of_descriptions)
    errno = EINVAL;
  else if (takes_lock_of_description(command, argument) && plan.strikes(Fault::busy))
    errno = EAGAIN;
  else if (takes_lock_of_description(command, argument) && plan.strikes(Fault::io_error))
    errno = EIO;
  else
    return static_cast<int>(::syscall(SYS_fcntl, file, command, argument));
  return -1;
}

namespace {

/// The file system of SQLite with the plan before it. A file holds the real one behind itself.
struct File {
  sqlite3_file base;
  sqlite3_file* real() { return reinterpret_cast<sqlite3_file*>(this + 1); }
};
sqlite3_file* real(sqlite3_file* file) {
  return reinterpret_cast<File*>(file)->real();
}
sqlite3_vfs* real_vfs = nullptr;
sqlite3_mem_methods real_memory;

int read(sqlite3_file* file, void* buffer, int size, sqlite3_int64 offset) {
  if (plan.strikes(Fault::io_error))
    return SQLITE_IOERR_READ;
  const int code = real(file)->pMethods->xRead(real(file), buffer, size, offset);
  if (code != SQLITE_OK || !plan.strikes(Fault::short_read))
    return code;
  std::memset(static_cast<char*>(buffer) + size / 2, 0, static_cast<std::size_t>(size - size / 2));
  return SQLITE_IOERR_SHORT_READ;
}
int write(sqlite3_file* file, const void* buffer, int size, sqlite3_int64 offset) {
  if (plan.strikes(Fault::io_error)) { // half of it may be there
    (void)real(file)->pMethods->xWrite(real(file), buffer, size / 2, offset);
    return SQLITE_IOERR_WRITE;
  }
  if (plan.strikes(Fault::full))
    return SQLITE_FULL;
  if (plan.strikes(Fault::access))
    return SQLITE_READONLY;
  return real(file)->pMethods->xWrite(real(file), buffer, size, offset);
}
int truncate(sqlite3_file* file, sqlite3_int64 size) {
  return plan.strikes(Fault::io_error) ? SQLITE_IOERR_TRUNCATE : real(file)->pMethods->xTruncate(real(file), size);
}
int sync(sqlite3_file* file, int flags) {
  return plan.strikes(Fault::io_error) ? SQLITE_IOERR_FSYNC
         : plan.strikes(Fault::full)   ? SQLITE_FULL
                                       : real(file)->pMethods->xSync(real(file), flags);
}
int file_size(sqlite3_file* file, sqlite3_int64* size) {
  return plan.strikes(Fault::io_error) ? SQLITE_IOERR_FSTAT : real(file)->pMethods->xFileSize(real(file), size);
}
int lock(sqlite3_file* file, int level) {
  return plan.strikes(Fault::io_error) ? SQLITE_IOERR_LOCK
         : plan.strikes(Fault::busy)   ? SQLITE_BUSY
                                       : real(file)->pMethods->xLock(real(file), level);
}
int check_reserved_lock(sqlite3_file* file, int* out) {
  return plan.strikes(Fault::io_error) ? SQLITE_IOERR_CHECKRESERVEDLOCK
                                       : real(file)->pMethods->xCheckReservedLock(real(file), out);
}
int close(sqlite3_file* file) {
  return real(file)->pMethods->xClose(real(file));
}
int unlock(sqlite3_file* file, int level) {
  return real(file)->pMethods->xUnlock(real(file), level);
}
int file_control(sqlite3_file* file, int operation, void* argument) {
  return real(file)->pMethods->xFileControl(real(file), operation, argument);
}
int sector_size(sqlite3_file* file) {
  return real(file)->pMethods->xSectorSize(real(file));
}
int device_characteristics(sqlite3_file* file) {
  return real(file)->pMethods->xDeviceCharacteristics(real(file));
}

int open(sqlite3_vfs*, const char* name, sqlite3_file* file, int flags, int* out_flags) {
  static const sqlite3_io_methods methods = {
      .iVersion = 1,
      .xClose = close,
      .xRead = read,
      .xWrite = write,
      .xTruncate = truncate,
      .xSync = sync,
      .xFileSize = file_size,
      .xLock = lock,
      .xUnlock = unlock,
      .xCheckReservedLock = check_reserved_lock,
      .xFileControl = file_control,
      .xSectorSize = sector_size,
      .xDeviceCharacteristics = device_characteristics,
      .xShmMap = nullptr,
      .xShmLock = nullptr,
      .xShmBarrier = nullptr,
      .xShmUnmap = nullptr,
      .xFetch = nullptr,
      .xUnfetch = nullptr,
  };
  file->pMethods = nullptr;
  if (plan.strikes(Fault::io_error) || plan.strikes(Fault::access))
    return SQLITE_CANTOPEN;
  const int code = real_vfs->xOpen(real_vfs, name, real(file), flags, out_flags);
  if (code == SQLITE_OK)
    file->pMethods = &methods;
  return code;
}
int remove(sqlite3_vfs*, const char* name, int sync_directory) {
  return plan.strikes(Fault::io_error) || plan.strikes(Fault::access)
             ? SQLITE_IOERR_DELETE
             : real_vfs->xDelete(real_vfs, name, sync_directory);
}
int access(sqlite3_vfs*, const char* name, int flags, int* out) {
  return plan.strikes(Fault::io_error) || plan.strikes(Fault::access) ? SQLITE_IOERR_ACCESS
                                                                      : real_vfs->xAccess(real_vfs, name, flags, out);
}
int full_pathname(sqlite3_vfs*, const char* name, int size, char* out) {
  return plan.strikes(Fault::access) ? SQLITE_CANTOPEN : real_vfs->xFullPathname(real_vfs, name, size, out);
}

void* allocate(int size) {
  return plan.strikes(Fault::no_memory) ? nullptr : real_memory.xMalloc(size);
}
void* reallocate(void* block, int size) {
  return plan.strikes(Fault::no_memory) ? nullptr : real_memory.xRealloc(block, size);
}

void install_faults() {
  REQUIRE(sqlite3_config(SQLITE_CONFIG_GETMALLOC, &real_memory) == SQLITE_OK);
  sqlite3_mem_methods memory = real_memory;
  memory.xMalloc = allocate;
  memory.xRealloc = reallocate;
  REQUIRE(sqlite3_config(SQLITE_CONFIG_MALLOC, &memory) == SQLITE_OK);
  real_vfs = sqlite3_vfs_find(nullptr);
  static sqlite3_vfs vfs = *real_vfs;
  vfs.zName = "kiln-faults";
  vfs.szOsFile = static_cast<int>(sizeof(File)) + real_vfs->szOsFile;
  vfs.xOpen = open;
  vfs.xDelete = remove;
  vfs.xAccess = access;
  vfs.xFullPathname = full_pathname;
  // The rest takes the real one's data with it.
  REQUIRE(sqlite3_vfs_register(&vfs, 1) == SQLITE_OK);
}

} // namespace

int main(int argc, char** argv) {
  doctest::Context context(argc, argv);
  return context.run();
}

TEST_CASE("faults: SQLite's calls fail one after another, and none costs more than its call") {
  static const bool installed = (install_faults(), true); // before SQLite's first use
  REQUIRE(installed);
  constexpr std::size_t code_bytes = 9000;
  Place place;
  place.options.busy_timeout_ms = 0;
  place.options.max_bytes = 120'000;
  {
    const std::unique_ptr<Store> store = place.open();
    for (int i = 0; i < 8; ++i)
      REQUIRE(store->put(row_of(i, code_bytes)));
  }
  const Bytes pristine = read_whole(place.database());
  int wrong = 0;
  const auto use = [&](Store& store) {
    for (const std::uint64_t number : {0, 100, 3})
      wrong += find(store, number, code_bytes) == Found::wrong;
    if (store.put(row_of(20, code_bytes)))
      wrong += find(store, 20, code_bytes) == Found::wrong;
    for (int i = 21; i < 25; ++i) // beyond the bound: rows are evicted
      (void)store.put(row_of(i, code_bytes));
    store.flush();
    if (const Result<std::vector<Store::Listed>> rows = store.list())
      for (const Store::Listed& listed : *rows)
        wrong += listed.code_bytes != code_bytes;
    (void)store.stats();
    (void)store.find("");
    if (const Result<Store::Verified> verified = store.verify(true))
      wrong += plan.fault != Fault::short_read && verified->bad != 0;
    (void)store.remove(key_of(3));
    (void)store.prune(60'000, false);
  };

  long runs = 0, struck = 0, replaced = 0;
  for (const Fault fault : all_faults)
    for (const bool stays : {false, true}) {
      // Every call in turn. Some of them where there are thousands (memory) and where all that follow fail too; in the
      // long run every one.
      long step = 1;
      for (long at = 0;; at += step) {
        INFO(name_of(fault), stays ? " from call " : " at call ", at);
        for (const fs::directory_entry& entry : fs::directory_iterator(place.options.directory))
          fs::remove(entry);
        write_whole(place.database(), pristine);
        plan = {.armed = true, .fault = fault, .at = at, .stays = stays};
        {
          const std::unique_ptr<Store> store = place.open();
          use(*store);
        }
        const Plan done = std::exchange(plan, {});
        ++runs;
        struck += done.failed != 0;
        REQUIRE(wrong == 0);
        // The fault is over: the same process, a new store.
        const std::unique_ptr<Store> store = place.open();
        for (int i = 0; i < 27; ++i)
          REQUIRE(find(*store, i, code_bytes) != Found::wrong);
        REQUIRE(store->put(row_of(50, code_bytes)));
        REQUIRE(find(*store, 50, code_bytes) == Found::yes);
        const Result<Store::Verified> verified = store->verify(false);
        REQUIRE(verified);
        REQUIRE(verified->bad == 0);
        REQUIRE(bytes_in(place.options.directory) < 2 * 120'000 + 2 * 20'000);
        // Only what looks like a shortened file may be taken for damage.
        const bool another = store->path() != place.database();
        replaced += another;
        REQUIRE((fault == Fault::short_read || !another));
        if (done.failed == 0)
          break; // there are no more calls
        if (!tortures())
          step = (fault == Fault::no_memory ? 61 : stays ? 11 : 1) * slower();
      }
    }
  MESSAGE(runs, " runs, ", struck, " with a fault: 0 crashes, ", wrong, " wrong rows, ", replaced,
          " files replaced (short reads)");
  CHECK(struck > 100);
}

TEST_CASE("faults: where the system has no locks of open file descriptions, SQLite's own serve") {
  knows_locks_of_descriptions = false;
  Place place;
  const std::unique_ptr<Store> store = place.open(), another = place.open();
  for (int i = 0; i < 3; ++i)
    CHECK(store->put(row_of(i)));
  CHECK(find(*another, 1, 100) == Found::yes);
  sqlite3* handle = nullptr;
  const auto by_sqlite_in_a_child = [&](const char* sql) {
    const pid_t child = ::fork();
    if (child == 0) {
      const bool done = sqlite3_open(place.database().c_str(), &handle) == SQLITE_OK &&
                        sqlite3_exec(handle, sql, nullptr, nullptr, nullptr) == SQLITE_OK;
      ::_exit(done ? 0 : 1);
    }
    int status = 1;
    ::waitpid(child, &status, 0);
    return status == 0;
  };
  CHECK(by_sqlite_in_a_child("BEGIN EXCLUSIVE"));
  sqlite3_stmt* statement = nullptr; // a reader in this process, whose lock keeps a writer in another one out
  REQUIRE(sqlite3_open(place.database().c_str(), &handle) == SQLITE_OK);
  REQUIRE(sqlite3_prepare_v2(handle, "SELECT key FROM kernels", -1, &statement, nullptr) == SQLITE_OK);
  REQUIRE(sqlite3_step(statement) == SQLITE_ROW);
  { // and is not dropped by a store that comes and goes
    const std::unique_ptr<Store> third = place.open();
    CHECK(find(*third, 1, 100) == Found::yes);
  }
  CHECK(!by_sqlite_in_a_child("BEGIN EXCLUSIVE"));
  sqlite3_finalize(statement);
  CHECK(by_sqlite_in_a_child("BEGIN EXCLUSIVE"));
  sqlite3_close(handle);
  knows_locks_of_descriptions = true;
  CHECK(place.warnings.empty());
}

// ---------------------------------------------------------------- killed writers

namespace {

/// Puts, gets and evicts until it is killed.
[[noreturn]] void write_until_killed(const Place& place, std::uint64_t seed, std::atomic<int>& wrong,
                                     std::atomic<long>& puts) {
  ::alarm(100);
  std::mt19937_64 random(seed);
  const std::unique_ptr<Store> store = place.open();
  for (;;) {
    const std::uint64_t number = random() % 64;
    const std::size_t size = 500 + 700 * (number % 32);
    if (random() % 2 == 0)
      puts += static_cast<bool>(store->put(row_of(number, size)));
    else
      wrong += find(*store, number, size) == Found::wrong;
    if (random() % 64 == 0)
      (void)store->prune(200'000, false);
  }
}

} // namespace

TEST_CASE("faults: writers killed at random points leave no bad row and no damaged file") {
  const int kills = times(static_cast<int>(200 / slower()), 2000);
  auto random = random_numbers();
  Place place;
  place.options.max_bytes = 400'000;
  place.options.busy_timeout_ms = 2000; // to see rows, not who has the lock
  struct Counts {
    std::atomic<int> wrong{0};
    std::atomic<long> puts{0};
  };
  void* const memory = ::mmap(nullptr, sizeof(Counts), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
  REQUIRE(memory != MAP_FAILED);
  Counts& counts = *new (memory) Counts;
  std::array<pid_t, 3> writers{};
  const auto start = [&](pid_t& writer) {
    const std::uint64_t seed = random();
    writer = ::fork();
    if (writer == 0)
      write_until_killed(place, seed, counts.wrong, counts.puts);
  };
  for (pid_t& writer : writers)
    start(writer);
  int wrong = 0, bad = 0, hot_journals = 0, hits = 0;
  const auto look_at = [&](Store& store, std::uint64_t number) {
    const Found found = find(store, number, 500 + 700 * (number % 32));
    wrong += found == Found::wrong;
    hits += found == Found::yes;
  };
  for (int kill = 0; kill < kills; ++kill) {
    // On a slow machine it is the writers that set the pace.
    for (int waited_ms = 0; counts.puts <= kill && waited_ms < 20'000; ++waited_ms)
      std::this_thread::sleep_for(std::chrono::milliseconds(1));
    std::this_thread::sleep_for(std::chrono::microseconds(random() % 8000));
    pid_t& writer = writers[random() % writers.size()];
    ::kill(writer, SIGKILL);
    int status = 0;
    REQUIRE(::waitpid(writer, &status, 0) == writer);
    REQUIRE(WIFSIGNALED(status));
    CHECK(WTERMSIG(status) == SIGKILL); // a crash of its own would be another signal
    hot_journals += fs::exists(place.database() + "-journal") && fs::file_size(place.database() + "-journal") > 0;
    const std::unique_ptr<Store> store = place.open();
    for (int i = 0; i < 4; ++i)
      look_at(*store, random() % 64);
    const Result<StoreStats> stats = store->stats(); // the writers may hold the lock
    bad += stats ? static_cast<int>(stats->refused) : 0;
    start(writer);
  }
  for (const pid_t writer : writers) {
    ::kill(writer, SIGKILL);
    ::waitpid(writer, nullptr, 0);
  }
  const std::unique_ptr<Store> store = place.open();
  for (int number = 0; number < 64; ++number)
    look_at(*store, number);
  const Result<Store::Verified> verified = store->verify(false);
  REQUIRE(verified);
  const bool replaced = fs::exists(place.options.directory + "/kernels-1.db");
  const Result<UsageFile::Totals> totals = store->totals(); // no kill damaged the usage file
  REQUIRE(totals);
  CHECK(totals->counts.puts > counts.puts - 2 * kills);
  CHECK(totals->counts.refused == 0);
  MESSAGE(kills, " kills, ", counts.puts.load(), " puts, ", hot_journals, " hot journals seen, ", hits,
          " rows looked at: ", wrong + counts.wrong, " wrong, ", bad + verified->bad, " refused, ", int{replaced},
          " files replaced");
  CHECK(counts.puts > kills);
  CHECK(hits > 0);
  CHECK(wrong + counts.wrong == 0);
  CHECK(bad == 0);
  CHECK(verified->bad == 0);
  CHECK(!replaced);
  for (const std::string& warning : place.warnings)
    CHECK_MESSAGE(false, warning);
  ::munmap(memory, sizeof(Counts));
}

// ---------------------------------------------------------------- rot

TEST_CASE("faults: no flipped bit of a stored row is loaded") {
  constexpr int rows = 20;
  constexpr std::size_t code_bytes = 150;
  Place place;
  {
    const std::unique_ptr<Store> store = place.open();
    for (int i = 0; i < rows; ++i)
      REQUIRE(store->put(row_of(i, code_bytes)));
  }
  sqlite3* handle = nullptr;
  REQUIRE(sqlite3_open(place.database().c_str(), &handle) == SQLITE_OK);
  sqlite3_exec(handle, "PRAGMA synchronous=OFF; PRAGMA journal_mode=MEMORY", nullptr, nullptr, nullptr);
  const std::unique_ptr<Store> store = place.open(CacheMode::read_only); // leaves what it refuses
  long flips = 0, loaded = 0, wrong_of_unauthenticated = 0;
  struct Column {
    const char* name;
    const char* type;
    bool authenticated;
  };
  constexpr Column columns[] = {{"key", "BLOB", true},           {"op", "TEXT", true},
                                {"desc", "TEXT", true},          {"isa", "TEXT", true},
                                {"target", "TEXT", true},        {"generator", "TEXT", true},
                                {"mac", "BLOB", true},           {"code", "BLOB", true},
                                {"code_bytes", "INTEGER", true}, {"compile_us", "INTEGER", true},
                                {"created_at", "INTEGER", true}, {"mac_key", "INTEGER", true},
                                {"last_hit_at", "REAL", false}};
  const int every = tortures() ? 1 : 5; // co-prime to 8: every bit of a byte has its turn
  for (const Column& column : columns) {
    const bool integer = column.type[0] == 'I';
    sqlite3_stmt* read = nullptr;
    sqlite3_stmt* change = nullptr;
    REQUIRE(sqlite3_prepare_v2(handle, fmt::format("SELECT {} FROM kernels WHERE id = ?", column.name).c_str(), -1,
                               &read, nullptr) == SQLITE_OK);
    REQUIRE(sqlite3_prepare_v2(
                handle,
                fmt::format("UPDATE kernels SET {} = CAST(? AS {}) WHERE id = ?", column.name, column.type).c_str(), -1,
                &change, nullptr) == SQLITE_OK);
    for (int i = 0; i < rows; ++i) {
      sqlite3_bind_int64(read, 1, i + 1);
      REQUIRE(sqlite3_step(read) == SQLITE_ROW);
      Bytes content(8);
      if (integer) {
        const std::int64_t value = sqlite3_column_int64(read, 0);
        std::memcpy(content.data(), &value, 8);
      } else {
        const auto* bytes = static_cast<const std::uint8_t*>(sqlite3_column_blob(read, 0));
        content.assign(bytes, bytes + sqlite3_column_bytes(read, 0));
      }
      sqlite3_reset(read);
      const auto set = [&](const Bytes& bytes) {
        std::int64_t value = 0;
        if (integer) {
          std::memcpy(&value, bytes.data(), 8);
          sqlite3_bind_int64(change, 1, value);
        } else {
          sqlite3_bind_blob(change, 1, bytes.data(), static_cast<int>(bytes.size()), SQLITE_STATIC);
        }
        sqlite3_bind_int64(change, 2, i + 1);
        const int code = sqlite3_step(change);
        sqlite3_reset(change);
        REQUIRE(code == SQLITE_DONE);
      };
      for (std::size_t bit = static_cast<std::size_t>(i % every); bit < 8 * content.size();
           bit += static_cast<std::size_t>(every)) {
        Bytes flipped = content;
        flipped[bit / 8] ^= static_cast<std::uint8_t>(1 << bit % 8);
        set(flipped);
        ++flips;
        const Found found = find(*store, static_cast<std::uint64_t>(i), code_bytes);
        if (column.authenticated)
          loaded += found != Found::no;
        else
          wrong_of_unauthenticated += found != Found::yes;
      }
      set(content);
      REQUIRE(find(*store, static_cast<std::uint64_t>(i), code_bytes) == Found::yes);
    }
    sqlite3_finalize(read);
    sqlite3_finalize(change);
  }
  sqlite3_close(handle);
  MESSAGE(flips, " bits of ", rows, " rows flipped: ", loaded, " loaded");
  CHECK(loaded == 0);
  CHECK(wrong_of_unauthenticated == 0);
}

TEST_CASE("faults: random flips in the file give right rows or none") {
  const int flips = times(2000 / static_cast<int>(slower()), 100'000);
  constexpr int rows = 20;
  const auto size_of = [](std::uint64_t number) { return std::size_t{200} + 450 * number; };
  auto random = random_numbers();
  Place place;
  {
    const std::unique_ptr<Store> store = place.open();
    for (int i = 0; i < rows; ++i)
      REQUIRE(store->put(row_of(i, size_of(i))));
  }
  const Bytes pristine = read_whole(place.database());
  long wrong = 0, hits = 0, misses = 0, not_stored = 0;
  for (int i = 0; i < flips; ++i) {
    INFO("flip ", i);
    // Some in the header and the first pages, where they do the most.
    const std::size_t range = i % 4 == 0 ? 100 : i % 4 == 1 ? 3 * 4096 : pristine.size();
    const std::size_t bit = random() % (8 * range);
    Bytes flipped = pristine;
    flipped[bit / 8] ^= static_cast<std::uint8_t>(1 << bit % 8);
    write_whole(place.database(), flipped);
    const bool writes = i % 8 == 0;
    {
      const std::unique_ptr<Store> store = place.open(writes ? CacheMode::read_write : CacheMode::read_only);
      for (int look = 0; look < 3; ++look) {
        const std::uint64_t number = random() % rows;
        const Found found = find(*store, number, size_of(number));
        wrong += found == Found::wrong;
        ++(found == Found::yes ? hits : misses);
      }
      if (writes) {
        const Status put = store->put(row_of(30, 3000));
        not_stored += !put || find(*store, 30, 3000) != Found::yes;
        CHECK_MESSAGE(put, "bit ", bit, ": ", put.message());
        (void)store->verify(true);
        (void)store->prune(40'000, false);
      }
    }
    if (writes)
      for (const fs::directory_entry& entry : fs::directory_iterator(place.options.directory))
        fs::remove(entry);
  }
  MESSAGE(flips, " flips: ", hits, " right rows, ", misses, " misses, ", wrong,
          " wrong; puts that failed: ", not_stored);
  CHECK(wrong == 0);
  CHECK(hits > misses);
  CHECK(misses > 0);
  CHECK(not_stored == 0);
}

// ---------------------------------------------------------------- the bound on size

TEST_CASE("faults: after each write the directory holds at most the bound and one entry") {
  auto random = random_numbers();
  Place place;
  place.options.max_bytes = 300'000;
  const std::unique_ptr<Store> store = place.open();
  std::int64_t largest = 0;
  for (int i = 0; i < times(400, 5000); ++i) {
    // Half of them small, some nearly as large as the bound.
    const std::size_t size = random() % 2 == 0 ? random() % 2000 : random() % 230'000;
    REQUIRE(store->put(row_of(random() % 500, size)));
    const std::int64_t entry = (static_cast<std::int64_t>(size) + 2 * 4096) / 4096 * 4096;
    const std::int64_t bytes = bytes_in(place.options.directory);
    largest = std::max(largest, bytes);
    REQUIRE(bytes <= place.options.max_bytes + std::max<std::int64_t>(entry, 230'000 + 2 * 4096));
    const Result<StoreStats> stats = store->stats();
    REQUIRE(stats);
    REQUIRE(stats->bytes <= place.options.max_bytes);
  }
  MESSAGE("bound ", place.options.max_bytes, " bytes, most on disk ", largest);
  CHECK(largest > 250'000);
}
