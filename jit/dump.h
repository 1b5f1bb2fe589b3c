#pragma once
#include <functional>
#include <string>

#include "cache/digest.h"
#include "cache/log.h"
#include "jit/code_object.h"
#include "jit/desc.h"
#include "jit/implementation.h"

namespace kiln {

/// KILN_DUMP_DIR: writes `KEY-ISA.bin` (the image; `.ptx`, `.cubin` of a GPU kernel) and, but for PTX, `KEY-ISA.txt`
/// (desc, plan, entries and, with `disassemble`, the listing, or what the assembler said). KEY is the key's first 16
/// digits. Failures are logged.
void dump_code(const std::string& directory, const Digest& key, IsaPath isa, const KernelDesc& desc,
               const CodeObject& code, const std::function<Result<std::string>(const CodeObject&)>& disassemble,
               const Log& log);

} // namespace kiln
