/// bench_attention: attention on one machine: prefill against the peak of its instruction, decode against what the
/// machine reads, few queries against the line between one and many, and compile times.
///
///   bench_attention [--only GROUP,…] [--json FILE] [--smoke] [--limits]
///
/// Groups: compile, prefill, decode (one thread), few, decode2 (two threads). --limits prints the limits of this moment
/// alone, for bench/attention_torch.py: a line for each instruction, its path and GFLOP/s on one thread.
/// Exit code: 0 all figures reached, 1 one fell short or failed, 2 usage.
#include <algorithm>
#include <cstring>
#include <optional>
#include <random>

#include <fmt/format.h>

#include "backends/table.h"
#include "bench/calibration.h"
#include "bench/host.h"
#include "bench/machine.h"
#include "bench/measure.h"
#include "bench/options.h"
#include "bench/report.h"
#include "jit/bf16.h"
#include "jit/engine.h"
#include "jit/ops/attention_driver.h"

using namespace kiln;
using namespace kiln::bench;
using attention::Causal;
using attention::Strides;

namespace {

std::unique_ptr<Engine> engine_for(std::optional<IsaPath> isa, int threads, bool avx2_only = false) {
  EngineOptions options;
  options.config.cache = CacheMode::off;
  options.config.threads = threads;
  if (isa)
    options.config.forced.push_back({OpId::attention, *isa});
  options.machine = detect_machine();
  if (avx2_only)
    options.machine.target.features = Features{Feature::avx2, Feature::fma};
  options.implementations = implementation_table();
  return take(Engine::create(std::move(options)));
}

struct Shape {
  std::int64_t b, hq, hkv, m, n, d;
  Causal causal = Causal::none;

  KernelDesc desc() const { return attention::make_desc(b, hq, hkv, m, n, d, d, causal); }
  double operations() const { return attention::op().operations(desc()); }
  double kv_bytes() const { return 4.0 * static_cast<double>(b * hkv * n * d); }
};

/// One problem with random inputs, and its kernel.
class Problem {
public:
  Problem(Engine& engine, const Shape& shape)
      : shape_(shape), q_(random_bf16(shape.b * shape.hq * shape.m * shape.d)),
        k_(random_bf16(shape.b * shape.hkv * shape.n * shape.d)),
        v_(random_bf16(shape.b * shape.hkv * shape.n * shape.d)),
        o_(static_cast<std::size_t>(shape.b * shape.hq * shape.m * shape.d) * 2) {
    Result<KernelRef> kernel = engine.get(shape.desc());
    if (!kernel)
      fail(kernel.status().message());
    kernel_.emplace(std::move(*kernel));
    args_ = {.b = shape.b, .hq = shape.hq, .hkv = shape.hkv, .m = shape.m, .n = shape.n};
    args_.q = q_.as<std::uint16_t>();
    args_.k = k_.as<std::uint16_t>();
    args_.v = v_.as<std::uint16_t>();
    args_.o = o_.as<std::uint16_t>();
    args_.q_strides = args_.o_strides = Strides::contiguous(shape.hq, shape.m, shape.d);
    args_.k_strides = args_.v_strides = Strides::contiguous(shape.hkv, shape.n, shape.d);
  }
  void run() const {
    if (const Status status = attention::run(**kernel_, args_); !status)
      fail(status.message());
  }
  const Kernel& kernel() const { return **kernel_; }
  const Shape& shape() const { return shape_; }

private:
  static HugeBuffer random_bf16(std::int64_t count) {
    HugeBuffer buffer(static_cast<std::size_t>(count) * 2);
    std::mt19937 random(1);
    std::uniform_real_distribution<float> uniform(-1, 1);
    std::vector<std::uint16_t> noise(1 << 16);
    for (std::uint16_t& value : noise)
      value = bf16_of_float(uniform(random));
    for (std::int64_t i = 0; i < count; i += static_cast<std::int64_t>(noise.size()) - 7) // no two rows alike
      std::memcpy(buffer.as<std::uint16_t>() + i, noise.data(),
                  static_cast<std::size_t>(std::min<std::int64_t>(count - i, static_cast<std::int64_t>(noise.size()))) *
                      2);
    return buffer;
  }
  Shape shape_;
  HugeBuffer q_, k_, v_, o_;
  std::optional<KernelRef> kernel_;
  attention::Args args_;
};

struct Bench {
  Report report;
  bool smoke;
  RaceOptions options() const {
    return smoke ? RaceOptions{.rounds = 1, .sample_seconds = 1e-5} : RaceOptions{.rounds = 11, .sample_seconds = 4e-3};
  }
  std::int64_t size(std::int64_t full) const { return smoke ? std::max<std::int64_t>(full / 16, 1) : full; }
};

std::string_view name_of(Causal causal) {
  return causal == Causal::none ? "all keys" : causal == Causal::top_left ? "causal" : "causal, bottom right";
}

/// Shares of the instruction's peak. For AMX no more than what an Emerald Rapids Xeon gave, 0.24 to 0.26 of its peak on
/// random tiles: exponentials, rearranging and tile stores are not hidden behind its products.
struct PrefillReach {
  IsaPath isa;
  double all_keys, causal;
};
constexpr PrefillReach kPrefillReach[] = {
    {IsaPath::amx, 0.2, 0.15}, {IsaPath::avx512bf16, 0.65, 0.55}, {IsaPath::portable, 0.5, 0.45}};

void prefill(Bench& bench, Engine& engine, const ComputeLoop& loop, std::string_view path, double reach,
             double reach_causal) {
  constexpr std::uint64_t kSteps = 20000;
  for (const std::int64_t size : {512, 2048})
    for (const Causal causal : {Causal::none, Causal::top_left}) {
      const Problem problem(engine,
                            {1, bench.size(16), bench.size(16), bench.size(size), bench.size(size), 128, causal});
      const Contender contenders[] = {timed("peak", [&] { loop.run(kSteps); }), timed("Kiln", [&] { problem.run(); })};
      const std::vector<Series> s = race(contenders, bench.options());
      const Series limit = scaled(s[0], problem.shape().operations() / (loop.operations * static_cast<double>(kSteps)));
      bench.report.add(
          {"prefill", fmt::format("{}: 16 heads {}x{} D=128 {}, of peak", path, size, size, name_of(causal)),
           time_ratio(limit, s[1]), "", Figure::Bound::at_least, causal == Causal::none ? reach : reach_causal,
           fmt::format("{:.1f} of {:.1f} GFLOP/s, {}", problem.shape().operations() / s[1].median() / 1e9,
                       problem.shape().operations() / limit.median() / 1e9, loop.instruction)});
    }
}

/// One layer again and again finds part of its keys in the last cache; the layers of a model in turn find none.
void decode(Bench& bench, int threads) {
  const std::unique_ptr<Engine> engine = engine_for({}, threads);
  std::vector<int> cpus = allowed_cpus();
  cpus.resize(std::min(cpus.size(), static_cast<std::size_t>(threads)));
  Team team(cpus);
  for (const auto& [hq, hkv] : {std::pair<std::int64_t, std::int64_t>{32, 8}, {8, 8}})
    for (const int layers : {1, 8}) {
      std::vector<Problem> problems;
      for (int layer = 0; layer < layers; ++layer)
        problems.emplace_back(*engine, Shape{1, hq, hkv, 1, bench.size(8192), 128});
      const double all_bytes = problems[0].shape().kv_bytes() * layers;
      const std::size_t bytes =
          static_cast<std::size_t>(all_bytes) / 4096 / static_cast<std::size_t>(threads) * 4096; // of a thread
      const HugeBuffer memory(bytes * static_cast<std::size_t>(threads));
      fill_random(memory, 2);
      std::vector<Contender> contenders = {timed("Kiln", [&] {
        for (const Problem& problem : problems)
          problem.run();
      })};
      for (const ReadLoop& loop : read_loops())
        contenders.push_back({std::string(loop.name), [&, run = loop.run](int calls) {
                                double seconds = 0;
                                for (int i = 0; i < calls; ++i)
                                  seconds += team.run(
                                      [&](std::size_t member) { run(memory.as<char>() + member * bytes, bytes); });
                                return seconds;
                              }});
      const std::vector<Series> s = race(contenders, bench.options());
      std::size_t fastest = 1;
      for (std::size_t i = 2; i < s.size(); ++i)
        if (s[i].median() < s[fastest].median())
          fastest = i;
      bench.report.add({"decode",
                        fmt::format("{}/{} heads N=8192 D=128 on {}, {}, of what it reads", hq, hkv, threads,
                                    layers == 1 ? "one layer again" : fmt::format("{} layers in turn", layers)),
                        time_ratio(s[fastest], s[0]), "", Figure::Bound::at_least, 0.9,
                        fmt::format("{:.1f} of {:.1f} GB/s, {}", all_bytes / s[0].median() / 1e9,
                                    all_bytes / s[fastest].median() / 1e9, s[fastest].name)});
    }
}

/// Time at M queries over what lies on the line between 1 and 32.
void few_queries(Bench& bench, Engine& engine) {
  for (const auto& [hq, hkv] : {std::pair<std::int64_t, std::int64_t>{32, 8}, {8, 8}}) {
    std::vector<Problem> problems;
    std::vector<std::int64_t> sizes = {1, 32, 2, 3, 4, 5, 6, 7, 8, 9, 12, 13, 16, 17, 20, 24, 25, 28, 31};
    for (const std::int64_t m : sizes)
      problems.emplace_back(engine, Shape{1, hq, hkv, m, bench.size(4096), 128});
    std::vector<Contender> contenders;
    for (const Problem& problem : problems)
      contenders.push_back(timed("", [&problem] { problem.run(); }));
    const std::vector<Series> s = race(contenders, bench.options());
    double worst = 0;
    std::string detail;
    for (std::size_t i = 0; i < sizes.size(); ++i) {
      const double line = s[0].median() + (s[1].median() - s[0].median()) * static_cast<double>(sizes[i] - 1) / 31;
      if (i >= 2)
        worst = std::max(worst, s[i].median() / line);
      detail += fmt::format(" {}:{:.2f}", sizes[i], s[i].median() * 1e3);
    }
    bench.report.add({"few queries", fmt::format("{}/{} heads N=4096, M = 2…31 over the line from 1 to 32", hq, hkv),
                      worst, "", Figure::Bound::at_most, 1.0, "ms" + detail});
  }
}

void compile_times(Bench& bench) {
  bool first = true;
  for (const std::int64_t m : {512, 1})
    for (const std::int64_t d : {128, 64, 72}) {
      const std::unique_ptr<Engine> engine = engine_for({}, 1);
      const Problem problem(*engine, {1, 4, 1, m, 64, d});
      bench.report.add({"compile",
                        fmt::format("{} m={} d={}{}", name_of(problem.kernel().implementation().isa), m, d,
                                    first ? ", the first of the process" : ""),
                        static_cast<double>(problem.kernel().compile_us) / 1e3, "ms", Figure::Bound::at_most,
                        first ? 80.0 : 40.0, fmt::format("{} bytes", problem.kernel().text().size())});
      first = false;
    }
}

double clock_hz() {
  constexpr std::uint64_t kLinks = 3000000;
  const double begin = now();
  run_clock_chain(kLinks);
  return kCyclesPerLink * static_cast<double>(kLinks) / (now() - begin);
}

void print_limits() {
  constexpr std::uint64_t kSteps = 20000;
  constexpr int kSamples = 20; // the best of some tens of milliseconds
  for (const ComputeLoop& loop : float_compute_loops()) {
    double best = 0;
    for (int i = 0; i < kSamples; ++i) {
      const double begin = now();
      loop.run(kSteps);
      best = std::max(best, loop.operations * static_cast<double>(kSteps) / (now() - begin) / 1e9);
    }
    fmt::print("{} {:.1f}\n", loop.isa, best);
  }
}

} // namespace

int main(int argc, char** argv) {
  Options options("bench_attention", "attention against the machine's limits.",
                  {"compile", "prefill", "decode", "few", "decode2"});
  bool limits = false;
  options.add("--limits", limits, "print the peak of each instruction, in GFLOP/s, and nothing else");
  options.parse(argc, argv);
  if (float_compute_loops().empty()) {
    fmt::print("bench_attention: no calibration loop for this CPU\n");
    return 0;
  }
  if (limits) {
    print_limits();
    return 0;
  }
  Bench bench{Report(clock_hz()), options.smoke()};
  if (options.wants("compile"))
    compile_times(bench); // first: it shows the process's first
  const std::vector<int> cpus = allowed_cpus();
  pin_to(cpus[0]);
  if (options.wants("prefill"))
    for (const ComputeLoop& loop : float_compute_loops()) {
      const PrefillReach& reach = *std::find_if(std::begin(kPrefillReach), std::end(kPrefillReach),
                                                [&](const PrefillReach& r) { return name_of(r.isa) == loop.isa; });
      const std::unique_ptr<Engine> engine = engine_for(reach.isa, 1);
      prefill(bench, *engine, loop, loop.isa, reach.all_keys, reach.causal);
    }
  if (options.wants("decode"))
    decode(bench, 1);
  if (options.wants("few"))
    few_queries(bench, *engine_for({}, 1));
  unpin(cpus);
  if (options.wants("decode2") && cpus.size() > 1)
    decode(bench, 2);
  if (!options.json().empty() && !bench.report.write_json(options.json()))
    return 1;
  return options.smoke() || bench.report.all_met() ? 0 : 1;
}
