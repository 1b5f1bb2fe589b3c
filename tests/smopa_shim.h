#pragma once
#include <cstddef>
#include <cstdint>

#include "jit/code_object.h"

/// Runs code with SMOPA and USMOPA (int8 → int32) under an emulator that computes it wrongly: qemu 7.2 never writes the odd rows
/// of the result. Each such word of an image becomes an undefined instruction, whose trap carries the outer product out
/// on the streaming vectors and ZA of the signal frame (Arm ARM DDI 0487, SMOPA; Linux,
/// Documentation/arch/arm64/sme.rst); everything else runs as it is. For tests: a trap takes 10 to 130 µs, and what it
/// shows is that the code around the products is right, not that the words are: those are for llvm-mc to judge. aarch64
/// Linux only.
namespace kiln::test {

class SmopaShim {
public:
  /// Catches SIGILL of the whole process; one shim at a time.
  SmopaShim();
  ~SmopaShim(); ///< gives SIGILL back to its former handler
  SmopaShim(const SmopaShim&) = delete;
  SmopaShim& operator=(const SmopaShim&) = delete;

  /// Replaces those words of the image and returns their number. The image runs while the shim lives; not beside
  /// running images.
  static std::size_t rewrite(CodeObject& code);

  /// Products carried out since the constructor, on every thread.
  static std::int64_t executed();
};

} // namespace kiln::test
