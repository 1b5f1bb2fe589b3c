#pragma once
#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "cache/bytes.h"
#include "cache/status.h"
#include "jit/cuda/launch_plan.h"
#include "jit/cuda/tensor_map.h"
#include "jit/desc.h"
#include "jit/op.h"

/// int8_mm: C[M,N] = A[M,K] · B[K,N], s8 or u8, exact s32 sums that wrap, and an epilogue (jit/ops/int8_mm_epilogue.h).
/// Typed view of its desc, the layout of packed weights, and the interface between its drivers and every kernel of it.
namespace kiln::int8_mm {

/// Order of the field table: KernelDesc::value[…].
enum Field : int {
  kM,
  kN,
  kK,
  kBLayout,
  kADtype,
  kCDtype,
  kRescale,
  kRescalePer,
  kBDtype,
  kAZp,
  kBZp,
  kBias,
  kRounding,
  kAct,
  kCZp,
  kClamp,
  kFieldCount
};
enum class BLayout : std::int64_t { kn, nk };
enum class ADtype : std::int64_t { s8, u8 };
enum class BDtype : std::int64_t { s8, u8 };
enum class CDtype : std::int64_t { s32, s8, bf16, u8, f32, f16 };
// Stages of the epilogue (OPS.md): absent, one value, or one for each row or column.
enum class AZp : std::int64_t { none, tensor, row };
enum class BZp : std::int64_t { none, tensor, channel };
enum class Rescale : std::int64_t { none, scale, q_scale, shift_right, shift_left };
enum class RescalePer : std::int64_t { tensor, channel };
/// Where v / 2^s lies half way between two integers.
enum class Rounding : std::int64_t { zero, away, minus_inf, plus_inf, even, odd };
enum class Act : std::int64_t { none, relu, leaky_relu };

const OpSpec& op();
/// OpSpec::timing_problem, of GPU kernels; of an m of kAny with 4096 rows.
Result<std::unique_ptr<TimingProblem>> timing_problem(const KernelDesc& desc, Runtime& runtime);
KernelDesc make_desc(std::int64_t m, std::int64_t n, std::int64_t k, BLayout b_layout = BLayout::nk);

/// The classes of m, by their upper bounds: one kernel each per (N, K). m = 0 belongs to the first.
inline constexpr std::int64_t kMClasses[] = {1, 2, 4, 8, 16, 32, kAny};
/// Likewise of GPU kernels, whose tiles are 16 rows at least.
inline constexpr std::int64_t kGpuMClasses[] = {16, 32, 64, 128, 256, 512, 1024, kAny};

/// How B lies in a pack: b[⌈N/n_block⌉][⌈K/k_block⌉][n_block][k_block] s8, zero beyond N and K, each n-panel and the
/// whole 64-byte aligned, followed by Σ_k b[k,n] as s32 [⌈N/n_block⌉·n_block].
struct PackLayout {
  std::int32_t n_block = 16, k_block = 4;
  bool operator==(const PackLayout&) const = default;

  std::string id() const; ///< `n16k4`
  static Result<PackLayout> parse(std::string_view id);
  std::int64_t panels(std::int64_t n) const { return (n + n_block - 1) / n_block; }
  std::int64_t k_padded(std::int64_t k) const { return (k + k_block - 1) / k_block * k_block; }
  /// Bytes from one n-panel to the next.
  std::int64_t panel_bytes(std::int64_t k) const { return (k_padded(k) * n_block + 63) / 64 * 64; }
  std::int64_t sums_offset(std::int64_t n, std::int64_t k) const { return panels(n) * panel_bytes(k); }
  std::int64_t bytes(std::int64_t n, std::int64_t k) const {
    return sums_offset(n, k) + (panels(n) * n_block * 4 + 63) / 64 * 64;
  }
};

/// Packs panels [panel_begin, panel_end) of B: `panels_out` receives them one after another, `sums_out` their n_block
/// sums each. `ldb` ≥ N (kn) or ≥ K (nk). A u8 element b is packed, and summed, as b − 128. Vectorised plain C++;
/// writes nothing else.
void pack_panels(PackLayout layout, const void* b, std::int64_t ldb, BLayout b_layout, std::int64_t n, std::int64_t k,
                 std::int64_t panel_begin, std::int64_t panel_end, std::int8_t* panels_out, std::int32_t* sums_out,
                 BDtype b_dtype = BDtype::s8);

/// Code::unsupported for k above `max_k`.
Status check_k(const KernelDesc& desc, std::int64_t max_k);
/// What kernels without an epilogue serve: Code::unsupported, naming the field, for anything but s8 · s8 → s32 without
/// a stage, or k above `max_k`.
Status check_plain(const KernelDesc& desc, std::int64_t max_k);

struct Plan;
struct Epilogue;
struct EpilogueValues;
struct Scalars;

/// One call of a kernel entry: m rows × n columns of C. Runs on one thread; kernels read nothing outside A's m rows of
/// K elements, the pack's panels of that range and its sums, and write nothing outside C's m × n elements and the
/// workspace. N and K are constants of the kernel; n is what the driver gives this call.
struct Call {
  const std::int8_t* a;       ///< of a_dtype; any alignment
  std::int64_t lda;           ///< elements
  const std::int8_t* b;       ///< the first panel of the range
  const std::int32_t* b_sums; ///< of its first column
  void* c;                    ///< of c_dtype: its first column, row 0; aligned to its elements
  std::int64_t ldc;           ///< elements
  std::int64_t m;             ///< in the kernel's range of m, > 0
  std::int64_t n;             ///< columns to compute, > 0; a multiple of plan.n_step unless the range ends at N
  void* workspace;            ///< 64-byte aligned, plan.workspace_bytes(m); private to the call
  // With an epilogue, else null:
  const std::int32_t*
      terms; ///< TermsLayout: of its first panel; anything in panels behind N's up to a multiple of n_step
  const Scalars* scalars;
  const std::int32_t* a_zp; ///< [m], with a_zp=row
  // What generated code has as constants, for `reference`, and what it reads instead of terms:
  std::int64_t k;
  const Plan* plan;
  const Epilogue* epilogue;
  const EpilogueValues* values;
  std::int64_t row, column; ///< of the whole product, that the call begins at
};
using Entry = void (*)(const Call*);

/// What a GPU kernel takes of A and B by tensor maps: coordinates {k, row, 0}.
struct Boxes {
  cuda::TensorBox a, b;
  bool operator==(const Boxes&) const = default;
};

/// Launch plan, version 1: what the driver must know about a kernel. Stored with the code object as named integers.
struct Plan {
  PackLayout layout;
  std::int32_t m_step = 1;  ///< rows that a register tile handles at best: the driver cuts m at multiples of it
  std::int32_t n_step = 16; ///< columns likewise; a multiple of layout.n_block
  std::int64_t workspace_fixed = 0, workspace_per_row = 0;
  std::int32_t a_shift = 0; ///< what the kernel adds to A's elements: 128 for s8 as u8, −128 for u8 as s8, 0
  std::int64_t workspace_bytes(std::int64_t m) const { return workspace_fixed + m * workspace_per_row; }
  /// Of GPU kernels; then the steps and workspaces above say nothing.
  std::optional<cuda::LaunchPlan> launch;
  std::optional<Boxes> boxes; ///< of those with tensor maps

  std::vector<std::pair<std::string, std::int64_t>> values() const;
  static Result<Plan> from(std::span<const std::pair<std::string, std::int64_t>> values);
};

/// How GPU kernels read B: a pack of one column a panel, which is row-major [N][ldb] with ldb =
/// kGpuLayout.panel_bytes(K), zero from K on.
inline constexpr PackLayout kGpuLayout = {.n_block = 1, .k_block = 8};

/// Parameters of a GPU kernel, in this order: addresses are u64 in device memory, all else u32. N and K are constants
/// of the kernel. Entry `main` (and `reduce`, see LaunchPlan). a, b, and rows of both, are 16-byte aligned (the driver
/// checks); c is aligned to its elements. B is [N][ldb] from a pack or raw: bytes from K on are zero in a pack, and
/// anything in a raw B, as those of A are. A kernel with boxes has the maps of A and B before these.
struct GpuParameters {
  std::uint64_t a, b, c, scale; ///< scale: f32 [N] or one f32; 0 without the stage
  std::uint64_t workspace;
  std::uint32_t m, lda, ldb, ldc; ///< strides in elements
  static constexpr int kCount = 9;
};

/// What the reference op gives for s8 without an epilogue (plain C++, s32 wrap-around), for any strides.
void reference(std::int64_t m, std::int64_t n, std::int64_t k, const std::int8_t* a, std::int64_t lda,
               const std::int8_t* b, std::int64_t ldb, BLayout b_layout, std::int32_t* c, std::int64_t ldc);

} // namespace kiln::int8_mm
