#pragma once
#include <cstdint>

#include "cache/status.h"
#include "jit/kernel.h"
#include "jit/ops/fp8_block_bmm.h"

/// fp8_block_bmm's driver: checks a call, and puts it on a stream or on the CPU's threads.
namespace kiln::fp8_block_bmm {

struct Args {
  Tensors tensors;        ///< in host memory, or in that of the kernel's GPU
  int threads = 0;        ///< CPU: 0: the engine's
  void* stream = nullptr; ///< GPU: CUstream
};

/// Z = X · Yᵀ, scaled. Checks every argument first; writes nothing when it returns an error. On a GPU the product is on
/// the stream when it returns; what the GPU's copy engine wants to know of the tensors is kept for calls with the
/// same ones, in a table that the first call of the process makes; nothing else is allocated.
Status run(const Kernel& kernel, const Args& args);
/// 0: no kernel needs any.
Result<std::uint64_t> workspace_bytes(const Kernel& kernel, const Args& args);

} // namespace kiln::fp8_block_bmm
