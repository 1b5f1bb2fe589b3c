#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <bit>
#include <vector>

#include "backends/nvidia/fragment_sums.h"
#include "backends/nvidia/int8_mm.h"

namespace kiln::nvidia::int8 {
namespace {

using namespace ptx;
/// Of D: columns of C l/4 (0, 1) and l/4 + 8 (2, 3), rows of C 2·(l mod 4) + {0, 1}.
using Fragment = std::array<B32, 4>;

constexpr int kBlock = 128; // k, and bytes, of a row in one stage

/// Which k a lane holds of an operand is free, as long as both have the same: lane l mod 4 takes 16 neighbouring bytes
/// of 64, so that one 16-byte load gives its part of two mma ("mma.m16n8k32", PTX ISA, matrix fragments).
class Tile {
public:
  Tile(Sm sm, const Shape& shape, const TileConfig& config)
      : shape_(shape), c_(config), w_(sm, "main", config.threads(), config.cluster) {}

  Result<std::string> emit() {
    prologue();
    for (int s = 0; s < stages_ahead(); ++s)
      copy_stage();
    acc_.resize(static_cast<std::size_t>(c_.column_tiles * c_.row_tiles));
    for (Fragment& f : acc_) {
      f = w_.make<B32, 4>();
      for (const B32 r : f)
        w_.mov_to(r, 0);
    }
    k_loop();
    FragmentSums<B32> sums(w_,
                           {.shared = shared_,
                            .lane = lane_,
                            .warp = warp_,
                            .group = group_,
                            .rank = rank_,
                            .groups = c_.warps_k,
                            .group_warps = group_warps(),
                            .cluster = c_.cluster},
                           acc_);
    sums.over_groups();
    sums.over_cluster();
    store();
    return w_.finish();
  }

private:
  int group_warps() const { return c_.warps_n * c_.warps_m; }
  int ranks() const { return c_.warps_k * c_.cluster; } ///< that take turns along K
  int group_bytes() const { return static_cast<int>(c_.rows() + c_.columns()) * kBlock; }
  int step_bytes() const { return c_.warps_k * group_bytes(); }
  /// Stages on their way: the slots but those in use, by wgmma also the step before.
  int stages_ahead() const { return c_.stages - (c_.wgmma ? 2 : 1); }
  std::int64_t steps() const {
    return std::max<std::int64_t>(1, (shape_.k + ranks() * kBlock - 1) / (ranks() * kBlock));
  }
  int rows_per_copy() const { return 4 * group_warps(); }

  /// One operand's way into shared memory: this thread's 16 bytes of every rows_per_copy()-th row.
  struct Copy {
    B64 from, row_step;
    B32 left; ///< rows from the block's first on that exist
    int rows, offset;
  };

  void prologue() {
    const B64 a = w_.parameter_b64("a"), b = w_.parameter_b64("b");
    out_ = w_.parameter_b64("c");
    scale_ = w_.parameter_b64("scale");
    w_.parameter_b64("workspace");
    const B32 m = w_.parameter_b32("m"), lda = w_.parameter_b32("lda"), ldb = w_.parameter_b32("ldb");
    ldc_ = w_.parameter_b32("ldc");

    const B32 thread = w_.thread();
    lane_ = w_.and_(thread, 31);
    const B32 warp = w_.shr(thread, 5);
    group_ = c_.warps_k > 1 ? w_.div_u32(warp, group_warps()) : w_.mov(0);
    warp_ = w_.sub(warp, w_.mul(group_, group_warps()));
    warp_m_ = w_.div_u32(warp_, c_.warps_n);
    warp_n_ = w_.sub(warp_, w_.mul(warp_m_, c_.warps_n));
    B32 slice = w_.block_x(), rank_k = group_;
    if (c_.cluster > 1) {
      rank_ = w_.rank_in_cluster();
      slice = w_.shr(slice, std::countr_zero(static_cast<unsigned>(c_.cluster)));
      rank_k = w_.mad(rank_, c_.warps_k, group_);
    }
    first_column_ = w_.mul(slice, c_.columns());
    first_row_ = w_.mul(w_.block_y(), c_.rows());
    rows_left_ = w_.sub(m, first_row_);

    shared_ = w_.shared_memory();
    ring_ = w_.mad(group_, group_bytes(), shared_);
    ring_end_ = w_.add(ring_, c_.stages * step_bytes());
    copied_ = w_.mov(ring_);
    multiplied_ = w_.mov(ring_);

    w_.comment("this thread's 16 bytes: row, chunk; the chunks of a row are exchanged against bank conflicts");
    const B32 in_group = w_.mad(warp_, 32, lane_);
    copy_row_ = w_.shr(in_group, 3);
    const B32 chunk = w_.and_(in_group, 7);
    slot_ = w_.mad(copy_row_, kBlock, w_.mul(w_.xor_(chunk, exchange(copy_row_)), 16));
    const B32 first_k = w_.mad(rank_k, kBlock, w_.mul(chunk, 16));
    k_left_ = w_.sub(shape_.k, first_k);
    const auto copy = [&](B64 base, B32 first, B32 stride, B32 left, std::int64_t rows, int offset) {
      const B64 from = w_.add64(w_.mad_wide(w_.add(first, copy_row_), stride, base), w_.widen(first_k));
      return Copy{from, w_.mul_wide(stride, rows_per_copy()), left, static_cast<int>(rows), offset};
    };
    copies_[0] = copy(a, first_row_, lda, rows_left_, c_.rows(), 0);
    copies_[1] = copy(b, first_column_, ldb, w_.sub(shape_.n, first_column_), c_.columns(),
                      static_cast<int>(c_.rows()) * kBlock);

    w_.comment("where this lane reads its operands");
    const B32 quad = w_.shr(lane_, 2), in_quad = w_.and_(lane_, 3), exchanged = exchange(quad);
    for (int half = 0; half < 2; ++half) {
      const B32 chunk_at = w_.mul(w_.xor_(w_.add(in_quad, 4 * half), exchanged), 16);
      const auto h = static_cast<std::size_t>(half);
      row_read_[h] = w_.mad(w_.mad(warp_m_, 8 * c_.row_tiles, quad), kBlock, chunk_at);
      column_read_[h] =
          w_.mad(w_.mad(warp_n_, 16 * c_.column_tiles, quad), kBlock, w_.add(chunk_at, c_.rows() * kBlock));
    }
  }

  /// What a row's chunks are exchanged by: wgmma's 128-byte swizzle, or its part that 16-byte loads need.
  B32 exchange(B32 row) { return c_.wgmma ? w_.and_(row, 7) : w_.mul(w_.and_(row, 1), 4); }

  void advance(B32 slot) {
    w_.add_to(slot, slot, step_bytes());
    w_.mov_to(slot, ring_, w_.compare_u32(Compare::ge, slot, ring_end_));
  }

  /// This group's next 128 k of both operands into the ring; a group of copies even where K has ended.
  void copy_stage() {
    w_.comment("copy 128 k");
    const B32 bytes = w_.max_s32(w_.min_s32(k_left_, 16), 0);
    const B32 slot = w_.add(copied_, slot_);
    for (Copy& c : copies_) {
      const B64 row = w_.b64();
      w_.mov_to(row, c.from);
      for (int first = 0; first < c.rows; first += rows_per_copy()) {
        const Pred exists = w_.compare_s32(Compare::lt, w_.add(copy_row_, first), c.left);
        const Guard in_tile =
            first + rows_per_copy() <= c.rows ? Guard() : Guard(w_.compare_u32(Compare::lt, copy_row_, c.rows - first));
        w_.cp_async({slot, c.offset + first * kBlock}, {row}, w_.select(exists, bytes, 0), in_tile);
        if (first + rows_per_copy() < c.rows)
          w_.add64_to(row, row, c.row_step);
      }
      w_.add64_to(c.from, c.from, std::int64_t{ranks()} * kBlock);
    }
    w_.add_to(k_left_, k_left_, -ranks() * kBlock);
    advance(copied_);
    w_.cp_async_commit();
  }

  void k_loop() {
    const B32 steps_left = w_.mov(steps());
    if (c_.wgmma) {
      wgmma_loop(steps_left);
      return;
    }
    w_.loop("128 k, for each group of warps", [&] {
      w_.cp_async_wait(c_.stages - 2);
      w_.barrier();
      copy_stage();
      for (std::size_t half = 0; half < 2; ++half)
        multiply_half(w_.add(multiplied_, row_read_[half]), w_.add(multiplied_, column_read_[half]));
      advance(multiplied_);
      w_.add_to(steps_left, steps_left, -1);
      return w_.compare_s32(Compare::gt, steps_left, 0);
    });
    w_.cp_async_wait(0);
  }

  void wgmma_loop(B32 steps_left) {
    const Pred yes = w_.compare_s32(Compare::gt, steps_left, 0);
    std::vector<B32> d;
    for (const Fragment& f : acc_)
      d.insert(d.end(), f.begin(), f.end());
    const B32 columns = w_.mad(w_.shr(warp_, 2), 64 * kBlock, c_.rows() * kBlock);
    w_.loop("128 k", [&] {
      w_.cp_async_wait(stages_ahead() - 1);
      w_.fence_proxy_async();
      w_.barrier();
      copy_stage();
      // Descriptors ("wgmma, matrix descriptor"): address, 8 rows apart 1024 bytes, 128-byte swizzle; all over 16.
      constexpr int kHigh = 1024 / 16 | 1 << 30;
      const B32 a = w_.or_(w_.shr(w_.add(multiplied_, columns), 4), 1 << 16);
      const B32 b = w_.or_(w_.shr(multiplied_, 4), 1 << 16);
      w_.wgmma_fence();
      for (int j = 0; j < 4; ++j)
        w_.wgmma_s8(d, w_.combine(w_.add(a, 2 * j), kHigh), w_.combine(w_.add(b, 2 * j), kHigh), 8 * c_.row_tiles, yes);
      w_.wgmma_commit();
      w_.wgmma_wait(1);
      advance(multiplied_);
      w_.add_to(steps_left, steps_left, -1);
      return w_.compare_s32(Compare::gt, steps_left, 0);
    });
    w_.wgmma_wait(0);
    w_.cp_async_wait(0);
  }

  /// 64 k: two mma for each fragment.
  void multiply_half(B32 rows, B32 columns) {
    std::vector<std::array<B32, 4>> b;
    for (int r = 0; r < c_.row_tiles; ++r) {
      b.push_back(w_.make<B32, 4>());
      w_.load_shared(std::span<const B32>(b.back()), {rows, r * 8 * kBlock});
    }
    for (int t = 0; t < c_.column_tiles; ++t) {
      const std::array<B32, 4> low = w_.make<B32, 4>(), high = w_.make<B32, 4>(); // rows l/4 and l/4 + 8
      w_.load_shared(std::span<const B32>(low), {columns, t * 16 * kBlock});
      w_.load_shared(std::span<const B32>(high), {columns, (t * 16 + 8) * kBlock});
      for (std::size_t i = 0; i < 2; ++i) {
        const std::array<B32, 4> a = {low[2 * i], high[2 * i], low[2 * i + 1], high[2 * i + 1]};
        for (int r = 0; r < c_.row_tiles; ++r) {
          const Fragment& d = acc_[static_cast<std::size_t>(t * c_.row_tiles + r)];
          w_.mma_s8(d, a, std::span<const B32, 2>(b[static_cast<std::size_t>(r)].data() + 2 * i, 2), d);
        }
      }
    }
  }

  void store() {
    const Label end = w_.label();
    if (c_.warps_k > 1)
      w_.branch(end, w_.compare_u32(Compare::ne, group_, 0));
    const B32 column = w_.add(first_column_, w_.mad(warp_n_, 16 * c_.column_tiles, w_.shr(lane_, 2)));
    const B32 row = w_.mad(warp_m_, 8 * c_.row_tiles, w_.mul(w_.and_(lane_, 3), 2));
    const int share = static_cast<int>(acc_.size()) / c_.cluster;
    for (int i = 0; i < share; ++i) {
      B32 f_column = column, f_row = row;
      if (c_.cluster > 1) {
        const B32 f = w_.add(rank_, i * c_.cluster), t = w_.div_u32(f, c_.row_tiles);
        f_column = w_.mad(t, 16, column);
        f_row = w_.mad(w_.sub(f, w_.mul(t, c_.row_tiles)), 8, row);
      } else {
        f_column = w_.add(column, i / c_.row_tiles * 16);
        f_row = w_.add(row, i % c_.row_tiles * 8);
      }
      const B32 size = w_.mov(shape_.output == Output::s32 ? 4 : shape_.output == Output::bf16 ? 2 : 1);
      for (int half = 0; half < 2; ++half) {
        const B32 n = w_.add(f_column, 8 * half);
        const Pred n_exists = w_.compare_u32(Compare::lt, n, shape_.n);
        const std::array<F32, 1> scale = w_.make<F32, 1>();
        if (shape_.scaled) {
          w_.mov_to(scale[0], 0.0f);
          w_.load_global(std::span<const F32>(scale),
                         shape_.scale_per_channel ? GlobalAddress{w_.mad_wide(n, 4, scale_)} : GlobalAddress{scale_},
                         n_exists);
        }
        for (int e = 0; e < 2; ++e) {
          const B32 m = w_.add(f_row, e);
          const Pred exists = w_.both(n_exists, w_.compare_s32(Compare::lt, m, rows_left_));
          // row · ldc may pass 32 bits
          const B64 at =
              w_.add64(w_.mul_wide(n, size), w_.add64(out_, w_.mul_wide(w_.mul(ldc_, size), w_.add(first_row_, m))));
          store_element(at, acc_[static_cast<std::size_t>(i)][static_cast<std::size_t>(2 * half + e)], scale[0],
                        exists);
        }
      }
    }
    w_.bind(end);
  }

  void store_element(B64 at, B32 sum, F32 scale, Pred exists) {
    if (!shape_.scaled) {
      w_.store_global({at}, std::span<const B32>(&sum, 1), exists);
      return;
    }
    const F32 y = w_.mul(w_.from_s32(sum), scale);
    if (shape_.output == Output::bf16) {
      w_.store_global_b16({at}, w_.to_bf16x2(0.0f, y), exists);
    } else {
      const B32 whole = w_.to_s32_saturated(y);
      w_.store_global_b8({at}, w_.max_s32(w_.min_s32(whole, 127), -128), exists);
    }
  }

  const Shape shape_;
  const TileConfig c_;
  Writer w_;
  B64 out_, scale_;
  B32 ldc_, lane_, group_, warp_, warp_n_, warp_m_, rank_;
  B32 first_column_, first_row_, rows_left_;
  B32 shared_, ring_, ring_end_, copied_, multiplied_;
  B32 copy_row_, slot_, k_left_; ///< this thread's copies: row, place in a stage, k from its first byte on
  std::array<Copy, 2> copies_;
  std::array<B32, 2> row_read_, column_read_;
  std::vector<Fragment> acc_;
};

} // namespace

std::string TileConfig::text() const {
  return fmt::format("c{}r{}n{}m{}k{}c{}s{}{}", column_tiles, row_tiles, warps_n, warps_m, warps_k, cluster, stages,
                     wgmma ? "g" : "");
}
std::int64_t TileConfig::shared_bytes() const {
  const std::int64_t sums = rows() * columns() * 4;
  return std::max({std::int64_t{stages} * warps_k * (rows() + columns()) * kBlock,
                   warps_k > 1 ? (warps_k - 1) * sums : 0, cluster > 1 ? sums : 0});
}

Result<std::string> emit_tile(Sm sm, const Shape& shape, const TileConfig& c) {
  const bool suits = c.column_tiles > 0 && c.row_tiles > 0 && c.warps_n > 0 && c.warps_m > 0 && c.warps_k > 0 &&
                     c.cluster > 0 && std::has_single_bit(static_cast<unsigned>(c.cluster)) &&
                     c.column_tiles * c.row_tiles % c.cluster == 0 && c.stages >= (c.wgmma ? 3 : 2) &&
                     (!c.wgmma || (c.column_tiles == 1 && c.warps_m == 1 && c.warps_k == 1 && c.warps_n % 4 == 0)) &&
                     shape.scaled == (shape.output != Output::s32);
  if (!suits)
    return Status::error(Code::compile_failed,
                         fmt::format("int8_mm: configuration {} does not suit n={} k={}", c.text(), shape.n, shape.k));
  return Tile(sm, shape, c).emit();
}

} // namespace kiln::nvidia::int8
