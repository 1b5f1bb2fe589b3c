#pragma once
#include <cstdint>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "cache/bytes.h"
#include "cache/digest.h"
#include "cache/status.h"
#include "jit/target.h"

namespace kiln {

/// What an image is: machine code to be mapped, or what the NVIDIA driver takes.
enum class CodeFormat : std::uint8_t { flat, ptx, cubin };
std::string_view name_of(CodeFormat format);

/// An image with named entries: what generators make and the cache stores. A plain value.
/// `flat`: relocation-free machine code. `ptx`: text of the PTX ISA, not yet assembled. `cubin`: an ELF image for one
/// SM (or its family) that some driver can load; GPU entries are found by name, their offsets are 0.
struct CodeObject {
  struct Entry {
    std::string name; ///< `main`; a split op has several
    std::uint64_t offset = 0;
    bool operator==(const Entry&) const = default;
  };
  CodeFormat format = CodeFormat::flat;
  Bytes image;
  std::uint32_t alignment = 64; ///< of the image's first byte; a power of two ≤ 4096
  std::vector<Entry> entries;   ///< the first is what the op's driver calls unless its plan says otherwise
  Arch arch = Arch::x86_64;
  Features features;            ///< checked against the machine at load
  std::int32_t vector_bits = 0; ///< SVE or streaming vector length the code was made for, 0 when it does not matter
  std::int32_t sm = 0;          ///< NVIDIA: as in Target, 0 otherwise
  /// Of a cubin, for the reader and for `verify`, never part of the key: who assembled it (`ptxas 12.9.86`, `driver
  /// 13.0`), the driver's CUDA version (13000; 0: none had a part in it), and the digest of its PTX.
  std::string compiler;
  std::int32_t driver_version = 0;
  Digest ptx_digest;
  /// Of a kernel whose tiles, stages and so on are one choice among several: the choice, as its row prints it
  /// (`x2n128s4`); and, where timing made the choice (Engine::tune) and not the row, the name of the device timed on.
  std::string configuration, tuned_for;
  std::uint32_t vector_registers = 0, general_registers = 0; ///< that the code touches: for the reader
  std::uint32_t plan_version = 1;
  std::vector<std::pair<std::string, std::int64_t>> plan; ///< launch plan: named integers, typed by the op
  bool operator==(const CodeObject&) const = default;

  /// What a machine must have to run it.
  Target needs() const {
    return {.arch = arch,
            .features = features,
            .sve_bits = features.has(Feature::sve) ? vector_bits : 0,
            .sme_bits = features.has(Feature::sme) ? vector_bits : 0,
            .sm = sm};
  }

  Bytes serialise() const; ///< deterministic
  /// Distrusts its input: sizes, entry offsets, alignment, names are all checked.
  static Result<CodeObject> parse(ByteSpan bytes);
};

} // namespace kiln
