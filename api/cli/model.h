#pragma once
#include <cstdint>
#include <span>
#include <string>
#include <vector>

#include "cache/status.h"
#include "jit/desc.h"

namespace kiln::cli {

/// The kernels that a model's layers need, for each number of tokens: `path` is a Hugging Face config.json, `scheme` a
/// comma list of rows of the table of schemes: `w8a8` (linear layers by int8_mm with weights as [N][K]), `w8a8-dynamic`
/// (by int8_linear), `fp8-block` (by fp8_block_bmm on cuda:0), `attention`. Projections that hosts often fuse (q, k, v;
/// gate and up) are there in both forms. Each desc once.
/// Code::invalid_argument names file, line and field.
Result<std::vector<KernelDesc>> model_kernels(const std::string& path, const std::string& scheme,
                                              std::span<const std::int64_t> tokens);

} // namespace kiln::cli
