#include "backends/llvm/generator/ir.h"

namespace kiln::generator {

void loop(llvm::IRBuilder<>& ir, llvm::Value* begin, llvm::Value* end, std::int64_t step, Values& carried,
          llvm::function_ref<void(llvm::Value*, Values&)> body) {
  loop(ir, begin, end, ir.getInt64(static_cast<std::uint64_t>(step)), carried, body);
}

void loop(llvm::IRBuilder<>& ir, llvm::Value* begin, llvm::Value* end, llvm::Value* step, Values& carried,
          llvm::function_ref<void(llvm::Value*, Values&)> body) {
  llvm::Function* function = ir.GetInsertBlock()->getParent();
  llvm::BasicBlock* before = ir.GetInsertBlock();
  auto* inside = llvm::BasicBlock::Create(ir.getContext(), "loop", function);
  auto* after = llvm::BasicBlock::Create(ir.getContext(), "done", function);
  ir.CreateCondBr(ir.CreateICmpSLT(begin, end), inside, after);

  ir.SetInsertPoint(inside);
  llvm::PHINode* index = ir.CreatePHI(ir.getInt64Ty(), 2);
  index->addIncoming(begin, before);
  const Values initial = carried;
  llvm::SmallVector<llvm::PHINode*, 32> phis;
  for (llvm::Value*& value : carried) {
    phis.push_back(ir.CreatePHI(value->getType(), 2));
    phis.back()->addIncoming(value, before);
    value = phis.back();
  }
  body(index, carried);
  llvm::Value* next = ir.CreateNSWAdd(index, step);
  llvm::BasicBlock* last = ir.GetInsertBlock();
  index->addIncoming(next, last);
  for (std::size_t i = 0; i < phis.size(); ++i)
    phis[i]->addIncoming(carried[i], last);
  ir.CreateCondBr(ir.CreateICmpSLT(next, end), inside, after);

  ir.SetInsertPoint(after);
  for (std::size_t i = 0; i < carried.size(); ++i) {
    llvm::PHINode* result = ir.CreatePHI(carried[i]->getType(), 2);
    result->addIncoming(initial[i], before);
    result->addIncoming(carried[i], last);
    carried[i] = result;
  }
}

void when(llvm::IRBuilder<>& ir, llvm::Value* condition, llvm::function_ref<void()> body) {
  llvm::Function* function = ir.GetInsertBlock()->getParent();
  auto* inside = llvm::BasicBlock::Create(ir.getContext(), "then", function);
  auto* after = llvm::BasicBlock::Create(ir.getContext(), "after", function);
  ir.CreateCondBr(condition, inside, after);
  ir.SetInsertPoint(inside);
  body();
  ir.CreateBr(after);
  ir.SetInsertPoint(after);
}

llvm::Value* advance(llvm::IRBuilder<>& ir, llvm::Value* base, llvm::Value* bytes) {
  return ir.CreatePtrAdd(base, bytes);
}

llvm::Value* advance(llvm::IRBuilder<>& ir, llvm::Value* base, std::int64_t bytes) {
  return bytes == 0 ? base : advance(ir, base, ir.getInt64(bytes));
}

} // namespace kiln::generator
