#pragma once
#include <llvm/IR/IRBuilder.h>

#include "jit/ops/int8_linear.h"

namespace kiln::generator {

/// int8_linear's quantisation of one row: k elements of type `x_type` at `x` become s16 at `q`, and s (NaN where the
/// row is to become NaN; then q is anything) f32 at `s`. `lanes`: f32 in a register. Leaves the builder behind it.
void quantise_row(llvm::IRBuilder<>& ir, int8_linear::Float x_type, std::int64_t k, int lanes, llvm::Value* x,
                  llvm::Value* q, llvm::Value* s);

} // namespace kiln::generator
