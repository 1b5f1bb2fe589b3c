#define DOCTEST_CONFIG_IMPLEMENT_WITH_MAIN
#include <doctest/doctest.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <random>
#include <sstream>
#include <string>
#include <vector>

#include <fmt/format.h>

#include "backends/nvidia/fp8_block_bmm.h"
#include "jit/f16.h"
#include "tests/ptx_machine.h"

/// The PTX of fp8_block_bmm, run by tests/ptx_machine on a GPU of few SMs, against the op's reference.
/// KILN_TEST_CONFIGURATIONS: more of them to run, one `b m n k configuration` a line.

using namespace kiln;
using namespace kiln::nvidia::fp8;
using kiln::fp8_block_bmm::ZDtype;
using kiln::test::ptx::Launch;
using kiln::test::ptx::TensorMap;

namespace {

struct Problem {
  std::int64_t b, m, n, k;
  const char* configuration;
  bool x_e5m2 = false, y_e5m2 = false;
  ZDtype z = ZDtype::bf16;
};

float z_value(ZDtype type, const std::uint8_t* at) {
  std::uint32_t bits = 0;
  std::memcpy(&bits, at, type == ZDtype::f32 ? 4 : 2);
  if (type == ZDtype::bf16)
    bits <<= 16;
  else if (type == ZDtype::f16)
    return float_of_f16(static_cast<std::uint16_t>(bits));
  return std::bit_cast<float>(bits);
}

/// Empty, or what is wrong. Rows of X and Z lie apart, scales of X with m innermost; blocks: of `sms` SMs.
std::string wrong(const Problem& p, const Config& config, std::uint64_t seed, int sms) {
  const Shape shape{p.b, p.n, p.k, p.x_e5m2, p.y_e5m2, p.z};
  const Result<Emitted> made = emit({90, true}, shape, config);
  if (!made)
    return made.status().message();
  std::mt19937_64 random(seed);
  const std::int64_t kb = (p.k + 127) / 128, nb = (p.n + 127) / 128, ldx = p.k + 32, ldz = p.n + 16;
  const std::int64_t z_bytes = p.z == ZDtype::f32 ? 4 : 2;
  const auto bytes = [&](std::int64_t size) {
    std::vector<std::uint8_t> v(static_cast<std::size_t>(size));
    for (std::uint8_t& byte : v)
      byte = static_cast<std::uint8_t>(random()) & 0xB7; // moderate numbers of either type
    return v;
  };
  const auto scales = [&](std::int64_t size) {
    std::vector<float> v(static_cast<std::size_t>(size));
    for (float& s : v)
      s = static_cast<float>(1 + random() % 7) / 8;
    return v;
  };
  const std::vector<std::uint8_t> x = bytes(p.b * p.m * ldx), y = bytes(p.b * p.n * p.k);
  const std::vector<float> xs = scales(p.b * kb * p.m), ys = scales(p.b * nb * kb);
  std::vector<std::uint8_t> z(static_cast<std::size_t>(p.b * p.m * ldz * z_bytes), 0xEE);
  const auto* const boxes = &made->boxes;
  const TensorMap x_map{const_cast<std::uint8_t*>(x.data()),
                        1,
                        {p.k, p.m, p.b},
                        {ldx, p.m * ldx},
                        {boxes->x.inner, boxes->x.rows},
                        boxes->x.swizzle};
  const TensorMap y_map{const_cast<std::uint8_t*>(y.data()),
                        1,
                        {p.k, p.n, p.b},
                        {p.k, p.n * p.k},
                        {boxes->y.inner, boxes->y.rows},
                        boxes->y.swizzle};
  const TensorMap z_map{z.data(),
                        static_cast<int>(z_bytes),
                        {p.n, p.m, p.b},
                        {ldz * z_bytes, p.m * ldz * z_bytes},
                        {boxes->z.inner, boxes->z.rows},
                        boxes->z.swizzle};
  const auto address = [](const void* at) { return static_cast<std::uint64_t>(reinterpret_cast<std::uintptr_t>(at)); };
  const auto number = [](std::int64_t v) { return static_cast<std::uint64_t>(v); };
  const auto sizes = [](const auto& v) { return v.size() * sizeof(v[0]); };
  Launch launch;
  launch.seed = seed;
  launch.shared_bytes = static_cast<unsigned>(made->launch.smem_bytes);
  launch.blocks = made->launch.grid(p.m, p.n, sms, p.b).x;
  launch.parameters = {{0, &x_map},
                       {0, &y_map},
                       {0, boxes->z.inner > 0 ? &z_map : nullptr},
                       {address(x.data())},
                       {address(y.data())},
                       {address(xs.data())},
                       {address(ys.data())},
                       {address(z.data())},
                       {0},
                       {number(p.m * ldx)},
                       {number(p.m * ldz)},
                       {number(kb * p.m)},
                       {number(p.m)},
                       {number(ldx)},
                       {number(ldz)},
                       {1},
                       {number(p.m)}};
  launch.memory = {{x.data(), sizes(x)},
                   {y.data(), sizes(y)},
                   {xs.data(), sizes(xs)},
                   {ys.data(), sizes(ys)},
                   {z.data(), sizes(z), true}};
  if (std::string problem = test::ptx::run(made->text, launch); !problem.empty())
    return problem;

  std::vector<std::uint8_t> expected(z.size(), 0xEE);
  fp8_block_bmm::Tensors t;
  t.m = p.m;
  t.x = x.data();
  t.x_stride_b = p.m * ldx;
  t.ldx = ldx;
  t.y = y.data();
  t.xs = xs.data();
  t.xs_stride_b = kb * p.m;
  t.xs_stride_m = 1;
  t.xs_stride_k = p.m;
  t.ys = ys.data();
  t.z = expected.data();
  t.z_stride_b = p.m * ldz;
  t.ldz = ldz;
  using kiln::fp8_block_bmm::Float8;
  fp8_block_bmm::reference(fp8_block_bmm::make_desc(p.b, p.m, p.n, p.k, p.x_e5m2 ? Float8::e5m2 : Float8::e4m3,
                                                    p.y_e5m2 ? Float8::e5m2 : Float8::e4m3, p.z),
                           t);
  double worst = 0, norm = 0;
  for (std::int64_t row = 0; row < p.b * p.m; ++row)
    for (std::int64_t column = 0; column < ldz; ++column) {
      const std::size_t at = static_cast<std::size_t>((row * ldz + column) * z_bytes);
      if (column >= p.n) {
        if (std::memcmp(&z[at], &expected[at], static_cast<std::size_t>(z_bytes)) != 0)
          return fmt::format("row {}: written beside at {}", row, column);
        continue;
      }
      const double want = z_value(p.z, &expected[at]), got = z_value(p.z, &z[at]);
      norm = std::max(norm, std::fabs(want));
      if (!(std::fabs(got - want) <= 0x1p-6 * std::fabs(want) + 1e-3))
        return fmt::format("row {} column {}: {} instead of {}", row, column, got, want);
      worst = std::max(worst, std::fabs(got - want));
    }
  return norm > 0 ? "" : "nothing but zeros";
}

#if defined(__SANITIZE_ADDRESS__) // ten times slower
constexpr int kSeeds = 1;
#else
constexpr int kSeeds = 2;
#endif

void check_problem(const Problem& p, int sms = 4, int seeds = kSeeds) {
  const std::optional<Config> config = Config::parse(p.configuration);
  REQUIRE(config);
  for (int seed = 1; seed <= seeds; ++seed) {
    const std::string what = fmt::format("b={} m={} n={} k={} {} seed {}", p.b, p.m, p.n, p.k, p.configuration, seed);
    CAPTURE(what);
    CHECK(wrong(p, *config, static_cast<std::uint64_t>(seed), sms) == "");
  }
}

} // namespace

// Configurations by what is special about them; sizes with short last blocks of m, n and k, and fewer stages than
// steps. Tiles of several warpgroups, and those next to each other, take the most time here.

TEST_CASE("a copying warp and warpgroups that scale before the next step; these ran on a GPU") {
  check_problem({1, 129, 264, 400, "x2v1n128s3k1g8r"});
  check_problem({2, 7, 136, 272, "y2v1n16s3k1g0"});
  check_problem({1, 60, 264, 656, "x1v1n192s3k1g0r", true, false, ZDtype::f32});
  check_problem({2, 30, 136, 400, "y1v1n32s4k1g0c", false, true, ZDtype::f16});
}

TEST_CASE("K split over a cluster") {
  check_problem({1, 1, 72, 400, "y1v1n8s4k2g0"}); // ran on a GPU
  check_problem({1, 5, 72, 1040, "y1v1n8s4k2g0ef"});
  check_problem({1, 5, 72, 1040, "y2v1n8s3k4g0efp", false, false, ZDtype::f32});
  check_problem({1, 200, 136, 400, "x2v1n64s4k2g16ep"});
}

TEST_CASE("steps that overlap, of tiles with one to five steps") {
  for (const std::int64_t k : {128, 144, 384, 512, 640})
    check_problem({2, 130, 136, k, "x2v1n64s3k1g8ro"});
  check_problem({1, 128, 136, 656, "x2v1n64s4k1g0roefp"});
  check_problem({2, 16, 136, 656, "y2v1n16s4k1g0oef"});
  check_problem({2, 130, 136, 656, "x2v1n64s3k1g8rol"});
}

TEST_CASE("copies by the multiplying warps, of tiles with one to five steps") {
  for (const std::int64_t k : {16, 256, 400, 512, 528})
    check_problem({2, 130, 136, k, "x2v1n128s3k1g8roi"});
  check_problem({1, 129, 264, 656, "x2v1n128s5k1g2coi", true, true});
  check_problem({1, 129, 200, 400, "x2v1n112s4k1g8roi"});
  check_problem({1, 129, 200, 528, "x2v1n128s6k1g16roid", false, false, ZDtype::f16});
  check_problem({1, 5, 72, 1040, "y1v1n8s3k1g0oif"});
  check_problem({1, 129, 264, 400, "x2v1n128s4k1g8roil"});
  check_problem({2, 30, 136, 528, "y1v1n32s4k1g0coif"});
}

TEST_CASE("an early start") {
  check_problem({1, 129, 136, 400, "x2v1n128s3k1g8re"});
  check_problem({3, 33, 136, 128, "x1v1n64s4k1g0ref"});
  check_problem({1, 5, 72, 656, "y1v1n8s3k1g0e"});
  check_problem({2, 5, 72, 128, "y1v1n8s8k1g0ef"}); // the ring is never full
}

TEST_CASE("more from the environment") {
  const char* const more = std::getenv("KILN_TEST_CONFIGURATIONS");
  if (more == nullptr)
    return;
  std::string text = more;
  for (char& c : text)
    c = c == ',' ? '\n' : c;
  std::istringstream in(text);
  std::string configuration;
  for (Problem p{}; in >> p.b >> p.m >> p.n >> p.k >> configuration;) {
    p.configuration = configuration.c_str();
    check_problem(p);
  }
}
