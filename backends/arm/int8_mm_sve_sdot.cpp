#include "backends/arm/int8_linear.h"
#include "backends/arm/int8_mm_sve.h"
#include "backends/arm/rows.h"

/// int8_mm with SDOT on SVE vectors, and USDOT for u8 rows (FEAT_I8MM): four products a lane, summed into s32. The k of
/// one row are loaded into every column's place: A64FX does one SDOT by element a cycle, and two of these (LLVM 19's
/// model of it); the loads find room beside the products.
///
/// From packs of four k a column a tile of 8 × 3 vectors has 24 accumulators and takes 35 instructions a step for 24
/// SDOT. What bounds it: the pipes of SDOT, two a cycle on Neoverse V1 and A64FX.
///
/// From packs of eight k a column (machines with SMMLA, which does all but the lowest tiles there) two lanes make up a
/// result, and are added in the end. What bounds it: loads of weights, one for each SDOT with one row.
namespace kiln::arm {
namespace {

using asmjit::a64::Gp;
using int8_mm::PackLayout;

constexpr Features kFeatures{Feature::neon, Feature::sve};

class SveSdotPath final : public SvePath {
public:
  using SvePath::SvePath;

  void load_a(int to, const Gp& base, int offset) override {
    a_.word(shape_.layout.k_block == 4 ? sve::ld1rw(z(to), kAll, base, offset) : sve::ld1rd(z(to), kAll, base, offset));
  }

  void multiply(int unit, int vector, int a, int, int b) override {
    a_.word(shape_.multiplies_u8 ? sve::usdot(acc(unit, vector), z(a), z(b))
                                 : sve::sdot(acc(unit, vector), z(b), z(a)));
  }

  void store_row(int unit, int) override {
    if (shape_.layout.k_block == 4) {
      for (int vector = 0; vector < shape_.vectors(); ++vector)
        store(acc(unit, vector), vector);
      return;
    }
    for (int vector = 0; vector < shape_.vectors(); vector += 2) {
      const sve::Z even = z(vector % shape_.loads), odd = z((vector + 1) % shape_.loads);
      a_.word(sve::uzp1(sve::Element::s, even, acc(unit, vector), acc(unit, vector + 1)));
      a_.word(sve::uzp2(sve::Element::s, odd, acc(unit, vector), acc(unit, vector + 1)));
      a_.word(sve::add(sve::Element::s, even, even, odd));
      store(even, vector / 2);
    }
  }

  TileSums finished_sums() override {
    if (shape_.layout.k_block == 4)
      return sums_of(shape_.vectors(), [&](int unit, int vector) { return acc(unit, vector); });
    return sums_of(shape_.vectors() / 2, [&](int unit, int i) {
      const sve::Z sums = acc(unit, 2 * i), right = acc(unit, 2 * i + 1), even = z(i % 8);
      a_.word(sve::uzp1(sve::Element::s, even, sums, right));
      a_.word(sve::uzp2(sve::Element::s, sums, sums, right));
      a_.word(sve::add(sve::Element::s, sums, sums, even));
      return sums;
    });
  }
};

/// Rows of a tile and, with them, columns: 24 accumulators, 12 with one row.
NestShape shape_for(std::int64_t m_class, std::int64_t k, PackLayout layout, const Target& target) {
  const int rows = m_class == kAny || m_class > 8 ? 8 : static_cast<int>(m_class);
  const int vectors = rows > 4 ? 3 : rows > 2 ? 6 : 12;
  NestShape shape{.layout = layout,
                  .k = k,
                  .a_load = layout.k_block,
                  .vector_bytes = target.sve_bits / 8,
                  .together = rows > 2 ? 3 : 1, // A's registers are the fewer ones with two rows
                  .pairs = false,
                  .unroll = 2};
  shape.heights = int8_mm::heights_for(m_class, 1, rows);
  shape.a_rows = shape.heights.max <= 2 ? shape.heights.max : (shape.heights.max + 3) / 4 * 4;
  shape.columns = columns_for(panel_vectors(layout, target), vectors, layout.k_block / 4);
  return shape;
}

bool reads_layout(std::string_view id, const KernelDesc& desc, const Target& target) {
  const Result<PackLayout> layout = PackLayout::parse(id);
  const int vectors = layout ? panel_vectors(*layout, target) : 0;
  const std::int64_t m_class = desc.value[int8_mm::kM];
  if (vectors == 0)
    return false;
  if (layout->k_block == 8) // more rows are SMMLA's wherever weights are packed so
    return vectors % 6 == 0 && (m_class == 1 || m_class == 2);
  return layout->k_block == 4 && (vectors % 3 == 0 || vectors % 2 == 0);
}

Result<CodeObject> compile(const KernelDesc& desc, const Target& target, std::string_view pack_layout) {
  if (!reads_layout(pack_layout, desc, target))
    return unreadable(IsaPath::sve_sdot, pack_layout, desc);
  NestShape shape =
      shape_for(desc.value[int8_mm::kM], desc.value[int8_mm::kK], *PackLayout::parse(pack_layout), target);
  shape.multiplies_u8 = NestShape::can_multiply_u8(desc, target);
  Assembler a;
  if (desc.op == OpId::int8_linear)
    begin_linear(a, shape, desc);
  else
    shape.epilogue = int8_mm::Epilogue::of(desc);
  SveSdotPath path(a, shape);
  const Features features = shape.linear ? kFeatures : sve_features(kFeatures, desc, target);
  return emit_sve_nest(a, shape, path, features, target);
}

} // namespace

Implementation int8_mm_sve_sdot() {
  Implementation row = sve_row(
      IsaPath::sve_sdot, kFeatures,
      [](const KernelDesc&, const Target& target) { return sve_pack_layout(target, 4).id(); }, reads_layout, compile);
  row.uses = [](const KernelDesc& desc, const Target& target) { return sve_features(kFeatures, desc, target); };
  return row;
}

Implementation int8_linear_sve_sdot() {
  return sve_linear_row(int8_mm_sve_sdot());
}

} // namespace kiln::arm
