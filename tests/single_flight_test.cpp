#include <doctest/doctest.h>

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <csignal>
#include <cstdlib>
#include <filesystem>
#include <functional>
#include <thread>
#include <vector>

#include "cache/file_lock.h"
#include "jit/engine.h"
#include "jit/ops/int8_mm_driver.h"
#include "tests/child_process.h"
#include "tests/emulator.h"

/// One compile for a cold key, among processes: the locks, and the path of a call over them with a null backend.

using namespace kiln;
using namespace kiln::test;
using std::chrono::milliseconds;
using std::chrono::steady_clock;

namespace {

class TemporaryDirectory {
public:
  TemporaryDirectory() {
    std::string pattern = (std::filesystem::temp_directory_path() / "kiln_single_flight.XXXXXX").string();
    REQUIRE(::mkdtemp(pattern.data()) != nullptr);
    path = pattern;
  }
  ~TemporaryDirectory() { std::filesystem::remove_all(path); }
  std::filesystem::path path;
};

#if defined(__SANITIZE_THREAD__) || defined(__SANITIZE_ADDRESS__)
constexpr bool is_sanitized = true;
#else
constexpr bool is_sanitized = false;
#endif
/// Where a process takes ten times as long as on a machine, fewer of them make a fleet, they wait for each other as
/// long as it takes, and no time is asserted: that one compiles for all is.
bool is_slow() {
  return is_sanitized || is_emulated();
}

/// What the processes of one test share.
struct Shared {
  std::atomic<int> compiles{0}, failures{0}, ready{0};
  std::atomic<int> together{0}; ///< compiles that wait for each other: met, unless one of them never comes
  std::atomic<bool> missed{false};
  std::atomic<bool> go{false};
  std::atomic<int> first_compiler{0}; ///< pid
  std::atomic<int> compile_ms{20}, first_compile_ms{20};
  std::atomic<std::int64_t> longest_us{0}; ///< of any get
  std::atomic<int> fork_child{0};          ///< pid of a child that the first compiler leaves behind

  static Shared& make() {
    void* const memory = ::mmap(nullptr, sizeof(Shared), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    REQUIRE(memory != MAP_FAILED);
    return *new (memory) Shared;
  }
};
Shared* shared = nullptr;

template <class Condition> bool within(milliseconds time, Condition condition) {
  const auto end = steady_clock::now() + time;
  while (!condition()) {
    if (steady_clock::now() > end)
      return false;
    std::this_thread::sleep_for(milliseconds(1));
  }
  return true;
}

std::vector<std::pair<std::string, std::int64_t>> plan_for(std::string_view layout) {
  int8_mm::Plan plan{.layout = *int8_mm::PackLayout::parse(layout)};
  plan.n_step = plan.layout.n_block;
  return plan.values();
}

Result<CodeObject> compile_slowly(const KernelDesc&, const Target& target, std::string_view layout) {
  const bool first = shared->compiles.fetch_add(1) == 0;
  if (first)
    shared->first_compiler = ::getpid();
  std::this_thread::sleep_for(milliseconds(first ? shared->first_compile_ms : shared->compile_ms));
  if (!within(std::chrono::seconds(20), [] { return shared->compiles >= shared->together; }))
    shared->missed = true;
  CodeObject code;
  code.arch = target.arch;
  code.image = target.arch == Arch::aarch64 ? Bytes{0xC0, 0x03, 0x5F, 0xD6} : Bytes{0xC3};
  code.entries = {{"main", 0}};
  code.plan = plan_for(layout);
  return code;
}

const Implementation* null_row() {
  static const Implementation row = [] {
    Implementation r;
    r.op = OpId::int8_mm;
    r.isa = IsaPath::portable;
    r.backend = BackendId::portable;
    r.generator = GeneratorId::llvm;
    r.generator_digest = "generator-1";
    r.any_arch = true;
    r.pack_layout = [](const KernelDesc&, const Target&) { return std::string("n16k4"); };
    r.compile = compile_slowly;
    return r;
  }();
  return &row;
}

void atomic_max(std::atomic<std::int64_t>& value, std::int64_t candidate) {
  std::int64_t seen = value;
  while (seen < candidate && !value.compare_exchange_weak(seen, candidate)) {
  }
}

struct Fleet {
  TemporaryDirectory root;
  Config config;
  milliseconds patience = EngineOptions().turn_patience;
  std::vector<pid_t> processes;

  Fleet() {
    shared = &Shared::make();
    config.cache_dir = root.path / "cache";
    config.key_dir = root.path / "keys";
    config.threads = 1;
  }
  ~Fleet() {
    for (const pid_t process : processes) // only where a REQUIRE failed
      ::kill(process, SIGKILL);
    ::munmap(shared, sizeof(Shared));
  }

  std::unique_ptr<Engine> engine() const {
    EngineOptions options;
    options.config = config;
    options.machine = detect_machine();
    options.implementations = {null_row(), 1};
    options.turn_patience = patience;
    options.log_sink = [](void*, LogLevel, const char* message) {
      std::fprintf(stderr, "%s\n", message);
      ++shared->failures; // nothing here is worth a warning
    };
    Result<std::unique_ptr<Engine>> made = Engine::create(std::move(options));
    return made ? std::move(*made) : nullptr;
  }

  /// A process whose threads all get the same kernel once `go` is set.
  void start(int threads) {
    const pid_t child = ::fork();
    if (child != 0)
      return processes.push_back(child);
    ::alarm(100);
    const std::unique_ptr<Engine> e = engine();
    const auto get = [&] {
      while (!shared->go)
        std::this_thread::sleep_for(milliseconds(1));
      const auto start = steady_clock::now();
      const Result<KernelRef> kernel = e->get(int8_mm::make_desc(1, 64, 64));
      atomic_max(shared->longest_us, (steady_clock::now() - start) / std::chrono::microseconds(1));
      shared->failures += !kernel.is_ok();
    };
    std::vector<std::thread> others;
    for (int i = 1; i < threads; ++i)
      others.emplace_back(get);
    ++shared->ready;
    get();
    for (std::thread& thread : others)
      thread.join();
    ::_exit(0);
  }

  /// As many as the figure says, or a few where they are slow: these are patient, so that only a wrong turn makes two
  /// of them compile.
  void start_many() {
    if (is_slow())
      patience = std::chrono::seconds(60);
    for (int i = 0; i < (is_slow() ? 6 : 32); ++i)
      start(is_slow() ? 3 : 16);
  }

  void go() {
    while (shared->ready != static_cast<int>(processes.size()))
      std::this_thread::sleep_for(milliseconds(1));
    shared->go = true;
  }

  /// How many ended otherwise than by themselves.
  int wait() {
    int killed = 0;
    for (const pid_t process : processes) {
      int status = 1;
      CHECK(::waitpid(process, &status, 0) == process);
      killed += status != 0;
    }
    processes.clear();
    return killed;
  }
};

Result<FileLock> take(const std::string& path, std::uint64_t byte, FileLock::Kind kind = FileLock::Kind::exclusive,
                      milliseconds patience = milliseconds(0)) {
  return FileLock::take(path, byte, kind, patience, FileLock::Missing::create);
}

} // namespace

TEST_CASE("lock: one holder of a byte, several that share one, and none after release") {
  const TemporaryDirectory root;
  const std::string path = root.path / "lock";
  CHECK(FileLock::take(path, 1, FileLock::Kind::shared, milliseconds(0), FileLock::Missing::leave).status().code() ==
        Code::not_found);
  {
    const Result<FileLock> first = take(path, 7);
    REQUIRE(first);
    CHECK(first->held());
    CHECK(!first->waited());
    CHECK(take(path, 7).status().code() == Code::busy);
    CHECK(take(path, 7, FileLock::Kind::shared).status().code() == Code::busy);
    CHECK(take(path, std::uint64_t{1} << 40));
    const auto start = steady_clock::now();
    CHECK(take(path, 7, FileLock::Kind::exclusive, milliseconds(50)).status().code() == Code::busy);
    CHECK(steady_clock::now() - start >= milliseconds(50));
  }
  FileLock moved;
  CHECK(!moved.held());
  {
    Result<FileLock> second = take(path, 7, FileLock::Kind::shared);
    REQUIRE(second);
    CHECK(FileLock::take(path, 7, FileLock::Kind::shared, milliseconds(0), FileLock::Missing::leave));
    moved = std::move(*second);
    CHECK(!second->held());
  }
  CHECK(take(path, 7).status().code() == Code::busy);
  moved.release();
  CHECK(take(path, 7));
  struct stat info;
  REQUIRE(::stat(path.c_str(), &info) == 0);
  CHECK(info.st_size == 0);
  CHECK((info.st_mode & 07777) == 0600);
}

TEST_CASE("lock: what is no file of this user's is refused at once") {
  const TemporaryDirectory root;
  const std::string path = root.path / "lock";
  REQUIRE(::mkfifo(path.c_str(), 0600) == 0);
  CHECK(take(path, 1).status().code() == Code::io);
  ::unlink(path.c_str());
  std::filesystem::create_symlink(root.path / "elsewhere", path);
  CHECK(take(path, 1).status().code() == Code::io);
  CHECK(!std::filesystem::exists(root.path / "elsewhere"));
  CHECK(take(root.path / "none" / "lock", 1).status().code() == Code::not_found);
}

TEST_CASE("lock: free as soon as its holder is killed, though a child that the holder made lives on") {
  const TemporaryDirectory root;
  const std::string path = root.path / "lock";
  shared = &Shared::make();
  const pid_t holder = ::fork();
  if (holder == 0) {
    ::alarm(60);
    const Result<FileLock> lock = take(path, 3);
    if (const pid_t child = ::fork(); child == 0) {
      ::alarm(60);
      shared->fork_child = ::getpid();
      for (;;)
        ::pause();
    }
    shared->first_compiler = lock ? 1 : -1;
    for (;;)
      ::pause();
  }
  REQUIRE(within(std::chrono::seconds(20), [] { return shared->first_compiler != 0 && shared->fork_child != 0; }));
  CHECK(shared->first_compiler == 1);
  CHECK(take(path, 3).status().code() == Code::busy);
  ::kill(holder, SIGKILL);
  const Result<FileLock> lock = take(path, 3, FileLock::Kind::exclusive, std::chrono::seconds(20));
  REQUIRE(lock);
  CHECK(::kill(shared->fork_child, SIGKILL) == 0); // it was alive
  ::waitpid(holder, nullptr, 0);
  ::munmap(shared, sizeof(Shared));
}

// Neither sanitizer follows a fork among threads.
#if !defined(__SANITIZE_THREAD__) && !defined(__SANITIZE_ADDRESS__)
TEST_CASE("lock: a child made while other threads take locks has none of them, and can take its own") {
  const TemporaryDirectory root;
  const std::string path = root.path / "lock";
  std::atomic<bool> stop = false;
  std::vector<std::thread> threads;
  for (std::uint64_t t = 0; t < 3; ++t)
    threads.emplace_back([&, t] {
      while (!stop)
        (void)take(path, t);
    });
  for (int i = 0; i < 100; ++i)
    CHECK(exit_status_in_child([&] {
            for (const auto& entry : std::filesystem::directory_iterator("/proc/self/fd")) {
              std::error_code error;
              if (std::filesystem::read_symlink(entry, error) == path)
                return 1;
            }
            return take(path, 10) ? 0 : 2;
          }) == 0);
  stop = true;
  for (std::thread& thread : threads)
    thread.join();
}
#endif

TEST_CASE("32 processes of 16 threads on one cold key: one compile") {
  Fleet fleet;
  fleet.start_many();
  fleet.go();
  CHECK(fleet.wait() == 0);
  MESSAGE("compiles ", shared->compiles.load(), ", longest get ", shared->longest_us / 1000, " ms");
  CHECK(shared->compiles == 1);
  CHECK(shared->failures == 0);
}

TEST_CASE("32 processes of 16 threads, the one that compiles killed: two compiles, and no one waits over a second") {
  Fleet fleet;
  shared->first_compile_ms = 60'000;
  fleet.start_many();
  fleet.go();
  REQUIRE(within(std::chrono::seconds(20), [] { return shared->first_compiler != 0; }));
  std::this_thread::sleep_for(milliseconds(100)); // the others wait by now
  const auto killed = steady_clock::now();
  ::kill(shared->first_compiler, SIGKILL);
  CHECK(fleet.wait() == 1);
  const auto after_kill = (steady_clock::now() - killed) / milliseconds(1);
  MESSAGE("compiles ", shared->compiles.load(), ", longest get ", shared->longest_us / 1000, " ms, all done ",
          after_kill, " ms after the kill");
  CHECK(shared->compiles == 2);
  CHECK(shared->failures == 0);
  if (!is_slow())
    CHECK(shared->longest_us < 1'000'000);
}

TEST_CASE("a compile longer than the others' patience: they compile for themselves") {
  Fleet fleet;
  shared->first_compile_ms = 60'000;
  for (int i = 0; i < 3; ++i)
    fleet.start(2);
  fleet.go();
  REQUIRE(within(std::chrono::seconds(20), [] { return shared->compiles == 3; }));
  CHECK(within(std::chrono::seconds(20), [] { return shared->longest_us > 0; }));
  CHECK(shared->longest_us > 700'000);
  ::kill(shared->first_compiler, SIGKILL);
  CHECK(fleet.wait() == 1);
  CHECK(shared->compiles == 3);
  CHECK(shared->failures == 0);
}

TEST_CASE("without a cache that may be written, processes do not wait for each other") {
  Fleet fleet;
  SUBCASE("read-only") {
    fleet.config.cache = CacheMode::read_only;
  }
  SUBCASE("off") {
    fleet.config.cache = CacheMode::off;
  }
  shared->together = 3;
  for (int i = 0; i < 3; ++i)
    fleet.start(2);
  fleet.go();
  CHECK(fleet.wait() == 0);
  CHECK(shared->compiles == 3);
  CHECK(!shared->missed);
  CHECK(!std::filesystem::exists(fleet.config.cache_dir));
}

TEST_CASE("where no lock can be had, nobody waits and everything works") {
  TemporaryDirectory root;
  const Log log(LogLevel::off);
  StoreOptions options;
  options.directory = root.path / "cache";
  options.key_directory = root.path / "keys";
  std::filesystem::create_directories(root.path / "cache" / "kernels.lock"); // no file, so there are no locks on it
  std::filesystem::permissions(root.path / "cache", std::filesystem::perms::owner_all);
  const std::unique_ptr<Store> first = std::move(*Store::open(options, log));
  const std::unique_ptr<Store> second = std::move(*Store::open(options, log));
  StoreRow row;
  row.key = digest_of({});
  row.code = {1, 2, 3};
  const auto start = steady_clock::now();
  CHECK(!first->compile_turn(row.key, std::chrono::seconds(30)).held());
  CHECK(!second->compile_turn(row.key, std::chrono::seconds(30)).held());
  CHECK(steady_clock::now() - start < std::chrono::seconds(10));
  CHECK(first->put(row));
  CHECK(second->get(row.key));
}
