#include "jit/ops/int4_mm.h"
#include "backends/reference/rows.h"
#include "jit/bf16.h"

namespace kiln::reference {
namespace {

using namespace kiln::int4_mm;

/// The op's definition over the plain layout, which is the weights as they come. Allocates nothing: it runs on threads
/// that cannot tell of a failure.
void multiply(const Call* call) {
  const auto* const sz = reinterpret_cast<const std::uint16_t*>(call->sz);
  for (std::int64_t i = 0; i < call->m; ++i)
    for (std::int64_t j = call->n_begin; j < call->n_end; ++j) {
      double sum = 0;
      for (std::int64_t g = 0; g < call->k / call->group; ++g) {
        const std::uint16_t* const scale_zero = sz + (g * call->n + j) * 2;
        const double scale = float_of_bf16(scale_zero[0]), zero = float_of_bf16(scale_zero[1]);
        for (std::int64_t p = g * call->group; p < (g + 1) * call->group; ++p)
          sum += ((plain_q(call->w, call->k, j, p) - 8) * scale + zero) * float_of_bf16(call->x[i * call->ldx + p]);
      }
      call->y[i * call->ldy + j] = bf16_of_double(sum);
    }
}

} // namespace

Implementation int4_mm() {
  Implementation row;
  row.op = OpId::int4_mm;
  row.isa = IsaPath::reference;
  row.backend = BackendId::reference;
  row.generator = GeneratorId::none;
  row.any_arch = true;
  row.pack_layout = [](const KernelDesc&, const Target&) { return std::string("plain"); };
  row.builtin = reinterpret_cast<const void*>(&multiply);
  row.builtin_plan = [](const KernelDesc&, std::string_view) {
    return Plan{.layout = find_pack_layout("plain"), .launch = {}}.values();
  };
  return row;
}

} // namespace kiln::reference
