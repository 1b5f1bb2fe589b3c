#include <doctest/doctest.h>

#include <cmath>
#include <cstring>
#include <limits>
#include <random>
#include <set>
#include <vector>

#include "api/session.h"
#include "jit/bf16.h"
#include "jit/f16.h"
#include "jit/f8.h"
#include "jit/ops/fp8_block_bmm_driver.h"

/// fp8_block_bmm on the CPU: its desc, its reference against float64 sums of this file's own, its driver's checks.

using namespace kiln;
using namespace kiln::fp8_block_bmm;

namespace {

/// Of the bits' meaning: OCP 8-bit Floating Point Specification, tables 1 and 2.
double f8_value(Float8 type, int bits) {
  const int mantissa_bits = type == Float8::e4m3 ? 3 : 2, bias = type == Float8::e4m3 ? 7 : 15;
  const int exponent = (bits & 0x7F) >> mantissa_bits, mantissa = bits & ((1 << mantissa_bits) - 1);
  const double sign = bits & 0x80 ? -1 : 1;
  if (type == Float8::e4m3 && (bits & 0x7F) == 0x7F)
    return std::numeric_limits<double>::quiet_NaN();
  if (type == Float8::e5m2 && exponent == 31)
    return mantissa == 0 ? sign * std::numeric_limits<double>::infinity() : std::numeric_limits<double>::quiet_NaN();
  const double fraction = std::ldexp(mantissa, -mantissa_bits);
  return sign * (exponent == 0 ? std::ldexp(fraction, 1 - bias) : std::ldexp(1 + fraction, exponent - bias));
}

double z_value(ZDtype type, const void* z, std::int64_t i) {
  switch (type) {
  case ZDtype::bf16:
    return float_of_bf16(static_cast<const std::uint16_t*>(z)[i]);
  case ZDtype::f16:
    return float_of_f16(static_cast<const std::uint16_t*>(z)[i]);
  case ZDtype::f32:
    break;
  }
  return static_cast<const float*>(z)[i];
}

struct Shape {
  std::int64_t b, m, n, k;
  Float8 x = Float8::e4m3, y = Float8::e4m3;
  ZDtype z = ZDtype::bf16;
  std::int64_t pad = 0;     ///< between rows of X and Z, in units of 16 and 8
  bool interleaved = false; ///< [m][b][…] instead of [b][m][…]
  bool one_scale = false;   ///< a row of X has one for all of K
};

/// The tensors of a product. Whatever is not part of Z holds 0x5A.
struct Product {
  Shape s;
  KernelDesc desc;
  std::vector<std::uint8_t> x, y, z;
  std::vector<float> xs, ys;
  Tensors t;

  explicit Product(const Shape& shape, unsigned seed = 1)
      : s(shape), desc(make_desc(s.b, s.m, s.n, s.k, s.x, s.y, s.z)) {
    std::mt19937 random(seed);
    const std::int64_t k_blocks = blocks_of(s.k), n_blocks = blocks_of(s.n), bytes = bytes_of(s.z);
    const auto lay_out = [&](std::int64_t row, std::int64_t& stride_b, std::int64_t& ld) {
      ld = s.interleaved ? s.b * row : row;
      stride_b = s.interleaved ? row : s.m * row;
      return s.b * s.m * row;
    };
    x.resize(static_cast<std::size_t>(lay_out(s.k + 16 * s.pad, t.x_stride_b, t.ldx)));
    z.assign(static_cast<std::size_t>(lay_out(s.n + 8 * s.pad, t.z_stride_b, t.ldz) * bytes), 0x5A);
    y.resize(static_cast<std::size_t>(s.b * s.n * s.k));
    for (auto* f8 : {&x, &y})
      for (std::uint8_t& value : *f8) {
        const int most = (f8 == &x ? s.x : s.y) == Float8::e4m3 ? 0x7E : 0x4B; // 448; 14
        value = static_cast<std::uint8_t>(random() % static_cast<unsigned>(most + 1) | (random() & 0x80));
      }
    t.xs_stride_k = s.one_scale ? 0 : s.m + 3; // transposed, as some quantisers leave them
    t.xs_stride_m = 1;
    t.xs_stride_b = s.one_scale ? s.m : t.xs_stride_k * k_blocks;
    xs.resize(static_cast<std::size_t>(s.b * (s.one_scale ? s.m : t.xs_stride_b)));
    ys.resize(static_cast<std::size_t>(s.b * n_blocks * k_blocks));
    for (auto* scales : {&xs, &ys})
      for (float& scale : *scales)
        scale = std::ldexp(static_cast<float>(random() % 1000 + 1), -20);
    t.m = s.m;
    t.x = x.data();
    t.y = y.data();
    t.xs = xs.data();
    t.ys = ys.data();
    t.z = z.data();
  }

  double x_at(std::int64_t b, std::int64_t i, std::int64_t p) const {
    return f8_value(s.x, x[static_cast<std::size_t>(b * t.x_stride_b + i * t.ldx + p)]);
  }
  double y_at(std::int64_t b, std::int64_t j, std::int64_t p) const {
    return f8_value(s.y, y[static_cast<std::size_t>((b * s.n + j) * s.k + p)]);
  }
  double expected(std::int64_t b, std::int64_t i, std::int64_t j) const {
    double sum = 0;
    for (std::int64_t p = 0; p < s.k; ++p) {
      const std::int64_t block = p / 128;
      sum += x_at(b, i, p) * y_at(b, j, p) *
             xs[static_cast<std::size_t>(b * t.xs_stride_b + i * t.xs_stride_m + block * t.xs_stride_k)] *
             ys[static_cast<std::size_t>((b * ((s.n + 127) / 128) + j / 128) * ((s.k + 127) / 128) + block)];
    }
    return sum;
  }
  double z_at(std::int64_t b, std::int64_t i, std::int64_t j) const {
    return z_value(s.z, z.data(), b * t.z_stride_b + i * t.ldz + j);
  }
  /// Every element within its type's rounding and what f32 sums of a block lose.
  void check() const {
    constexpr double scales = 0x1p-20; // of both, at most
    const double unit = s.z == ZDtype::bf16 ? 0x1p-8 : s.z == ZDtype::f16 ? 0x1p-11 : 0x1p-22;
    std::int64_t wrong = 0;
    for (std::int64_t b = 0; b < s.b; ++b)
      for (std::int64_t i = 0; i < s.m; ++i)
        for (std::int64_t j = 0; j < s.n; ++j) {
          const double want = expected(b, i, j), got = z_at(b, i, j);
          double magnitude = 0;
          for (std::int64_t p = 0; p < s.k; p += 1)
            magnitude = std::max(magnitude, std::fabs(x_at(b, i, p) * y_at(b, j, p)));
          const double denormal = s.z == ZDtype::f16 ? 0x1p-25 : 0;
          const double sums = static_cast<double>(blocks_of(s.k)) * 0x1p-24 * 128 * magnitude * scales;
          wrong += !(std::fabs(got - want) <= unit * std::fabs(want) + sums + denormal);
        }
    CHECK(wrong == 0);
    std::int64_t beside = 0;
    std::vector<bool> part(z.size());
    const std::int64_t bytes = bytes_of(s.z);
    for (std::int64_t b = 0; b < s.b; ++b)
      for (std::int64_t i = 0; i < s.m; ++i)
        for (std::int64_t j = 0; j < s.n * bytes; ++j)
          part[static_cast<std::size_t>((b * t.z_stride_b + i * t.ldz) * bytes + j)] = true;
    for (std::size_t i = 0; i < z.size(); ++i)
      beside += !part[i] && z[i] != 0x5A;
    CHECK(beside == 0);
  }
};

std::unique_ptr<Engine> make_cpu_engine() {
  HostOptions options;
  options.settings.cache = CacheMode::off;
  options.settings.threads = 2;
  Result<std::unique_ptr<Engine>> engine = make_engine(options);
  REQUIRE(engine.is_ok());
  return std::move(*engine);
}

const Shape kShapes[] = {
    {.b = 1, .m = 1, .n = 8, .k = 16},
    {.b = 2, .m = 3, .n = 136, .k = 144, .pad = 1},
    {.b = 3, .m = 7, .n = 24, .k = 128, .x = Float8::e5m2, .z = ZDtype::f32, .interleaved = true},
    {.b = 1, .m = 65, .n = 264, .k = 272, .y = Float8::e5m2, .z = ZDtype::f16, .pad = 2},
    {.b = 2, .m = 2, .n = 576, .k = 2064, .x = Float8::e5m2, .y = Float8::e5m2, .pad = 1, .interleaved = true},
    {.b = 1, .m = 5, .n = 128, .k = 384, .z = ZDtype::f32, .one_scale = true},
};

} // namespace

TEST_CASE("8-bit floats: every value, against the specification's tables") {
  for (int bits = 0; bits < 256; ++bits) {
    CAPTURE(bits);
    for (const Float8 type : {Float8::e4m3, Float8::e5m2}) {
      const double want = f8_value(type, bits);
      const float got = type == Float8::e4m3 ? float_of_e4m3(static_cast<std::uint8_t>(bits))
                                             : float_of_e5m2(static_cast<std::uint8_t>(bits));
      CHECK((std::isnan(want) ? std::isnan(got) : static_cast<double>(got) == want));
      CHECK(std::signbit(got) == (bits >= 128));
    }
  }
  CHECK(float_of_e4m3(0x7E) == 448.0f);
  CHECK(float_of_e5m2(0x7B) == 57344.0f);
}

TEST_CASE("the reference is the op's definition: types, strides, short last blocks") {
  const auto engine = make_cpu_engine();
  for (const Shape& shape : kShapes) {
    CAPTURE(make_desc(shape.b, shape.m, shape.n, shape.k, shape.x, shape.y, shape.z).text());
    Product direct(shape);
    fp8_block_bmm::reference(direct.desc, direct.t);
    direct.check();
    for (const int threads : {0, 1}) { // by the engine: the same bits
      Product p(shape);
      const Result<KernelRef> kernel = engine->get(p.desc);
      REQUIRE(kernel.is_ok());
      CHECK((*kernel)->implementation().isa == IsaPath::reference);
      const Status status = fp8_block_bmm::run(**kernel, {.tensors = p.t, .threads = threads});
      REQUIRE_MESSAGE(status.is_ok(), status.message());
      CHECK(p.z == direct.z);
    }
  }
}

TEST_CASE("a block's sum is rounded to f32 before it is scaled, and the whole once") {
  // 2^16 + 2^-9 in one block needs 26 bits: the f32 sum loses the small part, which a second block keeps.
  Product p({.b = 1, .m = 1, .n = 8, .k = 256, .x = Float8::e5m2, .y = Float8::e5m2, .z = ZDtype::f32});
  std::fill(p.x.begin(), p.x.end(), 0);
  std::fill(p.y.begin(), p.y.end(), 0x3C); // 1
  std::fill(p.xs.begin(), p.xs.end(), 1.0f);
  std::fill(p.ys.begin(), p.ys.end(), 1.0f);
  p.x[0] = 0x78; // 2^15
  p.x[1] = 0x78; // 2^15
  p.x[2] = 0x18; // 2^-9
  fp8_block_bmm::reference(p.desc, p.t);
  CHECK(p.z_at(0, 0, 0) == 65536.0);
  std::swap(p.x[2], p.x[130]);
  p.ys[1] = 0x1p9f;
  fp8_block_bmm::reference(p.desc, p.t);
  CHECK(p.z_at(0, 0, 0) == 65537.0);
}

TEST_CASE("NaN and infinity: in their row or column, and nowhere else") {
  const double infinity = std::numeric_limits<double>::infinity();
  for (const ZDtype z : {ZDtype::bf16, ZDtype::f16, ZDtype::f32}) {
    CAPTURE(static_cast<int>(z));
    const Shape shape = {.b = 2, .m = 3, .n = 16, .k = 144, .y = Float8::e5m2, .z = z};
    Product usual(shape);
    fp8_block_bmm::reference(usual.desc, usual.t);
    const auto differs = [&](const Product& p, std::int64_t b, std::int64_t i, std::int64_t j) {
      return std::memcmp(p.z.data() + (b * p.t.z_stride_b + i * p.t.ldz + j) * bytes_of(z),
                         usual.z.data() + (b * p.t.z_stride_b + i * p.t.ldz + j) * bytes_of(z),
                         static_cast<std::size_t>(bytes_of(z))) != 0;
    };
    struct Case {
      const char* what;
      void (*change)(Product&);
      bool (*is_nan)(std::int64_t b, std::int64_t i, std::int64_t j);
    };
    const Case cases[] = {
        {"x", [](Product& p) { p.x[static_cast<std::size_t>(p.t.x_stride_b + p.t.ldx + 143)] = 0x7F; },
         [](std::int64_t b, std::int64_t i, std::int64_t) { return b == 1 && i == 1; }},
        {"y", [](Product& p) { p.y[static_cast<std::size_t>(5 * 144)] = 0x7D; },
         [](std::int64_t b, std::int64_t, std::int64_t j) { return b == 0 && j == 5; }},
        {"xs", [](Product& p) { p.xs[2] = std::numeric_limits<float>::quiet_NaN(); },
         [](std::int64_t b, std::int64_t i, std::int64_t) { return b == 0 && i == 2; }},
        {"ys", [](Product& p) { p.ys[2] = std::numeric_limits<float>::quiet_NaN(); },
         [](std::int64_t b, std::int64_t, std::int64_t) { return b == 1; }},
    };
    for (const Case& c : cases) {
      CAPTURE(c.what);
      Product p(shape);
      c.change(p);
      fp8_block_bmm::reference(p.desc, p.t);
      for (std::int64_t b = 0; b < shape.b; ++b)
        for (std::int64_t i = 0; i < shape.m; ++i)
          for (std::int64_t j = 0; j < shape.n; ++j)
            if (c.is_nan(b, i, j))
              CHECK(std::isnan(p.z_at(b, i, j)));
            else
              CHECK_FALSE(differs(p, b, i, j));
    }
    // Beyond f16, and beyond f32 for all.
    Product p(shape);
    p.xs[0] = z == ZDtype::f16 ? 0x1p10f : 0x1p127f;
    std::fill(p.x.begin(), p.x.begin() + 144, 0x78); // 256
    std::fill(p.y.begin(), p.y.begin() + 144, 0x3C); // 1
    std::fill(p.ys.begin(), p.ys.end(), 1.0f);
    fp8_block_bmm::reference(p.desc, p.t);
    CHECK(p.z_at(0, 0, 0) == infinity);
  }
}

TEST_CASE("classes of m: at most eight kernels for one (b, n, k), each m in exactly one; batch_invariant has one") {
  std::set<std::string> kernels, first_512;
  for (std::int64_t m = 0; m <= 3000; ++m) {
    const KernelDesc desc = make_desc(2, m, 4096, 7168);
    const KernelDesc canonical = op().canonical(desc);
    const MRange range = op().m_range(canonical);
    CHECK(op().canonical(canonical) == canonical);
    CHECK((m >= range.min && m <= range.max));
    CHECK(op().m_range(desc).max == range.max);
    kernels.insert(canonical.text());
    if (m >= 1 && m <= 512)
      first_512.insert(canonical.text());
    const KernelDesc invariant =
        op().canonical(make_desc(2, m, 4096, 7168, Float8::e4m3, Float8::e4m3, ZDtype::bf16, true));
    CHECK(invariant.value[kM] == kAny);
    CHECK(op().m_range(invariant).min == 0);
  }
  CHECK(kernels.size() == 8);
  CHECK(first_512.size() == 7);
}

TEST_CASE("desc: text and back; what is refused, by name") {
  const KernelDesc desc = make_desc(8, 1024, 4096, 4096, Float8::e5m2, Float8::e4m3, ZDtype::f16, true);
  CHECK(desc.text() ==
        "fp8_block_bmm b=8 m=1024 n=4096 k=4096 x_dtype=e5m2 y_dtype=e4m3 z_dtype=f16 batch_invariant=1");
  const Result<KernelDesc> parsed = parse_desc(desc.text());
  REQUIRE(parsed.is_ok());
  CHECK(*parsed == desc);
  CHECK(op().operations(make_desc(2, 3, 8, 16)) == 2.0 * 2 * 3 * 8 * 16);
  CHECK(op().bytes(make_desc(2, 3, 8, 16)) == 2.0 * (11 * 16 + 4 * 3 + 4 + 2 * 3 * 8));
  const auto refused = [](const std::string& text, const std::string& says) {
    CAPTURE(text);
    const Result<KernelDesc> result = parse_desc("fp8_block_bmm " + text);
    REQUIRE_FALSE(result.is_ok());
    CHECK(result.status().code() == Code::invalid_argument);
    CHECK_MESSAGE(result.status().message().find(says) != std::string::npos, result.status().message());
  };
  refused("b=1 m=1 n=12 k=16", "n=12: allowed is a multiple of 8");
  refused("b=1 m=1 n=8 k=24", "k=24: allowed is a multiple of 16");
  refused("m=1 n=8 k=16", "field b is missing");
  refused("b=65536 m=1 n=8 k=16", "b=65536: allowed is an integer from 0 to 65535");
  refused("b=1 m=-2 n=8 k=16", "m=-2: allowed is an integer from 0 to 2147483647 or any");
  refused("b=1 m=1 n=8 k=16 x_dtype=bf16", "x_dtype=bf16: allowed is one of e4m3, e5m2");
  refused("b=1 m=1 n=8 k=16 z_dtype=e4m3", "z_dtype=e4m3: allowed is one of bf16, f16, f32");
  refused("b=65535 m=2147483647 n=2147483640 k=2147483632", "at most 2^61 bytes");
}

TEST_CASE("rows and batches of X may overlap and repeat") {
  const auto engine = make_cpu_engine();
  for (const auto& [stride_b, ldx] :
       {std::pair<std::int64_t, std::int64_t>{0, 144}, {16, 144}, {720, 16}, {32, 16}, {0, 0}, {5, 1}}) {
    CAPTURE(stride_b);
    CAPTURE(ldx);
    Product p({.b = 2, .m = 5, .n = 16, .k = 144});
    const Result<KernelRef> kernel = engine->get(p.desc);
    REQUIRE(kernel.is_ok());
    p.t.x_stride_b = stride_b;
    p.t.ldx = ldx;
    const Status status = fp8_block_bmm::run(**kernel, {.tensors = p.t});
    REQUIRE_MESSAGE(status.is_ok(), status.message());
    p.check();
  }
}

TEST_CASE("a call's arguments: what is refused, by name, with nothing written") {
  const auto engine = make_cpu_engine();
  Product p({.b = 2, .m = 5, .n = 16, .k = 144});
  const Result<KernelRef> kernel = engine->get(p.desc);
  REQUIRE(kernel.is_ok());
  const auto refused = [&](auto change, const std::string& says) {
    Args args = {.tensors = p.t};
    change(args);
    const Status status = fp8_block_bmm::run(**kernel, args);
    CHECK(status.code() == Code::invalid_argument);
    CHECK_MESSAGE(status.message().find(says) != std::string::npos, status.message());
    CHECK(std::all_of(p.z.begin(), p.z.end(), [](std::uint8_t byte) { return byte == 0x5A; }));
  };
  refused([](Args& a) { a.tensors.m = 9; }, "m is 9: allowed is 0 to 8");
  refused([](Args& a) { a.tensors.m = -1; }, "m is -1");
  refused([](Args& a) { a.threads = -1; }, "threads is -1");
  refused([](Args& a) { a.tensors.ldx = -144; }, "ldx is -144: allowed is 0 to 2147483647");
  refused([](Args& a) { a.tensors.ldx = std::int64_t{1} << 31; }, "ldx is 2147483648");
  refused([](Args& a) { a.tensors.ldz = 15; }, "ldz is 15: allowed is 16");
  refused([](Args& a) { a.tensors.x_stride_b = -16; }, "x_stride_b is -16: allowed is 0 to");
  refused([](Args& a) { a.tensors.z_stride_b = 24; }, "z_stride_b is 24: allowed is one whose rows do not overlap");
  refused([](Args& a) { a.tensors.z_stride_b = std::int64_t{1} << 60; }, "z_stride_b is");
  refused([](Args& a) { a.tensors.xs_stride_m = -1; }, "xs_stride_m is -1: allowed is 0 to");
  refused([](Args& a) { a.tensors.xs_stride_k = std::int64_t{1} << 31; }, "xs_stride_k is 2147483648");
  refused([](Args& a) { a.tensors.xs_stride_b = -5; }, "xs_stride_b is -5");
  refused([](Args& a) { a.tensors.x = nullptr; }, "x is null: allowed is [2][5][144]");
  refused([](Args& a) { a.tensors.y = nullptr; }, "y is null: allowed is [2][16][144]");
  refused([](Args& a) { a.tensors.xs = nullptr; }, "xs is null: allowed is [2][5][2] f32");
  refused([](Args& a) { a.tensors.ys = nullptr; }, "ys is null: allowed is [2][1][2] f32");
  refused([](Args& a) { a.tensors.z = nullptr; }, "z is null: allowed is [2][5][16]");
  Args nothing = {.tensors = {}};
  CHECK(fp8_block_bmm::run(**kernel, nothing).is_ok()); // m = 0
  CHECK(*fp8_block_bmm::workspace_bytes(**kernel, {.tensors = p.t}) == 0);
}

TEST_CASE("sizes of nothing: an empty batch or matrix does nothing, an empty K gives zeros") {
  const auto engine = make_cpu_engine();
  for (const Shape& shape : {Shape{.b = 0, .m = 2, .n = 8, .k = 16}, Shape{.b = 1, .m = 2, .n = 0, .k = 16}}) {
    Product p(shape);
    const Result<KernelRef> kernel = engine->get(p.desc);
    REQUIRE(kernel.is_ok());
    CHECK(fp8_block_bmm::run(**kernel, {.tensors = {.m = 2}}).is_ok());
  }
  Product p({.b = 2, .m = 2, .n = 8, .k = 0, .pad = 1});
  const Result<KernelRef> kernel = engine->get(p.desc);
  REQUIRE(kernel.is_ok());
  p.t.x = nullptr;
  p.t.y = nullptr;
  p.t.xs = p.t.ys = nullptr;
  CHECK(fp8_block_bmm::run(**kernel, {.tensors = p.t}).is_ok());
  p.check();
}

TEST_CASE("launch plans: round trip; every damage is refused") {
  const Plan plan = {
      .gpu =
          Plan::Gpu{.launch = {.tile_m = 128, .tile_n = 128, .threads = 288, .smem_bytes = 200000, .blocks_per_sm = 1},
                    .boxes = {.x = {.inner = 128, .rows = 128, .swizzle = 128},
                              .y = {.inner = 128, .rows = 64, .swizzle = 128, .l2_promotion = 128},
                              .z = {}}}};
  const auto values = plan.values();
  const Result<Plan> back = Plan::from(values);
  REQUIRE(back.is_ok());
  CHECK(back->gpu == plan.gpu);
  CHECK(Plan::from({})->gpu == std::nullopt);
  for (std::size_t i = 0; i < values.size(); ++i) {
    CAPTURE(values[i].first);
    auto missing = values, repeated = values, negative = values;
    missing.erase(missing.begin() + static_cast<std::ptrdiff_t>(i));
    repeated.push_back(values[i]);
    negative[i].second = -1;
    for (const auto& damaged : {missing, repeated, negative})
      CHECK(Plan::from(damaged).status().code() == Code::integrity);
  }
  const auto changed = [&](const std::string& name, std::int64_t value) {
    auto damaged = values;
    for (auto& [key, old] : damaged)
      if (key == name)
        old = value;
    return Plan::from(damaged).status().code();
  };
  CHECK(changed("x_inner", 257) == Code::integrity);
  CHECK(changed("x_rows", 0) == Code::integrity);
  CHECK(changed("y_swizzle", 48) == Code::integrity);
  CHECK(changed("z_l2_promotion", 32) == Code::integrity);
  CHECK(changed("workspace_fixed", 256) == Code::integrity);
  CHECK(changed("reduce_threads", 128) == Code::integrity);
}
