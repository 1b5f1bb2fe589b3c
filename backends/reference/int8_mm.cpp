#include "backends/reference/rows.h"
#include "jit/ops/int8_mm_epilogue.h"

namespace kiln::reference {
namespace {

using namespace kiln::int8_mm;

/// The op's definition over a pack of any layout.
void multiply(const Call* call) {
  const Epilogue epilogue = call->epilogue != nullptr ? *call->epilogue : Epilogue{};
  const EpilogueValues values = call->values != nullptr ? *call->values : EpilogueValues{};
  const PackLayout& layout = call->plan->layout;
  const std::int64_t panel_bytes = layout.panel_bytes(call->k);
  const bool a_u8 = epilogue.a_dtype == ADtype::u8;
  const std::int32_t packed_less = epilogue.b_dtype == BDtype::u8 ? 128 : 0;
  for (std::int64_t i = 0; i < call->m; ++i)
    for (std::int64_t j = 0; j < call->n; ++j) {
      const std::int8_t* const panel = call->b + j / layout.n_block * panel_bytes;
      const std::int64_t column = j % layout.n_block;
      std::uint32_t sum = 0, a_sum = 0, b_sum = 0; // unsigned: sums wrap
      for (std::int64_t k = 0; k < call->k; ++k) {
        const std::int8_t a_bits = call->a[i * call->lda + k];
        const std::int32_t a = a_u8 ? std::int32_t{static_cast<std::uint8_t>(a_bits)} : a_bits;
        const std::int32_t b =
            panel[(k / layout.k_block * layout.n_block + column) * layout.k_block + k % layout.k_block] + packed_less;
        sum += static_cast<std::uint32_t>(a * b);
        a_sum += static_cast<std::uint32_t>(a);
        b_sum += static_cast<std::uint32_t>(b);
      }
      finish_reference(epilogue, values, call->k, call->row + i, call->column + j, static_cast<std::int32_t>(sum),
                       static_cast<std::int32_t>(a_sum), static_cast<std::int32_t>(b_sum),
                       static_cast<std::uint8_t*>(call->c) + (i * call->ldc + j) * epilogue.c_bytes());
    }
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
  row.pack_layout = [](const KernelDesc&, const Target&) { return kOwnLayout.id(); };
  row.builtin = reinterpret_cast<const void*>(&multiply);
  row.builtin_plan = plan_for;
  return row;
}

} // namespace kiln::reference
