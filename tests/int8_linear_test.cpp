#include <doctest/doctest.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <memory>
#include <vector>

#include <fmt/format.h>

#include "backends/table.h"
#include "jit/engine.h"
#include "jit/floating_point.h"
#include "jit/ops/int8_linear_driver.h"
#include "tests/int8_linear_values.h"
#include "tests/int8_values.h"
#include "tests/test_engine.h"

/// int8_linear by its definition: the reference against arithmetic in float64 that rounds where the definition does and
/// shares nothing with it; the conversions of f16; the desc, the pack and what a call refuses.

using namespace kiln;
using namespace kiln::int8_linear;
using namespace kiln::test;

namespace {

/// A finite value rounded to nearest even to `precision` bits, none of them below 2^least, and beyond `largest` to
/// infinity.
double rounded(double value, int precision, int least, double largest) {
  if (value == 0 || !std::isfinite(value))
    return value;
  const int unit = std::max(std::ilogb(value) - precision + 1, least);
  const double scaled = std::ldexp(value, -unit), down = std::floor(scaled), rest = scaled - down;
  const bool up = rest > 0.5 || (rest == 0.5 && std::fmod(down, 2.0) != 0);
  const double result = std::copysign(std::ldexp(up ? down + 1 : down, unit), value);
  return std::fabs(result) > largest ? std::copysign(std::numeric_limits<double>::infinity(), value) : result;
}
double to_f32(double value) {
  return rounded(value, 24, -149, 0x1.FFFFFEp127);
}
double to_f16(double value) {
  return rounded(value, 11, -24, 65504);
}
double to_bf16(double value) {
  return rounded(value, 8, -133, 0x1.FEp127);
}
double to(Float type, double value) {
  return type == Float::bf16 ? to_bf16(value) : type == Float::f16 ? to_f16(value) : value;
}

/// a·b + c rounded to f32 once. The product of two f32 is exact in float64; where the sum is not, its last bit is made
/// odd, which tells the second rounding that something follows.
double fused(double a, double b, double c) {
  const double product = a * b, sum = product + c;
  if (!std::isfinite(sum))
    return sum;
  const double c_part = sum - product, error = (product - (sum - c_part)) + (c - c_part);
  std::uint64_t bits = std::bit_cast<std::uint64_t>(sum);
  if (error != 0 && bits % 2 == 0)
    bits += (error > 0) == (sum > 0) ? 1 : std::uint64_t(-1);
  return to_f32(std::bit_cast<double>(bits));
}

double value_at(Float type, const void* data, std::int64_t index) {
  if (type == Float::f32)
    return static_cast<double>(static_cast<const float*>(data)[index]);
  const std::uint16_t bits = static_cast<const std::uint16_t*>(data)[index];
  const int mantissa_bits = type == Float::bf16 ? 7 : 10, exponent_bits = 15 - mantissa_bits;
  const int exponent = (bits & 0x7FFF) >> mantissa_bits, mantissa = bits & ((1 << mantissa_bits) - 1);
  const int bias = (1 << (exponent_bits - 1)) - 1;
  const double sign = bits >> 15 ? -1 : 1;
  if (exponent == (1 << exponent_bits) - 1)
    return mantissa != 0 ? std::numeric_limits<double>::quiet_NaN() : sign * std::numeric_limits<double>::infinity();
  return sign * (exponent == 0 ? std::ldexp(mantissa, 1 - bias - mantissa_bits)
                               : std::ldexp(mantissa + (1 << mantissa_bits), exponent - bias - mantissa_bits));
}

std::uint32_t bits_at(Float type, const void* data, std::int64_t index) {
  return type == Float::f32 ? static_cast<const std::uint32_t*>(data)[index]
                            : static_cast<const std::uint16_t*>(data)[index];
}

/// The definition, in float64.
void oracle_row(Float x_type, Float y_type, const void* x, std::int64_t n, std::int64_t k, const std::int8_t* w,
                const float* ws, const float* bias, double* y) {
  double a = 0;
  bool finite = true;
  for (std::int64_t p = 0; p < k; ++p) {
    const double value = value_at(x_type, x, p);
    finite = finite && std::isfinite(value);
    a = std::fmax(a, std::fabs(value));
  }
  const double r = a == 0 ? 0 : to_f32(127.0 / a);
  const bool none = a == 0 || !std::isfinite(r);
  const double s = none ? 0 : to_f32(a / 127.0);
  for (std::int64_t j = 0; j < n; ++j) {
    std::int64_t sum = 0;
    for (std::int64_t p = 0; p < k && finite && !none; ++p) {
      const double scaled = to_f32(value_at(x_type, x, p) * r);
      const double q = std::clamp(rounded(scaled, 53, 0, 1e9), -127.0, 127.0); // to a multiple of 2^0
      sum += static_cast<std::int64_t>(q) * w[j * k + p];
    }
    const double t = to_f32(s * static_cast<double>(ws[j]));
    y[j] = finite ? to(y_type,
                       fused(to_f32(static_cast<double>(sum)), t, bias != nullptr ? static_cast<double>(bias[j]) : 0.0))
                  : std::numeric_limits<double>::quiet_NaN();
  }
}

constexpr Float kFloats[] = {Float::bf16, Float::f16, Float::f32};

} // namespace

TEST_CASE("the reference is the definition") {
  std::mt19937 random(8);
  for (const Float x_type : kFloats)
    for (const Float y_type : kFloats)
      for (const XValues values : kAllXValues)
        for (const auto& [m, n, k] : {std::tuple{1, 3, 1}, {6, 5, 37}, {3, 2, 300}, {2, 3, 0}})
          for (const bool with_bias : {false, true}) {
            CAPTURE(static_cast<int>(x_type));
            CAPTURE(static_cast<int>(y_type));
            CAPTURE(k);
            INFO("values ", std::string(name_of(values)));
            std::vector<float> x(static_cast<std::size_t>(m * k)), ws(static_cast<std::size_t>(n)), bias(ws.size()),
                y(static_cast<std::size_t>(m * n));
            std::vector<std::int8_t> w(static_cast<std::size_t>(n * k));
            fill_x(x_type, x.data(), m, k, k, values, random);
            fill(w.data(), n * k, Values::random, random);
            fill_floats(ws.data(), n, values == XValues::specials, random);
            fill_floats(bias.data(), n, values == XValues::specials, random);
            const float* const b = with_bias ? bias.data() : nullptr;
            reference(make_desc(m, n, k, x_type, y_type, with_bias), m, x.data(), k, w.data(), k, ws.data(), b,
                      y.data(), n);
            std::vector<double> expected(static_cast<std::size_t>(n));
            for (int i = 0; i < m; ++i) {
              const auto* row = reinterpret_cast<const std::uint8_t*>(x.data()) + i * k * bytes_of(x_type);
              oracle_row(x_type, y_type, row, n, k, w.data(), ws.data(), b, expected.data());
              for (int j = 0; j < n; ++j) {
                const double want = expected[static_cast<std::size_t>(j)], got = value_at(y_type, y.data(), i * n + j);
                if (std::isnan(want)) {
                  CHECK(bits_at(y_type, y.data(), i * n + j) == (y_type == Float::f32    ? 0x7FC00000u
                                                                 : y_type == Float::bf16 ? 0x7FC0u
                                                                                         : 0x7E00u));
                } else {
                  CHECK(got == want);
                  CHECK(std::signbit(got) == std::signbit(want));
                }
              }
            }
          }
}

TEST_CASE("a row's quantised values, by hand") {
  std::int8_t q[5];
  const float halves[] = {-127, 0.5f, 1.5f, -2.5f, 126.5f}; // r = 1: ties to even
  CHECK(quantise_row(Float::f32, halves, 5, q) == 1.0f);
  CHECK(std::vector<int>(q, q + 5) == std::vector<int>{-127, 0, 2, -2, 126});
  // 127 / a is infinite up to here: nothing to scale by.
  const float tiny[] = {0x1p-122f, -0x1p-122f, 0, 0, 0};
  CHECK(quantise_row(Float::f32, tiny, 5, q) == 0.0f);
  CHECK(std::vector<int>(q, q + 5) == std::vector<int>(5, 0));
  const float small[] = {0x1p-121f, -0x1p-122f, 0, 0, 0};
  CHECK(quantise_row(Float::f32, small, 5, q) == 0x1p-121f / 127);
  CHECK(std::vector<int>(q, q + 5) == std::vector<int>{127, -64, 0, 0, 0});
  const float wrong[] = {1, 2, std::numeric_limits<float>::infinity(), 0, 0};
  CHECK(std::isnan(quantise_row(Float::f32, wrong, 5, q)));
  CHECK(quantise_row(Float::f32, wrong, 0, q) == 0.0f);
}

TEST_CASE("f16: every value there and back, and rounding to nearest even") {
  for (std::uint32_t bits = 0; bits < 0x10000; ++bits) {
    const std::uint16_t half = static_cast<std::uint16_t>(bits);
    const float value = float_of_f16(half);
    if (std::isnan(value)) {
      CHECK(f16_of_float(value) == 0x7E00);
    } else {
      if (static_cast<double>(value) != value_at(Float::f16, &half, 0) || f16_of_float(value) != half)
        FAIL("f16 bits ", bits);
    }
  }
  std::mt19937 random(3);
  for (int i = 0; i < 200000; ++i) {
    // Every exponent around f16's range, ties among the mantissas.
    const auto next = [&] { return static_cast<std::uint32_t>(random()); };
    const std::uint32_t exponent = 127 - 28 + next() % 50, mantissa = next() & (next() % 2 ? 0x7FFFFF : 0x7FF000);
    const float value = std::bit_cast<float>((next() % 2) << 31 | exponent << 23 | mantissa);
    const std::uint16_t half = f16_of_float(value);
    if (value_at(Float::f16, &half, 0) != to_f16(static_cast<double>(value)))
      FAIL("f16 of ", value);
  }
}

TEST_CASE("the desc: classes of m, what changes no code, bad fields by name") {
  const OpSpec& spec = int8_linear::op();
  KernelDesc d = make_desc(5, 64, 32, Float::f16, Float::f32, true, WLayout::kn);
  CHECK(d.text() == "int8_linear m=5 n=64 k=32 x_dtype=f16 y_dtype=f32 bias=1 w_layout=kn");
  const KernelDesc canonical = spec.canonical(d);
  CHECK(canonical.text() == "int8_linear m=8 n=64 k=32 x_dtype=f16 y_dtype=f32 bias=1 w_layout=nk");
  CHECK(spec.canonical(canonical) == canonical);
  CHECK(spec.m_range(canonical).min == 5);
  CHECK(spec.m_range(canonical).max == 8);
  CHECK(spec.pack_desc(d) == spec.pack_desc(make_desc(1, 64, 32)));
  CHECK(*parse_desc(canonical.text()) == canonical);
  for (const auto& [text, part] :
       {std::pair<std::string, std::string>{"int8_linear m=1 n=1", "k is missing"},
        {"int8_linear m=1 n=1 k=1 x_dtype=s8", "x_dtype=s8: allowed is one of bf16, f16, f32"},
        {"int8_linear m=1 n=1 k=1 bias=2", "bias=2: allowed is an integer from 0 to 1"},
        {"int8_linear m=1 n=-1 k=1", "n=-1: allowed is an integer from 0"},
        {"int8_linear m=2147483647 n=2147483647 k=1", "at most 2^61 bytes"}}) {
    const Result<KernelDesc> parsed = parse_desc(text);
    REQUIRE(!parsed);
    CHECK_MESSAGE(parsed.status().message().find(part) != std::string::npos, parsed.status().message());
  }
}

TEST_CASE("a call refuses what is wrong, names it, and writes nothing") {
  const std::unique_ptr<Engine> engine = test::make_engine({});
  const Result<KernelRef> kernel = engine->get(make_desc(3, 20, 16, Float::bf16, Float::bf16, true)),
                          without_bias = engine->get(make_desc(3, 20, 16));
  REQUIRE(kernel.is_ok());
  REQUIRE(without_bias.is_ok());
  const auto layout = int8_mm::PackLayout::parse((*kernel)->texts().pack_layout);
  std::vector<std::int8_t> w(20 * 16, 1);
  const auto pack_of = [&](int8_mm::PackLayout l, std::int64_t n) {
    return std::move(*int8_mm::Pack::make(l, w.data(), 16, WLayout::nk, n, 16, engine->runtime().parallel));
  };
  const int8_mm::Pack pack = pack_of(*layout, 20), narrow = pack_of(*layout, 19),
                      other = pack_of({.n_block = 16, .k_block = 1}, 20);
  alignas(64) std::uint16_t x[3 * 16] = {}, y[3 * 20 + 1];
  std::fill(std::begin(y), std::end(y), 0x5A5A);
  alignas(64) std::uint8_t workspace[64];
  float ws[21] = {}, bias[21] = {};
  const Args good = {.m = 3, .x = x, .ldx = 16, .pack = &pack, .ws = ws, .bias = bias, .y = y, .ldy = 20};
  const auto check = [&](const char* part, auto change, const Kernel& k) {
    Args args = good;
    change(args);
    const Status status = int8_linear::run(k, args);
    CHECK(status.code() == Code::invalid_argument);
    CHECK_MESSAGE(status.message().find(part) != std::string::npos, status.message());
    CHECK(std::all_of(std::begin(y), std::end(y), [](std::uint16_t v) { return v == 0x5A5A; }));
  };
  check(
      "m is 5", [](Args& a) { a.m = 5; }, **kernel);
  check(
      "m is -1", [](Args& a) { a.m = -1; }, **kernel);
  check(
      "x is null", [](Args& a) { a.x = nullptr; }, **kernel);
  check(
      "x is 0x", [&](Args& a) { a.x = reinterpret_cast<std::uint8_t*>(x) + 1; }, **kernel);
  check(
      "ldx is 15: allowed is 16 or more", [](Args& a) { a.ldx = 15; }, **kernel);
  check(
      "ldx is", [](Args& a) { a.ldx = std::int64_t{1} << 60; }, **kernel);
  check(
      "y is null", [](Args& a) { a.y = nullptr; }, **kernel);
  check(
      "ldy is 19", [](Args& a) { a.ldy = 19; }, **kernel);
  check(
      "w_pack is null", [](Args& a) { a.pack = nullptr; }, **kernel);
  check(
      "w_pack is a pack of n=19", [&](Args& a) { a.pack = &narrow; }, **kernel);
  if (!(other.layout() == *layout))
    check(
        "w_pack is a pack of layout n16k1", [&](Args& a) { a.pack = &other; }, **kernel);
  check(
      "ws is null", [](Args& a) { a.ws = nullptr; }, **kernel);
  check(
      "ws is 0x", [&](Args& a) { a.ws = reinterpret_cast<float*>(reinterpret_cast<std::uint8_t*>(ws) + 2); }, **kernel);
  check(
      "bias is null", [](Args& a) { a.bias = nullptr; }, **kernel);
  check(
      "bias is given", [](Args&) {}, **without_bias);
  check(
      "threads is -1", [](Args& a) { a.threads = -1; }, **kernel);
  check(
      "workspace is", [&](Args& a) { a.workspace = workspace + 1, a.workspace_bytes = 1 << 30; }, **kernel);
  check(
      "workspace_bytes is 1", [&](Args& a) { a.workspace = workspace, a.workspace_bytes = 1; }, **kernel);
  CHECK(int8_linear::run(**kernel, good).is_ok());
  CHECK(y[0] == 0);
  CHECK(y[60] == 0x5A5A);
  Args nothing = good;
  nothing.m = 0;
  CHECK(int8_linear::run(**kernel, nothing).is_ok());
}

TEST_CASE("packs are those of int8_mm where the layouts agree, and one serves every m and type") {
  const std::unique_ptr<Engine> engine = test::make_engine({});
  const Result<std::string> layout = engine->pack_layout(make_desc(kAny, 64, 64));
  REQUIRE(layout.is_ok());
  for (const std::int64_t m : {1, 7, 100})
    for (const Float type : kFloats) {
      const Result<KernelRef> kernel = engine->get(make_desc(m, 64, 64, type, type));
      REQUIRE(kernel.is_ok());
      CHECK((*kernel)->texts().pack_layout == *layout);
    }
}
