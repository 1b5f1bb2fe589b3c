#pragma once
#include <cstdint>

#include "backends/arm/emit.h"
#include "backends/arm/epilogue_sve.h"
#include "backends/arm/int8_mm_nest.h"
#include "jit/implementation.h"
#include "jit/ops/int8_linear.h"

/// What int8_linear adds to the kernels of int8_mm: the rows of X quantised in front of the nest, and the results made
/// of its sums. The quantised rows are what the nest takes as A; each ends with its s, NaN where the row is to become
/// NaN.
namespace kiln::arm {

/// How the rows lie in the call's workspace, one every `row_bytes`, a multiple of 16.
struct QuantisedRows {
  int8_linear::Float x;    ///< what comes in
  std::int64_t k = 0;      ///< elements, then zeros to a multiple of 16
  int copies = 1;          ///< 2: every eight elements twice
  std::int64_t offset = 0; ///< of the first element from the row's first byte
  std::int64_t row_bytes = 0;
  std::int64_t scale_at() const { return row_bytes - 4; }

  static QuantisedRows make(int8_linear::Float x, std::int64_t k, int copies = 1, std::int64_t offset = 0) {
    const std::int64_t elements = (k + 15) / 16 * 16 * copies;
    return {.x = x, .k = k, .copies = copies, .offset = offset, .row_bytes = (offset + elements + 4 + 15) / 16 * 16};
  }
};

/// Emits the head of a kernel's entry: quantises with NEON when the call (x0) asks for it, and returns unless it asks
/// for the multiplication too. Changes x1 … x10, v0 … v7 and v16 … v31.
void emit_quantiser(Assembler& a, const QuantisedRows& rows);

/// Makes the shape of an int8_mm that of an int8_linear of this desc, and emits the head of its entry.
void begin_linear(Assembler& a, NestShape& shape, const KernelDesc& desc);

/// FPCR.DN (Arm ARM, C5.2.8), while sums are dequantised: NaNs are then the default ones, which are Kiln's.
inline constexpr std::int64_t kDefaultNan = 1 << 25;

/// Sums to elements of y before the last stages. `at.values` are the rows' s, at.terms as of int8_linear.
class NeonLinearEpilogue final : public NeonEpilogue {
public:
  NeonLinearEpilogue(Assembler& a, const int8_mm::Epilogue& y, bool has_bias)
      : NeonEpilogue(a, y), has_bias_(has_bias) {}
  void apply(TileSums& sums, const TileTerms& at) override;

private:
  const bool has_bias_;
};
class SveLinearEpilogue final : public SveEpilogue {
public:
  SveLinearEpilogue(const SveEpilogue& stages, bool has_bias) : SveEpilogue(stages), has_bias_(has_bias) {}
  void apply(TileSums& sums, const TileTerms& at) override { apply_rest(sums, at, true, true); }
  void apply_rest(const TileSums& sums, const TileTerms& at, bool has_values, bool has_row_sums) override;

private:
  const bool has_bias_;
};

/// The row of int8_linear beside a row of int8_mm: the same path, layouts and preferences, which depend on M, N and K
/// only, and the same `compile`, which looks at the desc's op.
Implementation linear_row(Implementation product);

} // namespace kiln::arm
