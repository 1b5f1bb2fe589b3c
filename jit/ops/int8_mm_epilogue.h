#pragma once
#include <cstdint>

#include "jit/desc.h"
#include "jit/ops/int8_mm.h"

/// int8_mm's epilogue (OPS.md): which stages a desc has, their values, what kernels are given of them, and the
/// definition itself.
namespace kiln::int8_mm {

/// The stages of a desc, and the types that go in and come out: all that a kernel's code depends on beside the shape.
struct Epilogue {
  ADtype a_dtype = ADtype::s8;
  BDtype b_dtype = BDtype::s8;
  CDtype c_dtype = CDtype::s32;
  AZp a_zp = AZp::none;
  BZp b_zp = BZp::none;
  bool bias = false;
  Rescale rescale = Rescale::none;
  RescalePer rescale_per = RescalePer::channel;
  Rounding rounding = Rounding::zero;
  Act act = Act::none;
  bool c_zp = false, clamp = false;
  bool operator==(const Epilogue&) const = default;

  static Epilogue of(const KernelDesc& desc);

  /// s8 · s8 → s32 and no stage.
  bool is_absent() const { return *this == Epilogue{}; }
  bool has_float_output() const { return c_dtype == CDtype::f32 || c_dtype == CDtype::bf16 || c_dtype == CDtype::f16; }
  int c_bytes() const;
  /// v = acc · multiplier, rounded to v / 2^shift: `q_scale`, and `shift_right`, whose multiplier is 1.
  bool rounds_wide() const { return rescale == Rescale::q_scale || rescale == Rescale::shift_right; }
  /// Kernels compute with floating-point instructions: f32 scales, and some round integers in f64.
  bool needs_floating_point() const { return rescale == Rescale::scale || rounding == Rounding::even; }
  /// Negative values go through a rounding of their own, or are multiplied by a float.
  bool has_integer_slope() const { return act == Act::leaky_relu && rescale != Rescale::scale; }
  bool has_float_slope() const { return act == Act::leaky_relu && rescale == Rescale::scale; }
  /// Σ_k A[m,k] takes part: with b_zp, and with u8 weights, which are packed as b − 128.
  bool needs_row_sums() const { return b_zp != BZp::none || b_dtype == BDtype::u8; }
  /// Values are held below or above something else than the output type's own range (`relu` is a bound of 0).
  bool has_upper_bound() const { return clamp || c_zp; }
  bool has_lower_bound() const { return has_upper_bound() || act == Act::relu; }
};

/// The values of a call, as a host gives them: pointers to one element or to [N] ([M] for a_zp), as the desc says; null
/// and 0 where it has no such stage.
struct EpilogueValues {
  const std::int32_t* a_zp = nullptr;
  const std::int32_t* b_zp = nullptr;
  const std::int32_t* bias = nullptr;
  const std::int32_t* mult = nullptr;
  const std::int32_t* shift = nullptr;
  const float* scale = nullptr;
  std::int32_t slope_mult = 0, slope_shift = 0;
  float slope = 0;
  std::int32_t c_zp = 0;
  double lo = 0, hi = 0; ///< of c's type, f32 for bf16 and f16
};

/// Every value present that the desc asks for, and within its range: Code::invalid_argument names value and range.
Status check_values(const Epilogue& epilogue, const EpilogueValues& values, std::int64_t n);

/// What CPU kernels read for each column: `count` arrays of s32 [n_block] for each panel of the pack, panel after
/// panel. An index of −1: the epilogue has no such array. Zero beyond N.
struct TermsLayout {
  int offset = 0;      ///< the sums begin at it: bias, scalar a_zp, and what flipping A's sign bits adds
  int a_zp = -1;       ///< += a_zp[m] · this, with a_zp=row
  int row_sum = -1;    ///< += Σ_k A[m,k] · this
  int multiplier = -1; ///< s32 of `q_scale` and `shift_right`; f32 bits of `scale`
  int shift = -1;      ///< 0…62: right after the multiplication, rounded; 0…31 to the left for `shift_left`
  int count = 1;
  static TermsLayout of(const Epilogue& epilogue);
  std::int64_t panel_bytes(const PackLayout& pack) const { return std::int64_t{4} * count * pack.n_block; }
  /// From a panel's first byte to the array `index`.
  static std::int64_t array_bytes(const PackLayout& pack, int index) { return std::int64_t{4} * index * pack.n_block; }
};

/// Values that all columns share, in the form that generated code reads: bounds as they hold before c_zp is added.
struct Scalars {
  std::int32_t lo = 0, hi = 0, c_zp = 0; ///< integer outputs: clamp(v, lo, hi) + c_zp
  float lo_f = 0, hi_f = 0;              ///< others: v > lo_f ? v : lo_f, then v < hi_f ? v : hi_f
  float slope = 0;
  std::int32_t slope_multiplier = 0, slope_shift = 0; ///< as the terms' multiplier and shift
};
Scalars scalars_of(const Epilogue& epilogue, const EpilogueValues& values);

/// Terms of columns [column, column + count), a panel's first one to some panel's last or N's, to `terms`. `b_sums` are
/// the pack's, of the first of them. `a_shift` is what the kernel adds to A's elements where it converts them.
void make_terms(const Epilogue& epilogue, const EpilogueValues& values, const PackLayout& pack, std::int64_t k,
                int a_shift, const std::int32_t* b_sums, std::int64_t column, std::int64_t count, std::int32_t* terms);

/// The definition: element (m, n) of C from its sum, from Σ_k A[m,k] and from Σ_k B[k,n], all of the values of A and B
/// as given and wrapped to s32.
void finish_reference(const Epilogue& epilogue, const EpilogueValues& values, std::int64_t k, std::int64_t m,
                      std::int64_t n, std::int32_t sum, std::int32_t a_sum, std::int32_t b_sum, void* c_element);

/// The whole op by its definition, for any strides: a, b and c of the epilogue's types.
void reference(const Epilogue& epilogue, const EpilogueValues& values, std::int64_t m, std::int64_t n, std::int64_t k,
               const void* a, std::int64_t lda, const void* b, std::int64_t ldb, BLayout b_layout, void* c,
               std::int64_t ldc);

} // namespace kiln::int8_mm
