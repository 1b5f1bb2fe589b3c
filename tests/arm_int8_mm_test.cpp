#define DOCTEST_CONFIG_IMPLEMENT_WITH_MAIN
#include <doctest/doctest.h>

#include <algorithm>
#include <random>
#include <string>
#include <vector>

#include <fmt/format.h>

#include "backends/arm/rows.h"
#include "tests/aarch64_call.h"
#include "tests/emulator.h"
#include "tests/int8_mm_kernel_check.h"
#include "tests/llvm_mc.h"

/// The paths of int8_mm on aarch64 that use v registers, kernel by kernel: what emission promises on any host, and on
/// aarch64 those that the machine can execute against the reference.

using namespace kiln;
using namespace kiln::test;

namespace {

/// A path on one of the layouts that it reads.
struct Case {
  Implementation row;
  const char* layout;
  std::int64_t most_rows = kAny; ///< that it serves from this layout
};

std::vector<Case> cases() {
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

std::string name_of(const Case& c) {
  return fmt::format("{} on {}", kiln::name_of(c.row.isa), c.layout);
}

KernelDesc canonical(std::int64_t m, std::int64_t n, std::int64_t k) {
  return int8_mm::op().canonical(int8_mm::make_desc(m, n, k));
}

CodeObject compile(const Case& c, std::int64_t m, std::int64_t n, std::int64_t k) {
  Result<CodeObject> code = c.row.compile(canonical(m, n, k), Target{.arch = Arch::aarch64}, c.layout);
  REQUIRE_MESSAGE(code.is_ok(), (code ? "" : code.status().message()));
  return std::move(*code);
}

bool serves(const Case& c, std::int64_t m) {
  return c.most_rows == kAny || m <= c.most_rows;
}

constexpr std::int64_t kOneOfEachClass[] = {1, 2, 4, 8, 16, 32, 33};

// ---------------------------------------------------------------- what the code looks like

/// Under an emulator the host's programs are out of reach; the code is the same there.
bool has_llvm_mc() {
  return !is_emulated() && std::system("command -v llvm-mc-19 >/dev/null") == 0;
}

std::vector<std::string> listing(const CodeObject& code) {
  std::vector<std::uint32_t> words(code.image.size() / 4);
  std::memcpy(words.data(), code.image.data(), code.image.size());
  return disassemble(words);
}

bool begins_with(const std::string& line, std::initializer_list<const char*> mnemonics) {
  return std::any_of(mnemonics.begin(), mnemonics.end(),
                     [&](const char* mnemonic) { return line.starts_with(std::string(mnemonic) + " "); });
}

/// The loops through K: bodies that end in a branch back over products, and contain no other branch.
std::vector<std::vector<std::string>> k_loops(const std::vector<std::string>& lines) {
  std::vector<std::vector<std::string>> loops;
  for (std::size_t i = 0; i < lines.size(); ++i) {
    int distance = 0;
    if (std::sscanf(lines[i].c_str(), "b.ne #%d", &distance) != 1 || distance >= 0)
      continue;
    std::vector<std::string> body(lines.begin() + static_cast<std::ptrdiff_t>(i) + distance / 4,
                                  lines.begin() + static_cast<std::ptrdiff_t>(i) + 1);
    const auto is_product = [](const std::string& l) { return begins_with(l, {"sdot", "smmla", "smull", "smull2"}); };
    const auto branches = [](const std::string& l) { return l[0] == 'b' || begins_with(l, {"tbz", "tbnz"}); };
    if (std::any_of(body.begin(), body.end(), is_product) && std::count_if(body.begin(), body.end(), branches) == 1)
      loops.push_back(std::move(body));
  }
  return loops;
}

struct Mix {
  int products = 0, weight_loads = 0, a_loads = 0, others = 0;
};

/// x8 runs along A, x10 … x13 along the panels.
Mix mix_of(const std::vector<std::string>& loop) {
  Mix mix;
  for (const std::string& line : loop)
    if (begins_with(line, {"sdot", "smmla", "smull", "smull2", "sadalp"}))
      ++mix.products;
    else if (begins_with(line, {"ldr", "ldp"}))
      ++(line.find("[x8") != std::string::npos ? mix.a_loads : mix.weight_loads);
    else
      ++mix.others;
  return mix;
}

} // namespace

TEST_CASE("the same desc gives the same bytes, with the features and the plan of its path") {
  for (const Case& c : cases())
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
  for (const Case& c : cases()) {
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
    KernelDesc u8 = canonical(1, 16, 16);
    u8.value[int8_mm::kADtype] = static_cast<std::int64_t>(int8_mm::ADtype::u8);
    CHECK(row.supports(canonical(1, 16, 16), Target{}).is_ok());
    CHECK(row.supports(u8, Target{}).message().find("a_dtype") != std::string::npos);
    const Status too_long = row.supports(canonical(1, 16, std::int64_t{1} << 30), Target{});
    CHECK(too_long.code() == Code::unsupported);
    CHECK(too_long.message().find("k=1073741824") != std::string::npos);
  }
}

TEST_CASE("every word is an instruction to llvm-mc, none names x18" * doctest::skip(!has_llvm_mc())) {
  for (const Case& c : cases())
    for (const std::int64_t m : kOneOfEachClass)
      for (const std::int64_t k : {13, 512, 1003}) { // below 16 k rows are loaded in pieces
        if (!serves(c, m) || (std::string(c.layout) != "n12k4" && std::string(c.layout) != "n12k8" && k != 13))
          continue;
        INFO(name_of(c), " m ", m, " k ", k);
        for (const std::string& line : listing(compile(c, m, 1024, k))) {
          CHECK_MESSAGE(line.find("x18") == std::string::npos, line);
          CHECK_MESSAGE(line.find("w18") == std::string::npos, line);
        }
      }
}

TEST_CASE("what the K loops consist of" * doctest::skip(!has_llvm_mc())) {
  const Case sdot{arm::int8_mm_sdot(), "n12k4"}, sdot_k8{arm::int8_mm_sdot(), "n12k8"},
      i8mm{arm::int8_mm_i8mm(), "n12k8"}, neon{arm::int8_mm_neon(), "n12k8"};
  const auto loops_of = [](const Case& c, std::int64_t m) { return k_loops(listing(compile(c, m, 1024, 1024))); };
  struct Expected {
    const Case& c;
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
  for (const Case* const c : {&sdot, &sdot_k8})
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

// ---------------------------------------------------------------- what the code computes

namespace {

/// Calls `check(case)` for each path that this machine can execute. Says once which are left out.
template <class Check> void for_each_runnable(Check check) {
  const Target machine = detect_machine().target;
  for (const Case& c : cases()) {
    if (!machine.features.contains(c.row.needs)) {
      MESSAGE("not run here, the machine lacks its features: ", name_of(c));
      continue;
    }
    INFO(name_of(c));
    check(c);
  }
}

void check_kernel(const Case& c, const KernelCase& k, std::mt19937& random) {
  check_int8_mm_kernel(compile(c, k.m, k.n, k.k), k, random, call_and_check_registers);
}

} // namespace

TEST_CASE("every m of every class, any n and k, between inaccessible pages") {
  constexpr unsigned kSeed = 30;
  INFO("seed ", kSeed);
  std::mt19937 random(kSeed);
  // Classes up to 32 whole; of the unbounded one more than a period of every path's row split (8 · 8 rows), in odd
  // steps.
  std::vector<std::int64_t> rows;
  for (std::int64_t m = 1; m <= 40; ++m)
    rows.push_back(m);
  for (std::int64_t m = 43; m <= 130; m += 9)
    rows.push_back(m);
  for_each_runnable([&](const Case& c) {
    int turn = 0;
    for (const std::int64_t m : rows) {
      if (!serves(c, m))
        continue;
      for (const Guard guard : {Guard::after, Guard::before}) {
        const std::int64_t n = 1 + random() % (m > 40 ? 40 : 130), k = 1 + random() % (m % 3 == 0 ? 150 : 50);
        check_kernel(c, {.m = m, .n = n, .k = k, .n_cut = n, .values = kAllValues[turn++ % 4], .guard = guard}, random);
      }
    }
  });
}

TEST_CASE("all kinds of values with every path") {
  constexpr unsigned kSeed = 31;
  INFO("seed ", kSeed);
  std::mt19937 random(kSeed);
  for_each_runnable([&](const Case& c) {
    for (const std::int64_t m : {1, 2, 4, 7, 13, 35})
      for (const Values values : kAllValues)
        if (serves(c, m))
          check_kernel(c, {.m = m, .n = 29, .k = 200, .n_cut = 29, .values = values, .guard = Guard::after}, random);
  });
}

TEST_CASE("every remainder of n and k") {
  constexpr unsigned kSeed = 32;
  INFO("seed ", kSeed);
  std::mt19937 random(kSeed);
  for_each_runnable([&](const Case& c) {
    const std::int64_t block = int8_mm::PackLayout::parse(c.layout)->n_block;
    for (const std::int64_t m : {1, 2, 3, 6, 15, 33}) {
      if (!serves(c, m))
        continue;
      for (std::int64_t k = 0; k <= 67; k += m < 15 ? 1 : 3) {
        const std::int64_t n = 1 + random() % 40;
        check_kernel(c, {.m = m, .n = n, .k = k, .n_cut = n, .values = Values::random, .guard = Guard::after}, random);
      }
      // One tile of columns and more: of four panels at most.
      const std::int64_t last = std::min<std::int64_t>(m <= 2 ? 5 * block : 2 * block, 150);
      for (std::int64_t n = 1; n <= last; n += last > 60 ? 3 : 1)
        check_kernel(c, {.m = m, .n = n, .k = 21, .n_cut = n, .values = Values::random, .guard = Guard::after}, random);
    }
  });
}

TEST_CASE("a range of columns at a time, as several threads would") {
  constexpr unsigned kSeed = 33;
  INFO("seed ", kSeed);
  std::mt19937 random(kSeed);
  for_each_runnable([&](const Case& c) {
    for (const std::int64_t m : {1, 2, 4, 8, 16, 40}) {
      if (!serves(c, m))
        continue;
      const std::int64_t n = 333, k = 30, step = int8_mm::Plan::from(compile(c, m, n, k).plan)->n_step;
      for (const std::int64_t steps : {1, 2})
        check_kernel(c,
                     {.m = m, .n = n, .k = k, .n_cut = steps * step, .values = Values::random, .guard = Guard::after},
                     random);
    }
  });
}

TEST_CASE("sums wrap and never saturate") {
  std::mt19937 random(34);
  // 2^17 products of (−128)·(−128) are 2^31: one more than s32 holds.
  constexpr std::int64_t k = std::int64_t{1} << 17;
  for_each_runnable([&](const Case& c) {
    for (const std::int64_t m : {1, 5})
      if (serves(c, m) && std::string(c.layout).starts_with("n12"))
        check_kernel(c, {.m = m, .n = 3, .k = k, .n_cut = 3, .values = Values::all_lowest, .guard = Guard::after},
                     random);
  });
}

#endif
