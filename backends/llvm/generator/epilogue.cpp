#include "backends/llvm/generator/epilogue.h"

#include <cstddef>

#include <llvm/IR/IntrinsicsAArch64.h>
#include <llvm/IR/IntrinsicsX86.h>

namespace kiln::generator {

using int8_mm::Act;
using int8_mm::CDtype;
using int8_mm::Rescale;
using int8_mm::Rounding;
using int8_mm::Scalars;
using llvm::Value;

EpilogueWriter::EpilogueWriter(llvm::IRBuilder<>& ir, const int8_mm::Epilogue& epilogue, const Target& target,
                               int lanes, Value* call)
    : ir_(ir), epilogue_(epilogue), terms_(int8_mm::TermsLayout::of(epilogue)), arch_(target.arch),
      lanes_(static_cast<unsigned>(lanes)) {
  Value* const scalars =
      ir_.CreateLoad(ir_.getPtrTy(), advance(ir_, call, static_cast<std::int64_t>(offsetof(int8_mm::Call, scalars))));
  const auto scalar = [&](std::size_t offset, llvm::Type* type) {
    return splat(ir_.CreateAlignedLoad(type, advance(ir_, scalars, static_cast<std::int64_t>(offset)), llvm::Align(4)));
  };
  llvm::Type* const s32 = ir_.getInt32Ty();
  llvm::Type* const f32 = ir_.getFloatTy();
  const bool is_float = epilogue_.has_float_output(), is_narrow = epilogue_.c_bytes() == 1;
  if (epilogue_.has_lower_bound() || is_narrow)
    lo_ = is_float ? scalar(offsetof(Scalars, lo_f), f32) : scalar(offsetof(Scalars, lo), s32);
  if (epilogue_.has_upper_bound() || is_narrow)
    hi_ = is_float ? scalar(offsetof(Scalars, hi_f), f32) : scalar(offsetof(Scalars, hi), s32);
  if (epilogue_.c_zp)
    c_zp_ = scalar(offsetof(Scalars, c_zp), s32);
  if (epilogue_.has_float_slope())
    slope_ = scalar(offsetof(Scalars, slope), f32);
  if (epilogue_.has_integer_slope())
    prepare_wide(slope_wide_, scalar(offsetof(Scalars, slope_multiplier), s32),
                 scalar(offsetof(Scalars, slope_shift), s32));
}

EpilogueWriter::EpilogueWriter(llvm::IRBuilder<>& ir, const KernelDesc& linear, const Target& target, int lanes)
    : ir_(ir), epilogue_(int8_linear::output_of(linear)), terms_(int8_linear::terms_of(linear)), arch_(target.arch),
      lanes_(static_cast<unsigned>(lanes)), dequantises_(true), has_bias_(int8_linear::has_bias(linear)),
      has_fma_(target.arch == Arch::aarch64 || target.features.has(Feature::avx512f)) {}

EpilogueWriter::Columns EpilogueWriter::load_columns(Value* terms, std::int64_t at, std::int64_t array_bytes) {
  const auto term = [&](int index, llvm::Type* element) {
    return ir_.CreateAlignedLoad(vector_of(element), advance(ir_, terms, at + index * array_bytes), llvm::Align(4));
  };
  llvm::Type* const s32 = ir_.getInt32Ty();
  Columns columns;
  columns.offset = term(terms_.offset, s32);
  if (terms_.a_zp >= 0)
    columns.a_zp = term(terms_.a_zp, s32);
  if (terms_.row_sum >= 0)
    columns.row_sum = term(terms_.row_sum, s32);
  if (has_bias_)
    columns.bias = term(int8_linear::TermsLayout::kBias, ir_.getFloatTy());
  if (epilogue_.rescale == Rescale::scale)
    columns.multiplier = term(terms_.multiplier, ir_.getFloatTy());
  else if (epilogue_.rescale == Rescale::shift_left)
    columns.shift = term(terms_.shift, s32);
  else if (epilogue_.rounds_wide())
    prepare_wide(columns, term(terms_.multiplier, s32), term(terms_.shift, s32));
  return columns;
}

/// A shift of 0 adds neither a half nor a nudge.
void EpilogueWriter::prepare_wide(Columns& columns, Value* multiplier, Value* shift) {
  llvm::Type* const s64 = vector_of(ir_.getInt64Ty());
  columns.multiplier = ir_.CreateSExt(multiplier, s64);
  columns.shift = ir_.CreateZExt(shift, s64);
  columns.one = ir_.CreateZExt(ir_.CreateICmpNE(shift, splat32(0)), s64);
  const bool down = epilogue_.rounding == Rounding::zero || epilogue_.rounding == Rounding::minus_inf ||
                    epilogue_.rounding == Rounding::even;
  // 2^shift / 2, less one for a shift above 0.
  Value* half = ir_.CreateLShr(ir_.CreateShl(splat(ir_.getInt64(1)), columns.shift), splat(ir_.getInt64(1)));
  columns.half = down ? ir_.CreateSub(half, columns.one) : half;
}

/// As in backends/x86/epilogue.cpp: ⌊(x + half + nudge) / 2^shift⌋.
Value* EpilogueWriter::round_wide(Value* value, const Columns& by) {
  Value* x = ir_.CreateMul(ir_.CreateSExt(value, vector_of(ir_.getInt64Ty())), by.multiplier);
  Value* nudge = nullptr;
  if (epilogue_.rounding == Rounding::zero || epilogue_.rounding == Rounding::away)
    nudge = ir_.CreateAnd(ir_.CreateLShr(x, splat(ir_.getInt64(63))), by.one);
  else if (epilogue_.rounding == Rounding::even || epilogue_.rounding == Rounding::odd)
    nudge = ir_.CreateAnd(ir_.CreateAShr(x, by.shift), by.one);
  x = ir_.CreateAdd(x, by.half);
  if (nudge != nullptr)
    x = epilogue_.rounding == Rounding::zero || epilogue_.rounding == Rounding::even ? ir_.CreateAdd(x, nudge)
                                                                                     : ir_.CreateSub(x, nudge);
  return ir_.CreateTrunc(ir_.CreateAShr(x, by.shift), value->getType());
}

Value* EpilogueWriter::finish(Value* acc, const Columns& columns, Value* a_zp, Value* row_sum) {
  acc = ir_.CreateAdd(acc, columns.offset);
  if (columns.a_zp != nullptr)
    acc = ir_.CreateAdd(acc, ir_.CreateMul(splat(a_zp), columns.a_zp));
  if (columns.row_sum != nullptr)
    acc = ir_.CreateAdd(acc, ir_.CreateMul(splat(row_sum), columns.row_sum));
  Value* v = dequantises_                          ? dequantise(acc, columns, a_zp)
             : epilogue_.rescale == Rescale::scale ? float_stages(acc, columns)
                                                   : integer_stages(acc, columns);
  if (epilogue_.has_float_output()) {
    if (lo_ != nullptr)
      v = ir_.CreateSelect(ir_.CreateFCmpOGT(v, lo_), v, lo_);
    if (hi_ != nullptr)
      v = ir_.CreateSelect(ir_.CreateFCmpOLT(v, hi_), v, hi_);
    return epilogue_.c_dtype == CDtype::bf16 ? to_bf16(v) : epilogue_.c_dtype == CDtype::f16 ? to_f16(v) : v;
  }
  if (lo_ != nullptr)
    v = ir_.CreateBinaryIntrinsic(llvm::Intrinsic::smax, v, lo_);
  if (hi_ != nullptr)
    v = ir_.CreateBinaryIntrinsic(llvm::Intrinsic::smin, v, hi_);
  if (c_zp_ != nullptr)
    v = ir_.CreateAdd(v, c_zp_);
  return epilogue_.c_bytes() == 1 ? ir_.CreateTrunc(v, vector_of(ir_.getInt8Ty())) : v;
}

Value* EpilogueWriter::integer_stages(Value* v, const Columns& columns) {
  if (epilogue_.rounds_wide())
    v = round_wide(v, columns);
  else if (epilogue_.rescale == Rescale::shift_left)
    v = ir_.CreateShl(v, columns.shift);
  if (epilogue_.has_integer_slope())
    v = ir_.CreateSelect(ir_.CreateICmpSLT(v, splat32(0)), round_wide(v, slope_wide_), v);
  return v;
}

Value* EpilogueWriter::float_stages(Value* acc, const Columns& columns) {
  llvm::Type* const f32 = vector_of(ir_.getFloatTy());
  Value* y = ir_.CreateFMul(ir_.CreateSIToFP(acc, f32), columns.multiplier);
  if (epilogue_.has_float_slope()) {
    y = ir_.CreateSelect(ir_.CreateFCmpOLT(y, llvm::Constant::getNullValue(f32)), ir_.CreateFMul(y, slope_), y);
    // An infinity times a slope of 0.
    Value* const nan = ir_.CreateBitCast(splat32(epilogue_.has_float_output() ? 0x7FC0'0000 : 0), f32);
    y = ir_.CreateSelect(ir_.CreateFCmpUNO(y, y), nan, y);
  }
  return epilogue_.has_float_output() ? y : to_s32(y);
}

Value* EpilogueWriter::dequantise(Value* acc, const Columns& columns, Value* s) {
  llvm::Type* const f32 = vector_of(ir_.getFloatTy());
  Value* const t = ir_.CreateFMul(splat(ir_.CreateBitCast(s, ir_.getFloatTy())), columns.multiplier);
  Value* const bias = columns.bias != nullptr ? columns.bias : llvm::Constant::getNullValue(f32);
  Value* const y = fused(ir_.CreateSIToFP(acc, f32), t, bias);
  // Whatever NaN it is becomes ours.
  return ir_.CreateSelect(ir_.CreateFCmpUNO(y, y), ir_.CreateBitCast(splat32(0x7FC0'0000), f32), y);
}

/// a · b + c, rounded once. Without an instruction for it, LLVM would call a library: then in f64, where the product is
/// exact, and where the sum is not, its last bit is made odd, which tells the rounding to f32 that something follows
/// (Boldo and Melquiond, "Emulation of FMA and correctly rounded sums: proved algorithms using rounding to odd", 2008).
Value* EpilogueWriter::fused(Value* a, Value* b, Value* c) {
  if (has_fma_)
    return ir_.CreateIntrinsic(llvm::Intrinsic::fma, {a->getType()}, {a, b, c});
  llvm::Type* const f64 = vector_of(ir_.getDoubleTy());
  llvm::Type* const s64 = vector_of(ir_.getInt64Ty());
  Value* const zero = llvm::Constant::getNullValue(f64);
  Value* const product = ir_.CreateFMul(ir_.CreateFPExt(a, f64), ir_.CreateFPExt(b, f64));
  Value* const addend = ir_.CreateFPExt(c, f64);
  Value* const sum = ir_.CreateFAdd(product, addend);
  Value* const of_addend = ir_.CreateFSub(sum, product);
  Value* const error =
      ir_.CreateFAdd(ir_.CreateFSub(product, ir_.CreateFSub(sum, of_addend)), ir_.CreateFSub(addend, of_addend));
  Value* const bits = ir_.CreateBitCast(sum, s64);
  Value* const is_even =
      ir_.CreateICmpEQ(ir_.CreateAnd(bits, splat(ir_.getInt64(1))), llvm::Constant::getNullValue(s64));
  // An infinite sum has no error: it is a NaN, and not "not equal".
  Value* const follows = ir_.CreateAnd(is_even, ir_.CreateFCmpONE(error, zero));
  Value* const outward = ir_.CreateICmpEQ(ir_.CreateFCmpOGT(error, zero), ir_.CreateFCmpOGT(sum, zero));
  Value* const odd = ir_.CreateAdd(bits, ir_.CreateSelect(outward, splat(ir_.getInt64(1)), splat(ir_.getInt64(-1))));
  return ir_.CreateFPTrunc(ir_.CreateBitCast(ir_.CreateSelect(follows, odd, bits), f64), a->getType());
}

/// Half to even, saturating; there is no NaN.
Value* EpilogueWriter::to_s32(Value* y) {
  llvm::Type* const s32 = vector_of(ir_.getInt32Ty());
  if (arch_ == Arch::aarch64)
    return ir_.CreateIntrinsic(llvm::Intrinsic::aarch64_neon_fcvtns, {s32, y->getType()}, {y});
  Value* const converted = lanes_ == 16  ? ir_.CreateIntrinsic(llvm::Intrinsic::x86_avx512_mask_cvtps2dq_512, {},
                                                               {y, llvm::Constant::getNullValue(s32),
                                                                ir_.getInt16(0xFFFF), ir_.getInt32(4)}) // by MXCSR
                           : lanes_ == 8 ? ir_.CreateIntrinsic(llvm::Intrinsic::x86_avx_cvt_ps2dq_256, {}, {y})
                                         : ir_.CreateIntrinsic(llvm::Intrinsic::x86_sse2_cvtps2dq, {}, {y});
  // Out of range it gives −2^31.
  Value* const above = ir_.CreateFCmpOGE(y, ir_.CreateBitCast(splat32(0x4F00'0000), y->getType()));
  return ir_.CreateSelect(above, splat32(0x7FFF'FFFF), converted);
}

Value* EpilogueWriter::to_bf16(Value* y) {
  Value* const bits = ir_.CreateBitCast(y, vector_of(ir_.getInt32Ty()));
  Value* const lowest = ir_.CreateAnd(ir_.CreateLShr(bits, splat32(16)), splat32(1));
  Value* const rounded = ir_.CreateAdd(ir_.CreateAdd(bits, splat32(0x7FFF)), lowest);
  return ir_.CreateTrunc(ir_.CreateLShr(rounded, splat32(16)), vector_of(ir_.getInt16Ty()));
}

/// jit/f16.h in vectors.
Value* EpilogueWriter::to_f16(Value* y) {
  Value* const bits = ir_.CreateBitCast(y, vector_of(ir_.getInt32Ty()));
  Value* const magnitude = ir_.CreateAnd(bits, splat32(0x7FFF'FFFF));
  Value* const lowest = ir_.CreateAnd(ir_.CreateLShr(magnitude, splat32(13)), splat32(1));
  Value* const normal =
      ir_.CreateLShr(ir_.CreateAdd(ir_.CreateAdd(magnitude, splat32(0xFFFu - (112u << 23))), lowest), splat32(13));
  Value* const half = ir_.CreateBitCast(splat32(0x3F00'0000), y->getType());
  Value* const small = ir_.CreateSub(
      ir_.CreateBitCast(ir_.CreateFAdd(ir_.CreateBitCast(magnitude, y->getType()), half), bits->getType()),
      splat32(0x3F00'0000));
  Value* result = ir_.CreateSelect(ir_.CreateICmpULT(magnitude, splat32(0x3880'0000)), small, normal);
  result = ir_.CreateSelect(ir_.CreateICmpUGE(magnitude, splat32(0x4780'0000)), splat32(0x7C00), result);
  result = ir_.CreateSelect(ir_.CreateICmpUGT(magnitude, splat32(0x7F80'0000)), splat32(0x7E00), result);
  Value* const sign = ir_.CreateAnd(ir_.CreateLShr(bits, splat32(16)), splat32(0x8000));
  return ir_.CreateTrunc(ir_.CreateOr(result, sign), vector_of(ir_.getInt16Ty()));
}

} // namespace kiln::generator
