#include "jit/background.h"

#include <algorithm>
#include <system_error>

#include <fmt/format.h>

namespace kiln {

Background::Background(std::function<void(const KernelDesc&)> work) : work_(std::move(work)) {}

Background::~Background() {
  Worker& worker = worker_.get();
  {
    std::lock_guard lock(worker.mutex);
    worker.stop = true;
  }
  worker.changed.notify_all();
  if (worker.thread.joinable())
    worker.thread.join();
}

Status Background::add(const KernelDesc& desc) {
  Worker& worker = worker_.get();
  std::lock_guard lock(worker.mutex);
  if (std::find(worker.list.begin(), worker.list.end(), desc) != worker.list.end())
    return {};
  if (!worker.thread.joinable()) {
    try {
      worker.thread = std::thread([this, &worker] { loop(worker); });
    } catch (const std::system_error& e) {
      return Status::error(Code::out_of_memory, fmt::format("no background thread can be started: {}", e.what()));
    }
  }
  worker.list.push_back(desc);
  worker.changed.notify_all();
  return {};
}

bool Background::wait_empty(std::chrono::milliseconds timeout) {
  Worker& worker = worker_.get();
  std::unique_lock lock(worker.mutex);
  return worker.changed.wait_for(lock, timeout, [&] { return worker.list.empty(); });
}

void Background::loop(Worker& worker) {
  std::unique_lock lock(worker.mutex);
  for (;;) {
    worker.changed.wait(lock, [&] { return worker.stop || !worker.list.empty(); });
    if (worker.stop)
      return;
    const KernelDesc desc = worker.list.front();
    lock.unlock();
    work_(desc);
    lock.lock();
    worker.list.pop_front();
    worker.changed.notify_all();
  }
}

} // namespace kiln
