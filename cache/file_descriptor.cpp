#include "cache/file_descriptor.h"

#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>

#include <fmt/format.h>

namespace kiln {

FileDescriptor::~FileDescriptor() {
  if (descriptor_ >= 0)
    ::close(descriptor_);
}

std::uint64_t size_of(const FileDescriptor& file) {
  struct stat info;
  return ::fstat(file.get(), &info) == 0 && info.st_size > 0 ? static_cast<std::uint64_t>(info.st_size) : 0;
}

FileIdentity identity_of(const struct stat& info) {
  return {info.st_dev, info.st_ino, static_cast<std::uint64_t>(info.st_size),
          info.st_ctim.tv_sec * std::int64_t{1'000'000'000} + info.st_ctim.tv_nsec};
}

FileIdentity identity_of(const FileDescriptor& file) {
  struct stat info;
  return ::fstat(file.get(), &info) == 0 ? identity_of(info) : FileIdentity();
}

FileIdentity identity_of(const std::string& path) {
  struct stat info;
  return ::lstat(path.c_str(), &info) == 0 ? identity_of(info) : FileIdentity();
}

Result<Bytes> read_at(const FileDescriptor& file, const std::string& path, std::uint64_t offset, std::size_t size) {
  Bytes bytes(size);
  std::size_t done = 0;
  while (done < size) {
    const ssize_t n = ::pread(file.get(), bytes.data() + done, size - done, static_cast<off_t>(offset + done));
    if (n < 0 && errno == EINTR)
      continue;
    if (n < 0)
      return Status::error(Code::io, fmt::format("{}: cannot read: {}", path, std::strerror(errno)));
    if (n == 0)
      return Status::error(Code::integrity, fmt::format("{}: cut short: it ends at byte {}, where {} are needed", path,
                                                        offset + done, offset + size));
    done += static_cast<std::size_t>(n);
  }
  return bytes;
}

Result<Bytes> read_whole(const FileDescriptor& file, const std::string& path, std::size_t max_bytes) {
  const std::uint64_t size = size_of(file);
  if (size > max_bytes)
    return Status::error(Code::integrity,
                         fmt::format("{}: has {} bytes; allowed are at most {}", path, size, max_bytes));
  return read_at(file, path, 0, static_cast<std::size_t>(size));
}

} // namespace kiln
