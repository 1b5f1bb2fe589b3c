#include "cache/trusted_file.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <filesystem>
#include <fmt/format.h>

namespace kiln {
namespace {

Status system_error(std::string_view what, const std::string& path, int error) {
  const Code code = error == ENOENT || error == ENOTDIR ? Code::not_found : Code::io;
  return Status::error(code, fmt::format("{}: cannot {}: {}", path, what, std::strerror(error)));
}

Status refused(const std::string& path, const struct stat& info, std::string_view needed) {
  return Status::error(Code::io,
                       fmt::format("{} is not trusted: it belongs to uid {} and has mode {:04o}; needed is {}", path,
                                   info.st_uid, info.st_mode & 07777u, needed));
}

bool others_may_write(const struct stat& info) {
  return (info.st_uid != 0 && info.st_uid != ::geteuid()) || (info.st_mode & (S_IWGRP | S_IWOTH)) != 0;
}

FileIdentity identity_of(const struct stat& info) {
  return {info.st_dev, info.st_ino, static_cast<std::uint64_t>(info.st_size),
          info.st_ctim.tv_sec * std::int64_t{1'000'000'000} + info.st_ctim.tv_nsec};
}

std::string needed_directory() {
  return fmt::format("a directory of uid 0 or {} that group and others may not write", ::geteuid());
}

/// The directory that holds the last part of an absolute path, reached from the root one part at a time, each opened
/// without following links and looked at while it is open.
Result<FileDescriptor> open_trusted_directory(const std::filesystem::path& path) {
  const std::string needed = fmt::format("a directory of uid 0 or {} that group and others may not write", ::geteuid());
  std::filesystem::path so_far = "/";
  FileDescriptor directory(::open("/", O_PATH | O_DIRECTORY | O_CLOEXEC));
  const std::filesystem::path relative = path.parent_path().relative_path();
  for (auto part = relative.begin();; ++part) {
    struct stat info;
    if (!directory || ::fstat(directory.get(), &info) != 0)
      return errno == ENOTDIR || errno == ELOOP
                 ? Status::error(Code::io, fmt::format("{} is not trusted: it is a symbolic link or no directory; "
                                                       "give the path without links",
                                                       so_far.string()))
                 : system_error("open", so_far.string(), errno);
    const bool is_last = part == relative.end();
    const bool sticky = (info.st_mode & S_ISVTX) != 0 && (info.st_uid == 0 || info.st_uid == ::geteuid());
    if (others_may_write(info) && (is_last || !sticky))
      return refused(so_far.string(), info, needed_directory());
    if (is_last)
      return directory;
    so_far /= *part;
    directory = FileDescriptor(::openat(directory.get(), part->c_str(), O_PATH | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC));
  }
}

} // namespace

FileDescriptor::~FileDescriptor() {
  if (descriptor_ >= 0)
    ::close(descriptor_);
}

Result<FileDescriptor> open_for_reading(const std::string& path, Ownership ownership) {
  // O_NONBLOCK: opening a FIFO must not wait for a writer.
  constexpr int flags = O_RDONLY | O_CLOEXEC | O_NONBLOCK | O_NOCTTY;
  FileDescriptor file;
  if (ownership == Ownership::path) {
    std::error_code error;
    const std::filesystem::path absolute = std::filesystem::absolute(path, error).lexically_normal();
    if (error)
      return system_error("find", path, error.value());
    const Result<FileDescriptor> directory = open_trusted_directory(absolute);
    if (!directory)
      return directory.status();
    file = FileDescriptor(::openat(directory->get(), absolute.filename().c_str(), flags | O_NOFOLLOW));
    if (!file && errno == ELOOP)
      return Status::error(Code::io, fmt::format("{} is not trusted: it is a symbolic link", path));
  } else {
    file = FileDescriptor(::open(path.c_str(), flags));
  }
  struct stat info;
  if (!file || ::fstat(file.get(), &info) != 0)
    return system_error("open", path, errno);
  if (!S_ISREG(info.st_mode))
    return Status::error(Code::io, fmt::format("{}: not a regular file", path));
  if (ownership == Ownership::secret && (info.st_uid != ::geteuid() || (info.st_mode & (S_IRWXG | S_IRWXO)) != 0))
    return refused(path, info, fmt::format("a file of uid {} closed to group and others (mode 0600)", ::geteuid()));
  if (ownership != Ownership::any && others_may_write(info))
    return refused(path, info, fmt::format("a file of uid 0 or {} that group and others may not write", ::geteuid()));
  return file;
}

Status check_trusted_directory(const std::string& directory) {
  struct stat info;
  if (::stat(directory.c_str(), &info) != 0)
    return system_error("look at", directory, errno);
  return others_may_write(info) ? refused(directory, info, needed_directory()) : Status();
}

std::uint64_t size_of(const FileDescriptor& file) {
  struct stat info;
  return ::fstat(file.get(), &info) == 0 && info.st_size > 0 ? static_cast<std::uint64_t>(info.st_size) : 0;
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
      return system_error("read", path, errno);
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
