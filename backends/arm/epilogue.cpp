#include "backends/arm/epilogue.h"

#include <algorithm>
#include <cstddef>

namespace kiln::arm {

using namespace asmjit::a64;
using int8_mm::Act;
using int8_mm::CDtype;
using int8_mm::Rescale;
using int8_mm::Rounding;
using int8_mm::Scalars;

// ---------------------------------------------------------------- the stages

Registers TileSums::column(int vector) const {
  Registers all;
  for (int row = 0; row < rows; ++row)
    all.push_back(at(row, vector));
  return all;
}

Rounding TileEpilogue::of_negative(Rounding rounding) {
  return rounding == Rounding::zero ? Rounding::plus_inf : rounding == Rounding::away ? Rounding::minus_inf : rounding;
}

void TileEpilogue::apply(TileSums& sums, const TileTerms& at) {
  for (int vector = 0; vector < sums.vectors; ++vector) {
    load(sums.free[0], at.terms, term(at, vector, terms_.offset), at.scratch);
    for (const std::uint32_t sum : sums.column(vector))
      add(sum, sums.free[0]);
  }
  apply_rest(sums, at, true, false);
}

void TileEpilogue::apply_rest(const TileSums& sums, const TileTerms& at, bool has_values, bool has_row_sums) {
  if (terms_.a_zp >= 0 && has_values)
    add_products(sums, at, at.zp_at, terms_.a_zp);
  if (terms_.row_sum >= 0 && has_values && !has_row_sums)
    add_products(sums, at, 0, terms_.row_sum);
  const Registers& free = sums.free;
  for (int vector = 0; vector < sums.vectors; ++vector) {
    const auto load_term = [&](std::uint32_t to, int array) {
      load(to, at.terms, term(at, vector, array), at.scratch);
    };
    switch (epilogue_.rescale) {
    case Rescale::none:
      break;
    case Rescale::scale:
      load_term(free[0], terms_.multiplier);
      scale(sums.column(vector), free[0]);
      break;
    case Rescale::shift_left:
      load_term(free[0], terms_.shift);
      shift_left(sums.column(vector), free[0]);
      break;
    case Rescale::q_scale:
    case Rescale::shift_right:
      load_term(free[0], terms_.multiplier);
      load_term(free[1], terms_.shift);
      round(sums.column(vector), free, false);
      break;
    }
  }
  if (epilogue_.has_integer_slope()) {
    broadcast(free[0], at.scalars, offsetof(Scalars, slope_multiplier));
    broadcast(free[1], at.scalars, offsetof(Scalars, slope_shift));
    round(sums.sums, free, true);
  }
  if (epilogue_.has_float_slope()) {
    broadcast(free[0], at.scalars, offsetof(Scalars, slope));
    scale_negative(sums.sums, free, free[0]);
  }
  if (epilogue_.rescale == Rescale::scale && !epilogue_.has_float_output())
    to_integers(sums.sums);
}

// ---------------------------------------------------------------- in NEON registers

namespace {

VecV v(std::uint32_t id) {
  return VecV(id);
}
// Numbers of free registers that hold operands of the last stages.
constexpr std::size_t kLo = 0, kHi = 1, kCZp = 2, kBf16Half = 3, kOne = 4, kTemp = 5;

} // namespace

void NeonEpilogue::load(std::uint32_t to, const GpX& base, std::int64_t offset, const GpX& scratch) {
  constexpr std::int64_t kReach = 4095 * 16; // LDR (SIMD&FP, unsigned offset)
  if (offset % 16 == 0 && offset <= kReach) {
    a_.ldr(v(to), ptr(base, static_cast<std::int32_t>(offset)));
    return;
  }
  a_.add_constant(scratch, base, offset, scratch);
  a_.ldr(v(to), ptr(scratch));
}

void NeonEpilogue::broadcast(std::uint32_t to, const GpX& base, std::int64_t offset) {
  a_.ldr(v(to).s(), ptr(base, static_cast<std::int32_t>(offset)));
  a_.dup(v(to).s4(), v(to).s(0));
}

void NeonEpilogue::add(std::uint32_t to, std::uint32_t by) {
  a_.add(v(to).s4(), v(to).s4(), v(by).s4());
}

void NeonEpilogue::add_products(const TileSums& sums, const TileTerms& at, std::int64_t value_at, int array) {
  constexpr int kLanes = 4;
  const auto values = [&](int row) { return v(sums.free[static_cast<std::size_t>(1 + row / kLanes)]); };
  for (int row = 0; row < sums.rows; row += kLanes)
    a_.ldr(values(row), ptr(at.values, static_cast<std::int32_t>(value_at) + 4 * row));
  for (int vector = 0; vector < sums.vectors; ++vector) {
    const VecV of_columns = v(sums.free[0]);
    load(sums.free[0], at.terms, term(at, vector, array), at.scratch);
    for (int row = 0; row < sums.rows; ++row)
      a_.mla(v(sums.at(row, vector)).s4(), of_columns.s4(), values(row).s(static_cast<std::uint32_t>(row % kLanes)));
  }
}

void NeonEpilogue::shift_left(const Registers& sums, std::uint32_t by) {
  for (const std::uint32_t sum : sums)
    a_.sshl(v(sum).s4(), v(sum).s4(), v(by).s4());
}

void NeonEpilogue::scale(const Registers& sums, std::uint32_t by) {
  for (const std::uint32_t sum : sums)
    a_.scvtf(v(sum).s4(), v(sum).s4());
  for (const std::uint32_t sum : sums)
    a_.fmul(v(sum).s4(), v(sum).s4(), v(by).s4());
}

/// An infinity times a slope of 0 is the processor's default NaN, which is Kiln's.
void NeonEpilogue::scale_negative(const Registers& sums, const Registers& free, std::uint32_t by) {
  for (std::size_t i = 0; i < sums.size(); ++i) {
    const VecV y = v(sums[i]), scaled = v(free[1 + i % 3]), mask = v(free[4 + i % 3]);
    a_.fmul(scaled.s4(), y.s4(), v(by).s4());
    a_.fcmlt(mask.s4(), y.s4(), 0);
    a_.bit(y.b16(), scaled.b16(), mask.b16());
  }
}

void NeonEpilogue::to_integers(const Registers& sums) {
  for (const std::uint32_t sum : sums) // half to even, saturating; NaN is 0
    a_.fcvtns(v(sum).s4(), v(sum).s4());
}

/// SRSHL adds half of 2^shift before it shifts right, without overflow: ties go up, as plus_inf has it. A rule that
/// wants another one down has 1 taken from v, which changes nothing but a tie:
///   minus_inf   −round(−v): the multiplier is negated, and the result
///   away        −[v < 0]: the sign of v
///   zero        −[v > 0]: the sign of −v
///   odd         −q, q the quotient's lowest bit when rounded down: bit `shift` of v, moved to the sign
///   even        −(1 − q): that bit of −v
/// The product that the sign is taken of has a multiplier of its own, 0 in lanes whose shift is 0.
void NeonEpilogue::round(const Registers& sums, const Registers& free, bool slope) {
  const Rounding rounding = slope ? of_negative(epilogue_.rounding) : epilogue_.rounding;
  const bool by_bit = rounding == Rounding::even || rounding == Rounding::odd,
             by_sign = by_bit || rounding == Rounding::zero || rounding == Rounding::away;
  const VecV multiplier = v(free[0]), shift = v(free[1]), of_sign = v(free[1]), low = v(free[6]);
  const VecV minus_shift[2] = {v(free[2]), v(free[slope ? 2 : 3])}, to_sign[2] = {v(free[4]), v(free[slope ? 4 : 5])};
  const auto widen = [&](const VecV(&to)[2]) {
    a_.sxtl(to[0].d2(), low.s2());
    if (!slope)
      a_.sxtl2(to[1].d2(), low.s4());
  };
  a_.neg(low.s4(), shift.s4());
  widen(minus_shift);
  if (by_bit) {
    a_.movi(low.s4(), 63);
    a_.sub(low.s4(), low.s4(), shift.s4());
    widen(to_sign);
  }
  if (by_sign) {
    a_.cmgt(of_sign.s4(), shift.s4(), 0);
    a_.and_(of_sign.b16(), of_sign.b16(), multiplier.b16());
    if (rounding == Rounding::zero || rounding == Rounding::even)
      a_.neg(of_sign.s4(), of_sign.s4());
  }
  if (rounding == Rounding::minus_inf)
    a_.neg(multiplier.s4(), multiplier.s4());

  // Two sums side by side where there are registers for it, so that in-order cores wait less.
  const std::size_t width = by_bit ? 1 : 2;
  for (std::size_t first = 0; first < sums.size(); first += width) {
    const std::size_t count = std::min(width, sums.size() - first);
    const auto sum = [&](std::size_t i) { return v(sums[first + i]); };
    const auto half = [&](std::size_t i, std::size_t upper) { return v(free[6 - 2 * i + upper]); };
    const auto each = [&](auto&& emit) {
      for (std::size_t i = 0; i < count; ++i)
        emit(i);
    };
    const auto each_half = [&](auto&& emit) {
      for (std::size_t i = 0; i < count; ++i)
        for (const std::size_t upper : {0, 1})
          emit(half(i, upper), upper);
    };
    const VecV factor = by_sign ? of_sign : multiplier;
    each([&](std::size_t i) {
      a_.smull(half(i, 0).d2(), sum(i).s2(), factor.s2());
      a_.smull2(half(i, 1).d2(), sum(i).s4(), factor.s4());
    });
    if (by_bit)
      each_half([&](const VecV& x, std::size_t upper) { a_.sshl(x.d2(), x.d2(), to_sign[upper].d2()); });
    if (by_sign) {
      each_half([&](const VecV& x, std::size_t) { a_.sshr(x.d2(), x.d2(), 63); });
      each([&](std::size_t i) {
        a_.smlal(half(i, 0).d2(), sum(i).s2(), multiplier.s2());
        a_.smlal2(half(i, 1).d2(), sum(i).s4(), multiplier.s4());
      });
    }
    each_half([&](const VecV& x, std::size_t upper) { a_.srshl(x.d2(), x.d2(), minus_shift[upper].d2()); });
    const auto result = [&](std::size_t i) { return slope ? half(i, 0) : sum(i); };
    each([&](std::size_t i) { a_.uzp1(result(i).s4(), half(i, 0).s4(), half(i, 1).s4()); });
    if (rounding == Rounding::minus_inf)
      each([&](std::size_t i) { a_.neg(result(i).s4(), result(i).s4()); });
    if (slope) {
      each([&](std::size_t i) { a_.cmlt(half(i, 1).s4(), sum(i).s4(), 0); });
      each([&](std::size_t i) { a_.bit(sum(i).b16(), result(i).b16(), half(i, 1).b16()); });
    }
  }
}

void NeonEpilogue::prepare_stores(const TileSums& sums, const TileTerms& at) {
  const bool is_float = epilogue_.has_float_output();
  const Registers& free = sums.free;
  if (epilogue_.has_lower_bound())
    broadcast(free[kLo], at.scalars, is_float ? offsetof(Scalars, lo_f) : offsetof(Scalars, lo));
  if (epilogue_.has_upper_bound())
    broadcast(free[kHi], at.scalars, is_float ? offsetof(Scalars, hi_f) : offsetof(Scalars, hi));
  if (epilogue_.c_zp)
    broadcast(free[kCZp], at.scalars, offsetof(Scalars, c_zp));
  if (epilogue_.c_dtype == CDtype::bf16) {
    a_.movi(v(free[kOne]).s4(), 1);
    a_.movi(v(free[kBf16Half]).s4(), 0x7F, msl(8)); // 0x7FFF
  }
}

void NeonEpilogue::store_row(const TileSums& sums, int row, const GpX& to, const GpX&) {
  Registers results;
  for (int vector = 0; vector < sums.vectors; ++vector)
    results.push_back(sums.at(row, vector));
  const auto operand = [&](std::size_t i) { return v(sums.free[i]); };
  const auto temp = [&](std::size_t i) { return operand(kTemp + i % 3); };
  for (std::size_t i = 0; i < results.size(); ++i) {
    const VecV y = v(results[i]);
    if (epilogue_.has_float_output()) {
      if (epilogue_.has_lower_bound()) // y > lo ? y : lo, as lo is not −0
        a_.fmaxnm(y.s4(), y.s4(), operand(kLo).s4());
      if (epilogue_.has_upper_bound()) { // y < hi ? y : hi; FMINNM would keep a −0 below a bound of +0
        a_.fcmgt(temp(i).s4(), operand(kHi).s4(), y.s4());
        a_.bif(y.b16(), operand(kHi).b16(), temp(i).b16());
      }
    } else {
      if (epilogue_.has_lower_bound())
        a_.smax(y.s4(), y.s4(), operand(kLo).s4());
      if (epilogue_.has_upper_bound())
        a_.smin(y.s4(), y.s4(), operand(kHi).s4());
      if (epilogue_.c_zp)
        a_.add(y.s4(), y.s4(), operand(kCZp).s4());
    }
    if (epilogue_.c_dtype == CDtype::bf16) { // to nearest even in the upper half
      a_.ushr(temp(i).s4(), y.s4(), 16);
      a_.and_(temp(i).b16(), temp(i).b16(), operand(kOne).b16());
      a_.add(y.s4(), y.s4(), operand(kBf16Half).s4());
      a_.add(y.s4(), y.s4(), temp(i).s4());
    }
  }
  narrow_and_store(results, to);
}

void NeonEpilogue::narrow_and_store(const Registers& results, const GpX& to) {
  const std::size_t count = results.size();
  const int c_bytes = epilogue_.c_bytes();
  // Neighbours into one register, then, of bytes, pairs of them.
  const bool in_range = epilogue_.has_upper_bound();
  for (std::size_t i = 0; i < count && c_bytes < 4; i += 2) {
    const bool pair = i + 1 < count;
    const VecV low = v(results[i]), high = v(results[pair ? i + 1 : i]);
    switch (epilogue_.c_dtype) {
    case CDtype::f16:
      a_.fcvtn(low.h4(), low.s4());
      if (pair)
        a_.fcvtn2(low.h8(), high.s4());
      break;
    case CDtype::bf16:
      a_.uzp2(low.h8(), low.h8(), high.h8());
      break;
    default:
      if (in_range) {
        a_.uzp1(low.h8(), low.h8(), high.h8());
      } else if (epilogue_.c_dtype == CDtype::u8) {
        a_.sqxtun(low.h4(), low.s4());
        if (pair)
          a_.sqxtun2(low.h8(), high.s4());
      } else {
        a_.sqxtn(low.h4(), low.s4());
        if (pair)
          a_.sqxtn2(low.h8(), high.s4());
      }
    }
  }
  for (std::size_t i = 0; i < count && c_bytes == 1;) {
    const bool pair = i + 3 < count;
    const VecV low = v(results[i]), high = v(results[pair ? i + 2 : i]);
    if (in_range) {
      a_.uzp1(low.b16(), low.b16(), high.b16());
    } else if (epilogue_.c_dtype == CDtype::u8) {
      a_.uqxtn(low.b8(), low.h8());
      if (pair)
        a_.uqxtn2(low.b16(), high.h8());
    } else {
      a_.sqxtn(low.b8(), low.h8());
      if (pair)
        a_.sqxtn2(low.b16(), high.h8());
    }
    i += pair ? 4 : 2;
  }
  // What is left over of four, or of two, is stored by itself.
  const std::size_t together = static_cast<std::size_t>(4 / c_bytes);
  for (std::size_t i = 0; i < count;) {
    const VecV first = v(results[i]);
    const int at = static_cast<int>(i) * 4 * c_bytes;
    if (c_bytes == 4 && i + 1 < count && at <= 1008) {
      a_.stp(first, v(results[i + 1]), ptr(to, at));
      i += 2;
    } else if (i + together <= count) {
      a_.str(first, ptr(to, at));
      i += together;
    } else if (c_bytes == 2 || i + 2 <= count) {
      a_.str(first.d(), ptr(to, at));
      i += c_bytes == 2 ? 1 : 2;
    } else {
      a_.str(first.s(), ptr(to, at));
      i += 1;
    }
  }
}

} // namespace kiln::arm
