#pragma once
#include <llvm/IR/IRBuilder.h>

#include "backends/llvm/generator/ir.h"
#include "jit/ops/int8_linear.h"
#include "jit/ops/int8_mm_epilogue.h"
#include "jit/target.h"

namespace kiln::generator {

/// int8_mm's epilogue in IR, on vectors of s32 sums of one row. Exact in 64 bits where it divides; floats by IEEE
/// operations and, where LLVM would call a library, integer arithmetic.
class EpilogueWriter {
public:
  /// `call` is the kernel's argument. Loads what all columns share; the builder stands in the entry block.
  EpilogueWriter(llvm::IRBuilder<>& ir, const int8_mm::Epilogue& epilogue, const Target& target, int lanes,
                 llvm::Value* call);

  /// int8_linear's stage in place of int8_mm's, for its terms and the types of a desc: y = fma(f32(sum), s · ws, bias).
  EpilogueWriter(llvm::IRBuilder<>& ir, const KernelDesc& linear, const Target& target, int lanes);

  /// The terms of a vector of columns, ready for the rows that follow.
  struct Columns {
    llvm::Value *offset = nullptr, *a_zp = nullptr, *row_sum = nullptr;
    llvm::Value* multiplier = nullptr; ///< s64, or f32 for `scale`
    llvm::Value* shift = nullptr;      ///< s64, or s32 for `shift_left`
    llvm::Value *half = nullptr, *one = nullptr;
    llvm::Value* bias = nullptr; ///< f32, of int8_linear
  };
  /// Arrays begin at `terms` + `at` bytes, `array_bytes` apart.
  Columns load_columns(llvm::Value* terms, std::int64_t at, std::int64_t array_bytes);

  /// Sums that began at 0, to elements of C's type. `a_zp` and `row_sum` are the row's i32, used only with those
  /// stages; of int8_linear a_zp is the bits of the row's s.
  llvm::Value* finish(llvm::Value* sums, const Columns& columns, llvm::Value* a_zp, llvm::Value* row_sum);

private:
  llvm::FixedVectorType* vector_of(llvm::Type* element) const { return llvm::FixedVectorType::get(element, lanes_); }
  llvm::Value* splat(llvm::Value* scalar) { return ir_.CreateVectorSplat(lanes_, scalar); }
  llvm::Value* splat32(std::uint32_t value) { return splat(ir_.getInt32(value)); }
  void prepare_wide(Columns& columns, llvm::Value* multiplier, llvm::Value* shift);
  llvm::Value* round_wide(llvm::Value* value, const Columns& by);
  llvm::Value* integer_stages(llvm::Value* acc, const Columns& columns);
  llvm::Value* float_stages(llvm::Value* acc, const Columns& columns);
  llvm::Value* dequantise(llvm::Value* acc, const Columns& columns, llvm::Value* s);
  llvm::Value* fused(llvm::Value* a, llvm::Value* b, llvm::Value* c);
  llvm::Value* to_s32(llvm::Value* y);
  llvm::Value* to_bf16(llvm::Value* y);
  llvm::Value* to_f16(llvm::Value* y);

  llvm::IRBuilder<>& ir_;
  const int8_mm::Epilogue epilogue_;
  const int8_mm::TermsLayout terms_;
  const Arch arch_;
  const unsigned lanes_;
  const bool dequantises_ = false, has_bias_ = false, has_fma_ = false; ///< of int8_linear
  llvm::Value *lo_ = nullptr, *hi_ = nullptr, *c_zp_ = nullptr, *slope_ = nullptr;
  Columns slope_wide_;
};

} // namespace kiln::generator
