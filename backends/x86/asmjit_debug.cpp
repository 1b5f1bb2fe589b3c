#include <cstdio>

#include <asmjit/core.h>

/// asmjit's debug functions, in place of those in Debian's static library: that object reads `stderr` in a way that
/// cannot be linked into a shared library, and aborts the host on a failed assertion (which release builds of asmjit
/// never check). The linker takes these because emit.cpp uses one of them, so the library's object is never wanted.
namespace asmjit {

const char* DebugUtils::errorAsString(Error error) noexcept {
  thread_local char text[32];
  std::snprintf(text, sizeof text, "asmjit error %u", static_cast<unsigned>(error));
  return text;
}

void DebugUtils::debugOutput(const char*) noexcept {}

void DebugUtils::assertionFailed(const char*, int, const char*) noexcept {
  __builtin_trap();
}

} // namespace asmjit
