/// bench_latency: what Kiln costs a host beside the kernels themselves.
///
///   bench_latency [--only GROUP,…] [--rows N] [--on DIRECTORY] [--json FILE] [--smoke]
///
/// Groups: compile, memory, disk, scale, process, attention, threads. `attention`: the kernels of a model's attention,
/// made by LLVM, in processes that find them on disk. `disk` and `process` fill a cache with N rows (default 10000) of
/// kernels in a temporary directory (in /dev/shm where there is one), through kiln_warmup; `scale` fills two, of 1,000
/// and 100,000 rows, and reads them in turns. With --on the caches are copied to that directory's file system before
/// they are read. --smoke takes a second: few rows and shapes, figures printed but not judged. Exit code: 0 all figures
/// reached, 1 one fell short or failed, 2 usage.
#include <sys/types.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <memory>
#include <optional>
#include <random>
#include <string>
#include <string_view>
#include <thread>
#include <utility>
#include <vector>

#include <fmt/format.h>

#include "api/kiln.h"
#include "backends/table.h"
#include "bench/calibration.h"
#include "bench/host.h"
#include "bench/machine.h"
#include "bench/measure.h"
#include "bench/options.h"
#include "bench/report.h"
#include "jit/engine.h"
#include "jit/ops/int8_mm_driver.h"

namespace kiln::bench {
namespace {

kiln_int8_mm_desc make_desc(std::int64_t m, std::int64_t n, std::int64_t k) {
  kiln_int8_mm_desc desc = KILN_INT8_MM_DESC_INIT;
  desc.m = m;
  desc.n = n;
  desc.k = k;
  return desc;
}

KernelHandle get(kiln_engine* engine, const kiln_int8_mm_desc& desc) {
  kiln_kernel* kernel = nullptr;
  check(kiln_get(engine, &desc.base, &kernel), "kiln_get");
  return KernelHandle(kernel);
}

/// Distinct kernels of the sizes that models have, every class of m in turn.
std::vector<kiln_int8_mm_desc> model_shapes(std::size_t count) {
  std::vector<kiln_int8_mm_desc> descs;
  for (std::int64_t i = 0; descs.size() < count; ++i)
    for (const std::int64_t m : int8_mm::kMClasses)
      if (descs.size() < count)
        descs.push_back(make_desc(m, 256 + 16 * (i % 64), 256 + 8 * (i / 64)));
  return descs;
}

struct Bench {
  Report& report;
  std::size_t rows;
  std::size_t shapes;

  void at_most(const std::string& group, const std::string& what, double measured, const std::string& unit,
               double reach, std::string detail) {
    report.add({group, what, measured, unit, Figure::Bound::at_most, reach, std::move(detail)});
  }
};

std::string spread(const std::vector<double>& seconds) {
  return fmt::format("best {:.1f}, p90 {:.1f}, p99 {:.1f} µs over {}", Series::quantile(seconds, 0) * 1e6,
                     Series::quantile(seconds, 0.9) * 1e6, Series::quantile(seconds, 0.99) * 1e6, seconds.size());
}

/// A machine with every feature of the architecture; of Arm's vector lengths, those of today's cores whose code differs
/// from that of 128 bits.
Target machine_with_everything(Arch arch) {
  Target target{.arch = arch, .features = features_of(arch)};
  if (target.features.has(Feature::sve))
    target.sve_bits = 256;
  if (target.features.has(Feature::sme))
    target.sme_bits = 512;
  return target;
}

/// Emission by asmjit works on any host, so every path of x86 and Arm is timed wherever this runs.
void compile(Bench& bench) {
  for (const Implementation& row : implementation_table()) {
    if (row.generator != GeneratorId::asmjit)
      continue;
    const Target target = machine_with_everything(row.arch);
    std::vector<double> seconds;
    for (const kiln_int8_mm_desc& shape : model_shapes(bench.shapes)) {
      const KernelDesc desc = int8_mm::op().canonical(int8_mm::make_desc(shape.m, shape.n, shape.k));
      const double begin = now();
      const Result<CodeObject> code = row.compile(desc, target, row.pack_layout(desc, target));
      seconds.push_back(now() - begin);
      if (!code)
        fail(code.status().message());
    }
    bench.at_most("compile", fmt::format("{}, p50", name_of(row.isa)), Series::quantile(seconds, 0.5) * 1e6, "µs", 15,
                  spread(seconds));
  }
}

/// A hit in memory, and what kiln_run adds to the call of the kernel's own entry.
void memory(Bench& bench) {
  const EngineHandle engine = make_engine(nullptr);
  const kiln_int8_mm_desc desc = make_desc(1, 16, 16);
  const KernelHandle kernel = get(engine.get(), desc);

  constexpr int batch = 1000;
  std::vector<kiln_kernel*> kernels(batch);
  std::vector<double> gets, pairs;
  for (int i = 0; i < 500; ++i) {
    double begin = now();
    for (kiln_kernel*& out : kernels)
      kiln_get(engine.get(), &desc.base, &out);
    gets.push_back((now() - begin) / batch);
    for (kiln_kernel* k : kernels)
      kiln_kernel_release(k);
    begin = now();
    for (int j = 0; j < batch; ++j) {
      kiln_kernel* k = nullptr;
      kiln_get(engine.get(), &desc.base, &k);
      kiln_kernel_release(k);
    }
    pairs.push_back((now() - begin) / batch);
  }
  bench.at_most("memory", "kiln_get, hit in memory, p50", Series::quantile(gets, 0.5) * 1e9, "ns", 50,
                fmt::format("{:.1f} ns with its release", Series::quantile(pairs, 0.5) * 1e9));

  const HugeBuffer a(16), b(16 * 16), c(16 * 4);
  fill_random(a, 1);
  fill_random(b, 2);
  kiln_pack* packed = nullptr;
  check(kiln_pack_create(engine.get(), &desc.base, b.as<std::int8_t>(), 16, &packed), "kiln_pack_create");
  const PackHandle pack(packed);
  kiln_int8_mm_args args = KILN_INT8_MM_ARGS_INIT;
  args.m = 1;
  args.a = a.as<std::int8_t>();
  args.lda = 16;
  args.b_pack = pack.get();
  args.c = c.as<std::int32_t>();
  args.ldc = 16;
  check(kiln_run(kernel.get(), &args.base), "kiln_run");

  // The same kernel from the inside of the library.
  EngineOptions options;
  options.machine = detect_machine();
  options.config.cache = CacheMode::off;
  options.implementations = implementation_table();
  const std::unique_ptr<kiln::Engine> inner = take(kiln::Engine::create(std::move(options)));
  const KernelRef inner_kernel = take(inner->get(int8_mm::make_desc(1, 16, 16)));
  const auto& plan = *static_cast<const int8_mm::Plan*>(inner_kernel->plan());
  const int8_mm::Pack inner_pack = take(int8_mm::Pack::make(plan.layout, b.as<std::int8_t>(), 16, int8_mm::BLayout::nk,
                                                            16, 16, inner->runtime().parallel));
  const HugeBuffer workspace(static_cast<std::size_t>(plan.workspace_bytes(1)) + 64);
  const int8_mm::Call call = {.a = a.as<std::int8_t>(),
                              .lda = 16,
                              .b = inner_pack.panels(),
                              .b_sums = inner_pack.sums(),
                              .c = c.as<std::int32_t>(),
                              .ldc = 16,
                              .m = 1,
                              .n = 16,
                              .workspace = workspace.as<void>(),
                              .k = 16,
                              .plan = &plan};
  const auto entry = reinterpret_cast<int8_mm::Entry>(inner_kernel->entry());

  const Contender contenders[] = {timed("kiln_run", [&] { kiln_run(kernel.get(), &args.base); }),
                                  timed("entry", [&] { entry(&call); })};
  const std::vector<Series> s = race(contenders, {.rounds = 101, .sample_seconds = 5e-4});
  bench.at_most(
      "memory", "kiln_run beyond the kernel itself, p50", (s[0].median() - s[1].median()) * 1e9, "ns", 30,
      fmt::format("1×16×16: {:.1f} ns, of which the kernel {:.1f}", s[0].median() * 1e9, s[1].median() * 1e9));
}

/// A cache on disk with many rows, made once for all groups that want it.
class FilledCache {
public:
  /// `on`: where it lies when it is read; empty: where it was filled.
  FilledCache(std::size_t rows, const std::string& on) : descs_(model_shapes(rows)) {
    fill();
    if (on.empty())
      return;
    moved_.emplace(on);
    std::filesystem::copy(directory_.path, moved_->path, std::filesystem::copy_options::recursive);
    for (const auto& entry : std::filesystem::recursive_directory_iterator(moved_->path))
      std::filesystem::permissions(entry, std::filesystem::perms(entry.is_directory() ? 0700 : 0600));
  }
  /// For an engine that reads it: the authentication key's place is told by the environment.
  std::string use() const {
    setenv("XDG_DATA_HOME", (place() + "/data").c_str(), 1);
    return place() + "/cache";
  }
  const std::vector<kiln_int8_mm_desc>& descs() const { return descs_; }
  double fill_seconds() const { return seconds_; }

private:
  const std::string& place() const { return moved_ ? moved_->path : directory_.path; }
  void fill() {
    const EngineHandle engine = make_engine(use().c_str());
    std::vector<const kiln_desc*> list;
    for (const kiln_int8_mm_desc& desc : descs_)
      list.push_back(&desc.base);
    kiln_warmup_result result = KILN_WARMUP_RESULT_INIT;
    const double begin = now();
    check(kiln_warmup(engine.get(), list.data(), list.size(), nullptr, &result), "kiln_warmup");
    seconds_ = now() - begin;
    if (result.compiled != descs_.size())
      fail(fmt::format("warmup compiled {} kernels of {}", result.compiled, descs_.size()));
  }
  TemporaryDirectory directory_;
  std::optional<TemporaryDirectory> moved_;
  std::vector<kiln_int8_mm_desc> descs_;
  double seconds_ = 0;
};

void disk(Bench& bench, FilledCache& cache) {
  const EngineHandle engine = make_engine(cache.use().c_str());
  std::vector<kiln_int8_mm_desc> order = cache.descs();
  constexpr unsigned seed = 1;
  std::shuffle(order.begin(), order.end(), std::mt19937(seed));
  order.resize(std::min<std::size_t>(order.size(), 2000));
  std::vector<KernelHandle> held;
  std::vector<double> seconds;
  for (const kiln_int8_mm_desc& desc : order) {
    kiln_kernel* kernel = nullptr;
    const double begin = now();
    const kiln_status status = kiln_get(engine.get(), &desc.base, &kernel);
    seconds.push_back(now() - begin);
    check(status, "kiln_get");
    held.emplace_back(kernel);
  }
  kiln_stats stats = KILN_STATS_INIT;
  check(kiln_get_stats(engine.get(), &stats), "kiln_get_stats");
  if (stats.disk_hits != order.size())
    fail(fmt::format("{} of {} kernels came from disk", stats.disk_hits, order.size()));
  bench.at_most("disk", fmt::format("hit on disk, {} rows, p50", cache.descs().size()),
                Series::quantile(seconds, 0.5) * 1e6, "µs", 60,
                fmt::format("{}; filled at {:.2f} ms a row", spread(seconds),
                            cache.fill_seconds() * 1e3 / static_cast<double>(cache.descs().size())));
}

/// What a hit on disk costs among many rows against few: one from each in turn, so that both meet the same machine.
void scale(Bench& bench, std::size_t few, std::size_t many, const std::string& on) {
  const std::array<FilledCache, 2> caches = {FilledCache(few, on), FilledCache(many, on)};
  std::array<std::vector<double>, 2> seconds;
  std::uint64_t hits = 0;
  constexpr unsigned rounds = 3;
  for (unsigned round = 0; round < rounds; ++round) { // a kernel comes from disk once an engine
    std::array<EngineHandle, 2> engines;
    std::array<std::vector<kiln_int8_mm_desc>, 2> order;
    for (std::size_t i = 0; i < 2; ++i) {
      engines[i] = make_engine(caches[i].use().c_str());
      order[i] = caches[i].descs();
      std::shuffle(order[i].begin(), order[i].end(), std::mt19937(round));
      order[i].resize(few);
      get(engines[i].get(), order[i].back()); // the key file is read now
    }
    for (std::size_t k = 0; k + 1 < few; ++k)
      for (std::size_t i = 0; i < 2; ++i) {
        const double begin = now();
        const KernelHandle kernel = get(engines[i].get(), order[i][k]);
        seconds[i].push_back(now() - begin);
      }
    for (const EngineHandle& engine : engines) {
      kiln_stats stats = KILN_STATS_INIT;
      check(kiln_get_stats(engine.get(), &stats), "kiln_get_stats");
      hits += stats.disk_hits;
    }
  }
  if (hits != rounds * 2 * few)
    fail(fmt::format("{} of {} kernels came from disk", hits, rounds * 2 * few));
  const double p50[] = {Series::quantile(seconds[0], 0.5), Series::quantile(seconds[1], 0.5)};
  bench.at_most("scale", fmt::format("hit on disk, {} rows, p50", few), p50[0] * 1e6, "µs", 60, spread(seconds[0]));
  bench.at_most("scale", fmt::format("hit on disk, {} rows, p50", many), p50[1] * 1e6, "µs", 60, spread(seconds[1]));
  bench.at_most("scale", fmt::format("{} rows against {}, p50", many, few), p50[1] / p50[0], "", 1.5,
                fmt::format("filled at {:.2f} ms a row", caches[1].fill_seconds() * 1e3 / static_cast<double>(many)));
}

int llvm_mappings() {
  int found = 0;
  std::ifstream maps("/proc/self/maps");
  for (std::string line; std::getline(maps, line);)
    found += line.find("llvm") != std::string::npos || line.find("LLVM") != std::string::npos;
  return found;
}

/// In a fresh process: prints the nanoseconds from main's first line to the first kernel, where that came from, and
/// whether LLVM is mapped.
int child(double begin, const char* cache_dir) {
  const EngineHandle engine = make_engine(cache_dir);
  const KernelHandle kernel = get(engine.get(), model_shapes(1)[0]);
  const double end = now();
  kiln_kernel_info info = KILN_KERNEL_INFO_INIT;
  check(kiln_kernel_get_info(kernel.get(), &info), "kiln_kernel_get_info");
  fmt::print("{} {} {}\n", (end - begin) * 1e9, static_cast<int>(info.source), llvm_mappings());
  return 0;
}

void process(Bench& bench, FilledCache& cache) {
  const std::string self = std::filesystem::read_symlink("/proc/self/exe").string();
  const std::string command = fmt::format("'{}' --child '{}'", self, cache.use());
  std::vector<double> seconds;
  int from_disk = 0, with_llvm = 0;
  for (int i = 0; i < 25; ++i) {
    const std::unique_ptr<FILE, Releaser<pclose>> pipe(popen(command.c_str(), "r"));
    double nanoseconds = 0;
    int source = 0, llvm = 0;
    if (!pipe || std::fscanf(pipe.get(), "%lf %d %d", &nanoseconds, &source, &llvm) != 3)
      fail("a child process gave no answer");
    seconds.push_back(nanoseconds / 1e9);
    from_disk += source == KILN_FROM_DISK;
    with_llvm += llvm > 0;
  }
  if (from_disk != static_cast<int>(seconds.size()))
    fail(fmt::format("{} of {} children had their kernel from disk", from_disk, seconds.size()));
  bench.at_most("process", "fresh process: engine and first kernel from disk, p50",
                Series::quantile(seconds, 0.5) * 1e3, "ms", 2, spread(seconds));
  bench.at_most("process", "of these, with an LLVM library mapped", with_llvm, "", 0,
                fmt::format("{} processes", seconds.size()));
}

/// Of a model's attention: prefill, decode and a few queries, with and without lse.
std::vector<kiln_attention_desc> attention_shapes() {
  std::vector<kiln_attention_desc> descs;
  for (const std::int64_t m : {std::int64_t{KILN_ANY}, std::int64_t{1}, std::int64_t{2}})
    for (const std::int64_t d : {64, 128}) {
      kiln_attention_desc desc = KILN_ATTENTION_DESC_INIT;
      desc.b = desc.n = KILN_ANY;
      desc.hq = 32;
      desc.hkv = 8;
      desc.m = m;
      desc.d = desc.dv = d;
      desc.causal = KILN_CAUSAL_BOTTOM_RIGHT;
      desc.lse = d == 64;
      descs.push_back(desc);
    }
  return descs;
}

/// In a process of its own: the time of each get, in the order of the list, of kernels that are on disk.
int attention_child(const char* cache_dir) {
  const EngineHandle engine = make_engine(cache_dir);
  for (const kiln_attention_desc& desc : attention_shapes()) {
    kiln_kernel* kernel = nullptr;
    const double begin = now();
    const kiln_status status = kiln_get(engine.get(), &desc.base, &kernel);
    const double seconds = now() - begin;
    check(status, "kiln_get");
    const KernelHandle held(kernel);
    kiln_kernel_info info = KILN_KERNEL_INFO_INIT;
    check(kiln_kernel_get_info(kernel, &info), "kiln_kernel_get_info");
    if (info.source != KILN_FROM_DISK || std::string_view(info.generator) != "llvm")
      fail(fmt::format("{} by {} came from source {}", info.desc, info.generator, info.source));
    fmt::print("{} ", seconds);
  }
  fmt::print("{}\n", llvm_mappings());
  return 0;
}

void attention(Bench& bench) {
  const TemporaryDirectory directory;
  setenv("XDG_DATA_HOME", (directory.path + "/data").c_str(), 1);
  const std::vector<kiln_attention_desc> shapes = attention_shapes();
  double compile_us = 0;
  {
    const EngineHandle engine = make_engine((directory.path + "/cache").c_str());
    for (const kiln_attention_desc& desc : shapes) {
      kiln_kernel* kernel = nullptr;
      check(kiln_get(engine.get(), &desc.base, &kernel), "kiln_get");
      const KernelHandle held(kernel);
      kiln_kernel_info info = KILN_KERNEL_INFO_INIT;
      check(kiln_kernel_get_info(kernel, &info), "kiln_kernel_get_info");
      if (std::string_view(info.generator) != "llvm") {
        fmt::print("attention: no LLVM here that compiles it\n");
        return;
      }
      compile_us += static_cast<double>(info.compile_us);
    }
  }
  const std::string self = std::filesystem::read_symlink("/proc/self/exe").string();
  const std::string command = fmt::format("'{}' --attention-child '{}/cache'", self, directory.path);
  std::vector<double> first, later;
  int with_llvm = 0;
  constexpr int kProcesses = 25;
  for (int i = 0; i < kProcesses; ++i) {
    const std::unique_ptr<FILE, Releaser<pclose>> pipe(popen(command.c_str(), "r"));
    int llvm = 0;
    bool answered = pipe != nullptr;
    for (std::size_t shape = 0; shape < shapes.size() && answered; ++shape) {
      double seconds = 0;
      answered = std::fscanf(pipe.get(), "%lf", &seconds) == 1;
      (shape == 0 ? first : later).push_back(seconds);
    }
    if (!answered || std::fscanf(pipe.get(), "%d", &llvm) != 1)
      fail("a child process gave no answer");
    with_llvm += llvm > 0;
  }
  bench.at_most("attention", "kernel from disk, p50", Series::quantile(later, 0.5) * 1e6, "µs", 100,
                fmt::format("{}; the first of a process, which opens the cache, {:.0f} µs; compiled in {:.1f} ms each",
                            spread(later), Series::quantile(first, 0.5) * 1e6,
                            compile_us / 1e3 / static_cast<double>(shapes.size())));
  bench.at_most("attention", "of these processes, with an LLVM library mapped", with_llvm, "", 0,
                fmt::format("{} processes", kProcesses));
}

/// Many threads ask for one key that nobody has yet.
void threads(Bench& bench) {
  constexpr int keys = 20, count = 64;
  const EngineHandle engine = make_engine(nullptr);
  for (int key = 0; key < keys; ++key) {
    const kiln_int8_mm_desc desc = make_desc(64, 1024 + 16 * key, 512);
    std::atomic<int> ready{0};
    std::vector<std::thread> crowd;
    for (int i = 0; i < count; ++i)
      crowd.emplace_back([&] {
        ready.fetch_add(1);
        while (ready.load() < count)
          std::this_thread::yield();
        get(engine.get(), desc);
      });
    for (std::thread& thread : crowd)
      thread.join();
  }
  kiln_stats stats = KILN_STATS_INIT;
  check(kiln_get_stats(engine.get(), &stats), "kiln_get_stats");
  bench.at_most("threads", "64 threads on one cold key: compiles", static_cast<double>(stats.compiled) / keys, "", 1,
                fmt::format("mean of {} keys", keys));
}

int run(const Options& options, std::size_t rows, const std::string& on) {
  setenv("KILN_CACHE_MAX_MB", "4096", 1); // no row is to be evicted
  constexpr std::uint64_t links = 1000000;
  const Contender clock[] = {timed("clock", [] { run_clock_chain(links); })};
  Report report(kCyclesPerLink * static_cast<double>(links) / race(clock, {.rounds = 5})[0].median());
  Bench bench{report, options.smoke() ? 50 : rows, options.smoke() ? std::size_t{20} : std::size_t{200}};
  if (options.wants("compile"))
    compile(bench);
  if (options.wants("memory"))
    memory(bench);
  if (options.wants("disk") || options.wants("process")) {
    FilledCache cache(bench.rows, on);
    if (options.wants("disk"))
      disk(bench, cache);
    if (options.wants("process"))
      process(bench, cache);
  }
  if (options.wants("scale"))
    scale(bench, options.smoke() ? 20 : 1000, options.smoke() ? 60 : 100'000, on);
  if (options.wants("attention"))
    attention(bench);
  if (options.wants("threads"))
    threads(bench);
  const bool written = options.json().empty() || report.write_json(options.json());
  return written && (options.smoke() || report.all_met()) ? 0 : 1;
}

} // namespace
} // namespace kiln::bench

int main(int argc, char** argv) {
  const double begin = kiln::bench::now();
  if (argc == 3 && std::string_view(argv[1]) == "--child")
    return kiln::bench::child(begin, argv[2]);
  if (argc == 3 && std::string_view(argv[1]) == "--attention-child")
    return kiln::bench::attention_child(argv[2]);
  kiln::bench::Options options("bench_latency", "What compiling, finding and calling kernels costs a host.",
                               {"compile", "memory", "disk", "scale", "process", "attention", "threads"});
  std::size_t rows = 10000;
  std::string on;
  options.add("--rows", rows, "of the cache that `disk` and `process` read");
  options.add("--on", on, "DIRECTORY", "where caches are made; in memory by default");
  options.parse(argc, argv);
  return kiln::bench::run(options, rows, on);
}
