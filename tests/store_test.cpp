#include <atomic>
#include <chrono>
#include <csignal>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <functional>
#include <mutex>
#include <random>
#include <thread>

#include <fcntl.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include <doctest/doctest.h>
#include <fmt/format.h>
#include <sqlite3.h>

#include "cache/database.h"
#include "cache/store.h"
#include "cache/trusted_directory.h"
#include "tests/store_fixture.h"

using namespace kiln;
using namespace kiln::test;
namespace fs = std::filesystem;

namespace {

/// A connection beside the store's, as another program would have it.
class Connection {
public:
  explicit Connection(const std::string& path) { REQUIRE(sqlite3_open(path.c_str(), &handle_) == SQLITE_OK); }
  ~Connection() { sqlite3_close(handle_); }
  void run(const std::string& sql) {
    INFO(sql);
    const int code = sqlite3_exec(handle_, sql.c_str(), nullptr, nullptr, nullptr);
    CHECK_MESSAGE(code == SQLITE_OK, sqlite3_errmsg(handle_));
  }
  std::int64_t integer(const std::string& sql) {
    INFO(sql);
    sqlite3_stmt* statement = nullptr;
    REQUIRE(sqlite3_prepare_v2(handle_, sql.c_str(), -1, &statement, nullptr) == SQLITE_OK);
    REQUIRE(sqlite3_step(statement) == SQLITE_ROW);
    const std::int64_t out = sqlite3_column_int64(statement, 0);
    sqlite3_finalize(statement);
    return out;
  }

private:
  sqlite3* handle_ = nullptr;
};

bool has(Store& store, std::uint64_t number, std::size_t code_bytes = 100) {
  const std::optional<StoreRow> row = store.get(key_of(number));
  CHECK((!row || same(*row, row_of(number, code_bytes))));
  return row.has_value();
}

StoreStats stats_of(Store& store) {
  const Result<StoreStats> stats = store.stats();
  REQUIRE(stats);
  return *stats;
}

bool mentions(const std::string& text, std::string_view part) {
  return text.find(part) != std::string::npos;
}

/// Runs `body` in a child made by fork, which a hang ends; true when it returned true.
bool in_child(const std::function<bool()>& body) {
  const pid_t child = ::fork();
  if (child == 0) {
    ::alarm(60);
    ::_exit(body() ? 0 : 1);
  }
  int status = 0;
  REQUIRE(::waitpid(child, &status, 0) == child);
  return WIFEXITED(status) && WEXITSTATUS(status) == 0;
}

void write_file(const std::string& path, ByteSpan content, mode_t mode = 0600) {
  std::ofstream(path, std::ios::binary)
      .write(reinterpret_cast<const char*>(content.data()), static_cast<long>(content.size()));
  REQUIRE(::chmod(path.c_str(), mode) == 0);
}

Bytes read_whole(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  return Bytes(std::istreambuf_iterator<char>(file), {});
}

mode_t mode_of(const std::string& path) {
  struct stat info;
  REQUIRE(::stat(path.c_str(), &info) == 0);
  return info.st_mode & 07777;
}

/// A cache at `place` with rows 0 to `rows` - 1, closed.
void fill(const Place& place, int rows, std::size_t code_bytes = 100) {
  const std::unique_ptr<Store> store = place.open();
  for (int i = 0; i < rows; ++i)
    REQUIRE(store->put(row_of(i, code_bytes)));
}

} // namespace

TEST_CASE("store: rows that are put together are all there or none is") {
  Place place;
  place.options.max_bytes = 256 << 10;
  fill(place, 3);
  const auto rows = [](int first, int count) {
    std::vector<StoreRow> out;
    for (int i = first; i < first + count; ++i)
      out.push_back(row_of(static_cast<std::uint64_t>(i), 20'000));
    return out;
  };
  const std::unique_ptr<Store> store = place.open();
  CHECK(store->put_all({}));
  REQUIRE(store->put_all(rows(10, 8)));
  for (std::uint64_t i = 10; i < 18; ++i)
    CHECK(has(*store, i, 20'000));
  CHECK(stats_of(*store).puts == 8);

  const Status too_many = store->put_all(rows(20, 14)); // 280,000 bytes: they would evict each other
  CHECK(too_many.code() == Code::unsupported);
  CHECK(mentions(too_many.message(), "14 kernels do not fit together"));
  for (std::uint64_t i = 20; i < 34; ++i)
    CHECK(!has(*store, i, 20'000));
  for (std::uint64_t i = 10; i < 18; ++i) // what was there still is
    CHECK(has(*store, i, 20'000));
}

TEST_CASE("store: a row comes back as it was put, from this store and from the next") {
  Place place;
  {
    const std::unique_ptr<Store> store = place.open();
    CHECK(!fs::exists(place.options.directory));
    CHECK(!store->get(key_of(1)));
    CHECK(!fs::exists(place.options.directory));
    for (std::size_t code_bytes :
         {std::size_t{0}, std::size_t{1}, std::size_t{4000}, std::size_t{16384}, std::size_t{1} << 20}) {
      CHECK(store->put(row_of(code_bytes, code_bytes)));
      CHECK(has(*store, code_bytes, code_bytes));
    }
    CHECK(store->path() == place.database());
  }
  const std::unique_ptr<Store> store = place.open();
  CHECK(has(*store, 16384, 16384));
  CHECK(!has(*store, 2));
  const StoreStats stats = stats_of(*store);
  CHECK(stats.rows == 5);
  CHECK(stats.bytes == 1 + 4000 + 16384 + (1 << 20));
  CHECK(stats.file_bytes >= stats.bytes);
  CHECK(stats.disk_hits == 1);
  CHECK(stats.misses == 1);
  CHECK(mode_of(place.options.directory) == 0700);
  CHECK(mode_of(place.options.key_directory) == 0700);
  CHECK(mode_of(place.database()) == 0600);
  CHECK(mode_of(place.key_file()) == 0600);
  CHECK(fs::file_size(place.key_file()) == 32);
  CHECK(place.warnings.empty());
}

TEST_CASE("store: a second put replaces the row") {
  Place place;
  const std::unique_ptr<Store> store = place.open();
  StoreRow row = row_of(1);
  REQUIRE(store->put(row));
  row.code = {1, 2, 3};
  row.created_at = 0;
  REQUIRE(store->put(row));
  const std::optional<StoreRow> found = store->get(row.key);
  REQUIRE(found);
  CHECK(found->code == row.code);
  CHECK(found->created_at > 1'700'000'000);
  CHECK(found->last_hit_at >= found->created_at);
  CHECK(stats_of(*store).rows == 1);
}

TEST_CASE("store: text of any bytes survives") {
  Place place;
  const std::unique_ptr<Store> store = place.open();
  StoreRow row = row_of(1);
  row.desc = std::string("a\0b\xff\n'", 6);
  row.isa.clear();
  REQUIRE(store->put(row));
  const std::optional<StoreRow> found = store->get(row.key);
  REQUIRE(found);
  CHECK(same(*found, row));
}

TEST_CASE("store: a change of any authenticated column is refused, the row removed and counted") {
  for (const char* change :
       {"op = 'int8_mn'", "desc = desc || ' '", "isa = 'avx2'", "target = ''", "generator = 'b'", "code_bytes = 99",
        "compile_us = 13", "created_at = created_at + 1", "mac_key = mac_key + 1", "mac = zeroblob(32)",
        "mac = substr(mac, 1, 31)", "signature = x'01'", "code = substr(code, 1, 99)",
        "code = CAST(code || x'00' AS BLOB)", "op = op || substr(desc, 1, 1), desc = substr(desc, 2)"}) {
    INFO(change);
    Place place;
    fill(place, 2);
    Connection(place.database()).run(fmt::format("UPDATE kernels SET {} WHERE desc LIKE '% k=0'", change));
    const std::unique_ptr<Store> store = place.open();
    CHECK(!has(*store, 0));
    CHECK(has(*store, 1));
    const StoreStats stats = stats_of(*store);
    CHECK(stats.refused == 1);
    CHECK(stats.misses == 1);
    CHECK(stats.rows == 1);
    REQUIRE(place.warnings.size() == 1);
    CHECK(mentions(place.warnings[0], key_of(0).hex()));
    // The compiled-again kernel takes its place.
    CHECK(store->put(row_of(0)));
    CHECK(has(*store, 0));
  }
}

TEST_CASE("store: the time of use is not authenticated") {
  Place place;
  fill(place, 1);
  Connection(place.database()).run("UPDATE kernels SET last_hit_at = 5");
  const std::unique_ptr<Store> store = place.open();
  const std::optional<StoreRow> row = store->get(key_of(0));
  REQUIRE(row);
  CHECK(row->last_hit_at == 5);
}

TEST_CASE("store: every flipped bit of a code is refused") {
  Place place;
  const StoreRow row = row_of(0, 24);
  const std::unique_ptr<Store> store = place.open();
  REQUIRE(store->put(row));
  Connection connection(place.database());
  connection.run("CREATE TABLE saved AS SELECT * FROM kernels");
  for (std::size_t bit = 0; bit < 8 * row.code.size(); ++bit) {
    Bytes code = row.code;
    code[bit / 8] ^= static_cast<std::uint8_t>(1 << bit % 8);
    std::string hex;
    for (const std::uint8_t byte : code)
      hex += fmt::format("{:02x}", byte);
    connection.run("DELETE FROM kernels");
    connection.run("INSERT INTO kernels SELECT * FROM saved");
    CHECK(store->get(row.key));
    connection.run(fmt::format("UPDATE kernels SET code = x'{}'", hex));
    CHECK(!store->get(row.key));
  }
  CHECK(stats_of(*store).refused == static_cast<std::int64_t>(8 * row.code.size()));
  CHECK(place.warnings.size() == 1);
}

TEST_CASE("store: rows that change places are both refused") {
  Place place;
  fill(place, 3);
  const std::string zero = key_of(0).hex(), one = key_of(1).hex();
  Connection(place.database())
      .run(fmt::format("UPDATE kernels SET key = zeroblob(32) WHERE key = x'{0}'; UPDATE kernels SET key = x'{0}' "
                       "WHERE key = x'{1}';"
                       "UPDATE kernels SET key = x'{1}' WHERE key = zeroblob(32)",
                       zero, one));
  const std::unique_ptr<Store> store = place.open();
  CHECK(!has(*store, 0));
  CHECK(!has(*store, 1));
  CHECK(has(*store, 2));
  CHECK(stats_of(*store).refused == 2);
}

TEST_CASE("store: a copied cache is worth nothing under another user's key") {
  Place mine, other;
  fill(mine, 2);
  fill(other, 1);
  fs::copy_file(other.database(), mine.database(), fs::copy_options::overwrite_existing);
  const std::unique_ptr<Store> store = mine.open();
  CHECK(!has(*store, 0));
  CHECK(stats_of(*store).refused == 1);
}

TEST_CASE("store: without its key file a cache is a miss, and the next put makes a key") {
  Place place;
  fill(place, 2);
  fs::remove(place.key_file());
  const std::unique_ptr<Store> store = place.open();
  CHECK(!has(*store, 0));
  CHECK(!has(*store, 1));
  CHECK(!fs::exists(place.key_file()));
  CHECK(place.warnings.size() == 1);
  CHECK(!store->verify(true));
  CHECK(stats_of(*store).rows == 2);
  CHECK(store->put(row_of(0)));
  CHECK(has(*store, 0));
  CHECK(!has(*store, 1));
  CHECK(stats_of(*store).refused == 1);
}

TEST_CASE("store: the least recently used rows go first, and the bound holds after each put") {
  Place place;
  place.options.max_bytes = 400'000;
  constexpr std::size_t code_bytes = 30'000;
  const std::unique_ptr<Store> store = place.open();
  int count = 0;
  while (stats_of(*store).evictions == 0) {
    REQUIRE(count < 14);
    REQUIRE(store->put(row_of(count++, code_bytes)));
    if (count == 5)
      CHECK(has(*store, 0, code_bytes)); // from now on older than row 4 only by creation
  }
  CHECK(count > 10); // the bound is used
  CHECK(has(*store, 0, code_bytes));
  CHECK(!has(*store, 1, code_bytes));
  for (int i = 2; i < count; ++i)
    CHECK(has(*store, i, code_bytes));
  // Now row 0 is the oldest, then 2, 3, …
  REQUIRE(store->put(row_of(100, code_bytes)));
  CHECK(!has(*store, 0, code_bytes));
  CHECK(has(*store, 2, code_bytes)); // the newest again
  REQUIRE(store->put(row_of(101, code_bytes)));
  CHECK(!has(*store, 3, code_bytes));
  CHECK(has(*store, 2, code_bytes));

  for (int i = 200; i < 300; ++i) {
    REQUIRE(store->put(row_of(i, code_bytes)));
    const StoreStats stats = stats_of(*store);
    CHECK(stats.bytes <= place.options.max_bytes);
    CHECK(stats.file_bytes <=
          place.options.max_bytes + 2 * static_cast<std::int64_t>(code_bytes)); // free pages are used again
  }
  CHECK(place.warnings.empty());
}

TEST_CASE("store: a kernel larger than the bound is refused and costs no other") {
  Place place;
  place.options.max_bytes = 400'000;
  const std::unique_ptr<Store> store = place.open();
  for (int i = 0; i < 5; ++i)
    REQUIRE(store->put(row_of(i)));
  const Status status = store->put(row_of(9, 400'000));
  CHECK(status.code() == Code::unsupported);
  CHECK(mentions(status.message(), "400000"));
  CHECK(!has(*store, 9));
  for (int i = 0; i < 5; ++i)
    CHECK(has(*store, i));
  CHECK(stats_of(*store).evictions == 0);
}

namespace {

std::string usage_file(const Place& place) {
  return place.options.directory + "/kernels.usage";
}

UsageCounts totals_of(Store& store) {
  const Result<UsageFile::Totals> totals = store.totals();
  REQUIRE_MESSAGE(totals, totals.status().message());
  CHECK(totals->since > 1'700'000'000);
  return totals->counts;
}

} // namespace

TEST_CASE("store: a use is noted at once, without a write to the database, and survives its process") {
  Place place;
  fill(place, 3);
  const Bytes before = read_whole(place.database());
  CHECK(in_child([&] {
    const std::unique_ptr<Store> store = place.open();
    bool good = true;
    for (int i = 0; i < 100; ++i)
      good = good && has(*store, i % 2);
    ::_exit(good ? 0 : 1); // no destructor
    return good;
  }));
  CHECK(read_whole(place.database()) == before);
  const std::unique_ptr<Store> store = place.open();
  const Result<std::vector<Store::Listed>> rows = store->list();
  REQUIRE((rows && rows->size() == 3));
  CHECK((*rows)[0].row.key == key_of(1)); // the last in use first
  CHECK((*rows)[0].row.hits == 50);
  CHECK((*rows)[1].row.hits == 50);
  CHECK((*rows)[2].row.hits == 0);
  CHECK(store->look(key_of(0))->hits == 50);
  REQUIRE(store->put(row_of(0)));
  CHECK(store->look(key_of(0))->hits == 0); // another row
}

TEST_CASE("store: counts of all processes are summed, whatever ends them") {
  Place place;
  CHECK(!place.open()->totals());
  fill(place, 10);
  constexpr int processes = 8, gets = 200;
  for (int p = 0; p < processes; ++p)
    CHECK(in_child([&] {
      std::unique_ptr<Store> store = place.open();
      bool good = true;
      for (int i = 0; i < gets; ++i)
        good = good && has(*store, i % 20) == (i % 20 < 10);
      store->count({.memory_hits = 1000, .compiles = 2, .compile_us = 30});
      const Result<UsageFile::Totals> totals = store->totals();
      good = good && totals && totals->counts.memory_hits == 1000 * (p + 1); // pending ones included
      if (p % 2 == 0)
        store.reset();
      else
        store->flush();
      ::_exit(good ? 0 : 1);
      return good;
    }));
  CHECK(in_child([&] { // what is lost with a process that is killed: less than 64 calls
    const std::unique_ptr<Store> store = place.open();
    for (int i = 0; i < gets; ++i)
      (void)has(*store, 0);
    ::_exit(0);
    return true;
  }));
  const std::unique_ptr<Store> store = place.open();
  const UsageCounts counts = totals_of(*store);
  CHECK(counts.puts == 10);
  CHECK(counts.put_bytes == 1000);
  CHECK(counts.misses == processes * gets / 2);
  CHECK(counts.disk_hits == processes * gets / 2 + gets / 64 * 64);
  CHECK(counts.memory_hits == processes * 1000);
  CHECK(counts.compiles == processes * 2);
  CHECK(counts.compile_us == processes * 30);
  CHECK(counts.refused + counts.errors + counts.busy + counts.evictions == 0);
  CHECK(store->stats()->memory_hits == 0); // of this process
  CHECK(mode_of(usage_file(place)) == 0600);
}

TEST_CASE("store: processes that count at once lose nothing") {
  Place place;
  fill(place, 1);
  constexpr int processes = 6, rounds = 300;
  std::vector<pid_t> children;
  for (int p = 0; p < processes; ++p) {
    const pid_t child = ::fork();
    if (child == 0) {
      ::alarm(60);
      std::unique_ptr<Store> store = place.open();
      for (int i = 0; i < rounds; ++i) {
        store->count({.memory_hits = 1});
        store->flush();
      }
      store.reset(); // with what found the file busy
      ::_exit(0);
    }
    children.push_back(child);
  }
  for (const pid_t child : children) {
    int status = 1;
    REQUIRE(::waitpid(child, &status, 0) == child);
    CHECK(status == 0);
  }
  CHECK(totals_of(*place.open()).memory_hits == processes * rounds);
}

TEST_CASE("store: refused rows are counted by reason, and remembered") {
  Place place, other;
  place.options.max_bytes = other.options.max_bytes = 64 << 20;
  fill(other, 1);
  fill(place, 5);
  const auto kernel = [](int number) { return key_of(static_cast<std::uint64_t>(number)).hex(); };
  {
    Connection connection(place.database());
    connection.run(fmt::format("UPDATE kernels SET isa = 'avx2' WHERE key = x'{}'", kernel(0)));
    connection.run(fmt::format("UPDATE kernels SET mac_key = 7 WHERE key = x'{}'", kernel(1)));
    connection.run(
        fmt::format("ATTACH '{}' AS other; INSERT INTO kernels (op, desc, isa, target, generator, code_bytes,"
                    "compile_us, created_at, last_hit_at, mac_key, mac, code, key) SELECT op, desc, isa, "
                    "target, generator, code_bytes, compile_us, created_at, last_hit_at, mac_key, mac, code,"
                    " x'{}' FROM other.kernels",
                    other.database(), kernel(9)));
  }
  const std::unique_ptr<Store> store = place.open();
  for (const int number : {0, 1, 9}) {
    INFO(number);
    const Result<StoreRow> seen = store->look(key_of(static_cast<std::uint64_t>(number)));
    CHECK(seen.status().code() == Code::integrity);
    CHECK_MESSAGE(mentions(seen.status().message(), number == 0 ? "it was changed" : "another key file"),
                  seen.status().message());
  }
  CHECK(stats_of(*store).refused == 0); // looking counts nothing and removes nothing
  for (const int number : {0, 1, 9}) {
    CHECK(!has(*store, static_cast<std::uint64_t>(number)));
    const std::optional<UsageFile::Trace> trace = store->trace(key_of(static_cast<std::uint64_t>(number)));
    REQUIRE(trace);
    CHECK(trace->event == UsageFile::Event::refused);
  }
  REQUIRE(has(*store, 2));
  store->refuse(key_of(2), &UsageCounts::refused_code);
  REQUIRE(has(*store, 3));
  store->refuse(key_of(3), &UsageCounts::refused_features);
  store->flush();
  const UsageCounts counts = totals_of(*place.open());
  CHECK(counts.refused == 5);
  CHECK(counts.refused_mac == 1);
  CHECK(counts.refused_key_file == 2);
  CHECK(counts.refused_code == 1);
  CHECK(counts.refused_features == 1);
  CHECK(counts.disk_hits == 0);
  CHECK(counts.misses == 5);
  CHECK(place.warnings.size() == 2); // one a reason
}

TEST_CASE("store: a value larger than any kernel is refused before it is read") {
  Place place;
  place.options.max_bytes = 4ll << 30;
  fill(place, 2);
  Connection(place.database())
      .run(fmt::format("UPDATE kernels SET code = zeroblob({}) WHERE key = x'{}'", (256 << 20) + 1, key_of(0).hex()));
  const std::unique_ptr<Store> store = place.open();
  CHECK(!has(*store, 0));
  CHECK(has(*store, 1));
  const StoreStats stats = stats_of(*store);
  CHECK(stats.refused == 1);
  CHECK(stats.refused_size == 1);
  CHECK(stats.errors == 0);
  CHECK(stats.rows == 1);
}

TEST_CASE("store: what became of a kernel is remembered") {
  Place place;
  place.options.max_bytes = 200'000;
  const std::unique_ptr<Store> store = place.open();
  CHECK(!store->trace(key_of(1)));
  const auto event = [&](std::uint64_t number) {
    const std::optional<UsageFile::Trace> trace = store->trace(key_of(number));
    REQUIRE(trace);
    return trace->event;
  };
  REQUIRE(store->put(row_of(1, 60'000)));
  REQUIRE(store->put(row_of(2, 60'000)));
  CHECK(event(1) == UsageFile::Event::used);
  REQUIRE(store->put(row_of(3, 60'000)));
  REQUIRE(store->put(row_of(4, 60'000)));
  CHECK(event(1) == UsageFile::Event::evicted);
  CHECK(event(4) == UsageFile::Event::used);
  const UsageCounts counts = totals_of(*store);
  CHECK(counts.evictions >= 1);
  CHECK(counts.evicted_bytes == counts.evictions * 60'000);
  REQUIRE(store->remove(key_of(4)));
  CHECK(event(4) == UsageFile::Event::removed);
  REQUIRE(store->put(row_of(1, 100)));
  CHECK(event(1) == UsageFile::Event::used);
  CHECK(!store->trace(key_of(77)));
}

TEST_CASE("store: a damaged or foreign usage file costs what it held, and nothing else") {
  Place place;
  fill(place, 3);
  const Bytes sound = read_whole(usage_file(place));
  REQUIRE(sound.size() > 1024);
  SUBCASE("every byte of its header") {
    for (std::size_t i = 0; i < 1024; i += 13) {
      Bytes damaged = sound;
      damaged[i] ^= 0x40;
      write_file(usage_file(place), damaged);
      const std::unique_ptr<Store> store = place.open();
      CHECK(!store->totals());
      CHECK(has(*store, 0));
    }
  }
  SUBCASE("any slots") {
    Bytes damaged = sound;
    std::mt19937 random(1);
    for (std::size_t i = 1024; i < damaged.size(); ++i)
      damaged[i] = static_cast<std::uint8_t>(random());
    write_file(usage_file(place), damaged);
    place.options.max_bytes = 120'000;
    const std::unique_ptr<Store> store = place.open();
    for (std::uint64_t i = 0; i < 30; ++i) {
      CHECK(store->put(row_of(i, 20'000)));
      CHECK(has(*store, i, 20'000));
    }
  }
  SUBCASE("made for a larger bound") {
    CHECK(sound.size() > 1 << 20);
    place.options.max_bytes = 1 << 20;
    const std::unique_ptr<Store> store = place.open();
    CHECK(has(*store, 0));
    for (std::uint64_t i = 10; i < 20; ++i)
      CHECK(store->put(row_of(i, 90'000)));
    CHECK(fs::file_size(usage_file(place)) < 4096);
    const UsageCounts counts = totals_of(*store);
    CHECK(counts.puts == 13); // the sums stay
    CHECK(counts.disk_hits == 1);
  }
  SUBCASE("cut short") {
    for (const std::size_t size : {0, 5, 1023, 1024, 1030}) {
      write_file(usage_file(place), Bytes(sound.begin(), sound.begin() + static_cast<std::ptrdiff_t>(size)));
      const std::unique_ptr<Store> store = place.open();
      CHECK(has(*store, 0));
      store->flush();
      CHECK(totals_of(*store).disk_hits >= 1);
      CHECK(fs::file_size(usage_file(place)) >= 1024);
    }
  }
  SUBCASE("a link") {
    const std::string elsewhere = (place.root.path() / "elsewhere").string();
    write_file(elsewhere, Bytes(2000));
    fs::remove(usage_file(place));
    fs::create_symlink(elsewhere, usage_file(place));
    const std::unique_ptr<Store> store = place.open();
    CHECK(has(*store, 0));
    CHECK(store->put(row_of(8)));
    store->flush();
    CHECK(!store->totals());
    CHECK(read_whole(elsewhere) == Bytes(2000));
  }
  SUBCASE("writable by others") {
    REQUIRE(::chmod(usage_file(place).c_str(), 0622) == 0);
    const std::unique_ptr<Store> store = place.open();
    CHECK(has(*store, 0));
    store->flush();
    CHECK(read_whole(usage_file(place)) == sound);
  }
  SUBCASE("a pipe") {
    fs::remove(usage_file(place));
    REQUIRE(::mkfifo(usage_file(place).c_str(), 0600) == 0);
    const std::unique_ptr<Store> store = place.open();
    CHECK(has(*store, 0));
    store->flush();
    CHECK(!store->totals());
  }
  CHECK(place.warnings.empty());
}

TEST_CASE("store: a host that closes the usage file's descriptor and reuses its number keeps its file") {
  Place place;
  fill(place, 2);
  const std::unique_ptr<Store> store = place.open();
  CHECK(has(*store, 0));
  int ours = -1;
  for (const fs::directory_entry& entry : fs::directory_iterator("/proc/self/fd")) {
    std::error_code error;
    if (fs::read_symlink(entry, error) == fs::canonical(usage_file(place)))
      ours = std::stoi(entry.path().filename());
  }
  REQUIRE(ours >= 0);
  const std::string path = (place.root.path() / "host").string();
  write_file(path, Bytes(100'000));
  {
    const int file = ::open(path.c_str(), O_RDWR);
    REQUIRE(::dup2(file, ours) == ours);
    ::close(file);
  }
  for (int i = 0; i < 100; ++i)
    CHECK(has(*store, 1));
  store->flush();
  CHECK(read_whole(path) == Bytes(100'000));
  struct stat info;
  CHECK(::fstat(ours, &info) == 0); // still the host's
  ::close(ours);
  CHECK(store->list()->front().row.hits == 100);
}

TEST_CASE("store: a lock held elsewhere is a quick miss, without a warning") {
  Place place;
  fill(place, 1);
  const std::unique_ptr<Store> store = place.open();
  for (const bool opened_before : {false, true}) {
    INFO(opened_before);
    int ready[2], done[2];
    REQUIRE(::pipe(ready) == 0);
    REQUIRE(::pipe(done) == 0);
    const pid_t holder = ::fork();
    if (holder == 0) {
      ::alarm(60);
      char byte = 0;
      Connection connection(place.database());
      connection.run("BEGIN EXCLUSIVE");
      ::close(done[1]);
      if (::write(ready[1], &byte, 1) == 1 && ::read(done[0], &byte, 1) == 0)
        connection.run("COMMIT");
      ::_exit(0);
    }
    char byte;
    REQUIRE(::read(ready[0], &byte, 1) == 1);
    const auto start = std::chrono::steady_clock::now();
    CHECK(!store->get(key_of(0)));
    CHECK(store->put(row_of(1)).code() == Code::busy);
    CHECK(store->list().status().code() == Code::busy);
    CHECK(std::chrono::steady_clock::now() - start < std::chrono::seconds(5)); // 3 × 20 ms and a loaded machine
    ::close(done[0]);
    ::close(done[1]);
    ::waitpid(holder, nullptr, 0);
    ::close(ready[0]);
    ::close(ready[1]);
    CHECK(has(*store, 0));
    CHECK(!has(*store, 1));
  }
  CHECK(stats_of(*store).errors == 0);
  CHECK(place.warnings.empty());
}

TEST_CASE("store: connections in one process keep each other out, and neither one's end nor a look at the file frees "
          "another's locks") {
  Place place;
  fill(place, 1);
  const Result<TrustedDirectory> directory =
      TrustedDirectory::open(place.options.directory, TrustedDirectory::Owner::user, TrustedDirectory::Missing::leave);
  REQUIRE(directory);
  const auto open = [&] {
    Damage damage;
    Result<std::unique_ptr<Database>> opened =
        Database::open(place.database(), *directory->check_file("kernels.db", TrustedDirectory::Privacy::own),
                       Database::Access::write, 0, damage);
    REQUIRE(opened);
    return std::move(*opened);
  };
  const auto other_process_can = [&](const char* sql) {
    return in_child([&] {
      sqlite3* handle = nullptr;
      return sqlite3_open(place.database().c_str(), &handle) == SQLITE_OK &&
             sqlite3_exec(handle, sql, nullptr, nullptr, nullptr) == SQLITE_OK;
    });
  };
  const std::unique_ptr<Database> first = open();
  std::unique_ptr<Database> second = open();
  CHECK(other_process_can("BEGIN EXCLUSIVE"));
  REQUIRE(first->run("BEGIN IMMEDIATE"));
  CHECK(second->run("BEGIN IMMEDIATE").code() == Code::busy);
  CHECK(second->run("SELECT count(*) FROM kernels")); // readers go on
  CHECK(other_process_can("SELECT count(*) FROM kernels"));
  CHECK(!other_process_can("BEGIN IMMEDIATE"));
  second.reset();
  (void)read_whole(place.database());
  CHECK(!other_process_can("BEGIN IMMEDIATE"));
  second = open();
  CHECK(second->run("BEGIN IMMEDIATE").code() == Code::busy);
  REQUIRE(first->run("ROLLBACK"));
  REQUIRE(second->run("BEGIN EXCLUSIVE"));
  CHECK(first->run("SELECT count(*) FROM kernels").code() == Code::busy);
  CHECK(!other_process_can("SELECT count(*) FROM kernels"));
  REQUIRE(second->run("COMMIT"));
  CHECK(first->run("SELECT count(*) FROM kernels"));
  CHECK(other_process_can("BEGIN EXCLUSIVE"));
  // A reader keeps the writer from committing, and no new reader comes in between.
  {
    Query reader = first->query("SELECT id FROM kernels");
    REQUIRE(reader.step());
    REQUIRE(second->run("BEGIN IMMEDIATE"));
    REQUIRE(second->run("UPDATE kernels SET last_hit_at = 5000000000"));
    CHECK(second->run("COMMIT").code() == Code::busy);
    CHECK(!other_process_can("SELECT count(*) FROM kernels"));
  }
  CHECK(second->run("COMMIT"));
  CHECK(place.open()->list()->front().row.last_hit_at == 5000000000); // a time to come: no use is later
}

TEST_CASE("store: processes that begin at once agree on one key and one database") {
  Place place;
  place.options.busy_timeout_ms = 20'000;
  constexpr int processes = 6;
  std::vector<pid_t> children;
  int go[2];
  REQUIRE(::pipe(go) == 0);
  for (int p = 0; p < processes; ++p) {
    const pid_t child = ::fork();
    if (child == 0) {
      ::alarm(60);
      char byte;
      ::close(go[1]);
      bool good = ::read(go[0], &byte, 1) == 0;
      const std::unique_ptr<Store> store = place.open();
      for (int i = 0; i < 10; ++i) {
        good = good && store->put(row_of(100 * p + i));
        good = good && has(*store, 100 * p + i);
      }
      ::_exit(good && place.warnings.empty() ? 0 : 1);
    }
    children.push_back(child);
  }
  ::close(go[0]);
  ::close(go[1]);
  for (const pid_t child : children) {
    int status = 1;
    REQUIRE(::waitpid(child, &status, 0) == child);
    CHECK(status == 0);
  }
  const std::unique_ptr<Store> store = place.open();
  for (int p = 0; p < processes; ++p)
    for (int i = 0; i < 10; ++i)
      CHECK(has(*store, 100 * p + i));
  CHECK(stats_of(*store).rows == 10 * processes);
  // No temporary file is left behind.
  CHECK(std::distance(fs::directory_iterator(place.options.key_directory), {}) == 1);
}

TEST_CASE("store: a child made by fork has a connection of its own, and the parent's lives on") {
  Place place;
  std::unique_ptr<Store> store = place.open();
  REQUIRE(store->put(row_of(1)));
  CHECK(has(*store, 1));
  CHECK(in_child([&] {
    const bool shares = has(*store, 1) && store->put(row_of(2)) && stats_of(*store).disk_hits == 1;
    store.reset();
    return shares;
  }));
  CHECK(has(*store, 1));
  CHECK(has(*store, 2));
  CHECK(in_child([&] {
    store.reset(); // unused in this child: nothing of the parent's is written or closed
    return true;
  }));
  CHECK(store->put(row_of(3)));
  store.reset();
  std::int64_t hits = 0;
  const Result<std::vector<Store::Listed>> rows = place.open()->list();
  REQUIRE(rows);
  for (const Store::Listed& listed : *rows)
    hits += listed.row.hits;
  CHECK(hits == 4);
  CHECK(place.warnings.empty());
}

// Neither sanitizer follows a fork among threads: AddressSanitizer's allocator of GCC 12 may stay locked in the child.
#if !defined(__SANITIZE_THREAD__) && !defined(__SANITIZE_ADDRESS__)
TEST_CASE("store: a fork while other threads use the store neither hangs nor breaks the child") {
  Place place;
  place.options.busy_timeout_ms = 20'000; // the threads' batches of hits take the lock
  fill(place, 8, 16384);
  const std::unique_ptr<Store> store = place.open();
  std::atomic<bool> stop = false;
  std::vector<std::thread> threads;
  for (int t = 0; t < 2; ++t)
    threads.emplace_back([&] {
      while (!stop)
        (void)store->get(key_of(3));
    });
  for (int i = 0; i < 30; ++i)
    CHECK(in_child([&] {
      const std::optional<StoreRow> row = store->get(key_of(i % 8)); // the fork waited for the threads to be outside
      return row && same(*row, row_of(i % 8, 16384));
    }));
  stop = true;
  for (std::thread& thread : threads)
    thread.join();
  CHECK(has(*store, 1, 16384));
}
#endif

TEST_CASE("store: threads share a store") {
  Place place;
  place.options.max_bytes = 300'000;
  place.options.busy_timeout_ms = 5000;
  const std::unique_ptr<Store> store = place.open();
  std::atomic<int> wrong = 0;
  std::vector<std::thread> threads;
  for (int t = 0; t < 8; ++t)
    threads.emplace_back([&, t] {
      std::mt19937 random(t); // seeds 0 to 7
      for (int i = 0; i < 60; ++i) {
        const std::uint64_t number = random() % 24;
        if (random() % 3 == 0) {
          wrong += !store->put(row_of(number, 16384));
        } else if (const std::optional<StoreRow> row = store->get(key_of(number))) {
          wrong += !same(*row, row_of(number, 16384));
        }
        if (random() % 16 == 0)
          wrong += !store->list();
      }
    });
  for (std::thread& thread : threads)
    thread.join();
  CHECK(wrong == 0);
  const StoreStats stats = stats_of(*store);
  CHECK(stats.disk_hits > 0);
  CHECK(stats.puts > 0);
  CHECK(stats.refused == 0);
  CHECK(stats.errors == 0);
  CHECK(place.warnings.empty());
}

TEST_CASE("store: of the threads that want to compile a key one at a time has the turn") {
  Place place;
  const std::unique_ptr<Store> store = place.open();
  std::atomic<int> inside = 0, together = 0, turns = 0;
  std::vector<std::thread> threads;
  for (int t = 0; t < 4; ++t)
    threads.emplace_back([&] {
      for (int i = 0; i < 50; ++i) {
        const FileLock turn = store->compile_turn(key_of(i % 2), std::chrono::seconds(60));
        turns += turn.held();
        if (i % 2 == 0) {
          together += ++inside > 1;
          --inside;
        }
      }
    });
  for (std::thread& thread : threads)
    thread.join();
  CHECK(turns == 200);
  CHECK(together == 0);
  CHECK(place.open(CacheMode::read_only)->compile_turn(key_of(0), std::chrono::seconds(60)).held() == false);
}

TEST_CASE("store: read-only mode reads and changes nothing") {
  Place place;
  {
    const std::unique_ptr<Store> store = place.open(CacheMode::read_only);
    CHECK(!store->get(key_of(0)));
    CHECK(store->put(row_of(0)));
    const Result<std::vector<Store::Listed>> listed = store->list();
    REQUIRE(listed);
    CHECK(listed->empty());
    CHECK(!fs::exists(place.options.directory));
    CHECK(!fs::exists(place.options.key_directory));
  }
  fill(place, 3);
  Connection(place.database()).run(fmt::format("UPDATE kernels SET op = 'other' WHERE key = x'{}'", key_of(2).hex()));
  const Bytes before = read_whole(place.database());
  {
    const std::unique_ptr<Store> store = place.open(CacheMode::read_only);
    for (int i = 0; i < 130; ++i)
      CHECK(has(*store, i % 2));
    CHECK(!has(*store, 2));
    CHECK(store->put(row_of(7)));
    CHECK(store->remove(key_of(0)).code() == Code::unsupported);
    CHECK(store->clear(false).status().code() == Code::unsupported);
    CHECK(store->prune(0, false).status().code() == Code::unsupported);
    CHECK(store->verify(true).status().code() == Code::unsupported);
    const Result<Store::Verified> verified = store->verify(false);
    REQUIRE(verified);
    CHECK(verified->ok == 2);
    CHECK(verified->bad == 1);
    CHECK(stats_of(*store).rows == 3);
    CHECK(stats_of(*store).refused == 1);
  }
  CHECK(read_whole(place.database()) == before);
  CHECK(place.warnings.size() == 1);
}

TEST_CASE("store: off does nothing at all") {
  Place place;
  place.options.directory = "";
  const std::unique_ptr<Store> store = place.open(CacheMode::off);
  CHECK(store->put(row_of(0)));
  CHECK(!store->get(key_of(0)));
  store->flush();
  CHECK(store->list()->empty());
  CHECK(store->find("")->empty());
  CHECK(store->stats()->rows == 0);
  CHECK(store->verify(true)->ok == 0);
  CHECK(store->prune(0, false)->rows == 0);
  CHECK(store->clear(false)->rows == 0);
  CHECK(store->remove(key_of(0)).code() == Code::not_found);
  CHECK(place.warnings.empty());
}

TEST_CASE("store: unusable options are errors that say what is allowed") {
  Place place;
  const auto error = [&](const std::function<void(StoreOptions&)>& change) {
    StoreOptions options = place.options;
    change(options);
    const Result<std::unique_ptr<Store>> store = Store::open(options, place.log);
    REQUIRE(!store);
    CHECK(store.status().code() == Code::invalid_argument);
    return store.status().message();
  };
  CHECK(mentions(error([](StoreOptions& o) { o.directory = ""; }), "cache directory ''"));
  CHECK(mentions(error([](StoreOptions& o) { o.key_directory = ""; }), "key directory ''"));
  CHECK(mentions(error([](StoreOptions& o) { o.directory = std::string("/tmp/a\0b", 8); }), "cache directory"));
  CHECK(mentions(error([](StoreOptions& o) { o.max_bytes = 0; }), "0 bytes"));
  CHECK(mentions(error([](StoreOptions& o) { o.busy_timeout_ms = -1; }), "-1 ms"));
  CHECK(mentions(error([](StoreOptions& o) { o.key_directory = o.directory; }), "inside"));
  CHECK(mentions(error([](StoreOptions& o) { o.key_directory = o.directory + "//deep/../key/"; }), "inside"));
  // Through a link too.
  fs::create_directory(place.options.directory);
  fs::create_directory_symlink(place.options.directory, place.root.path() / "link");
  CHECK(mentions(error([&](StoreOptions& o) { o.key_directory = (place.root.path() / "link" / "key").string(); }),
                 "inside"));
  // A neighbour whose name begins alike is outside.
  StoreOptions options = place.options;
  options.key_directory = options.directory + "-key";
  CHECK(Store::open(options, place.log));
}

namespace {

/// The store at `place` is not to be used: one warning that says `parts`, and every call behaves.
void check_disabled(Place& place, std::initializer_list<std::string> parts) {
  const std::unique_ptr<Store> store = place.open();
  CHECK(!store->get(key_of(0)));
  CHECK(!store->get(key_of(1)));
  const Status status = store->put(row_of(0));
  CHECK(!status);
  CHECK(!store->put(row_of(1)));
  CHECK(!store->get(key_of(0)));
  store->flush();
  CHECK(place.warnings.size() == 1);
  for (const std::string& part : parts) {
    CHECK_MESSAGE(mentions(status.message(), part), status.message());
    for (const std::string& warning : place.warnings)
      CHECK_MESSAGE(mentions(warning, part), warning);
  }
}

std::string uid_text(uid_t uid) {
  return fmt::format("uid {}", uid);
}

} // namespace

TEST_CASE("store: paths that others may have written are refused with owner, mode and what is needed") {
  const std::string me = uid_text(::geteuid());
  Place place;
  fill(place, 2);
  SUBCASE("cache directory writable by others") {
    fs::permissions(place.options.directory, fs::perms(0777));
    check_disabled(place, {place.options.directory, "0777", me, "0700"});
  }
  SUBCASE("cache directory writable by the group") {
    fs::permissions(place.options.directory, fs::perms(0770));
    check_disabled(place, {place.options.directory, "0770", me, "0700"});
  }
  SUBCASE("cache directory is a link") {
    fs::rename(place.options.directory, place.root.path() / "elsewhere");
    fs::create_directory_symlink(place.root.path() / "elsewhere", place.options.directory);
    check_disabled(place, {place.options.directory, "symbolic link"});
    place.options.directory += "/"; // must not hide it
    place.warnings.clear();
    check_disabled(place, {"symbolic link"});
  }
  SUBCASE("cache directory is a file") {
    fs::remove_all(place.options.directory);
    write_file(place.options.directory, {});
    check_disabled(place, {place.options.directory, "a file"});
  }
  SUBCASE("cache directory below a file") {
    write_file((place.root.path() / "file").string(), {});
    place.options.directory = (place.root.path() / "file" / "cache").string();
    check_disabled(place, {(place.root.path() / "file").string(), "a file", "a directory"});
  }
  SUBCASE("database writable by the group") {
    REQUIRE(::chmod(place.database().c_str(), 0660) == 0);
    check_disabled(place, {"kernels.db", "0660", me, "0600"});
  }
  SUBCASE("database is a link") {
    fs::rename(place.database(), place.root.path() / "elsewhere");
    fs::create_symlink(place.root.path() / "elsewhere", place.database());
    check_disabled(place, {"kernels.db", "symbolic link"});
  }
  SUBCASE("database is a pipe") {
    fs::remove(place.database());
    REQUIRE(::mkfifo(place.database().c_str(), 0600) == 0);
    check_disabled(place, {"kernels.db", "special file"});
  }
  SUBCASE("key directory writable by others") {
    fs::permissions(place.options.key_directory, fs::perms(0702));
    check_disabled(place, {place.options.key_directory, "0702", me, "0700"});
  }
  SUBCASE("key file readable by others") {
    REQUIRE(::chmod(place.key_file().c_str(), 0604) == 0);
    check_disabled(place, {place.key_file(), "0604", me, "0600"});
  }
  SUBCASE("key file is a link") {
    fs::rename(place.key_file(), place.root.path() / "elsewhere");
    fs::create_symlink(place.root.path() / "elsewhere", place.key_file());
    check_disabled(place, {place.key_file(), "symbolic link"});
  }
  SUBCASE("key file of a wrong size") {
    write_file(place.key_file(), Bytes(31));
    check_disabled(place, {place.key_file(), "31 bytes", "needed are 32"});
  }
}

TEST_CASE("store: another user's files and an unwritable directory are refused") {
  if (::geteuid() != 0) {
    MESSAGE("needs the superuser to make another user's files: not run");
    return;
  }
  constexpr uid_t nobody = 65534;
  Place place;
  fill(place, 1);
  SUBCASE("cache directory") {
    REQUIRE(::chown(place.options.directory.c_str(), nobody, nobody) == 0);
    check_disabled(place, {place.options.directory, uid_text(nobody), uid_text(0)});
  }
  SUBCASE("database") {
    REQUIRE(::chown(place.database().c_str(), nobody, nobody) == 0);
    check_disabled(place, {"kernels.db", uid_text(nobody), uid_text(0)});
  }
  SUBCASE("key file") {
    REQUIRE(::chown(place.key_file().c_str(), nobody, nobody) == 0);
    check_disabled(place, {place.key_file(), uid_text(nobody), uid_text(0)});
  }
  SUBCASE("the superuser's, seen by another user") {
    REQUIRE(::chmod(place.root.path().c_str(), 0755) == 0);
    REQUIRE(::chown(place.options.key_directory.c_str(), nobody, nobody) == 0);
    REQUIRE(::chown(place.key_file().c_str(), nobody, nobody) == 0);
    CHECK(in_child([&] {
      if (::seteuid(nobody) != 0)
        return false;
      check_disabled(place, {"uid 0", uid_text(nobody)});
      return place.warnings.size() == 1;
    }));
  }
  SUBCASE("a parent where nothing can be made") {
    REQUIRE(::chmod(place.root.path().c_str(), 0755) == 0);
    place.options.directory = (place.root.path() / "new" / "cache").string();
    place.options.key_directory = (place.root.path() / "new" / "key").string();
    CHECK(in_child([&] {
      if (::seteuid(nobody) != 0)
        return false;
      check_disabled(place, {"Permission denied", (place.root.path() / "new").string()});
      return place.warnings.size() == 1;
    }));
  }
}

namespace {

Bytes random_bytes(std::size_t size, unsigned seed) {
  std::mt19937 random(seed);
  Bytes bytes(size);
  for (std::uint8_t& byte : bytes)
    byte = static_cast<std::uint8_t>(random());
  return bytes;
}

/// Pages 2 and on overwritten: the header is sound, the rest is not.
void corrupt_pages(const std::string& path) {
  Bytes content = read_whole(path);
  REQUIRE(content.size() > 3 * 4096);
  const Bytes noise = random_bytes(content.size() - 4096, 7);
  std::copy(noise.begin(), noise.end(), content.begin() + 4096);
  write_file(path, content);
}

std::string generation(const Place& place, int number) {
  return fmt::format("{}/kernels-{}.db", place.options.directory, number);
}

void make_older(const std::string& path, std::chrono::hours age) {
  fs::last_write_time(path, fs::last_write_time(path) - age);
}

} // namespace

TEST_CASE("store: a damaged file is left as it is, and the next generation takes its place, with one warning") {
  Place place;
  fill(place, 5, 3000);
  const auto run = [&](const char* sql) { Connection(place.database()).run(sql); };
  std::string says;
  SUBCASE("garbage") {
    write_file(place.database(), random_bytes(20'000, 1));
    says = "not a database";
  }
  SUBCASE("zeroed") {
    write_file(place.database(), Bytes(fs::file_size(place.database())));
    says = "not a database";
  }
  SUBCASE("empty") {
    write_file(place.database(), {});
    says = "not a database";
  }
  SUBCASE("shorter than a header") {
    write_file(place.database(), Bytes(50, 'S'));
    says = "not a database";
  }
  SUBCASE("another program's database") {
    run("PRAGMA application_id = 5");
    says = "another program's";
  }
  SUBCASE("with a write-ahead log") {
    run("PRAGMA journal_mode = WAL");
    says = "another program's";
  }
  SUBCASE("truncated") {
    fs::resize_file(place.database(), 2 * 4096);
    says = "malformed";
  }
  SUBCASE("corrupt pages") {
    corrupt_pages(place.database());
    says = "malformed";
  }
  SUBCASE("without its table") {
    run("DROP TABLE kernels");
    says = "malformed";
  }
  const Bytes before = read_whole(place.database());
  {
    const std::unique_ptr<Store> store = place.open();
    CHECK(!store->get(key_of(0)));
    CHECK(!store->get(key_of(1)));
    CHECK(!fs::exists(generation(place, 1))); // a get makes nothing
    CHECK(store->put(row_of(0)));
    CHECK(has(*store, 0));
    CHECK(!has(*store, 1));
    CHECK(store->path() == generation(place, 1));
    CHECK(stats_of(*store).rows == 1);
  }
  REQUIRE(place.warnings.size() == 1);
  CHECK_MESSAGE(mentions(place.warnings[0], place.database()), place.warnings[0]);
  CHECK_MESSAGE(mentions(place.warnings[0], says), place.warnings[0]);
  CHECK(read_whole(place.database()) == before);
  CHECK(!fs::exists(place.database() + "-shm"));
  CHECK(mode_of(generation(place, 1)) == 0600);
  // Whoever comes next finds nothing amiss.
  place.warnings.clear();
  const std::unique_ptr<Store> store = place.open();
  CHECK(has(*store, 0));
  CHECK(store->put(row_of(3)));
  CHECK(place.warnings.empty());
  CHECK(!fs::exists(generation(place, 2)));
}

TEST_CASE("store: a put alone finds the damage, and is stored all the same") {
  Place place;
  fill(place, 5, 3000);
  corrupt_pages(place.database());
  const std::unique_ptr<Store> store = place.open();
  CHECK(store->put(row_of(7)));
  CHECK(has(*store, 7));
  CHECK(place.warnings.size() == 1);
}

TEST_CASE("store: for one cause a file is replaced once a day") {
  Place place;
  fill(place, 5, 3000);
  write_file(place.database(), Bytes(9000));
  fill(place, 1);
  CHECK(place.warnings.size() == 1);
  write_file(generation(place, 1), Bytes(9000));
  place.warnings.clear();
  {
    const std::unique_ptr<Store> store = place.open();
    for (int i = 0; i < 3; ++i) {
      CHECK(!store->get(key_of(0)));
      CHECK(!store->put(row_of(0)));
    }
  }
  REQUIRE(place.warnings.size() == 1);
  CHECK(mentions(place.warnings[0], "kernels-1.db"));
  CHECK(mentions(place.warnings[0], "kiln cache clear"));
  CHECK(!fs::exists(generation(place, 2)));
  SUBCASE("the next day it is replaced again") {
    make_older(place.options.directory + "/replaced-not-a-database", std::chrono::hours(25));
    fill(place, 1);
    CHECK(place.open()->path() == generation(place, 2));
  }
  SUBCASE("by another cause it is replaced at once") {
    fs::remove(generation(place, 1));
    fs::copy_file(place.options.directory + "/kernels.lock", generation(place, 1)); // any file
    Connection(generation(place, 1)).run("CREATE TABLE other (a)");
    REQUIRE(::chmod(generation(place, 1).c_str(), 0600) == 0);
    fill(place, 1);
    CHECK(place.open()->path() == generation(place, 2));
  }
  SUBCASE("clear begins anew, and takes the damaged files away") {
    const std::unique_ptr<Store> store = place.open();
    CHECK(store->clear(true).status().code() == Code::io);
    CHECK(fs::exists(generation(place, 1)));
    const Result<Store::Pruned> cleared = store->clear(false);
    REQUIRE_MESSAGE(cleared, cleared.status().message());
    CHECK(cleared->rows == 0);
    CHECK(!fs::exists(place.database()));
    CHECK(!fs::exists(generation(place, 1)));
    CHECK(store->path() == generation(place, 2));
    CHECK(store->put(row_of(0)));
    CHECK(has(*store, 0));
    CHECK(!fs::exists(place.options.directory + "/replaced-not-a-database"));
  }
}

TEST_CASE("store: a cache of another schema is left alone, and this build's lies beside it") {
  Place place;
  fill(place, 2);
  bool newer = true;
  SUBCASE("a newer one") {
    Connection(place.database()).run("PRAGMA user_version = 1000");
  }
  SUBCASE("an older one") {
    newer = false;
    Connection(place.database()).run("PRAGMA user_version = 1");
  }
  const Bytes before = read_whole(place.database());
  {
    const std::unique_ptr<Store> store = place.open();
    CHECK(!store->get(key_of(0)));
    CHECK(!fs::exists(generation(place, 1)));
    CHECK(store->put(row_of(5)));
    CHECK(has(*store, 5));
  }
  // The other's next generation does not hide this one's.
  fs::copy_file(place.database(), generation(place, 2));
  const std::unique_ptr<Store> store = place.open();
  CHECK(has(*store, 5));
  CHECK(store->path() == generation(place, 1));
  make_older(place.database(), std::chrono::hours(24 * 29));
  CHECK(place.open()->get(key_of(5)));
  CHECK(fs::exists(place.database()));
  make_older(place.database(), std::chrono::hours(24 * 2));
  CHECK(place.open()->get(key_of(5)));
  CHECK(fs::exists(place.database()) == newer);
  if (newer)
    CHECK(read_whole(place.database()) == before);
  CHECK(place.warnings.empty());
}

TEST_CASE("store: an old generation goes when nobody has it open and it is a day old") {
  Place place;
  fill(place, 5, 3000);
  std::unique_ptr<Store> holder = place.open();
  CHECK(has(*holder, 0, 3000)); // open, and sound as far as it has seen
  {
    Place other; // another process's, which finds a damage: the newest generation is another
    fill(other, 1);
    fs::copy_file(other.database(), generation(place, 1));
  }
  const auto open_newest = [&] {
    const std::unique_ptr<Store> store = place.open();
    (void)store->get(key_of(9));
    CHECK(store->path() == generation(place, 1));
  };
  make_older(place.database(), std::chrono::hours(23));
  open_newest();
  CHECK(fs::exists(place.database())); // a day has not passed
  make_older(place.database(), std::chrono::hours(2));
  open_newest();
  CHECK(fs::exists(place.database())); // it is open
  CHECK(has(*holder, 1, 3000));
  holder.reset();
  make_older(place.database(), std::chrono::hours(25)); // the holder wrote its hits
  open_newest();
  CHECK(!fs::exists(place.database()));
  CHECK(fs::exists(generation(place, 1)));
  CHECK(place.warnings.empty());
}

TEST_CASE("store: processes that find a damage at once agree on the next generation") {
  for (int round = 0; round < 5; ++round) {
    Place place;
    place.options.busy_timeout_ms = 20'000;
    fill(place, 3, 3000);
    if (round % 2 == 0)
      write_file(place.database(), Bytes(20'000));
    else
      corrupt_pages(place.database());
    constexpr int processes = 8;
    std::vector<pid_t> children;
    int go[2];
    REQUIRE(::pipe(go) == 0);
    for (int p = 0; p < processes; ++p) {
      const pid_t child = ::fork();
      if (child == 0) {
        ::alarm(60);
        char byte;
        ::close(go[1]);
        bool good = ::read(go[0], &byte, 1) == 0;
        const std::unique_ptr<Store> store = place.open();
        if (p % 2 == 0)
          good = good && !store->get(key_of(0));
        good = good && store->put(row_of(100 + p)) && has(*store, 100 + p);
        ::_exit(good && place.warnings.size() <= 1 ? 0 : 1);
      }
      children.push_back(child);
    }
    ::close(go[0]);
    ::close(go[1]);
    for (const pid_t child : children) {
      int status = 1;
      REQUIRE(::waitpid(child, &status, 0) == child);
      CHECK(status == 0);
    }
    const std::unique_ptr<Store> store = place.open();
    for (int p = 0; p < processes; ++p)
      CHECK(has(*store, 100 + p));
    CHECK(store->path() == generation(place, 1));
    CHECK(!fs::exists(generation(place, 2)));
  }
}

TEST_CASE("store: an error that passes costs its call, not the process") {
  if (::geteuid() != 0)
    MESSAGE("the superuser writes where nobody may: less is tested");
  Place place;
  fill(place, 2);
  SUBCASE("too many open files") {
    CHECK(in_child([&] {
      const std::unique_ptr<Store> store = place.open();
      rlimit files;
      ::getrlimit(RLIMIT_NOFILE, &files);
      const rlimit none = {3, files.rlim_max};
      ::setrlimit(RLIMIT_NOFILE, &none);
      bool good = !store->get(key_of(0)) && !store->get(key_of(0)) && !store->put(row_of(5));
      ::setrlimit(RLIMIT_NOFILE, &files);
      return good && has(*store, 0) && store->put(row_of(5)) && has(*store, 5);
    }));
  }
  SUBCASE("a directory that was open to others for a while") {
    const std::unique_ptr<Store> store = place.open();
    fs::permissions(place.options.directory, fs::perms(0777));
    CHECK(!store->get(key_of(0)));
    fs::permissions(place.options.directory, fs::perms(0700));
    CHECK(has(*store, 0));
  }
}

TEST_CASE("store: a damaged file gives right rows, misses or errors, never a crash or a wrong row") {
  Place place;
  constexpr int rows = 12;
  fill(place, rows, 3000);
  const Bytes pristine = read_whole(place.database());
  int hits = 0, misses = 0;
  for (unsigned seed = 0; seed < 60; ++seed) {
    INFO(seed);
    std::mt19937 random(seed);
    Bytes damaged = pristine;
    if (seed % 6 == 5)
      damaged.resize(random() % damaged.size());
    else
      for (unsigned i = 0; i < 1u + seed % 40; ++i)
        damaged[random() % damaged.size()] = static_cast<std::uint8_t>(random());
    for (const fs::directory_entry& entry : fs::directory_iterator(place.options.directory))
      fs::remove(entry);
    write_file(place.database(), damaged);
    const std::unique_ptr<Store> store = place.open();
    for (int i = 0; i < rows; ++i)
      ++(has(*store, i, 3000) ? hits : misses);
    (void)store->verify(true);
    (void)store->list();
    CHECK(store->put(row_of(0, 3000)));
    CHECK(has(*store, 0, 3000));
    (void)store->prune(20'000, false);
    CHECK(store->clear(false));
    CHECK(stats_of(*store).rows == 0);
  }
  CHECK(hits > 0);
  CHECK(misses > 0);
}

TEST_CASE("store: a full disk costs one warning, and what is stored stays readable") {
  Place place;
  fill(place, 1);
  CHECK(in_child([&] {
    // A process's own limit on file sizes is the disk that is full at a chosen byte. Its signal, SIGXFSZ, would end
    // the process.
    rlimit unlimited;
    ::getrlimit(RLIMIT_FSIZE, &unlimited);
    const rlimit full = {fs::file_size(place.database()) + 8192, unlimited.rlim_max};
    const std::unique_ptr<Store> store = place.open();
    ::setrlimit(RLIMIT_FSIZE, &full);
    const Status status = store->put(row_of(1, 1 << 20));
    bool good = !status && status.code() == Code::io && mentions(status.message(), "kernels.db");
    good = good && !store->put(row_of(1, 1 << 20)) && place.warnings.size() == 1;
    good = good && has(*store, 0) && !has(*store, 1);
    ::setrlimit(RLIMIT_FSIZE, &unlimited);
    return good && store->put(row_of(1, 1 << 20)) && has(*store, 1, 1 << 20) && stats_of(*store).errors == 2;
  }));
  // Full from the start: nothing half-written is left.
  Place fresh;
  CHECK(in_child([&] {
    rlimit limit;
    ::getrlimit(RLIMIT_FSIZE, &limit);
    limit.rlim_cur = 16;
    ::setrlimit(RLIMIT_FSIZE, &limit);
    const std::unique_ptr<Store> store = fresh.open();
    const Status status = store->put(row_of(1));
    return !status && mentions(status.message(), "File too large") && !store->get(key_of(1)) &&
           fresh.warnings.size() == 1;
  }));
  CHECK(!fs::exists(fresh.key_file()));
  CHECK(!fs::exists(fresh.database()));
}

TEST_CASE("store: a cache removed under an open store is made anew") {
  Place place;
  const std::unique_ptr<Store> store = place.open();
  REQUIRE(store->put(row_of(0)));
  fs::remove_all(place.options.directory);
  (void)store->put(row_of(1)); // may be the one that notices
  CHECK(store->put(row_of(2)));
  CHECK(has(*store, 2));
  CHECK(place.open()->get(key_of(2)));
  CHECK(place.warnings.empty());
}

TEST_CASE("store: list and find show every row, whatever made it") {
  Place place;
  const std::unique_ptr<Store> store = place.open();
  CHECK(store->list()->empty());
  CHECK(store->find("")->empty());
  for (int i = 0; i < 40; ++i) {
    StoreRow row = row_of(i);
    if (i % 2)
      row.generator = std::string(64, 'b');
    REQUIRE(store->put(row));
  }
  CHECK(store->get(key_of(7)));
  const Result<std::vector<Store::Listed>> listed = store->list();
  REQUIRE(listed);
  REQUIRE(listed->size() == 40);
  const Store::Listed& first = listed->front();
  CHECK(first.row.key == key_of(7));
  CHECK(first.row.hits == 1);
  CHECK(first.row.generator == std::string(64, 'b'));
  CHECK(first.row.desc == row_of(7).desc);
  CHECK(first.row.code.empty());
  CHECK(first.code_bytes == 100);
  CHECK((*listed)[1].row.key == key_of(39));
  CHECK(listed->back().row.key == key_of(0));

  CHECK(store->find("")->size() == 40);
  const std::string hex = key_of(7).hex();
  for (const std::size_t digits : {std::size_t{1}, std::size_t{7}, std::size_t{8}, std::size_t{64}}) {
    const Result<std::vector<Digest>> found = store->find(hex.substr(0, digits));
    REQUIRE(found);
    std::size_t expected = 0;
    for (int i = 0; i < 40; ++i)
      expected += key_of(i).hex().substr(0, digits) == hex.substr(0, digits);
    CHECK(found->size() == expected);
    CHECK(std::find(found->begin(), found->end(), key_of(7)) != found->end());
  }
  for (const std::string& bad : {std::string("xyz"), std::string("AB"), hex + "0"}) {
    CHECK(store->find(bad).status().code() == Code::invalid_argument);
    CHECK(mentions(store->find(bad).status().message(), bad));
  }
}

TEST_CASE("store: remove, prune and clear take rows away, and dry runs count the same") {
  Place place;
  const std::unique_ptr<Store> store = place.open();
  CHECK(store->remove(key_of(0)).code() == Code::not_found);
  CHECK(store->clear(false)->rows == 0);
  constexpr int rows = 50;
  constexpr std::int64_t code_bytes = 10'000;
  for (int i = 0; i < rows; ++i)
    REQUIRE(store->put(row_of(i, code_bytes)));
  CHECK(store->remove(key_of(0)));
  CHECK(store->remove(key_of(0)).code() == Code::not_found);
  CHECK(has(*store, 1, code_bytes));

  const StoreStats before = stats_of(*store);
  const Result<Store::Pruned> planned = store->prune(200'000, true);
  REQUIRE(planned);
  CHECK(planned->rows > 30);
  CHECK(stats_of(*store).rows == before.rows);
  const Result<Store::Pruned> pruned = store->prune(200'000, false);
  REQUIRE(pruned);
  CHECK(pruned->rows == planned->rows);
  CHECK(pruned->bytes == planned->bytes);
  CHECK(pruned->bytes == pruned->rows * code_bytes);
  const StoreStats after = stats_of(*store);
  CHECK(after.rows == before.rows - pruned->rows);
  CHECK(after.file_bytes <= 200'000);
  CHECK(has(*store, 1, code_bytes)); // used last
  CHECK(!has(*store, 2, code_bytes));
  CHECK(has(*store, rows - 1, code_bytes));

  CHECK(store->clear(true)->rows == after.rows);
  CHECK(stats_of(*store).rows == after.rows);
  const Result<Store::Pruned> cleared = store->clear(false);
  REQUIRE(cleared);
  CHECK(cleared->rows == after.rows);
  CHECK(cleared->bytes == after.bytes);
  CHECK(stats_of(*store).rows == 0);
  CHECK(stats_of(*store).bytes == 0);
  CHECK(stats_of(*store).file_bytes < 50'000);
  CHECK(!has(*store, rows - 1, code_bytes));
  CHECK(store->put(row_of(0)));
  CHECK(store->prune(0, false)->rows == 1);
}

TEST_CASE("store: verify finds the bad rows and removes them when told to") {
  Place place;
  fill(place, 20);
  {
    Connection connection(place.database());
    connection.run(fmt::format("UPDATE kernels SET isa = 'neon' WHERE key = x'{}'", key_of(3).hex()));
    connection.run(fmt::format("UPDATE kernels SET code = zeroblob(100) WHERE key = x'{}'", key_of(4).hex()));
  }
  const std::unique_ptr<Store> store = place.open();
  for (const bool repair : {false, true, false}) {
    const Result<Store::Verified> verified = store->verify(repair);
    REQUIRE(verified);
    CHECK(verified->ok == 18);
    const bool repaired = stats_of(*store).rows == 18 && !repair;
    CHECK(verified->bad == (repaired ? 0 : 2));
    CHECK(verified->bad_keys.size() == static_cast<std::size_t>(verified->bad));
    for (const std::string& key : verified->bad_keys)
      CHECK((key == key_of(3).hex() || key == key_of(4).hex()));
  }
  CHECK(stats_of(*store).rows == 18);
}
