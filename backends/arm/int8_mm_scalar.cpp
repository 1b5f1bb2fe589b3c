#include "backends/arm/int8_mm_scalar.h"

#include <bit>
#include <cstddef>

namespace kiln::arm {

using asmjit::Label;
using int8_mm::Call;
using namespace asmjit::a64;

void emit_scalar_int8_mm(Assembler& a, int8_mm::PackLayout layout, std::int64_t k) {
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

} // namespace kiln::arm
