#pragma once
#include "cache/status.h"
#include "jit/code_object.h"
#include "jit/desc.h"

namespace kiln::x86::amx {

struct Tuning {
  bool t1_a = false, t1_b = false;
  int wide_prefetch = 16, narrow_prefetch = 4096, unroll = 1;
};
Result<CodeObject> compile(const KernelDesc& desc, const Tuning& tuning);

} // namespace kiln::x86::amx
