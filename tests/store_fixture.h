#pragma once
#include <cstdlib>
#include <filesystem>
#include <optional>
#include <random>
#include <string>
#include <unistd.h>
#include <vector>

#include <doctest/doctest.h>
#include <fmt/format.h>

#include "cache/store.h"

namespace kiln::test {

class TemporaryDirectory {
public:
  /// In KILN_TEST_DIRECTORY, else in memory where that is possible: a disk that others keep busy would take a second
  /// for each sync.
  TemporaryDirectory() {
    const char* chosen = std::getenv("KILN_TEST_DIRECTORY");
    std::string pattern = chosen != nullptr                 ? chosen
                          : ::access("/dev/shm", W_OK) == 0 ? "/dev/shm"
                                                            : std::filesystem::temp_directory_path().string();
    pattern += "/kiln_store_test.XXXXXX";
    REQUIRE(::mkdtemp(pattern.data()) != nullptr);
    path_ = pattern;
  }
  ~TemporaryDirectory() { std::filesystem::remove_all(path_); }
  TemporaryDirectory(const TemporaryDirectory&) = delete;
  TemporaryDirectory& operator=(const TemporaryDirectory&) = delete;
  const std::filesystem::path& path() const { return path_; }

private:
  std::filesystem::path path_;
};

/// A place for a cache and its key, and the warnings of the stores opened there.
struct Place {
  Place() {
    options.directory = (root.path() / "cache").string();
    options.key_directory = (root.path() / "key").string();
  }
  std::unique_ptr<Store> open(CacheMode mode = CacheMode::read_write) const {
    StoreOptions with_mode = options;
    with_mode.mode = mode;
    Result<std::unique_ptr<Store>> store = Store::open(with_mode, log);
    REQUIRE(store);
    return std::move(*store);
  }
  std::string database() const { return options.directory + "/kernels.db"; }
  std::string key_file() const { return options.key_directory + "/cache.key"; }
  static void collect(void* context, LogLevel, const char* message) {
    static_cast<std::vector<std::string>*>(context)->emplace_back(message);
  }

  TemporaryDirectory root;
  StoreOptions options;
  std::vector<std::string> warnings;
  Log log{LogLevel::warn, &collect, &warnings};
};

inline Digest key_of(std::uint64_t number) {
  Writer writer;
  writer.u64(number);
  return digest_of(writer.bytes());
}

inline StoreRow row_of(std::uint64_t number, std::size_t code_bytes = 100) {
  StoreRow row;
  row.key = key_of(number);
  row.op = "int8_mm";
  row.desc = fmt::format("int8_mm m=1 n=4096 k={}", number);
  row.isa = "avx512vnni";
  row.target = "x86_64 avx512f avx512vnni";
  row.generator = std::string(64, 'a');
  std::mt19937_64 random(number);
  row.code.resize(code_bytes);
  for (std::uint8_t& byte : row.code)
    byte = static_cast<std::uint8_t>(random());
  row.compile_us = 12;
  row.created_at = 1'700'000'000;
  return row;
}

inline bool same(const StoreRow& a, const StoreRow& b) {
  return a.key == b.key && a.op == b.op && a.desc == b.desc && a.isa == b.isa && a.target == b.target &&
         a.generator == b.generator && a.code == b.code && a.compile_us == b.compile_us && a.created_at == b.created_at;
}

} // namespace kiln::test
