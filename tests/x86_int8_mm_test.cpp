#include <doctest/doctest.h>

#include <random>
#include <string>
#include <vector>

#include <fmt/format.h>

#include "backends/x86/rows.h"
#include "tests/int8_mm_kernel_check.h"

/// The vector paths of int8_mm on x86, kernel by kernel: those that this machine can execute against the reference, all
/// of them for what emission promises.

using namespace kiln;
using namespace kiln::test;

namespace {

const Implementation kRows[] = {x86::int8_mm_avx512vnni(), x86::int8_mm_avxvnni(), x86::int8_mm_avx2()};

KernelDesc canonical(std::int64_t m, std::int64_t n, std::int64_t k) {
  return int8_mm::op().canonical(int8_mm::make_desc(m, n, k));
}

CodeObject compile(const Implementation& row, std::int64_t m, std::int64_t n, std::int64_t k) {
  Result<CodeObject> code = row.compile(canonical(m, n, k), Target{}, row.pack_layout(canonical(m, n, k), Target{}));
  REQUIRE_MESSAGE(code.is_ok(), (code ? "" : code.status().message()));
  return std::move(*code);
}

/// Calls `check(row, name)` for each path that this machine can execute.
template <class Check> void for_each_runnable(Check check) {
  const Target machine = detect_machine().target;
  for (const Implementation& row : kRows) {
    const std::string name(name_of(row.isa));
    if (!machine.features.contains(row.needs)) {
      MESSAGE("not run here, the machine lacks its features: ", name);
      continue;
    }
    INFO(name);
    check(row);
  }
}

} // namespace

TEST_CASE("every m of every class, any n and k, between inaccessible pages") {
  constexpr unsigned kSeed = 20;
  INFO("seed ", kSeed);
  std::mt19937 random(kSeed);
  // Classes up to 32 whole; of the unbounded one more than a period of every path's row split (13 · 14 rows), in odd
  // steps.
  std::vector<std::int64_t> rows;
  for (std::int64_t m = 1; m <= 70; ++m)
    rows.push_back(m);
  for (std::int64_t m = 73; m <= 220; m += 7)
    rows.push_back(m);
  for_each_runnable([&](const Implementation& row) {
    for (const std::int64_t m : rows)
      for (const Values values : kAllValues) {
        const std::int64_t n = 1 + random() % 150, k = 1 + random() % (m % 3 == 0 ? 300 : 70);
        const CodeObject code = compile(row, m, n, k);
        for (const Guard guard : {Guard::after, Guard::before})
          check_int8_mm_kernel(code, {.m = m, .n = n, .k = k, .n_cut = n, .values = values, .guard = guard}, random);
      }
  });
}

TEST_CASE("every remainder of n and k") {
  constexpr unsigned kSeed = 21;
  INFO("seed ", kSeed);
  std::mt19937 random(kSeed);
  for_each_runnable([&](const Implementation& row) {
    for (const std::int64_t m : {1, 2, 3, 6, 15, 31, 47}) {
      for (std::int64_t k = 0; k <= 67; ++k) {
        const std::int64_t n = 1 + random() % 40;
        check_int8_mm_kernel(compile(row, m, n, k),
                             {.m = m, .n = n, .k = k, .n_cut = n, .values = Values::random, .guard = Guard::after},
                             random);
      }
      for (std::int64_t n = 1; n <= 131; ++n)
        check_int8_mm_kernel(compile(row, m, n, 37),
                             {.m = m, .n = n, .k = 37, .n_cut = n, .values = Values::random, .guard = Guard::after},
                             random);
    }
  });
}

TEST_CASE("a range of columns at a time, as several threads would") {
  constexpr unsigned kSeed = 22;
  INFO("seed ", kSeed);
  std::mt19937 random(kSeed);
  for_each_runnable([&](const Implementation& row) {
    for (const std::int64_t m : {1, 2, 4, 8, 16, 32, 50}) {
      const std::int64_t n = 333, k = 90;
      const CodeObject code = compile(row, m, n, k);
      const std::int64_t step = int8_mm::Plan::from(code.plan)->n_step;
      for (const std::int64_t steps : {1, 2, 3})
        check_int8_mm_kernel(
            code, {.m = m, .n = n, .k = k, .n_cut = steps * step, .values = Values::random, .guard = Guard::after},
            random);
    }
  });
}

TEST_CASE("sums wrap and never saturate") {
  std::mt19937 random(23);
  // 2^17 products of (−128)·(−128) are 2^31: one more than s32 holds.
  constexpr std::int64_t k = std::int64_t{1} << 17;
  for_each_runnable([&](const Implementation& row) {
    for (const std::int64_t m : {1, 33})
      check_int8_mm_kernel(compile(row, m, 17, k),
                           {.m = m, .n = 17, .k = k, .n_cut = 17, .values = Values::all_lowest, .guard = Guard::after},
                           random);
  });
}

TEST_CASE("the same desc gives the same bytes, and one pack serves every m") {
  for (const Implementation& row : kRows) {
    const std::string layout = row.pack_layout(canonical(1, 100, 100), Target{});
    for (const std::int64_t m : {1, 2, 4, 8, 16, 32, 33})
      for (const std::int64_t k : {0, 1, 63, 64, 1000, 4096}) {
        INFO(std::string(name_of(row.isa)), " m ", m, " k ", k);
        const CodeObject code = compile(row, m, 100, k);
        CHECK(code == compile(row, m, 100, k));
        CHECK(code.features == row.needs);
        CHECK(int8_mm::Plan::from(code.plan)->layout.id() == layout);
        CHECK(row.pack_layout(canonical(m, 100, k), Target{}) == layout);
      }
  }
}

TEST_CASE("what a path cannot do is refused with the reason") {
  for (const Implementation& row : kRows) {
    CHECK(row.supports(canonical(1, 16, 16), Target{}).is_ok());
    const Status too_long = row.supports(canonical(1, 16, std::int64_t{1} << 30), Target{});
    CHECK(too_long.code() == Code::unsupported);
    CHECK(too_long.message().find("k=1073741824") != std::string::npos);
  }
}
