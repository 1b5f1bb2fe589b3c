#define DOCTEST_CONFIG_IMPLEMENT_WITH_MAIN
#include <doctest/doctest.h>

#include <cstring>
#include <dlfcn.h>
#include <filesystem>
#include <thread>
#include <vector>

#include "api/session.h"
#include "backends/table.h"
#include "cache/file.h"
#include "jit/bf16.h"
#include "jit/cuda/assemble.h"
#include "jit/cuda/module.h"
#include "jit/engine.h"
#include "jit/kernel_key.h"
#include "jit/ops/int4_mm_driver.h"
#include "jit/ops/int8_mm_driver.h"
#include "tests/child_process.h"
#include "tests/fake_cuda/fake_cuda.h"

/// GPUs from the desc to the launch, over a driver of our own (tests/fake_cuda) and rows whose kernels are host
/// functions: what the engine, the driver layer and the ops' drivers do is tested on any machine.

using namespace kiln;
using namespace kiln::test;
using fake_cuda::Launch;

namespace {

constexpr const char* kLibrary = KILN_FAKE_CUDA; // path, by the build

template <class Function> Function symbol(const char* name) {
  void* const library = dlopen(kLibrary, RTLD_NOW | RTLD_LOCAL);
  REQUIRE(library != nullptr);
  return reinterpret_cast<Function>(dlsym(library, name));
}

fake_cuda::State& fake() {
  static fake_cuda::State& state = *symbol<fake_cuda::StateFunction>("fake_cuda_state")();
  return state;
}
cuda::CUcontext new_context(int device) {
  return symbol<fake_cuda::ContextFunction>("fake_cuda_context")(device);
}
cuda::CUstream new_stream(cuda::CUcontext context) {
  return symbol<fake_cuda::StreamFunction>("fake_cuda_stream")(context);
}

int compiles = 0;
cuda::LaunchPlan launch_plan; ///< of the kernels that the rows below make
std::optional<int4_mm::Boxes> int4_boxes;
std::optional<int8_mm::Boxes> int8_boxes;

Result<CodeObject> compile_int4(const KernelDesc& desc, const Target& target, std::string_view layout) {
  ++compiles;
  const std::string text = "// " + desc.text() + "\n.version 7.0\n.target " + target.text().substr(6) +
                           "\n.visible .entry main()\n.visible .entry reduce()\n";
  CodeObject code;
  code.format = CodeFormat::ptx;
  code.arch = Arch::nvptx;
  code.sm = target.sm;
  code.image.assign(text.begin(), text.end());
  code.entries = {{"main", 0}};
  if (launch_plan.reduce_threads > 0)
    code.entries.push_back({"reduce", 0});
  code.plan =
      int4_mm::Plan{.layout = int4_mm::find_pack_layout(layout), .launch = launch_plan, .boxes = int4_boxes}.values();
  return code;
}

Result<CodeObject> compile_int8(const KernelDesc& desc, const Target& target, std::string_view layout) {
  Result<CodeObject> code = compile_int4(desc, target, "plain");
  int8_mm::Plan plan;
  plan.layout = *int8_mm::PackLayout::parse(layout);
  plan.launch = launch_plan;
  plan.boxes = int8_boxes;
  code->plan = plan.values();
  return code;
}

Status supports(const KernelDesc&, const Target& target) {
  return target.sm >= 80 ? Status() : Status::error(Code::unsupported, "needs sm_80 or later");
}

Implementation gpu_row(OpId op) {
  Implementation row;
  row.op = op;
  row.isa = IsaPath::mma_sync;
  row.backend = BackendId::nvidia;
  row.generator = GeneratorId::ptx;
  row.generator_digest = "generator-1";
  row.device = DeviceKind::cuda;
  row.arch = Arch::nvptx;
  row.supports = supports;
  row.pack_layout = [](const KernelDesc& d, const Target&) {
    return d.op == OpId::int4_mm ? std::string("plain") : int8_mm::kGpuLayout.id();
  };
  row.compile = op == OpId::int4_mm ? compile_int4 : compile_int8;
  return row;
}

/// The kernel `main` of int4_mm as a host function, over plain packs.
struct Int4Kernel {
  std::int64_t n, k, group;
  void operator()(const Launch& launch, void** p) const {
    if (launch.kernel != "main")
      return;
    const auto address = [&](int i) { return *static_cast<std::uint64_t*>(p[i]); };
    const auto number = [&](int i) { return std::int64_t{*static_cast<std::uint32_t*>(p[i])}; };
    int4_mm::reference(number(5), n, k, group, reinterpret_cast<const std::uint16_t*>(address(0)), number(6),
                       reinterpret_cast<const std::uint8_t*>(address(1)),
                       reinterpret_cast<const std::uint16_t*>(address(2)), reinterpret_cast<std::uint16_t*>(address(3)),
                       number(7));
  }
};

struct Fixture {
  std::filesystem::path directory = std::filesystem::temp_directory_path() /
                                    ("kiln-cuda-test-" + std::to_string(::getpid()) + "-" + std::to_string(++count));
  std::vector<Implementation> rows = {gpu_row(OpId::int4_mm), gpu_row(OpId::int8_mm)};
  std::vector<std::string> logged;
  Config config;
  std::string library = kLibrary;
  static inline int count = 0;

  Fixture() {
    for (const Implementation& row : implementation_table())
      if (row.device == DeviceKind::cpu)
        rows.push_back(row);
    compiles = 0;
    launch_plan = {};
    int4_boxes.reset();
    int8_boxes.reset();
    fake_cuda::State& f = fake();
    f.version = 13000;
    f.devices = {fake_cuda::Device(), fake_cuda::Device()};
    f.missing.clear();
    f.failures.clear();
    f.calls.clear();
    f.launches.clear();
    f.kernel = nullptr;
    f.bytes_left = std::uint64_t{1} << 32;
    f.capturing.clear();
    f.capture_violations.clear();
    f.rejects_ptx = false;
    f.refuses_cubin_of.clear();
    f.jit_log = "ptxas info    : Used 32 registers";
    config.cache_dir = directory / "cache";
    config.key_dir = directory / "keys";
    config.threads = 1;
  }
  ~Fixture() {
    CHECK(fake().capture_violations.empty());
    CHECK(symbol<fake_cuda::CurrentFunction>("fake_cuda_current")() == nullptr); // every push was popped
    std::filesystem::remove_all(directory);
  }
  cuda::Driver& driver() {
    const Result<cuda::Driver*> opened = cuda::Driver::open(library);
    REQUIRE_MESSAGE(opened.is_ok(), (opened ? "" : opened.status().message()));
    return **opened;
  }
  std::unique_ptr<Engine> engine() {
    EngineOptions options;
    options.config = config;
    options.machine = detect_machine();
    options.implementations = rows;
    options.cuda_library = library;
    options.log_context = this;
    options.log_sink = [](void* self, LogLevel, const char* message) {
      static_cast<Fixture*>(self)->logged.emplace_back(message);
    };
    Result<std::unique_ptr<Engine>> made = Engine::create(std::move(options));
    REQUIRE(made.is_ok());
    return std::move(*made);
  }
};

KernelDesc on_gpu(KernelDesc desc, std::uint8_t index = 0) {
  desc.device = {DeviceKind::cuda, index};
  return desc;
}
KernelDesc int4_desc(std::int64_t m = 1, std::uint8_t device = 0) {
  return on_gpu(int4_mm::make_desc(m, 24, 128, 64), device);
}

void check_error(const Status& status, Code code, std::vector<std::string> says) {
  CHECK(status.code() == code);
  for (const std::string& text : says)
    CHECK_MESSAGE(status.message().find(text) != std::string::npos, status.message());
}
template <class T> void check_error(const Result<T>& result, Code code, std::vector<std::string> says) {
  REQUIRE(!result.is_ok());
  check_error(result.status(), code, says);
}

/// A product on the fake GPU: tensors in its memory, and what must come out.
struct Product {
  Fixture& fixture;
  Engine& engine;
  std::int64_t m, n = 24, k = 128, group = 64, ldx = 136, ldy = 32;
  std::vector<std::uint8_t> w = std::vector<std::uint8_t>(static_cast<std::size_t>(n * k / 2));
  std::vector<std::uint16_t> sz = std::vector<std::uint16_t>(static_cast<std::size_t>(k / group * n * 2));
  std::vector<std::uint16_t> x, expected;
  cuda::Buffer gpu_x, gpu_y;
  std::optional<int4_mm::Pack> pack;
  std::uint8_t device;

  Product(Fixture& f, Engine& e, std::int64_t rows, std::uint8_t device_index = 0)
      : fixture(f), engine(e), m(rows), device(device_index) {
    std::uint32_t random = 1;
    const auto next = [&] { return random = random * 1664525 + 1013904223, random >> 16; };
    for (auto& byte : w)
      byte = static_cast<std::uint8_t>(next());
    for (auto& value : sz)
      value = bf16_of_float(static_cast<float>(next() % 256) / 256);
    x.resize(static_cast<std::size_t>(m * ldx));
    for (auto& value : x)
      value = bf16_of_float(static_cast<float>(next() % 256) / 128 - 1);
    expected.assign(static_cast<std::size_t>(m * ldy), 0x5a5a);
    int4_mm::reference(m, n, k, group, x.data(), ldx, w.data(), sz.data(), expected.data(), ldy);
    const auto upload = [&](const std::vector<std::uint16_t>& data) {
      Result<cuda::Buffer> buffer = cuda::Buffer::allocate(fixture.driver(), device, data.size() * 2);
      REQUIRE(buffer.is_ok());
      REQUIRE(buffer->write(data.data(), data.size() * 2).is_ok());
      return std::move(*buffer);
    };
    gpu_x = upload(x);
    gpu_y = upload(std::vector<std::uint16_t>(expected.size(), 0x5a5a));
    Result<int4_mm::Pack> made = make_pack({.w = w.data(), .sz = sz.data()});
    REQUIRE_MESSAGE(made.is_ok(), (made ? "" : made.status().message()));
    pack = std::move(*made);
    fake().kernel = Int4Kernel{n, k, group};
  }
  KernelDesc desc() const { return on_gpu(int4_mm::make_desc(m, n, k, group), device); }
  Result<int4_mm::Pack> make_pack(const int4_mm::Weights& weights) {
    return int4_mm::Pack::make(*int4_mm::find_pack_layout("plain"), weights, desc(), engine.runtime());
  }
  int4_mm::Args args() {
    return {.m = m,
            .x = reinterpret_cast<const std::uint16_t*>(gpu_x.address()),
            .ldx = ldx,
            .pack = &*pack,
            .y = reinterpret_cast<std::uint16_t*>(gpu_y.address()),
            .ldy = ldy};
  }
  KernelRef kernel() {
    Result<KernelRef> got = engine.get(desc());
    REQUIRE_MESSAGE(got.is_ok(), (got ? "" : got.status().message()));
    return std::move(*got);
  }
  bool is_right() {
    std::vector<std::uint16_t> y(expected.size());
    REQUIRE(gpu_y.read(y.data(), y.size() * 2).is_ok());
    return y == expected;
  }
};

} // namespace

// ---------------------------------------------------------------- before the driver is there (in this order)

TEST_CASE_FIXTURE(Fixture,
                  "no driver: descs for CPUs are served, those for GPUs refused, and nothing is opened unasked") {
  library = "libno-such-cuda.so.1";
  const auto e = engine();
  CHECK(e->get(int4_mm::make_desc(1, 24, 128, 64)).is_ok());
  check_error(e->get(int4_desc()), Code::unsupported, {"no NVIDIA driver", "libno-such-cuda.so.1"});
  check_error(e->get_for_stream(int4_desc(), nullptr), Code::unsupported, {"no NVIDIA driver"});
  const Explanation why = e->explain(int4_desc(), nullptr);
  CHECK(why.taken == nullptr);
  for (const auto& candidate : why.candidates)
    CHECK(candidate.reason.find(candidate.implementation->device == DeviceKind::cuda ? "no NVIDIA driver"
                                                                                     : "for another device") == 0);
  library = kLibrary;
  CHECK(engine()->get(int4_mm::make_desc(1, 24, 128, 64)).is_ok());
  CHECK(fake().calls.empty());
}

TEST_CASE_FIXTURE(Fixture, "a driver that lacks something, has no device, or fails to start") {
  fake().missing = {"cuLaunchKernel", "cuMemAlloc"};
  check_error(engine()->get(int4_desc()), Code::unsupported, {"lacks cuMemAlloc, cuLaunchKernel"});
  fake().missing.clear();
  fake().devices.clear();
  check_error(engine()->get(int4_desc()), Code::unsupported, {"CUDA_ERROR_NO_DEVICE (100"});
  fake().devices = {fake_cuda::Device()};
  for (const char* name : {"cuInit", "cuDriverGetVersion", "cuDeviceGetCount", "cuDeviceGet", "cuDeviceGetName",
                           "cuDeviceTotalMem", "cuDeviceGetAttribute"}) {
    fake().failures[name] = {999};
    check_error(engine()->get(int4_desc()), name == std::string("cuInit") ? Code::unsupported : Code::internal,
                {name, "999"});
  }
}

// ---------------------------------------------------------------- the path of a kernel

TEST_CASE_FIXTURE(Fixture, "made as PTX, assembled by the driver, stored as cubin, loaded by the next process") {
  const std::string ptx_of_sm90 = ".target sm_90a";
  {
    const auto e = engine();
    const Result<KernelRef> kernel = e->get(int4_desc());
    REQUIRE_MESSAGE(kernel.is_ok(), (kernel ? "" : kernel.status().message()));
    CHECK((*kernel)->source == Source::compiled);
    CHECK((*kernel)->text().empty());
    CHECK((*kernel)->code_bytes() > 0);
    CHECK((*kernel)->code().format == CodeFormat::cubin);
    CHECK((*kernel)->code().compiler == "driver 13.0");
    CHECK((*kernel)->code().driver_version == 13000);
    CHECK(e->get(int4_desc(1)).is_ok());
    CHECK(e->stats().memory_hits == 1);
    CHECK(compiles == 1);
  }
  const auto e = engine();
  CHECK(e->explain(int4_desc(), nullptr).tier == "disk");
  const Result<KernelRef> kernel = e->get(int4_desc());
  REQUIRE(kernel.is_ok());
  CHECK((*kernel)->source == Source::disk);
  CHECK(compiles == 1);
  CHECK(fake().calls_of("cuLinkCreate") == 1);
  // The same cubin on the second device, whose SM is the same: a module of its own, no compile.
  CHECK(e->get(int4_desc(1, 1)).is_ok());
  CHECK(compiles == 1);
  CHECK(fake().calls_of("cuLibraryLoadData") == 2);
  CHECK(fake().calls_of("cuLibraryUnload") == 0);
  const Explanation why = e->explain(int4_desc(), nullptr);
  CHECK(why.key_text.find("\nsm=90\n") != std::string::npos);
  const Result<Engine::Made> made = e->code(int4_desc(), nullptr);
  REQUIRE(made.is_ok());
  CHECK(std::string(made->code.image.begin(), made->code.image.end()).find(ptx_of_sm90) != std::string::npos);
  CHECK(check_row(*e->store()->get(why.key)).is_ok());
  CHECK(logged.empty());
}

TEST_CASE_FIXTURE(Fixture, "a cubin that the driver refuses is made anew from PTX, and replaces it") {
  CHECK(engine()->get(int4_desc(8)).is_ok());
  CHECK(compiles == 1);
  fake().refuses_cubin_of = "FAKECUBIN " + std::to_string(fake().links) + "\n";
  // The module of the first is the process's: a driver of another name has none.
  library = std::filesystem::path(kLibrary).parent_path() / "." / "libcuda.so.1";
  const auto e = engine();
  const Result<KernelRef> kernel = e->get(int4_desc(8));
  REQUIRE_MESSAGE(kernel.is_ok(), (kernel ? "" : kernel.status().message()));
  CHECK((*kernel)->source == Source::compiled);
  CHECK(compiles == 2);
  CHECK(engine()->get(int4_desc(8)).is_ok());
  CHECK(compiles == 2);
}

TEST_CASE_FIXTURE(Fixture, "PTX that the driver rejects: the log in the message, the text in KILN_DUMP_DIR") {
  fake().rejects_ptx = true;
  config.dump_dir = directory / "dump";
  check_error(engine()->get(int4_desc()), Code::compile_failed,
              {"rejects the PTX", "CUDA_ERROR_INVALID_PTX (218", "line 3; error : Unknown opcode"});
  int files = 0;
  for (const auto& file : std::filesystem::directory_iterator(config.dump_dir)) {
    ++files;
    CHECK(file.path().extension() == ".ptx");
    CHECK(read_file(file.path()).is_ok());
  }
  CHECK(files == 1);
  fake().rejects_ptx = false;
  CHECK(engine()->get(int4_desc()).is_ok());
}

TEST_CASE_FIXTURE(Fixture, "advisories of lost speed in the JIT's log are a warning") {
  fake().jit_log = "ptxas info    : (C7504) Potential Performance Loss: 'setmaxnreg' ignored\nptxas info    : Used 9 "
                   "registers";
  CHECK(engine()->get(int4_desc(9)).is_ok());
  REQUIRE(logged.size() == 1);
  CHECK(logged[0].find("C7504") != std::string::npos);
  CHECK(logged[0].find("Used 9") == std::string::npos);
}

TEST_CASE_FIXTURE(Fixture, "KILN_MISS=error compiles nothing; KILN_DISABLE and KILN_FORCE count by device") {
  config.miss = MissPolicy::error;
  check_error(engine()->get(int4_desc(16)), Code::miss, {"KILN_MISS=error"});
  config.miss = MissPolicy::fallback; // for CPUs: a GPU kernel is compiled now
  CHECK(engine()->get(int4_desc(16)).is_ok());
  config.miss = MissPolicy::error;
  CHECK(engine()->get(int4_desc(16)).is_ok());
  config.miss = MissPolicy::compile;
  config.disabled_backends = {BackendId::nvidia};
  check_error(engine()->get(int4_desc(16)), Code::unsupported, {"mma_sync: left out by KILN_DISABLE"});
  CHECK(engine()->get(int4_mm::make_desc(16, 24, 128, 64)).is_ok());
  config.disabled_backends.clear();
  config.forced = {{OpId::none, IsaPath::mma_sync}};
  CHECK(engine()->get(int4_desc(16)).is_ok());
  CHECK(engine()->get(int4_mm::make_desc(16, 24, 128, 64)).is_ok()); // no CPU has the path
  config.forced = {{OpId::int4_mm, IsaPath::wgmma}};
  check_error(engine()->get(int4_desc(16)), Code::unsupported, {"wgmma, which KILN_FORCE demands"});
}

TEST_CASE_FIXTURE(Fixture, "a device that is not there, an SM that no row serves") {
  check_error(engine()->get(int4_desc(1, 7)), Code::unsupported, {"device=cuda:7", "cuda:0"});
  const auto e = engine();
  const Target old{.arch = Arch::nvptx, .sm = 75};
  check_error(e->warmup(int4_desc(), &old), Code::unsupported, {"mma_sync: needs sm_80 or later"});
  const Target cpu = detect_machine().target;
  check_error(e->warmup(int4_desc(), &cpu), Code::unsupported, {"mma_sync: for NVIDIA GPUs"});
  const Target gpu{.arch = Arch::nvptx, .sm = 90};
  check_error(e->warmup(int4_mm::make_desc(1, 24, 128, 64), &gpu), Code::unsupported, {"reference: for CPUs"});
}

TEST_CASE_FIXTURE(Fixture, "ahead of time without an assembler: PTX is stored, and assembled where it is first used") {
  config.program_path = "/nowhere";
  const Target target{.arch = Arch::nvptx, .sm = 90};
  {
    const auto e = engine();
    if (!cuda::find_ptxas(config.program_path).empty())
      return; // a toolkit in its usual place: cuda_ptxas_test has that case
    CHECK(*e->warmup(int4_desc(64), &target) == Engine::Warmed::compiled);
    CHECK(*e->warmup(int4_desc(64), &target) == Engine::Warmed::hit);
    CHECK(fake().calls_of("cuLinkCreate") == 0);
  }
  const auto e = engine();
  const Result<KernelRef> kernel = e->get(int4_desc(64));
  REQUIRE(kernel.is_ok());
  CHECK((*kernel)->source == Source::compiled);
  CHECK(e->stats().store.rows == 1);
  CHECK((*engine()->get(int4_desc(64)))->source == Source::disk);
  CHECK(logged.empty());
}

// ---------------------------------------------------------------- calls

TEST_CASE_FIXTURE(Fixture, "a product on a stream: one launch, no synchronisation, right result") {
  const auto e = engine();
  for (const std::int64_t m : {1, 7, 300}) {
    Product p(*this, *e, m);
    const KernelRef kernel = p.kernel();
    const cuda::CUstream stream = new_stream(*driver().primary_context(0));
    fake().launches.clear();
    const int waits = fake().calls_of("cuStreamSynchronize");
    int4_mm::Args args = p.args();
    args.stream = stream;
    const Status status = int4_mm::run(*kernel, args);
    REQUIRE_MESSAGE(status.is_ok(), status.message());
    REQUIRE(fake().launches.size() == 1);
    const Launch& launch = fake().launches[0];
    CHECK(launch.stream == stream);
    CHECK(launch.threads == 128);
    CHECK(launch.grid[0] == 1);
    CHECK(launch.grid[1] == (m + 15) / 16);
    CHECK(fake().calls_of("cuStreamSynchronize") == waits);
    CHECK(p.is_right());
  }
}

TEST_CASE_FIXTURE(Fixture, "weights on the GPU, in both forms, and packs in files") {
  const auto e = engine();
  Product p(*this, *e, 3);
  const KernelRef kernel = p.kernel();
  const auto gpu = [&](const void* data, std::size_t bytes) {
    Result<cuda::Buffer> buffer = cuda::Buffer::allocate(driver(), 0, bytes);
    REQUIRE(buffer->write(data, bytes).is_ok());
    return std::move(*buffer);
  };
  std::vector<std::int32_t> packed(p.w.size() / 4);
  int4_mm::plain_to_tensor_core(p.w.data(), p.n, p.k, 4, packed.data());
  const cuda::Buffer w = gpu(packed.data(), p.w.size()), sz = gpu(p.sz.data(), p.sz.size() * 2);
  Result<int4_mm::Pack> made = p.make_pack({.w = reinterpret_cast<const void*>(w.address()),
                                            .sz = reinterpret_cast<const void*>(sz.address()),
                                            .inner_k_tiles = 4,
                                            .place = DeviceKind::cuda});
  REQUIRE_MESSAGE(made.is_ok(), (made ? "" : made.status().message()));
  const std::string file = directory / "weights.pack";
  REQUIRE(made->save(file).is_ok());
  Result<int4_mm::Pack> loaded = int4_mm::Pack::load(file, {DeviceKind::cuda, 0}, e->runtime());
  REQUIRE(loaded.is_ok());
  for (const int4_mm::Pack* pack : {&*made, &*loaded}) {
    int4_mm::Args args = p.args();
    args.pack = pack;
    CHECK(int4_mm::run(*kernel, args).is_ok());
    CHECK(p.is_right());
  }
  check_error(
      p.make_pack({.w = packed.data(), .sz = reinterpret_cast<const void*>(sz.address()), .place = DeviceKind::cuda}),
      Code::invalid_argument, {"int4_mm: w is no device pointer"});
}

TEST_CASE_FIXTURE(Fixture, "bad arguments are refused by name and nothing is launched") {
  const auto e = engine();
  Product p(*this, *e, 3), elsewhere(*this, *e, 3, 1);
  const KernelRef kernel = p.kernel();
  std::vector<std::uint16_t> host(4096);
  const auto refused = [&](auto change, std::vector<std::string> says) {
    int4_mm::Args args = p.args();
    change(args);
    check_error(int4_mm::run(*kernel, args), Code::invalid_argument, says);
  };
  using Args = int4_mm::Args;
  refused([](Args& a) { a.y = nullptr; }, {"int4_mm: y is null"});
  refused([](Args& a) { a.x = nullptr; }, {"int4_mm: x is null"});
  refused([](Args& a) { a.pack = nullptr; }, {"int4_mm: w_pack is null"});
  refused([](Args& a) { ++a.x; }, {"int4_mm: x is 0x", "aligned to 16 bytes"});
  refused([](Args& a) { ++a.y; }, {"int4_mm: y is 0x", "aligned to 16 bytes"});
  refused([](Args& a) { a.ldx = 129; }, {"ldx is 129", "a multiple of 8"});
  refused([](Args& a) { a.ldx = 120; }, {"ldx is 120", "128 to"});
  refused([](Args& a) { a.ldy = 25; }, {"ldy is 25", "a multiple of 8"});
  refused([](Args& a) { a.m = 9; }, {"m is 9", "2 to 8"});
  refused([&](Args& a) { a.x = host.data() + 8 - reinterpret_cast<std::uintptr_t>(host.data()) % 16 / 2; },
          {"x is no device pointer", "memory of cuda:0"});
  refused([&](Args& a) { a.x = elsewhere.args().x; }, {"x is memory of cuda:1"});
  refused([&](Args& a) { a.pack = &*elsewhere.pack; }, {"w_pack is memory of cuda:1"});
  refused([&](Args& a) { a.stream = new_stream(*driver().primary_context(1)); }, {"stream is one of another device"});
  // Memory of another context of the same device.
  const cuda::CUcontext other = new_context(0);
  driver().api().cuCtxPushCurrent(other);
  Product theirs(*this, *e, 3);
  cuda::CUcontext popped = nullptr;
  driver().api().cuCtxPopCurrent(&popped);
  refused([&](Args& a) { a.x = theirs.args().x; }, {"x is memory of another context"});
  CHECK(fake().launches.empty());
  const Result<int4_mm::Pack> on_cpu =
      int4_mm::Pack::make(*int4_mm::find_pack_layout("plain"), {.w = p.w.data(), .sz = p.sz.data()},
                          int4_mm::make_desc(3, 24, 128, 64), e->runtime());
  REQUIRE(on_cpu.is_ok());
  refused([&](Args& a) { a.pack = &*on_cpu; }, {"w_pack is in host memory"});
  check_error(check_desc(on_gpu(int4_mm::make_desc(1, 24, 100, 64))), Code::invalid_argument,
              {"k=100", "a multiple of the group, 64"});
}

TEST_CASE_FIXTURE(Fixture, "contexts: the caller's own, that of the stream, else the primary one; several devices") {
  const auto e = engine();
  const cuda::CUcontext own = new_context(0);
  driver().api().cuCtxPushCurrent(own);
  {
    Product p(*this, *e, 2);
    const KernelRef kernel = p.kernel();
    CHECK(int4_mm::run(*kernel, p.args()).is_ok()); // the default stream: in the current context
    CHECK(fake().launches.back().context == own);
    CHECK(p.is_right());
    Product second(*this, *e, 2, 1); // another device, though a context of the first is current
    CHECK(int4_mm::run(*second.kernel(), second.args()).is_ok());
    CHECK(fake().launches.back().context == *driver().primary_context(1));
    CHECK(second.is_right());
    int4_mm::Args args = second.args();
    args.stream = new_stream(*driver().primary_context(1));
    CHECK(int4_mm::run(*second.kernel(), args).is_ok());
    CHECK(fake().launches.back().stream == args.stream);
  }
  cuda::CUcontext popped = nullptr;
  driver().api().cuCtxPopCurrent(&popped);
  CHECK(popped == own);
}

TEST_CASE_FIXTURE(Fixture, "stream capture: a miss is busy and harms nothing, loaded kernels are captured") {
  const auto e = engine();
  Product p(*this, *e, 5);
  const cuda::CUstream stream = new_stream(*driver().primary_context(0));
  fake().capturing = {stream};
  check_error(e->get_for_stream(p.desc(), stream), Code::busy, {"is not loaded", "captured"});
  fake().capturing = {nullptr}; // what the default stream tells of a blocking stream
  check_error(e->get(p.desc()), Code::busy, {"is not loaded"});
  CHECK(compiles == 0);
  fake().capturing = {stream};
  const KernelRef kernel = p.kernel(); // on another thread, say: relaxed mode keeps the capture whole
  int4_mm::Args args = p.args();
  args.stream = stream;
  CHECK(int4_mm::run(*kernel, args).is_ok());
  CHECK(fake().launches.back().captured);
  CHECK(e->get_for_stream(p.desc(), stream).is_ok());
  // A context in which it is not loaded.
  const cuda::CUcontext other = new_context(0);
  const cuda::CUstream there = new_stream(other);
  driver().api().cuCtxPushCurrent(other);
  {
    fake().capturing = {};
    Product q(*this, *e, 5);
    fake().capturing = {there};
    args = q.args();
    args.stream = there;
    check_error(int4_mm::run(*kernel, args), Code::busy, {"run it there once before the capture"});
    fake().capturing = {};
    CHECK(int4_mm::run(*kernel, args).is_ok());
    fake().capturing = {there};
    CHECK(int4_mm::run(*kernel, args).is_ok());
    fake().capturing = {};
  }
  cuda::CUcontext popped = nullptr;
  driver().api().cuCtxPopCurrent(&popped);
}

TEST_CASE_FIXTURE(Fixture, "split K: workspace of the stream's, the caller's, the graph's; a second kernel sums") {
  launch_plan = {.tile_m = 16, .tile_n = 8, .split_k = 4, .threads = 64, .smem_bytes = 100000, .cluster_x = 2};
  launch_plan.workspace_per_row = 24 * 4 * 4;
  launch_plan.workspace_zeroed = 64;
  launch_plan.reduce_threads = 32;
  const auto e = engine();
  Product p(*this, *e, 17);
  const KernelRef kernel = p.kernel();
  const cuda::CUstream stream = new_stream(*driver().primary_context(0));
  int4_mm::Args args = p.args();
  args.stream = stream;
  std::uint64_t seen = 0;
  fake().kernel = [&, run = Int4Kernel{p.n, p.k, p.group}](const Launch& launch, void** parameters) {
    seen = *static_cast<std::uint64_t*>(parameters[4]);
    for (int i = 0; i < 64 && launch.kernel == "main"; ++i)
      CHECK(reinterpret_cast<const std::uint8_t*>(seen)[i] == 0);
    std::memset(reinterpret_cast<void*>(seen), 1, 64);
    run(launch, parameters);
  };
  const Result<std::uint64_t> bytes = int4_mm::workspace_bytes(*kernel, args);
  REQUIRE(bytes.is_ok());
  CHECK(*bytes == 32 * 24 * 4 * 4);
  CHECK(int4_mm::run(*kernel, args).is_ok());
  const std::uint64_t first = seen;
  CHECK(int4_mm::run(*kernel, args).is_ok());
  CHECK(seen == first);
  REQUIRE(fake().launches.size() == 4);
  const Launch &main = fake().launches[0], &reduce = fake().launches[1];
  CHECK(main.grid[0] == 4); // 3 tiles, whole clusters
  CHECK(main.grid[1] == 2);
  CHECK(main.grid[2] == 4);
  CHECK(main.cluster_x == 2);
  CHECK(main.shared_bytes == 100000);
  CHECK(reduce.kernel == "reduce");
  CHECK(reduce.threads == 32);
  CHECK(fake().calls_of("cuKernelSetAttribute") == 2);
  args.stream = new_stream(*driver().primary_context(0));
  CHECK(int4_mm::run(*kernel, args).is_ok());
  CHECK(seen != first); // each stream has its own

  Result<cuda::Buffer> mine = cuda::Buffer::allocate(driver(), 0, *bytes);
  args.workspace = reinterpret_cast<void*>(mine->address());
  args.workspace_bytes = *bytes - 1;
  check_error(int4_mm::run(*kernel, args), Code::invalid_argument, {"workspace_bytes", "or more"});
  args.workspace_bytes = *bytes;
  CHECK(int4_mm::run(*kernel, args).is_ok());
  CHECK(seen == mine->address());
  args.workspace = nullptr;
  fake().capturing = {static_cast<cuda::CUstream>(args.stream)};
  CHECK(int4_mm::run(*kernel, args).is_ok());
  CHECK(fake().calls_of("cuMemAllocAsync") == 1);
  CHECK(fake().calls_of("cuMemFreeAsync") == 1);
  fake().capturing = {};
  CHECK(p.is_right());
}

TEST_CASE_FIXTURE(Fixture, "out of device memory, a launch that fails: a status, and the next call works") {
  const auto e = engine();
  Product p(*this, *e, 3);
  fake().bytes_left = 100;
  check_error(p.make_pack({.w = p.w.data(), .sz = p.sz.data()}), Code::out_of_memory,
              {"int4_mm: a pack", "cuMemAlloc: CUDA_ERROR_OUT_OF_MEMORY (2"});
  fake().bytes_left = std::uint64_t{1} << 32;
  const KernelRef kernel = p.kernel();
  fake().failures["cuLaunchKernel"] = {719};
  check_error(int4_mm::run(*kernel, p.args()), Code::internal, {"cuLaunchKernel: CUDA_ERROR_LAUNCH_FAILED (719"});
  CHECK(int4_mm::run(*kernel, p.args()).is_ok());
  CHECK(p.is_right());
}

TEST_CASE_FIXTURE(Fixture, "every entry point that fails gives a status, and the next try works") {
  for (const char* name :
       {"cuLinkCreate", "cuLinkAddData", "cuLinkComplete", "cuLibraryLoadData", "cuLibraryGetKernel", "cuFuncLoad",
        "cuKernelGetFunction", "cuCtxGetCurrent", "cuCtxPushCurrent", "cuCtxGetDevice", "cuStreamIsCapturing"}) {
    CAPTURE(name);
    config.cache = CacheMode::off;
    launch_plan.grid_n = ++count; // a kernel that no engine has loaded
    const auto e = engine();
    driver(); // is open
    const cuda::CUcontext context = *driver().primary_context(0);
    driver().api().cuCtxPushCurrent(context);
    cuda::CUcontext popped = nullptr;
    if (name == std::string("cuCtxPushCurrent"))
      driver().api().cuCtxPopCurrent(&popped);
    fake().failures[name] = {999};
    check_error(e->get(int4_desc()),
                name == std::string_view("cuLibraryLoadData") || name == std::string_view("cuLibraryGetKernel")
                    ? Code::unsupported
                : std::string_view(name).starts_with("cuLinkA") || std::string_view(name).starts_with("cuLinkCom")
                    ? Code::compile_failed
                    : Code::internal,
                {name, "999"});
    fake().failures.clear();
    CHECK(e->get(int4_desc()).is_ok());
    if (name != std::string("cuCtxPushCurrent"))
      driver().api().cuCtxPopCurrent(&popped);
  }
}

TEST_CASE_FIXTURE(Fixture, "a driver without libraries (CUDA 11.4): a module for each context") {
  fake().version = 11040;
  library = std::filesystem::path(kLibrary).parent_path() / "." / "." / "libcuda.so.1";
  const auto e = engine();
  const auto run_in = [&](cuda::CUcontext context) {
    driver().api().cuCtxPushCurrent(context);
    {
      Product p(*this, *e, 2);
      CHECK(int4_mm::run(*p.kernel(), p.args()).is_ok());
      CHECK(p.is_right());
    }
    cuda::CUcontext popped = nullptr;
    driver().api().cuCtxPopCurrent(&popped);
  };
  const cuda::CUcontext first = new_context(0), second = new_context(0);
  run_in(first);
  run_in(second);
  run_in(first);
  CHECK(fake().calls_of("cuModuleLoadData") == 2);
  CHECK(fake().calls_of("cuLibraryLoadData") == 0);
}

TEST_CASE_FIXTURE(Fixture, "int8_mm: packs in GPU memory, raw B, the scale stage's arguments") {
  const auto e = engine();
  KernelDesc desc = on_gpu(int8_mm::make_desc(3, 5, 20));
  desc.value[int8_mm::kCDtype] = static_cast<std::int64_t>(int8_mm::CDtype::bf16);
  check_error(check_desc(desc), Code::invalid_argument, {"c_dtype=bf16", "rescale=scale"});
  desc.value[int8_mm::kRescale] = static_cast<std::int64_t>(int8_mm::Rescale::scale);
  const Result<KernelRef> kernel = e->get(desc);
  REQUIRE_MESSAGE(kernel.is_ok(), (kernel ? "" : kernel.status().message()));
  CHECK(e->pack_layout(desc).is_ok());

  std::vector<std::int8_t> b(5 * 20);
  for (std::size_t i = 0; i < b.size(); ++i)
    b[i] = static_cast<std::int8_t>(i * 7);
  Result<int8_mm::Pack> pack =
      int8_mm::Pack::make(int8_mm::kGpuLayout, b.data(), 20, int8_mm::BLayout::nk, 5, 20, e->runtime().parallel);
  REQUIRE(pack.is_ok());
  REQUIRE(pack->move_to({DeviceKind::cuda, 0}, e->runtime()).is_ok());
  const auto buffer = [&] { return std::move(*cuda::Buffer::allocate(driver(), 0, 4096)); };
  const cuda::Buffer a = buffer(), c = buffer(), scale = buffer(), raw = buffer();
  int8_mm::GpuParameters seen{};
  fake().kernel = [&](const Launch&, void** p) {
    const auto u64 = [&](int i) { return *static_cast<std::uint64_t*>(p[i]); };
    const auto u32 = [&](int i) { return *static_cast<std::uint32_t*>(p[i]); };
    seen = {u64(0), u64(1), u64(2), u64(3), u64(4), u32(5), u32(6), u32(7), u32(8)};
  };
  int8_mm::Args args = {.m = 3,
                        .a = reinterpret_cast<const std::int8_t*>(a.address()),
                        .lda = 32,
                        .pack = &*pack,
                        .c = reinterpret_cast<void*>(c.address()),
                        .ldc = 7,
                        .values = {.scale = reinterpret_cast<const float*>(scale.address())}};
  const Status status = int8_mm::run(**kernel, args);
  REQUIRE_MESSAGE(status.is_ok(), status.message());
  CHECK(seen.a == a.address());
  CHECK(seen.scale == scale.address());
  CHECK(seen.m == 3);
  CHECK(seen.lda == 32);
  CHECK(seen.ldb == 64);
  CHECK(seen.ldc == 7);
  for (int n = 0; n < 5; ++n) // rows of K bytes, zero after them
    for (int k = 0; k < 64; ++k)
      CHECK(reinterpret_cast<const std::int8_t*>(seen.b)[n * 64 + k] ==
            (k < 20 ? b[static_cast<std::size_t>(n * 20 + k)] : 0));
  args.pack = nullptr;
  args.b = reinterpret_cast<const std::int8_t*>(raw.address());
  args.ldb = 48;
  CHECK(int8_mm::run(**kernel, args).is_ok());
  CHECK(seen.b == raw.address());
  CHECK(seen.ldb == 48);
  args.ldb = 20;
  check_error(int8_mm::run(**kernel, args), Code::invalid_argument, {"ldb is 20", "a multiple of 16"});
  args.ldb = 48;
  args.values.scale = nullptr;
  check_error(int8_mm::run(**kernel, args), Code::invalid_argument, {"scale is null", "5 floats"});
  args.values.scale = reinterpret_cast<const float*>(scale.address());
  args.b_layout = int8_mm::BLayout::kn;
  check_error(int8_mm::run(**kernel, args), Code::invalid_argument, {"b_layout is kn"});
}

TEST_CASE_FIXTURE(Fixture, "int4_mm with tensor maps: before the other parameters, of what the plan has boxes for") {
  int4_boxes =
      int4_mm::Boxes{.x = {.inner = 64, .rows = 32, .swizzle = 128}, .y = {.inner = 64, .rows = 64, .swizzle = 128}};
  launch_plan = {.tile_m = 64, .tile_n = 16, .threads = 288, .blocks_per_sm = 1};
  const auto e = engine();
  Product p(*this, *e, 70);
  const KernelRef kernel = p.kernel();
  const auto* const plan = static_cast<const int4_mm::Plan*>(kernel->plan());
  REQUIRE(plan->boxes);
  CHECK(*plan->boxes == *int4_boxes);
  fake_cuda::TensorMapContent x, y;
  fake().kernel = [&](const Launch& launch, void** parameters) {
    std::memcpy(&x, parameters[0], sizeof x);
    std::memcpy(&y, parameters[1], sizeof y);
    Int4Kernel{p.n, p.k, p.group}(launch, parameters + 2);
  };
  fake().launches.clear();
  fake().calls.clear();
  REQUIRE(int4_mm::run(*kernel, p.args()).is_ok());
  CHECK(p.is_right());
  CHECK(x.address == p.gpu_x.address());
  CHECK(x.extents[0] == 128);
  CHECK(x.extents[1] == 70);
  CHECK(x.strides[0] == 2 * 136);
  CHECK(x.box[0] == 64);
  CHECK(x.box[1] == 32);
  CHECK(y.address == p.gpu_y.address());
  CHECK(y.extents[0] == 24);
  CHECK(y.extents[1] == 70);
  CHECK(y.strides[0] == 2 * 32);
  REQUIRE(fake().launches.size() == 1);
  CHECK(fake().launches[0].grid[0] == 4); // 2 · 2 tiles, 4 SMs
  CHECK(fake().calls_of("cuTensorMapEncodeTiled") == 2);
  REQUIRE(int4_mm::run(*kernel, p.args()).is_ok());
  CHECK(fake().calls_of("cuTensorMapEncodeTiled") == 2); // kept
  fake().failures["cuTensorMapEncodeTiled"] = {1};
  int4_mm::Args fewer = p.args();
  fewer.m = 69;
  // A class has its bounds: 65 to 128.
  check_error(int4_mm::run(*kernel, fewer), Code::internal,
              {"int4_mm: cuTensorMapEncodeTiled: CUDA_ERROR_INVALID_VALUE"});
  // Without a map of Y, that parameter is zero.
  int4_boxes->y = {};
  config.cache = CacheMode::off;
  const auto other = engine();
  Product q(*this, *other, 70);
  bool zero = false;
  fake().kernel = [&](const Launch& launch, void** parameters) {
    const cuda::TensorMap none;
    zero = std::memcmp(parameters[1], &none, sizeof none) == 0;
    Int4Kernel{q.n, q.k, q.group}(launch, parameters + 2);
  };
  REQUIRE(int4_mm::run(*q.kernel(), q.args()).is_ok());
  CHECK(zero);
  CHECK(q.is_right());
}

TEST_CASE_FIXTURE(Fixture, "int8_mm with tensor maps: of A and of a raw B, up to K") {
  int8_boxes =
      int8_mm::Boxes{.a = {.inner = 128, .rows = 64, .swizzle = 128}, .b = {.inner = 128, .rows = 128, .swizzle = 128}};
  launch_plan = {.tile_m = 64, .tile_n = 128, .threads = 160, .blocks_per_sm = 1};
  const auto e = engine();
  const Result<KernelRef> kernel = e->get(on_gpu(int8_mm::make_desc(20, 24, 70), 0));
  REQUIRE(kernel.is_ok());
  const auto take = [&](std::uint64_t bytes) {
    Result<cuda::Buffer> buffer = cuda::Buffer::allocate(driver(), 0, bytes);
    REQUIRE(buffer.is_ok());
    return std::move(*buffer);
  };
  const cuda::Buffer a = take(20 * 96), b = take(24 * 80), c = take(20 * 24 * 4);
  fake_cuda::TensorMapContent a_map, b_map;
  std::uint32_t m = 0, lda = 0;
  fake().kernel = [&](const Launch&, void** parameters) {
    std::memcpy(&a_map, parameters[0], sizeof a_map);
    std::memcpy(&b_map, parameters[1], sizeof b_map);
    m = *static_cast<std::uint32_t*>(parameters[7]);
    lda = *static_cast<std::uint32_t*>(parameters[8]);
  };
  const int8_mm::Args args = {.m = 20,
                              .a = reinterpret_cast<const void*>(a.address()),
                              .lda = 96,
                              .b = reinterpret_cast<const void*>(b.address()),
                              .ldb = 80,
                              .b_layout = int8_mm::BLayout::nk,
                              .c = reinterpret_cast<void*>(c.address()),
                              .ldc = 24};
  REQUIRE(int8_mm::run(**kernel, args).is_ok());
  CHECK(m == 20);
  CHECK(lda == 96);
  CHECK(a_map.address == a.address());
  CHECK(a_map.extents[0] == 70);
  CHECK(a_map.extents[1] == 20);
  CHECK(a_map.strides[0] == 96);
  CHECK(a_map.box[1] == 64);
  CHECK(b_map.address == b.address());
  CHECK(b_map.extents[0] == 70);
  CHECK(b_map.extents[1] == 24);
  CHECK(b_map.strides[0] == 80);
  CHECK(b_map.box[1] == 128);
}

TEST_CASE("rows of one launch: what a grid or a kernel's count of tiles allows") {
  cuda::LaunchPlan plan = {.tile_m = 64, .tile_n = 128};
  CHECK(plan.most_rows(4096) == std::int64_t{65535} * 64);
  plan.blocks_per_sm = 1;
  plan.split_k = 2;
  CHECK(plan.most_rows(4096) == ((std::int64_t{1} << 31) - 1) / 2 / 32 * 64);
  plan.tile_n = 1;
  CHECK(plan.most_rows((std::int64_t{1} << 31) - 1) == 64);
}

TEST_CASE_FIXTURE(Fixture, "many threads, one kernel: compiled once, loaded once in each context") {
  const auto e = engine();
  launch_plan.grid_n = 77;
  std::vector<std::thread> threads;
  std::atomic<int> ok{0};
  driver();
  for (int i = 0; i < 8; ++i)
    threads.emplace_back([&] { ok += e->get(int4_desc(1)).is_ok(); });
  for (std::thread& thread : threads)
    thread.join();
  CHECK(ok == 8);
  CHECK(compiles == 1);
  CHECK(fake().calls_of("cuKernelGetFunction") == 1);
}

#if !defined(__SANITIZE_ADDRESS__) && !defined(__SANITIZE_THREAD__)
TEST_CASE_FIXTURE(Fixture, "a child made by fork is told that CUDA is lost to it; the parent goes on") {
  const auto e = engine();
  Product p(*this, *e, 3);
  const KernelRef kernel = p.kernel();
  const int child = exit_status_in_child([&] {
    if (e->get(int4_desc(200)).status().code() != Code::unsupported)
      return 1;
    const Status ran = int4_mm::run(*kernel, p.args());
    if (ran.code() != Code::unsupported || ran.message().find("fork") == std::string::npos)
      return 2;
    if (engine()->get(int4_desc(200)).status().message().find("fork") == std::string::npos)
      return 3;
    p.pack.reset(); // frees nothing that is not the child's
    return engine()->get(int4_mm::make_desc(1, 24, 128, 64)).is_ok() ? 0 : 4;
  });
  CHECK(child == 0);
  CHECK(int4_mm::run(*kernel, p.args()).is_ok());
  CHECK(p.is_right());
}
#endif
