#include <algorithm>
#include <cstddef>
#include <limits>

#include <fmt/format.h>

#include "backends/x86/emit.h"
#include "backends/x86/int8_mm_amx.h"
#include "backends/x86/rows.h"
#include "jit/ops/int8_mm.h"

// int8_mm on AMX. A tile holds 16 rows of 64 bytes: 16 × 64 of A, 64 × 16 of B (a panel's 16 rows of k4), 16 × 16 sums.
//
//   per group of 64 columns
//     per pair of panels                      32 columns whose panels stay in L2, and in L1 while K ≤ 512
//       per 32 rows, the last block shorter   wide: 2 × 2 tiles of sums, 4 tile loads per 4 products
//     the last 1…16 rows                      narrow: 1 × 4 tiles of sums, one tile of A against 4 panels
//
// Remainders cost no second tile configuration, which would clear the sums:
// - M: the last block of rows starts early, so that it ends at m; rows that two blocks share get the same sums twice. Only m < 16 has
//   lower tiles, and then every block has them.
// - K: the last K mod 64 elements of A's rows are copied once a call, with zeros before them, so that the product takes the last 16 rows
//   of the panel, some of them a second time against zeros. K < 61 has one product on shorter tiles.
// - N: the pack is zero beyond N; sums of a panel that N cuts go through the workspace and a masked store.
namespace kiln::x86 {
namespace {

using asmjit::Label;
using asmjit::x86::Gp;
using asmjit::x86::Mem;
using asmjit::x86::ptr;
using asmjit::x86::qword_ptr;
using asmjit::x86::Tmm;
using int8_mm::Call;

constexpr int kTileRows = 16;       ///< palette 1: 8 tiles of 16 rows of 64 bytes
constexpr int kTileRowBytes = 64;
constexpr int kTileBytes = kTileRows * kTileRowBytes;
constexpr int kPanelColumns = 16;   ///< sums in a tile row
constexpr int kWideRows = 2 * kTileRows;
constexpr int kGroupPanels = 4;
constexpr int kGroupColumns = kGroupPanels * kPanelColumns;

// Workspace, in bytes from its start.
constexpr int kConfig = 0;                        ///< the kernel's tile configuration
constexpr int kCallerConfig = kConfig + 64;       ///< that of the caller
constexpr int kStaging = kCallerConfig + 64;      ///< a tile of sums that N cuts
constexpr int kTail = kStaging + kTileBytes;      ///< 64 bytes a row: the last K mod 64 elements

// Stack frame, in bytes from rsp.
enum Local : int {
  kRowsLeft = 0,      ///< rows from the current wide block on
  kSecondRow = 8,     ///< of the wide block: where its second tile begins
  kTailRow = 16,      ///< the block's first row in the workspace's tail
  kColumnsLeft = 24,
  kNarrowRows = 32,   ///< 0 when the wide blocks cover every row
  kNarrowFirst = 40,  ///< its first row
  kPrefetchEnd = 48,
  kFrameBytes = 56
};

class Emitter {
public:
  Emitter(std::int64_t m_class, std::int64_t n, std::int64_t k, const amx::Tuning& tuning)
      : m_class_(m_class), n_(n), k_(k), tuning_(tuning), panel_bytes_(kLayout.panel_bytes(k)) {}

  Result<CodeObject> emit() {
    a_.enter(kSaved);
    a_.sub(asmjit::x86::rsp, kFrameBytes);
    configure_tiles();
    if (tail_elements() != 0)
      copy_tail();
    choose_narrow_rows();
    column_loop();
    // The caller's configuration is its own to keep (its tiles are not: the psABI lets a call destroy them). Without one this loads
    // zeros, which is the initial state: no tile data is left for the system to save.
    a_.mov(ka0_, field(offsetof(Call, workspace)));
    a_.ldtilecfg(ptr(ka0_, kCallerConfig));
    a_.add(asmjit::x86::rsp, kFrameBytes);
    a_.leave(kSaved);
    return a_.finish(kNeeds, plan().values());
  }

  static constexpr int8_mm::PackLayout kLayout{kPanelColumns, 4};
  static constexpr Features kNeeds{Feature::avx512f, Feature::avx512bw, Feature::amx_tile, Feature::amx_int8};

private:
  int8_mm::Plan plan() const {
    int8_mm::Plan plan;
    plan.layout = kLayout;
    plan.m_step = has_wide() ? kWideRows : kTileRows;
    plan.n_step = kGroupColumns;
    plan.workspace_fixed = kTail;
    plan.workspace_per_row = tail_elements() != 0 ? kTileRowBytes : 0;
    return plan;
  }

  bool has_wide() const { return m_class_ == kAny || m_class_ > kTileRows; }

  // K: full steps of 64 straight from A, then a tail from the workspace.
  std::int64_t k_padded() const { return kLayout.k_padded(k_); }
  bool is_short() const { return k_padded() < kTileRowBytes; } ///< one product on shorter tiles
  bool is_direct_short() const { return is_short() && k_ > 0 && k_ == k_padded(); }
  std::int64_t full_steps() const { return is_direct_short() ? 1 : k_ / kTileRowBytes; }
  int tail_elements() const { return is_direct_short() ? 0 : static_cast<int>(k_ % kTileRowBytes); }
  /// Zeros before the tail in a row of the workspace.
  int tail_zeros() const { return is_short() ? 0 : static_cast<int>((kTileRowBytes - k_padded() % kTileRowBytes) % kTileRowBytes); }
  std::int64_t tail_panel_offset() const { return is_short() ? 0 : k_padded() * kPanelColumns - kTileBytes; }

  Mem field(std::size_t offset) const { return qword_ptr(call_, static_cast<std::int32_t>(offset)); }
  Mem local(Local offset) const { return qword_ptr(asmjit::x86::rsp, offset); }
  static Tmm sums(int i) { return Tmm(static_cast<std::uint32_t>(i)); }
  static Tmm tile_a(int i) { return Tmm(static_cast<std::uint32_t>(4 + i)); }
  static Tmm tile_b(int i) { return Tmm(static_cast<std::uint32_t>(6 + i)); }

  void add_constant(Gp reg, std::int64_t value) {
    if (value == 0)
      return;
    if (value <= std::numeric_limits<std::int32_t>::max()) {
      a_.add(reg, value);
    } else {
      a_.mov(scratch_, value);
      a_.add(reg, scratch_);
    }
  }

  /// Tiles 0–5 (sums, A) have min(m, 16) rows, tiles 6 and 7 (B) a row per 4 of K. Intel SDM, LDTILECFG: palette at byte 0, bytes per row
  /// as 16-bit words from 16, rows as bytes from 48.
  void configure_tiles() {
    const auto words = [](std::int64_t low, std::int64_t high) { return low * 0x0000'0000'0001'0001 | (high * 0x0000'0000'0001'0001) << 32; };
    const std::int64_t a_bytes = is_short() && k_ > 0 ? k_padded() : kTileRowBytes;
    const std::int64_t b_rows = a_bytes / 4;
    const Gp config = ka0_, rows = ka1_;
    a_.mov(config, field(offsetof(Call, workspace)));
    a_.sttilecfg(ptr(config, kCallerConfig));
    a_.vpxord(asmjit::x86::zmm0, asmjit::x86::zmm0, asmjit::x86::zmm0);
    a_.vmovdqa64(ptr(config, kConfig), asmjit::x86::zmm0);
    a_.mov(asmjit::x86::byte_ptr(config, kConfig), 1);
    a_.mov(scratch_, words(kTileRowBytes, kTileRowBytes));
    a_.mov(qword_ptr(config, kConfig + 16), scratch_);
    if (a_bytes != kTileRowBytes)
      a_.mov(scratch_, words(a_bytes, kTileRowBytes));
    a_.mov(qword_ptr(config, kConfig + 24), scratch_);
    a_.mov(rows, field(offsetof(Call, m)));
    a_.mov(scratch_.r32(), kTileRows);
    a_.cmp(rows, scratch_);
    a_.cmova(rows, scratch_);
    a_.mov(scratch_, 0x0101'0101'0101);
    a_.imul(rows, scratch_);
    a_.mov(scratch_, b_rows << 48 | b_rows << 56);
    a_.or_(rows, scratch_);
    a_.mov(qword_ptr(config, kConfig + 48), rows);
    a_.ldtilecfg(ptr(config, kConfig));
    a_.mov(lda_, field(offsetof(Call, lda)));
    a_.mov(ldc_bytes_, field(offsetof(Call, ldc)));
    a_.shl(ldc_bytes_, 2);
    a_.mov(tile_stride_.r32(), kTileRowBytes);
  }

  /// A masked load reads nothing of the bytes that its mask leaves out, so the row before and the page behind stay untouched.
  void copy_tail() {
    const Gp from = ka0_, to = ka1_, left = counter_;
    const std::uint64_t mask = ((std::uint64_t{1} << tail_elements()) - 1) << tail_zeros();
    a_.mov(scratch_, mask);
    a_.kmovq(asmjit::x86::k2, scratch_);
    a_.mov(from, field(offsetof(Call, a)));
    add_constant(from, k_ / kTileRowBytes * kTileRowBytes);
    a_.mov(to, field(offsetof(Call, workspace)));
    a_.mov(left, field(offsetof(Call, m)));
    Label row = a_.newLabel();
    a_.bind(row);
    a_.k(asmjit::x86::k2).z().vmovdqu8(asmjit::x86::zmm0, ptr(from, -tail_zeros()));
    a_.vmovdqa64(ptr(to, kTail), asmjit::x86::zmm0);
    a_.add(from, lda_);
    a_.add(to, kTileRowBytes);
    a_.dec(left);
    a_.jnz(row);
  }

  /// The wide blocks take 32 rows each while 17 or more are left.
  void choose_narrow_rows() {
    const Gp rows = ka0_, first = ka1_;
    a_.mov(scratch_, field(offsetof(Call, m)));
    if (!has_wide()) {
      a_.mov(local(kNarrowRows), scratch_);
      a_.mov(local(kNarrowFirst), 0);
      return;
    }
    a_.lea(rows, ptr(scratch_, -1)); // 0…15: m mod 32 is 1…16
    a_.and_(rows, kWideRows - 1);
    a_.cmp(rows, kTileRows);
    a_.mov(rows.r32(), kTileRows);
    a_.mov(first.r32(), 0);
    a_.cmovae(rows, first);
    Label done = a_.newLabel();
    a_.jae(done);
    a_.cmp(scratch_, rows);
    a_.cmovb(rows, scratch_);
    a_.mov(first, scratch_);
    a_.sub(first, rows);
    a_.bind(done);
    a_.mov(local(kNarrowRows), rows);
    a_.mov(local(kNarrowFirst), first);
  }

  void column_loop() {
    const int tail_columns = static_cast<int>(n_ % kGroupColumns);
    if (tail_columns % kPanelColumns != 0) {
      a_.mov(scratch_.r32(), (1 << (tail_columns % kPanelColumns)) - 1);
      a_.kmovw(asmjit::x86::k1, scratch_.r32());
    }
    a_.mov(b_, field(offsetof(Call, b)));
    a_.mov(c_, field(offsetof(Call, c)));
    a_.mov(scratch_, field(offsetof(Call, n)));
    Label tail = a_.newLabel(), done = a_.newLabel();
    if (n_ >= kGroupColumns) {
      Label loop = a_.newLabel();
      a_.cmp(scratch_, kGroupColumns);
      a_.jb(tail);
      a_.bind(loop);
      a_.mov(local(kColumnsLeft), scratch_);
      group(kGroupPanels, 0);
      add_constant(b_, kGroupPanels * panel_bytes_);
      a_.add(c_, kGroupColumns * 4);
      a_.mov(scratch_, local(kColumnsLeft));
      a_.sub(scratch_, kGroupColumns);
      a_.cmp(scratch_, kGroupColumns);
      a_.jae(loop);
    }
    a_.bind(tail);
    if (tail_columns != 0) {
      a_.test(scratch_, scratch_);
      a_.jz(done);
      group((tail_columns + kPanelColumns - 1) / kPanelColumns, tail_columns % kPanelColumns);
    }
    a_.bind(done);
  }

  /// 1…4 panels at b, their columns at c; `cut` columns in the last one, 0 for all.
  void group(int panels, int cut) {
    if (has_wide())
      for (int first = 0; first < panels; first += 2)
        wide(first, std::min(2, panels - first), first + 2 >= panels ? cut : 0);
    narrow(panels, cut);
  }

  void wide(int first_panel, int panels, int cut) {
    Label block = a_.newLabel(), done = a_.newLabel();
    a_.mov(scratch_, field(offsetof(Call, m)));
    a_.cmp(scratch_, kTileRows);
    a_.jbe(done);
    a_.mov(local(kRowsLeft), scratch_);
    a_.mov(a_row_, field(offsetof(Call, a)));
    a_.lea(c_row_, ptr(c_, first_panel * kTileRowBytes));
    if (tail_elements() != 0) {
      a_.mov(scratch_, field(offsetof(Call, workspace)));
      a_.add(scratch_, kTail);
      a_.mov(local(kTailRow), scratch_);
    }
    a_.mov(prefetch_, b_);
    add_constant(prefetch_, (first_panel + panels) * panel_bytes_);
    a_.mov(kb_[0], prefetch_);
    add_constant(kb_[0], panels * panel_bytes_);
    a_.mov(local(kPrefetchEnd), kb_[0]);

    a_.bind(block);
    a_.mov(scratch_, local(kRowsLeft));
    a_.sub(scratch_, kTileRows);
    a_.mov(counter_.r32(), kTileRows);
    a_.cmp(scratch_, counter_);
    a_.cmova(scratch_, counter_);
    a_.mov(local(kSecondRow), scratch_);
    a_.mov(ka0_, a_row_);
    a_.mov(ka1_, scratch_);
    a_.imul(ka1_, lda_);
    a_.add(ka1_, a_row_);
    a_.mov(kb_[0], b_);
    add_constant(kb_[0], first_panel * panel_bytes_);
    if (panels == 2) {
      a_.mov(kb_[1], kb_[0]);
      add_constant(kb_[1], panel_bytes_);
    }
    for (int i = 0; i < 2 * panels; ++i)
      a_.tilezero(sums(i));
    k_loop([&](int step) { wide_step(panels, lda_, step * kTileRowBytes, step * kTileBytes, true); },
           [&](int steps) {
             a_.add(ka0_, steps * kTileRowBytes);
             a_.add(ka1_, steps * kTileRowBytes);
             for (int p = 0; p < panels; ++p)
               a_.add(kb_[p], steps * kTileBytes);
           });
    if (tail_elements() != 0) {
      a_.mov(ka0_, local(kTailRow));
      a_.mov(ka1_, local(kSecondRow));
      a_.shl(ka1_, 6);
      a_.add(ka1_, ka0_);
      move_to_tail(panels);
      wide_step(panels, tile_stride_, 0, 0, false);
      a_.add(local(kTailRow), kWideRows * kTileRowBytes);
    }
    a_.mov(second_c_row_, local(kSecondRow));
    a_.imul(second_c_row_, ldc_bytes_);
    a_.add(second_c_row_, c_row_);
    for (int p = 0; p < panels; ++p) {
      store_sums(sums(p), c_row_, p, p == panels - 1 ? cut : 0, asmjit::Imm(kTileRows));
      store_sums(sums(panels + p), second_c_row_, p, p == panels - 1 ? cut : 0, asmjit::Imm(kTileRows));
    }
    a_.mov(scratch_, lda_);
    a_.shl(scratch_, 5);
    a_.add(a_row_, scratch_);
    a_.mov(scratch_, ldc_bytes_);
    a_.shl(scratch_, 5);
    a_.add(c_row_, scratch_);
    a_.sub(local(kRowsLeft), kWideRows);
    a_.cmp(local(kRowsLeft), kTileRows);
    a_.jg(block);
    a_.bind(done);
  }

  /// Each tile is loaded just before its first product, so that the products of one step overlap the loads of the next.
  void wide_step(int panels, Gp a_stride, int a_offset, int b_offset, bool prefetch) {
    load_b(tile_b(0), kb_[0], b_offset);
    load_a(tile_a(0), ka0_, a_stride, a_offset);
    a_.tdpbssd(sums(0), tile_a(0), tile_b(0));
    if (panels == 2) {
      load_b(tile_b(1), kb_[1], b_offset);
      a_.tdpbssd(sums(1), tile_a(0), tile_b(1));
    }
    load_a(tile_a(1), ka1_, a_stride, a_offset);
    a_.tdpbssd(sums(panels), tile_a(1), tile_b(0));
    if (panels == 2)
      a_.tdpbssd(sums(panels + 1), tile_a(1), tile_b(1));
    if (prefetch && tuning_.wide_prefetch != 0) {
      Label skip = a_.newLabel();
      a_.cmp(prefetch_, local(kPrefetchEnd));
      a_.jae(skip);
      for (int line = 0; line < tuning_.wide_prefetch; ++line)
        a_.prefetcht1(ptr(prefetch_, line * 64));
      a_.add(prefetch_, tuning_.wide_prefetch * 64);
      a_.bind(skip);
    }
  }

  void narrow(int panels, int cut) {
    Label done = a_.newLabel();
    a_.mov(ka0_, local(kNarrowRows));
    a_.test(ka0_, ka0_);
    a_.jz(done);
    a_.mov(ka0_, local(kNarrowFirst));
    a_.imul(ka0_, lda_);
    a_.add(ka0_, field(offsetof(Call, a)));
    a_.mov(kb_[0], b_);
    for (int p = 1; p < panels; ++p) {
      a_.mov(kb_[p], kb_[p - 1]);
      add_constant(kb_[p], panel_bytes_);
    }
    for (int p = 0; p < panels; ++p)
      a_.tilezero(sums(p));
    k_loop([&](int step) { narrow_step(panels, lda_, step * kTileRowBytes, step * kTileBytes, true); },
           [&](int steps) {
             a_.add(ka0_, steps * kTileRowBytes);
             for (int p = 0; p < panels; ++p)
               a_.add(kb_[p], steps * kTileBytes);
           });
    if (tail_elements() != 0) {
      a_.mov(ka0_, local(kNarrowFirst));
      a_.shl(ka0_, 6);
      a_.add(ka0_, field(offsetof(Call, workspace)));
      a_.add(ka0_, kTail);
      move_to_tail(panels);
      narrow_step(panels, tile_stride_, 0, 0, false);
    }
    a_.mov(c_row_, local(kNarrowFirst));
    a_.imul(c_row_, ldc_bytes_);
    a_.add(c_row_, c_);
    for (int p = 0; p < panels; ++p)
      store_sums(sums(p), c_row_, p, p == panels - 1 ? cut : 0, local(kNarrowRows));
    a_.bind(done);
  }

  void narrow_step(int panels, Gp a_stride, int a_offset, int b_offset, bool prefetch) {
    load_a(tile_a(0), ka0_, a_stride, a_offset);
    for (int p = 0; p < panels; ++p) {
      load_b(tile_b(p % 2), kb_[p], b_offset);
      a_.tdpbssd(sums(p), tile_a(0), tile_b(p % 2));
      if (prefetch && tuning_.narrow_prefetch != 0)
        for (int line = 0; line < kTileRows; ++line)
          a_.prefetcht1(ptr(kb_[p], b_offset + tuning_.narrow_prefetch + line * 64));
    }
  }

  void load_a(Tmm tile, Gp base, Gp stride, int offset) {
    const Mem rows = ptr(base, stride, 0, offset);
    if (tuning_.t1_a)
      a_.tileloaddt1(tile, rows);
    else
      a_.tileloadd(tile, rows);
  }

  void load_b(Tmm tile, Gp base, int offset) {
    const Mem rows = ptr(base, tile_stride_, 0, offset);
    if (tuning_.t1_b)
      a_.tileloaddt1(tile, rows);
    else
      a_.tileloadd(tile, rows);
  }

  /// From the end of the full steps to where the tail's product takes the panel.
  void move_to_tail(int panels) {
    const int back = static_cast<int>(k_ / kTileRowBytes * kTileBytes - tail_panel_offset());
    if (back != 0)
      for (int p = 0; p < panels; ++p)
        a_.sub(kb_[p], back);
  }

  template <class Step, class Advance> void k_loop(Step step, Advance advance) {
    const std::int64_t unrolled = tuning_.unroll, loops = full_steps() / unrolled;
    const int rest = static_cast<int>(full_steps() % unrolled);
    Label loop = a_.newLabel();
    if (loops > 1) {
      a_.mov(counter_, loops);
      a_.bind(loop);
    }
    if (loops > 0) {
      for (int i = 0; i < unrolled; ++i)
        step(i);
      advance(static_cast<int>(unrolled));
    }
    if (loops > 1) {
      a_.dec(counter_);
      a_.jnz(loop);
    }
    for (int i = 0; i < rest; ++i)
      step(i);
    if (rest > 0 && tail_elements() != 0)
      advance(rest);
  }

  void store_sums(Tmm tile, Gp row, int panel, int cut, const asmjit::Operand& rows) {
    if (cut == 0) {
      a_.tilestored(ptr(row, ldc_bytes_, 0, panel * kTileRowBytes), tile);
      return;
    }
    const Gp from = scratch_, to = ka0_, left = counter_;
    a_.mov(from, field(offsetof(Call, workspace)));
    a_.add(from, kStaging);
    a_.tilestored(ptr(from, tile_stride_), tile);
    a_.mov(to, row);
    a_.emit(asmjit::x86::Inst::kIdMov, left, rows);
    Label loop = a_.newLabel();
    a_.bind(loop);
    a_.vmovdqa32(asmjit::x86::zmm0, ptr(from));
    a_.k(asmjit::x86::k1).vmovdqu32(ptr(to, panel * kTileRowBytes), asmjit::x86::zmm0);
    a_.add(from, kTileRowBytes);
    a_.add(to, ldc_bytes_);
    a_.dec(left);
    a_.jnz(loop);
  }

  const std::int64_t m_class_, n_, k_;
  const amx::Tuning tuning_;
  const std::int64_t panel_bytes_;
  Assembler a_;

  static constexpr std::initializer_list<Gp> kSaved = {asmjit::x86::rbx, asmjit::x86::rbp, asmjit::x86::r12,
                                                       asmjit::x86::r13, asmjit::x86::r14, asmjit::x86::r15};
  const Gp call_ = asmjit::x86::rdi, lda_ = asmjit::x86::rsi, ldc_bytes_ = asmjit::x86::rdx, tile_stride_ = asmjit::x86::rcx;
  const Gp b_ = asmjit::x86::r8, c_ = asmjit::x86::r9;           ///< of the current group
  const Gp ka0_ = asmjit::x86::rbx, ka1_ = asmjit::x86::rbp;     ///< walk along K; A's second tile in wide blocks
  const Gp second_c_row_ = asmjit::x86::rbp;                     ///< after the K loop
  const Gp a_row_ = asmjit::x86::r11, c_row_ = asmjit::x86::r12; ///< of the current wide block
  const Gp prefetch_ = asmjit::x86::r10;
  const Gp kb_[kGroupPanels] = {asmjit::x86::r14, asmjit::x86::r15, asmjit::x86::r10, asmjit::x86::r11}; ///< two in wide blocks
  const Gp counter_ = asmjit::x86::r13, scratch_ = asmjit::x86::rax;
};

} // namespace

namespace amx {

Result<CodeObject> compile(const KernelDesc& desc, const Tuning& tuning) {
  return Emitter(desc.value[int8_mm::kM], desc.value[int8_mm::kN], desc.value[int8_mm::kK], tuning).emit();
}

} // namespace amx

Implementation int8_mm_amx() {
  Implementation row{};
  row.op = OpId::int8_mm;
  row.isa = IsaPath::amx;
  row.backend = BackendId::x86;
  row.generator = GeneratorId::asmjit;
  row.needs = Emitter::kNeeds;
  row.supports = [](const KernelDesc& desc, const Target&) -> Status {
    if (desc.value[int8_mm::kADtype] != static_cast<std::int64_t>(int8_mm::ADtype::s8))
      return Status::error(Code::unsupported, "int8_mm on amx: a_dtype=u8, allowed is s8");
    return {};
  };
  row.pack_layout = [](const KernelDesc&, const Target&) { return Emitter::kLayout.id(); };
  row.compile = [](const KernelDesc& desc, const Target&) { return amx::compile(desc, {}); };
  return row;
}

} // namespace kiln::x86
