#pragma once
#include <cstdint>
#include <initializer_list>
#include <string>

#include "cache/bytes.h"
#include "cache/status.h"

namespace kiln {

/// The whole of a regular file, or its first `at_most` bytes. Code::not_found, Code::io (names path and cause).
Result<Bytes> read_file(const std::string& path, std::size_t at_most = SIZE_MAX);

/// Writes the parts to a new file beside `path` (with exactly this mode), syncs, and renames it to `path`: a reader
/// sees the old file or the new one, whole. Code::io names path and cause; nothing is left behind.
Status write_file_atomically(const std::string& path, std::initializer_list<ByteSpan> parts, unsigned mode = 0600);

/// Writes all of `bytes` to a descriptor; false, with errno, when it cannot (EFBIG beyond the limit on file sizes: no
/// signal).
bool write_all(int descriptor, ByteSpan bytes);

} // namespace kiln
