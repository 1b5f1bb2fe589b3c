#include <algorithm>
#include <variant>
#include <vector>

#include <fmt/format.h>

#include "backends/nvidia/int8_mm.h"
#include "backends/nvidia/row_parts.h"
#include "backends/nvidia/rows.h"
#include "jit/ops/int8_mm.h"

/// int8_mm on mma.sync and wgmma: which kernel serves a desc, and its launch plan.
namespace kiln::nvidia {
namespace {

using namespace kiln::int8_mm;

/// K that one step of a group of warps takes.
constexpr std::int64_t kBlockK = 128;

Status supports_fields(const KernelDesc& desc) {
  KernelDesc without_scale = desc;
  without_scale.value[kRescale] = static_cast<std::int64_t>(Rescale::none);
  without_scale.value[kCDtype] = static_cast<std::int64_t>(CDtype::s32);
  if (Status s = check_plain(without_scale, INT64_MAX); !s)
    return s;
  const auto c_dtype = static_cast<CDtype>(desc.value[kCDtype]);
  const auto rescale = static_cast<Rescale>(desc.value[kRescale]);
  const bool scaled = desc.value[kRescale] == static_cast<std::int64_t>(Rescale::scale);
  if ((!scaled && (rescale != Rescale::none || c_dtype != CDtype::s32)) ||
      (scaled && c_dtype != CDtype::s8 && c_dtype != CDtype::bf16))
    return Status::error(Code::unsupported, "c_dtype and rescale: allowed on GPUs is c_dtype=s32 without rescale, or "
                                            "c_dtype=s8 or bf16 with rescale=scale");
  return {};
}

Status supports_mma_sync(const KernelDesc& desc, const Target& target) {
  if (Status s = check_mma_sync(target); !s)
    return s;
  return supports_fields(desc);
}
Status supports_wgmma(const KernelDesc& desc, const Target& target) {
  if (Status s = check_wgmma(target); !s)
    return s;
  if (desc.value[kK] == 0)
    return Status::error(Code::unsupported, "k=0 has no tensor map: mma_sync serves it");
  return supports_fields(desc);
}

int8::Shape shape_of(const KernelDesc& desc) {
  const auto c_dtype = static_cast<CDtype>(desc.value[kCDtype]);
  return {.n = std::max<std::int64_t>(desc.value[kN], 1),
          .k = desc.value[kK],
          .output = c_dtype == CDtype::s32  ? int8::Output::s32
                    : c_dtype == CDtype::s8 ? int8::Output::s8
                                            : int8::Output::bf16,
          .scaled = desc.value[kRescale] == static_cast<std::int64_t>(Rescale::scale),
          .scale_per_channel = desc.value[kRescalePer] == static_cast<std::int64_t>(RescalePer::channel)};
}

/// Blocks of a cluster that split K, where tiles alone leave few blocks.
int cluster_for(const int8::Shape& shape, const int8::TileConfig& config) {
  const std::int64_t blocks = (shape.n + config.columns() - 1) / config.columns();
  // Each block of a cluster stores as many of a warp's fragments.
  const auto divides = [&](int cluster) { return config.column_tiles * config.row_tiles % cluster == 0; };
  int cluster = 1;
  while (cluster < 4 && divides(2 * cluster) && 2 * blocks * cluster <= kManyBlocks &&
         2 * cluster * config.warps_k * kBlockK <= shape.k)
    cluster *= 2;
  return cluster;
}

/// Tiles as high as the class of m.
int8::TileConfig choose_mma_sync(const int8::Shape& shape, std::int64_t m, const Target& target) {
  int8::TileConfig config = {.column_tiles = 4, .row_tiles = 8, .warps_n = 2, .warps_m = 2, .stages = 3};
  if (target.sm < 90) { // the same tile by twice the warps: ptxas for sm_80 spills otherwise
    config.row_tiles = 4;
    config.warps_m = 4;
  }
  if (m == kAny || m > 64)
    return config;
  config = {.column_tiles = 2,
            .row_tiles = static_cast<int>((m + 7) / 8),
            .warps_n = 2,
            .warps_m = 1,
            .warps_k = 4,
            .stages = 2};
  if (m == 64) {
    config.warps_k = 2;
    if (target.sm < 90) { // as above
      config.column_tiles = 1;
      config.warps_n = 4;
    }
  }
  if (target.sm >= 90)
    config.cluster = cluster_for(shape, config);
  return config;
}

int8::TileConfig choose_tile(const int8::Shape& shape, std::int64_t m) {
  int8::TileConfig config = {
      .column_tiles = 1, .row_tiles = 32, .warps_n = 8, .warps_m = 1, .stages = 4, .wgmma = true};
  if (m == kAny || m > 64)
    return config;
  config.row_tiles = static_cast<int>((m + 7) / 8);
  config.warps_n = 4;
  config.stages = 8;
  config.cluster = cluster_for(shape, config);
  return config;
}

/// A plan without its launch.
Result<Plan> plan_for(std::string_view pack_layout) {
  const Result<PackLayout> layout = PackLayout::parse(pack_layout);
  if (!layout)
    return layout.status();
  Plan plan;
  plan.layout = *layout;
  return plan;
}
Result<CodeObject> compile_tile(const int8::Shape& shape, const int8::TileConfig& config, const Target& target,
                                std::string_view pack_layout) {
  const Result<std::string> text = int8::emit_tile(sm_of(target), shape, config);
  if (!text)
    return text.status();
  Result<Plan> plan = plan_for(pack_layout);
  if (!plan)
    return plan.status();
  plan->launch = tiled_launch(config, config.rows(), config.columns(), shape.n, config.shared_bytes());
  return ptx_object(*text, target, plan->values());
}
Result<CodeObject> compile_tma(const int8::Shape& shape, const int8::TmaConfig& config, const Target& target,
                               std::string_view pack_layout) {
  const Result<int8::Emitted> made = int8::emit_tma(sm_of(target), shape, config);
  if (!made)
    return made.status();
  Result<Plan> plan = plan_for(pack_layout);
  if (!plan)
    return plan.status();
  plan->launch = made->launch;
  plan->boxes = Boxes{.a = made->a_box, .b = made->b_box};
  return ptx_object(made->text, target, plan->values());
}

/// What one kernel on wgmma is made of.
using Wgmma = std::variant<int8::TmaConfig, int8::TileConfig>;
std::string text_of(const Wgmma& config) {
  return std::visit([](const auto& c) { return c.text(); }, config);
}
/// The one taken without timing, then what may be faster.
std::vector<Wgmma> wgmma_configs(const KernelDesc& desc) {
  const int8::Shape shape = shape_of(desc);
  std::vector<Wgmma> all;
  for (const int8::TmaConfig& config : int8::candidates(shape, desc.value[kM]))
    all.push_back(config);
  all.push_back(choose_tile(shape, desc.value[kM]));
  return all;
}
Result<CodeObject> compile_config(const KernelDesc& desc, const Wgmma& config, const Target& target,
                                  std::string_view pack_layout) {
  const int8::Shape shape = shape_of(desc);
  const auto* const tma = std::get_if<int8::TmaConfig>(&config);
  Result<CodeObject> code = tma != nullptr
                                ? compile_tma(shape, *tma, target, pack_layout)
                                : compile_tile(shape, std::get<int8::TileConfig>(config), target, pack_layout);
  if (code)
    code->configuration = text_of(config);
  return code;
}

Result<CodeObject> compile_mma_sync(const KernelDesc& desc, const Target& target, std::string_view pack_layout) {
  const int8::Shape shape = shape_of(desc);
  return compile_tile(shape, choose_mma_sync(shape, desc.value[kM], target), target, pack_layout);
}
Result<CodeObject> compile_wgmma(const KernelDesc& desc, const Target& target, std::string_view pack_layout) {
  return compile_config(desc, wgmma_configs(desc).front(), target, pack_layout);
}
std::vector<std::string> configurations(const KernelDesc& desc, const Target&) {
  std::vector<std::string> texts;
  for (const Wgmma& config : wgmma_configs(desc))
    texts.push_back(text_of(config));
  return texts;
}
Result<CodeObject> compile_configured(const KernelDesc& desc, const Target& target, std::string_view pack_layout,
                                      std::string_view configuration) {
  for (const Wgmma& config : wgmma_configs(desc))
    if (text_of(config) == configuration)
      return compile_config(desc, config, target, pack_layout);
  return Status::error(Code::invalid_argument,
                       fmt::format("int8_mm: '{}' is no configuration for {}", configuration, desc.text()));
}

Implementation row_of(IsaPath isa) {
  Implementation row = nvidia::row_of(OpId::int8_mm, isa);
  row.pack_layout = [](const KernelDesc&, const Target&) { return kGpuLayout.id(); };
  return row;
}

} // namespace

Implementation int8_mm_wgmma() {
  Implementation row = row_of(IsaPath::wgmma);
  row.supports = supports_wgmma;
  row.compile = compile_wgmma;
  row.configurations = configurations;
  row.compile_configured = compile_configured;
  return row;
}

Implementation int8_mm_mma_sync() {
  Implementation row = row_of(IsaPath::mma_sync);
  row.supports = supports_mma_sync;
  row.compile = compile_mma_sync;
  return row;
}

} // namespace kiln::nvidia
