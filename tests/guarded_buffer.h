#pragma once
#include <sys/mman.h>
#include <unistd.h>

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <new>

namespace kiln::test {

/// Which side of a buffer touches an inaccessible page: sanitizers do not see generated code, the processor does.
enum class Guard { after, before };

/// `bytes` of memory that end where an inaccessible page begins, or begin where one ends.
class GuardedBuffer {
public:
  GuardedBuffer(std::size_t bytes, Guard guard) {
    const std::size_t page = static_cast<std::size_t>(::sysconf(_SC_PAGESIZE));
    size_ = (bytes + page - 1) / page * page + 2 * page;
    void* const map = ::mmap(nullptr, size_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (map == MAP_FAILED)
      throw std::bad_alloc();
    map_ = static_cast<std::uint8_t*>(map);
    ::mprotect(map_, page, PROT_NONE);
    ::mprotect(map_ + size_ - page, page, PROT_NONE);
    data_ = guard == Guard::after ? map_ + size_ - page - bytes : map_ + page;
  }
  ~GuardedBuffer() { ::munmap(map_, size_); }
  GuardedBuffer(const GuardedBuffer&) = delete;
  GuardedBuffer& operator=(const GuardedBuffer&) = delete;

  template <class T> T* as() const { return reinterpret_cast<T*>(data_); }

private:
  std::uint8_t* map_ = nullptr;
  std::uint8_t* data_ = nullptr;
  std::size_t size_ = 0;
};

} // namespace kiln::test
