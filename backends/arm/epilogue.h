#pragma once
#include <cstdint>
#include <vector>

#include "backends/arm/emit.h"
#include "jit/ops/int8_mm_epilogue.h"

/// int8_mm's epilogue on sums in vector registers, on their way to C. A tile of sums goes through it stage by stage:
/// the operands of a stage are in registers while all rows of a vector of columns pass, so that eight registers beside
/// the sums are enough for every stage. Absent stages emit nothing.
///
///   apply            all stages but the last: results in s32, or f32 for float outputs
///   prepare_stores   what the last ones need: bounds, c_zp
///   store_row        the last ones, and C's type
namespace kiln::arm {

using Registers = std::vector<std::uint32_t>; ///< numbers of vector registers

/// A tile of sums: a register holds neighbouring columns of one row.
struct TileSums {
  int rows = 0, vectors = 0;
  Registers sums; ///< [rows][vectors]
  Registers free; ///< others that the stages may use, eight at least
  std::uint32_t at(int row, int vector) const { return sums[static_cast<std::size_t>(row * vectors + vector)]; }
  Registers column(int vector) const;
};

/// Where a tile's operands lie.
struct TileTerms {
  asmjit::a64::GpX terms;              ///< int8_mm::TermsLayout
  std::vector<std::int64_t> vector_at; ///< of each vector of columns, bytes from there
  std::int64_t array_bytes = 0;        ///< from one array to the next
  asmjit::a64::GpX values;             ///< Σ_k A[m,k] of each row, s32; `zp_at` bytes behind, a_zp of each
  std::int64_t zp_at = 0;
  asmjit::a64::GpX scalars; ///< int8_mm::Scalars
  asmjit::a64::GpX scratch;
};

class TileEpilogue {
public:
  TileEpilogue(Assembler& assembler, const int8_mm::Epilogue& epilogue)
      : a_(assembler), epilogue_(epilogue), terms_(int8_mm::TermsLayout::of(epilogue)) {}
  virtual ~TileEpilogue() = default;

  /// Sums that began at 0. Clobbers `free`, at.scratch. May leave them in other registers.
  virtual void apply(TileSums& sums, const TileTerms& at);
  /// The same for sums to which offsets, and with `has_row_sums` the rows' sums times theirs, were added. Without
  /// `has_values` (K = 0) the products of at.values are 0.
  virtual void apply_rest(const TileSums& sums, const TileTerms& at, bool has_values, bool has_row_sums);
  /// Sets registers of sums.free, which stay with the tile until its last row is stored.
  virtual void prepare_stores(const TileSums& sums, const TileTerms& at) = 0;
  /// Row `row` of the tile to `to`, all its columns. Clobbers its sums, `scratch`.
  virtual void store_row(const TileSums& sums, int row, const asmjit::a64::GpX& to,
                         const asmjit::a64::GpX& scratch) = 0;

protected:
  using GpX = asmjit::a64::GpX;

  /// Half way between two integers a negative number is rounded as these are by a rule that does not look at its sign.
  static int8_mm::Rounding of_negative(int8_mm::Rounding rounding);

  // Vectors of s32 or f32.
  virtual void load(std::uint32_t to, const GpX& base, std::int64_t offset, const GpX& scratch) = 0;
  virtual void broadcast(std::uint32_t to, const GpX& base, std::int64_t offset) = 0;
  virtual void add(std::uint32_t to, std::uint32_t by) = 0;
  /// += the row's value at at.values + `value_at` times the columns' term in array `array`.
  virtual void add_products(const TileSums& sums, const TileTerms& at, std::int64_t value_at, int array) = 0;
  virtual void shift_left(const Registers& sums, std::uint32_t by) = 0;
  /// To f32, times `by`.
  virtual void scale(const Registers& sums, std::uint32_t by) = 0;
  virtual void scale_negative(const Registers& sums, const Registers& free, std::uint32_t by) = 0;
  virtual void to_integers(const Registers& sums) = 0;
  /// v / 2^shift rounded, v = sum · multiplier: the multiplier in free[0], shifts 0 … 62 in free[1]. `slope`: values
  /// below 0 only, by operands that are the same in all lanes.
  virtual void round(const Registers& sums, const Registers& free, bool slope) = 0;

  std::int64_t term(const TileTerms& at, int vector, int array) const {
    return at.vector_at[static_cast<std::size_t>(vector)] + array * at.array_bytes;
  }

  Assembler& a_;
  const int8_mm::Epilogue epilogue_;
  const int8_mm::TermsLayout terms_;
};

/// In NEON registers, four columns in each.
class NeonEpilogue : public TileEpilogue {
public:
  using TileEpilogue::TileEpilogue;
  void prepare_stores(const TileSums& sums, const TileTerms& at) override;
  void store_row(const TileSums& sums, int row, const asmjit::a64::GpX& to, const asmjit::a64::GpX& scratch) override;

protected:
  void load(std::uint32_t to, const GpX& base, std::int64_t offset, const GpX& scratch) override;

private:
  void broadcast(std::uint32_t to, const GpX& base, std::int64_t offset) override;
  void add(std::uint32_t to, std::uint32_t by) override;
  void add_products(const TileSums& sums, const TileTerms& at, std::int64_t value_at, int array) override;
  void shift_left(const Registers& sums, std::uint32_t by) override;
  void scale(const Registers& sums, std::uint32_t by) override;
  void scale_negative(const Registers& sums, const Registers& free, std::uint32_t by) override;
  void to_integers(const Registers& sums) override;
  void round(const Registers& sums, const Registers& free, bool slope) override;
  void narrow_and_store(const Registers& results, const GpX& to);
};

} // namespace kiln::arm
