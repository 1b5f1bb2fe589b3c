#pragma once
#include <cstddef>
#include <cstdint>
#include <memory>

namespace kiln {

/// Runs `task(context, i)` for i in [0, count), possibly on several threads, and returns when all are done.
/// A host's own; must not throw.
using ParallelForFn = void (*)(void* host, std::size_t count, void (*task)(void* context, std::size_t index),
                               void* context);

/// The threads of one engine. Default: pthreadpool, made before the first parallel run and not earlier. A host may give
/// its own. Thread-safe: a call that finds the pool busy with another (or with the one it is nested in) runs on its
/// caller's thread alone. After fork the child makes a pool of its own. The floating-point state of the pool's threads
/// is the system's default.
class Parallel {
public:
  /// `threads` ≥ 1: upper bound; 1 never starts a thread.
  explicit Parallel(int threads);
  Parallel(int threads, ParallelForFn host_function, void* host);
  ~Parallel();
  Parallel(const Parallel&) = delete;
  Parallel& operator=(const Parallel&) = delete;

  int threads() const { return threads_; }
  void run(std::size_t count, void (*task)(void* context, std::size_t index), void* context);

private:
  struct Impl;
  int threads_;
  std::unique_ptr<Impl> impl_;
};

/// A 64-byte-aligned scratch buffer of the calling thread, at least `bytes` long, valid until its next call on this
/// thread; kept for reuse and freed with the thread. Null when memory is short.
void* thread_scratch(std::size_t bytes);

/// Such a buffer that stays this scope's while it calls Parallel::run: a task that a host runs on this thread
/// meanwhile, of the same call or another, gets other ones.
class ScratchLease {
public:
  explicit ScratchLease(std::size_t bytes);
  ~ScratchLease();
  ScratchLease(const ScratchLease&) = delete;
  ScratchLease& operator=(const ScratchLease&) = delete;
  /// Null when memory is short, or a few of them are nested already.
  void* data() const { return data_; }

private:
  void* data_;
};

} // namespace kiln
