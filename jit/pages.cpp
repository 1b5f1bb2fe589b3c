#include "jit/pages.h"

#include <cstdlib>
#include <sys/mman.h>

namespace kiln {

void* allocate_pages(std::size_t bytes) {
  constexpr std::size_t huge = std::size_t{2} << 20;
  const std::size_t alignment = bytes >= huge ? huge : 64;
  const std::size_t size = (bytes + alignment - 1) / alignment * alignment;
  if (size < bytes)
    return nullptr;
  void* const memory = std::aligned_alloc(alignment, size);
#ifdef MADV_HUGEPAGE
  if (memory != nullptr && alignment == huge)
    ::madvise(memory, size, MADV_HUGEPAGE); // advice: a refusal costs speed only
#endif
  return memory;
}

void free_pages(void* memory) {
  std::free(memory);
}

} // namespace kiln
