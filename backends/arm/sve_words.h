#pragma once
#include <asmjit/core.h>

#include <asmjit/arm/a64operand.h>

#include <cstdint>
#include <type_traits>

/// The SVE and SME instructions that Kiln's kernels use and asmjit does not know, as words. Names and operand
/// order are those of the Arm Architecture Reference Manual (DDI 0487, chapters C6 to C9). An operand out of its range
/// gives an empty word, which Assembler::word refuses. Each is checked against llvm-mc by sve_words_test.
namespace kiln::arm::sve {

/// An instruction and the registers that it names: bit i for x{i}, z{i}. All zero (UDF #0): no instruction.
struct Word {
  std::uint32_t bits = 0;
  std::uint32_t general = 0, vectors = 0;
};

struct Z { ///< z0 … z31
  std::uint32_t id = 0;
};
struct P { ///< p0 … p15; as governing predicate of a load, a store or an operation p0 … p7
  std::uint32_t id = 0;
};
struct ZaTile { ///< za0.s … za3.s
  std::uint32_t id = 0;
};
enum class Element : std::uint32_t { b, h, s, d };
enum class Slice : std::uint32_t { horizontal, vertical };
/// What smstart and smstop switch: streaming mode, the ZA array, or both.
enum class Mode : std::uint32_t { sm = 1, za = 2, both = 3 };
using asmjit::a64::Gp;

namespace detail {

constexpr std::uint32_t kOutOfRange = ~0u;

constexpr std::uint32_t in(std::int64_t value, std::int64_t min, std::int64_t max) {
  return value >= min && value <= max ? static_cast<std::uint32_t>(value) : kOutOfRange;
}
/// A signed immediate in `bits` bits, its value a multiple of `scale`.
constexpr std::uint32_t signed_immediate(std::int64_t value, int bits, std::int64_t scale = 1) {
  const std::int64_t bound = std::int64_t{1} << (bits - 1);
  const std::uint32_t steps = value % scale == 0 ? in(value / scale + bound, 0, 2 * bound - 1) : kOutOfRange;
  return steps == kOutOfRange ? steps : steps ^ static_cast<std::uint32_t>(bound);
}
constexpr std::uint32_t unsigned_immediate(std::int64_t value, int bits, std::int64_t scale = 1) {
  return value % scale == 0 ? in(value / scale, 0, (std::int64_t{1} << bits) - 1) : kOutOfRange;
}

/// Builds a word from its opcode; each call puts one operand at its lowest bit.
class Builder {
public:
  constexpr explicit Builder(std::uint32_t opcode) : word_{opcode, 0, 0} {}
  constexpr Builder z(Z reg, int at) const { return with(in(reg.id, 0, 31), at).naming(0, 1u << (reg.id & 31)); }
  constexpr Builder p(P reg, int at) const { return with(in(reg.id, 0, 15), at); }
  constexpr Builder governing(P reg, int at) const { return with(in(reg.id, 0, 7), at); }
  /// x0 … x30, or sp or xzr, whichever the instruction means by 31.
  constexpr Builder x(const Gp& reg, int at) const {
    const std::uint32_t id = reg.id() & 31;
    return with(id, at).naming(id < 31 ? 1u << id : 0, 0);
  }
  /// w12 … w15, which alone select a slice of ZA.
  constexpr Builder slice_register(const Gp& reg, int at) const {
    return with(in(std::int64_t{reg.id()} - 12, 0, 3), at).naming(1u << (reg.id() & 31), 0);
  }
  /// A signed immediate of nine bits, the upper six apart from the lower three.
  constexpr Builder far_vector(std::int64_t imm) const {
    const std::uint32_t value = signed_immediate(imm, 9);
    return with(value == kOutOfRange ? value : value >> 3, 16).with(value & 7, 10);
  }
  constexpr Builder naming_vector(Z reg) const { return naming(0, 1u << (reg.id & 31)); }
  constexpr Builder field(std::uint32_t value, int at) const { return with(value, at); }
  template <class Enum>
  requires std::is_enum_v<Enum>
  constexpr Builder field(Enum value, int at) const { return with(static_cast<std::uint32_t>(value), at); }
  constexpr operator Word() const { return valid_ ? word_ : Word{}; }

private:
  constexpr Builder with(std::uint32_t value, int at) const {
    Builder next = *this;
    next.valid_ = valid_ && value != kOutOfRange;
    next.word_.bits |= value << at;
    return next;
  }
  constexpr Builder naming(std::uint32_t general, std::uint32_t vectors) const {
    Builder next = *this;
    next.word_.general |= general;
    next.word_.vectors |= vectors;
    return next;
  }

  Word word_;
  bool valid_ = true;
};

} // namespace detail

// ---------------------------------------------------------------- vector length

/// rd = imm · bytes of a vector.
constexpr Word rdvl(const Gp& rd, int imm) {
  return detail::Builder(0x04bf5000).field(detail::signed_immediate(imm, 6), 5).x(rd, 0);
}
/// rd = imm · bytes of a streaming vector; legal outside streaming mode.
constexpr Word rdsvl(const Gp& rd, int imm) {
  return detail::Builder(0x04bf5800).field(detail::signed_immediate(imm, 6), 5).x(rd, 0);
}

// ---------------------------------------------------------------- predicates

constexpr Word ptrue(Element size, P pd) {
  constexpr std::uint32_t kAll = 31;
  return detail::Builder(0x2518e000).field(size, 22).field(kAll, 5).p(pd, 0);
}
/// The first rm − rn elements, signed, 64-bit registers.
constexpr Word whilelt(Element size, P pd, const Gp& rn, const Gp& rm) {
  return detail::Builder(0x25201400).field(size, 22).x(rm, 16).x(rn, 5).p(pd, 0);
}

/// Elements of zn that compare with imm, signed, −16 … 15, as far as pg holds them.
constexpr Word cmplt(Element size, P pd, P pg, Z zn, int imm) {
  return detail::Builder(0x25002000)
      .field(size, 22)
      .field(detail::signed_immediate(imm, 5), 16)
      .governing(pg, 10)
      .z(zn, 5)
      .p(pd, 0);
}
constexpr Word cmpgt(Element size, P pd, P pg, Z zn, int imm) {
  return detail::Builder(0x25000010)
      .field(size, 22)
      .field(detail::signed_immediate(imm, 5), 16)
      .governing(pg, 10)
      .z(zn, 5)
      .p(pd, 0);
}
constexpr Word cmpeq(Element size, P pd, P pg, Z zn, int imm) {
  return detail::Builder(0x25008000)
      .field(size, 22)
      .field(detail::signed_immediate(imm, 5), 16)
      .governing(pg, 10)
      .z(zn, 5)
      .p(pd, 0);
}
/// f32: zn < 0; zn > zm.
constexpr Word fcmlt_zero(P pd, P pg, Z zn) {
  return detail::Builder(0x65912000).governing(pg, 10).z(zn, 5).p(pd, 0);
}
constexpr Word fcmgt(P pd, P pg, Z zn, Z zm) {
  return detail::Builder(0x65804010).z(zm, 16).governing(pg, 10).z(zn, 5).p(pd, 0);
}

// ---------------------------------------------------------------- memory: zeros where the predicate is false

/// From base + imm · bytes of a vector.
constexpr Word ld1b(Z zt, P pg, const Gp& base, int imm) {
  return detail::Builder(0xa400a000).field(detail::signed_immediate(imm, 4), 16).governing(pg, 10).x(base, 5).z(zt, 0);
}
/// 16 bytes from base + imm (a multiple of 16, −128 … 112) to every 128 bits.
constexpr Word ld1rqb(Z zt, P pg, const Gp& base, int imm) {
  return detail::Builder(0xa4002000)
      .field(detail::signed_immediate(imm, 4, 16), 16)
      .governing(pg, 10)
      .x(base, 5)
      .z(zt, 0);
}
/// 4 or 8 bytes from base + imm (a multiple of their size, up to 63 times it) to every 32 or 64 bits.
constexpr Word ld1rw(Z zt, P pg, const Gp& base, int imm) {
  return detail::Builder(0x8540c000)
      .field(detail::unsigned_immediate(imm, 6, 4), 16)
      .governing(pg, 10)
      .x(base, 5)
      .z(zt, 0);
}
constexpr Word ld1rd(Z zt, P pg, const Gp& base, int imm) {
  return detail::Builder(0x85c0e000)
      .field(detail::unsigned_immediate(imm, 6, 8), 16)
      .governing(pg, 10)
      .x(base, 5)
      .z(zt, 0);
}
/// A whole vector from or to base + imm · bytes of a vector.
constexpr Word ldr(Z zt, const Gp& base, int imm) {
  return detail::Builder(0x85804000).far_vector(imm).x(base, 5).z(zt, 0);
}
constexpr Word str(Z zt, const Gp& base, int imm) {
  return detail::Builder(0xe5804000).far_vector(imm).x(base, 5).z(zt, 0);
}

/// 32-bit elements from base + imm · bytes of a vector.
constexpr Word ld1w(Z zt, P pg, const Gp& base, int imm) {
  return detail::Builder(0xa540a000).field(detail::signed_immediate(imm, 4), 16).governing(pg, 10).x(base, 5).z(zt, 0);
}
/// The low `bytes` (b, h, s) of 32-bit elements, one behind the other, to base + imm · as many as a vector gives.
constexpr Word st1_of_s(Element bytes, Z zt, P pg, const Gp& base, int imm) {
  return detail::Builder(0xe440e000)
      .field(bytes == Element::d ? detail::kOutOfRange : static_cast<std::uint32_t>(bytes), 23)
      .field(detail::signed_immediate(imm, 4), 16)
      .governing(pg, 10)
      .x(base, 5)
      .z(zt, 0);
}

// ---------------------------------------------------------------- vectors

/// Every element becomes imm.
constexpr Word dup(Element size, Z zd, int imm) {
  return detail::Builder(0x2538c000).field(size, 22).field(detail::signed_immediate(imm, 8), 5).z(zd, 0);
}
/// Every element becomes wn, or xn of .d.
constexpr Word dup(Element size, Z zd, const Gp& rn) {
  return detail::Builder(0x05203800).field(size, 22).x(rn, 5).z(zd, 0);
}
/// zda.s += products of four bytes of zn and zm each, signed.
constexpr Word sdot(Z zda, Z zn, Z zm) {
  return detail::Builder(0x44800000).z(zm, 16).z(zn, 5).z(zda, 0);
}
/// In each 128 bits: zda.s (2 × 2) += zn.b (2 × 8) · zm.b (2 × 8)ᵀ, signed.
constexpr Word smmla(Z zda, Z zn, Z zm) {
  return detail::Builder(0x45009800).z(zm, 16).z(zn, 5).z(zda, 0);
}
constexpr Word add(Element size, Z zd, Z zn, Z zm) {
  return detail::Builder(0x04200000).field(size, 22).z(zm, 16).z(zn, 5).z(zd, 0);
}
constexpr Word uzp1(Element size, Z zd, Z zn, Z zm) {
  return detail::Builder(0x05206800).field(size, 22).z(zm, 16).z(zn, 5).z(zd, 0);
}
constexpr Word uzp2(Element size, Z zd, Z zn, Z zm) {
  return detail::Builder(0x05206c00).field(size, 22).z(zm, 16).z(zn, 5).z(zd, 0);
}

constexpr Word sub(Element size, Z zd, Z zn, Z zm) {
  return detail::Builder(0x04200400).field(size, 22).z(zm, 16).z(zn, 5).z(zd, 0);
}
constexpr Word trn1(Element size, Z zd, Z zn, Z zm) {
  return detail::Builder(0x05207000).field(size, 22).z(zm, 16).z(zn, 5).z(zd, 0);
}
/// zda.s += products of four bytes of zn and zm each, unsigned.
constexpr Word udot(Z zda, Z zn, Z zm) {
  return detail::Builder(0x44800400).z(zm, 16).z(zn, 5).z(zda, 0);
}
/// sdot and smmla with zn unsigned and zm signed (FEAT_I8MM).
constexpr Word usdot(Z zda, Z zn, Z zm) {
  return detail::Builder(0x44807800).z(zm, 16).z(zn, 5).z(zda, 0);
}
constexpr Word usmmla(Z zda, Z zn, Z zm) {
  return detail::Builder(0x45809800).z(zm, 16).z(zn, 5).z(zda, 0);
}
/// zdn += imm, zdn −= imm, zdn = imm − zdn; imm 0 … 255.
constexpr Word add(Element size, Z zdn, int imm) {
  return detail::Builder(0x2520c000).field(size, 22).field(detail::unsigned_immediate(imm, 8), 5).z(zdn, 0);
}
constexpr Word sub(Element size, Z zdn, int imm) {
  return detail::Builder(0x2521c000).field(size, 22).field(detail::unsigned_immediate(imm, 8), 5).z(zdn, 0);
}
constexpr Word subr(Element size, Z zdn, int imm) {
  return detail::Builder(0x2523c000).field(size, 22).field(detail::unsigned_immediate(imm, 8), 5).z(zdn, 0);
}
/// The greater or lesser of zdn and imm: signed −128 … 127; umin unsigned 0 … 255.
constexpr Word smax(Element size, Z zdn, int imm) {
  return detail::Builder(0x2528c000).field(size, 22).field(detail::signed_immediate(imm, 8), 5).z(zdn, 0);
}
constexpr Word smin(Element size, Z zdn, int imm) {
  return detail::Builder(0x252ac000).field(size, 22).field(detail::signed_immediate(imm, 8), 5).z(zdn, 0);
}
constexpr Word umin(Element size, Z zdn, int imm) {
  return detail::Builder(0x252bc000).field(size, 22).field(detail::unsigned_immediate(imm, 8), 5).z(zdn, 0);
}
/// Every 64 bits of zdn: & 1, | ~1; every 32 bits: & 1.
constexpr Word and_one(Element size, Z zdn) {
  return detail::Builder(size == Element::d   ? 0x05820000
                         : size == Element::s ? 0x05800000
                                              : 0)
      .field(size == Element::d || size == Element::s ? 0 : detail::kOutOfRange, 0)
      .z(zdn, 0);
}
constexpr Word or_not_one(Z zdn) {
  return detail::Builder(0x0503ffc0).z(zdn, 0);
}
/// To the right by 1 … bits of an element, with copies of the sign or zeros.
constexpr Word shift_right_immediate(std::uint32_t opcode, Element size, Z zd, Z zn, int imm) {
  const std::uint32_t bits = 8u << static_cast<std::uint32_t>(size);
  const std::uint32_t code =
      imm >= 1 && imm <= static_cast<int>(bits) ? 2 * bits - static_cast<std::uint32_t>(imm) : detail::kOutOfRange;
  return detail::Builder(opcode)
      .field(code == detail::kOutOfRange ? code : code >> 5, 22)
      .field(code & 31, 16)
      .z(zn, 5)
      .z(zd, 0);
}
constexpr Word asr(Element size, Z zd, Z zn, int imm) {
  return shift_right_immediate(0x04209000, size, zd, zn, imm);
}
constexpr Word lsr(Element size, Z zd, Z zn, int imm) {
  return shift_right_immediate(0x04209400, size, zd, zn, imm);
}
/// Elements of zdn that pg holds become op(zdn, zm), or op(zm).
constexpr Word predicated(std::uint32_t opcode, Element size, Z zdn, P pg, Z zm) {
  return detail::Builder(opcode).field(size, 22).governing(pg, 10).z(zm, 5).z(zdn, 0);
}
constexpr Word add(Element size, Z zdn, P pg, Z zm) {
  return predicated(0x04000000, size, zdn, pg, zm);
}
constexpr Word mul(Element size, Z zdn, P pg, Z zm) {
  return predicated(0x04100000, size, zdn, pg, zm);
}
constexpr Word smax(Element size, Z zdn, P pg, Z zm) {
  return predicated(0x04080000, size, zdn, pg, zm);
}
constexpr Word smin(Element size, Z zdn, P pg, Z zm) {
  return predicated(0x040a0000, size, zdn, pg, zm);
}
/// Shifts by zm, unsigned: more than an element has bits leave its sign, or zeros.
constexpr Word asr(Element size, Z zdn, P pg, Z zm) {
  return predicated(0x04108000, size, zdn, pg, zm);
}
constexpr Word lsl(Element size, Z zdn, P pg, Z zm) {
  return predicated(0x04138000, size, zdn, pg, zm);
}
constexpr Word neg(Element size, Z zd, P pg, Z zn) {
  return predicated(0x0417a000, size, zd, pg, zn);
}
/// Of 64-bit elements: their low 32 bits with copies of the sign, or zeros.
constexpr Word sxtw(Z zd, P pg, Z zn) {
  return predicated(0x0414a000, Element::d, zd, pg, zn);
}
constexpr Word uxtw(Z zd, P pg, Z zn) {
  return predicated(0x0415a000, Element::d, zd, pg, zn);
}
/// zda += zn · zm; zdn = za + zdn · zm.
constexpr Word mla(Element size, Z zda, P pg, Z zn, Z zm) {
  return detail::Builder(0x04004000).field(size, 22).z(zm, 16).governing(pg, 10).z(zn, 5).z(zda, 0);
}
constexpr Word mad(Element size, Z zdn, P pg, Z zm, Z za) {
  return detail::Builder(0x0400c000).field(size, 22).z(zm, 16).governing(pg, 10).z(za, 5).z(zdn, 0);
}
/// zd = pg ? zn : zm.
constexpr Word sel(Element size, Z zd, P pg, Z zn, Z zm) {
  return detail::Builder(0x0520c000).field(size, 22).z(zm, 16).governing(pg, 10).z(zn, 5).z(zd, 0);
}
/// A copy in front of an instruction that overwrites its operand zd.
constexpr Word movprfx(Z zd, Z zn) {
  return detail::Builder(0x0420bc00).z(zn, 5).z(zd, 0);
}

/// zd at least zn, then at most zm, signed. SME has it, and SVE2.1.
constexpr Word sclamp(Element size, Z zd, Z zn, Z zm) {
  return detail::Builder(0x4400c000).field(size, 22).z(zm, 16).z(zn, 5).z(zd, 0);
}

// SVE2; s32 elements of even (b) or odd (t) numbers make 64-bit ones.
constexpr Word long_product(std::uint32_t opcode, Z zd, Z zn, Z zm) {
  return detail::Builder(opcode).z(zm, 16).z(zn, 5).z(zd, 0);
}
constexpr Word smullb(Z zd, Z zn, Z zm) {
  return long_product(0x45c07000, zd, zn, zm);
}
constexpr Word smullt(Z zd, Z zn, Z zm) {
  return long_product(0x45c07400, zd, zn, zm);
}
constexpr Word umullb(Z zd, Z zn, Z zm) {
  return long_product(0x45c07800, zd, zn, zm);
}
constexpr Word umullt(Z zd, Z zn, Z zm) {
  return long_product(0x45c07c00, zd, zn, zm);
}
/// zda += the product.
constexpr Word smlalb(Z zda, Z zn, Z zm) {
  return long_product(0x44c04000, zda, zn, zm);
}
constexpr Word smlalt(Z zda, Z zn, Z zm) {
  return long_product(0x44c04400, zda, zn, zm);
}
/// To the left by zm, signed; to the right rounded, half up.
constexpr Word srshl(Element size, Z zdn, P pg, Z zm) {
  return predicated(0x44028000, size, zdn, pg, zm);
}

// f32.
constexpr Word scvtf(Z zd, P pg, Z zn) {
  return detail::Builder(0x6594a000).governing(pg, 10).z(zn, 5).z(zd, 0);
}
/// To integral values, half to even; to s32, towards 0, saturated.
constexpr Word frintn(Z zd, P pg, Z zn) {
  return detail::Builder(0x6580a000).governing(pg, 10).z(zn, 5).z(zd, 0);
}
constexpr Word fcvtzs(Z zd, P pg, Z zn) {
  return detail::Builder(0x659ca000).governing(pg, 10).z(zn, 5).z(zd, 0);
}
/// To f16 in the low half of each element.
constexpr Word fcvt_h(Z zd, P pg, Z zn) {
  return detail::Builder(0x6588a000).governing(pg, 10).z(zn, 5).z(zd, 0);
}
constexpr Word fmul(Z zd, Z zn, Z zm) {
  return detail::Builder(0x65800800).z(zm, 16).z(zn, 5).z(zd, 0);
}
/// zn times element `index` (0 … 3) of zm (z0 … z7) in the same 128 bits.
constexpr Word fmul(Z zd, Z zn, Z zm, int index) {
  return detail::Builder(0x64a02000)
      .field(detail::in(index, 0, 3), 19)
      .field(detail::in(zm.id, 0, 7), 16)
      .naming_vector(zm)
      .z(zn, 5)
      .z(zd, 0);
}
constexpr Word fmul(Z zdn, P pg, Z zm) {
  return detail::Builder(0x65828000).governing(pg, 10).z(zm, 5).z(zdn, 0);
}
/// zda = zda + zn · zm, zdn = za + zdn · zm, rounded once.
constexpr Word fmla(Z zda, P pg, Z zn, Z zm) {
  return detail::Builder(0x65a00000).z(zm, 16).governing(pg, 10).z(zn, 5).z(zda, 0);
}
constexpr Word fmad(Z zdn, P pg, Z zm, Z za) {
  return detail::Builder(0x65a08000).z(za, 16).governing(pg, 10).z(zm, 5).z(zdn, 0);
}
/// The greater one; of a number and a quiet NaN the number.
constexpr Word fmaxnm(Z zdn, P pg, Z zm) {
  return detail::Builder(0x65848000).governing(pg, 10).z(zm, 5).z(zdn, 0);
}

// ---------------------------------------------------------------- SME

constexpr Word smstart(Mode mode) {
  return detail::Builder(0xd503417f).field(mode, 9);
}
constexpr Word smstop(Mode mode) {
  return detail::Builder(0xd503407f).field(mode, 9);
}
/// Register of the ZA lazy-save scheme (AAPCS64, "The ZA lazy saving scheme").
constexpr Word mrs_tpidr2(const Gp& rt) {
  return detail::Builder(0xd53bd0a0).x(rt, 0);
}
constexpr Word msr_tpidr2(const Gp& rt) {
  return detail::Builder(0xd51bd0a0).x(rt, 0);
}
/// Zeroes the .d tiles of the mask (bit i: za{i}.d); za{i}.s is made of za{i}.d and za{i + 4}.d.
constexpr Word zero(std::uint32_t d_tiles) {
  return detail::Builder(0xc0080000).field(detail::in(d_tiles, 0, 255), 0);
}
/// To slice ws + offset of za0.b, offset 0 … 15, from base + index. Horizontal slice 4i + t of za0.b is horizontal
/// slice i of za{t}.s.
constexpr Word ld1b_za(Slice slice, const Gp& ws, int offset, P pg, const Gp& base, const Gp& index) {
  return detail::Builder(0xe0000000)
      .x(index, 16)
      .field(slice, 15)
      .slice_register(ws, 13)
      .governing(pg, 10)
      .x(base, 5)
      .field(detail::in(offset, 0, 15), 0);
}
/// Slice ws + offset of tile.s, offset 0 … 3, to base + 4 · index.
constexpr Word st1w(ZaTile tile, Slice slice, const Gp& ws, int offset, P pg, const Gp& base, const Gp& index) {
  return detail::Builder(0xe0a00000)
      .x(index, 16)
      .field(slice, 15)
      .slice_register(ws, 13)
      .governing(pg, 10)
      .x(base, 5)
      .field(detail::in(tile.id, 0, 3), 2)
      .field(detail::in(offset, 0, 3), 0);
}
/// zd.s where pg holds it = slice ws + offset of tile.s, offset 0 … 3.
constexpr Word mova(Z zd, P pg, ZaTile tile, Slice slice, const Gp& ws, int offset) {
  return detail::Builder(0xc0820000)
      .field(slice, 15)
      .slice_register(ws, 13)
      .governing(pg, 10)
      .field(detail::in(tile.id, 0, 3), 7)
      .field(detail::in(offset, 0, 3), 5)
      .z(zd, 0);
}
/// zn.s is added to every row of tile.s; as a column to every column.
constexpr Word addha(ZaTile tile, P rows, P columns, Z zn) {
  return detail::Builder(0xc0900000)
      .governing(columns, 13)
      .governing(rows, 10)
      .z(zn, 5)
      .field(detail::in(tile.id, 0, 3), 0);
}
constexpr Word addva(ZaTile tile, P rows, P columns, Z zn) {
  return detail::Builder(0xc0910000)
      .governing(columns, 13)
      .governing(rows, 10)
      .z(zn, 5)
      .field(detail::in(tile.id, 0, 3), 0);
}
/// Vector ws + offset of the ZA array, whole, to base + offset · bytes of a streaming vector, offset 0 … 15.
constexpr Word str_za(const Gp& ws, int offset, const Gp& base) {
  return detail::Builder(0xe1200000).slice_register(ws, 13).x(base, 5).field(detail::in(offset, 0, 15), 0);
}
/// tile.s[i][j] += Σ of four products zn.b[4i + r] · zm.b[4j + r], signed, of elements that pn and pm hold.
constexpr Word smopa(ZaTile tile, P pn, P pm, Z zn, Z zm) {
  return detail::Builder(0xa0800000)
      .z(zm, 16)
      .governing(pm, 13)
      .governing(pn, 10)
      .z(zn, 5)
      .field(detail::in(tile.id, 0, 3), 0);
}
/// The same with zn unsigned.
constexpr Word usmopa(ZaTile tile, P pn, P pm, Z zn, Z zm) {
  return detail::Builder(0xa1800000)
      .z(zm, 16)
      .governing(pm, 13)
      .governing(pn, 10)
      .z(zn, 5)
      .field(detail::in(tile.id, 0, 3), 0);
}

} // namespace kiln::arm::sve
