#include <algorithm>
#include <cstring>

#include "jit/ops/int4_mm.h"
#include "jit/ops/int4_mm_fragments.h"

/// The two forms in which weights come, and the layouts in which they are packed.
namespace kiln::int4_mm {
namespace {

/// Places in the tensor-core layout, which is made for mma.m16n8k16 with the weights as B: block (n/8, k/(16T)) holds
/// 32 lanes of T/2 words; word w of lane t holds eight weights of row n = t/4 in the w-th 32-wide step of K, those of
/// the bytes t%4, +4, +8, +12 of that step. From the high nibble down: the low nibbles (odd k) of bytes 3, 2, 1, 0,
/// then their high nibbles (even k).
struct Word {
  std::int64_t row;        ///< n
  std::int64_t first_byte; ///< of the plain form's row; the others follow at +4, +8, +12
};

template <class Visit> void for_each_word(std::int64_t n, std::int64_t k, std::int64_t inner_k_tiles, Visit visit) {
  const std::int64_t words = inner_k_tiles / 2, k_blocks = k / (inner_k_tiles * 16);
  std::int64_t index = 0;
  for (std::int64_t n_block = 0; n_block < n / 8; ++n_block)
    for (std::int64_t k_block = 0; k_block < k_blocks; ++k_block)
      for (std::int64_t lane = 0; lane < 32; ++lane)
        for (std::int64_t word = 0; word < words; ++word)
          visit(index++, Word{n_block * 8 + lane / 4, (k_block * words + word) * 16 + lane % 4});
}

// ---------------------------------------------------------------- `plain`: as the weights come

void pack_plain(const std::uint8_t* w, const std::uint16_t* sz, std::int64_t n, std::int64_t k, std::int64_t group,
                std::int64_t n_begin, std::int64_t n_end, std::uint8_t* w_out, std::uint8_t* sz_out) {
  const std::int64_t row = k / 2;
  if (n_begin == n_end || k == 0)
    return;
  std::memcpy(w_out + n_begin * row, w + n_begin * row, static_cast<std::size_t>((n_end - n_begin) * row));
  for (std::int64_t g = 0; g < k / group; ++g)
    std::memcpy(sz_out + (g * n + n_begin) * 4, sz + (g * n + n_begin) * 2,
                static_cast<std::size_t>((n_end - n_begin) * 4));
}

constexpr PackLayout kLayouts[] = {
    {.id = "plain",
     .number = 0,
     .w_bytes = [](std::int64_t n, std::int64_t k) { return n * (k / 2); },
     .sz_bytes = [](std::int64_t n, std::int64_t k, std::int64_t group) { return k / group * n * 4; },
     .pack = pack_plain,
     .n_step = 1},
    {.id = FragmentLayout::kId,
     .number = 1,
     .w_bytes =
         [](std::int64_t n, std::int64_t k) {
           return FragmentLayout{n, k, 64}.weight_bytes();
         },
     .sz_bytes =
         [](std::int64_t n, std::int64_t k, std::int64_t group) {
           return FragmentLayout{n, k, group}.scale_bytes();
         },
     .pack = pack_fragments,
     .n_step = 16},
};

} // namespace

void plain_to_tensor_core(const std::uint8_t* plain, std::int64_t n, std::int64_t k, std::int64_t inner_k_tiles,
                          std::int32_t* packed) {
  for_each_word(n, k, inner_k_tiles, [&](std::int64_t index, Word word) {
    const std::uint8_t* const bytes = plain + word.row * (k / 2) + word.first_byte;
    std::uint32_t value = 0;
    for (int i = 0; i < 4; ++i) {
      value |= static_cast<std::uint32_t>(bytes[4 * i] & 15) << (16 + 4 * i);
      value |= static_cast<std::uint32_t>(bytes[4 * i] >> 4) << (4 * i);
    }
    std::memcpy(reinterpret_cast<std::uint8_t*>(packed) + 4 * index, &value, 4);
  });
}

void tensor_core_to_plain(const std::int32_t* packed, std::int64_t n, std::int64_t k, std::int64_t inner_k_tiles,
                          std::uint8_t* plain) {
  for_each_word(n, k, inner_k_tiles, [&](std::int64_t index, Word word) {
    std::uint32_t value = 0;
    std::memcpy(&value, reinterpret_cast<const std::uint8_t*>(packed) + 4 * index, 4);
    std::uint8_t* const bytes = plain + word.row * (k / 2) + word.first_byte;
    for (int i = 0; i < 4; ++i)
      bytes[4 * i] = static_cast<std::uint8_t>((value >> (16 + 4 * i) & 15) | (value >> (4 * i) & 15) << 4);
  });
}

std::span<const PackLayout> pack_layouts() {
  return kLayouts;
}

const PackLayout* find_pack_layout(std::string_view id) {
  const auto layouts = pack_layouts();
  const auto found = std::find_if(layouts.begin(), layouts.end(), [&](const PackLayout& l) { return l.id == id; });
  return found == layouts.end() ? nullptr : &*found;
}

const PackLayout* find_pack_layout(std::int64_t number) {
  const auto layouts = pack_layouts();
  const auto found =
      std::find_if(layouts.begin(), layouts.end(), [&](const PackLayout& l) { return l.number == number; });
  return found == layouts.end() ? nullptr : &*found;
}

} // namespace kiln::int4_mm
