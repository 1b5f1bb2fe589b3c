#include "backends/arm/int8_mm_scalar.h"

#include <bit>
#include <cstddef>

#include "backends/arm/epilogue.h"

namespace kiln::arm {

using asmjit::Label;
using int8_mm::Call;
using namespace asmjit::a64;

namespace {

// On the stack: four sums, the row's sum of A or its s (16 bytes are read) and its a_zp, four results.
constexpr int kSums = 0, kRowSum = 16, kRowZp = 32, kResults = 48, kStackBytes = 64;

/// Rows of four sums at a time, which go through the stack and the stages to C. `linear`: of int8_linear, behind its
/// head.
void emit_finished(Assembler& a, int8_mm::PackLayout layout, std::int64_t k, const int8_mm::Epilogue& epilogue,
                   int a_shift, TileEpilogue& stages, std::int64_t terms_panel_bytes,
                   const QuantisedRows* linear = nullptr) {
  const Gp call = x0, row_a = x1, lda = x2, rows = x5, n = x6, column = x7;
  const GpX row_c = x3, ldc = x4, b = x8, index = x9, at = x10, rest = x11, block = x16, limit = x17;
  const Gp a_value = w12, b_value = w13, sum = w14;
  const Label row = a.newLabel(), element = a.newLabel(), product = a.newLabel(), copied = a.newLabel();
  const bool is_u8 = epilogue.a_dtype == int8_mm::ADtype::u8;
  const int log2_k_block = std::countr_zero(static_cast<unsigned>(layout.k_block)), c_bytes = epilogue.c_bytes();
  const auto field = [&](std::size_t offset) { return ptr(call, static_cast<std::int32_t>(offset)); };
  const auto load_a = [&] { is_u8 ? a.ldrb(a_value, ptr(row_a, index)) : a.ldrsb(a_value, ptr(row_a, index)); };

  a.sub(sp, sp, kStackBytes);
  if (linear != nullptr) {
    a.mov(at, kDefaultNan);
    a.msr(Predicate::SysReg::kFPCR, at);
    a.ldr(row_a, field(offsetof(int8_linear::Call, product.workspace)));
    a.add_constant(row_a, row_a, linear->offset, at);
    a.mov(lda, linear->row_bytes);
  } else {
    a.ldr(row_a, field(offsetof(Call, a)));
    a.ldr(lda, field(offsetof(Call, lda)));
  }
  a.ldr(row_c, field(offsetof(Call, c)));
  a.ldr(ldc, field(offsetof(Call, ldc)));
  if (c_bytes > 1)
    a.lsl(ldc, ldc, std::countr_zero(static_cast<unsigned>(c_bytes)));
  a.ldr(rows, field(offsetof(Call, m)));
  a.ldr(n, field(offsetof(Call, n)));
  a.bind(row);
  if (linear != nullptr) {
    a.add_constant(at, row_a, linear->scale_at() - linear->offset, at);
    a.ldr(sum, ptr(at));
    a.str(sum, ptr(sp, kRowSum));
  }
  if (epilogue.needs_row_sums()) {
    const Label next = a.newLabel();
    a.mov(sum, 0);
    if (k > 0) {
      a.mov(index, 0);
      a.mov(limit, k);
      a.bind(next);
      load_a();
      a.add(sum, sum, a_value);
      a.add(index, index, 1);
      a.cmp(index, limit);
      a.b_ne(next);
    }
    a.str(sum, ptr(sp, kRowSum));
  }
  if (epilogue.a_zp == int8_mm::AZp::row) {
    a.ldr(at, field(offsetof(Call, a_zp)));
    a.ldr(rest, field(offsetof(Call, m)));
    a.sub(rest, rest, rows);
    a.ldr(sum, ptr(at, rest, lsl(2)));
    a.str(sum, ptr(sp, kRowZp));
  }
  a.mov(column, 0);
  a.bind(element);
  a.mov(block, layout.n_block);
  a.udiv(at, column, block); // the panel
  a.msub(rest, at, block, column);
  a.mov(sum, 0);
  if (k > 0) {
    a.mov(limit, layout.panel_bytes(k));
    a.ldr(b, field(offsetof(Call, b)));
    a.madd(b, at, limit, b);
    a.add(b, b, rest, lsl(log2_k_block));
    a.lsl(block, block, log2_k_block);
    a.mov(limit, k);
    a.mov(index, 0);
    a.bind(product);
    a.lsr(at, index, log2_k_block); // the step
    a.and_(rest, index, layout.k_block - 1);
    a.madd(at, at, block, rest);
    load_a();
    if (a_shift != 0)
      a.sub(a_value, a_value, -a_shift);
    a.ldrsb(b_value, ptr(b, at));
    a.madd(sum, a_value, b_value, sum);
    a.add(index, index, 1);
    a.cmp(index, limit);
    a.b_ne(product);
  }
  a.and_(at, column, 3);
  a.add(rest, sp, kSums);
  a.str(sum, ptr(rest, at, lsl(2)));
  a.add(column, column, 1);
  a.tst(column, 3);
  a.b_ne(element);

  // Terms of the four, which a panel holds whole.
  const GpX terms = b, values = index, scalars = at, scratch = rest, first = limit;
  a.sub(first, column, 4);
  a.mov(block, layout.n_block);
  a.udiv(at, first, block);
  a.msub(rest, at, block, first);
  a.mov(block, terms_panel_bytes);
  a.ldr(terms, field(offsetof(Call, terms)));
  a.madd(terms, at, block, terms);
  a.add(terms, terms, rest, lsl(2));
  a.add(values, sp, kRowSum);
  a.ldr(scalars, field(offsetof(Call, scalars)));
  TileSums sums{.rows = 1, .vectors = 1, .sums = {16}, .free = {0, 1, 2, 3, 4, 5, 6, 7}};
  const TileTerms places{.terms = terms,
                         .vector_at = {0},
                         .array_bytes = std::int64_t{4} * layout.n_block,
                         .values = values,
                         .zp_at = kRowZp - kRowSum,
                         .scalars = scalars,
                         .scratch = scratch};
  a.add(scratch, sp, kSums);
  a.ldr(q16, ptr(scratch));
  stages.apply(sums, places);
  stages.prepare_stores(sums, places);
  a.add(terms, sp, kResults);
  stages.store_row(sums, 0, terms, scratch);
  // Those of them that are C's.
  const Label next = a.newLabel();
  const GpX to = values, left = scalars;
  a.add(to, row_c, first, lsl(std::countr_zero(static_cast<unsigned>(c_bytes))));
  a.subs(left, n, first);
  a.bind(next);
  if (c_bytes == 1) {
    a.ldrb(sum, ptr_post(terms, 1));
    a.strb(sum, ptr_post(to, 1));
  } else if (c_bytes == 2) {
    a.ldrh(sum, ptr_post(terms, 2));
    a.strh(sum, ptr_post(to, 2));
  } else {
    a.ldr(sum, ptr_post(terms, 4));
    a.str(sum, ptr_post(to, 4));
  }
  a.add(first, first, 1);
  a.cmp(first, column);
  a.b_eq(copied);
  a.subs(left, left, 1);
  a.b_ne(next);
  a.bind(copied);
  a.cmp(column, n);
  a.b_lt(element);
  a.add(row_a, row_a, lda);
  a.add(row_c, row_c, ldc);
  a.subs(rows, rows, 1);
  a.b_ne(row);
  if (linear != nullptr)
    a.msr(Predicate::SysReg::kFPCR, xzr); // as calls of int8_linear find it
  a.add(sp, sp, kStackBytes);
  a.ret(x30);
}

} // namespace

void emit_scalar_int8_mm(Assembler& a, int8_mm::PackLayout layout, std::int64_t k, const int8_mm::Epilogue& epilogue,
                         int a_shift) {
  if (!epilogue.is_absent()) {
    NeonEpilogue stages(a, epilogue);
    emit_finished(a, layout, k, epilogue, a_shift, stages, int8_mm::TermsLayout::of(epilogue).panel_bytes(layout));
    return;
  }
  const Gp call = x0, row_a = x1, lda = x2, row_c = x3, ldc = x4, rows = x5, n = x6, column = x7, b = x8;
  const Gp index = x9, at = x10, rest = x11, a_value = w12, b_value = w13, sum = w14;
  const Gp panel_bytes = x15, block = x16, last = x17; // columns of a panel, then bytes of a step; K
  const Label row = a.newLabel(), element = a.newLabel(), product = a.newLabel();
  const int log2_k_block = std::countr_zero(static_cast<unsigned>(layout.k_block));
  const auto field = [&](std::size_t offset) { return ptr(call, static_cast<std::int32_t>(offset)); };

  a.ldr(row_a, field(offsetof(Call, a)));
  a.ldr(lda, field(offsetof(Call, lda)));
  a.ldr(row_c, field(offsetof(Call, c)));
  a.ldr(ldc, field(offsetof(Call, ldc)));
  a.ldr(rows, field(offsetof(Call, m)));
  a.ldr(n, field(offsetof(Call, n)));
  a.mov(panel_bytes, layout.panel_bytes(k));
  a.mov(last, k);
  a.bind(row);
  a.mov(column, 0);
  a.bind(element);
  a.mov(sum, 0);
  if (k > 0) {
    a.ldr(b, field(offsetof(Call, b)));
    a.mov(block, layout.n_block);
    a.udiv(at, column, block); // the panel
    a.msub(rest, at, block, column);
    a.madd(b, at, panel_bytes, b);
    a.add(b, b, rest, lsl(log2_k_block));
    a.lsl(block, block, log2_k_block);
    a.mov(index, 0);
    a.bind(product);
    a.lsr(at, index, log2_k_block); // the step
    a.and_(rest, index, layout.k_block - 1);
    a.madd(at, at, block, rest);
    a.ldrsb(a_value, ptr(row_a, index));
    a.ldrsb(b_value, ptr(b, at));
    a.madd(sum, a_value, b_value, sum);
    a.add(index, index, 1);
    a.cmp(index, last);
    a.b_ne(product);
  }
  a.str(sum, ptr(row_c, column, lsl(2)));
  a.add(column, column, 1);
  a.cmp(column, n);
  a.b_ne(element);
  a.add(row_a, row_a, lda);
  a.add(row_c, row_c, ldc, lsl(2));
  a.subs(rows, rows, 1);
  a.b_ne(row);
  a.ret(x30);
}

void emit_scalar_int8_linear(Assembler& a, int8_mm::PackLayout layout, std::int64_t k, const QuantisedRows& rows,
                             bool has_bias, const int8_mm::Epilogue& y) {
  NeonLinearEpilogue stages(a, y, has_bias);
  emit_finished(a, layout, k, y, 0, stages, std::int64_t{4} * layout.n_block * (has_bias ? 3 : 2), &rows);
}

} // namespace kiln::arm
