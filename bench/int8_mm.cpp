/// bench_int8_mm: Kiln's int8_mm against the machine's limits and against oneDNN, interleaved in one run.
///
///   bench_int8_mm [--only GROUP,…] [--json FILE] [--plot FILE.svg] [--smoke]
///
/// Groups: calibration, gemm, epilogue, cold, warm, scale, paths, walk. Limits are measured beside each figure: a
/// register-only loop of the path's own multiply-add, and plain reads: of the weights alone when they are cold, of as
/// many bytes as the call touches when they are warm. Both sides get packed weights on huge pages, equal threads and
/// nothing to set up; the peer is the faster of oneDNN's matmul and inner product. Figures are medians over rounds of
/// the ratio within a round. --smoke takes a second: it checks the calibrations against the clock, loosely, and one
/// shape against oneDNN's result. Exit code: 0 all figures reached, 1 one fell short or failed, 2 usage.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include <fmt/format.h>

#include "api/kiln.h"
#include "backends/table.h"
#include "bench/calibration.h"
#include "bench/host.h"
#include "bench/machine.h"
#include "bench/measure.h"
#include "bench/onednn.h"
#include "bench/options.h"
#include "bench/plot.h"
#include "bench/report.h"
#include "jit/engine.h"
#include "jit/ops/int8_mm_driver.h"

namespace kiln::bench {
namespace {

/// An engine without a cache on disk: what is measured here is kernels. `path` is forced when not null.
EngineHandle make_engine(int threads, const char* path = nullptr) {
  const char* set_by_user = std::getenv("KILN_FORCE");
  const std::optional<std::string> before = set_by_user ? std::optional<std::string>(set_by_user) : std::nullopt;
  if (path)
    setenv("KILN_FORCE", path, 1);
  EngineHandle engine = bench::make_engine(nullptr, threads);
  if (path && before)
    setenv("KILN_FORCE", before->c_str(), 1);
  else if (path)
    unsetenv("KILN_FORCE");
  return engine;
}

struct Shape {
  std::int64_t m, n, k;
  double operations() const { return 2.0 * static_cast<double>(m) * static_cast<double>(n) * static_cast<double>(k); }
  std::size_t weight_bytes() const { return static_cast<std::size_t>(n * k); }
  /// Everything that a call must touch, in pages: at 1024² it is what decides whether the call still fits an L2 cache
  /// of 1 MiB.
  std::size_t touched_bytes() const {
    return (weight_bytes() + static_cast<std::size_t>(m * k + 4 * m * n) + 4095) / 4096 * 4096;
  }
  std::string text() const { return fmt::format("{}×{}×{}", m, n, k); }
};

kiln_int8_mm_desc desc_of(const Shape& shape) {
  kiln_int8_mm_desc desc = KILN_INT8_MM_DESC_INIT;
  desc.m = shape.m;
  desc.n = shape.n;
  desc.k = shape.k;
  return desc;
}

struct Tensors {
  Shape shape;
  HugeBuffer a, b, c, peer_c;
  explicit Tensors(const Shape& s)
      : shape(s), a(static_cast<std::size_t>(s.m * s.k)), b(s.weight_bytes()),
        c(static_cast<std::size_t>(4 * s.m * s.n)), peer_c(static_cast<std::size_t>(4 * s.m * s.n)) {
    fill_random(a, 1);
    fill_random(b, 2);
  }
};

/// The same weights packed several times over. Copies matter: cold runs rotate over them, and in caches that are
/// indexed by physical address how well one copy fits is luck.
using Packs = std::vector<PackHandle>;

Packs make_packs(kiln_engine* engine, const Tensors& t, int copies) {
  Packs packs;
  const kiln_int8_mm_desc desc = desc_of(t.shape);
  for (int copy = 0; copy < copies; ++copy) {
    kiln_pack* pack = nullptr;
    check(kiln_pack_create(engine, &desc.base, t.b.as<std::int8_t>(), t.shape.k, &pack), "kiln_pack_create");
    packs.emplace_back(pack);
  }
  return packs;
}

/// Kiln on one shape.
class KilnMm {
public:
  KilnMm(kiln_engine* engine, const Tensors& t, const Packs& packs) : KilnMm(engine, t, packs, t.shape.m) {}
  /// The first `m` rows only.
  KilnMm(kiln_engine* engine, const Tensors& t, const Packs& packs, std::int64_t m)
      : KilnMm(engine, t, packs, m, [](kiln_int8_mm_desc&) {}) {}
  /// With an epilogue, whose values must outlive it.
  template <class Change, class Values>
  KilnMm(kiln_engine* engine, const Tensors& t, const Packs& packs, Change change, Values values)
      : KilnMm(engine, t, packs, t.shape.m, change) {
    values(args_);
  }

private:
  template <class Change>
  KilnMm(kiln_engine* engine, const Tensors& t, const Packs& packs, std::int64_t m, Change change) : packs_(packs) {
    kiln_int8_mm_desc desc = desc_of({m, t.shape.n, t.shape.k});
    change(desc);
    kiln_kernel* kernel = nullptr;
    check(kiln_get(engine, &desc.base, &kernel), "kiln_get");
    kernel_.reset(kernel);
    kiln_kernel_info info = KILN_KERNEL_INFO_INIT;
    check(kiln_kernel_get_info(kernel, &info), "kiln_kernel_get_info");
    isa_ = info.isa;
    args_.m = m;
    args_.a = t.a.as<std::int8_t>();
    args_.lda = t.shape.k;
    args_.c = t.c.as<std::int32_t>();
    args_.ldc = t.shape.n;
  }

public:
  void run(std::size_t copy = 0) {
    args_.b_pack = packs_[copy].get();
    if (kiln_run(kernel_.get(), &args_.base) != KILN_OK)
      fail(fmt::format("kiln_run: {}", kiln_last_error()));
  }
  const std::string& isa() const { return isa_; }

private:
  const Packs& packs_;
  KernelHandle kernel_;
  std::string isa_;
  kiln_int8_mm_args args_ = KILN_INT8_MM_ARGS_INIT;
};

void check_equal(const Tensors& t, const std::string& who) {
  if (std::memcmp(t.c.as<void>(), t.peer_c.as<void>(), t.c.size()) != 0)
    fail(fmt::format("{}: {} and oneDNN differ in their results", t.shape.text(), who));
}

constexpr std::uint64_t kLoopSteps = 10000; ///< of a compute loop: some 0.1 ms

Contender compute_contender(const ComputeLoop& loop) {
  return timed(std::string(loop.isa), [&loop] { loop.run(kLoopSteps); });
}

/// Seconds that `operations` take at the loop's own rate, in each round.
Series compute_limit(const Series& measured, const ComputeLoop& loop, double operations) {
  return scaled(measured, operations / (loop.operations * static_cast<double>(kLoopSteps)));
}

/// Which read loop is the fastest here is for the machine to say.
const ReadLoop& fastest_reader(const std::function<Contender(const ReadLoop&)>& contender, const RaceOptions& options) {
  std::vector<Contender> contenders;
  for (const ReadLoop& loop : read_loops())
    contenders.push_back(contender(loop));
  const std::vector<Series> series = race(contenders, options);
  const auto best = std::min_element(series.begin(), series.end(),
                                     [](const Series& a, const Series& b) { return a.median() < b.median(); });
  return read_loops()[static_cast<std::size_t>(best - series.begin())];
}

const ComputeLoop& loop_of(const std::string& isa) {
  const ComputeLoop* loop = compute_loop(isa);
  if (!loop)
    fail(fmt::format("no calibration loop for the path {}", isa));
  return *loop;
}

double gops(double operations, const Series& series) {
  return operations / series.median() / 1e9;
}
double gbps(double bytes, const Series& series) {
  return bytes / series.median() / 1e9;
}

struct Bench {
  Report& report;
  std::vector<PlotPoint>& plot;
  std::vector<int> cpus;

  void ratio(const std::string& group, const std::string& what, double measured, double reach, std::string detail) {
    report.add({group, what, measured, "", Figure::Bound::at_least, reach, std::move(detail)});
  }
};

/// The loops' own claims: instructions per cycle times the clock.
void calibration(Bench& bench) {
  constexpr std::uint64_t links = 200000;
  std::vector<Contender> contenders = {timed("clock", [] { run_clock_chain(links); })};
  for (const ComputeLoop& loop : compute_loops())
    contenders.push_back(compute_contender(loop));
  const std::vector<Series> series = race(contenders, {.rounds = 40, .sample_seconds = 1e-3});
  const double chain_cycles = kCyclesPerLink * static_cast<double>(links);
  for (std::size_t i = 0; i < compute_loops().size(); ++i) {
    const ComputeLoop& loop = compute_loops()[i];
    const Series& seconds = series[i + 1];
    const double operations = loop.operations * static_cast<double>(kLoopSteps);
    const double per_cycle = operations / chain_cycles * time_ratio(series[0], seconds);
    // Random tiles make the core draw so much power that its clock falls while they run: no bound there.
    const bool bound = loop.operations_per_cycle > 0 && loop.isa != "amx";
    const double promised = loop.operations_per_cycle;
    bench.report.add(
        {"calibration", fmt::format("{}: of {:g} operations a cycle", loop.instruction, promised),
         promised > 0 ? per_cycle / promised : per_cycle, "", bound ? Figure::Bound::at_least : Figure::Bound::none,
         0.95,
         fmt::format("{:.0f} GOPS at {:.2f} GHz", gops(operations, seconds), chain_cycles / series[0].median() / 1e9)});
  }
  for (const std::size_t mib : {1, 16}) {
    const HugeBuffer buffer(mib << 20);
    fill_random(buffer, 1);
    const auto contender = [&](const ReadLoop& loop) {
      return timed(std::string(loop.name), [&] { loop.run(buffer.as<void>(), buffer.size()); });
    };
    const ReadLoop& loop = fastest_reader(contender, {.rounds = 9});
    const Contender only[] = {contender(loop)};
    bench.report.add({"calibration", fmt::format("read {} MiB again and again", mib),
                      gbps(static_cast<double>(buffer.size()), race(only, {.rounds = 15})[0]), "GB/s",
                      Figure::Bound::none, 0, std::string(loop.name)});
  }
}

/// Both of oneDNN's primitives on the same tensors.
struct Peers {
  OneDnn matmul, inner_product;
  Peers(const Tensors& t, int threads, int copies = 1)
      : matmul(OneDnn::Primitive::matmul, t.shape.m, t.shape.n, t.shape.k, t.a.as<std::int8_t>(), t.b.as<std::int8_t>(),
               t.peer_c.as<std::int32_t>(), threads, copies),
        inner_product(OneDnn::Primitive::inner_product, t.shape.m, t.shape.n, t.shape.k, t.a.as<std::int8_t>(),
                      t.b.as<std::int8_t>(), t.peer_c.as<std::int32_t>(), threads, copies) {}
};

/// What the rows about one shape on one core have in common.
struct RaceResult {
  Series compute, read, kiln, matmul, inner_product;
  const Series& peer() const { return matmul.median() <= inner_product.median() ? matmul : inner_product; }
};

RaceResult race_on_one_core(const Tensors& t, KilnMm& kiln, const std::vector<HugeBuffer>& read_buffers,
                            const ReadLoop& reader, const RaceOptions& options) {
  Peers peers(t, 1, static_cast<int>(read_buffers.size()));
  kiln.run();
  peers.matmul.run();
  check_equal(t, kiln.isa());
  std::size_t copy = 0;
  RaceOptions with_copies = options;
  with_copies.on_round = [&](int round) { copy = static_cast<std::size_t>(round) % read_buffers.size(); };
  const Contender contenders[] = {
      compute_contender(loop_of(kiln.isa())),
      timed("read", [&] { reader.run(read_buffers[copy].as<void>(), t.shape.touched_bytes()); }),
      timed("Kiln", [&] { kiln.run(copy); }), timed("oneDNN matmul", [&] { peers.matmul.run(static_cast<int>(copy)); }),
      timed("oneDNN inner product", [&] { peers.inner_product.run(static_cast<int>(copy)); })};
  std::vector<Series> series = race(contenders, with_copies);
  return {series[0], series[1], series[2], series[3], series[4]};
}

std::vector<HugeBuffer> make_read_buffers(std::size_t bytes, int copies) {
  std::vector<HugeBuffer> buffers;
  for (int copy = 0; copy < copies; ++copy) {
    buffers.emplace_back(bytes);
    fill_random(buffers.back(), static_cast<std::uint64_t>(copy) + 1);
  }
  return buffers;
}

/// Large products, bound by arithmetic.
void gemm(Bench& bench) {
  pin_to(bench.cpus[0]);
  const EngineHandle engine = make_engine(1);
  for (const Shape& shape : {Shape{64, 4096, 4096}, {84, 4096, 4096}, {512, 512, 512}, {1024, 1024, 1024}}) {
    const Tensors t(shape);
    const Packs packs = make_packs(engine.get(), t, 1);
    KilnMm kiln(engine.get(), t, packs);
    const RaceResult r = race_on_one_core(t, kiln, make_read_buffers(shape.touched_bytes(), 1), read_loops()[0],
                                          {.rounds = 25, .sample_seconds = 4e-3});
    const Series limit = compute_limit(r.compute, loop_of(kiln.isa()), shape.operations());
    const double reach = kiln.isa() == "amx" ? 0.80 : 0.93;
    bench.ratio("gemm", fmt::format("{} of {} peak, 1 core", shape.text(), kiln.isa()), time_ratio(limit, r.kiln),
                reach,
                fmt::format("{:.0f} of {:.0f} GOPS; best of each {:.3f}", gops(shape.operations(), r.kiln),
                            gops(shape.operations(), limit), limit.best() / r.kiln.best()));
    bench.ratio("gemm", fmt::format("{} × oneDNN", shape.text()), time_ratio(r.peer(), r.kiln), 1.0,
                fmt::format("{} {:.0f} GOPS; best of each {:.3f}", r.peer().name, gops(shape.operations(), r.peer()),
                            r.peer().best() / r.kiln.best()));
    bench.plot.push_back({"gemm", shape.text(), time_ratio(limit, r.kiln), time_ratio(limit, r.peer()), reach});
  }
  unpin(bench.cpus);
}

/// What the epilogue costs over the plain product, and the same by oneDNN.
void epilogue(Bench& bench) {
  pin_to(bench.cpus[0]);
  const EngineHandle engine = make_engine(1);
  struct Bounds {
    Shape shape;
    double q_scale, leaky; ///< seconds over those of the plain product, at most; 0: no bound
  };
  for (const Bounds& bounds :
       {Bounds{{64, 4096, 4096}, 1.05, 1.08}, {{512, 512, 512}, 1.15, 1.28}, {{1024, 1024, 1024}, 0, 0}}) {
    const Shape& shape = bounds.shape;
    const Tensors t(shape);
    const Packs packs = make_packs(engine.get(), t, 1);
    // Half of the results within s8. A dyadic multiplier, so that oneDNN's float has the same value.
    const int sum_bits = 12 + static_cast<int>(std::log2(static_cast<double>(shape.k)) / 2);
    const std::size_t n = static_cast<std::size_t>(shape.n);
    const std::vector<std::int32_t> mult(n, 1 << 30), shift(n, sum_bits - 8);
    const std::vector<float> scale(n, std::ldexp(1.0f, -1 - (sum_bits - 8)));
    constexpr std::int32_t a_zp = 3, c_zp = -6; // even: oneDNN rounds when it has added it
    const auto change = [&](kiln_rescale rescale, kiln_act act) {
      return [=](kiln_int8_mm_desc& desc) {
        desc.c_dtype = KILN_S8;
        desc.rescale = rescale;
        desc.rounding = KILN_ROUND_EVEN;
        desc.a_zp = KILN_ONE;
        desc.c_zp = KILN_ONE;
        desc.act = act;
      };
    };
    const auto values = [&](kiln_int8_mm_args& args) {
      args.mult = mult.data();
      args.shift = shift.data();
      args.scale = scale.data();
      args.a_zp = &a_zp;
      args.c_zp = c_zp;
      args.slope_mult = 1 << 30;
      args.slope_shift = 2;
    };
    KilnMm plain(engine.get(), t, packs);
    KilnMm q_scale(engine.get(), t, packs, change(KILN_RESCALE_Q_SCALE, KILN_ACT_NONE), values);
    KilnMm leaky(engine.get(), t, packs, change(KILN_RESCALE_Q_SCALE, KILN_ACT_LEAKY_RELU), values);
    KilnMm scaled(engine.get(), t, packs, change(KILN_RESCALE_SCALE, KILN_ACT_NONE), values);
    const OneDnnEpilogue by_peer{scale, a_zp, c_zp};
    OneDnn peer(OneDnn::Primitive::matmul, shape.m, shape.n, shape.k, t.a.as<std::int8_t>(), t.b.as<std::int8_t>(),
                t.peer_c.as<void>(), 1, 1, &by_peer);
    peer.run();
    const auto check_bytes = [&](KilnMm& kiln, const char* what) {
      kiln.run();
      if (std::memcmp(t.c.as<void>(), t.peer_c.as<void>(), n * static_cast<std::size_t>(shape.m)) != 0)
        fail(fmt::format("{}: {} and oneDNN differ in their results", shape.text(), what));
    };
    check_bytes(q_scale, "q_scale");
    check_bytes(scaled, "scale");
    const Contender contenders[] = {timed("plain", [&] { plain.run(); }), timed("q_scale", [&] { q_scale.run(); }),
                                    timed("q_scale, leaky relu", [&] { leaky.run(); }),
                                    timed("scale", [&] { scaled.run(); }), timed("oneDNN matmul", [&] { peer.run(); })};
    const std::vector<Series> s = race(contenders, {.rounds = 41, .sample_seconds = 4e-3});
    const auto cost = [&](const Series& with, double bound) {
      bench.report.add({"epilogue", fmt::format("{} {}: time over plain {}", shape.text(), with.name, plain.isa()),
                        time_ratio(with, s[0]), "", bound > 0 ? Figure::Bound::at_most : Figure::Bound::none, bound,
                        fmt::format("{:.0f} of {:.0f} GOPS; best of each {:.3f}", gops(shape.operations(), with),
                                    gops(shape.operations(), s[0]), with.best() / s[0].best())});
    };
    cost(s[1], bounds.q_scale);
    cost(s[2], bounds.leaky);
    cost(s[3], 0);
    for (const int kiln : {1, 3})
      bench.ratio("epilogue", fmt::format("{} s8 by {} × oneDNN", shape.text(), s[kiln].name),
                  time_ratio(s[4], s[kiln]), 1.0,
                  fmt::format("oneDNN matmul ({}) {:.0f} GOPS", peer.implementation(), gops(shape.operations(), s[4])));
  }
  unpin(bench.cpus);
}

/// One token against weights that come from memory.
void cold(Bench& bench) {
  constexpr std::size_t copies = 24;
  const Shape shape{1, 4096, 4096};
  const Tensors t(shape);
  const std::vector<HugeBuffer> buffers = make_read_buffers(shape.weight_bytes(), copies);
  for (const std::size_t threads : {std::size_t{1}, std::size_t{2}}) {
    if (bench.cpus.size() < threads)
      break;
    const EngineHandle engine = make_engine(static_cast<int>(threads));
    const Packs packs = make_packs(engine.get(), t, copies);
    KilnMm kiln(engine.get(), t, packs);
    Peers peers(t, static_cast<int>(threads), copies);
    Team team({bench.cpus.begin(), bench.cpus.begin() + static_cast<std::ptrdiff_t>(threads)});
    const std::size_t share = shape.weight_bytes() / threads;
    std::size_t turn = 0;
    const auto read = [&](const ReadLoop& loop) {
      return Contender{std::string(loop.name), [&](int calls) {
                         const std::size_t first = turn;
                         turn += static_cast<std::size_t>(calls);
                         return team.run([&, first](std::size_t member) {
                           for (std::size_t i = 0; i < static_cast<std::size_t>(calls); ++i)
                             loop.run(buffers[(first + i) % copies].as<char>() + member * share, share);
                         });
                       }};
    };
    const RaceOptions options{.rounds = 15, .sample_seconds = 1e-2, .settle_seconds = threads > 1 ? 1e-2 : 0};
    const ReadLoop& reader = fastest_reader(read, {.rounds = 5, .sample_seconds = 1e-2});
    if (threads == 1)
      pin_to(bench.cpus[0]);
    const Contender contenders[] = {
        read(reader), timed("Kiln", [&] { kiln.run(turn++ % copies); }),
        timed("oneDNN matmul", [&] { peers.matmul.run(static_cast<int>(turn++ % copies)); }),
        timed("oneDNN inner product", [&] { peers.inner_product.run(static_cast<int>(turn++ % copies)); })};
    const std::vector<Series> series = race(contenders, options);
    unpin(bench.cpus);
    const Series& peer = series[2].median() <= series[3].median() ? series[2] : series[3];
    const double bytes = static_cast<double>(shape.weight_bytes());
    bench.ratio("cold", fmt::format("{} of read bandwidth, {} core{}", shape.text(), threads, threads > 1 ? "s" : ""),
                time_ratio(series[0], series[1]), 0.95,
                fmt::format("{:.1f} of {:.1f} GB/s ({}), {} {:.1f}; best of each {:.3f}", gbps(bytes, series[1]),
                            gbps(bytes, series[0]), reader.name, peer.name, gbps(bytes, peer),
                            series[0].best() / series[1].best()));
    bench.plot.push_back({fmt::format("cold, {} core{}", threads, threads > 1 ? "s" : ""), shape.text(),
                          time_ratio(series[0], series[1]), time_ratio(series[0], peer), 0.95});
  }
}

/// Few rows against weights that stay in L2 or L3.
void warm(Bench& bench) {
  pin_to(bench.cpus[0]);
  const EngineHandle engine = make_engine(1);
  for (const std::int64_t size : {1024, 4096}) {
    const int copies = size == 1024 ? 8 : 3;
    const std::vector<HugeBuffer> buffers = make_read_buffers(Shape{32, size, size}.touched_bytes(), copies);
    std::size_t copy = 0;
    const ReadLoop& reader = fastest_reader(
        [&](const ReadLoop& loop) {
          return timed(std::string(loop.name), [&] {
            loop.run(buffers[copy].as<void>(), Shape{1, size, size}.touched_bytes());
          });
        },
        {.rounds = 9, .on_round = [&](int round) { copy = static_cast<std::size_t>(round) % buffers.size(); }});
    const Tensors weights({1, size, size});
    const Packs packs = make_packs(engine.get(), weights, copies);
    for (const std::int64_t m : {1, 2, 3, 4, 8, 16, 17, 32}) {
      const Shape shape{m, size, size};
      const Tensors t(shape);
      KilnMm kiln(engine.get(), t, packs);
      const RaceResult r = race_on_one_core(t, kiln, buffers, reader, {.rounds = 24, .sample_seconds = 1e-3});
      const Series compute = compute_limit(r.compute, loop_of(kiln.isa()), shape.operations());
      const Series limit = slower("limit", compute, r.read);
      const bool by_reading = r.read.median() > compute.median();
      bench.ratio("warm", fmt::format("{} of {}", shape.text(), by_reading ? "read bandwidth" : kiln.isa() + " peak"),
                  time_ratio(limit, r.kiln), 0.88,
                  fmt::format("{:.0f} of {:.0f} GOPS, read {:.0f} GB/s; best of each {:.3f}",
                              gops(shape.operations(), r.kiln), gops(shape.operations(), limit),
                              gbps(static_cast<double>(shape.touched_bytes()), r.read), limit.best() / r.kiln.best()));
      bench.ratio("warm", fmt::format("{} × oneDNN", shape.text()), time_ratio(r.peer(), r.kiln), 1.0,
                  fmt::format("{} {:.0f} GOPS; best of each {:.3f}", r.peer().name, gops(shape.operations(), r.peer()),
                              r.peer().best() / r.kiln.best()));
      if (m == 1 && size == 1024)
        bench.ratio("warm", fmt::format("{} × oneDNN's matmul", shape.text()), time_ratio(r.matmul, r.kiln), 1.2,
                    fmt::format("{:.0f} GOPS; best of each {:.3f}", gops(shape.operations(), r.matmul),
                                r.matmul.best() / r.kiln.best()));
      bench.plot.push_back({"warm", shape.text(), time_ratio(limit, r.kiln), time_ratio(limit, r.peer()), 0.88});
    }
  }
  unpin(bench.cpus);
}

/// Two cores against one, beside the calibration loop's own two against one.
void scale(Bench& bench) {
  if (bench.cpus.size() < 2)
    return;
  const Shape shape{1024, 1024, 1024};
  const Tensors t(shape);
  const EngineHandle one_engine = make_engine(1), two_engine = make_engine(2);
  const Packs packs = make_packs(one_engine.get(), t, 1);
  KilnMm one(one_engine.get(), t, packs), two(two_engine.get(), t, packs);
  Peers peers(t, 2);
  const ComputeLoop& loop = loop_of(one.isa());
  Team team({bench.cpus[0], bench.cpus[1]});
  const Contender contenders[] = {compute_contender(loop),
                                  {"2 cores",
                                   [&](int calls) {
                                     return team.run([&](std::size_t) {
                                       for (int i = 0; i < calls; ++i)
                                         loop.run(kLoopSteps);
                                     });
                                   }},
                                  timed("Kiln", [&] { one.run(); }),
                                  timed("Kiln, 2 cores", [&] { two.run(); }),
                                  timed("oneDNN matmul", [&] { peers.matmul.run(); }),
                                  timed("oneDNN inner product", [&] { peers.inner_product.run(); })};
  const std::vector<Series> s = race(contenders, {.rounds = 25, .sample_seconds = 6e-3, .settle_seconds = 1e-2});
  std::vector<double> fractions;
  for (std::size_t i = 0; i < s[0].seconds.size(); ++i)
    fractions.push_back(s[2].seconds[i] / s[3].seconds[i] / (2 * s[0].seconds[i] / s[1].seconds[i]));
  const Series& peer = s[4].median() <= s[5].median() ? s[4] : s[5];
  bench.ratio("scale", fmt::format("{} on 2 cores, of the loop's scaling", shape.text()),
              Series::quantile(fractions, 0.5), 0.95,
              fmt::format("{:.2f} × one core, loop {:.2f} ×; {:.0f} GOPS, {} {:.0f}", time_ratio(s[2], s[3]),
                          2 * time_ratio(s[0], s[1]), gops(shape.operations(), s[3]), peer.name,
                          gops(shape.operations(), peer)));
}

/// `portable` as on a machine whose widest vectors are AVX2: only the inside of the library can be told of another
/// machine.
struct PortableOnAvx2 {
  std::unique_ptr<kiln::Engine> engine;
  std::optional<KernelRef> kernel;
  std::optional<int8_mm::Pack> pack;
  int8_mm::Args args;

  explicit PortableOnAvx2(const Tensors& t) {
    EngineOptions options;
    options.machine = detect_machine();
    options.machine.target.features = Features{Feature::avx2};
    options.config.cache = CacheMode::off;
    options.config.threads = 1;
    options.config.forced = {{.path = IsaPath::portable}};
    options.implementations = implementation_table();
    engine = take(kiln::Engine::create(std::move(options)));
    const KernelDesc desc = int8_mm::make_desc(t.shape.m, t.shape.n, t.shape.k);
    kernel = take(engine->get(desc));
    const int8_mm::PackLayout layout = take(int8_mm::PackLayout::parse(take(engine->pack_layout(desc))));
    pack = take(int8_mm::Pack::make(layout, t.b.as<std::int8_t>(), t.shape.k, int8_mm::BLayout::nk, t.shape.n,
                                    t.shape.k, engine->runtime().parallel));
    args = {.m = t.shape.m,
            .a = t.a.as<std::int8_t>(),
            .lda = t.shape.k,
            .pack = &*pack,
            .c = t.c.as<std::int32_t>(),
            .ldc = t.shape.n};
  }

  void run() {
    if (const Status status = int8_mm::run(**kernel, args); !status)
      fail(fmt::format("portable on AVX2 features: {}", status.message()));
  }

  template <class T> static T take(Result<T> result) {
    if (!result)
      fail(fmt::format("portable on AVX2 features: {}", result.status().message()));
    return std::move(*result);
  }
};

/// Each path forced, against the limit of its own instructions.
void paths(Bench& bench) {
  pin_to(bench.cpus[0]);
  const Shape shape{1024, 1024, 1024};
  const Tensors t(shape);
  Peers(t, 1).matmul.run();
  const RaceOptions options{.rounds = 15, .sample_seconds = 4e-3};
  for (const ComputeLoop& loop : compute_loops()) {
    const std::string path(loop.isa);
    const EngineHandle engine = make_engine(1, path.c_str());
    const Packs packs = make_packs(engine.get(), t, 1);
    KilnMm kiln(engine.get(), t, packs);
    if (kiln.isa() != path)
      fail(fmt::format("KILN_FORCE={} gave the path {}", path, kiln.isa()));
    kiln.run();
    check_equal(t, path);
    const Contender contenders[] = {compute_contender(loop), timed("Kiln", [&] { kiln.run(); })};
    const std::vector<Series> s = race(contenders, options);
    const Series limit = compute_limit(s[0], loop, shape.operations());
    const double reach = path == "amx" ? 0.80 : path == "avx512vnni" ? 0.93 : 0.85;
    bench.ratio("paths", fmt::format("{}: {} of its peak", path, shape.text()), time_ratio(limit, s[1]), reach,
                fmt::format("{:.0f} of {:.0f} GOPS; best of each {:.3f}", gops(shape.operations(), s[1]),
                            gops(shape.operations(), limit), limit.best() / s[1].best()));
    if (path == "amx") // torch 2.11 with oneDNN 3 on the Xeon of the project's notes: 1.13 TOPS
      bench.report.add({"paths", fmt::format("amx: {}", shape.text()), gops(shape.operations(), s[1]), "GOPS",
                        Figure::Bound::at_least, 2.5 * 1130, ""});
  }
  if (compute_loop("avx2")) {
    const EngineHandle avx2_engine = make_engine(1, "avx2"), portable_engine = make_engine(1, "portable");
    const Packs avx2_packs = make_packs(avx2_engine.get(), t, 1),
                portable_packs = make_packs(portable_engine.get(), t, 1);
    KilnMm avx2(avx2_engine.get(), t, avx2_packs), portable(portable_engine.get(), t, portable_packs);
    PortableOnAvx2 narrow(t);
    narrow.run();
    check_equal(t, "portable on AVX2 features");
    portable.run();
    check_equal(t, "portable");
    const Contender contenders[] = {timed("avx2", [&] { avx2.run(); }),
                                    timed("portable on AVX2 features", [&] { narrow.run(); }),
                                    timed("portable", [&] { portable.run(); })};
    const std::vector<Series> s = race(contenders, options);
    bench.ratio("paths", fmt::format("portable on AVX2 features: {} × avx2", shape.text()), time_ratio(s[0], s[1]), 0.6,
                fmt::format("{:.0f} of {:.0f} GOPS; on this machine's own features {:.0f}",
                            gops(shape.operations(), s[1]), gops(shape.operations(), s[0]),
                            gops(shape.operations(), s[2])));
  }
  unpin(bench.cpus);
}

/// A host whose M changes on every call: how many kernels it makes, and whether any M is slower than a larger one. That
/// no larger M is faster by a tenth is more than the claim (time(M) ≤ 1.1 × time at the next multiple of the tile), and
/// needs no tile sizes.
void walk(Bench& bench) {
  pin_to(bench.cpus[0]);
  constexpr std::int64_t most = 512;
  constexpr int rounds = 7;
  const EngineHandle engine = make_engine(1);
  const Tensors t({most, 1024, 1024});
  const Packs packs = make_packs(engine.get(), t, 1);
  std::vector<KilnMm> calls;
  for (std::int64_t m = 1; m <= most; ++m)
    calls.emplace_back(engine.get(), t, packs, m);
  std::vector<double> best(calls.size(), 1e9);
  for (int round = 0; round < rounds; ++round)
    for (std::size_t i = 0; i < calls.size(); ++i) {
      calls[i].run();
      const Contender contender = timed("Kiln", [&] { calls[i].run(); });
      const int repeats = static_cast<int>(5e-5 / contender.run(1)) + 1;
      best[i] = std::min(best[i], contender.run(repeats) / repeats);
    }
  double worst = 0, least_later = best.back();
  std::size_t worst_at = 0;
  for (std::size_t i = best.size() - 1; i-- > 0;) {
    if (best[i] / least_later > worst) {
      worst = best[i] / least_later;
      worst_at = i;
    }
    least_later = std::min(least_later, best[i]);
  }
  kiln_stats stats = KILN_STATS_INIT;
  check(kiln_get_stats(engine.get(), &stats), "kiln_get_stats");
  bench.report.add({"walk", "kernels for M = 1…512 at N = K = 1024", static_cast<double>(stats.compiled), "",
                    Figure::Bound::at_most, 8, ""});
  bench.report.add({"walk", "time(M) / least time of a larger M, worst M", worst, "", Figure::Bound::at_most, 1.1,
                    fmt::format("at M = {}: {:.1f} µs", worst_at + 1, best[worst_at] * 1e6)});
  unpin(bench.cpus);
}

/// Whether the bench itself works here: loose bounds, since other work may run beside it.
int smoke(Bench& bench) {
  const ComputeLoop* loop = compute_loops().empty() ? nullptr : &compute_loops().back();
  if (!loop || read_loops().empty()) {
    fmt::print("no calibration loop runs on this CPU\n");
    return 0;
  }
  constexpr std::uint64_t links = 20000;
  const Contender contenders[] = {timed("clock", [] { run_clock_chain(links); }), compute_contender(*loop)};
  const std::vector<Series> s = race(contenders, {.rounds = 9, .sample_seconds = 5e-4});
  const double per_cycle = loop->operations * static_cast<double>(kLoopSteps) /
                           (kCyclesPerLink * static_cast<double>(links)) * s[0].best() / s[1].best();
  bench.report.add({"smoke", fmt::format("{}: operations a cycle", loop->instruction), per_cycle, "",
                    Figure::Bound::at_least, 0.5 * loop->operations_per_cycle, ""});
  bench.report.add({"smoke", fmt::format("{}: operations a cycle", loop->instruction), per_cycle, "",
                    Figure::Bound::at_most, loop->operations_per_cycle > 0 ? 1.2 * loop->operations_per_cycle : 1e9,
                    ""});
  const Tensors t({7, 64, 100});
  const EngineHandle engine = make_engine(1);
  const Packs packs = make_packs(engine.get(), t, 1);
  KilnMm(engine.get(), t, packs).run();
  Peers peers(t, 1);
  peers.matmul.run();
  check_equal(t, "Kiln");
  peers.inner_product.run();
  check_equal(t, "Kiln");
  return bench.report.all_met() ? 0 : 1;
}

struct Group {
  const char* name;
  void (*run)(Bench&);
};
constexpr Group kGroups[] = {{"calibration", calibration},
                             {"gemm", gemm},
                             {"epilogue", epilogue},
                             {"cold", cold},
                             {"warm", warm},
                             {"scale", scale},
                             {"paths", paths},
                             {"walk", walk}};

int run(const Options& options, const std::string& plot_file) {
  std::vector<PlotPoint> plot;
  constexpr std::uint64_t links = 1000000;
  const Contender clock[] = {timed("clock", [] { run_clock_chain(links); })};
  Report report(kCyclesPerLink * static_cast<double>(links) / race(clock, {.rounds = 9})[0].median());
  Bench bench{report, plot, allowed_cpus()};
  if (options.smoke())
    return smoke(bench);
  for (const Group& group : kGroups)
    if (options.wants(group.name))
      group.run(bench);
  bool written = options.json().empty() || report.write_json(options.json());
  if (!plot_file.empty())
    written =
        write_plot(plot_file, fmt::format("int8_mm, fraction of the machine's limit: {}", report.machine()), plot) &&
        written;
  return written && report.all_met() ? 0 : 1;
}

} // namespace
} // namespace kiln::bench

int main(int argc, char** argv) {
  using namespace kiln::bench;
  std::vector<std::string> groups;
  for (const Group& group : kGroups)
    groups.emplace_back(group.name);
  Options options("bench_int8_mm", "int8_mm against the machine's limits and oneDNN.", groups, Smoke::everything);
  std::string plot;
  options.add("--plot", plot, "FILE.svg", "also draw the figures there");
  options.parse(argc, argv);
  return run(options, plot);
}
