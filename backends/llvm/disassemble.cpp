#include "backends/llvm/disassemble.h"

#include "backends/llvm/shared_object.h"

namespace kiln {

Result<std::string> disassemble(Arch arch, ByteSpan image, std::span<const CodeObject::Entry> entries) {
  Writer request = portable::begin_request(llvm_abi::RequestKind::disassemble);
  request.string(name_of(arch));
  request.blob(image);
  request.u32(static_cast<std::uint32_t>(entries.size()));
  for (const CodeObject::Entry& entry : entries) {
    request.string(entry.name);
    request.u64(entry.offset);
  }
  const Result<Bytes> listing = portable::ask_llvm(request);
  if (!listing)
    return listing.status();
  return std::string(listing->begin(), listing->end());
}

} // namespace kiln
