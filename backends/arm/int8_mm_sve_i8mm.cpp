#include <utility>

#include "backends/arm/int8_linear.h"
#include "backends/arm/int8_mm_sve.h"
#include "backends/arm/rows.h"

/// int8_mm with SMMLA, and USMMLA for u8 rows, on SVE vectors (FEAT_SVE with FEAT_I8MM): in each 128 bits eight k of
/// two rows times eight k of two columns. A pair of rows is loaded into every 128 bits, so that a vector of B, VL / 64
/// columns, meets it whole. A tile of four pairs × six vectors has 24 accumulators and takes 34 instructions a step for
/// 24 SMMLA. What bounds it: the pipes of SMMLA, two a cycle on Neoverse V1.
namespace kiln::arm {
namespace {

using asmjit::a64::Gp;
using int8_mm::PackLayout;

constexpr Features kFeatures{Feature::neon, Feature::i8mm, Feature::sve};

class SveSmmlaPath final : public SvePath {
public:
  using SvePath::SvePath;

  void load_a(int to, const Gp& base, int offset) override { a_.word(sve::ld1rqb(z(to), kAll, base, offset)); }

  void multiply(int unit, int vector, int a, int, int b) override {
    a_.word((shape_.multiplies_u8 ? sve::usmmla : sve::smmla)(acc(unit, vector), z(a), z(b)));
  }

  /// The even 64 bits of the blocks are columns of the pair's first row, the odd ones of its second.
  void store_row(int unit, int row) override {
    for (int vector = 0; vector < shape_.vectors(); vector += 2) {
      const sve::Z columns = z(vector / 2 % shape_.loads), left = acc(unit, vector), right = acc(unit, vector + 1);
      a_.word(row == 0 ? sve::uzp1(sve::Element::d, columns, left, right)
                       : sve::uzp2(sve::Element::d, columns, left, right));
      store(columns, vector / 2);
    }
  }

  TileSums finished_sums() override {
    TileSums sums = sums_of(shape_.vectors() / 2, [&](int row, int i) { return acc(row / 2, 2 * i + row % 2); });
    // The pair's first row is made in a free register, and one of the blocks is free then.
    std::uint32_t& free = sums.free[0];
    for (int row = 0; row < sums.rows; row += 2)
      for (int i = 0; i < sums.vectors; ++i) {
        std::uint32_t& first = sums.sums[static_cast<std::size_t>(row * sums.vectors + i)];
        const sve::Z left = acc(row / 2, 2 * i), right = acc(row / 2, 2 * i + 1);
        a_.word(sve::uzp1(sve::Element::d, {free}, left, right));
        a_.word(sve::uzp2(sve::Element::d, right, left, right));
        std::swap(first, free);
      }
    return sums;
  }
};

NestShape shape_for(std::int64_t m_class, std::int64_t k, PackLayout layout, const Target& target) {
  const bool low = m_class != kAny && m_class <= 4;
  const int pairs = low ? static_cast<int>((m_class + 1) / 2) : 4;
  NestShape shape{.layout = layout,
                  .k = k,
                  .unit_rows = 2,
                  .vector_bytes = target.sve_bits / 8,
                  .together = 2,
                  .pairs = false,
                  .unroll = 2};
  shape.heights = int8_mm::heights_for(m_class, shape.unit_rows, pairs);
  shape.a_rows = 2 * shape.heights.max;
  shape.columns = columns_for(panel_vectors(layout, target), low ? 12 : 6, 2);
  return shape;
}

bool reads_layout(std::string_view id, const KernelDesc&, const Target& target) {
  const Result<PackLayout> layout = PackLayout::parse(id);
  const int vectors = layout && layout->k_block == 8 ? panel_vectors(*layout, target) : 0;
  return vectors > 0 && vectors % 6 == 0;
}

std::string declines(const KernelDesc& desc, const Target&) {
  const std::int64_t m_class = desc.value[int8_mm::kM];
  return m_class == 1 || m_class == 2 ? "two rows or fewer: SDOT reads each weight once" : "";
}

Result<CodeObject> compile(const KernelDesc& desc, const Target& target, std::string_view pack_layout) {
  if (!reads_layout(pack_layout, desc, target))
    return unreadable(IsaPath::sve_i8mm, pack_layout, desc);
  NestShape shape =
      shape_for(desc.value[int8_mm::kM], desc.value[int8_mm::kK], *PackLayout::parse(pack_layout), target);
  shape.multiplies_u8 = NestShape::can_multiply_u8(desc, target);
  Assembler a;
  if (desc.op == OpId::int8_linear)
    begin_linear(a, shape, desc);
  else
    shape.epilogue = int8_mm::Epilogue::of(desc);
  SveSmmlaPath path(a, shape);
  const Features features = shape.linear ? kFeatures : sve_features(kFeatures, desc, target);
  return emit_sve_nest(a, shape, path, features, target);
}

} // namespace

Implementation int8_mm_sve_i8mm() {
  Implementation row = sve_row(
      IsaPath::sve_i8mm, kFeatures,
      [](const KernelDesc&, const Target& target) { return sve_pack_layout(target, 8).id(); }, reads_layout, compile);
  row.uses = [](const KernelDesc& desc, const Target& target) { return sve_features(kFeatures, desc, target); };
  row.declines = declines;
  return row;
}

Implementation int8_linear_sve_i8mm() {
  return sve_linear_row(int8_mm_sve_i8mm());
}

} // namespace kiln::arm
