#pragma once
#include "backends/arm/epilogue.h"

/// The epilogue in SVE registers, vectors of any length: for SVE kernels, and in streaming mode for those of SME, with
/// instructions that are legal there.
namespace kiln::arm {

class SveEpilogue : public TileEpilogue {
public:
  /// What may be used beside SVE: SVE2's instructions, and those that SME adds in streaming mode.
  enum class Level { sve, sve2, streaming };
  /// `all` is true in every element; `temps` may be changed; `columns` are the
  /// elements of a vector that belong to C.
  SveEpilogue(Assembler& assembler, const int8_mm::Epilogue& epilogue, Level level, int vector_bytes, sve::P all,
              sve::P columns, std::vector<sve::P> temps)
      : TileEpilogue(assembler, epilogue), level_(level), vector_bytes_(vector_bytes), all_(all), columns_(columns),
        temps_(std::move(temps)) {}

  /// Whether the stages of this epilogue make use of SVE2.
  static bool uses_sve2(const int8_mm::Epilogue& epilogue) {
    return epilogue.rounds_wide() || epilogue.has_integer_slope();
  }

  void prepare_stores(const TileSums& sums, const TileTerms& at) override;
  void store_row(const TileSums& sums, int row, const asmjit::a64::GpX& to, const asmjit::a64::GpX& scratch) override;

protected:
  void load(std::uint32_t to, const GpX& base, std::int64_t offset, const GpX& scratch) override;
  sve::P all() const { return all_; }

private:
  void broadcast(std::uint32_t to, const GpX& base, std::int64_t offset) override;
  void add(std::uint32_t to, std::uint32_t by) override;
  void add_products(const TileSums& sums, const TileTerms& at, std::int64_t value_at, int array) override;
  void shift_left(const Registers& sums, std::uint32_t by) override;
  void scale(const Registers& sums, std::uint32_t by) override;
  void scale_negative(const Registers& sums, const Registers& free, std::uint32_t by) override;
  void to_integers(const Registers& sums) override;
  void round(const Registers& sums, const Registers& free, bool slope) override;
  void round_by_sve2(const Registers& sums, const Registers& free, bool slope, int8_mm::Rounding rounding);
  void round_by_sve1(const Registers& sums, const Registers& free, bool slope, int8_mm::Rounding rounding);

  const Level level_;
  const int vector_bytes_;
  const sve::P all_, columns_;
  const std::vector<sve::P> temps_;
};

} // namespace kiln::arm
