#include "backends/x86/int8_mm_nest.h"

#include <algorithm>

namespace kiln::x86 {

using namespace asmjit::x86;
using int8_mm::Call;

namespace {

/// Stack slots below the saved registers, bytes from rsp.
constexpr int kTallCode = 0, kShortCode = 8, kShortTiles = 16, kTiles = 24, kFrame = 32;

} // namespace

Heights heights_for(std::int64_t m_class, int max_height) {
  std::int64_t first = 1;
  for (const std::int64_t bound : int8_mm::kMClasses) {
    if (bound == m_class)
      break;
    first = bound + 1;
  }
  // The lowest tile of an unbounded class occurs within one period of the split from its first m.
  const std::int64_t last = m_class == kAny ? first + max_height * max_height : m_class;
  Heights heights{max_height, 1, true};
  for (std::int64_t m = first; m <= last; ++m) {
    const std::int64_t tiles = (m + max_height - 1) / max_height;
    heights.min = static_cast<int>(std::min<std::int64_t>(heights.min, m / tiles));
    heights.max = static_cast<int>(std::max<std::int64_t>(heights.max, (m + tiles - 1) / tiles));
    heights.single_tile = heights.single_tile && tiles == 1;
  }
  return heights;
}

Nest::Nest(Assembler& assembler, const NestShape& shape)
    : row_tile(assembler.newLabel()), a_(assembler), shape_(shape), column_tile_(assembler.newLabel()), table_(assembler.newLabel()) {
  for (int height = shape.heights.min; height <= shape.heights.max; ++height) {
    k_loop.push_back(a_.newLabel());
    store.push_back(a_.newLabel());
  }
}

void Nest::begin() {
  a_.enter(role::saved);
  a_.sub(rsp, kFrame);
  a_.mov(role::workspace, ptr(rdi, offsetof(Call, workspace)));
}

void Nest::split_rows() {
  const auto [min, max, single_tile] = shape_.heights;
  if (min == max && single_tile)
    return;
  const Gp base = rcx, height = rax, tall_tiles = rdx, tiles = rbx;
  if (single_tile) {
    a_.mov(height, ptr(rdi, offsetof(Call, m)));
  } else {
    a_.mov(rax, ptr(rdi, offsetof(Call, m)));
    a_.add(rax, max - 1);
    a_.mov(ecx, max);
    a_.xor_(edx, edx);
    a_.div(rcx);
    a_.mov(tiles, rax);
    a_.mov(ptr(rsp, kTiles), tiles);
    a_.mov(rax, ptr(rdi, offsetof(Call, m)));
    a_.xor_(edx, edx);
    a_.div(tiles);
    a_.sub(tiles, tall_tiles);
    a_.mov(ptr(rsp, kShortTiles), tiles);
  }
  a_.lea(base, ptr(table_));
  a_.movsxd(rsi, ptr(base, height, 2, -4 * min));
  a_.add(rsi, base);
  a_.mov(ptr(rsp, kShortCode), rsi);
  if (!single_tile) {
    a_.movsxd(rsi, ptr(base, height, 2, -4 * min + 4));
    a_.add(rsi, base);
    a_.mov(ptr(rsp, kTallCode), rsi);
  }
}

void Nest::load_arguments() {
  a_.mov(role::b, ptr(rdi, offsetof(Call, b)));
  a_.mov(role::b_sums, ptr(rdi, offsetof(Call, b_sums)));
  a_.mov(role::c, ptr(rdi, offsetof(Call, c)));
  a_.mov(role::ldc, ptr(rdi, offsetof(Call, ldc)));
  a_.shl(role::ldc, 2);
  a_.mov(role::n_left, ptr(rdi, offsetof(Call, n)));
}

void Nest::begin_column_tile() {
  const std::int64_t panel_bytes = shape_.layout.panel_bytes(shape_.k);
  a_.bind(column_tile_);
  // A panel that does not exist is computed from the last one that does, and not stored.
  for (int p = 1; p < shape_.panels; ++p) {
    const Gp panel = role::panel[p - 1];
    if (p == 1)
      a_.xor_(eax, eax);
    a_.mov(panel, p * panel_bytes);
    a_.cmp(role::n_left, p * shape_.layout.n_block);
    a_.cmovle(panel, p == 1 ? rax : role::panel[p - 2]);
  }
  a_.mov(role::a_tile, role::workspace);
  a_.mov(role::c_row, role::c);
  if (!shape_.heights.single_tile)
    a_.mov(role::tiles_left, ptr(rsp, kTiles));
}

void Nest::dispatch() {
  const auto [min, max, single_tile] = shape_.heights;
  if (min == max && single_tile)
    return;
  if (single_tile) {
    a_.jmp(ptr(rsp, kShortCode, 8));
  } else {
    a_.mov(rax, ptr(rsp, kShortCode));
    a_.cmp(role::tiles_left, ptr(rsp, kShortTiles));
    a_.cmovg(rax, ptr(rsp, kTallCode));
    a_.jmp(rax);
  }
}

void Nest::end_row_tile() {
  if (shape_.heights.single_tile)
    return;
  a_.dec(role::tiles_left);
  a_.jnz(row_tile);
}

void Nest::end_column_tile() {
  a_.add(role::b, shape_.panels * shape_.layout.panel_bytes(shape_.k));
  a_.add(role::b_sums, shape_.columns() * 4);
  a_.add(role::c, shape_.columns() * 4);
  a_.sub(role::n_left, shape_.columns());
  a_.jg(column_tile_);
}

void Nest::end() {
  a_.add(rsp, kFrame);
  a_.leave(role::saved);
  const auto [min, max, single_tile] = shape_.heights;
  if (min == max && single_tile)
    return;
  a_.align(asmjit::AlignMode::kZero, 4);
  a_.bind(table_);
  for (const asmjit::Label& label : k_loop)
    a_.embedLabelDelta(label, table_, 4);
  // Read, never taken, when m splits into tiles of the greatest height.
  a_.embedLabelDelta(k_loop.back(), table_, 4);
}

} // namespace kiln::x86
