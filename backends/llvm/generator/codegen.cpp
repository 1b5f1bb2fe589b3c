#include "backends/llvm/generator/codegen.h"

#include <mutex>

#include <llvm/IR/LegacyPassManager.h>
#include <llvm/IR/Verifier.h>
#include <llvm/MC/TargetRegistry.h>
#include <llvm/Support/CommandLine.h>
#include <llvm/Support/SmallVectorMemoryBuffer.h>
#include <llvm/Support/TargetSelect.h>
#include <llvm/Transforms/InstCombine/InstCombine.h>
#include <llvm/Transforms/Scalar.h>

#include <fmt/format.h>

namespace kiln::generator {
namespace {

/// In LLVM's form; Kiln's feature names are LLVM's. x18 belongs to the system on some systems.
std::string feature_text(const Target& target) {
  std::string text = target.arch == Arch::aarch64 ? "+reserve-x18" : "";
  for (const Feature feature : target.features.list())
    text += fmt::format("{}+{}", text.empty() ? "" : ",", name_of(feature));
  return text;
}

/// On each function, because code generation asks there; and nothing that would call a runtime library.
void set_attributes(llvm::Function& function, const llvm::TargetMachine& machine) {
  function.setDoesNotThrow();
  function.addFnAttr("no-builtins");
  function.addFnAttr("target-cpu", machine.getTargetCPU());
  if (!machine.getTargetFeatureString().empty())
    function.addFnAttr("target-features", machine.getTargetFeatureString());
}

/// The kernels are written as the loops they shall be: what is left is to clean up addresses.
void add_optimisations(llvm::legacy::PassManager& passes) {
  passes.add(llvm::createEarlyCSEPass());
  passes.add(llvm::createCFGSimplificationPass());
  passes.add(llvm::createInstructionCombiningPass());
  passes.add(llvm::createLICMPass());
  passes.add(llvm::createEarlyCSEPass());
  passes.add(llvm::createDeadCodeEliminationPass());
}

} // namespace

void initialise_llvm() {
  static std::once_flag done;
  std::call_once(done, [] {
    LLVMInitializeX86TargetInfo();
    LLVMInitializeX86Target();
    LLVMInitializeX86TargetMC();
    LLVMInitializeX86AsmPrinter();
    LLVMInitializeX86Disassembler();
    LLVMInitializeAArch64TargetInfo();
    LLVMInitializeAArch64Target();
    LLVMInitializeAArch64TargetMC();
    LLVMInitializeAArch64AsmPrinter();
    LLVMInitializeAArch64Disassembler();
    // The kernels' loops count by themselves: rewriting their addresses took half of the time of a compile.
    if (llvm::cl::Option* const option = llvm::cl::getRegisteredOptions().lookup("disable-lsr"))
      static_cast<llvm::cl::opt<bool>*>(option)->setValue(true);
  });
}

const char* triple_of(Arch arch) {
  switch (arch) {
  case Arch::x86_64:
    return "x86_64-unknown-linux-gnu";
  case Arch::aarch64:
    return "aarch64-unknown-linux-gnu";
  default:
    return "";
  }
}

Result<std::unique_ptr<llvm::TargetMachine>> make_target_machine(const Target& target) {
  const std::string triple = triple_of(target.arch);
  std::string error;
  const llvm::Target* found = llvm::TargetRegistry::lookupTarget(triple, error);
  if (found == nullptr)
    return Status::error(Code::unsupported,
                         fmt::format("LLVM generates no code for {}: {}", name_of(target.arch), error));
  // On aarch64 the tiny model addresses constants by ADR alone, which needs no 4 KiB-aligned image.
  const llvm::CodeModel::Model model = target.arch == Arch::aarch64 ? llvm::CodeModel::Tiny : llvm::CodeModel::Small;
  llvm::TargetOptions options;
  options.TrapUnreachable = true;
  std::unique_ptr<llvm::TargetMachine> machine(
      found->createTargetMachine(triple, target.arch == Arch::x86_64 ? "x86-64" : "generic", feature_text(target),
                                 options, llvm::Reloc::PIC_, model, llvm::CodeGenOptLevel::Default));
  if (machine == nullptr)
    return Status::error(Code::internal, fmt::format("LLVM has no code generator for {}", triple));
  return machine;
}

Result<std::unique_ptr<llvm::MemoryBuffer>> compile_module(llvm::Module& module, llvm::Function& entry,
                                                           llvm::TargetMachine& machine) {
  module.setTargetTriple(machine.getTargetTriple().str());
  module.setDataLayout(machine.createDataLayout());
  module.setPICLevel(llvm::PICLevel::BigPIC);
  for (llvm::Function& function : module)
    if (!function.isDeclaration())
      set_attributes(function, machine);
  entry.setVisibility(llvm::GlobalValue::HiddenVisibility);
  entry.setDSOLocal(true);

  std::string problems;
  llvm::raw_string_ostream problem_stream(problems);
  if (llvm::verifyModule(module, &problem_stream))
    return Status::error(Code::internal, "the generated IR is not valid: " + problem_stream.str());

  llvm::SmallVector<char, 0> object;
  llvm::raw_svector_ostream stream(object);
  llvm::legacy::PassManager passes;
  add_optimisations(passes);
  if (machine.addPassesToEmitFile(passes, stream, nullptr, llvm::CodeGenFileType::ObjectFile))
    return Status::error(Code::internal, "LLVM cannot write objects for " + machine.getTargetTriple().str());
  passes.run(module);
  return std::unique_ptr<llvm::MemoryBuffer>(
      std::make_unique<llvm::SmallVectorMemoryBuffer>(std::move(object), "kernel.o", false));
}

} // namespace kiln::generator
