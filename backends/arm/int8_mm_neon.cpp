#include "backends/arm/int8_linear.h"
#include "backends/arm/int8_mm_nest.h"
#include "backends/arm/rows.h"

/// int8_mm with the base instructions of Advanced SIMD, for cores without SDOT: SMULL makes eight products of s16,
/// SADALP adds them in pairs to s32. One product a lane is exact for all values; two products of (−128)·(−128) in one
/// lane, which SMLAL would save instructions by, are 2^15 and overflow. A vector of a pack holds eight k of two
/// columns, A's eight k are in the workspace twice, so that SMULL takes the first column and SMULL2 the second; the
/// four lanes of a result are added in the end. What bounds it: on Cortex-A72, which multiplies on one vector pipe and
/// accumulates on the other, eight products a cycle.
namespace kiln::arm {
namespace {

using namespace asmjit::a64;
using int8_mm::PackLayout;

constexpr PackLayout kLayout{.n_block = 12, .k_block = 8};
constexpr Features kFeatures{Feature::neon};

class NeonPath final : public VectorPath {
public:
  NeonPath(Assembler& a, const NestShape& shape) : VectorPath(a, shape, shape.loads + 4, 2) {}

  /// The products of one call are added in the next, so that a core that executes in order does not wait for them.
  void multiply(int unit, int vector, int a, int, int b) override {
    const VecV first = product(next_, 0), second = product(next_, 1);
    a_.smull(first.h8(), VecV(a).b8(), VecV(b).b8());
    a_.smull2(second.h8(), VecV(a).b16(), VecV(b).b16());
    finish_products();
    waiting_ = {unit, vector};
    next_ = 1 - next_;
  }
  void finish_products() override {
    if (waiting_.unit < 0)
      return;
    for (int half = 0; half < 2; ++half)
      a_.sadalp(acc(waiting_.unit, waiting_.vector, half).s4(), product(1 - next_, half).h8());
    waiting_.unit = -1;
  }

  void store_row(int unit, int) override {
    const int count = shape_.vectors() / 2;
    for (int i = 0; i < count; ++i) {
      const VecV sums = VecV(i), right = VecV(count);
      a_.addp(sums.s4(), acc(unit, 2 * i, 0).s4(), acc(unit, 2 * i, 1).s4());
      a_.addp(right.s4(), acc(unit, 2 * i + 1, 0).s4(), acc(unit, 2 * i + 1, 1).s4());
      a_.addp(sums.s4(), sums.s4(), right.s4());
    }
    store(count, [](int i) { return VecV(i); });
  }

  TileSums finished_sums() override {
    return sums_of(shape_.vectors() / 2, [&](int unit, int i) {
      const VecV sums = acc(unit, 2 * i, 0), right = acc(unit, 2 * i + 1, 0);
      a_.addp(sums.s4(), sums.s4(), acc(unit, 2 * i, 1).s4());
      a_.addp(right.s4(), right.s4(), acc(unit, 2 * i + 1, 1).s4());
      a_.addp(sums.s4(), sums.s4(), right.s4());
      return sums;
    });
  }

private:
  VecV product(int turn, int half) const { return VecV(shape_.loads + 2 * turn + half); }
  struct Waiting {
    int unit, vector;
  } waiting_{-1, 0};
  int next_ = 0; ///< pair of product registers
};

NestShape shape_for(std::int64_t m_class, std::int64_t k, PackLayout layout) {
  const int rows = m_class == 1 || m_class == 2 ? static_cast<int>(m_class) : 4;
  NestShape shape{.layout = layout, .k = k, .a_copies = 2, .together = 2, .loads = rows == 2 ? 4 : 8, .unroll = 2};
  shape.heights = int8_mm::heights_for(m_class, 1, rows);
  shape.a_rows = shape.heights.max;
  shape.columns = columns_for(layout.n_block / 2, rows <= 2 ? 6 : 2, 2);
  return shape;
}

bool reads_layout(std::string_view id, const KernelDesc&, const Target&) {
  const Result<PackLayout> layout = PackLayout::parse(id);
  return layout && layout->k_block == 8 && layout->n_block % 12 == 0;
}

Result<CodeObject> compile(const KernelDesc& desc, const Target& target, std::string_view pack_layout) {
  if (!reads_layout(pack_layout, desc, target))
    return unreadable(IsaPath::neon, pack_layout, desc);
  NestShape shape = shape_for(desc.value[int8_mm::kM], desc.value[int8_mm::kK], *PackLayout::parse(pack_layout));
  Assembler a;
  if (desc.op == OpId::int8_linear)
    begin_linear(a, shape, desc);
  else
    shape.epilogue = int8_mm::Epilogue::of(desc);
  NeonPath path(a, shape);
  return emit_nest(a, shape, path, kFeatures, 0);
}

} // namespace

Implementation int8_mm_neon() {
  return nest_row(
      IsaPath::neon, kFeatures, [](const KernelDesc&, const Target&) { return kLayout.id(); }, reads_layout, compile);
}

Implementation int8_linear_neon() {
  return linear_row(int8_mm_neon());
}

} // namespace kiln::arm
