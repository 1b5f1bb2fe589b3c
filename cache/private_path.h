#pragma once
#include <string>

#include "cache/bytes.h"
#include "cache/status.h"

namespace kiln {

/// Directories and files that only this process's user may write. A symbolic link as the last component, another owner
/// (the superuser included) or a mode that lets others write is refused with Code::io; the message says which path, its
/// owner and mode, and what is needed. Linked parents are followed.

/// The path with every link in it resolved. With `create`, directories that are missing are made with mode 0700;
/// without, a missing one is Code::not_found.
Result<std::string> private_directory(const std::string& directory, bool create);

/// Ok when the file is there and is private; `secret` also refuses a file that others may read. Never opens the file:
/// closing a descriptor of a database would drop the locks that SQLite holds on it in this process (POSIX locks belong
/// to the process).
Status check_private_file(const std::string& path, bool secret);

/// Makes the file with mode 0600 and this content, whole or not at all. Ok too when it exists already, whatever is in
/// it: of two processes that make it at once both go on with the first one's.
Status create_private_file(const std::string& path, ByteSpan content);

} // namespace kiln
