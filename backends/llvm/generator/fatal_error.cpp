#include "backends/llvm/generator/fatal_error.h"

#include <csetjmp>
#include <mutex>

#include <llvm/Support/ErrorHandling.h>

namespace kiln::generator {
namespace {

struct Recovery {
  std::jmp_buf resume;
  std::string* message;
};
thread_local Recovery* recovery = nullptr;

void recover(void*, const char* reason, bool) {
  if (recovery == nullptr)
    return; // not in survives(): LLVM goes on to abort
  *recovery->message = reason;
  std::longjmp(recovery->resume, 1);
}

} // namespace

bool survives(llvm::function_ref<void()> work, std::string& message) {
  // The handler is of this copy of LLVM only: a host that has one of its own is not touched.
  static std::once_flag installed;
  std::call_once(installed, [] {
    llvm::install_fatal_error_handler(recover);
    llvm::install_bad_alloc_error_handler(recover);
  });
  Recovery here{.message = &message};
  recovery = &here;
  const bool survived = setjmp(here.resume) == 0;
  if (survived)
    work();
  recovery = nullptr;
  return survived;
}

} // namespace kiln::generator
