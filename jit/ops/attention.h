#pragma once
#include <cstdint>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "cache/status.h"
#include "jit/desc.h"
#include "jit/op.h"

/// attention: O = softmax(scale · Q Kᵀ, visible keys only) V, bf16 with f32 state, and optionally the logarithm of each
/// row's sum. Query head h reads the key and value head h · Hkv / Hq.
/// Typed view of its desc, and the interface between its driver and every CPU kernel of it.
namespace kiln::attention {

/// Order of the field table: KernelDesc::value[…].
enum Field : int { kB, kHq, kHkv, kM, kN, kD, kDv, kCausal, kLse, kBatchInvariant, kFieldCount };
/// Which keys query m sees: all; those ≤ m; those ≤ m + N − M, N being the keys that the batch has.
enum class Causal : std::int64_t { none, top_left, bottom_right };

const OpSpec& op();
/// Without lse and batch_invariant.
KernelDesc make_desc(std::int64_t b, std::int64_t hq, std::int64_t hkv, std::int64_t m, std::int64_t n, std::int64_t d,
                     std::int64_t dv, Causal causal = Causal::none);
/// Query heads that share a head of K and V. Hkv = 0 counts as a group of one.
std::int64_t group_of(const KernelDesc& desc);

/// A kernel made for few rows, M · group, reads K and V as they lie. Every instruction set gains by that up to the
/// first number, and some up to the second.
inline constexpr std::int64_t kFewRows = 12, kMostFewRows = 63;
/// The classes of m, by their upper bounds, are 1, the most whose rows are within kFewRows, the same with kMostFewRows,
/// and kAny, which is the only one with batch_invariant=1. b, hkv, m and n are run-time values of every kernel: a model
/// has at most four kernels for a (group, D, Dv, causal, lse).

// ---------------------------------------------------------------- kernels

/// One call of a kernel entry: rows of one (batch, head of K and V) against a range of its keys. Row r is query
/// r / group of head r % group. Runs on one thread. Kernels read no key or value outside [key_begin, key_end) and write
/// nothing but the outputs' rows and the workspace. Strides in elements, innermost 1; any 2-byte alignment.
struct Call {
  const std::uint16_t* q; ///< bf16 bits [group][M][D]: the group's first head
  std::int64_t q_head_stride, q_row_stride;
  const std::uint16_t* k; ///< [N][D]
  std::int64_t k_row_stride;
  const std::uint16_t* v; ///< [N][Dv]
  std::int64_t v_row_stride;
  std::uint16_t* o; ///< [group][M][Dv]; used when `partial` is null
  std::int64_t o_head_stride, o_row_stride;
  std::int64_t row_begin, row_end;
  std::int64_t key_begin, key_end;
  /// Query m sees keys < visible + m · visible_step, of those below key_end.
  std::int64_t visible, visible_step; ///< step 0 or 1
  /// scale · log2(e): scores are scaled in the exponent of 2.
  float scale_log2e;
  float* partial; ///< null, or f32 [row_end − row_begin][Dv]: Σ exp2(score − max) · V, for a merge of several ranges
  /// Null, or f32 [row_end − row_begin][2]: `max`, the row's greatest scaled score in the exponent of 2 or a little
  /// less, and Σ exp2(score − max). A row that sees nothing has the sum 0.
  float* stats;
  void* workspace; ///< 64-byte aligned, plan.workspace_bytes; private to the call
  // What generated code has as constants, for `reference`:
  std::int64_t group, d, dv;
};
using Entry = void (*)(const Call*);

/// Launch plan, version 1.
struct Plan {
  std::int64_t block_rows = 1; ///< rows that the kernel takes through the keys together: the driver cuts at multiples
  std::int64_t workspace_bytes = 0;
  bool makes_partials = true; ///< Call::partial may be given

  std::vector<std::pair<std::string, std::int64_t>> values() const;
  static Result<Plan> from(std::span<const std::pair<std::string, std::int64_t>> values);
};

// ---------------------------------------------------------------- definition

/// One row by definition, in float64: `o` f64 [dv], the return value its lse. Sees the keys [0, visible).
double reference_row(const std::uint16_t* q, const std::uint16_t* k, std::int64_t k_row_stride, const std::uint16_t* v,
                     std::int64_t v_row_stride, std::int64_t visible, std::int64_t d, std::int64_t dv, double scale,
                     double* o);

/// Relative error that OPS.md allows, and what of Σ p·|v| an element may be off besides 2⁻⁷ of itself.
inline constexpr double kRelativeBound = 6e-3, kElementBound = 6e-3;
/// What lse may be off, times max(1, |lse|).
inline constexpr double kLseBound = 1e-3;

} // namespace kiln::attention
