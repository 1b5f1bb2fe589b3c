#include "jit/parallel.h"

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <utility>

#include <pthreadpool.h>
#ifdef __SANITIZE_THREAD__
#include <sanitizer/tsan_interface.h>
#endif

#include "cache/per_process.h"

namespace kiln {
namespace {

using Task = void (*)(void* context, std::size_t index);

void run_on(pthreadpool_t threads, std::size_t count, Task task, void* context) {
  constexpr std::uint32_t kKeepDenormals = 0;
#ifdef __SANITIZE_THREAD__
  // The library is not built with ThreadSanitizer, which has to be told what its barriers order: all before the run
  // comes before every task, and every task before what follows the run.
  struct Job {
    Task task;
    void* context;
  } job{task, context};
  __tsan_release(&job);
  const Task ordered_task = [](void* opaque, std::size_t index) {
    const Job* j = static_cast<Job*>(opaque);
    __tsan_acquire(opaque);
    j->task(j->context, index);
    __tsan_release(opaque);
  };
  pthreadpool_parallelize_1d(threads, ordered_task, &job, count, kKeepDenormals);
  __tsan_acquire(&job);
#else
  pthreadpool_parallelize_1d(threads, task, context, count, kKeepDenormals);
#endif
}

/// Made by the first parallel run of this process. One run at a time; whoever finds it busy runs alone.
class Pool {
public:
  ~Pool() {
    if (threads_)
      pthreadpool_destroy(threads_);
  }

  /// False when the pool is busy (with another caller, or with the run that this call is nested in) or cannot be made.
  bool try_run(int threads, std::size_t count, Task task, void* context) {
    if (busy_.test_and_set(std::memory_order_acquire))
      return false;
    if (!threads_)
      threads_ = pthreadpool_create(static_cast<std::size_t>(threads));
    const bool made = threads_ != nullptr;
    if (made)
      run_on(threads_, count, task, context);
    busy_.clear(std::memory_order_release);
    return made;
  }

private:
  std::atomic_flag busy_;
  pthreadpool_t threads_ = nullptr;
};

/// A buffer of one thread. Plain data, so that reaching it costs one look-up of thread storage and no check for
/// construction.
struct Scratch {
  void* data;
  std::size_t size;
};
/// Those of one thread: the first `leased` are in use by leases, the next one is anybody's.
struct Scratches {
  static constexpr int kMost = 4;
  Scratch each[kMost];
  int leased;
};
constinit thread_local Scratches scratches = {};

/// Frees them when the thread ends.
struct ScratchEnd {
  ~ScratchEnd() {
    for (Scratch& scratch : scratches.each)
      std::free(std::exchange(scratch, {nullptr, 0}).data);
  }
};

/// To twice its size at least, so that slowly growing requests allocate seldom; to what is asked for when that is too
/// much.
[[gnu::cold, gnu::noinline]] void* grow_scratch(std::size_t bytes) {
  constexpr std::size_t kLine = 64, kLeast = 4096, kMost = SIZE_MAX / 4;
  static thread_local ScratchEnd end;
  (void)end;
  Scratch& scratch = scratches.each[scratches.leased];
  const std::size_t doubled = std::max(2 * scratch.size, kLeast);
  std::free(scratch.data);
  scratch = {nullptr, 0};
  if (bytes > kMost)
    return nullptr;
  for (const std::size_t wanted : {std::max(bytes, doubled), bytes}) {
    const std::size_t size = std::max((wanted + kLine - 1) / kLine * kLine, kLine);
    if (void* const data = std::aligned_alloc(kLine, size)) {
      scratch = {data, size};
      break;
    }
  }
  return scratch.data;
}

} // namespace

struct Parallel::Impl {
  ParallelForFn host_function = nullptr;
  void* host = nullptr;
  PerProcess<Pool> pool; ///< a child made by fork has none of its parent's threads
};

Parallel::Parallel(int threads) : Parallel(threads, nullptr, nullptr) {}

Parallel::Parallel(int threads, ParallelForFn host_function, void* host)
    : threads_(std::max(threads, 1)), impl_(std::make_unique<Impl>()) {
  impl_->host_function = host_function;
  impl_->host = host;
}

Parallel::~Parallel() = default;

void Parallel::run(std::size_t count, void (*task)(void* context, std::size_t index), void* context) {
  if (count > 1 && threads_ > 1) {
    if (impl_->host_function)
      return impl_->host_function(impl_->host, count, task, context);
    if (impl_->pool.get().try_run(threads_, count, task, context))
      return;
  }
  for (std::size_t i = 0; i < count; ++i)
    task(context, i);
}

void* thread_scratch(std::size_t bytes) {
  const Scratch& scratch = scratches.each[scratches.leased];
  return bytes <= scratch.size && scratch.data ? scratch.data : grow_scratch(bytes);
}

ScratchLease::ScratchLease(std::size_t bytes) {
  // The last one stays for thread_scratch.
  data_ = scratches.leased < Scratches::kMost - 1 ? thread_scratch(bytes) : nullptr;
  if (data_ != nullptr)
    ++scratches.leased;
}

ScratchLease::~ScratchLease() {
  if (data_ != nullptr)
    --scratches.leased;
}

} // namespace kiln
