#include "jit/perf_file.h"

#include <cerrno>
#include <cstring>
#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>
#include <utility>

#include <fmt/format.h>

namespace kiln {

Result<PrivateFile> PrivateFile::open(std::string path) {
  PrivateFile file(std::move(path), -1);
  // O_NONBLOCK: a planted FIFO must not stop the host.
  file.descriptor_ =
      ::open(file.path_.c_str(), O_RDWR | O_APPEND | O_CREAT | O_NOFOLLOW | O_CLOEXEC | O_NONBLOCK, S_IRUSR | S_IWUSR);
  if (file.descriptor_ < 0)
    return file.failure("open");
  struct stat status;
  if (fstat(file.descriptor_, &status) != 0)
    return file.failure("fstat");
  if (!S_ISREG(status.st_mode) || status.st_uid != geteuid() || status.st_nlink != 1)
    return Status::error(Code::io, fmt::format("{}: not a plain file of this user alone", file.path_));
  return file;
}

PrivateFile::PrivateFile(PrivateFile&& other) noexcept
    : path_(std::move(other.path_)), descriptor_(std::exchange(other.descriptor_, -1)) {}

PrivateFile::~PrivateFile() {
  if (descriptor_ >= 0)
    close(descriptor_);
}

Status PrivateFile::append(ByteSpan bytes) const {
  while (!bytes.empty()) {
    const ssize_t written = write(descriptor_, bytes.data(), bytes.size());
    if (written < 0 && errno == EINTR)
      continue;
    if (written <= 0)
      return failure("write");
    bytes = bytes.subspan(static_cast<std::size_t>(written));
  }
  return {};
}

Status PrivateFile::failure(std::string_view what) const {
  return Status::error(Code::io, fmt::format("{}: {}: {}", path_, what, std::strerror(errno)));
}

} // namespace kiln
