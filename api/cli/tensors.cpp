#include "api/cli/tensors.h"

#include <cmath>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <random>

#include <fmt/format.h>
#include <fmt/ranges.h>

namespace kiln::cli {
namespace {

constexpr std::uint64_t kAlignment = 64;

template <class T> Difference integer_difference(const Tensor& actual, const Tensor& expected) {
  const T* a = actual.as<T>();
  const T* e = expected.as<T>();
  double max_abs = 0, squares_of_difference = 0, squares_of_expected = 0;
  for (std::uint64_t i = 0; i < actual.buffer.size() / sizeof(T); ++i) {
    const double difference = static_cast<double>(a[i]) - static_cast<double>(e[i]);
    max_abs = std::max(max_abs, std::abs(difference));
    squares_of_difference += difference * difference;
    squares_of_expected += static_cast<double>(e[i]) * static_cast<double>(e[i]);
  }
  const double scale = squares_of_expected == 0 ? 1 : std::sqrt(squares_of_expected);
  return {max_abs, std::sqrt(squares_of_difference) / scale};
}

} // namespace

void Buffer::Free::operator()(std::uint8_t* p) const {
  std::free(p);
}

Result<Buffer> Buffer::allocate(std::uint64_t bytes) {
  Buffer buffer;
  if (bytes <= std::numeric_limits<std::size_t>::max() - kAlignment) {
    const std::uint64_t rounded = (std::max<std::uint64_t>(bytes, 1) + kAlignment - 1) / kAlignment * kAlignment;
    buffer.data_.reset(static_cast<std::uint8_t*>(std::aligned_alloc(kAlignment, rounded)));
  }
  if (buffer.data_ == nullptr)
    return Status::error(Code::out_of_memory, fmt::format("no memory for {} bytes", bytes));
  buffer.size_ = bytes;
  return buffer;
}

std::string shape_text(const std::vector<std::int64_t>& shape) {
  return fmt::format("[{}]", fmt::join(shape, ", "));
}

Result<std::uint64_t> bytes_of(const std::vector<std::int64_t>& shape, std::size_t element_bytes) {
  std::uint64_t bytes = element_bytes;
  bool fits = true;
  for (const std::int64_t extent : shape) {
    fits = fits && extent >= 0 && !__builtin_mul_overflow(bytes, static_cast<std::uint64_t>(extent), &bytes);
  }
  if (!fits || bytes > static_cast<std::uint64_t>(std::numeric_limits<std::int64_t>::max()))
    return Status::error(Code::invalid_argument,
                         fmt::format("shape {} is impossible: allowed are extents ≥ 0 and less than 2^63 bytes in all",
                                     shape_text(shape)));
  return bytes;
}

Result<Tensor> make_tensor(Dtype dtype, std::vector<std::int64_t> shape) {
  const Result<std::uint64_t> bytes = bytes_of(shape, size_of(dtype));
  if (!bytes)
    return bytes.status();
  Result<Buffer> buffer = Buffer::allocate(*bytes);
  if (!buffer)
    return buffer.status();
  return Tensor{dtype, std::move(shape), std::move(*buffer)};
}

void fill_random(Tensor& tensor, std::uint64_t seed) {
  std::mt19937_64 random(seed);
  for (std::uint64_t i = 0; i < tensor.buffer.size(); i += sizeof(std::uint64_t)) {
    const std::uint64_t bits = random();
    std::memcpy(tensor.buffer.data() + i, &bits, std::min<std::uint64_t>(sizeof bits, tensor.buffer.size() - i));
  }
}

Difference difference(const Tensor& actual, const Tensor& expected) {
  switch (size_of(actual.dtype)) {
  case 1:
    return actual.dtype == Dtype::u8 ? integer_difference<std::uint8_t>(actual, expected)
                                     : integer_difference<std::int8_t>(actual, expected);
  default:
    return integer_difference<std::int32_t>(actual, expected);
  }
}

} // namespace kiln::cli
