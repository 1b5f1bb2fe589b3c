#pragma once
#include <vector>

#include "backends/x86/emit.h"
#include "jit/ops/int8_linear.h"
#include "jit/ops/int8_mm_epilogue.h"

/// What becomes of finished s32 sums on their way from registers to C: int8_mm's epilogue on vectors of 8 (AVX2) or 16
/// (AVX-512) columns of one row. Whoever holds sums in registers, in whatever order, can use it:
///
///   prepare_shared     once a call: values that all columns share
///   prepare_columns    once a vector of columns: its terms, in the form that the stages want
///   load_offsets       what the sums of a vector of columns begin at
///   apply              the stages, in registers
///   narrow, store      to C's type
///   emit_rare_paths    behind the code: what apply jumps to for values that are seldom seen
///
/// Both `prepare` write to scratch memory, a few lines that stay in L1; the stages take their operands from there, so
/// that they need few registers beside the sums. Absent stages emit nothing.
namespace kiln::x86 {

class EpilogueEmitter {
public:
  using Vec = asmjit::x86::Vec;
  using Gp = asmjit::x86::Gp;
  using Mem = asmjit::x86::Mem;
  using KReg = asmjit::x86::KReg;

  /// `vector_bytes` 32 or 64; `vectors` of columns that are prepared at a time; three vector registers that apply,
  /// narrow and store may use; how far from the register given as `scratch` the scratch memory begins.
  EpilogueEmitter(Assembler& assembler, const int8_mm::Epilogue& epilogue, int vector_bytes, int vectors,
                  std::uint32_t first_temp, std::uint32_t second_temp, std::uint32_t third_temp, int scratch_at = 0);

  /// int8_linear's stage in place of int8_mm's, for its terms and the types of a desc: y = fma(f32(sum), s · ws, bias).
  EpilogueEmitter(Assembler& assembler, const KernelDesc& linear, int vector_bytes, int vectors,
                  std::uint32_t first_temp, std::uint32_t second_temp, std::uint32_t third_temp, int scratch_at = 0);

  /// Of the scratch memory, which is 64-byte aligned: a multiple of 64.
  int scratch_bytes() const { return (shared_bytes_ - scratch_at_ + vectors_ * column_bytes_ + 63) / 64 * 64; }
  /// What the code uses beside AVX2, or AVX-512F and BW.
  Features features() const;

  /// From call->scalars. Clobbers rax and vector registers 0 … 7, and with 512 bits sets k5, which apply needs, and
  /// which nobody else may use (k6 is apply's own).
  void prepare_shared(const Gp& call, const Gp& scratch);
  /// Vector `i` of columns from the terms whose arrays begin at `terms` + `at`, `array_bytes` apart. Clobbers vector
  /// registers 0 … 7 and rax.
  void prepare_columns(int i, const Gp& terms, int at, int array_bytes, const Gp& scratch);
  void load_offsets(const Vec& sums, int i, const Gp& scratch);
  /// For sums that began at 0.
  void add_offsets(const Vec& sums, int i, const Gp& scratch);

  /// Sums, that began at the offsets, of vector `i` of columns. `a_zp` and `row_sum`: the row's s32, read only with
  /// those stages; of int8_linear a_zp is the row's s. Results as s32, or as f32 for float outputs, in `sums`.
  void apply(const Vec& sums, int i, const Gp& scratch, const Mem& a_zp, const Mem& row_sum);

  /// 512 bits: 16 results to C at `to`, those of `mask`. Clobbers `results`.
  void store(const Vec& results, const Mem& to, const KReg& mask);
  /// 256 bits: 16 results in two registers become C's type in `low`, and for f32 and s32 `high`. Clobbers both.
  void narrow(const Vec& low, const Vec& high);
  /// 256 bits: those narrowed 16 to memory of any alignment.
  void store_narrowed(const Vec& low, const Vec& high, const Gp& to, int offset);

  void emit_rare_paths();

  /// f32 to bf16 in the low half of each lane, to nearest even; a NaN must be 0x7FC00000.
  void round_to_bf16(const Vec& values, const Gp& scratch);

private:
  /// Where the operands of a division by 2^shift lie, from the columns' or the shared part: of even and odd lanes.
  struct Wide {
    int multiplier[2], half[2], shift[2], sign[2], lowest[2];
    int bias; ///< 256 bits: what the shift of unsigned numbers adds
    // With rounds_in_doubles(): multiplier / 2^shift of the low and high 8 lanes, and which lanes that is no way for;
    // −1: none are.
    int factor[2], unfit;
  };
  struct RarePath {
    asmjit::Label begin, end;
    Vec from, to;
    Wide wide;
    Gp scratch;
    int base;
  };

  bool is_512() const { return vector_bytes_ == 64; }
  Vec reg(std::uint32_t id) const;
  Vec temp(int i) const { return reg(temps_[i]); }
  Mem shared(const Gp& scratch, int slot) const { return asmjit::x86::ptr(scratch, slot); }
  Mem column(const Gp& scratch, int i, int slot) const {
    return asmjit::x86::ptr(scratch, shared_bytes_ + i * column_bytes_ + slot);
  }
  int slot(int& bytes) const;
  Wide wide_slots(int& bytes, bool per_lane) const;
  bool rounds_by_sign() const;
  bool rounds_by_lowest_bit() const;
  bool rounds_down_from_half() const;
  bool rounds_in_doubles() const;

  void load(const Vec& to, const Mem& from);
  void save(const Mem& to, const Vec& from);
  void broadcast_constant(const Vec& to, std::uint64_t value);
  /// From vectors of multipliers (s32) and shifts (s32 0 … 62) in registers 0 and 1.
  void prepare_wide(const Wide& wide, const Gp& scratch, int base);
  void prepare_factors(const Wide& wide, const Gp& scratch, int base);
  void round_wide(const Vec& from, const Vec& to, const Wide& wide, const Gp& scratch, int base);
  void round_in_doubles(const Vec& from, const Vec& to, const Wide& wide, const Gp& scratch, int base);
  void round_in_integers(const Vec& from, const Vec& to, const Wide& wide, const Gp& scratch, int base);
  void apply_scale(const Vec& sums, int i, const Gp& scratch);
  void dequantise(const Vec& sums, int i, const Gp& scratch, const Mem& s);
  void apply_integer(const Vec& sums, int i, const Gp& scratch);
  void add_product(const Vec& sums, const Mem& of_row, const Mem& of_columns);

  Assembler& a_;
  const int8_mm::Epilogue epilogue_;
  const int8_mm::TermsLayout terms_;
  const int vector_bytes_, vectors_;
  const std::uint32_t temps_[3];
  const bool dequantises_ = false, has_bias_ = false; ///< int8_linear
  const int scratch_at_ = 0;
  int shared_bytes_ = scratch_at_; ///< where the shared part ends
  int column_bytes_ = 0;           ///< of a vector of columns
  // Slots of the shared part; −1: none.
  int lo_ = -1, hi_ = -1, c_zp_ = -1, slope_ = -1, limit_ = -1, nan_ = -1, bf16_half_ = -1, one_ = -1;
  int magic_ = -1, low_halves_ = -1;
  Wide slope_wide_{};
  // Slots of each vector of columns.
  int offset_ = -1, a_zp_ = -1, row_sum_ = -1, scale_ = -1, left_ = -1, bias_ = -1;
  Wide wide_{};
  std::vector<RarePath> rare_paths_;
};

} // namespace kiln::x86
