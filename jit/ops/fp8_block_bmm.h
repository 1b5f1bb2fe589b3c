#pragma once
#include <array>
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

/// fp8_block_bmm: Z[b] = Σ_kb (X[b,:,kb] · Y[b,:,kb]ᵀ) · xs[b,m,kb] · ys[b,⌊n/128⌋,kb] over blocks kb of 128 of K: a
/// batched product of 8-bit floats whose scales come in blocks of 128 × 128 (of the weights, Y) and 1 × 128 (of the
/// activations, X). Each block's sum of products is promoted to f32 before it is scaled.
/// Typed view of its desc, and the interface between its driver and every kernel of it.
namespace kiln::fp8_block_bmm {

/// Order of the field table: KernelDesc::value[…].
enum Field : int { kB, kM, kN, kK, kXDtype, kYDtype, kZDtype, kBatchInvariant, kFieldCount };

/// Values of x_dtype and y_dtype, and of z_dtype.
enum class Float8 : std::uint8_t { e4m3, e5m2 };
enum class ZDtype : std::uint8_t { bf16, f16, f32 };
inline constexpr std::int64_t bytes_of(ZDtype type) {
  return type == ZDtype::f32 ? 4 : 2;
}

/// Of K and of N, for one scale.
inline constexpr std::int64_t kBlock = 128;
inline constexpr std::int64_t blocks_of(std::int64_t size) {
  return (size + kBlock - 1) / kBlock;
}

const OpSpec& op();
/// OpSpec::timing_problem; of an m of kAny with 4096 rows.
Result<std::unique_ptr<TimingProblem>> timing_problem(const KernelDesc& desc, Runtime& runtime);
KernelDesc make_desc(std::int64_t b, std::int64_t m, std::int64_t n, std::int64_t k, Float8 x = Float8::e4m3,
                     Float8 y = Float8::e4m3, ZDtype z = ZDtype::bf16, bool batch_invariant = false);
inline Float8 x_of(const KernelDesc& desc) {
  return static_cast<Float8>(desc.value[kXDtype]);
}
inline Float8 y_of(const KernelDesc& desc) {
  return static_cast<Float8>(desc.value[kYDtype]);
}
inline ZDtype z_of(const KernelDesc& desc) {
  return static_cast<ZDtype>(desc.value[kZDtype]);
}

/// The classes of m, by their upper bounds: one kernel each per (b, n, k). With batch_invariant=1 there is one class,
/// kAny.
inline constexpr std::int64_t kMClasses[] = {8, 16, 32, 64, 128, 256, 512, kAny};

// ---------------------------------------------------------------- kernels

/// What a GPU kernel takes of X, Y and Z through the tensor memory accelerator. Coordinates of all three are
/// {column, row, b}, columns the innermost.
struct Boxes {
  cuda::TensorBox x, y, z;
  bool operator==(const Boxes&) const = default;
};

/// Launch plan, version 1.
struct Plan {
  struct Gpu {
    cuda::LaunchPlan launch;
    Boxes boxes;
    bool operator==(const Gpu&) const = default;
  };
  std::optional<Gpu> gpu; ///< of GPU kernels

  std::vector<std::pair<std::string, std::int64_t>> values() const;
  static Result<Plan> from(std::span<const std::pair<std::string, std::int64_t>> values);
};

/// The tensors of one call. Strides are in elements; Y and ys are contiguous.
struct Tensors {
  std::int64_t m = 0;                                             ///< rows of this call
  const std::uint8_t* x = nullptr;                                ///< [b][m][k]
  std::int64_t x_stride_b = 0, ldx = 0;                           ///< any from 0 on: rows may overlap
  const std::uint8_t* y = nullptr;                                ///< [b][n][k]
  const float* xs = nullptr;                                      ///< [b][m][⌈k/128⌉]
  std::int64_t xs_stride_b = 0, xs_stride_m = 0, xs_stride_k = 0; ///< any from 0 on
  const float* ys = nullptr;                                      ///< [b][⌈n/128⌉][⌈k/128⌉]
  void* z = nullptr;                                              ///< [b][m][n]
  std::int64_t z_stride_b = 0, ldz = 0;
};

/// Parameters of a GPU kernel, in this order: three maps, of which one without a box is zero, addresses and strides of
/// batches (u64), the rest u32. B, N, K and the types are constants of the kernel. Entry `main`. Strides in elements.
/// The driver checks: x, y and z and their rows are 16-byte aligned, xs and ys 4-byte; strides of rows, and both of xs,
/// are below 2^31.
struct GpuParameters {
  cuda::TensorMap x_map, y_map, z_map;
  std::uint64_t x, y, xs, ys, z, workspace;
  std::uint64_t x_stride_b, z_stride_b, xs_stride_b;
  std::uint32_t m, ldx, ldz, xs_stride_m, xs_stride_k;
  static constexpr int kCount = 17;
  std::array<void*, kCount> pointers(); ///< to each, in order
};

/// One call of a CPU kernel: rows and columns of one b.
struct Call {
  const KernelDesc* desc;
  Tensors tensors;
  std::int64_t b, n_begin, n_end;
};
using Entry = void (*)(const Call*);

/// The op by definition: exact sums of a block, rounded to f32 each, their scaled sum in float64, rounded once. A NaN
/// is 0x7FC00000 (f32), 0x7FC0 (bf16) or 0x7E00 (f16). Allocates nothing. Needs the default floating-point control
/// state.
void reference(const Call& call);
/// All of Z.
void reference(const KernelDesc& desc, const Tensors& tensors);

} // namespace kiln::fp8_block_bmm
