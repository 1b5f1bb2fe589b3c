#include <algorithm>
#include <cstring>
#include <type_traits>
#include <utility>

#include "jit/ops/int8_mm.h"

/// Packing B. Written with the compiler's vector extension so that every architecture gets vector code from one source:
/// what bounds it is memory, once the byte shuffles are vector instructions.
namespace kiln::int8_mm {
namespace {

using Row16 = std::int8_t __attribute__((vector_size(16)));

template <class Element> struct VectorOf;
template <> struct VectorOf<std::int8_t> { using Type = Row16; };
template <> struct VectorOf<std::int16_t> { using Type = std::int16_t __attribute__((vector_size(16))); };
template <> struct VectorOf<std::int32_t> { using Type = std::int32_t __attribute__((vector_size(16))); };
template <> struct VectorOf<std::int64_t> { using Type = std::int64_t __attribute__((vector_size(16))); };

/// The first `bytes` bytes from p, by one load.
template <int bytes> Row16 load(const std::int8_t* p) {
  using Element = std::conditional_t<bytes == 4, std::int32_t, std::int64_t>;
  static_assert(bytes == 4 || bytes == 8 || bytes == 16);
  if constexpr (bytes == 16) {
    Row16 v;
    std::memcpy(&v, p, bytes);
    return v;
  } else {
    Element first;
    std::memcpy(&first, p, bytes);
    return (Row16) typename VectorOf<Element>::Type{first};
  }
}

/// The `Element`s of the low, or high, halves of a and b in turn.
template <class Element, bool high> Row16 interleave(Row16 a, Row16 b) {
  using Vector = typename VectorOf<Element>::Type;
  const auto shuffle = [&]<int... i>(std::integer_sequence<int, i...>) {
    constexpr int n = sizeof...(i), first = high ? n / 2 : 0;
    return (Row16)__builtin_shufflevector((Vector)a, (Vector)b, (first + i / 2 + i % 2 * n)...);
  };
  return shuffle(std::make_integer_sequence<int, 16 / sizeof(Element)>());
}

/// `columns` (≤ 16) columns of `kb` rows of B (kn) → out[columns][kb]. Reads and writes nothing else.
template <int kb, int columns> void transpose_kn(const std::int8_t* b, std::int64_t ldb, std::int8_t* out) {
  Row16 rows[kb]; // in the end column after column, through runs of 2, 4, 8 of a column's elements
  for (int k = 0; k < kb; ++k)
    rows[k] = load<columns>(b + k * ldb);
  const auto merge = [&]<class Element>(Element) {
    constexpr int run = sizeof(Element);
    Row16 merged[kb];
    for (int first = 0; first < kb; first += 2 * run)
      for (int i = 0; i < run; ++i) {
        merged[first + 2 * i] = interleave<Element, false>(rows[first + i], rows[first + run + i]);
        merged[first + 2 * i + 1] = interleave<Element, true>(rows[first + i], rows[first + run + i]);
      }
    std::copy(std::begin(merged), std::end(merged), rows);
  };
  if constexpr (kb >= 2)
    merge(std::int8_t());
  if constexpr (kb >= 4)
    merge(std::int16_t());
  if constexpr (kb >= 8)
    merge(std::int32_t());
  static_assert(kb == 1 || kb == 2 || kb == 4 || kb == 8);
  std::memcpy(out, rows, columns * kb);
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

/// Returns the rows done, a multiple of k_block. Columns that are no multiple of four are left to pack_elements.
template <int kb> std::int64_t pack_whole_kn(const Panel& p) {
  if (p.columns % 4 != 0)
    return 0;
  const std::int64_t whole = p.k / kb * kb;
  for (std::int64_t k = 0; k < whole; k += kb) {
    const std::int8_t* const row = p.b + k * p.ldb;
    std::int8_t* const out = p.out + k * p.n_block;
    std::int64_t j = 0;
    for (; j + 16 <= p.columns; j += 16)
      transpose_kn<kb, 16>(row + j, p.ldb, out + j * kb);
    for (; j + 8 <= p.columns; j += 8)
      transpose_kn<kb, 8>(row + j, p.ldb, out + j * kb);
    for (; j < p.columns; j += 4)
      transpose_kn<kb, 4>(row + j, p.ldb, out + j * kb);
  }
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
  const bool nk = b_layout == BLayout::nk;
  switch (p.k_block) {
  case 1:
    return nk ? pack_whole_nk<std::uint8_t>(p) : pack_whole_kn<1>(p);
  case 2:
    return nk ? pack_whole_nk<std::uint16_t>(p) : pack_whole_kn<2>(p);
  case 4:
    return nk ? pack_whole_nk<std::uint32_t>(p) : pack_whole_kn<4>(p);
  case 8:
    return nk ? pack_whole_nk<std::uint64_t>(p) : pack_whole_kn<8>(p);
  default:
    return 0;
  }
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

void pack_panels(PackLayout layout, const void* b_elements, std::int64_t ldb, BLayout b_layout, std::int64_t n,
                 std::int64_t k, std::int64_t panel_begin, std::int64_t panel_end, std::int8_t* panels_out,
                 std::int32_t* sums_out, BDtype b_dtype) {
  const std::int64_t panel_bytes = layout.panel_bytes(k), k_groups = layout.k_padded(k) / layout.k_block;
  // What is no element is 0 in the end: u8 panels are flipped whole.
  const int padding = b_dtype == BDtype::u8 ? 0x80 : 0;
  const auto* const b = static_cast<const std::int8_t*>(b_elements);
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
      std::memset(p.out, padding, static_cast<std::size_t>(panel_bytes));
    const std::int64_t done = pack_whole(p, b_layout);
    std::memset(p.out + done * p.n_block, padding, static_cast<std::size_t>(panel_bytes - done * p.n_block));
    pack_elements(p, b_layout, done);
    if (b_dtype == BDtype::u8)
      for (std::int64_t i = 0; i < panel_bytes; ++i)
        p.out[i] = static_cast<std::int8_t>(p.out[i] ^ 0x80);
    sum_panel(p.out, k_groups, p.n_block, p.k_block, sums_out + (panel - panel_begin) * layout.n_block);
  }
}

} // namespace kiln::int8_mm
