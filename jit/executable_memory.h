#pragma once
#include <cstddef>
#include <cstdint>
#include <memory>

#include "cache/bytes.h"
#include "cache/status.h"

namespace kiln {

/// Executable memory for many small kernels. Code is written through a second, writable view of a memfd: no mapping is ever
/// writable and executable, and pages that hold running kernels are never remapped or made unreadable. Chunks hold many
/// kernels; a freed range is filled with a trapping byte and reused.
///
/// Thread-safe. After fork, a child may run what it inherited, and allocates from fresh chunks of its own.
class ExecutableMemory {
public:
  ExecutableMemory();
  ~ExecutableMemory(); ///< every block must have been released
  ExecutableMemory(const ExecutableMemory&) = delete;
  ExecutableMemory& operator=(const ExecutableMemory&) = delete;

  /// Copies `image` to executable memory at `alignment` (a power of two ≤ 4096) and makes it visible to instruction fetch.
  /// Code::unsupported when the system refuses executable mappings altogether.
  Result<const std::uint8_t*> load(ByteSpan image, std::size_t alignment);
  /// `code` is what load() gave; nothing may run in it any more.
  void release(const std::uint8_t* code);

  struct Stats { std::size_t chunks = 0, bytes_reserved = 0, bytes_used = 0; };
  Stats stats() const;

private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

} // namespace kiln
