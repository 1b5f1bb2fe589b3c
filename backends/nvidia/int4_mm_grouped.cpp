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

constexpr int kTokenRow = 128;              // bytes of a token's K block
constexpr int kRowTile = 512;               // bytes of a row tile's K block
constexpr int kWarpgroup = 4;               // warps, of 16 rows each
constexpr int kSumSlots = 4;                // steps whose sums of x are kept
constexpr int kHeader = 1024;               // bytes of mbarriers
constexpr int kOnesTile = 1024;             // 8 rows of bf16 ones
constexpr std::uint32_t kOnes = 0x3F803F80; // bf16 1, twice
/// Descriptor ("wgmma, matrix descriptor") of tokens, all over 16: 8 rows apart 1024 bytes, 128-byte swizzle.
constexpr int kDescriptorLow = 1 << 16, kDescriptorHigh = 1024 / 16 | 1 << 30;

/// What one step, max(64, group) of K, takes in shared memory.
struct Step {
  Step(const Shape& shape, const GroupedConfig& c)
      : blocks(static_cast<int>(std::max<std::int64_t>(1, shape.group / 64))),
        token_block(static_cast<int>(c.tokens()) * kTokenRow), weight_block(c.warps_n * kRowTile),
        scale_block(static_cast<int>(int4_mm::FragmentLayout{.group = shape.group}.scale_block())),
        weights(blocks * token_block), scales(weights + blocks * weight_block),
        bytes((scales + c.warps_n * scale_block + 1023) / 1024 * 1024) {}
  int blocks;                    ///< of 64
  int token_block, weight_block; ///< bytes of one of them
  int scale_block;               ///< of one row tile
  int weights, scales, bytes;    ///< swizzled rows of tokens begin at multiples of 1024
};

/// Sums of the products by token: [group of warpgroups][token][row], rows padded so that neither way has bank
/// conflicts.
int sum_row_bytes(const GroupedConfig& c) {
  return static_cast<int>(c.rows() + 4) * 4;
}

class Grouped {
public:
  Grouped(Sm sm, const Shape& shape, const GroupedConfig& config)
      : shape_(shape), c_(config), layout_{shape.n, shape.k, shape.group}, step_(shape, config),
        w_(sm, "main", config.threads(), config.cluster) {}

  Result<std::string> emit() {
    prologue();
    prepare_copies();
    fill_ring();
    multiply_loop();
    dump();
    store();
    return w_.finish();
  }

private:
  int parts() const { return static_cast<int>(layout_.parts()); }
  int warps() const { return c_.warps_n * c_.warps_k; }
  int sum_tile_bytes() const { return static_cast<int>(c_.tokens()) * kTokenRow; }
  int ring_offset() const { return kHeader + kOnesTile + c_.warps_k * sum_tile_bytes(); }
  // mbarriers, of 8 bytes: steps that have come, steps that are free, sums that have come
  int empty_offset() const { return 8 * c_.stages; }
  int sums_offset() const { return 16 * c_.stages; }

  void prologue() {
    x_ = w_.parameter_b64("x");
    weights_ = w_.parameter_b64("w");
    scales_ = w_.parameter_b64("sz");
    y_ = w_.parameter_b64("y");
    w_.parameter_b64("workspace");
    const B32 m = w_.parameter_b32("m");
    ldx_ = w_.parameter_b32("ldx");
    ldy_ = w_.parameter_b32("ldy");

    thread_ = w_.thread();
    lane_ = w_.and_(thread_, 31);
    warp_ = w_.shr(thread_, 5);
    B32 slice = w_.block_x();
    rank_ = w_.mov(0);
    if (c_.cluster > 1) {
      rank_ = w_.rank_in_cluster();
      slice = w_.div_u32(slice, c_.cluster);
    }
    tile_ = w_.mul(slice, c_.warps_n);
    first_token_ = w_.mul(w_.block_y(), c_.tokens());
    tokens_left_ = w_.sub(m, first_token_);
    // Steps rank, rank + cluster, …
    steps_ = w_.div_u32(w_.sub(steps() + c_.cluster - 1, rank_), c_.cluster);

    shared_ = w_.shared_memory();
    w_.if_(w_.compare_u32(Compare::eq, thread_, 0), [&] {
      for (int s = 0; s < c_.stages; ++s) {
        w_.mbarrier_init({shared_, 8 * s}, 1 + 32 * copying_warps());
        w_.mbarrier_init({shared_, empty_offset() + 8 * s}, c_.warps_n);
      }
      for (int s = 0; s < kSumSlots * c_.warps_k; ++s)
        w_.mbarrier_init({shared_, sums_offset() + 8 * s}, c_.warps_n);
      w_.fence_mbarrier_init();
    });
    w_.comment("ones; sums of x before the first, and columns without: zero");
    const std::array<B32, 4> values = w_.make<B32, 4>();
    const int bytes = kOnesTile + c_.warps_k * sum_tile_bytes();
    for (int first = 0; first < bytes; first += 16 * c_.threads()) {
      const B32 at = w_.mad(thread_, 16, first);
      const B32 value = w_.select(w_.compare_u32(Compare::lt, at, kOnesTile), kOnes, 0);
      for (const B32 v : values)
        w_.mov_to(v, value);
      w_.store_shared({w_.add(at, shared_), kHeader}, std::span<const B32>(values),
                      w_.compare_u32(Compare::lt, at, bytes));
    }
    w_.fence_proxy_async();
    w_.barrier();
    first_lane_ = w_.compare_u32(Compare::eq, lane_, 0);
    w_.comment("warps of 16 rows; warpgroups along the rows, groups of them take turns along K");
    group_ = c_.warps_k > 1 ? w_.div_u32(warp_, c_.warps_n) : w_.mov(0);
    warp_row_ = w_.sub(warp_, w_.mul(group_, c_.warps_n));
    warpgroup_ = w_.shr(warp_row_, 2);
  }
  /// Products between two waits for the tensor cores: as many as there are registers for, an even number of such
  /// batches a step.
  int products() const { return (c_.token_tiles <= 4 || c_.threads() <= 256) && step_.blocks > 1 ? 4 : 2; }
  std::int64_t steps() const { return (layout_.k_blocks() + step_.blocks - 1) / step_.blocks; }

  // A group's warps share the copies of a step's tokens: four rows of a K block an instruction.
  int row_groups() const { return static_cast<int>(c_.tokens()) / 4; }
  int row_groups_per_pass() const { return std::min(c_.warps_n, row_groups()); }
  int blocks_per_pass() const { return c_.warps_n / row_groups_per_pass(); }
  int copying_warps() const { return std::min(c_.warps_n, row_groups() * step_.blocks); }

  void prepare_copies() {
    w_.comment("this lane's 16 bytes of tokens: row, chunk; the chunks of a row are exchanged (128-byte swizzle)");
    const B32 row_group = w_.and_(warp_row_, row_groups_per_pass() - 1);
    const B32 block = w_.div_u32(warp_row_, row_groups_per_pass());
    copy_row_ = w_.mad(row_group, 4, w_.shr(lane_, 3));
    const B32 chunk = w_.and_(lane_, 7);
    copy_k_ = w_.mad(block, 64, w_.mul(chunk, 8));
    token_slot_ = w_.mad(copy_row_, kTokenRow, w_.mul(w_.xor_(chunk, w_.and_(copy_row_, 7)), 16));
    token_slot_ = w_.mad(block, step_.token_block, token_slot_);
    const B64 first_row = w_.mul_wide(w_.add(first_token_, copy_row_), ldx_);
    tokens_ = w_.mad_wide(copy_k_, 2, w_.add64(w_.add64(x_, first_row), first_row));
    copies_ = w_.compare_u32(Compare::lt, warp_row_, copying_warps());
    leads_ = w_.compare_u32(Compare::eq, w_.mad(warp_row_, 32, lane_), 0);
  }

  /// A step into its slot: weights and scales by the copy engine; tokens, whose rows are to be swizzled, by lanes.
  void copy_step(B32 step, B32 slot, B32 full) {
    const B32 global_step = w_.mad(step, c_.cluster, rank_);
    w_.if_(leads_, [&] {
      const B32 row_tiles = w_.min_u32(w_.sub(layout_.row_tiles(), tile_), c_.warps_n);
      const B32 weight_bytes = w_.mul(row_tiles, kRowTile), scale_bytes = w_.mul(row_tiles, step_.scale_block);
      const B64 weights =
          w_.mad_wide(global_step, step_.blocks * layout_.block_stride(), w_.mad_wide(tile_, kRowTile, weights_));
      const B64 scales = w_.mad_wide(global_step, layout_.scale_step_stride(),
                                     w_.mad_wide(tile_, layout_.scale_tile_stride(), scales_));
      const B64 policy = w_.evict_first_policy();
      w_.mbarrier_expect_bytes({full}, w_.mad(weight_bytes, step_.blocks, scale_bytes));
      for (int b = 0; b < step_.blocks; ++b)
        w_.copy_bulk({slot, step_.weights + b * step_.weight_block}, {weights, b * layout_.block_stride()},
                     weight_bytes, {full}, policy);
      w_.copy_bulk({slot, step_.scales}, {scales}, scale_bytes, {full}, policy);
    });
    w_.if_(copies_, [&] {
      const B32 k = w_.mul(global_step, 64 * step_.blocks), to = w_.add(slot, token_slot_);
      const B64 from = w_.mad_wide(k, 2, tokens_);
      const bool ragged = shape_.k % 64 != 0;
      for (int b = 0; b < step_.blocks; b += blocks_per_pass()) {
        const B64 row = w_.b64();
        w_.mov_to(row, from);
        for (int g = 0; g < row_groups(); g += row_groups_per_pass()) {
          Pred exists = w_.compare_s32(Compare::gt, tokens_left_, w_.add(copy_row_, 4 * g));
          if (ragged)
            exists = w_.both(exists, w_.compare_s32(Compare::lt, w_.add(w_.add(k, copy_k_), 64 * b), shape_.k));
          w_.cp_async({to, b * step_.token_block + 4 * g * kTokenRow}, {row, std::int64_t{b} * kTokenRow},
                      w_.select(exists, 16, 0));
          if (g + row_groups_per_pass() < row_groups())
            w_.add64_to(row, row, w_.mul_wide(ldx_, 8 * row_groups_per_pass()));
        }
      }
      w_.cp_async_mbarrier_arrive({full});
    });
  }

  // A slot is of one group of warps always, since their number divides that of the slots: a phase of its mbarrier is
  // over only when all that wait for it have seen it.

  /// This group's of the ring's first steps.
  void fill_ring() {
    const B32 step = w_.mov(group_), slot = w_.mad(group_, step_.bytes, w_.add(shared_, ring_offset()));
    const B32 full = w_.mad(group_, 8, shared_), end = w_.min_u32(steps_, c_.stages);
    w_.if_(w_.compare_u32(Compare::lt, step, end), [&] {
      w_.loop("the ring's first steps", [&] {
        copy_step(step, slot, full);
        w_.add_to(step, step, c_.warps_k);
        w_.add_to(slot, slot, c_.warps_k * step_.bytes);
        w_.add_to(full, full, c_.warps_k * 8);
        return w_.compare_u32(Compare::lt, step, end);
      });
    });
  }

  /// Into the slot of as many turns ago as are in use.
  void refill(B32 step, B32 slot, B32 full, B32 parity) {
    const int before = c_.turns_in_use() * c_.warps_k;
    const B32 next = w_.add(step, c_.stages - before);
    const Pred exists =
        w_.both(w_.compare_s32(Compare::ge, step_index_, c_.turns_in_use()), w_.compare_u32(Compare::lt, next, steps_));
    w_.if_(exists, [&] {
      w_.comment("another step into the ring");
      const B32 old_slot = w_.add(slot, -before * step_.bytes), old_full = w_.add(full, -8 * before);
      const B32 old_parity = w_.mov(parity);
      const Pred wraps = w_.compare_s32(Compare::lt, old_slot, w_.add(shared_, ring_offset()));
      w_.add_to(old_slot, old_slot, c_.stages * step_.bytes, wraps);
      w_.add_to(old_full, old_full, 8 * c_.stages, wraps);
      w_.mov_to(old_parity, w_.xor_(parity, 1), wraps);
      w_.mbarrier_wait({old_full, empty_offset()}, old_parity);
      copy_step(next, old_slot, old_full);
    });
  }
  void advance(B32 slot, B32 barrier, B32 parity, B32 ring_end, int steps) {
    w_.add_to(slot, slot, steps * step_.bytes);
    w_.add_to(barrier, barrier, 8 * steps);
    const Pred wraps = w_.compare_u32(Compare::ge, slot, ring_end);
    w_.add_to(slot, slot, -c_.stages * step_.bytes, wraps);
    w_.add_to(barrier, barrier, -8 * c_.stages, wraps);
    w_.mov_to(parity, w_.xor_(parity, 1), wraps);
  }

  // Sums of x over a step: products with ones, tokens as the 64-row operand. Warpgroups share the step's k.
  int token_tiles64() const { return (c_.token_tiles + 7) / 8; }
  int warpgroups() const { return c_.warps_n / kWarpgroup; }
  int sum_steps() const { return 4 * step_.blocks / warpgroups(); } ///< of 16 k, of one warpgroup
  /// Sums of each part apart, if one warpgroup has both.
  int sum_sets() const { return warpgroups() == 1 ? parts() : 1; }

  void multiply_ones(B32 descriptor, Pred no) {
    const B32 first = w_.add(descriptor, sum_offset_);
    const B64 ones = w_.combine(w_.or_(w_.shr(w_.add(shared_, kHeader), 4), kDescriptorLow), kDescriptorHigh);
    const int steps = sum_steps() / sum_sets();
    for (int tile = 0; tile < token_tiles64(); ++tile)
      for (int i = 0; i < sum_steps(); ++i) {
        const int at = tile * 64 * kTokenRow / 16 + i / 4 * step_.token_block / 16 + i % 4 * 2;
        w_.wgmma_bf16(sums_[static_cast<std::size_t>(tile * sum_sets() + i / steps)],
                      w_.combine(w_.add(first, at), kDescriptorHigh), ones, 8, i % steps == 0 ? no : yes_);
      }
  }
  /// Each sum as three bf16, by the lanes of column 0: as many of the step's 16 columns of sums.
  void store_sums() {
    const B32 at = w_.xor_(sum_write_, w_.shl(w_.and_(step_index_, kSumSlots - 1), 5));
    for (int tile = 0; tile < token_tiles64(); ++tile)
      for (int set = 0; set < sum_sets(); ++set)
        for (int half = 0; half < (c_.token_tiles == 1 ? 1 : 2); ++half) {
          const F32 sum = sums_[static_cast<std::size_t>(tile * sum_sets() + set)][static_cast<std::size_t>(2 * half)];
          const B32 high = w_.to_bf16x2(0.0f, sum);
          const F32 rest = w_.f32(), last = w_.f32();
          w_.fma_to(rest, w_.as_f32(w_.shl(high, 16)), -1.0f, sum);
          const B32 middle = w_.to_bf16x2(0.0f, rest);
          w_.fma_to(last, w_.as_f32(w_.shl(middle, 16)), -1.0f, rest);
          const std::array<B32, 2> columns = {w_.or_(high, w_.shl(middle, 16)), w_.to_bf16x2(0.0f, last)};
          const B32 to = set == 0 ? at : w_.xor_(at, 16);
          w_.store_shared({to, (64 * tile + 8 * half) * kTokenRow}, std::span<const B32>(columns), stores_sums_);
        }
  }
  B32 sum_barrier(B32 index) { return w_.mad(w_.and_(index, kSumSlots - 1), 8, sum_barriers_); }

  /// acc += zero · (sums of x): the step before's.
  void multiply_zeros(B32 index) {
    const B32 slot = w_.and_(index, kSumSlots - 1);
    const B64 descriptor = w_.combine(w_.mad(slot, 2, sum_descriptor_), kDescriptorHigh);
    w_.wgmma_bf16(acc_, zeros_, descriptor, 8 * c_.token_tiles, yes_);
  }
  void wait_sums(B32 index) { w_.mbarrier_wait({sum_barrier(index)}, w_.and_(w_.shr(index, 2), 1)); }

  void multiply_loop() {
    yes_ = w_.compare_u32(Compare::lt, lane_, 32);
    const Pred no = w_.compare_u32(Compare::ge, lane_, 32);
    for (int i = 0; i < token_tiles64() * sum_sets(); ++i)
      sums_.push_back(w_.make<F32, 4>());
    for (B32& z : zeros_) {
      z = w_.b32();
      w_.mov_to(z, 0);
    }
    for (int e = 0; e < 4 * c_.token_tiles; ++e) {
      acc_.push_back(w_.f32());
      w_.mov_to(acc_.back(), 0.0f);
      part_.push_back(w_.f32());
      w_.mov_to(part_.back(), 0.0f);
    }
    const B32 slot = w_.add(shared_, ring_offset()), ring_end = w_.add(slot, c_.stages * step_.bytes);
    const B32 full = w_.mov(shared_), parity = w_.mov(0);
    w_.add_to(slot, slot, w_.mul(group_, step_.bytes));
    w_.add_to(full, full, w_.mul(group_, 8));
    const B32 step = w_.mov(group_); // of this block's
    step_index_ = w_.mov(0);
    sum_barriers_ = w_.add(w_.mad(group_, 8 * kSumSlots, shared_), sums_offset());
    const B32 sums = w_.add(w_.mad(group_, sum_tile_bytes(), shared_), kHeader + kOnesTile);
    sum_descriptor_ = w_.or_(w_.shr(sums, 4), kDescriptorLow);
    {
      // The first of this warpgroup's 16 k, and the place of its sum in a step's columns: 16 / warpgroups each.
      const B32 first = w_.mul(warpgroup_, sum_steps());
      sum_offset_ = w_.mad(w_.shr(first, 2), step_.token_block / 16, w_.mul(w_.and_(first, 3), 2));
      const B32 byte = w_.mul(warpgroup_, 32 / warpgroups()), quad = w_.shr(lane_, 2);
      const B32 warp = w_.and_(warp_row_, kWarpgroup - 1);
      const B32 place = w_.mad(w_.xor_(w_.shr(byte, 4), quad), 16, w_.and_(byte, 15));
      sum_write_ = w_.add(w_.mad(w_.mad(warp, 16, quad), kTokenRow, place), sums);
      stores_sums_ = w_.both(w_.compare_u32(Compare::eq, w_.and_(lane_, 3), 0),
                             w_.compare_u32(Compare::lt, w_.mul(warp, 16), c_.tokens()));
    }
    const B32 weight_read = w_.mad(warp_row_, kRowTile, w_.mad(lane_, 16, step_.weights));
    const B32 scale_read = w_.mad(warp_row_, step_.scale_block, w_.mad(w_.shr(lane_, 2), 8 * parts(), step_.scales));
    std::array<std::vector<std::array<B32, 4>>, 2> a; // two sets of operands, in turn
    for (auto& set : a)
      for (int i = 0; i < products(); ++i)
        set.push_back(w_.make<B32, 4>());
    std::array<std::array<B32, 4>, 2> q = {w_.make<B32, 4>(), w_.make<B32, 4>()}; // of even and odd K blocks
    const std::array<B32, 4> pair = w_.make<B32, 4>();
    const auto load_weights = [&](B32 from, int b) {
      w_.load_shared(std::span<const B32>(q[static_cast<std::size_t>(b % 2)]),
                     {w_.add(from, weight_read), b * step_.weight_block});
    };
    const auto load_scales = [&](B32 from) {
      w_.load_shared(std::span<const B32>(pair).first(static_cast<std::size_t>(2 * parts())),
                     SharedAddress{w_.add(from, scale_read)});
    };
    const auto dequantise = [&](int batch) {
      for (int i = 0; i < products(); ++i) {
        const int word = batch * products() + i;
        const std::array<B32, 4> values =
            unpack(w_, q[static_cast<std::size_t>(word / 4 % 2)][static_cast<std::size_t>(word % 4)]);
        for (std::size_t e = 0; e < 4; ++e)
          w_.mov_to(a[static_cast<std::size_t>(batch % 2)][static_cast<std::size_t>(i)][e], values[e]);
      }
    };
    const auto scale_part = [&](std::size_t p) {
      const std::array<F32, 2> scale = {w_.as_f32(w_.shl(pair[2 * p], 16)), w_.as_f32(w_.shl(pair[2 * p + 1], 16))};
      for (std::size_t e = 0; e < acc_.size(); ++e)
        w_.fma_to(acc_[e], scale[e / 2 % 2], part_[e], acc_[e]);
    };
    const int batches = 4 * step_.blocks / products();
    const Label end = w_.label();
    w_.branch(end, w_.compare_s32(Compare::ge, step, steps_));
    w_.mbarrier_wait({full}, parity);
    w_.fence_proxy_async();
    load_scales(slot);
    load_weights(slot, 0);
    dequantise(0);
    w_.loop("steps of K; the first operands are there", [&] {
      const B32 descriptor = w_.or_(w_.shr(slot, 4), kDescriptorLow);
      const B32 before = w_.sub(step_index_, 1);
      for (int batch = 0; batch < batches; ++batch) {
        const int first = batch * products(); // of the step's products
        const bool last = batch == batches - 1;
        if (first % 4 == 0 && first / 4 + 1 < step_.blocks)
          load_weights(slot, first / 4 + 1);
        if (batch > 0) {
          dequantise(batch);
          if (parts() == 2) {
            w_.wgmma_wait(0);
            scale_part(0);
          }
        }
        if (last)
          wait_sums(before);
        w_.wgmma_fence();
        for (int i = 0; i < products(); ++i) {
          const int at = (first + i) / 4 * step_.token_block / 16 + (first + i) % 4 * 2;
          w_.wgmma_bf16(part_, a[static_cast<std::size_t>(batch % 2)][static_cast<std::size_t>(i)],
                        w_.combine(w_.add(descriptor, at), kDescriptorHigh), 8 * c_.token_tiles,
                        i == 0 && (batch == 0 || parts() == 2) ? no : yes_);
        }
        if (batch == 0)
          multiply_ones(descriptor, no);
        if (last)
          multiply_zeros(before);
        w_.wgmma_commit();
        if (batch == 0)
          refill(step, slot, full, parity);
        else
          w_.wgmma_wait(1);
      }
      w_.comment("while the last products run: sums of x away, and the next step's first operands");
      store_sums();
      const B32 done = w_.mov(full), this_slot = w_.mov(slot), this_parity = w_.mov(parity);
      advance(slot, full, parity, ring_end, c_.warps_k);
      w_.add_to(step, step, c_.warps_k);
      const Pred more = w_.compare_s32(Compare::lt, step, steps_);
      // After the last step the same again: it has come.
      const B32 next = w_.select(more, slot, this_slot);
      w_.mbarrier_wait({w_.select(more, full, done)}, w_.select(more, parity, this_parity));
      w_.fence_proxy_async(); // of the sums and of the next step's tokens
      w_.barrier_warp();
      w_.mbarrier_arrive({sum_barrier(step_index_)}, first_lane_);
      load_weights(next, 0);
      dequantise(0);
      w_.wgmma_wait(0);
      scale_part(static_cast<std::size_t>(parts() - 1));
      // Columns 0 to 7 of the sums are of the first part, if there are two.
      for (std::size_t i = 0; i < 4; ++i)
        w_.mov_to(zeros_[i], w_.prmt(pair[parts() == 2 ? i : i % 2], 0, 0x3232));
      load_scales(next);
      w_.mbarrier_arrive({done, empty_offset()}, first_lane_);
      w_.add_to(step_index_, step_index_, 1);
      return more;
    });
    w_.bind(end, "end of K");
    const B32 before = w_.sub(step_index_, 1);
    wait_sums(before);
    w_.wgmma_fence();
    multiply_zeros(before);
    w_.wgmma_commit();
    w_.wgmma_wait(0);
  }

  void dump() {
    w_.comment("the ring is done with: sums by token, the rows side by side");
    w_.barrier();
    const B32 row = w_.mad(warp_row_, 16, w_.shr(lane_, 2)), token = w_.mul(w_.and_(lane_, 3), 2);
    const B32 at =
        w_.mad(w_.mad(group_, c_.tokens(), token), sum_row_bytes(c_), w_.mad(row, 4, w_.add(shared_, ring_offset())));
    for (int t = 0; t < c_.token_tiles; ++t)
      for (int e = 0; e < 4; ++e)
        w_.store_shared({at, std::int64_t{8 * t + e % 2} * sum_row_bytes(c_) + e / 2 * 32},
                        std::span<const F32>(&acc_[static_cast<std::size_t>(4 * t + e)], 1));
  }

  /// Eight rows of one token a thread: summed over the blocks of the cluster and their groups of warpgroups, in order.
  void store() {
    if (c_.cluster > 1) {
      w_.barrier_cluster_arrive();
      w_.barrier_cluster_wait();
    } else {
      w_.barrier();
    }
    const int octets = static_cast<int>(c_.rows()) / 8, all = octets * static_cast<int>(c_.tokens());
    const int items = (all + c_.cluster - 1) / c_.cluster;
    const B32 sums = w_.add(shared_, ring_offset());
    for (int first = 0; first < items; first += c_.threads()) {
      const B32 in_block = w_.add(thread_, first), item = w_.mad(rank_, items, in_block);
      const B32 token = w_.div_u32(item, octets), octet = w_.sub(item, w_.mul(token, octets));
      const B32 row = w_.mul(w_.mad(tile_, 2, octet), 8);
      const Pred inside = w_.both(w_.compare_u32(Compare::lt, in_block, items), w_.compare_u32(Compare::lt, item, all));
      const Pred stored = w_.both(inside, w_.both(w_.compare_s32(Compare::lt, token, tokens_left_),
                                                  w_.compare_u32(Compare::lt, row, shape_.n)));
      w_.if_(stored, [&] {
        const B32 at = w_.mad(token, sum_row_bytes(c_), w_.mad(octet, 32, sums));
        std::vector<std::array<F32, 4>> v; // all on their way before the first is needed
        for (int rank = 0; rank < c_.cluster; ++rank) {
          const SharedAddress from = c_.cluster > 1 ? w_.in_block(at, rank) : SharedAddress{at};
          for (int group = 0; group < c_.warps_k; ++group)
            for (int half = 0; half < 2; ++half) {
              v.push_back(w_.make<F32, 4>());
              const SharedAddress place{from.base, group * c_.tokens() * sum_row_bytes(c_) + half * 16};
              if (c_.cluster > 1)
                w_.load_cluster(std::span<const F32>(v.back()), place);
              else
                w_.load_shared(std::span<const F32>(v.back()), place);
            }
        }
        std::array<F32, 8> sum;
        for (std::size_t i = 0; i < v.size(); ++i)
          for (std::size_t e = 0; e < 4; ++e) {
            F32& s = sum[4 * (i % 2) + e];
            s = i < 2 ? v[i][e] : w_.add(s, v[i][e]);
          }
        std::array<B32, 4> out;
        for (std::size_t i = 0; i < 4; ++i)
          out[i] = w_.to_bf16x2(sum[2 * i + 1], sum[2 * i]);
        const B64 elements = w_.mad_wide(w_.add(first_token_, token), ldy_, w_.widen(row));
        w_.store_global({w_.add64(w_.add64(y_, elements), elements)}, std::span<const B32>(out));
      });
    }
    if (c_.cluster > 1) {
      w_.comment("no block leaves while another reads its sums");
      w_.barrier_cluster_arrive_relaxed();
      w_.barrier_cluster_wait();
    }
  }

  const Shape shape_;
  const GroupedConfig c_;
  const int4_mm::FragmentLayout layout_;
  const Step step_;
  Writer w_;
  B64 x_, weights_, scales_, y_;
  B32 ldx_, ldy_, thread_, lane_, warp_, rank_;
  B32 tile_;                      ///< first row tile of the block
  B32 first_token_, tokens_left_; ///< of the block; to the end of x
  B32 steps_;                     ///< of this block
  B32 shared_;
  B32 group_, warp_row_, warpgroup_; ///< of a multiplying warp: along K, along the rows
  Pred first_lane_, yes_;
  B32 step_index_; ///< of this group's, from 0
  B32 sum_barriers_, sum_descriptor_, sum_write_, sum_offset_;
  Pred stores_sums_, copies_, leads_;
  B32 copy_row_, copy_k_, token_slot_; ///< this lane's of the tokens: row, k in a step, place in a slot
  B64 tokens_;
  std::vector<F32> acc_, part_; ///< as wgmma has them: rows l/4 (0, 1) and l/4 + 8 (2, 3) of each 8 tokens
  std::array<B32, 4> zeros_;    ///< the operand of the step before
  std::vector<std::array<F32, 4>> sums_;
};

} // namespace

std::string GroupedConfig::text() const {
  return fmt::format("t{}n{}k{}c{}s{}", token_tiles, warps_n, warps_k, cluster, stages);
}
std::int64_t GroupedConfig::fixed_bytes() const {
  // Products with ones have 64 rows of tokens, also where there are fewer.
  return kHeader + kOnesTile + warps_k * tokens() * kTokenRow + std::max<std::int64_t>(0, 64 - tokens()) * kTokenRow;
}
std::int64_t GroupedConfig::stage_bytes(const Shape& shape) const {
  return Step(shape, *this).bytes;
}
std::int64_t GroupedConfig::shared_bytes(const Shape& shape) const {
  return fixed_bytes() + std::max(stages * stage_bytes(shape), warps_k * tokens() * sum_row_bytes(*this));
}

Result<std::string> emit_grouped(Sm sm, const Shape& shape, const GroupedConfig& c) {
  const bool suits = c.token_tiles > 0 && std::has_single_bit(static_cast<unsigned>(c.token_tiles)) && c.warps_n > 0 &&
                     c.warps_n % kWarpgroup == 0 && std::has_single_bit(static_cast<unsigned>(c.warps_n)) &&
                     c.warps_k > 0 && c.cluster > 0 && c.stages >= (c.turns_in_use() + 1) * c.warps_k &&
                     c.stages % c.warps_k == 0 && 8 * (2 * c.stages + kSumSlots * c.warps_k) <= kHeader;
  if (!suits)
    return Status::error(Code::compile_failed, fmt::format("int4_mm: configuration {} does not suit n={} k={} group={}",
                                                           c.text(), shape.n, shape.k, shape.group));
  return Grouped(sm, shape, c).emit();
}

} // namespace kiln::nvidia::int4
