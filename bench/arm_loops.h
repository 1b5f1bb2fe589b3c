#pragma once
#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "cache/status.h"
#include "jit/code_object.h"

/// The hot loops of an aarch64 kernel, cut from its emitted bytes.
namespace kiln::bench {

/// One line of the listing that kiln::disassemble gives.
struct Instruction {
  std::uint64_t offset = 0;      ///< bytes from the image's first
  std::string text;              ///< `sdot v8.4s, v0.16b, v4.4b[1]`, in LLVM's syntax
  std::int64_t branches_to = -1; ///< offset, -1 where it is no branch within the image

  std::string_view mnemonic() const;
  /// A vector instruction that multiplies 8- or 16-bit integers or adds up their products: SDOT, SMMLA, SMOPA and their
  /// unsigned and mixed kin; SMULL, SMLAL, SADALP and kin; or pairs of bf16: BFDOT, BFMMLA. For SMULL with SADALP a
  /// product takes more than one.
  bool is_mac() const;
  bool is_load() const;
};

/// Instructions [begin, end) of the image in order of address; the last branches back to the first.
struct Loop {
  std::vector<Instruction> body;

  std::uint64_t begin() const { return body.front().offset; }
  std::uint64_t end() const { return body.back().offset + 4; }
  std::size_t macs() const;
  std::size_t loads() const;
  /// Different first operands of MAC instructions: vector registers, or ZA tiles.
  std::size_t accumulators() const;
  /// Load instructions all of whose registers feed at most one MAC instruction: what is used once, as weights are in a
  /// GEMV. The others' registers serve several.
  std::size_t loads_used_once() const;
};

/// Every instruction of the code's image, in order of address. Opens libkiln-llvm (kiln::disassemble).
Result<std::vector<Instruction>> instructions_of(const CodeObject& code);

/// Innermost loops: from the target of each backward branch to that branch, where no other backward branch lies
/// between.
std::vector<Loop> innermost_loops(const std::vector<Instruction>& instructions);

/// Those of them that hold MAC instructions, the one with the most first: the loop of the largest register tile.
std::vector<Loop> hot_loops(const std::vector<Instruction>& instructions);

} // namespace kiln::bench
