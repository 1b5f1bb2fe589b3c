#include "backends/nvidia/int8_mm.h"
#include "backends/nvidia/persistent_choice.h"
#include "jit/ops/int8_mm.h"

/// Which configuration on Hopper serves a shape: what one may be, the one taken without timing, those worth timing.
namespace kiln::nvidia::int8 {
namespace {

constexpr std::size_t kCandidates = 16;

std::int64_t k_steps(const Shape& shape) {
  return (shape.k + 127) / 128;
}
std::int64_t shared_bytes(const TmaConfig& config) {
  return config.shared_bytes();
}

StepCost cost_of(const Shape& shape, const TmaConfig& c) {
  const int halved = c.share == Share::rows ? c.rows() : c.share == Share::columns ? c.columns : 0;
  const double element = shape.output == Output::s32 ? 4 : shape.output == Output::bf16 ? 2 : 1;
  return {.products = c.rows() * c.columns / 32.0,
          .shared_reads = 128.0 * (c.rows() + c.columns - halved / 2),
          .streamed = c.group == 0 ? 128.0 * (c.swapped ? c.rows() : c.columns) : 0,
          .tile_cycles = 1000 + c.rows() * c.columns * element / 24};
}

/// Whatever may be good for a class.
std::vector<TmaConfig> pool(std::int64_t m_class) {
  std::vector<TmaConfig> all;
  const auto add = [&](TmaConfig c) {
    const bool one_high = m_class != kAny && m_class <= (c.swapped ? c.columns : c.rows());
    for (const Share share : {Share::none, Share::columns, Share::rows})
      for (const int group : {8, 16}) {
        c.share = share;
        c.group = one_high ? 0 : group;
        const bool along_m = (share == Share::rows) == c.swapped;
        if ((share == Share::none || !(one_high && along_m)) && (!one_high || group == 8))
          all.push_back(c);
      }
    c.share = Share::none;
    c.group = one_high ? 0 : 8;
    for (c.split = 2; m_class != kAny && c.split <= 4; c.split *= 2)
      all.push_back(c);
  };
  if (m_class == kAny || m_class >= 128)
    for (const int columns : {256, 192, 128, 64})
      add({{.warpgroups = 2, .waves = 1, .columns = columns}});
  if (m_class != kAny && m_class <= 256)
    for (const int warpgroups : {1, 2})
      add({{.swapped = true, .warpgroups = warpgroups, .waves = 1, .columns = static_cast<int>(m_class)}});
  return all;
}

} // namespace

Status check(const Shape& shape, std::int64_t m_class, const TmaConfig& c) {
  const auto refuse = [&](std::string_view why) {
    return Status::error(Code::invalid_argument, fmt::format("int8_mm: configuration {}: {}", c.text(), why));
  };
  if (shape.k < 1)
    return refuse("K is 0");
  // wgmma's n of s8 ("wgmma.mma_async", shapes).
  if (const std::string why = why_not(c, k_steps(shape), m_class, c.columns <= 32 ? 8 : 16, true, shared_bytes);
      !why.empty())
    return refuse(why);
  return {};
}

std::vector<TmaConfig> candidates(const Shape& shape, std::int64_t m_class) {
  std::vector<TmaConfig> good;
  for (const TmaConfig& c : pool(m_class)) {
    const TmaConfig config = with_stages(c, k_steps(shape), shared_bytes);
    if (check(shape, m_class, config))
      good.push_back(config);
  }
  return best_of(std::move(good), usual_rows(m_class, class_before(int8_mm::kGpuMClasses, m_class)), kCandidates,
                 [&](const TmaConfig& c, std::int64_t m) {
                   return persistent_cycles(c, shape.n, m, k_steps(shape), cost_of(shape, c));
                 });
}

} // namespace kiln::nvidia::int8
