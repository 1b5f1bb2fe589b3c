#include "backends/arm/int8_linear.h"

#include <algorithm>
#include <bit>
#include <cstddef>
#include <utility>

namespace kiln::arm {

using namespace asmjit::a64;
using asmjit::Label;
using int8_linear::Call;
using int8_linear::Float;
using int8_linear::TermsLayout;

namespace {

constexpr std::uint32_t kInfinity = 0x7F800000, kNan = 0x7FC00000, k127 = 0x42FE0000; // f32
constexpr int kVectorBytes = 16;
constexpr int kVectors = 4; ///< of X in a turn

VecV v(int id) {
  return VecV(static_cast<std::uint32_t>(id));
}

/// X is read in blocks of four vectors, in v0 … v3; the last one may have fewer elements, then zeros.
class Quantiser {
public:
  Quantiser(Assembler& assembler, const QuantisedRows& rows) : a_(assembler), rows_(rows) {}

  void emit() {
    const Label quantised = a_.newLabel(), next_row = a_.newLabel(), multiply = a_.newLabel();
    const auto field = [](std::size_t offset) { return ptr(call, static_cast<std::int32_t>(offset)); };
    a_.ldr(steps, field(offsetof(Call, steps)));
    a_.tbz(steps, std::countr_zero(std::uint64_t{int8_linear::kQuantise}), quantised);
    a_.ldr(row, field(offsetof(Call, x)));
    a_.ldr(row_step, field(offsetof(Call, ldx)));
    a_.lsl(row_step, row_step, std::countr_zero(static_cast<unsigned>(element_bytes())));
    a_.ldr(rows_left, field(offsetof(Call, product.m)));
    a_.ldr(out, field(offsetof(Call, product.workspace)));
    a_.movi(zero.b16(), 0);
    a_.bind(next_row);
    find_maximum();
    find_scale();
    scale_row();
    a_.add(row, row, row_step);
    a_.add_constant(out, out, rows_.row_bytes, scratch);
    a_.subs(rows_left, rows_left, 1);
    a_.b_ne(next_row);
    a_.bind(quantised);
    a_.tbnz(steps, std::countr_zero(std::uint64_t{int8_linear::kMultiply}), multiply);
    a_.ret(x30);
    a_.bind(multiply);
  }

private:
  static constexpr GpX call = x0, row = x1, row_step = x2, rows_left = x3, out = x4, from = x5, to = x6, turns = x7,
                       steps = x8, scratch = x9;
  static constexpr GpW bits = w9, infinity = w10;
  static constexpr VecV zero = v31, r = v30, s = v29;
  static constexpr int kMaximum = 16; ///< v16 … v19

  bool words() const { return rows_.x != Float::f32; }
  int element_bytes() const { return words() ? 2 : 4; }
  int vector_elements() const { return kVectorBytes / element_bytes(); }
  int block_elements() const { return kVectors * vector_elements(); }

  /// `block(elements)` for the row, from `from` on, with its elements in v0 … v3; `after` moves other pointers on.
  template <class Block, class After> void for_blocks(Block block, After after) {
    const std::int64_t whole = rows_.k / block_elements();
    const int rest = static_cast<int>(rows_.k % block_elements());
    a_.mov(from, row);
    if (whole > 0) {
      const Label turn = a_.newLabel();
      a_.mov(turns, whole);
      a_.bind(turn);
      for (int i = 0; i < kVectors; i += 2)
        a_.ldp(v(i), v(i + 1), ptr(from, i * kVectorBytes));
      a_.add(from, from, kVectors * kVectorBytes);
      block(block_elements());
      after();
      a_.subs(turns, turns, 1);
      a_.b_ne(turn);
    }
    if (rest > 0) {
      load_rest(rest);
      block(rest);
    }
  }

  /// The last `rest` elements of the row, and zeros.
  void load_rest(int rest) {
    for (int i = 0; i < kVectors; ++i) {
      const int bytes = std::clamp(rest * element_bytes() - i * kVectorBytes, 0, kVectorBytes), at = i * kVectorBytes;
      if (bytes == kVectorBytes) {
        a_.ldr(v(i), ptr(from, at));
      } else if (bytes == 0) {
        a_.movi(v(i).b16(), 0);
      } else if (rows_.k >= vector_elements()) { // the 16 bytes before the row's end, less what was there before
        a_.ldur(v(i), ptr(from, at + bytes - kVectorBytes));
        a_.ext(v(i).b16(), v(i).b16(), zero.b16(), kVectorBytes - bytes);
      } else {
        a_.load_first(v(i), from, bytes, scratch);
      }
    }
  }

  /// max|x| as bits of f32. Magnitudes compare as their bits do, also shifted to the left by the sign's one.
  void find_maximum() {
    const auto take = [&](int into, const VecV& x) {
      words() ? a_.umax(v(into).h8(), v(into).h8(), x.h8()) : a_.umax(v(into).s4(), v(into).s4(), x.s4());
    };
    for (int i = 0; i < kVectors; ++i)
      a_.movi(v(kMaximum + i).b16(), 0);
    for_blocks(
        [&](int elements) {
          const int vectors = (elements + vector_elements() - 1) / vector_elements();
          for (int i = 0; i < vectors; ++i)
            words() ? a_.add(v(i).h8(), v(i).h8(), v(i).h8()) : a_.add(v(i).s4(), v(i).s4(), v(i).s4());
          for (int i = 0; i < vectors; ++i)
            take(kMaximum + i, v(i));
        },
        [] {});
    take(kMaximum, v(kMaximum + 1));
    take(kMaximum + 2, v(kMaximum + 3));
    take(kMaximum, v(kMaximum + 2));
    if (words())
      a_.umaxv(v(kMaximum).h(), v(kMaximum).h8());
    else
      a_.umaxv(v(kMaximum).s(), v(kMaximum).s4());
    a_.fmov(bits, v(kMaximum).s());
    if (rows_.x == Float::bf16)
      a_.lsl(bits, bits, 15);
    else
      a_.lsr(bits, bits, 1);
    if (rows_.x == Float::f16) {
      a_.fmov(r.s(), bits);
      a_.fcvt(r.s(), r.h());
      a_.fmov(bits, r.s());
    }
  }

  /// s to the row's end, r to every lane of `r`.
  void find_scale() {
    const Label not_finite = a_.newLabel(), scaled = a_.newLabel();
    const VecV maximum = v(kMaximum), most = v(kMaximum + 1);
    a_.mov(infinity, kInfinity);
    a_.cmp(bits, infinity);
    a_.b_hs(not_finite);
    a_.fmov(maximum.s(), bits);
    a_.mov(bits, k127);
    a_.fmov(most.s(), bits);
    a_.fdiv(r.s(), most.s(), maximum.s());
    a_.fdiv(s.s(), maximum.s(), most.s());
    a_.fmov(bits, r.s());
    a_.cmp(bits, infinity);
    a_.b_lo(scaled);
    a_.fmov(r.s(), wzr);
    a_.fmov(s.s(), wzr);
    a_.b(scaled);
    a_.bind(not_finite);
    a_.fmov(r.s(), wzr);
    a_.mov(bits, kNan);
    a_.fmov(s.s(), bits);
    a_.bind(scaled);
    a_.dup(r.s4(), r.s(0));
    a_.add_constant(scratch, out, rows_.scale_at(), scratch);
    a_.str(s.s(), ptr(scratch));
  }

  /// q of the row. |x · r| ≤ 127 · (1 + 2^-22): nothing to clamp; NaN, which only a row with s = NaN has, becomes 0.
  void scale_row() {
    a_.add_constant(to, out, rows_.offset, scratch);
    for_blocks(
        [&](int elements) {
          for (int i = 0; 16 * i < elements; ++i)
            quantise_sixteen(i * 16 / vector_elements(), 16 * rows_.copies * i);
        },
        [&] { a_.add(to, to, block_elements() * rows_.copies); });
  }

  /// From v{first} on, to byte `at` behind `to`.
  void quantise_sixteen(int first, int at) {
    const int out = 16 + 4 * (at / (16 * rows_.copies)); // registers of their own for each sixteen
    for (int i = 0; i < 4; ++i) {
      const VecV x = v(first + i / (words() ? 2 : 1)), f = v(out + i);
      const bool high = i % 2 != 0;
      if (rows_.x == Float::bf16)
        high ? a_.zip2(f.h8(), zero.h8(), x.h8()) : a_.zip1(f.h8(), zero.h8(), x.h8());
      else if (rows_.x == Float::f16)
        high ? a_.fcvtl2(f.s4(), x.h8()) : a_.fcvtl(f.s4(), x.h4());
      a_.fmul(f.s4(), words() ? f.s4() : x.s4(), r.s4());
    }
    for (int i = 0; i < 4; ++i)
      a_.fcvtns(v(out + i).s4(), v(out + i).s4()); // half to even
    a_.uzp1(v(out).h8(), v(out).h8(), v(out + 1).h8());
    a_.uzp1(v(out + 1).h8(), v(out + 2).h8(), v(out + 3).h8());
    a_.uzp1(v(out).b16(), v(out).b16(), v(out + 1).b16());
    if (rows_.copies == 1) {
      a_.str(v(out), ptr(to, at));
    } else {
      a_.zip1(v(out + 1).d2(), v(out).d2(), v(out).d2());
      a_.zip2(v(out + 2).d2(), v(out).d2(), v(out).d2());
      a_.stp(v(out + 1), v(out + 2), ptr(to, at));
    }
  }

  Assembler& a_;
  const QuantisedRows& rows_;
};

} // namespace

void emit_quantiser(Assembler& a, const QuantisedRows& rows) {
  Quantiser(a, rows).emit();
}

void begin_linear(Assembler& a, NestShape& shape, const KernelDesc& desc) {
  shape.epilogue = int8_linear::output_of(desc);
  shape.linear = LinearShape{.x = int8_linear::x_of(desc), .has_bias = int8_linear::has_bias(desc)};
  emit_quantiser(a, shape.quantised_rows());
}

void NeonLinearEpilogue::apply(TileSums& sums, const TileTerms& at) {
  constexpr int kLanes = 4, kScales = 2; // registers for the rows' s, of four each
  Registers& free = sums.free;
  const VecV column_scale(free[0]), bias(free[1]);
  const auto row_scale = [&](int row) { return VecV(free[static_cast<std::size_t>(2 + row / kLanes)]); };
  const std::size_t first_temp = 2 + kScales;
  std::size_t next = 0;
  if (sums.rows == 1) // behind it may be nothing to read
    a_.ldr(row_scale(0).s(), ptr(at.values));
  for (int row = 0; row < sums.rows && sums.rows > 1; row += kLanes)
    a_.ldr(row_scale(row), ptr(at.values, 4 * row));
  if (!has_bias_)
    a_.movi(bias.s4(), 0);
  for (int vector = 0; vector < sums.vectors; ++vector) {
    load(column_scale.id(), at.terms, term(at, vector, TermsLayout::kWs), at.scratch);
    if (has_bias_)
      load(bias.id(), at.terms, term(at, vector, TermsLayout::kBias), at.scratch);
    for (int row = 0; row < sums.rows; ++row) {
      // t and y in registers in turn; that of the sum is the next one free.
      std::uint32_t& sum = sums.sums[static_cast<std::size_t>(row * sums.vectors + vector)];
      std::uint32_t& temp = free[first_temp + next];
      const VecV t(free[first_temp + 2 + next]), y(temp), f(sum);
      next = 1 - next;
      a_.scvtf(f.s4(), f.s4());
      a_.fmul(t.s4(), column_scale.s4(), row_scale(row).s(static_cast<std::uint32_t>(row % kLanes)));
      a_.mov(y.b16(), bias.b16());
      a_.fmla(y.s4(), f.s4(), t.s4());
      std::swap(sum, temp);
    }
  }
}

void SveLinearEpilogue::apply_rest(const TileSums& sums, const TileTerms& at, bool, bool) {
  constexpr int kOfQuadword = 4;
  const std::size_t first_temp = 2 + static_cast<std::size_t>((sums.rows + kOfQuadword - 1) / kOfQuadword);
  const Registers& free = sums.free;
  const sve::Z column_scale{free[0]}, bias{free[1]};
  const auto row_scale = [&](int row) { return sve::Z{free[static_cast<std::size_t>(2 + row / kOfQuadword)]}; };
  if (sums.rows == 1) // behind it may be nothing to read
    a_.word(sve::ld1rw(row_scale(0), all(), at.values, 0));
  for (int row = 0; row < sums.rows && sums.rows > 1; row += kOfQuadword)
    a_.word(sve::ld1rqb(row_scale(row), all(), at.values, 4 * row));
  if (!has_bias_)
    a_.word(sve::dup(sve::Element::s, bias, 0));
  std::size_t next = 0;
  for (int vector = 0; vector < sums.vectors; ++vector) {
    load(column_scale.id, at.terms, term(at, vector, TermsLayout::kWs), at.scratch);
    if (has_bias_)
      load(bias.id, at.terms, term(at, vector, TermsLayout::kBias), at.scratch);
    for (int row = 0; row < sums.rows; ++row) {
      const sve::Z sum{sums.at(row, vector)}, t{free[first_temp + next++ % (free.size() - first_temp)]};
      a_.word(sve::scvtf(sum, all(), sum));
      a_.word(sve::fmul(t, column_scale, row_scale(row), row % kOfQuadword));
      a_.word(sve::fmad(sum, all(), t, bias));
    }
  }
}

Implementation linear_row(Implementation product) {
  // What it asks of a desc holds for both.
  static_assert(int{int8_linear::kM} == int8_mm::kM && int{int8_linear::kN} == int8_mm::kN &&
                int{int8_linear::kK} == int8_mm::kK);
  product.op = OpId::int8_linear;
  product.uses = nullptr;
  product.supports = [](const KernelDesc& desc, const Target&) { return int8_linear::check_k(desc, kNestMaxK); };
  return product;
}

} // namespace kiln::arm
