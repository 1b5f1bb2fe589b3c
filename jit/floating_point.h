#pragma once
#include <cstdint>

namespace kiln {

/// The default floating-point control state (round to nearest even, denormals kept, no traps) on this thread while it
/// lives; then the caller's again, status flags included.
class DefaultFloatingPoint {
public:
#if defined(__x86_64__)
  // MXCSR: Intel SDM vol. 1, 10.2.3.
  DefaultFloatingPoint() : saved_(__builtin_ia32_stmxcsr()) {
    __builtin_ia32_ldmxcsr(kDefault);
  }
  ~DefaultFloatingPoint() {
    __builtin_ia32_ldmxcsr(saved_);
  }
#elif defined(__aarch64__)
  // FPCR and FPSR: Arm ARM, C5.2.8 and C5.2.10.
  DefaultFloatingPoint() {
    asm volatile("mrs %0, fpcr\n\tmrs %1, fpsr" : "=r"(saved_), "=r"(saved_status_)::"memory");
    if (saved_ != 0)
      asm volatile("msr fpcr, xzr" ::: "memory");
  }
  ~DefaultFloatingPoint() {
    if (saved_ != 0)
      asm volatile("msr fpcr, %0" ::"r"(saved_) : "memory");
    asm volatile("msr fpsr, %0" ::"r"(saved_status_) : "memory");
  }
#else
#error "the floating-point control register of this architecture"
#endif
  DefaultFloatingPoint(const DefaultFloatingPoint&) = delete;
  DefaultFloatingPoint& operator=(const DefaultFloatingPoint&) = delete;

private:
#if defined(__x86_64__)
  static constexpr std::uint32_t kDefault = 0x1F80; ///< all exceptions masked, no flag set
  std::uint32_t saved_;
#else
  std::uint64_t saved_ = 0, saved_status_ = 0;
#endif
};

} // namespace kiln
