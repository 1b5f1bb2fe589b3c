#include "backends/x86/int8_mm_nest.h"

#include <bit>

#include <x86_generator_id.h>

namespace kiln::x86 {

using namespace asmjit::x86;
using int8_mm::Call;

namespace {

/// Stack slots below the saved registers, bytes from rsp.
constexpr int kTallCode = 0, kShortCode = 8, kShortTiles = 16, kTiles = 24, kWorkspace = 32, kColumnTiles = 40,
              kStreamBytes = 48, kFrame = 56;
/// With an epilogue.
constexpr int kScratch = 56, kTermsStride = 64, kEpilogueFrame = 72;
/// With staging: where it and its rows of A stand, and who else uses the registers of finishing.
constexpr int kStaged = 72, kStagedA = 80, kDisplaced = 88, kDeferringFrame = 120;
constexpr Gp kDisplacedRoles[] = {role::b_sums, role::c, role::n_left, role::tiles_left};

int frame_bytes(const NestShape& shape) {
  return shape.defers() ? kDeferringFrame : shape.terms > 0 ? kEpilogueFrame : kFrame;
}
int log2(int power) {
  return std::countr_zero(static_cast<unsigned>(power));
}

} // namespace

std::int64_t workspace_row_stride(std::int64_t bytes) {
  return ((bytes + 63) / 64 | 1) * 64 + 4;
}

Status supports_nest(const KernelDesc& desc, const Target&) {
  return int8_mm::check_k(desc, kNestMaxK);
}

void NestShape::add_epilogue(const int8_mm::Epilogue& epilogue, int epilogue_scratch_bytes) {
  c_bytes = epilogue.c_bytes();
  terms = int8_mm::TermsLayout::of(epilogue).count;
  scratch_bytes = epilogue_scratch_bytes;
  row_zp = epilogue.a_zp == int8_mm::AZp::row;
  row_sums = epilogue.needs_row_sums();
  if (row_zp && row_sums) // the stride has room for one
    row_stride += 4;
}

Implementation nest_row(IsaPath isa, Features needs, std::string (*pack_layout)(const KernelDesc&, const Target&),
                        Result<CodeObject> (*compile)(const KernelDesc&, const Target&, std::string_view)) {
  return {.op = OpId::int8_mm,
          .isa = isa,
          .backend = BackendId::x86,
          .generator = GeneratorId::asmjit,
          .generator_digest = k_x86_generator_digest,
          .needs = needs,
          .supports = supports_nest,
          .pack_layout = pack_layout,
          .compile = compile};
}

Nest::Nest(Assembler& assembler, const NestShape& shape)
    : row_tile(assembler.newLabel()), a_(assembler), shape_(shape), column_tile_(assembler.newLabel()),
      table_(assembler.newLabel()) {
  for (int height = shape.heights.min; height <= shape.heights.max; ++height) {
    k_loop.push_back(a_.newLabel());
    store.push_back(a_.newLabel());
  }
}

asmjit::x86::Mem panel_at(int p, int displacement) {
  return p == 0 ? ptr(role::b_k, displacement) : ptr(role::b_k, role::stream[p - 1], 0, displacement);
}

asmjit::x86::Mem columns_at(const Gp& base, int p, int displacement) {
  if (p == 0)
    return ptr(base, displacement);
  return p == 3 ? ptr(base, role::stream_columns_3, 0, displacement)
                : ptr(base, role::stream_columns, p - 1, displacement);
}

void Nest::begin() {
  a_.enter(role::saved);
  a_.sub(rsp, frame_bytes(shape_));
  if (shape_.defers())
    stage(0);
}

void Nest::begin_finishing() {
  for (int i = 0; const Gp& reg : kDisplacedRoles)
    a_.mov(ptr(rsp, kDisplaced + 8 * i++), reg);
  a_.mov(role::finish_scratch, ptr(rsp, kScratch));
  a_.mov(role::staged, ptr(rsp, kStaged));
  a_.mov(role::staged_a, ptr(rsp, kStagedA));
}

void Nest::end_finishing() {
  for (int i = 0; const Gp& reg : kDisplacedRoles)
    a_.mov(reg, ptr(rsp, kDisplaced + 8 * i++));
}

void Nest::is_finished() {
  a_.cmp(role::staged.r32(), shape_.heights.max * shape_.staged_row_bytes());
}

void Nest::next_staged_row() {
  a_.add(role::staged, shape_.staged_row_bytes());
  a_.add(role::staged_a, shape_.row_stride);
  a_.add(role::c_row, role::ldc);
}

void Nest::stage(int height) {
  a_.mov(qword_ptr(rsp, kStaged), (shape_.heights.max - height) * shape_.staged_row_bytes());
  if (height > 0)
    a_.mov(ptr(rsp, kStagedA), role::a_tile);
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
  const int columns = shape_.columns();
  a_.mov(role::b, ptr(rdi, offsetof(Call, b)));
  a_.mov(role::b_sums, ptr(rdi, shape_.terms > 0 ? offsetof(Call, terms) : offsetof(Call, b_sums)));
  a_.mov(role::c, ptr(rdi, offsetof(Call, c)));
  a_.mov(role::ldc, ptr(rdi, offsetof(Call, ldc)));
  if (shape_.c_bytes > 1)
    a_.shl(role::ldc, log2(shape_.c_bytes));
  a_.mov(role::n_left, ptr(rdi, offsetof(Call, n)));
  a_.mov(rax, ptr(rdi, offsetof(Call, workspace)));
  if (shape_.scratch_field > 0) {
    a_.mov(rbx, ptr(rdi, shape_.scratch_field));
    a_.mov(ptr(rsp, kScratch), rbx);
  } else if (shape_.terms > 0) {
    a_.mov(ptr(rsp, kScratch), rax);
    a_.add(rax, shape_.scratch_bytes);
  }
  a_.mov(ptr(rsp, kWorkspace), rax);

  a_.lea(rax, ptr(role::n_left, columns - 1));
  a_.shr(rax, std::countr_zero(static_cast<unsigned>(columns)));
  a_.mov(ptr(rsp, kColumnTiles), rax);
  if (shape_.panels == 1)
    return;
  if (!shape_.streams)
    a_.mov(eax, 1);
  a_.imul(role::stream_columns, rax, shape_.layout.n_block * shape_.c_bytes);
  if (shape_.terms > 0) {
    a_.imul(rbx, rax, shape_.terms_panel_bytes());
    a_.mov(ptr(rsp, kTermsStride), rbx);
  }
  if (shape_.panels == 4)
    a_.lea(role::stream_columns_3, ptr(role::stream_columns, role::stream_columns, 1));
  a_.imul(rax, rax, shape_.layout.panel_bytes(shape_.k));
  a_.mov(ptr(rsp, kStreamBytes), rax);
}

/// Leaves the columns left to the first stream in rax and the columns from one stream to the next in rbx.
void Nest::begin_column_tile() {
  a_.bind(column_tile_);
  if (shape_.panels > 1) {
    const Gp zero = rdi, columns_left = rax, columns_of_stream = rbx;
    a_.xor_(zero.r32(), zero.r32());
    a_.mov(columns_left, role::n_left);
    a_.mov(columns_of_stream, role::stream_columns);
    if (shape_.c_bytes > 1)
      a_.shr(columns_of_stream, log2(shape_.c_bytes));
    // A stream that has no panel left is computed from another's, and not stored.
    for (int p = 1; p < shape_.panels; ++p) {
      const Gp stream = role::stream[p - 1], previous = p == 1 ? zero : role::stream[p - 2];
      a_.mov(stream, ptr(rsp, kStreamBytes));
      if (p > 1)
        a_.add(stream, previous);
      a_.sub(columns_left, columns_of_stream);
      a_.cmovle(stream, previous);
    }
  }
  a_.mov(rax, role::n_left);
  a_.mov(role::a_tile, ptr(rsp, kWorkspace));
  a_.mov(role::c_row, role::c);
  if (!shape_.heights.single_tile)
    a_.mov(role::tiles_left, ptr(rsp, kTiles));
  if (shape_.ahead) {
    a_.lea(role::ahead, ptr(role::b, shape_.advance() * shape_.layout.panel_bytes(shape_.k)));
    a_.mov(role::ahead_step.r32(), shape_.step_bytes());
  }
}

void Nest::begin_preparing() {
  a_.mov(rdi, role::b_sums);
  a_.mov(rbx, role::n_left);
  a_.mov(role::c_row, ptr(rsp, kScratch));
}

/// Those of a panel that does not exist are another's again.
void Nest::prepare_next() {
  a_.mov(rax, role::stream_columns);
  if (shape_.c_bytes > 1)
    a_.shr(rax, log2(shape_.c_bytes));
  a_.sub(rbx, rax);
  a_.mov(rax, rdi);
  a_.add(rax, ptr(rsp, kTermsStride));
  a_.test(rbx, rbx);
  a_.cmovg(rdi, rax);
}

void Nest::end_preparing() {
  a_.mov(role::c_row, role::c);
}

void Nest::load_scratch() {
  a_.mov(role::scratch, ptr(rsp, kScratch));
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
  if (shape_.ahead && shape_.panels == 1)
    a_.xor_(role::ahead_step.r32(), role::ahead_step.r32());
  a_.dec(role::tiles_left);
  if (shape_.ahead && shape_.panels == 2) {
    // The first row tile fetched the next tile's first panel, the second does the other, those after it fetch nothing
    // new.
    const Gp zero = rdi, other = rbx, first_done = rax;
    a_.lea(first_done, ptr(role::tiles_left, 1));
    a_.xor_(zero.r32(), zero.r32());
    a_.lea(other, ptr(role::b, role::stream[0], 0, shape_.advance() * shape_.layout.panel_bytes(shape_.k)));
    a_.cmp(first_done, ptr(rsp, kTiles));
    a_.cmove(role::ahead, other);
    a_.cmovne(role::ahead_step, zero);
    a_.test(role::tiles_left, role::tiles_left);
  }
  a_.jnz(row_tile);
}

void Nest::end_column_tile() {
  const int columns = shape_.advance() * shape_.layout.n_block;
  a_.add(role::b, shape_.advance() * shape_.layout.panel_bytes(shape_.k));
  a_.add(role::b_sums, shape_.terms > 0 ? shape_.advance() * shape_.terms_panel_bytes() : columns * 4);
  a_.add(role::c, columns * shape_.c_bytes);
  a_.sub(role::n_left, columns);
  a_.dec(qword_ptr(rsp, kColumnTiles));
  a_.jnz(column_tile_);
}

void Nest::end() {
  a_.add(rsp, frame_bytes(shape_));
  a_.leave(role::saved);
}

void Nest::data() {
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
