#pragma once
#include <algorithm>
#include <array>
#include <bit>
#include <cstddef>
#include <cstdint>
#include <initializer_list>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "backends/nvidia/ptx.h"
#include "jit/cuda/launch_plan.h"

/// What the matrix products on Hopper share whose operands come through a ring in shared memory by the copy engine,
/// with mbarriers, a copying warp, multiplying warpgroups and a persistent grid.
namespace kiln::nvidia {

/// Which operand two neighbouring blocks share, each copying half of it to both: the 64-row one (tiles side by side) or
/// the other (tiles one below the other).
enum class Share : std::uint8_t { none, rows, columns };

/// Tiles of warpgroups · waves · 64 rows of one operand × `columns` rows of the other. The 64-row operand is the one
/// with the rows of the output, or that with its columns (the weights) when `swapped`: few rows of the output then cost
/// no more than they are.
struct PersistentConfig {
  bool swapped = false;
  int warpgroups = 2;        ///< that multiply
  int waves = 2;             ///< of 64 rows, that a warpgroup multiplies one after the other
  int columns = 128;         ///< of one wgmma
  int stages = 4;            ///< of 128 bytes of K in the ring
  int split = 1;             ///< blocks of a cluster that share a tile, each with a part of K
  Share share = Share::none; ///< by a cluster of two; none with a split
  int group = 8;             ///< tiles along M that run side by side; 0: M is within one

  int rows() const { return 64 * warpgroups * waves; }
  int sharing() const { return share == Share::none ? 1 : 2; }
  int cluster() const { return split * sharing(); }
  int threads() const { return 128 * warpgroups + 32; }
  int units() const { return waves * columns / (swapped ? 8 : 16); } ///< 16 × 8 or 16 sums of a warp
  int rank_units() const { return (units() + split - 1) / split; }   ///< that one block of a split adds up
  /// Of shared memory that the sums of a split take.
  std::int64_t sum_bytes() const {
    return split > 1 ? std::int64_t{split} * rank_units() * 64 * warpgroups * (swapped ? 32 : 64) : 0;
  }
  /// Rows of each operand that one block copies at once: a tensor map's box.
  int row_box() const { return rows() / (share == Share::rows ? 2 : 1); }
  int column_box() const { return columns / (share == Share::columns ? 2 : 1); }
  /// `x2v2n128s4k1g8r`: x or, swapped, y; warpgroups, waves, columns, stages, split, group; r or c for what is shared.
  std::string text() const;
  /// Of what text() gives.
  static std::optional<PersistentConfig> parse(std::string_view text);
  bool operator==(const PersistentConfig&) const = default;
};

/// Of sm_90 ("CUDA C++ Programming Guide", technical specifications): what an SM has, what each block takes besides its
/// own, what one may have.
inline constexpr std::int64_t kSmSharedBytes = 228 * 1024, kReservedBytes = 1024;
inline constexpr std::int64_t kBlockSharedBytes = kSmSharedBytes - kReservedBytes;
inline constexpr int kMaxStages = 32; ///< one lane makes the barriers of each
inline constexpr int kSms = 132;      ///< of the H100 and H200; others get along with what suits these

/// Registers of a thread that a block of so many threads can have: they are dealt out in each of the SM's four parts.
int register_limit(int threads);

cuda::LaunchPlan persistent_launch(const PersistentConfig& config, std::int64_t shared_bytes, int blocks_per_sm);

/// A kernel of such a configuration, without its arithmetic: which tiles a block takes, the ring, sums over a cluster
/// that splits K, and where results lie. Sums are `Sum` registers, in wgmma's layout of D: row l/4 (+8), columns
/// 2·(l mod 4) + {0, 1} of each eight.
template <class Config, class Sum> class PersistentTile {
protected:
  static constexpr int kRow = 128;     ///< bytes of K of a row in one stage
  static constexpr int kHeader = 1024; ///< bytes of mbarriers
  /// Descriptor ("wgmma, matrix descriptor"), all over 16: 8 rows apart 1024 bytes, 128-byte swizzle.
  static constexpr int kDescriptorLow = 1 << 16, kDescriptorHigh = 1024 / 16 | 1 << 30;
  using Compare = ptx::Compare;
  using Guard = ptx::Guard;
  using Pred = ptx::Pred;
  using B32 = ptx::B32;
  using B64 = ptx::B64;
  using F32 = ptx::F32;
  using I32 = ptx::I32;

  /// Where a tile lies: its first row of the 64-row operand and of the other one, and its matrix.
  struct Place {
    B32 row, column, batch;
  };
  /// A stage of the ring, and the parity of its barrier's phase.
  struct Slot {
    B32 index, parity;
  };
  /// Constants of the problem; K in steps of one stage.
  struct Problem {
    std::int64_t b = 1, n = 0, k_steps = 0;
  };
  /// Of shared memory, and of the barriers that tell that a stage has come.
  struct Layout {
    int stage_bytes, sums_offset, full_arrivals;
  };

  PersistentTile(ptx::Sm sm, const Problem& problem, const Config& config, const Layout& layout)
      : problem_(problem), layout_(layout), c_(config),
        w_(sm, "main", config.threads(), config.cluster(), config.blocks_per_sm()) {}

  int consumer_warps() const { return 4 * c_.warpgroups; }
  int columns() const { return c_.columns; }
  int empty_offset() const { return 8 * c_.stages; }
  int sums_ready_offset() const { return 16 * c_.stages; }
  int sums_read_offset() const { return 16 * c_.stages + 8; }

  // A warp's parts of a warpgroup's sums that are stored together: 16 columns, or when swapped 8.
  int unit_sums() const { return c_.swapped ? 4 : 8; }
  int wave_units() const { return columns() / 2 / unit_sums(); }
  int units() const { return c_.units(); }

  /// How the block's warps meet before the ring is used: all of them once; or, early, the copying warp makes the `full`
  /// barriers, which is all that it needs to fill the ring once, and waits for nobody, but where it copies into another
  /// block, whose barriers must be there.
  enum class Meeting : std::uint8_t { together, early };

  /// After the parameters: who this thread is, the barriers, the tiles that there are. `divides`: finds its cluster by
  /// a division, which takes longer than a shift.
  void start(std::initializer_list<B64> maps, Meeting meeting = Meeting::together, bool divides = true) {
    thread_ = w_.thread();
    lane_ = w_.and_(thread_, 31);
    warp_ = w_.uniform(w_.shr(thread_, 5));
    rank_ = c_.cluster() > 1 ? w_.rank_in_cluster() : w_.mov(0);
    if (!divides && std::has_single_bit(static_cast<unsigned>(c_.cluster()))) {
      const int bits = std::countr_zero(static_cast<unsigned>(c_.cluster()));
      cluster_ = bits > 0 ? w_.shr(w_.block_x(), bits) : w_.block_x();
      clusters_ = bits > 0 ? w_.shr(w_.blocks_x(), bits) : w_.blocks_x();
    } else {
      cluster_ = c_.cluster() > 1 ? w_.div_u32(w_.block_x(), c_.cluster()) : w_.block_x();
      clusters_ = c_.cluster() > 1 ? w_.div_u32(w_.blocks_x(), c_.cluster()) : w_.blocks_x();
    }
    shared_ = w_.shared_memory();
    if (meeting == Meeting::early)
      meet_early(maps);
    else
      meet(maps);
    // Tiles, or pairs of tiles that share an operand.
    m_tiles_ = c_.group == 0 ? w_.mov(1) : w_.div_u32(w_.add(m_, m_step() - 1), m_step());
    matrix_tiles_ = w_.mul(m_tiles_, n_tiles());
    all_tiles_ = w_.mul(matrix_tiles_, problem_.b);
    k_first_ = w_.mov(0);
    steps_ = w_.mov(k_steps());
    if (c_.split > 1) {
      k_first_ = w_.mul(rank_, rank_steps());
      steps_ = w_.max_s32(w_.min_s32(w_.sub(k_steps(), k_first_), rank_steps()), 0);
    }
  }
  /// One thread, by its number: the assembler makes a loop over the lanes of anything that may be several.
  template <class Body> void one_thread(int thread, Body body) {
    w_.if_(w_.compare_u32(Compare::eq, thread_, thread), body);
  }
  void init_full_barriers() {
    for (int s = 0; s < c_.stages; ++s)
      w_.mbarrier_init({shared_, 8 * s}, layout_.full_arrivals);
    w_.fence_mbarrier_init();
  }
  void init_empty_barriers() {
    for (int s = 0; s < c_.stages; ++s)
      w_.mbarrier_init({shared_, empty_offset() + 8 * s}, consumer_warps() * c_.sharing());
    w_.fence_mbarrier_init();
  }
  void init_sums_barriers() {
    w_.mbarrier_init({shared_, sums_ready_offset()}, 1);
    w_.mbarrier_init({shared_, sums_read_offset()}, consumer_warps() * c_.split);
    w_.fence_mbarrier_init();
  }
  void meet(std::initializer_list<B64> maps) {
    one_thread(0, [&] { init_full_barriers(); });
    one_thread(32, [&] { init_empty_barriers(); });
    one_thread(64, [&] {
      for (const B64 map : maps)
        w_.prefetch_tensor_map(map);
      if (c_.split > 1)
        init_sums_barriers();
    });
    w_.barrier();
    if (c_.cluster() > 1)
      w_.barrier_cluster_arrive_relaxed();
    if (c_.sharing() > 1) // else the others are waited for when there is something to send
      w_.barrier_cluster_wait();
  }
  static constexpr int kFullMade = 1, kEmptyMade = 2; ///< barriers of the block
  void meet_early(std::initializer_list<B64> maps) {
    const auto meet_cluster = [&] {
      w_.barrier_cluster_arrive_relaxed();
      w_.barrier_cluster_wait();
    };
    const ptx::Label others = w_.label(), met = w_.label();
    w_.branch(others, w_.compare_u32(Compare::lt, warp_, consumer_warps()));
    one_thread(32 * consumer_warps(), [&] {
      for (const B64 map : maps)
        w_.prefetch_tensor_map(map);
      init_full_barriers();
      w_.fence_proxy_async(); // before its own copies count there
    });
    w_.barrier_warp();
    if (c_.sharing() > 1) {
      meet_cluster();
    } else {
      w_.barrier_arrive(kFullMade, c_.threads());
      if (c_.split > 1)
        w_.barrier_cluster_arrive_relaxed();
    }
    w_.branch(met);
    w_.bind(others);
    one_thread(0, [&] { init_empty_barriers(); });
    if (c_.split > 1)
      one_thread(32, [&] { init_sums_barriers(); });
    w_.barrier_warp();
    if (c_.sharing() > 1) {
      meet_cluster();
    } else {
      w_.barrier_arrive(kEmptyMade, c_.threads());
      w_.barrier(kFullMade, c_.threads());
      if (c_.split > 1)
        w_.barrier_cluster_arrive_relaxed();
    }
    w_.bind(met);
  }
  /// The copying warp behind the multiplying warpgroups.
  template <class Produce, class Consume> Result<std::string> roles(Produce produce, Consume consume) {
    const ptx::Label consumers = w_.label(), end = w_.label();
    w_.branch(consumers, w_.compare_u32(Compare::lt, warp_, consumer_warps()));
    produce();
    w_.branch(end);
    w_.bind(consumers, "consumers");
    consume();
    w_.bind(end, "end");
    return w_.finish();
  }

  std::int64_t k_steps() const { return problem_.k_steps; }
  /// That each block of a split takes, but the last ones fewer.
  int rank_steps() const { return static_cast<int>((k_steps() + c_.split - 1) / c_.split); }
  bool every_rank_has_steps() const { return (c_.split - 1) * rank_steps() < k_steps(); }
  /// Rows of the 64-row operand, and of the other, that a cluster's tiles take.
  int cluster_rows() const { return c_.rows() * (c_.share == Share::columns ? c_.sharing() : 1); }
  int cluster_columns() const { return columns() * (c_.share == Share::rows ? c_.sharing() : 1); }
  int m_step() const { return c_.swapped ? cluster_columns() : cluster_rows(); }
  int n_step() const { return c_.swapped ? cluster_rows() : cluster_columns(); }
  std::int64_t n_tiles() const { return (problem_.n + n_step() - 1) / n_step(); }

  /// Bands of `group` tiles along M; within one, M first: what runs at one time shares operands in L2.
  Place locate(B32 index) {
    B32 batch = w_.mov(0), in_matrix = index;
    if (problem_.b > 1) {
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
  /// `body(step)` for each step along K that this block takes.
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

  void advance(const Slot& s) {
    w_.add_to(s.index, s.index, 1);
    const Pred wraps = w_.compare_u32(Compare::eq, s.index, c_.stages);
    w_.mov_to(s.index, 0, wraps);
    w_.mov_to(s.parity, w_.xor_(s.parity, 1), wraps);
  }

  // ---- the copying warp

  /// A box of `rows` rows of an operand into this block, or `shared` by two, of which each copies half. `policy`: of
  /// L2.
  void copy(B32 to, B64 map, B32 k, B32 row, int rows, bool shared, B32 batch, B32 full, B64 policy = {}) {
    if (!shared) {
      w_.copy_tensor_3d({to}, map, k, row, batch, {full}, 0, policy);
      return;
    }
    const int part = rows / c_.sharing();
    w_.copy_tensor_3d({w_.mad(rank_, part * kRow, to)}, map, k, w_.mad(rank_, part, row), batch, {full},
                      (1 << c_.sharing()) - 1, policy);
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

  void start_consuming() {
    yes_ = w_.always(true);
    no_ = w_.always(false);
    warpgroup_ = w_.shr(warp_, 2);
    quad_ = w_.and_(lane_, 3);
    const B32 empty = w_.add(shared_, empty_offset());
    first_lane_ = w_.compare_u32(Compare::lt, lane_, c_.sharing());
    empty_ = c_.sharing() > 1 ? w_.in_block(empty, w_.min_u32(lane_, c_.sharing() - 1)).base : empty;
    for (int wave = 0; wave < c_.waves; ++wave)
      for (int e = 0; e < columns() / 2; ++e)
        sums_.push_back(w_.template make<Sum, 1>()[0]);
  }
  void await_stage(const Slot& slot) { w_.mbarrier_wait({w_.mad(slot.index, 8, shared_)}, slot.parity); }
  void release(B32 slot) {
    w_.barrier_warp();
    const B32 at = w_.mad(slot, 8, empty_);
    if (c_.sharing() > 1)
      w_.mbarrier_arrive_cluster({at}, first_lane_);
    else
      w_.mbarrier_arrive({at}, first_lane_);
  }
  std::span<const Sum> wave_sums(int wave) const {
    const auto count = static_cast<std::size_t>(c_.columns / 2);
    return std::span<const Sum>(sums_).subspan(static_cast<std::size_t>(wave) * count, count);
  }
  std::span<const Sum> unit_of(int wave, int unit) const {
    return std::span<const Sum>(sums_).subspan(static_cast<std::size_t>((wave * wave_units() + unit) * unit_sums()),
                                               static_cast<std::size_t>(unit_sums()));
  }

  /// Each tile of a cluster that splits K: `multiply(has_steps)` leaves this block's sums in sums_; they are added up
  /// and stored by `prepare(place)` and `store(sums, wave, unit)`.
  template <class Multiply, class Prepare, class Store>
  void split_tiles(Multiply multiply, Prepare prepare, Store store) {
    sums_parity_ = w_.mov(0);
    const B32 waited = w_.mov(0);
    for_tiles([&](B32 tile) {
      multiply();
      w_.if_(w_.compare_u32(Compare::eq, waited, 0), [&] { w_.barrier_cluster_wait(); });
      w_.mov_to(waited, 1);
      store_shares(locate(tile), prepare, store);
    });
    w_.mbarrier_wait({shared_, sums_read_offset()}, w_.xor_(sums_parity_, 1));
  }
  /// K was split over the cluster: block r gets everybody's sums of the units r, r + split, … of each warp, adds them
  /// up in the order of the ranks and stores them.
  template <class Prepare, class Store> void store_shares(const Place& place, Prepare prepare, Store store) {
    w_.comment("sums over the cluster");
    const B32 at = w_.mad(thread_, 16, w_.add(shared_, layout_.sums_offset));
    const B32 mine = w_.mad(rank_, c_.rank_units() * unit_bytes(), at);
    w_.mbarrier_wait({shared_, sums_read_offset()}, w_.xor_(sums_parity_, 1));
    for (int rank = 0; rank < c_.split; ++rank) {
      const B32 to = w_.in_block(mine, rank).base, arrived = w_.in_block(shared_, rank).base;
      for (int i = 0; i * c_.split + rank < units(); ++i)
        for (int part = 0; part < unit_sums() / 4; ++part)
          w_.store_async({to, i * unit_bytes() + part * part_bytes()},
                         std::span<const Sum>(sums_)
                             .subspan(static_cast<std::size_t>((i * c_.split + rank) * unit_sums() + 4 * part))
                             .template first<4>(),
                         {arrived, sums_ready_offset()});
    }
    const B32 unit_count = w_.div_u32(w_.sub(units() + c_.split - 1, rank_), c_.split);
    w_.mbarrier_expect_bytes({shared_, sums_ready_offset()}, w_.mul(unit_count, c_.split * unit_bytes()),
                             w_.compare_u32(Compare::eq, thread_, 0));
    prepare(place);
    w_.mbarrier_wait({shared_, sums_ready_offset()}, sums_parity_);
    for (int i = 0; i * c_.split < units(); ++i) {
      const auto share = [&] {
        std::vector<Sum> total;
        for (int rank = 0; rank < c_.split; ++rank)
          for (int part = 0; part < unit_sums() / 4; ++part) {
            const std::array<Sum, 4> v = w_.template make<Sum, 4>();
            w_.load_shared(std::span<const Sum>(v),
                           {at, (rank * c_.rank_units() + i) * unit_bytes() + part * part_bytes()});
            for (std::size_t e = 0; e < 4; ++e)
              if (rank == 0)
                total.push_back(v[e]);
              else
                w_.add_to(total[static_cast<std::size_t>(4 * part) + e], total[static_cast<std::size_t>(4 * part) + e],
                          v[e]);
          }
        const B32 unit = w_.add(rank_, i * c_.split), wave = w_.div_u32(unit, wave_units());
        store(total, wave, w_.sub(unit, w_.mul(wave, wave_units())));
      };
      if ((i + 1) * c_.split <= units())
        share();
      else
        w_.if_(w_.compare_u32(Compare::lt, rank_, units() - i * c_.split), share);
    }
    w_.barrier_warp();
    const ptx::SharedAddress theirs = w_.in_block(shared_, w_.min_u32(lane_, c_.split - 1));
    w_.mbarrier_arrive_cluster({theirs.base, sums_read_offset()}, w_.compare_u32(Compare::lt, lane_, c_.split));
    w_.mov_to(sums_parity_, w_.xor_(sums_parity_, 1));
  }
  int part_bytes() const { return 16 * 128 * c_.warpgroups; }
  int unit_bytes() const { return unit_sums() / 4 * part_bytes(); }

  // ---- where results lie

  /// Of the output: its address, elements from batch to batch (none with one) and from row to row.
  struct Destination {
    B64 address, batch_stride;
    B32 row_stride;
    int element = 2; ///< bytes
  };
  /// Where this lane stores what it has of its warp's first row and column, and how the rows go on. With `pairs`, lanes
  /// exchange pairs of 16-bit elements (store_pairs), so that one has four neighbours of one of two eights.
  void prepare_store(const Place& place, const Destination& out, bool pairs) {
    out_ = out;
    const B32 warp_row = w_.add(w_.mad(warpgroup_, c_.waves * 64, place.row), w_.mul(w_.and_(warp_, 3), 16));
    const B32 eighth = w_.shr(lane_, 2), pair = w_.mul(quad_, 2);
    const B32 four = w_.mad(w_.and_(quad_, 1), 8, w_.mul(w_.shr(quad_, 1), 4));
    is_odd_ = w_.compare_u32(Compare::ne, w_.and_(lane_, 1), 0);
    if (c_.swapped) {
      first_m_ = w_.add(place.column, pairs ? eighth : pair);
      first_n_ = w_.add(warp_row, pairs ? four : eighth);
    } else {
      first_m_ = w_.add(warp_row, eighth);
      first_n_ = w_.add(place.column, pairs ? four : pair);
    }
    B64 matrix = out.address;
    if (out.batch_stride.id >= 0)
      matrix = w_.add64(out.address, w_.mul64(w_.mul64(out.batch_stride, w_.widen(place.batch)), out.element));
    row_bytes_ = w_.mul64(w_.widen(out.row_stride), out.element);
    first_ = w_.mad_wide(first_n_, out.element, w_.add64(matrix, w_.mul64(row_bytes_, w_.widen(first_m_))));
  }
  /// `rows` below and `columns` beside the lane's first element: a constant or, where K was split, a register.
  ptx::GlobalAddress output_at(I32 rows, I32 columns) {
    const B64 row = rows.is_immediate ? w_.add64(first_, w_.mul64(row_bytes_, rows.immediate))
                                      : w_.add64(first_, w_.mul64(row_bytes_, w_.widen(rows.reg)));
    if (columns.is_immediate)
      return {row, columns.immediate * out_.element};
    return {w_.mad_wide(columns, out_.element, row)};
  }
  Pred row_exists(I32 rows) { return w_.compare_u32(Compare::lt, w_.add(first_m_, rows), m_); }
  Pred column_exists(I32 columns) { return w_.compare_u32(Compare::lt, w_.add(first_n_, columns), problem_.n); }
  Pred exists(I32 rows, I32 columns) {
    const Pred row = row_exists(rows);
    return problem_.n % n_step() == 0 ? row : w_.both(row, column_exists(columns));
  }
  I32 plus(I32 a, int b) { return a.is_immediate ? I32(a.immediate + b) : I32(w_.add(a, b)); }
  I32 times(I32 a, int b) { return a.is_immediate ? I32(a.immediate * b) : I32(w_.mul(a, b)); }

  /// 16 columns of a row, of which this lane has 2·(l mod 4) + {0, 1} and eight further, as pairs of 16-bit elements.
  /// Neighbours exchange a pair: whole sectors of 32 bytes are written.
  void store_pairs(B32 low, B32 high, I32 m, I32 n) {
    const B32 theirs = w_.shuffle_xor(w_.select(is_odd_, low, high), 1);
    const std::array<B32, 2> four = {w_.select(is_odd_, theirs, low), w_.select(is_odd_, high, theirs)};
    w_.store_global(output_at(m, n), std::span<const B32>(four), exists(m, n));
  }

  const Problem problem_;
  const Layout layout_;
  const Config c_;
  ptx::Writer w_;
  B32 m_; ///< rows of the output: a parameter
  B32 thread_, lane_, warp_, rank_, cluster_, clusters_, shared_;
  B32 m_tiles_, matrix_tiles_, all_tiles_, k_first_, steps_;
  Pred yes_, no_, first_lane_, is_odd_;
  B32 warpgroup_, quad_, empty_, sums_parity_;
  std::vector<Sum> sums_; ///< of all waves
  Destination out_;
  B32 first_m_, first_n_;
  B64 first_, row_bytes_;
};

} // namespace kiln::nvidia
