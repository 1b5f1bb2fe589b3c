#pragma once
#include <string>

#include "cache/digest.h"
#include "cache/status.h"

namespace kiln {

/// The secret that authenticates this user's rows: 32 random bytes in `DIRECTORY/cache.key`, mode 0600. With `create`,
/// directory and file are made when missing; processes that do so at once all get the same key. Without, a missing one
/// is Code::not_found. A file that others may have written or read, and a place where they may have put it, are refused
/// (see trusted_directory.h); a file of another size is Code::integrity.
Result<Digest> read_key_file(const std::string& directory, bool create);

} // namespace kiln
