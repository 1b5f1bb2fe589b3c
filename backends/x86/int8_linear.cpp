#include "backends/x86/int8_linear.h"

#include <x86_generator_id.h>

namespace kiln::x86 {

using namespace asmjit::x86;
using int8_linear::Call;
using int8_linear::Float;

namespace {

constexpr std::int32_t kInfinity = 0x7F800000;
constexpr std::uint32_t kNan = 0x7FC00000, k127 = 0x42FE0000; // f32

/// Registers of both quantisers. Vector registers from 16 on are not used where there may be none.
namespace quantise_role {
inline constexpr Gp call = rdi, row = rsi, row_step = rcx, rows_left = rdx, out = r8, from = r9, to = r10, turns = r11;
} // namespace quantise_role
using namespace quantise_role;

/// The loop over rows, with `find_maximum()`, which leaves the bits of max|x| in X's own type in eax, and
/// `scale_row()`, which finds r in xmm2.
template <class FindMaximum, class ScaleRow>
void emit_rows_quantised(Assembler& a, const QuantisedRows& rows, FindMaximum find_maximum, ScaleRow scale_row,
                         bool has_avx512) {
  const Xmm maximum = xmm0, most = xmm1, r = xmm2, s = xmm3;
  const asmjit::Label quantised = a.newLabel(), multiply = a.newLabel(), next_row = a.newLabel(), scaled = a.newLabel(),
                      not_finite = a.newLabel(), constants = a.newLabel();
  a.test(byte_ptr(call, offsetof(Call, steps)), int8_linear::kQuantise);
  a.jz(quantised);
  a.mov(row, ptr(call, offsetof(Call, x)));
  a.mov(row_step, ptr(call, offsetof(Call, ldx)));
  a.shl(row_step, rows.x == Float::f32 ? 2 : 1);
  a.mov(rows_left, ptr(call, offsetof(Call, product.m)));
  a.mov(out, ptr(call, offsetof(Call, product.workspace)));
  a.bind(next_row);
  find_maximum();
  if (rows.x == Float::bf16) {
    a.shl(eax, 16);
  } else if (rows.x == Float::f16) {
    a.vmovd(maximum, eax);
    if (has_avx512)
      a.vcvtph2ps(Zmm(maximum.id()), Ymm(maximum.id()));
    else
      a.vcvtph2ps(maximum, maximum);
    a.vmovd(eax, maximum);
  }
  a.cmp(eax, kInfinity);
  a.jae(not_finite);
  a.vmovd(maximum, eax);
  a.vmovss(most, ptr(constants));
  a.vdivss(r, most, maximum);
  a.vdivss(s, maximum, most);
  a.vmovd(eax, r);
  a.cmp(eax, kInfinity);
  a.jb(scaled);
  a.vxorps(s, s, s);
  a.vxorps(r, r, r);
  a.jmp(scaled);
  a.bind(not_finite);
  a.vmovss(s, ptr(constants, 4));
  a.vxorps(r, r, r);
  a.bind(scaled);
  a.vmovss(ptr(out, static_cast<int>(rows.row_stride - 4)), s);
  scale_row();
  a.add(row, row_step);
  a.add(out, static_cast<int>(rows.row_stride));
  a.dec(rows_left);
  a.jnz(next_row);
  a.bind(quantised);
  a.test(byte_ptr(call, offsetof(Call, steps)), int8_linear::kMultiply);
  a.jnz(multiply);
  a.vzeroupper();
  a.ret();
  a.align(asmjit::AlignMode::kZero, 4);
  a.bind(constants);
  a.embedUInt32(k127);
  a.embedUInt32(kNan);
  a.bind(multiply);
}

/// `count` chunks by `chunk(i)`, i of them after `from` and, unless null, `to`: in turns of four, which leave both
/// behind what is done, and then the rest, of which i counts on from there.
template <class Chunk> void emit_chunks(Assembler& a, std::int64_t count, int from_step, int to_step, Chunk chunk) {
  constexpr int kUnroll = 4;
  if (count >= kUnroll) {
    const asmjit::Label turn = a.newLabel();
    a.mov(turns.r32(), count / kUnroll);
    a.bind(turn);
    for (int i = 0; i < kUnroll; ++i)
      chunk(i);
    a.add(from, kUnroll * from_step);
    if (to_step > 0)
      a.add(to, kUnroll * to_step);
    a.dec(turns.r32());
    a.jnz(turn);
  }
  for (int i = 0; i < count % kUnroll; ++i)
    chunk(i);
}

} // namespace

void emit_quantiser_512(Assembler& a, const QuantisedRows& rows) {
  const bool u8 = rows.form == QuantisedRows::Form::u8; // else s8
  const bool words = rows.x != Float::f32;              // |x| of 16 bits compares as its bits do, as of 32
  const int bytes = words ? 2 : 4, per_maximum = 64 / bytes;
  const int rest = static_cast<int>(rows.k % 16), maximum_rest = static_cast<int>(rows.k % per_maximum);
  const Zmm magnitude = zmm31, flip = zmm30, r = zmm29;
  const auto prepare = [&] { // once a row: cheap, and the constants' registers are the nest's afterwards
    a.mov(eax, words ? 0x7FFF7FFF : 0x7FFFFFFF);
    a.vpbroadcastd(magnitude, eax);
    if (maximum_rest > 0) {
      a.mov(eax, static_cast<std::int64_t>((std::uint64_t{1} << maximum_rest) - 1));
      a.kmovd(k1, eax);
    }
    if (rest > 0) {
      a.mov(eax, (1 << rest) - 1);
      a.kmovw(k2, eax);
    }
  };
  const auto find_maximum = [&] {
    prepare();
    for (int i = 0; i < 4; ++i)
      a.vpxor(Xmm(i), Xmm(i), Xmm(i));
    const auto take = [&](int i, const Zmm& x) {
      if (words)
        a.vpmaxuw(Zmm(i), Zmm(i), x);
      else
        a.vpmaxud(Zmm(i), Zmm(i), x);
    };
    a.mov(from, row);
    const std::int64_t chunks = rows.k / per_maximum;
    emit_chunks(a, chunks, 64, 0, [&](int i) {
      const Zmm x(4 + i);
      a.vpandd(x, magnitude, ptr(from, 64 * i));
      take(i, x);
    });
    if (maximum_rest > 0) {
      const Mem at = ptr(from, static_cast<int>(chunks % 4) * 64);
      if (words)
        a.k(k1).z().vmovdqu16(zmm4, at);
      else
        a.k(k1).z().vmovdqu32(zmm4, at);
      a.vpandd(zmm4, zmm4, magnitude);
      take(3, zmm4);
    }
    take(0, zmm1);
    take(2, zmm3);
    take(0, zmm2);
    a.vextracti64x4(ymm1, zmm0, 1);
    const auto take_ymm = [&](const Ymm& x) { words ? a.vpmaxuw(ymm0, ymm0, x) : a.vpmaxud(ymm0, ymm0, x); };
    const auto take_xmm = [&](const Xmm& x) { words ? a.vpmaxuw(xmm0, xmm0, x) : a.vpmaxud(xmm0, xmm0, x); };
    take_ymm(ymm1);
    a.vextracti128(xmm1, ymm0, 1);
    take_xmm(xmm1);
    for (int shift = 8; shift >= bytes; shift /= 2) {
      a.vpsrldq(xmm1, xmm0, shift);
      take_xmm(xmm1);
    }
    if (words)
      a.vpextrw(eax, xmm0, 0);
    else
      a.vmovd(eax, xmm0);
  };
  const auto scale_row = [&] {
    a.vbroadcastss(r, xmm2);
    if (u8) {
      a.mov(eax, 0x80);
      a.vpbroadcastd(flip, eax);
    }
    a.mov(from, row);
    a.mov(to, out);
    const auto chunk = [&](int i, bool masked) {
      const Zmm x(4 + i);
      const Mem at = ptr(from, 16 * bytes * i);
      const auto load = [&]() -> Assembler& {
        if (masked)
          a.k(k2).z();
        return a;
      };
      switch (rows.x) {
      case Float::bf16:
        load().vpmovzxwd(x, at);
        a.vpslld(x, x, 16);
        a.vmulps(x, x, r);
        break;
      case Float::f16:
        load().vcvtph2ps(x, at);
        a.vmulps(x, x, r);
        break;
      case Float::f32:
        load().vmulps(x, r, at);
        break;
      }
      a.vcvtps2dq(x, x); // |x · r| ≤ 127 · (1 + 2^-22): nothing to clamp
      if (u8)
        a.vpxord(x, x, flip);
      a.vpmovdb(ptr(to, 16 * i), x);
    };
    const std::int64_t chunks = rows.k / 16;
    emit_chunks(a, chunks, 16 * bytes, 16, [&](int i) { chunk(i, false); });
    if (rest > 0) // whole vectors: the stride has room, and what lies behind K meets the pack's zeros
      chunk(static_cast<int>(chunks % 4), true);
    if (const int tail = static_cast<int>(rows.k % 64); !u8 && tail > 0) {
      const int line = static_cast<int>(rows.k - tail);
      a.mov(rax, ((std::uint64_t{1} << tail) - 1) << rows.tail_zeros);
      a.kmovq(k3, rax);
      a.k(k3).z().vmovdqu8(zmm4, ptr(out, line - rows.tail_zeros));
      a.vmovdqu64(ptr(out, line), zmm4);
    }
  };
  emit_rows_quantised(a, rows, find_maximum, scale_row, true);
}

void emit_quantiser_256(Assembler& a, const QuantisedRows& rows) {
  const bool u8 = rows.form == QuantisedRows::Form::u8, words = rows.x != Float::f32;
  const int bytes = words ? 2 : 4, width = u8 ? 32 : 16, out_bytes = u8 ? 1 : 2;
  const Ymm magnitude = ymm15, flip = ymm14, order = ymm13, r = ymm12;
  const bool vectors = rows.k >= width;
  const asmjit::Label constants = a.newLabel(), behind = a.newLabel();
  // Chunks of `width`, and one that ends at K and overlaps the last of them.
  const auto for_chunks = [&](auto chunk) {
    a.mov(from, row);
    a.mov(to, out);
    const asmjit::Label turn = a.newLabel();
    a.mov(turns.r32(), rows.k / width);
    a.bind(turn);
    chunk();
    a.add(from, width * bytes);
    a.add(to, width * out_bytes);
    a.dec(turns.r32());
    a.jnz(turn);
    if (rows.k % width != 0) {
      a.lea(from, ptr(row, static_cast<int>((rows.k - width) * bytes)));
      a.lea(to, ptr(out, static_cast<int>((rows.k - width) * out_bytes)));
      chunk();
    }
  };
  // Of fewer elements: one by one.
  const auto for_elements = [&](auto element) {
    const asmjit::Label next = a.newLabel();
    if (rows.k == 0)
      return;
    a.xor_(from.r32(), from.r32());
    a.bind(next);
    element();
    a.inc(from);
    a.cmp(from, static_cast<int>(rows.k));
    a.jl(next);
  };
  const auto load_element = [&] {
    if (words)
      a.movzx(eax, word_ptr(row, from, 1));
    else
      a.mov(eax, ptr(row, from, 2));
  };
  const auto find_maximum = [&] {
    if (!vectors) {
      const Gp most = to.r32();
      a.xor_(most, most);
      for_elements([&] {
        load_element();
        a.and_(eax, words ? 0x7FFF : 0x7FFFFFFF);
        a.cmp(most, eax);
        a.cmovb(most, eax);
      });
      a.mov(eax, most);
      return;
    }
    const auto take = [&](auto to_vector, auto x) {
      words ? a.vpmaxuw(to_vector, to_vector, x) : a.vpmaxud(to_vector, to_vector, x);
    };
    a.mov(eax, words ? 0x7FFF7FFF : 0x7FFFFFFF);
    a.vmovd(Xmm(magnitude.id()), eax);
    a.vpbroadcastd(magnitude, Xmm(magnitude.id()));
    const int vectors_in_chunk = width * bytes / 32;
    for (int i = 0; i < 4; ++i)
      a.vpxor(Xmm(i), Xmm(i), Xmm(i));
    for_chunks([&] {
      for (int i = 0; i < vectors_in_chunk; ++i) {
        a.vpand(Ymm(4 + i), magnitude, ptr(from, 32 * i));
        take(Ymm(i), Ymm(4 + i));
      }
    });
    take(ymm0, ymm1);
    take(ymm2, ymm3);
    take(ymm0, ymm2);
    a.vextracti128(xmm1, ymm0, 1);
    take(xmm0, xmm1);
    for (int shift = 8; shift >= bytes; shift /= 2) {
      a.vpsrldq(xmm1, xmm0, shift);
      take(xmm0, xmm1);
    }
    if (words)
      a.vpextrw(eax, xmm0, 0);
    else
      a.vmovd(eax, xmm0);
  };
  const auto scale_row = [&] {
    if (!vectors) {
      for_elements([&] {
        load_element();
        if (rows.x == Float::bf16)
          a.shl(eax, 16);
        a.vmovd(xmm0, eax);
        if (rows.x == Float::f16)
          a.vcvtph2ps(xmm0, xmm0);
        a.vmulss(xmm0, xmm0, xmm2);
        a.vcvtss2si(eax, xmm0);
        if (u8) {
          a.xor_(eax, 0x80);
          a.mov(ptr(out, from), al);
        } else {
          a.mov(ptr(out, from, 1), ax);
        }
      });
      return;
    }
    a.vbroadcastss(r, xmm2);
    if (u8) {
      a.vmovdqa(order, ptr(constants));
      a.vmovdqa(flip, ptr(constants, 32));
    }
    for_chunks([&] {
      for (int i = 0; i < width / 8; ++i) {
        const Ymm x(4 + i);
        const Mem at = ptr(from, 8 * bytes * i);
        if (rows.x == Float::bf16) {
          a.vpmovzxwd(x, at);
          a.vpslld(x, x, 16);
          a.vmulps(x, x, r);
        } else if (rows.x == Float::f16) {
          a.vcvtph2ps(x, at);
          a.vmulps(x, x, r);
        } else {
          a.vmulps(x, r, at);
        }
        a.vcvtps2dq(x, x); // |x · r| ≤ 127 · (1 + 2^-22): nothing to clamp
      }
      a.vpackssdw(ymm4, ymm4, ymm5);
      if (u8) {
        a.vpackssdw(ymm6, ymm6, ymm7);
        a.vpacksswb(ymm4, ymm4, ymm6);
        a.vpermd(ymm4, order, ymm4);
        a.vpxor(ymm4, ymm4, flip);
      } else {
        a.vpermq(ymm4, ymm4, 0b11011000);
      }
      a.vmovdqu(ptr(to), ymm4);
    });
  };
  if (vectors && u8) {
    a.jmp(behind);
    a.align(asmjit::AlignMode::kZero, 32);
    a.bind(constants);
    for (const std::uint32_t dword : {0, 4, 1, 5, 2, 6, 3, 7}) // the packs above work within halves
      a.embedUInt32(dword);
    for (int i = 0; i < 8; ++i)
      a.embedUInt32(0x80808080);
    a.bind(behind);
  } else {
    a.bind(constants);
  }
  emit_rows_quantised(a, rows, find_maximum, scale_row, false);
}

void add_linear(NestShape& shape, const KernelDesc& desc, int scratch_bytes) {
  shape.c_bytes = static_cast<int>(int8_linear::bytes_of(int8_linear::y_of(desc)));
  shape.terms = int8_linear::TermsLayout::count(desc);
  shape.scratch_bytes = scratch_bytes;
  shape.row_zp = true;
  shape.scratch_field = static_cast<int>(offsetof(Call, workspace));
}

int8_linear::Plan linear_plan(const NestShape& shape, QuantisedRows::Form form) {
  return {.layout = shape.layout,
          .m_step = 1, // heights adapt to any cut
          .n_step = shape.columns(),
          .q_row_bytes = shape.row_stride,
          .workspace_bytes = shape.scratch_bytes,
          .q_shift = form == QuantisedRows::Form::u8 ? 128 : 0,
          .terms = true};
}

Implementation linear_row(IsaPath isa, Features needs, Features (*uses)(const KernelDesc&, const Target&),
                          std::string (*pack_layout)(const KernelDesc&, const Target&),
                          Result<CodeObject> (*compile)(const KernelDesc&, const Target&, std::string_view)) {
  return {.op = OpId::int8_linear,
          .isa = isa,
          .backend = BackendId::x86,
          .generator = GeneratorId::asmjit,
          .generator_digest = k_x86_generator_digest,
          .needs = needs,
          .uses = uses,
          .supports = [](const KernelDesc& desc, const Target&) { return int8_linear::check_k(desc, kNestMaxK); },
          .pack_layout = pack_layout,
          .compile = compile};
}

} // namespace kiln::x86
