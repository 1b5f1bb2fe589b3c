#include "backends/llvm/generator/attention_emitter.h"

#include <cfloat>
#include <cstddef>

namespace kiln::generator {

using attention::Call;
using llvm::Value;

void RowState::lay_out(WorkspaceLayout& workspace, std::int64_t rows) {
  const std::int64_t state = rows / row_lanes * register_bytes();
  q_rows = workspace.take(rows * 8);
  o_rows = workspace.take(rows * 8);
  limits = workspace.take(state);
  maxima = workspace.take(state);
  sums = workspace.take(state);
  factors = workspace.take(state);
}

AttentionEmitter::AttentionEmitter(llvm::Function* function, const RowState& rows)
    : ir_(function->getContext()), call_(function->getArg(0)), rows_(rows), unit_(rows.unit) {
  ir_.SetInsertPoint(llvm::BasicBlock::Create(ir_.getContext(), "entry", function));
}

// ---------------------------------------------------------------- the call

Value* AttentionEmitter::pointer(std::size_t offset) {
  return ir_.CreateLoad(ir_.getPtrTy(), advance(ir_, call_, static_cast<std::int64_t>(offset)));
}

Value* AttentionEmitter::integer(std::size_t offset) {
  return ir_.CreateLoad(ir_.getInt64Ty(), advance(ir_, call_, static_cast<std::int64_t>(offset)));
}

void AttentionEmitter::read_call() {
  workspace_ = pointer(offsetof(Call, workspace));
  key_begin_ = integer(offsetof(Call, key_begin));
  key_end_ = integer(offsetof(Call, key_end));
  row_begin_ = integer(offsetof(Call, row_begin));
  row_end_ = integer(offsetof(Call, row_end));
  visible_ = integer(offsetof(Call, visible));
  visible_step_ = integer(offsetof(Call, visible_step));
  k_stride_ = ir_.CreateShl(integer(offsetof(Call, k_row_stride)), 1);
  v_stride_ = ir_.CreateShl(integer(offsetof(Call, v_row_stride)), 1);
  Value* scale = load(ir_.getFloatTy(), advance(ir_, call_, offsetof(Call, scale_log2e)), 4);
  scale_ = ir_.CreateVectorSplat(static_cast<unsigned>(unit_.lanes), scale);
  k_ = pointer(offsetof(Call, k));
  v_ = pointer(offsetof(Call, v));
}

// ---------------------------------------------------------------- rows

Value* AttentionEmitter::limit_of(Value* row) {
  Value* limit = ir_.CreateAdd(visible_, ir_.CreateMul(query_of(row), visible_step_));
  return larger(smaller(limit, key_end_), key_begin_);
}

void AttentionEmitter::set_up_rows(Value* first, Value* last, Value* rows) {
  Value* q_head = ir_.CreateShl(integer(offsetof(Call, q_head_stride)), 1);
  Value* q_row = ir_.CreateShl(integer(offsetof(Call, q_row_stride)), 1);
  Value* o_head = ir_.CreateShl(integer(offsetof(Call, o_head_stride)), 1);
  Value* o_row = ir_.CreateShl(integer(offsetof(Call, o_row_stride)), 1);
  Values none;
  loop(ir_, constant(0), rows, 1, none, [&](Value* i, Values&) {
    Value* row = smaller(ir_.CreateAdd(first, i), last);
    Value* query = query_of(row);
    Value* head = ir_.CreateSub(row, times(query, rows_.group));
    const auto offset = [&](Value* head_stride, Value* row_stride) {
      return ir_.CreateAdd(ir_.CreateMul(head, head_stride), ir_.CreateMul(query, row_stride));
    };
    ir_.CreateStore(offset(q_head, q_row), advance(ir_, at(rows_.q_rows), times(i, 8)));
    ir_.CreateStore(offset(o_head, o_row), advance(ir_, at(rows_.o_rows), times(i, 8)));
    Value* limit = ir_.CreateVectorSplat(static_cast<unsigned>(rows_.lanes_per_row()),
                                         ir_.CreateTrunc(limit_of(row), ir_.getInt32Ty()));
    store(limit, advance(ir_, at(rows_.limits), times(i, rows_.lanes_per_row() * 4)), 4);
  });
}

Value* AttentionEmitter::q_row(Value* row) {
  Value* offset = ir_.CreateLoad(ir_.getInt64Ty(), advance(ir_, at(rows_.q_rows), times(row, 8)));
  // Loaded here: kept from the kernel's start, it would take a register from the loops that come after Q's.
  return advance(ir_, pointer(offsetof(Call, q)), offset);
}

// ---------------------------------------------------------------- softmax

Value* AttentionEmitter::over_lanes_of_row(Value* v, llvm::function_ref<Value*(Value*, Value*)> combine) {
  for (int distance = 1; distance < rows_.lanes_per_row(); distance *= 2) {
    llvm::SmallVector<int, 16> other;
    for (int i = 0; i < unit_.lanes; ++i)
      other.push_back(i ^ distance);
    v = combine(v, ir_.CreateShuffleVector(v, other));
  }
  return v;
}

void AttentionEmitter::mask(Value* scores, std::int64_t step_bytes, Value* limits, Value* key, Value* begin,
                            Value* end) {
  const int per_row = rows_.lanes_per_row();
  llvm::SmallVector<llvm::Constant*, 16> lanes;
  for (int i = 0; i < unit_.lanes; ++i)
    lanes.push_back(ir_.getInt32(static_cast<std::uint32_t>(i % per_row)));
  Value* keys =
      ir_.CreateAdd(ir_.CreateVectorSplat(static_cast<unsigned>(unit_.lanes), ir_.CreateTrunc(key, ir_.getInt32Ty())),
                    llvm::ConstantVector::get(lanes));
  Value* limit = load(unit_.dwords(ir_), limits, register_bytes());
  Values carried{keys, scores};
  loop(ir_, begin, end, per_row, carried, [&](Value*, Values& now) {
    Value* is_visible = ir_.CreateICmpSLT(now[0], limit);
    store_register(
        ir_.CreateSelect(is_visible, load_register(now[1]), llvm::ConstantFP::getInfinity(unit_.floats(ir_), true)),
        now[1]);
    now[0] = ir_.CreateAdd(now[0], llvm::ConstantInt::get(unit_.dwords(ir_), static_cast<std::uint64_t>(per_row)));
    now[1] = advance(ir_, now[1], step_bytes);
  });
}

// ---------------------------------------------------------------- the end of a block of rows

Value* AttentionEmitter::any_of(Value* lanes) {
  if (unit_.lanes == 16)
    return ir_.CreateICmpNE(ir_.CreateBitCast(lanes, ir_.getInt16Ty()), ir_.getInt16(0));
  return ir_.CreateICmpNE(ir_.CreateOrReduce(ir_.CreateSExt(lanes, unit_.dwords(ir_))), ir_.getInt32(0));
}

AttentionEmitter::Exponent AttentionEmitter::exponent_of(Value* scores, std::int64_t step_bytes, Value* end,
                                                         Value* lane_maxima, Value* max) {
  // A row that has seen nothing yet stands at -FLT_MAX.
  Value* size = ir_.CreateUnaryIntrinsic(llvm::Intrinsic::fabs, max);
  Value* is_huge =
      ir_.CreateAnd(ir_.CreateFCmpOGE(size, float_constant(0x1p30)), ir_.CreateFCmpOGT(max, float_constant(-FLT_MAX)));
  when(ir_, any_of(is_huge), [&] {
    Value* greatest = over_lanes_of_row(lane_maxima, [&](Value* a, Value* b) { return greater(ir_, a, b); });
    greatest = greater(ir_, greatest, float_constant(-FLT_MAX)); // -infinity less itself would be NaN
    Value* from_max = ir_.CreateFSub(ir_.CreateFMul(greatest, scale_), max);
    Values none;
    loop(ir_, constant(0), end, rows_.lanes_per_row(), none, [&](Value* key, Values&) {
      Value* at = advance(ir_, scores, times(divided(key, rows_.lanes_per_row()), step_bytes));
      Value* score = load_register(at);
      Value* exponent = ir_.CreateFAdd(ir_.CreateFMul(ir_.CreateFSub(score, greatest), scale_), from_max);
      store_register(ir_.CreateSelect(is_huge, exponent, score), at);
    });
  });
  return {ir_.CreateSelect(is_huge, float_constant(1), scale_),
          ir_.CreateSelect(is_huge, float_constant(0), ir_.CreateFNeg(max))};
}

void AttentionEmitter::finish_sums(Value* state) {
  Value* sums = advance(ir_, at(rows_.sums), state);
  Value* sum = over_lanes_of_row(load_register(sums), [&](Value* a, Value* b) { return ir_.CreateFAdd(a, b); });
  store_register(sum, sums);
  Value* is_nothing = ir_.CreateFCmpOEQ(sum, float_constant(0));
  Value* inverse = ir_.CreateFDiv(float_constant(1), ir_.CreateSelect(is_nothing, float_constant(1), sum));
  store_register(inverse, advance(ir_, at(rows_.factors), state));
}

void AttentionEmitter::store_rows(Value* first, Value* rows, std::int64_t dv,
                                  llvm::function_ref<Value*(Value* row)> o_row,
                                  llvm::function_ref<void(Value* from, Value* to, Value* factor)> store_row) {
  Value* partial = pointer(offsetof(Call, partial));
  Value* stats = pointer(offsetof(Call, stats));
  Value* o = pointer(offsetof(Call, o));
  Value* is_partial = ir_.CreateIsNotNull(partial);
  Value* first_index = ir_.CreateSub(first, row_begin_);
  Values none;
  loop(ir_, constant(0), rows, 1, none, [&](Value* row, Values&) {
    Value* from = o_row(row);
    Value* index = ir_.CreateAdd(first_index, row);
    Value* state = times(row, rows_.lanes_per_row() * 4);
    const auto state_of = [&](std::int64_t piece) { return load(ir_.getFloatTy(), advance(ir_, at(piece), state), 4); };
    when(ir_, ir_.CreateIsNotNull(stats), [&] {
      Value* to = advance(ir_, stats, times(index, 8));
      store(state_of(rows_.maxima), to, 4);
      store(state_of(rows_.sums), advance(ir_, to, 4), 4);
    });
    when(ir_, is_partial, [&] { store_row(from, advance(ir_, partial, times(index, dv * 4)), nullptr); });
    when(ir_, ir_.CreateNot(is_partial), [&] {
      Value* offset = ir_.CreateLoad(ir_.getInt64Ty(), advance(ir_, at(rows_.o_rows), times(row, 8)));
      store_row(from, advance(ir_, o, offset), state_of(rows_.factors));
    });
  });
}

} // namespace kiln::generator
