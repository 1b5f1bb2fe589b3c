#pragma once
#include <cstddef>

namespace kiln {

/// Memory for large read-mostly data (packs): 64-byte aligned, and from 2 MiB on 2 MiB-aligned with huge pages asked
/// for, because a stream through 4 KiB pages spends its time in page walks. Null when memory is short. Freed by
/// free_pages().
void* allocate_pages(std::size_t bytes);
void free_pages(void* memory);

} // namespace kiln
