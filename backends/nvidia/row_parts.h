#pragma once
#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include "backends/nvidia/ptx.h"
#include "jit/code_object.h"
#include "jit/cuda/launch_plan.h"
#include "jit/implementation.h"

/// What the rows of this backend share.
namespace kiln::nvidia {

/// Blocks that keep a GPU of this kind busy: the key has the SM's version, not how many there are.
inline constexpr std::int64_t kManyBlocks = 128;

/// Of mma.sync with bf16 and s8, and of cp.async. Code::unsupported names what is needed.
Status check_mma_sync(const Target& target);
/// Of wgmma.
Status check_wgmma(const Target& target);

ptx::Sm sm_of(const Target& target);

/// Blocks of config.threads(), each for tile_m × tile_n of the output; `config.cluster` of them share one and split K.
template <class Config>
cuda::LaunchPlan clustered_launch(const Config& config, std::int64_t tile_m, std::int64_t tile_n, std::int64_t grid_n,
                                  std::int64_t shared_bytes) {
  cuda::LaunchPlan launch;
  launch.tile_m = static_cast<std::int32_t>(tile_m);
  launch.tile_n = static_cast<std::int32_t>(tile_n);
  launch.grid_n = static_cast<std::int32_t>(grid_n);
  launch.cluster_x = config.cluster > 1 ? config.cluster : 0;
  launch.threads = config.threads();
  launch.smem_bytes = static_cast<std::int32_t>(shared_bytes);
  return launch;
}
/// Of n columns of the output, as many such blocks as cover them.
template <class Config>
cuda::LaunchPlan tiled_launch(const Config& config, std::int64_t tile_m, std::int64_t tile_n, std::int64_t n,
                              std::int64_t shared_bytes) {
  return clustered_launch(config, tile_m, tile_n, (n + tile_n - 1) / tile_n * config.cluster, shared_bytes);
}

/// The kernel `main` of a text.
CodeObject ptx_object(const std::string& text, const Target& target,
                      std::vector<std::pair<std::string, std::int64_t>> plan);

/// Without what is the op's own.
Implementation row_of(OpId op, IsaPath isa);

} // namespace kiln::nvidia
