#include "backends/nvidia/persistent_choice.h"

#include <charconv>

#include <fmt/format.h>

namespace kiln::nvidia {

int register_limit(int threads) {
  constexpr int kRegisters = 65536;
  const int per_part = (threads / 32 + 3) / 4;
  return std::min(255, kRegisters / 4 / 32 / per_part / 8 * 8);
}

cuda::LaunchPlan persistent_launch(const PersistentConfig& config, std::int64_t shared_bytes, int blocks_per_sm) {
  cuda::LaunchPlan launch;
  launch.tile_m = config.swapped ? config.columns : config.rows();
  launch.tile_n = config.swapped ? config.rows() : config.columns;
  launch.split_k = config.split;
  launch.cluster_x = config.cluster() > 1 ? config.cluster() : 0;
  launch.threads = config.threads();
  launch.smem_bytes = static_cast<std::int32_t>(shared_bytes);
  launch.blocks_per_sm = blocks_per_sm;
  return launch;
}

std::string PersistentConfig::text() const {
  constexpr std::string_view kShare[] = {"", "r", "c"};
  return fmt::format("{}{}v{}n{}s{}k{}g{}{}", swapped ? 'y' : 'x', warpgroups, waves, columns, stages, split, group,
                     kShare[static_cast<std::size_t>(share)]);
}

std::optional<PersistentConfig> PersistentConfig::parse(std::string_view text) {
  const std::string_view whole = text;
  PersistentConfig config;
  const auto takes = [&](char c) {
    const bool is = !text.empty() && text.front() == c;
    text.remove_prefix(is ? 1 : 0);
    return is;
  };
  const auto number = [&](int& value) {
    const std::from_chars_result end = std::from_chars(text.data(), text.data() + text.size(), value);
    if (end.ec != std::errc() || value < 0 || value > 4096)
      return false;
    text.remove_prefix(static_cast<std::size_t>(end.ptr - text.data()));
    return true;
  };
  config.swapped = takes('y');
  if (!config.swapped && !takes('x'))
    return std::nullopt;
  if (!number(config.warpgroups) || !takes('v') || !number(config.waves) || !takes('n') || !number(config.columns) ||
      !takes('s') || !number(config.stages) || !takes('k') || !number(config.split) || !takes('g') ||
      !number(config.group))
    return std::nullopt;
  config.share = takes('r') ? Share::rows : takes('c') ? Share::columns : Share::none;
  return config.text() == whole ? std::optional(config) : std::nullopt;
}

std::vector<std::int64_t> usual_rows(std::int64_t m_class, std::int64_t previous) {
  if (m_class == kAny)
    return {previous * 3 / 2, previous * 2, previous * 4, previous * 6, previous * 8, previous * 16};
  return {(previous + m_class) / 2, m_class};
}

double persistent_cycles(const PersistentConfig& c, std::int64_t n, std::int64_t m, std::int64_t k_steps,
                         const StepCost& cost) {
  constexpr double kFromL2 = 36, kFromMemory = 2450, kMostFromMemory = 26, kOverhead = 1.15;
  const std::int64_t tile_m = c.swapped ? c.columns : c.rows(), tile_n = c.swapped ? c.rows() : c.columns;
  const auto whole = [](std::int64_t size, std::int64_t step) { return (size + step - 1) / step; };
  const bool along_m = (c.share == Share::rows) == c.swapped;
  const std::int64_t m_tiles = whole(m, tile_m * (along_m ? c.sharing() : 1)) * (along_m ? c.sharing() : 1);
  const std::int64_t n_tiles = whole(n, tile_n * (along_m ? 1 : c.sharing())) * (along_m ? 1 : c.sharing());
  const std::int64_t blocks = m_tiles * n_tiles * c.split;
  // Clusters of two find a place on every SM, larger ones on fewer (seen on an H200).
  const std::int64_t room = c.cluster() <= 2 ? kSms : c.cluster() <= 4 ? 120 : 96;
  const double turns = static_cast<double>(whole(blocks, room)), steps = static_cast<double>(whole(k_steps, c.split));
  const double running = static_cast<double>(std::min(blocks, room));
  const double sums = c.split > 1 ? 700 + 4.0 * c.rows() * c.columns * (c.split - 1) / c.split / 20 : 0;
  const double step = std::max({kOverhead * cost.products, cost.shared_reads / kFromL2,
                                cost.streamed / std::min(kMostFromMemory, kFromMemory / running)});
  return turns * (steps * step + cost.tile_cycles + sums);
}

} // namespace kiln::nvidia
