#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <bit>
#include <vector>

#include "backends/nvidia/int4_mm.h"
#include "jit/ops/int4_mm_fragments.h"

namespace kiln::nvidia::int4 {
namespace {

using namespace ptx;

constexpr int kRowTile = 512; // bytes of a row tile's K block
constexpr int kBlockK = 64;   // of bf16 in a row of 128 bytes

/// What a stage, 64 of K, takes in shared memory.
struct Stage {
  Stage(const Shape& shape, const TmaConfig& c)
      : scale_block(static_cast<int>(int4_mm::FragmentLayout{.group = shape.group}.scale_block())),
        weights(c.columns * 128), scales(weights + c.row_tiles() * kRowTile),
        bytes((scales + c.row_tiles() * scale_block + 1023) / 1024 * 1024) {}
  int scale_block;            ///< of one row tile
  int weights, scales, bytes; ///< swizzled rows of tokens begin at multiples of 1024
};

/// Tokens come through a tensor map that zeroes what lies beyond M and K; weights and scales, which lie together for
/// all rows of a tile, in one piece each. Warps dequantise their 16 rows into the register operand while the products
/// before run.
class Tma : PersistentTile<TmaConfig, F32> {
public:
  Tma(Sm sm, const Shape& shape, const TmaConfig& config)
      : PersistentTile(sm, {1, shape.n, (shape.k + kBlockK - 1) / kBlockK}, config, layout_of(shape, config)),
        shape_(shape), fragments_{shape.n, shape.k, shape.group}, stage_(shape, config) {}

  Result<std::string> emit() {
    prologue();
    return roles([&] { produce(); }, [&] { consume(); });
  }

private:
  static Layout layout_of(const Shape& shape, const TmaConfig& c) {
    const int stage = Stage(shape, c).bytes;
    return {.stage_bytes = stage, .sums_offset = kHeader + c.stages * stage, .full_arrivals = 1};
  }
  int parts() const { return static_cast<int>(fragments_.parts()); }
  int output_offset() const { return kHeader + c_.stages * stage_.bytes; } ///< without a split
  int wave_bytes() const { return columns() * kRow; }                      ///< of 64 rows on their way out
  B32 stage_at(const Slot& slot) { return w_.mad(slot.index, stage_.bytes, w_.add(shared_, kHeader)); }

  void prologue() {
    x_map_ = w_.parameter_tensor_map("x_map");
    y_map_ = w_.parameter_tensor_map("y_map");
    w_.parameter_b64("x");
    weights_ = w_.parameter_b64("w");
    scales_ = w_.parameter_b64("sz");
    y_ = w_.parameter_b64("y");
    w_.parameter_b64("workspace");
    m_ = w_.parameter_b32("m");
    w_.parameter_b32("ldx");
    ldy_ = w_.parameter_b32("ldy");
    start({x_map_, y_map_});
  }

  // ---- the copying warp

  void produce() {
    const Slot slot{w_.mov(0), w_.mov(1)};
    const Pred leads = w_.compare_u32(Compare::eq, thread_, 32 * consumer_warps());
    // Weights that are read once do not push out what others wait to be written back.
    const B64 policy = c_.group == 0 ? w_.evict_first_policy() : B64();
    for_tiles([&](B32 tile) {
      const Place place = locate(tile);
      const B32 first = w_.shr(place.row, 4);
      const B32 tiles = w_.max_s32(w_.min_s32(w_.sub(fragments_.row_tiles(), first), c_.row_tiles()), 0);
      const Pred has_weights = w_.compare_u32(Compare::ne, tiles, 0);
      const B32 weight_bytes = w_.mul(tiles, kRowTile), scale_bytes = w_.mul(tiles, stage_.scale_block);
      const B32 bytes = w_.add(w_.add(weight_bytes, scale_bytes), stage_.weights);
      const B64 weights = w_.add64(w_.mul64(w_.widen(k_first_), fragments_.block_stride()),
                                   w_.mad_wide(first, fragments_.tile_stride(), weights_));
      const B64 scales = w_.mad_wide(first, fragments_.scale_tile_stride(), scales_);
      for_steps([&](B32 step) {
        const B32 full = w_.mad(slot.index, 8, shared_);
        w_.mbarrier_wait({full, empty_offset()}, slot.parity);
        w_.if_(leads, [&] {
          const B32 stage = stage_at(slot), k_block = w_.add(step, k_first_);
          w_.mbarrier_expect_bytes({full}, bytes);
          copy(stage, x_map_, w_.mul(k_block, kBlockK), place.column, columns(), c_.share == Share::columns,
               place.batch, full);
          w_.copy_bulk({stage, stage_.weights}, {weights}, weight_bytes, {full}, policy, has_weights);
          const B32 scale_step = w_.shr(
              k_block, std::countr_zero(static_cast<std::uint64_t>(std::max<std::int64_t>(1, shape_.group / kBlockK))));
          w_.copy_bulk({stage, stage_.scales},
                       {w_.add64(scales, w_.mul64(w_.widen(scale_step), fragments_.scale_step_stride()))}, scale_bytes,
                       {full}, policy, has_weights);
        });
        w_.add64_to(weights, weights, fragments_.block_stride());
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
    const B32 row_tile = w_.mad(warpgroup_, 4 * c_.waves, w_.and_(warp_, 3));
    weight_read_ = w_.mad(row_tile, kRowTile, w_.mad(lane_, 16, stage_.weights));
    scale_read_ = w_.mad(row_tile, stage_.scale_block, w_.mad(w_.shr(lane_, 2), 8 * parts(), stage_.scales));
    for (int wave = 0; wave < c_.waves; ++wave)
      raw_.push_back({w_.make<B32, 4>(), w_.make<B32, 4>()});
    const Slot slot{w_.mov(0), w_.mov(0)};
    if (c_.split > 1) {
      split_tiles([&] { multiply(slot); },
                  [&](const Place& place) {
                    prepare_store(place, {y_, {}, ldy_, 2}, true);
                  },
                  [&](const std::vector<F32>& sums, I32 wave, I32 unit) { store_unit(sums, wave, unit); });
      return;
    }
    for_tiles([&](B32 tile) {
      multiply(slot);
      store_staged(locate(tile));
    });
    w_.bulk_wait_read(0); // the block's memory is read until then
  }

  /// Of a stage that has come: each wave's words of the pack and its scales, as they are.
  void load_raw(const Slot& slot) {
    const B32 stage = stage_at(slot), weights = w_.add(stage, weight_read_), scales = w_.add(stage, scale_read_);
    for (int wave = 0; wave < c_.waves; ++wave) {
      const Raw& raw = raw_[static_cast<std::size_t>(wave)];
      w_.load_shared(std::span<const B32>(raw.scales).first(static_cast<std::size_t>(2 * parts())),
                     SharedAddress{scales, 4 * wave * stage_.scale_block});
      w_.load_shared(std::span<const B32>(raw.q), {weights, 4 * wave * kRowTile});
    }
  }
  /// A wave's four products of 16 k each, and of as many operands as a weight has, not awaited.
  void start_products(B32 descriptor_low, int wave) {
    const Raw& raw = raw_[static_cast<std::size_t>(wave)];
    const std::array<Scale, 4> scale = scales_of(w_, raw.scales, parts());
    std::vector<std::vector<Operand>> operands;
    for (std::size_t j = 0; j < 4; ++j)
      operands.push_back(dequantise(w_, raw.q[j], scale, parts() == 1 ? 0 : j / 2, c_.operands));
    w_.wgmma_fence();
    for (int j = 0; j < 4; ++j) {
      const B64 descriptor = w_.combine(w_.add(descriptor_low, 2 * j), kDescriptorHigh);
      for (const Operand& a : operands[static_cast<std::size_t>(j)])
        w_.wgmma_bf16(wave_sums(wave), a, descriptor, columns(), yes_);
    }
    w_.wgmma_commit();
  }

  /// A tile's steps of this block into sums_. Two sets of operands in turn: of two steps, or of a step's two waves.
  /// While a wave's products run, the next one's weights are fetched and, when the set's last products are done,
  /// dequantised.
  void multiply(const Slot& slot) {
    for (const F32 sum : sums_)
      w_.mov_to(sum, 0.0f);
    const auto steps = [&] {
      const Label end = w_.label();
      const B32 step = w_.mov(0), before = w_.mov(0), used = w_.mov(0);
      await_stage(slot);
      load_raw(slot);
      const auto one = [&] {
        const B32 low = w_.or_(w_.shr(stage_at(slot), 4), kDescriptorLow);
        const Pred has_before = w_.compare_u32(Compare::ne, step, 0);
        start_products(low, 0);
        if (c_.waves == 2) {
          w_.wgmma_wait(1); // the step before is done
          w_.if_(has_before, [&] { release(before); });
          start_products(low, 1);
        }
        w_.mov_to(used, slot.index);
        advance(slot);
        w_.add_to(step, step, 1);
        w_.if_(w_.compare_u32(Compare::lt, step, steps_), [&] {
          await_stage(slot);
          load_raw(slot);
        });
        w_.wgmma_wait(1);
        if (c_.waves == 1)
          w_.if_(has_before, [&] { release(before); });
        w_.mov_to(before, used);
      };
      w_.loop("steps along K", [&] {
        one();
        if (c_.waves == 1) {
          w_.branch(end, w_.compare_u32(Compare::ge, step, steps_));
          one();
        }
        return w_.compare_u32(Compare::lt, step, steps_);
      });
      w_.bind(end, "end of K");
      w_.wgmma_wait(0);
      release(before);
    };
    if (every_rank_has_steps())
      steps();
    else
      w_.if_(w_.compare_u32(Compare::ne, steps_, 0), steps);
  }

  // ---- the way out

  B32 pack(F32 high, F32 low) { return w_.to_bf16x2(high, low); }

  /// Through shared memory, each warpgroup what it has: tokens of 64 rows each, the columns of Y, whose 16-byte chunks
  /// are exchanged (128-byte swizzle).
  void store_staged(const Place& place) {
    const B32 buffer = w_.add(w_.mad(warpgroup_, c_.waves * wave_bytes(), shared_), output_offset());
    const B32 barrier = w_.add(warpgroup_, 1);
    w_.bulk_wait_read(0);
    w_.barrier(barrier, 128);
    // Row of the matrix lane / 8: rows of the output's columns 0 to 7 and 8 to 15, of eight tokens and the next.
    const B32 in_eight = w_.and_(lane_, 7), token = w_.mad(w_.shr(lane_, 4), 8, in_eight);
    const B32 chunk = w_.mad(w_.and_(warp_, 3), 2, w_.and_(w_.shr(lane_, 3), 1));
    const B32 at = w_.mad(token, kRow, w_.mad(w_.xor_(chunk, in_eight), 16, buffer));
    for (int wave = 0; wave < c_.waves; ++wave)
      for (int u = 0; u < wave_units(); u += 2) {
        std::vector<B32> matrices;
        for (int i = u; i < std::min(u + 2, wave_units()); ++i) {
          const std::span<const F32> v = unit_of(wave, i);
          matrices.push_back(pack(v[1], v[0]));
          matrices.push_back(pack(v[3], v[2]));
        }
        w_.stmatrix({at, wave * wave_bytes() + u * 8 * kRow}, matrices, true);
      }
    w_.fence_proxy_async();
    w_.barrier(barrier, 128);
    const B32 first = w_.mad(warpgroup_, c_.waves * 64, place.row);
    const Pred leads = w_.compare_u32(Compare::eq, w_.and_(thread_, 127), 0);
    for (int wave = 0; wave < c_.waves; ++wave)
      w_.store_tensor_3d(y_map_, w_.add(first, 64 * wave), place.column, place.batch, {buffer, wave * wave_bytes()},
                         leads);
    w_.bulk_commit();
  }
  /// 16 rows, columns of Y, by 8 tokens.
  void store_unit(std::span<const F32> v, I32 wave, I32 unit) {
    store_pairs(w_.transpose(pack(v[1], v[0])), w_.transpose(pack(v[3], v[2])), times(unit, 8), times(wave, 64));
  }

  const Shape shape_;
  const int4_mm::FragmentLayout fragments_;
  const Stage stage_;
  B64 x_map_, y_map_, weights_, scales_, y_;
  B32 ldy_, weight_read_, scale_read_;
  struct Raw {
    std::array<B32, 4> q, scales;
  };
  std::vector<Raw> raw_; ///< of each wave
};

} // namespace

std::string TmaConfig::text() const {
  return PersistentConfig::text() + (operands > 1 ? fmt::format("e{}", operands) : "");
}
std::int64_t TmaConfig::shared_bytes(const Shape& shape) const {
  return 1024 + std::int64_t{stages} * Stage(shape, *this).bytes +
         (split > 1 ? sum_bytes() : std::int64_t{rows()} * columns * 2);
}

Result<Emitted> emit_tma(Sm sm, const Shape& shape, const TmaConfig& config) {
  Result<std::string> text = Tma(sm, shape, config).emit();
  if (!text)
    return text.status();
  Emitted emitted;
  emitted.text = std::move(*text);
  emitted.launch = persistent_launch(config, config.shared_bytes(shape), config.blocks_per_sm());
  emitted.x_box = {.inner = kBlockK, .rows = config.column_box(), .swizzle = 128};
  if (config.split == 1)
    emitted.y_box = {.inner = 64, .rows = config.columns, .swizzle = 128};
  return emitted;
}

} // namespace kiln::nvidia::int4
