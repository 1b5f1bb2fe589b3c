#include <atomic>
#include <chrono>
#include <filesystem>
#include <fstream>
#include <memory>
#include <optional>
#include <thread>
#include <vector>

#include <fcntl.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include <doctest/doctest.h>
#include <fmt/format.h>

#include "cache/bundle.h"
#include "cache/file.h"
#include "cache/system_cache.h"

using namespace kiln;
namespace fs = std::filesystem;

namespace {

StoreRow row_of(std::uint64_t number, std::uint8_t code = 7) {
  Writer writer;
  writer.u64(number);
  StoreRow row;
  row.key = digest_of(writer.bytes());
  row.op = "int8_mm";
  row.desc = fmt::format("int8_mm m=1 n=4096 k={}", number);
  row.isa = "avx2";
  row.target = "x86_64:avx2";
  row.generator = std::string(64, 'a');
  row.code = Bytes(500, code);
  return row;
}

/// A directory with a signed bundle, a list that trusts its key, and a cache that looks at both.
struct Place {
  Place() {
    std::string pattern = (fs::temp_directory_path() / "kiln_system_cache_test.XXXXXX").string();
    REQUIRE(::mkdtemp(pattern.data()) != nullptr);
    root = fs::canonical(pattern);
    fs::create_directory(root / "system");
    Result<SecretKey> made = SecretKey::generate();
    REQUIRE(made);
    key.emplace(std::move(*made));
    trust(key->public_key().line());
  }
  ~Place() { fs::remove_all(root); }

  void trust(const std::string& text) { std::ofstream(trusted()) << text << "\n"; }
  std::string trusted() const { return root / "trusted.keys"; }
  std::string file() const { return root / "system/kernels.bundle"; }
  void publish(std::initializer_list<StoreRow> rows, const SecretKey* with) {
    const Result<Bytes> bundle = make_bundle(std::vector(rows), with);
    REQUIRE(bundle);
    REQUIRE(write_file_atomically(file(), {*bundle}, 0644));
  }
  void publish(std::initializer_list<StoreRow> rows) { publish(rows, &*key); }
  std::unique_ptr<SystemCache> open() {
    return std::make_unique<SystemCache>((root / "system").string(), trusted(), log);
  }
  /// That a new process finds nothing, and says once what `says` names.
  void check_refused(std::string_view says) {
    INFO(says);
    warnings.clear();
    const auto cache = open();
    CHECK(!cache->get(row_of(1).key));
    CHECK(!cache->get(row_of(1).key));
    REQUIRE(warnings.size() == 1);
    INFO(warnings[0]);
    CHECK(warnings[0].find(says) != std::string::npos);
    CHECK(!cache->contents(false));
  }
  static void collect(void* context, LogLevel, const char* message) {
    static_cast<std::vector<std::string>*>(context)->emplace_back(message);
  }

  fs::path root;
  std::optional<SecretKey> key;
  std::vector<std::string> warnings;
  Log log{LogLevel::warn, &collect, &warnings};
};

void wait_until_it_looks_again() {
  std::this_thread::sleep_for(std::chrono::milliseconds(SystemCache::look_again_ms + 50));
}

/// For threads that wait for what a failed test never does.
std::chrono::steady_clock::time_point end_of_patience() {
  return std::chrono::steady_clock::now() + std::chrono::seconds(20);
}

} // namespace

TEST_CASE("system cache: kernels of a trusted bundle, counted") {
  Place place;
  place.publish({row_of(1), row_of(2)});
  const auto cache = place.open();
  CHECK(cache->path() == place.file());
  const std::optional<StoreRow> row = cache->get(row_of(1).key);
  REQUIRE(row);
  CHECK((row->code == row_of(1).code && row->desc == row_of(1).desc && row->key == row_of(1).key));
  CHECK(cache->get(row_of(2).key));
  CHECK(!cache->get(row_of(3).key));
  const SystemCache::Stats stats = cache->stats();
  CHECK((stats.hits == 2 && stats.misses == 1 && stats.refused == 0));
  const Result<SystemCache::Contents> contents = cache->contents(true);
  REQUIRE(contents);
  CHECK((contents->kernels == 2 && contents->bad == 0 && contents->signer == place.key->public_key().id()));
  CHECK(contents->file_bytes == static_cast<std::int64_t>(fs::file_size(place.file())));
  CHECK(place.warnings.empty());
}

TEST_CASE("system cache: what is not there is a miss without a word, until it is there") {
  Place place;
  const auto cache = place.open();
  CHECK(!cache->get(row_of(1).key));
  CHECK(cache->contents(false).status().code() == Code::not_found);
  place.publish({row_of(1)});
  CHECK(!cache->get(row_of(1).key)); // not on every get
  wait_until_it_looks_again();
  CHECK(cache->get(row_of(1).key));
  CHECK(place.warnings.empty());
}

TEST_CASE("system cache: replaced by rename, withdrawn by unlink") {
  Place place;
  place.publish({row_of(1, 7)});
  const auto cache = place.open();
  CHECK((*cache->get(row_of(1).key))->code[0] == 7);
  place.publish({row_of(1, 8), row_of(2)});
  CHECK((*cache->get(row_of(1).key))->code[0] == 7); // the old file, whole
  wait_until_it_looks_again();
  CHECK((*cache->get(row_of(1).key))->code[0] == 8);
  CHECK(cache->get(row_of(2).key));
  fs::remove(place.file());
  CHECK(cache->get(row_of(2).key));
  wait_until_it_looks_again();
  CHECK(!cache->get(row_of(2).key));
  CHECK(place.warnings.empty());
}

TEST_CASE("system cache: a replacement that is not trusted ends the old one") {
  Place place;
  place.publish({row_of(1)});
  const auto cache = place.open();
  CHECK(cache->get(row_of(1).key));
  place.publish({row_of(1)}, nullptr);
  wait_until_it_looks_again();
  CHECK(!cache->get(row_of(1).key));
  REQUIRE(place.warnings.size() == 1);
  CHECK(place.warnings[0].find("unsigned") != std::string::npos);
}

TEST_CASE("system cache: nothing that others could have put there") {
  Place place;
  place.publish({row_of(1)}, nullptr);
  place.check_refused("is unsigned");
  Result<SecretKey> other = SecretKey::generate();
  REQUIRE(other);
  place.publish({row_of(1)}, &*other);
  place.check_refused(other->public_key().id());
  place.publish({row_of(1)});
  fs::remove(place.trusted());
  place.check_refused("which does not exist");
  place.trust("nonsense");
  place.check_refused("trusted.keys:1: no public key");
  place.trust(place.key->public_key().line());
  CHECK(place.open()->get(row_of(1).key));

  const auto with_mode = [&](const fs::path& path, mode_t mode) {
    struct stat before;
    REQUIRE(::stat(path.c_str(), &before) == 0);
    REQUIRE(::chmod(path.c_str(), mode) == 0);
    place.check_refused(fmt::format("{} is not trusted", path.string()));
    REQUIRE(::chmod(path.c_str(), before.st_mode & 07777) == 0);
  };
  with_mode(place.root, 0777);
  with_mode(place.root / "system", 0775);
  with_mode(place.root / "system", 01777);
  with_mode(place.file(), 0664);
  with_mode(place.trusted(), 0666);
  CHECK(place.open()->get(row_of(1).key));

  fs::rename(place.root / "system", place.root / "real");
  fs::create_directory_symlink(place.root / "real", place.root / "system");
  place.check_refused("symbolic link");
  fs::remove(place.root / "system");
  fs::create_directory(place.root / "system");
  fs::create_symlink(place.root / "real/kernels.bundle", place.file());
  place.check_refused("symbolic link");
  fs::remove(place.file());
  REQUIRE(::mkfifo(place.file().c_str(), 0644) == 0);
  place.check_refused("not a regular file");
  if (::geteuid() == 0) {
    fs::remove(place.file());
    place.publish({row_of(1)});
    REQUIRE(::chown(place.file().c_str(), 12345, 12345) == 0);
    place.check_refused("uid 12345");
  }
}

TEST_CASE("system cache: a bundle that is changed or cut while it is open") {
  Place place;
  place.publish({row_of(1), row_of(2)});
  const auto cache = place.open();
  REQUIRE(cache->get(row_of(1).key));
  const int file = ::open(place.file().c_str(), O_RDWR | O_CLOEXEC);
  const auto size = static_cast<off_t>(fs::file_size(place.file()));
  REQUIRE(::pwrite(file, "!!!!", 4, size - 4) == 4); // the entry of the larger key
  const Digest last = std::max(row_of(1).key, row_of(2).key), first = std::min(row_of(1).key, row_of(2).key);
  CHECK(!cache->get(last));
  CHECK(!cache->get(last));
  CHECK(cache->get(first));
  CHECK(cache->stats().refused == 2);
  CHECK(cache->contents(true)->bad == 1);
  CHECK(place.warnings.size() == 1);
  REQUIRE(::ftruncate(file, 10) == 0); // no SIGBUS: nothing is mapped
  ::close(file);
  CHECK(!cache->get(first));
  CHECK(cache->stats().refused == 3);
}

TEST_CASE("system cache: threads read while it is replaced") {
  Place place;
  place.publish({row_of(1, 7), row_of(2)});
  const auto cache = place.open();
  std::atomic<bool> done = false;
  std::atomic<int> missed = 0;
  {
    std::vector<std::jthread> threads;
    for (int i = 0; i < 4; ++i)
      threads.emplace_back([&, end = end_of_patience()] {
        while (!done && std::chrono::steady_clock::now() < end) {
          const std::optional<StoreRow> row = cache->get(row_of(1).key);
          missed += !row;
          if (row && row->code[0] == 8)
            done = true;
        }
      });
    REQUIRE(cache->get(row_of(2).key));
    place.publish({row_of(1, 8)});
  }
  CHECK(done);
  CHECK(missed == 0);
  CHECK(!cache->get(row_of(2).key));
}

// Neither sanitizer follows a fork among threads: AddressSanitizer's allocator of GCC 12 may stay locked in the child.
#if !defined(__SANITIZE_THREAD__) && !defined(__SANITIZE_ADDRESS__)
TEST_CASE("system cache: a child made by fork, also while threads of its parent are inside") {
  Place place;
  place.publish({row_of(1), row_of(2)});
  const auto cache = place.open();
  std::atomic<bool> done = false;
  std::vector<std::jthread> threads;
  for (int i = 0; i < 4; ++i)
    threads.emplace_back([&, end = end_of_patience()] {
      while (!done && std::chrono::steady_clock::now() < end)
        if (!cache->get(row_of(1).key))
          std::abort();
    });
  int failed = 0;
  for (int i = 0; i < 50; ++i) {
    const pid_t child = ::fork();
    if (child == 0) {
      ::alarm(20);
      ::_exit(cache->get(row_of(2).key) && cache->stats().hits == 1 ? 0 : 1);
    }
    int status = 0;
    REQUIRE(::waitpid(child, &status, 0) == child);
    failed += !WIFEXITED(status) || WEXITSTATUS(status) != 0;
  }
  done = true;
  CHECK(failed == 0);
}
#endif
