#include <doctest/doctest.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>
#include <limits>
#include <vector>

#include "backends/table.h"
#include "jit/engine.h"
#include "jit/ops/int8_mm_driver.h"
#include "tests/guarded_buffer.h"
#include "tests/other_rounding.h"
#include "tests/table_rows.h"
#include "tests/test_engine.h"
#if defined(__x86_64__)
#include "tests/amx_emulator.h"
#include "tests/avxvnni_emulator.h"
#endif

/// int8_mm's epilogue on every path that this machine can run, through engine and driver, bit for bit against the
/// definition: sampled stages × values × types × shapes, packed and raw B, one and three threads, in buffers that touch
/// inaccessible pages. Accumulators are taken to the edges of s32 and to exact ties by the bias.

using namespace kiln;
using namespace kiln::int8_mm;
using test::Guard;
using test::GuardedBuffer;
using test::make_engine;
using test::samples;

namespace {

constexpr int kSamples = 250;

class Random {
public:
  explicit Random(unsigned seed) : state_(seed * 0x9E37'79B9'7F4A'7C15ull + 1) {}
  std::uint64_t bits() { // splitmix64
    std::uint64_t z = state_ += 0x9E37'79B9'7F4A'7C15ull;
    z = (z ^ z >> 30) * 0xBF58'476D'1CE4'E5B9ull;
    z = (z ^ z >> 27) * 0x94D0'49BB'1331'11EBull;
    return z ^ z >> 31;
  }
  std::int64_t below(std::int64_t count) {
    return static_cast<std::int64_t>(bits() % static_cast<std::uint64_t>(count));
  }
  std::int64_t from_to(std::int64_t lo, std::int64_t hi) { return lo + below(hi - lo + 1); }
  template <class T> T of(std::initializer_list<T> list) { return list.begin()[below(std::ssize(list))]; }

  std::int32_t s32() {
    constexpr std::int32_t min = std::numeric_limits<std::int32_t>::min();
    constexpr std::int32_t max = std::numeric_limits<std::int32_t>::max();
    switch (below(4)) {
    case 0:
      return of({0, 1, -1, 2, -2, 127, -128, 255, 1 << 24, 1 << 30, -(1 << 30), max, max - 63, min, min + 1});
    case 1:
      return static_cast<std::int32_t>(bits());
    case 2:
      return static_cast<std::int32_t>(from_to(-300, 300));
    default:
      return static_cast<std::int32_t>(of({1u, 3u, ~0u}) << below(32));
    }
  }
  float f32() {
    switch (below(3)) {
    case 0:
      return of({1.0f, 0.5f, 0.0f, -0.0f, 0x1p-31f, 0x1p-149f, 0x1p-126f, 3e38f, -1.5f});
    case 1:
      return static_cast<float>(from_to(-1000, 1000)) / 1000.0f;
    default:
      return std::ldexp(static_cast<float>(from_to(-1000, 1000)), static_cast<int>(from_to(-70, 50)));
    }
  }
  std::int32_t q_shift() {
    return static_cast<std::int32_t>(below(2) == 0 ? of({0, 1, -1, -30, -31, -32, -62, 31, 30}) : from_to(-62, 31));
  }

private:
  std::uint64_t state_;
};

struct Values {
  std::vector<std::int32_t> a_zp, b_zp, bias, mult, shift;
  std::vector<float> scale;
  EpilogueValues view;
};

Values random_values(Random& random, const Epilogue& e, std::int64_t m, std::int64_t n, bool mild) {
  Values v;
  const auto fill = [](auto& values, std::int64_t count, auto&& make) {
    for (std::int64_t i = 0; i < count; ++i)
      values.push_back(make());
  };
  const auto s32 = [&] { return random.s32(); };
  const auto zero_point = [&] { return mild ? static_cast<std::int32_t>(random.from_to(-20, 150)) : random.s32(); };
  const std::int64_t many = e.rescale_per == RescalePer::channel ? n : 1;
  if (e.a_zp != AZp::none)
    fill(v.a_zp, e.a_zp == AZp::row ? m : 1, zero_point);
  if (e.b_zp != BZp::none)
    fill(v.b_zp, e.b_zp == BZp::channel ? n : 1, zero_point);
  if (e.bias)
    fill(v.bias, n, s32);
  if (e.rescale == Rescale::scale)
    fill(v.scale, many, [&] { return random.f32(); });
  if (e.rescale == Rescale::q_scale) {
    fill(v.mult, many, [&] {
      return static_cast<std::int32_t>(random.of<std::int64_t>(
          {1, 2, 3, 1 << 30, 0x7fff'ffff, random.from_to(1, 0x7fff'ffff), std::int64_t{1} << random.below(31)}));
    });
    const bool usual = random.below(2) == 0; // all as real layers have them: some paths compute those another way
    fill(v.shift, many, [&] { return usual ? static_cast<std::int32_t>(random.from_to(-19, 31)) : random.q_shift(); });
  }
  if (e.rescale == Rescale::shift_right)
    fill(v.shift, many, [&] {
      return static_cast<std::int32_t>(random.below(3) == 0 ? random.from_to(0, 62) : random.from_to(0, 12));
    });
  if (e.rescale == Rescale::shift_left)
    fill(v.shift, many, [&] { return static_cast<std::int32_t>(random.from_to(0, 31)); });
  v.view = {.a_zp = v.a_zp.data(),
            .b_zp = v.b_zp.data(),
            .bias = v.bias.data(),
            .mult = v.mult.data(),
            .shift = v.shift.data(),
            .scale = v.scale.data(),
            .slope_mult =
                static_cast<std::int32_t>(random.of<std::int64_t>({1, 1 << 30, random.from_to(1, 0x7fff'ffff)})),
            .slope_shift = random.q_shift(),
            .slope = random.f32(),
            .c_zp = random.of({0, 3, -7, -128, 255, random.s32()})};
  if (e.has_float_output()) {
    v.view.lo = random.of({-100.5, -0.0, 0.0, 1.0, -std::numeric_limits<double>::infinity()});
    v.view.hi = random.of({1.0, 6.0, 1000.0, std::numeric_limits<double>::infinity()});
  } else {
    const std::int64_t least = e.c_dtype == CDtype::s8 ? -128 : e.c_dtype == CDtype::u8 ? 0 : -(std::int64_t{1} << 31);
    const std::int64_t most = e.c_dtype == CDtype::s8   ? 127
                              : e.c_dtype == CDtype::u8 ? 255
                                                        : (std::int64_t{1} << 31) - 1;
    const std::int64_t lo = random.from_to(least, most);
    v.view.lo = static_cast<double>(lo);
    v.view.hi = static_cast<double>(random.from_to(lo, most));
  }
  return v;
}

KernelDesc random_desc(Random& random, std::int64_t m, std::int64_t n, std::int64_t k, bool mild) {
  KernelDesc d = make_desc(m, n, k, random.below(2) == 0 ? BLayout::kn : BLayout::nk);
  d.value[kRescale] = random.of({0, 1, 2, 2, 2, 3, 4});
  const bool scaled = d.value[kRescale] == static_cast<std::int64_t>(Rescale::scale);
  d.value[kCDtype] = scaled ? random.below(6) : random.of({0, 1, 3});
  d.value[kADtype] = random.below(2);
  d.value[kBDtype] = random.below(2);
  d.value[kRescalePer] = random.below(2);
  d.value[kAZp] = random.below(3);
  d.value[kBZp] = random.below(3);
  d.value[kBias] = mild ? 0 : random.below(2);
  d.value[kRounding] = random.below(6);
  d.value[kAct] = random.below(3);
  d.value[kCZp] = random.below(2);
  d.value[kClamp] = random.below(3) == 0;
  if (random.below(8) == 0) // few stages, or none: each alone
    for (const Field field : {kADtype, kBDtype, kAZp, kBZp, kBias, kAct, kCZp, kClamp})
      if (random.below(4) != 0)
        d.value[field] = 0;
  if (Epilogue::of(d).has_float_output())
    d.value[kCZp] = 0;
  REQUIRE_MESSAGE(check_desc(d).is_ok(), check_desc(d).message());
  return d;
}

/// Elements from the first to the last of a strided matrix.
std::int64_t extent(std::int64_t rows, std::int64_t columns, std::int64_t stride) {
  return rows == 0 || columns == 0 ? 0 : (rows - 1) * stride + columns;
}

void check_case(Engine& engine, unsigned seed, std::int64_t m, std::int64_t n, std::int64_t k, Guard guard) {
  Random random(seed);
  const bool mild = random.below(3) == 0; // results spread over the output's range instead of all at its ends
  const KernelDesc desc = random_desc(random, m, n, k, mild);
  INFO("seed ", seed, ": ", desc.text(), guard == Guard::after ? ", guard after" : ", guard before");
  const Epilogue e = Epilogue::of(desc);
  const Values values = random_values(random, e, m, n, mild);
  const auto layout = static_cast<BLayout>(desc.value[kBLayout]);
  const bool kn = layout == BLayout::kn;
  const std::int64_t lda = k + random.below(3), ldb = (kn ? n : k) + random.below(3), ldc = n + random.below(3) * 7;
  const std::int64_t c_bytes = e.c_bytes(), c_size = extent(m, n, ldc) * c_bytes;
  const GuardedBuffer a(static_cast<std::size_t>(extent(m, k, lda)), guard),
      b(static_cast<std::size_t>(extent(kn ? k : n, kn ? n : k, ldb)), guard),
      c(static_cast<std::size_t>(c_size), guard);
  const auto fill = [&](const GuardedBuffer& buffer, std::int64_t count) {
    const std::int64_t kind = random.below(4);
    for (std::int64_t i = 0; i < count; ++i)
      buffer.as<std::uint8_t>()[i] = kind == 0 ? 0x80 : kind == 1 ? 0x7f : static_cast<std::uint8_t>(random.bits());
  };
  fill(a, extent(m, k, lda));
  fill(b, extent(kn ? k : n, kn ? n : k, ldb));
  constexpr std::uint8_t kUntouched = 0x5A;
  std::memset(c.as<void>(), kUntouched, static_cast<std::size_t>(c_size));

  const Result<KernelRef> kernel = engine.get(desc);
  REQUIRE_MESSAGE(kernel.is_ok(), (kernel ? "" : kernel.status().message()));
  Args args{
      .m = m, .a = a.as<void>(), .lda = lda, .b_layout = layout, .c = c.as<void>(), .ldc = ldc, .values = values.view};
  std::optional<Pack> pack;
  if (random.below(4) != 0) {
    const Result<std::string> id = engine.pack_layout(desc);
    REQUIRE(id.is_ok());
    Result<Pack> made =
        Pack::make(*PackLayout::parse(*id), b.as<void>(), ldb, layout, n, k, engine.runtime().parallel, e.b_dtype);
    REQUIRE(made.is_ok());
    pack.emplace(std::move(*made));
    args.pack = &*pack;
  } else {
    args.b = b.as<void>();
    args.ldb = ldb;
  }
  const Status status = [&] {
    const test::OtherRounding scope;
    return run(**kernel, args);
  }();
  REQUIRE_MESSAGE(status.is_ok(), status.message());

  std::vector<std::uint8_t> expected(static_cast<std::size_t>(c_size), kUntouched);
  reference(e, values.view, m, n, k, a.as<void>(), lda, b.as<void>(), ldb, layout, expected.data(), ldc);
  std::int64_t wrong = 0, first = -1;
  for (std::int64_t i = 0; i < c_size; ++i) // the gaps between rows too
    if (c.as<std::uint8_t>()[i] != expected[static_cast<std::size_t>(i)] && wrong++ == 0)
      first = i / c_bytes;
  INFO(wrong, " wrong bytes, first at row ", first / std::max<std::int64_t>(ldc, 1), " column ",
       first % std::max<std::int64_t>(ldc, 1));
  CHECK(wrong == 0);
}

void check_sampled(Engine& engine, unsigned first_seed, int count) {
  constexpr std::int64_t kSizes[] = {0, 1, 2, 3, 7, 8, 13, 16, 17, 31, 33, 47, 64, 65, 100};
  for (int i = 0; i < count; ++i) {
    const unsigned seed = first_seed + static_cast<unsigned>(i);
    Random random(~seed);
    const auto any_size = [&] { return kSizes[random.below(std::ssize(kSizes))]; };
    const std::int64_t m = any_size(), n = any_size(), k = any_size();
    check_case(engine, seed, m, n, k, random.below(2) == 0 ? Guard::after : Guard::before);
  }
}

} // namespace

namespace {

/// The rows of int8_mm that this machine runs with an epilogue. Says which are left out.
std::vector<Implementation> paths_here(std::span<const Implementation> rows) {
  const Target target = detect_machine().target;
  KernelDesc desc = make_desc(kAny, 64, 64);
  desc.value[kRescale] = static_cast<std::int64_t>(Rescale::q_scale);
  desc.value[kCDtype] = static_cast<std::int64_t>(CDtype::s8);
  KernelDesc with_f16 = desc; // takes the most features
  with_f16.value[kRescale] = static_cast<std::int64_t>(Rescale::scale);
  with_f16.value[kCDtype] = static_cast<std::int64_t>(CDtype::f16);
  std::vector<Implementation> paths;
  for (const Implementation& row : rows) {
    if (row.op != OpId::int8_mm || row.device != DeviceKind::cpu || (!row.any_arch && row.arch != target.arch))
      continue;
    const std::string isa(name_of(row.isa));
    if (!target.features.contains(row.features_for(with_f16, target)))
      MESSAGE("not run here, the machine lacks its features: ", isa);
    else if (const Status fits = row.supports ? row.supports(desc, target) : Status(); !fits)
      MESSAGE("not run here: ", isa, ": ", fits.message());
    else
      paths.push_back(row);
  }
  return paths;
}

/// Sums that are a tie of v / 2^s, next to one, or at an edge of s32, each in a column of its own.
struct Ties {
  std::vector<std::int32_t> sums, mult, shift; ///< s = 31 + shift
};
Ties ties(bool has_multiplier) {
  constexpr std::int64_t kMin = std::numeric_limits<std::int32_t>::min(),
                         kMax = std::numeric_limits<std::int32_t>::max();
  Ties ties;
  const auto add = [&](std::int64_t sum, std::int64_t mult, int s) {
    if (sum < kMin || sum > kMax)
      return;
    ties.sums.push_back(static_cast<std::int32_t>(sum));
    ties.mult.push_back(static_cast<std::int32_t>(mult));
    ties.shift.push_back(has_multiplier ? s - 31 : s);
  };
  for (const int s : {-31, -30, -1, 0, 1, 2, 3, 8, 16, 30, 31, 32, 33, 45, 60, 61, 62}) {
    if (s < 0 && !has_multiplier)
      continue;
    const int log2_mult = has_multiplier ? std::clamp(s - 27, 0, 30) : 0;
    const std::int64_t mult = std::int64_t{1} << log2_mult;
    if (const int half = s - 1 - log2_mult; half >= 0 && half <= 31) // sum · mult is odd · 2^(s − 1)
      for (const std::int64_t odd : {1, 3, 5, 7})
        for (const std::int64_t sign : {-1, 1})
          for (const std::int64_t beside : {-1, 0, 1})
            add(sign * (odd << half) + beside, mult, s);
    for (const std::int64_t sum : {kMin, kMin + 1, -(std::int64_t{1} << 30), std::int64_t{-1}, std::int64_t{0},
                                   std::int64_t{1}, std::int64_t{1} << 30, kMax - 1, kMax}) {
      add(sum, mult, s);
      if (has_multiplier) {
        add(sum, kMax, s);
        add(sum, 3, s);
      }
    }
  }
  return ties;
}

void check_ties(Engine& engine, const KernelDesc& desc, const Ties& ties) {
  INFO(desc.text());
  const Epilogue e = Epilogue::of(desc);
  const std::int64_t m = desc.value[kM], n = desc.value[kN];
  const EpilogueValues values = {.bias = ties.sums.data(),
                                 .mult = ties.mult.data(),
                                 .shift = ties.shift.data(),
                                 .slope_mult = 1 << 30, // a quarter
                                 .slope_shift = -1};
  const Result<KernelRef> kernel = engine.get(desc);
  REQUIRE_MESSAGE(kernel.is_ok(), (kernel ? "" : kernel.status().message()));
  std::vector<std::int32_t> c(static_cast<std::size_t>(m * n)), expected(c.size());
  const Status status = [&] {
    const test::OtherRounding scope;
    return run(**kernel, {.m = m, .c = c.data(), .ldc = n, .values = values});
  }();
  REQUIRE_MESSAGE(status.is_ok(), status.message());
  reference(e, values, m, n, 0, nullptr, 0, nullptr, 0, BLayout::nk, expected.data(), n);
  for (std::size_t i = 0; i < c.size(); ++i)
    if (c[i] != expected[i]) {
      const std::size_t column = i % static_cast<std::size_t>(n);
      FAIL_CHECK("sum ", ties.sums[column], ", mult ", ties.mult[column], ", shift ", ties.shift[column], ": ", c[i],
                 " instead of ", expected[i]);
    }
}

} // namespace

TEST_CASE("every path finishes its sums as the definition does") {
  const test::TableRows<OpId::int8_mm> rows;
  const std::vector<Implementation> paths = paths_here(rows.all());
  for (const Implementation& row : paths)
    SUBCASE(std::string(name_of(row.isa)).c_str()) {
      // LLVM takes milliseconds a kernel.
      const int count = row.generator == GeneratorId::llvm ? samples(kSamples) / 5 : samples(kSamples);
      for (const int threads : {1, 3})
        check_sampled(
            *make_engine(
                {.threads = threads, .forced = Config::Force{OpId::int8_mm, row.isa}, .implementations = rows.all()}),
            static_cast<unsigned>(100'000 * threads), count);
    }
  CHECK(paths.size() >= 2); // portable and reference run everywhere
}

TEST_CASE("ties and the edges of s32, by every rule") {
  const test::TableRows<OpId::int8_mm> rows;
  for (const Implementation& row : paths_here(rows.all()))
    SUBCASE(std::string(name_of(row.isa)).c_str()) {
      const std::unique_ptr<Engine> engine =
          make_engine({.forced = Config::Force{OpId::int8_mm, row.isa}, .implementations = rows.all()});
      for (const Rescale rescale : {Rescale::q_scale, Rescale::shift_right}) {
        const Ties columns = ties(rescale == Rescale::q_scale);
        for (const Act act : {Act::none, Act::leaky_relu}) {
          if (row.generator == GeneratorId::llvm && (rescale == Rescale::shift_right || act == Act::none))
            continue; // milliseconds a kernel
          for (int rounding = 0; rounding < 6; ++rounding) {
            KernelDesc desc = make_desc(3, std::ssize(columns.sums), 0);
            desc.value[kRescale] = static_cast<std::int64_t>(rescale);
            desc.value[kRescalePer] = static_cast<std::int64_t>(RescalePer::channel);
            desc.value[kRounding] = rounding;
            desc.value[kBias] = 1;
            desc.value[kAct] = static_cast<std::int64_t>(act);
            check_ties(*engine, desc, columns);
          }
        }
      }
    }
}

TEST_CASE("calls that the driver cuts") {
  const test::TableRows<OpId::int8_mm> rows;
  const std::unique_ptr<Engine> engine =
      make_engine({.threads = 3, .l2_bytes = 64 << 10, .implementations = rows.all()});
  unsigned seed = 7;
  for (const std::int64_t m : {1, 33, 150})
    for (const auto& [n, k] : {std::pair<std::int64_t, std::int64_t>{1000, 1100}, {40, 3000}})
      for (int i = 0; i < 3; ++i)
        check_case(*engine, seed++, m, n, k, Guard::after);
}

#if defined(__x86_64__)
TEST_CASE("amx, emulated where the machine has none") {
  Features features = detect_machine().target.features;
  if (!features.contains({Feature::avx512bw, Feature::avx512vl, Feature::avx512vnni}))
    return;
  std::optional<test::AmxEmulator> emulator;
  if (!test::amx_available()) {
    emulator.emplace();
    features.add(Feature::amx_tile);
    features.add(Feature::amx_int8);
  }
  const std::unique_ptr<Engine> engine =
      make_engine({.forced = Config::Force{OpId::int8_mm, IsaPath::amx}, .features = features});
  check_sampled(*engine, 700'000, samples(kSamples));
  // Pairs of panels, sums that reach C during the next pair, rows copied ahead.
  unsigned seed = 800'000;
  for (const auto& [m, n, k] :
       {std::array<std::int64_t, 3>{70, 100, 256}, {33, 64, 320}, {100, 520, 256}, {65, 1030, 512}})
    for (int i = 0; i < 6; ++i)
      check_case(*engine, seed++, m, n, k, Guard::after);
}

TEST_CASE("avxvnni, emulated where the machine has none") {
  Features features = detect_machine().target.features;
  if (!features.contains({Feature::avx2, Feature::f16c}))
    return;
  std::optional<test::AvxVnniEmulator> emulator;
  if (!features.has(Feature::avxvnni)) {
    emulator.emplace();
    features.add(Feature::avxvnni);
  }
  check_sampled(*make_engine({.forced = Config::Force{OpId::int8_mm, IsaPath::avxvnni}, .features = features}), 900'000,
                samples(kSamples));
}

TEST_CASE("portable with narrower vectors than the machine's") {
  if (!detect_machine().target.features.has(Feature::avx2))
    return;
  for (const Features features : {Features{}, Features{Feature::avx2}})
    check_sampled(*make_engine({.forced = Config::Force{OpId::int8_mm, IsaPath::portable}, .features = features}),
                  500'000, samples(kSamples) / 5);
}
#endif
