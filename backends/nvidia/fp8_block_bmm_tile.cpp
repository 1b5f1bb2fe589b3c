#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <vector>

#include "backends/nvidia/fp8_block_bmm.h"

namespace kiln::nvidia::fp8 {
namespace {

using namespace ptx;

/// A persistent grid. In each block one warp makes the copy engine fill a ring of stages, and fetches the scales of
/// each by cp.async, whose strides are free; warpgroups multiply 128 of k into fresh sums, scale these and add them up.
class Tile : PersistentTile<Config, F32> {
public:
  Tile(Sm sm, const Shape& shape, const Config& config)
      : PersistentTile(sm, {shape.b, shape.n, k_blocks(shape)}, config, layout_of(config)), shape_(shape) {}

  Result<std::string> emit() {
    prologue();
    if (c_.copier)
      return roles([&] { produce(); }, [&] { consume(); });
    consume();
    return w_.finish();
  }

private:
  static std::int64_t k_blocks(const Shape& shape) { return (shape.k + kRow - 1) / kRow; }
  std::int64_t k_blocks() const { return k_steps(); }
  std::int64_t n_blocks() const { return (shape_.n + 127) / 128; }
  int z_bytes() const { return shape_.z == fp8_block_bmm::ZDtype::f32 ? 4 : 2; }
  bool f32_out() const { return shape_.z == fp8_block_bmm::ZDtype::f32; }

  // A stage: the 64-row operand, the other one. Behind the ring the tile on its way out, the scales of each stage: X's
  // rows, then those that the tile's part of Y needs; then, of a tile's first stage, where it lies.
  static int stage_bytes(const Config& c) { return (c.rows() + c.columns) * kRow; }
  static int place_offset(const Config& c) { return (c.x_rows() + c.y_chunks() + 3) / 4 * 16; }
  static int scale_bytes(const Config& c) { return place_offset(c) + 16; }
  static int output_offset(const Config& c) { return kHeader + c.stages * stage_bytes(c); }
  static int scales_offset(const Config& c) {
    return output_offset(c) + (c.stages_output() ? c.rows() * c.columns * 2 : 0);
  }
  /// A stage has come with the copy engine's bytes and the scales, of the copying warp's lanes or of a warpgroup's.
  static Layout layout_of(const Config& c) {
    return {.stage_bytes = stage_bytes(c),
            .sums_offset = scales_offset(c) + c.stages * scale_bytes(c),
            .full_arrivals = 1 + (c.copier ? 32 : 128)};
  }
  int row_bytes() const { return c_.rows() * kRow; }
  int stage_bytes() const { return stage_bytes(c_); }
  int x_rows() const { return c_.x_rows(); }
  int place_offset() const { return place_offset(c_); }
  int scale_bytes() const { return scale_bytes(c_); }
  int output_offset() const { return output_offset(c_); }
  int scales_offset() const { return scales_offset(c_); }

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

    start({x_map_, y_map_}, c_.early ? Meeting::early : Meeting::together, c_.copier && !c_.early);
  }
  /// Early and in no cluster that shares: the copying warp's first round through the ring.
  bool has_unwaited_round() const { return c_.early && c_.sharing() == 1; }

  // ---- the copying warp

  void produce() {
    const Slot slot{w_.mov(0), w_.mov(1)};
    const Pred leads = w_.compare_u32(Compare::eq, thread_, 32 * consumer_warps());
    const int row_parts = (x_rows() + 31) / 32;
    if (c_.streams)
      policy_ = w_.evict_first_policy();
    const B32 filled = has_unwaited_round() ? w_.mov(0) : B32(); // stages, until the ring is full
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
        if (has_unwaited_round()) {
          w_.if_(w_.compare_u32(Compare::ge, filled, c_.stages), [&] {
            w_.if_(w_.compare_u32(Compare::eq, filled, c_.stages), [&] { w_.barrier(kEmptyMade, c_.threads()); });
            w_.mbarrier_wait({full, empty_offset()}, slot.parity);
          });
          w_.mov_to(filled, w_.min_u32(w_.add(filled, 1), c_.stages + 1));
        } else {
          w_.mbarrier_wait({full, empty_offset()}, slot.parity);
        }
        w_.if_(leads, [&] {
          if (c_.split == 1) {
            const std::array<B32, 4> v = {place.row, place.column, place.batch, place.batch};
            w_.store_shared({scales_of(slot), place_offset()}, std::span<const B32>(v),
                            w_.compare_u32(Compare::eq, step, 0));
          }
          copy_operands(slot, step, place);
          if (c_.prefetches)
            prefetch(step, place);
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
    if (has_unwaited_round())
      w_.if_(w_.compare_u32(Compare::le, filled, c_.stages), [&] { w_.barrier(kEmptyMade, c_.threads()); });
    await_release(slot);
    if (c_.split > 1)
      w_.barrier_cluster_wait();
  }
  /// Y of the step that will have this one's stage, if it is of the same tile.
  void prefetch(B32 step, const Place& place) {
    const B32 later = w_.add(step, c_.stages);
    const int rows = c_.swapped ? c_.rows() : columns();
    const bool shared = c_.share == (c_.swapped ? Share::rows : Share::columns);
    w_.if_(w_.compare_u32(Compare::lt, later, steps_), [&] {
      const B32 first = c_.swapped ? place.row : place.column;
      w_.prefetch_tensor_3d(y_map_, w_.mul(w_.add(later, k_first_), kRow),
                            shared ? w_.mad(rank_, rows / c_.sharing(), first) : first, place.batch, policy_);
    });
  }
  void copy_operands(const Slot& slot, B32 step, const Place& place) {
    const B32 full = w_.mad(slot.index, 8, shared_);
    const B32 stage = w_.mad(slot.index, stage_bytes(), w_.add(shared_, kHeader));
    const B32 k = w_.mul(w_.add(step, k_first_), kRow);
    w_.mbarrier_expect_bytes({full}, stage_bytes());
    copy(stage, c_.swapped ? y_map_ : x_map_, k, place.row, c_.rows(), c_.share == Share::rows, place.batch, full,
         c_.swapped ? policy_ : B64());
    copy(w_.add(stage, row_bytes()), c_.swapped ? x_map_ : y_map_, k, place.column, columns(),
         c_.share == Share::columns, place.batch, full, c_.swapped ? B64() : policy_);
  }

  // ---- the multiplying warpgroups

  void consume() {
    start_consuming();
    for (int e = 0; e < columns() / 2; ++e)
      part_.push_back(w_.f32());
    for (int e = 0; c_.overlaps && e < columns() / 2; ++e)
      other_part_.push_back(w_.f32());
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
    else if (c_.overlaps)
      multiply_overlapped(slot);
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
  /// The same with the products of the next step begun, in the other set of registers, before those of a step are
  /// scaled. The last step of a tile begins the next tile, but where their sets are the same, since K has an odd number
  /// of steps: then only once it is scaled. (Awaiting the older of two steps in flight would be as good, but ptxas does
  /// not see through that in a loop.)
  void multiply_overlapped(const Slot& slot) {
    if (!c_.copier)
      begin_copies();
    const B32 tile = w_.mov(cluster_);
    Place place{w_.b32(), w_.b32(), w_.b32()};
    w_.if_(w_.compare_u32(Compare::lt, tile, all_tiles_), [&] {
      await_stage(slot);
      start_products(part_);
      w_.loop("tiles", [&] {
        const Pred is_later = w_.compare_u32(Compare::ne, tile, cluster_);
        w_.add_to(tile, tile, clusters_);
        const Pred more = w_.compare_u32(Compare::lt, tile, all_tiles_);
        const auto first = [&](const Slot& used) {
          const Place next = load_place(used);
          w_.if_(is_later, [&] { store_all(place); });
          w_.mov_to(place.row, next.row);
          w_.mov_to(place.column, next.column);
          w_.mov_to(place.batch, next.batch);
        };
        const auto nothing = [](const Slot&) {};
        const std::int64_t steps = k_blocks();
        overlapped_step(slot, 0, true, steps > 1 ? Pred() : more, first);
        if (steps > 3) {
          const B32 pair = w_.mov(0);
          w_.loop("steps along K", [&] {
            overlapped_step(slot, 1, false, {}, nothing);
            overlapped_step(slot, 0, false, {}, nothing);
            w_.add_to(pair, pair, 1);
            return w_.compare_u32(Compare::lt, pair, (steps - 2) / 2);
          });
        }
        if (steps > 1 && steps % 2 != 0)
          overlapped_step(slot, 1, false, {}, nothing);
        if (steps > 1)
          overlapped_step(slot, steps % 2 == 0 ? 1 : 0, false, more, nothing);
        return more;
      });
      w_.wgmma_wait(0); // products of no tile
      store_all(place);
    });
    if (!c_.copier)
      w_.if_(w_.compare_u32(Compare::eq, warp_, 0), [&] { await_release(copies_.slot); });
    w_.bulk_wait_read(0);
  }
  /// A step whose products run in set `set`. `more`: whether there is another tile, of a tile's last step; none: the
  /// next step is of the same tile. Where nothing comes, products of whatever the ring holds begin all the same: ptxas
  /// does not see through any that begin on a condition.
  template <class Body>
  void overlapped_step(const Slot& slot, int set, bool is_first, Pred more, const Body& meanwhile) {
    const bool is_last = more != Pred();
    const Slot used{w_.mov(slot.index), {}};
    advance(slot);
    describe(slot);
    if (is_last)
      w_.if_(more, [&] { await_stage(slot); });
    else
      await_stage(slot);
    std::vector<F32> factors;
    const auto read_scales = [&] {
      load_scales(used);
      factors = scale_factors(0);
    };
    if (!c_.late)
      read_scales();
    meanwhile(used);
    if (!c_.copier)
      copy_next();
    w_.wgmma_wait(0);
    const bool in_same_set = is_last && set == 0;
    if (!in_same_set)
      start_products(set == 0 ? other_part_ : part_);
    if (c_.late) {
      w_.barrier_warp(); // ptxas moves nothing across it that reads memory, nor what needs that
      read_scales();
    }
    release(used.index);
    add_scaled(set == 0 ? part_ : other_part_, factors, 0, is_first);
    if (in_same_set)
      start_products(part_);
  }

  // ---- copies by the multiplying warps: one thread the operands, the last warpgroup the scales, as many steps ahead
  // as the ring has room for beside the stage that was multiplied last

  /// Of the next step to be copied: its stage, tile and number, and where this thread's scales are.
  struct Copies {
    Slot slot;
    B32 tile, step;
    Place place;
    std::vector<B64> x_from;
    std::vector<B32> x_bytes;
    B64 y_from;
  };
  int scale_parts() const { return (x_rows() + 127) / 128; }
  void begin_copies() {
    copies_.slot = {w_.mov(0), w_.mov(1)};
    copies_.tile = w_.mov(cluster_);
    copies_.step = w_.mov(0);
    copies_.place = {w_.b32(), w_.b32(), w_.b32()};
    for (int i = 0; i < scale_parts(); ++i) {
      copies_.x_from.push_back(w_.b64());
      copies_.x_bytes.push_back(w_.b32());
    }
    copies_.y_from = w_.b64();
    scale_thread_ = w_.sub(thread_, 128 * (c_.warpgroups - 1));
    copies_scales_ = w_.compare_u32(Compare::ge, warp_, 4 * (c_.warpgroups - 1));
    if (c_.streams)
      policy_ = w_.evict_first_policy();
    xs_step_ = w_.mul_wide(xs_stride_k_, 4);
    w_.if_(w_.compare_u32(Compare::lt, copies_.tile, all_tiles_), [&] { begin_copied_tile(); });
    const B32 i = w_.mov(0);
    w_.loop("the ring is filled", [&] {
      copy_next();
      w_.add_to(i, i, 1);
      return w_.compare_u32(Compare::lt, i, c_.stages - 1);
    });
  }
  void begin_copied_tile() {
    const Place place = locate(copies_.tile);
    w_.mov_to(copies_.place.row, place.row);
    w_.mov_to(copies_.place.column, place.column);
    w_.mov_to(copies_.place.batch, place.batch);
    const B32 x_row = c_.swapped ? place.column : place.row, y_row = c_.swapped ? place.row : place.column;
    const B64 first = w_.mul64(xs_stride_b_, w_.widen(place.batch));
    for (std::size_t i = 0; i < copies_.x_from.size(); ++i) {
      const B32 row = w_.add(w_.add(x_row, scale_thread_), 128 * static_cast<int>(i));
      w_.mov_to(copies_.x_from[i], w_.add64(xs_, w_.mul64(w_.mad_wide(row, xs_stride_m_, first), 4)));
      w_.mov_to(copies_.x_bytes[i], w_.select(w_.compare_u32(Compare::lt, row, m_), 4, 0));
    }
    const B32 block = w_.min_u32(w_.shr(w_.mad(scale_thread_, c_.y_chunk(), y_row), 7), n_blocks() - 1);
    w_.mov_to(copies_.y_from, w_.mad_wide(w_.mul(w_.mad(place.batch, n_blocks(), block), k_blocks()), 4, ys_));
  }
  /// Nothing once all tiles are copied.
  void copy_next() {
    w_.if_(w_.compare_u32(Compare::lt, copies_.tile, all_tiles_), [&] {
      const Slot& slot = copies_.slot;
      const B32 full = w_.mad(slot.index, 8, shared_);
      w_.if_(w_.compare_u32(Compare::eq, warp_, 0), [&] {
        w_.mbarrier_wait({full, empty_offset()}, slot.parity);
        w_.if_(w_.compare_u32(Compare::eq, thread_, 0), [&] {
          const std::array<B32, 4> v = {copies_.place.row, copies_.place.column, copies_.place.batch,
                                        copies_.place.batch};
          w_.store_shared({scales_of(slot), place_offset()}, std::span<const B32>(v),
                          w_.compare_u32(Compare::eq, copies_.step, 0));
          copy_operands(slot, copies_.step, copies_.place);
        });
      });
      w_.if_(copies_scales_, [&] {
        w_.mbarrier_wait({full, empty_offset()}, slot.parity);
        const B32 scales = w_.mad(slot.index, scale_bytes(), w_.mad(scale_thread_, 4, shared_));
        for (int i = 0; i < scale_parts(); ++i) {
          const int left = x_rows() - 128 * i;
          const Guard guard = left < 128 ? Guard(w_.compare_u32(Compare::lt, scale_thread_, left)) : Guard();
          B64& from = copies_.x_from[static_cast<std::size_t>(i)];
          w_.cp_async_word({scales, scales_offset() + 512 * i}, {from}, copies_.x_bytes[static_cast<std::size_t>(i)],
                           guard);
          w_.add64_to(from, from, xs_step_);
        }
        w_.cp_async_word({scales, scales_offset() + 4 * x_rows()}, {copies_.y_from}, w_.mov(4),
                         w_.compare_u32(Compare::lt, scale_thread_, c_.y_chunks()));
        w_.add64_to(copies_.y_from, copies_.y_from, 4);
        w_.cp_async_mbarrier_arrive({full});
      });
      advance(slot);
      w_.add_to(copies_.step, copies_.step, 1);
      w_.if_(w_.compare_u32(Compare::eq, copies_.step, k_blocks()), [&] {
        w_.mov_to(copies_.step, 0);
        w_.add_to(copies_.tile, copies_.tile, clusters_);
        w_.if_(w_.compare_u32(Compare::lt, copies_.tile, all_tiles_), [&] { begin_copied_tile(); });
      });
    });
  }

  /// With K split over the cluster.
  void multiply_split(const Slot& slot) {
    const auto steps = [&] {
      await_stage(slot);
      load_scales(slot);
      start_products(0);
      const Pred more = w_.compare_u32(Compare::lt, 1, steps_);
      finish_step(slot, more, true);
      w_.if_(more, [&] { multiply_others(slot); });
    };
    split_tiles(
        [&] {
          if (every_rank_has_steps()) {
            steps();
            return;
          }
          for (const F32 sum : sums_)
            w_.mov_to(sum, 0.0f);
          w_.if_(w_.compare_u32(Compare::ne, steps_, 0), steps);
        },
        [&](const Place& place) { prepare(place); },
        [&](const std::vector<F32>& sums, I32 wave, I32 unit) { store_unit(sums, wave, unit); });
  }

  /// As it was left with the scales of a tile's first stage.
  Place load_place(const Slot& slot) {
    const std::array<B32, 4> v = w_.make<B32, 4>();
    w_.load_shared(std::span<const B32>(v), {scales_of(slot), place_offset()});
    return {v[0], v[1], v[2]};
  }
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
  void start_products(int wave) { start_products(part_, wave); }
  void start_products(const std::vector<F32>& part, int wave = 0) {
    const B32 row_low = w_.add(row_descriptor_, wave * 64 * kRow / 16), column_low = column_descriptor_;
    w_.wgmma_fence();
    for (int i = 0; i < kRow / 32; ++i)
      w_.wgmma_fp8(part, w_.combine(w_.add(row_low, 2 * i), kDescriptorHigh),
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
    add_scaled(part_, factors, wave, is_first);
  }
  void add_scaled(const std::vector<F32>& parts, const std::vector<F32>& factors, int wave, bool is_first) {
    for (int e = 0; e < columns() / 2; ++e) {
      const int j = e / 4, half = e / 2 % 2;
      const int f = c_.swapped ? 2 * j + e % 2 : 2 * (8 * j / c_.y_chunk()) + half;
      const F32 sum = sums_[static_cast<std::size_t>(wave * columns() / 2 + e)];
      const F32 part = parts[static_cast<std::size_t>(e)], factor = factors[static_cast<std::size_t>(f)];
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
    prepare(place);
    for (int wave = 0; wave < c_.waves; ++wave)
      for (int u = 0; u < wave_units(); ++u)
        store_unit(unit_of(wave, u), wave, u);
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

  void prepare(const Place& place) { prepare_store(place, {z_, z_stride_b_, z_stride_m_, z_bytes()}, !f32_out()); }

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
          w_.store_global(output_at(plus(m, e), plus(n, 8 * half)),
                          v.subspan(static_cast<std::size_t>(2 * half + e), 1), exists(plus(m, e), plus(n, 8 * half)));
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
        w_.store_global(output_at(m, plus(n, 8 * eight)), v.subspan(static_cast<std::size_t>(4 * eight) + h, 2),
                        exists(m, plus(n, 8 * eight)));
    }
  }
  B32 pack(F32 high, F32 low) {
    return shape_.z == fp8_block_bmm::ZDtype::f16 ? w_.to_f16x2(high, low) : w_.to_bf16x2(high, low);
  }
  const Shape shape_;
  B64 x_map_, y_map_, z_map_, xs_, ys_, z_, z_stride_b_, xs_stride_b_;
  B32 z_stride_m_, xs_stride_m_, xs_stride_k_;
  B32 row_descriptor_, column_descriptor_;
  B64 policy_; ///< of Y's copies; none: L2's own
  Copies copies_;
  B32 scale_thread_;
  Pred copies_scales_;
  B64 xs_step_;
  std::vector<F32> part_, other_part_; ///< of 128 k, and of the next 128
  std::vector<F32> x_scales_, y_scales_;
};

} // namespace

Result<Emitted> emit(Sm sm, const Shape& shape, const Config& config) {
  Result<std::string> text = Tile(sm, shape, config).emit();
  if (!text)
    return text.status();
  Emitted emitted;
  emitted.text = std::move(*text);
  emitted.launch = persistent_launch(config, config.shared_bytes(), config.blocks_per_sm());
  emitted.launch.threads = config.threads();
  emitted.boxes.x = {.inner = 128, .rows = config.swapped ? config.column_box() : config.row_box(), .swizzle = 128};
  if (config.stages_output() && shape.z != fp8_block_bmm::ZDtype::f32)
    emitted.boxes.z = config.swapped ? cuda::TensorBox{.inner = 16, .rows = config.columns}
                                     : cuda::TensorBox{.inner = 64, .rows = 16, .swizzle = 128};
  emitted.boxes.y = {.inner = 128, .rows = config.swapped ? config.row_box() : config.column_box(), .swizzle = 128};
  return emitted;
}

} // namespace kiln::nvidia::fp8
