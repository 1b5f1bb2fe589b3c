#include <llvm/IR/IntrinsicsAArch64.h>

#include "backends/llvm/generator/attention_matrix.h"

// attention by BFMMLA: a register of two rows of four bf16 along the sum, times one of two columns of four, added to
// 2 × 2 f32 (Arm ARM, BFMMLA). Both operands have the same form, so both products are 12 × 8 register tiles: six
// registers of rows, four of columns, 24 of sums, of which two wait for no result of the four before on any core with
// four pipes.
//
// Everything is rearranged into registers of such operands: Q once per block of rows, K and V once per tile and block,
// P as it comes out of the exponentials.
namespace kiln::generator {
namespace {

using llvm::Value;

constexpr int kDepth = 4;       ///< elements of a row in a register
constexpr int kRowPairs = 6;    ///< registers of rows in a step
constexpr int kColumnPairs = 4; ///< registers of keys, or of values
constexpr int kColumns = 2 * kColumnPairs;
constexpr std::int64_t kRegisterBytes = 16;

class BfmmlaAttention final : public MatrixAttention {
public:
  BfmmlaAttention(llvm::Function* function, const MatrixBlocking& blocking) : MatrixAttention(function, blocking) {}

private:
  llvm::FixedVectorType* halves(int count) { return vector_of(ir_.getInt16Ty(), count); }
  llvm::FixedVectorType* operands() { return vector_of(ir_.getBFloatTy(), 8); }
  llvm::FixedVectorType* sums() { return vector_of(ir_.getFloatTy(), 4); }

  /// Elements `first`, first + 1, … of both, `size` at a time in turn: zip1 and zip2.
  Value* zipped(Value* a, Value* b, int elements, int size, int first) {
    llvm::SmallVector<int, 16> order;
    for (int i = first; order.size() < static_cast<std::size_t>(elements); i += size)
      for (int source = 0; source < 2; ++source)
        for (int j = 0; j < size; ++j)
          order.push_back(source * elements + i + j);
    return ir_.CreateShuffleVector(a, b, order);
  }

  // ---- rearranging

  /// Rows of D in pairs, `pairs` of them side by side: [D / 4][pairs] registers.
  void rearrange_pairs(llvm::function_ref<Value*(Value* row)> address_of, Value* rows, int pairs, Value* to) {
    Values none;
    const std::int64_t step_bytes = pairs * kRegisterBytes;
    loop(ir_, constant(0), rows, 2, none, [&](Value* row, Values&) {
      Value *first = address_of(row), *second = address_of(ir_.CreateAdd(row, constant(1)));
      Value* group = times(divided(row, 2 * pairs), b_.d / kDepth * step_bytes);
      Value* pair = times(divided(ir_.CreateURem(row, constant(2 * pairs)), 2), kRegisterBytes);
      Value* target = advance(ir_, to, ir_.CreateAdd(group, pair));
      loop(ir_, constant(0), constant(b_.d), 2 * kDepth, none, [&](Value* i, Values&) {
        Value *a = load(halves(8), advance(ir_, first, times(i, 2)), 2),
              *b = load(halves(8), advance(ir_, second, times(i, 2)), 2);
        Value* at = advance(ir_, target, times(divided(i, kDepth), step_bytes));
        store(zipped(a, b, 8, kDepth, 0), at, kRegisterBytes);
        store(zipped(a, b, 8, kDepth, kDepth), advance(ir_, at, step_bytes), kRegisterBytes);
      });
    });
  }
  void rearrange_q(Value* rows) override {
    rearrange_pairs([&](Value* row) { return q_row(row); }, rows, kRowPairs, at(b_.q));
  }
  void rearrange_k(Value* k, Value* keys) override {
    rearrange_pairs([&](Value* key) { return row_of(k, k_stride_, key, keys); }, round_up_to(keys, kColumns),
                    kColumnPairs, at(b_.k));
  }

  /// Eight values of four keys at a time, transposed: [Dv / 8][keys / 4][4] registers of two values of four keys.
  void rearrange_v(Value* v, Value* keys) override {
    Values none;
    loop(ir_, constant(0), round_up_to(keys, b_.step_keys), kDepth, none, [&](Value* key, Values&) {
      Value* rows[kDepth];
      Value* is_key[kDepth];
      for (int i = 0; i < kDepth; ++i) {
        Value* number = ir_.CreateAdd(key, constant(i));
        rows[i] = row_of(v, v_stride_, number, keys);
        is_key[i] = ir_.CreateICmpSLT(number, keys);
      }
      Value* to = advance(ir_, at(b_.v), times(divided(key, kDepth), kColumnPairs * kRegisterBytes));
      loop(ir_, constant(0), constant(b_.dv), kColumns, none, [&](Value* i, Values&) {
        Value* values[kDepth];
        for (int j = 0; j < kDepth; ++j)
          values[j] = ir_.CreateSelect(is_key[j], load(halves(8), advance(ir_, rows[j], times(i, 2)), 2),
                                       llvm::Constant::getNullValue(halves(8)));
        Value* at = advance(ir_, to, times(divided(i, kColumns), b_.v_part_bytes()));
        for (int half = 0; half < 2; ++half) {
          Value *even = zipped(values[0], values[1], 8, 1, 4 * half),
                *odd = zipped(values[2], values[3], 8, 1, 4 * half);
          for (int quarter = 0; quarter < 2; ++quarter)
            store(zipped(even, odd, 8, 2, 4 * quarter), advance(ir_, at, (2 * half + quarter) * kRegisterBytes),
                  kRegisterBytes);
        }
      });
    });
  }

  // ---- products

  /// totals[row pair · 4 + column pair] += rows · columns over `count` registers along the sum, those of rows
  /// row_bytes apart and those of columns following one another.
  void multiply(Value* rows, std::int64_t row_bytes, Value* columns, Value* count, Values& totals) {
    Values carried = totals;
    carried.push_back(rows);
    carried.push_back(columns);
    loop(ir_, constant(0), count, 1, carried, [&](Value*, Values& now) {
      Value*& row_at = now[now.size() - 2];
      Value*& column_at = now[now.size() - 1];
      Value* column[kColumnPairs];
      for (int j = 0; j < kColumnPairs; ++j)
        column[j] = load(operands(), advance(ir_, column_at, j * kRegisterBytes), kRegisterBytes);
      for (int i = 0; i < kRowPairs; ++i) {
        Value* row = load(operands(), advance(ir_, row_at, i * kRegisterBytes), kRegisterBytes);
        for (int j = 0; j < kColumnPairs; ++j) {
          Value*& sum = now[static_cast<std::size_t>(i * kColumnPairs + j)];
          sum = ir_.CreateIntrinsic(llvm::Intrinsic::aarch64_neon_bfmmla, {}, {sum, row, column[j]});
        }
      }
      row_at = advance(ir_, row_at, row_bytes);
      column_at = advance(ir_, column_at, kColumnPairs * kRegisterBytes);
    });
    totals.assign(carried.begin(), carried.end() - 2);
  }
  /// body(sum, its register at `at`): scores or O, the columns' pairs a chunk apart.
  void for_sums(Value* at, llvm::function_ref<void(std::size_t sum, Value* at)> body) {
    for (int i = 0; i < kRowPairs; ++i)
      for (int j = 0; j < kColumnPairs; ++j)
        body(static_cast<std::size_t>(i * kColumnPairs + j),
             advance(ir_, at, j * b_.chunk_bytes() + i * kRegisterBytes));
  }

  void score(const Step& step) override {
    Values none;
    Value* q = q_of_step(step.first);
    loop(ir_, constant(0), step.padded, kColumns, none, [&](Value* key, Values&) {
      Values totals(kRowPairs * kColumnPairs, llvm::Constant::getNullValue(sums()));
      multiply(q, kRowPairs * kRegisterBytes, advance(ir_, at(b_.k), times(ir_.CreateAdd(step.begin, key), b_.d * 2)),
               constant(b_.d / kDepth), totals);
      for_sums(advance(ir_, at(b_.scores), times(divided(key, 2), b_.chunk_bytes())),
               [&](std::size_t sum, Value* to) { store(totals[sum], to, kRegisterBytes); });
    });
  }

  void accumulate(const Step& step) override {
    Values none;
    Value* o = o_of_step(step.first);
    Value* v = advance(ir_, at(b_.v), times(divided(step.begin, b_.step_keys), b_.v_step_bytes));
    loop(ir_, constant(0), constant(b_.v_parts), 1, none, [&](Value* part, Values&) {
      Value* o_part = advance(ir_, o, times(part, kColumnPairs * b_.chunk_bytes()));
      Values totals(kRowPairs * kColumnPairs, nullptr);
      for_sums(o_part, [&](std::size_t sum, Value* from) { totals[sum] = load(sums(), from, kRegisterBytes); });
      multiply(at(b_.scores), b_.chunk_bytes(), advance(ir_, v, times(part, b_.v_part_bytes())),
               divided(step.padded, kDepth), totals);
      for_sums(o_part, [&](std::size_t sum, Value* to) { store(totals[sum], to, kRegisterBytes); });
    });
  }

  /// Two keys of two rows each to two rows of four keys.
  Value* narrow(Value* first, Value* second) override {
    auto* narrow_type = vector_of(ir_.getBFloatTy(), 4);
    auto* pairs = vector_of(ir_.getInt32Ty(), 2);
    Value *a = ir_.CreateBitCast(ir_.CreateFPTrunc(first, narrow_type), pairs),
          *b = ir_.CreateBitCast(ir_.CreateFPTrunc(second, narrow_type), pairs);
    return ir_.CreateShuffleVector(a, b, llvm::ArrayRef<int>{0, 2, 1, 3});
  }
};

} // namespace

MatrixBlocking bfmmla_blocking(const KernelDesc& desc, const Target& target) {
  const std::int64_t d = desc.value[attention::kD], dv = desc.value[attention::kDv];
  // O, Q and a tile of K and V at D = 128 take 200 KiB of the smallest L2 in use, 512 KiB.
  constexpr std::int64_t kBlockRows = 8 * 2 * kRowPairs, kKeys = 128;
  MatrixBlocking b{};
  b.unit = DotUnit::of(target);
  b.row_lanes = 2;
  b.step_rows = 2 * kRowPairs;
  b.step_keys = kColumns;
  b.value_step = kColumns;
  b.block_rows = kBlockRows;
  b.tile = kKeys;
  b.score_keys = kKeys;
  b.q_step_bytes = d / kDepth * kRowPairs * kRegisterBytes;
  b.k_bytes = kKeys * d * 2;
  b.v_parts = dv / kColumns;
  b.v_step_bytes = kColumns * kColumns * 2;
  b.unit_bytes = 0;
  b.lay_out(desc);
  return b;
}

void emit_bfmmla_attention(llvm::Function* function, const KernelDesc& desc, const Target& target) {
  const MatrixBlocking blocking = bfmmla_blocking(desc, target);
  BfmmlaAttention(function, blocking).emit();
}

} // namespace kiln::generator
