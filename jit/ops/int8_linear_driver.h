#pragma once
#include <cstdint>

#include "cache/status.h"
#include "jit/kernel.h"
#include "jit/ops/int8_linear.h"
#include "jit/ops/int8_mm_driver.h"

/// int8_linear's driver: checks a call and cuts it into ranges for a kernel. Packs are int8_mm's, of the same layout.
namespace kiln::int8_linear {

struct Args {
  std::int64_t m = 0;
  const void* x = nullptr; ///< of x_dtype
  std::int64_t ldx = 0;
  const int8_mm::Pack* pack = nullptr;
  const float* ws = nullptr;   ///< [N]
  const float* bias = nullptr; ///< [N], with bias=1
  void* y = nullptr;           ///< of y_dtype
  std::int64_t ldy = 0;
  int threads = 0;           ///< 0: the engine's
  void* workspace = nullptr; ///< null: the threads' own scratch
  std::uint64_t workspace_bytes = 0;
};

/// Y = dequant(quant(X) · W) by this kernel. Checks every argument first; writes nothing when it returns an error, but
/// with Code::out_of_memory Y may be incomplete.
Status run(const Kernel& kernel, const Args& args);
/// What run() would use of Args::workspace.
Result<std::uint64_t> workspace_bytes(const Kernel& kernel, const Args& args);

} // namespace kiln::int8_linear
