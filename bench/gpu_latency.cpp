/// bench_gpu_latency: what GPU kernels cost a host beside their own time.
///
///   bench_gpu_latency [--only GROUP,…] [--json FILE] [--smoke]
///
/// Making PTX is timed on any machine; the driver's compiler, loading and launching on one with a GPU, else they are
/// left out, which is said. --smoke: figures printed but not judged. Exit code: 0 all figures reached, 1 one fell short
/// or failed, 2 usage.
#include <array>
#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
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
#include "jit/cuda/assemble.h"
#include "jit/cuda/driver.h"
#include "jit/cuda/module.h"
#include "jit/engine.h"

namespace kiln::bench {
namespace {

constexpr const char* kDriver = "libcuda.so.1";

void at_most(Report& report, const char* group, std::string what, double measured, const char* unit, double reach,
             std::string detail) {
  report.add({group, std::move(what), measured, unit, Figure::Bound::at_most, reach, std::move(detail)});
}

std::string spread(const std::vector<double>& seconds, double unit, const char* name) {
  return fmt::format("best {:.1f}, p90 {:.1f}, most {:.1f} {} over {}", Series::quantile(seconds, 0) / unit,
                     Series::quantile(seconds, 0.9) / unit, Series::quantile(seconds, 1) / unit, name, seconds.size());
}

/// One of every class of m, on the layers of two models.
std::vector<kiln_int4_mm_desc> model_layers() {
  std::vector<kiln_int4_mm_desc> descs;
  for (const auto& [n, k] : {std::pair<std::int64_t, std::int64_t>{8192, 8192}, {14336, 4096}, {4096, 14336}})
    for (const std::int64_t m : {1, 8, 16, 32, 64, 128, 1024}) {
      kiln_int4_mm_desc desc = KILN_INT4_MM_DESC_INIT;
      desc.base.device = KILN_DEVICE_CUDA;
      desc.m = m;
      desc.n = n;
      desc.k = k;
      descs.push_back(desc);
    }
  return descs;
}

/// Needs no GPU.
void make_ptx(Report& report) {
  EngineOptions options;
  options.machine = detect_machine();
  options.config.cache = CacheMode::off;
  options.implementations = implementation_table();
  const std::unique_ptr<Engine> engine = take(Engine::create(std::move(options)));
  for (const int sm : {80, 90}) {
    const Target target{.arch = Arch::nvptx, .sm = sm};
    std::vector<double> seconds;
    for (const std::string_view op : {"int4_mm group=128", "int8_mm"})
      for (const int m : {1, 8, 16, 32, 64, 128, 1024})
        for (const int n : {2048, 4096, 8192}) {
          const KernelDesc desc = take(parse_desc(fmt::format("{} m={} n={} k=4096 device=cuda", op, m, n)));
          const double begin = now();
          take(engine->code(desc, &target));
          seconds.push_back(now() - begin);
        }
    at_most(report, "ptx", fmt::format("PTX made for {}, p50", target.text()), Series::quantile(seconds, 0.5) * 1e3,
            "ms", 1, spread(seconds, 1e-3, "ms"));
  }
}

/// The first GPU with its primary context current for as long as this lives.
class Gpu {
public:
  static std::optional<Gpu> find() {
    const Result<cuda::Driver*> driver = cuda::Driver::open(kDriver);
    if (!driver) {
      fmt::print("no GPU figures: {}\n", driver.status().message());
      return std::nullopt;
    }
    return Gpu(**driver);
  }
  cuda::Driver& driver() const { return *driver_; }
  cuda::CUcontext context() const { return scope_.context(); }
  cuda::CUstream stream() const { return stream_; }
  void synchronise() const { check(driver_->api().cuStreamSynchronize(stream_), "cuStreamSynchronize"); }
  void check(cuda::CUresult result, std::string_view what) const {
    if (const Status status = driver_->status(result, what); !status)
      fail(status.message());
  }
  std::string name() const { return driver_->devices()[0].name; }
  std::int32_t sm() const { return driver_->devices()[0].sm; }

private:
  explicit Gpu(cuda::Driver& driver) : driver_(&driver), scope_(take(cuda::ContextScope::enter(driver, 0, nullptr))) {
    using Create = cuda::CUresult (*)(cuda::CUstream*, unsigned);
    constexpr int cuda_2 = 2000;
    constexpr unsigned non_blocking = 1;
    const auto create = reinterpret_cast<Create>(driver.find("cuStreamCreate", cuda_2));
    if (create == nullptr)
      fail("the driver has no cuStreamCreate");
    check(create(&stream_, non_blocking), "cuStreamCreate");
  }
  cuda::Driver* driver_;
  cuda::ContextScope scope_;
  cuda::CUstream stream_ = nullptr;
};

KernelHandle get(kiln_engine* engine, const kiln_int4_mm_desc& desc) {
  kiln_kernel* kernel = nullptr;
  check(kiln_get(engine, &desc.base, &kernel), "kiln_get");
  return KernelHandle(kernel);
}

kiln_kernel_info info_of(const KernelHandle& kernel) {
  kiln_kernel_info info = KILN_KERNEL_INFO_INIT;
  check(kiln_kernel_get_info(kernel.get(), &info), "kiln_kernel_get_info");
  return info;
}

/// Weights, activations and output of a desc on the GPU, all zero.
struct Product {
  Product(const Gpu& gpu, kiln_engine* engine, const kiln_int4_mm_desc& desc)
      : x(take(cuda::Buffer::allocate(gpu.driver(), 0, static_cast<std::uint64_t>(2 * desc.m * desc.k)))),
        y(take(cuda::Buffer::allocate(gpu.driver(), 0, static_cast<std::uint64_t>(2 * desc.m * desc.n)))) {
    const std::vector<std::uint8_t> w(static_cast<std::size_t>(desc.n * desc.k / 2));
    const std::vector<std::uint16_t> sz(static_cast<std::size_t>(2 * desc.n * desc.k / desc.group));
    kiln_int4_mm_weights weights = KILN_INT4_MM_WEIGHTS_INIT;
    weights.w = w.data();
    weights.sz = sz.data();
    kiln_pack* made = nullptr;
    check(kiln_int4_mm_pack_create(engine, &desc, &weights, &made), "kiln_int4_mm_pack_create");
    pack.reset(made);
    args.m = desc.m;
    args.x = reinterpret_cast<const void*>(x.address());
    args.ldx = desc.k;
    args.w_pack = made;
    args.y = reinterpret_cast<void*>(y.address());
    args.ldy = desc.n;
    args.stream = gpu.stream();
  }
  cuda::Buffer x, y;
  PackHandle pack;
  kiln_int4_mm_args args = KILN_INT4_MM_ARGS_INIT;
};

/// Likewise of an fp8_block_bmm.
struct Fp8Product {
  Fp8Product(const Gpu& gpu, const kiln_fp8_block_bmm_desc& desc) {
    const std::int64_t blocks = (desc.k + 127) / 128;
    const auto place = [&](std::int64_t bytes) {
      buffers.push_back(take(cuda::Buffer::allocate(gpu.driver(), 0, static_cast<std::uint64_t>(bytes))));
      return reinterpret_cast<void*>(buffers.back().address());
    };
    args.m = desc.m;
    args.x = place(desc.b * desc.m * desc.k);
    args.x_stride_b = desc.m * desc.k;
    args.ldx = desc.k;
    args.y = place(desc.b * desc.n * desc.k);
    args.xs = static_cast<const float*>(place(desc.b * desc.m * blocks * 4));
    args.xs_stride_b = desc.m * blocks;
    args.xs_stride_m = blocks;
    args.xs_stride_k = 1;
    args.ys = static_cast<const float*>(place(desc.b * ((desc.n + 127) / 128) * blocks * 4));
    args.z = place(desc.b * desc.m * desc.n * 2);
    args.z_stride_b = desc.m * desc.n;
    args.ldz = desc.n;
    args.stream = gpu.stream();
  }
  std::vector<cuda::Buffer> buffers;
  kiln_fp8_block_bmm_args args = KILN_FP8_BLOCK_BMM_ARGS_INIT;
};

/// Fills a cache in this process; a second one reads it.
void compile_and_load(Report& report, const Gpu& gpu) {
  const TemporaryDirectory directory;
  setenv("XDG_DATA_HOME", (directory.path + "/data").c_str(), 1);
  const std::string cache = directory.path + "/cache";
  const EngineHandle engine = make_engine(cache.c_str());
  std::vector<double> compiled;
  for (const kiln_int4_mm_desc& desc : model_layers()) {
    const KernelHandle kernel = get(engine.get(), desc);
    if (info_of(kernel).source == KILN_COMPILED)
      compiled.push_back(1e-6 * static_cast<double>(info_of(kernel).compile_us));
  }
  at_most(report, "compile", "PTX made and compiled by the driver, p50", Series::quantile(compiled, 0.5) * 1e3, "ms",
          80, spread(compiled, 1e-3, "ms"));

  std::vector<double> first, loads;
  const std::string self = std::filesystem::read_symlink("/proc/self/exe").string();
  constexpr int processes = 5;
  for (int i = 0; i < processes; ++i) {
    const std::unique_ptr<FILE, Releaser<pclose>> pipe(
        popen(fmt::format("'{}' --child '{}'", self, cache).c_str(), "r"));
    double seconds = 0;
    if (!pipe || std::fscanf(pipe.get(), "first %lf", &seconds) != 1)
      fail("a child process gave no answer");
    first.push_back(seconds);
    while (std::fscanf(pipe.get(), " load %lf", &seconds) == 1)
      loads.push_back(seconds);
  }
  at_most(report, "process", "second process, context there: engine, kernel from disk, first product done, p50",
          Series::quantile(first, 0.5) * 1e3, "ms", 2, spread(first, 1e-3, "ms"));
  at_most(report, "process", "kernel loaded from disk, context there, p50", Series::quantile(loads, 0.5) * 1e6, "µs",
          300, spread(loads, 1e-6, "µs"));
  (void)gpu;
}

int child(const char* cache) {
  const std::optional<Gpu> gpu = Gpu::find();
  if (!gpu)
    return 1;
  const std::vector<kiln_int4_mm_desc> descs = model_layers();
  const EngineHandle packer = make_engine(nullptr);
  const Product product(*gpu, packer.get(), descs[0]);
  gpu->synchronise();
  const double begin = now();
  const EngineHandle engine = make_engine(cache);
  const KernelHandle kernel = get(engine.get(), descs[0]);
  check(kiln_run(kernel.get(), &product.args.base), "kiln_run");
  gpu->synchronise();
  fmt::print("first {}\n", now() - begin);
  std::vector<KernelHandle> held;
  for (const kiln_int4_mm_desc& desc : std::span(descs).subspan(1)) {
    const double start = now();
    held.push_back(get(engine.get(), desc));
    const double seconds = now() - start;
    if (info_of(held.back()).source == KILN_FROM_DISK)
      fmt::print("load {}\n", seconds);
    else if (info_of(held.back()).source != KILN_FROM_MEMORY)
      fail("a kernel of the second process did not come from disk");
  }
  return 0;
}

/// kiln_run against cuLaunchKernel of an empty kernel with as many parameters. Neither waits: a batch fits the launch
/// queue, which is empty when it begins.
void launch(Report& report, const Gpu& gpu) {
  const std::string ptx =
      fmt::format(".version 7.8\n.target sm_{}\n.address_size 64\n.visible .entry main(", gpu.sm()) +
      ".param .u64 a, .param .u64 b, .param .u64 c, .param .u64 d, .param .u64 e, .param .u64 f, "
      ".param .u64 g, .param .u64 h)\n{\n  ret;\n}\n";
  CodeObject empty;
  empty.format = CodeFormat::ptx;
  empty.arch = Arch::nvptx;
  empty.sm = gpu.sm();
  empty.image.assign(ptx.begin(), ptx.end());
  empty.entries = {{"main", 0}};
  const cuda::Assembled assembled = take(cuda::assemble_with_driver(gpu.driver(), 0, empty));
  cuda::Module& module = *take(gpu.driver().load(assembled.cubin, 0));
  const cuda::CUfunction function = take(module.ready(gpu.context(), nullptr)).launchable[0];
  std::array<std::uint64_t, 8> values{};
  std::array<void*, 8> parameters{};
  for (std::size_t i = 0; i < values.size(); ++i)
    parameters[i] = &values[i];

  const EngineHandle engine = make_engine(nullptr);
  kiln_int4_mm_desc small = KILN_INT4_MM_DESC_INIT;
  small.base.device = KILN_DEVICE_CUDA;
  small.m = 1;
  small.n = 8;
  small.k = 128;
  const kiln_int4_mm_desc large = model_layers()[0];
  const Product products[] = {{gpu, engine.get(), small}, {gpu, engine.get(), large}};
  const KernelHandle kernels[] = {get(engine.get(), small), get(engine.get(), large)};
  const auto batched = [&](std::string name, auto call) {
    return Contender{std::move(name), [&gpu, call](int calls) {
                       constexpr int batch = 64;
                       double seconds = 0;
                       for (int done = 0; done < calls; done += batch) {
                         const int some = std::min(batch, calls - done);
                         gpu.synchronise();
                         const double begin = now();
                         for (int i = 0; i < some; ++i)
                           call();
                         seconds += now() - begin;
                       }
                       gpu.synchronise();
                       return seconds;
                     }};
  };
  const Contender contenders[] = {
      batched("cuLaunchKernel",
              [&] {
                gpu.check(gpu.driver().api().cuLaunchKernel(function, 1, 1, 1, 32, 1, 1, 0, gpu.stream(),
                                                            parameters.data(), nullptr),
                          "cuLaunchKernel");
              }),
      batched("small", [&] { check(kiln_run(kernels[0].get(), &products[0].args.base), "kiln_run"); }),
      batched("large", [&] { check(kiln_run(kernels[1].get(), &products[1].args.base), "kiln_run"); })};
  const std::vector<Series> s = race(contenders, {.rounds = 51, .sample_seconds = 2e-3});
  const double raw = s[0].median() * 1e6;
  at_most(report, "launch", "kiln_run beyond cuLaunchKernel, int4_mm 1×8×128, p50", s[1].median() * 1e6 - raw, "µs",
          0.5, fmt::format("{:.2f} µs against {:.2f}", s[1].median() * 1e6, raw));
  at_most(report, "launch", "the same, 1×8192×8192", s[2].median() * 1e6 - raw, "µs", 0.5,
          fmt::format("{:.2f} µs against {:.2f}", s[2].median() * 1e6, raw));
  if (gpu.sm() != 90)
    return;
  kiln_fp8_block_bmm_desc desc = KILN_FP8_BLOCK_BMM_DESC_INIT;
  desc.base.device = KILN_DEVICE_CUDA;
  desc.m = 16;
  desc.n = 128;
  desc.k = 128;
  kiln_kernel* made = nullptr;
  check(kiln_get(engine.get(), &desc.base, &made), "kiln_get");
  const KernelHandle kernel(made);
  const Fp8Product product(gpu, desc);
  const Contender fp8[] = {contenders[0],
                           batched("fp8", [&] { check(kiln_run(kernel.get(), &product.args.base), "kiln_run"); })};
  const std::vector<Series> both = race(fp8, {.rounds = 51, .sample_seconds = 2e-3});
  at_most(report, "launch", "kiln_run, fp8_block_bmm 16×128×128, tensor maps kept, p50", both[1].median() * 1e6, "µs",
          3, fmt::format("of which cuLaunchKernel {:.2f} µs", both[0].median() * 1e6));
}

int run(const Options& options) {
  constexpr std::uint64_t links = 1'000'000;
  const Contender clock[] = {timed("clock", [] { run_clock_chain(links); })};
  // Compiling is measured, not the driver's own cache (CUDA C++ Programming Guide, "CUDA Environment Variables").
  setenv("CUDA_CACHE_DISABLE", "1", 1);
  Report report(kCyclesPerLink * static_cast<double>(links) / race(clock, {.rounds = 5})[0].median());
  if (options.wants("ptx"))
    make_ptx(report);
  if (const std::optional<Gpu> gpu = Gpu::find()) {
    fmt::print("{}, CUDA {}\n", gpu->name(), gpu->driver().version_text());
    if (options.wants("compile"))
      compile_and_load(report, *gpu);
    if (options.wants("launch"))
      launch(report, *gpu);
  }
  if (!options.json().empty() && !report.write_json(options.json()))
    return 1;
  return options.smoke() || report.all_met() ? 0 : 1;
}

} // namespace
} // namespace kiln::bench

int main(int argc, char** argv) {
  if (argc == 3 && std::string_view(argv[1]) == "--child")
    return kiln::bench::child(argv[2]);
  kiln::bench::Options options("bench_gpu_latency", "What GPU kernels cost a host beside their own time.",
                               {"ptx", "compile", "launch"});
  options.parse(argc, argv);
  return kiln::bench::run(options);
}
