#include <algorithm>
#include <cstddef>
#include <optional>

#include <fmt/format.h>
#include <x86_generator_id.h>

#include "backends/x86/emit.h"
#include "backends/x86/epilogue.h"
#include "backends/x86/int8_linear.h"
#include "backends/x86/rows.h"
#include "jit/ops/int8_mm.h"

// int8_mm on AMX. A tile holds 16 rows of 64 bytes: 16 × 64 of A, 64 × 16 of B (a panel's 16 rows of k4), 16 × 16 sums.
//
//   per block of columns                       its panels stay in L2
//     per 32 rows, the last block shorter      A's rows become tiles of 1 KiB in the workspace, which stay in L1 up to
//     K = 1024;
//                                              where it can be, the 32 rows before carry this copy in the steps of
//                                              their products
//       per pair of panels                     wide: 2 × 2 tiles of sums, 4 tile loads per 4 products
//     the last 1…16 rows
//       per 4 panels                           narrow: 1 × 4 tiles of sums
//
// Remainders need no second tile configuration, which would clear the sums:
// - M: the last tile of rows begins early, so that it ends at m; rows that two tiles share get the same sums twice.
// Only m < 16 has
//   lower tiles, and then every tile of the call.
// - K: the last tile of A has zeros before the last K mod 64 elements, so that its product takes the last 16 rows of
// the panel, some of
//   them a second time against zeros. K < 61 has one product on shorter tiles.
// - N: the pack is zero beyond N; sums of a panel that N cuts go through the workspace and a masked store.
//
// Measured on an Emerald Rapids Xeon: a product takes 20 cycles on random values (16 on zeros), a tile load 8 from L1
// and 20–25 from L2, so that one of the two operands must come from L1. Rows 4096 bytes apart fall into one set of L1:
// hence the copy of A. Storing the sums at once was 10 % slower than passing them to C during the next steps; the
// likely reason is that C's lines, most of them not in L1, hold up the tile loads behind them. Fetching C's lines ahead
// (prefetchw, prefetcht0…2) was slower too, by 4–8 %.
//
// int8_linear is the same nest without the copy of A: its rows are quantised to the workspace at a stride that spreads
// them over the sets of L1, and tiles are loaded from them as they lie. The sums go through staging and the
// dequantising stage to Y.
namespace kiln::x86 {
namespace {

using asmjit::Label;
using asmjit::x86::Gp;
using asmjit::x86::Mem;
using asmjit::x86::ptr;
using asmjit::x86::qword_ptr;
using asmjit::x86::rsp;
using asmjit::x86::Tmm;
using asmjit::x86::zmm0;
using int8_mm::Call;

constexpr int kTileRows = 16; ///< palette 1: 8 tiles of 16 rows of 64 bytes
constexpr int kTileRowBytes = 64;
constexpr int kTileBytes = kTileRows * kTileRowBytes;
constexpr int kPanelColumns = 16; ///< sums in a tile row
constexpr int kPairColumns = 2 * kPanelColumns;
constexpr int kGroupPanels = 4;
constexpr int kGroupColumns = kGroupPanels * kPanelColumns;
constexpr int kWideRows = 2 * kTileRows;
constexpr int kPairSumsBytes = 4 * kTileBytes;
const asmjit::x86::KReg kAllLanes = asmjit::x86::k3;
constexpr std::int64_t kMaxK = std::int64_t{1} << 24; ///< a group of panels lies within a 32-bit displacement

// Workspace, in bytes from its start.
constexpr int kConfig = 0;                   ///< the kernel's tile configuration
constexpr int kCallerConfig = kConfig + 64;  ///< that of the caller
constexpr int kStaging = kCallerConfig + 64; ///< finished sums of a pair of panels on their way to C
constexpr int kTilesOfA = kStaging + kPairSumsBytes;

// Stack frame, in bytes from rsp.
enum Local : int {
  kColumnsLeft = 0,
  kBlockB = 8,    ///< of the block of columns: its panels,
  kBlockC = 16,   ///< its columns of C, row 0,
  kPairs = 24,    ///< its whole pairs of panels
  kRest = 32,     ///< and its columns beyond them: N mod 32, or 0
  kRowsLeft = 40, ///< rows from the current wide block on
  kRowC = 48,     ///< of the wide block: its first row of C in the block of columns
  kRowA = 56,     ///< and its tiles of A
  kRowAStep = 64, ///< to the tiles of the next wide block
  kStagingBegin = 72,
  kStagingEnd = 80,           ///< where `from` stands when all staged sums are in C
  kAheadRows = 88,            ///< rows of the next wide block whose copy is still due: 0, its tiles are there
  kAheadFrom = 96,            ///< the next of them in A, or 0 for no copy ahead
  kAheadSecond = 104,         ///< the first row in A of that block's second tile of rows
  kAheadTo = 112,             ///< bytes from where `ka` walks to the tiles of the row at kAheadFrom
  kSecondRows = kAheadSecond, ///< of int8_linear, which copies nothing: bytes to the second tile's rows
  kCall = 120,
  kFrameBytes = 136,
  // With an epilogue, whose scratch memory lies behind them; rsp is then 64-byte aligned.
  kCallerStack = 128,
  kBlockTerms = 136, ///< the terms of the block of columns
  kTermsAt = 144,    ///< of the current panels
  kEpilogueFrameBytes = 192
};

class Emitter {
public:
  /// Of int8_mm or int8_linear.
  explicit Emitter(const KernelDesc& desc)
      : is_linear_(desc.op == OpId::int8_linear), product_(is_linear_ ? int8_linear::product_desc(desc) : desc),
        m_class_(product_.value[int8_mm::kM]), n_(product_.value[int8_mm::kN]), k_(product_.value[int8_mm::kK]),
        panel_bytes_(kLayout.panel_bytes(k_)),
        epilogue_(is_linear_ ? int8_linear::output_of(desc) : int8_mm::Epilogue::of(desc)),
        terms_(is_linear_ ? int8_linear::terms_of(desc) : int8_mm::TermsLayout::of(epilogue_)) {
    constexpr std::uint32_t temps[] = {29, 30, 31};
    if (is_linear_) {
      finish_.emplace(a_, desc, kTileRowBytes, kGroupPanels, temps[0], temps[1], temps[2], kEpilogueFrameBytes);
      quantised_ = {.form = QuantisedRows::Form::s8,
                    .x = int8_linear::x_of(desc),
                    .k = k_,
                    .row_stride = row_stride(),
                    .tail_zeros = tail_zeros()};
    } else if (!epilogue_.is_absent()) {
      finish_.emplace(a_, epilogue_, kTileRowBytes, kGroupPanels, temps[0], temps[1], temps[2], kEpilogueFrameBytes);
    }
  }

  Result<CodeObject> emit() {
    if (is_linear_)
      emit_quantiser_512(a_, quantised_);
    a_.enter(kSaved);
    if (finish_) {
      a_.mov(scratch_, rsp);
      a_.sub(rsp, kEpilogueFrameBytes + finish_->scratch_bytes());
      a_.and_(rsp, -64);
      a_.mov(local(kCallerStack), scratch_);
      finish_->prepare_shared(call_, rsp);
      a_.mov(scratch_.r32(), 0xFFFF);
      a_.kmovw(kAllLanes, scratch_.r32());
    } else {
      a_.sub(rsp, kFrameBytes);
    }
    if (rows_ahead() > 0)
      a_.mov(local(kCall), call_);
    configure_tiles();
    column_blocks();
    // The caller's configuration is its own to keep (its tiles are not: a call may destroy them). Without one this
    // loads zeros, which is the initial state, so that the system has no tile data to save.
    a_.mov(scratch_, workspace());
    a_.ldtilecfg(ptr(scratch_, kCallerConfig));
    if (finish_)
      a_.mov(rsp, local(kCallerStack));
    else
      a_.add(rsp, kFrameBytes);
    a_.leave(kSaved);
    if (k_ > 0 && !is_linear_)
      copy_tile();
    if (finish_)
      finish_->emit_rare_paths();
    return a_.finish(features_for(epilogue_), is_linear_ ? linear_plan().values() : plan().values());
  }

  static Features features_for(const int8_mm::Epilogue& epilogue) {
    Features features = kNeeds;
    if (!epilogue.is_absent())
      features.add(Feature::avx512vl);
    if (epilogue.needs_row_sums())
      features.add(Feature::avx512vnni);
    return features;
  }

  static constexpr int8_mm::PackLayout kLayout{kPanelColumns, 4};
  static constexpr Features kNeeds{Feature::avx512f, Feature::avx512bw, Feature::amx_tile, Feature::amx_int8};

private:
  int8_mm::Plan plan() const {
    int8_mm::Plan plan;
    plan.layout = kLayout;
    plan.m_step = has_wide() ? kWideRows : kTileRows;
    plan.n_step = kGroupColumns;
    // One row more for each that tiles of 16 may add.
    plan.workspace_fixed = tiles_of_a() + (kTileRows - 1) * steps() * kTileRowBytes;
    plan.workspace_per_row = steps() * kTileRowBytes;
    return plan;
  }

  int8_linear::Plan linear_plan() const {
    return {.layout = kLayout,
            .m_step = has_wide() ? kWideRows : kTileRows,
            .n_step = kGroupColumns,
            .q_row_bytes = row_stride(),
            .workspace_bytes = tiles_of_a(),
            .terms = true};
  }
  /// Of quantised rows: their steps and a line for s, an odd number of lines.
  std::int64_t row_stride() const { return ((steps() + 1) | 1) * kTileRowBytes; }

  // With an epilogue that takes values of the rows, those of 32 rows lie before A's tiles: for row i of each tile of
  // rows the sum of its elements and its a_zp, a line for each i, as far behind it as in staging.
  // Of int8_linear s takes the place of a_zp.
  bool has_row_values() const { return epilogue_.needs_row_sums() || has_row_value_each(); }
  bool has_row_value_each() const { return is_linear_ || epilogue_.a_zp == int8_mm::AZp::row; }
  static constexpr int kRowValues = kTilesOfA;
  static constexpr int kRowSum = 0, kRowZp = 4, kRowValuesOfTile = 8;
  int tiles_of_a() const { return kTilesOfA + (has_row_values() ? kTileBytes : 0); }

  int c_bytes() const { return epilogue_.c_bytes(); }
  int c_shift() const { return c_bytes() == 4 ? 2 : c_bytes() == 2 ? 1 : 0; }
  /// From one panel's terms to the next's.
  int terms_bytes() const { return static_cast<int>(terms_.panel_bytes(kLayout)); }

  bool has_wide() const { return m_class_ == kAny || m_class_ > kTileRows; }

  // Along K: steps of one product, the last one on a padded tile of A when K is no multiple of 64.
  std::int64_t k_padded() const { return kLayout.k_padded(k_); }
  bool is_short() const { return k_padded() < kTileRowBytes; } ///< one product on shorter tiles
  std::int64_t full_steps() const { return k_ / kTileRowBytes; }
  std::int64_t steps() const { return (k_ + kTileRowBytes - 1) / kTileRowBytes; }
  int tail_elements() const { return static_cast<int>(k_ % kTileRowBytes); }
  int tail_zeros() const {
    return is_short() ? 0 : static_cast<int>((kTileRowBytes - k_padded() % kTileRowBytes) % kTileRowBytes);
  }
  /// How far the panel's 16 rows of the last product begin before the end of the full steps.
  int tail_step_back() const {
    return is_short() ? 0 : static_cast<int>(full_steps() * kTileBytes - (k_padded() * kPanelColumns - kTileBytes));
  }
  std::int64_t a_tile_row_bytes() const { return steps() * kTileBytes; }       ///< of A's tiles of 16 rows
  int a_step_bytes() const { return is_linear_ ? kTileRowBytes : kTileBytes; } ///< from one tile of A to the next

  /// Whole groups of columns whose panels take at most about half of a 2 MiB L2, or a quarter where A's tiles take
  /// their part of it.
  std::int64_t block_pairs() const {
    const std::int64_t block_bytes = k_ <= 1024 ? 1 << 20 : 512 << 10,
                       group_bytes = std::max<std::int64_t>(1, kGroupPanels * panel_bytes_);
    return 2 * std::clamp<std::int64_t>(block_bytes / group_bytes, 1, 64);
  }
  /// Rows of the next wide block that become tiles during each pair of panels of this one, so that all 32 do during one
  /// block of columns; 0 where each block copies its own rows first.
  int rows_ahead() const {
    const std::int64_t pairs = std::min(n_ / kPairColumns, block_pairs());
    if (is_linear_ || m_class_ != kAny || tail_elements() != 0 || !defers() || pairs < kWideRows / kMostRowsAhead)
      return 0;
    return pairs >= kWideRows ? 1 : kMostRowsAhead;
  }
  static constexpr int kMostRowsAhead = 2;
  /// Panels that would drive the 32 rows of A out of a 48 KiB L1 are loaded as data that L1 need not keep; likewise
  /// where the next rows' tiles are written meanwhile: up to 10 % faster for K = 256…512.
  bool streams_panels(int rows) const {
    return rows == kTileRows || rows_ahead() > 0 || kWideRows * k_ + 2 * panel_bytes_ > 48 << 10;
  }

  Mem field(std::size_t offset) const { return qword_ptr(call_, static_cast<std::int32_t>(offset)); }
  /// The call's own; that of int8_linear's product is where the quantised rows are.
  Mem workspace() const {
    return field(is_linear_ ? offsetof(int8_linear::Call, workspace) : offsetof(Call, workspace));
  }
  Mem quantised_rows() const { return field(offsetof(int8_linear::Call, product.workspace)); }
  Mem local(Local offset) const { return qword_ptr(rsp, offset); }
  static Tmm sums(int i) { return Tmm(static_cast<std::uint32_t>(i)); }
  static Tmm tile_a(int i) { return Tmm(static_cast<std::uint32_t>(4 + i)); }
  static Tmm tile_b(int i) { return Tmm(static_cast<std::uint32_t>(6 + i)); }

  /// Tiles 0–5 (sums, A) have min(m, 16) rows, tiles 6 and 7 (B) a row per 4 of K. Intel SDM, LDTILECFG: palette at
  /// byte 0, bytes per row as 16-bit words from 16, rows as bytes from 48.
  void configure_tiles() {
    const auto words = [](std::int64_t low, std::int64_t high) {
      return low * 0x0000'0000'0001'0001 | (high * 0x0000'0000'0001'0001) << 32;
    };
    const std::int64_t a_bytes = is_short() && k_ > 0 ? k_padded() : kTileRowBytes;
    const std::int64_t b_rows = a_bytes / 4;
    const Gp config = ka_, rows = kb_;
    a_.mov(config, workspace());
    a_.sttilecfg(ptr(config, kCallerConfig));
    a_.vpxord(zmm0, zmm0, zmm0);
    a_.vmovdqa64(ptr(config, kConfig), zmm0);
    a_.mov(asmjit::x86::byte_ptr(config, kConfig), 1);
    a_.mov(scratch_, words(kTileRowBytes, kTileRowBytes));
    a_.mov(qword_ptr(config, kConfig + 16), scratch_);
    if (a_bytes != kTileRowBytes)
      a_.mov(scratch_, words(a_bytes, kTileRowBytes));
    a_.mov(qword_ptr(config, kConfig + 24), scratch_);
    a_.mov(rows, field(offsetof(Call, m)));
    at_most(rows, kTileRows);
    a_.mov(scratch_, 0x0101'0101'0101);
    a_.imul(rows, scratch_);
    a_.mov(scratch_, b_rows << 48 | b_rows << 56);
    a_.or_(rows, scratch_);
    a_.mov(qword_ptr(config, kConfig + 48), rows);
    a_.ldtilecfg(ptr(config, kConfig));
    a_.mov(ldc_bytes_, field(offsetof(Call, ldc)));
    if (c_shift() > 0)
      a_.shl(ldc_bytes_, c_shift());
    a_.mov(tile_stride_.r32(), kTileRowBytes);
    if (is_linear_)
      a_.mov(a_stride_, row_stride());
  }

  void at_most(Gp reg, std::int64_t bound) {
    a_.mov(scratch_, bound);
    a_.cmp(reg, scratch_);
    a_.cmova(reg, scratch_);
  }

  /// A subroutine: 16 rows of A (all of them when m < 16) from row `ka` on, to the tiles at `kb`.
  void copy_tile() {
    const Gp from = a_rows_, to = c_, rows = pairs_left_;
    constexpr int kLines = 4;
    const std::int64_t turns = full_steps() / kLines;
    const int rest = static_cast<int>(full_steps() % kLines);
    Label row = a_.newLabel();
    a_.bind(copy_tile_);
    a_.imul(ka_, field(offsetof(Call, lda)));
    a_.add(ka_, field(offsetof(Call, a)));
    a_.mov(rows, field(offsetof(Call, m)));
    at_most(rows, kTileRows);
    a_.bind(row);
    a_.mov(from, ka_);
    a_.mov(to, kb_);
    if (turns > 0) {
      Label turn = a_.newLabel();
      a_.mov(counter_, turns);
      a_.bind(turn);
      copy_lines(from, to, kLines);
      a_.add(from, kLines * kTileRowBytes);
      a_.add(to, kLines * kTileBytes);
      a_.dec(counter_);
      a_.jnz(turn);
    }
    copy_lines(from, to, rest);
    if (tail_elements() != 0) {
      // The masked load reads nothing of what its mask leaves out: neither the row before nor the page behind.
      a_.k(asmjit::x86::k2).z().vmovdqu8(zmm0, ptr(from, rest * kTileRowBytes - tail_zeros()));
      a_.vmovdqa64(ptr(to, rest * kTileBytes), zmm0);
    }
    a_.add(ka_, field(offsetof(Call, lda)));
    a_.add(kb_, kTileRowBytes);
    a_.dec(rows);
    a_.jnz(row);
    a_.ret();
  }

  void copy_lines(Gp from, Gp to, int lines) {
    for (int i = 0; i < lines; ++i)
      a_.vmovdqu64(asmjit::x86::zmm(static_cast<std::uint32_t>(i)), ptr(from, i * kTileRowBytes));
    for (int i = 0; i < lines; ++i)
      a_.vmovdqa64(ptr(to, i * kTileBytes), asmjit::x86::zmm(static_cast<std::uint32_t>(i)));
  }

  void column_blocks() {
    if (n_ % kPanelColumns != 0) {
      a_.mov(scratch_.r32(), (1 << (n_ % kPanelColumns)) - 1);
      a_.kmovw(asmjit::x86::k1, scratch_.r32());
    }
    if (tail_elements() != 0 && !is_linear_) {
      a_.mov(scratch_, ((std::uint64_t{1} << tail_elements()) - 1) << tail_zeros());
      a_.kmovq(asmjit::x86::k2, scratch_);
    }
    if (has_wide()) {
      a_.mov(scratch_, workspace());
      a_.add(scratch_, kStaging);
      a_.mov(local(kStagingBegin), scratch_);
      a_.add(scratch_, kTileBytes);
      a_.mov(local(kStagingEnd), scratch_);
    }
    if (has_wide() && !is_linear_) {
      // With one block of columns, tiles are used once: all wide blocks take the same memory, which then stays in the
      // cache, or two memories in turn where they copy ahead.
      a_.mov(ka_, 2 * a_tile_row_bytes());
      if (rows_ahead() == 0) {
        a_.xor_(scratch_.r32(), scratch_.r32());
        a_.cmp(field(offsetof(Call, n)), static_cast<std::int32_t>(block_pairs() * kPairColumns));
        a_.cmovbe(ka_, scratch_);
      }
      a_.mov(local(kRowAStep), ka_);
    }
    Label block = a_.newLabel();
    a_.mov(b_, field(offsetof(Call, b)));
    a_.mov(c_, field(offsetof(Call, c)));
    if (finish_) {
      a_.mov(scratch_, field(offsetof(Call, terms)));
      a_.mov(local(kBlockTerms), scratch_);
    }
    a_.mov(scratch_, field(offsetof(Call, n)));
    a_.bind(block);
    a_.mov(local(kBlockB), b_);
    a_.mov(local(kBlockC), c_);
    a_.mov(local(kColumnsLeft), scratch_);
    a_.mov(pairs_left_, scratch_);
    a_.shr(pairs_left_, 5);
    at_most(pairs_left_, block_pairs());
    a_.mov(local(kPairs), pairs_left_);
    if (n_ % kPairColumns != 0) {
      // Columns beyond the whole pairs: a next block's when they are a pair or more.
      a_.mov(kb_, local(kColumnsLeft));
      a_.shl(pairs_left_, 5);
      a_.sub(kb_, pairs_left_);
      a_.xor_(scratch_.r32(), scratch_.r32());
      a_.cmp(kb_, kPairColumns);
      a_.cmovae(kb_, scratch_);
      a_.mov(local(kRest), kb_);
    }
    if (has_wide())
      wide_rows();
    narrow_rows();
    a_.mov(scratch_, local(kPairs));
    a_.mov(ka_, scratch_);
    a_.imul(ka_, ka_, 2 * panel_bytes_);
    a_.mov(b_, local(kBlockB));
    a_.add(b_, ka_);
    a_.mov(c_, local(kBlockC));
    if (finish_) {
      a_.imul(ka_, scratch_, 2 * terms_bytes());
      a_.add(local(kBlockTerms), ka_);
    }
    a_.shl(scratch_, 5);
    a_.lea(c_, ptr(c_, scratch_, static_cast<std::uint32_t>(c_shift())));
    a_.mov(ka_, local(kColumnsLeft));
    a_.sub(ka_, scratch_);
    if (n_ % kPairColumns != 0)
      a_.sub(ka_, local(kRest));
    a_.mov(scratch_, ka_);
    a_.test(scratch_, scratch_);
    a_.jnz(block);
  }

  void wide_rows() {
    Label block = a_.newLabel(), done = a_.newLabel();
    a_.mov(scratch_, field(offsetof(Call, m)));
    a_.cmp(scratch_, kTileRows);
    a_.jbe(done);
    a_.mov(local(kRowsLeft), scratch_);
    a_.mov(scratch_, local(kBlockC));
    a_.mov(local(kRowC), scratch_);
    a_.mov(scratch_, is_linear_ ? quantised_rows() : workspace());
    if (!is_linear_)
      a_.add(scratch_, tiles_of_a());
    a_.mov(local(kRowA), scratch_);
    a_.mov(from_, local(kStagingEnd));
    if (rows_ahead() > 0)
      a_.mov(local(kAheadRows), kWideRows);
    a_.bind(block);
    a_.mov(second_, local(kRowsLeft));
    a_.sub(second_, kTileRows);
    at_most(second_, kTileRows);
    if (k_ > 0 && !is_linear_) {
      // A's rows become tiles before or when their first block of columns is due.
      Label copied = a_.newLabel();
      a_.mov(scratch_, local(kBlockB));
      a_.cmp(scratch_, field(offsetof(Call, b)));
      a_.jne(copied);
      if (rows_ahead() > 0) {
        a_.cmp(local(kAheadRows), 0);
        a_.je(copied);
      }
      a_.mov(ka_, field(offsetof(Call, m)));
      a_.sub(ka_, local(kRowsLeft));
      a_.mov(kb_, local(kRowA));
      a_.call(copy_tile_);
      a_.mov(ka_, field(offsetof(Call, m)));
      a_.sub(ka_, local(kRowsLeft));
      a_.add(ka_, second_);
      a_.mov(kb_, local(kRowA));
      a_.add(kb_, a_tile_row_bytes());
      a_.call(copy_tile_);
      a_.bind(copied);
    }
    if (rows_ahead() > 0)
      begin_ahead();
    if (has_row_values())
      for (int tile = 0; tile < 2; ++tile) {
        a_.mov(ka_, field(offsetof(Call, m)));
        a_.sub(ka_, local(kRowsLeft));
        if (tile == 1)
          a_.add(ka_, second_);
        a_.mov(kb_, local(kRowA));
        if (tile == 1)
          a_.add(kb_, a_tile_row_bytes());
        row_values(tile);
      }
    begin_terms();
    if (is_linear_) {
      a_.imul(scratch_, second_, static_cast<std::int32_t>(row_stride()));
      a_.mov(local(kSecondRows), scratch_);
    }
    a_.imul(second_, ldc_bytes_);
    if (!is_linear_)
      a_.mov(a_rows_, local(kRowA));
    a_.mov(b_, local(kBlockB));
    a_.mov(c_, local(kRowC));
    if (n_ >= kPairColumns) {
      Label pair = a_.newLabel(), none = a_.newLabel();
      a_.mov(pairs_left_, local(kPairs));
      a_.test(pairs_left_, pairs_left_);
      a_.jz(none);
      a_.bind(pair);
      wide(2, 0);
      a_.add(b_, 2 * panel_bytes_);
      a_.add(c_, kPairColumns * c_bytes());
      next_terms(2);
      a_.dec(pairs_left_);
      a_.jnz(pair);
      a_.bind(none);
    }
    if (n_ % kPairColumns != 0) {
      Label none = a_.newLabel();
      a_.cmp(local(kRest), 0);
      a_.je(none);
      wide(n_ % kPairColumns > kPanelColumns ? 2 : 1, static_cast<int>(n_ % kPanelColumns));
      a_.bind(none);
    }
    if (defers() && has_row_values()) // they are this block's
      finish_staged();
    a_.mov(scratch_, ldc_bytes_);
    a_.shl(scratch_, 5);
    a_.add(local(kRowC), scratch_);
    if (is_linear_) {
      a_.add(local(kRowA), static_cast<std::int32_t>(kWideRows * row_stride()));
    } else {
      a_.mov(scratch_, local(kRowAStep));
      a_.add(local(kRowA), scratch_);
    }
    if (rows_ahead() > 0) {
      Label blocks = a_.newLabel();
      a_.cmp(field(offsetof(Call, n)), static_cast<std::int32_t>(block_pairs() * kPairColumns));
      a_.ja(blocks);
      a_.neg(local(kRowAStep));
      a_.bind(blocks);
    }
    a_.sub(local(kRowsLeft), kWideRows);
    a_.cmp(local(kRowsLeft), kTileRows);
    a_.jg(block);
    if (defers() && !has_row_values())
      finish_staged();
    a_.bind(done);
  }

  void begin_terms() {
    if (!finish_)
      return;
    a_.mov(scratch_, local(kBlockTerms));
    a_.mov(local(kTermsAt), scratch_);
  }
  void next_terms(int panels) {
    if (finish_)
      a_.add(local(kTermsAt), panels * terms_bytes());
  }
  /// Those of the current panels, for the stages.
  void prepare_columns(int panels) {
    if (!finish_)
      return;
    a_.mov(ka_, local(kTermsAt));
    for (int p = 0; p < panels; ++p)
      finish_->prepare_columns(p, ka_, p * terms_bytes(), kPanelColumns * 4, rsp);
  }

  /// The values of the rows of tile `tile` of two, whose first is row `ka` of A and whose tiles of A are at `kb`.
  void row_values(int tile) {
    using namespace asmjit::x86;
    const auto place = [&](const Gp& workspace, int row, int value) {
      return ptr(workspace, kRowValues + row * kTileRowBytes + tile * kRowValuesOfTile + value);
    };
    if (epilogue_.needs_row_sums()) {
      const Zmm ones = zmm16, bytes = zmm17;
      for (int row = 0; row < kTileRows; ++row)
        a_.vpxord(Zmm(row), Zmm(row), Zmm(row));
      a_.mov(scratch_.r32(), 0x01010101);
      a_.vpbroadcastd(ones, scratch_.r32());
      if (steps() > 0) {
        const Label step = a_.newLabel();
        a_.mov(counter_, steps());
        a_.bind(step);
        for (int row = 0; row < kTileRows; ++row)
          if (epilogue_.a_dtype == int8_mm::ADtype::u8) {
            a_.vmovdqa64(bytes, ptr(kb_, row * kTileRowBytes));
            a_.vpdpbusd(Zmm(row), bytes, ones);
          } else {
            a_.vpdpbusd(Zmm(row), ones, ptr(kb_, row * kTileRowBytes));
          }
        a_.add(kb_, kTileBytes);
        a_.dec(counter_);
        a_.jnz(step);
      }
      a_.mov(scratch_, workspace());
      for (int row = 0; row < kTileRows; ++row) {
        const Xmm sum(row), other = xmm17;
        a_.vextracti64x4(ymm17, Zmm(row), 1);
        a_.vpaddd(Ymm(row), Ymm(row), ymm17);
        a_.vextracti32x4(other, Ymm(row), 1);
        a_.vpaddd(sum, sum, other);
        for (const int lanes : {0b01'00'11'10, 0b10'11'00'01}) {
          a_.vpshufd(other, sum, lanes);
          a_.vpaddd(sum, sum, other);
        }
        a_.vmovd(place(scratch_, row, kRowSum), sum);
      }
    }
    if (has_row_value_each()) {
      const Label next = a_.newLabel();
      a_.mov(counter_, field(offsetof(Call, m)));
      at_most(counter_, kTileRows);
      if (is_linear_) {
        a_.imul(ka_, ka_, static_cast<std::int32_t>(row_stride()));
        a_.add(ka_, quantised_rows());
      } else {
        a_.mov(scratch_, field(offsetof(Call, a_zp)));
        a_.lea(ka_, ptr(scratch_, ka_, 2));
      }
      a_.mov(kb_, workspace());
      a_.bind(next);
      a_.vmovd(xmm0, ptr(ka_, is_linear_ ? static_cast<std::int32_t>(row_stride()) - 4 : 0));
      a_.vmovd(place(kb_, 0, kRowZp), xmm0);
      a_.add(ka_, is_linear_ ? static_cast<std::int32_t>(row_stride()) : 4);
      a_.add(kb_, kTileRowBytes);
      a_.dec(counter_);
      a_.jnz(next);
    }
  }

  /// The stages on 16 sums of row tile `tile`, panel `panel`; `staged` is where they lay in staging.
  void finish_row(const asmjit::x86::Zmm& sums, int tile, int panel, const Gp& staged, int staged_at) {
    const int values = kRowValues - kStaging + staged_at + tile * kRowValuesOfTile;
    if (!is_linear_) // whose offsets are 0
      finish_->add_offsets(sums, panel, rsp);
    finish_->apply(sums, panel, rsp, ptr(staged, values + kRowZp), ptr(staged, values + kRowSum));
  }

  /// Sets what the wide block copies of the next one: nothing behind the last one, in a later block of columns (the
  /// tiles are there), or when the call has too few columns to finish it.
  void begin_ahead() {
    const Gp left = ka_, row = kb_;
    Label none = a_.newLabel();
    a_.mov(local(kAheadRows), kWideRows);
    a_.mov(local(kAheadFrom), 0);
    a_.mov(left, local(kRowsLeft));
    a_.sub(left, kWideRows + kTileRows);
    a_.jle(none);
    a_.mov(scratch_, local(kBlockB));
    a_.cmp(scratch_, field(offsetof(Call, b)));
    a_.jne(none);
    a_.cmp(local(kPairs), kWideRows / rows_ahead());
    a_.jb(none);
    a_.mov(row, field(offsetof(Call, m)));
    a_.sub(row, left);
    a_.sub(row, kTileRows);
    at_most(left, kTileRows);
    a_.add(left, row);
    for (const Gp& reg : {row, left}) {
      a_.imul(reg, field(offsetof(Call, lda)));
      a_.add(reg, field(offsetof(Call, a)));
    }
    a_.mov(local(kAheadFrom), row);
    a_.mov(local(kAheadSecond), left);
    a_.mov(scratch_, local(kRowAStep));
    a_.mov(local(kAheadTo), scratch_);
    a_.bind(none);
  }

  /// A line of each of the block's rows that are copied ahead.
  void copy_ahead() {
    Label none = a_.newLabel();
    a_.test(ahead_from_, ahead_from_);
    a_.jz(none);
    const auto line = [](int i) { return asmjit::x86::zmm(static_cast<std::uint32_t>(4 + i)); };
    for (int i = 0; i < rows_ahead(); ++i)
      a_.vmovdqu64(line(i), i == 0 ? ptr(ahead_from_) : ptr(ahead_from_, ahead_lda_));
    for (int i = 0; i < rows_ahead(); ++i)
      a_.vmovdqa64(ptr(ka_, ahead_to_, 0, i * kTileRowBytes), line(i));
    a_.add(ahead_from_, kTileRowBytes);
    a_.bind(none);
  }

  void next_rows_ahead() {
    const Gp from = scratch_, rows = ka_, step = kb_;
    Label none = a_.newLabel(), same_tile = a_.newLabel();
    a_.mov(from, local(kAheadFrom));
    a_.test(from, from);
    a_.jz(none);
    a_.imul(step, field(offsetof(Call, lda)), rows_ahead());
    a_.add(from, step);
    a_.add(local(kAheadTo), rows_ahead() * kTileRowBytes);
    a_.mov(rows, local(kAheadRows));
    a_.sub(rows, rows_ahead());
    a_.cmovz(from, rows);
    a_.mov(local(kAheadRows), rows);
    a_.cmp(rows, kTileRows);
    a_.jne(same_tile);
    a_.mov(from, local(kAheadSecond));
    a_.add(local(kAheadTo), static_cast<std::int32_t>(a_tile_row_bytes() - kTileBytes));
    a_.bind(same_tile);
    a_.mov(local(kAheadFrom), from);
    a_.bind(none);
  }

  /// 32 rows × 1 or 2 panels; `cut` columns in the last panel, 0 for all.
  void wide(int panels, int cut) {
    const bool ahead = panels == 2 && cut == 0 && rows_ahead() > 0;
    begin_k();
    if (is_linear_) {
      a_.mov(ka_second_, local(kSecondRows));
      a_.add(ka_second_, ka_);
    }
    if (ahead) {
      a_.mov(ahead_from_, local(kAheadFrom));
      if (rows_ahead() > 1)
        a_.mov(ahead_lda_, field(offsetof(Call, lda)));
      a_.mov(ahead_to_, local(kAheadTo));
    }
    for (int i = 0; i < 2 * panels; ++i)
      a_.tilezero(sums(i));
    if (full_steps() > 0) {
      Label step = a_.newLabel();
      if (full_steps() > 1)
        a_.mov(counter_, full_steps());
      a_.bind(step);
      wide_step(panels, true, ahead);
      if (full_steps() > 1 || tail_elements() != 0)
        next_k(true);
      if (full_steps() > 1) {
        a_.dec(counter_);
        a_.jnz(step);
      }
    }
    if (tail_elements() != 0) {
      if (tail_step_back() != 0)
        a_.sub(kb_, tail_step_back());
      wide_step(panels, false, false);
    }
    if (ahead) {
      a_.mov(call_, local(kCall));
      if (rows_ahead() > 1)
        a_.mov(a_rows_, local(kRowA));
      next_rows_ahead();
    }
    if (panels == 2 && cut == 0) {
      stage_sums();
      if (!defers())
        finish_staged();
    } else if (finish_) {
      prepare_columns(panels);
      for (int tile = 0; tile < 2; ++tile)
        for (int p = 0; p < panels; ++p)
          finish_sums(sums(tile * panels + p), tile, p, p == panels - 1 ? cut : 0);
    } else {
      for (int p = 0; p < panels; ++p)
        store_sums(sums(p), c_, p, p == panels - 1 ? cut : 0);
      a_.lea(ka_, ptr(c_, second_));
      for (int p = 0; p < panels; ++p)
        store_sums(sums(panels + p), ka_, p, p == panels - 1 ? cut : 0);
    }
  }

  /// Each tile is loaded just before its first product, so that the products of one step overlap the loads of the next.
  void wide_step(int panels, bool copies, bool ahead) {
    load_b(tile_b(0), 0, kWideRows);
    load_a(0);
    multiply(sums(0), tile_a(0), tile_b(0));
    // An epilogue is spread over the step: as one piece it would fill the scheduler, and no product would enter behind
    // it.
    const bool finishes = copies && defers(), spreads = finishes && finish_;
    if (spreads)
      copy_staged_quarters(0, 1);
    if (panels == 2) {
      load_b(tile_b(1), static_cast<std::int32_t>(panel_bytes_), kWideRows);
      multiply(sums(1), tile_a(0), tile_b(1));
    }
    if (finishes)
      copy_staged_quarters(spreads ? 1 : 0, spreads ? 2 : 4);
    if (ahead)
      copy_ahead();
    load_a(1);
    multiply(sums(panels), tile_a(1), tile_b(0));
    if (spreads)
      copy_staged_quarters(2, panels == 2 ? 3 : 4);
    if (panels == 2) {
      multiply(sums(panels + 1), tile_a(1), tile_b(1));
      if (spreads)
        copy_staged_quarters(3, 4);
    }
  }

  /// Of a step's share of the staged rows. The last quarter goes on to the next step's.
  void copy_staged_quarters(int begin, int end) {
    const int vectors = staged_rows_per_step(); // a quarter of four for each row
    Label none = a_.newLabel(), wait = a_.newLabel();
    a_.cmp(from_, local(kStagingEnd));
    a_.je(none);
    a_.cmp(from_, local(kStagingBegin));
    a_.jb(wait);
    copy_staged(begin * vectors, end * vectors);
    a_.bind(wait);
    if (end == 4)
      a_.add(from_, staged_rows_per_step() * kTileRowBytes);
    a_.bind(none);
  }

  // Sums of a pair of panels reach C during the steps of the next pair, as evenly as the steps allow (the opening
  // comment says why). Where steps are left, the first ones give the sums time to get to the staging tiles.
  bool defers() const { return full_steps() >= 4; }
  static constexpr int kWaitSteps = 4;
  /// Of each tile: a power of two, so that 16 rows are done in the steps that are left.
  int staged_rows_per_step() const { return full_steps() >= 16 ? 1 : full_steps() >= 8 ? 2 : 4; }
  int staged_wait_steps() const {
    return static_cast<int>(std::min<std::int64_t>(kWaitSteps, full_steps() - kTileRows / staged_rows_per_step()));
  }

  void multiply(const Tmm& sums, const Tmm& a, const Tmm& b) {
    if (epilogue_.a_dtype == int8_mm::ADtype::u8)
      a_.tdpbusd(sums, a, b);
    else
      a_.tdpbssd(sums, a, b);
  }

  void stage_sums() {
    prepare_columns(2);
    a_.mov(from_, local(kStagingBegin));
    for (int i = 0; i < 4; ++i)
      a_.tilestored(ptr(from_, tile_stride_, 0, i * kTileBytes), sums(i));
    if (defers() && staged_wait_steps() > 0)
      a_.sub(from_, staged_wait_steps() * staged_rows_per_step() * kTileRowBytes);
    a_.mov(to_, c_);
    a_.mov(to_second_, second_);
  }

  /// Vectors of 16 sums, four in a row: those of the first tile's panels, then of the second's.
  void copy_staged(int begin, int end) {
    for (int row = begin / 4; row < (end + 3) / 4; ++row) {
      const int first = std::max(begin - 4 * row, 0), last = std::min(end - 4 * row, 4);
      for (int i = first; i < last; ++i)
        a_.vmovdqa64(asmjit::x86::zmm(static_cast<std::uint32_t>(i)), ptr(from_, i * kTileBytes + row * kTileRowBytes));
      for (int i = first; i < last; ++i) {
        const asmjit::x86::Zmm line = asmjit::x86::zmm(static_cast<std::uint32_t>(i));
        const int tile = i / 2, panel = i % 2, at = panel * kPanelColumns * c_bytes();
        const Mem to = tile == 0 ? ptr(to_, at) : ptr(to_, to_second_, 0, at);
        if (finish_) {
          finish_row(line, tile, panel, from_, row * kTileRowBytes);
          finish_->store(line, to, kAllLanes);
        } else {
          a_.vmovdqu64(to, line);
        }
      }
      if (last == 4)
        a_.add(to_, ldc_bytes_);
    }
  }

  void finish_staged() {
    Label row = a_.newLabel(), done = a_.newLabel();
    a_.cmp(from_, local(kStagingEnd));
    a_.je(done);
    a_.mov(scratch_, local(kStagingBegin));
    a_.cmp(from_, scratch_);
    a_.cmovb(from_, scratch_);
    a_.bind(row);
    copy_staged(0, 4);
    a_.add(from_, kTileRowBytes);
    a_.cmp(from_, local(kStagingEnd));
    a_.jne(row);
    a_.bind(done);
  }

  /// The tile of rows that the wide blocks leave: when m mod 32 is 1…16.
  void narrow_rows() {
    Label done = a_.newLabel();
    const Gp rows = ka_;
    a_.mov(rows, field(offsetof(Call, m)));
    a_.lea(scratch_, ptr(rows, -1));
    if (has_wide()) {
      a_.test(scratch_, kTileRows);
      a_.jnz(done);
    }
    if (!is_linear_) {
      a_.shr(scratch_, 4); // its tile
      a_.imul(scratch_, scratch_, static_cast<std::int32_t>(a_tile_row_bytes()));
      a_.add(scratch_, workspace());
      a_.add(scratch_, tiles_of_a());
      a_.mov(kb_, scratch_);
    }
    a_.xor_(scratch_.r32(), scratch_.r32());
    a_.sub(rows, kTileRows);
    a_.cmovb(rows, scratch_);
    a_.mov(second_, rows);
    if (is_linear_) {
      a_.imul(kb_, rows, static_cast<std::int32_t>(row_stride()));
      a_.add(kb_, quantised_rows());
    }
    a_.mov(from_, kb_);
    if (k_ > 0 && !is_linear_) {
      Label copied = a_.newLabel();
      a_.mov(scratch_, local(kBlockB));
      a_.cmp(scratch_, field(offsetof(Call, b)));
      a_.jne(copied);
      a_.call(copy_tile_);
      a_.bind(copied);
    }
    if (has_row_values()) {
      a_.mov(ka_, second_);
      a_.mov(kb_, from_);
      row_values(0);
    }
    begin_terms();
    if (is_linear_)
      a_.mov(local(kRowA), from_);
    else
      a_.mov(a_rows_, from_);
    a_.mov(c_, second_);
    a_.imul(c_, ldc_bytes_);
    a_.add(c_, local(kBlockC));
    a_.mov(b_, local(kBlockB));
    if (n_ >= kGroupColumns) {
      Label group = a_.newLabel(), none = a_.newLabel();
      a_.mov(pairs_left_, local(kPairs));
      a_.shr(pairs_left_, 1);
      a_.jz(none);
      a_.bind(group);
      narrow(kGroupPanels, 0);
      a_.add(b_, kGroupPanels * panel_bytes_);
      a_.add(c_, kGroupColumns * c_bytes());
      next_terms(kGroupPanels);
      a_.dec(pairs_left_);
      a_.jnz(group);
      a_.bind(none);
    }
    if (n_ % kGroupColumns != 0) {
      a_.mov(scratch_, local(kPairs));
      a_.and_(scratch_, 1);
      if (n_ % kPairColumns != 0)
        a_.or_(scratch_, local(kRest));
      a_.test(scratch_, scratch_);
      a_.jz(done);
      narrow(static_cast<int>((n_ % kGroupColumns + kPanelColumns - 1) / kPanelColumns),
             static_cast<int>(n_ % kPanelColumns));
    }
    a_.bind(done);
  }

  void narrow(int panels, int cut) {
    begin_k();
    for (int p = 0; p < panels; ++p)
      a_.tilezero(sums(p));
    if (full_steps() > 0) {
      Label step = a_.newLabel();
      if (full_steps() > 1)
        a_.mov(counter_, full_steps());
      a_.bind(step);
      narrow_step(panels);
      if (full_steps() > 1 || tail_elements() != 0)
        next_k(false);
      if (full_steps() > 1) {
        a_.dec(counter_);
        a_.jnz(step);
      }
    }
    if (tail_elements() != 0) {
      if (tail_step_back() != 0)
        a_.sub(kb_, tail_step_back());
      narrow_step(panels);
    }
    if (finish_) {
      prepare_columns(panels);
      for (int p = 0; p < panels; ++p)
        finish_sums(sums(p), 0, p, p == panels - 1 ? cut : 0);
      return;
    }
    for (int p = 0; p < panels; ++p)
      store_sums(sums(p), c_, p, p == panels - 1 ? cut : 0);
  }

  void narrow_step(int panels) {
    load_a(0);
    for (int p = 0; p < panels; ++p) {
      load_b(tile_b(p % 2), static_cast<std::int32_t>(p * panel_bytes_), kTileRows);
      multiply(sums(p), tile_a(0), tile_b(p % 2));
    }
  }

  void begin_k() {
    if (is_linear_)
      a_.mov(ka_, local(kRowA));
    else
      a_.mov(ka_, a_rows_);
    a_.mov(kb_, b_);
  }
  void next_k(bool is_wide) {
    a_.add(ka_, a_step_bytes());
    if (is_linear_ && is_wide)
      a_.add(ka_second_, a_step_bytes());
    a_.add(kb_, kTileBytes);
  }

  /// Of row tile 0 or 1.
  void load_a(int tile) {
    if (is_linear_)
      a_.tileloadd(tile_a(tile), ptr(tile == 0 ? ka_ : ka_second_, a_stride_));
    else
      a_.tileloadd(tile_a(tile), ptr(ka_, tile_stride_, 0, static_cast<std::int32_t>(tile * a_tile_row_bytes())));
  }

  /// For a block of 16 or 32 rows.
  void load_b(Tmm tile, std::int32_t offset, int rows) {
    if (streams_panels(rows))
      a_.tileloaddt1(tile, ptr(kb_, tile_stride_, 0, offset));
    else
      a_.tileloadd(tile, ptr(kb_, tile_stride_, 0, offset));
  }

  /// To the rows of C at `row`; not to `ka_` when N cuts the panel, unless it is the last use of it.
  void store_sums(Tmm tile, Gp row, int panel, int cut) {
    if (cut == 0) {
      a_.tilestored(ptr(row, ldc_bytes_, 0, panel * kTileRowBytes), tile);
      return;
    }
    const Gp from = kb_, to = ka_, left = counter_;
    a_.mov(from, workspace());
    a_.add(from, kStaging);
    a_.tilestored(ptr(from, tile_stride_), tile);
    if (to != row)
      a_.mov(to, row);
    a_.mov(left, field(offsetof(Call, m)));
    at_most(left, kTileRows);
    Label loop = a_.newLabel();
    a_.bind(loop);
    a_.vmovdqa32(zmm0, ptr(from));
    a_.k(asmjit::x86::k1).vmovdqu32(ptr(to, panel * kTileRowBytes), zmm0);
    a_.add(from, kTileRowBytes);
    a_.add(to, ldc_bytes_);
    a_.dec(left);
    a_.jnz(loop);
  }

  /// A tile of sums through staging and the stages to C.
  void finish_sums(Tmm tile_sums, int tile, int panel, int cut) {
    const Gp from = kb_, to = ka_, left = counter_;
    a_.mov(from, workspace());
    a_.add(from, kStaging);
    a_.tilestored(ptr(from, tile_stride_), tile_sums);
    if (tile == 0)
      a_.mov(to, c_);
    else
      a_.lea(to, ptr(c_, second_));
    a_.mov(left, field(offsetof(Call, m)));
    at_most(left, kTileRows);
    Label loop = a_.newLabel();
    a_.bind(loop);
    a_.vmovdqa32(zmm0, ptr(from));
    finish_row(zmm0, tile, panel, from, 0);
    finish_->store(zmm0, ptr(to, panel * kPanelColumns * c_bytes()), cut != 0 ? asmjit::x86::k1 : kAllLanes);
    a_.add(from, kTileRowBytes);
    a_.add(to, ldc_bytes_);
    a_.dec(left);
    a_.jnz(loop);
  }

  const bool is_linear_;
  const KernelDesc product_;
  const std::int64_t m_class_, n_, k_;
  const std::int64_t panel_bytes_;
  const int8_mm::Epilogue epilogue_;
  const int8_mm::TermsLayout terms_;
  QuantisedRows quantised_{}; ///< of int8_linear
  Assembler a_;
  std::optional<EpilogueEmitter> finish_; ///< null: no epilogue
  const Label copy_tile_ = a_.newLabel();

  static constexpr std::initializer_list<Gp> kSaved = {asmjit::x86::rbx, asmjit::x86::rbp, asmjit::x86::r12,
                                                       asmjit::x86::r13, asmjit::x86::r14, asmjit::x86::r15};
  const Gp call_ = asmjit::x86::rdi, ldc_bytes_ = asmjit::x86::rdx, tile_stride_ = asmjit::x86::rcx;
  const Gp a_rows_ = asmjit::x86::rsi;                 ///< the rows' tiles of A
  const Gp b_ = asmjit::x86::r8, c_ = asmjit::x86::r9; ///< the current panels and their columns of the rows
  const Gp second_ = asmjit::x86::r14; ///< bytes from the first row of C to that of the second tile of rows
  const Gp pairs_left_ = asmjit::x86::r15;
  const Gp ka_ = asmjit::x86::rbx, kb_ = asmjit::x86::rbp; ///< walk along K
  const Gp counter_ = asmjit::x86::r13, scratch_ = asmjit::x86::rax;
  const Gp from_ = asmjit::x86::r10, to_ = asmjit::x86::r12; ///< staged sums and their place in C
  const Gp to_second_ = asmjit::x86::r11;                    ///< `second_` for them
  // During the steps of a pair of panels, which need none of the registers that these are otherwise:
  const Gp ahead_from_ = scratch_, ahead_to_ = call_; ///< kAheadFrom, walking along the row, and kAheadTo
  const Gp ahead_lda_ = a_rows_;
  // Of int8_linear, which has its rows in kRowA and copies nothing ahead:
  const Gp a_stride_ = a_rows_;   ///< bytes from one quantised row to the next
  const Gp ka_second_ = scratch_; ///< walks along the second tile's rows, during the steps
};

std::string reason_to_decline(std::int64_t m_class) {
  return m_class >= 0 && m_class <= 1 ? "M ≤ 1: memory bound, and avx512vnni needs no tile state" : "";
}

std::string pack_layout(const KernelDesc&, const Target&) {
  return Emitter::kLayout.id();
}
Result<CodeObject> compile(const KernelDesc& desc, const Target&, std::string_view) {
  return Emitter(desc).emit();
}

} // namespace

Implementation int8_mm_amx() {
  Implementation row{};
  row.op = OpId::int8_mm;
  row.isa = IsaPath::amx;
  row.backend = BackendId::x86;
  row.generator = GeneratorId::asmjit;
  row.generator_digest = k_x86_generator_digest;
  row.needs = Emitter::kNeeds;
  row.uses = [](const KernelDesc& desc, const Target&) { return Emitter::features_for(int8_mm::Epilogue::of(desc)); };
  row.supports = [](const KernelDesc& desc, const Target&) -> Status { return int8_mm::check_k(desc, kMaxK); };
  row.declines = [](const KernelDesc& desc, const Target&) -> std::string {
    // Measured: equal within 4 % at M = 1…8 with weights in L3, 6 % behind at M = 1 with weights from memory, ahead
    // from M = 2 in L2.
    return reason_to_decline(desc.value[int8_mm::kM]);
  };
  row.pack_layout = pack_layout;
  row.compile = compile;
  return row;
}

Implementation int8_linear_amx() {
  Implementation row = linear_row(
      IsaPath::amx, Emitter::kNeeds,
      [](const KernelDesc& desc, const Target&) { return Emitter::features_for(int8_linear::output_of(desc)); },
      pack_layout, compile);
  row.supports = [](const KernelDesc& desc, const Target&) { return int8_linear::check_k(desc, kMaxK); };
  row.declines = [](const KernelDesc& desc, const Target&) { return reason_to_decline(desc.value[int8_linear::kM]); };
  return row;
}

} // namespace kiln::x86
