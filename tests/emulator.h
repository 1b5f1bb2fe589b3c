#pragma once
#include <cerrno> // program_invocation_name
#include <cstdlib>
#include <filesystem>
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

/// The file of this program, to run it again. Not from /proc/self/exe, which scripts/aarch64-run makes the loader.
inline std::string own_program() {
  return std::filesystem::absolute(program_invocation_name);
}

} // namespace kiln::test
