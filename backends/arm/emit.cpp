#include "backends/arm/emit.h"

#include <bit>
#include <fmt/format.h>

namespace kiln::arm {

using namespace asmjit::a64;

namespace {

// Constant, so that the bytes are the same wherever they are made.
const asmjit::Environment kEnvironment(asmjit::Arch::kAArch64, asmjit::SubArch::kUnknown, asmjit::Vendor::kUnknown,
                                       asmjit::Platform::kLinux, asmjit::PlatformABI::kGNU);

constexpr int kFirstGeneral = 19, kFirstVector = 8;
constexpr std::uint32_t kPlatformRegister = 1u << 18;

} // namespace

Assembler::Assembler() {
  first_error_ = holder_.init(kEnvironment);
  if (first_error_ == asmjit::kErrorOk)
    first_error_ = holder_.attach(this);
}

void Assembler::enter(int general, int vectors) {
  saved_general_ = (general + 1) / 2 * 2;
  saved_vectors_ = (vectors + 1) / 2 * 2;
  const int bytes = 8 * (saved_general_ + saved_vectors_);
  if (bytes > 0)
    sub(sp, sp, bytes);
  int at = 0;
  for (int i = 0; i < saved_general_; i += 2, at += 16)
    stp(x(kFirstGeneral + i), x(kFirstGeneral + i + 1), ptr(sp, at));
  for (int i = 0; i < saved_vectors_; i += 2, at += 16)
    stp(d(kFirstVector + i), d(kFirstVector + i + 1), ptr(sp, at));
}

void Assembler::leave() {
  const int bytes = 8 * (saved_general_ + saved_vectors_);
  int at = 0;
  for (int i = 0; i < saved_general_; i += 2, at += 16)
    ldp(x(kFirstGeneral + i), x(kFirstGeneral + i + 1), ptr(sp, at));
  for (int i = 0; i < saved_vectors_; i += 2, at += 16)
    ldp(d(kFirstVector + i), d(kFirstVector + i + 1), ptr(sp, at));
  if (bytes > 0)
    add(sp, sp, bytes);
  ret(x30);
}

void Assembler::word(std::uint32_t instruction, std::uint32_t general, std::uint32_t vectors) {
  general_registers_ |= general;
  vector_registers_ |= vectors;
  const asmjit::Error error = embedUInt32(instruction);
  if (first_error_ == asmjit::kErrorOk)
    first_error_ = error;
}

void Assembler::word(const sve::Word& word) {
  if (word.bits == 0 && first_error_ == asmjit::kErrorOk)
    first_error_ = asmjit::kErrorInvalidImmediate;
  this->word(word.bits, word.general, word.vectors);
}

void Assembler::add_constant(const Gp& to, const Gp& from, std::int64_t value, const Gp& scratch) {
  constexpr std::int64_t k12 = 1 << 12, k24 = 1 << 24;
  const std::int64_t size = value < 0 ? -value : value;
  if (size >= k24) {
    mov(scratch, value);
    add(to, from, scratch);
    return;
  }
  // In one or two immediates of 12 bits, the upper one shifted.
  const std::int64_t high = size / k12 * k12, low = size % k12;
  if (high > 0)
    value < 0 ? sub(to, from, high) : add(to, from, high);
  if (low > 0 || (high == 0 && to.id() != from.id()))
    value < 0 ? sub(to, high > 0 ? to : from, low) : add(to, high > 0 ? to : from, low);
}

void Assembler::load_first(const Vec& vector, const Gp& from, int bytes, const Gp& at) {
  const VecV to(vector.id());
  int done = 0;
  for (const int size : {8, 4, 2, 1}) {
    if ((bytes & size) == 0)
      continue;
    if (done == 0) { // the rest of the register becomes 0
      if (size == 8)
        ldr(to.d(), ptr(from));
      else if (size == 4)
        ldr(to.s(), ptr(from));
      else if (size == 2)
        ldr(to.h(), ptr(from));
      else
        ldr(to.b(), ptr(from));
    } else {
      add(at, from, done);
      if (size == 4)
        ld1(to.s(done / 4), ptr(at));
      else if (size == 2)
        ld1(to.h(done / 2), ptr(at));
      else
        ld1(to.b(done), ptr(at));
    }
    done += size;
  }
}

asmjit::Error Assembler::_emit(asmjit::InstId id, const asmjit::Operand_& o0, const asmjit::Operand_& o1,
                               const asmjit::Operand_& o2, const asmjit::Operand_* more) {
  record(o0);
  record(o1);
  record(o2);
  record(more[0]);
  const asmjit::Error error = asmjit::a64::Assembler::_emit(id, o0, o1, o2, more);
  if (first_error_ == asmjit::kErrorOk)
    first_error_ = error;
  return error;
}

void Assembler::record(const asmjit::Operand_& operand) {
  // sp and zr have ids beyond the registers proper.
  const auto general = [&](std::uint32_t id) { general_registers_ |= id < 31 ? 1u << id : 0; };
  if (operand.isReg()) {
    const auto& reg = operand.as<asmjit::BaseReg>();
    if (reg.isGp())
      general(reg.id());
    else if (reg.isVec())
      vector_registers_ |= 1u << reg.id();
  } else if (operand.isMem()) {
    const auto& memory = operand.as<Mem>();
    if (memory.hasBaseReg())
      general(memory.baseId());
    if (memory.hasIndexReg())
      general(memory.indexId());
  }
}

Result<CodeObject> Assembler::finish(Features features, std::int32_t vector_bits,
                                     std::vector<std::pair<std::string, std::int64_t>> plan) {
  if (first_error_ == asmjit::kErrorOk)
    first_error_ = holder_.flatten();
  if (first_error_ == asmjit::kErrorOk)
    first_error_ = holder_.resolveUnresolvedLinks();
  if (first_error_ != asmjit::kErrorOk)
    return Status::error(Code::compile_failed,
                         fmt::format("asmjit: {}", asmjit::DebugUtils::errorAsString(first_error_)));
  if (holder_.hasUnresolvedLinks() || holder_.hasRelocEntries())
    return Status::error(Code::compile_failed, "asmjit: the code names an unbound label or needs relocation");
  if ((general_registers_ & kPlatformRegister) != 0)
    return Status::error(Code::compile_failed, "the code names x18, which belongs to the platform");

  CodeObject object;
  object.image.resize(holder_.codeSize());
  first_error_ = holder_.copyFlattenedData(object.image.data(), object.image.size());
  if (first_error_ != asmjit::kErrorOk)
    return Status::error(Code::compile_failed,
                         fmt::format("asmjit: {}", asmjit::DebugUtils::errorAsString(first_error_)));
  object.alignment = 64;
  object.entries = {{"main", 0}};
  object.arch = Arch::aarch64;
  object.features = features;
  object.vector_bits = vector_bits;
  object.vector_registers = static_cast<std::uint32_t>(std::popcount(vector_registers_));
  object.general_registers = static_cast<std::uint32_t>(std::popcount(general_registers_));
  object.plan = std::move(plan);
  return object;
}

} // namespace kiln::arm
