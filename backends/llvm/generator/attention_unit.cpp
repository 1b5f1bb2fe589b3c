#include "backends/llvm/generator/attention_unit.h"

#include <array>

#include <llvm/IR/IntrinsicsAArch64.h>
#include <llvm/IR/IntrinsicsX86.h>

namespace kiln::generator {

using llvm::Value;

DotUnit DotUnit::of(const Target& target) {
  if (target.arch == Arch::aarch64) {
    if (target.features.has(Feature::bf16))
      return {.instruction = Instruction::bfdot, .lanes = 4, .width = 2, .multiplies_by_lane = true};
    return {.instruction = Instruction::fma, .lanes = 4, .width = 1, .multiplies_by_lane = true};
  }
  if (target.features.has(Feature::avx512bf16))
    return {.instruction = Instruction::vdpbf16ps, .lanes = 16, .width = 2};
  if (target.features.has(Feature::avx512bw))
    return {.instruction = Instruction::fma, .lanes = 16, .width = 1};
  // 16 registers: 12 sums, 3 of rows and 1 of a key; 8 sums, 2 of values and 4 of P.
  const int lanes = target.features.has(Feature::avx2) ? 8 : 4;
  return {.instruction = Instruction::fma,
          .lanes = lanes,
          .width = 1,
          .registers = 16,
          .row_vectors = 3,
          .value_vectors = 2};
}

llvm::FixedVectorType* DotUnit::floats(llvm::IRBuilder<>& ir) const {
  return llvm::FixedVectorType::get(ir.getFloatTy(), static_cast<unsigned>(lanes));
}
llvm::FixedVectorType* DotUnit::dwords(llvm::IRBuilder<>& ir) const {
  return llvm::FixedVectorType::get(ir.getInt32Ty(), static_cast<unsigned>(lanes));
}

Value* DotUnit::dot(llvm::IRBuilder<>& ir, Value* sums, Value* a, Value* b) const {
  if (instruction == Instruction::fma)
    return ir.CreateIntrinsic(llvm::Intrinsic::fmuladd, {floats(ir)},
                              {ir.CreateBitCast(a, floats(ir)), ir.CreateBitCast(b, floats(ir)), sums});
  auto* pairs = llvm::FixedVectorType::get(ir.getBFloatTy(), static_cast<unsigned>(2 * lanes));
  a = ir.CreateBitCast(a, pairs);
  b = ir.CreateBitCast(b, pairs);
  if (instruction == Instruction::bfdot)
    return ir.CreateIntrinsic(llvm::Intrinsic::aarch64_neon_bfdot, {floats(ir), pairs}, {sums, a, b});
  return ir.CreateIntrinsic(llvm::Intrinsic::x86_avx512bf16_dpbf16ps_512, {}, {sums, a, b});
}

Values DotUnit::splats(llvm::IRBuilder<>& ir, Value* from, int count) const {
  Values out;
  if (multiplies_by_lane && count % lanes == 0) {
    // As floats all the way: that is what instruction selection looks for to take a lane.
    Value* group = nullptr;
    for (int i = 0; i < count; ++i) {
      if (i % lanes == 0)
        group = ir.CreateAlignedLoad(floats(ir), advance(ir, from, i * 4), llvm::Align(2));
      out.push_back(
          ir.CreateShuffleVector(group, llvm::SmallVector<int, 16>(static_cast<std::size_t>(lanes), i % lanes)));
    }
    return out;
  }
  for (int i = 0; i < count; ++i)
    out.push_back(ir.CreateVectorSplat(
        static_cast<unsigned>(lanes), ir.CreateAlignedLoad(ir.getInt32Ty(), advance(ir, from, i * 4), llvm::Align(2))));
  return out;
}

Value* DotUnit::narrow(llvm::IRBuilder<>& ir, Value* values) const {
  auto* type = llvm::cast<llvm::FixedVectorType>(values->getType());
  const unsigned n = type->getNumElements();
  auto* integers = llvm::FixedVectorType::get(ir.getInt32Ty(), n);
  auto* halves = llvm::FixedVectorType::get(ir.getInt16Ty(), n);
  Value* is_nan = ir.CreateFCmpUNO(values, values);
  values = ir.CreateSelect(is_nan, llvm::ConstantFP::getQNaN(type), values);
  if (instruction == Instruction::vdpbf16ps && n == 16)
    return ir.CreateBitCast(ir.CreateIntrinsic(llvm::Intrinsic::x86_avx512bf16_cvtneps2bf16_512, {}, {values}), halves);
  if (instruction == Instruction::bfdot)
    return ir.CreateBitCast(ir.CreateFPTrunc(values, llvm::FixedVectorType::get(ir.getBFloatTy(), n)), halves);
  const auto constant = [&](std::uint32_t v) { return llvm::ConstantInt::get(integers, v); };
  Value* bits = ir.CreateBitCast(values, integers);
  Value* odd = ir.CreateAnd(ir.CreateLShr(bits, constant(16)), constant(1));
  Value* rounded = ir.CreateAdd(ir.CreateAdd(bits, constant(0x7FFF)), odd);
  return ir.CreateTrunc(ir.CreateLShr(rounded, constant(16)), halves);
}

Value* DotUnit::narrow_pairs(llvm::IRBuilder<>& ir, Value* first, Value* second) const {
  llvm::SmallVector<int, 32> interleaved;
  for (int i = 0; i < lanes; ++i) {
    interleaved.push_back(i);
    interleaved.push_back(lanes + i);
  }
  if (instruction == Instruction::vdpbf16ps) {
    // The second operand gives the low half of the result.
    Value* both = ir.CreateIntrinsic(llvm::Intrinsic::x86_avx512bf16_cvtne2ps2bf16_512, {}, {second, first});
    both = ir.CreateBitCast(both, llvm::FixedVectorType::get(ir.getInt16Ty(), static_cast<unsigned>(2 * lanes)));
    return ir.CreateBitCast(ir.CreateShuffleVector(both, interleaved), dwords(ir));
  }
  auto* narrow_type = llvm::FixedVectorType::get(ir.getBFloatTy(), static_cast<unsigned>(lanes));
  return ir.CreateBitCast(
      ir.CreateShuffleVector(ir.CreateFPTrunc(first, narrow_type), ir.CreateFPTrunc(second, narrow_type), interleaved),
      dwords(ir));
}

Value* LaneSums::add_shuffled(Value* a, Value* b, llvm::ArrayRef<int> first, llvm::ArrayRef<int> second) {
  return ir_.CreateFAdd(ir_.CreateShuffleVector(a, b, first), ir_.CreateShuffleVector(a, b, second));
}

Value* LaneSums::add_within_groups(llvm::ArrayRef<Value*> four) {
  llvm::SmallVector<int, 16> low, high, even, odd;
  for (int group = 0; group < lanes_; group += 4) {
    low.append({group, group + 1, lanes_ + group, lanes_ + group + 1});
    high.append({group + 2, group + 3, lanes_ + group + 2, lanes_ + group + 3});
    even.append({group, group + 2, lanes_ + group, lanes_ + group + 2});
    odd.append({group + 1, group + 3, lanes_ + group + 1, lanes_ + group + 3});
  }
  return add_shuffled(add_shuffled(four[0], four[1], low, high), add_shuffled(four[2], four[3], low, high), even, odd);
}

Value* LaneSums::add_groups(Values parts) {
  const int groups = lanes_ / 4;
  while (parts.size() > 1) {
    // A vector has `pieces` groups of each of its parts.
    const int pieces = static_cast<int>(parts.size()), half = pieces / 2;
    llvm::SmallVector<int, 16> first, second;
    for (int group = 0; group < groups; ++group) {
      const int of = group * 2 / groups, index = group % (groups / 2); // which operand, and of its half of the result
      const int from = of * groups + index / half * pieces + index % half;
      for (int i = 0; i < 4; ++i) {
        first.push_back(from * 4 + i);
        second.push_back((from + half) * 4 + i);
      }
    }
    Values next;
    for (std::size_t i = 0; i < parts.size(); i += 2)
      next.push_back(add_shuffled(parts[i], parts[i + 1], first, second));
    parts = next;
  }
  return parts[0];
}

void LaneSums::set(int lane, Value* vector) {
  vectors_[static_cast<std::size_t>(lane)] = vector;
  const int groups = lanes_ / 4, group = lane / 4, within = lane % 4;
  Values branch;
  for (int i = 0; i < (neighbours_first_ ? 4 : groups); ++i) {
    branch.push_back(vectors_[static_cast<std::size_t>(neighbours_first_ ? group * 4 + i : within + i * 4)]);
    if (branch.back() == nullptr)
      return;
  }
  branches_[static_cast<std::size_t>(neighbours_first_ ? group : within)] =
      neighbours_first_ ? add_within_groups(branch) : add_groups(branch);
}

Value* LaneSums::all() {
  return neighbours_first_ ? add_groups(Values(branches_.begin(), branches_.begin() + lanes_ / 4))
                           : add_within_groups(branches_);
}

Value* widen(llvm::IRBuilder<>& ir, Value* bits) {
  const unsigned n = llvm::cast<llvm::FixedVectorType>(bits->getType())->getNumElements();
  auto* integers = llvm::FixedVectorType::get(ir.getInt32Ty(), n);
  return ir.CreateBitCast(ir.CreateShl(ir.CreateZExt(bits, integers), llvm::ConstantInt::get(integers, 16)),
                          llvm::FixedVectorType::get(ir.getFloatTy(), n));
}

Value* greater(llvm::IRBuilder<>& ir, Value* a, Value* b) {
  return ir.CreateSelect(ir.CreateFCmpOGT(a, b), a, b);
}

Value* exp2_of_score(llvm::IRBuilder<>& ir, Value* x) {
  // 2^f, f in [-1/2, 1/2]: 1 + f·(c[0] + f·(c[1] + …)), the minimax polynomial of relative error 2e-9, found by
  // reweighted least squares.
  constexpr std::array<double, 6> c = {0x1.62e430p-1, 0x1.ebfbdcp-3,  0x1.c6aee8p-5,
                                       0x1.3b2d4cp-7, 0x1.5f3e52p-10, 0x1.41fbbcp-13};
  llvm::Type* type = x->getType();
  const auto constant = [&](double v) { return llvm::ConstantFP::get(type, v); };
  auto* integers =
      llvm::FixedVectorType::get(ir.getInt32Ty(), llvm::cast<llvm::FixedVectorType>(type)->getNumElements());
  // Adding 1.5 · 2^23 rounds to an integer n, and adding 127 to that leaves the exponent bits of 2^n lowest; those of
  // n = -127 are 0.0.
  Value* magic = constant(0x1.8p23 + 127);
  x = greater(ir, constant(-127), x);
  Value* rounded = ir.CreateFAdd(x, magic);
  Value* f = ir.CreateFSub(x, ir.CreateFSub(rounded, magic));
  Value* power =
      ir.CreateBitCast(ir.CreateShl(ir.CreateBitCast(rounded, integers), llvm::ConstantInt::get(integers, 23)), type);
  const auto multiply_add = [&](Value* a, Value* b, Value* to) {
    return ir.CreateIntrinsic(llvm::Intrinsic::fmuladd, {type}, {a, b, to});
  };
  Value* sum = constant(c[5]);
  for (int i = 4; i >= 0; --i)
    sum = multiply_add(sum, f, constant(c[static_cast<std::size_t>(i)]));
  return ir.CreateFMul(multiply_add(sum, f, constant(1)), power);
}

} // namespace kiln::generator
