#pragma once
#include "backends/arm/emit.h"
#include "jit/ops/int8_mm_epilogue.h"

/// int8_mm's epilogue on vectors of four columns of one row, in NEON registers: sums from v0 to C's type in v0. The
/// columns' terms and what all share stay in registers while row after row goes through.
namespace kiln::arm {

class EpilogueEmitter {
public:
  using GpX = asmjit::a64::GpX;

  EpilogueEmitter(Assembler& assembler, const int8_mm::Epilogue& epilogue)
      : a_(assembler), epilogue_(epilogue), terms_(int8_mm::TermsLayout::of(epilogue)) {}

  /// What all columns share, from call->scalars. Clobbers `scratch`, v1 … v5 and v16 … v31.
  void load_scalars(const GpX& call, const GpX& scratch);
  /// Four columns whose terms begin at `terms`, arrays `array_bytes` apart. Clobbers `scratch`, v1 … v5, v8 … v15.
  void load_columns(const GpX& terms, int array_bytes, const GpX& scratch);
  /// v0: four sums that began at 0, to what is stored. The row's sum of A's elements and its a_zp are s32 at `values`
  /// and `zp_at` bytes behind. Clobbers `scratch`, v1 … v5.
  void apply(const GpX& values, int zp_at, const GpX& scratch);
  /// All four, or the first `left` (1 … 3, in a register) of them. Clobbers v0.
  void store(const GpX& to);
  void store_some(const GpX& to, const GpX& left, const asmjit::Label& done);

private:
  /// Operands of a division by 2^shift of s64: low and high pair of lanes.
  struct Wide {
    std::uint32_t multiplier, minus_shift[2];
    std::uint32_t
        nudge[2]; ///< lanes to nudge: −1, or 1 where the lowest bit of the quotient decides; 0 for a shift of 0
  };
  void prepare_wide(const Wide& wide, std::uint32_t shift);
  void round_wide(std::uint32_t to, const Wide& wide);
  void apply_scale();
  void store_elements(const GpX& to, int count, int at);

  Assembler& a_;
  const int8_mm::Epilogue epilogue_;
  const int8_mm::TermsLayout terms_;
};

} // namespace kiln::arm
