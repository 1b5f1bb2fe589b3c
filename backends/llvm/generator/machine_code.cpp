#include "backends/llvm/generator/machine_code.h"

#include <algorithm>
#include <set>
#include <utility>

#include <llvm/MC/MCAsmInfo.h>
#include <llvm/MC/MCContext.h>
#include <llvm/MC/MCDisassembler/MCDisassembler.h>
#include <llvm/MC/MCInstPrinter.h>
#include <llvm/MC/MCInstrAnalysis.h>
#include <llvm/MC/MCInstrInfo.h>
#include <llvm/MC/MCRegisterInfo.h>
#include <llvm/MC/MCSubtargetInfo.h>
#include <llvm/MC/TargetRegistry.h>

#include <fmt/format.h>

#include "backends/llvm/generator/codegen.h"

namespace kiln::generator {

struct MachineCode::Tools {
  Arch arch;
  std::unique_ptr<llvm::MCRegisterInfo> registers;
  std::unique_ptr<llvm::MCAsmInfo> assembler;
  std::unique_ptr<llvm::MCInstrInfo> instructions;
  std::unique_ptr<llvm::MCSubtargetInfo> subtarget;
  std::unique_ptr<llvm::MCContext> context;
  std::unique_ptr<llvm::MCDisassembler> disassembler;
  std::unique_ptr<llvm::MCInstrAnalysis> analysis;
  std::unique_ptr<llvm::MCInstPrinter> printer;

  static Result<std::unique_ptr<Tools>> make(Arch arch);
  const llvm::MCRegisterClass* register_class(const char* name) const {
    for (const llvm::MCRegisterClass& candidate : registers->regclasses())
      if (std::string_view(registers->getRegClassName(&candidate)) == name)
        return &candidate;
    return nullptr;
  }
};

Result<std::unique_ptr<MachineCode::Tools>> MachineCode::Tools::make(Arch arch) {
  const llvm::Triple triple(triple_of(arch));
  std::string error;
  const llvm::Target* target = llvm::TargetRegistry::lookupTarget(triple.str(), error);
  if (target == nullptr)
    return Status::error(Code::unsupported, fmt::format("LLVM disassembles no {} code: {}", name_of(arch), error));
  auto tools = std::make_unique<Tools>();
  tools->arch = arch;
  tools->registers.reset(target->createMCRegInfo(triple.str()));
  tools->assembler.reset(target->createMCAsmInfo(*tools->registers, triple.str(), llvm::MCTargetOptions()));
  tools->instructions.reset(target->createMCInstrInfo());
  // Whatever a generator may have used; x86 decodes everything anyway.
  tools->subtarget.reset(target->createMCSubtargetInfo(triple.str(), "", arch == Arch::aarch64 ? "+all" : ""));
  tools->context =
      std::make_unique<llvm::MCContext>(triple, tools->assembler.get(), tools->registers.get(), tools->subtarget.get());
  tools->disassembler.reset(target->createMCDisassembler(*tools->subtarget, *tools->context));
  tools->analysis.reset(target->createMCInstrAnalysis(tools->instructions.get()));
  const unsigned intel_syntax = 1, only_syntax = 0;
  tools->printer.reset(target->createMCInstPrinter(triple, arch == Arch::x86_64 ? intel_syntax : only_syntax,
                                                   *tools->assembler, *tools->instructions, *tools->registers));
  if (!tools->disassembler || !tools->analysis || !tools->printer)
    return Status::error(Code::internal, fmt::format("LLVM was built without a disassembler for {}", name_of(arch)));
  tools->printer->setPrintImmHex(true);
  tools->printer->setPrintBranchImmAsAddress(true);
  return tools;
}

MachineCode::MachineCode(ByteSpan image, std::vector<CodeObject::Entry> entries, std::unique_ptr<Tools> tools)
    : image_(image), entries_(std::move(entries)), tools_(std::move(tools)) {}
MachineCode::MachineCode(MachineCode&&) noexcept = default;
MachineCode::~MachineCode() = default;

Result<MachineCode> MachineCode::decode(Arch arch, ByteSpan image, std::vector<CodeObject::Entry> entries) {
  for (const CodeObject::Entry& entry : entries)
    if (entry.offset >= image.size())
      return Status::error(Code::invalid_argument, fmt::format("entry {} is at {}, the image has {} bytes", entry.name,
                                                               entry.offset, image.size()));
  Result<std::unique_ptr<Tools>> tools = Tools::make(arch);
  if (!tools)
    return tools.status();
  MachineCode code(image, std::move(entries), std::move(*tools));
  code.follow_control_flow();
  return code;
}

namespace {

/// The targets in a table of 32-bit offsets from itself; ends at the first entry that does not lead to code before it.
std::vector<std::uint64_t> jump_table(ByteSpan image, std::uint64_t table) {
  std::vector<std::uint64_t> targets;
  for (std::uint64_t at = table; at + 4 <= image.size(); at += 4) {
    const auto offset = static_cast<std::int32_t>(Reader(image.subspan(at, 4)).u32());
    if (offset >= 0 || table < static_cast<std::uint64_t>(-std::int64_t{offset}))
      break;
    targets.push_back(table - static_cast<std::uint64_t>(-std::int64_t{offset}));
  }
  return targets;
}

} // namespace

void MachineCode::follow_control_flow() {
  std::vector<std::uint64_t> to_visit;
  std::set<std::uint64_t> targets;
  // Indirect jumps of both generators go through tables of 32-bit offsets from the table, whose address rip-relative
  // lea takes.
  std::vector<std::uint64_t> tables;
  bool jumps_indirectly = false;
  for (const CodeObject::Entry& entry : entries_)
    to_visit.push_back(entry.offset);
  while (!to_visit.empty() || (jumps_indirectly && !tables.empty())) {
    if (to_visit.empty()) {
      for (const std::uint64_t table : std::exchange(tables, {}))
        for (const std::uint64_t target : jump_table(image_, table)) {
          targets.insert(target);
          to_visit.push_back(target);
        }
      continue;
    }
    std::uint64_t at = to_visit.back();
    to_visit.pop_back();
    while (at < image_.size() && !instructions_.contains(at)) {
      Instruction next;
      const llvm::ArrayRef<std::uint8_t> bytes(image_.data() + at, image_.size() - at);
      if (tools_->disassembler->getInstruction(next.inst, next.size, bytes, at, llvm::nulls()) !=
          llvm::MCDisassembler::Success)
        break;
      const llvm::MCInstrAnalysis& analysis = *tools_->analysis;
      if (std::uint64_t target = 0; (analysis.isBranch(next.inst) || analysis.isCall(next.inst)) &&
                                    analysis.evaluateBranch(next.inst, at, next.size, target) &&
                                    target < image_.size()) {
        targets.insert(target);
        to_visit.push_back(target);
      }
      const llvm::StringRef name = tools_->instructions->getName(next.inst.getOpcode());
      jumps_indirectly |= analysis.isIndirectBranch(next.inst);
      if (name == "LEA64r")
        if (const auto target =
                analysis.evaluateMemoryOperandAddress(next.inst, tools_->subtarget.get(), at, next.size);
            target && *target < image_.size())
          tables.push_back(*target);
      const bool ends = analysis.isReturn(next.inst) || analysis.isUnconditionalBranch(next.inst) ||
                        analysis.isIndirectBranch(next.inst) ||
                        tools_->instructions->get(next.inst.getOpcode()).isTrap();
      const std::uint64_t size = next.size;
      instructions_.emplace(at, std::move(next));
      if (ends)
        break;
      at += size;
    }
  }
  int number = 0;
  for (const std::uint64_t target : targets)
    labels_[target] = fmt::format("L{}", number++);
  for (const CodeObject::Entry& entry : entries_)
    labels_[entry.offset] = entry.name;
}

std::string MachineCode::listing() const {
  constexpr std::size_t kDataPerLine = 8, kByteColumns = 11;
  std::string out;
  const auto line = [&](std::uint64_t at, std::uint64_t size, std::string_view text) {
    std::string bytes;
    for (std::uint64_t i = 0; i < size; ++i)
      bytes += fmt::format("{:02x} ", image_[at + i]);
    out += fmt::format("{:6x}: {:<{}} {}\n", at, bytes, 3 * kByteColumns, text);
  };
  for (std::uint64_t at = 0; at < image_.size();) {
    const auto found = instructions_.lower_bound(at);
    if (found == instructions_.end() || found->first != at) {
      const std::uint64_t data_end = found == instructions_.end() ? image_.size() : found->first;
      const std::uint64_t size = std::min<std::uint64_t>(data_end - at, kDataPerLine);
      line(at, size, ".byte");
      at += size;
      continue;
    }
    const auto& [inst, size] = found->second;
    if (const auto label = labels_.find(at); label != labels_.end())
      out += label->second + ":\n";
    std::string text;
    llvm::raw_string_ostream stream(text);
    tools_->printer->printInst(&inst, at, "", *tools_->subtarget, stream);
    text.erase(0, text.find_first_not_of('\t'));
    std::ranges::replace(text, '\t', ' ');
    if (std::uint64_t target = 0; (tools_->analysis->isBranch(inst) || tools_->analysis->isCall(inst)) &&
                                  tools_->analysis->evaluateBranch(inst, at, size, target) && labels_.contains(target))
      text = text.substr(0, text.rfind(' ') + 1) + labels_.at(target);
    line(at, size, text);
    at += size;
  }
  return out;
}

MachineCode::Registers MachineCode::registers() const {
  const bool x86 = tools_->arch == Arch::x86_64;
  const llvm::MCRegisterClass* vectors = tools_->register_class(x86 ? "VR512" : "ZPR");
  const llvm::MCRegisterClass* generals = tools_->register_class(x86 ? "GR64_NOSP" : "GPR64common");
  std::set<unsigned> vector, general;
  const auto count = [&](llvm::MCRegister reg, const llvm::MCRegisterClass* file, std::set<unsigned>& counted) {
    if (file == nullptr || !reg.isValid())
      return;
    for (const llvm::MCPhysReg whole : tools_->registers->superregs_inclusive(reg))
      if (file->contains(whole))
        counted.insert(whole);
  };
  for (const auto& [at, instruction] : instructions_) {
    for (const llvm::MCOperand& operand : instruction.inst)
      if (operand.isReg()) {
        count(operand.getReg(), vectors, vector);
        count(operand.getReg(), generals, general);
      }
    // Vector registers are implied by vzeroupper alone, which means all of them.
    const llvm::MCInstrDesc& info = tools_->instructions->get(instruction.inst.getOpcode());
    for (const llvm::MCPhysReg reg : info.implicit_uses())
      count(reg, generals, general);
    for (const llvm::MCPhysReg reg : info.implicit_defs())
      count(reg, generals, general);
  }
  return {static_cast<std::uint32_t>(vector.size()), static_cast<std::uint32_t>(general.size())};
}

} // namespace kiln::generator
