#include "cache/key_file.h"

#include <fcntl.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <fmt/format.h>

#include "cache/private_path.h"
#include "cache/random.h"

namespace kiln {
namespace {

/// As many bytes of the file as fit into `out`.
Result<std::size_t> read_file(const std::string& path, std::span<std::uint8_t> out) {
  const int file = ::open(path.c_str(), O_RDONLY | O_NOFOLLOW | O_CLOEXEC);
  std::size_t size = 0;
  ssize_t count = file < 0 ? -1 : 1;
  while (count > 0 && size < out.size()) {
    count = ::read(file, out.data() + size, out.size() - size);
    if (count < 0 && errno == EINTR)
      count = 1;
    else if (count > 0)
      size += static_cast<std::size_t>(count);
  }
  const int error = errno;
  if (file >= 0)
    ::close(file);
  if (count < 0)
    return Status::error(Code::io, fmt::format("cannot read {}: {}", path, std::strerror(error)));
  return size;
}

} // namespace

Result<Digest> read_key_file(const std::string& directory, bool create) {
  const Result<std::string> checked = private_directory(directory, create);
  if (!checked)
    return checked.status();
  const std::string path = *checked + "/cache.key";

  Status status = check_private_file(path, true);
  if (status.code() == Code::not_found && create) {
    const Result<Digest> fresh = random_digest();
    if (!fresh)
      return fresh.status();
    if (status = create_private_file(path, fresh->bytes); !status)
      return status;
    status = check_private_file(path, true);
  }
  if (!status)
    return status;

  std::array<std::uint8_t, sizeof(Digest) + 1> content;
  const Result<std::size_t> size = read_file(path, content);
  if (!size)
    return size.status();
  Digest key;
  if (*size != key.bytes.size())
    return Status::error(
        Code::integrity,
        fmt::format("the key file {} has {} {} bytes; needed are {}: remove it, and a new one is made and the kernels "
                    "stored under the old one are compiled again",
                    path, *size > key.bytes.size() ? "at least" : "only", *size, key.bytes.size()));
  std::memcpy(key.bytes.data(), content.data(), key.bytes.size());
  return key;
}

} // namespace kiln
