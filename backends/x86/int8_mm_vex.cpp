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

NestShape vex_shape_for(const VexTile& tile, std::int64_t m_class, int8_mm::PackLayout layout, std::int64_t k,
                        int bytes_per_element) {
  const int8_mm::Heights heights = int8_mm::heights_for(m_class, 1, tile.rows);
  return {.heights = heights,
          .panels = 1,
          .layout = layout,
          .k = k,
          .row_stride = workspace_row_stride(bytes_per_element * k),
          .row_step = 4,
          .unroll = tile.unroll,
          .ahead = !heights.single_tile};
}

Features linear_vex_features(Features path, const KernelDesc& desc) {
  path.add(Feature::fma);
  if (int8_linear::x_of(desc) == int8_linear::Float::f16 || int8_linear::y_of(desc) == int8_linear::Float::f16)
    path.add(Feature::f16c);
  return path;
}

Features vex_features(Features path, const KernelDesc& desc) {
  if (int8_mm::Epilogue::of(desc).c_dtype == int8_mm::CDtype::f16)
    path.add(Feature::f16c);
  return path;
}

VexPath::VexPath(Assembler& assembler, const NestShape& shape, const VexTile& tile, const int8_mm::Epilogue& epilogue,
                 EpilogueEmitter* emitter)
    : a_(assembler), shape_(shape), tile_(tile), a_is_u8_(epilogue.a_dtype == int8_mm::ADtype::u8), emitter_(emitter),
      lanes_(assembler.newLabel()), byte_mask_(assembler.newLabel()) {}

void VexPath::begin_rows() {
  if (emitter_ == nullptr)
    return;
  a_.mov(rows_role::out, ptr(rows_role::call, offsetof(int8_mm::Call, workspace)));
  emitter_->prepare_shared(rows_role::call, rows_role::out);
}

void VexPath::finish_row() {
  if (shape_.row_sums)
    sum_row();
  if (shape_.row_zp) {
    a_.mov(eax, ptr(rows_role::row_zp));
    a_.mov(ptr(rows_role::out, shape_.row_zp_at()), eax);
    a_.add(rows_role::row_zp, 4);
  }
}

/// The row has just been read. vpsadbw adds up u8; s8 become u8 by 128 more each.
void VexPath::sum_row() {
  using namespace rows_role;
  const std::int64_t k = shape_.k, whole = k / 32, rest = k % 32;
  const Gp sum = rbx;
  if (k < 32) {
    a_.xor_(sum.r32(), sum.r32());
    for (int i = 0; i < k; ++i) {
      if (a_is_u8_)
        a_.movzx(eax, byte_ptr(row, i));
      else
        a_.movsx(eax, byte_ptr(row, i));
      a_.add(sum.r32(), eax);
    }
    a_.mov(ptr(out, shape_.row_sum_at()), sum.r32());
    return;
  }
  const Ymm zero = ymm2, sums = ymm3, bytes = ymm4, flip = ymm5;
  const asmjit::Label next = a_.newLabel();
  const auto add = [&](const Mem& from, bool masked) {
    if (a_is_u8_)
      a_.vmovdqu(bytes, from);
    else
      a_.vpxor(bytes, flip, from);
    if (masked)
      a_.vpand(bytes, bytes, ptr(byte_mask_, static_cast<int>(rest)));
    a_.vpsadbw(bytes, bytes, zero);
    a_.vpaddq(sums, sums, bytes);
  };
  a_.vpxor(zero, zero, zero);
  a_.vpxor(sums, sums, sums);
  a_.mov(eax, 0x80808080);
  a_.vmovd(Xmm(flip.id()), eax);
  a_.vpbroadcastd(flip, Xmm(flip.id()));
  a_.mov(from, row);
  a_.mov(chunks.r32(), whole);
  a_.bind(next);
  add(ptr(from), false);
  a_.add(from, 32);
  a_.dec(chunks.r32());
  a_.jnz(next);
  if (rest > 0)
    add(ptr(row, static_cast<int>(k - 32)), true);
  a_.vextracti128(Xmm(bytes.id()), sums, 1);
  a_.vpaddq(Xmm(sums.id()), Xmm(sums.id()), Xmm(bytes.id()));
  a_.vpshufd(Xmm(bytes.id()), Xmm(sums.id()), 0b01'00'11'10);
  a_.vpaddq(Xmm(sums.id()), Xmm(sums.id()), Xmm(bytes.id()));
  a_.vmovd(sum.r32(), Xmm(sums.id()));
  if (!a_is_u8_)
    a_.sub(sum.r32(), static_cast<std::int32_t>(static_cast<std::uint32_t>(128 * k)));
  a_.mov(ptr(out, shape_.row_sum_at()), sum.r32());
}

void VexPath::prepare_columns(int, const Gp& terms) {
  for (int half = 0; half < 2; ++half)
    emitter_->prepare_columns(half, terms, 32 * half, 4 * shape_.layout.n_block, role::c_row);
}

bool VexPath::begin_at_offsets() {
  if (emitter_ == nullptr)
    return false;
  const int rows = shape_.heights.max;
  for (int half = 0; half < 2; ++half) {
    emitter_->load_offsets(acc(rows - 1, half), half, role::scratch);
    for (int row = 0; row + 1 < rows; ++row)
      a_.vmovdqa(acc(row, half), acc(rows - 1, half));
  }
  return true;
}

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
  if (emitter_ != nullptr) {
    const int row_at = (row - shape_.heights.max) * static_cast<int>(shape_.row_stride); // a_tile is behind the tile
    for (int half = 0; half < 2; ++half)
      emitter_->apply(acc(row, half), half, role::scratch, ptr(role::a_tile, row_at + shape_.row_zp_at()),
                      ptr(role::a_tile, row_at + shape_.row_sum_at()));
    emitter_->narrow(acc(row, 0), acc(row, 1));
  }
  a_.cmp(role::n_left, shape_.layout.n_block);
  a_.jl(partial.begin);
  if (emitter_ != nullptr)
    emitter_->store_narrowed(acc(row, 0), acc(row, 1), role::c_row, 0);
  else
    for (int half = 0; half < 2; ++half)
      a_.vmovdqu(ptr(role::c_row, 32 * half), acc(row, half));
  a_.bind(partial.end);
  partial_.push_back(partial);
}

void VexPath::data() {
  for (const Partial& partial : partial_) {
    const Ymm left = broadcast();
    a_.bind(partial.begin);
    if (shape_.c_bytes < 4) { // through a line of scratch memory, element by element
      const Gp index = rbx, element = rax;
      const int line = emitter_->scratch_bytes();
      const asmjit::Label next = a_.newLabel();
      emitter_->store_narrowed(acc(partial.row, 0), acc(partial.row, 1), role::scratch, line);
      a_.xor_(index.r32(), index.r32());
      a_.bind(next);
      if (shape_.c_bytes == 1) {
        a_.movzx(element.r32(), byte_ptr(role::scratch, index, 0, line));
        a_.mov(ptr(role::c_row, index), element.r8());
      } else {
        a_.movzx(element.r32(), word_ptr(role::scratch, index, 1, line));
        a_.mov(ptr(role::c_row, index, 1), element.r16());
      }
      a_.inc(index.r32());
      a_.cmp(index, role::n_left);
      a_.jl(next);
      a_.jmp(partial.end);
      continue;
    }
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
  if (shape_.row_sums) {
    a_.bind(byte_mask_);
    for (int i = 0; i < 64; ++i)
      a_.embedUInt8(i < 32 ? 0 : 255);
  }
}

} // namespace kiln::x86
