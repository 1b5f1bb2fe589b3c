#pragma once
#include <cstdint>
#include <functional>
#include <string>
#include <utility>

#include <sys/types.h>

#include "cache/file_descriptor.h"
#include "cache/process.h"

namespace kiln {

/// A descriptor of this process alone. What hangs on its open file description (locks) ends with the process, because
/// no child keeps a copy: one made by fork loses it before fork returns there, one made by exec anyway. A host that
/// closes descriptors that it did not open, and gets the number for a file of its own, keeps its file. Move-only.
class ProcessDescriptor {
public:
  ProcessDescriptor() = default;
  ~ProcessDescriptor() { close(); }
  ProcessDescriptor(ProcessDescriptor&& other) noexcept { *this = std::move(other); }
  ProcessDescriptor& operator=(ProcessDescriptor&& other) noexcept {
    std::swap(descriptor_, other.descriptor_);
    std::swap(file_, other.file_);
    std::swap(process_, other.process_);
    return *this;
  }

  /// Calls `open`, which returns a descriptor that exec closes, or -1 with errno, while no fork can happen. Empty, with
  /// errno, when that fails.
  static ProcessDescriptor make(const std::function<int()>& open);
  /// openat(2) with O_CLOEXEC added.
  static ProcessDescriptor open_at(int directory, const char* path, int flags, mode_t mode = 0);
  /// Registers what open_at would at its first call: handlers of fork that are registered later run before its own.
  static void prepare_for_forks();

  int get() const { return descriptor_; }
  explicit operator bool() const { return descriptor_ >= 0; }
  /// Of the file that was opened.
  const FileIdentity& file() const { return file_; }
  /// Whether it still stands for that file, in the process that opened it.
  bool is_ours() const;
  void close();

private:
  int descriptor_ = -1;
  FileIdentity file_;
  ProcessId process_{};
};

} // namespace kiln
