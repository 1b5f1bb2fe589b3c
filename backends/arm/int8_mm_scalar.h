#pragma once
#include <cstdint>

#include "backends/arm/emit.h"
#include "jit/ops/int8_mm.h"

namespace kiln::arm {

/// Emits what a kernel whose vectors have a fixed length does on a thread that was given another (prctl, PR_SVE_SET_VL
/// or PR_SME_SET_VL), where none of its vector instructions would be right: the same sums with general registers, slow
/// and exact. x0 is the Call; returns to the caller, saves and needs no other register than x0 … x17. `layout.k_block`
/// is a power of two.
void emit_scalar_int8_mm(Assembler& a, int8_mm::PackLayout layout, std::int64_t k);

} // namespace kiln::arm
