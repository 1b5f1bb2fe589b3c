#pragma once
#include <cstdint>
#include <string>

#include "cache/file_descriptor.h"
#include "cache/status.h"

namespace kiln {

/// Who may have written what a file says. What is looked at is the open file, not its name: nobody can swap it after.
enum class Ownership : std::uint8_t {
  any,    ///< anybody: the content is authenticated in another way
  file,   ///< the file belongs to the superuser or this process's user, and group and others may not write it
  path,   ///< likewise, it is no symbolic link, and lies in a TrustedDirectory
  secret, ///< the file belongs to this process's user, and group and others may neither read nor write it
};

/// A regular file, for reading. Never blocks, not even on a FIFO. Code::not_found, Code::io; the message says which
/// part of the path, its owner and mode, and what is needed.
Result<FileDescriptor> open_for_reading(const std::string& path, Ownership ownership);

/// Ok when the directory belongs to the superuser or this process's user, and group and others may not write it.
Status check_trusted_directory(const std::string& directory);

} // namespace kiln
