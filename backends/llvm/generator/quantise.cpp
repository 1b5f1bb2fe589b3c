#include "backends/llvm/generator/quantise.h"

#include "backends/llvm/generator/ir.h"

namespace kiln::generator {
namespace {

using int8_linear::Float;
using llvm::Value;

constexpr std::uint32_t kMagnitude = 0x7FFF'FFFF, kInfinity = 0x7F80'0000, kNan = 0x7FC0'0000;

class Quantiser {
public:
  Quantiser(llvm::IRBuilder<>& ir, Float x_type) : ir_(ir), x_type_(x_type) {}

  /// The bits of max|x|: as integers they compare as the values do, and infinity and NaN are above all others.
  Value* maximum(Value* x, std::int64_t k, int lanes) {
    const std::int64_t whole = k / lanes * lanes;
    Values most{llvm::Constant::getNullValue(bits_of(lanes))};
    loop(ir_, ir_.getInt64(0), ir_.getInt64(whole), lanes, most,
         [&](Value* i, Values& so_far) { so_far[0] = larger(so_far[0], magnitudes(x, i, lanes)); });
    Value* of_lanes = most[0];
    for (int half = lanes / 2; half > 0; half /= 2) {
      llvm::SmallVector<int, 16> low, high;
      for (int i = 0; i < half; ++i) {
        low.push_back(i);
        high.push_back(half + i);
      }
      of_lanes = larger(ir_.CreateShuffleVector(of_lanes, low), ir_.CreateShuffleVector(of_lanes, high));
    }
    Values rest{of_lanes};
    loop(ir_, ir_.getInt64(whole), ir_.getInt64(k), 1, rest,
         [&](Value* i, Values& so_far) { so_far[0] = larger(so_far[0], magnitudes(x, i, 1)); });
    return ir_.CreateExtractElement(rest[0], std::uint64_t{0});
  }

  void scale(Value* x, Value* q, std::int64_t k, int lanes, Value* r) {
    const std::int64_t whole = k / lanes * lanes;
    const auto chunk = [&](Value* i, int count) {
      Value* const values = ir_.CreateBitCast(bits_at(x, i, count), floats_of(count));
      Value* const scaled = ir_.CreateFMul(values, ir_.CreateVectorSplat(static_cast<unsigned>(count), r));
      // The sum with 1.5 · 2^23 rounds to an integer, half to even, and ends in its bits; |x · r| < 128.
      Value* const sum = ir_.CreateFAdd(scaled, llvm::ConstantFP::get(floats_of(count), 12582912.0));
      Value* const words = ir_.CreateTrunc(ir_.CreateBitCast(sum, bits_of(count)),
                                           llvm::FixedVectorType::get(ir_.getInt16Ty(), static_cast<unsigned>(count)));
      ir_.CreateAlignedStore(words, advance(ir_, q, ir_.CreateShl(i, 1)), llvm::Align(2));
    };
    Values none;
    loop(ir_, ir_.getInt64(0), ir_.getInt64(whole), lanes, none, [&](Value* i, Values&) { chunk(i, lanes); });
    loop(ir_, ir_.getInt64(whole), ir_.getInt64(k), 1, none, [&](Value* i, Values&) { chunk(i, 1); });
  }

private:
  llvm::FixedVectorType* bits_of(int count) {
    return llvm::FixedVectorType::get(ir_.getInt32Ty(), static_cast<unsigned>(count));
  }
  llvm::FixedVectorType* floats_of(int count) {
    return llvm::FixedVectorType::get(ir_.getFloatTy(), static_cast<unsigned>(count));
  }
  Value* splat(int count, std::uint32_t value) {
    return ir_.CreateVectorSplat(static_cast<unsigned>(count), ir_.getInt32(value));
  }
  Value* larger(Value* a, Value* b) { return ir_.CreateSelect(ir_.CreateICmpSGT(a, b), a, b); }
  Value* magnitudes(Value* x, Value* i, int count) {
    return ir_.CreateAnd(bits_at(x, i, count), splat(count, kMagnitude));
  }

  /// Elements i … i + count − 1 as the bits of f32.
  Value* bits_at(Value* x, Value* i, int count) {
    if (x_type_ == Float::f32)
      return ir_.CreateAlignedLoad(bits_of(count), advance(ir_, x, ir_.CreateShl(i, 2)), llvm::Align(4));
    Value* const halves =
        ir_.CreateZExt(ir_.CreateAlignedLoad(llvm::FixedVectorType::get(ir_.getInt16Ty(), static_cast<unsigned>(count)),
                                             advance(ir_, x, ir_.CreateShl(i, 1)), llvm::Align(2)),
                       bits_of(count));
    if (x_type_ == Float::bf16)
      return ir_.CreateShl(halves, splat(count, 16));
    // jit/f16.h in vectors; what is not finite becomes at least infinity's bits.
    Value* const sign = ir_.CreateShl(ir_.CreateAnd(halves, splat(count, 0x8000)), splat(count, 16));
    Value* const magnitude = ir_.CreateShl(ir_.CreateAnd(halves, splat(count, 0x7FFF)), splat(count, 13));
    Value* const rebiased = ir_.CreateBitCast(ir_.CreateFMul(ir_.CreateBitCast(magnitude, floats_of(count)),
                                                             llvm::ConstantFP::get(floats_of(count), 0x1p112)),
                                              bits_of(count));
    Value* const special = ir_.CreateOr(magnitude, splat(count, kInfinity));
    Value* const is_special = ir_.CreateICmpUGE(magnitude, splat(count, 0x7C00u << 13));
    return ir_.CreateOr(ir_.CreateSelect(is_special, special, rebiased), sign);
  }

  llvm::IRBuilder<>& ir_;
  const Float x_type_;
};

} // namespace

void quantise_row(llvm::IRBuilder<>& ir, Float x_type, std::int64_t k, int lanes, Value* x, Value* q, Value* s) {
  llvm::Type* const f32 = ir.getFloatTy();
  Value* const zero = llvm::ConstantFP::get(f32, 0.0);
  Value* const most = llvm::ConstantFP::get(f32, 127.0);
  const auto is_finite = [&](Value* bits) { return ir.CreateICmpULT(bits, ir.getInt32(kInfinity)); };
  Quantiser quantiser(ir, x_type);
  Value* const bits = quantiser.maximum(x, k, lanes);
  Value* const a = ir.CreateBitCast(bits, f32);
  Value* const r = ir.CreateFDiv(most, a);
  Value* const scales = ir.CreateAnd(is_finite(bits), is_finite(ir.CreateBitCast(r, ir.getInt32Ty())));
  Value* const s_of_finite = ir.CreateSelect(scales, ir.CreateFDiv(a, most), zero);
  ir.CreateAlignedStore(ir.CreateSelect(is_finite(bits), s_of_finite, ir.CreateBitCast(ir.getInt32(kNan), f32)), s,
                        llvm::Align(4));
  quantiser.scale(x, q, k, lanes, ir.CreateSelect(scales, r, zero));
}

} // namespace kiln::generator
