#include <algorithm>
#include <cstring>

#include "jit/ops/int8_mm.h"

/// Packing B. Written with the compiler's vector extension so that every architecture gets vector code from one source:
/// what bounds it is memory, once the byte shuffles are vector instructions.
namespace kiln::int8_mm {
namespace {

using Row16 = std::int8_t __attribute__((vector_size(16)));

Row16 load16(const std::int8_t* p) {
  Row16 v;
  std::memcpy(&v, p, 16);
  return v;
}
void store16(std::int8_t* p, Row16 v) {
  std::memcpy(p, &v, 16);
}

Row16 interleave_low(Row16 a, Row16 b) {
  return __builtin_shufflevector(a, b, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
}
Row16 interleave_high(Row16 a, Row16 b) {
  return __builtin_shufflevector(a, b, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
}
using Pair8 = std::int16_t __attribute__((vector_size(16)));
Pair8 interleave_pairs_low(Pair8 a, Pair8 b) {
  return __builtin_shufflevector(a, b, 0, 8, 1, 9, 2, 10, 3, 11);
}
Pair8 interleave_pairs_high(Pair8 a, Pair8 b) {
  return __builtin_shufflevector(a, b, 4, 12, 5, 13, 6, 14, 7, 15);
}

/// Sixteen columns of `kb` rows of B (kn) → out[16][kb].
template <int kb> void transpose_kn(const std::int8_t* b, std::int64_t ldb, std::int8_t* out) {
  if constexpr (kb == 2) {
    const Row16 r0 = load16(b), r1 = load16(b + ldb);
    store16(out, interleave_low(r0, r1));
    store16(out + 16, interleave_high(r0, r1));
  } else {
    static_assert(kb == 4);
    const Row16 r0 = load16(b), r1 = load16(b + ldb), r2 = load16(b + 2 * ldb), r3 = load16(b + 3 * ldb);
    const Pair8 low01 = (Pair8)interleave_low(r0, r1), high01 = (Pair8)interleave_high(r0, r1);
    const Pair8 low23 = (Pair8)interleave_low(r2, r3), high23 = (Pair8)interleave_high(r2, r3);
    store16(out, (Row16)interleave_pairs_low(low01, low23));
    store16(out + 16, (Row16)interleave_pairs_high(low01, low23));
    store16(out + 32, (Row16)interleave_pairs_low(high01, high23));
    store16(out + 48, (Row16)interleave_pairs_high(high01, high23));
  }
}

struct Panel {
  const std::int8_t* b;
  std::int64_t ldb;
  std::int64_t columns; ///< that exist, ≤ n_block
  std::int64_t k;
  int n_block, k_block;
  std::int8_t* out;
};

/// Any layout, any remainder: element by element.
void pack_elements(const Panel& p, BLayout b_layout, std::int64_t k_begin) {
  const std::int64_t step_n = b_layout == BLayout::nk ? p.ldb : 1, step_k = b_layout == BLayout::nk ? 1 : p.ldb;
  for (std::int64_t k = k_begin; k < p.k; ++k)
    for (std::int64_t j = 0; j < p.columns; ++j)
      p.out[(k / p.k_block * p.n_block + j) * p.k_block + k % p.k_block] = p.b[j * step_n + k * step_k];
}

/// Returns the rows done, a multiple of k_block.
template <int kb> std::int64_t pack_whole_kn(const Panel& p) {
  const std::int64_t whole = p.k / kb * kb;
  for (std::int64_t k = 0; k < whole; k += kb)
    for (int j = 0; j < p.n_block; j += 16)
      transpose_kn<kb>(p.b + k * p.ldb + j, p.ldb, p.out + k * p.n_block + j * kb);
  return whole;
}

/// [n][k] already holds each column's k_block run in a row: a strided copy of words, in strips of k so that the lines
/// written stay in L1.
template <class Word> std::int64_t pack_whole_nk(const Panel& p) {
  constexpr std::int64_t kb = sizeof(Word), strip = 64;
  const std::int64_t whole = p.k / kb * kb;
  for (std::int64_t k0 = 0; k0 < whole; k0 += strip)
    for (std::int64_t j = 0; j < p.columns; ++j) {
      const std::int8_t* from = p.b + j * p.ldb;
      for (std::int64_t k = k0; k < std::min(whole, k0 + strip); k += kb)
        std::memcpy(p.out + k * p.n_block + j * kb, from + k, kb);
    }
  return whole;
}

std::int64_t pack_whole(const Panel& p, BLayout b_layout) {
  if (b_layout == BLayout::nk) {
    switch (p.k_block) {
    case 2:
      return pack_whole_nk<std::uint16_t>(p);
    case 4:
      return pack_whole_nk<std::uint32_t>(p);
    case 8:
      return pack_whole_nk<std::uint64_t>(p);
    default:
      return 0;
    }
  }
  if (p.columns == p.n_block && p.n_block % 16 == 0) {
    if (p.k_block == 2)
      return pack_whole_kn<2>(p);
    if (p.k_block == 4)
      return pack_whole_kn<4>(p);
  }
  return 0;
}

/// Σ_k of a packed panel, which wraps. Runs of at most 256 k-groups are summed in 16 bits, where the k_block lanes of
/// one column stay apart.
void sum_panel(const std::int8_t* panel, std::int64_t k_groups, int n_block, int k_block, std::int32_t* sums) {
  std::fill_n(sums, n_block, 0);
  const int lanes = n_block * k_block;
  std::int16_t partial[256 * 64];
  constexpr std::int64_t run = 256; // 256 · 128 = 2^15: −32768 still fits
  for (std::int64_t g0 = 0; g0 < k_groups; g0 += run) {
    const std::int64_t g1 = std::min(k_groups, g0 + run);
    std::fill_n(partial, lanes, std::int16_t{0});
    for (std::int64_t g = g0; g < g1; ++g)
      for (int i = 0; i < lanes; ++i)
        partial[i] = static_cast<std::int16_t>(partial[i] + panel[g * lanes + i]);
    for (int j = 0; j < n_block; ++j)
      for (int i = 0; i < k_block; ++i)
        sums[j] = static_cast<std::int32_t>(static_cast<std::uint32_t>(sums[j]) +
                                            static_cast<std::uint32_t>(partial[j * k_block + i]));
  }
}

} // namespace

void pack_panels(PackLayout layout, const std::int8_t* b, std::int64_t ldb, BLayout b_layout, std::int64_t n,
                 std::int64_t k, std::int64_t panel_begin, std::int64_t panel_end, std::int8_t* panels_out,
                 std::int32_t* sums_out) {
  const std::int64_t panel_bytes = layout.panel_bytes(k), k_groups = layout.k_padded(k) / layout.k_block;
  for (std::int64_t panel = panel_begin; panel < panel_end; ++panel) {
    const std::int64_t column = panel * layout.n_block;
    const Panel p = {.b = b + column * (b_layout == BLayout::nk ? ldb : 1),
                     .ldb = ldb,
                     .columns = std::min<std::int64_t>(layout.n_block, n - column),
                     .k = k,
                     .n_block = layout.n_block,
                     .k_block = layout.k_block,
                     .out = panels_out + (panel - panel_begin) * panel_bytes};
    const bool ragged = p.columns < p.n_block;
    if (ragged)
      std::memset(p.out, 0, static_cast<std::size_t>(panel_bytes));
    const std::int64_t done = pack_whole(p, b_layout);
    std::memset(p.out + done * p.n_block, 0, static_cast<std::size_t>(panel_bytes - done * p.n_block));
    pack_elements(p, b_layout, done);
    sum_panel(p.out, k_groups, p.n_block, p.k_block, sums_out + (panel - panel_begin) * layout.n_block);
  }
}

} // namespace kiln::int8_mm
