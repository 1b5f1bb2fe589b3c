#include <doctest/doctest.h>

#include <fcntl.h>
#include <sched.h>
#include <sys/stat.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <mutex>
#include <thread>

#include "cache/fork_gate.h"
#include "cache/log.h"
#include "cache/per_process.h"
#include "cache/process.h"
#include "cache/process_descriptor.h"
#include "tests/child_process.h"
#include "tests/emulator.h"
#include "tests/store_fixture.h"

/// What a fork finds, and what it leaves a child with. (Under load, and with the whole library: host_process_test.)

using namespace kiln;
using namespace kiln::test;
using Clock = std::chrono::steady_clock;
using std::chrono::milliseconds;

TEST_CASE("a process is told from its parent, though both have the number 1") {
  const ProcessId here = current_process();
  CHECK(here == current_process());
  CHECK(exit_status_in_child([&] {
          if (here == current_process() || process_generation() != here.generation + 1)
            return 1;
          return exit_status_in_child([&] { return process_generation() == here.generation + 2 ? 0 : 1; });
        }) == 0);
  CHECK(here == current_process());
  const unsigned forks = fork_count();
  CHECK(exit_status_in_child([] { return 0; }) == 0);
  CHECK(fork_count() == forks + 1);
  CHECK(process_generation() == here.generation);
}

TEST_CASE("a child with its parent's number makes a connection of its own" * doctest::skip(is_emulated())) {
  Place place;
  const int status = exit_status_in_child([&] {
    if (::unshare(CLONE_NEWPID) != 0)
      return 77;
    return exit_status_in_child([&] { // number 1
      const std::unique_ptr<Store> store = place.open();
      if (::getpid() != 1 || !store->put(row_of(1)) || !store->get(row_of(1).key) || ::unshare(CLONE_NEWPID) != 0)
        return 1;
      return exit_status_in_child([&] { // number 1 again
        if (::getpid() != 1 || !store->get(row_of(1).key))
          return 2;
        const Result<StoreStats> stats = store->stats();
        return stats && stats->disk_hits == 1 && stats->puts == 0 ? 0 : 3; // counts of a session of its own
      });
    });
  });
  if (status == 77)
    MESSAGE("no PID namespaces here: not run");
  else
    CHECK(status == 0);
}

TEST_CASE("a descriptor of this process: no child has it, and a host's file under its number is left alone") {
  const TemporaryDirectory root;
  const std::string path = root.path() / "file";
  ProcessDescriptor file = ProcessDescriptor::open_at(AT_FDCWD, path.c_str(), O_RDWR | O_CREAT, 0600);
  REQUIRE(file);
  CHECK(file.is_ours());
  const int number = file.get();
  CHECK((::fcntl(number, F_GETFD) & FD_CLOEXEC) != 0);
  CHECK(exit_status_in_child([&] {
          if (::fcntl(number, F_GETFD) != -1 || file.is_ours())
            return 1;
          const int own = ::open("/dev/null", O_RDONLY); // gets the number
          file.close();
          return own == number && ::fcntl(own, F_GETFD) != -1 ? 0 : 2;
        }) == 0);
  CHECK(file.is_ours());
  const int theirs = ::open("/dev/null", O_RDONLY | O_CLOEXEC);
  REQUIRE(::dup2(theirs, number) == number);
  CHECK(!file.is_ours());
  file.close();
  CHECK(::fcntl(number, F_GETFD) != -1);
  ::close(number);
  ::close(theirs);
  CHECK(!ProcessDescriptor::open_at(AT_FDCWD, (path + "/none").c_str(), O_RDONLY));
}

// Neither sanitizer follows a fork among threads: AddressSanitizer's allocator of GCC 12 may stay locked in the child.
#if !defined(__SANITIZE_THREAD__) && !defined(__SANITIZE_ADDRESS__)
namespace {

/// A thread that is inside for so long.
class Inside {
public:
  Inside(ForkRegion region, milliseconds time)
      : thread_([this, region, time] {
          const InForkRegion inside(region);
          entered_ = true;
          std::this_thread::sleep_for(time);
        }) {
    while (!entered_)
      std::this_thread::yield();
  }
  ~Inside() { thread_.join(); }

private:
  std::atomic<bool> entered_{false};
  std::thread thread_;
};

} // namespace

TEST_CASE("fork waits for threads that are inside, and a child may go in") {
  for (const ForkRegion region : {ForkRegion::database, ForkRegion::generator}) {
    const Inside inside(region, milliseconds(150));
    const auto start = Clock::now();
    CHECK(exit_status_in_child([&] {
            if (was_forked_inside(ForkRegion::database) || was_forked_inside(ForkRegion::generator))
              return 1;
            const InForkRegion also(region);
            return 0;
          }) == 0);
    CHECK(Clock::now() - start >= milliseconds(100));
  }
  const auto start = Clock::now();
  CHECK(exit_status_in_child([] { return 0; }) == 0);
  CHECK(Clock::now() - start < milliseconds(900)); // nobody is inside
}

TEST_CASE("fork waits a second at most, and the child knows what it must not touch") {
  Place place;
  const std::unique_ptr<Store> store = place.open();
  REQUIRE(store->put(row_of(1)));
  const Inside inside(ForkRegion::database, milliseconds(1700));
  const auto start = Clock::now();
  CHECK(exit_status_in_child([&] {
          if (!was_forked_inside(ForkRegion::database) || was_forked_inside(ForkRegion::generator))
            return 1;
          // Without the cache, said once; and so do its own children, which need not wait.
          if (store->get(row_of(1).key) || store->put(row_of(2)) || place.warnings.size() != 1 ||
              place.warnings[0].find("forked while another thread used the cache") == std::string::npos)
            return 2;
          const auto again = Clock::now();
          const int grandchild = exit_status_in_child([&] { return store->get(row_of(1).key) ? 3 : 0; });
          return grandchild == 0 && Clock::now() - again < milliseconds(900) ? 0 : 4;
        }) == 0);
  const auto waited = Clock::now() - start;
  CHECK(waited >= milliseconds(900));
  CHECK(waited < milliseconds(1600));
  CHECK(store->get(row_of(1).key)); // the parent goes on
}

TEST_CASE("a fork from within a region waits in vain, and nothing else") {
  CHECK(exit_status_in_child([] {
          const InForkRegion inside(ForkRegion::generator);
          if (exit_status_in_child([] { return was_forked_inside(ForkRegion::generator) ? 0 : 1; }) != 0)
            return 1;
          const pid_t child = ::fork();
          if (child == 0)
            return 0; // leaves the region that its parent entered
          int status = 1;
          ::waitpid(child, &status, 0);
          return status == 0 ? 0 : 2;
        }) == 0);
}

TEST_CASE("a child made while another thread logs can log") {
  struct Sink {
    std::atomic<bool> entered{false}, leave{false};
    std::atomic<int> lines{0};
  } sink;
  const Log log(
      LogLevel::warn,
      [](void* context, LogLevel, const char* message) {
        auto& self = *static_cast<Sink*>(context);
        ++self.lines;
        self.entered = true;
        while (*message == 'w' && !self.leave)
          std::this_thread::yield();
      },
      &sink);
  std::thread thread([&] { log.warn("wait"); });
  while (!sink.entered)
    std::this_thread::yield();
  CHECK(exit_status_in_child([&] {
          log.warn("from the child");
          return sink.lines == 2 ? 0 : 1;
        }) == 0);
  sink.leave = true;
  thread.join();
  log.warn("from the parent");
  CHECK(sink.lines == 2);
}
#endif
