#pragma once
#include <cstdint>
#include <string_view>

/// int4_mm: packed weights as fragments of the tensor cores' 16-row operand ("mma.m16n8k16", PTX ISA, matrix
/// fragments). What every GPU kernel of the op reads, straight into registers, 512 contiguous bytes a warp.
namespace kiln::int4_mm {

/// Weights: [⌈k/64⌉][⌈n/16⌉][32 lanes][16 bytes]: what all blocks read at one time lies together. Word j of lane l is
/// its part of the A operand of 16 k from 16·j on: eight q, register i of four in bits 4i…4i+3 (the even k) and
/// 16+4i…16+4i+3 (the odd one), where register i is row l/4 + 8·(i mod 2) and k 16·j + 2·(l mod 4) + 8·(i/2). So a
/// shift and one LOP3 give two bf16 of 128 + q. Beyond n and k, q is 8: the weight 0.
///
/// Scales: [steps][⌈n/16⌉][8 rows r][parts][rows r, r + 8] words, the scale's bf16 bits low, the zero's high; a step is
/// max(64, group) wide, and has 64/group parts for groups of 32, else one. Beyond n and k, both are 0.
struct FragmentLayout {
  static constexpr std::string_view kId = "mma16k64";
  std::int64_t n = 0, k = 0, group = 0;

  std::int64_t row_tiles() const { return (n + 15) / 16; }
  std::int64_t k_blocks() const { return (k + 63) / 64; }
  std::int64_t weight_bytes() const { return row_tiles() * k_blocks() * 512; }
  std::int64_t parts() const { return group < 64 ? 64 / group : 1; }
  std::int64_t steps() const { return group < 64 ? k_blocks() : k / group; }
  std::int64_t scale_block() const { return parts() * 64; } ///< bytes of one step of one row tile
  // From one row tile, K block or scale step to the next, in bytes.
  std::int64_t tile_stride() const { return 512; }
  std::int64_t block_stride() const { return row_tiles() * 512; }
  std::int64_t scale_tile_stride() const { return scale_block(); }
  std::int64_t scale_step_stride() const { return row_tiles() * scale_block(); }
  std::int64_t scale_bytes() const { return row_tiles() * steps() * scale_block(); }
};

/// PackLayout::pack of this layout.
void pack_fragments(const std::uint8_t* w, const std::uint16_t* sz, std::int64_t n, std::int64_t k, std::int64_t group,
                    std::int64_t n_begin, std::int64_t n_end, std::uint8_t* w_out, std::uint8_t* sz_out);

} // namespace kiln::int4_mm
