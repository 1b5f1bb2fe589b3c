#pragma once
#include <cstdint>
#include <numeric>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "backends/nvidia/persistent_tile.h"
#include "backends/nvidia/ptx.h"
#include "cache/status.h"
#include "jit/cuda/launch_plan.h"
#include "jit/ops/fp8_block_bmm.h"

/// fp8_block_bmm on Hopper: the copy engine, wgmma on e4m3 and e5m2, scales applied in registers per 128 of K.
namespace kiln::nvidia::fp8 {

/// Constants of a kernel.
struct Shape {
  std::int64_t b = 1, n = 0, k = 0;
  bool x_e5m2 = false, y_e5m2 = false;
  fp8_block_bmm::ZDtype z = fp8_block_bmm::ZDtype::bf16;
};

/// The 64-row operand is X, or Y when `swapped`. A stage has 128 of K. `columns`: a multiple of 8, unless swapped 16,
/// to 256.
struct Config : PersistentConfig {
  bool overlaps = false;   ///< the products of a step run while those of the one before are scaled, in registers more
  bool copier = true;      ///< a warp of its own copies; else the multiplying ones do, and may have more registers
  bool early = false;      ///< copying begins before the block's warps have met
  bool streams = false;    ///< Y is read once: it is the first to leave L2, before what others have written there
  bool prefetches = false; ///< what of Y the ring has no room for yet goes to L2
  bool late =
      false; ///< where steps overlap: scales are read behind the next products, so that nothing is between these
  bool direct = false; ///< Z leaves from registers: its place in shared memory is the ring's

  int threads() const { return 128 * warpgroups + (copier ? 32 : 0); }
  int x_rows() const { return swapped ? columns : rows(); }
  int y_chunk() const { return swapped ? 64 : std::gcd(columns, 128); } ///< rows of Y that have one scale for sure
  int y_chunks() const { return (swapped ? rows() : columns) / y_chunk(); }
  /// Whether tiles of 16-bit elements leave through shared memory and the copy engine.
  bool stages_output() const { return split == 1 && !direct && (swapped || columns % 64 == 0); }
  std::int64_t shared_bytes() const;
  /// Of a thread, at most: sums, factors, and what addresses take besides.
  int registers() const { return columns / 2 * (waves + (overlaps ? 2 : 1)) + (swapped ? columns / 2 : 0) + 40; }
  /// That run at one time, as their memory and registers allow.
  int blocks_per_sm() const;
  /// PersistentConfig's, then o, i (no copier), e, f (streams), p, l, d for the flags in their order.
  std::string text() const;
  /// Of what text() gives.
  static std::optional<Config> parse(std::string_view text);
  bool operator==(const Config&) const = default;
};

struct Emitted {
  std::string text;
  cuda::LaunchPlan launch;
  fp8_block_bmm::Boxes boxes;
};

/// Code::invalid_argument: not a configuration that emit makes for this shape.
Status check(const Shape& shape, std::int64_t m_class, bool batch_invariant, const Config& config);
/// Without timing. `m_class` is the class' bound, or kAny.
Config choose(const Shape& shape, std::int64_t m_class, bool batch_invariant);
/// To be timed: the first is choose()'s.
std::vector<Config> candidates(const Shape& shape, std::int64_t m_class, bool batch_invariant);
Result<Emitted> emit(ptx::Sm sm, const Shape& shape, const Config& config);

} // namespace kiln::nvidia::fp8
