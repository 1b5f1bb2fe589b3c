#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <vector>

#include "backends/nvidia/fp8_block_bmm.h"

namespace kiln::nvidia::fp8 {
namespace {

using namespace ptx;

constexpr int kRow = 128;     // k, and bytes, of a row in one stage: what one scale is for
constexpr int kHeader = 1024; // bytes of mbarriers
/// Descriptor ("wgmma, matrix descriptor"), all over 16: 8 rows apart 1024 bytes, 128-byte swizzle.
constexpr int kDescriptorLow = 1 << 16, kDescriptorHigh = 1024 / 16 | 1 << 30;

/// Where a tile lies: its first row of the 64-row operand and of the other one, and its matrix.
struct Place {
  B32 row, column, batch;
};

/// A persistent grid. In each block one warp makes the copy engine fill a ring of stages, and fetches the scales of
/// each by cp.async, whose strides are free; warpgroups multiply 128 of k into fresh sums, scale these and add them up.
class Tile {
public:
  Tile(Sm sm, const Shape& shape, const Config& config)
      : shape_(shape), c_(config), w_(sm, "main", config.threads(), config.cluster(), config.blocks_per_sm()) {}

  Result<std::string> emit() {
    prologue();
    const Label consumers = w_.label(), end = w_.label();
    w_.branch(consumers, w_.compare_u32(Compare::lt, warp_, consumer_warps()));
    produce();
    w_.branch(end);
    w_.bind(consumers, "consumers");
    consume();
    w_.bind(end, "end");
    return w_.finish();
  }

private:
  int consumer_warps() const { return 4 * c_.warpgroups; }
  int columns() const { return c_.columns; }
  std::int64_t k_blocks() const { return (shape_.k + kRow - 1) / kRow; }
  std::int64_t n_blocks() const { return (shape_.n + 127) / 128; }
  int z_bytes() const { return shape_.z == fp8_block_bmm::ZDtype::f32 ? 4 : 2; }
  bool f32_out() const { return shape_.z == fp8_block_bmm::ZDtype::f32; }

  // A stage: the 64-row operand, the other one.
  int row_bytes() const { return c_.rows() * kRow; }
  int stage_bytes() const { return (c_.rows() + columns()) * kRow; }
  // Its scales: X's rows, then those that the tile's part of Y needs; then, of a tile's first stage, where it lies.
  int x_rows() const { return c_.x_rows(); }
  int place_offset() const { return (x_rows() + c_.y_chunks() + 3) / 4 * 16; }
  int scale_bytes() const { return place_offset() + 16; }
  int output_offset() const { return kHeader + c_.stages * stage_bytes(); }
  int scales_offset() const { return output_offset() + (c_.stages_output() ? c_.rows() * columns() * 2 : 0); }
  int sums_offset() const { return scales_offset() + c_.stages * scale_bytes(); }
  int empty_offset() const { return 8 * c_.stages; }
  int sums_ready_offset() const { return 16 * c_.stages; }
  int sums_read_offset() const { return 16 * c_.stages + 8; }

  // A warp's parts of a warpgroup's sums that are stored together: 16 columns, or when swapped 8.
  int unit_sums() const { return c_.swapped ? 4 : 8; }
  int wave_units() const { return columns() / 2 / unit_sums(); }
  int units() const { return c_.units(); }

  void prologue() {
    x_map_ = w_.parameter_tensor_map("x_map");
    y_map_ = w_.parameter_tensor_map("y_map");
    z_map_ = w_.parameter_tensor_map("z_map");
    w_.parameter_b64("x");
    w_.parameter_b64("y");
    xs_ = w_.parameter_b64("xs");
    ys_ = w_.parameter_b64("ys");
    z_ = w_.parameter_b64("z");
    w_.parameter_b64("workspace");
    w_.parameter_b64("x_stride_b");
    z_stride_b_ = w_.parameter_b64("z_stride_b");
    xs_stride_b_ = w_.parameter_b64("xs_stride_b");
    m_ = w_.parameter_b32("m");
    w_.parameter_b32("x_stride_m");
    z_stride_m_ = w_.parameter_b32("z_stride_m");
    xs_stride_m_ = w_.parameter_b32("xs_stride_m");
    xs_stride_k_ = w_.parameter_b32("xs_stride_k");

    thread_ = w_.thread();
    lane_ = w_.and_(thread_, 31);
    warp_ = w_.uniform(w_.shr(thread_, 5));
    rank_ = c_.cluster() > 1 ? w_.rank_in_cluster() : w_.mov(0);
    cluster_ = c_.cluster() > 1 ? w_.div_u32(w_.block_x(), c_.cluster()) : w_.block_x();
    clusters_ = c_.cluster() > 1 ? w_.div_u32(w_.blocks_x(), c_.cluster()) : w_.blocks_x();
    shared_ = w_.shared_memory();
    // One thread each, by its number: the assembler makes a loop over the lanes of anything that may be several.
    const auto one_thread = [&](int thread, auto body) { w_.if_(w_.compare_u32(Compare::eq, thread_, thread), body); };
    one_thread(0, [&] {
      for (int s = 0; s < c_.stages; ++s)
        w_.mbarrier_init({shared_, 8 * s}, 1 + 32);
      w_.fence_mbarrier_init();
    });
    one_thread(32, [&] {
      for (int s = 0; s < c_.stages; ++s)
        w_.mbarrier_init({shared_, empty_offset() + 8 * s}, consumer_warps() * c_.sharing());
      w_.fence_mbarrier_init();
    });
    one_thread(64, [&] {
      w_.prefetch_tensor_map(x_map_);
      w_.prefetch_tensor_map(y_map_);
      if (c_.split > 1) {
        w_.mbarrier_init({shared_, sums_ready_offset()}, 1);
        w_.mbarrier_init({shared_, sums_read_offset()}, consumer_warps() * c_.split);
        w_.fence_mbarrier_init();
      }
    });
    w_.barrier();
    if (c_.cluster() > 1)
      w_.barrier_cluster_arrive_relaxed();
    if (c_.sharing() > 1) // else the others are waited for when there is something to send
      w_.barrier_cluster_wait();
    // Tiles, or pairs of tiles that share an operand.
    m_tiles_ = c_.group == 0 ? w_.mov(1) : w_.div_u32(w_.add(m_, m_step() - 1), m_step());
    matrix_tiles_ = w_.mul(m_tiles_, n_tiles());
    all_tiles_ = w_.mul(matrix_tiles_, shape_.b);
    k_first_ = w_.mov(0);
    steps_ = w_.mov(k_blocks());
    if (c_.split > 1) {
      k_first_ = w_.mul(rank_, rank_steps());
      steps_ = w_.max_s32(w_.min_s32(w_.sub(k_blocks(), k_first_), rank_steps()), 0);
    }
  }
  /// Of 128 k that each block of a split takes, but the last ones fewer.
  int rank_steps() const { return static_cast<int>((k_blocks() + c_.split - 1) / c_.split); }
  bool every_rank_has_steps() const { return (c_.split - 1) * rank_steps() < k_blocks(); }
  /// Rows of the 64-row operand, and of the other, that a cluster's tiles take.
  int cluster_rows() const { return c_.rows() * (c_.share == Share::columns ? c_.sharing() : 1); }
  int cluster_columns() const { return columns() * (c_.share == Share::rows ? c_.sharing() : 1); }
  int m_step() const { return c_.swapped ? cluster_columns() : cluster_rows(); }
  int n_step() const { return c_.swapped ? cluster_rows() : cluster_columns(); }
  std::int64_t n_tiles() const { return (shape_.n + n_step() - 1) / n_step(); }

  /// Bands of `group` tiles along M; within one, M first: what runs at one time shares operands in L2.
  Place locate(B32 index) {
    B32 batch = w_.mov(0), in_matrix = index;
    if (shape_.b > 1) {
      batch = w_.div_u32(index, matrix_tiles_);
      in_matrix = w_.sub(index, w_.mul(batch, matrix_tiles_));
    }
    B32 m = w_.mov(0), n = m;
    if (c_.group == 0) {
      n = w_.mul(in_matrix, n_step());
    } else {
      const B32 band_tiles = w_.mov(c_.group * n_tiles());
      const B32 band = w_.div_u32(in_matrix, band_tiles), first = w_.mul(band, c_.group);
      const B32 height = w_.min_u32(w_.sub(m_tiles_, first), c_.group);
      const B32 in_band = w_.sub(in_matrix, w_.mul(band, band_tiles));
      const B32 n_tile = w_.div_u32(in_band, height);
      const B32 m_tile = w_.add(first, w_.sub(in_band, w_.mul(n_tile, height)));
      m = w_.mul(m_tile, m_step());
      n = w_.mul(n_tile, n_step());
    }
    Place place{c_.swapped ? n : m, c_.swapped ? m : n, batch};
    if (c_.share == Share::columns)
      place.row = w_.mad(rank_, c_.rows(), place.row);
    else if (c_.share == Share::rows)
      place.column = w_.mad(rank_, columns(), place.column);
    return place;
  }
  template <class Body> void for_tiles(Body body) {
    const B32 tile = w_.mov(cluster_);
    w_.if_(w_.compare_u32(Compare::lt, tile, all_tiles_), [&] {
      w_.loop("tiles", [&] {
        body(tile);
        w_.add_to(tile, tile, clusters_);
        return w_.compare_u32(Compare::lt, tile, all_tiles_);
      });
    });
  }
  /// `body(step)` for each 128 of K that this block takes.
  template <class Body> void for_steps(Body body) {
    const auto loop = [&] {
      const B32 step = w_.mov(0);
      w_.loop("steps along K", [&] {
        body(step);
        w_.add_to(step, step, 1);
        return w_.compare_u32(Compare::lt, step, steps_);
      });
    };
    if (every_rank_has_steps())
      loop();
    else
      w_.if_(w_.compare_u32(Compare::ne, steps_, 0), loop);
  }

  struct Slot {
    B32 index, parity;
  };
  void advance(const Slot& s) {
    w_.add_to(s.index, s.index, 1);
    const Pred wraps = w_.compare_u32(Compare::eq, s.index, c_.stages);
    w_.mov_to(s.index, 0, wraps);
    w_.mov_to(s.parity, w_.xor_(s.parity, 1), wraps);
  }

  // ---- the copying warp

  void produce() {
    const Slot slot{w_.mov(0), w_.mov(1)};
    const Pred leads = w_.compare_u32(Compare::eq, thread_, 32 * consumer_warps());
    const int row_parts = (x_rows() + 31) / 32;
    for_tiles([&](B32 tile) {
      const Place place = locate(tile);
      const B32 x_row = c_.swapped ? place.column : place.row, y_row = c_.swapped ? place.row : place.column;
      w_.comment("this lane's scales");
      const B64 first = w_.mad_wide(k_first_, xs_stride_k_, w_.mul64(xs_stride_b_, w_.widen(place.batch)));
      std::vector<B64> from;
      std::vector<B32> bytes;
      for (int i = 0; i < row_parts; ++i) {
        const B32 row = w_.add(w_.add(x_row, lane_), 32 * i);
        from.push_back(w_.add64(xs_, w_.mul64(w_.mad_wide(row, xs_stride_m_, first), 4)));
        bytes.push_back(w_.select(w_.compare_u32(Compare::lt, row, m_), 4, 0));
      }
      const Pred has_y = w_.compare_u32(Compare::lt, lane_, c_.y_chunks());
      const Pred has_row = w_.compare_u32(Compare::lt, lane_, x_rows() - 32 * (row_parts - 1));
      const B32 block = w_.min_u32(w_.shr(w_.mad(lane_, c_.y_chunk(), y_row), 7), n_blocks() - 1);
      const B64 y_from = w_.mad_wide(w_.mad(w_.mad(place.batch, n_blocks(), block), k_blocks(), k_first_), 4, ys_);
      const B64 step_bytes = w_.mul_wide(xs_stride_k_, 4);
      for_steps([&](B32 step) {
        const B32 full = w_.mad(slot.index, 8, shared_);
        w_.mbarrier_wait({full, empty_offset()}, slot.parity);
        w_.if_(leads, [&] {
          if (c_.split == 1) {
            const std::array<B32, 4> v = {place.row, place.column, place.batch, place.batch};
            w_.store_shared({scales_of(slot), place_offset()}, std::span<const B32>(v),
                            w_.compare_u32(Compare::eq, step, 0));
          }
          copy_operands(slot, step, place);
        });
        const B32 scales = w_.mad(slot.index, scale_bytes(), w_.mad(lane_, 4, shared_));
        for (int i = 0; i < row_parts; ++i) {
          const bool partial = i + 1 == row_parts && x_rows() % 32 != 0;
          w_.cp_async_word({scales, scales_offset() + 128 * i}, {from[static_cast<std::size_t>(i)]},
                           bytes[static_cast<std::size_t>(i)], partial ? Guard(has_row) : Guard());
          w_.add64_to(from[static_cast<std::size_t>(i)], from[static_cast<std::size_t>(i)], step_bytes);
        }
        w_.cp_async_word({scales, scales_offset() + 4 * x_rows()}, {y_from}, w_.mov(4), has_y);
        w_.add64_to(y_from, y_from, 4);
        w_.cp_async_mbarrier_arrive({full});
        advance(slot);
      });
    });
    await_release(slot);
    if (c_.split > 1)
      w_.barrier_cluster_wait();
  }
  void copy_operands(const Slot& slot, B32 step, const Place& place) {
    const B32 full = w_.mad(slot.index, 8, shared_);
    const B32 stage = w_.mad(slot.index, stage_bytes(), w_.add(shared_, kHeader));
    const B32 k = w_.mul(w_.add(step, k_first_), kRow);
    w_.mbarrier_expect_bytes({full}, stage_bytes());
    copy(stage, c_.swapped ? y_map_ : x_map_, k, place.row, c_.rows(), c_.share == Share::rows, place.batch, full);
    copy(w_.add(stage, row_bytes()), c_.swapped ? x_map_ : y_map_, k, place.column, columns(),
         c_.share == Share::columns, place.batch, full);
  }
  void copy(B32 to, B64 map, B32 k, B32 row, int rows, bool shared, B32 batch, B32 full) {
    if (!shared) {
      w_.copy_tensor_3d({to}, map, k, row, batch, {full});
      return;
    }
    const int part = rows / c_.sharing();
    w_.copy_tensor_3d({w_.mad(rank_, part * kRow, to)}, map, k, w_.mad(rank_, part, row), batch, {full},
                      (1 << c_.sharing()) - 1);
  }

  /// No block leaves before all that others send to its barriers has come: each stage is free again.
  void await_release(const Slot& slot) {
    if (c_.sharing() == 1)
      return;
    const B32 i = w_.mov(0);
    w_.loop("every stage is free", [&] {
      w_.mbarrier_wait({w_.mad(slot.index, 8, shared_), empty_offset()}, slot.parity);
      advance(slot);
      w_.add_to(i, i, 1);
      return w_.compare_u32(Compare::lt, i, c_.stages);
    });
  }

  // ---- the multiplying warpgroups

  void consume() {
    yes_ = w_.always(true);
    no_ = w_.always(false);
    warpgroup_ = w_.shr(warp_, 2);
    quad_ = w_.and_(lane_, 3);
    const B32 empty = w_.add(shared_, empty_offset());
    first_lane_ = w_.compare_u32(Compare::lt, lane_, c_.sharing());
    empty_ = c_.sharing() > 1 ? w_.in_block(empty, w_.min_u32(lane_, c_.sharing() - 1)).base : empty;
    for (int wave = 0; wave < c_.waves; ++wave)
      for (int e = 0; e < columns() / 2; ++e)
        sums_.push_back(w_.f32());
    for (int e = 0; e < columns() / 2; ++e)
      part_.push_back(w_.f32());
    for (int i = 0; i < (c_.swapped ? columns() / 4 : 2 * c_.waves); ++i)
      x_scales_.push_back(w_.f32());
    for (int i = 0; i < (c_.swapped ? c_.waves : c_.y_chunks()); ++i)
      y_scales_.push_back(w_.f32());
    const Slot slot{w_.mov(0), w_.mov(0)};
    row_descriptor_ = w_.b32();
    column_descriptor_ = w_.b32();
    describe(slot);
    if (c_.split > 1)
      multiply_split(slot);
    else
      multiply_all(slot);
  }

  /// The tiles of this block. A tile is stored while the first products of the next run.
  void multiply_all(const Slot& slot) {
    const B32 tile = w_.mov(cluster_);
    Place place{w_.b32(), w_.b32(), w_.b32()};
    w_.if_(w_.compare_u32(Compare::lt, tile, all_tiles_), [&] {
      await_stage(slot);
      w_.loop("tiles", [&] {
        start_products(0);
        const Place next = load_place(slot);
        load_scales(slot);
        w_.if_(w_.compare_u32(Compare::ne, tile, cluster_), [&] { store_all(place); });
        w_.mov_to(place.row, next.row);
        w_.mov_to(place.column, next.column);
        w_.mov_to(place.batch, next.batch);
        w_.add_to(tile, tile, clusters_);
        finish_step(slot, w_.always(k_blocks() > 1), true);
        if (k_blocks() > 1)
          multiply_others(slot);
        const Pred more = w_.compare_u32(Compare::lt, tile, all_tiles_);
        w_.if_(more, [&] { await_stage(slot); });
        return more;
      });
      store_all(place);
    });
    w_.bulk_wait_read(0); // the block's memory is read until then
  }
  /// With K split over the cluster.
  void multiply_split(const Slot& slot) {
    sums_parity_ = w_.mov(0);
    const B32 waited = w_.mov(0);
    for_tiles([&](B32 tile) {
      const auto steps = [&] {
        await_stage(slot);
        load_scales(slot);
        start_products(0);
        const Pred more = w_.compare_u32(Compare::lt, 1, steps_);
        finish_step(slot, more, true);
        w_.if_(more, [&] { multiply_others(slot); });
      };
      if (every_rank_has_steps()) {
        steps();
      } else {
        for (const F32 sum : sums_)
          w_.mov_to(sum, 0.0f);
        w_.if_(w_.compare_u32(Compare::ne, steps_, 0), steps);
      }
      w_.if_(w_.compare_u32(Compare::eq, waited, 0), [&] { w_.barrier_cluster_wait(); });
      w_.mov_to(waited, 1);
      store_shares(locate(tile));
    });
    w_.mbarrier_wait({shared_, sums_read_offset()}, w_.xor_(sums_parity_, 1));
  }

  /// As the copying warp left it with a tile's first stage.
  Place load_place(const Slot& slot) {
    const std::array<B32, 4> v = w_.make<B32, 4>();
    w_.load_shared(std::span<const B32>(v), {scales_of(slot), place_offset()});
    return {v[0], v[1], v[2]};
  }
  void await_stage(const Slot& slot) { w_.mbarrier_wait({w_.mad(slot.index, 8, shared_)}, slot.parity); }
  B32 scales_of(const Slot& slot) { return w_.mad(slot.index, scale_bytes(), w_.add(shared_, scales_offset())); }
  /// The low words of the descriptors of a stage's operands, for start_products.
  void describe(const Slot& slot) {
    const B32 rows = w_.add(shared_, kHeader), columns = w_.add(rows, row_bytes());
    const B32 stage = w_.mad(slot.index, stage_bytes() / 16, kDescriptorLow);
    w_.mov_to(row_descriptor_, w_.add(stage, w_.shr(w_.mad(warpgroup_, c_.waves * 64 * kRow, rows), 4)));
    w_.mov_to(column_descriptor_, w_.add(stage, w_.shr(columns, 4)));
  }
  /// Of a stage that has come, into x_scales_ and y_scales_.
  void load_scales(const Slot& slot) {
    const B32 scales = scales_of(slot);
    load_x_scales(scales);
    load_y_scales(scales);
  }
  /// part = 64 rows of the stage times its columns, not awaited.
  void start_products(int wave) {
    const B32 row_low = w_.add(row_descriptor_, wave * 64 * kRow / 16), column_low = column_descriptor_;
    w_.wgmma_fence();
    for (int i = 0; i < kRow / 32; ++i)
      w_.wgmma_fp8(part_, w_.combine(w_.add(row_low, 2 * i), kDescriptorHigh),
                   w_.combine(w_.add(column_low, 2 * i), kDescriptorHigh), columns(), i == 0 ? no_ : yes_,
                   c_.swapped ? shape_.y_e5m2 : shape_.x_e5m2, c_.swapped ? shape_.x_e5m2 : shape_.y_e5m2);
    w_.wgmma_commit();
  }
  /// A step whose first products have been started. While its last ones run, the next stage is awaited, if there is
  /// `more` of the tile, and its scales are fetched.
  void finish_step(const Slot& slot, Pred more, bool is_first) {
    for (int wave = 0; wave < c_.waves; ++wave) {
      if (wave > 0)
        start_products(wave);
      const std::vector<F32> factors = scale_factors(wave);
      const B32 used = w_.mov(slot.index);
      if (wave + 1 == c_.waves) {
        advance(slot);
        describe(slot);
        w_.if_(more, [&] { await_stage(slot); });
        load_scales(slot); // of no use after a tile's last step
      }
      w_.wgmma_wait(0);
      if (wave + 1 == c_.waves)
        release(used);
      add_scaled(factors, wave, is_first);
    }
  }
  /// All steps of a tile but the first. Returns with nothing in flight.
  void multiply_others(const Slot& slot) {
    const B32 step = w_.mov(1);
    w_.loop("steps along K", [&] {
      start_products(0);
      w_.add_to(step, step, 1);
      const Pred more = w_.compare_u32(Compare::lt, step, steps_);
      finish_step(slot, more, false);
      return more;
    });
  }
  void release(B32 slot) {
    w_.barrier_warp();
    const B32 at = w_.mad(slot, 8, empty_);
    if (c_.sharing() > 1)
      w_.mbarrier_arrive_cluster({at}, first_lane_);
    else
      w_.mbarrier_arrive({at}, first_lane_);
  }

  /// Of this lane's rows of X, two a wave; swapped, of its columns, two of eight.
  void load_x_scales(B32 scales) {
    if (c_.swapped) {
      const B32 from = w_.mad(quad_, 8, scales);
      for (int j = 0; j < columns() / 8; ++j)
        w_.load_shared(std::span<const F32>(x_scales_).subspan(static_cast<std::size_t>(2 * j), 2), {from, 32 * j});
      return;
    }
    const B32 row = w_.add(w_.mad(warpgroup_, c_.waves * 64, w_.mul(w_.and_(warp_, 3), 16)), w_.shr(lane_, 2));
    const B32 from = w_.mad(row, 4, scales);
    for (int i = 0; i < 2 * c_.waves; ++i)
      w_.load_shared(std::span<const F32>(x_scales_).subspan(static_cast<std::size_t>(i), 1),
                     {from, i / 2 * 256 + i % 2 * 32});
  }
  /// Of the column chunks; swapped, of this warpgroup's waves.
  void load_y_scales(B32 scales) {
    const B32 from = c_.swapped ? w_.mad(warpgroup_, c_.waves * 4, scales) : scales;
    for (std::size_t i = 0; i < y_scales_.size(); ++i)
      w_.load_shared(std::span<const F32>(y_scales_).subspan(i, 1), {from, 4 * (x_rows() + static_cast<int>(i))});
  }
  /// Swapped: of each pair of columns. Else of each chunk of columns, for both rows.
  std::vector<F32> scale_factors(int wave) {
    std::vector<F32> factors;
    if (c_.swapped)
      for (const F32 v : x_scales_)
        factors.push_back(w_.mul(v, y_scales_[static_cast<std::size_t>(wave)]));
    else
      for (const F32 v : y_scales_)
        for (int half = 0; half < 2; ++half)
          factors.push_back(w_.mul(v, x_scales_[static_cast<std::size_t>(2 * wave + half)]));
    return factors;
  }
  /// sums += factors · part; of a tile's first step =.
  void add_scaled(const std::vector<F32>& factors, int wave, bool is_first) {
    for (int e = 0; e < columns() / 2; ++e) {
      const int j = e / 4, half = e / 2 % 2;
      const int f = c_.swapped ? 2 * j + e % 2 : 2 * (8 * j / c_.y_chunk()) + half;
      const F32 sum = sums_[static_cast<std::size_t>(wave * columns() / 2 + e)];
      const F32 part = part_[static_cast<std::size_t>(e)], factor = factors[static_cast<std::size_t>(f)];
      if (is_first)
        w_.mov_to(sum, w_.mul(part, factor));
      else
        w_.fma_to(sum, part, factor, sum);
    }
  }

  // ---- the way out

  void store_all(const Place& place) {
    if (c_.stages_output() && !f32_out()) {
      store_staged(place);
      return;
    }
    prepare_store(place);
    for (int wave = 0; wave < c_.waves; ++wave)
      for (int u = 0; u < wave_units(); ++u) {
        const auto begin = static_cast<std::size_t>((wave * wave_units() + u) * unit_sums());
        store_unit(std::span<const F32>(sums_).subspan(begin, static_cast<std::size_t>(unit_sums())), wave, u);
      }
  }

  /// Through shared memory, each warp what it has: boxes of 16 rows by 64 columns whose 16-byte chunks are exchanged
  /// (128-byte swizzle); swapped, of all rows by 16 columns.
  void store_staged(const Place& place) {
    const int box_bytes = c_.swapped ? columns() * 32 : 16 * 128, boxes = c_.swapped ? 1 : columns() / 64;
    const B32 buffer = w_.add(w_.mad(warp_, c_.waves * boxes * box_bytes, shared_), output_offset());
    w_.bulk_wait_read(0);
    w_.barrier_warp();
    for (int wave = 0; wave < c_.waves; ++wave)
      if (c_.swapped)
        stage_transposed(buffer, wave, box_bytes);
      else
        stage(buffer, wave, box_bytes);
    w_.fence_proxy_async();
    w_.barrier_warp();
    const Pred leads = w_.compare_u32(Compare::eq, lane_, 0);
    const B32 first = w_.add(w_.mad(warpgroup_, c_.waves * 64, place.row), w_.mul(w_.and_(warp_, 3), 16));
    for (int wave = 0; wave < c_.waves; ++wave)
      for (int box = 0; box < boxes; ++box) {
        const B32 row = w_.add(first, 64 * wave), column = w_.add(place.column, 64 * box);
        w_.store_tensor_3d(z_map_, c_.swapped ? row : column, c_.swapped ? column : row, place.batch,
                           {buffer, (wave * boxes + box) * box_bytes}, leads);
      }
    w_.bulk_commit();
  }
  std::span<const F32> unit_of(int wave, int unit) {
    return std::span<const F32>(sums_).subspan(static_cast<std::size_t>((wave * wave_units() + unit) * unit_sums()),
                                               static_cast<std::size_t>(unit_sums()));
  }
  void stage(B32 buffer, int wave, int box_bytes) {
    const B32 row = w_.and_(lane_, 7); // of the matrix lane / 8: rows 0 to 7 and 8 to 15, of eight columns and the next
    const B32 chunk = w_.xor_(row, w_.shr(lane_, 4));
    const B32 at = w_.mad(w_.and_(lane_, 15), 128, w_.mad(chunk, 16, buffer));
    for (int u = 0; u < wave_units(); ++u) {
      const std::span<const F32> v = unit_of(wave, u);
      const std::array<B32, 4> matrices = {pack(v[1], v[0]), pack(v[3], v[2]), pack(v[5], v[4]), pack(v[7], v[6])};
      w_.stmatrix({w_.xor_(at, u % 4 * 32), (wave * columns() / 64 + u / 4) * box_bytes}, matrices);
    }
  }
  void stage_transposed(B32 buffer, int wave, int box_bytes) {
    // Row of the matrix lane / 8: columns of Z 0 to 7 and 8 to 15, of eight rows and the next.
    const B32 row = w_.mad(w_.shr(lane_, 4), 8, w_.and_(lane_, 7)), chunk = w_.and_(w_.shr(lane_, 3), 1);
    const B32 at = w_.mad(row, 32, w_.mad(chunk, 16, buffer));
    for (int u = 0; u < wave_units(); u += 2) {
      std::vector<B32> matrices;
      for (int i = u; i < std::min(u + 2, wave_units()); ++i) {
        const std::span<const F32> v = unit_of(wave, i);
        matrices.push_back(pack(v[1], v[0]));
        matrices.push_back(pack(v[3], v[2]));
      }
      w_.stmatrix({at, wave * box_bytes + u * 8 * 32}, matrices, true);
    }
  }

  /// K was split over the cluster: block r gets everybody's sums of the units r, r + split, … of each warp, adds them
  /// up in the order of the ranks and stores them.
  void store_shares(const Place& place) {
    w_.comment("sums over the cluster");
    const B32 at = w_.mad(thread_, 16, w_.add(shared_, sums_offset()));
    const B32 mine = w_.mad(rank_, c_.rank_units() * unit_bytes(), at);
    w_.mbarrier_wait({shared_, sums_read_offset()}, w_.xor_(sums_parity_, 1));
    for (int rank = 0; rank < c_.split; ++rank) {
      const B32 to = w_.in_block(mine, rank).base, arrived = w_.in_block(shared_, rank).base;
      for (int i = 0; i * c_.split + rank < units(); ++i)
        for (int part = 0; part < unit_sums() / 4; ++part)
          w_.store_async({to, i * unit_bytes() + part * part_bytes()},
                         std::span<const F32>(sums_)
                             .subspan(static_cast<std::size_t>((i * c_.split + rank) * unit_sums() + 4 * part))
                             .first<4>(),
                         {arrived, sums_ready_offset()});
    }
    const B32 unit_count = w_.div_u32(w_.sub(units() + c_.split - 1, rank_), c_.split);
    w_.mbarrier_expect_bytes({shared_, sums_ready_offset()}, w_.mul(unit_count, c_.split * unit_bytes()),
                             w_.compare_u32(Compare::eq, thread_, 0));
    prepare_store(place);
    w_.mbarrier_wait({shared_, sums_ready_offset()}, sums_parity_);
    for (int i = 0; i * c_.split < units(); ++i) {
      const auto share = [&] {
        std::vector<F32> total;
        for (int rank = 0; rank < c_.split; ++rank)
          for (int part = 0; part < unit_sums() / 4; ++part) {
            const std::array<F32, 4> v = w_.make<F32, 4>();
            w_.load_shared(std::span<const F32>(v),
                           {at, (rank * c_.rank_units() + i) * unit_bytes() + part * part_bytes()});
            for (std::size_t e = 0; e < 4; ++e)
              if (rank == 0)
                total.push_back(v[e]);
              else
                w_.add_to(total[static_cast<std::size_t>(4 * part) + e], total[static_cast<std::size_t>(4 * part) + e],
                          v[e]);
          }
        const B32 unit = w_.add(rank_, i * c_.split), wave = w_.div_u32(unit, wave_units());
        store_unit(total, wave, w_.sub(unit, w_.mul(wave, wave_units())));
      };
      if ((i + 1) * c_.split <= units())
        share();
      else
        w_.if_(w_.compare_u32(Compare::lt, rank_, units() - i * c_.split), share);
    }
    w_.barrier_warp();
    const SharedAddress theirs = w_.in_block(shared_, w_.min_u32(lane_, c_.split - 1));
    w_.mbarrier_arrive_cluster({theirs.base, sums_read_offset()}, w_.compare_u32(Compare::lt, lane_, c_.split));
    w_.mov_to(sums_parity_, w_.xor_(sums_parity_, 1));
  }
  int part_bytes() const { return 16 * 128 * c_.warpgroups; }
  int unit_bytes() const { return unit_sums() / 4 * part_bytes(); }

  /// Where in Z this lane stores what it has of its warp's first row and column, and how the rows go on.
  void prepare_store(const Place& place) {
    const B32 warp_row = w_.add(w_.mad(warpgroup_, c_.waves * 64, place.row), w_.mul(w_.and_(warp_, 3), 16));
    const B32 eighth = w_.shr(lane_, 2), pair = w_.mul(quad_, 2);
    // Pairs of 16-bit elements change lanes (store_pairs), so that a lane has four neighbours of one of two eights.
    const B32 four = w_.mad(w_.and_(quad_, 1), 8, w_.mul(w_.shr(quad_, 1), 4));
    is_odd_ = w_.compare_u32(Compare::ne, w_.and_(lane_, 1), 0);
    if (c_.swapped) {
      first_m_ = w_.add(place.column, f32_out() ? pair : eighth);
      first_n_ = w_.add(warp_row, f32_out() ? eighth : four);
    } else {
      first_m_ = w_.add(warp_row, eighth);
      first_n_ = w_.add(place.column, f32_out() ? pair : four);
    }
    const B64 matrix = w_.add64(z_, w_.mul64(w_.mul64(z_stride_b_, w_.widen(place.batch)), z_bytes()));
    z_row_bytes_ = w_.mul64(w_.widen(z_stride_m_), z_bytes());
    z_first_ = w_.mad_wide(first_n_, z_bytes(), w_.add64(matrix, w_.mul64(z_row_bytes_, w_.widen(first_m_))));
  }
  /// `rows` below and `columns` beside the lane's first element: a constant or, where K was split, a register.
  GlobalAddress z_at(I32 rows, I32 columns) {
    const B64 row = rows.is_immediate ? w_.add64(z_first_, w_.mul64(z_row_bytes_, rows.immediate))
                                      : w_.add64(z_first_, w_.mul64(z_row_bytes_, w_.widen(rows.reg)));
    if (columns.is_immediate)
      return {row, columns.immediate * z_bytes()};
    return {w_.mad_wide(columns, z_bytes(), row)};
  }
  Pred z_exists(I32 rows, I32 columns) {
    const Pred row_exists = w_.compare_u32(Compare::lt, w_.add(first_m_, rows), m_);
    if (shape_.n % n_step() == 0)
      return row_exists;
    return w_.both(row_exists, w_.compare_u32(Compare::lt, w_.add(first_n_, columns), shape_.n));
  }
  I32 plus(I32 a, int b) { return a.is_immediate ? I32(a.immediate + b) : I32(w_.add(a, b)); }
  I32 times(I32 a, int b) { return a.is_immediate ? I32(a.immediate * b) : I32(w_.mul(a, b)); }

  /// Sums of 16 rows and 16 columns (swapped: 8) that this warp has, by wgmma's layout of D: row l/4 (+8), columns
  /// 2·(l mod 4) + {0, 1} of each eight.
  void store_unit(std::span<const F32> v, I32 wave, I32 unit) {
    if (c_.swapped) {
      const I32 m = times(unit, 8), n = times(wave, 64);
      if (!f32_out()) {
        store_pairs(w_.transpose(pack(v[1], v[0])), w_.transpose(pack(v[3], v[2])), m, n);
        return;
      }
      for (int e = 0; e < 2; ++e)
        for (int half = 0; half < 2; ++half)
          w_.store_global(z_at(plus(m, e), plus(n, 8 * half)), v.subspan(static_cast<std::size_t>(2 * half + e), 1),
                          z_exists(plus(m, e), plus(n, 8 * half)));
      return;
    }
    for (int half = 0; half < 2; ++half) {
      const I32 m = plus(times(wave, 64), 8 * half), n = times(unit, 16);
      const auto h = static_cast<std::size_t>(2 * half);
      if (!f32_out()) {
        store_pairs(pack(v[h + 1], v[h]), pack(v[h + 5], v[h + 4]), m, n);
        continue;
      }
      for (int eight = 0; eight < 2; ++eight)
        w_.store_global(z_at(m, plus(n, 8 * eight)), v.subspan(static_cast<std::size_t>(4 * eight) + h, 2),
                        z_exists(m, plus(n, 8 * eight)));
    }
  }
  B32 pack(F32 high, F32 low) {
    return shape_.z == fp8_block_bmm::ZDtype::f16 ? w_.to_f16x2(high, low) : w_.to_bf16x2(high, low);
  }
  /// 16 columns of a row, of which this lane has 2·(l mod 4) + {0, 1} and eight further. Neighbours exchange a pair:
  /// whole sectors of 32 bytes are written.
  void store_pairs(B32 low, B32 high, I32 m, I32 n) {
    const B32 theirs = w_.shuffle_xor(w_.select(is_odd_, low, high), 1);
    const std::array<B32, 2> four = {w_.select(is_odd_, theirs, low), w_.select(is_odd_, high, theirs)};
    w_.store_global(z_at(m, n), std::span<const B32>(four), z_exists(m, n));
  }

  const Shape shape_;
  const Config c_;
  Writer w_;
  B64 x_map_, y_map_, z_map_, xs_, ys_, z_, z_stride_b_, xs_stride_b_;
  B32 m_, z_stride_m_, xs_stride_m_, xs_stride_k_;
  B32 thread_, lane_, warp_, rank_, cluster_, clusters_, shared_;
  B32 m_tiles_, matrix_tiles_, all_tiles_, k_first_, steps_;
  Pred yes_, no_, first_lane_, is_odd_;
  B32 row_descriptor_, column_descriptor_;
  B32 warpgroup_, quad_, empty_, sums_parity_;
  std::vector<F32> sums_, part_; ///< of all waves, scaled; of 128 k
  std::vector<F32> x_scales_, y_scales_;
  B32 first_m_, first_n_;
  B64 z_first_, z_row_bytes_;
};

} // namespace

Result<Emitted> emit(Sm sm, const Shape& shape, const Config& config) {
  Result<std::string> text = Tile(sm, shape, config).emit();
  if (!text)
    return text.status();
  Emitted emitted;
  emitted.text = std::move(*text);
  emitted.launch.tile_m = config.swapped ? config.columns : config.rows();
  emitted.launch.tile_n = config.swapped ? config.rows() : config.columns;
  emitted.launch.split_k = config.split;
  emitted.launch.cluster_x = config.cluster() > 1 ? config.cluster() : 0;
  emitted.launch.threads = config.threads();
  emitted.launch.smem_bytes = static_cast<std::int32_t>(config.shared_bytes());
  emitted.launch.blocks_per_sm = config.blocks_per_sm();
  const int row_box = config.rows() / (config.share == Share::rows ? config.sharing() : 1);
  const int column_box = config.columns / (config.share == Share::columns ? config.sharing() : 1);
  emitted.boxes.x = {.inner = kRow, .rows = config.swapped ? column_box : row_box, .swizzle = 128};
  if (config.stages_output() && shape.z != fp8_block_bmm::ZDtype::f32)
    emitted.boxes.z = config.swapped ? cuda::TensorBox{.inner = 16, .rows = config.columns}
                                     : cuda::TensorBox{.inner = 64, .rows = 16, .swizzle = 128};
  emitted.boxes.y = {.inner = kRow, .rows = config.swapped ? row_box : column_box, .swizzle = 128};
  return emitted;
}

} // namespace kiln::nvidia::fp8
