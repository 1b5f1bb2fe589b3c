#pragma once
#include <cstdint>

#include "backends/arm/emit.h"
#include "backends/arm/int8_linear.h"
#include "jit/ops/int8_mm_epilogue.h"

namespace kiln::arm {

/// Emits what a kernel whose vectors have a fixed length does on a thread that was given another (prctl, PR_SVE_SET_VL
/// or PR_SME_SET_VL), where none of its vector instructions would be right: the same sums with general registers, slow
/// and exact, and the epilogue with NEON. x0 is the Call; returns to the caller, saves and needs no other register than
/// x0 … x17, v0 … v7 and v16. `layout.k_block` is a power of two, n_block a multiple of 4. `a_shift`: as in the plan.
void emit_scalar_int8_mm(Assembler& a, int8_mm::PackLayout layout, std::int64_t k, const int8_mm::Epilogue& epilogue,
                         int a_shift);

/// The same of int8_linear, behind its head: `rows` as they are quantised, `y` its type.
void emit_scalar_int8_linear(Assembler& a, int8_mm::PackLayout layout, std::int64_t k, const QuantisedRows& rows,
                             bool has_bias, const int8_mm::Epilogue& y);

} // namespace kiln::arm
