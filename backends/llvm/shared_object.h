#pragma once
#include "backends/llvm/abi.h"
#include "cache/bytes.h"
#include "cache/status.h"

namespace kiln::portable {

/// A request with its head written: the body follows.
Writer begin_request(llvm_abi::RequestKind kind);

/// Has libkiln-llvm answer. The first call in a process opens it, and it stays open: code of it may be running on
/// another thread. Code::unsupported, with the places searched, when it is not installed.
Result<Bytes> ask_llvm(const Writer& request);

} // namespace kiln::portable
