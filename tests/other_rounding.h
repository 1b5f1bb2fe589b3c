#pragma once
#include <doctest/doctest.h>

#include <cfenv>

namespace kiln::test {

/// Round toward zero while it lives, which a call must neither use nor change.
class OtherRounding {
public:
  OtherRounding() { std::fesetround(FE_TOWARDZERO); }
  ~OtherRounding() {
    CHECK(std::fegetround() == FE_TOWARDZERO);
    std::fesetround(FE_TONEAREST);
  }
};

} // namespace kiln::test
