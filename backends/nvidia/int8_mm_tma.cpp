#include <fmt/format.h>

#include <array>
#include <vector>

#include "backends/nvidia/int8_mm.h"

namespace kiln::nvidia::int8 {
namespace {

using namespace ptx;

int element_bytes(Output output) {
  return output == Output::s32 ? 4 : output == Output::bf16 ? 2 : 1;
}

/// A and B through tensor maps, which zero what lies beyond M, N and K; s32 sums, exact in any order; the stage `scale`
/// on the way out.
class Tma : PersistentTile<TmaConfig, B32> {
public:
  Tma(Sm sm, const Shape& shape, const TmaConfig& config)
      : PersistentTile(sm, {1, shape.n, (shape.k + kRow - 1) / kRow}, config, layout_of(config)), shape_(shape) {}

  Result<std::string> emit() {
    prologue();
    return roles([&] { produce(); }, [&] { consume(); });
  }

private:
  static Layout layout_of(const TmaConfig& c) {
    const int stage = (c.rows() + c.columns) * kRow;
    return {.stage_bytes = stage, .sums_offset = kHeader + c.stages * stage, .full_arrivals = 1};
  }
  int row_bytes() const { return c_.rows() * kRow; }
  int element() const { return element_bytes(shape_.output); }

  void prologue() {
    a_map_ = w_.parameter_tensor_map("a_map");
    b_map_ = w_.parameter_tensor_map("b_map");
    w_.parameter_b64("a");
    w_.parameter_b64("b");
    out_address_ = w_.parameter_b64("c");
    scale_ = w_.parameter_b64("scale");
    w_.parameter_b64("workspace");
    m_ = w_.parameter_b32("m");
    w_.parameter_b32("lda");
    w_.parameter_b32("ldb");
    ldc_ = w_.parameter_b32("ldc");
    start({a_map_, b_map_});
  }

  // ---- the copying warp

  void produce() {
    const Slot slot{w_.mov(0), w_.mov(1)};
    const Pred leads = w_.compare_u32(Compare::eq, thread_, 32 * consumer_warps());
    // Weights that are read once do not push out what others wait to be written back.
    const B64 policy = c_.group == 0 ? w_.evict_first_policy() : B64();
    for_tiles([&](B32 tile) {
      const Place place = locate(tile);
      for_steps([&](B32 step) {
        const B32 full = w_.mad(slot.index, 8, shared_);
        w_.mbarrier_wait({full, empty_offset()}, slot.parity);
        w_.if_(leads, [&] {
          const B32 stage = w_.mad(slot.index, layout_.stage_bytes, w_.add(shared_, kHeader));
          const B32 k = w_.mul(w_.add(step, k_first_), kRow);
          w_.mbarrier_expect_bytes({full}, layout_.stage_bytes);
          copy(stage, c_.swapped ? b_map_ : a_map_, k, place.row, c_.rows(), c_.share == Share::rows, place.batch, full,
               c_.swapped ? policy : B64());
          copy(w_.add(stage, row_bytes()), c_.swapped ? a_map_ : b_map_, k, place.column, columns(),
               c_.share == Share::columns, place.batch, full, c_.swapped ? B64() : policy);
        });
        advance(slot);
      });
    });
    await_release(slot);
    if (c_.split > 1)
      w_.barrier_cluster_wait();
  }

  // ---- the multiplying warpgroups

  void consume() {
    start_consuming();
    const Slot slot{w_.mov(0), w_.mov(0)};
    if (c_.split > 1) {
      split_tiles([&] { multiply(slot); }, [&](const Place& place) { prepare(place); },
                  [&](const std::vector<B32>& sums, I32 wave, I32 unit) { store_unit(sums, wave, unit, false); });
      return;
    }
    for_tiles([&](B32 tile) {
      multiply(slot);
      const Place place = locate(tile);
      prepare(place);
      const auto store_all = [&](bool whole) {
        for (int wave = 0; wave < c_.waves; ++wave)
          for (int unit = 0; unit < wave_units(); ++unit)
            store_unit(unit_of(wave, unit), wave, unit, whole);
      };
      if (c_.swapped) {
        store_all(false);
        return;
      }
      // Pairs of neighbours at once, where the output's rows allow it and no column lies beyond N.
      const Label single = w_.label(), stored = w_.label();
      const B32 unaligned = w_.and_(w_.or_(w_.low(out_address_), w_.mul(ldc_, element())), 2 * element() - 1);
      const Pred inside = w_.compare_u32(Compare::le, w_.add(place.column, columns()), problem_.n);
      w_.branch(single, unless(w_.both(inside, w_.compare_u32(Compare::eq, unaligned, 0))));
      store_all(true);
      w_.branch(stored);
      w_.bind(single, "element by element");
      store_all(false);
      w_.bind(stored);
    });
  }

  /// A tile's steps of this block into sums_. While a step's products run, those of the next are started; the stage of
  /// the one before is then free.
  void multiply(const Slot& slot) {
    const auto steps = [&] {
      const B32 step = w_.mov(0), before = w_.mov(0);
      w_.loop("steps along K", [&] {
        await_stage(slot);
        const Pred goes_on = w_.compare_u32(Compare::ne, step, 0);
        const B32 stage = w_.mad(slot.index, layout_.stage_bytes, w_.add(shared_, kHeader));
        const B32 rows = w_.mad(warpgroup_, c_.waves * 64 * kRow, stage);
        const B32 row_low = w_.or_(w_.shr(rows, 4), kDescriptorLow);
        const B32 column_low = w_.or_(w_.shr(w_.add(stage, row_bytes()), 4), kDescriptorLow);
        w_.wgmma_fence();
        for (int wave = 0; wave < c_.waves; ++wave)
          for (int i = 0; i < kRow / 32; ++i)
            w_.wgmma_s8(wave_sums(wave), w_.combine(w_.add(row_low, wave * 64 * kRow / 16 + 2 * i), kDescriptorHigh),
                        w_.combine(w_.add(column_low, 2 * i), kDescriptorHigh), columns(), i == 0 ? goes_on : yes_);
        w_.wgmma_commit();
        w_.wgmma_wait(1);
        w_.if_(goes_on, [&] { release(before); });
        w_.mov_to(before, slot.index);
        advance(slot);
        w_.add_to(step, step, 1);
        return w_.compare_u32(Compare::lt, step, steps_);
      });
      w_.wgmma_wait(0);
      release(before);
    };
    if (every_rank_has_steps()) {
      steps();
      return;
    }
    for (const B32 sum : sums_)
      w_.mov_to(sum, 0);
    w_.if_(w_.compare_u32(Compare::ne, steps_, 0), steps);
  }

  // ---- the way out

  void prepare(const Place& place) {
    prepare_store(place, {out_address_, {}, ldc_, element()}, false);
    if (shape_.scaled && !shape_.scale_per_channel) {
      one_scale_ = w_.f32();
      w_.load_global(std::span<const F32>(&one_scale_, 1), {scale_});
    }
  }
  /// `columns` beside the lane's first; 0 beyond N.
  F32 scale_at(I32 columns) {
    if (!shape_.scale_per_channel)
      return one_scale_;
    const F32 scale = w_.f32();
    w_.mov_to(scale, 0.0f);
    w_.load_global(std::span<const F32>(&scale, 1), {w_.mad_wide(w_.add(first_n_, columns), 4, scale_)},
                   column_exists(columns));
    return scale;
  }
  /// Sums of 16 rows and 16 columns (swapped: 8) that this warp has. `whole`: pairs are stored at once, all columns are
  /// there.
  void store_unit(std::span<const B32> v, I32 wave, I32 unit, bool whole) {
    if (c_.swapped) {
      const I32 m = times(unit, 8), n = times(wave, 64);
      for (int half = 0; half < 2; ++half) {
        const F32 scale = shape_.scaled ? scale_at(plus(n, 8 * half)) : F32();
        for (int e = 0; e < 2; ++e)
          store_element(v[static_cast<std::size_t>(2 * half + e)], scale, plus(m, e), plus(n, 8 * half));
      }
      return;
    }
    const I32 n = times(unit, 16);
    for (int eight = 0; eight < 2; ++eight) {
      std::array<F32, 2> scale;
      for (int e = 0; e < 2 && shape_.scaled; ++e)
        scale[static_cast<std::size_t>(e)] = scale_at(plus(n, 8 * eight + e));
      for (int half = 0; half < 2; ++half) {
        const I32 m = plus(times(wave, 64), 8 * half);
        const auto first = static_cast<std::size_t>(4 * eight + 2 * half);
        if (whole)
          store_pair(v[first], v[first + 1], scale, m, plus(n, 8 * eight));
        else
          for (std::size_t e = 0; e < 2; ++e)
            store_element(v[first + e], scale[e], m, plus(n, 8 * eight + static_cast<int>(e)));
      }
    }
  }
  void store_pair(B32 low, B32 high, const std::array<F32, 2>& scale, I32 m, I32 n) {
    const Pred there = row_exists(m);
    if (!shape_.scaled) {
      const std::array<B32, 2> pair = {low, high};
      w_.store_global(output_at(m, n), std::span<const B32>(pair), there);
      return;
    }
    const F32 y0 = w_.mul(w_.from_s32(low), scale[0]), y1 = w_.mul(w_.from_s32(high), scale[1]);
    if (shape_.output == Output::bf16) {
      const B32 pair = w_.to_bf16x2(y1, y0);
      w_.store_global(output_at(m, n), std::span<const B32>(&pair, 1), there);
    } else {
      const B32 b0 = w_.to_s32_saturated(y0), b1 = w_.to_s32_saturated(y1);
      w_.store_global_b16(output_at(m, n), w_.pack_s8(b0, b1, b0, b1), there);
    }
  }
  void store_element(B32 sum, F32 scale, I32 m, I32 n) {
    const Pred there = w_.both(row_exists(m), column_exists(n));
    const GlobalAddress at = output_at(m, n);
    if (!shape_.scaled) {
      w_.store_global(at, std::span<const B32>(&sum, 1), there);
      return;
    }
    const F32 y = w_.mul(w_.from_s32(sum), scale);
    if (shape_.output == Output::bf16)
      w_.store_global_b16(at, w_.to_bf16x2(0.0f, y), there);
    else
      w_.store_global_b8(at, w_.max_s32(w_.min_s32(w_.to_s32_saturated(y), 127), -128), there);
  }

  const Shape shape_;
  B64 a_map_, b_map_, out_address_, scale_;
  B32 ldc_;
  F32 one_scale_;
};

} // namespace

std::int64_t TmaConfig::shared_bytes() const {
  return 1024 + std::int64_t{stages} * (rows() + columns) * 128 + sum_bytes();
}

Result<Emitted> emit_tma(Sm sm, const Shape& shape, const TmaConfig& config) {
  Result<std::string> text = Tma(sm, shape, config).emit();
  if (!text)
    return text.status();
  Emitted emitted{.text = std::move(*text),
                  .launch = persistent_launch(config, config.shared_bytes(), config.blocks_per_sm()),
                  .a_box = {},
                  .b_box = {}};
  emitted.a_box = {.inner = 128, .rows = config.swapped ? config.column_box() : config.row_box(), .swizzle = 128};
  emitted.b_box = {.inner = 128, .rows = config.swapped ? config.row_box() : config.column_box(), .swizzle = 128};
  return emitted;
}

} // namespace kiln::nvidia::int8
