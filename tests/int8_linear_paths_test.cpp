#include <doctest/doctest.h>

#include <array>
#include <cstring>
#include <optional>
#include <span>
#include <vector>

#include <fmt/format.h>

#include "backends/table.h"
#include "jit/engine.h"
#include "jit/floating_point.h"
#include "jit/ops/int8_linear_driver.h"
#include "tests/emulator.h"
#include "tests/guarded_buffer.h"
#include "tests/int8_linear_values.h"
#include "tests/int8_values.h"
#include "tests/other_rounding.h"
#include "tests/table_rows.h"
#include "tests/test_engine.h"
#if defined(__x86_64__)
#include "tests/amx_emulator.h"
#include "tests/avxvnni_emulator.h"
#endif

/// Every int8_linear row of the implementation table that this machine can run, through engine and driver, against the
/// reference op to the bit: sampled shapes × types × values × with and without bias and workspace × one and three
/// threads, in buffers that touch inaccessible pages, under the caller's own floating-point state.

using namespace kiln;
using namespace kiln::test;
using int8_linear::bytes_of;
using int8_linear::Float;

namespace {

constexpr std::int64_t kSizes[] = {0, 1, 2, 3, 7, 8, 15, 16, 17, 31, 33, 63, 64, 65, 100, 255, 257};
constexpr Float kFloats[] = {Float::bf16, Float::f16, Float::f32};

constexpr int kSamples = 40;

struct Case {
  std::int64_t m, n, k;
  std::int64_t ldx, ldy;
  Float x, y;
  bool bias, special_scales, own_workspace;
  Values w_values;
  XValues x_values;
  Guard guard;
  unsigned seed;

  std::string text() const {
    return fmt::format("m={} n={} k={} ldx={} ldy={} x_dtype={} y_dtype={} bias={} scales={} workspace={} w {} x {} "
                       "guard {} seed {}",
                       m, n, k, ldx, ldy, static_cast<int>(x), static_cast<int>(y), bias, special_scales, own_workspace,
                       name_of(w_values), name_of(x_values), guard == Guard::after ? "after" : "before", seed);
  }
};

Case random_case(unsigned seed) {
  std::mt19937 random(seed);
  const auto pick = [&](auto&& list) { return list[random() % std::size(list)]; };
  Case c{};
  c.seed = seed;
  c.m = pick(kSizes);
  c.n = pick(kSizes);
  c.k = pick(kSizes);
  const auto stride = [&](std::int64_t length) { return length + (random() % 3 == 0 ? random() % 70 : 0); };
  c.ldx = stride(c.k);
  c.ldy = stride(c.n);
  c.x = pick(kFloats);
  c.y = pick(kFloats);
  c.bias = random() % 2;
  c.special_scales = random() % 3 == 0;
  c.own_workspace = random() % 4 == 0;
  c.w_values = pick(kAllValues);
  c.x_values = pick(kAllXValues);
  return c;
}

/// Elements from the first to the last of a strided matrix: what a call may touch.
std::int64_t extent(std::int64_t rows, std::int64_t columns, std::int64_t stride) {
  return rows == 0 || columns == 0 ? 0 : (rows - 1) * stride + columns;
}

void check_case(Engine& engine, const Case& c) {
  INFO(c.text());
  std::mt19937 random(c.seed);
  const std::int64_t x_size = extent(c.m, c.k, c.ldx), y_size = extent(c.m, c.n, c.ldy);
  const GuardedBuffer x(static_cast<std::size_t>(x_size * bytes_of(c.x)), c.guard),
      y(static_cast<std::size_t>(y_size * bytes_of(c.y)), c.guard), ws(static_cast<std::size_t>(c.n) * 4, c.guard),
      bias(static_cast<std::size_t>(c.n) * 4, c.guard);
  std::vector<std::int8_t> w(static_cast<std::size_t>(c.n * c.k));
  if (x_size > 0)
    fill_x(c.x, x.as<void>(), c.m, c.k, c.ldx, c.x_values, random);
  fill(w.data(), c.n * c.k, c.w_values, random);
  fill_floats(ws.as<float>(), c.n, c.special_scales, random);
  fill_floats(bias.as<float>(), c.n, c.special_scales, random);
  const std::size_t y_bytes = static_cast<std::size_t>(y_size * bytes_of(c.y));
  std::memset(y.as<void>(), 0x5A, y_bytes);
  std::vector<std::uint8_t> expected(y_bytes, 0x5A);

  const KernelDesc desc = int8_linear::make_desc(c.m, c.n, c.k, c.x, c.y, c.bias);
  const Result<KernelRef> kernel = engine.get(desc);
  REQUIRE_MESSAGE(kernel.is_ok(), (kernel ? "" : kernel.status().message()));
  const Result<std::string> layout = engine.pack_layout(desc);
  REQUIRE(layout.is_ok());
  const Result<int8_mm::Pack> pack = int8_mm::Pack::make(*int8_mm::PackLayout::parse(*layout), w.data(), c.k,
                                                         int8_linear::WLayout::nk, c.n, c.k, engine.runtime().parallel);
  REQUIRE(pack.is_ok());
  int8_linear::Args args{.m = c.m,
                         .x = x.as<void>(),
                         .ldx = c.ldx,
                         .pack = &*pack,
                         .ws = ws.as<float>(),
                         .bias = c.bias ? bias.as<float>() : nullptr,
                         .y = y.as<void>(),
                         .ldy = c.ldy};
  std::optional<GuardedBuffer> workspace;
  if (c.own_workspace) {
    const Result<std::uint64_t> bytes = int8_linear::workspace_bytes(**kernel, args);
    REQUIRE(bytes.is_ok());
    workspace.emplace((*bytes + 63) / 64 * 64, c.guard);
    std::memset(workspace->as<void>(), 0xA5, *bytes);
    args.workspace = workspace->as<void>();
    args.workspace_bytes = *bytes;
  }
  Status status;
  {
    const OtherRounding scope;
    status = int8_linear::run(**kernel, args);
  }
  REQUIRE_MESSAGE(status.is_ok(), status.message());
  int8_linear::reference(desc, c.m, x.as<void>(), c.ldx, w.data(), c.k, ws.as<float>(),
                         c.bias ? bias.as<float>() : nullptr, expected.data(), c.ldy);
  std::int64_t wrong = 0, first = -1;
  for (std::int64_t i = 0; i < y_size; ++i) // the gaps between rows too
    if (std::memcmp(y.as<std::uint8_t>() + i * bytes_of(c.y), expected.data() + i * bytes_of(c.y),
                    static_cast<std::size_t>(bytes_of(c.y))) != 0 &&
        wrong++ == 0)
      first = i;
  std::uint32_t got = 0, want = 0;
  if (wrong > 0) {
    std::memcpy(&got, y.as<std::uint8_t>() + first * bytes_of(c.y), static_cast<std::size_t>(bytes_of(c.y)));
    std::memcpy(&want, expected.data() + first * bytes_of(c.y), static_cast<std::size_t>(bytes_of(c.y)));
  }
  INFO(fmt::format("{} wrong, the first at row {} column {}: {:#x}, expected {:#x}", wrong,
                   first / std::max<std::int64_t>(c.ldy, 1), first % std::max<std::int64_t>(c.ldy, 1), got, want));
  CHECK(wrong == 0);
}

} // namespace

TEST_CASE("every path equals the reference op") {
  const Target target = detect_machine().target;
  const TableRows<OpId::int8_linear> rows;
  const KernelDesc small = int8_linear::make_desc(kAny, 64, 64);
  int paths = 0;
  for (const Implementation& row : rows.all()) {
    if (row.op != OpId::int8_linear || (!row.any_arch && row.arch != target.arch))
      continue;
    const std::string isa(name_of(row.isa));
    if (!target.features.contains(row.features_for(small, target))) {
      MESSAGE("not run here, the machine lacks its features: ", isa);
      continue;
    }
    if (const Status fits = row.supports ? row.supports(small, target) : Status(); !fits) {
      MESSAGE("not run here: ", isa, ": ", fits.message());
      continue;
    }
    ++paths;
    SUBCASE(isa.c_str()) {
      for (const int threads : {1, 3}) {
        const std::unique_ptr<Engine> engine = make_engine(
            {.threads = threads, .forced = Config::Force{OpId::int8_linear, row.isa}, .implementations = rows.all()});
        for (int i = 0; i < samples(kSamples); ++i)
          for (Case c = random_case(static_cast<unsigned>(1000 * threads + i));
               const Guard guard : {Guard::after, Guard::before}) {
            c.guard = guard;
            check_case(*engine, c);
          }
      }
    }
  }
  CHECK(paths >= 1);
}

#if defined(__x86_64__)
TEST_CASE("amx, emulated where the machine has none") {
  Features features = detect_machine().target.features;
  if (!features.contains({Feature::avx512bw, Feature::avx512vl, Feature::avx512vnni}))
    return;
  std::optional<AmxEmulator> emulator;
  if (!amx_available()) {
    emulator.emplace();
    features.add(Feature::amx_tile);
    features.add(Feature::amx_int8);
  }
  const std::unique_ptr<Engine> engine =
      make_engine({.forced = Config::Force{OpId::int8_linear, IsaPath::amx}, .features = features});
  for (int i = 0; i < samples(kSamples); ++i) {
    Case c = random_case(static_cast<unsigned>(7000 + i));
    c.guard = i % 2 == 0 ? Guard::after : Guard::before;
    check_case(*engine, c);
  }
  // Pairs of panels and a last one that N cuts, sums that reach Y during the next pair, several blocks of columns,
  // row tiles that share rows, K that ends within a tile.
  unsigned seed = 7500;
  for (const auto& [m, n, k] : {std::array<std::int64_t, 3>{70, 100, 256},
                                {33, 64, 330},
                                {100, 520, 256},
                                {65, 1030, 514},
                                {5, 200, 1090},
                                {48, 90, 60},
                                {17, 33, 65}})
    for (const Float type : kFloats)
      check_case(*engine, {.m = m,
                           .n = n,
                           .k = k,
                           .ldx = k + 3,
                           .ldy = n + 5,
                           .x = type,
                           .y = type,
                           .bias = seed % 2 == 0,
                           .special_scales = seed % 3 == 0,
                           .own_workspace = seed % 4 == 0,
                           .w_values = Values::random,
                           .x_values = XValues::specials,
                           .guard = Guard::after,
                           .seed = seed++});
  if (emulator)
    CHECK(emulator->executed() > 0);
}

TEST_CASE("avxvnni, emulated where the machine has none") {
  Features features = detect_machine().target.features;
  if (!features.contains({Feature::avx2, Feature::f16c}))
    return;
  std::optional<AvxVnniEmulator> emulator;
  if (!features.has(Feature::avxvnni)) {
    emulator.emplace();
    features.add(Feature::avxvnni);
  }
  const std::unique_ptr<Engine> engine =
      make_engine({.forced = Config::Force{OpId::int8_linear, IsaPath::avxvnni}, .features = features});
  for (int i = 0; i < samples(kSamples) / 2; ++i) {
    Case c = random_case(static_cast<unsigned>(9000 + i));
    c.guard = i % 2 == 0 ? Guard::after : Guard::before;
    check_case(*engine, c);
  }
}
#endif

TEST_CASE("portable code for the same processor with less") {
  const Target target = detect_machine().target;
  if (target.arch != Arch::x86_64)
    return; // NEON is the least there
  const TableRows<OpId::int8_linear> rows;
  for (const Features features : {Features{}, Features{Feature::avx2}}) {
    if (!target.features.contains(features))
      continue;
    CAPTURE(features.text());
    const std::unique_ptr<Engine> engine = make_engine({.forced = Config::Force{OpId::int8_linear, IsaPath::portable},
                                                        .features = features,
                                                        .implementations = rows.all()});
    for (int i = 0; i < samples(kSamples); ++i) {
      Case c = random_case(static_cast<unsigned>(5000 + i));
      c.guard = Guard::after;
      check_case(*engine, c);
    }
  }
}

TEST_CASE("large enough for several threads, row blocks and rows quantised for all") {
  const TableRows<OpId::int8_linear> rows;
  const std::unique_ptr<Engine> engine =
      make_engine({.threads = 3, .l2_bytes = 64 << 10, .implementations = rows.all()});
  for (const std::int64_t m : {1, 40, 300})
    for (const auto& [n, k] : {std::pair<std::int64_t, std::int64_t>{1000, 1100}, {40, 3000}, {700, 9000}}) {
      if (m * n * k > (rows.compute_slowly() ? 5'000'000 : 400'000'000))
        continue;
      for (const bool own_workspace : {false, true})
        check_case(*engine, {.m = m,
                             .n = n,
                             .k = k,
                             .ldx = k,
                             .ldy = n,
                             .x = Float::bf16,
                             .y = Float::bf16,
                             .bias = true,
                             .special_scales = false,
                             .own_workspace = own_workspace,
                             .w_values = Values::random,
                             .x_values = XValues::specials,
                             .guard = Guard::after,
                             .seed = 7});
    }
}

TEST_CASE("a host whose m walks compiles a bounded number of kernels") {
  const TableRows<OpId::int8_linear> rows;
  const std::unique_ptr<Engine> engine = make_engine({.implementations = rows.all()});
  for (std::int64_t m = 1; m <= 512; ++m)
    REQUIRE(engine->get(int8_linear::make_desc(m, 96, 80)).is_ok());
  CHECK(engine->stats().kernels <= 8);
}
