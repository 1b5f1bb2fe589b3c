#include "cache/process.h"

#include <atomic>

#include <pthread.h>
#include <unistd.h>

namespace kiln {
namespace {

std::atomic<unsigned> generation{0}, forks{0};

void count_forks() {
  // Registered with this library's handle: glibc drops the handlers when it is unloaded.
  static const int registered = pthread_atfork([] { forks.fetch_add(1, std::memory_order_relaxed); }, nullptr,
                                               [] { generation.fetch_add(1, std::memory_order_relaxed); });
  static_cast<void>(registered);
}

} // namespace

unsigned process_generation() {
  count_forks();
  return generation.load(std::memory_order_relaxed);
}

unsigned fork_count() {
  count_forks();
  return forks.load(std::memory_order_relaxed);
}

ProcessId current_process() {
  return {::getpid(), process_generation()};
}

} // namespace kiln
