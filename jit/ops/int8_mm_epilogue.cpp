#include "jit/ops/int8_mm_epilogue.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>
#include <limits>
#include <vector>

#include <fmt/format.h>

#include "jit/bf16.h"
#include "jit/f16.h"

namespace kiln::int8_mm {
namespace {

/// b as it is packed is b less this.
std::int32_t b_shift(const Epilogue& e) {
  return e.b_dtype == BDtype::u8 ? 128 : 0;
}

// s32 arithmetic that wraps.
std::int32_t wrap(std::uint32_t v) {
  return static_cast<std::int32_t>(v);
}
std::uint32_t bits(std::int32_t v) {
  return static_cast<std::uint32_t>(v);
}

// ---------------------------------------------------------------- values

constexpr std::int32_t kMostMult = std::numeric_limits<std::int32_t>::max();
constexpr std::int32_t kLeastQShift = -62, kMostQShift = 31, kMostShiftRight = 62, kMostShiftLeft = 31;

Status bad(std::string_view name, const std::string& value, std::string_view allowed) {
  return Status::error(Code::invalid_argument, fmt::format("int8_mm: {} is {}: allowed is {}", name, value, allowed));
}

Status missing(std::string_view name, std::int64_t count, std::string_view of) {
  return bad(name, "null", fmt::format("{} value{}{}", count, count == 1 ? "" : "s", of));
}

/// All of `count` values lie in [min, max]. The common case is one vector loop.
Status check_range(std::string_view name, const std::int32_t* values, std::int64_t count, std::int32_t min,
                   std::int32_t max) {
  std::int32_t least = max, most = min;
  for (std::int64_t i = 0; i < count; ++i) {
    least = std::min(least, values[i]);
    most = std::max(most, values[i]);
  }
  if (least >= min && most <= max)
    return {};
  const std::int64_t at =
      std::find_if(values, values + count, [&](std::int32_t v) { return v < min || v > max; }) - values;
  return bad(count == 1 ? std::string(name) : fmt::format("{}[{}]", name, at), std::to_string(values[at]),
             fmt::format("{} to {}", min, max));
}

Status check_finite(std::string_view name, const float* values, std::int64_t count) {
  std::uint32_t not_finite = 0;
  for (std::int64_t i = 0; i < count; ++i)
    not_finite |= static_cast<std::uint32_t>((std::bit_cast<std::uint32_t>(values[i]) & 0x7F80'0000) == 0x7F80'0000);
  if (not_finite == 0)
    return {};
  const std::int64_t at = std::find_if(values, values + count, [](float v) { return !std::isfinite(v); }) - values;
  return bad(count == 1 ? std::string(name) : fmt::format("{}[{}]", name, at), fmt::format("{}", values[at]),
             "a finite number");
}

/// What c's type holds.
std::pair<double, double> range_of(CDtype dtype) {
  switch (dtype) {
  case CDtype::s8:
    return {-128, 127};
  case CDtype::u8:
    return {0, 255};
  case CDtype::s32:
    return {-0x1p31, 0x1p31 - 1};
  case CDtype::f32:
    return {-std::numeric_limits<float>::max(), std::numeric_limits<float>::max()};
  case CDtype::bf16:
    return {-0x1.FEp127, 0x1.FEp127};
  case CDtype::f16:
    return {-65504, 65504};
  }
  return {0, 0};
}

std::string_view text_of(CDtype dtype) {
  constexpr std::string_view names[] = {"s32", "s8", "bf16", "u8", "f32", "f16"};
  return names[static_cast<int>(dtype)];
}

Status check_clamp(const Epilogue& e, const EpilogueValues& v) {
  const auto [least, most] = range_of(e.c_dtype);
  for (const auto& [name, bound] : {std::pair{"lo", v.lo}, {"hi", v.hi}}) {
    const bool infinite = e.has_float_output() && std::isinf(bound);
    const bool whole =
        e.has_float_output() ? static_cast<double>(static_cast<float>(bound)) == bound : std::nearbyint(bound) == bound;
    if (!infinite && !(bound >= least && bound <= most && whole))
      return bad(name, fmt::format("{}", bound),
                 fmt::format("{} from {} to {}{}, what c_dtype={} holds",
                             e.has_float_output() ? "a float" : "an integer", least, most,
                             e.has_float_output() ? ", or an infinity" : "", text_of(e.c_dtype)));
  }
  if (v.lo > v.hi)
    return bad("lo", fmt::format("{}", v.lo), fmt::format("at most hi, {}", v.hi));
  return {};
}

// ---------------------------------------------------------------- shifts and multipliers as code takes them

struct Wide {
  std::int32_t multiplier, shift;
};
/// acc · mult · 2^−s: what lies left of the point is taken into the multiplier, of whose product only 32 bits count.
/// Without branches, so that a loop of it is one of vectors. s ≥ −31.
Wide wide_of(std::int32_t mult, std::int32_t s) {
  return {wrap(bits(mult) << std::max(-s, 0)), std::max(s, 0)};
}

// ---------------------------------------------------------------- the definition

/// OPS.md, "Epilogue", 3: round(v / 2^s), |v| < 2^62.
std::int64_t rounded_shift(std::int64_t v, std::int32_t s, Rounding rounding) {
  if (s <= 0)
    return static_cast<std::int64_t>(static_cast<std::uint64_t>(v) << -s);
  const std::int64_t magnitude = v < 0 ? -v : v, half = std::int64_t{1} << (s - 1), lowest = (magnitude >> s) & 1;
  std::int64_t nudge = 0;
  switch (rounding) {
  case Rounding::zero:
    nudge = -1;
    break;
  case Rounding::away:
    break;
  case Rounding::minus_inf:
    nudge = v >= 0 ? -1 : 0;
    break;
  case Rounding::plus_inf:
    nudge = v <= 0 ? -1 : 0;
    break;
  case Rounding::even:
    nudge = lowest - 1;
    break;
  case Rounding::odd:
    nudge = -lowest;
    break;
  }
  const std::int64_t quotient = (magnitude + half + nudge) >> s;
  return v < 0 ? -quotient : quotient;
}

std::int32_t low_bits(std::int64_t v) {
  return wrap(static_cast<std::uint32_t>(static_cast<std::uint64_t>(v)));
}

/// Half to even, saturated; NaN is 0.
std::int32_t s32_of(float y) {
  if (std::isnan(y))
    return 0;
  return static_cast<std::int32_t>(std::clamp(std::nearbyint(static_cast<double>(y)), -0x1p31, 0x1p31 - 1));
}

void store_integer(const Epilogue& e, const EpilogueValues& v, std::int64_t value, void* c) {
  const auto [least, most] = range_of(e.c_dtype);
  const std::int64_t lo = static_cast<std::int64_t>(e.clamp ? v.lo : least),
                     hi = static_cast<std::int64_t>(e.clamp ? v.hi : most);
  value = std::clamp(value + (e.c_zp ? v.c_zp : 0), lo, hi);
  if (e.c_dtype == CDtype::s32)
    *static_cast<std::int32_t*>(c) = static_cast<std::int32_t>(value);
  else
    *static_cast<std::uint8_t*>(c) = static_cast<std::uint8_t>(value);
}

void store_float(const Epilogue& e, const EpilogueValues& v, float y, void* c) {
  if (e.clamp) {
    const float lo = static_cast<float>(v.lo) + 0.0f, hi = static_cast<float>(v.hi) + 0.0f; // −0 is +0
    y = y > lo ? y : lo;
    y = y < hi ? y : hi;
  }
  if (std::isnan(y))
    y = std::bit_cast<float>(0x7FC0'0000);
  switch (e.c_dtype) {
  case CDtype::bf16:
    *static_cast<std::uint16_t*>(c) = bf16_of_float(y);
    break;
  case CDtype::f16:
    *static_cast<std::uint16_t*>(c) = f16_of_float(y);
    break;
  default:
    std::memcpy(c, &y, sizeof y);
  }
}

template <class T> T at(const T* values, bool each, std::int64_t i) {
  return values[each ? i : 0];
}

} // namespace

Epilogue Epilogue::of(const KernelDesc& d) {
  const auto as = [&]<class E>(E, Field field) { return static_cast<E>(d.value[field]); };
  return {.a_dtype = as(ADtype(), kADtype),
          .b_dtype = as(BDtype(), kBDtype),
          .c_dtype = as(CDtype(), kCDtype),
          .a_zp = as(AZp(), kAZp),
          .b_zp = as(BZp(), kBZp),
          .bias = d.value[kBias] != 0,
          .rescale = as(Rescale(), kRescale),
          .rescale_per = as(RescalePer(), kRescalePer),
          .rounding = as(Rounding(), kRounding),
          .act = as(Act(), kAct),
          .c_zp = d.value[kCZp] != 0,
          .clamp = d.value[kClamp] != 0};
}

int Epilogue::c_bytes() const {
  switch (c_dtype) {
  case CDtype::s8:
  case CDtype::u8:
    return 1;
  case CDtype::bf16:
  case CDtype::f16:
    return 2;
  default:
    return 4;
  }
}

Status check_values(const Epilogue& e, const EpilogueValues& v, std::int64_t n) {
  const bool per_channel = e.rescale_per == RescalePer::channel;
  const std::int64_t count = per_channel ? n : 1;
  const std::string_view of = per_channel ? ", one for each of n" : "";
  if (e.a_zp != AZp::none && v.a_zp == nullptr)
    return e.a_zp == AZp::row ? bad("a_zp", "null", "one value for each of m") : missing("a_zp", 1, "");
  if (e.b_zp != BZp::none && v.b_zp == nullptr)
    return e.b_zp == BZp::channel ? missing("b_zp", n, ", one for each of n") : missing("b_zp", 1, "");
  if (e.bias && v.bias == nullptr)
    return missing("bias", n, ", one for each of n");
  switch (e.rescale) {
  case Rescale::none:
    break;
  case Rescale::scale:
    if (v.scale == nullptr)
      return missing("scale", count, of);
    if (Status s = check_finite("scale", v.scale, count); !s)
      return s;
    break;
  case Rescale::q_scale:
    if (v.mult == nullptr)
      return missing("mult", count, of);
    if (Status s = check_range("mult", v.mult, count, 1, kMostMult); !s)
      return s;
    [[fallthrough]];
  case Rescale::shift_right:
  case Rescale::shift_left:
    if (v.shift == nullptr)
      return missing("shift", count, of);
    if (Status s = check_range("shift", v.shift, count, e.rescale == Rescale::q_scale ? kLeastQShift : 0,
                               e.rescale == Rescale::q_scale       ? kMostQShift
                               : e.rescale == Rescale::shift_right ? kMostShiftRight
                                                                   : kMostShiftLeft);
        !s)
      return s;
    break;
  }
  if (e.has_integer_slope()) {
    if (Status s = check_range("slope_mult", &v.slope_mult, 1, 1, kMostMult); !s)
      return s;
    if (Status s = check_range("slope_shift", &v.slope_shift, 1, kLeastQShift, kMostQShift); !s)
      return s;
  }
  if (e.has_float_slope())
    if (Status s = check_finite("slope", &v.slope, 1); !s)
      return s;
  return e.clamp ? check_clamp(e, v) : Status();
}

TermsLayout TermsLayout::of(const Epilogue& e) {
  TermsLayout layout;
  const auto add = [&](int& index, bool present) {
    if (present)
      index = layout.count++;
  };
  add(layout.a_zp, e.a_zp == AZp::row);
  add(layout.row_sum, e.needs_row_sums());
  add(layout.multiplier, e.rounds_wide() || e.rescale == Rescale::scale);
  add(layout.shift, e.rounds_wide() || e.rescale == Rescale::shift_left);
  return layout;
}

Scalars scalars_of(const Epilogue& e, const EpilogueValues& v) {
  constexpr std::int64_t kMin = std::numeric_limits<std::int32_t>::min(),
                         kMax = std::numeric_limits<std::int32_t>::max();
  Scalars out;
  if (e.has_float_output()) {
    constexpr float infinity = std::numeric_limits<float>::infinity();
    out.lo_f = e.clamp ? static_cast<float>(v.lo) + 0.0f : -infinity; // −0 becomes +0
    out.hi_f = e.clamp ? static_cast<float>(v.hi) + 0.0f : infinity;
    if (e.act == Act::relu)
      out.lo_f = std::max(out.lo_f, 0.0f);
  } else {
    const auto [least, most] = range_of(e.c_dtype);
    const std::int64_t zp = e.c_zp ? v.c_zp : 0;
    const std::int64_t lo = static_cast<std::int64_t>(e.clamp ? v.lo : least) - zp,
                       hi = static_cast<std::int64_t>(e.clamp ? v.hi : most) - zp;
    // Bounds beyond s32 on one side are never reached, on the other always.
    if (lo > kMax || hi < kMin) {
      out.c_zp = static_cast<std::int32_t>(lo > kMax ? lo + zp : hi + zp);
    } else {
      out.lo = static_cast<std::int32_t>(std::max(lo, kMin));
      out.hi = static_cast<std::int32_t>(std::min(hi, kMax));
      out.c_zp = static_cast<std::int32_t>(zp);
      if (e.act == Act::relu) // before c_zp is added; `hi` comes last and wins
        out.lo = std::max(out.lo, 0);
    }
  }
  if (e.has_integer_slope()) {
    const Wide wide = wide_of(v.slope_mult, 31 + v.slope_shift);
    out.slope_multiplier = wide.multiplier;
    out.slope_shift = wide.shift;
  }
  out.slope = v.slope;
  return out;
}

void make_terms(const Epilogue& e, const EpilogueValues& v, const PackLayout& pack, std::int64_t k, int a_shift,
                const std::int32_t* b_sums, std::int64_t column, std::int64_t count, std::int32_t* terms) {
  const TermsLayout layout = TermsLayout::of(e);
  const std::int64_t panel = pack.n_block;
  const std::uint32_t k_bits = static_cast<std::uint32_t>(k);
  const auto b_zp = [&](std::int64_t n) { // of b as it is packed
    return (e.b_zp == BZp::none ? 0 : bits(at(v.b_zp, e.b_zp == BZp::channel, n))) - bits(b_shift(e));
  };
  // Array by array, so that each loop is a simple one.
  for (std::int64_t first = 0; first < count; first += panel, terms += layout.count * panel) {
    const std::int64_t here = std::min(panel, count - first), n0 = column + first;
    const std::int32_t* const sums = b_sums + first;
    const auto array = [&](int index) { return terms + index * panel; };
    if (here < panel)
      std::fill_n(terms, layout.count * panel, 0);
    std::int32_t* const offset = array(layout.offset);
    for (std::int64_t j = 0; j < here; ++j)
      offset[j] = wrap(0 - bits(a_shift) * bits(sums[j]));
    if (e.bias)
      for (std::int64_t j = 0; j < here; ++j)
        offset[j] = wrap(bits(offset[j]) + bits(v.bias[n0 + j]));
    if (e.a_zp == AZp::tensor) {
      const std::uint32_t a_zp = bits(v.a_zp[0]);
      for (std::int64_t j = 0; j < here; ++j)
        offset[j] = wrap(bits(offset[j]) - a_zp * (bits(sums[j]) - k_bits * b_zp(n0 + j)));
    }
    if (layout.a_zp >= 0)
      for (std::int64_t j = 0; j < here; ++j)
        array(layout.a_zp)[j] = wrap(k_bits * b_zp(n0 + j) - bits(sums[j]));
    if (layout.row_sum >= 0)
      for (std::int64_t j = 0; j < here; ++j)
        array(layout.row_sum)[j] = wrap(0 - b_zp(n0 + j));
    const bool each = e.rescale_per == RescalePer::channel;
    switch (e.rescale) {
    case Rescale::none:
      break;
    case Rescale::scale:
      for (std::int64_t j = 0; j < here; ++j)
        array(layout.multiplier)[j] = std::bit_cast<std::int32_t>(at(v.scale, each, n0 + j));
      break;
    case Rescale::q_scale:
      if (each) {
        std::int32_t* __restrict const multiplier = array(layout.multiplier);
        std::int32_t* __restrict const shift = array(layout.shift);
        for (std::int64_t j = 0; j < here; ++j) {
          const Wide wide = wide_of(v.mult[n0 + j], 31 + v.shift[n0 + j]);
          multiplier[j] = wide.multiplier;
          shift[j] = wide.shift;
        }
      } else {
        const Wide wide = wide_of(v.mult[0], 31 + v.shift[0]);
        std::fill_n(array(layout.multiplier), here, wide.multiplier);
        std::fill_n(array(layout.shift), here, wide.shift);
      }
      break;
    case Rescale::shift_right:
      std::fill_n(array(layout.multiplier), here, 1);
      [[fallthrough]];
    case Rescale::shift_left:
      for (std::int64_t j = 0; j < here; ++j)
        array(layout.shift)[j] = at(v.shift, each, n0 + j);
      break;
    }
  }
}

void finish_reference(const Epilogue& e, const EpilogueValues& v, std::int64_t k, std::int64_t m, std::int64_t n,
                      std::int32_t sum, std::int32_t a_sum, std::int32_t b_sum, void* c_element) {
  const std::uint32_t a_zp = e.a_zp == AZp::none ? 0 : bits(at(v.a_zp, e.a_zp == AZp::row, m)),
                      b_zp = e.b_zp == BZp::none ? 0 : bits(at(v.b_zp, e.b_zp == BZp::channel, n));
  const std::int32_t acc = wrap(bits(sum) - a_zp * bits(b_sum) - b_zp * bits(a_sum) +
                                static_cast<std::uint32_t>(k) * a_zp * b_zp + (e.bias ? bits(v.bias[n]) : 0));
  const std::int64_t channel = e.rescale_per == RescalePer::channel ? n : 0;
  if (e.rescale == Rescale::scale) {
    float y = static_cast<float>(acc) * v.scale[channel];
    if (e.act == Act::relu)
      y = y > 0 ? y : 0.0f;
    else if (e.act == Act::leaky_relu && y < 0)
      y *= v.slope;
    if (e.has_float_output())
      store_float(e, v, y, c_element);
    else
      store_integer(e, v, s32_of(y), c_element);
    return;
  }
  std::int32_t value = acc;
  if (e.rescale == Rescale::q_scale)
    value = low_bits(rounded_shift(std::int64_t{acc} * v.mult[channel], 31 + v.shift[channel], e.rounding));
  else if (e.rescale == Rescale::shift_right)
    value = low_bits(rounded_shift(acc, v.shift[channel], e.rounding));
  else if (e.rescale == Rescale::shift_left)
    value = low_bits(rounded_shift(acc, -v.shift[channel], e.rounding));
  if (value < 0 && e.act == Act::relu)
    value = 0;
  else if (value < 0 && e.act == Act::leaky_relu)
    value = low_bits(rounded_shift(std::int64_t{value} * v.slope_mult, 31 + v.slope_shift, e.rounding));
  store_integer(e, v, value, c_element);
}

void reference(const Epilogue& e, const EpilogueValues& v, std::int64_t m, std::int64_t n, std::int64_t k,
               const void* a, std::int64_t lda, const void* b, std::int64_t ldb, BLayout b_layout, void* c,
               std::int64_t ldc) {
  const auto element = [](const void* data, std::int64_t i, bool is_u8) -> std::int32_t {
    return is_u8 ? std::int32_t{static_cast<const std::uint8_t*>(data)[i]} : static_cast<const std::int8_t*>(data)[i];
  };
  const bool a_u8 = e.a_dtype == ADtype::u8, b_u8 = e.b_dtype == BDtype::u8;
  const std::int64_t b_n = b_layout == BLayout::nk ? ldb : 1, b_k = b_layout == BLayout::nk ? 1 : ldb;
  const auto sum_of = [&](std::int64_t count, const auto& term) {
    std::uint32_t sum = 0; // unsigned: the sum wraps
    for (std::int64_t p = 0; p < count; ++p)
      sum += bits(term(p));
    return wrap(sum);
  };
  std::vector<std::int32_t> b_sums(static_cast<std::size_t>(n));
  for (std::int64_t j = 0; j < n; ++j)
    b_sums[static_cast<std::size_t>(j)] =
        sum_of(k, [&](std::int64_t p) { return element(b, j * b_n + p * b_k, b_u8); });
  for (std::int64_t i = 0; i < m; ++i) {
    const std::int32_t a_sum = sum_of(k, [&](std::int64_t p) { return element(a, i * lda + p, a_u8); });
    for (std::int64_t j = 0; j < n; ++j) {
      const std::int32_t sum = sum_of(
          k, [&](std::int64_t p) { return element(a, i * lda + p, a_u8) * element(b, j * b_n + p * b_k, b_u8); });
      finish_reference(e, v, k, i, j, sum, a_sum, b_sums[static_cast<std::size_t>(j)],
                       static_cast<std::uint8_t*>(c) + (i * ldc + j) * e.c_bytes());
    }
  }
}

} // namespace kiln::int8_mm
