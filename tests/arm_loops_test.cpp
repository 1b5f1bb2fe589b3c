#include <doctest/doctest.h>

#include "bench/arm_loops.h"

/// What bench_arm_mca and arm_instruction_count_test cut from a kernel, on instructions written here.

using namespace kiln;
using namespace kiln::bench;

namespace {

struct Line {
  const char* text;
  int branches_to = -1; ///< index of a line
};

std::vector<Instruction> code_of(const std::vector<Line>& lines) {
  std::vector<Instruction> code;
  for (const Line& line : lines)
    code.push_back({4 * code.size(), line.text, line.branches_to < 0 ? -1 : 4 * std::int64_t{line.branches_to}});
  return code;
}

} // namespace

TEST_CASE("innermost loops by their back edges") {
  const std::vector<Instruction> code = code_of({
      {"mov x9, xzr"},                  // 0
      {"ldr q0, [x0], #0x10"},          // 1: the outer loop's head
      {"cbz x2, L3", 5},                // 2: forward
      {"sdot v8.4s, v0.16b, v1.4b[0]"}, // 3
      {"b.ne L1", 3},                   // 4
      {"smmla v8.4s, v0.16b, v1.16b"},  // 5
      {"smmla v9.4s, v0.16b, v1.16b"},  // 6
      {"subs x1, x1, #0x1"},            // 7
      {"tbnz w1, #0x0, L2", 5},         // 8
      {"str q8, [x3]"},                 // 9
      {"cbnz x3, L4", 9},               // 10: holds no multiply-add
      {"b.ne L0", 1},                   // 11: not innermost
      {"b L5", 12},                     // 12: to itself
  });
  const std::vector<Loop> loops = innermost_loops(code);
  REQUIRE(loops.size() == 4);
  CHECK(loops[0].begin() == 12);
  CHECK(loops[0].end() == 20);
  CHECK(loops[3].begin() == loops[3].end() - 4);
  const std::vector<Loop> hot = hot_loops(code);
  REQUIRE(hot.size() == 2);
  CHECK(hot[0].begin() == 20);
  CHECK(hot[0].macs() == 2);
  CHECK(hot[0].accumulators() == 2);
  CHECK(hot[1].begin() == 12);
}

TEST_CASE("multiply-adds and loads") {
  const auto is_mac = [](const char* text) { return Instruction{0, text}.is_mac(); };
  for (const char* text : {"sdot v8.4s, v0.16b, v1.4b[0]", "smmla z8.s, z0.b, z1.b", "smull2 v0.8h, v1.16b, v2.16b",
                           "sadalp v8.4s, v0.8h", "smopa za3.s, p0/m, p1/m, z0.b, z1.b", "smlal v0.4s, v1.4h, v2.h[7]",
                           "bfmmla v28.4s, v1.8h, v3.8h", "bfdot v8.4s, v0.8h, v1.2h[3]"})
    CHECK(is_mac(text));
  for (const char* text : {"smull x0, w1, w2", "fmla v0.4s, v1.4s, v2.4s", "add v0.4s, v1.4s, v2.4s", "ldr q0, [x0]"})
    CHECK_FALSE(is_mac(text));
}

TEST_CASE("loads whose registers feed one multiply-add only") {
  const auto once = [](const std::vector<Line>& lines) { return Loop{code_of(lines)}.loads_used_once(); };
  // Two registers of weights by one load, A's for both.
  CHECK(once({{"ldp q0, q1, [x1], #0x20"},
              {"ldr q2, [x0], #0x10"},
              {"sdot v8.4s, v0.16b, v2.4b[0]"},
              {"sdot v9.4s, v1.16b, v2.4b[1]"}}) == 1);
  // One of the pair serves two.
  CHECK(once({{"ldp q0, q1, [x1], #0x20"}, {"sdot v8.4s, v0.16b, v1.4b[0]"}, {"sdot v9.4s, v1.16b, v3.4b[1]"}}) == 0);
  // Loaded for the next iteration, and the register used by something else in between.
  CHECK(once({{"sdot v8.4s, v0.16b, v2.4b[0]"}, {"ldr q0, [x1], #0x10"}}) == 1);
  CHECK(once({{"sdot v8.4s, v0.16b, v2.4b[0]"}, {"sdot v9.4s, v0.16b, v2.4b[0]"}, {"ldr q0, [x1]"}}) == 0);
  CHECK(once({{"ldr q0, [x1]"},
              {"movi v0.2d, #0000000000000000"},
              {"sdot v8.4s, v0.16b, v2.4b[0]"},
              {"sdot v9.4s, v0.16b, v2.4b[0]"}}) == 1);
  // SVE; the predicate is no register of data. A load of an address is none either.
  CHECK(once({{"ld1b { z0.b }, p0/z, [x1]"}, {"ldr x2, [x3]"}, {"sdot z8.s, z0.b, z2.b"}}) == 1);
  CHECK(once({{"ld1rqb { z2.b }, p0/z, [x1]"}, {"sdot z8.s, z0.b, z2.b[0]"}, {"sdot z9.s, z1.b, z2.b[1]"}}) == 0);
}
