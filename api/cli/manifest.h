#pragma once
#include <string>
#include <vector>

#include "cache/status.h"
#include "jit/desc.h"

namespace kiln::cli {

/// The kernels that a manifest asks for (api/doc/manifest.md), in its order. Code::invalid_argument names file, line
/// and field.
Result<std::vector<KernelDesc>> read_manifest(const std::string& path);

} // namespace kiln::cli
