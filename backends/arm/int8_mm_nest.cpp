#include "backends/arm/int8_mm_nest.h"

#include "backends/arm/int8_linear.h"

#include <algorithm>
#include <bit>
#include <cstddef>

#include <arm_generator_id.h>
#include <fmt/format.h>

namespace kiln::arm {

using namespace asmjit::a64;
using asmjit::Label;
using int8_mm::Call;

namespace {

// Roles that only the nest itself knows, beside those of the header. x18 belongs to the platform.
constexpr GpX call = x0;
constexpr GpX b = x1;             // the column tile's first byte
constexpr GpX c = x2;             // the column tile's row 0
constexpr GpX n_left = x3;        // columns from here to the end of the call
constexpr GpX ldc = x4;           // bytes
constexpr GpX a_tile = x5;        // the row tile in the workspace
constexpr GpX rows_left = x7;     // from this row tile on, where units are pairs
constexpr GpX turns = x9;         // of the K loop, left
constexpr GpX height = x15;       // of the row tile, units
constexpr GpX tiles_left = x17;   // row tiles
constexpr GpX tiles = x19;        // of the call
constexpr GpX short_tiles = x20;  // of them, the last ones, are one unit lower
constexpr GpX short_height = x21; // units; the only height with single tiles
constexpr GpX workspace = x22;    // of the call
constexpr GpX slices_left = x24;  // of the panel
constexpr GpX m = x25;            // of the call
constexpr GpX pair_rows = x26;    // rows of the tile, where units are pairs
constexpr GpX c_tile = x27;       // the row tile's row 0 in C
constexpr GpX terms = x28;        // of the column tile's first column
constexpr GpX other = x16;        // scratch
constexpr int kSavedGeneral = 10, kSavedVectors = 8;

constexpr int kVectorBytes = 16;

/// One K loop body's loads and products, in the order of the products. Registers are taken as they become free, each
/// load as early as they allow: cores that execute in order wait least that way.
class Steps {
public:
  Steps(const NestShape& shape, Path& path) : shape_(shape), path_(path) {
    const std::size_t products =
        static_cast<std::size_t>(shape.unroll) * static_cast<std::size_t>(shape.heights.max * shape.vectors());
    products_.reserve(products);
    loads_.reserve(products);
    free_.reserve(products);
  }

  /// Steps [first, last) of a turn for a tile of `units`. False when registers run out.
  bool emit(int units, int first, int last) {
    const int first_unit = shape_.heights.max - units, vectors = shape_.columns.vectors, all = shape_.vectors();
    const int a_load = shape_.a_load, a_shift = std::countr_zero(static_cast<unsigned>(a_load));
    const int a_step = shape_.a_step_bytes(), a_unit = shape_.unit_bytes(), first_a = first * a_step >> a_shift;
    products_.clear();
    loads_.clear();
    of_a_.assign(static_cast<std::size_t>(((last * a_step + a_load - 1) >> a_shift) - first_a), -1);
    of_b_.assign(static_cast<std::size_t>((last - first) * all), -1);
    for (int step = first; step < last; ++step)
      for (int begin = 0; begin < all; begin += shape_.together) {
        const int end = std::min(all, begin + shape_.together);
        int of_vector[kMostTogether];
        for (int vector = begin; vector < end; ++vector) {
          const int panel = vector / vectors, in_panel = vector % vectors;
          of_vector[vector - begin] = need(of_b_, (panel * (last - first) + step - first) * vectors + in_panel, false,
                                           panel, step * shape_.step_bytes() + in_panel * shape_.vector_bytes);
        }
        for (int unit = 0; unit < units; ++unit) {
          const int a_at = step * a_step + unit * a_unit, a_byte = a_at & (a_load - 1);
          const int a = need(of_a_, (a_at >> a_shift) - first_a, true, 0, a_at - a_byte);
          for (int vector = begin; vector < end; ++vector) {
            const int now = static_cast<int>(products_.size()), b = of_vector[vector - begin];
            load(a).last_use = load(b).last_use = now;
            products_.push_back({first_unit + unit, vector, a, a_byte, b});
          }
        }
      }
    return emit_in_order();
  }

private:
  struct Load {
    bool a;
    int panel; ///< of B
    int offset;
    int index;               ///< in of_a_ or of_b_
    int first_use, last_use; ///< products
    int reg;                 ///< −1: not loaded
  };
  struct Product {
    int unit, vector, a, a_byte, b;
  };

  static constexpr int kMostTogether = 4;

  Load& load(int id) { return loads_[static_cast<std::size_t>(id)]; }

  int need(std::vector<int>& known, int index, bool a, int panel, int offset) {
    int& id = known[static_cast<std::size_t>(index)];
    if (id < 0) {
      const int now = static_cast<int>(products_.size());
      id = static_cast<int>(loads_.size());
      loads_.push_back({a, panel, offset, index, now, now, -1});
    }
    return id;
  }

  /// The load of the 16 bytes behind those of `of`, when one instruction can do both and it is needed soon.
  Load* partner(const Load& of) {
    constexpr int kSoon = 24, kLargestOffset = 1008; // LDP (SIMD&FP): a signed 7-bit multiple of 16
    const std::vector<int>& known = of.a ? of_a_ : of_b_;
    if (!shape_.pairs || of.offset > kLargestOffset || of.index + 1 >= static_cast<int>(known.size()))
      return nullptr;
    const int id = known[static_cast<std::size_t>(of.index) + 1];
    if (id < 0)
      return nullptr;
    Load& next = load(id);
    const bool adjacent = next.panel == of.panel && next.offset == of.offset + kVectorBytes;
    return adjacent && next.reg < 0 && next.first_use - of.first_use <= kSoon ? &next : nullptr;
  }

  bool emit_in_order() {
    free_.clear();
    for (int i = 0; i < shape_.loads; ++i)
      free_.push_back(i);
    next_free_ = next_load_ = 0;
    bool full = false; // since then no register became free
    for (int now = 0; now < static_cast<int>(products_.size()); ++now) {
      if (next_load_ < loads_.size() && (!full || loads_[next_load_].first_use <= now)) {
        issue_loads(now);
        full = true;
      }
      const Product& p = products_[static_cast<std::size_t>(now)];
      const Load &a = load(p.a), &b = load(p.b);
      if (a.reg < 0 || b.reg < 0)
        return false;
      path_.multiply(p.unit, p.vector, a.reg, p.a_byte, b.reg);
      for (const Load* const used : {&a, &b})
        if (used->last_use == now) {
          free_.push_back(used->reg);
          full = false;
        }
    }
    path_.finish_products();
    return true;
  }

  /// Loads in the order of their use, as far as registers go.
  void issue_loads(int now) {
    for (; next_load_ < loads_.size(); ++next_load_) {
      Load& first = loads_[next_load_];
      if (first.reg >= 0) // loaded beside another
        continue;
      const std::size_t free = free_.size() - next_free_;
      Load* const second = partner(first);
      if (free == 0 || (free == 1 && second != nullptr && first.first_use > now))
        return;
      const GpX& base = first.a ? role::a_k : role::b_k[first.panel];
      const int offset = first.a ? first.offset - shape_.a_bias : first.offset;
      first.reg = free_[next_free_++];
      if (second != nullptr && free >= 2) {
        second->reg = free_[next_free_++];
        path_.load_two(first.reg, second->reg, base, offset);
      } else if (first.a) {
        path_.load_a(first.reg, base, offset);
      } else {
        path_.load_b(first.reg, base, offset);
      }
    }
  }

  const NestShape& shape_;
  Path& path_;
  std::vector<Product> products_;
  std::vector<Load> loads_;      ///< in the order of their first use
  std::vector<int> of_a_, of_b_; ///< by place in the turn: index in loads_, or −1
  std::vector<int> free_;        ///< registers, a queue from next_free_ on
  std::size_t next_free_ = 0, next_load_ = 0;
};

class Nest {
public:
  Nest(Assembler& assembler, const NestShape& shape, Path& path, TileEpilogue& epilogue)
      : a_(assembler), shape_(shape), path_(path), steps_(shape, path), epilogue_(epilogue), heights_(shape.heights),
        tail_(assembler.newLabel()), row_tile_done_(assembler.newLabel()) {}

  bool emit() {
    const Label column_tile = a_.newLabel(), row_tile = a_.newLabel();
    a_.enter(kSavedGeneral, kSavedVectors);
    if (shape_.linear) {
      a_.mov(role::scratch, kDefaultNan);
      a_.msr(Predicate::SysReg::kFPCR, role::scratch);
    }
    split_rows();
    if ((shape_.k > 0 || shape_.has_row_values()) && !shape_.takes_rows_as_they_are())
      copy_rows();
    load_arguments();

    a_.bind(column_tile);
    begin_column_tile();
    a_.bind(row_tile);
    begin_row_tile();
    const bool fits = row_tile_heights();
    a_.cmp(n_left, shape_.tile_columns());
    a_.b_lt(tail_);
    a_.bind(row_tile_done_);
    end_row_tile(row_tile);
    end_column_tile(column_tile);
    if (shape_.linear)
      a_.msr(Predicate::SysReg::kFPCR, xzr); // as calls of int8_linear find it
    a_.leave();

    a_.bind(tail_);
    copy_tail();
    return fits;
  }

private:
  bool finishes() const { return shape_.finishes(); }
  bool a_is_u8() const { return shape_.epilogue.a_dtype == int8_mm::ADtype::u8; }
  int c_shift() const { return std::countr_zero(static_cast<unsigned>(shape_.epilogue.c_bytes())); }

  const GpX& rows() const { return shape_.unit_rows == 1 ? height : pair_rows; }

  /// m rows into tiles of which heights.
  void split_rows() {
    a_.ldr(m, ptr(call, offsetof(Call, m)));
    a_.ldr(workspace, ptr(call, shape_.linear ? offsetof(int8_linear::Call, workspace) : offsetof(Call, workspace)));
    const GpX units = shape_.unit_rows == 1 ? m : x9;
    if (shape_.unit_rows == 2) {
      a_.add(units, m, 1);
      a_.lsr(units, units, 1);
    }
    if (heights_.single_tile) {
      a_.mov(short_height, units);
      return;
    }
    a_.add(tiles, units, heights_.max - 1);
    if (std::has_single_bit(static_cast<unsigned>(heights_.max))) {
      a_.lsr(tiles, tiles, std::countr_zero(static_cast<unsigned>(heights_.max)));
    } else {
      a_.mov(other, heights_.max);
      a_.udiv(tiles, tiles, other);
    }
    const GpX tall_tiles = other;
    a_.udiv(short_height, units, tiles);
    a_.msub(tall_tiles, short_height, tiles, units);
    a_.sub(short_tiles, tiles, tall_tiles);
  }

  /// height, and rows(), of the row tile that is `tiles_left` from the end.
  void row_tile_size() {
    if (heights_.single_tile) {
      a_.mov(height, short_height);
      if (shape_.unit_rows == 2)
        a_.mov(pair_rows, m);
      return;
    }
    a_.cmp(tiles_left, short_tiles);
    a_.cinc(height, short_height, CondCode::kGT);
    if (shape_.unit_rows == 2) { // the last pair may be a single row
      a_.lsl(pair_rows, height, 1);
      a_.cmp(pair_rows, rows_left);
      a_.csel(pair_rows, pair_rows, rows_left, CondCode::kLT);
    }
  }

  // ---------------------------------------------------------------- A into the workspace

  /// Rows that are copied together: those of 16 bytes of a step, or of 32.
  int group_rows() const {
    const int of_vector = kVectorBytes / (shape_.layout.k_block * shape_.a_copies);
    const bool twice = of_vector < 4 && shape_.a_rows % (2 * of_vector) == 0;
    return std::min(shape_.a_rows, twice ? 2 * of_vector : of_vector);
  }
  int group_bytes() const { return group_rows() * shape_.layout.k_block * shape_.a_copies; }

  /// [row tile][step][a_rows][a_copies][k_block], zero beyond K. Rows that a tile lacks are copies of its last one:
  /// what comes of them is not stored.
  void copy_rows() {
    const GpX row = x1, lda = x2, last = x3, tile_out = x4, out = x5, k = x9, next = x14, groups_left = x16;
    const GpX group[4] = {x10, x11, x12, x13};
    const GpX row_sum = x6, row_zp = x24;
    const int rows_of_group = group_rows(), groups = shape_.a_rows / rows_of_group;
    const std::int64_t whole = shape_.k / 16 * 16, rest = shape_.k % 16;
    const int chunk_bytes = 16 * shape_.a_rows * shape_.a_copies;
    const Label next_tile = a_.newLabel(), next_group = a_.newLabel(), next_chunk = a_.newLabel();

    // Rows are addressed from the end of their whole vectors: `k` runs from below to 0.
    if (shape_.linear) {
      a_.ldr(row, ptr(call, offsetof(int8_linear::Call, product.workspace)));
      a_.mov(lda, shape_.quantised_rows().row_bytes);
    } else {
      a_.ldr(row, ptr(call, offsetof(Call, a)));
      a_.ldr(lda, ptr(call, offsetof(Call, lda)));
    }
    a_.add_constant(row, row, whole, next);
    a_.add_constant(tile_out, workspace, shape_.a_offset(), next);
    if (rest > 0)
      a_.movi(zero().b16(), 0);
    if (shape_.flips_a())
      a_.movi(sign_bits().b16(), 0x80);
    if (shape_.epilogue.a_zp == int8_mm::AZp::row)
      a_.ldr(row_zp, ptr(call, offsetof(Call, a_zp)));
    if (!heights_.single_tile)
      a_.mov(tiles_left, tiles);
    if (shape_.unit_rows == 2)
      a_.mov(rows_left, m);
    a_.bind(next_tile);
    row_tile_size();
    a_.sub(next, rows(), 1);
    a_.madd(last, next, lda, row);
    if (shape_.epilogue.a_zp == int8_mm::AZp::row) {
      const GpX to = x10, left = x9;
      const GpW value = w11;
      const Label next_zp = a_.newLabel();
      a_.add_constant(to, tile_out, shape_.a_elements_bytes() + NestShape::kRowValues, next);
      a_.mov(left, rows());
      a_.bind(next_zp);
      a_.ldr(value, ptr_post(row_zp, 4));
      a_.str(value, ptr_post(to, 4));
      a_.subs(left, left, 1);
      a_.b_ne(next_zp);
    }
    if (shape_.epilogue.needs_row_sums())
      a_.add_constant(row_sum, tile_out, shape_.a_elements_bytes(), next);
    if (shape_.linear) {
      const GpX to = x10, scale = x11, left = x9;
      const GpW value = w12;
      const Label next_scale = a_.newLabel();
      a_.add_constant(to, tile_out, shape_.a_elements_bytes(), next);
      a_.add_constant(scale, row, shape_.quantised_rows().scale_at() - whole, next);
      a_.mov(left, rows());
      a_.bind(next_scale);
      a_.ldr(value, ptr(scale));
      a_.add(scale, scale, lda);
      a_.str(value, ptr_post(to, 4));
      a_.subs(left, left, 1);
      a_.b_ne(next_scale);
    }
    a_.mov(group[0], row);
    if (groups > 1)
      a_.mov(groups_left, groups);
    a_.bind(next_group);
    const auto step_row = [&](const GpX& to, const GpX& from) {
      a_.add(next, from, lda);
      a_.cmp(next, last);
      a_.csel(to, next, last, CondCode::kLS);
    };
    for (int i = 1; i < rows_of_group; ++i)
      step_row(group[i], group[i - 1]);
    a_.mov(out, tile_out);
    const bool sums_rows = shape_.epilogue.needs_row_sums();
    if (sums_rows)
      for (int i = 0; i < rows_of_group; ++i)
        a_.movi(sum_of(i).s4(), 0);
    if (whole > 0) {
      a_.mov(k, -whole);
      a_.bind(next_chunk);
      for (int i = 0; i < rows_of_group; ++i)
        a_.ldr(bytes_of(i), ptr(group[i], k));
      convert(rows_of_group);
      interleave(out);
      a_.add(out, out, chunk_bytes);
      a_.adds(k, k, 16);
      a_.b_ne(next_chunk);
    }
    if (rest > 0) {
      a_.mov(k, rest - 16);
      for (int i = 0; i < rows_of_group; ++i)
        load_rest(bytes_of(i), group[i], k, next);
      convert(rows_of_group);
      interleave(out);
    }
    if (sums_rows)
      for (int i = 0; i < rows_of_group; ++i) {
        a_.addv(sum_of(i).s(), sum_of(i).s4());
        a_.str(sum_of(i).s(), ptr_post(row_sum, 4));
      }
    if (groups > 1) {
      step_row(group[0], group[rows_of_group - 1]);
      a_.add(tile_out, tile_out, group_bytes());
      a_.subs(groups_left, groups_left, 1);
      a_.b_ne(next_group);
    }
    if (heights_.single_tile)
      return;
    a_.add(row, last, lda);
    a_.add_constant(tile_out, tile_out, shape_.a_tile_bytes() - (groups > 1 ? groups * group_bytes() : 0), next);
    if (shape_.unit_rows == 2)
      a_.sub(rows_left, rows_left, pair_rows);
    a_.subs(tiles_left, tiles_left, 1);
    a_.b_ne(next_tile);
  }

  static VecV sum_of(int i) { return VecV(16 + i); }
  static VecV sign_bits() { return VecV(30); }

  /// Adds the bytes of the group's rows to their sums, where they take part, and takes 128 from u8 that cannot be
  /// multiplied.
  void convert(int rows_of_group) {
    const VecV pairs = VecV(29);
    for (int i = 0; i < rows_of_group; ++i) {
      if (shape_.epilogue.needs_row_sums()) {
        if (a_is_u8()) {
          a_.uaddlp(pairs.h8(), bytes_of(i).b16());
          a_.uadalp(sum_of(i).s4(), pairs.h8());
        } else {
          a_.saddlp(pairs.h8(), bytes_of(i).b16());
          a_.sadalp(sum_of(i).s4(), pairs.h8());
        }
      }
      if (shape_.flips_a())
        a_.eor(bytes_of(i).b16(), bytes_of(i).b16(), sign_bits().b16());
    }
  }

  static VecV bytes_of(int i) { return VecV(i); }
  static VecV zero() { return VecV(31); }

  /// The last K mod 16 bytes of a row and zeros. With 16 and more the last 16 are loaded, at `from` + `k`, and shifted.
  void load_rest(const VecV& to, const GpX& from, const GpX& k, const GpX& at) {
    const int rest = static_cast<int>(shape_.k % 16);
    if (shape_.k >= 16) {
      a_.ldr(to, ptr(from, k));
      a_.ext(to.b16(), to.b16(), zero().b16(), 16 - rest);
      return;
    }
    a_.load_first(to, from, rest, at);
  }

  /// 16 bytes of each row of the group, in bytes_of, to the steps that they belong to, from `out` on.
  void interleave(const GpX& out) {
    const int stride = shape_.a_step_bytes(), rows_of_group = group_rows();
    const VecV r0 = bytes_of(0), r1 = bytes_of(1), r2 = bytes_of(2), r3 = bytes_of(3);
    const VecV t0 = VecV(4), t1 = VecV(5), t2 = VecV(6), t3 = VecV(7);
    if (rows_of_group == 1 && shape_.a_copies == 1) {
      a_.str(r0, ptr(out));
    } else if (shape_.layout.k_block == 4 && rows_of_group == 2) {
      a_.zip1(t0.s4(), r0.s4(), r1.s4());
      a_.zip2(t1.s4(), r0.s4(), r1.s4());
      a_.stp(t0, t1, ptr(out));
    } else if (shape_.layout.k_block == 4) {
      a_.zip1(t0.s4(), r0.s4(), r2.s4());
      a_.zip2(t1.s4(), r0.s4(), r2.s4());
      a_.zip1(t2.s4(), r1.s4(), r3.s4());
      a_.zip2(t3.s4(), r1.s4(), r3.s4());
      a_.zip1(r0.s4(), t0.s4(), t2.s4());
      a_.zip2(r1.s4(), t0.s4(), t2.s4());
      a_.zip1(r2.s4(), t1.s4(), t3.s4());
      a_.zip2(r3.s4(), t1.s4(), t3.s4());
      for (int step = 0; step < 4; ++step)
        a_.str(bytes_of(step), ptr(out, step * stride));
    } else if (shape_.a_copies == 2) {
      interleave_halves(out, r0, r0, r1, r1, rows_of_group == 2);
    } else {
      interleave_halves(out, r0, r1, r2, r3, rows_of_group == 4);
    }
  }

  /// The low halves of two rows to the first step, the high ones to the next; and of two more behind them.
  void interleave_halves(const GpX& out, const VecV& r0, const VecV& r1, const VecV& r2, const VecV& r3, bool four) {
    const VecV low = VecV(4), high = VecV(5), low_behind = VecV(6), high_behind = VecV(7);
    const int stride = shape_.a_step_bytes();
    a_.zip1(low.d2(), r0.d2(), r1.d2());
    a_.zip2(high.d2(), r0.d2(), r1.d2());
    if (!four) {
      a_.str(low, ptr(out));
      a_.str(high, ptr(out, stride));
      return;
    }
    a_.zip1(low_behind.d2(), r2.d2(), r3.d2());
    a_.zip2(high_behind.d2(), r2.d2(), r3.d2());
    a_.stp(low, low_behind, ptr(out));
    a_.stp(high, high_behind, ptr(out, stride));
  }

  // ---------------------------------------------------------------- the loops

  void load_arguments() {
    a_.ldr(b, ptr(call, offsetof(Call, b)));
    a_.ldr(c, ptr(call, offsetof(Call, c)));
    a_.ldr(n_left, ptr(call, offsetof(Call, n)));
    a_.ldr(ldc, ptr(call, offsetof(Call, ldc)));
    if (c_shift() > 0)
      a_.lsl(ldc, ldc, c_shift());
    if (finishes())
      a_.ldr(terms, ptr(call, offsetof(Call, terms)));
    if (shape_.slices() > 1)
      a_.mov(slices_left, shape_.slices());
  }

  void begin_column_tile() {
    if (shape_.takes_rows_as_they_are()) {
      a_.ldr(a_tile, ptr(call, offsetof(int8_linear::Call, product.workspace)));
      a_.add_constant(a_tile, a_tile, shape_.quantised_rows().offset, role::scratch);
    } else {
      a_.add_constant(a_tile, workspace, shape_.a_offset(), role::scratch);
    }
    a_.mov(c_tile, c);
    if (!heights_.single_tile)
      a_.mov(tiles_left, tiles);
    if (shape_.unit_rows == 2)
      a_.mov(rows_left, m);
  }

  void begin_row_tile() {
    row_tile_size();
    // Columns beyond N are stored to the workspace, and copied from there as far as they are C's.
    a_.mov(role::scratch, shape_.epilogue.c_bytes() * shape_.tile_columns());
    a_.cmp(n_left, shape_.tile_columns());
    a_.csel(role::c_row, c_tile, workspace, CondCode::kGE);
    a_.csel(role::store_stride, ldc, role::scratch, CondCode::kGE);
    path_.clear();
    if (shape_.steps() == 0)
      return;
    a_.add_constant(role::a_k, a_tile, shape_.a_bias - left_out_ * shape_.a_step_bytes(), role::scratch);
    a_.add_constant(role::b_k[0], b, -left_out_ * shape_.step_bytes(), role::scratch);
    for (int p = 1; p < shape_.columns.panels; ++p) {
      // A panel beyond N is computed from the tile's first one, and not stored.
      a_.add_constant(role::b_k[p], role::b_k[0], p * shape_.layout.panel_bytes(shape_.k), role::scratch);
      a_.cmp(n_left, p * shape_.layout.n_block);
      a_.csel(role::b_k[p], role::b_k[p], role::b_k[0], CondCode::kGT);
    }
  }

  /// The K loop of each height, the highest last: it goes on to store all rows, the others enter behind the first ones.
  /// Stages take all rows of the highest tile: those that a lower one lacks are sums of 0.
  bool row_tile_heights() {
    const auto [min, max, single_tile] = heights_;
    std::vector<Label> k_loop, store;
    const Label finish = a_.newLabel();
    for (int h = min; h <= max; ++h) {
      k_loop.push_back(a_.newLabel());
      store.push_back(a_.newLabel());
    }
    for (int h = max; h > min; --h) {
      a_.cmp(height, h);
      a_.b_eq(k_loop[static_cast<std::size_t>(h - min)]);
    }
    bool fits = true;
    for (int h = min; h <= max; ++h) {
      a_.bind(k_loop[static_cast<std::size_t>(h - min)]);
      fits = run_through_k(h) && fits;
      if (h < max)
        a_.b(finishes() ? finish : store[static_cast<std::size_t>(h - min)]);
    }
    TileSums sums;
    if (finishes()) {
      a_.bind(finish);
      sums = path_.finished_sums();
      finish_sums(sums);
      for (int h = min; h < max; ++h) {
        a_.cmp(height, h);
        a_.b_eq(store[static_cast<std::size_t>(h - min)]);
      }
    }
    const Label stored = a_.newLabel();
    for (int unit = 0; unit < max; ++unit) {
      if (max - unit >= min)
        a_.bind(store[static_cast<std::size_t>(max - unit - min)]);
      for (int row = 0; row < shape_.unit_rows; ++row) {
        if (row == 1 && unit + 1 == max) // m is odd: the last tile's last unit is one row
          a_.tbnz(pair_rows, 0, stored);
        if (finishes())
          epilogue_.store_row(sums, unit * shape_.unit_rows + row, role::c_row, role::scratch);
        else
          path_.store_row(unit, row);
        if (unit + 1 < max || row + 1 < shape_.unit_rows)
          a_.add(role::c_row, role::c_row, role::store_stride);
      }
    }
    a_.bind(stored);
    return fits;
  }

  bool run_through_k(int h) {
    if (shape_.turns() == 1)
      return steps_.emit(h, 0, static_cast<int>(shape_.steps()));
    const Label turn = a_.newLabel(), entry = a_.newLabel();
    a_.mov(turns, shape_.turns());
    if (left_out_ > 0)
      a_.b(entry);
    a_.bind(turn);
    bool fits = left_out_ == 0 || steps_.emit(h, 0, left_out_);
    a_.bind(entry);
    fits = steps_.emit(h, left_out_, shape_.unroll) && fits;
    a_.add(role::a_k, role::a_k, shape_.a_step_bytes() * shape_.unroll);
    for (int p = 0; p < shape_.columns.panels; ++p)
      a_.add_constant(role::b_k[p], role::b_k[p], shape_.step_bytes() * shape_.unroll, role::scratch);
    a_.subs(turns, turns, 1);
    a_.b_ne(turn);
    return fits;
  }

  void end_row_tile(const Label& row_tile) {
    if (heights_.single_tile)
      return;
    a_.madd(c_tile, rows(), ldc, c_tile);
    a_.add_constant(a_tile, a_tile, shape_.a_tile_bytes(), role::scratch);
    if (shape_.unit_rows == 2)
      a_.sub(rows_left, rows_left, pair_rows);
    a_.subs(tiles_left, tiles_left, 1);
    a_.b_ne(row_tile);
  }

  void end_column_tile(const Label& column_tile) {
    const std::int64_t panels_bytes = shape_.columns.panels * shape_.layout.panel_bytes(shape_.k);
    if (shape_.slices() == 1) {
      a_.add_constant(b, b, panels_bytes, role::scratch);
      if (finishes())
        a_.add_constant(terms, terms, shape_.columns.panels * shape_.terms_panel_bytes(), role::scratch);
    } else {
      const Label same_panel = a_.newLabel();
      const int slice_bytes = shape_.columns.vectors * shape_.vector_bytes;
      a_.add(b, b, slice_bytes);
      if (finishes())
        a_.add(terms, terms, 4 * shape_.slice_columns());
      a_.subs(slices_left, slices_left, 1);
      a_.b_ne(same_panel);
      a_.mov(slices_left, shape_.slices());
      a_.add_constant(b, b, panels_bytes - shape_.slices() * slice_bytes, role::scratch);
      if (finishes())
        a_.add_constant(terms, terms, shape_.terms_panel_bytes() - 4 * shape_.layout.n_block, role::scratch);
      a_.bind(same_panel);
    }
    a_.add(c, c, shape_.epilogue.c_bytes() * shape_.tile_columns());
    a_.subs(n_left, n_left, shape_.tile_columns());
    a_.b_gt(column_tile);
  }

  /// The tile's sums through the stages.
  void finish_sums(TileSums& sums) {
    TileTerms at{.terms = terms,
                 .vector_at = {},
                 .array_bytes = 4 * shape_.layout.n_block,
                 .values = x16,
                 .zp_at = NestShape::kRowValues,
                 .scalars = x9,
                 .scratch = role::scratch};
    const int columns = shape_.tile_columns() / sums.vectors, per_panel = shape_.slice_columns() / columns;
    for (int vector = 0; vector < sums.vectors; ++vector)
      at.vector_at.push_back(vector / per_panel * shape_.terms_panel_bytes() + vector % per_panel * 4 * columns);
    if (shape_.takes_rows_as_they_are()) {
      const QuantisedRows row = shape_.quantised_rows();
      a_.add_constant(at.values, a_tile, row.scale_at() - row.offset, at.scratch);
    } else if (shape_.has_row_values()) { // of the highest tile's row 0, whether there is one or not
      const auto [min, max, single_tile] = heights_;
      const int log2_bytes = shape_.unit_rows == 1 ? 2 : 3;
      if (min == max) {
        a_.add_constant(at.values, a_tile, shape_.a_elements_bytes(), at.scratch);
      } else {
        a_.add_constant(at.values, a_tile, shape_.a_elements_bytes() - (std::int64_t{max} << log2_bytes), at.scratch);
        a_.add(at.values, at.values, height, lsl(log2_bytes));
      }
    }
    a_.ldr(at.scalars, ptr(call, offsetof(Call, scalars)));
    epilogue_.apply(sums, at);
    epilogue_.prepare_stores(sums, at);
  }

  /// The tile's first n_left columns, from the workspace to C.
  void copy_tail() {
    const GpX from_row = x8, to_row = x9, from = x10, to = x11, left = x12, tail_rows = x13;
    const int c_bytes = shape_.epilogue.c_bytes(), columns = kVectorBytes / c_bytes;
    const Label next_row = a_.newLabel(), next_vector = a_.newLabel(), row_done = a_.newLabel();
    a_.mov(from_row, workspace);
    a_.mov(to_row, c_tile);
    a_.mov(tail_rows, rows());
    a_.bind(next_row);
    a_.mov(from, from_row);
    a_.mov(to, to_row);
    a_.subs(left, n_left, columns);
    Label none = a_.newLabel();
    a_.b_lt(none);
    a_.bind(next_vector);
    a_.ldr(q0, ptr_post(from, kVectorBytes));
    a_.str(q0, ptr_post(to, kVectorBytes));
    a_.subs(left, left, columns);
    a_.b_ge(next_vector);
    // The low bits of a count less `columns` are those of the count.
    for (int some = columns / 2; some > 0; some /= 2) {
      a_.bind(none);
      none = some > 1 ? a_.newLabel() : row_done;
      a_.tbz(left, std::countr_zero(static_cast<unsigned>(some)), none);
      const int bytes = some * c_bytes;
      const auto copy = [&](const auto& vector) {
        a_.ldr(vector, some > 1 ? ptr_post(from, bytes) : ptr(from));
        a_.str(vector, some > 1 ? ptr_post(to, bytes) : ptr(to));
      };
      bytes == 8 ? copy(d0) : bytes == 4 ? copy(s0) : bytes == 2 ? copy(h0) : copy(b0);
    }
    a_.bind(row_done);
    a_.add(from_row, from_row, c_bytes * shape_.tile_columns());
    a_.add(to_row, to_row, ldc);
    a_.subs(tail_rows, tail_rows, 1);
    a_.b_ne(next_row);
    a_.b(row_tile_done_);
  }

  Assembler& a_;
  const NestShape& shape_;
  Path& path_;
  Steps steps_;
  TileEpilogue& epilogue_;
  const int8_mm::Heights heights_;
  const int left_out_ = shape_.left_out();
  Label tail_, row_tile_done_;
};

} // namespace

Columns columns_for(int panel_vectors, int most, int multiple) {
  Columns columns{1, multiple};
  for (int vectors = multiple; vectors <= std::min(panel_vectors, most); vectors += multiple)
    if (panel_vectors % vectors == 0)
      columns.vectors = vectors;
  if (columns.vectors == panel_vectors)
    columns.panels = std::clamp(most / panel_vectors, 1, role::kPanels);
  return columns;
}

void VectorPath::clear() {
  for (int i = 0; i < shape_.heights.max * shape_.vectors() * per_product_; ++i)
    a_.movi(acc(0, 0, i).s4(), 0);
}

void VectorPath::load_a(int to, const Gp& base, int offset) {
  a_.ldr(VecV(to), ptr(base, offset));
}

void VectorPath::load_b(int to, const Gp& base, int offset) {
  a_.ldr(VecV(to), ptr(base, offset));
}

void VectorPath::load_two(int to, int second, const Gp& base, int offset) {
  a_.ldp(VecV(to), VecV(second), ptr(base, offset));
}

int8_mm::Plan NestShape::plan() const {
  return {.layout = layout,
          .m_step = unit_rows, // heights adapt to any cut
          .n_step = columns.panels * layout.n_block,
          .workspace_fixed = a_offset() + a_tile_bytes(), // the last tile may lack rows
          .workspace_per_row = (a_tile_bytes() + tile_rows() - 1) / tile_rows(),
          .a_shift = flips_a() ? -128 : 0};
}

bool NestShape::can_multiply_u8(const KernelDesc& desc, const Target& target) {
  return desc.op == OpId::int8_mm && target.features.has(Feature::i8mm) &&
         int8_mm::Epilogue::of(desc).a_dtype == int8_mm::ADtype::u8;
}

Features NestShape::features(Features needs, const KernelDesc& desc, const Target& target) {
  if (can_multiply_u8(desc, target))
    needs.add(Feature::i8mm);
  return needs;
}

QuantisedRows NestShape::quantised_rows() const {
  if (takes_rows_as_they_are())
    return QuantisedRows::make(linear->x, k, a_copies, left_out() * a_step_bytes() % 16); // aligned as by a_offset()
  return QuantisedRows::make(linear->x, k);
}

int8_linear::Plan NestShape::linear_plan() const {
  const bool copies = !takes_rows_as_they_are();
  return {.layout = layout,
          .m_step = unit_rows,
          .n_step = columns.panels * layout.n_block,
          .q_row_bytes = quantised_rows().row_bytes,
          .workspace_bytes = copies ? a_offset() + a_tile_bytes() : c_scratch_bytes(),
          .workspace_per_row = copies ? (a_tile_bytes() + tile_rows() - 1) / tile_rows() : 0,
          .terms = true};
}

Result<CodeObject> emit_nest(Assembler& a, const NestShape& shape, Path& path, TileEpilogue& epilogue,
                             Features features, std::int32_t vector_bits) {
  if (!Nest(a, shape, path, epilogue).emit())
    return Status::error(Code::compile_failed, "int8_mm: a step of K needs more registers than its loads have");
  return a.finish(features, vector_bits, shape.linear ? shape.linear_plan().values() : shape.plan().values());
}

Result<CodeObject> emit_nest(Assembler& a, const NestShape& shape, VectorPath& path, Features features,
                             std::int32_t vector_bits) {
  if (shape.linear) {
    NeonLinearEpilogue epilogue(a, shape.epilogue, shape.linear->has_bias);
    return emit_nest(a, shape, path, epilogue, features, vector_bits);
  }
  NeonEpilogue epilogue(a, shape.epilogue);
  return emit_nest(a, shape, path, epilogue, features, vector_bits);
}

Implementation nest_row(IsaPath isa, Features needs, std::string (*pack_layout)(const KernelDesc&, const Target&),
                        bool (*reads_layout)(std::string_view, const KernelDesc&, const Target&),
                        Result<CodeObject> (*compile)(const KernelDesc&, const Target&, std::string_view)) {
  return {.op = OpId::int8_mm,
          .isa = isa,
          .backend = BackendId::arm,
          .generator = GeneratorId::asmjit,
          .generator_digest = k_arm_generator_digest,
          .arch = Arch::aarch64,
          .needs = needs,
          .supports = supports_nest,
          .pack_layout = pack_layout,
          .reads_layout = reads_layout,
          .compile = compile};
}

Status unreadable(IsaPath isa, std::string_view pack_layout, const KernelDesc& desc) {
  const std::int64_t m_class = desc.value[int8_mm::kM];
  return Status::error(Code::unsupported, fmt::format("int8_mm: {} reads no packs of {} with m={}", name_of(isa),
                                                      pack_layout, m_class == kAny ? "any" : std::to_string(m_class)));
}

Status supports_nest(const KernelDesc& desc, const Target&) {
  return int8_mm::check_k(desc, kNestMaxK);
}

} // namespace kiln::arm
