#pragma once
#include <cstdint>
#include <string>
#include <string_view>

#include "cache/bytes.h"
#include "cache/status.h"

namespace kiln {

/// A file of packed weights: magic, version, op, layout, n, k, BLAKE2b digest of all, data.
struct PackFile {
  std::string layout; ///< id in the op's own terms
  std::int64_t n = 0, k = 0;
  Bytes data;
};

/// A new file, renamed to `path`. Code::not_found, Code::io.
Status save_pack_file(const std::string& path, std::string_view op, std::string_view layout, std::int64_t n,
                      std::int64_t k, ByteSpan data);
/// Code::not_found, Code::io; Code::integrity when it is damaged, of another format or op, or n or k is not 0 to 2^31
/// − 1. `data_bytes` tells from layout, n and k how much data there must be, or a negative number when there is no such
/// layout.
Result<PackFile> load_pack_file(const std::string& path, std::string_view op,
                                std::int64_t (*data_bytes)(std::string_view layout, std::int64_t n, std::int64_t k));

} // namespace kiln
