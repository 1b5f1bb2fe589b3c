#pragma once
#include <chrono>
#include <cstdint>
#include <string>
#include <utility>

#include "cache/status.h"

namespace kiln {

/// A lock on one byte of a file, which need not have that byte: an open file description lock of Linux (fcntl(2)). The
/// kernel releases it when its holder dies, however; it lies between any two holders, in one process or in several. The
/// file stays empty and is never removed. A child made by fork inherits none: its copies of the descriptors are closed
/// before fork returns there, so that a lock whose holder dies is free although a child lives on.
class FileLock {
public:
  enum class Kind : std::uint8_t { shared, exclusive };
  enum class Missing : std::uint8_t { create, leave };

  /// Tries until `patience` has passed (0: once). Code::busy when another holder has it, Code::not_found when there is
  /// no file and `missing` says to leave it so, Code::io when the file system has no such locks, the descriptors are
  /// used up, or the file is not this user's own (it gets mode 0600).
  static Result<FileLock> take(const std::string& path, std::uint64_t byte, Kind kind,
                               std::chrono::milliseconds patience, Missing missing);

  FileLock() = default;
  ~FileLock() { release(); }
  FileLock(FileLock&& other) noexcept { *this = std::move(other); }
  FileLock& operator=(FileLock&& other) noexcept {
    std::swap(file_, other.file_);
    std::swap(file_id_, other.file_id_);
    std::swap(process_, other.process_);
    waited_ = other.waited_;
    return *this;
  }

  bool held() const { return file_ >= 0; }
  /// Whether another held the lock at the first try.
  bool waited() const { return waited_; }
  void release();

private:
  int file_ = -1;
  std::uint64_t file_id_ = 0; ///< tells whether `file_` is still ours: a host may close descriptors it did not open
  int process_ = 0;
  bool waited_ = false;
};

} // namespace kiln
