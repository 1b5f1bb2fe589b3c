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
using Fragment = std::array<F32, 4>; ///< of D: rows l/4 (0, 1) and l/4 + 8 (2, 3), tokens 2·(l mod 4) + {0, 1}

constexpr std::uint32_t kOnes = 0x3F803F80; // bf16 1, twice
constexpr int kAccumulator = 512;           // bytes of a fragment of f32 over a warp

/// The kernel as it is written: roles of registers, then each part of the loop as a function.
class Skinny {
public:
  Skinny(Sm sm, const Shape& shape, const SkinnyConfig& config)
      : shape_(shape), c_(config), layout_{shape.n, shape.k, shape.group},
        w_(sm, "main", config.threads(), config.cluster), ranks_(config.cluster * config.warps),
        unroll_(std::max(2, config.depth)) {}

  Result<std::string> emit() {
    prologue();
    for (int s = 0; s < c_.depth; ++s)
      load_weights(s, s);
    load_tokens(0);
    write_tokens(0);
    load_tokens(1);
    k_loop();
    reduce();
    return w_.finish();
  }

private:
  int parts() const { return static_cast<int>(layout_.parts()); }

  /// One stage of weights and of their scales.
  struct Weights {
    std::vector<std::array<B32, 4>> q;  ///< by row tile
    std::vector<std::array<B32, 4>> sz; ///< by row tile: [part][row half]
  };
  using Tokens = std::vector<std::array<B32, 8>>; ///< by token tile: the B operands of steps 0…3
  int token_bytes() const { return c_.token_tiles * 1024; }

  void prologue() {
    const B64 x = w_.parameter_b64("x"), weights = w_.parameter_b64("w"), scales = w_.parameter_b64("sz");
    y_ = w_.parameter_b64("y");
    w_.parameter_b64("workspace");
    const B32 m = w_.parameter_b32("m");
    const B32 ldx = w_.parameter_b32("ldx");
    ldy_ = w_.parameter_b32("ldy");

    thread_ = w_.thread();
    lane_ = w_.and_(thread_, 31);
    const B32 warp = w_.shr(thread_, 5), block = w_.block_x();
    B32 slice = block;
    rank_k_ = warp;
    if (c_.cluster > 1) {
      rank_ = w_.rank_in_cluster();
      slice = w_.shr(block, std::countr_zero(static_cast<unsigned>(c_.cluster)));
      rank_k_ = w_.mad(rank_, c_.warps, warp);
    }
    w_.comment("the last slice overlaps its neighbour rather than reach beyond the tiles");
    tile_ = w_.min_u32(w_.mul(slice, c_.row_tiles), layout_.row_tiles() - c_.row_tiles);
    w_.comment("K blocks of this warp: rank, rank + ranks, and so on");
    left_ = w_.shr(w_.sub(static_cast<std::int64_t>(layout_.k_blocks()) + ranks_ - 1, rank_k_),
                   std::countr_zero(static_cast<unsigned>(ranks_)));

    policy_ = w_.evict_first_policy();
    weights_ = w_.mad_wide(rank_k_, layout_.block_stride(), w_.mad_wide(tile_, layout_.tile_stride(), weights));
    weights_ = w_.mad_wide(lane_, 16, weights_);
    const int blocks_per_step = static_cast<int>(std::max<std::int64_t>(1, shape_.group / 64));
    const B32 step = w_.shr(rank_k_, std::countr_zero(static_cast<unsigned>(blocks_per_step)));
    const B32 quad = w_.shr(lane_, 2);
    scales_ = w_.mad_wide(step, layout_.scale_step_stride(), w_.mad_wide(tile_, layout_.scale_tile_stride(), scales));
    scales_ = w_.mad_wide(quad, 8 * parts(), scales_);
    scale_advance_ = ranks_ * layout_.scale_step_stride() / blocks_per_step;

    first_token_ = w_.mul(w_.block_y(), 8 * c_.token_tiles);
    m_ = w_.sub(m, first_token_);
    const B32 last = w_.sub(m_, 1), in_row = w_.and_(lane_, 7), row = w_.shr(lane_, 3);
    const B64 first_k = w_.mad_wide(rank_k_, 128, w_.mad_wide(in_row, 16, x));
    for (int i = 0; i < 2 * c_.token_tiles; ++i) {
      if (i == 0)
        w_.comment("tokens beyond the last repeat it; their columns of D are never stored");
      const B32 token = w_.min_u32(w_.add(row, 4 * i), last);
      const B64 elements = w_.mul_wide(w_.add(first_token_, token), ldx);
      tokens_.push_back(w_.add64(first_k, w_.add64(elements, elements)));
      x_.push_back(w_.make<B32, 4>());
    }
    first_half_ = w_.compare_u32(Compare::lt, in_row, 4);
    shared_ = w_.shared_memory();
    w_.comment("a warp's tokens of two K blocks: rows of 128 bytes, chunks of 16 exchanged against bank conflicts");
    const B32 own = w_.mad(warp, 2 * token_bytes(), shared_);
    token_write_ = w_.mad(row, 128, w_.mad(w_.xor_(in_row, row), 16, own));
    const B32 matrix = w_.shr(lane_, 3);
    for (int half = 0; half < 2; ++half)
      token_read_[static_cast<std::size_t>(half)] =
          w_.mad(in_row, 128, w_.mad(w_.xor_(w_.add(matrix, 4 * half), in_row), 16, own));

    rank_k_now_ = w_.mov(rank_k_);

    acc_.resize(static_cast<std::size_t>(c_.row_tiles * c_.token_tiles));
    for (Fragment& f : acc_) {
      f = w_.make<F32, 4>();
      for (const F32 r : f)
        w_.mov_to(r, 0.0f);
    }
    for (F32& z : zero_)
      z = w_.mov_f32(0.0f);
    ones_.fill(w_.mov(kOnes));
    weight_stages_.resize(static_cast<std::size_t>(c_.depth));
    for (Weights& s : weight_stages_)
      for (int r = 0; r < c_.row_tiles; ++r) {
        s.q.push_back(w_.make<B32, 4>());
        s.sz.push_back(w_.make<B32, 4>());
      }
  }

  /// `ahead` K blocks of this warp beyond the pointers.
  void load_row_tile(int stage, int r, int ahead, Guard more) {
    Weights& s = weight_stages_[static_cast<std::size_t>(stage % c_.depth)];
    const auto i = static_cast<std::size_t>(r);
    w_.load_stream(s.q[i], {weights_, r * layout_.tile_stride() + ahead * ranks_ * layout_.block_stride()}, policy_,
                   more);
    w_.load_constant(std::span<const B32>(s.sz[i]).first(static_cast<std::size_t>(2 * parts())),
                     {scales_, r * layout_.scale_tile_stride() + ahead * scale_advance_}, more);
  }
  void load_weights(int stage, int ahead) {
    const Pred more = w_.compare_s32(Compare::gt, left_, ahead);
    for (int r = 0; r < c_.row_tiles; ++r)
      load_row_tile(stage, r, ahead, more);
  }
  /// This lane's share of the tokens of a K block, into registers.
  void load_tokens(int ahead) {
    const Pred more = w_.compare_s32(Compare::gt, left_, ahead);
    const bool ragged = shape_.k % 64 != 0;
    // In the last block of a K that ends half-way, the second half of x is not there: zero.
    Pred exists = more;
    if (ragged) {
      const Pred whole = w_.compare_u32(Compare::lt, w_.add(rank_k_now_, ahead * ranks_), layout_.k_blocks() - 1);
      exists = w_.both(more, w_.either(whole, first_half_));
    }
    for (std::size_t i = 0; i < tokens_.size(); ++i) {
      if (ragged)
        for (const B32 r : x_[i])
          w_.mov_to(r, 0);
      w_.load_constant(std::span<const B32>(x_[i]), {tokens_[i], std::int64_t{ahead} * ranks_ * 128}, exists);
    }
  }
  /// Into shared memory, from where `read_tokens` of the next block takes them as operands.
  void write_tokens(int stage) {
    for (std::size_t i = 0; i < x_.size(); ++i) {
      // Rows 4 to 7 of eight lie 4 chunks off: their row's number in the exchange has bit 2 set.
      const SharedAddress to{i % 2 == 0 ? token_write_ : token_write_odd(),
                             stage % 2 * token_bytes() + static_cast<int>(i) * 512};
      w_.store_shared(to, std::span<const B32>(x_[i]));
    }
  }
  B32 token_write_odd() {
    if (token_write_odd_.id < 0)
      token_write_odd_ = w_.xor_(token_write_, 64);
    return token_write_odd_;
  }
  Tokens read_tokens(int stage) {
    Tokens x;
    for (int t = 0; t < c_.token_tiles; ++t) {
      x.push_back(w_.make<B32, 8>());
      for (std::size_t half = 0; half < 2; ++half)
        w_.ldmatrix(std::span<const B32>(x.back()).subspan(4 * half, 4),
                    {token_read_[half], stage % 2 * token_bytes() + t * 1024});
    }
    return x;
  }

  void k_loop() {
    const Label end = w_.label();
    w_.branch(end, w_.compare_s32(Compare::le, left_, 0));
    w_.loop("K blocks of 64, one stage each", [&] {
      for (int s = 0; s < unroll_; ++s) {
        multiply_block(s);
        if (s + 1 < unroll_)
          w_.branch(end, w_.compare_s32(Compare::le, left_, s + 1));
      }
      w_.add64_to(weights_, weights_, unroll_ * ranks_ * layout_.block_stride());
      w_.add64_to(scales_, scales_, unroll_ * scale_advance_);
      for (const B64 t : tokens_)
        w_.add64_to(t, t, std::int64_t{unroll_} * ranks_ * 128);
      w_.add_to(rank_k_now_, rank_k_now_, unroll_ * ranks_);
      w_.add_to(left_, left_, -unroll_);
      return w_.compare_s32(Compare::gt, left_, 0);
    });
    w_.bind(end, "end of K");
  }

  std::span<const B32, 2> operand(const std::array<B32, 8>& x, int step) const {
    return std::span<const B32, 2>(x.data() + 2 * step, 2);
  }

  void multiply_block(int s) {
    w_.barrier_warp();
    const Tokens tokens = read_tokens(s);
    write_tokens(s + 1); // of which every lane has read the block before
    load_tokens(s + 2);
    const Weights& weights = weight_stages_[static_cast<std::size_t>(s % c_.depth)];
    const int steps = 4 / parts(); // of one scale
    w_.comment("sums of x over the group's part, for the zeros: a product with ones");
    std::vector<Fragment> sums;
    for (int t = 0; t < c_.token_tiles; ++t)
      for (int part = 0; part < parts(); ++part)
        sums.push_back(product(steps, [&](const Fragment& d, int i, std::span<const F32, 4> c) {
          w_.mma_bf16(d, ones_, operand(tokens[static_cast<std::size_t>(t)], part * steps + i), c);
        }));
    const Pred more = w_.compare_s32(Compare::gt, left_, s + c_.depth);
    for (int r = 0; r < c_.row_tiles; ++r) {
      w_.comment(fmt::format("row tile {}", r));
      const auto tile = static_cast<std::size_t>(r);
      std::array<std::array<B32, 4>, 4> a;
      for (std::size_t j = 0; j < 4; ++j)
        a[j] = unpack(w_, weights.q[tile][j]);
      std::array<std::array<F32, 2>, 4> scale, zero; // by part and row half
      for (int i = 0; i < 2 * parts(); ++i) {
        const B32 pair = weights.sz[tile][static_cast<std::size_t>(i)];
        scale[static_cast<std::size_t>(i / 2)][static_cast<std::size_t>(i % 2)] = w_.as_f32(w_.shl(pair, 16));
        zero[static_cast<std::size_t>(i / 2)][static_cast<std::size_t>(i % 2)] = w_.as_f32(w_.and_(pair, 0xFFFF0000));
      }
      load_row_tile(s, r, s + c_.depth, more);
      for (int t = 0; t < c_.token_tiles; ++t)
        for (int part = 0; part < parts(); ++part) {
          const auto p = static_cast<std::size_t>(part);
          const Fragment d = product(steps, [&](const Fragment& to, int i, std::span<const F32, 4> c) {
            w_.mma_bf16(to, a[p * static_cast<std::size_t>(steps) + static_cast<std::size_t>(i)],
                        operand(tokens[static_cast<std::size_t>(t)], part * steps + i), c);
          });
          const Fragment& x_sum = sums[static_cast<std::size_t>(t * parts() + part)];
          const Fragment& acc = acc_[static_cast<std::size_t>(r * c_.token_tiles + t)];
          for (std::size_t e = 0; e < 4; ++e) {
            w_.fma_to(acc[e], scale[p][e / 2], d[e], acc[e]);
            w_.fma_to(acc[e], zero[p][e / 2], x_sum[e], acc[e]);
          }
        }
    }
  }

  /// D of `steps` mma that begin at zero.
  template <class Mma> Fragment product(int steps, Mma mma) {
    const Fragment d = w_.make<F32, 4>();
    for (int i = 0; i < steps; ++i)
      mma(d, i, i == 0 ? std::span<const F32, 4>(zero_) : std::span<const F32, 4>(d));
    return d;
  }

  /// Sums over the warps, then over the cluster, each in the order of its ranks; then bf16 to y.
  void reduce() {
    const int fragments = c_.row_tiles * c_.token_tiles;
    const B32 shared = shared_;
    w_.barrier();
    w_.comment("every warp's sums side by side: [warp][row tile][token tile][lane][4]");
    const B32 warp = w_.shr(thread_, 5);
    const B32 own = w_.add(w_.mad(warp, fragments * kAccumulator, shared), w_.shl(lane_, 4));
    for (int f = 0; f < fragments; ++f)
      w_.store_shared({own, f * kAccumulator}, std::span<const F32>(acc_[static_cast<std::size_t>(f)]));
    w_.barrier();
    w_.comment("their sum, in the place of warp 0's");
    const int lanes = 32 * fragments, threads = c_.threads();
    for (int first = 0; first < lanes; first += threads) {
      const B32 index = w_.add(thread_, first);
      const auto sum_one = [&] {
        const B32 at = w_.mad(index, 16, shared);
        Fragment sum = w_.make<F32, 4>();
        w_.load_shared(std::span<const F32>(sum), SharedAddress{at});
        std::vector<Fragment> others; // all on their way before the first is needed
        for (int other = 1; other < c_.warps; ++other) {
          others.push_back(w_.make<F32, 4>());
          w_.load_shared(std::span<const F32>(others.back()),
                         SharedAddress{at, std::int64_t{other} * fragments * kAccumulator});
        }
        for (const Fragment& v : others)
          for (std::size_t e = 0; e < 4; ++e)
            sum[e] = w_.add(sum[e], v[e]);
        w_.store_shared(SharedAddress{at}, std::span<const F32>(sum));
      };
      if (first + threads <= lanes)
        sum_one();
      else
        w_.if_(w_.compare_u32(Compare::lt, index, lanes), sum_one);
    }
    if (c_.cluster > 1) {
      w_.barrier_cluster_arrive();
      w_.barrier_cluster_wait();
    } else {
      w_.barrier();
    }
    w_.comment("eight rows of one token a thread");
    const int items = fragments * 16 / c_.cluster;
    for (int first = 0; first < items; first += threads) {
      B32 item = w_.add(thread_, first);
      const bool all = first + threads <= items;
      const Pred mine = all ? Pred{} : w_.compare_u32(Compare::lt, item, items);
      if (c_.cluster > 1)
        item = w_.mad(rank_, items, item);
      if (all)
        store_octet(item, shared);
      else
        w_.if_(mine, [&] { store_octet(item, shared); });
    }
    if (c_.cluster > 1) {
      w_.comment("no block leaves while another reads its sums");
      w_.barrier_cluster_arrive_relaxed();
      w_.barrier_cluster_wait();
    }
  }

  void store_octet(B32 item, B32 shared) {
    const int octets = 2 * c_.row_tiles;
    const B32 token = w_.div_u32(item, octets), octet = w_.sub(item, w_.mul(token, octets));
    const B32 row = w_.mad(w_.mad(tile_, 2, octet), 8, 0);
    const Pred stored = w_.both(w_.compare_u32(Compare::lt, token, m_), w_.compare_u32(Compare::lt, row, shape_.n));
    w_.if_(stored, [&] {
      // fragment (octet/2, token/8), lane (token mod 8)/2 of row 0, element 2·(octet mod 2) + token mod 2
      const B32 fragment = w_.mad(w_.shr(octet, 1), c_.token_tiles, w_.shr(token, 3));
      const B32 in_fragment =
          w_.mad(w_.shr(w_.and_(token, 7), 1), 16, w_.mad(w_.and_(octet, 1), 8, w_.mul(w_.and_(token, 1), 4)));
      const B32 at = w_.mad(fragment, kAccumulator, w_.add(in_fragment, shared));
      std::vector<std::array<F32, 1>> v; // by rank and row; all on their way before the first is needed
      for (int rank = 0; rank < c_.cluster; ++rank) {
        const SharedAddress from = c_.cluster > 1 ? w_.in_block(at, rank) : SharedAddress{at};
        for (int r = 0; r < 8; ++r) {
          v.push_back(w_.make<F32, 1>());
          const SharedAddress place{from.base, std::int64_t{r} * 64}; // four lanes on
          if (c_.cluster > 1)
            w_.load_cluster(std::span<const F32>(v.back()), place);
          else
            w_.load_shared(std::span<const F32>(v.back()), place);
        }
      }
      std::array<F32, 8> sum;
      for (std::size_t i = 0; i < v.size(); ++i)
        sum[i % 8] = i < 8 ? v[i][0] : w_.add(sum[i % 8], v[i][0]);
      std::array<B32, 4> out;
      for (std::size_t i = 0; i < 4; ++i)
        out[i] = w_.to_bf16x2(sum[2 * i + 1], sum[2 * i]);
      const B64 elements = w_.mad_wide(w_.add(first_token_, token), ldy_, w_.widen(row));
      const B64 at_y = w_.add64(w_.add64(y_, elements), elements);
      w_.store_global({at_y}, std::span<const B32>(out));
    });
  }

  const Shape shape_;
  const SkinnyConfig c_;
  const int4_mm::FragmentLayout layout_;
  Writer w_;
  const int ranks_;  ///< warps that split K
  const int unroll_; ///< K blocks of one turn of the loop
  B64 y_, policy_;
  B32 m_, first_token_; ///< tokens from the block's first on
  B32 ldy_, thread_, lane_, rank_, rank_k_, rank_k_now_, tile_;
  B32 left_;             ///< K blocks that this warp still has from the pointers on
  B64 weights_, scales_; ///< this lane's place in the next K block of row tile 0
  std::int64_t scale_advance_ = 0;
  std::vector<B64> tokens_;           ///< this lane's 16 bytes of every fourth token in the next K block
  std::vector<std::array<B32, 4>> x_; ///< what lies there
  Pred first_half_;                   ///< they are of the first 32 k
  B32 shared_, token_write_, token_write_odd_;
  std::array<B32, 2> token_read_;
  std::vector<Fragment> acc_;
  Fragment zero_;
  std::array<B32, 4> ones_;
  std::vector<Weights> weight_stages_;
};

} // namespace

std::string SkinnyConfig::text() const {
  return fmt::format("t{}r{}w{}c{}d{}", token_tiles, row_tiles, warps, cluster, depth);
}
std::int64_t SkinnyConfig::blocks(const Shape& shape) const {
  const std::int64_t tiles = (shape.n + 15) / 16;
  return (tiles + row_tiles - 1) / row_tiles * cluster;
}

std::array<B32, 4> unpack(Writer& w, B32 word) {
  std::array<B32, 4> a;
  for (int i = 0; i < 4; ++i) {
    // (word & mask) | magic: bf16 of 128 + q, whose mantissa's last bits are q; then − 136, exact.
    const B32 shifted = i == 0 ? word : w.shr(word, 4 * i);
    const B32 biased = w.lop3(shifted, 0x000F000F, 0x43004300, 0xEA);
    a[static_cast<std::size_t>(i)] = w.fma_bf16x2(biased, kOnes, 0xC308C308);
  }
  return a;
}

Result<std::string> emit_skinny(Sm sm, const Shape& shape, const SkinnyConfig& config) {
  const std::int64_t tiles = (shape.n + 15) / 16;
  if (config.row_tiles < 1 || config.row_tiles > tiles || !std::has_single_bit(static_cast<unsigned>(config.warps)) ||
      !std::has_single_bit(static_cast<unsigned>(config.cluster)) || config.cluster * config.warps * 64 < shape.group ||
      config.token_tiles < 1 || (config.depth != 1 && config.depth != 2 && config.depth != 4))
    return Status::error(Code::compile_failed, fmt::format("int4_mm: configuration {} does not suit n={} k={} group={}",
                                                           config.text(), shape.n, shape.k, shape.group));
  return Skinny(sm, shape, config).emit();
}

} // namespace kiln::nvidia::int4
