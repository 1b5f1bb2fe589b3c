#pragma once
#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include <fmt/format.h>

#include "backends/nvidia/persistent_tile.h"
#include "jit/desc.h"

/// Which persistent configuration serves a shape: what the ops' choices share.
namespace kiln::nvidia {

/// As many stages as fit, but no more than K has use for. `bytes(config)`: of shared memory.
template <class Config, class Bytes> Config with_stages(Config config, std::int64_t k_steps, Bytes bytes) {
  config.stages = 1;
  const std::int64_t one = bytes(config);
  config.stages = 2;
  const std::int64_t each = bytes(config) - one;
  const std::int64_t fit = 1 + (kBlockSharedBytes - one) / each;
  // A persistent block fetches for its next tile too.
  const std::int64_t useful = std::max<std::int64_t>(4, 4 * ((k_steps + config.split - 1) / config.split));
  config.stages = static_cast<int>(std::clamp<std::int64_t>(std::min(fit, useful), 2, kMaxStages));
  return config;
}

/// Empty, or why no kernel is made of a configuration. `column_step`: what its columns are a multiple of.
template <class Config, class Bytes>
std::string why_not(const Config& c, std::int64_t k_steps, std::int64_t m_class, int column_step, bool may_split,
                    Bytes bytes) {
  // Each within bounds before they are multiplied.
  const bool sizes = c.warpgroups >= 1 && c.warpgroups <= 4 && c.waves >= 1 && c.waves <= 4 && c.rows() <= 256 &&
                     c.columns >= 8 && c.columns <= 256 && c.columns % column_step == 0 && c.stages >= 2 &&
                     c.stages <= kMaxStages && c.split >= 1 && c.split <= 8 && c.group >= 0 && c.group <= 64;
  if (!sizes)
    return "a number is out of its range";
  if (bytes(c) > kBlockSharedBytes)
    return fmt::format("{} bytes of shared memory, allowed are {}", bytes(c), kBlockSharedBytes);
  if (c.split > 1 && (c.share != Share::none || !may_split || c.split > k_steps))
    return "K is not to be split that way";
  if (c.share == Share::columns && c.columns % (2 * column_step) != 0)
    return "half of the columns is not a multiple of eight";
  const bool m_is_shared = c.share != Share::none && (c.share == Share::rows) == c.swapped;
  const std::int64_t tile_m = c.swapped ? c.columns : c.rows();
  if (c.group == 0 && (m_class == kAny || m_class > tile_m * (m_is_shared ? 2 : 1)))
    return fmt::format("a tile has {} rows, the class {}", tile_m, m_class);
  if (c.registers() > register_limit(c.threads()))
    return fmt::format("about {} registers, a block of {} threads can have {}", c.registers(), c.threads(),
                       register_limit(c.threads()));
  return {};
}

/// The bound of the class before `m_class`; 0 for the first.
template <std::size_t count> std::int64_t class_before(const std::int64_t (&classes)[count], std::int64_t m_class) {
  std::int64_t before = 0;
  for (const std::int64_t bound : classes) {
    if (bound == m_class)
      break;
    before = bound;
  }
  return before;
}
/// Rows of the output that a class is judged by. `previous`: the bound of the class before it.
std::vector<std::int64_t> usual_rows(std::int64_t m_class, std::int64_t previous);

/// Cycles of the busiest SM: how long a step takes by what bounds it.
struct StepCost {
  double products;        ///< cycles of the tensor cores
  double shared_reads;    ///< bytes that come to the SM, most from L2
  double streamed = 0;    ///< of these from memory, read once
  double tile_cycles = 0; ///< of a tile besides its steps
};
/// About how many cycles the busiest SM needs for m rows of n columns. Constants are fits to times on an H200: 1.15 of
/// what the tensor cores alone take, 36 bytes a cycle of what comes from L2, 2450 in all of what comes from memory but
/// 26 for one SM; the sums over a cluster at 20 bytes a cycle.
double persistent_cycles(const PersistentConfig& c, std::int64_t n, std::int64_t m, std::int64_t k_steps,
                         const StepCost& cost);

/// The best `most` by cycles for some rows of a class, those that cost the same in the order of `all`.
template <class Config, class Cycles>
std::vector<Config> best_of(std::vector<Config> all, const std::vector<std::int64_t>& rows, std::size_t most,
                            Cycles cycles) {
  const auto score = [&](const Config& c) {
    double sum = 0;
    for (const std::int64_t m : rows)
      sum += cycles(c, m) / static_cast<double>(m);
    return sum;
  };
  std::stable_sort(all.begin(), all.end(), [&](const Config& a, const Config& b) { return score(a) < score(b); });
  all.resize(std::min(all.size(), most));
  return all;
}

} // namespace kiln::nvidia
