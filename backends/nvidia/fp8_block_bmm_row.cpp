#include <algorithm>

#include <fmt/format.h>

#include "backends/nvidia/fp8_block_bmm.h"
#include "backends/nvidia/row_parts.h"
#include "backends/nvidia/rows.h"

/// fp8_block_bmm on wgmma: the op's desc and what its emitters make.
namespace kiln::nvidia {
namespace {

using namespace kiln::fp8_block_bmm;

Status supports(const KernelDesc&, const Target& target) {
  return check_wgmma(target);
}

/// The desc's; of an empty one, whose kernel is never launched, the smallest that there is a kernel for.
fp8::Shape shape_of(const KernelDesc& desc) {
  return {.b = std::max<std::int64_t>(desc.value[kB], 1),
          .n = std::max<std::int64_t>(desc.value[kN], 8),
          .k = std::max<std::int64_t>(desc.value[kK], 16),
          .x_e5m2 = x_of(desc) == Float8::e5m2,
          .y_e5m2 = y_of(desc) == Float8::e5m2,
          .z = z_of(desc)};
}
bool is_batch_invariant(const KernelDesc& desc) {
  return desc.value[kBatchInvariant] != 0;
}

Result<CodeObject> compile_config(const KernelDesc& desc, const Target& target, const fp8::Config& config) {
  const Result<fp8::Emitted> made = fp8::emit(sm_of(target), shape_of(desc), config);
  if (!made)
    return made.status();
  CodeObject code =
      ptx_object(made->text, target, Plan{.gpu = Plan::Gpu{.launch = made->launch, .boxes = made->boxes}}.values());
  code.configuration = config.text();
  return code;
}

Result<CodeObject> compile(const KernelDesc& desc, const Target& target, std::string_view) {
  return compile_config(desc, target, fp8::choose(shape_of(desc), desc.value[kM], is_batch_invariant(desc)));
}

std::vector<std::string> configurations(const KernelDesc& desc, const Target&) {
  std::vector<std::string> texts;
  for (const fp8::Config& config : fp8::candidates(shape_of(desc), desc.value[kM], is_batch_invariant(desc)))
    texts.push_back(config.text());
  return texts;
}

Result<CodeObject> compile_configured(const KernelDesc& desc, const Target& target, std::string_view,
                                      std::string_view configuration) {
  const std::optional<fp8::Config> config = fp8::Config::parse(configuration);
  if (!config)
    return Status::error(Code::invalid_argument, fmt::format("fp8_block_bmm: '{}' is no configuration", configuration));
  if (Status s = fp8::check(shape_of(desc), desc.value[kM], is_batch_invariant(desc), *config); !s)
    return s;
  return compile_config(desc, target, *config);
}

} // namespace

Implementation fp8_block_bmm_wgmma() {
  Implementation row = row_of(OpId::fp8_block_bmm, IsaPath::wgmma);
  row.supports = supports;
  row.compile = compile;
  row.configurations = configurations;
  row.compile_configured = compile_configured;
  return row;
}

} // namespace kiln::nvidia
