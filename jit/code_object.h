#pragma once
#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include "cache/bytes.h"
#include "cache/status.h"
#include "jit/target.h"

namespace kiln {

/// A flat, relocation-free image with named entries: what generators make and the cache stores. A plain value.
struct CodeObject {
  struct Entry {
    std::string name; ///< `main`; a split op has several
    std::uint64_t offset = 0;
    bool operator==(const Entry&) const = default;
  };
  Bytes image;
  std::uint32_t alignment = 64; ///< of the image's first byte; a power of two ≤ 4096
  std::vector<Entry> entries;   ///< the first is what the op's driver calls unless its plan says otherwise
  Arch arch = Arch::x86_64;
  Features features;            ///< checked against the machine at load
  std::int32_t vector_bits = 0; ///< SVE or streaming vector length the code was made for, 0 when it does not matter
  std::uint32_t vector_registers = 0, general_registers = 0; ///< that the code touches: for the reader
  std::uint32_t plan_version = 1;
  std::vector<std::pair<std::string, std::int64_t>> plan; ///< launch plan: named integers, typed by the op
  bool operator==(const CodeObject&) const = default;

  /// What a machine must have to run it.
  Target needs() const {
    return {.arch = arch,
            .features = features,
            .sve_bits = features.has(Feature::sve) ? vector_bits : 0,
            .sme_bits = features.has(Feature::sme) ? vector_bits : 0};
  }

  Bytes serialise() const; ///< deterministic
  /// Distrusts its input: sizes, entry offsets, alignment, names are all checked.
  static Result<CodeObject> parse(ByteSpan bytes);
};

} // namespace kiln
