#pragma once
#include <cstdlib>
#include <string>

namespace kiln::test {

/// The command that runs programs of this build where the machine itself cannot, such as scripts/aarch64-run, which
/// tells its name to what it runs. Empty natively.
inline std::string emulator() {
  const char* command = std::getenv("TEST_EMULATOR");
  return command != nullptr ? command : "";
}

/// Where true, what qemu 7.2 does not do is not tested: a second view of a mapping by mremap with an old size of 0,
/// seccomp filters, and threads in a child that was forked among threads (it aborts).
inline bool is_emulated() {
  return !emulator().empty();
}

} // namespace kiln::test
