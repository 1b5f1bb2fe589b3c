#include "backends/x86/emit.h"

#include <bit>
#include <fmt/format.h>

namespace kiln::x86 {

namespace {

// Constant, so that the bytes are the same wherever they are made.
const asmjit::Environment kEnvironment(asmjit::Arch::kX64, asmjit::SubArch::kUnknown, asmjit::Vendor::kUnknown,
                                       asmjit::Platform::kLinux, asmjit::PlatformABI::kGNU);

} // namespace

Assembler::Assembler() {
  first_error_ = holder_.init(kEnvironment);
  if (first_error_ == asmjit::kErrorOk)
    first_error_ = holder_.attach(this);
}

void Assembler::enter(std::initializer_list<asmjit::x86::Gp> callee_saved) {
  for (const asmjit::x86::Gp& reg : callee_saved)
    push(reg);
}

void Assembler::leave(std::initializer_list<asmjit::x86::Gp> callee_saved) {
  vzeroupper();
  for (auto reg = callee_saved.end(); reg != callee_saved.begin();)
    pop(*--reg);
  ret();
}

asmjit::Error Assembler::_emit(asmjit::InstId id, const asmjit::Operand_& o0, const asmjit::Operand_& o1,
                               const asmjit::Operand_& o2, const asmjit::Operand_* more) {
  record(o0);
  record(o1);
  record(o2);
  record(more[0]);
  const asmjit::Error error = asmjit::x86::Assembler::_emit(id, o0, o1, o2, more);
  if (first_error_ == asmjit::kErrorOk)
    first_error_ = error;
  return error;
}

void Assembler::record(const asmjit::Operand_& operand) {
  if (operand.isReg()) {
    const auto& reg = operand.as<asmjit::BaseReg>();
    if (reg.isGp())
      general_registers_ |= 1u << reg.id();
    else if (reg.isVec())
      vector_registers_ |= 1u << reg.id();
  } else if (operand.isMem()) {
    const auto& memory = operand.as<asmjit::x86::Mem>();
    if (memory.hasBaseReg())
      general_registers_ |= 1u << memory.baseId();
    if (memory.hasIndexReg())
      general_registers_ |= 1u << memory.indexId();
  }
}

Result<CodeObject> Assembler::finish(Features features, std::vector<std::pair<std::string, std::int64_t>> plan) {
  if (first_error_ == asmjit::kErrorOk)
    first_error_ = holder_.flatten();
  if (first_error_ == asmjit::kErrorOk)
    first_error_ = holder_.resolveUnresolvedLinks();
  if (first_error_ != asmjit::kErrorOk)
    return Status::error(Code::compile_failed,
                         fmt::format("asmjit: {}", asmjit::DebugUtils::errorAsString(first_error_)));
  if (holder_.hasUnresolvedLinks() || holder_.hasRelocEntries())
    return Status::error(Code::compile_failed, "asmjit: the code names an unbound label or needs relocation");

  CodeObject object;
  object.image.resize(holder_.codeSize());
  first_error_ = holder_.copyFlattenedData(object.image.data(), object.image.size());
  if (first_error_ != asmjit::kErrorOk)
    return Status::error(Code::compile_failed,
                         fmt::format("asmjit: {}", asmjit::DebugUtils::errorAsString(first_error_)));
  object.alignment = 64;
  object.entries = {{"main", 0}};
  object.arch = Arch::x86_64;
  object.features = features;
  object.vector_registers = static_cast<std::uint32_t>(std::popcount(vector_registers_));
  object.general_registers = static_cast<std::uint32_t>(std::popcount(general_registers_));
  object.plan = std::move(plan);
  return object;
}

} // namespace kiln::x86
