#pragma once
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "bench/machine.h"

namespace kiln::bench {

/// What becomes of the sums: s8 of round(scale[n] · (sum − a_zp · Σ_k b)) + c_zp.
struct OneDnnEpilogue {
  std::vector<float> scale; ///< [N]
  std::int32_t a_zp = 0, c_zp = 0;
};

/// A product by oneDNN on the same tensors. Weights are reordered once into the layout it prefers, and the primitive
/// exists before the first run.
class OneDnn {
public:
  /// Two of its primitives compute this; the inner product is often the faster one for few rows.
  enum class Primitive { matmul, inner_product };

  /// int8_mm: C[M,N] = A[M,K] · B[N,K]ᵀ, s8 × s8 → s32, or s8 by an epilogue. `b` is the weights as [N][K], `copies`
  /// how many separate reordered copies to keep (cold runs rotate over them). `threads` holds for every run. `a` and
  /// `c` are used by every run. Zero points are matmul's only.
  OneDnn(Primitive primitive, std::int64_t m, std::int64_t n, std::int64_t k, const std::int8_t* a,
         const std::int8_t* b, void* c, int threads, int copies = 1, const OneDnnEpilogue* epilogue = nullptr);
  /// A linear layer, all bf16, by its inner product: Y[M,N] = X[M,K] · W[N,K]ᵀ. The rest as above.
  OneDnn(std::int64_t m, std::int64_t n, std::int64_t k, const std::uint16_t* x, const std::uint16_t* w,
         std::uint16_t* y, int threads, int copies = 1);
  ~OneDnn();

  void run(int copy = 0);
  const std::string& implementation() const; ///< as oneDNN names it

private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

} // namespace kiln::bench
