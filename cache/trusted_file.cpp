#include "cache/trusted_file.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <filesystem>

#include <fmt/format.h>

#include "cache/trusted_directory.h"

namespace kiln {
namespace {

Status system_error(std::string_view what, const std::string& path, int error) {
  const Code code = error == ENOENT || error == ENOTDIR ? Code::not_found : Code::io;
  return Status::error(code, fmt::format("{}: cannot {}: {}", path, what, std::strerror(error)));
}

} // namespace

Result<FileDescriptor> open_for_reading(const std::string& path, Ownership ownership) {
  // O_NONBLOCK: opening a FIFO must not wait for a writer.
  constexpr int flags = O_RDONLY | O_CLOEXEC | O_NONBLOCK | O_NOCTTY;
  FileDescriptor file;
  if (ownership == Ownership::path) {
    std::error_code error;
    const std::filesystem::path absolute = std::filesystem::absolute(path, error);
    if (error)
      return system_error("find", path, error.value());
    const Result<TrustedDirectory> directory = TrustedDirectory::open(
        absolute.parent_path(), TrustedDirectory::Owner::user_or_superuser, TrustedDirectory::Missing::leave);
    if (!directory)
      return directory.status();
    file = FileDescriptor(::openat(directory->descriptor(), absolute.filename().c_str(), flags | O_NOFOLLOW));
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
    return not_trusted(path, info, fmt::format("a file of uid {} closed to group and others (mode 0600)", ::geteuid()));
  if (ownership != Ownership::any && others_may_write(info))
    return not_trusted(path, info, fmt::format("a file of {} that group and others may not write", trusted_owners()));
  return file;
}

Status check_trusted_directory(const std::string& directory) {
  struct stat info;
  if (::stat(directory.c_str(), &info) != 0)
    return system_error("look at", directory, errno);
  return others_may_write(info)
             ? not_trusted(directory, info,
                           fmt::format("a directory of {} that group and others may not write", trusted_owners()))
             : Status();
}

} // namespace kiln
