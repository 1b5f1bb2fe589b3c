#pragma once
#include <doctest/doctest.h>

#include <algorithm>
#include <cstring>
#include <random>
#include <vector>

#include "jit/code_object.h"
#include "jit/executable_memory.h"
#include "jit/ops/int8_mm.h"
#include "tests/guarded_buffer.h"
#include "tests/int8_values.h"

namespace kiln::test {

struct KernelCase {
  std::int64_t m, n, k;
  std::int64_t n_cut; ///< columns of one call
  Values values;
  Guard guard;
};

/// One compiled kernel against the reference, called as its plan says and without the driver: every buffer guarded, the
/// workspace filled with garbage, nothing written between the rows of C. `enter` calls the entry: a test may look at the
/// processor's state on both sides.
inline void check_int8_mm_kernel(
    const CodeObject& code, const KernelCase& c, std::mt19937& random,
    void (*enter)(int8_mm::Entry, const int8_mm::Call&) = [](int8_mm::Entry entry, const int8_mm::Call& call) {
      entry(&call);
    }) {
  CAPTURE(c.m);
  CAPTURE(c.n);
  CAPTURE(c.k);
  CAPTURE(c.n_cut);
  INFO("values ", std::string(name_of(c.values)), ", guard ", c.guard == Guard::after ? "after" : "before");
  const Result<int8_mm::Plan> plan = int8_mm::Plan::from(code.plan);
  REQUIRE(plan.is_ok());
  const int8_mm::PackLayout layout = plan->layout;
  const std::int64_t lda = c.k + 3, ldc = c.n + 5;
  const std::int64_t a_size = c.k == 0 ? 0 : (c.m - 1) * lda + c.k, c_size = (c.m - 1) * ldc + c.n;
  const GuardedBuffer a(static_cast<std::size_t>(a_size), c.guard), out(static_cast<std::size_t>(c_size) * 4, c.guard);
  const GuardedBuffer pack(static_cast<std::size_t>(layout.sums_offset(c.n, c.k)), c.guard);
  const std::size_t workspace_bytes = static_cast<std::size_t>(plan->workspace_bytes(c.m) + 63) / 64 * 64;
  const GuardedBuffer workspace(workspace_bytes, c.guard);
  std::memset(workspace.as<void>(), 0x5a, workspace_bytes);
  std::vector<std::int8_t> b(static_cast<std::size_t>(c.n * c.k));
  std::vector<std::int32_t> sums(static_cast<std::size_t>(layout.panels(c.n) * layout.n_block));
  fill(a.as<std::int8_t>(), a_size, c.values, random);
  fill(b.data(), c.n * c.k, c.values, random);
  int8_mm::pack_panels(layout, b.data(), c.k, int8_mm::BLayout::nk, c.n, c.k, 0, layout.panels(c.n),
                       pack.as<std::int8_t>(), sums.data());

  constexpr std::int32_t kUntouched = 0x7eadbeef;
  std::vector<std::int32_t> expected(static_cast<std::size_t>(c_size), kUntouched);
  std::copy(expected.begin(), expected.end(), out.as<std::int32_t>());
  int8_mm::reference(c.m, c.n, c.k, a.as<std::int8_t>(), lda, b.data(), c.k, int8_mm::BLayout::nk, expected.data(),
                     ldc);

  ExecutableMemory memory;
  const Result<const std::uint8_t*> loaded = memory.load(code.image, code.alignment);
  REQUIRE(loaded.is_ok());
  const auto entry = reinterpret_cast<int8_mm::Entry>(*loaded + code.entries.front().offset);
  for (std::int64_t column = 0; column < c.n; column += c.n_cut) {
    const int8_mm::Call call{.a = a.as<std::int8_t>(),
                             .lda = lda,
                             .b = pack.as<std::int8_t>() + column / layout.n_block * layout.panel_bytes(c.k),
                             .b_sums = sums.data() + column,
                             .c = out.as<std::int32_t>() + column,
                             .ldc = ldc,
                             .m = c.m,
                             .n = std::min(c.n_cut, c.n - column),
                             .workspace = workspace.as<void>()};
    enter(entry, call);
  }
  memory.release(*loaded);
  const bool equal = std::equal(expected.begin(), expected.end(), out.as<std::int32_t>());
  CHECK(equal);
}

} // namespace kiln::test
