#include "backends/nvidia/row_parts.h"

#include <fmt/format.h>

#include <nvidia_generator_id.h>

namespace kiln::nvidia {
namespace {

/// bf16 and s8 mma, and cp.async, came with sm_80 (PTX ISA, "mma", "cp.async").
constexpr int kFirstSm = 80;
/// wgmma is in this architecture alone (PTX ISA, "wgmma.mma_async").
constexpr int kWgmmaSm = 90;

} // namespace

Status check_mma_sync(const Target& target) {
  if (target.sm < kFirstSm)
    return Status::error(Code::unsupported, fmt::format("sm_{}: needs sm_{} or later", target.sm, kFirstSm));
  return {};
}

Status check_wgmma(const Target& target) {
  if (target.sm != kWgmmaSm)
    return Status::error(Code::unsupported, fmt::format("sm_{}: needs sm_{}a", target.sm, kWgmmaSm));
  return {};
}

ptx::Sm sm_of(const Target& target) {
  return {.number = target.sm, .architecture_specific = target.sm >= kFirstArchSpecificSm};
}

CodeObject ptx_object(const std::string& text, const Target& target,
                      std::vector<std::pair<std::string, std::int64_t>> plan) {
  CodeObject code;
  code.format = CodeFormat::ptx;
  code.arch = Arch::nvptx;
  code.sm = target.sm;
  code.image.assign(text.begin(), text.end());
  code.entries = {{"main", 0}};
  code.plan = std::move(plan);
  return code;
}

Implementation row_of(OpId op, IsaPath isa) {
  Implementation row;
  row.op = op;
  row.isa = isa;
  row.backend = BackendId::nvidia;
  row.generator = GeneratorId::ptx;
  row.generator_digest = k_nvidia_generator_digest;
  row.device = DeviceKind::cuda;
  row.arch = Arch::nvptx;
  return row;
}

} // namespace kiln::nvidia
