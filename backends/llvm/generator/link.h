#pragma once
#include <memory>
#include <string>

#include <llvm/Support/MemoryBuffer.h>

#include "cache/bytes.h"
#include "cache/status.h"
#include "jit/target.h"

namespace kiln::generator {

/// Constants, then code: position-independent, with nothing left to relocate.
struct FlatImage {
  Bytes bytes;
  std::uint32_t alignment = 1;
  std::uint64_t entry = 0; ///< offset of the entry symbol
};

/// Links one object by itself. Code::compile_failed for what a flat image cannot hold: external symbols, absolute
/// addresses, writable data.
Result<FlatImage> link_flat(Arch arch, std::unique_ptr<llvm::MemoryBuffer> object, const std::string& entry);

} // namespace kiln::generator
