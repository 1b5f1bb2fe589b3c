#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <charconv>

#include "backends/nvidia/fp8_block_bmm.h"
#include "backends/nvidia/row_parts.h"

/// Which configuration serves a shape: what one may be, the one taken without timing, those worth timing.
namespace kiln::nvidia::fp8 {
namespace {

// Of sm_90 ("Technical Specifications"): what an SM has, what each block takes besides its own, what one may have.
constexpr std::int64_t kSmSharedBytes = 228 * 1024, kReservedBytes = 1024;
constexpr std::int64_t kSharedBytes = kSmSharedBytes - kReservedBytes;
constexpr int kMaxStages = 32; // one lane makes the barriers of each
constexpr int kRegisters = 65536;

std::int64_t k_blocks(const Shape& shape) {
  return (shape.k + 127) / 128;
}
/// Tiles of a batch of few rows: all lie along N.
std::int64_t n_tiles(const Shape& shape, int rows) {
  return (shape.n + rows - 1) / rows * shape.b;
}

/// As many stages as fit, but no more than K has use for.
Config with_stages(Config config, const Shape& shape) {
  config.stages = 1;
  const std::int64_t one = config.shared_bytes();
  config.stages = 2;
  const std::int64_t each = config.shared_bytes() - one;
  const std::int64_t fit = 1 + (kSharedBytes - one) / each;
  // A persistent block fetches for its next tile too.
  const std::int64_t useful = std::max<std::int64_t>(4, 4 * ((k_blocks(shape) + config.split - 1) / config.split));
  config.stages = static_cast<int>(std::clamp<std::int64_t>(std::min(fit, useful), 2, kMaxStages));
  return config;
}

/// Registers of a thread that a block of so many warps can have: they are dealt out in each of the SM's four parts.
int register_limit(int threads) {
  const int per_part = (threads / 32 + 3) / 4;
  return std::min(255, kRegisters / 4 / 32 / per_part / 8 * 8);
}

} // namespace

std::int64_t Config::shared_bytes() const {
  const std::int64_t scales = (x_rows() + y_chunks() + 3) / 4 * 16 + 16;
  const std::int64_t stage = (rows() + columns) * 128 + scales;
  return 1024 + stages * stage + (stages_output() ? rows() * columns * 2 : 0) +
         (split > 1 ? split * rank_units() * 64 * warpgroups * (swapped ? 32 : 64) : 0);
}

int Config::blocks_per_sm() const {
  int blocks = 1;
  while (blocks < 4 && (blocks + 1) * (shared_bytes() + kReservedBytes) <= kSmSharedBytes &&
         registers() <= register_limit((blocks + 1) * threads()))
    ++blocks;
  return blocks;
}

std::string Config::text() const {
  constexpr std::string_view kShare[] = {"", "r", "c"};
  return fmt::format("{}{}v{}n{}s{}k{}g{}{}", swapped ? 'y' : 'x', warpgroups, waves, columns, stages, split, group,
                     kShare[static_cast<std::size_t>(share)]);
}

std::optional<Config> Config::parse(std::string_view text) {
  const std::string_view whole = text;
  Config config;
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

Status check(const Shape& shape, std::int64_t m_class, bool batch_invariant, const Config& c) {
  const auto refuse = [&](std::string_view why) {
    return Status::error(Code::invalid_argument, fmt::format("fp8_block_bmm: configuration {}: {}", c.text(), why));
  };
  // Each within bounds before they are multiplied.
  const bool sizes = c.warpgroups >= 1 && c.warpgroups <= 4 && c.waves >= 1 && c.waves <= 4 && c.rows() <= 256 &&
                     c.columns >= 8 && c.columns <= 256 && c.columns % (c.swapped ? 8 : 16) == 0 && c.stages >= 2 &&
                     c.stages <= kMaxStages && c.split >= 1 && c.split <= 8 && c.group >= 0 && c.group <= 64;
  if (!sizes)
    return refuse("a number is out of its range");
  if (c.shared_bytes() > kSharedBytes)
    return refuse(fmt::format("{} bytes of shared memory, allowed are {}", c.shared_bytes(), kSharedBytes));
  if (c.split > 1 && (c.share != Share::none || batch_invariant || c.split > k_blocks(shape)))
    return refuse("K is not to be split that way");
  if (c.share == Share::columns && c.columns % (c.swapped ? 16 : 32) != 0)
    return refuse("half of the columns is not a multiple of eight");
  const bool m_is_shared = c.share != Share::none && (c.share == Share::rows) == c.swapped;
  const std::int64_t tile_m = c.swapped ? c.columns : c.rows();
  if (c.group == 0 && (m_class == kAny || m_class > tile_m * (m_is_shared ? 2 : 1)))
    return refuse(fmt::format("a tile has {} rows, the class {}", tile_m, m_class));
  if (c.registers() > register_limit(c.threads()))
    return refuse(fmt::format("about {} registers, a block of {} threads can have {}", c.registers(), c.threads(),
                              register_limit(c.threads())));
  return {};
}

namespace {

/// What the slowest SM reads, in rows of 128 bytes: tiles in turns, and for each what a block's ring sees of it.
std::int64_t reads(const Shape& shape, const Config& c) {
  const std::int64_t blocks = n_tiles(shape, c.swapped ? c.rows() : c.columns) * c.split, turns = (blocks + 131) / 132;
  const std::int64_t shared = c.share == Share::rows ? c.rows() : c.share == Share::columns ? c.columns : 0;
  return turns * (c.rows() + c.columns - shared / 2) * ((k_blocks(shape) + c.split - 1) / c.split);
}
void order_by_reads(const Shape& shape, std::vector<Config>& configs) {
  std::stable_sort(configs.begin(), configs.end(),
                   [&](const Config& a, const Config& b) { return reads(shape, a) < reads(shape, b); });
}

/// X's rows are few: weights on the 64-row side; splits of K where that leaves SMs without work. Clusters of more than
/// two find no place on some SMs: only where few of them are needed.
std::vector<Config> few_rows(const Shape& shape, std::int64_t m_class) {
  std::vector<Config> all;
  for (const int warpgroups : {1, 2, 3}) {
    Config c{.swapped = true, .warpgroups = warpgroups, .waves = 1, .columns = static_cast<int>(m_class), .group = 0};
    const std::int64_t tiles = n_tiles(shape, c.rows());
    while (c.split < 8 && 2 * c.split * tiles <= (c.split == 1 ? kManyBlocks + 4 : kManyBlocks / 2) &&
           2 * c.split <= k_blocks(shape))
      c.split *= 2;
    all.push_back(c);
    if (c.split == 1 && m_class >= 32) {
      c.share = Share::columns;
      all.push_back(c);
    }
  }
  if (m_class == 64)
    for (const int columns : {64, 128, 192})
      for (const Share share : {Share::none, Share::rows})
        all.push_back({.warpgroups = 1, .waves = 1, .columns = columns, .share = share, .group = 0});
  order_by_reads(shape, all);
  return all;
}

/// One tile's height of X, and weights in narrow ones.
std::vector<Config> some_rows(const Shape& shape) {
  std::vector<Config> all;
  for (const int columns : {64, 128, 32})
    all.push_back({.warpgroups = 2, .waves = 1, .columns = columns, .share = Share::rows, .group = 0});
  Config split{.warpgroups = 2, .waves = 1, .columns = 128, .group = 0};
  while (split.split < 4 && 2 * split.split * n_tiles(shape, 128) <= kManyBlocks + 4 &&
         2 * split.split <= k_blocks(shape))
    split.split *= 2;
  all.push_back(split);
  all.push_back({.swapped = true, .warpgroups = 1, .waves = 1, .columns = 128, .group = 0});
  all.push_back({.swapped = true, .warpgroups = 2, .waves = 1, .columns = 128, .share = Share::columns, .group = 0});
  order_by_reads(shape, all);
  return all;
}

/// Tiles of 128 × 128, in bands whose operands L2 holds; narrower ones where they fill the SMs better.
std::vector<Config> many_rows(const Shape& shape, std::int64_t m_class) {
  std::vector<Config> all;
  for (const int columns : {128, 64})
    for (const Share share : {Share::columns, Share::rows})
      for (const int group : {16, 8, 32})
        all.push_back({.warpgroups = 2, .waves = 1, .columns = columns, .share = share, .group = group});
  if (m_class == kAny)
    return all;
  const auto cost = [&](const Config& c) {
    const std::int64_t tiles = (m_class + c.rows() - 1) / c.rows() * n_tiles(shape, c.columns);
    return (tiles + 131) / 132 * (c.rows() * c.columns + 8 * (c.rows() + c.columns));
  };
  std::stable_sort(all.begin(), all.end(), [&](const Config& a, const Config& b) { return cost(a) < cost(b); });
  return all;
}

} // namespace

std::vector<Config> candidates(const Shape& shape, std::int64_t m_class, bool batch_invariant) {
  std::vector<Config> all = m_class == kAny || m_class > 128 ? many_rows(shape, m_class)
                            : m_class > 64                   ? some_rows(shape)
                                                             : few_rows(shape, m_class);
  std::vector<Config> good;
  for (const Config& c : all) {
    const Config config = with_stages(c, shape);
    if (check(shape, m_class, batch_invariant, config) && std::find(good.begin(), good.end(), config) == good.end())
      good.push_back(config);
  }
  return good;
}

Config choose(const Shape& shape, std::int64_t m_class, bool batch_invariant) {
  return candidates(shape, m_class, batch_invariant).front();
}

} // namespace kiln::nvidia::fp8
