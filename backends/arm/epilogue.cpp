#include "backends/arm/epilogue.h"

#include <cstddef>

namespace kiln::arm {

using namespace asmjit::a64;
using int8_mm::Act;
using int8_mm::CDtype;
using int8_mm::Rescale;
using int8_mm::Rounding;
using int8_mm::Scalars;

namespace {

VecV v(std::uint32_t id) {
  return VecV(id);
}

constexpr std::uint32_t kSums = 0, kLow = 1, kHigh = 2, kTemp = 3, kSloped = 4, kMask = 5;
// Of four columns:
constexpr std::uint32_t kOffset = 8, kZp = 9, kRowSum = 10, kMultiplier = 11, kMinusShift = 12, kNudge = 14;
// Of all:
constexpr std::uint32_t kLo = 16, kHi = 17, kCZp = 18, kSlope = 19, kZero = 20, kSlopeMultiplier = 22,
                        kSlopeMinusShift = 23, kSlopeNudge = 24, kNan = 25, kBf16Half = 26, kOne = 27;

} // namespace

void EpilogueEmitter::load_scalars(const GpX& call, const GpX& scratch) {
  const auto load = [&](std::uint32_t to, std::size_t offset) {
    a_.ldr(scratch, ptr(call, static_cast<std::int32_t>(offsetof(int8_mm::Call, scalars))));
    a_.add(scratch, scratch, offset);
    a_.ld1r(v(to).s4(), ptr(scratch));
  };
  const auto constant = [&](std::uint32_t to, std::uint32_t bits) {
    a_.mov(scratch.w(), bits);
    a_.dup(v(to).s4(), scratch.w());
  };
  const bool is_float = epilogue_.has_float_output();
  a_.movi(v(kZero).s4(), 0);
  if (epilogue_.has_lower_bound())
    load(kLo, is_float ? offsetof(Scalars, lo_f) : offsetof(Scalars, lo));
  if (epilogue_.has_upper_bound())
    load(kHi, is_float ? offsetof(Scalars, hi_f) : offsetof(Scalars, hi));
  if (epilogue_.c_zp)
    load(kCZp, offsetof(Scalars, c_zp));
  if (epilogue_.has_float_slope()) {
    load(kSlope, offsetof(Scalars, slope));
    constant(kNan, is_float ? 0x7FC0'0000 : 0);
  }
  if (epilogue_.c_dtype == CDtype::bf16) {
    constant(kBf16Half, 0x7FFF);
    constant(kOne, 1);
  }
  if (epilogue_.has_integer_slope()) {
    load(kSlopeMultiplier, offsetof(Scalars, slope_multiplier));
    load(kTemp, offsetof(Scalars, slope_shift));
    prepare_wide({kSlopeMultiplier, {kSlopeMinusShift, kSlopeMinusShift}, {kSlopeNudge, kSlopeNudge}}, kTemp);
  }
}

void EpilogueEmitter::load_columns(const GpX& terms, int array_bytes, const GpX& scratch) {
  const auto load = [&](std::uint32_t to, int index) {
    if (index < 0)
      return;
    a_.add_constant(scratch, terms, std::int64_t{index} * array_bytes, scratch);
    a_.ldr(v(to), ptr(scratch));
  };
  load(kOffset, terms_.offset);
  load(kZp, terms_.a_zp);
  load(kRowSum, terms_.row_sum);
  load(kMultiplier, terms_.multiplier);
  if (epilogue_.rescale == Rescale::shift_left)
    load(kMinusShift, terms_.shift);
  if (epilogue_.rounds_wide()) {
    load(kTemp, terms_.shift);
    prepare_wide({kMultiplier, {kMinusShift, kMinusShift + 1}, {kNudge, kNudge + 1}}, kTemp);
  }
}

void EpilogueEmitter::prepare_wide(const Wide& wide, std::uint32_t shift) {
  const bool by_lowest_bit = epilogue_.rounding == Rounding::even || epilogue_.rounding == Rounding::odd;
  a_.neg(v(kLow).s4(), v(shift).s4());
  for (int half = 0; half < 2; ++half) {
    if (half == 1 && wide.nudge[1] == wide.nudge[0])
      break; // the same in all lanes
    const VecV minus_shift = v(wide.minus_shift[half]), nudge = v(wide.nudge[half]);
    if (half == 0)
      a_.sxtl(minus_shift.d2(), v(kLow).s2());
    else
      a_.sxtl2(minus_shift.d2(), v(kLow).s4());
    a_.cmtst(nudge.d2(), minus_shift.d2(), minus_shift.d2());
    if (by_lowest_bit)
      a_.ushr(nudge.d2(), nudge.d2(), 63);
  }
}

/// SRSHL adds half of 2^shift before it shifts right, without overflow: ties go up, as plus_inf has it, and less 1 in a
/// lane they go down. A tie's nudge: minus_inf −1, away −[x < 0], zero −[x ≥ 0], even q − 1, odd −q, q the lowest bit
/// of the quotient rounded down.
void EpilogueEmitter::round_wide(std::uint32_t to, const Wide& wide) {
  a_.smull(v(kLow).d2(), v(kSums).s2(), v(wide.multiplier).s2());
  a_.smull2(v(kHigh).d2(), v(kSums).s4(), v(wide.multiplier).s4());
  for (int half = 0; half < 2; ++half) {
    const VecV x = v(half == 0 ? kLow : kHigh), t = v(kTemp);
    const VecV minus_shift = v(wide.minus_shift[half]), nudge = v(wide.nudge[half]);
    switch (epilogue_.rounding) {
    case Rounding::plus_inf:
      break;
    case Rounding::minus_inf:
      a_.add(x.d2(), x.d2(), nudge.d2());
      break;
    case Rounding::away:
    case Rounding::zero:
      a_.sshr(t.d2(), x.d2(), 63);
      if (epilogue_.rounding == Rounding::away)
        a_.and_(t.b16(), nudge.b16(), t.b16());
      else
        a_.bic(t.b16(), nudge.b16(), t.b16());
      a_.add(x.d2(), x.d2(), t.d2());
      break;
    case Rounding::even:
    case Rounding::odd:
      a_.sshl(t.d2(), x.d2(), minus_shift.d2());
      a_.and_(t.b16(), t.b16(), nudge.b16());
      if (epilogue_.rounding == Rounding::even) {
        a_.sub(t.d2(), t.d2(), nudge.d2());
        a_.add(x.d2(), x.d2(), t.d2());
      } else {
        a_.sub(x.d2(), x.d2(), t.d2());
      }
      break;
    }
    a_.srshl(x.d2(), x.d2(), minus_shift.d2());
  }
  a_.xtn(v(to).s2(), v(kLow).d2());
  a_.xtn2(v(to).s4(), v(kHigh).d2());
}

void EpilogueEmitter::apply(const GpX& values, int zp_at, const GpX& scratch) {
  const VecV sums = v(kSums), mask = v(kMask);
  a_.add(sums.s4(), sums.s4(), v(kOffset).s4());
  if (terms_.a_zp >= 0) {
    a_.add(scratch, values, zp_at);
    a_.ld1r(v(kTemp).s4(), ptr(scratch));
    a_.mla(sums.s4(), v(kTemp).s4(), v(kZp).s4());
  }
  if (terms_.row_sum >= 0) {
    a_.ld1r(v(kTemp).s4(), ptr(values));
    a_.mla(sums.s4(), v(kTemp).s4(), v(kRowSum).s4());
  }
  if (epilogue_.rescale == Rescale::scale)
    apply_scale();
  else if (epilogue_.rounds_wide())
    round_wide(kSums, {kMultiplier, {kMinusShift, kMinusShift + 1}, {kNudge, kNudge + 1}});
  else if (epilogue_.rescale == Rescale::shift_left)
    a_.sshl(sums.s4(), sums.s4(), v(kMinusShift).s4());
  if (epilogue_.has_integer_slope()) {
    a_.cmgt(mask.s4(), v(kZero).s4(), sums.s4());
    round_wide(kSloped, {kSlopeMultiplier, {kSlopeMinusShift, kSlopeMinusShift}, {kSlopeNudge, kSlopeNudge}});
    a_.bit(sums.b16(), v(kSloped).b16(), mask.b16());
  }
  if (epilogue_.has_float_output()) {
    if (epilogue_.has_lower_bound()) { // v > lo ? v : lo
      a_.fcmgt(mask.s4(), sums.s4(), v(kLo).s4());
      a_.bif(sums.b16(), v(kLo).b16(), mask.b16());
    }
    if (epilogue_.has_upper_bound()) {
      a_.fcmgt(mask.s4(), v(kHi).s4(), sums.s4());
      a_.bif(sums.b16(), v(kHi).b16(), mask.b16());
    }
  } else {
    if (epilogue_.has_lower_bound())
      a_.smax(sums.s4(), sums.s4(), v(kLo).s4());
    if (epilogue_.has_upper_bound())
      a_.smin(sums.s4(), sums.s4(), v(kHi).s4());
    if (epilogue_.c_zp)
      a_.add(sums.s4(), sums.s4(), v(kCZp).s4());
  }
  switch (epilogue_.c_dtype) {
  case CDtype::s32:
  case CDtype::f32:
    break;
  case CDtype::s8:
    a_.sqxtn(sums.h4(), sums.s4());
    a_.sqxtn(sums.b8(), sums.h8());
    break;
  case CDtype::u8:
    a_.sqxtun(sums.h4(), sums.s4());
    a_.uqxtn(sums.b8(), sums.h8());
    break;
  case CDtype::bf16: // a NaN is 0x7FC00000
    a_.ushr(v(kTemp).s4(), sums.s4(), 16);
    a_.and_(v(kTemp).b16(), v(kTemp).b16(), v(kOne).b16());
    a_.add(sums.s4(), sums.s4(), v(kBf16Half).s4());
    a_.add(sums.s4(), sums.s4(), v(kTemp).s4());
    a_.shrn(sums.h4(), sums.s4(), 16);
    break;
  case CDtype::f16:
    a_.fcvtn(sums.h4(), sums.s4());
    break;
  }
}

void EpilogueEmitter::apply_scale() {
  const VecV y = v(kSums), mask = v(kMask), sloped = v(kSloped);
  a_.scvtf(y.s4(), y.s4());
  a_.fmul(y.s4(), y.s4(), v(kMultiplier).s4());
  if (epilogue_.has_float_slope()) {
    a_.fmul(sloped.s4(), y.s4(), v(kSlope).s4());
    a_.fcmgt(mask.s4(), v(kZero).s4(), y.s4());
    a_.bit(y.b16(), sloped.b16(), mask.b16());
    a_.fcmeq(mask.s4(), y.s4(), y.s4()); // an infinity times a slope of 0 becomes our NaN
    a_.bif(y.b16(), v(kNan).b16(), mask.b16());
  }
  if (!epilogue_.has_float_output())
    a_.fcvtns(y.s4(), y.s4()); // half to even, saturating
}

/// The first `count` (1, 2, 4) elements of v0 to `to` + `at`.
void EpilogueEmitter::store_elements(const GpX& to, int count, int at) {
  const VecV results = v(kSums);
  switch (count * epilogue_.c_bytes()) {
  case 1:
    return static_cast<void>(a_.str(results.b(), ptr(to, at)));
  case 2:
    return static_cast<void>(a_.str(results.h(), ptr(to, at)));
  case 4:
    return static_cast<void>(a_.str(results.s(), ptr(to, at)));
  case 8:
    return static_cast<void>(a_.str(results.d(), ptr(to, at)));
  default:
    a_.str(results, ptr(to, at));
  }
}

void EpilogueEmitter::store(const GpX& to) {
  store_elements(to, 4, 0);
}

void EpilogueEmitter::store_some(const GpX& to, const GpX& left, const asmjit::Label& done) {
  const asmjit::Label one = a_.newLabel();
  const int two_bytes = 2 * epilogue_.c_bytes();
  a_.tbz(left, 1, one);
  store_elements(to, 2, 0);
  a_.tbz(left, 0, done);
  a_.ext(v(kSums).b16(), v(kSums).b16(), v(kSums).b16(), two_bytes);
  store_elements(to, 1, two_bytes);
  a_.b(done);
  a_.bind(one);
  store_elements(to, 1, 0);
  a_.b(done);
}

} // namespace kiln::arm
