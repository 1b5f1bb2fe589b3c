#include "jit/ops/int8_mm.h"
#include "backends/reference/rows.h"

namespace kiln::reference {
namespace {

using namespace kiln::int8_mm;

/// The op's definition over a pack of any layout.
void multiply(const Call* call) {
  const PackLayout& layout = call->plan->layout;
  const std::int64_t panel_bytes = layout.panel_bytes(call->k);
  for (std::int64_t i = 0; i < call->m; ++i)
    for (std::int64_t j = 0; j < call->n; ++j) {
      const std::int8_t* const panel = call->b + j / layout.n_block * panel_bytes;
      const std::int64_t column = j % layout.n_block;
      std::uint32_t sum = 0; // unsigned: the sum wraps
      for (std::int64_t k = 0; k < call->k; ++k) {
        const std::int8_t b =
            panel[(k / layout.k_block * layout.n_block + column) * layout.k_block + k % layout.k_block];
        sum += static_cast<std::uint32_t>(std::int32_t{call->a[i * call->lda + k]} * std::int32_t{b});
      }
      call->c[i * call->ldc + j] = static_cast<std::int32_t>(sum);
    }
}

Status supports(const KernelDesc& desc, const Target&) {
  return check_s8(desc, INT64_MAX);
}

/// Its own packs: the layout that most other paths read too.
constexpr PackLayout kOwnLayout = {.n_block = 16, .k_block = 4};

std::vector<std::pair<std::string, std::int64_t>> plan_for(const KernelDesc&, std::string_view pack_layout) {
  Plan plan{.layout = kOwnLayout};
  if (const Result<PackLayout> asked = PackLayout::parse(pack_layout))
    plan.layout = *asked;
  plan.n_step = plan.layout.n_block;
  return plan.values();
}

} // namespace

Implementation int8_mm() {
  Implementation row;
  row.op = OpId::int8_mm;
  row.isa = IsaPath::reference;
  row.backend = BackendId::reference;
  row.generator = GeneratorId::none;
  row.any_arch = true;
  row.supports = supports;
  row.pack_layout = [](const KernelDesc&, const Target&) { return kOwnLayout.id(); };
  row.builtin = reinterpret_cast<const void*>(&multiply);
  row.builtin_plan = plan_for;
  return row;
}

} // namespace kiln::reference
