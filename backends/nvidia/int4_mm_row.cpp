#include <algorithm>
#include <bit>

#include <fmt/format.h>

#include "backends/nvidia/int4_mm.h"
#include "backends/nvidia/rows.h"
#include "jit/ops/int4_mm.h"
#include "jit/ops/int4_mm_fragments.h"
#include <nvidia_generator_id.h>

/// int4_mm on mma.sync: which kernel serves a desc, and its launch plan.
namespace kiln::nvidia {
namespace {

using namespace kiln::int4_mm;

/// bf16 mma and cp.async came with sm_80 (PTX ISA, "mma", "cp.async").
constexpr int kFirstSm = 80;
/// Blocks that keep a GPU of this kind busy: the key has the SM's version, not how many there are.
constexpr std::int64_t kManyBlocks = 128;

Status supports(const KernelDesc&, const Target& target) {
  if (target.sm < kFirstSm)
    return Status::error(Code::unsupported, fmt::format("sm_{}: needs sm_{} or later", target.sm, kFirstSm));
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

/// Row tiles that leave enough blocks; where even one is too many, clusters that split K.
int4::SkinnyConfig choose_skinny(const int4::Shape& shape, std::int64_t m, bool clusters) {
  const std::int64_t tiles = (shape.n + 15) / 16, k_blocks = (shape.k + 63) / 64;
  int4::SkinnyConfig config;
  config.token_tiles = m <= 8 ? 1 : 2;
  if (config.token_tiles == 2)
    config.warps = 8; // 16 warps leave 128 registers a thread: too few for the second token tile
  config.row_tiles = static_cast<int>(std::min<std::int64_t>(floor_power_of_two(tiles / kManyBlocks), 4));
  while (config.warps > 4 && config.warps > k_blocks)
    config.warps /= 2;
  while (clusters && config.cluster < 8 && config.blocks(shape) * 2 <= kManyBlocks &&
         2 * config.cluster * config.warps <= k_blocks)
    config.cluster *= 2;
  return config;
}

int4::TileConfig choose_tile(std::int64_t m) {
  int4::TileConfig config;
  if (m != kAny && m <= 32)
    config = {.row_tiles = 2, .token_tiles = 4, .warps_n = 4, .warps_m = 1, .warps_k = 2};
  else if (m != kAny && m <= 64)
    config = {.row_tiles = 2, .token_tiles = 8, .warps_n = 4, .warps_m = 1, .warps_k = 2};
  return config;
}

Result<CodeObject> compile(const KernelDesc& desc, const Target& target, std::string_view pack_layout) {
  const int4::Shape shape = shape_of(desc);
  const ptx::Sm sm = {.number = target.sm, .architecture_specific = target.sm >= 90};
  const std::int64_t m = desc.value[kM];
  cuda::LaunchPlan launch;
  Result<std::string> text = Status::error(Code::internal, "no kernel");
  if (m != kAny && m <= 16) {
    const int4::SkinnyConfig config = choose_skinny(shape, m, target.sm >= 90);
    launch.tile_m = static_cast<std::int32_t>(config.tokens());
    launch.tile_n = 16 * config.row_tiles;
    launch.grid_n = static_cast<std::int32_t>(config.blocks(shape));
    launch.cluster_x = config.cluster > 1 ? config.cluster : 0;
    launch.threads = config.threads();
    launch.smem_bytes = static_cast<std::int32_t>(config.shared_bytes());
    text = int4::emit_skinny(sm, shape, config);
  } else {
    const int4::TileConfig config = choose_tile(m);
    launch.tile_m = static_cast<std::int32_t>(config.tokens());
    launch.tile_n = static_cast<std::int32_t>(config.rows());
    launch.grid_n = static_cast<std::int32_t>((shape.n + config.rows() - 1) / config.rows() * config.cluster);
    launch.cluster_x = config.cluster > 1 ? config.cluster : 0;
    launch.threads = config.threads();
    launch.smem_bytes = static_cast<std::int32_t>(config.shared_bytes(shape));
    text = int4::emit_tile(sm, shape, config);
  }
  if (!text)
    return text.status();
  CodeObject code;
  code.format = CodeFormat::ptx;
  code.arch = Arch::nvptx;
  code.sm = target.sm;
  code.image.assign(text->begin(), text->end());
  code.entries = {{"main", 0}};
  code.plan = Plan{.layout = find_pack_layout(pack_layout), .launch = launch}.values();
  return code;
}

} // namespace

Implementation int4_mm_mma_sync() {
  Implementation row;
  row.op = OpId::int4_mm;
  row.isa = IsaPath::mma_sync;
  row.backend = BackendId::nvidia;
  row.generator = GeneratorId::ptx;
  row.generator_digest = k_nvidia_generator_digest;
  row.device = DeviceKind::cuda;
  row.arch = Arch::nvptx;
  row.supports = supports;
  row.pack_layout = [](const KernelDesc&, const Target&) { return std::string(FragmentLayout::kId); };
  row.compile = compile;
  return row;
}

} // namespace kiln::nvidia
