#include "jit/ops/attention.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <limits>

#include "backends/reference/rows.h"
#include "jit/bf16.h"

namespace kiln::reference {
namespace {

using namespace kiln::attention;

constexpr std::size_t kMaxHeadSize = 256;

/// The op's definition, row by row in float64; each output is rounded once.
void attend(const Call* call) {
  constexpr double kLog2E = 1.44269504088896341;
  std::array<double, kMaxHeadSize> o;
  for (std::int64_t row = call->row_begin; row < call->row_end; ++row) {
    const std::int64_t head = row % call->group, query = row / call->group;
    const std::int64_t visible = std::clamp<std::int64_t>(call->visible + query * call->visible_step, 0, call->key_end);
    const double lse =
        reference_row(call->q + head * call->q_head_stride + query * call->q_row_stride, call->k, call->k_row_stride,
                      call->v, call->v_row_stride, visible, call->d, call->dv, call->scale_log2e / kLog2E, o.data());
    std::uint16_t* const out = call->o + head * call->o_head_stride + query * call->o_row_stride;
    for (std::int64_t i = 0; i < call->dv; ++i)
      out[i] = bf16_of_double(o[static_cast<std::size_t>(i)]);
    if (call->stats != nullptr) {
      float* const stats = call->stats + (row - call->row_begin) * 2;
      stats[0] = static_cast<float>(lse * kLog2E);
      stats[1] = visible > 0 ? 1.0f : 0.0f;
    }
  }
}

} // namespace

Implementation attention() {
  Implementation row;
  row.op = OpId::attention;
  row.isa = IsaPath::reference;
  row.backend = BackendId::reference;
  row.generator = GeneratorId::none;
  row.any_arch = true;
  row.builtin = reinterpret_cast<const void*>(&attend);
  row.builtin_plan = [](const KernelDesc&, std::string_view) { return Plan{.makes_partials = false}.values(); };
  return row;
}

} // namespace kiln::reference
