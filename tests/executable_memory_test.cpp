#include "jit/executable_memory.h"

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <csignal>
#include <cstddef>
#include <cstdlib>
#include <cstring>
#include <dirent.h>
#include <fcntl.h>
#include <fstream>
#include <linux/audit.h>
#include <map>
#include <random>
#include <string>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <thread>
#include <unistd.h>
#include <vector>

#include <doctest/doctest.h>

#include "tests/child_process.h"
#include "tests/emulator.h"

using namespace kiln;
using namespace kiln::test;

// The fork tests start threads in a child of a threaded parent, which is what Kiln promises to survive.
extern "C" const char* __tsan_default_options();
extern "C" const char* __tsan_default_options() {
  return "die_after_fork=0";
}

namespace {

constexpr std::size_t kChunk = 256 << 10;

/// A function that returns `value`, followed by `padding` bytes that hold it too.
Bytes function_returning(std::uint32_t value, std::size_t padding = 0) {
  Writer code;
#ifdef __x86_64__
  code.u8(0xb8); // mov eax, imm32
  code.u32(value);
  code.u8(0xc3); // ret
#else
  code.u32(0x52800000 | (value & 0xffff) << 5); // movz w0, #low
  code.u32(0x72a00000 | (value >> 16) << 5);    // movk w0, #high, lsl 16
  code.u32(0xd65f03c0);                         // ret
#endif
  Bytes bytes = code.take();
  bytes.resize(bytes.size() + padding, static_cast<std::uint8_t>(value));
  return bytes;
}

__attribute__((no_sanitize("undefined"))) std::uint32_t run(const std::uint8_t* code) {
  return reinterpret_cast<std::uint32_t (*)()>(reinterpret_cast<std::uintptr_t>(code))();
}

std::uint8_t trap() {
#ifdef __x86_64__
  return 0xcc;
#else
  return 0;
#endif
}

/// Mappings that are writable and executable, and writable mappings of code files.
int forbidden_mappings() {
  std::ifstream maps("/proc/self/maps");
  int found = 0;
  for (std::string line; std::getline(maps, line);) {
    const std::string rights = line.substr(line.find(' ') + 1, 4);
    const bool writable = rights[1] == 'w', executable = rights[2] == 'x';
    found += writable && (executable || line.find("kiln-code") != std::string::npos);
  }
  return found;
}

int code_file_descriptor() {
  DIR* directory = opendir("/proc/self/fd");
  int found = -1;
  while (const dirent* entry = readdir(directory)) {
    char link[256] = {};
    if (readlinkat(dirfd(directory), entry->d_name, link, sizeof link - 1) > 0 && std::strstr(link, "kiln-code"))
      found = std::atoi(entry->d_name);
  }
  closedir(directory);
  return found;
}

} // namespace

TEST_CASE("code runs at the alignment asked for") {
  ExecutableMemory memory;
  for (std::size_t alignment : {1, 16, 64, 256, 4096}) {
    const auto value = static_cast<std::uint32_t>(1000 + alignment);
    const auto code = memory.load(function_returning(value), alignment);
    REQUIRE(code.is_ok());
    CHECK(reinterpret_cast<std::uintptr_t>(*code) % alignment == 0);
    CHECK(run(*code) == value);
  }
  CHECK(memory.stats().chunks == 1);
  CHECK(forbidden_mappings() == 0);
}

TEST_CASE("bad arguments are refused by value") {
  ExecutableMemory memory;
  for (std::size_t alignment : {std::size_t{0}, std::size_t{48}, std::size_t{8192}}) {
    const auto code = memory.load(function_returning(1), alignment);
    REQUIRE(!code.is_ok());
    CHECK(code.status().code() == Code::invalid_argument);
    CHECK(code.status().message().find(std::to_string(alignment)) != std::string::npos);
  }
  CHECK(!memory.load({}, 64).is_ok());
  CHECK(memory.stats().chunks == 0);
}

TEST_CASE("a released range holds traps, and the next load takes it") {
  ExecutableMemory memory;
  const auto first = memory.load(function_returning(1, 100), 64), second = memory.load(function_returning(2, 100), 64);
  REQUIRE((first.is_ok() && second.is_ok()));
  const std::size_t block = static_cast<std::size_t>(*second - *first);
  memory.release(*first);
  CHECK(std::all_of(*first, *first + block, [](std::uint8_t byte) { return byte == trap(); }));
  CHECK(run(*second) == 2);
  const auto third = memory.load(function_returning(3, 100), 64);
  REQUIRE(third.is_ok());
  CHECK(*third == *first);
  CHECK(run(*third) == 3);
}

TEST_CASE("free ranges are joined, and empty chunks beyond one go back") {
  ExecutableMemory memory;
  std::vector<const std::uint8_t*> blocks;
  while (memory.stats().chunks < 4)
    blocks.push_back(*memory.load(function_returning(7, 5000), 64));
  std::shuffle(blocks.begin(), blocks.end(), std::mt19937(1));
  for (const std::uint8_t* block : blocks)
    memory.release(block);
  CHECK(memory.stats().bytes_used == 0);
  CHECK(memory.stats().chunks == 1);
  const auto whole = memory.load(function_returning(8, kChunk - 64), 64);
  REQUIRE(whole.is_ok());
  CHECK(memory.stats().chunks == 1);
  CHECK(run(*whole) == 8);
}

TEST_CASE("an image larger than a chunk has one of its own") {
  ExecutableMemory memory;
  const auto code = memory.load(function_returning(9, 3 * kChunk), 4096);
  REQUIRE(code.is_ok());
  CHECK(run(*code) == 9);
  CHECK(memory.stats().bytes_reserved >= 3 * kChunk);
  memory.release(*code);
  CHECK(memory.stats().bytes_reserved <= kChunk);
}

TEST_CASE("live blocks keep their bytes through any order of loads and releases") {
  const unsigned seed = std::random_device{}();
  INFO("seed ", seed);
  std::mt19937 random(seed);
  ExecutableMemory memory;
  std::map<const std::uint8_t*, Bytes> live;
  for (int step = 0; step < 3000; ++step) {
    if (live.size() < 100 && random() % 5 < 3) {
      Bytes image = function_returning(random(), random() % 20000);
      const auto code = memory.load(image, std::size_t{1} << random() % 13);
      REQUIRE(code.is_ok());
      const auto next = live.lower_bound(*code);
      REQUIRE((next == live.end() || *code + image.size() <= next->first));
      REQUIRE((next == live.begin() || std::prev(next)->first + std::prev(next)->second.size() <= *code));
      live.emplace(*code, std::move(image));
    } else if (!live.empty()) {
      const auto victim = std::next(live.begin(), static_cast<std::ptrdiff_t>(random() % live.size()));
      memory.release(victim->first);
      live.erase(victim);
    }
    if (step % 100 == 0)
      for (const auto& [code, image] : live)
        REQUIRE(std::equal(image.begin(), image.end(), code));
  }
  for (const auto& [code, image] : live)
    memory.release(code);
  CHECK(memory.stats().bytes_used == 0);
}

TEST_CASE("eight threads load, run and release, and no mapping is ever writable and executable") {
  ExecutableMemory memory;
  std::atomic<int> wrong{0};
  std::atomic<bool> done{false};
  std::vector<std::thread> threads;
  for (unsigned t = 0; t < 8; ++t)
    threads.emplace_back([&, t] {
      std::vector<std::pair<const std::uint8_t*, std::uint32_t>> held;
      for (std::uint32_t i = 0; i < 200; ++i) {
        const std::uint32_t value = t << 16 | i;
        const auto code = memory.load(function_returning(value, 50 * i), 64);
        if (!code || run(*code) != value)
          ++wrong;
        else
          held.emplace_back(*code, value);
        if (i % 3 == 0 && !held.empty()) {
          wrong += run(held.front().first) != held.front().second;
          memory.release(held.front().first);
          held.erase(held.begin());
        }
      }
      for (const auto& [code, value] : held) {
        wrong += run(code) != value;
        memory.release(code);
      }
    });
  int forbidden = 0, looks = 0;
  std::thread watcher([&] {
    while (!done) {
      forbidden += forbidden_mappings();
      ++looks;
    }
  });
  for (std::thread& thread : threads)
    thread.join();
  done = true;
  watcher.join();
  CHECK(wrong == 0);
  CHECK(forbidden == 0);
  CHECK(looks > 0);
  CHECK(memory.stats().bytes_used == 0);
}

TEST_CASE("children made by fork load while threads of the parent do") {
  ExecutableMemory memory;
  const auto inherited = memory.load(function_returning(41), 64);
  REQUIRE(inherited.is_ok());
  std::atomic<bool> done{false};
  std::atomic<int> wrong{0};
  std::vector<std::thread> threads;
#ifdef __SANITIZE_ADDRESS__
  constexpr std::uint32_t kThreads =
      0; // whose allocator of GCC 12 a child forked among threads may find locked for good
#else
  constexpr std::uint32_t kThreads = 4;
#endif
  for (std::uint32_t t = 0; t < kThreads; ++t)
    threads.emplace_back([&, t] {
      while (!done) {
        const auto code = memory.load(function_returning(t, 700), 64);
        wrong += !code || run(*code) != t;
        if (code)
          memory.release(*code);
      }
    });
  for (int round = 0; round < 20; ++round)
    CHECK(exit_status_in_child([&] {
            for (std::uint32_t i = 0; i < 50; ++i) {
              const auto code = memory.load(function_returning(i, 300), 64);
              if (!code || run(*code) != i || run(*inherited) != 41)
                return 1;
              if (i % 2 == 0)
                memory.release(*code);
            }
            memory.release(*inherited);
            return run(*inherited) == 41 && memory.stats().chunks == 1 ? 0 : 2;
          }) == 0);
  done = true;
  for (std::thread& thread : threads)
    thread.join();
  CHECK(wrong == 0);
  CHECK(run(*inherited) == 41);
}

TEST_CASE("what the parent releases and loads after a fork leaves the child's code alone") {
  ExecutableMemory memory;
  const auto code = memory.load(function_returning(51), 64);
  REQUIRE(code.is_ok());
  int to_child[2];
  REQUIRE(pipe(to_child) == 0);
  const pid_t child = fork();
  if (child == 0) {
    char byte;
    _exit(read(to_child[0], &byte, 1) == 1 && run(*code) == 51 ? 0 : 1);
  }
  memory.release(*code);
  const auto next = memory.load(function_returning(52), 64);
  REQUIRE(next.is_ok());
  CHECK(run(*next) == 52);
  CHECK(memory.stats().chunks == 1);
  REQUIRE(write(to_child[1], "x", 1) == 1);
  int status = 0;
  waitpid(child, &status, 0);
  CHECK(status == 0);
  close(to_child[0]);
  close(to_child[1]);
}

TEST_CASE("memory-deny-write-execute leaves loading as it is") {
  constexpr int kPrSetMdwe = 65, kRefuseExecGain = 1; // include/uapi/linux/prctl.h of Linux 6.3
  const int status = exit_status_in_child([] {
    if (prctl(kPrSetMdwe, kRefuseExecGain, 0, 0, 0) != 0)
      return 77;
    void* page = mmap(nullptr, 4096, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (mprotect(page, 4096, PROT_READ | PROT_EXEC) == 0)
      return 1;
    ExecutableMemory memory;
    const auto code = memory.load(function_returning(61), 64);
    return code && run(*code) == 61 ? 0 : 2;
  });
  if (status == 77)
    MESSAGE("skipped: this kernel has no PR_SET_MDWE");
  else
    CHECK(status == 0);
}

TEST_CASE("a system without executable mappings is told as unsupported" * doctest::skip(is_emulated())) {
  CHECK(exit_status_in_child([] {
          if (!refuse_executable_mappings())
            return 1;
          ExecutableMemory memory;
          const auto code = memory.load(function_returning(1), 64);
          return !code && code.status().code() == Code::unsupported && code_file_descriptor() < 0 ? 0 : 2;
        }) == 0);
}

TEST_CASE("without files, for want of descriptors or by a limit on their size, anonymous memory serves" *
          doctest::skip(is_emulated())) {
  for (const int resource : {RLIMIT_FSIZE, RLIMIT_NOFILE})
    CHECK(exit_status_in_child([&] {
            const rlimit limit = {0, 0};
            if (setrlimit(static_cast<__rlimit_resource>(resource), &limit) != 0)
              return 1;
            ExecutableMemory memory;
            const auto code = memory.load(function_returning(1), 64);
            return code && run(*code) == 1 ? 0 : 2;
          }) == 0);
}

TEST_CASE("memory for a perf map is anonymous, and otherwise the same" * doctest::skip(is_emulated())) {
  ExecutableMemory memory(true);
  std::vector<const std::uint8_t*> blocks;
  for (std::uint32_t i = 0; i < 100; ++i) {
    const auto code = memory.load(function_returning(i, 113 * i), 64);
    REQUIRE(code.is_ok());
    blocks.push_back(*code);
  }
  for (std::uint32_t i = 0; i < 100; i += 2)
    memory.release(blocks[i]);
  CHECK(*blocks[0] == trap());
  for (std::uint32_t i = 1; i < 100; i += 2)
    CHECK(run(blocks[i]) == i);
  CHECK(code_file_descriptor() < 0);
  CHECK(forbidden_mappings() == 0);
  CHECK(exit_status_in_child([&] {
          const auto code = memory.load(function_returning(77), 64);
          return code && run(*code) == 77 && run(blocks[1]) == 1 ? 0 : 1;
        }) == 0);
  CHECK(run(blocks[1]) == 1);
}

TEST_CASE("a host that closes our descriptor and reuses its number keeps its file") {
  CHECK(exit_status_in_child([] {
          ExecutableMemory memory;
          const auto before = memory.load(function_returning(71), 64);
          const int ours = code_file_descriptor();
          if (!before || ours < 0)
            return 1;
          const int theirs = memfd_create("host", 0);
          if (dup2(theirs, ours) != ours)
            return 2;
          const auto after = memory.load(function_returning(72), 64);
          if (!after || run(*after) != 72 || run(*before) != 71)
            return 3;
          memory.release(*before);
          memory.release(*after);
          struct stat status;
          return fstat(ours, &status) == 0 && status.st_size == 0 ? 0 : 4;
        }) == 0);
}
