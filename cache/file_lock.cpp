#include "cache/file_lock.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <thread>

#include <fmt/format.h>

namespace kiln {
namespace {

/// Ok with 0, or errno.
int try_lock(int file, std::uint64_t byte, FileLock::Kind kind) {
  struct flock range {};
  range.l_type = kind == FileLock::Kind::exclusive ? F_WRLCK : F_RDLCK;
  range.l_whence = SEEK_SET;
  range.l_start = static_cast<off_t>(byte);
  range.l_len = 1;
  return ::fcntl(file, F_OFD_SETLK, &range) == 0 ? 0 : errno;
}

} // namespace

Result<FileLock> FileLock::take(const std::string& path, std::uint64_t byte, Kind kind,
                                std::chrono::milliseconds patience, Missing missing) {
  return take_at(AT_FDCWD, path.c_str(), path, byte, kind, patience, missing);
}

Result<FileLock> FileLock::take(const TrustedDirectory& directory, const char* name, std::uint64_t byte, Kind kind,
                                std::chrono::milliseconds patience, Missing missing) {
  return take_at(directory.descriptor(), name, directory.path_of(name), byte, kind, patience, missing);
}

Result<FileLock> FileLock::take_at(int directory, const char* name, const std::string& path, std::uint64_t byte,
                                   Kind kind, std::chrono::milliseconds patience, Missing missing) {
  const auto deadline = std::chrono::steady_clock::now() + patience;
  const auto failed = [&](const char* doing, int error) {
    return Status::error(error == ENOENT ? Code::not_found : Code::io,
                         fmt::format("{}: cannot {}: {}", path, doing, std::strerror(error)));
  };
  // A shared lock needs a descriptor for reading, an exclusive one for writing. O_NONBLOCK: a pipe must not hang us.
  const int access = (missing == Missing::create ? O_RDWR | O_CREAT : kind == Kind::exclusive ? O_RDWR : O_RDONLY);
  FileLock lock; // whose descriptor is the only one of its description: the lock goes with it
  lock.file_ = ProcessDescriptor::open_at(directory, name, access | O_NOFOLLOW | O_NONBLOCK, 0600);
  if (!lock.file_)
    return failed("open", errno);
  struct stat info;
  if (::fstat(lock.file_.get(), &info) != 0 || !S_ISREG(info.st_mode) || info.st_uid != ::geteuid() ||
      (info.st_mode & (S_IWGRP | S_IWOTH)) != 0)
    return Status::error(
        Code::io, fmt::format("{}: needed is a file of uid {} that group and others may not write", path, ::geteuid()));
  auto pause = std::chrono::microseconds(250);
  for (;;) {
    const int error = try_lock(lock.file_.get(), byte, kind);
    if (error == 0)
      return lock;
    if (error != EAGAIN && error != EACCES && error != EINTR)
      return failed("lock", error);
    const auto now = std::chrono::steady_clock::now();
    if (now >= deadline)
      return Status::error(Code::busy, fmt::format("{}: byte {} is locked by another", path, byte));
    lock.waited_ = true;
    std::this_thread::sleep_for(std::min<std::chrono::nanoseconds>(pause, deadline - now));
    pause = std::min(pause * 2, std::chrono::microseconds(4000));
  }
}

} // namespace kiln
