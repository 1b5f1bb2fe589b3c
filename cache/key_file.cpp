#include "cache/key_file.h"

#include <algorithm>
#include <fmt/format.h>

#include "cache/file.h"
#include "cache/private_path.h"
#include "cache/random.h"

namespace kiln {

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

  const Result<Bytes> content = read_file(path);
  if (!content)
    return content.status();
  Digest key;
  if (content->size() != key.bytes.size())
    return Status::error(
        Code::integrity,
        fmt::format("the key file {} has {} bytes; needed are {}: remove it, and a new one is made and the "
                    "kernels stored under the old one are compiled again",
                    path, content->size(), key.bytes.size()));
  std::copy(content->begin(), content->end(), key.bytes.begin());
  return key;
}

} // namespace kiln
