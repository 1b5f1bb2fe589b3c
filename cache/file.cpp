#include "cache/file.h"

#include <algorithm>
#include <cerrno>
#include <cstdlib>
#include <fcntl.h>
#include <sys/stat.h>
#include <system_error>
#include <unistd.h>

#include <fmt/format.h>

#include "cache/file_size_limit.h"

namespace kiln {
namespace {

Status io_error(const std::string& path, const char* doing) {
  const int cause = errno;
  return Status::error(cause == ENOENT ? Code::not_found : Code::io,
                       fmt::format("{}: cannot {}: {}", path, doing, std::generic_category().message(cause)));
}

struct Descriptor {
  int fd;
  ~Descriptor() {
    if (fd >= 0)
      ::close(fd);
  }
};

} // namespace

bool write_all(int descriptor, ByteSpan bytes) {
  const FileSizeLimit limit;
  while (!bytes.empty()) {
    const ssize_t n = ::write(descriptor, bytes.data(), bytes.size());
    if (n < 0 && errno == EINTR)
      continue;
    if (n <= 0)
      return false;
    bytes = bytes.subspan(static_cast<std::size_t>(n));
  }
  return true;
}

Result<Bytes> read_file(const std::string& path, std::size_t at_most) {
  const Descriptor file{::open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK)};
  if (file.fd < 0)
    return io_error(path, "open");
  struct stat info {};
  if (::fstat(file.fd, &info) != 0)
    return io_error(path, "stat");
  if (!S_ISREG(info.st_mode))
    return Status::error(Code::io, fmt::format("{}: not a regular file", path));
  Bytes bytes(std::min(static_cast<std::size_t>(info.st_size), at_most));
  std::size_t done = 0;
  while (done < bytes.size()) {
    const ssize_t n = ::read(file.fd, bytes.data() + done, bytes.size() - done);
    if (n < 0 && errno == EINTR)
      continue;
    if (n < 0)
      return io_error(path, "read");
    if (n == 0)
      break; // shortened while we read
    done += static_cast<std::size_t>(n);
  }
  bytes.resize(done);
  return bytes;
}

Status write_file_atomically(const std::string& path, std::initializer_list<ByteSpan> parts, unsigned mode) {
  // The rename would put a file in the place of a device or a pipe.
  struct stat info {};
  if (::stat(path.c_str(), &info) == 0 && !S_ISREG(info.st_mode))
    return Status::error(Code::io, fmt::format("{}: cannot write: not a regular file", path));
  std::string temporary = path + ".XXXXXX";
  const Descriptor file{::mkostemp(temporary.data(), O_CLOEXEC)};
  if (file.fd < 0)
    return io_error(path, "create a file beside it");
  bool written = true;
  for (const ByteSpan part : parts)
    written = written && write_all(file.fd, part);
  if (written && ::fchmod(file.fd, mode) == 0 && ::fsync(file.fd) == 0 &&
      ::rename(temporary.c_str(), path.c_str()) == 0)
    return {};
  Status status = io_error(path, "write");
  ::unlink(temporary.c_str());
  return status;
}

} // namespace kiln
