#include "jit/cuda/tensor_map.h"

#include <algorithm>
#include <bit>
#include <new>

#include <fmt/format.h>

#include "jit/cuda/driver.h"

namespace kiln::cuda {
namespace {

/// What cuTensorMapEncodeTiled allows, by the manual.
constexpr std::int64_t kMaxBox = 256;

struct Value {
  std::string_view name;
  std::int32_t TensorBox::*field;
  std::int64_t max;
};
constexpr Value kValues[] = {{"inner", &TensorBox::inner, kMaxBox},
                             {"rows", &TensorBox::rows, kMaxBox},
                             {"swizzle", &TensorBox::swizzle, 128},
                             {"l2_promotion", &TensorBox::l2_promotion, 256}};

/// CUtensorMapSwizzle and CUtensorMapL2promotion count in powers of two: from 32 and from 64 bytes on.
int power_from(std::int32_t first, std::int32_t bytes) {
  return bytes == 0 ? 0 : std::countr_zero(static_cast<unsigned>(bytes / first)) + 1;
}
bool is_power_from(std::int32_t first, std::int32_t bytes) {
  return bytes == 0 || (bytes >= first && std::has_single_bit(static_cast<unsigned>(bytes)));
}

/// Words by themselves, each with an odd factor of its own, so that the multiplications need not wait for one another:
/// three maps are looked up in every launch.
std::uint64_t hash_of(const auto& key) {
  std::uint64_t sum = 0, factor = 0x9E3779B97F4A7C15;
  for (const std::uint64_t word : key) {
    sum ^= std::rotl((word ^ word >> 29) * factor, 31);
    factor += 0xD6E8FEB86659FD92;
  }
  sum *= 0x9E3779B97F4A7C15;
  return sum ^ sum >> 32;
}

} // namespace

void TensorBox::append_to(std::string_view prefix, std::vector<std::pair<std::string, std::int64_t>>& values) const {
  for (const Value& value : kValues)
    values.emplace_back(fmt::format("{}_{}", prefix, value.name), this->*value.field);
}

Result<TensorBox> TensorBox::from(std::string_view prefix,
                                  std::span<const std::pair<std::string, std::int64_t>> values) {
  TensorBox box;
  for (const Value& value : kValues) {
    const std::string name = fmt::format("{}_{}", prefix, value.name);
    const auto is_it = [&](const auto& given) { return given.first == name; };
    const auto found = std::find_if(values.begin(), values.end(), is_it);
    if (found == values.end() || std::count_if(values.begin(), values.end(), is_it) != 1 || found->second < 0 ||
        found->second > value.max)
      return Status::error(Code::integrity,
                           fmt::format("a launch plan where {} is missing, repeated or not 0 to {}", name, value.max));
    box.*value.field = static_cast<std::int32_t>(found->second);
  }
  if ((box.inner == 0) != (box.rows == 0) || !is_power_from(32, box.swizzle) || !is_power_from(64, box.l2_promotion))
    return Status::error(Code::integrity, fmt::format("a launch plan with an impossible box {0}: {0}_inner={1}, "
                                                      "{0}_rows={2}, {0}_swizzle={3}, {0}_l2_promotion={4}",
                                                      prefix, box.inner, box.rows, box.swizzle, box.l2_promotion));
  return box;
}

TensorView matrix_view(std::uint64_t address, int element, std::int64_t element_bytes, std::int64_t columns,
                       std::int64_t rows, std::int64_t row_stride) {
  // The third stride of a single matrix is any that a map allows.
  const auto bytes = static_cast<std::uint64_t>(row_stride * element_bytes);
  return {.address = address,
          .element = element,
          .extents = {static_cast<std::uint64_t>(columns), static_cast<std::uint64_t>(rows), 1},
          .strides = {bytes, bytes}};
}

bool TensorMapCache::read(const Slot& slot, const Key& key, TensorMap& out) {
  const std::uint32_t before = slot.sequence.load(std::memory_order_acquire);
  if (before % 2 != 0)
    return false;
  // Acquire: whoever reads a word of a later writer also sees that writer's odd sequence below.
  for (std::size_t i = 0; i < key.size(); ++i)
    if (slot.key[i].load(std::memory_order_acquire) != key[i])
      return false;
  for (std::size_t i = 0; i < TensorMap::kWords; ++i)
    out.words[i] = slot.map[i].load(std::memory_order_acquire);
  return slot.sequence.load(std::memory_order_relaxed) == before;
}

void TensorMapCache::write(Slot& slot, const Key& key, const TensorMap& map) {
  std::uint32_t sequence = slot.sequence.load(std::memory_order_relaxed);
  if (sequence % 2 != 0 || !slot.sequence.compare_exchange_strong(sequence, sequence + 1, std::memory_order_acquire))
    return; // another thread writes: this map is made anew next time
  // Release: the odd sequence is seen before any of these words.
  for (std::size_t i = 0; i < key.size(); ++i)
    slot.key[i].store(key[i], std::memory_order_release);
  for (std::size_t i = 0; i < TensorMap::kWords; ++i)
    slot.map[i].store(map.words[i], std::memory_order_release);
  slot.sequence.store(sequence + 2, std::memory_order_release);
}

Status TensorMapCache::get(const Driver& driver, const TensorView& view, const TensorBox& box, TensorMap& out) {
  const Key key = {view.address,
                   view.extents[0],
                   view.extents[1],
                   view.extents[2],
                   view.strides[0],
                   view.strides[1],
                   static_cast<std::uint64_t>(view.element) << 32 | static_cast<std::uint64_t>(box.inner) << 16 |
                       static_cast<std::uint64_t>(box.rows),
                   static_cast<std::uint64_t>(box.swizzle) << 32 | static_cast<std::uint64_t>(box.l2_promotion)};
  Set* sets = sets_.load(std::memory_order_acquire);
  if (sets == nullptr)
    if (Set* const made = new (std::nothrow) Set[kSets]; made != nullptr) {
      if (sets_.compare_exchange_strong(sets, made))
        sets = made;
      else
        delete[] made;
    }
  Set* const set = sets == nullptr ? nullptr : &sets[hash_of(key) % kSets];
  if (set != nullptr)
    for (const Slot& slot : set->ways)
      if (read(slot, key, out))
        return {};
  const Api& api = driver.api();
  if (api.cuTensorMapEncodeTiled == nullptr)
    return Status::error(Code::unsupported, "this driver is older than CUDA 12.0: it makes no tensor maps");
  const std::uint32_t extents[] = {static_cast<std::uint32_t>(box.inner), static_cast<std::uint32_t>(box.rows), 1};
  constexpr std::uint32_t element_strides[] = {1, 1, 1};
  if (Status s =
          driver.status(api.cuTensorMapEncodeTiled(&out, view.element, 3, reinterpret_cast<void*>(view.address),
                                                   view.extents.data(), view.strides.data(), extents, element_strides,
                                                   CU_TENSOR_MAP_INTERLEAVE_NONE, power_from(32, box.swizzle),
                                                   power_from(64, box.l2_promotion), CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE),
                        "cuTensorMapEncodeTiled");
      !s)
    return s;
  if (set != nullptr)
    write(set->ways[set->next.fetch_add(1, std::memory_order_relaxed) % kWays], key, out);
  return {};
}

} // namespace kiln::cuda
