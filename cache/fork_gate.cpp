#include "cache/fork_gate.h"

#include <pthread.h>

#include <array>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <mutex>
#include <new>

#include "cache/process.h"
#include "cache/process_descriptor.h"

namespace kiln {
namespace {

constexpr std::chrono::seconds patience{1};

struct Gate {
  struct State {
    std::mutex mutex; ///< held while fork copies the process
    std::condition_variable changed;
    bool is_closed = false; ///< a fork waits: nobody enters
    std::array<int, 2> inside{};

    bool is_empty() const { return inside[0] == 0 && inside[1] == 0; }
  } state;
  std::array<std::atomic<bool>, 2> was_inside{};

  /// Lives as long as the process, as threads may be inside when static objects are destroyed.
  static Gate& get() {
    static Gate* const gate = [] {
      auto* made = new Gate;
      // Handlers run last first, and whoever is inside may still want to open files: so theirs come after this.
      ProcessDescriptor::prepare_for_forks();
      // Registered with this library's handle: glibc drops the handlers when it is unloaded.
      pthread_atfork([] { get().close(); }, [] { get().open_in_parent(); }, [] { get().open_in_child(); });
      return made;
    }();
    return *gate;
  }

  void close() {
    std::unique_lock lock(state.mutex);
    state.is_closed = true;
    state.changed.wait_for(lock, patience, [&] { return state.is_empty(); });
    lock.release();
  }

  void open_in_parent() {
    state.is_closed = false;
    state.mutex.unlock();
    state.changed.notify_all();
  }

  void open_in_child() {
    for (std::size_t i = 0; i < was_inside.size(); ++i)
      if (state.inside[i] != 0)
        was_inside[i] = true;
    new (&state) State; // threads that do not exist here may have been waiting
  }
};

std::size_t index_of(ForkRegion region) {
  return static_cast<std::size_t>(region);
}

} // namespace

InForkRegion::InForkRegion(ForkRegion region) : region_(region), process_(process_generation()) {
  Gate::State& state = Gate::get().state;
  std::unique_lock lock(state.mutex);
  state.changed.wait(lock, [&] { return !state.is_closed; });
  ++state.inside[index_of(region_)];
}

InForkRegion::~InForkRegion() {
  if (process_ != process_generation()) // forked from within: the child's count begins anew
    return;
  Gate::State& state = Gate::get().state;
  const std::lock_guard lock(state.mutex);
  --state.inside[index_of(region_)];
  if (state.is_closed)
    state.changed.notify_all();
}

bool was_forked_inside(ForkRegion region) {
  return Gate::get().was_inside[index_of(region)];
}

} // namespace kiln
