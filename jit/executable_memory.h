#pragma once
#include <cstddef>
#include <cstdint>
#include <memory>

#include "cache/bytes.h"
#include "cache/status.h"

namespace kiln {

/// Executable memory for many small kernels, in memfd chunks of 256 KiB that are mapped read + execute and have no
/// writable mapping at all: code is written to the file. (A second, writable mapping would stay an open door, or cost
/// page faults and a TLB flush on every core per load.) Pages that hold running kernels are never remapped or made
/// unreadable; a freed range is filled with a trapping byte and reused; one empty chunk is kept.
///
/// Thread-safe. Survives fork: the child runs what it inherited, and both sides allocate from fresh chunks afterwards,
/// since what one side writes to a shared chunk the other would run. Inherited blocks stay mapped in the child after
/// release().
class ExecutableMemory {
public:
  /// `for_perf_map`: in anonymous memory, the only one for which `perf` looks up names in /tmp/perf-PID.map; loading
  /// takes three times as long, through a second, writable mapping that exists only meanwhile. Also what serves where
  /// no memfd can be had.
  explicit ExecutableMemory(bool for_perf_map = false);
  ~ExecutableMemory(); ///< every block must have been released
  ExecutableMemory(const ExecutableMemory&) = delete;
  ExecutableMemory& operator=(const ExecutableMemory&) = delete;

  /// Copies `image` to executable memory at `alignment` (a power of two ≤ 4096) and makes it visible to instruction
  /// fetch. Code::unsupported when the system refuses executable mappings altogether; out_of_memory or io when it
  /// fails.
  Result<const std::uint8_t*> load(ByteSpan image, std::size_t alignment);
  /// `code` is what load() gave; nothing may run in it any more.
  void release(const std::uint8_t* code);

  /// Whether the system refused executable mappings altogether when code was to be loaded: it will again.
  bool is_refused() const;

  struct Stats {
    std::size_t chunks = 0, bytes_reserved = 0, bytes_used = 0;
  };
  Stats stats() const;

private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

} // namespace kiln
