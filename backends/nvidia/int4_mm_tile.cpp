#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <bit>
#include <vector>

#include "backends/nvidia/fragment_sums.h"
#include "backends/nvidia/int4_mm.h"
#include "jit/ops/int4_mm_fragments.h"

namespace kiln::nvidia::int4 {
namespace {

using namespace ptx;
using Fragment = std::array<F32, 4>; ///< of D: rows l/4 (0, 1) and l/4 + 8 (2, 3), tokens 2·(l mod 4) + {0, 1}

constexpr int kTokenRow = 128; // bytes of a token's K block
constexpr int kRowTile = 512;  // bytes of a row tile's K block

int log2(std::int64_t power_of_two) {
  return std::countr_zero(static_cast<std::uint64_t>(power_of_two));
}

/// What one K block takes in shared memory.
struct Stage {
  Stage(const Shape& shape, const TileConfig& c)
      : scale_block(static_cast<int>(int4_mm::FragmentLayout{.group = shape.group}.scale_block())),
        weights(static_cast<int>(c.tokens()) * kTokenRow), scales(weights + c.warps_n * c.row_tiles * kRowTile),
        bytes((scales + c.warps_n * c.row_tiles * scale_block + 1023) / 1024 * 1024) {}
  int scale_block;            ///< of one row tile
  int weights, scales, bytes; ///< swizzled rows of tokens begin at multiples of 1024
};

class Tile {
public:
  Tile(Sm sm, const Shape& shape, const TileConfig& config)
      : shape_(shape), c_(config), layout_{shape.n, shape.k, shape.group}, stage_(shape, config),
        w_(sm, "main", config.threads(), config.cluster, config.blocks_per_sm) {}

  Result<std::string> emit() {
    prologue();
    for (int s = 0; s < stages_ahead(); ++s)
      copy_stage();
    accumulators();
    k_loop();
    FragmentSums<F32> sums(w_,
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
  int parts() const { return static_cast<int>(layout_.parts()); }
  int group_warps() const { return c_.warps_n * c_.warps_m; }
  int block_row_tiles() const { return c_.warps_n * c_.row_tiles; }
  int ranks() const { return c_.warps_k * c_.cluster; } ///< that take turns along K
  int step_bytes() const { return c_.warps_k * stage_.bytes; }
  /// Stages on their way: the slots but those in use, by wgmma also the step before.
  int stages_ahead() const { return c_.stages - (c_.wgmma ? 2 * c_.step_blocks : 1); }
  std::int64_t steps() const { return (layout_.k_blocks() + ranks() - 1) / ranks(); }
  Fragment& acc(int r, int t) { return acc_[static_cast<std::size_t>(r * c_.token_tiles + t)]; }

  void prologue() {
    const B64 x = w_.parameter_b64("x"), weights = w_.parameter_b64("w"), scales = w_.parameter_b64("sz");
    y_ = w_.parameter_b64("y");
    w_.parameter_b64("workspace");
    const B32 m = w_.parameter_b32("m"), ldx = w_.parameter_b32("ldx");
    ldy_ = w_.parameter_b32("ldy");

    const B32 thread = w_.thread();
    lane_ = w_.and_(thread, 31);
    const B32 warp = w_.shr(thread, 5);
    group_ = c_.warps_k > 1 ? w_.div_u32(warp, group_warps()) : w_.mov(0);
    warp_ = w_.sub(warp, w_.mul(group_, group_warps()));
    warp_m_ = w_.div_u32(warp_, c_.warps_n);
    warp_n_ = w_.sub(warp_, w_.mul(warp_m_, c_.warps_n));
    B32 slice = w_.block_x();
    k_block_ = w_.mov(group_);
    if (c_.cluster > 1) {
      rank_ = w_.rank_in_cluster();
      slice = w_.shr(slice, log2(c_.cluster));
      w_.mov_to(k_block_, w_.mad(rank_, c_.warps_k, group_));
    }
    tile_ = w_.mul(slice, block_row_tiles());
    first_token_ = w_.mul(w_.block_y(), c_.tokens());
    tokens_left_ = w_.sub(m, first_token_);

    shared_ = w_.shared_memory();
    const B32 own = w_.mad(group_, stage_.bytes, shared_);
    ring_ = own;
    ring_end_ = w_.add(own, c_.stages * step_bytes());
    copied_ = w_.mov(own);
    multiplied_ = w_.mov(own);

    w_.comment("this thread's 16 bytes of tokens: row, chunk; the chunks of a row are exchanged (128-byte swizzle)");
    const B32 in_group = w_.mad(warp_, 32, lane_);
    copy_row_ = w_.shr(in_group, 3);
    const B32 chunk = w_.and_(in_group, 7);
    copy_k_ = w_.mul(chunk, 8);
    token_slot_ = w_.mad(copy_row_, kTokenRow, w_.mul(w_.xor_(chunk, w_.and_(copy_row_, 7)), 16));
    const B64 first_row = w_.mul_wide(w_.add(first_token_, copy_row_), ldx);
    tokens_ = w_.add64(w_.add64(x, first_row), first_row);
    tokens_ = w_.mad_wide(k_block_, kTokenRow, w_.mad_wide(chunk, 16, tokens_));
    row_step_ = w_.mul_wide(ldx, 2 * rows_per_copy());

    weight_slot_ = w_.mad(in_group, 16, stage_.weights);
    for (int first = 0; first < block_row_tiles(); first += group_warps()) {
      const B32 tile = w_.add(warp_, first);
      weights_.push_back(w_.mad_wide(existing_tile(tile), layout_.tile_stride(),
                                     w_.mad_wide(k_block_, layout_.block_stride(), w_.mad_wide(lane_, 16, weights))));
      copies_weights_.push_back(
          first + group_warps() <= block_row_tiles() ? Pred{} : w_.compare_u32(Compare::lt, tile, block_row_tiles()));
    }
    const int per_tile = stage_.scale_block / 16;
    scale_slot_ = w_.mad(in_group, 16, stage_.scales);
    for (int first = 0; first < block_row_tiles() * per_tile; first += 32 * group_warps()) {
      const B32 index = w_.add(in_group, first), tile = w_.shr(index, log2(per_tile));
      scales_.push_back(w_.mad_wide(existing_tile(tile), layout_.scale_tile_stride(),
                                    w_.mad_wide(w_.and_(index, per_tile - 1), 16, scales)));
      copies_scales_.push_back(w_.compare_u32(Compare::lt, index, block_row_tiles() * per_tile));
    }

    w_.comment("where this lane reads its operands");
    const B32 quad = w_.shr(lane_, 2), in_matrix = w_.and_(lane_, 7), matrix = w_.shr(lane_, 3);
    const B32 row_at = w_.mul(w_.mad(warp_m_, 8 * c_.token_tiles, in_matrix), kTokenRow);
    for (int half = 0; half < 2; ++half)
      token_read_[static_cast<std::size_t>(half)] =
          w_.add(row_at, w_.mul(w_.xor_(w_.add(matrix, 4 * half), in_matrix), 16));
    weight_read_ = w_.mad(warp_n_, c_.row_tiles * kRowTile, w_.mad(lane_, 16, stage_.weights));
    scale_read_ = w_.mad(warp_n_, c_.row_tiles * stage_.scale_block, w_.mad(quad, 8 * parts(), stage_.scales));
  }

  B32 existing_tile(B32 tile_in_block) { return w_.min_u32(w_.add(tile_, tile_in_block), layout_.row_tiles() - 1); }
  int rows_per_copy() const { return 4 * group_warps(); }

  void advance(B32 slot) {
    w_.add_to(slot, slot, step_bytes());
    w_.mov_to(slot, ring_, w_.compare_u32(Compare::ge, slot, ring_end_));
  }

  /// This group's next K block into the ring; a group of copies even where K has ended. What does not exist is
  /// zero: tokens, and K blocks beyond the last.
  void copy_stage() {
    w_.comment("copy a K block");
    const Pred k_exists = w_.compare_s32(Compare::gt, w_.sub(w_.sub(shape_.k, w_.mul(k_block_, 64)), copy_k_), 0);
    const B32 slot = w_.add(copied_, token_slot_);
    const B64 row = w_.b64();
    w_.mov_to(row, tokens_);
    for (int first = 0; first < c_.tokens(); first += rows_per_copy()) {
      const Pred exists = w_.both(k_exists, w_.compare_s32(Compare::lt, w_.add(copy_row_, first), tokens_left_));
      const bool all = first + rows_per_copy() <= c_.tokens();
      const Guard in_tile = all ? Guard() : Guard(w_.compare_u32(Compare::lt, copy_row_, c_.tokens() - first));
      w_.cp_async({slot, first * kTokenRow}, {row}, w_.select(exists, 16, 0), in_tile);
      if (first + rows_per_copy() < c_.tokens())
        w_.add64_to(row, row, row_step_);
    }
    const B32 bytes = w_.select(w_.compare_u32(Compare::lt, k_block_, layout_.k_blocks()), 16, 0);
    const B32 weight_slot = w_.add(copied_, weight_slot_);
    for (std::size_t i = 0; i < weights_.size(); ++i) {
      w_.cp_async({weight_slot, static_cast<std::int64_t>(i) * group_warps() * kRowTile}, {weights_[i]}, bytes,
                  copies_weights_[i]);
      w_.add64_to(weights_[i], weights_[i], ranks() * layout_.block_stride());
    }
    const B32 step = w_.shr(k_block_, log2(std::max<std::int64_t>(1, shape_.group / 64)));
    const B32 scale_slot = w_.add(copied_, scale_slot_);
    for (std::size_t i = 0; i < scales_.size(); ++i)
      w_.cp_async({scale_slot, static_cast<std::int64_t>(i) * 512 * group_warps()},
                  {w_.mad_wide(step, layout_.scale_step_stride(), scales_[i])}, bytes, copies_scales_[i]);
    w_.add64_to(tokens_, tokens_, std::int64_t{ranks()} * kTokenRow);
    w_.add_to(k_block_, k_block_, ranks());
    advance(copied_);
    w_.cp_async_commit();
  }

  void accumulators() {
    acc_.resize(static_cast<std::size_t>(c_.row_tiles * c_.token_tiles));
    for (Fragment& f : acc_) {
      f = w_.make<F32, 4>();
      for (const F32 r : f)
        w_.mov_to(r, 0.0f);
    }
    k_steps_ = w_.mov(steps());
  }

  void k_loop() {
    if (c_.wgmma) {
      wgmma_loop();
      return;
    }
    w_.loop("K blocks of 64, one for each group of warps", [&] {
      w_.cp_async_wait(stages_ahead() - 1);
      w_.barrier();
      copy_stage();
      multiply_block();
      advance(multiplied_);
      w_.add_to(k_steps_, k_steps_, -1);
      return w_.compare_s32(Compare::gt, k_steps_, 0);
    });
    w_.cp_async_wait(0);
  }

  /// Dequantises a K block while the products of the one before run; two sets of operands in turn.
  void wgmma_loop() {
    const Label end = w_.label();
    const Pred yes = w_.compare_s32(Compare::gt, k_steps_, 0);
    std::vector<F32> d;
    for (const Fragment& f : acc_)
      d.insert(d.end(), f.begin(), f.end());
    const auto in_ring = [&](B32 slot, int blocks_on) {
      if (blocks_on == 0)
        return slot;
      const B32 at = w_.add(slot, blocks_on * step_bytes());
      w_.add_to(at, at, -c_.stages * step_bytes(), w_.compare_u32(Compare::ge, at, ring_end_));
      return at;
    };
    w_.loop("K blocks of 64", [&] {
      for (int set = 0; set < 2; ++set) {
        w_.cp_async_wait(stages_ahead() - c_.step_blocks);
        w_.fence_proxy_async();
        w_.barrier();
        for (int i = 0; i < c_.step_blocks; ++i)
          copy_stage();
        std::vector<std::vector<Operand>> operands;
        std::vector<B32> slots;
        for (int i = 0; i < c_.step_blocks; ++i) {
          slots.push_back(in_ring(multiplied_, i));
          const std::array<Scale, 4> scale = load_scale(w_.add(slots.back(), scale_read_));
          const std::array<B32, 4> q = w_.make<B32, 4>();
          w_.load_shared(std::span<const B32>(q), SharedAddress{w_.add(slots.back(), weight_read_)});
          for (std::size_t j = 0; j < 4; ++j)
            operands.push_back(dequantise(w_, q[j], scale, parts() == 1 ? 0 : j / 2, c_.operands));
        }
        w_.wgmma_fence();
        for (int i = 0; i < 4 * c_.step_blocks; ++i) {
          // Descriptor ("wgmma, matrix descriptor"): address, 8 rows apart 1024 bytes, 128-byte swizzle; all over 16.
          const B32 first = w_.or_(w_.shr(slots[static_cast<std::size_t>(i / 4)], 4), 1 << 16);
          const B64 descriptor = w_.combine(w_.add(first, 2 * (i % 4)), 1024 / 16 | 1 << 30);
          for (const Operand& a : operands[static_cast<std::size_t>(i)])
            w_.wgmma_bf16(d, a, descriptor, 8 * c_.token_tiles, yes);
        }
        w_.wgmma_commit();
        w_.wgmma_wait(1);
        w_.mov_to(multiplied_, in_ring(multiplied_, c_.step_blocks));
        w_.add_to(k_steps_, k_steps_, -c_.step_blocks);
        if (set == 0)
          w_.branch(end, w_.compare_s32(Compare::le, k_steps_, 0));
      }
      return w_.compare_s32(Compare::gt, k_steps_, 0);
    });
    w_.bind(end, "end of K");
    w_.wgmma_wait(0);
    w_.cp_async_wait(0);
  }

  /// Of a row tile.
  std::array<Scale, 4> load_scale(SharedAddress from) {
    const std::array<B32, 4> words = w_.make<B32, 4>();
    w_.load_shared(std::span<const B32>(words).first(static_cast<std::size_t>(2 * parts())), from);
    return scales_of(w_, words, parts());
  }

  void multiply_block() {
    const B32 weights = w_.add(multiplied_, weight_read_), scales = w_.add(multiplied_, scale_read_);
    std::vector<std::array<Scale, 4>> scale;
    for (int r = 0; r < c_.row_tiles; ++r)
      scale.push_back(load_scale({scales, r * stage_.scale_block}));
    for (int half = 0; half < 2; ++half) {
      const B32 tokens = w_.add(multiplied_, token_read_[static_cast<std::size_t>(half)]);
      std::vector<std::array<B32, 4>> x; // operands of two steps
      for (int t = 0; t < c_.token_tiles; ++t) {
        x.push_back(w_.make<B32, 4>());
        w_.ldmatrix(std::span<const B32>(x.back()), {tokens, t * 8 * kTokenRow});
      }
      std::vector<std::array<B32, 2>> q;
      for (int r = 0; r < c_.row_tiles; ++r) {
        q.push_back(w_.make<B32, 2>());
        w_.load_shared(std::span<const B32>(q.back()), {weights, r * kRowTile + 8 * half});
      }
      const std::size_t part = parts() == 1 ? 0 : static_cast<std::size_t>(half);
      for (std::size_t i = 0; i < 2; ++i)
        for (int r = 0; r < c_.row_tiles; ++r) {
          for (const Operand& a :
               dequantise(w_, q[static_cast<std::size_t>(r)][i], scale[static_cast<std::size_t>(r)], part, c_.operands))
            for (int t = 0; t < c_.token_tiles; ++t)
              w_.mma_bf16(acc(r, t), a, std::span<const B32, 2>(x[static_cast<std::size_t>(t)].data() + 2 * i, 2),
                          acc(r, t));
        }
    }
  }

  /// bf16 to y: fragments transposed, so that a lane has two neighbouring rows of one token.
  void store() {
    const Label end = w_.label();
    if (c_.warps_k > 1)
      w_.branch(end, w_.compare_u32(Compare::ne, group_, 0));
    const B32 quad = w_.shr(lane_, 2);
    const B32 row = w_.mad(w_.mad(warp_n_, c_.row_tiles, tile_), 16, w_.mul(w_.and_(lane_, 3), 2));
    const B32 token = w_.mad(warp_m_, 8 * c_.token_tiles, quad);
    const int share = c_.row_tiles * c_.token_tiles / c_.cluster;
    for (int i = 0; i < share; ++i) {
      // With a cluster, fragment i·cluster + rank; its row and token tile from there.
      B32 f_row = row, f_token = token;
      if (c_.cluster > 1) {
        const B32 f = w_.add(rank_, i * c_.cluster);
        const B32 r = w_.div_u32(f, c_.token_tiles), t = w_.sub(f, w_.mul(r, c_.token_tiles));
        f_row = w_.mad(r, 16, row);
        f_token = w_.mad(t, 8, token);
      } else {
        f_row = w_.add(row, i / c_.token_tiles * 16);
        f_token = w_.add(token, i % c_.token_tiles * 8);
      }
      const Fragment& f = acc_[static_cast<std::size_t>(i)];
      const B32 low = w_.transpose(w_.to_bf16x2(f[1], f[0])), high = w_.transpose(w_.to_bf16x2(f[3], f[2]));
      const Pred token_exists = w_.compare_s32(Compare::lt, f_token, tokens_left_);
      const B64 elements = w_.mad_wide(w_.add(first_token_, f_token), ldy_, w_.widen(f_row));
      const B64 at = w_.add64(w_.add64(y_, elements), elements);
      const Pred low_exists = w_.both(token_exists, w_.compare_u32(Compare::lt, f_row, shape_.n));
      const Pred high_exists = w_.both(token_exists, w_.compare_u32(Compare::lt, w_.add(f_row, 8), shape_.n));
      w_.store_global({at}, std::span<const B32>(&low, 1), low_exists);
      w_.store_global({at, 16}, std::span<const B32>(&high, 1), high_exists);
    }
    w_.bind(end);
  }

  const Shape shape_;
  const TileConfig c_;
  const int4_mm::FragmentLayout layout_;
  const Stage stage_;
  Writer w_;
  B64 y_;
  B32 ldy_, lane_, group_, warp_, warp_n_, warp_m_, rank_;
  B32 tile_;                      ///< first row tile of the block
  B32 first_token_, tokens_left_; ///< of the block; to the end of x
  B32 k_block_;                   ///< this group's next to copy
  B32 k_steps_;                   ///< left to multiply
  B32 shared_, ring_, ring_end_, copied_, multiplied_;
  B32 copy_row_, copy_k_, token_slot_, weight_slot_, scale_slot_;
  B64 tokens_, row_step_;
  std::vector<B64> weights_, scales_;
  std::vector<Pred> copies_weights_, copies_scales_;
  std::array<B32, 2> token_read_;
  B32 weight_read_, scale_read_;
  std::vector<Fragment> acc_;
};

} // namespace

std::array<Scale, 4> scales_of(Writer& w, const std::array<B32, 4>& words, int parts) {
  std::array<Scale, 4> scale;
  for (std::size_t i = 0; i < static_cast<std::size_t>(2 * parts); ++i)
    scale[i] = {w.prmt(words[i], 0, 0x1010), w.prmt(words[i], 0, 0x3232)};
  return scale;
}

std::vector<Operand> dequantise(Writer& w, B32 word, const std::array<Scale, 4>& scale, std::size_t part,
                                int operands) {
  constexpr std::uint32_t kOnes = 0x3F803F80;       // bf16 1, twice
  constexpr std::uint32_t kMinusZeros = 0x80008000; // bf16 −0, twice: added, it changes nothing
  const Operand q = unpack(w, word);
  const Scale* const s = &scale[2 * part]; // by row half
  const auto each = [](auto value) { return Operand{value(0), value(1), value(2), value(3)}; };
  if (operands == 1)
    return {each([&](std::size_t i) { return w.fma_bf16x2(q[i], s[i % 2].scale, s[i % 2].zero); })};
  // q − 8 has 4 significant bits and the scale 8: what their product loses in rounding is a bf16.
  const Operand rounded = each([&](std::size_t i) { return w.fma_bf16x2(q[i], s[i % 2].scale, kMinusZeros); });
  Operand rest = each([&](std::size_t i) { return w.fma_bf16x2(q[i], s[i % 2].scale, w.negate_bf16x2(rounded[i])); });
  if (operands == 3)
    return {rounded, rest, {s[0].zero, s[1].zero, s[0].zero, s[1].zero}};
  return {rounded, each([&](std::size_t i) { return w.fma_bf16x2(rest[i], kOnes, s[i % 2].zero); })};
}

std::string TileConfig::text() const {
  return fmt::format("r{}t{}n{}m{}k{}c{}s{}b{}{}{}", row_tiles, token_tiles, warps_n, warps_m, warps_k, cluster, stages,
                     blocks_per_sm, wgmma ? fmt::format("g{}", step_blocks) : "",
                     operands > 1 ? fmt::format("e{}", operands) : "");
}
std::int64_t TileConfig::shared_bytes(const Shape& shape) const {
  const std::int64_t ring = std::int64_t{stages} * warps_k * Stage(shape, *this).bytes;
  const std::int64_t sums = rows() * tokens() * 4;
  return std::max({ring, warps_k > 1 ? (warps_k - 1) * sums : 0, cluster > 1 ? sums : 0});
}

Result<std::string> emit_tile(Sm sm, const Shape& shape, const TileConfig& c) {
  const auto power_of_two = [](int v) { return v > 0 && std::has_single_bit(static_cast<unsigned>(v)); };
  const bool suits = c.row_tiles > 0 && c.token_tiles > 0 && c.warps_n > 0 && c.warps_m > 0 && c.warps_k > 0 &&
                     power_of_two(c.cluster) && c.row_tiles * c.token_tiles % c.cluster == 0 &&
                     c.stages >= (c.wgmma ? 3 * c.step_blocks : 2) &&
                     (!c.wgmma || (c.row_tiles == 1 && c.warps_m == 1 && c.warps_k == 1 && c.warps_n % 4 == 0));
  if (!suits)
    return Status::error(Code::compile_failed, fmt::format("int4_mm: configuration {} does not suit n={} k={} group={}",
                                                           c.text(), shape.n, shape.k, shape.group));
  return Tile(sm, shape, c).emit();
}

} // namespace kiln::nvidia::int4
