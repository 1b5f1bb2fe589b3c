#include "jit/parallel.h"

#include <algorithm>
#include <atomic>
#include <cstring>
#include <filesystem>
#include <limits>
#include <mutex>
#include <set>
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

/// Runs `count` tasks, and tells whether each ran once.
bool runs_each_once(Parallel& parallel, std::size_t count) {
  std::vector<std::atomic<int>> runs(count);
  parallel.run(
      count, [](void* context, std::size_t i) { ++(*static_cast<std::vector<std::atomic<int>>*>(context))[i]; }, &runs);
  return std::all_of(runs.begin(), runs.end(), [](const auto& n) { return n == 1; });
}

std::ptrdiff_t thread_count() {
  if (is_emulated()) // whose threads have been joined a while before they end
    std::this_thread::sleep_for(std::chrono::milliseconds(100));
  return std::distance(std::filesystem::directory_iterator("/proc/self/task"), std::filesystem::directory_iterator());
}

} // namespace

TEST_CASE("every task runs once") {
  for (int threads : {1, 2, 3}) {
    Parallel parallel(threads);
    CHECK(parallel.threads() == threads);
    for (std::size_t count : {0, 1, 2, 3, 7, 8, 9, 64, 1000}) {
      CAPTURE(threads);
      CAPTURE(count);
      CHECK(runs_each_once(parallel, count));
    }
  }
}

TEST_CASE("no thread starts before there is parallel work, and one thread never needs another") {
  const std::ptrdiff_t before = thread_count();
  Parallel one(1), many(4);
  CHECK(runs_each_once(one, 100));
  CHECK(runs_each_once(many, 1));
  CHECK(thread_count() == before);
  CHECK(runs_each_once(many, 2));
  CHECK(thread_count() == before + 3);
}

TEST_CASE("work is spread over the threads and never over more") {
  Parallel parallel(3);
  struct Seen {
    std::mutex mutex;
    std::set<std::thread::id> threads;
  } seen;
  parallel.run(
      30,
      [](void* context, std::size_t) {
        {
          auto& s = *static_cast<Seen*>(context);
          const std::scoped_lock lock(s.mutex);
          s.threads.insert(std::this_thread::get_id());
        }
        std::this_thread::sleep_for(std::chrono::milliseconds(1));
      },
      &seen);
  CHECK(seen.threads.size() >= 2);
  CHECK(seen.threads.size() <= 3);
}

TEST_CASE("nested runs finish") {
  Parallel parallel(4);
  struct Nested {
    Parallel* parallel;
    std::atomic<int> inner{0};
  } nested{&parallel};
  parallel.run(
      8,
      [](void* context, std::size_t) {
        auto& outer = *static_cast<Nested*>(context);
        outer.parallel->run(
            10, [](void* c, std::size_t) { ++static_cast<Nested*>(c)->inner; }, context);
      },
      &nested);
  CHECK(nested.inner == 80);
}

TEST_CASE("callers from many threads all get their work done") {
  Parallel parallel(3);
  std::atomic<int> failed{0};
  std::vector<std::thread> callers;
  for (int t = 0; t < 4; ++t)
    callers.emplace_back([&] {
      for (std::size_t i = 0; i < 40; ++i)
        failed += !runs_each_once(parallel, i % 17);
    });
  for (std::thread& caller : callers)
    caller.join();
  CHECK(failed == 0);
}

TEST_CASE("a host's function is used for parallel work, and only for that") {
  struct Host {
    std::size_t calls = 0, tasks = 0;
  } host;
  Parallel parallel(
      4,
      [](void* h, std::size_t count, void (*task)(void*, std::size_t), void* context) {
        auto& seen = *static_cast<Host*>(h);
        ++seen.calls;
        seen.tasks += count;
        for (std::size_t i = count; i-- > 0;)
          task(context, i);
      },
      &host);
  CHECK(runs_each_once(parallel, 25));
  CHECK(runs_each_once(parallel, 1));
  CHECK(host.calls == 1);
  CHECK(host.tasks == 25);
  CHECK(thread_count() <= 2); // a sanitizer may have one of its own
}

TEST_CASE("a child made by fork has threads of its own, also when the pool was busy" * doctest::skip(is_emulated())) {
  Parallel parallel(3);
  CHECK(runs_each_once(parallel, 10));
  std::atomic<bool> done{false};
  std::thread busy([&] {
    while (!done)
      runs_each_once(parallel, 50);
  });
  for (int round = 0; round < 4; ++round)
    CHECK(exit_status_in_child([&] {
            for (int i = 0; i < 5; ++i)
              if (!runs_each_once(parallel, 40))
                return 1;
            return thread_count() >= 3 ? 0 : 2;
          }) == 0);
  done = true;
  busy.join();
  CHECK(runs_each_once(parallel, 10));
}

TEST_CASE("a pool made before a fork is left alone when the child destroys it") {
  auto parallel = std::make_unique<Parallel>(3);
  CHECK(runs_each_once(*parallel, 10));
  CHECK(exit_status_in_child([&] {
          parallel.reset();
          return 0;
        }) == 0);
  CHECK(runs_each_once(*parallel, 10));
}

TEST_CASE("denormals are kept on every thread") {
  Parallel parallel(4);
  std::vector<float> halves(64);
  parallel.run(
      halves.size(),
      [](void* context, std::size_t i) {
        volatile float least_normal = std::numeric_limits<float>::min();
        (*static_cast<std::vector<float>*>(context))[i] = least_normal * 0.5f;
      },
      &halves);
  CHECK(std::all_of(halves.begin(), halves.end(), [](float v) { return v > 0; }));
}

TEST_CASE("scratch is aligned, kept while it fits, and grows by doubling") {
  std::thread([] {
    void* first = thread_scratch(10000);
    REQUIRE(first != nullptr);
    CHECK(reinterpret_cast<std::uintptr_t>(first) % 64 == 0);
    std::memset(first, 1, 10000);
    CHECK(thread_scratch(0) == first);
    CHECK(thread_scratch(9999) == first);
    void* second = thread_scratch(10100);
    REQUIRE(second != nullptr);
    std::memset(second, 2, 10100);
    CHECK(thread_scratch(20000) == second);
    CHECK(reinterpret_cast<std::uintptr_t>(thread_scratch(1000001)) % 64 == 0);
  }).join();
}

TEST_CASE("scratch that cannot be had is null, and a later request works") {
  CHECK(thread_scratch(std::numeric_limits<std::size_t>::max()) == nullptr);
  CHECK(thread_scratch(64) != nullptr);
}

TEST_CASE("each thread has scratch of its own") {
  void* mine = thread_scratch(64);
  void* other = nullptr;
  std::thread([&] { other = thread_scratch(64); }).join();
  CHECK(mine != other);
}
