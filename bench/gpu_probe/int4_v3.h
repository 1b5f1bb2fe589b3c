#pragma once
#include <cstdint>
#include <string>
#include <string_view>

#include "backends/nvidia/ptx.h"
#include "cache/status.h"

/// int4_mm on the tensor cores' mma.sync. Weights are the 16-row operand and tokens its 8 columns, so that D comes out
/// transposed and few tokens waste nothing; weights go from memory straight into registers as fragments
/// (int4_mm::FragmentLayout), and are dequantised there.
namespace kiln::nvidia::int4 {

/// What a kernel is made for; m is bounded by `tokens` of its configuration, or free.
struct Shape {
  std::int64_t n = 0, k = 0, group = 0;
};

/// Few tokens: bound by reading the weights. A block computes `row_tiles` tiles of 16 rows; its warps, and the blocks of
/// its cluster, take turns along K, each with all tokens and all rows in its own registers, and add up at the end in a
/// fixed order. Weights and scales go straight into registers, a step ahead; tokens through a ring in shared memory that
/// each lane writes and reads alone: no warp waits for another before the last sum.
struct SkinnyConfig {
  int token_tiles = 1; ///< of 8 tokens: 1 or 2
  int row_tiles = 4;   ///< of 16 rows, per block; at most ⌈n/16⌉
  int warps = 16;      ///< a power of two
  int cluster = 1;     ///< blocks that share the rows and split K: 1, 2, 4 or 8; above 1 from sm_90 on
  int step_blocks = 1; ///< K blocks of 64 at a time, within one group: 1 or 2
  int depth = 1;       ///< steps of weights in flight per warp: 1 or 2
  int token_stages = 3;

  std::string text() const; ///< `t1r4w16c1b1d1s3`
  std::int64_t tokens() const { return 8 * token_tiles; }
  std::int64_t blocks(const Shape& shape) const;
  std::int64_t shared_bytes() const;
  int threads() const { return 32 * warps; }
};
Result<std::string> emit_skinny(ptx::Sm sm, const Shape& shape, const SkinnyConfig& config);

/// Four bf16x2 of q − 8, exact, from a word of the pack: the A operand of one mma.
std::array<ptx::B32, 4> unpack(ptx::Writer& w, ptx::B32 word);

} // namespace kiln::nvidia::int4
