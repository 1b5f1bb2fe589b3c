#pragma once
#include <string>
#include <string_view>

#include "backends/arm/epilogue_sve.h"
#include "backends/arm/int8_mm_nest.h"

/// What the SVE paths of int8_mm share. A kernel is made for one vector length, which is part of its key and checked
/// when it is loaded: offsets are constants, and of predicates one that is all true is enough. Since a thread may be
/// given another length later (prctl, PR_SVE_SET_VL), a call begins by asking for it.
namespace kiln::arm {

class SvePath : public Path {
public:
  SvePath(Assembler& assembler, const NestShape& shape) : a_(assembler), shape_(shape) {}

  void clear() override; ///< sets the predicate of the loads too
  void load_b(int to, const asmjit::a64::Gp& base, int offset) override;
  void load_two(int, int, const asmjit::a64::Gp&, int) override {} // shape.pairs is false

  SveEpilogue epilogue(SveEpilogue::Level level) const {
    return {a_, shape_.epilogue, level, shape_.vector_bytes, kAll, kAll, {{1}, {2}, {3}, {4}, {5}, {6}, {7}}};
  }

protected:
  static constexpr sve::P kAll{0};
  static sve::Z z(int id) { return {static_cast<std::uint32_t>(id)}; }
  sve::Z acc(int unit, int vector) const { return z(shape_.loads + unit * shape_.vectors() + vector); }
  /// To vector `at` of role::c_row.
  void store(sve::Z from, int at) { a_.word(sve::str(from, role::c_row, at)); }

  /// Sums of `vectors` registers a row; `at(row, vector)` says or makes which.
  template <class At> TileSums sums_of(int vectors, At at) const {
    TileSums sums{.rows = shape_.tile_rows(), .vectors = vectors};
    for (int row = 0; row < sums.rows; ++row)
      for (int vector = 0; vector < vectors; ++vector)
        sums.sums.push_back(at(row, vector).id);
    for (std::uint32_t i = 0; i < 8; ++i)
      sums.free.push_back(i);
    return sums;
  }

  Assembler& a_;
  const NestShape& shape_;
};

/// The kernel: emit_nest with `path`, a SvePath over `a` and `shape`; without SVE on a thread of another vector length.
/// For int8_linear behind begin_linear.
Result<CodeObject> emit_sve_nest(Assembler& a, const NestShape& shape, SvePath& path, Features features,
                                 const Target& target);

/// Of the kernel's code: `needs`, and SVE2 where the target has it and the desc's epilogue gains by it.
Features sve_features(Features needs, const KernelDesc& desc, const Target& target);

/// Twelve columns for each 128 bits of a vector: three vectors of four k a column, or six of eight.
int8_mm::PackLayout sve_pack_layout(const Target& target, int k_block);
/// Vectors of a panel, 0 when its columns do not fill whole ones.
int panel_vectors(int8_mm::PackLayout layout, const Target& target);

/// nest_row for a path of the machine's SVE vectors, of 256 bits at least. Its `uses` is left to the path.
Implementation sve_row(IsaPath isa, Features needs, std::string (*pack_layout)(const KernelDesc&, const Target&),
                       bool (*reads_layout)(std::string_view, const KernelDesc&, const Target&),
                       Result<CodeObject> (*compile)(const KernelDesc&, const Target&, std::string_view));

/// And the row of int8_linear beside it.
Implementation sve_linear_row(Implementation product);

} // namespace kiln::arm
