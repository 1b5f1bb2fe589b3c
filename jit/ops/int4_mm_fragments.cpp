#include "jit/ops/int4_mm_fragments.h"

#include <algorithm>
#include <cstring>

namespace kiln::int4_mm {
namespace {

constexpr int kRows = 16, kBlock = 64, kBlockBytes = kBlock / 2;
constexpr std::uint8_t kTwoEights = 0x88; // the weight 0, twice

/// 16 rows × 64 k as 32 lanes of four words.
void pack_block(const std::uint8_t rows[kRows][kBlockBytes], std::uint8_t* out) {
  for (int lane = 0; lane < 32; ++lane)
    for (int step = 0; step < 4; ++step, out += 4) {
      std::uint32_t word = 0;
      for (int i = 0; i < 4; ++i) {
        const int k = 16 * step + 2 * (lane % 4) + 8 * (i / 2);
        const std::uint32_t pair = rows[lane / 4 + 8 * (i % 2)][k / 2];
        word |= pair >> 4 << (4 * i) | (pair & 15) << (16 + 4 * i);
      }
      std::memcpy(out, &word, 4);
    }
}

} // namespace

void pack_fragments(const std::uint8_t* w, const std::uint16_t* sz, std::int64_t n, std::int64_t k, std::int64_t group,
                    std::int64_t n_begin, std::int64_t n_end, std::uint8_t* w_out, std::uint8_t* sz_out) {
  const FragmentLayout layout{n, k, group};
  const std::int64_t tile_begin = n_begin / kRows, tile_end = (n_end + kRows - 1) / kRows;
  const std::int64_t row_bytes = k / 2, groups = k / group;
  std::uint8_t rows[kRows][kBlockBytes];
  for (std::int64_t tile = tile_begin; tile < tile_end; ++tile) {
    for (std::int64_t block = 0; block < layout.k_blocks(); ++block) {
      const std::int64_t bytes = std::min<std::int64_t>(kBlockBytes, row_bytes - block * kBlockBytes);
      std::memset(rows, kTwoEights, sizeof rows);
      for (std::int64_t r = 0; r < std::min<std::int64_t>(kRows, n - tile * kRows); ++r)
        std::memcpy(rows[r], w + (tile * kRows + r) * row_bytes + block * kBlockBytes, static_cast<std::size_t>(bytes));
      pack_block(rows, w_out + block * layout.block_stride() + tile * layout.tile_stride());
    }
    for (std::int64_t step = 0; step < layout.steps(); ++step) {
      std::uint8_t* out = sz_out + step * layout.scale_step_stride() + tile * layout.scale_tile_stride();
      for (std::int64_t r = 0; r < 8; ++r)
        for (std::int64_t g = step * layout.parts(); g < (step + 1) * layout.parts(); ++g)
          for (std::int64_t row = tile * kRows + r; row < (tile + 1) * kRows; row += 8, out += 4) {
            std::uint32_t word = 0; // scale low, zero high, on any host
            if (g < groups && row < n)
              word = sz[(g * n + row) * 2] | static_cast<std::uint32_t>(sz[(g * n + row) * 2 + 1]) << 16;
            std::memcpy(out, &word, 4);
          }
    }
  }
}

} // namespace kiln::int4_mm
