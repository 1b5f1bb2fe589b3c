#include <doctest/doctest.h>

#include <string>
#include <thread>
#include <vector>

#include <fmt/format.h>

#if defined(__aarch64__)
#include <sys/prctl.h>
#endif

#include "backends/arm/rows.h"
#include "tests/arm_int8_mm_check.h"

/// The SVE paths of int8_mm, kernel by kernel: what emission promises for every vector length on any host, and on
/// aarch64 what the kernels of the machine's own vector length compute.

using namespace kiln;
using namespace kiln::test;

namespace {

Target machine_with(int sve_bits) {
  return {.arch = Arch::aarch64, .features = {Feature::neon, Feature::i8mm, Feature::sve}, .sve_bits = sve_bits};
}

/// Both paths on all layouts that they meet with vectors of this length.
std::vector<ArmPath> paths_for(int sve_bits) {
  const Target target = machine_with(sve_bits);
  const int block = sve_bits / 128 * 12;
  std::vector<ArmPath> paths = {
      {arm::int8_mm_sve_i8mm(), fmt::format("n{}k8", block), kAny, target},
      {arm::int8_mm_sve_sdot(), fmt::format("n{}k4", block), kAny, target},
      {arm::int8_mm_sve_sdot(), fmt::format("n{}k8", block), 2, target},
      {arm::int8_mm_sve_sdot(), fmt::format("n{}k4", sve_bits / 16), kAny, target}, // SME's
  };
  return paths;
}

constexpr int kVectorBits[] = {256, 384, 512, 1024, 2048};

} // namespace

TEST_CASE("the same desc gives the same bytes, with the features, the vector length and the plan of its path") {
  for (const int bits : kVectorBits)
    for (const ArmPath& path : paths_for(bits))
      for (const std::int64_t m : kOneOfEachClass)
        for (const std::int64_t k : {0, 1, 7, 63, 64, 1000, 4096}) {
          if (!serves(path, m))
            continue;
          INFO(name_of(path), " of ", bits, " bits, m ", m, " k ", k);
          const CodeObject code = compile(path, m, 100, k);
          CHECK(code == compile(path, m, 100, k));
          CHECK(code.arch == Arch::aarch64);
          CHECK(code.features == path.row.needs);
          CHECK(code.vector_bits == bits);
          CHECK(path.row.vector_bits(path.target) == bits);
          const Result<int8_mm::Plan> plan = int8_mm::Plan::from(code.plan);
          REQUIRE(plan.is_ok());
          CHECK(plan->layout.id() == path.layout);
        }
}

TEST_CASE("layouts that a path reads, and rows that it leaves to another") {
  for (const int bits : kVectorBits) {
    for (const ArmPath& path : paths_for(bits)) {
      INFO(name_of(path), " of ", bits, " bits");
      for (const std::int64_t m : kOneOfEachClass) {
        const KernelDesc desc = canonical(m, 100, 100);
        CHECK(path.row.reads(path.layout, desc, path.target) == serves(path, m));
        const Result<CodeObject> code = path.row.compile(desc, path.target, path.layout);
        CHECK(code.is_ok() == serves(path, m));
        if (!code) {
          CHECK(code.status().code() == Code::unsupported);
          CHECK(code.status().message().find(path.layout) != std::string::npos);
        }
      }
      // Of other paths; n12k8 is three vectors of 256 bits, of which no two make a vector of results.
      for (const char* const foreign : {"n16k2", "n12k16", "n10k4", "n12k8", "n12k4", "n12", ""}) {
        CHECK_FALSE(path.row.reads(foreign, canonical(1, 100, 100), path.target));
        CHECK_FALSE(path.row.reads(foreign, canonical(33, 100, 100), path.target));
        CHECK(path.row.compile(canonical(33, 100, 100), path.target, foreign).status().code() == Code::unsupported);
      }
    }
  }
  CHECK(arm::int8_mm_sve_i8mm().pack_layout(canonical(1, 9, 9), machine_with(256)) == "n24k8");
  CHECK(arm::int8_mm_sve_sdot().pack_layout(canonical(1, 9, 9), machine_with(512)) == "n48k4");
  CHECK(arm::int8_mm_sve_i8mm().pack_layout(canonical(1, 9, 9), machine_with(2048)) == "n192k8");

  const Implementation i8mm = arm::int8_mm_sve_i8mm();
  CHECK(i8mm.declines(canonical(2, 9, 9), machine_with(256)).find("SDOT") != std::string::npos);
  CHECK(i8mm.declines(canonical(3, 9, 9), machine_with(256)).empty());
  CHECK(i8mm.declines(int8_mm::op().pack_desc(canonical(1, 9, 9)), machine_with(256)).empty());
}

TEST_CASE("what a path cannot do is refused with the reason") {
  for (const Implementation& row : {arm::int8_mm_sve_i8mm(), arm::int8_mm_sve_sdot()}) {
    const KernelDesc desc = canonical(1, 16, 16);
    CHECK(row.supports(desc, machine_with(256)).is_ok());
    CHECK(row.supports(canonical(1, 16, std::int64_t{1} << 30), machine_with(256)).message().find("k=1073741824") !=
          std::string::npos);
    const Status narrow = row.supports(desc, machine_with(128));
    CHECK(narrow.code() == Code::unsupported);
    CHECK(narrow.message() == "made for vectors of 256 bits or more: NEON's do as well at 128");
    CHECK(row.assumes(machine_with(256)).find("256 bits") != std::string::npos);
  }
}

TEST_CASE("every word is an instruction to llvm-mc, none names x18" * doctest::skip(!has_llvm_mc())) {
  for (const int bits : {256, 2048})
    for (const ArmPath& path : paths_for(bits))
      for (const std::int64_t m : kOneOfEachClass)
        for (const std::int64_t k : {13, 1003}) { // below 16 k rows are loaded in pieces
          if (!serves(path, m))
            continue;
          INFO(name_of(path), " m ", m, " k ", k);
          for (const std::string& line : listing(compile(path, m, 1024, k))) {
            CHECK_MESSAGE(line.find("x18") == std::string::npos, line);
            CHECK_MESSAGE(line.find("w18") == std::string::npos, line);
          }
        }
}

TEST_CASE("what the K loops consist of" * doctest::skip(!has_llvm_mc())) {
  struct Expected {
    std::size_t path; ///< of paths_for
    std::int64_t m;
    std::vector<int> products; ///< of a step, of each tile height
    double loads;              ///< at most, per product
  };
  const Expected expected[] = {
      {0, 33, {18, 24}, 0.5},         {0, 8, {18, 24}, 0.5}, {0, 4, {24}, 0.6}, {1, 33, {18, 21, 24}, 0.5},
      {1, 8, {15, 18, 21, 24}, 0.54}, {1, 4, {18, 24}, 0.5}, {1, 2, {24}, 0.6}, {2, 2, {24}, 0.6},
  };
  for (const int bits : {256, 512})
    for (const Expected& e : expected) {
      const ArmPath path = paths_for(bits)[e.path];
      INFO(name_of(path), " of ", bits, " bits, m ", e.m);
      const auto loops = k_loops(listing(compile(path, e.m, 1024, 1024)));
      REQUIRE(loops.size() == e.products.size());
      for (std::size_t i = 0; i < loops.size(); ++i) {
        const Mix mix = mix_of(loops[i]);
        CHECK(mix.products == 2 * e.products[i]);
        CHECK(mix.a_loads + mix.weight_loads <= e.loads * mix.products);
        CHECK(mix.others <= 7); // the pointers, the count and the branch
      }
    }
  // One row: a load of weights for each product, in twelve accumulators; A is a twelfth of it.
  for (const std::size_t i : {1, 2}) {
    const ArmPath path = paths_for(256)[i];
    INFO(name_of(path));
    const auto loops = k_loops(listing(compile(path, 1, 1024, 1024)));
    REQUIRE(loops.size() == 1);
    const Mix mix = mix_of(loops[0]);
    CHECK(mix.products == 24);
    CHECK(mix.weight_loads == mix.products);
    CHECK(mix.a_loads * 12 == mix.products);
    CHECK(mix.others <= 7);
  }
}

#if defined(__aarch64__)

namespace {

std::vector<ArmPath> paths_here() {
  const int bits = detect_machine().target.sve_bits;
  if (bits >= 256) {
    std::vector<ArmPath> paths = paths_for(bits);
    for (ArmPath& path : paths)
      path.target.features = detect_machine().target.features;
    return paths;
  }
  MESSAGE("nothing is run here, the machine's SVE vectors have ", bits, " bits");
  return {};
}

} // namespace

TEST_CASE("every m of every class, any n and k, between inaccessible pages") {
  check_every_m(paths_here());
}
TEST_CASE("all kinds of values with every path") {
  check_all_values(paths_here());
}
TEST_CASE("every remainder of n and k") {
  check_every_remainder(paths_here());
}
TEST_CASE("a range of columns at a time, as several threads would") {
  check_column_ranges(paths_here());
}
TEST_CASE("epilogues of all stages and types") {
  check_epilogues(paths_here());
}
TEST_CASE("sums wrap and never saturate") {
  check_sums_wrap(paths_here());
}

TEST_CASE("on a thread that was given another vector length the sums are exact, without vectors") {
  const std::vector<ArmPath> paths = paths_here();
  if (paths.empty())
    return;
  constexpr int kSetVl = 50, kGetVl = 51, kLengthMask = 0xffff; // include/uapi/linux/prctl.h: PR_SVE_SET_VL, _GET_VL
  // A thread of its own, whose length ends with it. The main thread's stays.
  std::thread([&] {
    std::mt19937 random(35);
    CHECK((prctl(kSetVl, 16) & kLengthMask) == 16);
    CHECK((prctl(kGetVl) & kLengthMask) == 16);
    for (const ArmPath& path : paths) {
      if (!detect_machine().target.features.contains(path.row.needs))
        continue;
      INFO(name_of(path));
      const std::int64_t block = int8_mm::PackLayout::parse(path.layout)->n_block;
      for (const std::int64_t m : {1, 2, 40})
        for (const std::int64_t k : {0, 1, 70})
          if (serves(path, m))
            check_int8_mm_kernel(compile(path, m, 2 * block + 1, k),
                                 {.m = m,
                                  .n = 2 * block + 1,
                                  .k = k,
                                  .n_cut = 2 * block + 1,
                                  .values = Values::random,
                                  .guard = Guard::after},
                                 random);
      for (const std::int64_t m : {1, 2, 40})
        for (const std::int64_t k : {0, 70})
          if (serves(path, m))
            for (const KernelDesc& desc : finished_descs(m, block + 7, k))
              check_finished_kernel(compile(path, desc), desc,
                                    {.m = std::min<std::int64_t>(m, 5),
                                     .n = block + 7,
                                     .k = k,
                                     .n_cut = kAny,
                                     .values = Values::random,
                                     .guard = Guard::after},
                                    random);
    }
  }).join();
  CHECK(detect_machine().target.sve_bits == paths.front().target.sve_bits);
}

#endif
