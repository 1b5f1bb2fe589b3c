#include <doctest/doctest.h>

#include <string>
#include <vector>

#include "backends/arm/rows.h"
#include "tests/arm_int8_mm_check.h"

/// The paths of int8_mm on aarch64 that use v registers, kernel by kernel: what emission promises on any host, and on
/// aarch64 those that the machine can execute against the reference.

using namespace kiln;
using namespace kiln::test;

namespace {

std::vector<ArmPath> paths() {
  return {
      {arm::int8_mm_sdot(), "n12k4"},    {arm::int8_mm_sdot(), "n24k4"}, // SVE of 256 bits without SMMLA
      {arm::int8_mm_sdot(), "n8k4"},                                     // SME of 128 … 2048 bits
      {arm::int8_mm_sdot(), "n16k4"},    {arm::int8_mm_sdot(), "n32k4"},    {arm::int8_mm_sdot(), "n64k4"},
      {arm::int8_mm_sdot(), "n128k4"},   {arm::int8_mm_sdot(), "n12k8", 2}, // SMMLA
      {arm::int8_mm_sdot(), "n24k8", 2},                                    // and SVE of 256, 512 bits
      {arm::int8_mm_sdot(), "n48k8", 2}, {arm::int8_mm_i8mm(), "n12k8"},    {arm::int8_mm_i8mm(), "n24k8"},
      {arm::int8_mm_i8mm(), "n48k8"},    {arm::int8_mm_neon(), "n12k8"},    {arm::int8_mm_neon(), "n24k8"},
  };
}

} // namespace

TEST_CASE("the same desc gives the same bytes, with the features and the plan of its path") {
  for (const ArmPath& c : paths())
    for (const std::int64_t m : kOneOfEachClass)
      for (const std::int64_t k : {0, 1, 7, 63, 64, 1000, 4096}) {
        if (!serves(c, m))
          continue;
        INFO(name_of(c), " m ", m, " k ", k);
        const CodeObject code = compile(c, m, 100, k);
        CHECK(code == compile(c, m, 100, k));
        CHECK(code.arch == Arch::aarch64);
        CHECK(code.features == c.row.needs);
        CHECK(code.vector_bits == 0);
        const Result<int8_mm::Plan> plan = int8_mm::Plan::from(code.plan);
        REQUIRE(plan.is_ok());
        CHECK(plan->layout.id() == c.layout);
      }
}

TEST_CASE("layouts that a path reads, and rows that it leaves to another") {
  const Target target{.arch = Arch::aarch64, .features = {Feature::neon, Feature::dotprod, Feature::i8mm}};
  for (const ArmPath& c : paths()) {
    INFO(name_of(c));
    for (const std::int64_t m : kOneOfEachClass) {
      const KernelDesc desc = canonical(m, 100, 100);
      CHECK(c.row.reads(c.layout, desc, target) == serves(c, m));
      const Result<CodeObject> code = c.row.compile(desc, target, c.layout);
      CHECK(code.is_ok() == serves(c, m));
      if (!code) {
        CHECK(code.status().code() == Code::unsupported);
        CHECK(code.status().message().find(c.layout) != std::string::npos);
      }
    }
    for (const char* const foreign : {"n16k2", "n12k16", "n10k4", "n16k8", "n12", ""}) {
      CHECK_FALSE(c.row.reads(foreign, canonical(33, 100, 100), target));
      CHECK(c.row.compile(canonical(33, 100, 100), target, foreign).status().code() == Code::unsupported);
    }
  }
  CHECK(arm::int8_mm_sdot().pack_layout(canonical(1, 9, 9), target) == "n12k4");
  CHECK(arm::int8_mm_i8mm().pack_layout(canonical(1, 9, 9), target) == "n12k8");
  CHECK(arm::int8_mm_neon().pack_layout(canonical(1, 9, 9), target) == "n12k8");

  const Implementation i8mm = arm::int8_mm_i8mm();
  CHECK(i8mm.declines(canonical(2, 9, 9), target).find("SDOT") != std::string::npos);
  CHECK(i8mm.declines(canonical(3, 9, 9), target).empty());
  CHECK(i8mm.declines(int8_mm::op().pack_desc(canonical(1, 9, 9)), target).empty());
}

TEST_CASE("what a path cannot do is refused with the reason") {
  for (const Implementation& row : {arm::int8_mm_sdot(), arm::int8_mm_i8mm(), arm::int8_mm_neon()}) {
    CHECK(row.supports(canonical(1, 16, 16), Target{}).is_ok());
    const Status too_long = row.supports(canonical(1, 16, std::int64_t{1} << 30), Target{});
    CHECK(too_long.code() == Code::unsupported);
    CHECK(too_long.message().find("k=1073741824") != std::string::npos);
  }
}

TEST_CASE("every word is an instruction to llvm-mc, none names x18" * doctest::skip(!has_llvm_mc())) {
  for (const ArmPath& c : paths())
    for (const std::int64_t m : kOneOfEachClass)
      for (const std::int64_t k : {13, 512, 1003}) { // below 16 k rows are loaded in pieces
        if (!serves(c, m) || (c.layout != "n12k4" && c.layout != "n12k8" && k != 13))
          continue;
        INFO(name_of(c), " m ", m, " k ", k);
        for (const std::string& line : listing(compile(c, m, 1024, k))) {
          CHECK_MESSAGE(line.find("x18") == std::string::npos, line);
          CHECK_MESSAGE(line.find("w18") == std::string::npos, line);
        }
      }
}

TEST_CASE("u8 rows are multiplied as they are where the machine can, and cost what s8 rows do" *
          doctest::skip(!has_llvm_mc())) {
  const Target target{.arch = Arch::aarch64, .features = {Feature::neon, Feature::dotprod, Feature::i8mm}};
  struct Expected {
    ArmPath path;
    const char* product;
    std::int64_t m;
  };
  const Expected expected[] = {{{arm::int8_mm_sdot(), "n12k4"}, "sudot", 33},
                               {{arm::int8_mm_sdot(), "n12k8", 2}, "usdot", 1},
                               {{arm::int8_mm_i8mm(), "n12k8"}, "usmmla", 33}};
  for (const Expected& e : expected)
    for (const bool has_i8mm : {false, true}) {
      INFO(name_of(e.path), " m ", e.m, has_i8mm ? " with" : " without", " FEAT_I8MM");
      ArmPath path = e.path;
      path.target.features = has_i8mm ? target.features : path.row.needs;
      const bool mixed = has_i8mm || path.row.needs.has(Feature::i8mm);
      KernelDesc desc = canonical(e.m, 100, 1000);
      const CodeObject signed_rows = compile(path, desc);
      desc.value[int8_mm::kADtype] = static_cast<std::int64_t>(int8_mm::ADtype::u8);
      const CodeObject code = compile(path, desc);
      CHECK(path.row.features_for(desc, path.target).text() == code.features.text());
      CHECK(code.features.has(Feature::i8mm) == mixed);
      CHECK(int8_mm::Plan::from(code.plan)->a_shift == (mixed ? 0 : -128));
      CHECK((code.image.size() == signed_rows.image.size()) == mixed); // the stages that take 128 · Σ b out again
      const std::vector<std::string> lines = listing(code);
      CHECK(std::any_of(lines.begin(), lines.end(), [&](auto& line) { return begins_with(line, {e.product}); }) ==
            mixed);
    }
}

TEST_CASE("what the K loops consist of" * doctest::skip(!has_llvm_mc())) {
  const ArmPath sdot{arm::int8_mm_sdot(), "n12k4"}, sdot_k8{arm::int8_mm_sdot(), "n12k8"},
      i8mm{arm::int8_mm_i8mm(), "n12k8"}, neon{arm::int8_mm_neon(), "n12k8"};
  const auto loops_of = [](const ArmPath& c, std::int64_t m) { return k_loops(listing(compile(c, m, 1024, 1024))); };
  struct Expected {
    const ArmPath& c;
    std::int64_t m;
    std::vector<int> products; ///< of a step, of each tile height
    double loads;              ///< at most, per product
  };
  const Expected expected[] = {
      {sdot, 33, {18, 21, 24}, 0.15}, {sdot, 8, {15, 18, 21, 24}, 0.18}, {sdot, 4, {18, 24}, 0.25},
      {i8mm, 33, {18, 24}, 0.28},     {i8mm, 8, {18, 24}, 0.28},         {i8mm, 4, {24}, 0.34},
      {neon, 33, {24, 32}, 0.15},
  };
  for (const Expected& e : expected) {
    INFO(name_of(e.c), " m ", e.m);
    const auto loops = loops_of(e.c, e.m);
    REQUIRE(loops.size() == e.products.size());
    for (std::size_t i = 0; i < loops.size(); ++i) {
      const Mix mix = mix_of(loops[i]);
      CHECK(mix.products % e.products[i] == 0);
      CHECK(mix.products >= 64 * e.products[i] / e.products.back()); // enough to hide the loop's own instructions
      CHECK(mix.a_loads + mix.weight_loads <= e.loads * mix.products);
      CHECK(mix.others <= 5);
    }
  }
  // One and two rows: every weight is loaded once, for one product each row; A's rows are a small part.
  for (const ArmPath* const c : {&sdot, &sdot_k8})
    for (const std::int64_t m : {1, 2}) {
      INFO(name_of(*c), " m ", m);
      const auto loops = loops_of(*c, m);
      REQUIRE(loops.size() == 1);
      const Mix mix = mix_of(loops[0]);
      int weight_vectors = 0;
      for (const std::string& line : loops[0])
        if (begins_with(line, {"ldr", "ldp"}) && line.find("[x8") == std::string::npos)
          weight_vectors += begins_with(line, {"ldp"}) ? 2 : 1;
      CHECK(weight_vectors * m == mix.products);
      CHECK(mix.weight_loads <= weight_vectors);
      CHECK(mix.a_loads * 8 <= mix.products);
      CHECK(mix.others <= 7); // the pointers, the count and the branch
      CHECK(mix.products >= 48);
    }
}

#if defined(__aarch64__)

TEST_CASE("every m of every class, any n and k, between inaccessible pages") {
  check_every_m(paths());
}
TEST_CASE("all kinds of values with every path") {
  check_all_values(paths());
}
TEST_CASE("every remainder of n and k") {
  check_every_remainder(paths());
}
TEST_CASE("a range of columns at a time, as several threads would") {
  check_column_ranges(paths());
}
TEST_CASE("epilogues of all stages and types") {
  check_epilogues(paths());
}
TEST_CASE("sums wrap and never saturate") {
  check_sums_wrap(paths());
}

TEST_CASE("long rows: distances beyond every immediate") {
  std::mt19937 random(35);
  for_each_runnable(paths(), [&](const ArmPath& path) {
    if (int8_mm::PackLayout::parse(path.layout)->n_block != 12) // the others are as long, and only wider
      return;
    struct Shape {
      std::int64_t m, n, k;
    };
    // 4095 is the largest immediate of an addition, 2^24 − 1 that of two: panels and row tiles on both sides.
    for (const Shape s : {Shape{1, 25, 5003}, {9, 25, 5003}, {1, 13, (1 << 21) + 5}, {9, 1, (1 << 21) + 5}})
      if (serves(path, s.m))
        check_kernel(path,
                     {.m = s.m, .n = s.n, .k = s.k, .n_cut = s.n, .values = Values::random, .guard = Guard::after},
                     random);
  });
}

#endif
