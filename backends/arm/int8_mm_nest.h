#pragma once
#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "backends/arm/emit.h"
#include "backends/arm/epilogue.h"
#include "jit/implementation.h"
#include "jit/ops/int8_linear.h"
#include "jit/ops/int8_mm_tiles.h"

/// The loops around a register tile, common to the vector paths of int8_mm on aarch64: A's rows are brought into the
/// workspace once, interleaved so that the loads of a step of K are contiguous; then for each column tile every row
/// tile runs through K and stores its part of C. A column tile of B is thus read from memory once and is in a cache for
/// the row tiles after the first.
///
/// What a path multiplies is a unit of rows (one row, or the two of SMMLA) with a vector of B. A tile is `units` ×
/// (`panels` · `vectors`) of them.
namespace kiln::arm {

/// A column tile of a pack: whole panels side by side, or a slice of one panel.
struct Columns {
  int panels = 1, vectors = 1; ///< of each panel
};
/// The widest one of at most `most` vectors: of panels of `panel_vectors`, in multiples of `multiple`.
Columns columns_for(int panel_vectors, int most, int multiple);

/// Register roles of the nest. x0 is the Call on entry.
namespace role {
using namespace asmjit::a64;
inline constexpr GpX b_k[4] = {x10, x11, x12, x13}; ///< running along K, of each panel of the tile
inline constexpr GpX a_k = x8;
inline constexpr GpX c_row = x6;         ///< the next row to store
inline constexpr GpX store_stride = x23; ///< bytes from it to the one after
inline constexpr GpX scratch = x14;      ///< free wherever a path emits
inline constexpr int kPanels = 4;
} // namespace role

/// The largest K: its steps are counted in 32 bits.
inline constexpr std::int64_t kNestMaxK = std::int64_t{1} << 26;

struct QuantisedRows; // backends/arm/int8_linear.h

/// What makes a kernel of int8_linear of the nest: A's rows are made of X before it, and its sums dequantised.
struct LinearShape {
  int8_linear::Float x; ///< what comes in
  bool has_bias;
};

struct NestShape {
  int8_mm::PackLayout layout;
  std::int64_t k = 0;
  int8_mm::Heights heights;
  int unit_rows = 1;
  int a_rows = 8;   ///< rows of a tile in the workspace: at least those of the highest, 1, 2 or a multiple of 4 (of
                    ///< `unit_rows` when a row takes 8 bytes of a step)
  int a_copies = 1; ///< of a row's bytes of a step, side by side
  int a_load = 16;  ///< bytes of A in a register: 16, or fewer where a load replicates them
  Columns columns;
  int vector_bytes = 16; ///< of a vector of B: 16, or SVE's
  int together = 1;      ///< vectors of B that a unit of rows meets before the next unit, 4 at most
  int loads = 8;         ///< registers 0 … loads − 1 hold A and B, those above are the path's
  bool pairs = true;     ///< two 16-byte loads in one instruction
  int a_bias = 0;        ///< added to a_k, for loads whose offsets begin below 0
  int unroll = 4;        ///< steps of K in one turn of the loop
  /// A tile of A in the workspace ends with the sums of its rows and their a_zp, as far as its stages want them.
  int8_mm::Epilogue epilogue;
  bool multiplies_u8 = false;        ///< the path's products take A's u8 as they are (FEAT_I8MM)
  std::optional<LinearShape> linear; ///< then of `epilogue` only y's type matters, and the values of rows are their s

  bool has_row_values() const { return epilogue.needs_row_sums() || epilogue.a_zp == int8_mm::AZp::row || linear; }
  static constexpr int kRowValues = 64; ///< bytes of each of the two
  int terms_panel_bytes() const {
    return linear ? 4 * layout.n_block * (linear->has_bias ? 3 : 2)
                  : static_cast<int>(int8_mm::TermsLayout::of(epilogue).panel_bytes(layout));
  }

  std::int64_t steps() const { return (k + layout.k_block - 1) / layout.k_block; }
  int step_bytes() const { return layout.n_block * layout.k_block; }
  int unit_bytes() const { return unit_rows * layout.k_block * a_copies; } ///< of A's workspace, in a step
  int a_step_bytes() const { return a_rows * layout.k_block * a_copies; }
  int vectors() const { return columns.panels * columns.vectors; }
  int slice_columns() const { return columns.vectors * vector_bytes / layout.k_block; }
  int slices() const { return layout.n_block / slice_columns(); }
  int tile_columns() const { return columns.panels * slice_columns(); }
  int tile_rows() const { return heights.max * unit_rows; }
  std::int64_t turns() const { return steps() <= unroll ? 1 : (steps() + unroll - 1) / unroll; }
  /// Steps of a turn that the first turn leaves out, as it is entered behind them.
  int left_out() const { return steps() <= unroll ? 0 : static_cast<int>(turns() * unroll - steps()); }
  /// Bytes of a row tile in the workspace: whole vectors of A's rows, zero beyond K; then their values.
  std::int64_t a_elements_bytes() const { return (k + 15) / 16 * 16 * a_rows * a_copies; }
  std::int64_t a_tile_bytes() const { return a_elements_bytes() + (has_row_values() ? 2 * kRowValues : 0); }
  /// The workspace begins with a tile of C for columns that end at N.
  std::int64_t c_scratch_bytes() const { return (std::int64_t{4} * tile_rows() * tile_columns() + 63) / 64 * 64; }
  /// Where A begins behind it, so that a turn's first load of A is aligned.
  std::int64_t a_offset() const { return c_scratch_bytes() + left_out() * a_step_bytes() % 16; }
  int8_mm::Plan plan() const;
  /// Whether A's elements become s8 by 128 less, on their way to the workspace.
  bool flips_a() const { return epilogue.a_dtype == int8_mm::ADtype::u8 && !multiplies_u8; }
  /// Whether sums go through stages on their way to C.
  bool finishes() const {
    int8_mm::Epilogue stages = epilogue;
    if (multiplies_u8)
      stages.a_dtype = int8_mm::ADtype::s8; // which asks for none
    return !stages.is_absent();
  }
  /// `target` has FEAT_I8MM and this int8_mm has u8 rows.
  static bool can_multiply_u8(const KernelDesc& desc, const Target& target);
  /// `needs`, with FEAT_I8MM where it is made use of so.
  static Features features(Features needs, const KernelDesc& desc, const Target& target);

  /// With `linear`: one row is quantised as the loop along K reads it.
  bool takes_rows_as_they_are() const { return linear && a_rows == 1; }
  QuantisedRows quantised_rows() const;
  int8_linear::Plan linear_plan() const;
};

/// What differs between the paths. Registers below `shape.loads` are free outside the K loop.
class Path {
public:
  virtual ~Path() = default;
  /// Accumulators of the highest tile become 0.
  virtual void clear() = 0;
  /// `a_load` bytes of A, or vector_bytes of B, from base + offset into register `to`; `load_two` the next 16 into
  /// `second`.
  virtual void load_a(int to, const asmjit::a64::Gp& base, int offset) = 0;
  virtual void load_b(int to, const asmjit::a64::Gp& base, int offset) = 0;
  virtual void load_two(int to, int second, const asmjit::a64::Gp& base, int offset) = 0;
  /// acc(unit, vector) += the unit's `unit_bytes` at byte `a_byte` of register `a`, times the vector of B in `b`.
  virtual void multiply(int unit, int vector, int a, int a_byte, int b) = 0;
  /// Nothing of the products so far may wait any longer: their registers are loaded anew.
  virtual void finish_products() {}
  /// Row `row` of the unit's accumulators, all columns of the tile, to role::c_row.
  virtual void store_row(int unit, int row) = 0;
  /// All accumulators become sums, in registers.
  virtual TileSums finished_sums() = 0;
};

/// A path in v registers: its accumulators are those from `first`, 8 or more, on, `per_product` for each unit and
/// vector.
class VectorPath : public Path {
public:
  VectorPath(Assembler& assembler, const NestShape& shape, int first, int per_product)
      : a_(assembler), shape_(shape), first_(first), per_product_(per_product) {}

  void clear() override;
  void load_a(int to, const asmjit::a64::Gp& base, int offset) override;
  void load_b(int to, const asmjit::a64::Gp& base, int offset) override;
  void load_two(int to, int second, const asmjit::a64::Gp& base, int offset) override;

protected:
  asmjit::a64::VecV acc(int unit, int vector, int i = 0) const {
    return asmjit::a64::VecV(
        static_cast<std::uint32_t>(first_ + (unit * shape_.vectors() + vector) * per_product_ + i));
  }
  /// Sums of `vectors` registers a row; `at(row, vector)` says or makes which.
  template <class At> TileSums sums_of(int vectors, At at) const {
    TileSums sums{.rows = shape_.tile_rows(), .vectors = vectors};
    for (int row = 0; row < sums.rows; ++row)
      for (int vector = 0; vector < vectors; ++vector)
        sums.sums.push_back(at(row, vector).id());
    for (std::uint32_t i = 0; i < 8; ++i)
      sums.free.push_back(i);
    return sums;
  }
  /// `count` registers from `get` on to role::c_row.
  template <class Get> void store(int count, Get get) {
    int i = 0;
    for (; i + 1 < count; i += 2)
      a_.stp(get(i), get(i + 1), asmjit::a64::ptr(role::c_row, 16 * i));
    if (i < count)
      a_.str(get(i), asmjit::a64::ptr(role::c_row, 16 * i));
  }

  Assembler& a_;
  const NestShape& shape_;

private:
  const int first_, per_product_;
};

/// Emits the kernel. `epilogue` takes the path's sums. Code::compile_failed when `shape.loads` registers cannot hold
/// what one product needs.
Result<CodeObject> emit_nest(Assembler& a, const NestShape& shape, Path& path, TileEpilogue& epilogue,
                             Features features, std::int32_t vector_bits);
/// The same for a path in v registers.
Result<CodeObject> emit_nest(Assembler& a, const NestShape& shape, VectorPath& path, Features features,
                             std::int32_t vector_bits);

/// A row of the implementation table, but for what differs between the nest's paths.
Implementation nest_row(IsaPath isa, Features needs, std::string (*pack_layout)(const KernelDesc&, const Target&),
                        bool (*reads_layout)(std::string_view, const KernelDesc&, const Target&),
                        Result<CodeObject> (*compile)(const KernelDesc&, const Target&, std::string_view));

/// Code::unsupported: the path reads no packs of this layout, with this class of m.
Status unreadable(IsaPath isa, std::string_view pack_layout, const KernelDesc& desc);

/// What the nest can serve: rows whose steps are counted in 32 bits.
Status supports_nest(const KernelDesc& desc, const Target& target);

} // namespace kiln::arm
