#pragma once
#include <cstdint>
#include <string>
#include <utility>

#include "cache/bytes.h"
#include "cache/status.h"

struct stat;

namespace kiln {

/// An open file, closed with its owner. Move-only.
class FileDescriptor {
public:
  FileDescriptor() = default;
  explicit FileDescriptor(int descriptor) : descriptor_(descriptor) {}
  FileDescriptor(FileDescriptor&& other) noexcept : descriptor_(std::exchange(other.descriptor_, -1)) {}
  FileDescriptor& operator=(FileDescriptor&& other) noexcept {
    std::swap(descriptor_, other.descriptor_);
    return *this;
  }
  ~FileDescriptor();
  int get() const { return descriptor_; }
  explicit operator bool() const { return descriptor_ >= 0; }

private:
  int descriptor_ = -1;
};

/// Bytes of an open regular file; 0 when the system does not tell.
std::uint64_t size_of(const FileDescriptor& file);

/// Tells whether a name still stands for the file that was opened, unchanged.
struct FileIdentity {
  std::uint64_t device = 0, inode = 0, bytes = 0;
  std::int64_t changed_ns = 0; ///< of the last change of content, owner or mode (ctime), Unix nanoseconds
  bool operator==(const FileIdentity&) const = default;
  /// Whatever changed in it meanwhile.
  bool is_same_file(const FileIdentity& other) const { return device == other.device && inode == other.inode; }
};
FileIdentity identity_of(const struct stat& info);
/// One system call each. All zero when there is no such file; links are not followed.
FileIdentity identity_of(const FileDescriptor& file);
FileIdentity identity_of(const std::string& path);

/// `size` bytes from `offset`. Code::integrity when the file ends before. `path` is for messages.
Result<Bytes> read_at(const FileDescriptor& file, const std::string& path, std::uint64_t offset, std::size_t size);

/// The whole of a small file; Code::integrity when it has more than `max_bytes`, before any is read.
Result<Bytes> read_whole(const FileDescriptor& file, const std::string& path, std::size_t max_bytes);

} // namespace kiln
