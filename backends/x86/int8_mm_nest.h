#pragma once
#include <cstddef>
#include <cstdint>
#include <vector>

#include "backends/x86/emit.h"
#include "backends/x86/epilogue.h"
#include "jit/implementation.h"
#include "jit/ops/int8_mm_tiles.h"

/// The loops around a register tile, common to the vector paths of int8_mm: A's rows are brought into the workspace
/// once, then for each column tile every row tile runs through K. A column tile of B is thus read from memory once and
/// is in L2 for the row tiles after the first.
///
/// The panels of a column tile lie side by side, or apart: then the panels of a call are split into as many streams as
/// a column tile has panels, and tile j takes panel j of each. Each stream is one contiguous walk through memory, which
/// prefetchers follow from panel to panel, and several such walks read faster than one. Few rows gain by it; with many,
/// the stores to C fall too often into one set of L1.
namespace kiln::x86 {

/// Bytes from one row to the next in the workspace, for rows of `bytes`: an odd number of lines, so that rows fall into
/// different sets of L1, and one step of K more, so that in a tile of rows at most one goes on to a new line in each
/// step (+1 % at K = 4096 on Zen 5).
std::int64_t workspace_row_stride(std::int64_t bytes);

/// The largest K of the nest: a tile of rows is addressed by 32-bit displacements.
inline constexpr std::int64_t kNestMaxK = std::int64_t{1} << 26;

/// What the nest can serve: a tile of rows is addressed by 32-bit displacements.
Status supports_nest(const KernelDesc& desc, const Target& target);

/// A row of the implementation table, but for what differs between the nest's paths.
Implementation nest_row(IsaPath isa, Features needs, std::string (*pack_layout)(const KernelDesc&, const Target&),
                        Result<CodeObject> (*compile)(const KernelDesc&, const Target&, std::string_view));

struct NestShape {
  int8_mm::Heights heights;
  int panels = 1; ///< of layout.n_block columns in a column tile: 1, 2, or with single tiles 4
  int8_mm::PackLayout layout;
  std::int64_t k = 0;
  std::int64_t row_stride = 0; ///< bytes of a row of A in the workspace
  int row_step = 4;            ///< bytes of A in the workspace that one step of K reads
  int unroll = 1;              ///< steps of K in one turn of the loop
  bool streams = false;        ///< the panels of a column tile lie apart
  bool ahead = false; ///< fetch a panel of the next column tile into L2 during each of the first row tiles; one or two
                      ///< panels, not single tiles

  /// With an epilogue; the workspace then begins with its scratch memory, and each row ends with its own values: a_zp
  /// and the sum of its elements, as far as they take part.
  int c_bytes = 4;
  int terms = 0; ///< arrays of its terms; 0: no epilogue
  int scratch_bytes = 0;
  bool row_zp = false, row_sums = false;
  /// Where in the Call a pointer to the scratch memory is, when the rows of `workspace` are there already, without
  /// scratch memory before them; 0: they are not.
  int scratch_field = 0;

  /// Where in the scratch memory finished sums wait for the epilogue, which then runs row by row between the steps of
  /// the next row tile's K loop, on pipes that multiplication leaves idle; 0: it follows the K loop at once.
  int staging_at = 0;
  bool defers() const { return staging_at > 0; }
  int staged_row_bytes() const { return panels * layout.n_block * 4; }
  /// When there are rows to wait for, and steps enough to finish one between two of them.
  void defer_epilogue() {
    if (terms == 0 || heights.single_tile || steps() / unroll < heights.max)
      return;
    staging_at = scratch_bytes;
    scratch_bytes += heights.max * staged_row_bytes();
  }

  /// Where a row's values lie, from its first byte.
  int row_sum_at() const { return static_cast<int>(row_stride) - 4; }
  int row_zp_at() const { return static_cast<int>(row_stride) - (row_sums ? 8 : 4); }
  bool has_row_values() const { return row_zp || row_sums; }
  int terms_panel_bytes() const { return 4 * terms * layout.n_block; }
  /// Takes from the epilogue what the loops must know; `row_stride` is that without one.
  void add_epilogue(const int8_mm::Epilogue& epilogue, int epilogue_scratch_bytes);

  std::int64_t steps() const { return (k + layout.k_block - 1) / layout.k_block; }
  int step_bytes() const { return layout.n_block * layout.k_block; }
  int columns() const { return panels * layout.n_block; }
  /// Panels from one column tile to the next.
  int advance() const { return streams ? 1 : panels; }
};

/// Register roles of the nest (System V; rdi holds the Call on entry).
namespace role {
using namespace asmjit::x86;
inline constexpr Gp b = rsi;              ///< the column tile's panel in the first stream
inline constexpr Gp b_sums = rcx;         ///< of its first column; with an epilogue the terms of its first panel
inline constexpr Gp c = rdx;              ///< its row 0
inline constexpr Gp n_left = r8;          ///< columns from here to the end of the call
inline constexpr Gp ldc = r9;             ///< bytes
inline constexpr Gp a_tile = r10;         ///< the row tile's first row in the workspace
inline constexpr Gp c_row = r11;          ///< the next row of C to store
inline constexpr Gp a_k = rdi, b_k = rbx; ///< running along K; free outside the K loop
inline constexpr Gp turns = rax;          ///< of the K loop, left; free outside it
inline constexpr Gp stream[3] = {
    r12, r13, r14}; ///< from b to the tile's panel in stream 1, 2, 3, or to that of the last stream that has one
inline constexpr Gp stream_columns = rbp;   ///< bytes of C, and of b_sums, from one stream's first column to the next's
inline constexpr Gp stream_columns_3 = r15; ///< three times that, with four panels
inline constexpr Gp tiles_left = r15;       ///< row tiles, unless single
inline constexpr Gp ahead = r13, ahead_step = r14; ///< next line to fetch
inline constexpr Gp scratch = rdi;                 ///< the epilogue's, outside the K loop (load_scratch)
// While staged rows are finished (Nest::begin_finishing):
inline constexpr Gp finish_scratch = rcx; ///< the epilogue's
inline constexpr Gp staged = rdx;         ///< bytes from the first staged row to the next to finish
inline constexpr Gp staged_a = r8;        ///< that row in the workspace
inline constexpr Gp chunks = r15;         ///< left of the K loop
inline constexpr std::initializer_list<Gp> saved = {rbx, rbp, r12, r13, r14, r15};
} // namespace role

/// Panel `p` of the column tile, `displacement` bytes from b_k.
asmjit::x86::Mem panel_at(int p, int displacement);
/// What belongs to the first column of panel `p`, for a `base` that does to that of panel 0: b_sums or a row of C.
asmjit::x86::Mem columns_at(const asmjit::x86::Gp& base, int p, int displacement = 0);

/// Emits the loops. `Path` gives what differs, in the order it is emitted:
///   void convert_rows();               A → workspace; every register is its own to use, rdi is the Call
///   void set_mask(int p, Gp columns);  panel p has so many columns left (s32, may be ≤ 0 or > n_block)
///   void begin_row_tile();             accumulators of every row of the tallest tile begin; rax is free
///   void begin_k(int height);
///   void step(int height, int index);  step `index` of a turn: rows max − height … max − 1 of the accumulators
///   void end_k(int height);
///   void store_row(int row);           accumulator row `row` to c_row
///   void data();                       constants, behind the code
/// With an epilogue also, and begin_row_tile and store_row then find role::scratch loaded:
///   void prepare_columns(int p, Gp terms);  those of panel p; rax and every vector register are free
/// And if shape.defers(), which a path without these must not:
///   void stage_row(int row);  accumulator row `row` to its place in staging, from role::scratch
///   void finish_row();        row role::staged to c_row; between steps, so that accumulators keep their values
template <class Path> void emit_nest(Assembler& a, const NestShape& shape, Path& path);

/// Parts of emit_nest that do not depend on the path.
class Nest {
public:
  Nest(Assembler& assembler, const NestShape& shape);
  void begin();
  void split_rows();     ///< how many tiles of which height, and where their code is
  void load_arguments(); ///< from the Call to the roles
  void begin_column_tile();
  void begin_preparing(); ///< the terms of panel 0 to rdi, the scratch memory to role::c_row
  void prepare_next();    ///< the terms of the next panel
  void end_preparing();
  void load_scratch();
  void dispatch(); ///< to the K loop of this row tile's height
  // With staging:
  void begin_finishing(); ///< the roles of finishing take their registers,
  void end_finishing();   ///< and give them back
  void is_finished();     ///< sets the flags: equal when no row is left
  void next_staged_row();
  void stage(int height); ///< notes that a tile of this height is staged, 0 for none
  void end_row_tile();
  void end_column_tile();
  void end();
  void data();

  asmjit::Label row_tile;            ///< start of the row loop
  std::vector<asmjit::Label> k_loop; ///< by height − heights.min
  std::vector<asmjit::Label> store;  ///< likewise: the first row to store

private:
  Assembler& a_;
  const NestShape& shape_;
  asmjit::Label column_tile_, table_;
};

template <class Path> void emit_nest(Assembler& a, const NestShape& shape, Path& path) {
  namespace x86 = asmjit::x86;
  const auto [min, max, single_tile] = shape.heights;
  Nest nest(a, shape);
  constexpr bool can_defer = requires {
    path.finish_row();
  };
  const auto finish_row = [&] {
    if constexpr (can_defer) {
      path.finish_row();
      nest.next_staged_row();
    }
  };
  nest.begin();
  path.convert_rows();
  nest.split_rows();
  nest.load_arguments();
  nest.begin_column_tile();
  for (int p = 0; p < shape.panels; ++p) {
    path.set_mask(p, x86::rax);
    if (p + 1 < shape.panels)
      a.sub(x86::rax, x86::rbx);
  }
  if (shape.terms > 0) {
    nest.begin_preparing();
    for (int p = 0; p < shape.panels; ++p) {
      if (p > 0)
        nest.prepare_next();
      path.prepare_columns(p, x86::rdi);
    }
    nest.end_preparing();
  }
  a.bind(nest.row_tile);
  if (shape.terms > 0)
    nest.load_scratch();
  path.begin_row_tile();
  nest.dispatch();

  for (int height = min; height <= max; ++height) {
    a.bind(nest.k_loop[height - min]);
    a.mov(role::a_k, role::a_tile);
    a.mov(role::b_k, role::b);
    path.begin_k(height);
    const std::int64_t turns = shape.steps() / shape.unroll;
    if (turns > 0) {
      const asmjit::Label turn = a.newLabel(), chunk = a.newLabel(), finished = a.newLabel();
      if (shape.defers()) {
        nest.begin_finishing();
        a.mov(role::chunks.r32(), max);
        a.mov(role::turns.r32(), turns / max + turns % max);
        a.bind(chunk);
        nest.is_finished();
        a.je(finished);
        finish_row();
        a.bind(finished);
      } else {
        a.mov(role::turns.r32(), turns);
      }
      a.align(asmjit::AlignMode::kCode, 32);
      a.bind(turn);
      for (int index = 0; index < shape.unroll; ++index)
        path.step(height, index);
      if (shape.ahead) {
        a.prefetcht1(x86::ptr(role::ahead));
        a.add(role::ahead, role::ahead_step);
      }
      a.add(role::a_k, shape.row_step * shape.unroll);
      a.add(role::b_k, shape.step_bytes() * shape.unroll);
      a.dec(role::turns.r32());
      a.jnz(turn);
      if (shape.defers()) {
        a.mov(role::turns.r32(), turns / max);
        a.dec(role::chunks.r32());
        a.jnz(chunk);
        nest.end_finishing();
      }
    }
    for (int index = 0; index < shape.steps() % shape.unroll; ++index)
      path.step(height, index);
    path.end_k(height);
    if (shape.defers())
      nest.stage(height);
    if (!single_tile || shape.has_row_values()) // those are then at fixed distances for every height
      a.add(role::a_tile, height * shape.row_stride);
    if (shape.terms > 0)
      nest.load_scratch();
    if (height < max)
      a.jmp(nest.store[height - min]);
  }
  for (int row = 0; row < max; ++row) {
    if (max - row >= min)
      a.bind(nest.store[max - row - min]);
    if constexpr (can_defer)
      if (shape.defers()) {
        path.stage_row(row);
        continue;
      }
    path.store_row(row);
    if (row + 1 < max || !single_tile)
      a.add(role::c_row, role::ldc);
  }
  nest.end_row_tile();
  if (shape.defers()) {
    const asmjit::Label row = a.newLabel();
    nest.begin_finishing();
    a.bind(row);
    finish_row();
    nest.is_finished();
    a.jne(row);
    nest.end_finishing();
    nest.stage(0);
  }
  nest.end_column_tile();
  nest.end();
  nest.data();
  path.data();
}

} // namespace kiln::x86
