#pragma once
#include <llvm/IR/IRBuilder.h>

/// What IRBuilder lacks to write kernels as the loops they are.
namespace kiln::generator {

using Values = llvm::SmallVector<llvm::Value*, 32>;

/// `for (index = begin; index < end; index += step)`, s64, with `carried` values: the body gets those of the iteration
/// and leaves those of the next; after the loop, `carried` holds the last ones. The builder stands behind the loop
/// then.
void loop(llvm::IRBuilder<>& ir, llvm::Value* begin, llvm::Value* end, std::int64_t step, Values& carried,
          llvm::function_ref<void(llvm::Value* index, Values& carried)> body);
void loop(llvm::IRBuilder<>& ir, llvm::Value* begin, llvm::Value* end, llvm::Value* step, Values& carried,
          llvm::function_ref<void(llvm::Value* index, Values& carried)> body);

/// `if (condition) body()`.
void when(llvm::IRBuilder<>& ir, llvm::Value* condition, llvm::function_ref<void()> body);

/// `base + bytes`. May leave the object, as cursors do after their last step.
llvm::Value* advance(llvm::IRBuilder<>& ir, llvm::Value* base, llvm::Value* bytes);
llvm::Value* advance(llvm::IRBuilder<>& ir, llvm::Value* base, std::int64_t bytes);

} // namespace kiln::generator
