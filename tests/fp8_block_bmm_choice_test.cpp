#define DOCTEST_CONFIG_IMPLEMENT_WITH_MAIN
#include <doctest/doctest.h>

#include <algorithm>
#include <limits>
#include <string>
#include <vector>

#include "backends/nvidia/fp8_block_bmm.h"

using namespace kiln;
using namespace kiln::nvidia::fp8;

namespace {

const Shape kShapes[] = {{1, 4096, 7168},  {1, 7168, 2048}, {1, 24576, 1536}, {8, 4096, 4096},
                         {32, 4096, 4096}, {128, 512, 128}, {1, 8, 16},       {2, 576, 144},
                         {1, 2112, 2064},  {5, 136, 640},   {1, 264, 131072}, {1, 131072, 16384}};

} // namespace

TEST_CASE("what is chosen and what is to be timed: printed, read again, accepted and made") {
  for (const Shape& shape : kShapes)
    for (const std::int64_t m : fp8_block_bmm::kMClasses)
      for (const bool invariant : {false, true}) {
        if (invariant && m != kAny)
          continue;
        CAPTURE(shape.b);
        CAPTURE(shape.n);
        CAPTURE(shape.k);
        CAPTURE(m);
        const std::vector<Config> all = candidates(shape, m, invariant);
        REQUIRE(!all.empty());
        CHECK(all.size() <= 16);
        CHECK(all.front() == choose(shape, m, invariant));
        for (const Config& c : all) {
          const std::string text = c.text();
          CAPTURE(text);
          CHECK(std::count(all.begin(), all.end(), c) == 1);
          CHECK(text.size() <= 64);
          CHECK(text.find_first_not_of("abcdefghijklmnopqrstuvwxyz0123456789") == std::string::npos);
          REQUIRE(Config::parse(text));
          CHECK(*Config::parse(text) == c);
          CHECK(check(shape, m, invariant, c));
          if (invariant)
            CHECK(c.split == 1);
          const Result<Emitted> made = emit({90, true}, shape, c);
          REQUIRE(made);
          CHECK(made->launch.smem_bytes <= 227 * 1024);
          CHECK(made->launch.blocks_per_sm * (made->launch.smem_bytes + 1024) <= 228 * 1024);
          CHECK(made->launch.tile_m % 8 == 0);
          CHECK(std::max(made->boxes.x.rows, made->boxes.y.rows) <= 256);
          // One tile must be as high as the class where the kernel reckons with no more.
          if (c.group == 0)
            CHECK(m <= made->launch.tile_m);
        }
      }
}

TEST_CASE("the chosen fill the GPU where the shape allows it") {
  const auto blocks = [](const Shape& s, std::int64_t m) {
    const Result<Emitted> made = emit({90, true}, s, choose(s, m, false));
    REQUIRE(made);
    const cuda::LaunchPlan& l = made->launch;
    return (s.n + l.tile_n - 1) / l.tile_n * ((m + l.tile_m - 1) / l.tile_m) * s.b * l.split_k;
  };
  CHECK(blocks({1, 4096, 7168}, 8) >= 120); // 64 tiles of the least height
  CHECK(blocks({1, 7168, 2048}, 128) >= 110);
  CHECK(blocks({1, 24576, 1536}, 64) >= 120);
}

TEST_CASE("text that is no configuration") {
  for (const char* text : {"", "x", "x2", "z2v1n128s5k1g8", "x2v1n128s5k1g8q", "x2v1n128s5k1g8rr", "x02v1n128s5k1g8",
                           "x2v1n128s5k1g", "x2v1n128s5k1g-8", "x2v1n99999999999s5k1g8", "x2v1n128s5k1g8 ",
                           "X2v1n128s5k1g8", "x2v1n128s5k1g8io", "x2v1n128s5k1g8oo", "x2v1n128s5k1gr8o"}) {
    CAPTURE(text);
    CHECK_FALSE(Config::parse(text));
  }
}

TEST_CASE("configurations that no kernel is made of are refused with the reason") {
  const Shape shape{1, 4096, 7168};
  const auto why = [&](const char* text, std::int64_t m = kAny, bool invariant = false) {
    const std::optional<Config> c = Config::parse(text);
    REQUIRE(c);
    const Status s = check(shape, m, invariant, *c);
    CHECK(s.code() == Code::invalid_argument);
    return s.message();
  };
  const auto contains = [](const std::string& text, const char* part) { return text.find(part) != std::string::npos; };
  CHECK(check(shape, kAny, false, *Config::parse("x2v1n128s5k1g16r")));
  for (const char* text :
       {"x0v1n128s5k1g8", "x9v1n128s5k1g8", "x2v1n136s4k1g8", "x2v1n264s2k1g8", "x2v1n0s5k1g8", "x2v1n128s1k1g8",
        "x2v1n128s99k1g8", "x2v1n128s4k0g8", "x2v1n128s4k9g8", "x4096v4096n128s4k1g8"})
    CHECK(contains(why(text), "out of its range"));
  CHECK(contains(why("x2v1n128s8k1g8"), "shared memory"));
  CHECK(contains(why("x2v2n128s3k1g8"), "registers"));
  CHECK(contains(why("x2v1n128s4k2g8r"), "K is not to be split"));
  CHECK(contains(why("x2v1n64s4k2g8", kAny, true), "K is not to be split"));
  CHECK(contains(why("y1v1n8s4k1g0c", 8), "multiple of eight"));
  CHECK(contains(why("y1v1n8s4k1g0", 16), "a tile has 8 rows, the class 16"));
  CHECK(contains(why("x2v1n128s4k1g0"), "a tile has 128 rows"));
  CHECK(contains(why("x2v1n128s5k1g8o"), "registers"));
  CHECK(check(shape, kAny, false, *Config::parse("x2v1n128s5k1g8oi")));
  CHECK(contains(why("x1v2n32s4k1g8o"), "steps overlap in one wave"));
  CHECK(contains(why("x2v1n64s4k2g8o"), "steps overlap in one wave"));
  for (const char* text : {"x2v1n128s5k1g8i", "x2v1n128s2k1g8oi", "x2v1n128s5k1g8oie", "x2v1n128s5k1g8oip"})
    CHECK(contains(why(text), "without a warp that copies"));
  CHECK(contains(why("x2v1n128s5k1g8f"), "more than once"));
  CHECK(contains(why("x2v1n128s5k1g8l"), "nothing is late"));
}
