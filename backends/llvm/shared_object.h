#pragma once
#include "backends/llvm/abi.h"
#include "cache/bytes.h"
#include "cache/status.h"
#include "jit/code_object.h"
#include "jit/desc.h"
#include "jit/target.h"

namespace kiln::portable {

/// A request with its head written: the body follows.
Writer begin_request(llvm_abi::RequestKind kind);

/// Has libkiln-llvm answer. The first call in a process opens it, and it stays open: code of it may be running on
/// another thread. Code::unsupported, with the places searched, when it is not installed.
Result<Bytes> ask_llvm(const Writer& request);

/// Whether LLVM, as it is built here, makes code for the architecture.
Status supports_arch(const KernelDesc& desc, const Target& target);

/// The kernel of a canonical desc. `used` holds only features that the code may use.
Result<CodeObject> compile_with_llvm(const KernelDesc& desc, const Target& used);

} // namespace kiln::portable
