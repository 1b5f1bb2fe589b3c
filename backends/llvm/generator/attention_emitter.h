#pragma once
#include <llvm/IR/Function.h>
#include <llvm/IR/IRBuilder.h>

#include "backends/llvm/generator/attention_unit.h"
#include "backends/llvm/generator/ir.h"
#include "jit/ops/attention.h"

namespace kiln::generator {

constexpr std::int64_t round_up(std::int64_t v, std::int64_t step) {
  return (v + step - 1) / step * step;
}

/// Gives out a workspace piece by piece, each on cache lines of its own.
class WorkspaceLayout {
public:
  /// Byte offset of a piece of `bytes`.
  std::int64_t take(std::int64_t bytes) {
    constexpr std::int64_t kCacheLine = 64;
    const std::int64_t begin = end_;
    end_ += round_up(bytes, kCacheLine);
    return begin;
  }
  /// Of all pieces so far.
  std::int64_t bytes() const { return end_; }

private:
  std::int64_t end_ = 0;
};

/// How a kernel's rows lie in registers, and where its workspace has what is kept of each row of a block. A row is one
/// query of one of the heads that share a head of K and V: the heads of a query follow one another.
struct RowState {
  DotUnit unit;
  int row_lanes = 0;      ///< rows in a register
  std::int64_t group = 0; ///< heads
  // Byte offsets. A row has lanes_per_row() lanes of a piece of state, which hold the same.
  std::int64_t q_rows = 0, o_rows = 0;            ///< s64 [rows]: byte offset of each row of Q and O
  std::int64_t limits = 0;                        ///< s32: keys below it are visible to the lane's row
  std::int64_t maxima = 0, sums = 0, factors = 0; ///< f32: the softmax's state, and what O is multiplied by

  int lanes_per_row() const { return unit.lanes / row_lanes; }
  std::int64_t register_bytes() const { return unit.lanes * 4; }
  /// Takes the pieces above for `rows` rows, a multiple of row_lanes.
  void lay_out(WorkspaceLayout& workspace, std::int64_t rows);
};

/// What the generators of attention kernels have in common: the call, the rows of a block and the ends of their
/// softmax, and words for what IRBuilder says in many.
class AttentionEmitter {
protected:
  /// `rows` outlives this.
  AttentionEmitter(llvm::Function* function, const RowState& rows);
  ~AttentionEmitter() = default;

  // ---- the call
  /// Loads the members below; first of all.
  void read_call();
  llvm::Value* pointer(std::size_t offset);
  llvm::Value* integer(std::size_t offset);
  llvm::Value* at(std::int64_t offset) { return advance(ir_, workspace_, offset); }

  // ---- s64
  llvm::Value* constant(std::int64_t v) { return ir_.getInt64(static_cast<std::uint64_t>(v)); }
  llvm::Value* times(llvm::Value* v, std::int64_t by) { return ir_.CreateMul(v, constant(by)); }
  llvm::Value* divided(llvm::Value* v, std::int64_t by) { return ir_.CreateUDiv(v, constant(by)); }
  llvm::Value* smaller(llvm::Value* a, llvm::Value* b) { return ir_.CreateSelect(ir_.CreateICmpSLT(a, b), a, b); }
  llvm::Value* larger(llvm::Value* a, llvm::Value* b) { return ir_.CreateSelect(ir_.CreateICmpSGT(a, b), a, b); }
  llvm::Value* round_up_to(llvm::Value* v, std::int64_t step) {
    return times(divided(ir_.CreateAdd(v, constant(step - 1)), step), step);
  }

  // ---- vectors
  llvm::FixedVectorType* vector_of(llvm::Type* element, std::int64_t count) {
    return llvm::FixedVectorType::get(element, static_cast<unsigned>(count));
  }
  llvm::Value* load(llvm::Type* type, llvm::Value* from, std::int64_t alignment) {
    return ir_.CreateAlignedLoad(type, from, llvm::Align(static_cast<std::uint64_t>(alignment)));
  }
  void store(llvm::Value* value, llvm::Value* to, std::int64_t alignment) {
    ir_.CreateAlignedStore(value, to, llvm::Align(static_cast<std::uint64_t>(alignment)));
  }
  std::int64_t register_bytes() const { return rows_.register_bytes(); }
  /// A register of f32.
  llvm::Value* load_register(llvm::Value* from) { return load(unit_.floats(ir_), from, register_bytes()); }
  void store_register(llvm::Value* value, llvm::Value* to) { store(value, to, register_bytes()); }
  llvm::Value* float_constant(double v) { return llvm::ConstantFP::get(unit_.floats(ir_), v); }

  // ---- rows
  llvm::Value* query_of(llvm::Value* row) { return divided(row, rows_.group); }
  /// The key from which on a row of the call sees nothing, within the call's range.
  llvm::Value* limit_of(llvm::Value* row);
  /// Offsets and limits of `rows` rows of the block that begins with the call's row `first`. Those behind row `last` of
  /// the call repeat it.
  void set_up_rows(llvm::Value* first, llvm::Value* last, llvm::Value* rows);
  /// Address of row `row` of the block in Q.
  llvm::Value* q_row(llvm::Value* row);
  /// Address of row `key` of a tile of `keys` rows of K or V, or of its last one.
  llvm::Value* row_of(llvm::Value* tile, llvm::Value* stride, llvm::Value* key, llvm::Value* keys) {
    return advance(ir_, tile, ir_.CreateMul(smaller(key, ir_.CreateSub(keys, constant(1))), stride));
  }

  // ---- softmax
  /// Over the lanes of each row, in all of them.
  llvm::Value* over_lanes_of_row(llvm::Value* v, llvm::function_ref<llvm::Value*(llvm::Value*, llvm::Value*)> combine);
  /// -infinity for the scores of keys that their row does not see: registers from `scores` on, `step_bytes` apart, of
  /// lanes_per_row keys each. They are the keys [begin, end) of a tile, the first of them number `key` of the call.
  /// `limits`: address of the rows'.
  void mask(llvm::Value* scores, std::int64_t step_bytes, llvm::Value* limits, llvm::Value* key, llvm::Value* begin,
            llvm::Value* end);
  /// Whether any lane of a register of booleans is true.
  llvm::Value* any_of(llvm::Value* lanes);
  /// What a register of scores is multiplied by, and what is added then, to be the exponent of 2.
  struct Exponent {
    llvm::Value *scale, *offset;
  };
  /// For the scores of a tile, registers `step_bytes` apart from `scores` on, of lanes_per_row keys each up to key
  /// `end`. `lane_maxima`: theirs, lane by lane, before scaling. `max`: their rows', scaled. That is score · scale -
  /// max, whose greatest is 0 but for the rounding of max. From 2^30 on that is no small number any more: the scores of
  /// such rows become the exponents in place, by their differences from the tile's greatest.
  Exponent exponent_of(llvm::Value* scores, std::int64_t step_bytes, llvm::Value* end, llvm::Value* lane_maxima,
                       llvm::Value* max);
  /// The state at byte offset `state` when all keys are through: `sums` become the rows' own, `factors` their inverses.
  void finish_sums(llvm::Value* state);
  /// The block's rows to where the call wants them, O or `partial`, and their state to `stats`: `o_row` gives the
  /// address of a row's sums, `store_row` stores `from` to `to`, as bf16 of the product with `factor` or, where that is
  /// null, as it is.
  void store_rows(llvm::Value* first, llvm::Value* rows, std::int64_t dv,
                  llvm::function_ref<llvm::Value*(llvm::Value* row)> o_row,
                  llvm::function_ref<void(llvm::Value* from, llvm::Value* to, llvm::Value* factor)> store_row);

  llvm::IRBuilder<> ir_;
  llvm::Value* call_;
  const RowState& rows_;
  const DotUnit& unit_;
  llvm::Value *workspace_ = nullptr, *key_begin_ = nullptr, *key_end_ = nullptr, *row_begin_ = nullptr,
              *row_end_ = nullptr;
  llvm::Value *visible_ = nullptr, *visible_step_ = nullptr;
  llvm::Value *k_stride_ = nullptr, *v_stride_ = nullptr; ///< bytes
  llvm::Value* scale_ = nullptr;                          ///< times log2 e, in all lanes
  llvm::Value *k_ = nullptr, *v_ = nullptr;
};

} // namespace kiln::generator
