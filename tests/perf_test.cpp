#include "jit/perf.h"

#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <string>
#include <sys/stat.h>
#include <unistd.h>

#include <doctest/doctest.h>
#include <fmt/format.h>

#include "tests/child_process.h"

using namespace kiln;
using namespace kiln::test;

// A child's process id is new, and so are the names of its files: each case runs in one.

namespace {

std::string contents(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  return {std::istreambuf_iterator<char>(file), {}};
}

std::string map_path() {
  return fmt::format("/tmp/perf-{}.map", getpid());
}

struct Warnings {
  int count = 0;
  std::string last;
  static void sink(void* context, LogLevel, const char* message) {
    auto& warnings = *static_cast<Warnings*>(context);
    ++warnings.count;
    warnings.last = message;
  }
};

template <class T> T read_at(const std::string& bytes, std::size_t offset) {
  T value{};
  if (offset + sizeof value <= bytes.size())
    std::memcpy(&value, bytes.data() + offset, sizeof value);
  return value;
}

const unsigned char kCode[] = {0x90, 0x90, 0xc3};

} // namespace

TEST_CASE("map: a line a kernel, in a file of this process alone") {
  CHECK(exit_status_in_child([] {
          const Log log;
          PerfReporter reporter(PerfMode::map, log);
          reporter.loaded(reinterpret_cast<void*>(0xabc000), 0x40, "kiln::int8_mm_avx2");
          reporter.loaded(reinterpret_cast<void*>(0xabd000), 0x123, "second");
          const std::string expected = "abc000 40 kiln::int8_mm_avx2\nabd000 123 second\n";
          struct stat status;
          const bool right = contents(map_path()) == expected && stat(map_path().c_str(), &status) == 0 &&
                             (status.st_mode & 0777) == 0600;
          const int nested = exit_status_in_child([&] {
            reporter.loaded(reinterpret_cast<void*>(0x1000), 1, "child");
            const bool own = contents(map_path()) == "1000 1 child\n";
            unlink(map_path().c_str());
            return own ? 0 : 1;
          });
          const bool untouched = contents(map_path()) == expected;
          unlink(map_path().c_str());
          return right ? untouched ? nested : 2 : 3;
        }) == 0);
}

TEST_CASE("map: a planted link is refused with one warning, and its target is left alone") {
  CHECK(exit_status_in_child([] {
          const std::string victim = fmt::format("/tmp/kiln-perf-victim-{}", getpid());
          std::ofstream(victim) << "precious";
          if (symlink(victim.c_str(), map_path().c_str()) != 0)
            return 1;
          Warnings warnings;
          const Log log(LogLevel::warn, Warnings::sink, &warnings);
          PerfReporter reporter(PerfMode::map, log);
          reporter.loaded(kCode, sizeof kCode, "first");
          reporter.loaded(kCode, sizeof kCode, "second");
          const bool right = contents(victim) == "precious" && warnings.count == 1 &&
                             warnings.last.find(map_path()) != std::string::npos;
          unlink(victim.c_str());
          unlink(map_path().c_str());
          return right ? 0 : 2;
        }) == 0);
}

TEST_CASE("off: no file is made") {
  CHECK(exit_status_in_child([] {
          const Log log;
          PerfReporter(PerfMode::off, log).loaded(kCode, sizeof kCode, "none");
          return std::filesystem::exists(map_path()) ? 1 : 0;
        }) == 0);
}

TEST_CASE("jitdump: header and records as the specification has them, for all engines of a process") {
  char directory[] = "/tmp/kiln-perf-XXXXXX";
  REQUIRE(mkdtemp(directory));
  CHECK(exit_status_in_child([&] {
          if (chdir(directory) != 0)
            return 1;
          const std::string name = fmt::format("jit-{}.dump", getpid());
          std::ofstream(name) << "left by an earlier process with this number";
          chmod(name.c_str(), 0600);
          const Log log;
          PerfReporter first(PerfMode::jitdump, log), second(PerfMode::jitdump, log);
          first.loaded(kCode, sizeof kCode, "one");
          second.loaded(kCode, sizeof kCode, "second");

          const std::string bytes = contents(name);
          if (read_at<std::uint32_t>(bytes, 0) != 0x4A695444 || read_at<std::uint32_t>(bytes, 4) != 1 ||
              read_at<std::uint32_t>(bytes, 8) != 40 || read_at<std::uint32_t>(bytes, 20) != std::uint32_t(getpid()))
            return 2;
          std::size_t at = 40;
          std::uint64_t last_index = 0;
          for (const std::string& kernel : {std::string("one"), std::string("second")}) {
            const std::size_t total = 56 + kernel.size() + 1 + sizeof kCode;
            if (read_at<std::uint32_t>(bytes, at) != 0 || read_at<std::uint32_t>(bytes, at + 4) != total ||
                read_at<std::uint32_t>(bytes, at + 16) != std::uint32_t(getpid()) ||
                read_at<std::uint64_t>(bytes, at + 24) != reinterpret_cast<std::uint64_t>(kCode) ||
                read_at<std::uint64_t>(bytes, at + 32) != reinterpret_cast<std::uint64_t>(kCode) ||
                read_at<std::uint64_t>(bytes, at + 40) != sizeof kCode)
              return 3;
            if (read_at<std::uint64_t>(bytes, at + 48) <= last_index)
              return 4;
            last_index = read_at<std::uint64_t>(bytes, at + 48);
            if (bytes.compare(at + 56, kernel.size() + 1, kernel.c_str(), kernel.size() + 1) != 0 ||
                std::memcmp(bytes.data() + at + 56 + kernel.size() + 1, kCode, sizeof kCode) != 0)
              return 5;
            at += total;
          }
          // The mapping by which `perf record` learns of the file.
          const std::string maps = contents("/proc/self/maps");
          const std::size_t marker = maps.find(name);
          if (marker == std::string::npos || maps.rfind("r-xp", marker) == std::string::npos)
            return 6;
          return at == bytes.size() ? 0 : 7;
        }) == 0);
  std::filesystem::remove_all(directory);
}
