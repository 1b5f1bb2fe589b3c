#pragma once
#include <sys/types.h>

namespace kiln {

/// How many forks lie between the process that loaded Kiln and this one: grows in the child only.
unsigned process_generation();
/// Forks that this process, or one it descends from, has begun: grows in parent and child, before the child exists.
/// Neither count sees a bare clone(2), after which glibc supports nothing of what Kiln needs.
unsigned fork_count();

/// Tells a process from those it was forked from, also where the first child in a new PID namespace has its parent's
/// number (both are 1), or where a bare clone(2) made it.
struct ProcessId {
  pid_t number;
  unsigned generation;
  bool operator==(const ProcessId&) const = default;
};
ProcessId current_process();

} // namespace kiln
