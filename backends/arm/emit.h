#pragma once
#include <asmjit/core.h>

#include <asmjit/arm/a64assembler.h>

#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include "backends/arm/sve_words.h"
#include "cache/status.h"
#include "jit/code_object.h"
#include "jit/target.h"

namespace kiln::arm {

/// An assembler over a code buffer of its own. Emits for aarch64 under AAPCS64, whatever the host is, and never asks
/// the host CPU. Remembers its first error and the registers that the code names, so that emitting code needs no checks
/// in between. x18 belongs to the platform on some systems: naming it is an error. One thread.
class Assembler final : public asmjit::a64::Assembler {
public:
  Assembler();

  /// Saves the first `general` registers of x19 … x28 and the first `vectors` of d8 … d15 (AAPCS64, 6.1: of v8 … v15
  /// only the low halves are the caller's) below sp; `leave` restores them and returns. Once per image, before the code
  /// moves sp; `leave` where sp is as `enter` left it.
  void enter(int general, int vectors);
  void leave();

  /// An instruction that asmjit does not know. Bit i of the masks: the code names x{i}, v{i} or z{i} in it.
  void word(std::uint32_t instruction, std::uint32_t general = 0, std::uint32_t vectors = 0);
  void word(const sve::Word& word); ///< an empty word is an error

  /// `to = from + value` for any value; `scratch`, another register than `from`, holds it when no immediate can.
  void add_constant(const asmjit::a64::Gp& to, const asmjit::a64::Gp& from, std::int64_t value,
                    const asmjit::a64::Gp& scratch);

  /// `bytes` (1 … 15) from `from` on to the vector's first ones, the rest becomes 0. Clobbers `at`.
  void load_first(const asmjit::a64::Vec& to, const asmjit::a64::Gp& from, int bytes, const asmjit::a64::Gp& at);

  /// The finished image with one entry, `main`, at its start. `vector_bits`: see CodeObject. Code::compile_failed when
  /// an instruction was refused, a label stayed unbound or the image would need relocation. The assembler is spent
  /// afterwards.
  Result<CodeObject> finish(Features features, std::int32_t vector_bits,
                            std::vector<std::pair<std::string, std::int64_t>> plan);

  asmjit::Error _emit(asmjit::InstId id, const asmjit::Operand_& o0, const asmjit::Operand_& o1,
                      const asmjit::Operand_& o2, const asmjit::Operand_* more) override;

private:
  void record(const asmjit::Operand_& operand);

  asmjit::CodeHolder holder_;
  asmjit::Error first_error_ = asmjit::kErrorOk;
  int saved_general_ = 0, saved_vectors_ = 0;                  ///< in whole pairs
  std::uint32_t general_registers_ = 0, vector_registers_ = 0; ///< bit i: register i is named
};

} // namespace kiln::arm
