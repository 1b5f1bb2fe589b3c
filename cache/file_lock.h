#pragma once
#include <chrono>
#include <cstdint>
#include <string>

#include "cache/own_descriptor.h"
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

  bool held() const { return file_.held(); }
  /// Whether another held the lock at the first try.
  bool waited() const { return waited_; }
  /// The only descriptor of its description: the lock goes with it.
  void release() { file_.close(); }

private:
  OwnDescriptor file_;
  bool waited_ = false;
};

} // namespace kiln
