#include <doctest/doctest.h>

#include <cstring>
#include <dlfcn.h>
#include <filesystem>
#include <thread>
#include <vector>

#include "backends/table.h"
#include "jit/cuda/module.h"
#include "jit/engine.h"
#include "jit/ops/fp8_block_bmm_driver.h"
#include "tests/fake_cuda/fake_cuda.h"

/// fp8_block_bmm from the desc to the launch, over a driver without a GPU (tests/fake_cuda) whose kernel is a host
/// function that sees X, Y and Z through the tensor maps it is given.

using namespace kiln;
using namespace kiln::test;
using namespace kiln::fp8_block_bmm;
using fake_cuda::TensorMapContent;

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

Plan::Gpu plan; ///< of the kernels that the row below makes

Result<CodeObject> compile(const KernelDesc& desc, const Target& target, std::string_view) {
  const std::string text = "// " + desc.text() + "\n.version 8.0\n.visible .entry main()\n";
  CodeObject code;
  code.format = CodeFormat::ptx;
  code.arch = Arch::nvptx;
  code.sm = target.sm;
  code.image.assign(text.begin(), text.end());
  code.entries = {{"main", 0}};
  code.plan = Plan{.gpu = plan}.values();
  return code;
}

Implementation gpu_row() {
  Implementation row;
  row.op = OpId::fp8_block_bmm;
  row.isa = IsaPath::wgmma;
  row.backend = BackendId::nvidia;
  row.generator = GeneratorId::ptx;
  row.generator_digest = "generator-1";
  row.device = DeviceKind::cuda;
  row.arch = Arch::nvptx;
  row.compile = compile;
  return row;
}

TensorMapContent map_at(void* parameter) {
  TensorMapContent content;
  std::memcpy(&content, parameter, sizeof content);
  return content;
}

/// The kernel `main`: every block does its tile with what its parameters say, and nothing else.
struct Kernel {
  KernelDesc desc;
  void operator()(const fake_cuda::Launch&, void** p) const {
    const auto address = [&](int i) { return *static_cast<std::uint64_t*>(p[i]); };
    const auto number = [&](int i) { return std::int64_t{*static_cast<std::uint32_t*>(p[i])}; };
    const TensorMapContent x = map_at(p[0]), y = map_at(p[1]), z = map_at(p[2]);
    const std::int64_t k = desc.value[kK], n = desc.value[kN], m = number(12);
    std::vector<std::uint8_t> x_row(static_cast<std::size_t>(k));
    for (std::int64_t b = 0; b < desc.value[kB]; ++b) {
      // Through the maps into a dense problem of one row, which the reference computes.
      for (std::int64_t i = 0; i < m; ++i) {
        for (std::int64_t q = 0; q < k; ++q)
          x_row[static_cast<std::size_t>(q)] =
              *x.at<std::uint8_t>(std::uint64_t(q), std::uint64_t(i), std::uint64_t(b));
        KernelDesc one = make_desc(1, 1, n, k, x_of(desc), y_of(desc), z_of(desc));
        Tensors t;
        t.m = 1;
        t.x = x_row.data();
        t.ldx = k;
        t.y = y.at<std::uint8_t>(0, 0, std::uint64_t(b));
        t.xs = reinterpret_cast<const float*>(address(5)) + b * std::int64_t(address(11)) + i * number(15);
        t.xs_stride_k = number(16);
        t.ys = reinterpret_cast<const float*>(address(6)) + b * blocks_of(n) * blocks_of(k);
        t.z = bytes_of(z_of(desc)) == 2 ? static_cast<void*>(z.at<std::uint16_t>(0, std::uint64_t(i), std::uint64_t(b)))
                                        : z.at<float>(0, std::uint64_t(i), std::uint64_t(b));
        t.ldz = n;
        fp8_block_bmm::reference(one, t);
      }
    }
    // Addresses and strides tell the same as the maps.
    const std::int64_t z_bytes = bytes_of(z_of(desc));
    CHECK(address(3) == x.address);
    CHECK(address(4) == y.address);
    CHECK(address(7) == z.address);
    CHECK(std::uint64_t(number(13)) == x.strides[0]);
    CHECK(std::uint64_t(number(14) * z_bytes) == z.strides[0]);
    if (desc.value[kB] > 1) {
      CHECK(address(9) == x.strides[1]);
      CHECK(address(10) * std::uint64_t(z_bytes) == z.strides[1]);
    }
    CHECK(std::int64_t(x.extents[1]) == m);
    CHECK(std::int64_t(y.extents[1]) == n);
    CHECK(std::int64_t(z.extents[0]) == n);
    CHECK(std::int64_t(y.strides[1]) == (desc.value[kB] > 1 ? n * k : k));
  }
};

struct Fixture {
  std::filesystem::path directory =
      std::filesystem::temp_directory_path() /
      ("kiln-fp8-cuda-test-" + std::to_string(::getpid()) + "-" + std::to_string(++count));
  std::vector<Implementation> rows = {gpu_row()};
  Config config;
  static inline int count = 0;

  Fixture() {
    for (const Implementation& row : implementation_table())
      if (row.device == DeviceKind::cpu)
        rows.push_back(row);
    plan = {.launch = {.tile_m = 64, .tile_n = 128, .threads = 256, .smem_bytes = 1000 + count},
            .boxes = {.x = {.inner = 128, .rows = 64, .swizzle = 128},
                      .y = {.inner = 128, .rows = 128, .swizzle = 128},
                      .z = {.inner = 16, .rows = 64, .swizzle = 0, .l2_promotion = 0}}};
    fake_cuda::State& f = fake();
    f.devices = {fake_cuda::Device(), fake_cuda::Device()};
    f.missing.clear();
    f.failures.clear();
    f.calls.clear();
    f.launches.clear();
    f.capturing.clear();
    f.capture_violations.clear();
    config.cache_dir = directory / "cache";
    config.key_dir = directory / "keys";
    config.threads = 1;
  }
  ~Fixture() {
    fake().kernel = nullptr;
    CHECK(fake().capture_violations.empty());
    CHECK(symbol<fake_cuda::CurrentFunction>("fake_cuda_current")() == nullptr);
    std::filesystem::remove_all(directory);
  }
  cuda::Driver& driver() {
    const Result<cuda::Driver*> opened = cuda::Driver::open(kLibrary);
    REQUIRE(opened.is_ok());
    return **opened;
  }
  std::unique_ptr<Engine> engine() {
    EngineOptions options;
    options.config = config;
    options.machine = detect_machine();
    options.implementations = rows;
    options.cuda_library = kLibrary;
    Result<std::unique_ptr<Engine>> made = Engine::create(std::move(options));
    REQUIRE(made.is_ok());
    return std::move(*made);
  }
};

/// A product in the fake GPU's memory, with what must come out.
struct Product {
  std::int64_t b, m, n, k;
  KernelDesc desc;
  Tensors t, on_host;
  std::vector<std::uint8_t> x, y, expected;
  std::vector<float> xs, ys;
  cuda::Buffer gpu_x, gpu_y, gpu_xs, gpu_ys, gpu_z;

  Product(Fixture& f, std::int64_t b_, std::int64_t m_, std::int64_t n_, std::int64_t k_, ZDtype z = ZDtype::bf16,
          bool interleaved = false)
      : b(b_), m(m_), n(n_), k(k_), desc(make_desc(b, m, n, k, Float8::e4m3, Float8::e5m2, z)) {
    desc.device = {DeviceKind::cuda, 0};
    const std::int64_t x_row = k + 32, z_row = n + 16, k_blocks = blocks_of(k);
    t.m = m;
    t.ldx = interleaved ? b * x_row : x_row;
    t.x_stride_b = interleaved ? x_row : m * x_row;
    t.ldz = interleaved ? b * z_row : z_row;
    t.z_stride_b = interleaved ? z_row : m * z_row;
    t.xs_stride_m = 1;
    t.xs_stride_k = m;
    t.xs_stride_b = m * k_blocks;
    std::uint32_t random = 7;
    const auto next = [&] { return random = random * 1664525 + 1013904223, random >> 16; };
    const auto filled = [&](std::int64_t size) {
      std::vector<std::uint8_t> bytes(static_cast<std::size_t>(size));
      for (auto& byte : bytes)
        byte = static_cast<std::uint8_t>(next() % 0x50 | (next() & 0x80));
      return bytes;
    };
    const auto scales = [&](std::int64_t size) {
      std::vector<float> values(static_cast<std::size_t>(size));
      for (auto& value : values)
        value = static_cast<float>(next() % 100 + 1) / 64;
      return values;
    };
    x = filled(b * m * x_row);
    y = filled(b * n * k);
    xs = scales(b * m * k_blocks);
    ys = scales(b * blocks_of(n) * k_blocks);
    expected.assign(static_cast<std::size_t>(b * m * z_row * bytes_of(z)), 0x5A);
    on_host = t;
    on_host.x = x.data();
    on_host.y = y.data();
    on_host.xs = xs.data();
    on_host.ys = ys.data();
    on_host.z = expected.data();
    const auto upload = [&](const void* data, std::size_t size) {
      Result<cuda::Buffer> buffer = cuda::Buffer::allocate(f.driver(), 0, size);
      REQUIRE(buffer.is_ok());
      REQUIRE(buffer->write(data, size).is_ok());
      return std::move(*buffer);
    };
    gpu_x = upload(x.data(), x.size());
    gpu_y = upload(y.data(), y.size());
    gpu_xs = upload(xs.data(), xs.size() * 4);
    gpu_ys = upload(ys.data(), ys.size() * 4);
    gpu_z = upload(expected.data(), expected.size());
    t.x = reinterpret_cast<const std::uint8_t*>(gpu_x.address());
    t.y = reinterpret_cast<const std::uint8_t*>(gpu_y.address());
    t.xs = reinterpret_cast<const float*>(gpu_xs.address());
    t.ys = reinterpret_cast<const float*>(gpu_ys.address());
    t.z = reinterpret_cast<void*>(gpu_z.address());
    fp8_block_bmm::reference(desc, on_host);
    fake().kernel = Kernel{desc};
  }
  KernelRef kernel(Engine& engine) const {
    Result<KernelRef> got = engine.get(desc);
    REQUIRE_MESSAGE(got.is_ok(), (got ? "" : got.status().message()));
    return std::move(*got);
  }
  bool is_right() const {
    std::vector<std::uint8_t> z(expected.size());
    REQUIRE(gpu_z.read(z.data(), z.size()).is_ok());
    return z == expected;
  }
};

void check_error(const Status& status, Code code, std::vector<std::string> says) {
  CHECK(status.code() == code);
  for (const std::string& text : says)
    CHECK_MESSAGE(status.message().find(text) != std::string::npos, status.message());
}

} // namespace

TEST_CASE_FIXTURE(Fixture, "a product on a stream: maps, addresses and strides of the parameters; nothing waits") {
  const auto e = engine();
  struct Case {
    std::int64_t b, m, n, k;
    ZDtype z;
    bool interleaved;
  };
  for (const Case& c : {Case{1, 3, 24, 144, ZDtype::bf16, false}, Case{3, 65, 136, 272, ZDtype::f16, false},
                        Case{2, 5, 128, 128, ZDtype::f32, true}, Case{1, 513, 8, 16, ZDtype::bf16, false}}) {
    CAPTURE(c.m);
    Product p(*this, c.b, c.m, c.n, c.k, c.z, c.interleaved);
    const KernelRef kernel = p.kernel(*e);
    fake().launches.clear();
    fake().calls.clear();
    const Status status = fp8_block_bmm::run(*kernel, {.tensors = p.t});
    REQUIRE_MESSAGE(status.is_ok(), status.message());
    CHECK(fake().calls_of("cuStreamSynchronize") == 0);
    CHECK(p.is_right());
    REQUIRE(fake().launches.size() == 1);
    const fake_cuda::Launch& launch = fake().launches[0];
    CHECK(launch.grid[0] == unsigned((c.n + 127) / 128));
    CHECK(launch.grid[1] == unsigned((c.m + 63) / 64));
    CHECK(launch.grid[2] == unsigned(c.b));
    CHECK(launch.threads == 256);
  }
}

TEST_CASE_FIXTURE(Fixture, "a persistent kernel: as many blocks as tiles of all batches, or as SMs; whole clusters") {
  for (const auto& [cluster, few, many] : {std::tuple{0, 3u, 4u}, {2, 4u, 4u}, {3, 3u, 3u}}) {
    CAPTURE(cluster);
    plan.launch.blocks_per_sm = 1;
    plan.launch.cluster_x = cluster;
    plan.launch.smem_bytes += 100;
    config.cache = CacheMode::off;
    const auto e = engine();
    Product p(*this, 3, 5, 24, 144), q(*this, 3, 65, 24, 144); // 3 and 6 tiles, 4 SMs
    for (const auto& [product, blocks] : {std::pair{&p, few}, {&q, many}}) {
      fake().kernel = Kernel{product->desc};
      fake().launches.clear();
      const KernelRef kernel = product->kernel(*e);
      REQUIRE(fp8_block_bmm::run(*kernel, {.tensors = product->t}).is_ok());
      REQUIRE(fake().launches.size() == 1);
      CHECK(fake().launches[0].grid[0] == blocks);
      CHECK(fake().launches[0].grid[1] == 1);
      CHECK(fake().launches[0].grid[2] == 1);
      CHECK(fake().launches[0].cluster_x == unsigned(cluster));
      CHECK(product->is_right());
    }
  }
}

TEST_CASE_FIXTURE(Fixture,
                  "maps are made once for the same tensors, anew for others, and only those the plan asks for") {
  const auto e = engine();
  Product p(*this, 2, 100, 24, 144);
  const KernelRef kernel = p.kernel(*e);
  const auto made_by = [&](const Tensors& t) {
    const int before = fake().calls_of("cuTensorMapEncodeTiled");
    REQUIRE(fp8_block_bmm::run(*kernel, {.tensors = t}).is_ok());
    return fake().calls_of("cuTensorMapEncodeTiled") - before;
  };
  CHECK(made_by(p.t) == 3);
  CHECK(p.is_right());
  CHECK(made_by(p.t) == 0);
  Tensors other = p.t;
  fake().kernel = nullptr;
  other.m = 70;
  CHECK(made_by(other) == 2); // X and Z
  other.x_stride_b += 16;
  CHECK(made_by(other) == 1);
  for (const auto& [stride_b, ldx] :
       {std::pair<std::int64_t, std::int64_t>{16, 144}, {720, 32}, {0, 144}}) { // overlapping
    other.x_stride_b = stride_b;
    other.ldx = ldx;
    TensorMapContent x;
    fake().kernel = [&](const fake_cuda::Launch&, void** parameters) { x = map_at(parameters[0]); };
    CHECK(made_by(other) == 1);
    CHECK(x.strides[0] == std::uint64_t(ldx));
    CHECK(x.strides[1] == std::uint64_t(stride_b));
  }
  fake().kernel = nullptr;
  other.xs_stride_m = 0; // no part of a map
  CHECK(made_by(other) == 0);
  other.y += 16;
  CHECK(made_by(other) == 1);
  // A kernel that stores Z without a map.
  plan.boxes.z = {};
  plan.launch.smem_bytes += 1000;
  config.cache = CacheMode::off;
  const auto another = engine();
  const KernelRef without = p.kernel(*another);
  bool z_is_zero = false;
  fake().kernel = [&](const fake_cuda::Launch&, void** parameters) {
    const cuda::TensorMap zero;
    z_is_zero = std::memcmp(parameters[2], &zero, sizeof zero) == 0;
  };
  REQUIRE(fp8_block_bmm::run(*without, {.tensors = p.t}).is_ok());
  CHECK(z_is_zero);
}

TEST_CASE_FIXTURE(Fixture, "bad arguments are refused by name, nothing is launched") {
  const auto e = engine();
  Product p(*this, 2, 5, 24, 144);
  const KernelRef kernel = p.kernel(*e);
  fake().launches.clear();
  std::vector<float> host(64);
  const auto refused = [&](auto change, const std::string& says) {
    Args args = {.tensors = p.t};
    change(args.tensors);
    check_error(fp8_block_bmm::run(*kernel, args), Code::invalid_argument, {"fp8_block_bmm: " + says});
    CHECK(fake().launches.empty());
  };
  refused([](Tensors& t) { t.ldx = 150; }, "ldx is 150: allowed is a multiple of 16 on a GPU");
  refused([](Tensors& t) { t.ldz = 44; }, "ldz is 44: allowed is a multiple of 8 on a GPU");
  refused([](Tensors& t) { t.x_stride_b += 8; }, "x_stride_b is 888: allowed is a multiple of 16");
  refused([](Tensors& t) { t.z_stride_b += 4; }, "z_stride_b is 204: allowed is a multiple of 8");
  refused([](Tensors& t) { t.x += 8; }, "x is 0x");
  refused([](Tensors& t) { t.y += 4; }, "y is 0x");
  refused([](Tensors& t) { t.z = static_cast<std::uint8_t*>(t.z) + 2; }, "z is 0x");
  refused([](Tensors& t) { t.xs = reinterpret_cast<const float*>(reinterpret_cast<const char*>(t.xs) + 2); },
          "xs is 0x");
  refused([&](Tensors& t) { t.ys = host.data(); }, "ys is no device pointer");
  refused(
      [&](Tensors& t) {
        t.x = reinterpret_cast<const std::uint8_t*>(&host) - reinterpret_cast<std::uintptr_t>(&host) % 16;
      },
      "x is no device pointer");
  refused([](Tensors& t) { t.m = 9; }, "m is 9");
  CHECK(fp8_block_bmm::run(*kernel, {.tensors = p.t}).is_ok());
  CHECK(p.is_right());
}

TEST_CASE_FIXTURE(Fixture, "an empty K zeroes Z on the stream; a captured stream captures the launch") {
  const auto e = engine();
  Product p(*this, 2, 3, 24, 0);
  const KernelRef kernel = p.kernel(*e);
  fake().launches.clear();
  fake().calls.clear();
  REQUIRE(fp8_block_bmm::run(*kernel, {.tensors = p.t}).is_ok());
  CHECK(fake().calls_of("cuMemsetD8Async") == 6);
  CHECK(fake().launches.empty());
  std::vector<std::uint8_t> z(p.expected.size());
  REQUIRE(p.gpu_z.read(z.data(), z.size()).is_ok());
  CHECK(z[0] == 0);
  CHECK(z[static_cast<std::size_t>(p.n * 2)] == 0x5A); // the padding

  Product q(*this, 1, 3, 24, 144);
  const KernelRef loaded = q.kernel(*e);
  const cuda::CUstream stream = symbol<fake_cuda::StreamFunction>("fake_cuda_stream")(*driver().primary_context(0));
  fake().capturing.insert(stream);
  CHECK(fp8_block_bmm::run(*loaded, {.tensors = q.t, .stream = stream}).is_ok());
  REQUIRE(fake().launches.size() == 1);
  CHECK(fake().launches[0].captured);
  CHECK(fake().calls_of("cuMemAlloc") + fake().calls_of("cuMemAllocAsync") == 5); // the product's own
  fake().capturing.clear();
}

TEST_CASE_FIXTURE(Fixture, "what the driver refuses is a status, and the next call works") {
  const auto e = engine();
  Product p(*this, 1, 3, 24, 144);
  const KernelRef kernel = p.kernel(*e);
  fake().failures["cuTensorMapEncodeTiled"] = {1};
  check_error(fp8_block_bmm::run(*kernel, {.tensors = p.t}), Code::internal,
              {"fp8_block_bmm: cuTensorMapEncodeTiled: CUDA_ERROR_INVALID_VALUE (1"});
  CHECK(fp8_block_bmm::run(*kernel, {.tensors = p.t}).is_ok());
  CHECK(p.is_right());
}

TEST_CASE_FIXTURE(Fixture, "a call of more rows than a grid has blocks goes in parts") {
  plan.launch.tile_m = 1;
  plan.launch.smem_bytes += 5000;
  const auto e = engine();
  const std::int64_t m = 65535 + 2;
  Product p(*this, 1, m, 8, 16);
  const KernelRef kernel = p.kernel(*e);
  fake().launches.clear();
  REQUIRE(fp8_block_bmm::run(*kernel, {.tensors = p.t}).is_ok());
  REQUIRE(fake().launches.size() == 2);
  CHECK(fake().launches[0].grid[1] == 65535);
  CHECK(fake().launches[1].grid[1] == 2);
  CHECK(p.is_right());
}

TEST_CASE_FIXTURE(Fixture, "many threads with more tensors than the cache has room for: every map is its own") {
  cuda::Driver& d = driver();
  cuda::TensorMapCache cache;
  const cuda::TensorBox box = {.inner = 128, .rows = 64, .swizzle = 128};
  constexpr int kThreads = 4, kViews = 5000, kRounds = 3;
  const auto view_of = [](int i) {
    return cuda::TensorView{.address = 4096 + 16 * std::uint64_t(i),
                            .extents = {128, 1 + std::uint64_t(i) % 7, 2},
                            .strides = {128, 128 * 16 + 16 * (std::uint64_t(i) % 5)}};
  };
  std::atomic<int> wrong{0};
  std::vector<std::thread> threads;
  for (int thread = 0; thread < kThreads; ++thread)
    threads.emplace_back([&, thread] {
      const Result<cuda::ContextScope> scope = cuda::ContextScope::enter(d, 0, nullptr);
      for (int round = 0; round < kRounds; ++round)
        for (int j = 0; j < kViews; ++j) {
          const int i = j % 3 == 0 ? j % 40 : (j * 37 + thread * 11) % kViews; // some often, all now and then
          const cuda::TensorView view = view_of(i);
          cuda::TensorMap map;
          const bool ok = cache.get(d, view, box, map).is_ok();
          const TensorMapContent content = map_at(&map);
          wrong += !ok || content.address != view.address || content.extents[1] != view.extents[1] ||
                   content.strides[1] != view.strides[1] || content.box[1] != 64 || content.swizzle != 3 ||
                   content.l2_promotion != 3;
        }
    });
  for (std::thread& thread : threads)
    thread.join();
  CHECK(wrong == 0);
  CHECK(fake().calls_of("cuTensorMapEncodeTiled") < kThreads * kViews * kRounds); // some were found
  // Alone, what fits stays.
  const Result<cuda::ContextScope> scope = cuda::ContextScope::enter(d, 0, nullptr);
  REQUIRE(scope.is_ok());
  cuda::TensorMap map;
  cuda::TensorMapCache fresh;
  for (int round = 0; round < 2; ++round) {
    fake().calls.clear();
    for (int i = 0; i < 200; ++i)
      REQUIRE(fresh.get(d, view_of(i), box, map).is_ok());
    CHECK(fake().calls_of("cuTensorMapEncodeTiled") == (round == 0 ? 200 : 0));
  }
}
