#include "api/cli/tensors.h"

#include <algorithm>
#include <charconv>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <random>

#include <fmt/format.h>
#include <fmt/ranges.h>

#include "jit/bf16.h"
#include "jit/f16.h"

namespace kiln::cli {
namespace {

constexpr std::uint64_t kAlignment = 64;

template <class T> double value_of(T element) {
  return static_cast<double>(element);
}
/// bfloat16 travels as its bits.
struct Bf16 {
  std::uint16_t bits;
};
double value_of(Bf16 element) {
  return static_cast<double>(float_of_bf16(element.bits));
}

struct F16 {
  std::uint16_t bits;
};
double value_of(F16 element) {
  return static_cast<double>(float_of_f16(element.bits));
}

/// Infinite where one side is not a number and the other is.
template <class T> Difference difference_of(const Tensor& actual, const Tensor& expected) {
  const T* a = actual.as<T>();
  const T* e = expected.as<T>();
  double max_abs = 0, worst_element = 0, squares_of_difference = 0, squares_of_expected = 0;
  for (std::uint64_t i = 0; i < actual.buffer.size() / sizeof(T); ++i) {
    const double there = value_of(a[i]), wanted = value_of(e[i]);
    if (there == wanted || (std::isnan(there) && std::isnan(wanted)))
      squares_of_expected += std::isfinite(wanted) ? wanted * wanted : 0;
    else if (!std::isfinite(there) || !std::isfinite(wanted))
      max_abs = worst_element = squares_of_difference = std::numeric_limits<double>::infinity();
    else {
      const double difference = there - wanted;
      max_abs = std::max(max_abs, std::abs(difference));
      worst_element = std::max(worst_element, std::abs(difference) / std::max(1.0, std::abs(wanted)));
      squares_of_difference += difference * difference;
      squares_of_expected += wanted * wanted;
    }
  }
  const double scale = squares_of_expected == 0 ? 1 : std::sqrt(squares_of_expected);
  return {max_abs, std::sqrt(squares_of_difference) / scale, worst_element};
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
  // Of the bits: uniform_real_distribution differs between libraries.
  const auto in_unit = [&] {
    return static_cast<float>(static_cast<std::int64_t>(random() >> 39) - (1 << 24)) / (1 << 24);
  };
  if (tensor.dtype == Dtype::bf16 || tensor.dtype == Dtype::f16 || tensor.dtype == Dtype::f32) {
    for (std::uint64_t i = 0; i < tensor.buffer.size() / size_of(tensor.dtype); ++i)
      if (tensor.dtype == Dtype::bf16)
        tensor.as<std::uint16_t>()[i] = bf16_of_float(in_unit());
      else if (tensor.dtype == Dtype::f16)
        tensor.as<std::uint16_t>()[i] = f16_of_float(in_unit());
      else
        tensor.as<float>()[i] = in_unit();
    return;
  }
  if (tensor.dtype == Dtype::e4m3 || tensor.dtype == Dtype::e5m2) {
    // Bits of a binary16, towards zero: e5m2 is its high byte, e4m3's exponent is less by 8.
    const bool is_e5m2 = tensor.dtype == Dtype::e5m2;
    for (std::uint64_t i = 0; i < tensor.buffer.size(); ++i) {
      const std::uint16_t bits = f16_of_float(is_e5m2 ? in_unit() : in_unit() * 0x1p-8f);
      tensor.as<std::uint8_t>()[i] =
          static_cast<std::uint8_t>(is_e5m2 ? bits >> 8 : (bits >> 8 & 0x80) | (bits & 0x3FFF) >> 7);
    }
    return;
  }
  for (std::uint64_t i = 0; i < tensor.buffer.size(); i += sizeof(std::uint64_t)) {
    const std::uint64_t bits = random();
    std::memcpy(tensor.buffer.data() + i, &bits, std::min<std::uint64_t>(sizeof bits, tensor.buffer.size() - i));
  }
}

Status fill(Tensor& tensor, std::string_view number) {
  const auto each = [&](auto value, std::string_view allowed) -> Status {
    const auto [end, error] = std::from_chars(number.data(), number.data() + number.size(), value);
    if (error != std::errc() || end != number.data() + number.size())
      return Status::error(Code::invalid_argument, fmt::format("allowed is {}, random or @file.npy", allowed));
    std::fill_n(tensor.as<decltype(value)>(), tensor.buffer.size() / sizeof value, value);
    return {};
  };
  if (tensor.dtype == Dtype::f32)
    return each(float{}, "a number");
  return each(std::int32_t{}, "a 32-bit integer");
}

Difference difference(const Tensor& actual, const Tensor& expected) {
  switch (actual.dtype) {
  case Dtype::u8:
    return difference_of<std::uint8_t>(actual, expected);
  case Dtype::s8:
    return difference_of<std::int8_t>(actual, expected);
  case Dtype::bf16:
    return difference_of<Bf16>(actual, expected);
  case Dtype::f16:
    return difference_of<F16>(actual, expected);
  case Dtype::f32:
    return difference_of<float>(actual, expected);
  default:
    return difference_of<std::int32_t>(actual, expected);
  }
}

} // namespace kiln::cli
