#include <algorithm>
#include <array>
#include <bit>
#include <cstddef>
#include <memory>
#include <optional>
#include <vector>

#include <arm_generator_id.h>
#include <fmt/format.h>

#include "backends/arm/emit.h"
#include "backends/arm/epilogue_sve.h"
#include "backends/arm/int8_linear.h"
#include "backends/arm/int8_mm_scalar.h"
#include "backends/arm/rows.h"
#include "backends/arm/sve_words.h"
#include "jit/ops/int8_mm.h"

// int8_mm on SME, with instructions of SME1 only. T = SVL / 32 is the height and the width of a tile of s32 sums; ZA
// holds four of them, and SMOPA adds to one the products of T rows × 4 of K with 4 of K × T columns, two vectors.
//
//   A's rows become vectors of T rows × 4 of K in the workspace, once for the call
//   per two panels of 2T columns               they stay in L2 for all rows
//     per panel
//       per 2T rows                            wide: 2 × 2 tiles of sums, 4 vector loads for 4 products
//     the last 1 … T rows                      narrow: 1 × 4 tiles of sums, 5 vector loads for 4 products
//
// Remainders:
// - M: rows of A beyond m are zeros in the workspace, their sums are not stored. Between T + 1 and 2T rows are wide.
// - K: A's bytes beyond K are not loaded, and zeros in the workspace; so they are in the pack.
// - N: the pack is zero beyond N; predicates keep its sums from memory. A last single panel is 1 × 2 in narrow.
//
// Epilogue: a tile's sums begin at the columns' terms (ADDHA), rows of it come to vector registers, kFinishRows at a
// time, and go through the stages to C. Sums of A's rows are made where A is copied, and lie with their a_zp behind
// each block of rows in the workspace. Row values that are the same for all columns are added to the tile too (ADDVA).
//
// int8_linear: rows are quantised with NEON before streaming mode, and are then the rows of A; the values behind a
// block are their s.
//
// The loops along K load vectors kAhead steps before their use, into registers of their own, from the last steps of one
// turn on for the first of the next, so that neither an in-order unit nor one behind a queue waits. What the last turn
// loads ahead is thrown away: of A what lies behind in the workspace, of B the panel's beginning.
//
// Rules of SME (Arm ARM DDI 0487, PSTATE.SM and PSTATE.ZA; AAPCS64, "SME"):
// - One smstart and one smstop a call. Between them only scalar, SME and streaming SVE instructions; outside of them
//   no SVE instruction, which cores without SVE refuse, but rdsvl.
// - Both clear the vector registers, of which d8 … d15 are the caller's, and set FPSR.
// - The function has a private ZA ("The ZA lazy saving scheme"): when TPIDR2_EL0 holds the address of a block, ZA is
//   the caller's: its first num_za_save_slices vectors go to za_save_buffer, and TPIDR2_EL0 becomes 0. ZA is off at
//   return.
namespace kiln::arm {
namespace {

using asmjit::Label;
using int8_mm::Call;
using namespace asmjit::a64;
using sve::Element;
using sve::P;
using sve::Slice;
using sve::Z;
using sve::ZaTile;

constexpr int kTiles = 4;        ///< of s32 in ZA
constexpr int kUnroll = 8;       ///< steps of K in a turn: two vectors a step fill the range of a load's immediate
constexpr int kAhead = 3;        ///< steps between a load and its use
constexpr int kRegisterSets = 4; ///< of a step's vectors: one in use, kAhead on their way
constexpr int kSliceStep = 4;    ///< slices that the offset of one slice register reaches
constexpr std::int64_t kFinishRows = 16; ///< in vector registers at a time; as many are left for the stages
constexpr std::int64_t kMaxK = std::int64_t{1} << 24;
constexpr std::int64_t kFewestWeights = 2048; ///< below, see declines

/// A vector sequence that the loop along K walks through.
struct Stream {
  Gp pointer;       ///< kUnroll / 2 steps beyond where the next turn begins
  int vectors;      ///< in a step
  bool wraps;       ///< the last turn loads ahead from `restart`
  Gp restart = xzr; ///< where `pointer` began
};
/// sums[tile] += rows · columns, numbers of a step's vectors in the order of the streams.
struct Product {
  std::uint32_t tile;
  int rows, columns;
};
/// Two tiles side by side on their way to C: the first T columns from `base` on, then the next T.
struct TilePair {
  std::uint32_t left, right;
  Gp base; ///< the row's first element
  P left_columns, right_columns;
};

class Emitter {
public:
  Emitter(const KernelDesc& desc, int sme_bits)
      : m_class_(desc.value[int8_mm::kM]), n_(desc.value[int8_mm::kN]), k_(desc.value[int8_mm::kK]),
        sme_bits_(sme_bits), t_(sme_bits / 32), layout_(layout(sme_bits)), panel_bytes_(layout_.panel_bytes(k_)),
        finish_(a_.newLabel()) {
    const bool is_linear = desc.op == OpId::int8_linear;
    epilogue_ = is_linear ? int8_linear::output_of(desc) : int8_mm::Epilogue::of(desc);
    terms_layout_ = is_linear ? int8_linear::terms_of(desc) : int8_mm::TermsLayout::of(epilogue_);
    const SveEpilogue stages(a_, epilogue_, SveEpilogue::Level::streaming, vector_bytes(), kAll, kColumns[0],
                             {kTemps.begin(), kTemps.end()});
    if (is_linear) {
      linear_ = Linear{QuantisedRows::make(int8_linear::x_of(desc), k_), int8_linear::has_bias(desc)};
      stages_ = std::make_unique<SveLinearEpilogue>(stages, linear_->has_bias);
    } else {
      stages_ = std::make_unique<SveEpilogue>(stages);
    }
    tile_columns_ = finishes() ? x(20) : x(14);
    has_wide_ = m_class_ == kAny || m_class_ > t_;
    has_narrow_ = !has_wide_ || m_class_ == kAny || m_class_ > 2 * t_;
  }

  static int8_mm::PackLayout layout(int sme_bits) { return {.n_block = 2 * (sme_bits / 32), .k_block = 4}; }
  static constexpr Features kNeeds{Feature::neon, Feature::sme};

  Result<CodeObject> emit() {
    const Label scalar = a_.newLabel();
    if (linear_)
      emit_quantiser(a_, linear_->rows);
    a_.word(sve::rdsvl(scratch_, 1));
    a_.cmp(scratch_, vector_bytes());
    a_.b_ne(scalar);
    a_.enter(kSavedGeneral, kSavedVectors);
    if (finishes())
      a_.str(x30, ptr_pre(sp, -16));
    commit_lazy_save();
    a_.mrs(fpsr_, Predicate::SysReg::kFPSR);
    if (linear_) {
      a_.mov(scratch_, kDefaultNan);
      a_.msr(Predicate::SysReg::kFPCR, scratch_);
    }
    a_.word(sve::smstart(sve::Mode::both));
    a_.word(sve::ptrue(Element::b, kAll));
    if (k_ > 0 || linear_)
      copy_rows();
    multiply();
    if (finishes()) {
      const Label done = a_.newLabel();
      a_.b(done);
      finish_tile();
      a_.bind(done);
    }
    a_.word(sve::smstop(sve::Mode::both));
    a_.msr(Predicate::SysReg::kFPSR, fpsr_);
    if (linear_)
      a_.msr(Predicate::SysReg::kFPCR, xzr); // as calls of int8_linear find it
    if (finishes())
      a_.ldr(x30, ptr_post(sp, 16));
    a_.leave();
    a_.bind(scalar);
    if (linear_)
      emit_scalar_int8_linear(a_, layout_, k_, linear_->rows, linear_->has_bias, epilogue_);
    else
      emit_scalar_int8_mm(a_, layout_, k_, epilogue_, plan().a_shift);
    return a_.finish(kNeeds, sme_bits_, linear_ ? linear_plan().values() : plan().values());
  }

private:
  int8_mm::Plan plan() const {
    int8_mm::Plan plan;
    plan.layout = layout_;
    plan.m_step = static_cast<std::int32_t>(has_wide_ ? 2 * t_ : t_);
    plan.n_step = static_cast<std::int32_t>(group_columns());
    // Whole tiles of rows; the values of a single one take the room of two.
    plan.workspace_per_row = 4 * (steps_in_workspace() + value_vectors());
    plan.workspace_fixed = (t_ - 1) * plan.workspace_per_row + value_vectors() * vector_bytes();
    return plan;
  }

  int8_linear::Plan linear_plan() const {
    const int8_mm::Plan product = plan();
    return {.layout = product.layout,
            .m_step = product.m_step,
            .n_step = product.n_step,
            .q_row_bytes = linear_->rows.row_bytes,
            .workspace_bytes = product.workspace_fixed,
            .workspace_per_row = product.workspace_per_row,
            .terms = true};
  }

  int vector_bytes() const { return static_cast<int>(4 * t_); }
  std::int64_t steps() const { return (k_ + 3) / 4; }
  /// Of each tile of rows: copy_rows writes kSliceStep at a time, the loop along K reads kAhead steps beyond the end.
  std::int64_t steps_in_workspace() const { return k_ == 0 ? 0 : (steps() + 3) / 4 * 4 + kAhead; }
  std::int64_t wide_block_bytes() const { return (steps_in_workspace() + value_vectors()) * 2 * vector_bytes(); }
  bool finishes() const { return !epilogue_.is_absent(); }
  /// Behind the steps: Σ_k A[m,k] of both tiles' rows, a_zp of both. With K = 0 their products are 0. Of int8_linear:
  /// the rows' s.
  int value_vectors() const {
    if (linear_)
      return 2;
    return k_ > 0 && (epilogue_.needs_row_sums() || epilogue_.a_zp == int8_mm::AZp::row) ? 2 : 0;
  }
  /// What Σ_k A[m,k] is multiplied with is the same for all columns.
  bool adds_row_sums_to_tiles() const { return epilogue_.needs_row_sums() && epilogue_.b_zp != int8_mm::BZp::channel; }
  /// No more than there can be.
  std::int64_t finish_rows() const {
    const std::int64_t most = std::min(t_, kFinishRows);
    return m_class_ == kAny ? most : std::clamp<std::int64_t>(m_class_, kSliceStep, most);
  }
  std::int64_t terms_panel_bytes() const { return terms_layout_.panel_bytes(layout_); }
  std::int64_t panel_columns() const { return 2 * t_; }
  int group_panels() const { return has_narrow_ ? 2 : 1; }
  std::int64_t group_columns() const { return group_panels() * panel_columns(); }
  /// From the begin of a stream to where its pointer stands.
  int bias(int vectors) const { return kUnroll / 2 * vectors * vector_bytes(); }

  Mem workspace() const { return field(linear_ ? offsetof(int8_linear::Call, workspace) : offsetof(Call, workspace)); }
  Mem field(std::size_t offset) const { return ptr(call_, static_cast<std::int32_t>(offset)); }

  /// Of another function's ZA, as __arm_tpidr2_save does it. The block: za_save_buffer at byte 0, num_za_save_slices as
  /// 16 bits at byte 8. Legal outside streaming mode, with ZA on, as it is when TPIDR2_EL0 is not 0.
  void commit_lazy_save() {
    const Gp block = x(9), buffer = x(10), slices = x(11), index = w(12);
    const Label done = a_.newLabel(), none = a_.newLabel(), slice = a_.newLabel();
    a_.word(sve::mrs_tpidr2(block));
    a_.cbz(block, done);
    a_.ldr(buffer, ptr(block));
    a_.ldrh(slices.w(), ptr(block, 8));
    a_.cbz(buffer, none);
    a_.cbz(slices, none);
    a_.mov(index, 0);
    a_.bind(slice);
    a_.word(sve::str_za(index, 0, buffer));
    a_.add(buffer, buffer, vector_bytes());
    a_.add(index, index, 1);
    a_.cmp(index, slices.w());
    a_.b_ne(slice);
    a_.bind(none);
    a_.word(sve::msr_tpidr2(xzr));
    a_.bind(done);
  }

  // ---------------------------------------------------------------- A → workspace

  /// [block of rows][step of K][1 or 2 tiles][T rows][4 bytes]: two tiles where more than T rows are left. Rows enter
  /// ZA as horizontal slices of bytes and leave it as vertical slices of words.
  void copy_rows() {
    const Label block = a_.newLabel(), tile = a_.newLabel(), chunk = a_.newLabel(), done = a_.newLabel();
    const std::int64_t chunk_bytes = kTiles * vector_bytes(), chunks = k_ / chunk_bytes, rest = k_ % chunk_bytes;
    const Gp count = x(26), in_block = x(26), stride = x(24);
    if (linear_) {
      a_.ldr(copy_.row, field(offsetof(int8_linear::Call, product.workspace)));
      a_.mov(copy_.lda, linear_->rows.row_bytes);
    } else {
      a_.ldr(copy_.row, field(offsetof(Call, a)));
      a_.ldr(copy_.lda, field(offsetof(Call, lda)));
    }
    a_.ldr(copy_.rows_left, field(offsetof(Call, m)));
    a_.ldr(copy_.block, workspace());
    for (int i = 1; i < kTiles; ++i)
      a_.mov(copy_.vector[i], i * vector_bytes());
    if (rest % vector_bytes() != 0) {
      a_.mov(scratch_, rest % vector_bytes());
      a_.word(sve::whilelt(Element::b, kLastBytes, xzr, scratch_));
    }
    if (epilogue_.needs_row_sums())
      a_.word(sve::dup(Element::b, kOnes, 1));
    if (epilogue_.a_zp == int8_mm::AZp::row)
      a_.ldr(copy_.a_zp, field(offsetof(Call, a_zp)));
    a_.bind(block);
    a_.mov(stride, t_); // in words
    if (has_wide_) {
      a_.lsl(scratch_, stride, 1);
      a_.cmp(copy_.rows_left, t_);
      a_.csel(stride, scratch_, stride, asmjit::arm::CondCode::kGT);
    }
    a_.mov(copy_.step[1], stride);
    a_.lsl(copy_.step[2], stride, 1);
    a_.add(copy_.step[3], stride, copy_.step[2]);
    a_.mov(copy_.tile, copy_.block);
    a_.bind(tile);
    a_.mov(scratch_, t_);
    a_.cmp(copy_.rows_left, scratch_);
    a_.csel(copy_.rows, copy_.rows_left, scratch_, asmjit::arm::CondCode::kLT);
    a_.mov(copy_.from, copy_.row);
    a_.mov(copy_.to, copy_.tile);
    if (epilogue_.needs_row_sums())
      for (int i = 0; i < kSliceStep; ++i)
        a_.word(sve::dup(Element::s, row_sums(i), 0));
    if (chunks > 0) {
      a_.mov(count, chunks);
      a_.bind(chunk);
      copy_chunk(chunk_bytes);
      a_.add_constant(copy_.from, copy_.from, chunk_bytes, scratch_);
      a_.subs(count, count, 1);
      a_.b_ne(chunk);
    }
    if (rest > 0)
      copy_chunk(rest);
    if (value_vectors() > 0)
      store_row_values();
    a_.subs(copy_.rows_left, copy_.rows_left, t_);
    a_.b_le(done);
    // Rows are left: this tile was one of two.
    a_.add(copy_.row, copy_.row, copy_.lda, lsl(std::countr_zero(static_cast<std::uint64_t>(t_))));
    a_.add(copy_.tile, copy_.tile, vector_bytes());
    a_.sub(in_block, copy_.tile, copy_.block);
    a_.cmp(in_block, 2 * vector_bytes());
    a_.b_ne(tile);
    a_.add_constant(copy_.block, copy_.block, wide_block_bytes(), scratch_);
    a_.b(block);
    a_.bind(done);
  }

  /// `bytes` of each row of the tile, at most what four tiles of ZA hold.
  void copy_chunk(std::int64_t bytes) {
    const Gp from = x(27), left = x(13), index = w(12);
    const int tiles = static_cast<int>((bytes + vector_bytes() - 1) / vector_bytes());
    const Label row = a_.newLabel();
    a_.word(sve::zero(kAllOfZa));
    a_.mov(from, copy_.from);
    a_.mov(left, copy_.rows);
    a_.mov(index, 0);
    a_.bind(row);
    for (int i = 0; i < tiles; ++i) {
      const bool cut = (i + 1) * vector_bytes() > bytes;
      a_.word(sve::ld1b_za(Slice::horizontal, index, i, cut ? kLastBytes : kAll, from, copy_.vector[i]));
    }
    a_.add(from, from, copy_.lda);
    a_.add(index, index, kTiles);
    a_.subs(left, left, 1);
    a_.b_ne(row);
    for (int i = 0; i < tiles; ++i) {
      const std::int64_t tile_steps = (std::min<std::int64_t>(bytes - i * vector_bytes(), vector_bytes()) + 3) / 4;
      const std::int64_t turns = (tile_steps + kSliceStep - 1) / kSliceStep;
      const Label turn = a_.newLabel();
      a_.mov(index, 0);
      a_.bind(turn);
      const ZaTile tile{static_cast<std::uint32_t>(i)};
      for (int j = 0; j < kSliceStep; ++j)
        a_.word(sve::st1w(tile, Slice::vertical, index, j, kAll, copy_.to, copy_.step[j]));
      if (epilogue_.needs_row_sums()) {
        for (int j = 0; j < kSliceStep; ++j)
          a_.word(sve::mova(four_of_rows(j), kAll, tile, Slice::vertical, index, j));
        for (int j = 0; j < kSliceStep; ++j)
          a_.word(a_is_u8() ? sve::udot(row_sums(j), four_of_rows(j), kOnes)
                            : sve::sdot(row_sums(j), four_of_rows(j), kOnes));
      }
      a_.add(copy_.to, copy_.to, copy_.step[1], lsl(4)); // kSliceStep steps, in words
      if (turns > 1) {
        a_.add(index, index, kSliceStep);
        a_.cmp(index, static_cast<std::int64_t>(turns * kSliceStep));
        a_.b_ne(turn);
      }
    }
  }

  bool a_is_u8() const { return epilogue_.a_dtype == int8_mm::ADtype::u8; }
  static constexpr Z kOnes{0};
  static Z row_sums(int i) { return {static_cast<std::uint32_t>(1 + i)}; }
  static Z four_of_rows(int i) { return {static_cast<std::uint32_t>(1 + kSliceStep + i)}; }

  /// Of the tile that was copied; the loop along K reads the kAhead steps in front of them.
  void store_row_values() {
    static_assert(kAhead < kSliceStep);
    if (linear_) {
      const Gp from = x(27), left = x(13), value = w(12), to = scratch_;
      const Label row = a_.newLabel();
      if (k_ > 0)
        a_.add(to, copy_.to, copy_.step[kAhead], lsl(2));
      else
        a_.mov(to, copy_.to);
      a_.add_constant(from, copy_.row, linear_->rows.scale_at(), left);
      a_.mov(left, copy_.rows);
      a_.bind(row);
      a_.ldr(value, ptr(from));
      a_.add(from, from, copy_.lda);
      a_.str(value, ptr_post(to, 4));
      a_.subs(left, left, 1);
      a_.b_ne(row);
      return;
    }
    a_.add(scratch_, copy_.to, copy_.step[kAhead], lsl(2));
    if (epilogue_.needs_row_sums()) {
      a_.word(sve::add(Element::s, row_sums(0), row_sums(0), row_sums(1)));
      a_.word(sve::add(Element::s, row_sums(2), row_sums(2), row_sums(3)));
      a_.word(sve::add(Element::s, row_sums(0), row_sums(0), row_sums(2)));
      a_.word(sve::str(row_sums(0), scratch_, 0));
    }
    if (epilogue_.a_zp == int8_mm::AZp::row) {
      a_.word(sve::whilelt(Element::s, kColumns[0], xzr, copy_.rows));
      a_.word(sve::ld1w(row_sums(0), kColumns[0], copy_.a_zp, 0));
      a_.word(sve::str(row_sums(0), scratch_, 2));
      a_.add(copy_.a_zp, copy_.a_zp, vector_bytes());
    }
  }

  // ---------------------------------------------------------------- products

  void multiply() {
    const Label group = a_.newLabel();
    a_.ldr(b_, field(offsetof(Call, b)));
    a_.ldr(c_, field(offsetof(Call, c)));
    a_.ldr(n_left_, field(offsetof(Call, n)));
    a_.ldr(ldc_, field(offsetof(Call, ldc)));
    a_.mov(tile_columns_, t_);
    if (finishes()) {
      if (c_shift() > 0)
        a_.lsl(ldc_, ldc_, c_shift());
      a_.ldr(terms_, field(offsetof(Call, terms)));
    } else {
      a_.add(row_offset_[1][1], ldc_, t_);
      for (int row = 2; row < kSliceStep; ++row) {
        a_.add(row_offset_[row][0], row_offset_[row - 1][0], ldc_);
        a_.add(row_offset_[row][1], row_offset_[row][0], t_);
      }
    }
    a_.bind(group);
    if (has_wide_)
      wide_rows();
    if (has_narrow_)
      narrow_rows();
    a_.add_constant(b_, b_, group_panels() * panel_bytes_, scratch_);
    a_.add(c_, c_, epilogue_.c_bytes() * group_columns());
    if (finishes())
      a_.add_constant(terms_, terms_, group_panels() * terms_panel_bytes(), scratch_);
    a_.subs(n_left_, n_left_, group_columns());
    a_.b_gt(group);
  }

  /// The panels of the group, each with all blocks of 2T rows and one of more than T. Leaves rows_left_ and a_block_ at
  /// the rows for narrow_rows.
  void wide_rows() {
    const Gp n_left = x(24), c_panel = x(25);
    const Label panel = a_.newLabel(), block = a_.newLabel(), next = a_.newLabel(), done = a_.newLabel();
    const bool several = has_narrow_; // blocks of rows, panels
    a_.add_constant(b_restart_, b_, bias(2), scratch_);
    a_.mov(n_left, n_left_);
    a_.mov(c_panel, c_);
    if (finishes())
      a_.mov(panel_terms_, terms_);
    a_.bind(panel);
    if (!finishes()) {
      a_.word(sve::whilelt(Element::s, kColumns[0], xzr, n_left));
      a_.word(sve::whilelt(Element::s, kColumns[1], tile_columns_, n_left));
    }
    a_.ldr(rows_left_, field(offsetof(Call, m)));
    a_.ldr(a_block_, workspace());
    a_.mov(c_row_, c_panel);
    if (several) {
      a_.cmp(rows_left_, t_);
      a_.b_le(next);
    }
    a_.bind(block);
    a_.word(sve::zero(kAllOfZa));
    a_.add_constant(a_k_, a_block_, bias(2), scratch_);
    a_.mov(b_k_[0], b_restart_);
    along_k({{a_k_, 2, false}, {b_k_[0], 2, true, b_restart_}}, {{0, 0, 2}, {1, 0, 3}, {2, 1, 2}, {3, 1, 3}});
    if (finishes()) {
      for (int tile = 0; tile < kTiles; ++tile)
        finish({tile, tile / 2, tile % 2, 2, n_left, panel_terms_, (tile % 2) * std::int64_t{vector_bytes()}});
      a_.add(c_row_, c_row_, ldc_, lsl(std::countr_zero(static_cast<std::uint64_t>(2 * t_))));
      a_.sub(rows_left_, rows_left_, 2 * t_);
    } else {
      const TilePair upper = {0, 1, c_row_, kColumns[0], kColumns[1]}, lower = {2, 3, c_row_, kColumns[0], kColumns[1]};
      a_.mov(rows_, t_);
      store(rows_, t_, {upper});
      a_.subs(rows_left_, rows_left_, t_);
      a_.cmp(rows_left_, tile_columns_);
      a_.csel(rows_, rows_left_, tile_columns_, asmjit::arm::CondCode::kLT);
      store(rows_, 0, {lower});
      a_.sub(rows_left_, rows_left_, t_);
    }
    if (several) {
      a_.add_constant(a_block_, a_block_, wide_block_bytes(), scratch_);
      a_.cmp(rows_left_, t_);
      a_.b_gt(block);
      a_.bind(next);
      a_.subs(n_left, n_left, panel_columns());
      a_.b_le(done);
      a_.add_constant(b_restart_, b_restart_, panel_bytes_, scratch_);
      if (finishes())
        a_.add_constant(panel_terms_, panel_terms_, terms_panel_bytes(), scratch_);
      a_.add(c_panel, c_panel, epilogue_.c_bytes() * panel_columns());
      a_.sub(scratch_, c_panel, c_);
      a_.cmp(scratch_, epilogue_.c_bytes() * group_columns());
      a_.b_ne(panel);
      a_.bind(done);
    }
  }

  /// The group's two panels, or its one, with the last 1 … T rows.
  void narrow_rows() {
    const Gp second = x(27);
    const Label single = a_.newLabel(), done = a_.newLabel();
    const std::int64_t last_group = n_ % group_columns();
    const bool has_pairs = n_ > panel_columns(), has_single = last_group > 0 && last_group <= panel_columns();
    const std::vector<Product> one_panel = {{0, 0, 1}, {1, 0, 2}},
                               two_panels = {{0, 0, 1}, {1, 0, 2}, {2, 0, 3}, {3, 0, 4}};
    if (has_wide_) {
      a_.cmp(rows_left_, 0);
      a_.b_le(done);
      a_.ldr(c_row_, field(offsetof(Call, m)));
      a_.sub(c_row_, c_row_, rows_left_);
      a_.mul(c_row_, c_row_, ldc_);
      a_.add(c_row_, c_, c_row_, lsl(finishes() ? 0 : 2));
    } else {
      a_.ldr(rows_left_, field(offsetof(Call, m)));
      a_.ldr(a_block_, workspace());
      a_.mov(c_row_, c_);
    }
    if (!finishes()) {
      a_.word(sve::whilelt(Element::s, kColumns[0], xzr, n_left_));
      for (int i = 1; i < kTiles; ++i) {
        a_.mov(scratch_, i * t_);
        a_.word(sve::whilelt(Element::s, kColumns[i], scratch_, n_left_));
      }
    }
    a_.word(sve::zero(kAllOfZa));
    a_.add_constant(a_k_, a_block_, bias(1), scratch_);
    a_.add_constant(b_restart_, b_, bias(2), scratch_);
    a_.mov(b_k_[0], b_restart_);
    const auto finish_tiles = [&](int count) {
      for (int tile = 0; tile < count; ++tile)
        finish({tile, 0, tile, 1, n_left_, terms_,
                tile / 2 * terms_panel_bytes() + tile % 2 * std::int64_t{vector_bytes()}});
    };
    const TilePair left = {0, 1, c_row_, kColumns[0], kColumns[1]}, right = {2, 3, second, kColumns[2], kColumns[3]};
    if (has_pairs && has_single) {
      a_.cmp(n_left_, panel_columns());
      a_.b_le(single);
    }
    if (has_pairs) {
      a_.add_constant(b_second_restart_, b_restart_, panel_bytes_, scratch_);
      a_.mov(b_k_[1], b_second_restart_);
      if (!finishes())
        a_.add(second, c_row_, 4 * panel_columns());
      along_k({{a_k_, 1, false}, {b_k_[0], 2, true, b_restart_}, {b_k_[1], 2, true, b_second_restart_}}, two_panels);
      finishes() ? finish_tiles(4) : store(rows_left_, 0, {left, right});
    }
    if (has_single) {
      if (has_pairs) {
        a_.b(done);
        a_.bind(single);
      }
      along_k({{a_k_, 1, false}, {b_k_[0], 2, true, b_restart_}}, one_panel);
      finishes() ? finish_tiles(2) : store(rows_left_, 0, {left});
    }
    a_.bind(done);
  }

  /// Sums of all steps of K. steps % kUnroll of them come first, the turns of the loop after them.
  void along_k(const std::vector<Stream>& streams, const std::vector<Product>& products) {
    int vectors = 0;
    for (const Stream& stream : streams)
      vectors += stream.vectors;
    const auto reg = [&](std::int64_t step, int vector) {
      return Z{static_cast<std::uint32_t>(step % kRegisterSets * vectors + vector)};
    };
    std::vector<sve::Word> loads;
    /// Those of a step, `offset` steps after where the turn at the pointers begins.
    const auto load = [&](std::int64_t step, int offset) {
      loads.clear();
      int vector = 0;
      for (const Stream& stream : streams)
        for (int i = 0; i < stream.vectors; ++i)
          loads.push_back(
              sve::ld1b(reg(step, vector++), kAll, stream.pointer, (offset - kUnroll / 2) * stream.vectors + i));
    };
    /// The products of a step, among them the loads.
    const auto multiply = [&](std::int64_t step) {
      std::size_t loaded = 0;
      for (std::size_t i = 0; i < products.size(); ++i) {
        for (const std::size_t due = loads.size() * (i + 1) / products.size(); loaded < due; ++loaded)
          a_.word(loads[loaded]);
        const Product& product = products[i];
        const auto word = a_is_u8() ? sve::usmopa : sve::smopa;
        a_.word(word(ZaTile{product.tile}, kAll, kAll, reg(step, product.rows), reg(step, product.columns)));
      }
      loads.clear();
    };
    const auto advance = [&](std::int64_t by_steps) {
      for (const Stream& stream : streams)
        a_.add_constant(stream.pointer, stream.pointer, by_steps * stream.vectors * vector_bytes(), scratch_);
    };

    const std::int64_t first = steps() % kUnroll, turns = steps() / kUnroll;
    const std::int64_t early = turns > 0 ? first + kAhead : first; // steps loaded before the loop
    const auto load_early = [&](std::int64_t step) {
      if (step >= early)
        return;
      if (step == first && first > 0)
        advance(first);
      load(step, static_cast<int>(step < first ? step : step - first));
    };
    for (std::int64_t step = 0; step < std::min<std::int64_t>(kAhead, early); ++step) {
      load_early(step);
      for (const sve::Word& word : loads)
        a_.word(word);
      loads.clear();
    }
    for (std::int64_t step = 0; step < first; ++step) {
      load_early(step + kAhead);
      multiply(step);
    }
    if (turns == 0)
      return;
    const Label turn = a_.newLabel();
    a_.mov(turns_, turns);
    a_.bind(turn);
    for (int index = 0; index < kUnroll; ++index) {
      if (index + kAhead == kUnroll) {
        advance(kUnroll);
        a_.subs(turns_, turns_, 1);
        for (const Stream& stream : streams)
          if (stream.wraps)
            a_.csel(stream.pointer, stream.restart, stream.pointer, asmjit::arm::CondCode::kEQ);
      }
      load(first + index + kAhead, (index + kAhead) % kUnroll);
      multiply(first + index);
    }
    a_.b_ne(turn);
  }

  /// Rows 0 … rows − 1 of the tiles to C; the bases move on by them. `constant_rows` is their number where it is known,
  /// then a multiple of kSliceStep, else 0, and `rows` may be less than 1.
  void store(const Gp& rows, std::int64_t constant_rows, const std::vector<TilePair>& pairs) {
    const Gp groups = x(13), index = w(12);
    const Label group = a_.newLabel(), rest = a_.newLabel(), row = a_.newLabel(), done = a_.newLabel();
    const auto store_row = [&](int i) {
      for (const TilePair& pair : pairs) {
        a_.word(
            sve::st1w(ZaTile{pair.left}, Slice::horizontal, index, i, pair.left_columns, pair.base, row_offset_[i][0]));
        a_.word(sve::st1w(ZaTile{pair.right}, Slice::horizontal, index, i, pair.right_columns, pair.base,
                          row_offset_[i][1]));
      }
    };
    const auto advance = [&](int log2_rows) {
      for (const TilePair& pair : pairs)
        a_.add(pair.base, pair.base, ldc_, lsl(2 + log2_rows));
    };
    a_.mov(index, 0);
    if (constant_rows > 0) {
      a_.mov(groups, constant_rows / kSliceStep);
    } else {
      a_.asr(groups, rows, 2);
      a_.cmp(groups, 0);
      a_.b_le(rest);
    }
    a_.bind(group);
    for (int i = 0; i < kSliceStep; ++i)
      store_row(i);
    advance(2);
    a_.add(index, index, kSliceStep);
    a_.subs(groups, groups, 1);
    a_.b_ne(group);
    if (constant_rows > 0)
      return;
    a_.bind(rest);
    a_.cmp(rows, 0);
    a_.b_le(done);
    a_.ands(groups, rows, kSliceStep - 1);
    a_.b_eq(done);
    a_.bind(row);
    store_row(0);
    advance(0);
    a_.add(index, index, 1);
    a_.subs(groups, groups, 1);
    a_.b_ne(row);
    a_.bind(done);
  }

  // ---------------------------------------------------------------- with an epilogue: sums → C

  int c_shift() const { return std::countr_zero(static_cast<unsigned>(epilogue_.c_bytes())); }

  /// One of a block's tiles of sums.
  struct FinishedTile {
    int number;
    int row, column;     ///< of the block, in tiles
    int rows_of_tiles;   ///< of the block
    Gp n_left;           ///< columns from the block's first
    Gp terms;            ///< these
    std::int64_t at = 0; ///< and so many bytes are where the tile's begin
  };

  /// Calls finish_tile, as far as the tile has rows and columns of C. The block's row 0 in C is at c_row_.
  void finish(const FinishedTile& tile) {
    const Label none = a_.newLabel();
    const ZaTile sums{static_cast<std::uint32_t>(tile.number)};
    if (tile.column > 0) {
      a_.subs(to_finish_.columns, tile.n_left, tile.column * t_);
      a_.b_le(none);
    } else {
      a_.mov(to_finish_.columns, tile.n_left);
    }
    if (tile.rows_of_tiles == 1) {
      a_.mov(to_finish_.rows, rows_left_);
    } else if (tile.row == 0) {
      a_.mov(to_finish_.rows, t_); // a second tile of rows has at least one
    } else {
      a_.sub(to_finish_.rows, rows_left_, t_);
      a_.cmp(to_finish_.rows, tile_columns_);
      a_.csel(to_finish_.rows, to_finish_.rows, tile_columns_, asmjit::arm::CondCode::kLT);
    }
    a_.mov(to_finish_.c, c_row_);
    if (tile.row > 0)
      a_.add(to_finish_.c, c_row_, ldc_, lsl(std::countr_zero(static_cast<std::uint64_t>(t_))));
    a_.add_constant(to_finish_.c, to_finish_.c, tile.column * t_ * epilogue_.c_bytes(), scratch_);
    a_.add_constant(to_finish_.terms, tile.terms, tile.at, scratch_);
    a_.add_constant(to_finish_.values, a_block_,
                    (steps_in_workspace() * tile.rows_of_tiles + tile.row) * std::int64_t{vector_bytes()}, scratch_);
    a_.mov(to_finish_.tile, tile.number);
    if (!linear_) { // whose offsets are 0
      a_.word(sve::ldr(Z{0}, to_finish_.terms, 0));
      a_.word(sve::addha(sums, kAll, kAll, Z{0}));
    }
    if (adds_row_sums_to_tiles() && k_ > 0) {
      a_.add_constant(scratch_, to_finish_.terms, terms_layout_.row_sum * array_bytes(), scratch_);
      a_.word(sve::ld1rw(Z{0}, kAll, scratch_, 0));
      a_.word(sve::ldr(Z{1}, to_finish_.values, 0));
      a_.word(sve::mul(Element::s, Z{0}, kAll, Z{1}));
      a_.word(sve::addva(sums, kAll, kAll, Z{0}));
    }
    a_.bl(finish_);
    a_.bind(none);
  }

  std::int64_t array_bytes() const { return int8_mm::TermsLayout::array_bytes(layout_, 1); }

  /// A function: rows of a tile of sums through the stages to C. Rows beyond the last one go through too, and are not
  /// stored.
  void finish_tile() {
    const Label group = a_.newLabel(), loaded = a_.newLabel();
    const int rows = static_cast<int>(finish_rows());
    a_.bind(finish_);
    a_.word(sve::whilelt(Element::s, kColumns[0], xzr, to_finish_.columns));
    a_.ldr(to_finish_.scalars, field(offsetof(Call, scalars)));
    for (int i = 0; i < rows; i += kSliceStep)
      a_.mov(slices(i), i);
    TileSums sums{.rows = rows, .vectors = 1};
    for (std::uint32_t i = 0; i < static_cast<std::uint32_t>(kFinishRows); ++i) {
      sums.free.push_back(i);
      if (i < static_cast<std::uint32_t>(rows))
        sums.sums.push_back(static_cast<std::uint32_t>(kFinishRows) + i);
    }
    a_.bind(group);
    std::vector<Label> of_tile;
    for (int tile = 0; tile < kTiles; ++tile)
      of_tile.push_back(a_.newLabel());
    for (int tile = 1; tile < kTiles; ++tile) {
      a_.cmp(to_finish_.tile, tile);
      a_.b_eq(of_tile[static_cast<std::size_t>(tile)]);
    }
    for (int tile = 0; tile < kTiles; ++tile) {
      a_.bind(of_tile[static_cast<std::size_t>(tile)]);
      for (int row = 0; row < rows; ++row)
        a_.word(sve::mova(Z{sums.at(row, 0)}, kAll, ZaTile{static_cast<std::uint32_t>(tile)}, Slice::horizontal,
                          slices(row), row % kSliceStep));
      if (tile + 1 < kTiles)
        a_.b(loaded);
    }
    a_.bind(loaded);
    const TileTerms at{.terms = to_finish_.terms,
                       .vector_at = {0},
                       .array_bytes = array_bytes(),
                       .values = to_finish_.values,
                       .zp_at = 2 * vector_bytes(),
                       .scalars = to_finish_.scalars,
                       .scratch = scratch_};
    stages_->apply_rest(sums, at, k_ > 0, adds_row_sums_to_tiles());
    stages_->prepare_stores(sums, at);
    // From the last row that is C's to the first.
    std::vector<Label> from_row;
    a_.mov(scratch_, rows);
    a_.cmp(to_finish_.rows, scratch_);
    a_.csel(to_finish_.c_row, to_finish_.rows, scratch_, asmjit::arm::CondCode::kLT);
    a_.sub(to_finish_.c_row, to_finish_.c_row, 1);
    a_.madd(to_finish_.c_row, to_finish_.c_row, ldc_, to_finish_.c);
    for (int row = 0; row < rows; ++row)
      from_row.push_back(a_.newLabel());
    a_.b_ge(from_row.back());
    for (int row = 0; row + 1 < rows; ++row) {
      a_.cmp(to_finish_.rows, row + 1);
      a_.b_eq(from_row[static_cast<std::size_t>(row)]);
    }
    for (int row = rows - 1; row >= 0; --row) {
      a_.bind(from_row[static_cast<std::size_t>(row)]);
      stages_->store_row(sums, row, to_finish_.c_row, scratch_);
      if (row > 0)
        a_.sub(to_finish_.c_row, to_finish_.c_row, ldc_);
    }
    if (t_ > rows) {
      a_.add(to_finish_.c, to_finish_.c, ldc_, lsl(std::countr_zero(static_cast<unsigned>(rows))));
      a_.add(to_finish_.values, to_finish_.values, 4 * rows);
      for (int i = 0; i < rows; i += kSliceStep)
        a_.add(slices(i), slices(i), rows);
      a_.subs(to_finish_.rows, to_finish_.rows, rows);
      a_.b_gt(group);
    }
    a_.ret(x30);
  }

  /// What numbers the slice of a row of the group, less row % kSliceStep.
  static Gp slices(int row) { return w(static_cast<std::uint32_t>(12 + row / kSliceStep)); }

  std::int64_t m_class_, n_, k_;
  int sme_bits_;
  std::int64_t t_; ///< rows and columns of a tile
  int8_mm::PackLayout layout_;
  std::int64_t panel_bytes_;
  int8_mm::Epilogue epilogue_;
  int8_mm::TermsLayout terms_layout_;
  bool has_wide_ = false, has_narrow_ = false;
  Assembler a_;
  struct Linear {
    QuantisedRows rows;
    bool has_bias;
  };
  std::optional<Linear> linear_; ///< of int8_linear
  std::unique_ptr<SveEpilogue> stages_;
  Label finish_; ///< the function

  static constexpr std::uint32_t kAllOfZa = 255;
  static constexpr int kSavedGeneral = 10, kSavedVectors = 8;
  // Predicates: every byte; the bytes of a row's last vector before K; columns of each tile before N.
  // The stages have one for their columns, and the others for themselves.
  static constexpr P kAll{0}, kLastBytes{1}, kColumns[kTiles] = {{2}, {3}, {4}, {5}};
  static constexpr std::array<P, 6> kTemps = {{{1}, {3}, {4}, {5}, {6}, {7}}};

  // Registers of the whole call, then of its two parts. Slices of ZA are numbered by w12 alone.
  const Gp call_ = x(0), fpsr_ = x(28);
  const GpX scratch_ = x9;
  struct {
    Gp row = x(1), lda = x(2), rows_left = x(3), block = x(4), tile = x(5), from = x(6), to = x(7), rows = x(8);
    Gp vector[kTiles] = {xzr, x(10), x(11), x(14)};   ///< bytes of so many vectors
    Gp step[kSliceStep] = {xzr, x(15), x(16), x(17)}; ///< words of so many steps in the workspace
    Gp a_zp = x(19);                                  ///< of the next tile of rows
  } copy_;
  const Gp b_ = x(3), c_ = x(2), n_left_ = x(4); ///< of the group: its first panel; its first column, row 0
  const Gp ldc_ = x(1);                          ///< elements; with an epilogue bytes
  Gp tile_columns_ = x(14);
  /// Words from a row of C to each of the first tiles of the next ones.
  const Gp row_offset_[kSliceStep][2] = {{xzr, x(14)}, {x(1), x(15)}, {x(16), x(17)}, {x(19), x(20)}};
  const Gp a_block_ = x(23), c_row_ = x(22), rows_left_ = x(21), rows_ = x(26);
  const GpX terms_ = x27, panel_terms_ = x26; ///< of the group's, of the panel's first column
  /// finish_tile's arguments, which it clobbers, and its own: w12 … w15 number slices.
  struct {
    GpX columns = x5, rows = x6, c = x7, values = x16, terms = x17, tile = x11;
    GpX c_row = x8, scalars = x19;
  } to_finish_;
  const Gp a_k_ = x(6), b_k_[2] = {x(7), x(8)}, turns_ = x(5), b_restart_ = x(10), b_second_restart_ = x(11);
};

Status check_vectors(const Target& target) {
  if (target.sme_bits < 128 || target.sme_bits > 2048 || !std::has_single_bit(static_cast<unsigned>(target.sme_bits)))
    return Status::error(Code::unsupported, fmt::format("streaming vectors of {} bits: allowed is 128, 256, "
                                                        "512, 1024 or 2048",
                                                        target.sme_bits));
  return {};
}

} // namespace

Implementation int8_mm_sme() {
  Implementation row{};
  row.op = OpId::int8_mm;
  row.isa = IsaPath::sme;
  row.backend = BackendId::arm;
  row.generator = GeneratorId::asmjit;
  row.generator_digest = k_arm_generator_digest;
  row.arch = Arch::aarch64;
  row.needs = Emitter::kNeeds;
  row.vector_bits = [](const Target& target) -> std::int32_t { return target.sme_bits; };
  row.supports = [](const KernelDesc& desc, const Target& target) -> Status {
    if (Status status = int8_mm::check_k(desc, kMaxK); !status)
      return status;
    return check_vectors(target);
  };
  row.declines = [](const KernelDesc& desc, const Target&) -> std::string {
    const auto& value = desc.value;
    // Whether weights are that few does not depend on m: all of their kernels read one pack.
    if (value[int8_mm::kN] * value[int8_mm::kK] < kFewestWeights)
      return fmt::format("fewer than {} weights: too few products to pay for entering streaming mode", kFewestWeights);
    if (value[int8_mm::kM] >= 0 && value[int8_mm::kM] <= 2)
      return "two rows or fewer: memory bound, and SDOT reads each weight once without streaming mode";
    return {};
  };
  row.pack_layout = [](const KernelDesc&, const Target& target) { return Emitter::layout(target.sme_bits).id(); };
  row.assumes = [](const Target& target) {
    return fmt::format("each thread has an SME unit to itself: where the cores of a cluster share one, more threads "
                       "than units gain nothing. Each thread keeps the streaming vector length of {} bits: on one that "
                       "was given another (PR_SME_SET_VL) the kernel is exact but multiplies without vectors",
                       target.sme_bits);
  };
  row.compile = [](const KernelDesc& desc, const Target& target, std::string_view) {
    return Emitter(desc, target.sme_bits).emit();
  };
  return row;
}

Implementation int8_linear_sme() {
  Implementation row = linear_row(int8_mm_sme());
  row.supports = [](const KernelDesc& desc, const Target& target) -> Status {
    if (Status status = int8_linear::check_k(desc, kMaxK); !status)
      return status;
    return check_vectors(target);
  };
  return row;
}

} // namespace kiln::arm
