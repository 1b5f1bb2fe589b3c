#include "cache/private_path.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstdlib>
#include <cstring>
#include <fmt/format.h>

#include "cache/digest.h"
#include "cache/file.h"
#include "cache/random.h"

namespace kiln {
namespace {

Status system_error(std::string_view what, const std::string& path, int error) {
  const Code code = error == ENOENT || error == ENOTDIR ? Code::not_found : Code::io;
  return Status::error(code, fmt::format("cannot {} {}: {}", what, path, std::strerror(error)));
}

Status refused(const std::string& path, const struct stat& info, std::string_view needed) {
  const char* kind = S_ISLNK(info.st_mode)   ? "a symbolic link"
                     : S_ISDIR(info.st_mode) ? "a directory"
                     : S_ISREG(info.st_mode) ? "a file"
                                             : "a special file";
  return Status::error(Code::io,
                       fmt::format("{} is not trusted: it is {} of uid {} with mode {:04o}; needed is {} of uid {}",
                                   path, kind, info.st_uid, info.st_mode & 07777u, needed, ::geteuid()));
}

bool others_may(const struct stat& info, mode_t what) {
  return info.st_uid != ::geteuid() || (info.st_mode & what) != 0;
}

/// Like `mkdir -p -m 0700`.
Status make_directories(const std::string& path) {
  for (std::size_t end = path.find('/', 1);; end = path.find('/', end + 1)) {
    const std::string parent = path.substr(0, end);
    if (::mkdir(parent.c_str(), 0700) != 0 && errno != EEXIST) {
      const int error = errno;
      struct stat info;
      // A directory that exists may still answer EROFS or EACCES.
      if (::stat(parent.c_str(), &info) != 0 || !S_ISDIR(info.st_mode))
        return Status::error(Code::io, fmt::format("cannot make the directory {}: {}", parent, std::strerror(error)));
    }
    if (end == std::string::npos)
      return {};
  }
}

Status write_and_sync(int file, ByteSpan content) {
  // Unsynced, a power cut could leave the name without the content.
  if (!write_all(file, content) || ::fsync(file) != 0)
    return Status::error(Code::io, std::strerror(errno));
  return {};
}

} // namespace

Result<std::string> private_directory(const std::string& directory, bool create) {
  // With a slash at the end a link would be followed.
  const std::string path = directory.substr(0, directory.find_last_not_of('/') + 1);
  if (create) {
    if (Status made = make_directories(path); !made)
      return made;
  }
  struct stat info;
  if (::lstat(path.c_str(), &info) != 0)
    return system_error("look at", path, errno);
  if (!S_ISDIR(info.st_mode) || others_may(info, S_IWGRP | S_IWOTH))
    return refused(path, info, "a directory not writable by group or others (mode 0700)");
  char* resolved = ::realpath(path.c_str(), nullptr);
  if (!resolved)
    return system_error("resolve", path, errno);
  std::string out = resolved;
  std::free(resolved);
  return out;
}

Status check_private_file(const std::string& path, bool secret) {
  struct stat info;
  if (::lstat(path.c_str(), &info) != 0)
    return system_error("look at", path, errno);
  if (secret && (!S_ISREG(info.st_mode) || others_may(info, S_IRWXG | S_IRWXO)))
    return refused(path, info, "a file closed to group and others (mode 0600)");
  if (!S_ISREG(info.st_mode) || others_may(info, S_IWGRP | S_IWOTH))
    return refused(path, info, "a file not writable by group or others (mode 0600)");
  return {};
}

Status create_private_file(const std::string& path, ByteSpan content) {
  const Result<Digest> unique = random_digest();
  if (!unique)
    return unique.status();
  const std::string temporary = path + "." + unique->hex().substr(0, 16);
  const int file = ::open(temporary.c_str(), O_WRONLY | O_CREAT | O_EXCL | O_NOFOLLOW | O_CLOEXEC, 0600);
  if (file < 0)
    return system_error("make", path, errno); // not the temporary name: each would be another cause in the log
  Status status = write_and_sync(file, content);
  ::close(file);
  if (!status)
    status = Status::error(status.code(), fmt::format("cannot write {}: {}", path, status.message()));
  // link, unlike rename, leaves a file that is there already.
  else if (::link(temporary.c_str(), path.c_str()) != 0 && errno != EEXIST)
    status = system_error("make", path, errno);
  ::unlink(temporary.c_str());
  return status;
}

} // namespace kiln
