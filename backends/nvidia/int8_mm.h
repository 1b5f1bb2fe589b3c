#pragma once
#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "backends/nvidia/persistent_tile.h"
#include "backends/nvidia/ptx.h"
#include "cache/status.h"
#include "jit/cuda/launch_plan.h"
#include "jit/cuda/tensor_map.h"

/// int8_mm on the tensor cores' mma.sync: C[M,N] = A[M,K] · B[N,K]ᵀ, s8 × s8, s32 sums that wrap.
namespace kiln::nvidia::int8 {

enum class Output : std::uint8_t { s32, s8, bf16 };

struct Shape {
  std::int64_t n = 0, k = 0;
  Output output = Output::s32; ///< s8 and bf16 come with the stage `scale`
  bool scaled = false, scale_per_channel = false;
};

/// A block computes a tile of columns of C (rows of B: the 16-row operand) × rows of C (the 8-column one). 128 k of
/// both go through a ring in shared memory by cp.async, whose byte counts zero what lies beyond M, N and K. `warps_k`
/// groups of warps, and the blocks of a cluster, take turns along K and add up at the end: exact in any order. With
/// `wgmma` (sm_90a), warpgroups of four warps along the columns multiply all rows of the tile: column_tiles, warps_m
/// and warps_k are 1, warps_n a multiple of 4.
struct TileConfig {
  int column_tiles = 4, row_tiles = 8;       ///< of 16 and 8, per warp
  int warps_n = 2, warps_m = 4, warps_k = 1; ///< of the block: along columns, rows, K
  int cluster = 1;                           ///< blocks that share a tile and split K; above 1 from sm_90 on
  int stages = 4;                            ///< at least 2, with wgmma 3
  bool wgmma = false;

  std::string text() const; ///< `c4r8n2m4k1c1s4`, with a `g` behind for wgmma
  std::int64_t columns() const { return 16 * column_tiles * warps_n; }
  std::int64_t rows() const { return 8 * row_tiles * warps_m; }
  std::int64_t shared_bytes() const;
  int threads() const { return 32 * warps_n * warps_m * warps_k; }
};
Result<std::string> emit_tile(ptx::Sm sm, const Shape& shape, const TileConfig& config);

/// On Hopper: a persistent grid, A and B through tensor maps. A stage has 128 of K. The 64-row operand is A, or B when
/// `swapped`; `columns` is 8, 16, 24, 32 or a multiple of 16 from 48 to 256. K > 0.
struct TmaConfig : PersistentConfig {
  std::int64_t shared_bytes() const;
  /// Of a thread, about.
  int registers() const { return columns / 2 * waves + 32 + 8 * waves + (split > 1 ? 8 : 0); }
  int blocks_per_sm() const { return 1; }
  bool operator==(const TmaConfig&) const = default;
};
struct Emitted {
  std::string text;
  cuda::LaunchPlan launch;
  cuda::TensorBox a_box, b_box;
};
Result<Emitted> emit_tma(ptx::Sm sm, const Shape& shape, const TmaConfig& config);

/// Code::invalid_argument: not a configuration that emit_tma makes for this shape. `m_class` is the class' bound, or
/// kAny.
Status check(const Shape& shape, std::int64_t m_class, const TmaConfig& config);
/// The one chosen without timing, then others that are worth it.
std::vector<TmaConfig> candidates(const Shape& shape, std::int64_t m_class);

} // namespace kiln::nvidia::int8
