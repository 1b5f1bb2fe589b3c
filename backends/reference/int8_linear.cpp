#include "jit/ops/int8_linear.h"
#include "backends/reference/rows.h"

namespace kiln::reference {
namespace {

using namespace kiln::int8_linear;

/// Sums of one row, a panel of the pack at a time; they wrap.
void multiply_row(const Call& call, float s, const std::int8_t* q, std::int64_t row, std::int64_t k) {
  const int8_mm::PackLayout& layout = call.plan->layout;
  const std::int64_t panel_bytes = layout.panel_bytes(k);
  for (std::int64_t j = 0; j < call.product.n; ++j) {
    const std::int8_t* const panel = call.product.b + j / layout.n_block * panel_bytes;
    const std::int64_t column = j % layout.n_block;
    std::uint32_t sum = 0;
    for (std::int64_t p = 0; p < k; ++p) {
      const std::int8_t w = panel[(p / layout.k_block * layout.n_block + column) * layout.k_block + p % layout.k_block];
      sum += static_cast<std::uint32_t>(std::int32_t{q[p]} * std::int32_t{w});
    }
    store_result(y_of(*call.desc), static_cast<std::int32_t>(sum), s, call.ws[j],
                 call.bias != nullptr ? call.bias[j] : 0.0f, call.product.c, row * call.product.ldc + j);
  }
}

/// The op's definition over a pack of any layout.
void run(const Call* call) {
  const std::int64_t k = call->desc->value[kK];
  const Float x_type = x_of(*call->desc);
  for (std::int64_t i = 0; i < call->product.m; ++i) {
    // s, then the row.
    auto* const s =
        reinterpret_cast<float*>(static_cast<std::uint8_t*>(call->product.workspace) + i * call->plan->q_row_bytes);
    auto* const q = reinterpret_cast<std::int8_t*>(s + 1);
    if (call->steps & kQuantise)
      *s = quantise_row(x_type, static_cast<const std::uint8_t*>(call->x) + i * call->ldx * bytes_of(x_type), k, q);
    if (call->steps & kMultiply)
      multiply_row(*call, *s, q, i, k);
  }
}

/// Its own packs: the layout that most other paths read too.
constexpr int8_mm::PackLayout kOwnLayout = {.n_block = 16, .k_block = 4};

std::vector<std::pair<std::string, std::int64_t>> plan_for(const KernelDesc& desc, std::string_view pack_layout) {
  Plan plan{.layout = kOwnLayout,
            .q_row_bytes = static_cast<std::int64_t>(sizeof(float)) + (desc.value[kK] + 3) / 4 * 4};
  if (const Result<int8_mm::PackLayout> asked = int8_mm::PackLayout::parse(pack_layout))
    plan.layout = *asked;
  plan.n_step = plan.layout.n_block;
  return plan.values();
}

} // namespace

Implementation int8_linear() {
  Implementation row;
  row.op = OpId::int8_linear;
  row.isa = IsaPath::reference;
  row.backend = BackendId::reference;
  row.generator = GeneratorId::none;
  row.any_arch = true;
  row.pack_layout = [](const KernelDesc&, const Target&) { return kOwnLayout.id(); };
  row.builtin = reinterpret_cast<const void*>(&run);
  row.builtin_plan = plan_for;
  return row;
}

} // namespace kiln::reference
