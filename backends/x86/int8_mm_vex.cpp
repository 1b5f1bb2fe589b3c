#include "backends/x86/int8_mm_vex.h"

namespace kiln::x86 {

using namespace asmjit::x86;

VexTile vex_tile_for(std::int64_t m_class) {
  switch (m_class) {
  case 1:
    return {.rows = 1, .sets = 4, .unroll = 4};
  case 2:
    return {.rows = 2, .sets = 2, .unroll = 2};
  case 4:
    return {.rows = 4, .sets = 1, .unroll = 1};
  default:
    return {.rows = 6, .sets = 1, .unroll = 1};
  }
}

VexPath::VexPath(Assembler& assembler, const NestShape& shape, const VexTile& tile)
    : a_(assembler), shape_(shape), tile_(tile), lanes_(assembler.newLabel()) {}

Ymm VexPath::acc(int row, int half, int set) const {
  return Ymm((set * shape_.heights.max + row) * 2 + half);
}

void VexPath::begin_k(int height) {
  for (int set = 1; set < tile_.sets; ++set)
    for (int row = shape_.heights.max - height; row < shape_.heights.max; ++row)
      for (int half = 0; half < 2; ++half)
        a_.vpxor(acc(row, half, set), acc(row, half, set), acc(row, half, set));
}

void VexPath::end_k(int height) {
  for (int set = 1; set < tile_.sets; ++set)
    for (int row = shape_.heights.max - height; row < shape_.heights.max; ++row)
      for (int half = 0; half < 2; ++half)
        a_.vpaddd(acc(row, half), acc(row, half), acc(row, half, set));
}

void VexPath::store_row(int row) {
  const Partial partial{a_.newLabel(), a_.newLabel(), row};
  a_.cmp(role::n_left, shape_.layout.n_block);
  a_.jl(partial.begin);
  for (int half = 0; half < 2; ++half)
    a_.vmovdqu(ptr(role::c_row, 32 * half), acc(row, half));
  a_.bind(partial.end);
  partial_.push_back(partial);
}

void VexPath::data() {
  for (const Partial& partial : partial_) {
    const Ymm left = broadcast();
    a_.bind(partial.begin);
    a_.vmovd(Xmm(left.id()), role::n_left.r32());
    a_.vpbroadcastd(left, Xmm(left.id()));
    for (int half = 0; half < 2; ++half) {
      a_.vpcmpgtd(b(half), left, ptr(lanes_, 32 * half));
      a_.vpmaskmovd(ptr(role::c_row, 32 * half), b(half), acc(partial.row, half));
    }
    a_.jmp(partial.end);
  }
  a_.align(asmjit::AlignMode::kZero, 32);
  a_.bind(lanes_);
  for (std::int32_t lane = 0; lane < 16; ++lane)
    a_.embedInt32(lane);
}

} // namespace kiln::x86
