#include <fmt/format.h>

#include <algorithm>
#include <charconv>

#include "backends/nvidia/fp8_block_bmm.h"

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

constexpr int kSms = 132;              // of the H100 and H200; others get along with what suits these
constexpr std::int64_t kUsualM = 4096; // of the class without bound
constexpr std::size_t kCandidates = 16;

/// About how many cycles the busiest SM needs. Constants are fits to times on an H200: per 128 of k 1.35 of what the
/// tensor cores alone take (4096 products a cycle), or 40 bytes a cycle of what comes from L2; what a tile costs
/// besides its steps, hidden where an SM has several blocks; the sums over a cluster.
double cycles(const Shape& shape, std::int64_t m, const Config& c) {
  const std::int64_t tile_m = c.swapped ? c.columns : c.rows(), tile_n = c.swapped ? c.rows() : c.columns;
  const std::int64_t blocks = (m + tile_m - 1) / tile_m * ((shape.n + tile_n - 1) / tile_n) * shape.b * c.split;
  const double turns = static_cast<double>((blocks + kSms - 1) / kSms);
  const double steps = static_cast<double>((k_blocks(shape) + c.split - 1) / c.split);
  const int halved = c.share == Share::rows ? c.rows() : c.share == Share::columns ? c.columns : 0;
  const double products = 1.35 * c.rows() * c.columns / 32, reads = 128.0 / 40 * (c.rows() + c.columns - halved / 2);
  return turns * (steps * std::max(products, reads) + 1000.0 / c.blocks_per_sm()) + (c.split > 1 ? 1500 : 0);
}

/// Whatever may be good for a class.
std::vector<Config> pool(const Shape& shape, std::int64_t m_class) {
  std::vector<Config> all;
  const bool unbounded = m_class == kAny;
  const auto add = [&](Config c) {
    const std::int64_t tile_m = c.swapped ? c.columns : c.rows();
    const bool one_high = !unbounded && m_class <= tile_m;
    const std::int64_t tiles = (shape.n + (c.swapped ? c.rows() : c.columns) - 1) / (c.swapped ? c.rows() : c.columns) *
                               shape.b * (unbounded ? 1 : (m_class + tile_m - 1) / tile_m);
    for (const Share share : {Share::rows, Share::columns, Share::none})
      for (const int group : {16, 8}) {
        c.share = share;
        c.group = one_high ? 0 : group;
        const bool along_m = (share == Share::rows) == c.swapped, pays = !c.swapped || c.columns >= 32;
        if (share == Share::none || (pays && !(one_high && along_m)))
          if (!one_high || group == 16)
            all.push_back(c);
      }
    c.share = Share::none;
    c.group = one_high ? 0 : 16;
    // Clusters of more than two find no place on some SMs: only where few of them are needed.
    for (c.split = 2; !unbounded && c.split <= 8 && c.split * tiles <= (c.split == 2 ? kSms : kSms / 2); c.split *= 2)
      all.push_back(c);
  };
  if (unbounded || m_class >= 64)
    for (const int columns : {128, 64, 192, 32})
      add({.warpgroups = m_class == 64 ? 1 : 2, .waves = 1, .columns = columns});
  if (!unbounded && m_class <= 128)
    for (const int warpgroups : {1, 2, 3})
      add({.swapped = true, .warpgroups = warpgroups, .waves = 1, .columns = static_cast<int>(m_class)});
  return all;
}

} // namespace

std::vector<Config> candidates(const Shape& shape, std::int64_t m_class, bool batch_invariant) {
  std::vector<Config> good;
  for (const Config& c : pool(shape, m_class)) {
    const Config config = with_stages(c, shape);
    if (check(shape, m_class, batch_invariant, config))
      good.push_back(config);
  }
  const std::int64_t m = m_class == kAny ? kUsualM : m_class;
  std::stable_sort(good.begin(), good.end(),
                   [&](const Config& a, const Config& b) { return cycles(shape, m, a) < cycles(shape, m, b); });
  good.resize(std::min(good.size(), kCandidates));
  return good;
}

Config choose(const Shape& shape, std::int64_t m_class, bool batch_invariant) {
  return candidates(shape, m_class, batch_invariant).front();
}

} // namespace kiln::nvidia::fp8
