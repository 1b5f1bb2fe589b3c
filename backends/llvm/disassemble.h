#pragma once
#include <span>
#include <string>

#include "cache/bytes.h"
#include "cache/status.h"
#include "jit/code_object.h"
#include "jit/target.h"

namespace kiln {

/// A listing of x86_64 or aarch64 machine code, of any generator: offset in the image, bytes, instruction (Intel syntax
/// on x86), entry names and `L0`, `L1`, … at branch targets. What no entry reaches is listed as bytes. Made by LLVM's
/// disassembler: opens libkiln-llvm, Code::unsupported where that is missing. Any thread.
Result<std::string> disassemble(Arch arch, ByteSpan image, std::span<const CodeObject::Entry> entries);

} // namespace kiln
