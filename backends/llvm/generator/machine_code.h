#pragma once
#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include <llvm/MC/MCInst.h>

#include "cache/bytes.h"
#include "cache/status.h"
#include "jit/code_object.h"
#include "jit/target.h"

namespace kiln::generator {

/// An image as LLVM's MC layer reads it: the instructions that control flow can reach from the entries.
class MachineCode {
public:
  static Result<MachineCode> decode(Arch arch, ByteSpan image, std::vector<CodeObject::Entry> entries);
  ~MachineCode();
  MachineCode(MachineCode&&) noexcept;

  /// As kiln::disassemble() describes it.
  std::string listing() const;

  struct Registers {
    std::uint32_t vector = 0, general = 0;
  };
  /// Distinct registers that instructions name (general ones: or imply), whatever part of them; without stack pointer
  /// and zero register.
  Registers registers() const;

private:
  struct Tools;
  struct Instruction {
    llvm::MCInst inst;
    std::uint64_t size = 0;
  };
  MachineCode(ByteSpan image, std::vector<CodeObject::Entry> entries, std::unique_ptr<Tools> tools);
  void follow_control_flow();

  ByteSpan image_;
  std::vector<CodeObject::Entry> entries_;
  std::unique_ptr<Tools> tools_;
  std::map<std::uint64_t, Instruction> instructions_;
  std::map<std::uint64_t, std::string> labels_;
};

} // namespace kiln::generator
