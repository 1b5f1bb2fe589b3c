#pragma once
#include <cstdint>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "cache/status.h"

namespace kiln::cuda {

using PlanValues = std::vector<std::pair<std::string, std::int64_t>>;

/// Where the blocks of one launch lie: what an op's driver must know of a GPU kernel, apart from the kernel's
/// parameters. Stored with the code object as named integers. Blocks are one-dimensional.
struct LaunchPlan {
  std::int32_t tile_m = 16,
               tile_n = 128;   ///< rows and columns of the output that one block, or one step of it, computes
  std::int32_t split_k = 1;    ///< blocks that share one tile's K
  std::int32_t threads = 128;  ///< of a block
  std::int32_t smem_bytes = 0; ///< dynamic shared memory of a block, up to what the SM has to opt in to
  std::int32_t cluster_x = 0;  ///< blocks of a cluster along x; 0: no cluster
  /// Columns of blocks, for a kernel that strides over the tiles of a row itself; 0: one for each tile_n columns.
  std::int32_t grid_n = 0;
  /// Not 0: a persistent kernel. Its grid is (min(tiles, blocks_per_sm · SMs), 1, 1), with clusters the tiles rounded
  /// up to them and the SMs down, and it finds its tiles from %ctaid.x and %nctaid.x. Tiles are counted as ⌈N/tile_n⌉ ·
  /// ⌈m/tile_m⌉ · batches · split_k.
  std::int32_t blocks_per_sm = 0;

  // Global memory of one call, 256-byte aligned, of any content when the kernel begins, nobody else's until it has
  // ended.
  std::int64_t workspace_fixed = 0;
  std::int64_t workspace_per_row = 0;   ///< times m, rounded up to tile_m
  std::int64_t workspace_per_block = 0; ///< times the blocks of the grid
  /// The first bytes of the workspace that the driver zeroes on the stream before the launch (counters). Costs a second
  /// node on the stream: 0 where the kernel can do without.
  std::int64_t workspace_zeroed = 0;

  /// A second kernel after the first, on the same stream with the same parameters (sums of a split K), when not 0: its
  /// entry is `reduce`, its grid (⌈N/reduce_tile_n⌉, ⌈m/reduce_tile_m⌉, 1), its block reduce_threads.
  std::int32_t reduce_threads = 0, reduce_tile_m = 1, reduce_tile_n = 128;

  struct Grid {
    std::uint32_t x = 1, y = 1, z = 1;
    bool operator==(const Grid&) const = default;
  };
  /// grid = (grid_n, or ⌈N/tile_n⌉; ⌈m/tile_m⌉; batches · split_k), or as blocks_per_sm says; x is rounded up to
  /// clusters. Blocks beyond the tiles must return at once. For m, n, batches > 0.
  Grid grid(std::int64_t m, std::int64_t n, int sm_count, std::int64_t batches = 1) const;
  /// The most rows of one launch, a multiple of tile_m: as many blocks as a grid has along y, or tiles as a persistent
  /// kernel counts in 32 bits.
  std::int64_t most_rows(std::int64_t n) const;
  Grid reduce_grid(std::int64_t m, std::int64_t n) const;
  std::int64_t workspace_bytes(std::int64_t m, std::int64_t n, int sm_count, std::int64_t batches = 1) const;

  void append_to(PlanValues& values) const;
  /// Takes its own values and leaves those of the op. Code::integrity when one is missing, repeated or impossible.
  static Result<LaunchPlan> from(std::span<const std::pair<std::string, std::int64_t>> values);
  bool operator==(const LaunchPlan&) const = default;
};

} // namespace kiln::cuda
