#include <doctest/doctest.h>

#include <vector>

#include <fmt/format.h>

#include "backends/table.h"
#include "jit/engine.h"
#include "jit/ops/int8_mm_driver.h"
#include "tests/guarded_buffer.h"
#include "tests/int8_values.h"
#include "tests/test_engine.h"

/// Every int8_mm row of the implementation table that this machine can run, through engine and driver, against the
/// reference op: sampled shapes × values × packed and raw B × both layouts × one and three threads, in buffers that
/// touch inaccessible pages.

using namespace kiln;
using namespace kiln::test;

namespace {

constexpr std::int64_t kSizes[] = {0, 1, 2, 3, 7, 8, 15, 16, 17, 31, 33, 63, 64, 65, 100, 255, 257};

constexpr int kSamples = 120;

struct Case {
  std::int64_t m, n, k;
  std::int64_t lda, ldb, ldc;
  int8_mm::BLayout b_layout;
  bool packed;
  Values values;
  Guard guard;
  unsigned seed;

  std::string text() const {
    return fmt::format("m={} n={} k={} lda={} ldb={} ldc={} {} {} values {} guard {} seed {}", m, n, k, lda, ldb, ldc,
                       b_layout == int8_mm::BLayout::kn ? "kn" : "nk", packed ? "packed" : "raw", name_of(values),
                       guard == Guard::after ? "after" : "before", seed);
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
  c.b_layout = random() % 2 ? int8_mm::BLayout::kn : int8_mm::BLayout::nk;
  c.packed = random() % 4 != 0;
  c.values = pick(kAllValues);
  const auto stride = [&](std::int64_t length) { return length + (random() % 3 == 0 ? random() % 70 : 0); };
  c.lda = stride(c.k);
  c.ldb = stride(c.b_layout == int8_mm::BLayout::kn ? c.n : c.k);
  c.ldc = stride(c.n);
  return c;
}

/// Elements from the first to the last of a strided matrix: what a call may touch.
std::int64_t extent(std::int64_t rows, std::int64_t columns, std::int64_t stride) {
  return rows == 0 || columns == 0 ? 0 : (rows - 1) * stride + columns;
}

void check_case(Engine& engine, const Case& c) {
  INFO(c.text());
  std::mt19937 random(c.seed);
  const bool kn = c.b_layout == int8_mm::BLayout::kn;
  const std::int64_t a_size = extent(c.m, c.k, c.lda), b_size = extent(kn ? c.k : c.n, kn ? c.n : c.k, c.ldb),
                     c_size = extent(c.m, c.n, c.ldc);
  const GuardedBuffer a(static_cast<std::size_t>(a_size), c.guard), b(static_cast<std::size_t>(b_size), c.guard),
      out(static_cast<std::size_t>(c_size) * 4, c.guard);
  fill(a.as<std::int8_t>(), a_size, c.values, random);
  fill(b.as<std::int8_t>(), b_size, c.values, random);
  constexpr std::int32_t kUntouched = 0x5A5A5A5A;
  std::fill_n(out.as<std::int32_t>(), c_size, kUntouched);

  const KernelDesc desc = int8_mm::make_desc(c.m, c.n, c.k, c.b_layout);
  const Result<KernelRef> kernel = engine.get(desc);
  REQUIRE_MESSAGE(kernel.is_ok(), (kernel ? "" : kernel.status().message()));
  int8_mm::Args args{.m = c.m,
                     .a = a.as<std::int8_t>(),
                     .lda = c.lda,
                     .b_layout = c.b_layout,
                     .c = out.as<std::int32_t>(),
                     .ldc = c.ldc};
  std::optional<int8_mm::Pack> pack;
  if (c.packed) {
    const Result<std::string> layout = engine.pack_layout(desc);
    REQUIRE(layout.is_ok());
    Result<int8_mm::Pack> made = int8_mm::Pack::make(*int8_mm::PackLayout::parse(*layout), b.as<std::int8_t>(), c.ldb,
                                                     c.b_layout, c.n, c.k, engine.runtime().parallel);
    REQUIRE(made.is_ok());
    pack.emplace(std::move(*made));
    args.pack = &*pack;
  } else {
    args.b = b.as<std::int8_t>();
    args.ldb = c.ldb;
  }
  const Status status = int8_mm::run(**kernel, args);
  REQUIRE_MESSAGE(status.is_ok(), status.message());

  std::vector<std::int32_t> expected(static_cast<std::size_t>(c_size), kUntouched);
  int8_mm::reference(c.m, c.n, c.k, a.as<std::int8_t>(), c.lda, b.as<std::int8_t>(), c.ldb, c.b_layout, expected.data(),
                     c.ldc);
  std::int64_t wrong = 0, first = -1;
  for (std::int64_t i = 0; i < c_size; ++i) // the gaps between rows too
    if (out.as<std::int32_t>()[i] != expected[static_cast<std::size_t>(i)] && wrong++ == 0)
      first = i;
  INFO("first wrong element at row ", first / std::max<std::int64_t>(c.ldc, 1), " column ",
       first % std::max<std::int64_t>(c.ldc, 1));
  CHECK(wrong == 0);
}

} // namespace

TEST_CASE("every path equals the reference op") {
  const Target target = detect_machine().target;
  int paths = 0;
  for (const Implementation& row : implementation_table()) {
    if (row.op != OpId::int8_mm || (!row.any_arch && row.arch != target.arch))
      continue;
    const std::string isa(name_of(row.isa));
    if (!target.features.contains(row.features_for(int8_mm::make_desc(kAny, 64, 64), target))) {
      MESSAGE("not run here, the machine lacks its features: ", isa);
      continue;
    }
    if (const Status fits = row.supports ? row.supports(int8_mm::make_desc(kAny, 64, 64), target) : Status(); !fits) {
      MESSAGE("not run here: ", isa, ": ", fits.message());
      continue;
    }
    ++paths;
    SUBCASE(isa.c_str()) {
      for (const int threads : {1, 3}) {
        const std::unique_ptr<Engine> engine =
            make_engine({.threads = threads, .forced = Config::Force{OpId::int8_mm, row.isa}});
        for (int i = 0; i < samples(kSamples); ++i)
          for (Case c = random_case(static_cast<unsigned>(1000 * threads + i));
               const Guard guard : {Guard::after, Guard::before}) {
            c.guard = guard;
            check_case(*engine, c);
          }
      }
    }
  }
  CHECK(paths >= 2); // portable and reference run everywhere
}

TEST_CASE("large enough for several threads and row blocks") {
  for (const std::int64_t m : {1, 33, 150, 300})
    for (const auto& [n, k] : {std::pair<std::int64_t, std::int64_t>{1000, 1100}, {40, 3000}}) {
      const std::unique_ptr<Engine> engine = make_engine({.threads = 3, .l2_bytes = 64 << 10});
      for (const bool packed : {true, false})
        check_case(*engine, {.m = m,
                             .n = n,
                             .k = k,
                             .lda = k,
                             .ldb = k,
                             .ldc = n,
                             .b_layout = int8_mm::BLayout::nk,
                             .packed = packed,
                             .values = Values::random,
                             .guard = Guard::after,
                             .seed = 7});
    }
}

TEST_CASE("a host whose m walks compiles a bounded number of kernels") {
  const std::unique_ptr<Engine> engine = make_engine({});
  for (std::int64_t m = 1; m <= 512; ++m)
    REQUIRE(engine->get(int8_mm::make_desc(m, 96, 80)).is_ok());
  CHECK(engine->stats().kernels <= 8);
}
