#include <doctest/doctest.h>

#include <dlfcn.h>
#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <set>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "api/kiln.h"
#include "tests/child_process.h"
#include "tests/emulator.h"

/// What host processes do around the library: load it twice, unload it, fork and exec at any moment. Nothing of Kiln is
/// linked here: each case opens libkiln in a process of its own, which a hang of a minute ends.
/// Usage: host_process_test LIBKILN [doctest's arguments]; `host_process_test --descriptors` prints those it inherited.

using namespace kiln::test;
namespace fs = std::filesystem;

namespace {

fs::path libkiln, program;

/// A place for caches, and the environment that says so, before anything is forked; and one for copies of libraries.
struct Place {
  Place() {
    // In memory where that is possible: a disk that others keep busy would take long for each sync.
    home = make(::access("/dev/shm", W_OK) == 0 ? "/dev/shm" : fs::temp_directory_path());
    libraries = make(fs::temp_directory_path()); // what is in memory may be mounted noexec
    ::setenv("HOME", home.c_str(), 1);
    for (const char* name : {"XDG_CACHE_HOME", "XDG_DATA_HOME", "KILN_CACHE_DIR", "KILN_FORCE", "KILN_PERF"})
      ::unsetenv(name);
    ::setenv("KILN_THREADS", "2", 1);
  }
  ~Place() {
    fs::remove_all(home);
    fs::remove_all(libraries);
  }
  Place(const Place&) = delete;
  Place& operator=(const Place&) = delete;

  fs::path home, libraries;

private:
  static fs::path make(const fs::path& where) {
    std::string pattern = (where / "kiln_host_process_test.XXXXXX").string();
    REQUIRE(::mkdtemp(pattern.data()) != nullptr);
    return pattern;
  }
};

/// One copy of the library.
struct Library {
  void* handle = nullptr;
  decltype(&kiln_engine_create) engine_create = nullptr;
  decltype(&kiln_engine_destroy) engine_destroy = nullptr;
  decltype(&kiln_get) get = nullptr;
  decltype(&kiln_kernel_release) kernel_release = nullptr;
  decltype(&kiln_kernel_get_info) kernel_get_info = nullptr;
  decltype(&kiln_run) run = nullptr;
  decltype(&kiln_get_stats) get_stats = nullptr;
  decltype(&kiln_last_error) last_error = nullptr;
  decltype(&kiln_prefetch) prefetch = nullptr;
  decltype(&kiln_prefetch_wait) prefetch_wait = nullptr;

  explicit Library(void* opened) : handle(opened) {
    if (handle == nullptr) {
      std::fprintf(stderr, "%s\n", dlerror());
      return;
    }
    const auto find = [&](auto& function, const char* name) {
      function = reinterpret_cast<std::decay_t<decltype(function)>>(dlsym(handle, name));
    };
    find(engine_create, "kiln_engine_create");
    find(engine_destroy, "kiln_engine_destroy");
    find(get, "kiln_get");
    find(kernel_release, "kiln_kernel_release");
    find(kernel_get_info, "kiln_kernel_get_info");
    find(run, "kiln_run");
    find(get_stats, "kiln_get_stats");
    find(last_error, "kiln_last_error");
    find(prefetch, "kiln_prefetch");
    find(prefetch_wait, "kiln_prefetch_wait");
  }
  static Library open(const fs::path& path = libkiln) { return Library(dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL)); }
};

constexpr std::int64_t k_of_all = 64;

kiln_int8_mm_desc desc_of(std::int64_t n, std::int64_t m = 1) {
  kiln_int8_mm_desc desc = KILN_INT8_MM_DESC_INIT;
  desc.m = m;
  desc.n = n;
  desc.k = k_of_all;
  return desc;
}

/// An engine of one copy, and calls on it that tell whether all went well.
struct Host {
  const Library& library;
  kiln_engine* engine = nullptr;

  explicit Host(const Library& l) : library(l) {
    if (library.engine_create == nullptr || library.engine_create(nullptr, &engine) != KILN_OK)
      std::fprintf(stderr, "no engine: %s\n", library.last_error ? library.last_error() : "no library");
  }
  ~Host() { end(); }
  Host(const Host&) = delete;
  Host& operator=(const Host&) = delete;
  void end() { library.engine_destroy(std::exchange(engine, nullptr)); }

  kiln_kernel* get(std::int64_t n, std::int64_t m = 1) {
    const kiln_int8_mm_desc desc = desc_of(n, m);
    kiln_kernel* kernel = nullptr;
    if (library.get(engine, &desc.base, &kernel) != KILN_OK)
      std::fprintf(stderr, "n=%ld: %s\n", static_cast<long>(n), library.last_error());
    return kernel;
  }
  /// Whether the kernel computes what it should.
  bool is_right(const kiln_kernel* kernel, std::int64_t n) const {
    std::vector<std::int8_t> a(k_of_all), b(static_cast<std::size_t>(n * k_of_all));
    for (std::size_t i = 0; i < a.size(); ++i)
      a[i] = static_cast<std::int8_t>(i * 7 - 90);
    for (std::size_t i = 0; i < b.size(); ++i)
      b[i] = static_cast<std::int8_t>(i * 13 - 50);
    std::vector<std::int32_t> c(static_cast<std::size_t>(n), 1);
    kiln_int8_mm_args args = KILN_INT8_MM_ARGS_INIT;
    args.m = 1;
    args.a = a.data();
    args.lda = k_of_all;
    args.b = b.data();
    args.ldb = k_of_all;
    args.c = c.data();
    args.ldc = n;
    if (kernel == nullptr || library.run(kernel, &args.base) != KILN_OK)
      return false;
    for (std::int64_t column = 0; column < n; ++column) {
      std::int32_t sum = 0;
      for (std::int64_t i = 0; i < k_of_all; ++i)
        sum += a[static_cast<std::size_t>(i)] * b[static_cast<std::size_t>(column * k_of_all + i)];
      if (c[static_cast<std::size_t>(column)] != sum)
        return false;
    }
    return true;
  }
  /// Gets, runs and releases; the source, or -1 when something was wrong.
  int use(std::int64_t n) {
    kiln_kernel* const kernel = get(n);
    kiln_kernel_info info = KILN_KERNEL_INFO_INIT;
    const bool good = is_right(kernel, n) && library.kernel_get_info(kernel, &info) == KILN_OK;
    const int source = info.source;
    library.kernel_release(kernel);
    return good ? source : -1;
  }
  kiln_stats stats() const {
    kiln_stats out = KILN_STATS_INIT;
    library.get_stats(engine, &out);
    return out;
  }
};

bool is_mapped(std::string_view name) {
  std::ifstream maps("/proc/self/maps");
  for (std::string line; std::getline(maps, line);)
    if (line.find(name) != std::string::npos)
      return true;
  return false;
}

long entries_in(const char* directory) {
  return std::distance(fs::directory_iterator(directory), {});
}

/// The threads of this process; one that has been joined may still be seen for a moment.
bool is_single_threaded() {
  if (is_emulated()) // qemu's own threads are in that list
    return true;
  for (int i = 0; i < 2000 && entries_in("/proc/self/task") > 1; ++i)
    std::this_thread::sleep_for(std::chrono::milliseconds(1));
  return entries_in("/proc/self/task") == 1;
}

/// Descriptors from 3 on, with what they stand for.
std::string inherited_descriptors() {
  std::string out;
  std::vector<fs::path> links;
  for (const fs::directory_entry& entry : fs::directory_iterator("/proc/self/fd"))
    links.push_back(entry.path());
  for (const fs::path& link : links) {
    std::error_code error;
    const fs::path target = fs::read_symlink(link, error); // gone: the iterator's own
    if (!error && std::stoi(link.filename()) > 2)
      out += link.filename().string() + " " + target.string() + "\n";
  }
  return out;
}

/// In a child forked from this process, after exec: 0 when it has no descriptor of ours.
int descriptors_after_exec() {
  const pid_t child = ::fork();
  if (child == 0) {
    ::execl(program.c_str(), program.c_str(), "--descriptors", nullptr);
    ::_exit(9);
  }
  int status = 0;
  ::waitpid(child, &status, 0);
  return status;
}

} // namespace

int main(int argc, char** argv) {
  if (argc > 1 && std::strcmp(argv[1], "--descriptors") == 0) {
    const std::string inherited = inherited_descriptors();
    std::fputs(inherited.c_str(), stderr);
    return inherited.empty() ? 0 : 1;
  }
  doctest::Context context(argc, argv);
  if (argc < 2 || argv[1][0] == '-')
    return std::fputs("usage: host_process_test LIBKILN\n", stderr), 2;
  libkiln = fs::canonical(argv[1]);
  program = fs::absolute(argv[0]);
  for (int i = 3; i < 1024; ++i) // of whoever started this
    ::close(i);
  return context.run();
}

TEST_CASE("unloaded: no thread and no mapping is left, and the process forks and ends as if there had been none") {
  const Place place;
  CHECK(exit_status_in_child([] {
          for (int round = 0; round < 3; ++round) {
            const Library library = Library::open();
            // On a thread that has ended: its thread-local objects keep the library until then.
            bool good = false;
            std::thread user([&] {
              Host host(library);
              const kiln_int8_mm_desc desc = desc_of(96);
              const kiln_desc* const list[] = {&desc.base};
              good = host.use(64) == (round == 0 ? KILN_COMPILED : KILN_FROM_DISK) && host.use(200) >= 0 &&
                     library.prefetch(host.engine, list, 1) == KILN_OK &&
                     library.prefetch_wait(host.engine, 20'000) == KILN_OK;
              library.run(nullptr, nullptr); // an error, whose message is the thread's
            });
            user.join();
            if (!good || !is_single_threaded())
              return 1;
            if (dlclose(library.handle) != 0 || is_mapped(libkiln.filename().string()))
              return 2;
            if (exit_status_in_child([] { return 0; }) != 0) // no fork handler is left
              return 3;
          }
          std::exit(0); // with what runs at exit
        }) == 0);
}

TEST_CASE("unloaded while a thread that used it lives on: that thread ends as if nothing were") {
  const Place place;
  CHECK(exit_status_in_child([] {
          const Library library = Library::open();
          std::atomic<int> step{0};
          bool good = false;
          std::thread user([&] {
            {
              Host host(library);
              good = host.use(64) >= 0 && library.run(nullptr, nullptr) != KILN_OK;
            }
            step = 1;
            while (step != 2)
              std::this_thread::yield();
          });
          while (step != 1)
            std::this_thread::yield();
          dlclose(library.handle);
          step = 2;
          user.join();
          if (!good || !is_single_threaded() || exit_status_in_child([] { return 0; }) != 0)
            return 1;
          std::exit(0);
        }) == 0);
}

TEST_CASE("an engine ends while threads run its kernels, which stay right until they are given back") {
  const Place place;
  CHECK(exit_status_in_child([] {
          const Library library = Library::open();
          Host host(library);
          std::vector<kiln_kernel*> kernels;
          for (std::int64_t n = 16; n < 16 + 8; ++n)
            kernels.push_back(host.get(n));
          std::atomic<int> wrong{0}, running{0};
          std::atomic<bool> stop{false};
          std::vector<std::thread> threads;
          for (int t = 0; t < 3; ++t)
            threads.emplace_back([&, t] {
              ++running;
              for (std::size_t i = static_cast<std::size_t>(t); !stop; ++i)
                wrong += !host.is_right(kernels[i % 8], 16 + static_cast<std::int64_t>(i % 8));
            });
          while (running < 3)
            std::this_thread::yield();
          host.end();
          std::this_thread::sleep_for(std::chrono::milliseconds(100));
          stop = true;
          for (std::thread& thread : threads)
            thread.join();
          // Given back on another thread, the last one after another engine has come.
          Host next(library);
          std::thread([&] {
            for (kiln_kernel* kernel : kernels)
              library.kernel_release(kernel);
          }).join();
          return wrong == 0 && next.use(16) == KILN_FROM_DISK && is_single_threaded() ? 0 : 1;
        }) == 0);
}

TEST_CASE("exec: whatever the library has open, and whatever its threads are opening, stays behind" *
          doctest::skip(is_emulated())) { // an emulator has files of its own open
  const Place place;
  for (const char* perf : {"off", "jitdump"}) {
    ::setenv("KILN_PERF", perf, 1);
    CHECK(exit_status_in_child([&] {
            fs::current_path(place.home);
            const Library library = Library::open();
            Host host(library);
            if (host.use(64) < 0 || host.use(64) < 0)
              return 1;
            if (inherited_descriptors().empty()) // there is something to inherit
              return 2;
            if (descriptors_after_exec() != 0)
              return 3;
            std::atomic<bool> stop{false};
            std::atomic<int> wrong{0};
            std::vector<std::thread> threads;
            for (int t = 0; t < 2; ++t)
              threads.emplace_back([&, t] { // engines come and go: every file is opened again and again
                for (std::int64_t n = 1; !stop; ++n) {
                  Host other(library);
                  wrong += other.use(1 + (n * 2 + t) % 40) < 0;
                }
              });
            constexpr int times = 40;
            int leaks = 0;
            for (int i = 0; i < times; ++i)
              leaks += descriptors_after_exec() != 0;
            stop = true;
            for (std::thread& thread : threads)
              thread.join();
            return leaks == 0 && wrong == 0 ? 0 : 4;
          }) == 0);
  }
}

// Neither sanitizer follows a fork among threads: AddressSanitizer's allocator of GCC 12 may stay locked in the child.
#if !defined(__SANITIZE_THREAD__) && !defined(__SANITIZE_ADDRESS__)
TEST_CASE("fork while other threads compile: the child compiles too, with every generator" *
          doctest::skip(is_emulated())) {
  const Place place;
  for (const char* force : {"", "portable"}) {
    INFO(force);
    ::setenv("KILN_FORCE", force, 1);
    const auto start = std::chrono::steady_clock::now();
    CHECK(exit_status_in_child([&] {
            const Library library = Library::open();
            Host host(library);
            std::atomic<bool> stop{false};
            std::atomic<int> wrong{0};
            std::vector<std::thread> threads;
            for (int t = 0; t < 2; ++t)
              threads.emplace_back([&, t] {
                for (std::int64_t n = 1; !stop; ++n)
                  wrong += host.use(2 * n + t) < 0;
              });
            constexpr int forks = 20;
            int bad = 0;
            std::chrono::steady_clock::duration longest{};
            for (int i = 0; i < forks; ++i) {
              const auto before = std::chrono::steady_clock::now();
              const pid_t child = ::fork();
              if (child == 0) {
                ::alarm(20);
                // One that a thread of the parent may be making, and one of its own, which it stores: at the latest
                // when the parent's threads leave it a moment to.
                bool good = host.use(2 * i + 1) >= 0, stored = false;
                for (int n = 100'000 + 100 * i; good && !stored && n < 100'000 + 100 * (i + 1); ++n) {
                  good = host.use(n) == KILN_COMPILED;
                  Host again(library);
                  stored = again.use(n) == KILN_FROM_DISK;
                }
                ::_exit(good && stored ? 0 : 1);
              }
              longest = std::max(longest, std::chrono::steady_clock::now() - before);
              int status = 1;
              ::waitpid(child, &status, 0);
              bad += status != 0;
            }
            stop = true;
            for (std::thread& thread : threads)
              thread.join();
            std::fprintf(stderr,
                         "%s: %d forks among compiling threads, %d children that failed; longest fork %.1f ms\n",
                         *force != 0 ? force : "any path", forks, bad,
                         std::chrono::duration<double, std::milli>(longest).count());
            return bad == 0 && wrong == 0 ? 0 : 1;
          }) == 0);
    CHECK(std::chrono::steady_clock::now() - start < std::chrono::seconds(50));
  }
  ::setenv("KILN_FORCE", "", 1);
}
#endif

namespace {

/// Copies a file with one name in it changed to another of the same length, so that the loader takes it for another.
void copy_renamed(const fs::path& from, const fs::path& to, const std::string& name, const std::string& other) {
  std::ifstream in(from, std::ios::binary);
  std::string content(std::istreambuf_iterator<char>(in), {});
  for (std::size_t at = 0; (at = content.find(name, at)) != std::string::npos; at += name.size())
    content.replace(at, name.size(), other);
  std::ofstream(to, std::ios::binary) << content;
}

fs::path mapped_path(std::string_view name) {
  std::ifstream maps("/proc/self/maps");
  for (std::string line; std::getline(maps, line);)
    if (line.find(name) != std::string::npos)
      return line.substr(line.find('/'));
  return {};
}

/// Both at once, each on a thread of its own, on a cache that has to evict: 0 when all was right.
int use_both(const Library& a, const Library& b, int kernels) {
  std::atomic<int> wrong{0}, errors{0}, compiled{0};
  const auto use = [&](const Library& library, bool backwards) {
    Host host(library);
    for (std::int64_t i = 0; i < kernels; ++i)
      wrong += host.use(1 + (backwards ? kernels - 1 - i : i)) < 0;
    const kiln_stats stats = host.stats();
    wrong += static_cast<int>(stats.cache_refused);
    errors += static_cast<int>(stats.cache_errors);
    compiled += static_cast<int>(stats.compiled);
  };
  std::thread other([&] { use(b, true); });
  use(a, false);
  other.join();
  // A third, alone: what they left is whole.
  Host host(a);
  int from_disk = 0;
  for (std::int64_t i = 0; i < kernels; ++i)
    from_disk += host.use(1 + i) == KILN_FROM_DISK;
  std::fprintf(stderr, "%d kernels, %d compiled by two copies at once, %d from disk afterwards, %d errors, %d wrong\n",
               kernels, compiled.load(), from_disk, errors.load(), wrong.load());
  return wrong == 0 && errors == 0 && host.stats().cache_refused == 0 && host.stats().cache_errors == 0 &&
                 from_disk > kernels * 9 / 10
             ? 0
             : 1;
}

} // namespace

TEST_CASE("two copies in one process share a cache: over one SQLite") {
  const Place place;
  fs::copy_file(libkiln, place.libraries / "libkiln-copy.so");
  CHECK(exit_status_in_child([&] {
          const Library a = Library::open(), b = Library::open(place.libraries / "libkiln-copy.so");
          if (a.handle == nullptr || b.handle == nullptr || a.get == b.get)
            return 2;
          return use_both(a, b, is_emulated() ? 20 : 200);
        }) == 0);
}

TEST_CASE("two copies in one process share a cache: over an SQLite each, as two packages bring them") {
  const Place place;
  const int status = exit_status_in_child([&] {
    const Library a = Library::open();
    const fs::path sqlite = mapped_path("/libsqlite3.so.0");
    if (sqlite.empty())
      return 77;
    copy_renamed(sqlite, place.libraries / "libsqlite9.so.0", "libsqlite3.so.0", "libsqlite9.so.0");
    copy_renamed(libkiln, place.libraries / "libkiln-copy.so", "libsqlite3.so.0", "libsqlite9.so.0");
    if (dlopen((place.libraries / "libsqlite9.so.0").c_str(), RTLD_NOW | RTLD_LOCAL) == nullptr)
      return 3;
    const Library b = Library::open(place.libraries / "libkiln-copy.so");
    if (b.handle == nullptr || !is_mapped("libsqlite9") || !is_mapped("libsqlite3"))
      return 4;
    return use_both(a, b, is_emulated() ? 20 : 200);
  });
  if (status == 77)
    MESSAGE("SQLite is no shared object here: not run");
  else
    CHECK(status == 0);
}

TEST_CASE("two copies in one process share a cache: in a namespace of the loader's own" *
          doctest::skip(is_emulated())) {
  const Place place;
  ::setenv("KILN_THREADS", "1", 1); // a C library of its own there knows nothing of the other's threads
  CHECK(exit_status_in_child([&] {
          const Library a = Library::open();
          const Library b(dlmopen(LM_ID_NEWLM, libkiln.c_str(), RTLD_NOW | RTLD_LOCAL));
          if (a.handle == nullptr || b.handle == nullptr)
            return 2;
          Host first(a), second(b);
          for (std::int64_t n = 1; n < 40; n += 2) {
            if (first.use(n) != KILN_COMPILED || second.use(n) != KILN_FROM_DISK)
              return 3;
            if (second.use(n + 1) != KILN_COMPILED || first.use(n + 1) != KILN_FROM_DISK)
              return 4;
          }
          second.end();
          if (first.use(101) != KILN_COMPILED)
            return 5;
          const kiln_stats stats = first.stats();
          return stats.cache_errors == 0 && stats.cache_refused == 0 && stats.cache_rows == 41 ? 0 : 6;
        }) == 0);
}

TEST_CASE("a host that closes every descriptor, and opens files of its own, keeps them as they are") {
  const Place place;
  CHECK(exit_status_in_child([&] {
          const Library library = Library::open();
          Host host(library);
          if (host.use(64) != KILN_COMPILED || host.use(80) != KILN_COMPILED)
            return 1;
          for (int i = 3; i < 256; ++i)
            ::close(i);
          std::vector<int> theirs;
          std::string content(4096, 'x');
          for (int i = 0; i < 20; ++i) {
            theirs.push_back(
                ::open((place.home / ("file" + std::to_string(i))).c_str(), O_RDWR | O_CREAT | O_EXCL, 0600));
            if (::write(theirs.back(), content.data(), content.size()) != 4096)
              return 2;
          }
          for (std::int64_t n = 100; n < 110; ++n)
            if (host.use(n) < 0) // compiled, at worst
              return 3;
          host.end();
          for (const int file : theirs) {
            std::string now(8192, 0);
            if (::pread(file, now.data(), now.size(), 0) != 4096 || now.compare(0, 4096, content) != 0)
              return 4;
          }
          Host next(library); // and the cache serves again
          return next.use(64) == KILN_FROM_DISK && next.use(109) == KILN_FROM_DISK ? 0 : 5;
        }) == 0);
}
