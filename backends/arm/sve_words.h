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

// ---------------------------------------------------------------- vectors

/// Every element becomes imm.
constexpr Word dup(Element size, Z zd, int imm) {
  return detail::Builder(0x2538c000).field(size, 22).field(detail::signed_immediate(imm, 8), 5).z(zd, 0);
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

} // namespace kiln::arm::sve
