#pragma once
#include <optional>
#include <vector>

#include "backends/x86/int8_linear.h"
#include "backends/x86/int8_mm_nest.h"

/// What the two 256-bit paths of int8_mm share: a tile of rows × one panel of 16 columns in 16 registers, and its
/// stores.
namespace kiln::x86 {

/// What bounds the tile: 16 registers, of which 12 hold 6 × 16 sums, 2 the panel, 1 the broadcast of A and 1 a product.
struct VexTile {
  int rows;   ///< at most
  int sets;   ///< accumulators per element, for consecutive steps of K: hides latency where there are few rows
  int unroll; ///< steps of K in one turn of the loop, a multiple of sets
};
VexTile vex_tile_for(std::int64_t m_class);

/// The rows of A, `width` bytes at a time: for each row, whole chunks in a loop, then one that ends at K and overlaps
/// the last (every byte read is A's, and the bytes written twice are the same), or, when K is below `width`, pieces of
/// 8, 4, 2 and 1. `convert(from, to, width, offset)` emits one chunk of `width` elements: those at `from` + offset, to
/// `to` + offset · out_scale; rax and rbx are its own to use. `finish` emits what else a row takes, from `row` to
/// `out`; rax, rbx and those that `convert` is given are its own.
template <class Convert, class Finish>
void emit_rows(Assembler& a, const NestShape& shape, int width, int out_scale, Convert convert, Finish finish);

/// Registers of emit_rows.
namespace rows_role {
using namespace asmjit::x86;
inline constexpr Gp call = rdi, row = rsi, out = rdx, lda = rcx, rows_left = r8, from = r9, to = r10, chunks = r11,
                    row_zp = r12;
} // namespace rows_role

/// The hooks of emit_nest that are the same on both paths.
class VexPath {
public:
  VexPath(Assembler& assembler, const NestShape& shape, const VexTile& tile, const int8_mm::Epilogue& epilogue,
          EpilogueEmitter* emitter);

  void set_mask(int, const asmjit::x86::Gp&) {} // made where a row is stored: no register is free before
  void prepare_columns(int p, const asmjit::x86::Gp& terms);
  void begin_k(int height);
  void end_k(int height);
  void store_row(int row);
  void data();

protected:
  /// What comes before the rows are converted: the epilogue's shared values.
  void begin_rows();
  /// emit_rows's `finish`: the row's own values. Clobbers ymm2 … ymm5.
  void finish_row();
  /// The accumulators begin at the epilogue's offsets; false without one.
  bool begin_at_offsets();
  asmjit::x86::Ymm acc(int row, int half, int set = 0) const;
  static asmjit::x86::Ymm b(int half) { return asmjit::x86::Ymm(12 + half); }
  static asmjit::x86::Ymm broadcast() { return asmjit::x86::ymm14; }
  static asmjit::x86::Ymm product() { return asmjit::x86::ymm15; }

  Assembler& a_;
  const NestShape& shape_;
  const VexTile& tile_;
  const bool a_is_u8_;
  EpilogueEmitter* const emitter_; ///< null: no epilogue

private:
  void sum_row();
  struct Partial {
    asmjit::Label begin, end;
    int row;
  };
  std::vector<Partial> partial_; ///< stores of panels with fewer than 16 columns, emitted out of the way
  asmjit::Label lanes_;          ///< s32 0 … 15
  asmjit::Label byte_mask_;      ///< 32 bytes of 0, 32 of 255
};

template <class Convert, class Finish>
void emit_rows(Assembler& a, const NestShape& shape, int width, int out_scale, Convert convert, Finish finish) {
  namespace x86 = asmjit::x86;
  using int8_mm::Call;
  using namespace rows_role;
  const std::int64_t k = shape.k;
  if (k == 0 && !shape.has_row_values())
    return;
  const asmjit::Label next_row = a.newLabel(), next_chunk = a.newLabel();
  a.mov(row, x86::ptr(call, offsetof(Call, a)));
  a.mov(lda, x86::ptr(call, offsetof(Call, lda)));
  a.mov(rows_left, x86::ptr(call, offsetof(Call, m)));
  a.mov(out, x86::ptr(call, offsetof(Call, workspace)));
  if (shape.scratch_bytes > 0)
    a.add(out, shape.scratch_bytes);
  if (shape.row_zp)
    a.mov(row_zp, x86::ptr(call, offsetof(Call, a_zp)));
  a.bind(next_row);
  if (k >= width) {
    a.mov(from, row);
    a.mov(to, out);
    a.mov(chunks.r32(), k / width);
    a.bind(next_chunk);
    convert(from, to, width, 0);
    a.add(from, width);
    a.add(to, width * out_scale);
    a.dec(chunks.r32());
    a.jnz(next_chunk);
    if (k % width != 0)
      convert(row, out, width, k - width);
  } else {
    std::int64_t offset = 0;
    for (int piece = width / 2; piece > 0; piece /= 2)
      if ((k & piece) != 0) {
        convert(row, out, piece, offset);
        offset += piece;
      }
  }
  finish();
  a.add(row, lda);
  a.add(out, shape.row_stride);
  a.dec(rows_left);
  a.jnz(next_row);
}

NestShape vex_shape_for(const VexTile& tile, std::int64_t m_class, int8_mm::PackLayout layout, std::int64_t k,
                        int bytes_per_element);

/// For an EpilogueEmitter: the vectors of a panel, the registers of A and B, and a line of scratch memory for the
/// columns that N cuts.
inline constexpr int kVexVectors = 2, kVexLine = 64;
inline constexpr std::uint32_t kVexTemps[] = {12, 13, 14};

/// What the code uses: f16 outputs need more than the path does.
Features vex_features(Features path, const KernelDesc& desc);

/// What `compile` of a 256-bit path does, given its class of hooks and the bytes that an element of A takes in the
/// workspace, and whether it flips the sign bits of s8.
template <class Path>
Result<CodeObject> compile_vex(const KernelDesc& desc, int8_mm::PackLayout layout, Features features,
                               int bytes_per_element, bool flips) {
  const std::int64_t m_class = desc.value[int8_mm::kM], k = desc.value[int8_mm::kK];
  const VexTile tile = vex_tile_for(m_class);
  NestShape shape = vex_shape_for(tile, m_class, layout, k, bytes_per_element);
  Assembler a;
  const int8_mm::Epilogue epilogue = int8_mm::Epilogue::of(desc);
  std::optional<EpilogueEmitter> emitter;
  if (!epilogue.is_absent()) {
    emitter.emplace(a, epilogue, 32, kVexVectors, kVexTemps[0], kVexTemps[1], kVexTemps[2]);
    shape.add_epilogue(epilogue, emitter->scratch_bytes() + kVexLine);
  }
  Path path(a, shape, tile, epilogue, emitter ? &*emitter : nullptr);
  emit_nest(a, shape, path);
  int8_mm::Plan plan{.layout = layout,
                     .m_step = 1, // heights adapt to any cut
                     .n_step = shape.columns(),
                     .workspace_fixed = shape.scratch_bytes,
                     .workspace_per_row = shape.row_stride};
  if (emitter && flips && epilogue.a_dtype == int8_mm::ADtype::s8)
    plan.a_shift = 128;
  return a.finish(vex_features(features, desc), plan.values());
}

/// What int8_linear needs and its code uses beside the path's own.
Features linear_vex_features(Features path, const KernelDesc& desc);

/// Likewise of int8_linear, for rows of this form.
template <class Path>
Result<CodeObject> compile_linear_vex(const KernelDesc& desc, int8_mm::PackLayout layout, Features features,
                                      QuantisedRows::Form form) {
  const std::int64_t m_class = desc.value[int8_linear::kM], k = desc.value[int8_linear::kK];
  const VexTile tile = vex_tile_for(m_class);
  NestShape shape = vex_shape_for(tile, m_class, layout, k, form == QuantisedRows::Form::u8 ? 1 : 2);
  Assembler a;
  EpilogueEmitter emitter(a, desc, 32, kVexVectors, kVexTemps[0], kVexTemps[1], kVexTemps[2]);
  add_linear(shape, desc, emitter.scratch_bytes() + kVexLine);
  emit_quantiser_256(a, {.form = form, .x = int8_linear::x_of(desc), .k = k, .row_stride = shape.row_stride});
  LinearPath<Path> path(a, shape, tile, int8_mm::Epilogue(), &emitter);
  emit_nest(a, shape, path);
  return a.finish(linear_vex_features(features, desc), linear_plan(shape, form).values());
}

} // namespace kiln::x86
