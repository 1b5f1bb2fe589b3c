#include "backends/x86/epilogue.h"

#include <cstddef>
#include <utility>

/// The division to nearest, exact in 64 bits: with x = acc · multiplier, |x| < 2^62, and h = 2^(shift − 1), the
/// integers nearest to x / 2^shift are ⌊(x + h + nudge) / 2^shift⌋, where the nudge of a tie is
///   plus_inf 0, minus_inf −1, away −[x < 0], zero [x < 0] − 1, even q − 1, odd −q, q the lowest bit of ⌊x / 2^shift⌋.
/// A shift of 0 adds nothing: its half and its part of the nudge are 0, by shifts of 64 and more, which give 0.
/// Half to even, with 512 bits, takes fewer steps in doubles: x / 2^shift + 1.5 · 2^52 by one fma is rounded once, to
/// an integer, and its low 32 bits are the quotient's. That needs |x| / 2^shift < 2^51, so a shift of 12 or more (or a
/// multiplier of 1); vectors of columns with other shifts go through the integers.
/// AVX2 lacks the arithmetic shift of 64-bit lanes: 2^63 more is shifted as an unsigned number, and taken off again.
namespace kiln::x86 {

using namespace asmjit::x86;
using int8_mm::Act;
using int8_mm::CDtype;
using int8_mm::Rescale;
using int8_mm::Rounding;
using int8_mm::Scalars;

namespace {

const KReg kOddLanes = k5, kSelect = k6;
constexpr std::uint32_t kTwoTo31 = 0x4F00'0000, kNan = 0x7FC0'0000; // f32
constexpr std::uint64_t kSignBit = std::uint64_t{1} << 63;
constexpr std::uint64_t kMagic = 0x4338'0000'0000'0000; // f64: 1.5 · 2^52
constexpr int kExponentBias = 1023, kMantissaBits = 52; // f64
constexpr int kLeastShiftInDoubles = 12;

} // namespace

EpilogueEmitter::EpilogueEmitter(Assembler& assembler, const int8_mm::Epilogue& epilogue, int vector_bytes, int vectors,
                                 std::uint32_t first_temp, std::uint32_t second_temp, std::uint32_t third_temp,
                                 int scratch_at)
    : a_(assembler), epilogue_(epilogue), terms_(int8_mm::TermsLayout::of(epilogue)), vector_bytes_(vector_bytes),
      vectors_(vectors), temps_{first_temp, second_temp, third_temp}, scratch_at_(scratch_at) {
  if (epilogue_.has_lower_bound() || epilogue_.c_dtype == CDtype::u8)
    lo_ = slot(shared_bytes_);
  if (epilogue_.has_upper_bound())
    hi_ = slot(shared_bytes_);
  if (epilogue_.c_zp)
    c_zp_ = slot(shared_bytes_);
  if (epilogue_.has_float_slope()) {
    slope_ = slot(shared_bytes_);
    nan_ = slot(shared_bytes_);
  }
  if (epilogue_.rescale == Rescale::scale && !epilogue_.has_float_output())
    limit_ = slot(shared_bytes_);
  if (epilogue_.c_dtype == CDtype::bf16) {
    bf16_half_ = slot(shared_bytes_);
    one_ = slot(shared_bytes_);
  }
  if (rounds_in_doubles()) {
    magic_ = slot(shared_bytes_);
    low_halves_ = slot(shared_bytes_);
  }
  if (epilogue_.has_integer_slope())
    slope_wide_ = wide_slots(shared_bytes_, false);

  offset_ = slot(column_bytes_);
  if (terms_.a_zp >= 0)
    a_zp_ = slot(column_bytes_);
  if (terms_.row_sum >= 0)
    row_sum_ = slot(column_bytes_);
  if (epilogue_.rescale == Rescale::scale)
    scale_ = slot(column_bytes_);
  if (epilogue_.rescale == Rescale::shift_left)
    left_ = slot(column_bytes_);
  if (epilogue_.rounds_wide())
    wide_ = wide_slots(column_bytes_, true);
}

EpilogueEmitter::EpilogueEmitter(Assembler& assembler, const KernelDesc& linear, int vector_bytes, int vectors,
                                 std::uint32_t first_temp, std::uint32_t second_temp, std::uint32_t third_temp,
                                 int scratch_at)
    : a_(assembler), epilogue_(int8_linear::output_of(linear)), terms_(int8_linear::terms_of(linear)),
      vector_bytes_(vector_bytes), vectors_(vectors), temps_{first_temp, second_temp, third_temp}, dequantises_(true),
      has_bias_(int8_linear::has_bias(linear)), scratch_at_(scratch_at) {
  nan_ = slot(shared_bytes_);
  if (epilogue_.c_dtype == CDtype::bf16) {
    bf16_half_ = slot(shared_bytes_);
    one_ = slot(shared_bytes_);
  }
  offset_ = slot(column_bytes_);
  scale_ = slot(column_bytes_);
  if (has_bias_)
    bias_ = slot(column_bytes_);
}

Features EpilogueEmitter::features() const {
  Features features;
  if (dequantises_ && !is_512())
    features.add(Feature::fma);
  if (is_512())
    features.add(Feature::avx512vl);
  else if (epilogue_.c_dtype == CDtype::f16)
    features.add(Feature::f16c);
  return features;
}

Vec EpilogueEmitter::reg(std::uint32_t id) const {
  return is_512() ? Vec(Zmm(id)) : Vec(Ymm(id));
}

int EpilogueEmitter::slot(int& bytes) const {
  return std::exchange(bytes, bytes + vector_bytes_);
}

EpilogueEmitter::Wide EpilogueEmitter::wide_slots(int& bytes, bool per_lane) const {
  Wide wide{};
  const auto add = [&](int(&slots)[2]) {
    slots[0] = slot(bytes);
    slots[1] = per_lane ? slot(bytes) : slots[0];
  };
  add(wide.multiplier);
  add(wide.half);
  add(wide.shift);
  if (rounds_by_sign())
    add(wide.sign);
  if (rounds_by_lowest_bit())
    add(wide.lowest);
  if (!is_512())
    wide.bias = slot(bytes);
  if (rounds_in_doubles()) {
    add(wide.factor);
    // A shift alone leaves |x| ≤ 2^31.
    wide.unfit = per_lane && epilogue_.rescale == Rescale::shift_right ? -1 : slot(bytes);
  }
  return wide;
}

bool EpilogueEmitter::rounds_by_sign() const {
  return epilogue_.rounding == Rounding::zero || epilogue_.rounding == Rounding::away;
}
bool EpilogueEmitter::rounds_by_lowest_bit() const {
  return epilogue_.rounding == Rounding::even || epilogue_.rounding == Rounding::odd;
}
/// The nudge is −1 but for what sign or lowest bit add.
bool EpilogueEmitter::rounds_down_from_half() const {
  return epilogue_.rounding == Rounding::zero || epilogue_.rounding == Rounding::minus_inf ||
         epilogue_.rounding == Rounding::even;
}

bool EpilogueEmitter::rounds_in_doubles() const {
  return is_512() && epilogue_.rounding == Rounding::even && (epilogue_.rounds_wide() || epilogue_.has_integer_slope());
}

void EpilogueEmitter::load(const Vec& to, const Mem& from) {
  if (is_512())
    a_.vmovdqu32(to, from);
  else
    a_.vmovdqu(to, from);
}

void EpilogueEmitter::save(const Mem& to, const Vec& from) {
  if (is_512())
    a_.vmovdqu32(to, from);
  else
    a_.vmovdqu(to, from);
}

void EpilogueEmitter::broadcast_constant(const Vec& to, std::uint64_t value) {
  a_.mov(rax, value);
  a_.vmovq(Xmm(to.id()), rax);
  a_.vpbroadcastq(to, Xmm(to.id()));
}

void EpilogueEmitter::prepare_shared(const Gp& call, const Gp& scratch) {
  const Gp scalars = rax;
  const Vec value = reg(0);
  const bool to_float = epilogue_.has_float_output();
  const auto from_scalars = [&](int slot, std::size_t offset) {
    if (slot < 0)
      return;
    a_.mov(scalars, ptr(call, static_cast<int>(offsetof(int8_mm::Call, scalars))));
    a_.vpbroadcastd(value, ptr(scalars, static_cast<int>(offset)));
    save(shared(scratch, slot), value);
  };
  const auto constant = [&](int slot, std::uint32_t bits) {
    if (slot < 0)
      return;
    broadcast_constant(value, std::uint64_t{bits} << 32 | bits);
    save(shared(scratch, slot), value);
  };
  from_scalars(lo_, to_float ? offsetof(Scalars, lo_f) : offsetof(Scalars, lo));
  from_scalars(hi_, to_float ? offsetof(Scalars, hi_f) : offsetof(Scalars, hi));
  from_scalars(c_zp_, offsetof(Scalars, c_zp));
  from_scalars(slope_, offsetof(Scalars, slope));
  constant(nan_, to_float ? kNan : 0);
  constant(limit_, kTwoTo31);
  constant(bf16_half_, 0x7FFF);
  constant(one_, 1);
  if (rounds_in_doubles()) {
    broadcast_constant(value, kMagic);
    save(shared(scratch, magic_), value);
    for (std::uint64_t i = 0; i < 8; ++i) { // dwords 0, 2, … 30
      a_.mov(rax, 4 * i | (4 * i + 2) << 32);
      a_.mov(ptr(scratch, low_halves_ + static_cast<int>(8 * i)), rax);
    }
  }
  if (epilogue_.has_integer_slope()) {
    a_.mov(scalars, ptr(call, static_cast<int>(offsetof(int8_mm::Call, scalars))));
    a_.vpbroadcastd(reg(0), ptr(scalars, static_cast<int>(offsetof(Scalars, slope_multiplier))));
    a_.vpbroadcastd(reg(1), ptr(scalars, static_cast<int>(offsetof(Scalars, slope_shift))));
    prepare_wide(slope_wide_, scratch, 0);
  }
  if (is_512()) {
    a_.mov(eax, 0xAAAA);
    a_.kmovw(kOddLanes, eax);
  }
}

void EpilogueEmitter::prepare_columns(int i, const Gp& terms, int at, int array_bytes, const Gp& scratch) {
  const auto term = [&](int index) { return ptr(terms, at + index * array_bytes); };
  const auto copy = [&](int slot, int index) {
    if (slot < 0)
      return;
    load(reg(0), term(index));
    save(column(scratch, i, slot), reg(0));
  };
  copy(offset_, terms_.offset);
  copy(a_zp_, terms_.a_zp);
  copy(row_sum_, terms_.row_sum);
  copy(scale_, terms_.multiplier);
  copy(left_, terms_.shift);
  copy(bias_, int8_linear::TermsLayout::kBias);
  if (epilogue_.rounds_wide()) {
    load(reg(0), term(terms_.multiplier));
    load(reg(1), term(terms_.shift));
    prepare_wide(wide_, scratch, shared_bytes_ + i * column_bytes_);
  }
}

void EpilogueEmitter::prepare_wide(const Wide& wide, const Gp& scratch, int base) {
  const Vec multiplier = reg(0), shifts = reg(1), shift = reg(2), value = reg(3), ones = reg(4), one = reg(5),
            constant = reg(6), bias = reg(7);
  const auto put = [&](int slot, const Vec& from) { save(ptr(scratch, base + slot), from); };
  if (rounds_in_doubles())
    prepare_factors(wide, scratch, base);
  broadcast_constant(one, 1);
  broadcast_constant(ones, ~std::uint64_t{0});
  for (int odd = 0; odd < 2; ++odd) {
    if (odd == 1 && wide.shift[1] == wide.shift[0] && is_512())
      return; // the same in all lanes
    if (odd == 1) {
      a_.vpsrlq(multiplier, multiplier, 32);
      a_.vpsrlq(shift, shifts, 32);
    } else {
      a_.vpsllq(shift, shifts, 32);
      a_.vpsrlq(shift, shift, 32);
    }
    put(wide.multiplier[odd], multiplier);
    put(wide.shift[odd], shift);
    if (rounds_down_from_half()) { // 2^(shift − 1) − 1
      broadcast_constant(constant, 65);
      a_.vpsubq(value, constant, shift);
      a_.vpsrlvq(value, ones, value);
    } else { // 2^(shift − 1)
      a_.vpaddq(value, shift, ones);
      a_.vpsllvq(value, one, value);
    }
    if (!is_512()) {
      broadcast_constant(constant, kSignBit);
      a_.vpaddq(value, value, constant);
    }
    put(wide.half[odd], value);
    a_.vpminud(value, shift, one); // 0 for a shift of 0
    if (rounds_by_lowest_bit())
      put(wide.lowest[odd], value);
    if (rounds_by_sign()) { // 63, or 64
      broadcast_constant(constant, 64);
      a_.vpsubq(value, constant, value);
      put(wide.sign[odd], value);
    }
    if (!is_512()) {
      broadcast_constant(constant, kSignBit);
      a_.vpsrlvq(value, constant, shift);
      if (odd == 0) {
        a_.vmovdqa(bias, value);
      } else {
        a_.vpsllq(value, value, 32);
        a_.vpblendd(bias, bias, value, 0xAA);
        put(wide.bias, bias);
      }
    }
  }
}

void EpilogueEmitter::prepare_factors(const Wide& wide, const Gp& scratch, int base) {
  const Vec multiplier = reg(0), shifts = reg(1), factor = reg(2), power = reg(3), constant = reg(4);
  for (int high = 0; high < 2; ++high) {
    if (high == 1) {
      if (wide.factor[1] == wide.factor[0])
        break;
      a_.vextracti64x4(Ymm(factor.id()), multiplier, 1);
      a_.vextracti64x4(Ymm(power.id()), shifts, 1);
    }
    a_.vcvtdq2pd(factor, high == 1 ? Ymm(factor.id()) : Ymm(multiplier.id()));
    a_.vpmovzxdq(power, high == 1 ? Ymm(power.id()) : Ymm(shifts.id()));
    broadcast_constant(constant, kExponentBias);
    a_.vpsubq(power, constant, power);
    a_.vpsllq(power, power, kMantissaBits);
    a_.vmulpd(factor, factor, power); // exact
    save(ptr(scratch, base + wide.factor[high]), factor);
  }
  if (wide.unfit < 0)
    return;
  a_.mov(eax, kLeastShiftInDoubles);
  a_.vpbroadcastd(constant, eax);
  a_.vpcmpud(kSelect, shifts, constant, VCmpImm::kLT_OS);
  a_.k(kSelect).vptestmd(kSelect, multiplier, multiplier); // 0 beyond N, where nothing is stored
  a_.kmovw(eax, kSelect);
  a_.mov(ptr(scratch, base + wide.unfit), eax);
}

void EpilogueEmitter::load_offsets(const Vec& sums, int i, const Gp& scratch) {
  load(sums, column(scratch, i, offset_));
}

void EpilogueEmitter::add_offsets(const Vec& sums, int i, const Gp& scratch) {
  a_.vpaddd(sums, sums, column(scratch, i, offset_));
}

void EpilogueEmitter::add_product(const Vec& sums, const Mem& of_row, const Mem& of_columns) {
  a_.vpbroadcastd(temp(0), of_row);
  a_.vpmulld(temp(0), temp(0), of_columns);
  a_.vpaddd(sums, sums, temp(0));
}

/// Low 32 bits of the rounded quotients; `from` may be `to`.
void EpilogueEmitter::round_wide(const Vec& from, const Vec& to, const Wide& wide, const Gp& scratch, int base) {
  if (!rounds_in_doubles()) {
    round_in_integers(from, to, wide, scratch, base);
    return;
  }
  if (wide.unfit < 0) {
    round_in_doubles(from, to, wide, scratch, base);
    return;
  }
  const RarePath rare{a_.newLabel(), a_.newLabel(), from, to, wide, scratch, base};
  a_.cmp(dword_ptr(scratch, base + wide.unfit), 0);
  a_.jne(rare.begin);
  round_in_doubles(from, to, wide, scratch, base);
  a_.bind(rare.end);
  rare_paths_.push_back(rare);
}

void EpilogueEmitter::emit_rare_paths() {
  for (const RarePath& rare : rare_paths_) {
    a_.bind(rare.begin);
    round_in_integers(rare.from, rare.to, rare.wide, rare.scratch, rare.base);
    a_.jmp(rare.end);
  }
}

void EpilogueEmitter::round_in_doubles(const Vec& from, const Vec& to, const Wide& wide, const Gp& scratch, int base) {
  const Vec high = temp(0), other = temp(1);
  const auto at = [&](int slot) { return ptr(scratch, base + slot); };
  a_.vextracti64x4(Ymm(high.id()), from, 1);
  a_.vcvtdq2pd(high, Ymm(high.id()));
  a_.vcvtdq2pd(to, Ymm(from.id()));
  load(other, shared(scratch, magic_));
  a_.vfmadd132pd(high, other, at(wide.factor[1]));
  a_.vfmadd132pd(to, other, at(wide.factor[0]));
  load(other, shared(scratch, low_halves_));
  a_.vpermt2d(to, other, high);
}

void EpilogueEmitter::round_in_integers(const Vec& from, const Vec& to, const Wide& wide, const Gp& scratch, int base) {
  const Vec odds = temp(0), nudge = temp(1);
  const auto at = [&](int slot) { return ptr(scratch, base + slot); };
  a_.vpsrlq(odds, from, 32);
  a_.vpmuldq(to, from, at(wide.multiplier[0]));
  a_.vpmuldq(odds, odds, at(wide.multiplier[1]));
  for (int odd = 0; odd < 2; ++odd) {
    const Vec x = odd == 1 ? odds : to;
    if (rounds_by_sign()) {
      a_.vpsrlvq(nudge, x, at(wide.sign[odd]));
    } else if (rounds_by_lowest_bit()) {
      a_.vpsrlvq(nudge, x, at(wide.shift[odd]));
      if (is_512())
        a_.vpandq(nudge, nudge, at(wide.lowest[odd]));
      else
        a_.vpand(nudge, nudge, at(wide.lowest[odd]));
    }
    a_.vpaddq(x, x, at(wide.half[odd]));
    if (epilogue_.rounding == Rounding::zero || epilogue_.rounding == Rounding::even)
      a_.vpaddq(x, x, nudge);
    else if (epilogue_.rounding == Rounding::away || epilogue_.rounding == Rounding::odd)
      a_.vpsubq(x, x, nudge);
    if (is_512())
      a_.vpsravq(x, x, at(wide.shift[odd]));
    else
      a_.vpsrlvq(x, x, at(wide.shift[odd]));
  }
  if (is_512()) {
    a_.k(kOddLanes).vpshufd(to, odds, 0b10'10'00'00);
  } else {
    a_.vpsllq(odds, odds, 32);
    a_.vpblendd(to, to, odds, 0xAA);
    a_.vpsubd(to, to, at(wide.bias));
  }
}

void EpilogueEmitter::apply(const Vec& sums, int i, const Gp& scratch, const Mem& a_zp, const Mem& row_sum) {
  if (a_zp_ >= 0)
    add_product(sums, a_zp, column(scratch, i, a_zp_));
  if (row_sum_ >= 0)
    add_product(sums, row_sum, column(scratch, i, row_sum_));
  if (dequantises_)
    dequantise(sums, i, scratch, a_zp);
  else if (epilogue_.rescale == Rescale::scale)
    apply_scale(sums, i, scratch);
  else
    apply_integer(sums, i, scratch);
  if (epilogue_.has_float_output()) {
    // v > lo ? v : lo, which is what these give for zeros and NaN too (SDM, MAXPS).
    if (lo_ >= 0)
      a_.vmaxps(sums, sums, shared(scratch, lo_));
    if (hi_ >= 0)
      a_.vminps(sums, sums, shared(scratch, hi_));
    if (epilogue_.c_dtype == CDtype::bf16)
      round_to_bf16(sums, scratch);
    return;
  }
  if (lo_ >= 0)
    a_.vpmaxsd(sums, sums, shared(scratch, lo_));
  if (hi_ >= 0)
    a_.vpminsd(sums, sums, shared(scratch, hi_));
  if (c_zp_ >= 0)
    a_.vpaddd(sums, sums, shared(scratch, c_zp_));
}

void EpilogueEmitter::apply_integer(const Vec& sums, int i, const Gp& scratch) {
  if (epilogue_.rounds_wide())
    round_wide(sums, sums, wide_, scratch, shared_bytes_ + i * column_bytes_);
  else if (left_ >= 0)
    a_.vpsllvd(sums, sums, column(scratch, i, left_));
  if (!epilogue_.has_integer_slope())
    return;
  const Vec sloped = temp(2);
  round_wide(sums, sloped, slope_wide_, scratch, 0);
  if (is_512()) {
    a_.vpxord(temp(0), temp(0), temp(0));
    a_.vpcmpd(kSelect, sums, temp(0), VCmpImm::kLT_OS);
    a_.k(kSelect).vmovdqa32(sums, sloped);
  } else {
    a_.vblendvps(sums, sums, sloped, sums); // by the sign bits
  }
}

void EpilogueEmitter::apply_scale(const Vec& sums, int i, const Gp& scratch) {
  const Vec mask = temp(0), other = temp(1);
  a_.vcvtdq2ps(sums, sums);
  a_.vmulps(sums, sums, column(scratch, i, scale_));
  if (epilogue_.has_float_slope()) {
    // An infinity times a slope of 0 is a NaN, and becomes ours.
    if (is_512()) {
      a_.vpxord(mask, mask, mask);
      a_.vcmpps(kSelect, sums, mask, VCmpImm::kLT_OQ);
      a_.k(kSelect).vmulps(sums, sums, shared(scratch, slope_));
      a_.vcmpps(kSelect, sums, sums, VCmpImm::kUNORD_Q);
      a_.k(kSelect).vmovaps(sums, shared(scratch, nan_));
    } else {
      a_.vmulps(other, sums, shared(scratch, slope_));
      a_.vxorps(mask, mask, mask);
      a_.vcmpps(mask, sums, mask, VCmpImm::kLT_OQ);
      a_.vblendvps(sums, sums, other, mask);
      a_.vcmpps(mask, sums, sums, VCmpImm::kUNORD_Q);
      a_.vmovdqu(other, shared(scratch, nan_));
      a_.vblendvps(sums, sums, other, mask);
    }
  }
  if (epilogue_.has_float_output())
    return;
  // Beyond s32 the conversion gives 2^31 as bits: right below, its complement above.
  if (is_512()) {
    a_.vcmpps(kSelect, sums, shared(scratch, limit_), VCmpImm::kGE_OS);
    a_.vcvtps2dq(sums, sums);
    a_.k(kSelect).vpternlogd(sums, sums, sums, 0x55); // their complement
  } else {
    a_.vmovdqu(mask, shared(scratch, limit_));
    a_.vcmpps(mask, sums, mask, VCmpImm::kGE_OS);
    a_.vcvtps2dq(sums, sums);
    a_.vpxor(sums, sums, mask);
  }
}

void EpilogueEmitter::dequantise(const Vec& sums, int i, const Gp& scratch, const Mem& s) {
  const Vec t = temp(0), other = temp(1);
  if (is_512()) {
    load(t, column(scratch, i, scale_));
    a_.vmulps(t, t, s._1to16());
  } else {
    a_.vbroadcastss(t, s);
    a_.vmulps(t, t, column(scratch, i, scale_));
  }
  a_.vcvtdq2ps(sums, sums);
  if (has_bias_) {
    a_.vfmadd213ps(sums, t, column(scratch, i, bias_));
  } else { // a sum of −0 and +0
    is_512() ? a_.vpxord(other, other, other) : a_.vpxor(other, other, other);
    a_.vfmadd213ps(sums, t, other);
  }
  // Whatever NaN it is becomes ours.
  if (is_512()) {
    a_.vcmpps(kSelect, sums, sums, VCmpImm::kUNORD_Q);
    a_.k(kSelect).vmovaps(sums, shared(scratch, nan_));
  } else {
    a_.vcmpps(t, sums, sums, VCmpImm::kUNORD_Q);
    load(other, shared(scratch, nan_));
    a_.vblendvps(sums, sums, other, t);
  }
}

void EpilogueEmitter::round_to_bf16(const Vec& values, const Gp& scratch) {
  const Vec lowest = temp(0);
  a_.vpsrld(lowest, values, 16);
  if (is_512())
    a_.vpandd(lowest, lowest, shared(scratch, one_));
  else
    a_.vpand(lowest, lowest, shared(scratch, one_));
  a_.vpaddd(values, values, shared(scratch, bf16_half_));
  a_.vpaddd(values, values, lowest);
  a_.vpsrld(values, values, 16);
}

void EpilogueEmitter::store(const Vec& results, const Mem& to, const KReg& mask) {
  const Zmm wide(results.id());
  const Ymm half(results.id());
  const Xmm quarter(results.id());
  switch (epilogue_.c_dtype) {
  case CDtype::s32:
  case CDtype::f32:
    a_.k(mask).vmovdqu32(to, wide);
    break;
  case CDtype::s8:
    a_.vpmovsdb(quarter, wide);
    a_.k(mask).vmovdqu8(to, quarter);
    break;
  case CDtype::u8:
    a_.vpmovusdb(quarter, wide);
    a_.k(mask).vmovdqu8(to, quarter);
    break;
  case CDtype::bf16:
    a_.vpmovdw(half, wide);
    a_.k(mask).vmovdqu16(to, half);
    break;
  case CDtype::f16:
    a_.vcvtps2ph(half, wide, 0); // to nearest even
    a_.k(mask).vmovdqu16(to, half);
    break;
  }
}

void EpilogueEmitter::narrow(const Vec& low, const Vec& high) {
  const Ymm l(low.id()), h(high.id());
  const Xmm xl(low.id()), xh(high.id());
  constexpr int kHalvesInOrder = 0b11'01'10'00; // of what packs leave in turn
  switch (epilogue_.c_dtype) {
  case CDtype::s32:
  case CDtype::f32:
    break;
  case CDtype::s8:
  case CDtype::u8:
    a_.vpackssdw(l, l, h);
    a_.vpermq(l, l, kHalvesInOrder);
    a_.vextracti128(xh, l, 1);
    if (epilogue_.c_dtype == CDtype::s8)
      a_.vpacksswb(xl, xl, xh);
    else
      a_.vpackuswb(xl, xl, xh);
    break;
  case CDtype::bf16:
    a_.vpackusdw(l, l, h);
    a_.vpermq(l, l, kHalvesInOrder);
    break;
  case CDtype::f16:
    a_.vcvtps2ph(xl, l, 0); // to nearest even
    a_.vcvtps2ph(xh, h, 0);
    a_.vinserti128(l, l, xh, 1);
    break;
  }
}

void EpilogueEmitter::store_narrowed(const Vec& low, const Vec& high, const Gp& to, int offset) {
  switch (epilogue_.c_bytes()) {
  case 1:
    a_.vmovdqu(ptr(to, offset), Xmm(low.id()));
    break;
  case 2:
    a_.vmovdqu(ptr(to, offset), Ymm(low.id()));
    break;
  default:
    a_.vmovdqu(ptr(to, offset), Ymm(low.id()));
    a_.vmovdqu(ptr(to, offset + 32), Ymm(high.id()));
  }
}

} // namespace kiln::x86
