#include "backends/llvm/generator/attention_unit.h"

#include <algorithm>
#include <array>
#include <bit>

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

namespace {

/// The vectors' operation by operation: each is a chain, and a core's window is too small to find another one behind
/// it.
class Exp2 {
public:
  Exp2(llvm::IRBuilder<>& ir, llvm::MutableArrayRef<Value*> x)
      : ir_(ir), x_(x), type_(x[0]->getType()),
        integers_(
            llvm::FixedVectorType::get(ir.getInt32Ty(), llvm::cast<llvm::FixedVectorType>(type_)->getNumElements())) {}

  /// 2^x = 2^n · 2^f with f in [-1/2, 1/2].
  void by_polynomial() {
    // 1 + f·(c[0] + f·(c[1] + …)), the minimax polynomial of relative error 2e-9, found by reweighted least squares.
    constexpr std::array<double, 6> c = {0x1.62e430p-1, 0x1.ebfbdcp-3,  0x1.c6aee8p-5,
                                         0x1.3b2d4cp-7, 0x1.5f3e52p-10, 0x1.41fbbcp-13};
    // Adding 1.5 · 2^23 rounds to an integer n, and adding 127 to that leaves the exponent bits of 2^n lowest; those of
    // n = -127 are 0.0.
    each([&](Value*& x, std::size_t) { x = greater(ir_, constant(-127), x); });
    Values rounded = split(0x1.8p23 + 127);
    Values sums(x_.size(), constant(c[5]));
    for (int i = 4; i >= 0; --i)
      each([&](Value*& f, std::size_t at) {
        sums[at] = multiply_add(sums[at], f, constant(c[static_cast<std::size_t>(i)]));
      });
    each([&](Value*& f, std::size_t at) {
      Value* power = ir_.CreateBitCast(ir_.CreateShl(rounded[at], integer(23)), type_);
      f = ir_.CreateFMul(multiply_add(sums[at], f, constant(1)), power);
    });
  }

  /// 2^x = 2^n · 2^(i / 32) · 2^f with f in [-1/64, 1/64] and the second factor from a table, two registers of 16: ten
  /// instructions instead of twelve, in a chain of half the length.
  void by_table() {
    // 2^f = 1 + f·(c[0] + f·c[1]), the minimax polynomial of relative error 0.9 · 2^-24: that of x's cubic term.
    constexpr std::array<double, 2> c = {0x1.62e584p-1, 0x1.ebfbe0p-3};
    Values is_normal;
    each([&](Value*& x, std::size_t) { is_normal.push_back(ir_.CreateFCmpUGE(x, constant(-126))); });
    // Adding 1.5 · 2^18 rounds to 1/32: i is in the lowest bits, n above it.
    Values rounded = split(0x1.8p18);
    Values powers; // 2^n · 2^(i / 32)
    each([&](Value*&, std::size_t at) {
      Value* root = ir_.CreateIntrinsic(llvm::Intrinsic::x86_avx512_vpermi2var_d_512, {},
                                        {roots(0), rounded[at], roots(kRoots / 2)});
      powers.push_back(ir_.CreateBitCast(ir_.CreateAdd(root, ir_.CreateShl(rounded[at], integer(23 - 5))), type_));
    });
    each([&](Value*& f, std::size_t at) {
      Value* more = ir_.CreateFMul(f, multiply_add(f, constant(c[1]), constant(c[0])));
      f = ir_.CreateSelect(is_normal[at], multiply_add(powers[at], more, powers[at]), constant(0));
    });
  }

private:
  static constexpr int kRoots = 32;

  void each(llvm::function_ref<void(Value*&, std::size_t)> body) {
    for (std::size_t i = 0; i < x_.size(); ++i)
      body(x_[i], i);
  }
  Value* constant(double v) { return llvm::ConstantFP::get(type_, v); }
  Value* integer(std::uint64_t v) { return llvm::ConstantInt::get(integers_, v); }
  Value* multiply_add(Value* a, Value* b, Value* to) {
    return ir_.CreateIntrinsic(llvm::Intrinsic::fmuladd, {type_}, {a, b, to});
  }

  /// Leaves of each x what `magic`, added, rounds away; the bits of the rounded sums.
  Values split(double magic) {
    Values sums;
    each([&](Value*& x, std::size_t) { sums.push_back(ir_.CreateFAdd(x, constant(magic))); });
    each([&](Value*& x, std::size_t at) { x = ir_.CreateFSub(x, ir_.CreateFSub(sums[at], constant(magic))); });
    for (Value*& sum : sums)
      sum = ir_.CreateBitCast(sum, integers_);
    return sums;
  }

  /// 2^(i / 32) for 16 i from `first` on, less what i adds to their exponents with n.
  Value* roots(int first) {
    llvm::SmallVector<std::uint32_t, kRoots / 2> bits;
    for (int i = first; i < first + kRoots / 2; ++i)
      bits.push_back(std::bit_cast<std::uint32_t>(kRootsOf2[static_cast<std::size_t>(i)]) -
                     (static_cast<std::uint32_t>(i) << (23 - 5)));
    return llvm::ConstantDataVector::get(ir_.getContext(), bits);
  }
  /// Written out: a host's library could round otherwise, and the same key must give the same code.
  static constexpr std::array<float, kRoots> kRootsOf2 = {
      0x1p0f,        0x1.059b0ep0f, 0x1.0b5586p0f, 0x1.11301ep0f, 0x1.172b84p0f, 0x1.1d4874p0f, 0x1.2387a6p0f,
      0x1.29e9ep0f,  0x1.306fep0f,  0x1.371a74p0f, 0x1.3dea64p0f, 0x1.44e086p0f, 0x1.4bfdaep0f, 0x1.5342b6p0f,
      0x1.5ab07ep0f, 0x1.6247ecp0f, 0x1.6a09e6p0f, 0x1.71f75ep0f, 0x1.7a1148p0f, 0x1.82589ap0f, 0x1.8ace54p0f,
      0x1.93737cp0f, 0x1.9c4918p0f, 0x1.a5503cp0f, 0x1.ae89fap0f, 0x1.b7f77p0f,  0x1.c199bep0f, 0x1.cb720ep0f,
      0x1.d5818ep0f, 0x1.dfc974p0f, 0x1.ea4afap0f, 0x1.f50766p0f};

  llvm::IRBuilder<>& ir_;
  llvm::MutableArrayRef<Value*> x_;
  llvm::Type* type_;
  llvm::FixedVectorType* integers_;
};

} // namespace

void exp2_of_scores(llvm::IRBuilder<>& ir, const DotUnit& unit, llvm::MutableArrayRef<Value*> x) {
  const std::size_t at_once = static_cast<std::size_t>(unit.registers) / 8; // of which each takes three
  for (std::size_t done = 0; done < x.size(); done += at_once) {
    Exp2 exp2(ir, x.slice(done, std::min(at_once, x.size() - done)));
    if (unit.lanes == 16)
      exp2.by_table();
    else
      exp2.by_polynomial();
  }
}

Value* exp2_of_score(llvm::IRBuilder<>& ir, const DotUnit& unit, Value* x) {
  exp2_of_scores(ir, unit, x);
  return x;
}

} // namespace kiln::generator
