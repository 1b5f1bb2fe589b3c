#include <llvm/IR/LLVMContext.h>

#include <fmt/format.h>

#include "backends/llvm/abi.h"
#include "backends/llvm/generator/attention.h"
#include "backends/llvm/generator/codegen.h"
#include "backends/llvm/generator/fatal_error.h"
#include "backends/llvm/generator/int8_mm.h"
#include "backends/llvm/generator/link.h"
#include "backends/llvm/generator/machine_code.h"
#include "jit/code_object.h"
#include "jit/op.h"
#include <llvm_generator_id.h>

namespace kiln::generator {
namespace {

/// One op that this generator makes kernels for.
struct OpGenerator {
  OpId op;
  llvm::Function* (*emit)(llvm::Module&, const KernelDesc&, const Target&);
  std::vector<std::pair<std::string, std::int64_t>> (*plan)(const KernelDesc&, const Target&);
};
constexpr OpGenerator kOps[] = {
    {OpId::int8_mm, emit_int8_mm, [](const KernelDesc& d, const Target& t) { return int8_mm_plan(d, t).values(); }},
    {OpId::int8_linear, emit_int8_linear,
     [](const KernelDesc& d, const Target& t) { return int8_linear_plan(d, t).values(); }},
    {OpId::attention, emit_attention,
     [](const KernelDesc& d, const Target& t) { return attention_plan(d, t).values(); }},
};

const OpGenerator* find_generator(OpId op) {
  for (const OpGenerator& generator : kOps)
    if (generator.op == op)
      return &generator;
  return nullptr;
}

Result<Bytes> compile(Reader& request) {
  const Result<KernelDesc> desc = parse_desc(request.string());
  if (!desc)
    return desc.status();
  const Result<Target> target = Target::parse(request.string());
  if (!target)
    return target.status();
  if (!request.finished())
    return Status::error(Code::invalid_argument, "the compile request has a wrong length");
  const OpGenerator* op = find_generator(desc->op);
  if (op == nullptr)
    return Status::error(Code::unsupported, fmt::format("LLVM makes no kernels for {}", desc->text()));
  Result<std::unique_ptr<llvm::TargetMachine>> machine = make_target_machine(*target);
  if (!machine)
    return machine.status();

  llvm::LLVMContext context;
  llvm::Module module("kiln", context);
  llvm::Function* entry = op->emit(module, *desc, *target);
  const std::string entry_symbol = entry->getName().str();
  Result<std::unique_ptr<llvm::MemoryBuffer>> object = compile_module(module, *entry, **machine);
  if (!object)
    return object.status();
  Result<FlatImage> image = link_flat(target->arch, std::move(*object), entry_symbol);
  if (!image)
    return image.status();

  CodeObject code;
  code.image = std::move(image->bytes);
  code.alignment = std::max(image->alignment, 64u);
  code.entries = {{.name = "main", .offset = image->entry}};
  code.arch = target->arch;
  code.features = target->features;
  code.plan = op->plan(*desc, *target);
  const Result<MachineCode> decoded = MachineCode::decode(code.arch, code.image, code.entries);
  if (!decoded)
    return decoded.status();
  const MachineCode::Registers registers = decoded->registers();
  code.vector_registers = registers.vector;
  code.general_registers = registers.general;
  return code.serialise();
}

Result<Bytes> disassemble(Reader& request) {
  const std::string arch_name = request.string();
  const ByteSpan image = request.blob();
  std::vector<CodeObject::Entry> entries;
  for (std::uint32_t count = request.u32(); request.ok() && count > 0; --count) {
    std::string name = request.string();
    entries.push_back({std::move(name), request.u64()});
  }
  if (!request.finished())
    return Status::error(Code::invalid_argument, "the disassemble request has a wrong length");
  for (const Arch arch : {Arch::x86_64, Arch::aarch64})
    if (arch_name == name_of(arch)) {
      const Result<MachineCode> code = MachineCode::decode(arch, image, std::move(entries));
      if (!code)
        return code.status();
      const std::string listing = code->listing();
      return Bytes(listing.begin(), listing.end());
    }
  return Status::error(Code::unsupported, fmt::format("{} code cannot be listed: x86_64 and aarch64 can", arch_name));
}

Result<Bytes> answer(Reader request) {
  if (const std::uint32_t version = request.u32(); version != llvm_abi::kVersion)
    return Status::error(Code::unsupported,
                         fmt::format("libkiln-llvm speaks version {} of the interface, libkiln version {}",
                                     llvm_abi::kVersion, version));
  if (const std::string id = request.string(); id != k_llvm_generator_digest)
    return Status::error(
        Code::unsupported,
        fmt::format("libkiln-llvm holds generator {}, libkiln expects {}: they are of different builds",
                    k_llvm_generator_digest, id));
  initialise_llvm();
  switch (const auto kind = static_cast<llvm_abi::RequestKind>(request.u8()); kind) {
  case llvm_abi::RequestKind::compile:
    return compile(request);
  case llvm_abi::RequestKind::disassemble:
    return disassemble(request);
  default:
    return Status::error(Code::invalid_argument, fmt::format("request kind {} is not known", static_cast<int>(kind)));
  }
}

} // namespace
} // namespace kiln::generator

extern "C" __attribute__((visibility("default"))) void kiln_llvm_answer(const std::uint8_t* request, std::size_t size,
                                                                        kiln::llvm_abi::Answer give, void* context) {
  using namespace kiln;
  Result<Bytes> result = Status::error(Code::internal, "no answer");
  std::string fatal;
  const auto work = [&] {
    try {
      result = generator::answer(Reader({request, size}));
    } catch (const std::bad_alloc&) {
      result = Status::error(Code::out_of_memory, "no memory for LLVM");
    }
  };
  if (!generator::survives(work, fatal))
    result = Status::error(Code::compile_failed, "LLVM gave up: " + fatal);
  if (result)
    return give(context, static_cast<std::uint32_t>(Code::ok), result->data(), result->size());
  const std::string& message = result.status().message();
  give(context, static_cast<std::uint32_t>(result.status().code()),
       reinterpret_cast<const std::uint8_t*>(message.data()), message.size());
}

/// The destructors of LLVM's statics never run: the process may exit while another thread compiles. Local to this
/// shared object.
extern "C" int __cxa_atexit(void (*)(void*), void*, void*) {
  return 0;
}
