#pragma once
#include <array>
#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "backends/nvidia/persistent_tile.h"
#include "backends/nvidia/ptx.h"
#include "cache/status.h"
#include "jit/cuda/launch_plan.h"
#include "jit/cuda/tensor_map.h"

/// int4_mm on the tensor cores' mma.sync and wgmma. Weights are the 16-row operand and tokens its 8 columns, so that D
/// comes out transposed and few tokens waste nothing; weights go from memory straight into registers as fragments
/// (int4_mm::FragmentLayout), and are dequantised there.
namespace kiln::nvidia::int4 {

/// What a kernel is made for; m is free, in steps of `tokens()` of its configuration.
struct Shape {
  std::int64_t n = 0, k = 0, group = 0;
};

/// Few tokens: bound by reading the weights. A block computes `row_tiles` tiles of 16 rows; its warps, and the blocks
/// of its cluster, take turns along K (blocks of 64), each with all tokens and all rows in its own registers, and add
/// up at the end in a fixed order. Nothing but that last sum goes through shared memory.
struct SkinnyConfig {
  int token_tiles = 1; ///< of 8 tokens: 1, 2 or 4
  int row_tiles = 4;   ///< of 16 rows, per block; at most ⌈n/16⌉
  int warps = 16;      ///< a power of two
  int cluster = 1;     ///< blocks that share the rows and split K: 1, 2, 4 or 8; above 1 from sm_90 on
  int depth = 1;       ///< K blocks of weights in flight per warp beyond the one in use: 1, 2 or 4

  std::string text() const; ///< `t1r4w16c1d1`
  std::int64_t tokens() const { return 8 * token_tiles; }
  std::int64_t blocks(const Shape& shape) const;
  std::int64_t shared_bytes() const {
    return std::int64_t{warps} * token_tiles * (row_tiles < 4 ? 2048 : row_tiles * 512); // x of two K blocks; sums
  }
  int threads() const { return 32 * warps; }
};
Result<std::string> emit_skinny(ptx::Sm sm, const Shape& shape, const SkinnyConfig& config);

/// More tokens: a block computes a tile of rows × tokens. Tokens, weights and scales of a K block of 64 go through a
/// ring in shared memory by cp.async; each warp multiplies `row_tiles` × `token_tiles` fragments and dequantises its
/// weights to bf16 once for all its tokens. `warps_k` groups of warps, and the blocks of a cluster, take turns along K
/// and add up at the end in a fixed order. With `wgmma` (sm_90a), warpgroups of four warps along the rows multiply all
/// tokens of the tile, the weights as register operand: row_tiles, warps_m and warps_k are 1, warps_n a multiple of 4.
struct TileConfig {
  int row_tiles = 4, token_tiles = 8;        ///< of 16 and 8, per warp
  int warps_n = 2, warps_m = 4, warps_k = 1; ///< of the block: along rows, tokens, K
  int cluster = 1;                           ///< blocks that share a tile and split K; above 1 from sm_90 on
  int stages = 4;                            ///< K blocks; at least 2, with wgmma 3 · step_blocks
  bool wgmma = false;
  int step_blocks = 1;   ///< with wgmma: K blocks between two barriers
  int blocks_per_sm = 1; ///< for which registers are to suffice
  /// As how many bf16 operands a weight goes in. 1: (q − 8)·scale + zero, rounded; where tokens and rows are few, such
  /// roundings do not average out to what OPS.md allows. 2: (q − 8)·scale rounded, and what that lost plus the zero. 3:
  /// the zero apart, and nothing is lost. Products cost as many times more.
  int operands = 1;

  std::string text() const; ///< `r4t8n2m4k1c1s4b1`, `g` and step_blocks behind for wgmma, `e` and operands
  std::int64_t rows() const { return 16 * row_tiles * warps_n; }
  std::int64_t tokens() const { return 8 * token_tiles * warps_m; }
  std::int64_t shared_bytes(const Shape& shape) const;
  int threads() const { return 32 * warps_n * warps_m * warps_k; }
};
Result<std::string> emit_tile(ptx::Sm sm, const Shape& shape, const TileConfig& config);

/// Up to 128 tokens on wgmma (sm_90a): one product a weight, and nothing lost. q − 8 is exact as bf16, the scale is
/// applied to a group's f32 sum, and the zero multiplies the group's sum of x, three bf16 of it, as one product more.
/// Steps of K come through a ring in shared memory, weights and scales by the copy engine, tokens by all warps;
/// warpgroups take turns along K in `warps_k` groups, as do the blocks of a cluster, and add up at the end in a fixed
/// order.
struct GroupedConfig {
  int token_tiles = 8; ///< of 8 tokens: a power of two to 16
  int warps_n = 16;    ///< along the rows, 16 each: 4, 8 or 16
  int warps_k = 1;     ///< groups of so many warps that take turns along K
  int cluster = 1;     ///< blocks that share a tile and split K
  int stages = 4;      ///< steps of max(64, group) of K in the ring: a multiple of warps_k, > turns_in_use() · warps_k

  std::string text() const; ///< `t8n16k1c4s6`
  std::int64_t rows() const { return 16 * warps_n; }
  std::int64_t tokens() const { return 8 * token_tiles; }
  /// Steps of a group after which a slot is filled anew: the other warpgroups of it have then most likely left it.
  int turns_in_use() const { return warps_n == 4 ? 1 : 2; }
  std::int64_t fixed_bytes() const; ///< of shared memory beside the ring
  std::int64_t stage_bytes(const Shape& shape) const;
  std::int64_t shared_bytes(const Shape& shape) const;
  int threads() const { return 32 * warps_n * warps_k; }
};
Result<std::string> emit_grouped(ptx::Sm sm, const Shape& shape, const GroupedConfig& config);

/// More than 64 tokens on Hopper: a persistent grid, tokens through a tensor map, weights as the register operand. A
/// stage has 64 of K; the 64-row operand is the weights (`swapped` always), `columns` tokens are a multiple of 8 to
/// 256, two waves at most; one wave needs three stages. No rows are shared.
struct TmaConfig : PersistentConfig {
  int operands = 1; ///< as TileConfig's

  int row_tiles() const { return rows() / 16; }
  std::int64_t shared_bytes(const Shape& shape) const;
  /// Of a thread, about: sums, two sets of operands.
  int registers() const { return columns / 2 * waves + (operands == 1 ? 32 : 84) + 40; }
  int blocks_per_sm() const { return 1; }
  std::string text() const; ///< PersistentConfig's, `e` and operands behind where there are several
  bool operator==(const TmaConfig&) const = default;
};
struct Emitted {
  std::string text;
  cuda::LaunchPlan launch;
  cuda::TensorBox x_box, y_box;
};
Result<Emitted> emit_tma(ptx::Sm sm, const Shape& shape, const TmaConfig& config);

/// Code::invalid_argument: not a configuration that emit_tma makes for this shape. `m_class` is the class' bound, or
/// kAny.
Status check(const Shape& shape, std::int64_t m_class, const TmaConfig& config);
/// The one chosen without timing, then others that are worth it. A weight goes in as so many `operands`.
std::vector<TmaConfig> candidates(const Shape& shape, std::int64_t m_class, int operands);

/// The A operand of one mma.
using Operand = std::array<ptx::B32, 4>;
/// bf16x2 of a row's scale and zero, each twice.
struct Scale {
  ptx::B32 scale, zero;
};
/// Of a row tile's step, this lane's words of the pack, by part and row half.
std::array<Scale, 4> scales_of(ptx::Writer& w, const std::array<ptx::B32, 4>& words, int parts);
/// The operands of a word of the pack whose products add up to its weights' (TileConfig::operands).
std::vector<Operand> dequantise(ptx::Writer& w, ptx::B32 word, const std::array<Scale, 4>& scale, std::size_t part,
                                int operands);
/// Four bf16x2 of q − 8, exact, from a word of the pack: the A operand of one mma.
std::array<ptx::B32, 4> unpack(ptx::Writer& w, ptx::B32 word);

} // namespace kiln::nvidia::int4
