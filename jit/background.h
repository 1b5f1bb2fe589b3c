#pragma once
#include <chrono>
#include <condition_variable>
#include <deque>
#include <functional>
#include <mutex>
#include <thread>

#include "jit/desc.h"

namespace kiln {

/// One background thread that works through a list of descs in order. Started by the first add(). Thread-safe.
class Background {
public:
  explicit Background(std::function<void(const KernelDesc&)> work);
  ~Background(); ///< finishes the desc in progress, drops the rest

  /// Ignored when already on the list.
  void add(const KernelDesc& desc);
  /// Waits until nothing is listed or in progress; false on time-out.
  bool wait_empty(std::chrono::milliseconds timeout);

private:
  void loop();
  std::function<void(const KernelDesc&)> work_;
  std::mutex mutex_;
  std::condition_variable changed_;
  std::deque<KernelDesc> list_; ///< the front is in progress
  bool stop_ = false;
  std::thread thread_;
};

} // namespace kiln
