#include "backends/arm/epilogue_sve.h"

#include <algorithm>
#include <cstddef>

namespace kiln::arm {

using int8_mm::CDtype;
using int8_mm::Rounding;
using int8_mm::Scalars;
using sve::Element;
using sve::P;
using sve::Z;
using GpX = asmjit::a64::GpX;

namespace {

// Numbers of free registers that hold operands of the last stages.
constexpr std::size_t kLo = 0, kHi = 1, kCZp = 2, kBf16Half = 3, kTemp = 4;

} // namespace

void SveEpilogue::load(std::uint32_t to, const GpX& base, std::int64_t offset, const GpX& scratch) {
  constexpr std::int64_t kReach = 255; // LDR (vector): −256 … 255 vectors
  if (offset % vector_bytes_ == 0 && offset / vector_bytes_ <= kReach) {
    a_.word(sve::ldr(Z{to}, base, static_cast<int>(offset / vector_bytes_)));
    return;
  }
  a_.add_constant(scratch, base, offset, scratch);
  a_.word(sve::ldr(Z{to}, scratch, 0));
}

void SveEpilogue::broadcast(std::uint32_t to, const GpX& base, std::int64_t offset) {
  a_.word(sve::ld1rw(Z{to}, all_, base, static_cast<int>(offset)));
}

void SveEpilogue::add(std::uint32_t to, std::uint32_t by) {
  a_.word(sve::add(Element::s, Z{to}, Z{to}, Z{by}));
}

void SveEpilogue::add_products(const TileSums& sums, const TileTerms& at, std::int64_t value_at, int array) {
  constexpr int kReach = 252; // LD1RW
  constexpr std::size_t kValues = 2;
  const int group = static_cast<int>(sums.free.size() - kValues);
  for (int first = 0; first < sums.vectors; first += group) {
    const int last = std::min(sums.vectors, first + group);
    const auto of_columns = [&](int vector) {
      return Z{sums.free[kValues + static_cast<std::size_t>(vector - first)]};
    };
    for (int vector = first; vector < last; ++vector)
      load(of_columns(vector).id, at.terms, term(at, vector, array), at.scratch);
    const bool far = value_at + 4 * (sums.rows - 1) > kReach;
    if (far)
      a_.add_constant(at.scratch, at.values, value_at, at.scratch);
    for (int row = 0; row < sums.rows; ++row) {
      const Z value{sums.free[static_cast<std::size_t>(row) % kValues]};
      a_.word(sve::ld1rw(value, all_, far ? at.scratch : at.values, static_cast<int>(far ? 0 : value_at) + 4 * row));
      for (int vector = first; vector < last; ++vector)
        a_.word(sve::mla(Element::s, Z{sums.at(row, vector)}, all_, of_columns(vector), value));
    }
  }
}

void SveEpilogue::shift_left(const Registers& sums, std::uint32_t by) {
  for (const std::uint32_t sum : sums)
    a_.word(sve::lsl(Element::s, Z{sum}, all_, Z{by}));
}

void SveEpilogue::scale(const Registers& sums, std::uint32_t by) {
  for (const std::uint32_t sum : sums)
    a_.word(sve::scvtf(Z{sum}, all_, Z{sum}));
  for (const std::uint32_t sum : sums)
    a_.word(sve::fmul(Z{sum}, Z{sum}, Z{by}));
}

/// An infinity times a slope of 0 is the processor's default NaN, which is Kiln's.
void SveEpilogue::scale_negative(const Registers& sums, const Registers&, std::uint32_t by) {
  for (std::size_t i = 0; i < sums.size(); ++i) {
    const P negative = temps_[i % temps_.size()];
    a_.word(sve::fcmlt_zero(negative, all_, Z{sums[i]}));
    a_.word(sve::fmul(Z{sums[i]}, negative, Z{by}));
  }
}

void SveEpilogue::to_integers(const Registers& sums) {
  for (const std::uint32_t sum : sums) // half to even
    a_.word(sve::frintn(Z{sum}, all_, Z{sum}));
  for (const std::uint32_t sum : sums) // saturating; NaN is 0
    a_.word(sve::fcvtzs(Z{sum}, all_, Z{sum}));
}

void SveEpilogue::round(const Registers& sums, const Registers& free, bool slope) {
  const Rounding rounding = slope ? of_negative(epilogue_.rounding) : epilogue_.rounding;
  level_ == Level::sve ? round_by_sve1(sums, free, slope, rounding) : round_by_sve2(sums, free, slope, rounding);
}

/// Products of even and of odd lanes, in 64 bits; SRSHL rounds them, ties up, as plus_inf has it.
///   minus_inf   −round(−v): the multiplier is negated, and the result
///   zero        −|sum| is rounded, then negated where the sum was above 0
///   away        |sum| is, then negated where it was below
///   odd, even   as NeonEpilogue::round has it: a tie gets 1 less where bit `shift` of v, or of −v, is set
void SveEpilogue::round_by_sve2(const Registers& sums, const Registers& free, bool slope, Rounding rounding) {
  const bool by_bit = rounding == Rounding::even || rounding == Rounding::odd,
             by_magnitude = rounding == Rounding::zero || rounding == Rounding::away;
  const Z multiplier{free[0]}, shift{free[1]}, of_sign{free[1]};
  const Z minus_shift[2] = {{free[2]}, {free[slope ? 2 : 3]}};
  const Z to_sign[2] = {{free[slope ? 3 : 4]}, {free[slope ? 3 : 5]}};
  const std::size_t first_temp = slope ? 4 : by_bit ? 6 : 4;
  const Z t{free[first_temp]};
  const auto widen = [&](const Z(&to)[2]) {
    a_.word(sve::sxtw(to[0], all_, t));
    if (!slope)
      a_.word(sve::asr(Element::d, to[1], t, 32));
  };
  a_.word(sve::neg(Element::s, t, all_, shift));
  widen(minus_shift);
  if (by_bit) {
    a_.word(sve::add(Element::s, t, 63));
    widen(to_sign);
    const P shifts = temps_[0];
    a_.word(sve::cmpgt(Element::s, shifts, all_, shift, 0));
    a_.word(sve::dup(Element::s, of_sign, 0));
    if (rounding == Rounding::even)
      a_.word(sve::neg(Element::s, of_sign, shifts, multiplier));
    else
      a_.word(sve::sel(Element::s, of_sign, shifts, multiplier, of_sign));
  }
  if (rounding == Rounding::minus_inf)
    a_.word(sve::neg(Element::s, multiplier, all_, multiplier));

  // As many sums side by side as there are registers for, so that no instruction waits for the one before.
  const std::size_t width = std::min((free.size() - first_temp) / 2, temps_.size());
  for (std::size_t first = 0; first < sums.size(); first += width) {
    const std::size_t count = std::min(width, sums.size() - first);
    const auto sum = [&](std::size_t i) { return Z{sums[first + i]}; };
    const auto half = [&](std::size_t i, int odd) {
      return Z{free[first_temp + 2 * i + static_cast<std::size_t>(odd)]};
    };
    const auto each = [&](auto&& emit) {
      for (std::size_t i = 0; i < count; ++i)
        emit(i);
    };
    const auto each_half = [&](auto&& emit) {
      for (std::size_t i = 0; i < count; ++i)
        for (int odd = 0; odd < 2; ++odd)
          emit(i, odd);
    };
    const auto product = [&](std::size_t i, int odd, Z by) {
      const bool is_unsigned = rounding == Rounding::away;
      a_.word(odd == 0 ? (is_unsigned ? sve::umullb : sve::smullb)(half(i, odd), sum(i), by)
                       : (is_unsigned ? sve::umullt : sve::smullt)(half(i, odd), sum(i), by));
    };
    if (by_magnitude) {
      each([&](std::size_t i) {
        a_.word(rounding == Rounding::zero ? sve::cmpgt(Element::s, temps_[i], all_, sum(i), 0)
                                           : sve::cmplt(Element::s, temps_[i], all_, sum(i), 0));
      });
      each([&](std::size_t i) { a_.word(sve::neg(Element::s, sum(i), temps_[i], sum(i))); });
    }
    if (by_bit) {
      each_half([&](std::size_t i, int odd) { product(i, odd, of_sign); });
      each_half([&](std::size_t i, int odd) { a_.word(sve::lsl(Element::d, half(i, odd), all_, to_sign[odd])); });
      each_half([&](std::size_t i, int odd) { a_.word(sve::asr(Element::d, half(i, odd), half(i, odd), 63)); });
      each_half([&](std::size_t i, int odd) {
        a_.word(odd == 0 ? sve::smlalb(half(i, odd), sum(i), multiplier)
                         : sve::smlalt(half(i, odd), sum(i), multiplier));
      });
    } else {
      each_half([&](std::size_t i, int odd) { product(i, odd, multiplier); });
    }
    each_half([&](std::size_t i, int odd) { a_.word(sve::srshl(Element::d, half(i, odd), all_, minus_shift[odd])); });
    const auto result = [&](std::size_t i) { return slope ? half(i, 0) : sum(i); };
    each([&](std::size_t i) { a_.word(sve::trn1(Element::s, result(i), half(i, 0), half(i, 1))); });
    if (rounding == Rounding::minus_inf)
      each([&](std::size_t i) { a_.word(sve::neg(Element::s, result(i), all_, result(i))); });
    if (by_magnitude)
      each([&](std::size_t i) { a_.word(sve::neg(Element::s, sum(i), temps_[i], sum(i))); });
    if (slope) {
      each([&](std::size_t i) { a_.word(sve::cmplt(Element::s, temps_[i], all_, sum(i), 0)); });
      each([&](std::size_t i) { a_.word(sve::sel(Element::s, sum(i), temps_[i], result(i), sum(i))); });
    }
  }
}

/// Even and odd lanes widened, times multipliers of 64 bits. A shift of 0 becomes one of 1 with twice the multiplier,
/// whose bits above the 64 do not count. `bias` is added to v before it is shifted, h half of 2^shift:
///   plus_inf    h
///   minus_inf   h − 1
///   away, zero  h, h − 1; of |sum|, then negated where it was below 0
///   even        h − 1, and 1 more where that makes the quotient odd: of a tie, rounded down
///   odd         h + 1, whose quotient of a tie is the one rounded up: less 2, and 1 more where that is odd
void SveEpilogue::round_by_sve1(const Registers& sums, const Registers& free, bool slope, Rounding rounding) {
  const bool by_magnitude = rounding == Rounding::zero || rounding == Rounding::away;
  const int halves = slope ? 1 : 2; // of operands
  const P p = temps_[0];
  const Z multiplier[2] = {{free[2]}, {free[slope ? 2 : 0]}}, shift[2] = {{free[3]}, {free[slope ? 3 : 1]}},
          bias[2] = {{free[4]}, {free[slope ? 4 : 5]}};
  const Z odd_half{free[6]}, t{free[7]};
  a_.word(sve::sxtw(multiplier[0], all_, Z{free[0]}));
  a_.word(sve::sxtw(shift[0], all_, Z{free[1]}));
  if (!slope) {
    a_.word(sve::asr(Element::d, multiplier[1], Z{free[0]}, 32));
    a_.word(sve::asr(Element::d, shift[1], Z{free[1]}, 32));
  }
  for (int half = 0; half < halves; ++half) {
    a_.word(sve::cmpeq(Element::d, p, all_, shift[half], 0));
    a_.word(sve::add(Element::d, multiplier[half], p, multiplier[half]));
    a_.word(sve::smax(Element::d, shift[half], 1));
    a_.word(sve::movprfx(t, shift[half]));
    a_.word(sve::sub(Element::d, t, 1));
    a_.word(sve::dup(Element::d, bias[half], 1));
    a_.word(sve::lsl(Element::d, bias[half], all_, t));
    if (rounding == Rounding::odd)
      a_.word(sve::add(Element::d, bias[half], 1));
    else if (rounding != Rounding::plus_inf && rounding != Rounding::away)
      a_.word(sve::sub(Element::d, bias[half], 1));
  }
  for (const std::uint32_t i : sums) {
    const Z sum{i}, even_half = slope ? Z{free[5]} : sum;
    if (by_magnitude) {
      a_.word(sve::cmplt(Element::s, p, all_, sum, 0));
      a_.word(sve::neg(Element::s, sum, p, sum));
      a_.word(sve::lsr(Element::d, odd_half, sum, 32));
      a_.word(sve::uxtw(even_half, all_, sum));
    } else {
      a_.word(sve::asr(Element::d, odd_half, sum, 32));
      a_.word(sve::sxtw(even_half, all_, sum));
    }
    const Z halves_of_sum[2] = {even_half, odd_half};
    for (int half = 0; half < 2; ++half) {
      const Z x = halves_of_sum[half];
      a_.word(sve::mad(Element::d, x, all_, multiplier[half], bias[half]));
      if (rounding == Rounding::even || rounding == Rounding::odd) {
        a_.word(sve::movprfx(t, x));
        a_.word(sve::asr(Element::d, t, all_, shift[half]));
        a_.word(rounding == Rounding::even ? sve::and_one(Element::d, t) : sve::or_not_one(t));
        a_.word(sve::add(Element::d, x, x, t));
      }
      a_.word(sve::asr(Element::d, x, all_, shift[half]));
    }
    a_.word(sve::trn1(Element::s, even_half, even_half, odd_half));
    if (by_magnitude)
      a_.word(sve::neg(Element::s, sum, p, sum));
    if (slope) {
      a_.word(sve::cmplt(Element::s, p, all_, sum, 0));
      a_.word(sve::sel(Element::s, sum, p, even_half, sum));
    }
  }
}

void SveEpilogue::prepare_stores(const TileSums& sums, const TileTerms& at) {
  const bool is_float = epilogue_.has_float_output();
  const Registers& free = sums.free;
  if (epilogue_.has_lower_bound())
    broadcast(free[kLo], at.scalars, is_float ? offsetof(Scalars, lo_f) : offsetof(Scalars, lo));
  if (epilogue_.has_upper_bound())
    broadcast(free[kHi], at.scalars, is_float ? offsetof(Scalars, hi_f) : offsetof(Scalars, hi));
  if (epilogue_.c_zp)
    broadcast(free[kCZp], at.scalars, offsetof(Scalars, c_zp));
  if (epilogue_.c_dtype == CDtype::bf16) { // 0x7FFF
    a_.word(sve::dup(Element::s, Z{free[kBf16Half]}, -1));
    a_.word(sve::lsr(Element::s, Z{free[kBf16Half]}, Z{free[kBf16Half]}, 17));
  }
}

void SveEpilogue::store_row(const TileSums& sums, int row, const GpX& to, const GpX& scratch) {
  const auto operand = [&](std::size_t i) { return Z{sums.free[i]}; };
  const auto each = [&](auto&& emit) {
    for (int vector = 0; vector < sums.vectors; ++vector)
      emit(Z{sums.at(row, vector)}, static_cast<std::size_t>(vector));
  };
  const bool is_float = epilogue_.has_float_output(), has_lo = epilogue_.has_lower_bound(),
             has_hi = epilogue_.has_upper_bound();
  if (is_float && has_lo) // y > lo ? y : lo, as lo is not −0
    each([&](Z y, std::size_t) { a_.word(sve::fmaxnm(y, all_, operand(kLo))); });
  if (is_float && has_hi) // y < hi ? y : hi; FMINNM would keep a −0 below a bound of +0
    each([&](Z y, std::size_t i) {
      const P below = temps_[i % temps_.size()];
      a_.word(sve::fcmgt(below, all_, operand(kHi), y));
      a_.word(sve::sel(Element::s, y, below, y, operand(kHi)));
    });
  const bool clamps = !is_float && has_lo && has_hi && level_ == Level::streaming;
  if (clamps)
    each([&](Z y, std::size_t) { a_.word(sve::sclamp(Element::s, y, operand(kLo), operand(kHi))); });
  if (!is_float && has_lo && !clamps)
    each([&](Z y, std::size_t) { a_.word(sve::smax(Element::s, y, all_, operand(kLo))); });
  if (!is_float && has_hi && !clamps)
    each([&](Z y, std::size_t) { a_.word(sve::smin(Element::s, y, all_, operand(kHi))); });
  if (epilogue_.c_zp)
    each([&](Z y, std::size_t) { a_.word(sve::add(Element::s, y, y, operand(kCZp))); });
  Element bytes = Element::s;
  switch (epilogue_.c_dtype) {
  case CDtype::s32:
  case CDtype::f32:
    break;
  case CDtype::s8:
    bytes = Element::b;
    if (!has_lo)
      each([&](Z y, std::size_t) { a_.word(sve::smax(Element::s, y, -128)); });
    if (!has_hi)
      each([&](Z y, std::size_t) { a_.word(sve::smin(Element::s, y, 127)); });
    break;
  case CDtype::u8:
    bytes = Element::b;
    if (!has_lo)
      each([&](Z y, std::size_t) { a_.word(sve::smax(Element::s, y, 0)); });
    if (!has_hi)
      each([&](Z y, std::size_t) { a_.word(sve::umin(Element::s, y, 255)); });
    break;
  case CDtype::f16:
    bytes = Element::h;
    each([&](Z y, std::size_t) { a_.word(sve::fcvt_h(y, all_, y)); });
    break;
  case CDtype::bf16: { // to nearest even
    bytes = Element::h;
    const auto temp = [&](std::size_t i) { return operand(kTemp + i % 4); };
    each([&](Z y, std::size_t i) {
      a_.word(sve::lsr(Element::s, temp(i), y, 16));
      a_.word(sve::and_one(Element::s, temp(i)));
      a_.word(sve::add(Element::s, y, y, operand(kBf16Half)));
      a_.word(sve::add(Element::s, y, y, temp(i)));
      a_.word(sve::lsr(Element::s, y, y, 16));
    });
    break;
  }
  }
  constexpr int kReach = 7; // ST1B … ST1W (scalar plus immediate): −8 … 7 vectors
  each([&](Z y, std::size_t i) {
    const int vector = static_cast<int>(i), before = vector > kReach ? kReach + 1 : 0;
    if (before > 0 && vector == before)
      a_.add(scratch, to, before * vector_bytes_ / 4 * epilogue_.c_bytes());
    a_.word(sve::st1_of_s(bytes, y, columns_, before > 0 ? scratch : to, vector - before));
  });
}

} // namespace kiln::arm
