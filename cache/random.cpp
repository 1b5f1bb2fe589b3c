#include "cache/random.h"

#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <fmt/format.h>

namespace kiln {

Result<Digest> random_digest() {
  Digest out;
  if (::getentropy(out.bytes.data(), out.bytes.size()) != 0)
    return Status::error(Code::io, fmt::format("the system gives no random bytes: {}", std::strerror(errno)));
  return out;
}

} // namespace kiln
