#include "cache/key_file.h"

#include <algorithm>

#include <fmt/format.h>

#include "cache/random.h"
#include "cache/trusted_directory.h"

namespace kiln {

Result<Digest> read_key_file(const std::string& directory, bool create) {
  constexpr const char* name = "cache.key";
  const Result<TrustedDirectory> place =
      TrustedDirectory::open(directory, TrustedDirectory::Owner::user,
                             create ? TrustedDirectory::Missing::create : TrustedDirectory::Missing::leave);
  if (!place)
    return place.status();
  const auto open = [&] { return place->open_file(name, TrustedDirectory::Privacy::secret); };
  Result<FileDescriptor> file = open();
  if (!file && file.status().code() == Code::not_found && create) {
    const Result<Digest> fresh = random_digest();
    if (!fresh)
      return fresh.status();
    if (Status status = place->create_file(name, fresh->bytes); !status)
      return status;
    file = open();
  }
  if (!file)
    return file.status();

  const std::string path = place->path_of(name);
  Digest key;
  if (const std::uint64_t size = size_of(*file); size != key.bytes.size())
    return Status::error(
        Code::integrity,
        fmt::format("the key file {} has {} bytes; needed are {}: remove it, and a new one is made and the "
                    "kernels stored under the old one are compiled again",
                    path, size, key.bytes.size()));
  const Result<Bytes> content = read_at(*file, path, 0, key.bytes.size());
  if (!content)
    return content.status();
  std::copy(content->begin(), content->end(), key.bytes.begin());
  return key;
}

} // namespace kiln
