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
/// its cluster, take turns along K (blocks of 64), each with all tokens and all rows in its own registers, and add up at
/// the end in a fixed order. Nothing but that last sum goes through shared memory.
struct SkinnyConfig {
  int token_tiles = 1; ///< of 8 tokens: 1 or 2
  int row_tiles = 4;   ///< of 16 rows, per block; at most ⌈n/16⌉
  int warps = 16;      ///< a power of two
  int cluster = 1;     ///< blocks that share the rows and split K: 1, 2, 4 or 8; above 1 from sm_90 on
  int depth = 1;       ///< K blocks of weights in flight per warp beyond the one in use: 1 or 2

  std::string text() const; ///< `t1r4w16c1d1`
  std::int64_t tokens() const { return 8 * token_tiles; }
  std::int64_t blocks(const Shape& shape) const;
  std::int64_t shared_bytes() const { return std::int64_t{warps} * row_tiles * token_tiles * 512; }
  int threads() const { return 32 * warps; }
};
Result<std::string> emit_skinny(ptx::Sm sm, const Shape& shape, const SkinnyConfig& config);

/// Four bf16x2 of q − 8, exact, from a word of the pack: the A operand of one mma.
std::array<ptx::B32, 4> unpack(ptx::Writer& w, ptx::B32 word);

} // namespace kiln::nvidia::int4
