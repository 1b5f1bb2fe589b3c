#include "backends/nvidia/int4_mm.h"
#include "backends/nvidia/persistent_choice.h"
#include "jit/ops/int4_mm.h"
#include "jit/ops/int4_mm_fragments.h"

/// Which configuration with a tensor map serves a shape: what one may be, the one taken without timing, those worth
/// timing.
namespace kiln::nvidia::int4 {
namespace {

constexpr std::size_t kCandidates = 12;

std::int64_t k_steps(const Shape& shape) {
  return (shape.k + 63) / 64;
}
auto shared_bytes_for(const Shape& shape) {
  return [shape](const TmaConfig& config) { return config.shared_bytes(shape); };
}

StepCost cost_of(const Shape& shape, const TmaConfig& c) {
  // A warp fetches and dequantises a step in about so many cycles, in which its warpgroup's other products run.
  constexpr double kDequantised = 400;
  const double weights =
      c.row_tiles() * static_cast<double>(512 + int4_mm::FragmentLayout{.group = shape.group}.scale_block());
  const double tokens = 128.0 * c.columns / (c.share == Share::columns ? 2 : 1);
  return {.products = std::max(c.rows() * c.columns / 32.0 * c.operands, kDequantised * c.waves),
          .shared_reads = weights + tokens,
          .streamed = c.group == 0 ? weights : 0,
          .tile_cycles = 1500 + c.rows() * c.columns / 16.0};
}

/// Whatever may be good for a class.
std::vector<TmaConfig> pool(std::int64_t m_class, int operands) {
  std::vector<TmaConfig> all;
  const auto add = [&](int warpgroups, int waves, int columns) {
    TmaConfig c{{.swapped = true, .warpgroups = warpgroups, .waves = waves, .columns = columns}, operands};
    const bool one_high = m_class != kAny && m_class <= columns;
    for (const Share share : {Share::columns, Share::none})
      for (const int group : {8, 16}) {
        c.share = share;
        c.group = one_high ? 0 : group;
        if (!one_high || group == 8)
          all.push_back(c);
      }
    c.share = Share::none;
    c.group = one_high ? 0 : 8;
    for (c.split = 2; m_class != kAny && c.split <= 4; c.split *= 2)
      all.push_back(c);
  };
  for (const int columns : {128, 192, 160, 96, 64})
    add(2, 1, columns);
  for (const int columns : {96, 64})
    add(2, 2, columns);
  add(1, 2, 128);
  add(1, 1, 128);
  return all;
}

} // namespace

Status check(const Shape& shape, std::int64_t m_class, const TmaConfig& c) {
  const auto refuse = [&](std::string_view why) {
    return Status::error(Code::invalid_argument, fmt::format("int4_mm: configuration {}: {}", c.text(), why));
  };
  if (c.operands < 1 || c.operands > 3)
    return refuse("a number is out of its range");
  if (!c.swapped || c.waves > 2 || c.share == Share::rows)
    return refuse("weights are the 64-row operand, in two waves at most, and not shared");
  // One wave awaits the next stage while it holds that of its running products and the one before.
  if (c.waves == 1 && c.stages < 3)
    return refuse("fewer than three stages");
  if (const std::string why = why_not(c, k_steps(shape), m_class, 8, true, shared_bytes_for(shape)); !why.empty())
    return refuse(why);
  return {};
}

std::vector<TmaConfig> candidates(const Shape& shape, std::int64_t m_class, int operands) {
  std::vector<TmaConfig> good;
  for (const TmaConfig& c : pool(m_class, operands)) {
    const TmaConfig config = with_stages(c, k_steps(shape), shared_bytes_for(shape));
    if (check(shape, m_class, config))
      good.push_back(config);
  }
  return best_of(std::move(good), usual_rows(m_class, class_before(int4_mm::kMClasses, m_class)), kCandidates,
                 [&](const TmaConfig& c, std::int64_t m) {
                   return persistent_cycles(c, shape.n, m, k_steps(shape), cost_of(shape, c));
                 });
}

} // namespace kiln::nvidia::int4
