#include <fmt/format.h>

#include <algorithm>
#include <ranges>

#include "backends/nvidia/fp8_block_bmm.h"
#include "backends/nvidia/persistent_choice.h"

/// Which configuration serves a shape: what one may be, the one taken without timing, those worth timing.
namespace kiln::nvidia::fp8 {
namespace {

std::int64_t k_blocks(const Shape& shape) {
  return (shape.k + 127) / 128;
}
} // namespace

std::int64_t Config::shared_bytes() const {
  const std::int64_t scales = (x_rows() + y_chunks() + 3) / 4 * 16 + 16;
  const std::int64_t stage = (rows() + columns) * 128 + scales;
  return 1024 + stages * stage + (stages_output() ? rows() * columns * 2 : 0) + sum_bytes();
}

int Config::blocks_per_sm() const {
  int blocks = 1;
  while (blocks < 4 && (blocks + 1) * (shared_bytes() + kReservedBytes) <= kSmSharedBytes &&
         registers() <= register_limit((blocks + 1) * threads()))
    ++blocks;
  return blocks;
}

namespace {

struct Flag {
  char letter;
  bool Config::*is;
  bool usual; ///< what it is without the letter
};
constexpr Flag kFlags[] = {{'o', &Config::overlaps, false},   {'i', &Config::copier, true},
                           {'e', &Config::early, false},      {'f', &Config::streams, false},
                           {'p', &Config::prefetches, false}, {'l', &Config::late, false},
                           {'d', &Config::direct, false}};

} // namespace

std::string Config::text() const {
  std::string text = PersistentConfig::text();
  for (const Flag& flag : kFlags)
    if (this->*flag.is != flag.usual)
      text += flag.letter;
  return text;
}

std::optional<Config> Config::parse(std::string_view text) {
  const std::string_view whole = text;
  Config config;
  for (const Flag& flag : kFlags | std::views::reverse)
    if (text.ends_with(flag.letter)) {
      config.*flag.is = !flag.usual;
      text.remove_suffix(1);
    }
  const std::optional<PersistentConfig> parsed = PersistentConfig::parse(text);
  if (!parsed)
    return std::nullopt;
  static_cast<PersistentConfig&>(config) = *parsed;
  return config.text() == whole ? std::optional(config) : std::nullopt;
}

Status check(const Shape& shape, std::int64_t m_class, bool batch_invariant, const Config& c) {
  std::string why = why_not(c, k_blocks(shape), m_class, c.swapped ? 8 : 16, !batch_invariant,
                            [](const Config& config) { return config.shared_bytes(); });
  if (why.empty() && c.overlaps && (c.waves != 1 || c.split != 1))
    why = "steps overlap in one wave without a split of K";
  if (why.empty() && c.late && !c.overlaps)
    why = "nothing is late where steps do not overlap";
  if (why.empty() && !c.copier && (!c.overlaps || c.early || c.prefetches || c.stages < 3))
    why = "without a warp that copies steps overlap, in three stages or more, and nothing is early or prefetched";
  if (why.empty() && c.streams && c.group != 0)
    why = "Y is read more than once";
  if (!why.empty())
    return Status::error(Code::invalid_argument, fmt::format("fp8_block_bmm: configuration {}: {}", c.text(), why));
  return {};
}

namespace {

constexpr std::int64_t kUsualM = 4096; // of the class without bound
constexpr std::size_t kCandidates = 16;

/// About how many cycles the busiest SM needs. Constants are fits to times on an H200: per 128 of k 1.35 of what the
/// tensor cores alone take (4096 products a cycle; an estimate where steps overlap), or 40 bytes a cycle of what comes
/// from L2; what a tile costs besides its steps, hidden where an SM has several blocks; the sums over a cluster.
double cycles(const Shape& shape, std::int64_t m, const Config& c) {
  const std::int64_t tile_m = c.swapped ? c.columns : c.rows(), tile_n = c.swapped ? c.rows() : c.columns;
  const std::int64_t blocks = (m + tile_m - 1) / tile_m * ((shape.n + tile_n - 1) / tile_n) * shape.b * c.split;
  const double turns = static_cast<double>((blocks + kSms - 1) / kSms);
  const double steps = static_cast<double>((k_blocks(shape) + c.split - 1) / c.split);
  const int halved = c.share == Share::rows ? c.rows() : c.share == Share::columns ? c.columns : 0;
  const double products = (c.overlaps ? 1.1 : 1.35) * c.rows() * c.columns / 32,
               reads = 128.0 / 40 * (c.rows() + c.columns - halved / 2);
  return turns * (steps * std::max(products, reads) + (c.overlaps ? 500.0 : 1000.0) / c.blocks_per_sm()) +
         (c.split > 1 ? 1500 : 0);
}

/// Whatever may be good for a class.
std::vector<Config> pool(const Shape& shape, std::int64_t m_class) {
  std::vector<Config> all;
  const bool unbounded = m_class == kAny;
  const auto add = [&](Config c) {
    const std::int64_t tile_m = c.swapped ? c.columns : c.rows();
    const bool one_high = !unbounded && m_class <= tile_m;
    c.streams = one_high;
    c.early = c.copier && !unbounded;
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
    if (c.overlaps)
      return;
    c.share = Share::none;
    c.group = one_high ? 0 : 16;
    // Clusters of more than two find no place on some SMs: only where few of them are needed.
    for (c.split = 2; !unbounded && c.split <= 8 && c.split * tiles <= (c.split == 2 ? kSms : kSms / 2); c.split *= 2)
      all.push_back(c);
  };
  if (unbounded || m_class >= 64)
    for (const int columns : {128, 64, 192, 32})
      for (const bool overlaps : {true, false}) {
        if (overlaps && (columns < 64 || k_blocks(shape) < 4)) // too little to hide anything under
          continue;
        Config c{{.warpgroups = m_class == 64 ? 1 : 2, .waves = 1, .columns = columns}};
        c.overlaps = overlaps;
        c.copier = !overlaps || columns < 128; // two sets of 128 columns take more registers than a ninth warp leaves
        c.prefetches = overlaps && c.copier && !unbounded;
        c.late = overlaps;
        add(c);
        c.late = false;
        if (overlaps)
          add(c);
      }
  if (!unbounded && m_class <= 128)
    for (const int warpgroups : {1, 2, 3})
      add({{.swapped = true, .warpgroups = warpgroups, .waves = 1, .columns = static_cast<int>(m_class)}});
  return all;
}

} // namespace

std::vector<Config> candidates(const Shape& shape, std::int64_t m_class, bool batch_invariant) {
  std::vector<Config> good;
  for (const Config& c : pool(shape, m_class)) {
    const Config config = with_stages(c, k_blocks(shape), [](const Config& config) { return config.shared_bytes(); });
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
