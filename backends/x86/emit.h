#pragma once
#include <asmjit/x86.h>

#include <cstdint>
#include <initializer_list>
#include <string>
#include <utility>
#include <vector>

#include "cache/status.h"
#include "jit/code_object.h"
#include "jit/target.h"

namespace kiln::x86 {

/// An assembler over a code buffer of its own. Emits for x86-64, System V, whatever the host is, and never asks the
/// host CPU. Remembers its first error and the registers that the code names, so that emitting code needs no checks in
/// between. One thread.
class Assembler final : public asmjit::x86::Assembler {
public:
  Assembler();

  /// Pushes the callee-saved registers that the code will use; `leave` pops the same ones, in reverse, and returns.
  /// `leave` also clears the upper halves of the vector registers (SSE code of the caller would run slowly behind them:
  /// Intel optimisation manual, 15.3).
  void enter(std::initializer_list<asmjit::x86::Gp> callee_saved);
  void leave(std::initializer_list<asmjit::x86::Gp> callee_saved);

  /// The finished image with one entry, `main`, at its start. Code::compile_failed when an instruction was refused, a
  /// label stayed unbound or the image would need relocation. The assembler is spent afterwards.
  Result<CodeObject> finish(Features features, std::vector<std::pair<std::string, std::int64_t>> plan);

  asmjit::Error _emit(asmjit::InstId id, const asmjit::Operand_& o0, const asmjit::Operand_& o1,
                      const asmjit::Operand_& o2, const asmjit::Operand_* more) override;

private:
  void record(const asmjit::Operand_& operand);

  asmjit::CodeHolder holder_;
  asmjit::Error first_error_ = asmjit::kErrorOk;
  std::uint32_t general_registers_ = 0, vector_registers_ = 0; ///< bit i: register i is named
};

} // namespace kiln::x86
