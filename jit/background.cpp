#include "jit/background.h"

#include <algorithm>

namespace kiln {

Background::Background(std::function<void(const KernelDesc&)> work) : work_(std::move(work)) {}

Background::~Background() {
  {
    std::lock_guard lock(mutex_);
    stop_ = true;
  }
  changed_.notify_all();
  if (thread_.joinable())
    thread_.join();
}

void Background::add(const KernelDesc& desc) {
  std::lock_guard lock(mutex_);
  if (std::find(list_.begin(), list_.end(), desc) != list_.end())
    return;
  list_.push_back(desc);
  if (!thread_.joinable())
    thread_ = std::thread([this] { loop(); });
  changed_.notify_all();
}

bool Background::wait_empty(std::chrono::milliseconds timeout) {
  std::unique_lock lock(mutex_);
  return changed_.wait_for(lock, timeout, [this] { return list_.empty(); });
}

void Background::loop() {
  std::unique_lock lock(mutex_);
  for (;;) {
    changed_.wait(lock, [this] { return stop_ || !list_.empty(); });
    if (stop_)
      return;
    const KernelDesc desc = list_.front();
    lock.unlock();
    work_(desc);
    lock.lock();
    list_.pop_front();
    changed_.notify_all();
  }
}

} // namespace kiln
