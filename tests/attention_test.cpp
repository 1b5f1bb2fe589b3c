#include <doctest/doctest.h>

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <functional>
#include <limits>
#include <optional>
#include <random>
#include <vector>

#include <fmt/format.h>
#include <fmt/ranges.h>

#include "backends/table.h"
#include "jit/bf16.h"
#include "jit/engine.h"
#include "jit/ops/attention_driver.h"
#include "tests/emulator.h"
#include "tests/guarded_buffer.h"
#include "tests/other_rounding.h"
#if defined(__x86_64__)
#include "tests/amx_emulator.h"
#endif

/// Every attention row of the implementation table that this machine can run, through engine and driver, against the
/// float64 reference: sampled shapes × values × strides × causal modes × kv_len, in buffers that touch inaccessible
/// pages.

using namespace kiln;
using namespace kiln::test;
using attention::Args;
using attention::Causal;
using attention::Strides;

namespace {

/// Enough to take every branch; KILN_TEST_SAMPLES asks for more or fewer.
int samples() {
  const char* text = std::getenv("KILN_TEST_SAMPLES");
  return text != nullptr ? std::atoi(text) : is_emulated() ? 3 : 30;
}

/// What this machine can run once `amx` is emulated, one thread at a time.
Target target_here() {
  Target target = detect_machine().target;
#if defined(__x86_64__)
  if (target.features.has(Feature::avx512bf16)) {
    target.features.add(Feature::amx_tile);
    target.features.add(Feature::amx_bf16);
  }
#endif
  return target;
}
bool needs_emulator(IsaPath isa) {
  return isa == IsaPath::amx && !detect_machine().target.features.has(Feature::amx_bf16);
}

std::unique_ptr<Engine> engine_for(IsaPath isa, int threads) {
  EngineOptions options;
  options.config.cache = CacheMode::off;
  options.config.threads = needs_emulator(isa) ? 1 : threads;
  options.config.forced.push_back({OpId::attention, isa});
  options.machine = detect_machine();
  options.machine.target = target_here();
  options.implementations = implementation_table();
  Result<std::unique_ptr<Engine>> engine = Engine::create(std::move(options));
  REQUIRE_MESSAGE(engine.is_ok(), (engine ? "" : engine.status().message()));
  return std::move(*engine);
}

/// Tile instructions work from here to the end of the test case, which gives signals back.
void emulate_amx() {
#if defined(__x86_64__)
  static std::optional<AmxEmulator> emulator;
  if (needs_emulator(IsaPath::amx))
    emulator.emplace();
#endif
}

std::vector<IsaPath> paths_here() {
  emulate_amx();
  const Target host = target_here();
  std::vector<IsaPath> paths;
  for (const Implementation& row : implementation_table()) {
    if (row.op != OpId::attention || row.device != DeviceKind::cpu)
      continue;
    if (row.any_arch || (row.arch == host.arch && host.features.contains(row.needs)))
      paths.push_back(row.isa);
    else
      MESSAGE("not executed on this machine: ", std::string(name_of(row.isa)));
  }
  return paths;
}

enum class Values { normal, large_scores, one_huge_key, all_equal, two_almost_equal, zero, denormal };
constexpr Values kAllValues[] = {Values::normal,       Values::normal,    Values::large_scores,
                                 Values::one_huge_key, Values::all_equal, Values::two_almost_equal,
                                 Values::zero,         Values::denormal};
std::string_view name_of(Values values) {
  constexpr std::string_view names[] = {"normal",           "large scores", "one huge key", "all equal",
                                        "two almost equal", "zero",         "denormal"};
  return names[static_cast<std::size_t>(values)];
}

struct Case {
  std::int64_t b = 1, hq = 1, hkv = 1, m = 1, n = 1, d = 64, dv = 64;
  Causal causal = Causal::none;
  bool lse = false, kv_len = false, batch_invariant = false;
  std::vector<std::int32_t> lengths; ///< kv_len; empty: random ones
  bool heads_inside = false;         ///< [B][M][H][D] in memory instead of [B][H][M][D]
  std::int64_t row_gap = 0;          ///< elements between rows
  std::int64_t spare_capacity = 0;   ///< rows of K and V beyond N
  std::optional<float> scale;
  Values values = Values::normal;
  Guard guard = Guard::after;
  unsigned seed = 0;

  std::string text() const {
    return fmt::format("b={} hq={} hkv={} m={} n={} d={} dv={} causal={} lse={} kv_len={} [{}] batch_invariant={} "
                       "heads_inside={} row_gap={} spare={} scale={} values {} guard {} seed {}",
                       b, hq, hkv, m, n, d, dv, static_cast<int>(causal), lse, kv_len, fmt::join(lengths, ", "),
                       batch_invariant, heads_inside, row_gap, spare_capacity,
                       scale ? std::to_string(*scale) : "default", name_of(values),
                       guard == Guard::after ? "after" : "before", seed);
  }
};

Case random_case(unsigned seed) {
  std::mt19937 random(seed);
  const auto pick = [&](auto&& list) { return list[random() % std::size(list)]; };
  constexpr std::int64_t kGroups[] = {1, 1, 1, 2, 3, 4, 4, 5, 8, 16},
                         kM[] = {0, 1, 1, 1, 2, 3, 4, 5, 7, 8, 12, 13, 15, 16, 17, 31, 33, 48, 63, 65, 100, 130};
  constexpr std::int64_t kN[] = {0,  1,  2,  3,   4,   5,   7,   15,  16,  17,  31,   33,  63,
                                 64, 65, 96, 127, 128, 129, 130, 255, 257, 300, 1030, 1100};
  constexpr std::int64_t kHeadSizes[] = {8, 16, 24, 40, 64, 64, 72, 80, 96, 120, 128, 128, 192, 248, 256};
  Case c;
  c.seed = seed;
  c.b = 1 + random() % 2;
  c.hkv = 1 + random() % 3;
  c.hq = c.hkv * pick(kGroups);
  c.m = pick(kM);
  c.n = pick(kN);
  if (c.n > 1000) // the reference is slow
    c.m = std::min<std::int64_t>(c.m, 5);
  c.d = pick(kHeadSizes);
  c.dv = random() % 2 ? c.d : pick(kHeadSizes);
  c.causal = static_cast<Causal>(random() % 3);
  c.lse = random() % 2;
  c.kv_len = random() % 3 == 0;
  c.batch_invariant = random() % 6 == 0;
  c.heads_inside = random() % 3 == 0;
  c.row_gap = random() % 3 == 0 ? random() % 40 : 0;
  c.spare_capacity = random() % 3 == 0 ? random() % 40 : 0;
  if (random() % 4 == 0)
    c.scale = random() % 4 == 0 ? 0.0f : std::uniform_real_distribution<float>(0, 2)(random);
  c.values = pick(kAllValues);
  c.guard = random() % 2 ? Guard::after : Guard::before;
  return c;
}

/// What no random case must be relied on for, with few kernels: most of these share one for each m.
std::vector<Case> fixed_cases() {
  std::vector<Case> cases;
  const auto add = [&](Case c) {
    c.seed = static_cast<unsigned>(cases.size());
    c.guard = cases.size() % 2 ? Guard::before : Guard::after;
    cases.push_back(std::move(c));
  };
  for (const std::int64_t m : is_emulated() ? std::vector<std::int64_t>{3} : std::vector<std::int64_t>{1, 3, 40}) {
    const Case base = {.hq = 2, .hkv = 1, .m = m, .n = 200, .causal = Causal::bottom_right, .lse = true};
    const auto change = [&](auto&& by) {
      Case c = base;
      by(c);
      add(std::move(c));
    };
    for (const Values values : {Values::large_scores, Values::one_huge_key, Values::all_equal, Values::zero})
      change([&](Case& c) { c.values = values; });
    // The greatest scores are 128 and 127.99, 16384 and 16383.
    for (const float scale : {0.125f, 16.0f})
      change([&](Case& c) { c.scale = scale, c.values = Values::two_almost_equal; });
    // The rounding of the greatest is no small number: of two almost equal by 2^31.5 and less 2^17.5, negative, beyond
    // all.
    for (const auto& [scale, values] : {std::pair{2e6f, Values::two_almost_equal},
                                        {1e9f, Values::all_equal},
                                        {1e9f, Values::large_scores},
                                        {1e20f, Values::normal}})
      change([&](Case& c) { c.scale = scale, c.values = values; });
    for (const std::int64_t n : {0, 1, 5}) // rows that see nothing: all, and the first m − n
      change([&](Case& c) { c.n = n; });
    // Batches without a key, with all, with fewer than queries.
    change([&](Case& c) { c.b = 3, c.n = 90, c.kv_len = true, c.lengths = {0, 90, 2}; });
    change([&](Case& c) { c.b = 2, c.n = 150, c.kv_len = true, c.lengths = {150, 0}; });
    // Latent attention's head sizes, and those furthest apart.
    for (const auto& [d, dv] : {std::pair{192, 128}, {8, 256}, {256, 8}})
      if (d == 192 || !is_emulated()) // where compiling takes half a second
        change([&](Case& c) { c.n = 130, c.d = d, c.dv = dv; });
    // A cache with room for more, whose last keys are the last bytes that can be read.
    for (const bool heads_inside : {false, true})
      change([&](Case& c) {
        c.b = 2, c.hq = 8, c.hkv = 2, c.n = 100, c.d = 72, c.dv = 80, c.row_gap = 8, c.spare_capacity = 60;
        c.kv_len = true, c.lengths = {100, 77}, c.heads_inside = heads_inside;
      });
  }
  return cases;
}

/// One bf16 tensor [B][heads][rows][columns] in a guarded buffer, everything that is no element of it filled.
struct Tensor {
  std::int64_t b, heads, rows, columns;
  Strides strides;
  std::vector<std::int32_t> lengths; ///< null, or the rows that each batch has
  std::int64_t size;                 ///< to the end of the last row that there is: what lies behind it cannot be read
  GuardedBuffer buffer;

  Tensor(const Case& c, std::int64_t heads_, std::int64_t rows_, std::int64_t columns_, std::int64_t spare = 0,
         std::vector<std::int32_t> lengths_ = {})
      : b(c.b), heads(heads_), rows(rows_), columns(columns_), strides(strides_of(c, heads_, rows_ + spare, columns_)),
        lengths(std::move(lengths_)), size(end()), buffer(static_cast<std::size_t>(size) * 2, c.guard) {
    std::fill_n(data(), size, kFiller);
  }
  std::int64_t rows_of(std::int64_t batch) const {
    return lengths.empty() ? rows : lengths[static_cast<std::size_t>(batch)];
  }
  std::int64_t end() const {
    std::int64_t found = 0;
    for (std::int64_t batch = 0; batch < b; ++batch)
      if (heads > 0 && rows_of(batch) > 0)
        found = std::max(found, batch * strides.batch + (heads - 1) * strides.head +
                                    (rows_of(batch) - 1) * strides.row + columns);
    return found;
  }
  static constexpr std::uint16_t kFiller = 0x7FA5; // a NaN: must change nothing
  static Strides strides_of(const Case& c, std::int64_t heads, std::int64_t rows, std::int64_t columns) {
    const std::int64_t length = columns + c.row_gap;
    return c.heads_inside ? Strides{rows * heads * length, length, heads * length, 1}
                          : Strides{heads * rows * length, rows * length, length, 1};
  }
  std::uint16_t* data() const { return buffer.as<std::uint16_t>(); }
  std::uint16_t* row(std::int64_t batch, std::int64_t head, std::int64_t i) const {
    return data() + batch * strides.batch + head * strides.head + i * strides.row;
  }
  template <class Value> void fill(Value value) const { // value(batch, head, row, column)
    for (std::int64_t batch = 0; batch < b; ++batch)
      for (std::int64_t head = 0; head < heads; ++head)
        for (std::int64_t i = 0; i < rows_of(batch); ++i)
          for (std::int64_t j = 0; j < columns; ++j)
            row(batch, head, i)[j] = bf16_of_float(value(batch, head, i, j));
  }
};

void fill_inputs(const Case& c, const Tensor& q, const Tensor& k, const Tensor& v, std::mt19937& random) {
  std::normal_distribution<float> normal;
  const auto any = [&](auto...) { return normal(random); };
  const auto times = [&](float factor) { return [&, factor](auto...) { return factor * normal(random); }; };
  q.fill(any);
  k.fill(any);
  v.fill(any);
  const std::int64_t special = c.n > 0 ? static_cast<std::int64_t>(random() % static_cast<unsigned>(c.n)) : 0;
  switch (c.values) {
  case Values::normal:
    break;
  case Values::large_scores:
    q.fill(times(30));
    break;
  case Values::one_huge_key:
    k.fill([&](auto, auto, std::int64_t key, auto) { return normal(random) * (key == special ? 1e4f : 1.0f); });
    break;
  case Values::all_equal:
    q.fill([](auto...) { return 1.5f; });
    k.fill([](auto...) { return -0.75f; });
    break;
  case Values::two_almost_equal: { // the two greatest scores, far above the others
    q.fill([](auto...) { return 1.0f; });
    k.fill([&](auto, auto, std::int64_t key, std::int64_t column) {
      return key == special ? 16.0f : key == (special + 1) % c.n ? (column == 0 ? 15.9375f : 16.0f) : -1.0f;
    });
    break;
  }
  case Values::zero:
    q.fill([](auto...) { return 0.0f; });
    break;
  case Values::denormal:
    k.fill(times(1e-39f));
    v.fill(any);
    break;
  }
}

double norm(const std::vector<double>& v) {
  double sum = 0;
  for (const double x : v)
    sum += x * x;
  return std::sqrt(sum);
}

/// A row or column below average may be what cancellation left: P's rounding, 2⁻⁹ of each term, is no share of it. The
/// bound on elements holds for these.
constexpr double kTiny = 1;

/// OPS.md, Accuracy: the whole, every row and every column that is not tiny, and every element.
void check_accuracy(const Case& c, const Tensor& o, const std::vector<double>& expected,
                    const std::vector<double>& magnitude) {
  std::vector<double> all, all_errors;
  std::vector<std::vector<double>> columns(static_cast<std::size_t>(c.dv)), column_errors = columns;
  std::int64_t wrong = 0, bad_rows = 0;
  std::string first;
  double worst_row = 0;
  std::size_t at = 0;
  const double rms = norm(expected) / std::sqrt(std::max<double>(static_cast<double>(expected.size()), 1));
  for (std::int64_t batch = 0; batch < c.b; ++batch)
    for (std::int64_t head = 0; head < c.hq; ++head)
      for (std::int64_t m = 0; m < c.m; ++m) {
        std::vector<double> row, errors;
        for (std::int64_t j = 0; j < c.dv; ++j, ++at) {
          const double found = float_of_bf16(o.row(batch, head, m)[j]), error = found - expected[at];
          const double allowed = std::fabs(expected[at]) / 128 + attention::kElementBound * magnitude[at];
          if (!(std::fabs(error) <= allowed) && wrong++ == 0)
            first = fmt::format("[{}][{}][{}][{}]: {} instead of {}", batch, head, m, j, found, expected[at]);
          row.push_back(expected[at]);
          errors.push_back(error);
          all.push_back(expected[at]);
          all_errors.push_back(error);
          columns[static_cast<std::size_t>(j)].push_back(expected[at]);
          column_errors[static_cast<std::size_t>(j)].push_back(error);
        }
        const double size = norm(row);
        if (size > kTiny * rms * std::sqrt(static_cast<double>(c.dv))) {
          worst_row = std::max(worst_row, norm(errors) / size);
          if (!(norm(errors) <= attention::kRelativeBound * size))
            ++bad_rows;
        }
      }
  INFO("first wrong element ", first, ", worst row ", worst_row);
  CHECK(wrong == 0);
  CHECK(bad_rows == 0);
  CHECK(norm(all_errors) <= attention::kRelativeBound * norm(all));
  for (std::size_t j = 0; j < columns.size(); ++j)
    if (norm(columns[j]) > kTiny * rms * std::sqrt(static_cast<double>(columns[j].size()))) {
      CAPTURE(j);
      REQUIRE(norm(column_errors[j]) <= attention::kRelativeBound * norm(columns[j]));
    }
}

KernelDesc desc_of(const Case& c) {
  KernelDesc desc = attention::make_desc(c.b, c.hq, c.hkv, c.m, c.n, c.d, c.dv, c.causal);
  desc.value[attention::kLse] = c.lse;
  desc.value[attention::kBatchInvariant] = c.batch_invariant;
  return desc;
}

void check_case(Engine& engine, const Case& c) {
  INFO(c.text());
  std::mt19937 random(c.seed);
  std::vector<std::int32_t> kv_len = c.lengths;
  while (c.kv_len && static_cast<std::int64_t>(kv_len.size()) < c.b)
    kv_len.push_back(static_cast<std::int32_t>(random() % static_cast<unsigned>(c.n + 1)));
  // Invisible keys are never read: they are NaNs or lie in the inaccessible page.
  const Tensor q(c, c.hq, c.m, c.d), k(c, c.hkv, c.n, c.d, c.spare_capacity, kv_len),
      v(c, c.hkv, c.n, c.dv, c.spare_capacity, kv_len), o(c, c.hq, c.m, c.dv);
  fill_inputs(c, q, k, v, random);
  constexpr float kUntouched = 12345;
  const std::int64_t rows = c.b * c.hq * c.m;
  std::vector<float> lse(static_cast<std::size_t>(rows + 1), kUntouched);

  const KernelDesc desc = desc_of(c);
  const Result<KernelRef> kernel = engine.get(desc);
  REQUIRE_MESSAGE(kernel.is_ok(), (kernel ? "" : kernel.status().message()));
  Args args{.b = c.b, .hq = c.hq, .hkv = c.hkv, .m = c.m, .n = c.n};
  args.q = q.data();
  args.q_strides = q.strides;
  args.k = k.data();
  args.k_strides = k.strides;
  args.v = v.data();
  args.v_strides = v.strides;
  args.o = o.data();
  args.o_strides = o.strides;
  args.lse = c.lse ? lse.data() : nullptr;
  args.kv_len = c.kv_len ? kv_len.data() : nullptr;
  args.scale = c.scale;
  const Status status = attention::run(**kernel, args);
  REQUIRE_MESSAGE(status.is_ok(), status.message());

  std::vector<double> expected(static_cast<std::size_t>(rows * c.dv)), magnitude = expected,
                                                                       expected_lse(static_cast<std::size_t>(rows));
  attention::reference(desc, args, expected.data(), expected_lse.data());
  std::vector<std::uint16_t> absolute(v.data(), v.data() + v.size);
  for (std::uint16_t& bits : absolute)
    bits &= 0x7FFF;
  Args of_absolute = args;
  of_absolute.v = absolute.data();
  attention::reference(desc, of_absolute, magnitude.data(), nullptr);
  check_accuracy(c, o, expected, magnitude);

  std::int64_t wrong_lse = 0;
  for (std::size_t i = 0; c.lse && i < expected_lse.size(); ++i)
    wrong_lse += std::isinf(expected_lse[i])
                     ? lse[i] != expected_lse[i]
                     : !(std::fabs(lse[i] - expected_lse[i]) <= 1e-3 * std::max(1.0, std::fabs(expected_lse[i])));
  CHECK(wrong_lse == 0);
  CHECK(lse.back() == kUntouched);

  // The gaps between rows.
  std::vector<bool> element(static_cast<std::size_t>(o.size));
  for (std::int64_t batch = 0; batch < c.b; ++batch)
    for (std::int64_t head = 0; head < c.hq; ++head)
      for (std::int64_t m = 0; m < c.m; ++m)
        std::fill_n(element.begin() + (o.row(batch, head, m) - o.data()), c.dv, true);
  std::int64_t touched = 0;
  for (std::int64_t i = 0; i < o.size; ++i)
    touched += !element[static_cast<std::size_t>(i)] && o.data()[i] != Tensor::kFiller;
  CHECK(touched == 0);
}

} // namespace

namespace {

/// A contiguous problem of random values that a test calls as it likes.
struct Problem {
  std::int64_t b, hq, hkv, m, n, d, dv;
  std::vector<std::uint16_t> q, k, v, o;
  std::vector<float> lse;

  Problem(std::int64_t b_, std::int64_t hq_, std::int64_t hkv_, std::int64_t m_, std::int64_t n_, std::int64_t d_,
          std::int64_t dv_)
      : b(b_), hq(hq_), hkv(hkv_), m(m_), n(n_), d(d_), dv(dv_), q(random(b * hq * m * d)), k(random(b * hkv * n * d)),
        v(random(b * hkv * n * dv)), o(static_cast<std::size_t>(b * hq * m * dv), Tensor::kFiller),
        lse(static_cast<std::size_t>(b * hq * m)) {}
  static std::vector<std::uint16_t> random(std::int64_t count) {
    static std::mt19937 generator(1);
    std::normal_distribution<float> normal;
    std::vector<std::uint16_t> values(static_cast<std::size_t>(count));
    for (std::uint16_t& value : values)
      value = bf16_of_float(normal(generator));
    return values;
  }
  Args args() {
    Args a{.b = b, .hq = hq, .hkv = hkv, .m = m, .n = n};
    a.q = q.data();
    a.q_strides = Strides::contiguous(hq, m, d);
    a.k = k.data();
    a.k_strides = Strides::contiguous(hkv, n, d);
    a.v = v.data();
    a.v_strides = Strides::contiguous(hkv, n, dv);
    a.o = o.data();
    a.o_strides = Strides::contiguous(hq, m, dv);
    return a;
  }
  KernelDesc desc(Causal causal = Causal::none) const { return attention::make_desc(b, hq, hkv, m, n, d, dv, causal); }
};

KernelRef kernel_of(Engine& engine, const KernelDesc& desc) {
  Result<KernelRef> kernel = engine.get(desc);
  REQUIRE_MESSAGE(kernel.is_ok(), (kernel ? "" : kernel.status().message()));
  return std::move(*kernel);
}

} // namespace

TEST_CASE("a bad argument is named, and nothing is written") {
  const std::unique_ptr<Engine> engine = engine_for(IsaPath::reference, 1);
  // q, k, v, o and lse one after the other, so that moving one by some elements makes it overlap its neighbour.
  constexpr std::int64_t kB = 2, kHq = 4, kHkv = 2, kM = 3, kN = 5, kD = 16, kDv = 8;
  std::vector<std::uint16_t> memory(4096, Tensor::kFiller);
  std::uint16_t *const q = memory.data() + 64, *const k = q + kB * kHq * kM * kD, *const v = k + kB * kHkv * kN * kD,
                       *const o = v + kB * kHkv * kN * kDv, *const lse = o + kB * kHq * kM * kDv;
  const auto desc_with = [&](std::int64_t with_lse) {
    KernelDesc desc = attention::make_desc(kB, kHq, kHkv, kM, kN, kD, kDv);
    desc.value[attention::kLse] = with_lse;
    return desc;
  };
  const KernelRef kernel = kernel_of(*engine, desc_with(0)), lse_kernel = kernel_of(*engine, desc_with(1));
  const auto good = [&](bool with_lse) {
    Args a{.b = kB, .hq = kHq, .hkv = kHkv, .m = kM, .n = kN};
    a.q = q;
    a.q_strides = Strides::contiguous(kHq, kM, kD);
    a.k = k;
    a.k_strides = Strides::contiguous(kHkv, kN, kD);
    a.v = v;
    a.v_strides = Strides::contiguous(kHkv, kN, kDv);
    a.o = o;
    a.o_strides = Strides::contiguous(kHq, kM, kDv);
    a.lse = with_lse ? reinterpret_cast<float*>(lse) : nullptr;
    return a;
  };
  constexpr std::int64_t kHuge = std::int64_t{1} << 60;
  constexpr float kInfinity = std::numeric_limits<float>::infinity(), kNaN = std::numeric_limits<float>::quiet_NaN();
  std::int32_t too_long[] = {5, 6}, negative[] = {0, -1};
  alignas(64) char workspace[128];
  const struct {
    std::function<void(Args&)> change;
    std::string_view because;
    bool with_lse = false;
  } calls[] = {
      {[](Args& a) { a.hq = 6; }, "hq is 6: allowed is 4"},
      {[](Args& a) { a.hkv = 3; }, "hq is 4: allowed is 6"},
      {[](Args& a) { a.n = -1; }, "n is -1"},
      {[](Args& a) { a.b = -1; }, "b is -1"},
      {[](Args& a) { a.m = 30; }, "m is 30: allowed is 2 to 6"},
      {[](Args& a) { a.m = -3; }, "m is -3: allowed is 2 to 6"},
      {[](Args& a) { a.b = a.n = (std::int64_t{1} << 31) - 1; }, "b·hq·max(m, n) is 2147483647 * 4 * 2147483647"},
      {[](Args& a) { a.q = nullptr; }, "q is null: allowed is a 2 x 4 x 3 x 16 tensor"},
      {[](Args& a) { a.k = nullptr; }, "k is null: allowed is a 2 x 2 x 5 x 16 tensor"},
      {[](Args& a) { a.v = nullptr; }, "v is null: allowed is a 2 x 2 x 5 x 8 tensor"},
      {[](Args& a) { a.o = nullptr; }, "o is null: allowed is a 2 x 4 x 3 x 8 tensor"},
      {[&](Args& a) { a.q = reinterpret_cast<std::uint16_t*>(workspace + 1); },
       "allowed is an address that is a multiple of 2"},
      {[&](Args& a) { a.lse = reinterpret_cast<float*>(workspace + 2); }, "lse is 0x", true},
      {[&](Args& a) { a.kv_len = reinterpret_cast<std::int32_t*>(workspace + 1); }, "kv_len is 0x"},
      {[](Args& a) { a.q_strides.column = 2; }, "q's innermost stride is 2: allowed is 1"},
      {[](Args& a) { a.k_strides.column = 2; }, "k's innermost stride is 2: allowed is 1"},
      {[](Args& a) { a.v_strides.column = 0; }, "v's innermost stride is 0: allowed is 1"},
      {[](Args& a) { a.o_strides.column = 3; }, "o's innermost stride is 3: allowed is 1"},
      {[](Args& a) { a.o_strides.row = 7; }, "o's strides is 96, 24, 7: allowed is strides by which no two rows of o"},
      {[](Args& a) { a.o_strides.row = -7; }, "o's strides is 96, 24, -7"},
      {[](Args& a) { a.o_strides.head = 0; }, "o's strides is 96, 0, 8"},
      {[](Args& a) { a.o_strides.batch = 16; },
       "o's strides is 16, 24, 8: allowed is strides by which no two rows of o overlap"},
      {[](Args& a) { a.q_strides.batch = kHuge + 1; }, "a tensor within 2^60 elements"},
      {[](Args& a) { a.k_strides.row = -kHuge; }, "a tensor within 2^60 elements"},
      {[](Args& a) { a.v_strides.head = std::numeric_limits<std::int64_t>::min(); }, "a tensor within 2^60 elements"},
      {[](Args& a) { a.o_strides.row = std::numeric_limits<std::int64_t>::min(); }, "a tensor within 2^60 elements"},
      // Overlapping in whole, and by the last row or the first.
      {[&](Args& a) { a.o = v; }, "o is in memory that v spans: allowed is memory of its own"},
      {[&](Args& a) { a.q = o; }, "o is in memory that q spans"},
      {[&](Args& a) { a.o = o - 1; }, "o is in memory that v spans"},
      {[&](Args& a) { a.o = q - 1 - (lse - o) + 8; }, "o is in memory that q spans"},
      {[&](Args& a) { a.k = o + 8; }, "o is in memory that k spans"},
      // Backwards: the pointer is to the last row in memory, or behind the output.
      {[&](Args& a) {
         a.o = lse - 8, a.o_strides = {-96, -24, -8}, a.v = v + 1;
       },
       "o is in memory that v spans"},
      {[&](Args& a) { a.v = lse, a.v_strides.row = -8; }, "o is in memory that v spans"},
      {[&](Args& a) { a.k = memory.data() + memory.size() - 16, a.k_strides.batch = -2970; },
       "o is in memory that k spans"},
      {[&](Args& a) { a.lse = reinterpret_cast<float*>(lse - 2); }, "lse is in memory that o spans", true},
      {[&](Args& a) { a.lse = reinterpret_cast<float*>(k); }, "lse is in memory that k spans", true},
      {[&](Args& a) { a.kv_len = reinterpret_cast<std::int32_t*>(o + 4); }, "o is in memory that kv_len spans"},
      {[](Args& a) { a.scale = -1.0f; }, "scale is -1: allowed is a finite number, 0 or more"},
      {[=](Args& a) { a.scale = kNaN; }, "scale is nan"},
      {[=](Args& a) { a.scale = kInfinity; }, "scale is inf"},
      {[=](Args& a) { a.scale = -kInfinity; }, "scale is -inf"},
      {[&](Args& a) { a.kv_len = too_long; }, "kv_len[1] is 6: allowed is 0 to n, 5"},
      {[&](Args& a) { a.kv_len = negative; }, "kv_len[1] is -1: allowed is 0 to n, 5"},
      {[&](Args& a) { a.lse = reinterpret_cast<float*>(lse); }, "lse is given: allowed is null, as lse=0 says"},
      {[](Args& a) { a.lse = nullptr; }, "lse is null: allowed is a 2 x 4 x 3 tensor, which lse=1 asks for", true},
      {[](Args& a) { a.threads = -1; }, "threads is -1"},
      {[&](Args& a) { a.workspace = workspace + 1; }, "64-byte aligned"},
      {[&](Args& a) { a.workspace = workspace; }, "workspace_bytes is 0: allowed is", true},
  };
  std::fill_n(o + 4, 4, std::uint16_t{0}); // two lengths
  const std::vector<std::uint16_t> before = memory;
  for (const auto& call : calls) {
    Args args = good(call.with_lse);
    call.change(args);
    const Status status = attention::run(call.with_lse ? *lse_kernel : *kernel, args);
    INFO(std::string(call.because), " | ", status.message());
    CHECK(status.code() == Code::invalid_argument);
    CHECK(status.message().starts_with("attention: "));
    CHECK(status.message().find(call.because) != std::string::npos);
    CHECK(memory == before);
  }
  CHECK_FALSE(attention::workspace_bytes(*kernel, {.b = 1 << 30, .hq = 4, .hkv = 2, .m = 3, .n = 1 << 30}).is_ok());

  const std::pair<const char*, const char*> descs[] = {
      {"attention hq=1 hkv=1 m=1 n=1 d=12 dv=8", "d=12: allowed is a multiple of 8"},
      {"attention hq=1 hkv=1 m=1 n=1 d=8 dv=20", "dv=20: allowed is a multiple of 8 from 8 to 256"},
      {"attention hq=1 hkv=1 m=1 n=1 d=0 dv=8", "d=0: allowed is an integer from 8 to 256"},
      {"attention hq=1 hkv=1 m=1 n=1 d=257 dv=8", "d=257: allowed is an integer from 8 to 256"},
      {"attention hq=1 hkv=1 m=1 n=1 d=8 dv=8 causal=left",
       "causal=left: allowed is one of none, top_left, bottom_right"},
      {"attention hq=1 hkv=1 m=1 n=1 d=8 dv=8 lse=2", "lse=2: allowed is an integer from 0 to 1"},
      {"attention hq=1 hkv=1 m=1 n=1 d=8 dv=264", "dv=264: allowed is an integer from 8 to 256"},
      {"attention hq=3 hkv=2 m=1 n=1 d=8 dv=8", "hq=3: allowed is a multiple of hkv, 2"},
      {"attention hq=1 hkv=0 m=1 n=1 d=8 dv=8", "hq=1: allowed is a multiple of hkv, 0"},
  };
  for (const auto& [text, because] : descs) {
    const Result<KernelDesc> desc = parse_desc(text);
    REQUIRE_FALSE(desc.is_ok());
    CHECK(desc.status().message().find(because) != std::string::npos);
  }
}

/// Elements of a tensor [2][heads][rows][columns] from its first in memory to its last, random, and nothing beside
/// them.
struct StridedInput {
  Strides strides;
  std::int64_t heads, rows, columns, before = 0; ///< elements before the one that the pointer is for
  std::int64_t size;
  std::optional<GuardedBuffer> own;
  std::uint16_t* data = nullptr;

  StridedInput(const Strides& strides_, std::int64_t heads_, std::int64_t rows_, std::int64_t columns_, Guard guard)
      : strides(strides_), heads(heads_), rows(rows_), columns(columns_), size(columns_) {
    for (const auto& [extent, stride] :
         {std::pair{std::int64_t{2}, strides.batch}, {heads, strides.head}, {rows, strides.row}}) {
      size += (extent - 1) * std::abs(stride);
      before += stride < 0 ? (extent - 1) * -stride : 0;
    }
    own.emplace(static_cast<std::size_t>(size) * 2, guard);
    data = own->as<std::uint16_t>() + before;
    static const std::vector<std::uint16_t> values = Problem::random(4099); // a prime: no two rows alike
    for (std::int64_t i = 0; i < size; ++i)
      own->as<std::uint16_t>()[i] = values[static_cast<std::size_t>((i + 131 * columns + 17 * rows) % 4099)];
  }
  std::vector<std::uint16_t> contiguous() const {
    std::vector<std::uint16_t> copy;
    for (std::int64_t batch = 0; batch < 2; ++batch)
      for (std::int64_t head = 0; head < heads; ++head)
        for (std::int64_t row = 0; row < rows; ++row) {
          const std::uint16_t* const from = data + batch * strides.batch + head * strides.head + row * strides.row;
          copy.insert(copy.end(), from, from + columns);
        }
    return copy;
  }
};

TEST_CASE("any strides: rows that overlap, repeat, run backwards or lie among other tensors' give the same bits") {
  struct Layout {
    const char* name;
    Strides (*of)(std::int64_t heads, std::int64_t rows, std::int64_t columns);
    bool separates = true; ///< rows: an output may have it too
  };
  const Layout layouts[] = {
      {"heads within a row",
       [](auto h, auto r, auto c) {
         return Strides{r * h * c, c, h * c};
       }},
      {"batches within a row",
       [](auto h, auto, auto c) {
         return Strides{h * c, c, 2 * h * c};
       }},
      {"a cache with room for more",
       [](auto h, auto r, auto c) {
         return Strides{h * (r + 17) * c, (r + 17) * c, c};
       }},
      {"every other row of heads",
       [](auto h, auto r, auto c) {
         return Strides{2 * r * h * c, c, 2 * h * c};
       }},
      {"rows backwards",
       [](auto h, auto r, auto c) {
         return Strides{h * r * c, r * c, -c};
       }},
      {"all backwards",
       [](auto h, auto r, auto c) {
         return Strides{-h * r * c, -r * c, -c};
       }},
      {"one row for all",
       [](auto, auto, auto) {
         return Strides{0, 0, 0};
       },
       false},
      {"one batch for all, heads and rows by one element",
       [](auto, auto, auto) {
         return Strides{0, 1, 1};
       },
       false},
      {"a sliding window",
       [](auto, auto, auto) {
         return Strides{5, -3, 8};
       },
       false},
      {"a row's half",
       [](auto h, auto r, auto c) {
         return Strides{-h * r * c, r * c, c / 2};
       },
       false},
  };
  constexpr std::int64_t kHq = 4, kHkv = 2;
  const std::int64_t kN = is_emulated() ? 37 : 70;
  for (const IsaPath isa : paths_here()) {
    const std::unique_ptr<Engine> engine = engine_for(isa, 1);
    for (const std::int64_t m : is_emulated() ? std::vector<std::int64_t>{3, 17} : std::vector<std::int64_t>{1, 5, 40})
      for (const std::int64_t d : is_emulated() ? std::vector<std::int64_t>{64} : std::vector<std::int64_t>{64, 72}) {
        Problem p(2, kHq, kHkv, m, kN, d, d);
        const KernelRef kernel = kernel_of(*engine, p.desc(Causal::bottom_right));
        const auto check = [&](Args strided, const StridedInput& q, const StridedInput& k, const StridedInput& v,
                               const Layout& out) {
          Args args = p.args();
          const std::vector<std::uint16_t> q_copy = q.contiguous(), k_copy = k.contiguous(), v_copy = v.contiguous();
          args.q = q_copy.data();
          args.k = k_copy.data();
          args.v = v_copy.data();
          REQUIRE(attention::run(*kernel, args).is_ok());
          strided.q = q.data, strided.q_strides = q.strides;
          strided.k = k.data, strided.k_strides = k.strides;
          strided.v = v.data, strided.v_strides = v.strides;
          const StridedInput o(out.of(kHq, m, d), kHq, m, d, Guard::after);
          strided.o = o.data;
          strided.o_strides = o.strides;
          const Status status = attention::run(*kernel, strided);
          REQUIRE_MESSAGE(status.is_ok(), status.message());
          CHECK(o.contiguous() == p.o);
        };
        for (std::size_t i = 0; i < std::size(layouts); ++i) {
          INFO("path ", std::string(kiln::name_of(isa)), " m=", m, " d=", d, " ", layouts[i].name);
          const Guard guard = i % 2 ? Guard::after : Guard::before;
          const StridedInput q(layouts[i].of(kHq, m, d), kHq, m, d, guard),
              k(layouts[i].of(kHkv, kN, d), kHkv, kN, d, guard),
              v(layouts[(i + 3) % std::size(layouts)].of(kHkv, kN, d), kHkv, kN, d, guard);
          check(p.args(), q, k, v, layouts[layouts[i].separates ? i : 0]);
        }
        INFO("path ", std::string(kiln::name_of(isa)), " m=", m, " d=", d, " K and V in one tensor");
        const StridedInput q(Strides::contiguous(kHq, m, d), kHq, m, d, Guard::after),
            k({kN * 2 * kHkv * d, d, 2 * kHkv * d}, kHkv, kN, d, Guard::before);
        StridedInput v(k.strides, kHkv, kN, d, Guard::after); // of its memory none is used
        std::vector<std::uint16_t> both = Problem::random(k.size + kHkv * d);
        StridedInput k_of_both(k.strides, kHkv, kN, d, Guard::before);
        k_of_both.data = both.data();
        v.data = both.data() + kHkv * d;
        check(p.args(), q, k_of_both, v, layouts[0]);
      }
  }
}

TEST_CASE("without keys K and V are empty: no pointer and no stride of theirs is used") {
  for (const IsaPath isa : paths_here()) {
    INFO("path ", std::string(kiln::name_of(isa)));
    const std::unique_ptr<Engine> engine = engine_for(isa, 1);
    Problem p(3, 4, 2, 2, 0, 64, 64);
    const KernelRef kernel = kernel_of(*engine, p.desc());
    Args args = p.args();
    args.k = args.v = nullptr;
    constexpr std::int64_t kMost = std::numeric_limits<std::int64_t>::max();
    args.k_strides = args.v_strides = {kMost, kMost, kMost};
    std::fill(p.o.begin(), p.o.end(), std::uint16_t{0x7FC0});
    const Status status = attention::run(*kernel, args);
    REQUIRE_MESSAGE(status.is_ok(), status.message());
    CHECK(std::all_of(p.o.begin(), p.o.end(), [](std::uint16_t bits) { return bits == 0; }));
  }
}

TEST_CASE("the bits depend neither on threads nor on where the workspace is; with batch_invariant=1 not on M") {
  for (const IsaPath isa : paths_here()) {
    INFO("path ", std::string(kiln::name_of(isa)));
    const std::unique_ptr<Engine> alone = engine_for(isa, 1), three = engine_for(isa, 3);
    for (const std::int64_t m : is_emulated() ? std::vector<std::int64_t>{3} : std::vector<std::int64_t>{1, 3, 40}) {
      Problem p(1, 6, 2, m, isa == IsaPath::reference ? 70 : 1100, 72, 40);
      const KernelRef kernel = kernel_of(*alone, p.desc()), threaded = kernel_of(*three, p.desc());
      Args args = p.args();
      REQUIRE(attention::run(*kernel, args).is_ok());
      const std::vector<std::uint16_t> first = p.o;
      std::fill(p.o.begin(), p.o.end(), Tensor::kFiller);
      REQUIRE(attention::run(*threaded, args).is_ok());
      CHECK(p.o == first);
      for (const KernelRef* of : {&kernel, &threaded}) {
        std::fill(p.o.begin(), p.o.end(), Tensor::kFiller);
        const test::OtherRounding scope;
        REQUIRE(attention::run(**of, args).is_ok());
        CHECK(p.o == first);
      }
      // Exactly the workspace that it asks for, filled with what must not matter.
      const Result<std::uint64_t> bytes = attention::workspace_bytes(*threaded, args);
      REQUIRE(bytes.is_ok());
      for (const Guard guard : {Guard::after, Guard::before}) {
        const GuardedBuffer workspace((*bytes + 63) / 64 * 64, guard);
        std::memset(workspace.as<void>(), 0xFF, *bytes);
        args.workspace = workspace.as<void>();
        args.workspace_bytes = *bytes;
        std::fill(p.o.begin(), p.o.end(), Tensor::kFiller);
        REQUIRE(attention::run(*threaded, args).is_ok());
        CHECK(p.o == first);
      }
      args.workspace_bytes = *bytes - 1;
      if (*bytes > 0)
        CHECK_FALSE(attention::run(*threaded, args).is_ok());
    }
    // The rows of a large call, one by one, with maxima that grow late, and a row fewer than a register holds.
    Problem p(1, 1, 1, 37, 420, 64, 64);
    for (std::uint16_t& bits : p.q)
      bits = bf16_of_float(30 * float_of_bf16(bits));
    KernelDesc desc = p.desc();
    desc.value[attention::kBatchInvariant] = 1;
    const KernelRef kernel = kernel_of(*alone, desc);
    REQUIRE(attention::run(*kernel, p.args()).is_ok());
    const std::vector<std::uint16_t> all = p.o;
    for (std::int64_t row = 0; row < p.m; ++row) {
      Args args = p.args();
      args.m = 1;
      args.q += row * p.d;
      args.o += row * p.dv;
      REQUIRE(attention::run(*kernel, args).is_ok());
    }
    CHECK(p.o == all);
  }
}

TEST_CASE("a host that runs other calls between the tasks of one spoils none") {
  const std::vector<IsaPath> paths = paths_here();
  const IsaPath isa = *std::find_if_not(paths.begin(), paths.end(), needs_emulator);
  INFO("path ", std::string(kiln::name_of(isa)));
  const std::unique_ptr<Engine> alone = engine_for(isa, 1);
  // Keys in several parts, whose sums meet in memory that all tasks of a call share; the other call wants more of it.
  Problem p(1, 6, 2, 3, 2000, 72, 40), other(1, 6, 2, 5, 2600, 72, 40);
  const KernelRef kernel = kernel_of(*alone, p.desc()), other_kernel = kernel_of(*alone, other.desc());
  REQUIRE(attention::run(*kernel, p.args()).is_ok());
  REQUIRE(attention::run(*other_kernel, other.args()).is_ok());
  const std::vector<std::uint16_t> wanted = p.o, other_wanted = other.o;
  struct Host {
    const Kernel& kernel;
    const Args args;
    std::int64_t calls = 0, failed = 0;
  } host{*other_kernel, other.args()};
  EngineOptions options;
  options.config.cache = CacheMode::off;
  options.config.threads = 3;
  options.config.forced.push_back({OpId::attention, isa});
  options.machine = detect_machine();
  options.machine.target = target_here();
  options.implementations = implementation_table();
  options.parallel_for = [](void* context, std::size_t count, void (*task)(void*, std::size_t), void* of_task) {
    Host& h = *static_cast<Host*>(context);
    for (std::size_t i = 0; i < count; ++i) {
      task(of_task, i);
      ++h.calls;
      h.failed += !attention::run(h.kernel, h.args).is_ok();
    }
  };
  options.parallel_context = &host;
  const Result<std::unique_ptr<Engine>> engine = Engine::create(std::move(options));
  REQUIRE(engine.is_ok());
  const KernelRef hosted = kernel_of(**engine, p.desc());
  std::fill(p.o.begin(), p.o.end(), Tensor::kFiller);
  std::fill(other.o.begin(), other.o.end(), Tensor::kFiller);
  REQUIRE(attention::run(*hosted, p.args()).is_ok());
  CHECK(host.calls >= 2);
  CHECK(host.failed == 0);
  CHECK(p.o == wanted);
  CHECK(other.o == other_wanted);
}

TEST_CASE("with batch_invariant=1 a query's bits and lse are those of a call with fewer of them, whatever it sees") {
  for (const IsaPath isa : paths_here()) {
    INFO("path ", std::string(kiln::name_of(isa)));
    const std::unique_ptr<Engine> engine = engine_for(isa, 1);
    for (const Causal causal : {Causal::top_left, Causal::bottom_right}) {
      if (causal == Causal::top_left && is_emulated())
        continue;
      CAPTURE(static_cast<int>(causal));
      Problem p(1, 6, 2, 41, 150, 48, 72);
      KernelDesc desc = p.desc(causal);
      desc.value[attention::kLse] = desc.value[attention::kBatchInvariant] = 1;
      const KernelRef kernel = kernel_of(*engine, desc);
      Args args = p.args();
      args.lse = p.lse.data();
      REQUIRE(attention::run(*kernel, args).is_ok());
      for (const std::int64_t m : {1, 2, 5, 16, 33}) {
        CAPTURE(m);
        // The first queries by top_left, the last ones by bottom_right: they see what they saw.
        const std::int64_t first = causal == Causal::top_left ? 0 : p.m - m;
        std::vector<std::uint16_t> o(p.o.size(), Tensor::kFiller);
        std::vector<float> lse(static_cast<std::size_t>(p.hq * m));
        Args fewer = args;
        fewer.m = m;
        fewer.q += first * p.d;
        fewer.o = o.data() + first * p.dv;
        fewer.lse = lse.data();
        REQUIRE(attention::run(*kernel, fewer).is_ok());
        std::int64_t wrong = 0;
        for (std::int64_t head = 0; head < p.hq; ++head)
          for (std::int64_t i = 0; i < m; ++i) {
            const std::int64_t row = head * p.m + first + i;
            wrong +=
                !std::equal(&o[static_cast<std::size_t>(row * p.dv)], &o[static_cast<std::size_t>(row * p.dv)] + p.dv,
                            &p.o[static_cast<std::size_t>(row * p.dv)]);
            wrong += lse[static_cast<std::size_t>(head * m + i)] != p.lse[static_cast<std::size_t>(row)];
          }
        CHECK(wrong == 0);
      }
    }
  }
}

TEST_CASE("a NaN of a visible key is a NaN of the rows that see it, of no other and of one kind") {
  for (const IsaPath isa : paths_here()) {
    INFO("path ", std::string(kiln::name_of(isa)));
    const std::unique_ptr<Engine> engine = engine_for(isa, 1);
    for (const std::int64_t m : {8, 80}) {
      Problem p(1, 1, 1, m, m, 32, 32);
      constexpr std::int64_t kBad = 5;
      p.k[kBad * 32 + 3] = 0xFFC1;
      const KernelRef kernel = kernel_of(*engine, p.desc(Causal::top_left));
      REQUIRE(attention::run(*kernel, p.args()).is_ok());
      std::int64_t wrong = 0;
      for (std::int64_t row = 0; row < m; ++row)
        for (std::int64_t j = 0; j < 32; ++j) {
          const std::uint16_t bits = p.o[static_cast<std::size_t>(row * 32 + j)];
          wrong += row < kBad ? std::isnan(float_of_bf16(bits)) : bits != 0x7FC0;
        }
      CHECK(wrong == 0);
    }
  }
}

TEST_CASE("what K and V hold at hidden keys changes no bit, be it infinite or NaN") {
  constexpr std::uint16_t kValues[] = {0x7F80, 0xFF80, 0x7FC0, 0xFFA5};
  struct Size {
    std::int64_t hq, hkv, m, n, d, dv;
  };
  // One query, few and many; blocks of rows that end anywhere; a last tile that N does not fill.
  constexpr Size kSizes[] = {{1, 1, 1, 9, 64, 64},    {4, 1, 1, 70, 128, 128}, {1, 1, 7, 40, 64, 72},
                             {3, 1, 5, 21, 72, 40},   {4, 2, 9, 33, 96, 128},  {1, 1, 41, 41, 64, 24},
                             {2, 2, 150, 150, 32, 64}};
  for (const IsaPath isa : paths_here()) {
    INFO("path ", std::string(kiln::name_of(isa)));
    const std::unique_ptr<Engine> engine = engine_for(isa, 1);
    for (const Size& size : kSizes)
      for (const Causal causal : {Causal::none, Causal::top_left, Causal::bottom_right}) {
        // Compiling takes half a second there. The kernels differ by whether rows end together, and those of few rows
        // not at all.
        if (is_emulated() && (causal == Causal::top_left || (causal == Causal::none && size.m <= attention::kFewRows)))
          continue;
        Problem p(1, size.hq, size.hkv, size.m, size.n, size.d, size.dv);
        INFO("hq ", size.hq, " m ", size.m, " n ", size.n, " d ", size.d, " dv ", size.dv, " causal ",
             static_cast<int>(causal));
        const std::int32_t kv_len = static_cast<std::int32_t>(size.n - 2);
        const KernelRef kernel = kernel_of(*engine, p.desc(causal));
        Args args = p.args();
        args.kv_len = &kv_len;
        REQUIRE(attention::run(*kernel, args).is_ok());
        const std::vector<std::uint16_t> clean = p.o, k = p.k, v = p.v;
        // Query m sees the keys below first + m.
        const std::int64_t first = causal == Causal::none       ? kv_len
                                   : causal == Causal::top_left ? 1
                                                                : kv_len - size.m + 1;
        std::int64_t wrong = 0;
        for (const std::int64_t bad : {first, first + 1, first + 2, first + 5, first + size.m / 2, size.n - 1})
          for (const bool in_v : {true, false}) {
            if (bad < 0 || bad >= size.n)
              continue;
            p.k = k;
            p.v = v;
            for (std::int64_t head = 0; head < size.hkv; ++head) {
              std::uint16_t* row =
                  in_v ? p.v.data() + (head * size.n + bad) * size.dv : p.k.data() + (head * size.n + bad) * size.d;
              for (std::int64_t i = 0; i < (in_v ? size.dv : size.d); ++i)
                row[i] = kValues[(i + bad) % 4];
            }
            std::fill(p.o.begin(), p.o.end(), Tensor::kFiller);
            REQUIRE(attention::run(*kernel, args).is_ok());
            for (std::int64_t i = 0; i < size.hq * size.m * size.dv; ++i) {
              const std::int64_t m = i / size.dv % size.m;
              const bool sees = bad < kv_len && (causal == Causal::none || bad < first + m);
              wrong += !sees && p.o[static_cast<std::size_t>(i)] != clean[static_cast<std::size_t>(i)];
            }
          }
        CHECK(wrong == 0);
      }
  }
}

TEST_CASE("infinities and NaNs of V at keys that a row does not see change nothing, at others they do") {
  const float kInfinity = std::numeric_limits<float>::infinity();
  for (const IsaPath isa : paths_here()) {
    INFO("path ", std::string(kiln::name_of(isa)));
    const std::unique_ptr<Engine> engine = engine_for(isa, 1);
    for (const std::int64_t m : {7, 20, 40, 150}) {
      Problem p(1, 1, 1, m, m + 3, 40, 24), finite = p;
      const std::pair<std::int64_t, float> bad[] = {
          {4, kInfinity}, {5, -kInfinity}, {m - 2, std::numeric_limits<float>::quiet_NaN()}, {m + 2, kInfinity}};
      for (std::size_t i = 0; i < std::size(bad); ++i)
        p.v[static_cast<std::size_t>(bad[i].first * p.dv) + 5 * i] = bf16_of_float(bad[i].second);
      const KernelRef kernel = kernel_of(*engine, p.desc(Causal::top_left));
      REQUIRE(attention::run(*kernel, p.args()).is_ok());
      REQUIRE(attention::run(*kernel, finite.args()).is_ok());
      std::int64_t wrong = 0;
      for (std::int64_t row = 0; row < m; ++row)
        for (std::int64_t j = 0; j < p.dv; ++j) {
          const std::size_t at = static_cast<std::size_t>(row * p.dv + j);
          const float found = float_of_bf16(p.o[at]);
          if (j % 5 == 0 && static_cast<std::size_t>(j / 5) < std::size(bad) && row >= bad[j / 5].first)
            wrong += std::isnan(bad[j / 5].second) ? !std::isnan(found) : found != bad[j / 5].second;
          else
            wrong += p.o[at] != finite.o[at];
        }
      CHECK(wrong == 0);
    }
  }
}

TEST_CASE("every path is within the bounds of the float64 reference, and stays inside its buffers") {
  const unsigned first_seed = std::getenv("KILN_TEST_SEED")
                                  ? static_cast<unsigned>(std::atoi(std::getenv("KILN_TEST_SEED")))
                                  : std::random_device()();
  for (const IsaPath isa : paths_here()) {
    const std::unique_ptr<Engine> alone = engine_for(isa, 1), three = engine_for(isa, 3);
    INFO("path ", std::string(kiln::name_of(isa)));
    for (const Case& c : fixed_cases())
      check_case(*alone, c);
    for (int i = 0; i < samples(); ++i)
      check_case(i % 3 == 0 ? *three : *alone, random_case(first_seed + static_cast<unsigned>(i)));
  }
}
