#pragma once
#include <cstdint>
#include <memory>
#include <string>

namespace kiln::bench {

/// A bf16 linear layer by oneDNN's inner product: Y[M,N] = X[M,K] · W[N,K]ᵀ, all bf16. Weights are reordered once into
/// the layout it prefers, and the primitive exists before the first run.
class OneDnnLinear {
public:
  /// `w` is [N][K], `copies` how many separate reordered copies to keep (cold runs rotate over them). `threads` holds
  /// for every run. `x` and `y` are used by every run.
  OneDnnLinear(std::int64_t m, std::int64_t n, std::int64_t k, const std::uint16_t* x, const std::uint16_t* w,
               std::uint16_t* y, int threads, int copies = 1);
  ~OneDnnLinear();

  void run(int copy = 0);
  const std::string& implementation() const; ///< as oneDNN names it

private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

} // namespace kiln::bench
