#pragma once
#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "cache/status.h"
#include "jit/cuda/launch_plan.h"
#include "jit/cuda/tensor_map.h"
#include "jit/desc.h"
#include "jit/op.h"

/// int4_mm: Y[M,N] = X[M,K] · dequant(W), X and Y bf16, f32 sums; W has 4 bits a weight, w = (q − 8)·scale + zero with
/// q in 0…15 and bf16 scale and zero for each (group of K, n).
/// Typed view of its desc, the layouts of packed weights, and the interface between its driver and every kernel of it.
namespace kiln::int4_mm {

/// Order of the field table: KernelDesc::value[…].
enum Field : int { kM, kN, kK, kGroup, kInnerKTiles, kBatchInvariant, kFieldCount };

/// `group` of a desc by its value in the field table, and back.
inline constexpr std::int64_t kGroups[] = {32, 64, 128, 256};
/// `inner_k_tiles`: 0 for the form uint8 [N][K/2], else T of the tensor-core layout.
inline constexpr std::int64_t kInnerKTileCounts[] = {0, 2, 4, 8};

const OpSpec& op();
/// OpSpec::timing_problem, of GPU kernels; of an m of kAny with 1024 rows.
Result<std::unique_ptr<TimingProblem>> timing_problem(const KernelDesc& desc, Runtime& runtime);
/// `group` is 32, 64, 128 or 256; `inner_k_tiles` 0, 2, 4 or 8. Other values give a desc that check_desc refuses.
KernelDesc make_desc(std::int64_t m, std::int64_t n, std::int64_t k, std::int64_t group, bool batch_invariant = false,
                     std::int64_t inner_k_tiles = 0);
std::int64_t group_of(const KernelDesc& desc);         ///< 32, 64, 128 or 256
std::int64_t inner_k_tiles_of(const KernelDesc& desc); ///< 0, 2, 4 or 8

/// The classes of m, by their upper bounds: one kernel each per (N, K, group). m = 0 belongs to the first. With
/// batch_invariant=1 there is one class, kAny.
inline constexpr std::int64_t kMClasses[] = {1, 8, 16, 32, 64, 128, 256, kAny};

// ---------------------------------------------------------------- weights

/// Row n of the plain form: uint8 [N][K/2], the even k in the high nibble.
inline std::uint8_t plain_q(const std::uint8_t* w, std::int64_t k, std::int64_t row, std::int64_t column) {
  const std::uint8_t byte = w[row * (k / 2) + column / 2];
  return column % 2 == 0 ? byte >> 4 : byte & 15;
}

/// Between the plain form and the tensor-core layout int32 [N/8][K/(T·16)][32][T/2] (OPS.md), N a multiple of 8, K of
/// 16·T, T = inner_k_tiles ∈ {2, 4, 8}. Both hold N·K/2 bytes. Any alignment.
void plain_to_tensor_core(const std::uint8_t* plain, std::int64_t n, std::int64_t k, std::int64_t inner_k_tiles,
                          std::int32_t* packed);
void tensor_core_to_plain(const std::int32_t* packed, std::int64_t n, std::int64_t k, std::int64_t inner_k_tiles,
                          std::uint8_t* plain);

/// How weights, scales and zeros lie in a pack: one row of pack_layouts() each. A pack is one buffer, 256-byte aligned:
/// the weights, then at sz_offset() the scales and zeros.
struct PackLayout {
  std::string_view id;     ///< `plain`, …: in keys, never reused for another layout
  std::int32_t number = 0; ///< the same in a launch plan
  std::int64_t (*w_bytes)(std::int64_t n, std::int64_t k);
  std::int64_t (*sz_bytes)(std::int64_t n, std::int64_t k, std::int64_t group);
  /// Writes all of both parts, padding included. `w` is the plain form, `sz` bf16 bits [K/group][N][2] (scale, zero).
  /// Columns [n_begin, n_end) only, multiples of n_step (n_end may be n): callers share the work among threads.
  void (*pack)(const std::uint8_t* w, const std::uint16_t* sz, std::int64_t n, std::int64_t k, std::int64_t group,
               std::int64_t n_begin, std::int64_t n_end, std::uint8_t* w_out, std::uint8_t* sz_out);
  std::int64_t n_step = 8;

  std::int64_t sz_offset(std::int64_t n, std::int64_t k) const { return (w_bytes(n, k) + 255) / 256 * 256; }
  std::int64_t bytes(std::int64_t n, std::int64_t k, std::int64_t group) const {
    return (sz_offset(n, k) + sz_bytes(n, k, group) + 255) / 256 * 256;
  }
};
std::span<const PackLayout> pack_layouts();
/// Null when there is none.
const PackLayout* find_pack_layout(std::string_view id);
const PackLayout* find_pack_layout(std::int64_t number);

// ---------------------------------------------------------------- kernels

/// What a GPU kernel takes of X, and of Y where it stores through one, by tensor maps: coordinates {column, row, 0}.
struct Boxes {
  cuda::TensorBox x, y;
  bool operator==(const Boxes&) const = default;
};

/// Launch plan, version 1.
struct Plan {
  const PackLayout* layout = nullptr;
  std::optional<cuda::LaunchPlan> launch; ///< of GPU kernels
  std::optional<Boxes> boxes;             ///< of those with tensor maps

  std::vector<std::pair<std::string, std::int64_t>> values() const;
  static Result<Plan> from(std::span<const std::pair<std::string, std::int64_t>> values);
};

/// Parameters of a GPU kernel, in this order: addresses are u64 in device memory, all else u32. N, K and the group are
/// constants of the kernel. Entry `main` (and `reduce`, see LaunchPlan). x and y are 16-byte aligned, and ldx and ldy
/// multiples of 8 (the driver checks), the pack and the workspace 256-byte aligned. A kernel with boxes has two maps
/// before these; one without a box is zero.
struct GpuParameters {
  std::uint64_t x, w, sz, y, workspace;
  std::uint32_t m, ldx, ldy; ///< ldx, ldy in elements
  static constexpr int kCount = 8;
};

/// One call of a CPU kernel: all of Y. Any alignment.
struct Call {
  const std::uint16_t* x; ///< bf16 bits
  std::int64_t ldx;
  const std::uint8_t* w;  ///< the pack's weights
  const std::uint8_t* sz; ///< the pack's scales and zeros
  std::uint16_t* y;
  std::int64_t ldy;
  std::int64_t m, n, k, group;
  std::int64_t n_begin, n_end; ///< columns of this call
};
using Entry = void (*)(const Call*);

/// What the op is by definition: float64 sums, rounded to bf16 once. `w` in plain form.
void reference(std::int64_t m, std::int64_t n, std::int64_t k, std::int64_t group, const std::uint16_t* x,
               std::int64_t ldx, const std::uint8_t* w, const std::uint16_t* sz, std::uint16_t* y, std::int64_t ldy);

} // namespace kiln::int4_mm
