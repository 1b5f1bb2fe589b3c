#pragma once
#include <cstdint>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "cache/status.h"
#include "jit/desc.h"
#include "jit/op.h"
#include "jit/ops/int8_mm.h"
#include "jit/ops/int8_mm_epilogue.h"

/// int8_linear: Y[M,N] = dequant(quant(X[M,K]) · W[K,N]) + bias: activations quantised per row at run time (dynamic
/// quantisation, as in "LLM.int8()", Dettmers et al. 2022, without its outliers), weights s8 with a scale per column.
/// Per row m of X, in f32: a = max|x|, s = a / 127, r = 127 / a, q = x · r rounded half to even; where a = 0 or r is
/// not finite, s = 0 and q = 0. Then t = s · ws[n], y = fma(f32(Σ_k q·w), t, bias[n]), +0 for an absent bias, rounded
/// to Y's type. A row with NaN or infinity is NaN whole. The same bits on every path; a NaN is 0x7FC00000, 0x7FC0 or
/// 0x7E00.
/// Typed view of its desc, and the interface between its driver and every kernel of it. Packs are int8_mm's.
namespace kiln::int8_linear {

/// Order of the field table: KernelDesc::value[…].
enum Field : int { kM, kN, kK, kXDtype, kYDtype, kBias, kWLayout, kFieldCount };
/// Of x and of y.
enum class Float : std::int64_t { bf16, f16, f32 };
/// Of the W that is packed.
using WLayout = int8_mm::BLayout;

const OpSpec& op();
KernelDesc make_desc(std::int64_t m, std::int64_t n, std::int64_t k, Float x = Float::bf16, Float y = Float::bf16,
                     bool bias = false, WLayout w_layout = WLayout::nk);
inline Float x_of(const KernelDesc& d) {
  return static_cast<Float>(d.value[kXDtype]);
}
inline Float y_of(const KernelDesc& d) {
  return static_cast<Float>(d.value[kYDtype]);
}
inline bool has_bias(const KernelDesc& d) {
  return d.value[kBias] != 0;
}
inline std::int64_t bytes_of(Float type) {
  return type == Float::f32 ? 4 : 2;
}
/// The int8_mm of the same sizes: what the product in the middle is.
KernelDesc product_desc(const KernelDesc& desc);

/// Code::unsupported, naming the field, for k above `max_k`.
Status check_k(const KernelDesc& desc, std::int64_t max_k);

/// What kernels that ask for it (Plan::terms) read for each column: `count` arrays of 32 bits [n_block] for each panel
/// of the pack, panel after panel. Zero beyond N in N's panel, anything in those behind it up to a multiple of
/// plan.n_step.
struct TermsLayout {
  static constexpr int kOffset = 0;        ///< s32: the sums begin at it
  static constexpr int kWs = 1, kBias = 2; ///< f32
  static int count(const KernelDesc& desc) { return has_bias(desc) ? 3 : 2; }
};
/// The same as what emitters of int8_mm's epilogue take: y's type after an f32 scale, and where its terms lie.
int8_mm::Epilogue output_of(const KernelDesc& desc);
int8_mm::TermsLayout terms_of(const KernelDesc& desc);
/// Terms of columns [0, count), from a panel's first one on; `w_sums`, ws and bias of the first of them. `q_shift`:
/// what the kernel adds to q.
void make_terms(const KernelDesc& desc, const int8_mm::PackLayout& pack, int q_shift, const std::int32_t* w_sums,
                const float* ws, const float* bias, std::int64_t count, std::int32_t* terms);

/// Launch plan, version 1: what the driver must know about a kernel.
struct Plan {
  int8_mm::PackLayout layout;
  std::int32_t m_step = 1;            ///< as of int8_mm::Plan
  std::int32_t n_step = 16;           ///< likewise
  std::int64_t q_row_bytes = 0;       ///< from one quantised row to the next
  std::int64_t q_end_bytes = 0;       ///< that the kernel may touch behind the last
  std::int64_t workspace_bytes = 0;   ///< private to a call that multiplies: this,
  std::int64_t workspace_per_row = 0; ///< and this for each of its rows
  std::int32_t q_shift = 0;           ///< what the kernel adds to q: 128 where it multiplies u8 by s8
  bool terms = false;                 ///< whether the kernel reads them (Call::product.terms)

  std::vector<std::pair<std::string, std::int64_t>> values() const;
  static Result<Plan> from(std::span<const std::pair<std::string, std::int64_t>> values);
};

/// What a call of a kernel does: any of these, in this order.
enum Step : std::uint64_t { kQuantise = 1, kMultiply = 2 };

/// One call of a kernel entry, on one thread, in the default floating-point control state. N, K and the types are
/// constants of the kernel; n is what the driver gives this call. Kernels read nothing outside X's m rows of K
/// elements, the pack's panels of that range and its sums, ws and bias, and write nothing outside Y's m × n elements,
/// the quantised rows and the workspace.
struct Call {
  /// The multiplication, as kernels of int8_mm see it: `workspace` has the quantised rows and their s (64-byte aligned,
  /// in the kernel's own form, plan.q_row_bytes each), b is W, c is Y; a and lda are not used. m may be any where the
  /// call only quantises.
  int8_mm::Call product;
  const void* x; ///< row 0; aligned to its elements
  std::int64_t ldx;
  const float* ws;     ///< of the first column
  const float* bias;   ///< likewise; null without one
  std::uint64_t steps; ///< of Step
  void* workspace;     ///< 64-byte aligned, plan.workspace_bytes and per row, private to the call
  // What generated code has as constants, for `reference`:
  const KernelDesc* desc;
  const Plan* plan;
};
using Entry = void (*)(const Call*);

/// One row quantised by definition: q[k], and s (NaN for a row with NaN or infinity, whose q are 0).
float quantise_row(Float type, const void* x, std::int64_t k, std::int8_t* q);
/// One result by definition, to y[index].
void store_result(Float type, std::int32_t sum, float s, float ws, float bias, void* y, std::int64_t index);

/// What the reference op gives, for any strides. `bias` may be null. Needs the default floating-point control state.
void reference(const KernelDesc& desc, std::int64_t m, const void* x, std::int64_t ldx, const std::int8_t* w,
               std::int64_t ldw, const float* ws, const float* bias, void* y, std::int64_t ldy);

} // namespace kiln::int8_linear
