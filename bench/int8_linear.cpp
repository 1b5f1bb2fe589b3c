/// bench_int8_linear: Kiln's int8_linear (bf16 in and out) against the machine's limits, against its own int8_mm, and
/// against a bf16 linear layer by oneDNN, interleaved in one run on one core.
///
///   bench_int8_linear [--only GROUP,…] [--json FILE] [--smoke]
///
/// Limits are measured beside each figure: plain reads of cold weights (24 copies in turn) for one row, a register-only
/// loop of the path's own multiply-add for many. Figures are medians over rounds of the ratio within a round. --smoke
/// takes a second and checks results only. Exit code: 0 all figures reached, 1 one fell short or failed, 2 usage.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <string>
#include <vector>

#include <fmt/format.h>

#include "api/kiln.h"
#include "bench/calibration.h"
#include "bench/host.h"
#include "bench/machine.h"
#include "bench/measure.h"
#include "bench/onednn.h"
#include "bench/options.h"
#include "bench/report.h"
#include "jit/bf16.h"

namespace kiln::bench {
namespace {

/// One layer on every side: the peer's bf16 weights are the dequantised ones.
struct Layer {
  std::int64_t m, n, k;
  HugeBuffer x, w, w_bf16, y, y_peer, a, c; ///< a and c are int8_mm's
  std::vector<float> ws;

  Layer(std::int64_t rows, std::int64_t columns, std::int64_t depth)
      : m(rows), n(columns), k(depth), x(size(2 * m * k)), w(size(n * k)), w_bf16(size(2 * n * k)), y(size(2 * m * n)),
        y_peer(size(2 * m * n)), a(size(m * k)), c(size(4 * m * n)), ws(size(n)) {
    fill_random(a, 1);
    fill_random(w, 2);
    for (std::int64_t i = 0; i < m * k; ++i)
      x.as<std::uint16_t>()[i] = bf16_of_float(static_cast<float>(a.as<std::int8_t>()[i]) / 64);
    for (std::int64_t j = 0; j < n; ++j) {
      ws[size(j)] = static_cast<float>(1 + j % 7) / 1024;
      for (std::int64_t p = 0; p < k; ++p)
        w_bf16.as<std::uint16_t>()[j * k + p] =
            bf16_of_float(static_cast<float>(w.as<std::int8_t>()[j * k + p]) * ws[size(j)]);
    }
  }
  static std::size_t size(std::int64_t count) { return static_cast<std::size_t>(count); }
  std::string text() const { return fmt::format("{}×{}×{}", m, n, k); }
  double operations() const { return 2.0 * static_cast<double>(m) * static_cast<double>(n) * static_cast<double>(k); }
  double weight_bytes() const { return static_cast<double>(n) * static_cast<double>(k); }

  /// ‖Kiln − oneDNN‖ / ‖oneDNN‖: what 8-bit activations cost on uniform values, some 0.5 %.
  double difference() const {
    double error = 0, norm = 0;
    for (std::int64_t i = 0; i < m * n; ++i) {
      const double peer = static_cast<double>(float_of_bf16(y_peer.as<std::uint16_t>()[i]));
      const double d = static_cast<double>(float_of_bf16(y.as<std::uint16_t>()[i])) - peer;
      error += d * d;
      norm += peer * peer;
    }
    return std::sqrt(error / norm);
  }
};

/// Kiln's side of a layer: the linear layer and the bare product, from the same packs.
class Kiln {
public:
  Kiln(kiln_engine* engine, const Layer& layer, int copies) {
    kiln_int8_linear_desc linear = KILN_INT8_LINEAR_DESC_INIT;
    kiln_int8_mm_desc mm = KILN_INT8_MM_DESC_INIT;
    linear.m = mm.m = layer.m;
    linear.n = mm.n = layer.n;
    linear.k = mm.k = layer.k;
    for (int copy = 0; copy < copies; ++copy) {
      kiln_pack* pack = nullptr;
      check(kiln_pack_create(engine, &linear.base, layer.w.as<void>(), layer.k, &pack), "kiln_pack_create");
      packs_.emplace_back(pack);
    }
    const auto get = [&](const kiln_desc& desc, KernelHandle& kernel) {
      kiln_kernel* got = nullptr;
      check(kiln_get(engine, &desc, &got), "kiln_get");
      kernel.reset(got);
    };
    get(linear.base, linear_);
    get(mm.base, mm_);
    kiln_kernel_info info = KILN_KERNEL_INFO_INIT;
    check(kiln_kernel_get_info(linear_.get(), &info), "kiln_kernel_get_info");
    isa = info.isa;
    linear_args_.m = mm_args_.m = layer.m;
    linear_args_.x = layer.x.as<void>();
    linear_args_.ldx = mm_args_.lda = layer.k;
    linear_args_.ws = layer.ws.data();
    linear_args_.y = layer.y.as<void>();
    linear_args_.ldy = mm_args_.ldc = layer.n;
    mm_args_.a = layer.a.as<std::int8_t>();
    mm_args_.c = layer.c.as<void>();
  }
  void run_linear(std::size_t copy = 0) {
    linear_args_.w_pack = packs_[copy].get();
    check(kiln_run(linear_.get(), &linear_args_.base), "kiln_run");
  }
  void run_mm(std::size_t copy = 0) {
    mm_args_.b_pack = packs_[copy].get();
    check(kiln_run(mm_.get(), &mm_args_.base), "kiln_run");
  }
  std::string isa;

private:
  std::vector<PackHandle> packs_;
  KernelHandle linear_, mm_;
  kiln_int8_linear_args linear_args_ = KILN_INT8_LINEAR_ARGS_INIT;
  kiln_int8_mm_args mm_args_ = KILN_INT8_MM_ARGS_INIT;
};

void check_results(const Layer& layer, Kiln& kiln, OneDnn& peer) {
  kiln.run_linear();
  peer.run();
  if (const double found = layer.difference(); !(found < 0.02))
    fail(fmt::format("{}: Kiln and oneDNN differ by {:.3f}", layer.text(), found));
}

double gbps(double bytes, const Series& series) {
  return bytes / series.median() / 1e9;
}

/// One token against weights that come from memory.
void cold(Report& report, kiln_engine* engine) {
  constexpr std::size_t copies = 24;
  const Layer layer(1, 4096, 4096);
  Kiln kiln(engine, layer, copies);
  OneDnn peer(layer.m, layer.n, layer.k, layer.x.as<std::uint16_t>(), layer.w_bf16.as<std::uint16_t>(),
              layer.y_peer.as<std::uint16_t>(), 1, copies);
  check_results(layer, kiln, peer);
  std::vector<HugeBuffer> buffers;
  for (std::size_t copy = 0; copy < copies; ++copy) {
    buffers.emplace_back(static_cast<std::size_t>(layer.weight_bytes()));
    fill_random(buffers.back(), copy + 1);
  }
  std::size_t turn = 0;
  const auto read = [&](const ReadLoop& loop) {
    return timed(std::string(loop.name), [&] {
      const HugeBuffer& buffer = buffers[turn++ % copies];
      loop.run(buffer.as<void>(), buffer.size());
    });
  };
  std::vector<Contender> readers;
  for (const ReadLoop& loop : read_loops())
    readers.push_back(read(loop));
  const std::vector<Series> by_reader = race(readers, {.rounds = 5, .sample_seconds = 1e-2});
  const auto fastest = std::min_element(by_reader.begin(), by_reader.end(),
                                        [](const Series& a, const Series& b) { return a.median() < b.median(); });
  const Contender contenders[] = {readers[static_cast<std::size_t>(fastest - by_reader.begin())],
                                  timed("int8_linear", [&] { kiln.run_linear(turn++ % copies); }),
                                  timed("int8_mm", [&] { kiln.run_mm(turn++ % copies); }),
                                  timed("oneDNN bf16", [&] { peer.run(static_cast<int>(turn++ % copies)); })};
  const std::vector<Series> s = race(contenders, {.rounds = 15, .sample_seconds = 1e-2});
  report.add(
      {"cold", fmt::format("{} of read bandwidth", layer.text()), time_ratio(s[0], s[1]), "", Figure::Bound::at_least,
       0.92,
       fmt::format("{} {:.1f} of {:.1f} GB/s ({}); best of each {:.3f}", kiln.isa, gbps(layer.weight_bytes(), s[1]),
                   gbps(layer.weight_bytes(), s[0]), s[0].name, s[0].best() / s[1].best())});
  report.add({"cold", fmt::format("{} × oneDNN bf16", layer.text()), time_ratio(s[3], s[1]), "",
              Figure::Bound::at_least, 1.8, fmt::format("{} {:.0f} µs", peer.implementation(), s[3].median() * 1e6)});
  report.add({"cold", fmt::format("{}: time over int8_mm", layer.text()), time_ratio(s[1], s[2]), "",
              Figure::Bound::none, 0, ""});
}

/// Prefills, bound by arithmetic.
void gemm(Report& report, kiln_engine* engine) {
  constexpr std::uint64_t kLoopSteps = 10000;
  for (const std::int64_t m : {64, 84, 512}) {
    const Layer layer(m, 4096, 4096);
    Kiln kiln(engine, layer, 1);
    OneDnn peer(layer.m, layer.n, layer.k, layer.x.as<std::uint16_t>(), layer.w_bf16.as<std::uint16_t>(),
                layer.y_peer.as<std::uint16_t>(), 1);
    check_results(layer, kiln, peer);
    const ComputeLoop* const loop = compute_loop(kiln.isa);
    if (loop == nullptr)
      fail(fmt::format("no calibration loop for the path {}", kiln.isa));
    const Contender contenders[] = {
        timed("limit", [&] { loop->run(kLoopSteps); }), timed("int8_linear", [&] { kiln.run_linear(); }),
        timed("int8_mm", [&] { kiln.run_mm(); }), timed("oneDNN bf16", [&] { peer.run(); })};
    const std::vector<Series> s = race(contenders, {.rounds = 15, .sample_seconds = 4e-3});
    const Series limit = scaled(s[0], layer.operations() / (loop->operations * static_cast<double>(kLoopSteps)));
    // Tiles wait for their loads (backends/x86/int8_mm_amx.cpp): the bound is int8_mm's there.
    const double reach = kiln.isa == "amx" ? 0.80 : 0.88;
    report.add({"gemm", fmt::format("{} of {} peak", layer.text(), kiln.isa), time_ratio(limit, s[1]), "",
                Figure::Bound::at_least, reach,
                fmt::format("{:.0f} of {:.0f} GOPS; best of each {:.3f}", layer.operations() / s[1].median() / 1e9,
                            layer.operations() / limit.median() / 1e9, limit.best() / s[1].best())});
    report.add({"gemm", fmt::format("{} × oneDNN bf16", layer.text()), time_ratio(s[3], s[1]), "", Figure::Bound::none,
                0, peer.implementation()});
    report.add({"gemm", fmt::format("{}: time over int8_mm", layer.text()), time_ratio(s[1], s[2]), "",
                Figure::Bound::none, 0, ""});
  }
}

int run(const Options& options) {
  const std::vector<int> cpus = allowed_cpus();
  pin_to(cpus[0]);
  const EngineHandle engine = make_engine(nullptr, 1);
  if (options.smoke()) {
    const Layer layer(5, 256, 512);
    Kiln kiln(engine.get(), layer, 1);
    OneDnn peer(layer.m, layer.n, layer.k, layer.x.as<std::uint16_t>(), layer.w_bf16.as<std::uint16_t>(),
                layer.y_peer.as<std::uint16_t>(), 1);
    check_results(layer, kiln, peer);
    kiln.run_mm();
    fmt::print("{} {}: as oneDNN's bf16 layer within {:.4f}\n", layer.text(), kiln.isa, layer.difference());
    return 0;
  }
  constexpr std::uint64_t links = 1000000;
  const Contender clock[] = {timed("clock", [] { run_clock_chain(links); })};
  Report report(kCyclesPerLink * static_cast<double>(links) / race(clock, {.rounds = 9})[0].median());
  if (options.wants("cold"))
    cold(report, engine.get());
  if (options.wants("gemm"))
    gemm(report, engine.get());
  unpin(cpus);
  const bool written = options.json().empty() || report.write_json(options.json());
  return written && report.all_met() ? 0 : 1;
}

} // namespace
} // namespace kiln::bench

int main(int argc, char** argv) {
  kiln::bench::Options options("bench_int8_linear", "int8_linear against the machine's limits, int8_mm and oneDNN.",
                               {"cold", "gemm"}, kiln::bench::Smoke::everything);
  options.parse(argc, argv);
  return kiln::bench::run(options);
}
