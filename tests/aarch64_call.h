#pragma once
#include <doctest/doctest.h>

#include <cstdint>

#include "jit/ops/int8_mm.h"

#if defined(__aarch64__)
namespace kiln::test {

/// What a function must leave as it was (AAPCS64, 6.1), and x18, which belongs to the platform on some systems.
struct PreservedState {
  std::uint64_t x19_to_x29[11], x18, d8_to_d15[8], sp_moved;
};

extern "C" void kiln_test_call_with_state(int8_mm::Entry entry, const int8_mm::Call* call, PreservedState* state);

/// Puts `state` into the registers, calls, and takes it out again.
asm(R"(
  .text
  .weak kiln_test_call_with_state
  .type kiln_test_call_with_state, %function
kiln_test_call_with_state:
  stp x29, x30, [sp, #-192]!
  stp x19, x20, [sp, #16]
  stp x21, x22, [sp, #32]
  stp x23, x24, [sp, #48]
  stp x25, x26, [sp, #64]
  stp x27, x28, [sp, #80]
  stp d8, d9, [sp, #96]
  stp d10, d11, [sp, #112]
  stp d12, d13, [sp, #128]
  stp d14, d15, [sp, #144]
  mov x9, sp
  stp x2, x9, [sp, #160]
  str x18, [sp, #176]
  ldp x19, x20, [x2]
  ldp x21, x22, [x2, #16]
  ldp x23, x24, [x2, #32]
  ldp x25, x26, [x2, #48]
  ldp x27, x28, [x2, #64]
  ldp x29, x18, [x2, #80]
  ldp d8, d9, [x2, #96]
  ldp d10, d11, [x2, #112]
  ldp d12, d13, [x2, #128]
  ldp d14, d15, [x2, #144]
  mov x9, x0
  mov x0, x1
  blr x9
  ldp x2, x9, [sp, #160]
  stp x19, x20, [x2]
  stp x21, x22, [x2, #16]
  stp x23, x24, [x2, #32]
  stp x25, x26, [x2, #48]
  stp x27, x28, [x2, #64]
  stp x29, x18, [x2, #80]
  stp d8, d9, [x2, #96]
  stp d10, d11, [x2, #112]
  stp d12, d13, [x2, #128]
  stp d14, d15, [x2, #144]
  mov x10, sp
  sub x10, x10, x9
  str x10, [x2, #160]
  mov sp, x9
  ldp x19, x20, [sp, #16]
  ldp x21, x22, [sp, #32]
  ldp x23, x24, [sp, #48]
  ldp x25, x26, [sp, #64]
  ldp x27, x28, [sp, #80]
  ldp d8, d9, [sp, #96]
  ldp d10, d11, [sp, #112]
  ldp d12, d13, [sp, #128]
  ldp d14, d15, [sp, #144]
  ldr x18, [sp, #176]
  ldp x29, x30, [sp], #192
  ret
  .size kiln_test_call_with_state, . - kiln_test_call_with_state
)");

/// Calls an entry and checks that it gave back the registers that are its caller's.
inline void call_and_check_registers(int8_mm::Entry entry, const int8_mm::Call& call) {
  PreservedState state;
  std::uint64_t pattern = 0x0123456789abcdef;
  const auto next = [&] { return pattern = pattern * 6364136223846793005u + 1442695040888963407u; };
  for (std::uint64_t& x : state.x19_to_x29)
    x = next();
  state.x18 = next();
  for (std::uint64_t& d : state.d8_to_d15)
    d = next();
  state.sp_moved = 0;
  const PreservedState before = state;
  kiln_test_call_with_state(entry, &call, &state);
  for (int i = 0; i < 11; ++i)
    CHECK_MESSAGE(state.x19_to_x29[i] == before.x19_to_x29[i], "x", 19 + i);
  CHECK(state.x18 == before.x18);
  for (int i = 0; i < 8; ++i)
    CHECK_MESSAGE(state.d8_to_d15[i] == before.d8_to_d15[i], "d", 8 + i);
  CHECK(state.sp_moved == 0);
}

} // namespace kiln::test
#endif
