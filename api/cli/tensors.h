#pragma once
#include <cstdint>
#include <memory>
#include <string_view>
#include <vector>

#include "cache/status.h"
#include "jit/op.h"

namespace kiln::cli {

/// 64-byte-aligned bytes.
class Buffer {
public:
  Buffer() = default;
  /// Code::out_of_memory with the size.
  static Result<Buffer> allocate(std::uint64_t bytes);
  std::uint8_t* data() { return data_.get(); }
  const std::uint8_t* data() const { return data_.get(); }
  std::uint64_t size() const { return size_; }

private:
  struct Free {
    void operator()(std::uint8_t* p) const;
  };
  std::unique_ptr<std::uint8_t[], Free> data_;
  std::uint64_t size_ = 0;
};

/// Row-major and dense.
struct Tensor {
  Dtype dtype;
  std::vector<std::int64_t> shape;
  Buffer buffer;

  template <class T> T* as() { return reinterpret_cast<T*>(buffer.data()); }
  template <class T> const T* as() const { return reinterpret_cast<const T*>(buffer.data()); }
};

/// A number for every element. Code::invalid_argument unless the type (s32, f32) can hold it.
Status fill(Tensor& tensor, std::string_view number);

/// `[3, 4]`
std::string shape_text(const std::vector<std::int64_t>& shape);
/// Bytes of a dense tensor; Code::invalid_argument when an extent is negative or the product overflows.
Result<std::uint64_t> bytes_of(const std::vector<std::int64_t>& shape, std::size_t element_bytes);
/// Its content is not initialised.
Result<Tensor> make_tensor(Dtype dtype, std::vector<std::int64_t> shape);
/// Integers: every bit pattern of the type is equally likely. Floating point: uniform in [−1, 1). The same seed gives
/// the same bytes everywhere.
void fill_random(Tensor& tensor, std::uint64_t seed);

struct Difference {
  double max_abs = 0; ///< largest |actual − expected|
  double relative = 0; ///< ‖actual − expected‖ / ‖expected‖, or ‖actual − expected‖ where expected is all zero
  double element = 0; ///< largest |actual − expected| / max(1, |expected|)
};
/// Of two tensors of one shape and type.
Difference difference(const Tensor& actual, const Tensor& expected);

} // namespace kiln::cli
