#include <optional>

#include "backends/x86/int8_linear.h"
#include "backends/x86/int8_mm_nest.h"
#include "backends/x86/rows.h"

/// int8_mm with 512-bit vpdpbusd (u8 × s8 → s32, four products a lane, no saturation).
///
/// A becomes u8 by a flipped sign bit, which adds 128: the accumulators begin at −128·Σ_k b. A's rows are flipped once
/// per call into the workspace, at a stride that spreads them over the sets of L1 (rows 4096 bytes apart would share
/// one set), so that the K loop holds nothing but loads and vpdpbusd, and so that a remainder of K needs no step of its
/// own: the pack is zero beyond K. u8 elements are as they should be. With an epilogue the accumulators begin at its
/// offsets, which hold the −128·Σ_k b, and the pass over A sums up its rows where they are wanted.
namespace kiln::x86 {
namespace {

using namespace asmjit::x86;
using int8_mm::Call;
using int8_mm::PackLayout;

constexpr PackLayout kLayout{.n_block = 16, .k_block = 4};
constexpr Features kFeatures{Feature::avx512f, Feature::avx512bw, Feature::avx512vnni};

/// Epilogues store with masks on narrower vectors.
Features features_for(const KernelDesc& desc) {
  Features features = kFeatures;
  if (!int8_mm::Epilogue::of(desc).is_absent())
    features.add(Feature::avx512vl);
  return features;
}

/// A register tile of rows × panels vectors. What bounds it: two vpdpbusd a cycle of 4 to 5 cycles latency, so at least
/// ten accumulators; two loads a cycle, of which a step of K takes rows + panels; 32 registers.
struct Tile {
  int rows;   ///< at most
  int panels; ///< of 16 columns
  int sets;   ///< accumulators per element, for consecutive steps of K: hides latency where rows × panels is small
  int unroll; ///< steps of K in one turn of the loop, a multiple of sets
  int prefetch = 0; ///< bytes ahead in each panel, into L1; 0 for none
};

/// Weights beyond this come from L3 or memory on any core: its L2 is smaller.
constexpr std::int64_t kBeyondL2 = 2 << 20;

Tile tile_for(std::int64_t m_class, std::int64_t weight_bytes) {
  switch (m_class) {
  case 1:
    return {.rows = 1, .panels = 4, .sets = 2, .unroll = 4};
  case 2:
    return {.rows = 2, .panels = 4, .sets = 2, .unroll = 4};
  // Here arithmetic and memory take about as long as each other, and a prefetch gains: 3 % from L2 at a short distance,
  // 12 % from L3 at one that covers its latency (M = 3 and 4, weights of 1 and 16 MiB, Zen 5; each loses as much at the
  // other's). Where one of the two dominates, fewer rows or more, it costs up to 4 %.
  case 4:
    return {.rows = 4, .panels = 4, .sets = 1, .unroll = 2, .prefetch = weight_bytes > kBeyondL2 ? 2048 : 384};
  case 8:
    return {.rows = 8, .panels = 2, .sets = 1, .unroll = 1};
  // 12 and 14 rows measured the same.
  default:
    return {.rows = 13, .panels = 2, .sets = 1, .unroll = 1};
  }
}

class Path {
public:
  Path(Assembler& assembler, const NestShape& shape, const Tile& tile, const int8_mm::Epilogue& epilogue,
       EpilogueEmitter* emitter)
      : a_(assembler), shape_(shape), tile_(tile), a_is_u8_(epilogue.a_dtype == int8_mm::ADtype::u8), emitter_(emitter),
        lanes_(assembler.newLabel()) {}

  void convert_rows() {
    const Gp call = rdi, row = rax, lda = rcx, rows_left = rdx, out = rsi, k = r8, mask = r9, row_zp = r10, zp = r11;
    const std::int64_t whole = shape_.k / 64 * 64, rest = shape_.k % 64;
    const Zmm flip = zmm0, bytes = zmm1, sum = zmm2, ones = zmm3;
    const asmjit::Label next_row = a_.newLabel(), next_chunk = a_.newLabel();
    if (emitter_ != nullptr) {
      a_.mov(out, ptr(call, offsetof(Call, workspace)));
      emitter_->prepare_shared(call, out);
    }
    if (shape_.k == 0 && !shape_.has_row_values())
      return;
    if (!a_is_u8_) {
      a_.mov(mask.r32(), 0x80808080);
      a_.vpbroadcastd(flip, mask.r32());
    }
    if (shape_.row_sums) {
      a_.mov(mask.r32(), 0x01010101);
      a_.vpbroadcastd(ones, mask.r32());
    }
    if (shape_.row_zp)
      a_.mov(row_zp, ptr(call, offsetof(Call, a_zp)));
    const auto add_up = [&] { // before the sign bits are flipped
      if (!shape_.row_sums)
        return;
      if (a_is_u8_)
        a_.vpdpbusd(sum, bytes, ones);
      else
        a_.vpdpbusd(sum, ones, bytes);
    };
    if (rest > 0) {
      a_.mov(mask, (std::uint64_t{1} << rest) - 1);
      a_.kmovq(k1, mask);
    }
    a_.mov(row, ptr(call, offsetof(Call, a)));
    a_.mov(lda, ptr(call, offsetof(Call, lda)));
    a_.mov(rows_left, ptr(call, offsetof(Call, m)));
    a_.mov(out, ptr(call, offsetof(Call, workspace)));
    if (shape_.scratch_bytes > 0)
      a_.add(out, shape_.scratch_bytes);
    a_.bind(next_row);
    if (shape_.row_sums)
      a_.vpxord(sum, sum, sum);
    if (whole > 0) {
      a_.xor_(k.r32(), k.r32());
      a_.bind(next_chunk);
      if (shape_.row_sums || a_is_u8_) {
        a_.vmovdqu64(bytes, ptr(row, k));
        add_up();
        if (!a_is_u8_)
          a_.vpxord(bytes, bytes, flip);
      } else {
        a_.vpxord(bytes, flip, ptr(row, k));
      }
      a_.vmovdqu64(ptr(out, k), bytes);
      a_.add(k, 64);
      a_.cmp(k, whole);
      a_.jl(next_chunk);
    }
    if (rest > 0) {
      a_.k(k1).z().vmovdqu8(bytes, ptr(row, whole));
      add_up();
      if (!a_is_u8_)
        a_.vpxord(bytes, bytes, flip);
      a_.vmovdqu64(ptr(out, whole), bytes);
    }
    if (shape_.row_sums) {
      const Ymm half = ymm4;
      const Xmm quarter = xmm4;
      a_.vextracti64x4(half, sum, 1);
      a_.vpaddd(Ymm(sum.id()), Ymm(sum.id()), half);
      a_.vextracti128(quarter, Ymm(sum.id()), 1);
      a_.vpaddd(Xmm(sum.id()), Xmm(sum.id()), quarter);
      for (const int other : {0b01'00'11'10, 0b10'11'00'01}) {
        a_.vpshufd(quarter, Xmm(sum.id()), other);
        a_.vpaddd(Xmm(sum.id()), Xmm(sum.id()), quarter);
      }
      a_.vmovd(ptr(out, shape_.row_sum_at()), Xmm(sum.id()));
    }
    if (shape_.row_zp) {
      a_.mov(zp.r32(), ptr(row_zp));
      a_.mov(ptr(out, shape_.row_zp_at()), zp.r32());
      a_.add(row_zp, 4);
    }
    a_.add(row, lda);
    a_.add(out, shape_.row_stride);
    a_.dec(rows_left);
    a_.jnz(next_row);
  }

  void set_mask(int p, const Gp& columns) {
    const Zmm left = bytes_of_a();
    a_.vpbroadcastd(left, columns.r32());
    a_.vpcmpd(mask(p), left, ptr(lanes_), VCmpImm::kGT_OS);
  }

  void prepare_columns(int p, const Gp& terms) {
    emitter_->prepare_columns(p, terms, 0, 4 * kLayout.n_block, role::c_row);
  }

  void begin_row_tile() {
    const int rows = shape_.heights.max;
    if (emitter_ != nullptr) {
      for (int p = 0; p < tile_.panels; ++p) {
        emitter_->load_offsets(acc(rows - 1, p), p, role::scratch);
        for (int row = 0; row + 1 < rows; ++row)
          a_.vmovdqa64(acc(row, p), acc(rows - 1, p));
      }
      return;
    }
    const Zmm zero = bytes_of_a();
    a_.vpxor(Xmm(zero.id()), Xmm(zero.id()), Xmm(zero.id()));
    for (int p = 0; p < tile_.panels; ++p) {
      const Zmm first = acc(rows - 1, p);
      a_.k(mask(p)).z().vmovdqu32(first, columns_at(role::b_sums, p));
      a_.vpslld(first, first, 7);
      a_.vpsubd(first, zero, first);
      for (int row = 0; row + 1 < rows; ++row)
        a_.vmovdqa64(acc(row, p), first);
    }
  }

  void begin_k(int height) {
    for (int set = 1; set < tile_.sets; ++set)
      for (int row = shape_.heights.max - height; row < shape_.heights.max; ++row)
        for (int p = 0; p < tile_.panels; ++p)
          a_.vpxord(acc(row, p, set), acc(row, p, set), acc(row, p, set));
  }

  void step(int height, int index) {
    const int first = shape_.heights.max - height, set = index % tile_.sets;
    for (int p = 0; p < tile_.panels; ++p) {
      if (height > 1) // one row reads the panel where it multiplies
        a_.vmovdqu64(b(p), panel_at(p, 64 * index));
      if (tile_.prefetch > 0)
        a_.prefetcht0(panel_at(p, 64 * index + tile_.prefetch));
    }
    for (int row = first; row < shape_.heights.max; ++row) {
      a_.vpbroadcastd(bytes_of_a(), ptr(role::a_k, static_cast<int>((row - first) * shape_.row_stride) + 4 * index));
      for (int p = 0; p < tile_.panels; ++p)
        if (height > 1)
          a_.vpdpbusd(acc(row, p, set), bytes_of_a(), b(p));
        else
          a_.vpdpbusd(acc(row, p, set), bytes_of_a(), panel_at(p, 64 * index));
    }
  }

  void end_k(int height) {
    for (int set = 1; set < tile_.sets; ++set)
      for (int row = shape_.heights.max - height; row < shape_.heights.max; ++row)
        for (int p = 0; p < tile_.panels; ++p)
          a_.vpaddd(acc(row, p), acc(row, p), acc(row, p, set));
  }

  void store_row(int row) {
    if (emitter_ != nullptr) {
      const int row_at = (row - shape_.heights.max) * static_cast<int>(shape_.row_stride); // a_tile is behind the tile
      for (int p = 0; p < tile_.panels; ++p) {
        emitter_->apply(acc(row, p), p, role::scratch, ptr(role::a_tile, row_at + shape_.row_zp_at()),
                        ptr(role::a_tile, row_at + shape_.row_sum_at()));
        emitter_->store(acc(row, p), columns_at(role::c_row, p), mask(p));
      }
      return;
    }
    for (int p = 0; p < tile_.panels; ++p)
      a_.k(mask(p)).vmovdqu32(columns_at(role::c_row, p), acc(row, p));
  }

  void stage_row(int row) {
    for (int p = 0; p < tile_.panels; ++p)
      a_.vmovdqa64(ptr(role::scratch, shape_.staging_at + row * shape_.staged_row_bytes() + 64 * p), acc(row, p));
  }

  void finish_row() {
    for (int p = 0; p < tile_.panels; ++p) // B's and A's registers are the epilogue's between steps
      a_.vmovdqa64(staged(p), ptr(role::finish_scratch, role::staged, 0, shape_.staging_at + 64 * p));
    for (int p = 0; p < tile_.panels; ++p) {
      emitter_->apply(staged(p), p, role::finish_scratch, ptr(role::staged_a, shape_.row_zp_at()),
                      ptr(role::staged_a, shape_.row_sum_at()));
      emitter_->store(staged(p), columns_at(role::c_row, p), mask(p));
    }
  }

  void data() {
    if (emitter_ != nullptr)
      emitter_->emit_rare_paths();
    a_.align(asmjit::AlignMode::kZero, 64);
    a_.bind(lanes_);
    for (std::int32_t lane = 0; lane < 16; ++lane)
      a_.embedInt32(lane);
  }

protected:
  Zmm acc(int row, int panel, int set = 0) const {
    return Zmm((set * shape_.heights.max + row) * tile_.panels + panel);
  }
  Zmm staged(int panel) const { return Zmm(tile_.sets * shape_.heights.max * tile_.panels + panel); }
  Zmm b(int panel) const { return Zmm(31 - panel); }
  Zmm bytes_of_a() const { return Zmm(31 - tile_.panels); }
  static KReg mask(int panel) { return KReg(1 + panel); }

  Assembler& a_;
  const NestShape& shape_;
  const Tile& tile_;
  const bool a_is_u8_;
  EpilogueEmitter* const emitter_; ///< null: no epilogue
  asmjit::Label lanes_;            ///< s32 0 … 15
};

NestShape shape_for(const Tile& tile, std::int64_t m_class, std::int64_t k) {
  const int8_mm::Heights heights = int8_mm::heights_for(m_class, 1, tile.rows);
  return {.heights = heights,
          .panels = tile.panels,
          .layout = kLayout,
          .k = k,
          .row_stride = workspace_row_stride(k),
          .row_step = 4,
          .unroll = tile.unroll,
          .streams = heights.single_tile,
          .ahead = !heights.single_tile};
}

// No row tile has more than 28 accumulators, and B and A are done with.
constexpr std::uint32_t kTemps[] = {29, 30, 31};

Result<CodeObject> compile(const KernelDesc& desc, const Target&, std::string_view) {
  const std::int64_t m_class = desc.value[int8_mm::kM], k = desc.value[int8_mm::kK];
  const Tile tile = tile_for(m_class, desc.value[int8_mm::kN] * k);
  NestShape shape = shape_for(tile, m_class, k);
  Assembler a;
  const int8_mm::Epilogue epilogue = int8_mm::Epilogue::of(desc);
  std::optional<EpilogueEmitter> emitter;
  if (!epilogue.is_absent()) {
    emitter.emplace(a, epilogue, 64, tile.panels, kTemps[0], kTemps[1], kTemps[2]);
    shape.add_epilogue(epilogue, emitter->scratch_bytes());
    shape.defer_epilogue();
  }
  Path path(a, shape, tile, epilogue, emitter ? &*emitter : nullptr);
  emit_nest(a, shape, path);
  const bool flips = epilogue.a_dtype == int8_mm::ADtype::s8;
  int8_mm::Plan plan{.layout = kLayout,
                     .m_step = 1, // heights adapt to any cut
                     .n_step = shape.columns(),
                     .workspace_fixed = 64 + shape.scratch_bytes, // the last row's copy ends in whole vectors
                     .workspace_per_row = shape.row_stride};
  if (emitter && flips)
    plan.a_shift = 128;
  return a.finish(features_for(desc), plan.values());
}

Features linear_features(const KernelDesc&, const Target&) {
  Features features = kFeatures;
  features.add(Feature::avx512vl);
  return features;
}

Result<CodeObject> compile_linear(const KernelDesc& desc, const Target& target, std::string_view) {
  const std::int64_t m_class = desc.value[int8_linear::kM], k = desc.value[int8_linear::kK];
  const Tile tile = tile_for(m_class, desc.value[int8_linear::kN] * k);
  NestShape shape = shape_for(tile, m_class, k);
  constexpr auto form = QuantisedRows::Form::u8;
  Assembler a;
  EpilogueEmitter emitter(a, desc, 64, tile.panels, kTemps[0], kTemps[1], kTemps[2]);
  add_linear(shape, desc, emitter.scratch_bytes());
  shape.defer_epilogue();
  emit_quantiser_512(a, {.form = form, .x = int8_linear::x_of(desc), .k = k, .row_stride = shape.row_stride});
  LinearPath<Path> path(a, shape, tile, int8_mm::Epilogue(), &emitter);
  emit_nest(a, shape, path);
  return a.finish(linear_features(desc, target), linear_plan(shape, form).values());
}

} // namespace

Implementation int8_linear_avx512vnni() {
  return linear_row(
      IsaPath::avx512vnni, kFeatures, linear_features, [](const KernelDesc&, const Target&) { return kLayout.id(); },
      compile_linear);
}

Implementation int8_mm_avx512vnni() {
  Implementation row = nest_row(
      IsaPath::avx512vnni, kFeatures, [](const KernelDesc&, const Target&) { return kLayout.id(); }, compile);
  row.uses = [](const KernelDesc& desc, const Target&) { return features_for(desc); };
  return row;
}

} // namespace kiln::x86
