#include "jit/executable_memory.h"

#include <algorithm>
#include <atomic>
#include <bit>
#include <iterator>
#include <map>
#include <mutex>
#include <vector>

#include <fmt/format.h>

#include "cache/per_process.h"
#include "cache/process.h"
#include "jit/os.h"

namespace kiln {
namespace {

constexpr std::size_t kChunkBytes = 256 << 10;
constexpr std::size_t kMaxAlignment = 4096;
/// Blocks begin and end on cache lines, so that no line holds code of two kernels.
constexpr std::size_t kGranule = 64;

// What a jump into memory without a kernel meets: int3, and UDF #0, which is also what fresh memory holds.
#ifdef __x86_64__
constexpr std::uint8_t kTrap = 0xcc;
#else
constexpr std::uint8_t kTrap = 0x00;
#endif

// An Arm core may go on with what it fetched ahead, also where nothing has run yet, until it synchronises itself (Arm
// Architecture Reference Manual, "Concurrent modification and execution of instructions").
#ifdef __aarch64__
constexpr bool kMayHoldFreshMemory = true;
#else
constexpr bool kMayHoldFreshMemory = false;
#endif

std::size_t round_up(std::size_t value, std::size_t step) {
  return (value + step - 1) / step * step;
}

void make_visible_to_instruction_fetch(const std::uint8_t* begin, std::size_t size) {
  // Nothing on x86-64; cleans and invalidates by address on aarch64, where reading the executable view is enough.
  char* first = const_cast<char*>(reinterpret_cast<const char*>(begin));
  __builtin___clear_cache(first, first + size);
}

/// One mapping with many blocks: [0, size) is split into `used` and `free`, which map offset to length.
struct Chunk {
  explicit Chunk(const os::CodeMapping& m) : mapping(m), forks(fork_count()) { free.emplace(0, m.size); }

  os::CodeMapping mapping;
  unsigned forks;               ///< when it was made
  std::size_t executed_end = 0; ///< bytes from here on have never held code
  std::map<std::size_t, std::size_t> used, free;
  bool failed = false; ///< a write did: the system is out of memory, or a host closed the file

  /// A chunk that a fork has shared is never written again, by either side: the other may run what this one released.
  bool is_writable() const { return !failed && forks == fork_count(); }

  /// Offset of the first free range that takes `size` bytes at `alignment`, or the chunk's size.
  std::size_t find(std::size_t size, std::size_t alignment) const {
    for (const auto& [offset, length] : free)
      if (const std::size_t begin = round_up(offset, alignment); begin + size <= offset + length)
        return begin;
    return mapping.size;
  }

  /// [begin, begin + size) lies in one free range.
  void take(std::size_t begin, std::size_t size) {
    const auto range = std::prev(free.upper_bound(begin));
    const std::size_t offset = range->first, end = offset + range->second;
    free.erase(range);
    if (begin > offset)
      free.emplace(offset, begin - offset);
    if (begin + size < end)
      free.emplace(begin + size, end - begin - size);
    used.emplace(begin, size);
  }

  void give_back(std::size_t begin) {
    const auto block = used.find(begin);
    std::size_t end = begin + block->second;
    used.erase(block);
    if (const auto next = free.find(end); next != free.end()) {
      end += next->second;
      free.erase(next);
    }
    if (const auto next = free.lower_bound(begin); next != free.begin())
      if (const auto previous = std::prev(next); previous->first + previous->second == begin) {
        begin = previous->first;
        free.erase(previous);
      }
    free.emplace(begin, end - begin);
  }
};

} // namespace

struct ExecutableMemory::Impl {
  struct Chunks {
    std::mutex mutex;
    std::map<const std::uint8_t*, Chunk> by_address;
    std::size_t bytes_used = 0;

    ~Chunks() {
      for (const auto& [address, chunk] : by_address)
        os::unmap_code(chunk.mapping);
    }

    // All below with the mutex held.

    /// A chunk with room at `offset`.
    Result<Chunk*> chunk_for(std::size_t size, std::size_t alignment, bool anonymous, std::size_t& offset) {
      for (auto& [address, chunk] : by_address)
        if (chunk.is_writable())
          if (offset = chunk.find(size, alignment); offset < chunk.mapping.size)
            return &chunk;
      const Result<os::CodeMapping> mapping =
          os::map_code(std::max(kChunkBytes, round_up(size, kMaxAlignment)), anonymous);
      if (!mapping)
        return mapping.status();
      offset = 0;
      return &by_address.emplace(mapping->address, Chunk(*mapping)).first->second;
    }

    Result<const std::uint8_t*> load(ByteSpan image, std::size_t alignment, bool anonymous) {
      const std::size_t size = round_up(image.size(), kGranule);
      std::size_t offset = 0;
      const Result<Chunk*> found = chunk_for(size, std::max(alignment, kGranule), anonymous, offset);
      if (!found)
        return found.status();
      Chunk& chunk = **found;

      Bytes padded_image(image.begin(), image.end());
      padded_image.resize(size, kTrap);
      Status written = os::write_code(chunk.mapping, offset, padded_image);
      if (!written) {
        chunk.failed = true;
        return written;
      }
      const std::uint8_t* code = chunk.mapping.address + offset;
      make_visible_to_instruction_fetch(code, size);
      const bool replaces = offset < chunk.executed_end;
      if (replaces)
        os::forget_replaced_code(chunk.mapping, offset, size);
      if (replaces || kMayHoldFreshMemory)
        os::synchronise_instruction_fetch();
      chunk.executed_end = std::max(chunk.executed_end, offset + size);
      chunk.take(offset, size);
      bytes_used += size;
      return code;
    }

    /// Empty chunks of ordinary size are kept for the next load, one of them; others go back to the system.
    void drop_empty_chunks() {
      bool has_spare = false;
      std::erase_if(by_address, [&](const auto& item) {
        const Chunk& chunk = item.second;
        if (!chunk.used.empty())
          return false;
        if (!has_spare && chunk.mapping.size == kChunkBytes && chunk.is_writable()) {
          has_spare = true;
          return false;
        }
        os::unmap_code(chunk.mapping);
        return true;
      });
    }
  };
  bool anonymous;
  PerProcess<Chunks> chunks;
  std::atomic<bool> refused{false};
};

ExecutableMemory::ExecutableMemory(bool for_perf_map) : impl_(new Impl{for_perf_map, {}, {}}) {}
ExecutableMemory::~ExecutableMemory() = default;

Result<const std::uint8_t*> ExecutableMemory::load(ByteSpan image, std::size_t alignment) {
  if (image.empty() || !std::has_single_bit(alignment) || alignment > kMaxAlignment)
    return Status::error(
        Code::invalid_argument,
        fmt::format("executable memory: an image of {} bytes at alignment {}; give at least 1 byte and a "
                    "power of two up to {}",
                    image.size(), alignment, kMaxAlignment));
  Impl::Chunks& chunks = impl_->chunks.get();
  const std::scoped_lock lock(chunks.mutex);
  Result<const std::uint8_t*> code = chunks.load(image, alignment, impl_->anonymous);
  if (!code && code.status().code() == Code::unsupported)
    impl_->refused = true;
  // The chunk that failed takes no more code, so the second try finds or makes another.
  return code || impl_->refused ? code : chunks.load(image, alignment, impl_->anonymous);
}

void ExecutableMemory::release(const std::uint8_t* code) {
  Impl::Chunks& chunks = impl_->chunks.get();
  const std::scoped_lock lock(chunks.mutex);
  auto after = chunks.by_address.upper_bound(code);
  if (after == chunks.by_address.begin())
    return; // inherited from the parent: stays mapped
  Chunk& chunk = std::prev(after)->second;
  const auto block = chunk.used.find(static_cast<std::size_t>(code - chunk.mapping.address));
  if (block == chunk.used.end())
    return;
  const auto [offset, size] = *block;
  chunks.bytes_used -= size;
  if (chunk.is_writable())
    chunk.failed = !os::write_code(chunk.mapping, offset, Bytes(size, kTrap));
  chunk.give_back(offset);
  if (chunk.used.empty())
    chunks.drop_empty_chunks();
}

bool ExecutableMemory::is_refused() const {
  return impl_->refused;
}

ExecutableMemory::Stats ExecutableMemory::stats() const {
  Impl::Chunks& chunks = impl_->chunks.get();
  const std::scoped_lock lock(chunks.mutex);
  Stats stats;
  stats.chunks = chunks.by_address.size();
  for (const auto& [address, chunk] : chunks.by_address)
    stats.bytes_reserved += chunk.mapping.size;
  stats.bytes_used = chunks.bytes_used;
  return stats;
}

} // namespace kiln
