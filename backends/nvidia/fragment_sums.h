#pragma once
#include <array>
#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "backends/nvidia/ptx.h"

namespace kiln::nvidia {

/// The end of a kernel whose groups of warps, and whose blocks of a cluster, each took a part of K: their accumulators
/// are added up through shared memory, in a fixed order. A fragment is 16×8 sums over a warp, four a lane (mma's D).
template <class R> class FragmentSums {
public:
  using Fragment = std::array<R, 4>;
  static constexpr int kBytes = 512; ///< of a fragment over a warp

  struct Place {
    ptx::B32 shared; ///< free from here on, once every warp is past its last product
    ptx::B32 lane;
    ptx::B32 warp, group; ///< of the group; of the block
    ptx::B32 rank;        ///< in the cluster; none with one block
    int groups, group_warps, cluster;
  };

  FragmentSums(ptx::Writer& writer, const Place& place, std::vector<Fragment>& sums)
      : w_(writer), p_(place), sums_(sums) {}

  /// The groups' sums into the first group's registers, in the order of the groups.
  void over_groups() {
    if (p_.groups == 1)
      return;
    w_.comment("sums over the groups of warps");
    w_.barrier();
    const ptx::Pred first = w_.compare_u32(ptx::Compare::eq, p_.group, 0);
    w_.if_(ptx::unless(first), [&] { dump(at(w_.mad(w_.sub(p_.group, 1), p_.group_warps, p_.warp))); });
    w_.barrier();
    w_.if_(first, [&] {
      for (int other = 1; other < p_.groups; ++other) {
        const ptx::B32 from = at(w_.add(p_.warp, (other - 1) * p_.group_warps));
        for (std::size_t f = 0; f < sums_.size(); ++f) {
          const Fragment v = w_.make<R, 4>();
          w_.load_shared(std::span<const R>(v), {from, static_cast<std::int64_t>(f) * kBytes});
          for (std::size_t e = 0; e < 4; ++e)
            w_.add_to(sums_[f][e], sums_[f][e], v[e]);
        }
      }
    });
  }

  /// Fragment f of the tile into register f / cluster of the block of rank f mod cluster, in the order of the ranks.
  void over_cluster() {
    if (p_.cluster == 1)
      return;
    w_.comment("sums over the cluster");
    w_.barrier();
    const auto first_group = [&](auto body) {
      if (p_.groups == 1)
        body();
      else
        w_.if_(w_.compare_u32(ptx::Compare::eq, p_.group, 0), body);
    };
    const ptx::B32 own = at(p_.warp);
    first_group([&] { dump(own); });
    w_.barrier_cluster_arrive();
    w_.barrier_cluster_wait();
    first_group([&] {
      const ptx::B32 mine = w_.mad(p_.rank, kBytes, own);
      for (int rank = 0; rank < p_.cluster; ++rank) {
        const ptx::SharedAddress from = w_.in_block(mine, rank);
        for (std::size_t i = 0; i < sums_.size() / static_cast<std::size_t>(p_.cluster); ++i) {
          const Fragment v = w_.make<R, 4>();
          w_.load_cluster(std::span<const R>(v), {from.base, static_cast<std::int64_t>(i) * p_.cluster * kBytes});
          for (std::size_t e = 0; e < 4; ++e)
            if (rank == 0)
              w_.mov_to(sums_[i][e], v[e]);
            else
              w_.add_to(sums_[i][e], sums_[i][e], v[e]);
        }
      }
    });
    w_.barrier_cluster_arrive_relaxed(); // no block leaves while another reads its sums
    w_.barrier_cluster_wait();
  }

private:
  /// A warp's fragments in shared memory: [place][fragment][lane][4].
  ptx::B32 at(ptx::B32 place) {
    return w_.mad(place, static_cast<int>(sums_.size()) * kBytes, w_.mad(p_.lane, 16, p_.shared));
  }
  void dump(ptx::B32 to) {
    for (std::size_t f = 0; f < sums_.size(); ++f)
      w_.store_shared({to, static_cast<std::int64_t>(f) * kBytes}, std::span<const R>(sums_[f]));
  }

  ptx::Writer& w_;
  const Place p_;
  std::vector<Fragment>& sums_;
};

} // namespace kiln::nvidia
