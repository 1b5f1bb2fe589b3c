#pragma once
#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "api/cli/tensors.h"
#include "cache/status.h"

/// NumPy's `.npy` files (numpy.org, "numpy.lib.format"): versions 1.0 to 3.0, little-endian, C order.
namespace kiln::cli {

struct NpyArray {
  std::string descr; ///< one of those that npy_descr() gives
  std::vector<std::int64_t> shape;
  Buffer buffer;
};

/// How a dtype travels: `|i1`, `|u1` (also the bits of float8), `<i4`, `<f4`, `<f2`, `<u2` (the bits of bfloat16).
std::string_view npy_descr(Dtype dtype);

/// Distrusts the file. Code::invalid_argument with the path and what is wrong.
Result<NpyArray> read_npy(const std::string& path);

/// Writes beside `path` and renames, so that there is a whole file or none. Only a regular file is replaced. Code::io.
Status write_npy(const std::string& path, const Tensor& tensor);

} // namespace kiln::cli
