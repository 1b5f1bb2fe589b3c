#pragma once
#include <array>
#include <atomic>
#include <cstdint>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "cache/status.h"
#include "jit/cuda/api.h"

namespace kiln::cuda {

class Driver;

/// What a kernel takes of a tensor through the tensor memory accelerator (sm_90 and later) at once: a part of a launch
/// plan. Without `inner` it takes nothing that way.
struct TensorBox {
  std::int32_t inner = 0, rows = 0; ///< elements of the innermost dimension, and of the next: at most 256 each
  std::int32_t swizzle = 0;         ///< bytes: 0, 32, 64 or 128
  std::int32_t l2_promotion = 256;  ///< bytes: 0, 64, 128 or 256
  bool operator==(const TensorBox&) const = default;

  /// As `x_inner`, `x_rows`, … for the prefix `x`.
  void append_to(std::string_view prefix, std::vector<std::pair<std::string, std::int64_t>>& values) const;
  /// Takes its own values and leaves the others. Code::integrity when one is missing, repeated or impossible.
  static Result<TensorBox> from(std::string_view prefix, std::span<const std::pair<std::string, std::int64_t>> values);
};

/// The tensor that a map is for, in device memory: rank 3, innermost dimension first, contiguous there.
struct TensorView {
  std::uint64_t address = 0;                   ///< a multiple of 16
  int element = CU_TENSOR_MAP_DATA_TYPE_UINT8; ///< CUtensorMapDataType
  std::array<std::uint64_t, 3> extents{};      ///< 1 to 2^32 elements
  std::array<std::uint64_t, 2> strides{};      ///< bytes, of the second and the third: multiples of 16 below 2^40
};

/// Rows of `columns` elements, `row_stride` elements apart.
TensorView matrix_view(std::uint64_t address, int element, std::int64_t element_bytes, std::int64_t columns,
                       std::int64_t rows, std::int64_t row_stride);

/// Maps made by cuTensorMapEncodeTiled (CUDA Driver API, "Tensor Map Object Management"), kept by everything that goes
/// into them: making one takes about as long as the rest of a launch. Bounded; without a lock, from any threads.
class TensorMapCache {
public:
  /// A context is current. Out-of-bounds elements read as zero and are not written. Code::unsupported with a driver
  /// older than CUDA 12.0.
  Status get(const Driver& driver, const TensorView& view, const TensorBox& box, TensorMap& out);

private:
  /// A view and a box, as numbers.
  using Key = std::array<std::uint64_t, 8>;
  /// A sequence lock: odd while one thread writes, which others then pass by. Every word is an atomic of its own, so
  /// that a reader who is too late reads nonsense, notices, and does not race.
  struct Slot {
    std::atomic<std::uint32_t> sequence{0};
    std::array<std::atomic<std::uint64_t>, std::tuple_size_v<Key>> key{};
    std::array<std::atomic<std::uint64_t>, TensorMap::kWords> map{};
  };
  static constexpr std::size_t kSets = 512, kWays = 4;
  struct Set {
    std::array<Slot, kWays> ways;
    std::atomic<std::uint32_t> next{0}; ///< to be replaced
  };
  static bool read(const Slot& slot, const Key& key, TensorMap& out);
  static void write(Slot& slot, const Key& key, const TensorMap& map);

  std::atomic<Set*> sets_{nullptr}; ///< made by the first call

public:
  TensorMapCache() = default;
  TensorMapCache(const TensorMapCache&) = delete;
  TensorMapCache& operator=(const TensorMapCache&) = delete;
  ~TensorMapCache() { delete[] sets_.load(); }
};

} // namespace kiln::cuda
