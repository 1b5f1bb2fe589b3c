#pragma once
#include <chrono>
#include <condition_variable>
#include <deque>
#include <functional>
#include <mutex>
#include <thread>

#include "cache/per_process.h"
#include "cache/status.h"
#include "jit/desc.h"

namespace kiln {

/// One background thread that works through a list of descs in order. Started by the first add(). Thread-safe. A child
/// made by fork begins with an empty list and a thread of its own.
class Background {
public:
  /// `work` must not throw.
  explicit Background(std::function<void(const KernelDesc&)> work);
  ~Background(); ///< finishes the desc in progress, drops the rest

  /// Ignored when already on the list. Code::out_of_memory when the system has no thread left.
  Status add(const KernelDesc& desc);
  /// Waits until nothing is listed or in progress; false on time-out.
  bool wait_empty(std::chrono::milliseconds timeout);

private:
  struct Worker {
    std::mutex mutex;
    std::condition_variable changed;
    std::deque<KernelDesc> list; ///< the front is in progress
    bool stop = false;
    std::thread thread;
  };
  void loop(Worker& worker);
  const std::function<void(const KernelDesc&)> work_;
  PerProcess<Worker> worker_;
};

} // namespace kiln
