#include <utility>

#include "backends/arm/int8_linear.h"
#include "backends/arm/int8_mm_nest.h"
#include "backends/arm/rows.h"

/// int8_mm with SMMLA, and USMMLA for u8 rows (FEAT_I8MM): eight k of two rows times eight k of two columns, a 2 × 2
/// block of s32 in one register. Packs of eight k a column give two columns a vector; A's rows go in pairs. A tile of 8
/// × 12 has 24 accumulators and takes 29 instructions a step for 24 SMMLA. What bounds it: the pipes of SMMLA, two or
/// four a cycle.
namespace kiln::arm {
namespace {

using namespace asmjit::a64;
using int8_mm::PackLayout;

constexpr PackLayout kLayout{.n_block = 12, .k_block = 8};
constexpr Features kFeatures{Feature::neon, Feature::i8mm};

class SmmlaPath final : public VectorPath {
public:
  SmmlaPath(Assembler& a, const NestShape& shape) : VectorPath(a, shape, shape.loads, 1) {}

  void multiply(int unit, int vector, int a, int, int b) override {
    if (shape_.multiplies_u8)
      a_.usmmla(acc(unit, vector).s4(), VecV(a).b16(), VecV(b).b16());
    else
      a_.smmla(acc(unit, vector).s4(), VecV(a).b16(), VecV(b).b16());
  }

  /// The low halves of two blocks are four columns of the pair's first row, the high halves of its second.
  void store_row(int unit, int row) override {
    const int count = shape_.vectors() / 2;
    for (int i = 0; i < count; ++i) {
      const VecV left = acc(unit, 2 * i), right = acc(unit, 2 * i + 1);
      if (row == 0)
        a_.zip1(VecV(i).d2(), left.d2(), right.d2());
      else
        a_.zip2(VecV(i).d2(), left.d2(), right.d2());
    }
    store(count, [](int i) { return VecV(i); });
  }

  TileSums finished_sums() override {
    TileSums sums = sums_of(shape_.vectors() / 2, [&](int row, int i) { return acc(row / 2, 2 * i + row % 2); });
    // The pair's first row is made in a free register, and one of the blocks is free then.
    std::uint32_t& free = sums.free[0];
    for (int row = 0; row < sums.rows; row += 2)
      for (int i = 0; i < sums.vectors; ++i) {
        std::uint32_t& first = sums.sums[static_cast<std::size_t>(row * sums.vectors + i)];
        const VecV left = acc(row / 2, 2 * i), right = acc(row / 2, 2 * i + 1);
        a_.zip1(VecV(free).d2(), left.d2(), right.d2());
        a_.zip2(right.d2(), left.d2(), right.d2());
        std::swap(first, free);
      }
    return sums;
  }
};

NestShape shape_for(std::int64_t m_class, std::int64_t k, PackLayout layout) {
  const bool low = m_class != kAny && m_class <= 4;
  const int pairs = low ? static_cast<int>((m_class + 1) / 2) : 4;
  NestShape shape{.layout = layout, .k = k, .unit_rows = 2, .together = 2};
  shape.heights = int8_mm::heights_for(m_class, shape.unit_rows, pairs);
  shape.a_rows = 2 * shape.heights.max;
  shape.columns = columns_for(layout.n_block / 2, low ? 12 : 6, 2);
  shape.loads = 32 - shape.heights.max * shape.vectors();
  return shape;
}

bool reads_layout(std::string_view id, const KernelDesc&, const Target&) {
  const Result<PackLayout> layout = PackLayout::parse(id);
  return layout && layout->k_block == 8 && layout->n_block % 12 == 0;
}

std::string declines(const KernelDesc& desc, const Target& target) {
  const std::int64_t m_class = desc.value[int8_mm::kM];
  return (m_class == 1 || m_class == 2) && target.features.has(Feature::dotprod)
             ? "two rows or fewer: SDOT reads each weight once"
             : "";
}

Result<CodeObject> compile(const KernelDesc& desc, const Target& target, std::string_view pack_layout) {
  if (!reads_layout(pack_layout, desc, target))
    return unreadable(IsaPath::i8mm, pack_layout, desc);
  NestShape shape = shape_for(desc.value[int8_mm::kM], desc.value[int8_mm::kK], *PackLayout::parse(pack_layout));
  shape.multiplies_u8 = NestShape::can_multiply_u8(desc, target);
  Assembler a;
  if (desc.op == OpId::int8_linear)
    begin_linear(a, shape, desc);
  else
    shape.epilogue = int8_mm::Epilogue::of(desc);
  SmmlaPath path(a, shape);
  return emit_nest(a, shape, path, kFeatures, 0);
}

} // namespace

Implementation int8_mm_i8mm() {
  Implementation row = nest_row(
      IsaPath::i8mm, kFeatures, [](const KernelDesc&, const Target&) { return kLayout.id(); }, reads_layout, compile);
  row.declines = declines;
  return row;
}

Implementation int8_linear_i8mm() {
  return linear_row(int8_mm_i8mm());
}

} // namespace kiln::arm
