#include <utility>

#include "backends/arm/int8_linear.h"
#include "backends/arm/int8_mm_nest.h"
#include "backends/arm/rows.h"

/// int8_mm with SDOT (FEAT_DotProd): four products a lane, summed into s32; u8 rows with SUDOT and USDOT where the
/// machine has FEAT_I8MM.
///
/// From packs of four k a column (n12k4, and those of SME machines) SDOT by element: a lane of A, four k of one row,
/// meets four columns. A tile of 8 × 12 has 24 accumulators and takes 27 instructions a step for 24 SDOT. What bounds
/// it: the pipes of SDOT, two or four a cycle.
///
/// From packs of eight k a column (machines with SMMLA, which does all but the lowest tiles there) a vector holds two
/// columns, so that two lanes make up a result: A's eight k are in the workspace twice, and the halves are added in the
/// end. What bounds it: loads of weights, one for each SDOT with one row.
namespace kiln::arm {
namespace {

using namespace asmjit::a64;
using int8_mm::PackLayout;

constexpr PackLayout kLayout{.n_block = 12, .k_block = 4};
constexpr Features kFeatures{Feature::neon, Feature::dotprod};

/// A vector of B: four k of four columns.
class ByElement final : public VectorPath {
public:
  ByElement(Assembler& a, const NestShape& shape) : VectorPath(a, shape, shape.loads, 1) {}

  void multiply(int unit, int vector, int a, int a_byte, int b) override {
    const VecV sums = acc(unit, vector), of_a = VecV(a).b4(static_cast<std::uint32_t>(a_byte / 4));
    if (shape_.multiplies_u8)
      a_.sudot(sums.s4(), VecV(b).b16(), of_a);
    else
      a_.sdot(sums.s4(), VecV(b).b16(), of_a);
  }

  void store_row(int unit, int) override {
    store(shape_.vectors(), [&](int vector) { return acc(unit, vector); });
  }

  TileSums finished_sums() override {
    return sums_of(shape_.vectors(), [&](int unit, int vector) { return acc(unit, vector); });
  }
};

/// A vector of B: eight k of two columns.
class ByPairs final : public VectorPath {
public:
  ByPairs(Assembler& a, const NestShape& shape) : VectorPath(a, shape, shape.loads, 1) {}

  void multiply(int unit, int vector, int a, int, int b) override {
    if (shape_.multiplies_u8)
      a_.usdot(acc(unit, vector).s4(), VecV(a).b16(), VecV(b).b16());
    else
      a_.sdot(acc(unit, vector).s4(), VecV(b).b16(), VecV(a).b16());
  }

  void store_row(int unit, int) override {
    const int count = shape_.vectors() / 2;
    for (int i = 0; i < count; ++i)
      a_.addp(VecV(i).s4(), acc(unit, 2 * i).s4(), acc(unit, 2 * i + 1).s4());
    store(count, [](int i) { return VecV(i); });
  }

  TileSums finished_sums() override {
    return sums_of(shape_.vectors() / 2, [&](int unit, int i) {
      const VecV sums = acc(unit, 2 * i);
      a_.addp(sums.s4(), sums.s4(), acc(unit, 2 * i + 1).s4());
      return sums;
    });
  }
};

/// Rows of a tile and, with them, columns: 24 accumulators at most.
NestShape shape_for(std::int64_t m_class, std::int64_t k, PackLayout layout) {
  NestShape shape{.layout = layout, .k = k, .together = 2};
  if (layout.k_block == 8) {
    const int rows = m_class == 1 ? 1 : 2;
    shape.heights = int8_mm::heights_for(m_class, 1, rows);
    shape.a_rows = rows;
    shape.a_copies = 2;
    shape.columns = columns_for(layout.n_block / 2, 12, 2);
    shape.loads = 32 - rows * shape.vectors();
    return shape;
  }
  // Panels of 8 · 2^i columns have no slices of three vectors. One row has fewer accumulators than registers: SDOT
  // forwards its accumulator in a cycle, and loads bound it.
  const auto [rows, vectors] = m_class == 1               ? std::pair(1, 16)
                               : m_class == 2             ? std::pair(2, 12)
                               : m_class == 4             ? std::pair(4, 6)
                               : layout.n_block % 12 == 0 ? std::pair(8, 3)
                                                          : std::pair(6, 4);
  shape.heights = int8_mm::heights_for(m_class, 1, rows);
  shape.a_rows = shape.heights.max <= 2 ? shape.heights.max : (shape.heights.max + 3) / 4 * 4;
  shape.columns = columns_for(layout.n_block / 4, vectors, 1);
  shape.loads = 32 - shape.heights.max * shape.vectors();
  // Shorter turns where there are many heights: each has its own, and all are emitted.
  shape.unroll = rows == 1 ? 8 : shape.heights.max - shape.heights.min > 2 ? 3 : 4;
  return shape;
}

bool reads_layout(std::string_view id, const KernelDesc& desc, const Target&) {
  const Result<PackLayout> layout = PackLayout::parse(id);
  if (!layout)
    return false;
  const std::int64_t m_class = desc.value[int8_mm::kM];
  if (layout->k_block == 8) // more rows are SMMLA's wherever weights are packed so
    return layout->n_block % 12 == 0 && (m_class == 1 || m_class == 2);
  return layout->k_block == 4 && (layout->n_block % 12 == 0 || layout->n_block % 8 == 0);
}

Result<CodeObject> compile(const KernelDesc& desc, const Target& target, std::string_view pack_layout) {
  if (!reads_layout(pack_layout, desc, target))
    return unreadable(IsaPath::sdot, pack_layout, desc);
  NestShape shape = shape_for(desc.value[int8_mm::kM], desc.value[int8_mm::kK], *PackLayout::parse(pack_layout));
  shape.multiplies_u8 = NestShape::can_multiply_u8(desc, target);
  const Features features = NestShape::features(kFeatures, desc, target);
  Assembler a;
  if (desc.op == OpId::int8_linear)
    begin_linear(a, shape, desc);
  else
    shape.epilogue = int8_mm::Epilogue::of(desc);
  if (shape.layout.k_block == 8) {
    ByPairs path(a, shape);
    return emit_nest(a, shape, path, features, 0);
  }
  ByElement path(a, shape);
  return emit_nest(a, shape, path, features, 0);
}

} // namespace

Implementation int8_mm_sdot() {
  Implementation row = nest_row(
      IsaPath::sdot, kFeatures, [](const KernelDesc&, const Target&) { return kLayout.id(); }, reads_layout, compile);
  row.uses = [](const KernelDesc& desc, const Target& target) { return NestShape::features(kFeatures, desc, target); };
  return row;
}

Implementation int8_linear_sdot() {
  return linear_row(int8_mm_sdot());
}

} // namespace kiln::arm
