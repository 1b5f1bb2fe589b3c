#include <algorithm>
#include <bit>
#include <variant>
#include <vector>

#include <fmt/format.h>

#include "backends/nvidia/int4_mm.h"
#include "backends/nvidia/row_parts.h"
#include "backends/nvidia/rows.h"
#include "jit/ops/int4_mm.h"
#include "jit/ops/int4_mm_fragments.h"

/// int4_mm on mma.sync and wgmma: which kernel serves a desc, and its launch plan. What stands here as a constant was
/// measured on an H200 (scripts/gpu-verify).
namespace kiln::nvidia {
namespace {

using namespace kiln::int4_mm;

/// An H200 has room for 30 clusters of four blocks at once, each block an SM's.
constexpr std::int64_t kManyClustersOfFour = 28;
/// Below so many columns a row's roundings of weights may not average out to what OPS.md allows; likewise few tokens a
/// column's.
constexpr std::int64_t kManyColumns = 512, kManyTokens = 64;

Status supports_mma_sync(const KernelDesc&, const Target& target) {
  return check_mma_sync(target);
}
/// Few tokens need no tiles, and a row whose bits do not depend on the others has one way for all.
bool takes_skinny(const KernelDesc& desc) {
  return desc.value[kBatchInvariant] != 0 || (desc.value[kM] != kAny && desc.value[kM] <= 16);
}
/// 17 to 64 tokens: enough for products to matter, too few for a weight's roundings to average out. From 9 on where
/// rows are too many for one round of the blocks of few tokens.
bool takes_grouped(const KernelDesc& desc) {
  if (desc.value[kBatchInvariant] != 0)
    return false;
  return desc.value[kM] == 32 || desc.value[kM] == 64 || (desc.value[kM] == 16 && desc.value[kN] > 64 * kManyBlocks);
}
Status supports_wgmma(const KernelDesc& desc, const Target& target) {
  if (Status s = check_wgmma(target); !s)
    return s;
  if (takes_skinny(desc) && !takes_grouped(desc))
    return Status::error(Code::unsupported, "few tokens, or batch_invariant=1: mma_sync serves them");
  return {};
}

/// The desc's shape; of an empty one, whose kernel is never launched, the smallest that there is a kernel for.
int4::Shape shape_of(const KernelDesc& desc) {
  const std::int64_t group = group_of(desc);
  return {std::max<std::int64_t>(desc.value[kN], 8), std::max(desc.value[kK], group), group};
}

std::int64_t floor_power_of_two(std::int64_t value) {
  return static_cast<std::int64_t>(std::bit_floor(static_cast<std::uint64_t>(std::max<std::int64_t>(value, 1))));
}
std::int64_t k_blocks(const int4::Shape& shape) {
  return (shape.k + 63) / 64;
}

/// Row tiles that leave enough blocks; where even one is too many, clusters that split K.
int4::SkinnyConfig choose_skinny(const int4::Shape& shape, std::int64_t m, bool clusters) {
  const std::int64_t tiles = (shape.n + 15) / 16;
  int4::SkinnyConfig config;
  config.token_tiles = m != kAny && m <= 8 ? 1 : 2;
  if (config.token_tiles == 2) { // 16 warps leave 128 registers a thread: too few for the second token tile
    config.warps = 8;
    config.depth = shape.group == 32 ? 1 : 2; // two scales a K block take the registers of the second step
  }
  const int most = shape.group == 32 && config.token_tiles == 2 ? 2 : 4;
  config.row_tiles = static_cast<int>(std::min<std::int64_t>(floor_power_of_two(tiles / kManyBlocks), most));
  // 14336 rows: seven row tiles a block fill the GPU once, four would twice, the second time by half.
  if (config.token_tiles == 1 && shape.group != 32 && tiles > 4 * kManyBlocks && tiles <= 7 * kManyBlocks)
    config.row_tiles = static_cast<int>((tiles + kManyBlocks - 1) / kManyBlocks);
  while (config.warps > 4 && config.warps > k_blocks(shape))
    config.warps /= 2;
  if (config.row_tiles > 4)
    config.warps = std::min(config.warps, 8);
  while (clusters && config.cluster < 8 && config.blocks(shape) * 2 <= kManyBlocks &&
         2 * config.cluster * config.warps <= k_blocks(shape))
    config.cluster *= 2;
  // A deep K: half the blocks along the rows, each with half of K, read half the tokens in all.
  while (clusters && config.cluster < 4 && config.row_tiles <= 2 && 2 * config.row_tiles <= most &&
         config.cluster * config.warps * 8 <= k_blocks(shape)) {
    config.row_tiles *= 2;
    config.cluster *= 2;
  }
  return config;
}

/// Operands of a weight: roundings of weights average out over many tokens and columns only (OPS.md, accuracy).
int operands_for(const int4::Shape& shape, std::int64_t m) {
  if (shape.n < kManyColumns)
    return 3;
  return m != kAny && m <= kManyTokens ? 2 : 1;
}

int4::TileConfig choose_mma_sync(const int4::Shape& shape, std::int64_t m, const Target& target) {
  int4::TileConfig config = {
      .row_tiles = 2, .token_tiles = 8, .warps_n = 4, .warps_m = 1, .stages = 3, .blocks_per_sm = 2};
  config.operands = operands_for(shape, m);
  if (m != kAny && m <= 32)
    config.token_tiles = 4;
  if (m != kAny && m <= 64) {
    config.warps_k = 2;
    config.blocks_per_sm = 1;
    const std::int64_t blocks = (shape.n + config.rows() - 1) / config.rows();
    if (target.sm >= 90 && 2 * blocks <= kManyBlocks && k_blocks(shape) >= 16)
      config.cluster = 2;
  }
  return config;
}

/// More than 64 tokens.
int4::TileConfig choose_wgmma(const int4::Shape& shape, std::int64_t m) {
  int4::TileConfig config = {.row_tiles = 1, .warps_n = 8, .warps_m = 1, .stages = 6, .wgmma = true};
  config.operands = operands_for(shape, m);
  const auto count = [&] { return (shape.n + config.rows() - 1) / config.rows(); };
  const std::int64_t blocks = count();
  if (m == kAny) {
    config.token_tiles = config.operands > 1 ? 16 : 32;
    config.stages = 5;
    // Where one tile of tokens leaves half the GPU idle, and K is deep enough to pay for the sum.
    config.cluster = 2 * blocks <= kManyBlocks && shape.k >= 4096 ? 2 : 1;
    return config;
  }
  config.token_tiles = static_cast<int>((m + 7) / 8);
  if (4 * blocks <=
      kManyBlocks) // lower blocks rather than clusters of four, of which fewer fit than the GPU has room for
    config.warps_n = 4;
  while (config.cluster < 4 && 2 * count() * config.cluster <= kManyBlocks / config.cluster &&
         32 * config.cluster <= k_blocks(shape))
    config.cluster *= 2;
  return config;
}

/// As many stages as fit, for whole turns of the groups; fewer groups where they would be too few.
int4::GroupedConfig with_stages(int4::GroupedConfig config, const int4::Shape& shape) {
  const auto fitting = [&] {
    const std::int64_t stages =
        std::min((kBlockSharedBytes - config.fixed_bytes()) / config.stage_bytes(shape), std::int64_t{kMaxStages});
    return static_cast<int>(stages / config.warps_k * config.warps_k);
  };
  while (config.warps_k > 1 && fitting() < 3 * config.warps_k) // copies come late with fewer
    config.warps_k /= 2;
  config.stages = fitting();
  return config;
}

/// Sixteen warps. Blocks as high as leave enough of them: each reads its tokens anew. The rest of the warps, and a
/// cluster of two, of which as many fit as the GPU has room for, split K.
int4::GroupedConfig choose_grouped(const int4::Shape& shape, std::int64_t m) {
  int4::GroupedConfig config = {.token_tiles = static_cast<int>(m / 8), .warps_n = 16, .warps_k = 1};
  const std::int64_t steps = shape.k / std::max<std::int64_t>(shape.group, 64);
  const auto count = [&] { return (shape.n + config.rows() - 1) / config.rows(); };
  while (config.warps_n > 4 && 2 * count() < kManyBlocks * 3 / 4) {
    config.warps_n /= 2;
    config.warps_k *= 2;
  }
  while (config.cluster < 4 && 2 * count() * config.cluster <= kManyBlocks &&
         (config.cluster == 1 || count() <= kManyClustersOfFour) && 2 * config.cluster * config.warps_k <= steps)
    config.cluster *= 2;
  return with_stages(config, shape);
}

/// What one kernel on wgmma is made of.
using Wgmma = std::variant<int4::TmaConfig, int4::TileConfig, int4::GroupedConfig>;
std::string text_of(const Wgmma& config) {
  return std::visit([](const auto& c) { return c.text(); }, config);
}

/// The one taken without timing, then what may be faster.
std::vector<Wgmma> wgmma_configs(const KernelDesc& desc) {
  const int4::Shape shape = shape_of(desc);
  const std::int64_t m = desc.value[kM];
  std::vector<Wgmma> all;
  const auto add = [&](const Wgmma& config) {
    const auto is_it = [&](const Wgmma& other) { return text_of(other) == text_of(config); };
    if (std::none_of(all.begin(), all.end(), is_it))
      all.push_back(config);
  };
  if (!takes_grouped(desc)) {
    const int operands = operands_for(shape, m);
    for (const int4::TmaConfig& config : int4::candidates(shape, m, operands))
      add(config);
    if (operands == 1)
      add(choose_wgmma(shape, m));
    return all;
  }
  const int4::GroupedConfig chosen = choose_grouped(shape, m);
  add(chosen);
  for (const int warps_n : {16, 8, 4})
    for (const int warps_k : {16 / warps_n, 8 / warps_n})
      for (const int cluster : {1, 2, 4}) {
        const std::int64_t blocks = (shape.n + 16 * warps_n - 1) / (16 * warps_n);
        if (warps_k == 0 || blocks * cluster > 2 * kManyBlocks ||
            cluster * warps_k > std::max<std::int64_t>(1, shape.k / std::max<std::int64_t>(shape.group, 64)))
          continue;
        const int4::GroupedConfig config = with_stages(
            {.token_tiles = chosen.token_tiles, .warps_n = warps_n, .warps_k = warps_k, .cluster = cluster}, shape);
        if (config.stages >= (config.turns_in_use() + 1) * config.warps_k &&
            config.shared_bytes(shape) <= kBlockSharedBytes)
          add(config);
      }
  return all;
}

Result<CodeObject> code_object(Result<std::string> text, const cuda::LaunchPlan& launch, const Target& target,
                               std::string_view pack_layout) {
  if (!text)
    return text.status();
  return ptx_object(*text, target, Plan{.layout = find_pack_layout(pack_layout), .launch = launch}.values());
}

Result<CodeObject> compile_tile(const int4::Shape& shape, const int4::TileConfig& config, const Target& target,
                                std::string_view pack_layout) {
  return code_object(int4::emit_tile(sm_of(target), shape, config),
                     tiled_launch(config, config.tokens(), config.rows(), shape.n, config.shared_bytes(shape)), target,
                     pack_layout);
}

Result<CodeObject> compile_tma(const int4::Shape& shape, const int4::TmaConfig& config, const Target& target,
                               std::string_view pack_layout) {
  const Result<int4::Emitted> made = int4::emit_tma(sm_of(target), shape, config);
  if (!made)
    return made.status();
  const Plan plan = {.layout = find_pack_layout(pack_layout),
                     .launch = made->launch,
                     .boxes = Boxes{.x = made->x_box, .y = made->y_box}};
  return ptx_object(made->text, target, plan.values());
}
Result<CodeObject> compile_grouped(const int4::Shape& shape, const int4::GroupedConfig& config, const Target& target,
                                   std::string_view pack_layout) {
  return code_object(int4::emit_grouped(sm_of(target), shape, config),
                     tiled_launch(config, config.tokens(), config.rows(), shape.n, config.shared_bytes(shape)), target,
                     pack_layout);
}
Result<CodeObject> compile_config(const KernelDesc& desc, const Wgmma& config, const Target& target,
                                  std::string_view pack_layout) {
  struct Compile {
    int4::Shape shape;
    const Target& target;
    std::string_view layout;
    Result<CodeObject> operator()(const int4::TmaConfig& c) const { return compile_tma(shape, c, target, layout); }
    Result<CodeObject> operator()(const int4::TileConfig& c) const { return compile_tile(shape, c, target, layout); }
    Result<CodeObject> operator()(const int4::GroupedConfig& c) const {
      return compile_grouped(shape, c, target, layout);
    }
  };
  Result<CodeObject> code = std::visit(Compile{shape_of(desc), target, pack_layout}, config);
  if (code)
    code->configuration = text_of(config);
  return code;
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
                       fmt::format("int4_mm: '{}' is no configuration for {}", configuration, desc.text()));
}

Result<CodeObject> compile_mma_sync(const KernelDesc& desc, const Target& target, std::string_view pack_layout) {
  const int4::Shape shape = shape_of(desc);
  if (!takes_skinny(desc))
    return compile_tile(shape, choose_mma_sync(shape, desc.value[kM], target), target, pack_layout);
  const int4::SkinnyConfig config = choose_skinny(shape, desc.value[kM], target.sm >= 90);
  return code_object(
      int4::emit_skinny(sm_of(target), shape, config),
      clustered_launch(config, config.tokens(), 16 * config.row_tiles, config.blocks(shape), config.shared_bytes()),
      target, pack_layout);
}

Implementation row_of(IsaPath isa) {
  Implementation row = nvidia::row_of(OpId::int4_mm, isa);
  row.pack_layout = [](const KernelDesc&, const Target&) { return std::string(FragmentLayout::kId); };
  return row;
}

} // namespace

Implementation int4_mm_wgmma() {
  Implementation row = row_of(IsaPath::wgmma);
  row.supports = supports_wgmma;
  row.compile = compile_wgmma;
  row.configurations = configurations;
  row.compile_configured = compile_configured;
  return row;
}

Implementation int4_mm_mma_sync() {
  Implementation row = row_of(IsaPath::mma_sync);
  row.supports = supports_mma_sync;
  row.compile = compile_mma_sync;
  return row;
}

} // namespace kiln::nvidia
