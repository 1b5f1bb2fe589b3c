#pragma once
#include <atomic>

#include "cache/process.h"

namespace kiln {

/// A T of this process. In a child made by fork the first get() makes a new T and leaves the inherited one alone for
/// good: threads that do not exist in the child may have held its locks, or been in the middle of changing it.
template <class T> class PerProcess {
public:
  PerProcess() : state_(new State) {}
  ~PerProcess() {
    if (State* state = state_.load(); state->generation == process_generation())
      delete state;
  }
  PerProcess(const PerProcess&) = delete;
  PerProcess& operator=(const PerProcess&) = delete;

  T& get() {
    State* state = state_.load(std::memory_order_acquire);
    if (state->generation == process_generation()) [[likely]]
      return state->value;
    State* fresh = new State;
    if (state_.compare_exchange_strong(state, fresh, std::memory_order_acq_rel))
      return fresh->value;
    delete fresh; // another thread of the child was first
    return state->value;
  }

private:
  struct State {
    unsigned generation = process_generation();
    T value{};
  };
  std::atomic<State*> state_;
};

} // namespace kiln
