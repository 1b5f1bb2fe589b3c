#include <doctest/doctest.h>

#include <random>
#include <string>
#include <vector>

#include "jit/ops/int8_mm.h"
#include "tests/guarded_buffer.h"
#include "tests/int8_values.h"

/// Packing B for int8_mm: every layout that a path of any machine reads, against the definition of PackLayout.

using namespace kiln;
using namespace kiln::int8_mm;
using namespace kiln::test;

TEST_CASE("every layout, both orders of B, every remainder: the definition, and nothing beside it is touched") {
  constexpr unsigned kSeed = 31;
  INFO("seed ", kSeed);
  std::mt19937 random(kSeed);
  for (const char* id :
       {"n16k1", "n16k2", "n16k4", "n12k4", "n12k8", "n24k8", "n8k4", "n32k4", "n128k4", "n192k8", "n5k3"})
    for (const BLayout b_layout : {BLayout::kn, BLayout::nk})
      for (int i = 0; i < 60; ++i) {
        const PackLayout layout = *PackLayout::parse(id);
        const std::int64_t n = 1 + random() % (2 * layout.n_block + 40), k = random() % 40;
        const bool nk = b_layout == BLayout::nk;
        const std::int64_t ldb = (nk ? k : n) + random() % 3;
        const std::int64_t rows = nk ? n : k, columns = nk ? k : n;
        const std::int64_t extent = rows == 0 || columns == 0 ? 0 : (rows - 1) * ldb + columns;
        INFO(id, nk ? " nk" : " kn", " n=", n, " k=", k, " ldb=", ldb);
        const Guard guard = i % 2 ? Guard::after : Guard::before;
        const std::int64_t begin = random() % layout.panels(n), end = layout.panels(n);
        const std::int64_t panel_bytes = layout.panel_bytes(k), packed = (end - begin) * panel_bytes;
        const GuardedBuffer b(static_cast<std::size_t>(extent), guard), out(static_cast<std::size_t>(packed), guard),
            sums(static_cast<std::size_t>((end - begin) * layout.n_block) * 4, guard);
        fill(b.as<std::int8_t>(), extent, kAllValues[i % std::size(kAllValues)], random);
        std::memset(out.as<void>(), 0x5a, static_cast<std::size_t>(packed));
        pack_panels(layout, b.as<std::int8_t>(), ldb, b_layout, n, k, begin, end, out.as<std::int8_t>(),
                    sums.as<std::int32_t>());

        std::vector<std::int8_t> expected(static_cast<std::size_t>(packed));
        std::vector<std::int32_t> expected_sums(static_cast<std::size_t>((end - begin) * layout.n_block));
        for (std::int64_t column = begin * layout.n_block; column < n; ++column)
          for (std::int64_t row = 0; row < k; ++row) {
            const std::int8_t value = b.as<std::int8_t>()[nk ? column * ldb + row : row * ldb + column];
            const std::int64_t panel = column / layout.n_block - begin;
            expected[static_cast<std::size_t>(panel * panel_bytes +
                                              (row / layout.k_block * layout.n_block + column % layout.n_block) *
                                                  layout.k_block +
                                              row % layout.k_block)] = value;
            expected_sums[static_cast<std::size_t>(column - begin * layout.n_block)] += value;
          }
        REQUIRE(std::equal(expected.begin(), expected.end(), out.as<std::int8_t>()));
        REQUIRE(std::equal(expected_sums.begin(), expected_sums.end(), sums.as<std::int32_t>()));
      }
}

TEST_CASE("sums of long columns of the lowest value do not saturate") {
  for (const char* id : {"n12k8", "n16k1", "n32k4"}) {
    const PackLayout layout = *PackLayout::parse(id);
    const std::int64_t k = 70000;
    const std::vector<std::int8_t> b(static_cast<std::size_t>(k), -128);
    std::vector<std::int8_t> out(static_cast<std::size_t>(layout.panel_bytes(k)));
    std::vector<std::int32_t> sums(static_cast<std::size_t>(layout.n_block));
    pack_panels(layout, b.data(), k, BLayout::nk, 1, k, 0, 1, out.data(), sums.data());
    CHECK(sums[0] == -128 * k);
  }
}

TEST_CASE("a layout has one name") {
  for (const char* id : {"n1k1", "n16k4", "n256k64"})
    CHECK(PackLayout::parse(id)->id() == id);
  for (const char* id :
       {"", "n", "n16", "n16k", "n016k4", "n16k04", "n0k4", "n16k0", "n257k4", "n16k65", "n-1k4", "n16k4 ", "N16k4"}) {
    CAPTURE(id);
    const auto layout = PackLayout::parse(id);
    REQUIRE(!layout.is_ok());
    CHECK(layout.status().code() == Code::invalid_argument);
    CHECK(layout.status().message().find(id) != std::string::npos);
  }
}

TEST_CASE("a launch plan has each value once, in its range") {
  using Values = std::vector<std::pair<std::string, std::int64_t>>;
  const Values good = Plan{.m_step = 6, .n_step = 32, .workspace_fixed = 64, .workspace_per_row = 4096}.values();
  REQUIRE(Plan::from(good).is_ok());
  CHECK(Plan::from(good)->values() == good);
  const auto refused = [](const Values& values) {
    const auto plan = Plan::from(values);
    return !plan.is_ok() && plan.status().code() == Code::integrity;
  };
  for (std::size_t i = 0; i < good.size(); ++i) {
    CAPTURE(good[i].first);
    Values missing = good, repeated = good, in_place_of_another = good, negative = good, huge = good;
    missing.erase(missing.begin() + static_cast<std::ptrdiff_t>(i));
    repeated.push_back(good[i]);
    in_place_of_another[(i + 1) % good.size()] = good[i];
    negative[i].second = -1;
    huge[i].second = std::int64_t{1} << 62;
    for (const Values& values : {missing, repeated, in_place_of_another, negative, huge})
      CHECK(refused(values));
  }
  // The largest that is taken: the workspace of the largest m, rounded up by the largest m_step, still has a size.
  Plan largest{.m_step = 1 << 16,
               .workspace_fixed = std::int64_t{1} << 40,
               .workspace_per_row = (std::int64_t{1} << 32) - (1 << 20)};
  CHECK(Plan::from(largest.values()).is_ok());
  CHECK(largest.workspace_bytes((std::int64_t{1} << 31) + largest.m_step) > 0);
  ++largest.workspace_per_row;
  CHECK(refused(largest.values()));
}
