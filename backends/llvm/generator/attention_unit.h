#pragma once
#include <llvm/IR/IRBuilder.h>

#include "backends/llvm/generator/ir.h"
#include "jit/target.h"

namespace kiln::generator {

/// The instruction that attention's two products are made of: a vector of f32 sums, to each of which it adds the dot
/// product of two lanes of 32 bits. A lane holds `width` elements that follow one another along the sum: a pair of bf16
/// (vdpbf16ps, bfdot), or one f32 (fma; bf16 inputs are widened first).
struct DotUnit {
  enum class Instruction { fma, vdpbf16ps, bfdot } instruction = Instruction::fma;
  int lanes = 4;      ///< of a register
  int width = 1;      ///< elements of a lane
  int registers = 32; ///< that the machine has
  /// The register tile of a product: `row_vectors` registers of rows by `keys` keys, for Q·K; `rows` by `value_vectors`
  /// registers of values, for P·V.
  int row_vectors = 4, keys = 4, rows = 4, value_vectors = 4;
  bool multiplies_by_lane = false; ///< the second operand may be one lane of a register

  static DotUnit of(const Target& target);

  /// sums <lanes x float> + a · b, both of `lanes` times 32 bits, whatever LLVM takes them for.
  llvm::Value* dot(llvm::IRBuilder<>& ir, llvm::Value* sums, llvm::Value* a, llvm::Value* b) const;
  /// `count` vectors, each filled with one of the dwords at `from`: operands of dot().
  Values splats(llvm::IRBuilder<>& ir, llvm::Value* from, int count) const;
  /// <n x float> to bf16 bits <n x i16>, to nearest even; a NaN is 0x7FC0.
  llvm::Value* narrow(llvm::IRBuilder<>& ir, llvm::Value* values) const;
  /// Two <lanes x float> to <lanes x i32> of bf16 pairs, `first` in the low halves. No value is a NaN of another kind
  /// than arithmetic makes.
  llvm::Value* narrow_pairs(llvm::IRBuilder<>& ir, llvm::Value* first, llvm::Value* second) const;
  llvm::FixedVectorType* floats(llvm::IRBuilder<>& ir) const;
  llvm::FixedVectorType* dwords(llvm::IRBuilder<>& ir) const;
};

/// Adds the lanes of as many vectors as a vector has lanes: the sum of vector i is lane i of the result. A tree whose
/// branches, four vectors side by side or those that are four apart, are added as soon as their vectors are there: what
/// is loaded for the vectors should come in that order. Shuffles are within 128 bits or of whole 128 bits, as x86
/// likes.
class LaneSums {
public:
  LaneSums(llvm::IRBuilder<>& ir, const DotUnit& unit, bool neighbours_first)
      : ir_(ir), lanes_(unit.lanes), neighbours_first_(neighbours_first),
        vectors_(static_cast<std::size_t>(unit.lanes)), branches_(4) {}
  void set(int lane, llvm::Value* vector);
  llvm::Value* all();

private:
  llvm::Value* add_shuffled(llvm::Value* a, llvm::Value* b, llvm::ArrayRef<int> first, llvm::ArrayRef<int> second);
  llvm::Value* add_within_groups(llvm::ArrayRef<llvm::Value*> four);
  llvm::Value* add_groups(Values parts);

  llvm::IRBuilder<>& ir_;
  int lanes_;
  bool neighbours_first_;
  Values vectors_, branches_;
};

/// bf16 bits <n x i16> as the f32 <n x float> that they are the high halves of.
llvm::Value* widen(llvm::IRBuilder<>& ir, llvm::Value* bits);

/// The greater of each lane of a and b; b where either is a NaN.
llvm::Value* greater(llvm::IRBuilder<>& ir, llvm::Value* a, llvm::Value* b);

/// In place of each x <unit.lanes x float>, 2^x of each lane for x ≤ 8: within 2 ulp; exactly 1 at 0; exactly 0 from
/// -127 down, and maybe already below -126, where exact results are below 2^-126; a NaN stays one.
void exp2_of_scores(llvm::IRBuilder<>& ir, const DotUnit& unit, llvm::MutableArrayRef<llvm::Value*> x);
/// The same of one.
llvm::Value* exp2_of_score(llvm::IRBuilder<>& ir, const DotUnit& unit, llvm::Value* x);

} // namespace kiln::generator
