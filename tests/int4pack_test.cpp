#include <doctest/doctest.h>

#include <cstring>
#include <dlfcn.h>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include <kiln_int4pack_adapter.hpp>

#include "jit/ops/int4_mm.h"
#include "jit/ops/int4_mm_fragments.h"
#include "tests/fake_cuda/fake_cuda.h"

/// A runtime of compiled PyTorch models in small: its tensors, its errors, and the operator's symbol, which the adapter
/// defines. Finds the fake libcuda.so.1 as any program finds the real one (LD_LIBRARY_PATH).

namespace {

using kiln::test::fake_cuda::Launch;

struct RuntimeTensor {
  void* data = nullptr;
  int dtype = 0; ///< of the runtime's own numbers
  bool cuda = true;
  int device = 0;
  std::vector<int> sizes, strides;
};
constexpr int kBfloat16 = 15, kInt32 = 3, kFloat = 6;

struct RuntimeError {
  int code; ///< 0, 18 (of the caller), 1 (internal)
  std::string message;
};

kiln::test::fake_cuda::State& fake() {
  static auto& state = *[] {
    void* const library = dlopen("libcuda.so.1", RTLD_NOW);
    REQUIRE(library != nullptr);
    const auto find = reinterpret_cast<kiln::test::fake_cuda::StateFunction>(dlsym(library, "fake_cuda_state"));
    REQUIRE_MESSAGE((find != nullptr), "libcuda.so.1 is not the fake one");
    return find();
  }();
  return state;
}

int outputs_alive = 0;
bool out_of_memory = false;
kiln::cuda::CUstream stream = nullptr;
kiln_int4pack_weights* model_weights = nullptr;

/// Memory of the fake GPU, in the primary context of device 0.
void* gpu_memory(std::size_t bytes) {
  const auto find = [](const char* name) { return dlsym(dlopen("libcuda.so.1", RTLD_NOW), name); };
  const auto get =
      reinterpret_cast<kiln::cuda::CUresult (*)(const char*, void**, int, std::uint64_t)>(find("cuGetProcAddress"));
  const auto entry = [&](const char* name) {
    void* function = nullptr;
    get(name, &function, 12000, 1);
    return function;
  };
  reinterpret_cast<int (*)(unsigned)>(entry("cuInit"))(0);
  kiln::cuda::CUcontext context = nullptr;
  reinterpret_cast<int (*)(kiln::cuda::CUcontext*, int)>(entry("cuDevicePrimaryCtxRetain"))(&context, 0);
  reinterpret_cast<int (*)(kiln::cuda::CUcontext)>(entry("cuCtxPushCurrent"))(context);
  kiln::cuda::CUdeviceptr address = 0;
  const int mode = std::exchange(fake().capture_mode, kiln::cuda::CU_STREAM_CAPTURE_MODE_RELAXED); // as a runtime does
  reinterpret_cast<int (*)(kiln::cuda::CUdeviceptr*, std::size_t)>(entry("cuMemAlloc"))(&address, bytes);
  fake().capture_mode = mode;
  reinterpret_cast<int (*)(kiln::cuda::CUcontext*)>(entry("cuCtxPopCurrent"))(&context);
  static auto& kept = *new std::vector<std::uint64_t>; // for the life of the process, as a runtime's pool
  kept.push_back(address);
  if (stream == nullptr)
    stream = reinterpret_cast<kiln::test::fake_cuda::StreamFunction>(find("fake_cuda_stream"))(context);
  return reinterpret_cast<void*>(address);
}

struct Traits {
  using Tensor = RuntimeTensor*;
  using Error = RuntimeError;
  static bool is_null(Tensor t) { return t == nullptr; }
  static void* data(Tensor t) { return t->data; }
  static std::int32_t dtype(Tensor t) { return t->dtype == kBfloat16 ? KILN_BF16 : t->dtype == kInt32 ? KILN_S32 : -1; }
  static bool on_cuda(Tensor t) { return t->cuda; }
  static std::int32_t device_index(Tensor t) { return t->device; }
  static std::int32_t rank(Tensor t) { return static_cast<std::int32_t>(t->sizes.size()); }
  static std::int64_t size(Tensor t, std::int32_t i) { return t->sizes[static_cast<std::size_t>(i)]; }
  static std::int64_t stride(Tensor t, std::int32_t i) { return t->strides[static_cast<std::size_t>(i)]; }
  static Tensor allocate_bf16(std::int64_t rows, std::int64_t columns, std::int32_t device) {
    if (out_of_memory)
      return nullptr;
    ++outputs_alive;
    const int n = static_cast<int>(columns);
    return new RuntimeTensor{gpu_memory(static_cast<std::size_t>(rows * columns * 2) + 1),
                             kBfloat16,
                             true,
                             device,
                             {static_cast<int>(rows), n},
                             {n, 1}};
  }
  static void release(Tensor t) {
    --outputs_alive;
    delete t;
  }
  static void* current_stream(std::int32_t) { return stream; }
  static kiln_engine* engine() {
    static kiln_engine* const engine = [] {
      kiln_engine_options options = KILN_ENGINE_OPTIONS_INIT;
      options.cache_mode = "off";
      kiln_engine* made = nullptr;
      REQUIRE(kiln_engine_create(&options, &made) == KILN_OK);
      return made;
    }();
    return engine;
  }
  static kiln_int4pack_weights* weights() { return model_weights; }
  static Error success() { return {0, ""}; }
  static Error failure(kiln_status status, const char* message) {
    return {status == KILN_INVALID_ARGUMENT ? 18 : 1, message};
  }
};

} // namespace

KILN_DEFINE_WEIGHT_INT4PACK_MM(Traits)

namespace {

/// The tensors of a good call.
struct Call {
  static constexpr int m = 5, n = 48, k = 256, group = 64, tiles = 4;
  std::vector<std::uint8_t> plain = std::vector<std::uint8_t>(n * k / 2);
  std::vector<std::uint16_t> sz_bits = std::vector<std::uint16_t>(k / group * n * 2);
  RuntimeTensor self{gpu_memory(m * k * 2), kBfloat16, true, 0, {m, k}, {k, 1}};
  RuntimeTensor mat2{gpu_memory(n * k / 2), kInt32, true, 0, {n / 8, k / (16 * tiles), 32, tiles / 2}, {}};
  RuntimeTensor sz{gpu_memory(k / group * n * 4), kBfloat16, true, 0, {k / group, n, 2}, {n * 2, 2, 1}};
  std::int64_t group_size = group;
  RuntimeTensor* output = nullptr;

  Call() {
    mat2.strides = {k / (16 * tiles) * 32 * tiles / 2, 32 * tiles / 2, tiles / 2, 1};
    for (std::size_t i = 0; i < plain.size(); ++i)
      plain[i] = static_cast<std::uint8_t>(i * 41 + i / 128);
    for (std::size_t i = 0; i < sz_bits.size(); ++i)
      sz_bits[i] = static_cast<std::uint16_t>(0x3F00 + i);
    kiln::int4_mm::plain_to_tensor_core(plain.data(), n, k, tiles, static_cast<std::int32_t*>(mat2.data));
    std::memcpy(sz.data, sz_bits.data(), sz_bits.size() * 2);
  }
  RuntimeError operator()() { return aoti_torch_cuda__weight_int4pack_mm(&self, &mat2, group_size, &sz, &output); }
  ~Call() {
    if (output != nullptr)
      Traits::release(output);
    CHECK(outputs_alive == 0);
  }
};

template <class Change> void refused(int code, const std::string& says, Change change) {
  Call call;
  change(call);
  const std::size_t launches = fake().launches.size();
  const RuntimeError error = call();
  CHECK(error.code == code);
  CHECK_MESSAGE(error.message.find(says) != std::string::npos, error.message);
  CHECK(call.output == nullptr);
  CHECK(fake().launches.size() == launches);
}

} // namespace

TEST_CASE(
    "a product: the kernel sees the runtime's tensors, Kiln's pack of the weights, and an output of the runtime's") {
  Call call;
  kiln::int4_mm::GpuParameters seen{};
  fake().launches.clear();
  fake().kernel = [&](const Launch&, void** p) {
    const auto u64 = [&](int i) { return *static_cast<std::uint64_t*>(p[i]); };
    const auto u32 = [&](int i) { return *static_cast<std::uint32_t*>(p[i]); };
    seen = {u64(0), u64(1), u64(2), u64(3), u64(4), u32(5), u32(6), u32(7)};
    // The pack is that of the plain weights, whichever layout the kernel reads.
    const auto* const layout = kiln::int4_mm::find_pack_layout(kiln::int4_mm::FragmentLayout::kId);
    REQUIRE(layout != nullptr);
    std::vector<std::uint8_t> w(static_cast<std::size_t>(layout->w_bytes(call.n, call.k)));
    std::vector<std::uint8_t> sz(static_cast<std::size_t>(layout->sz_bytes(call.n, call.k, call.group)));
    layout->pack(call.plain.data(), call.sz_bits.data(), call.n, call.k, call.group, 0, call.n, w.data(), sz.data());
    CHECK(std::memcmp(reinterpret_cast<void*>(seen.w), w.data(), w.size()) == 0);
    CHECK(std::memcmp(reinterpret_cast<void*>(seen.sz), sz.data(), sz.size()) == 0);
    std::memset(reinterpret_cast<void*>(seen.y), 0x42, call.m * call.n * 2);
  };
  const RuntimeError error = call();
  CHECK_MESSAGE(error.code == 0, error.message);
  REQUIRE(call.output != nullptr);
  CHECK(call.output->sizes == std::vector<int>{call.m, call.n});
  CHECK(seen.x == reinterpret_cast<std::uintptr_t>(call.self.data));
  CHECK(seen.y == reinterpret_cast<std::uintptr_t>(call.output->data));
  CHECK(seen.m == call.m);
  CHECK(seen.ldx == call.k);
  CHECK(seen.ldy == call.n);
  CHECK(static_cast<std::uint8_t*>(call.output->data)[call.m * call.n * 2 - 1] == 0x42);
  REQUIRE(fake().launches.size() == 1);
  CHECK(fake().launches[0].stream == stream);
  fake().kernel = nullptr;
}

TEST_CASE("a model's weights are packed once; without a model, for each call") {
  REQUIRE(kiln_int4pack_weights_create(&model_weights) == KILN_OK);
  {
    Call call, other;
    CHECK(call().code == 0);
    const int copies = fake().calls_of("cuMemcpyHtoDAsync");
    Traits::release(std::exchange(call.output, nullptr));
    CHECK(call().code == 0);
    CHECK(fake().calls_of("cuMemcpyHtoDAsync") == copies);
    CHECK(other().code == 0);
    CHECK(fake().calls_of("cuMemcpyHtoDAsync") == copies + 1);
    fake().capturing = {stream}; // all is there: it goes into the graph
    Traits::release(std::exchange(call.output, nullptr));
    CHECK(call().code == 0);
    Call third; // is not packed
    const RuntimeError error = third();
    CHECK(error.code == 1);
    CHECK(error.message.find("captured") != std::string::npos);
    fake().capturing = {};
    CHECK(fake().capture_violations.empty());
    Traits::release(std::exchange(call.output, nullptr));
    Traits::release(std::exchange(other.output, nullptr));
  }
  kiln_int4pack_weights_destroy(std::exchange(model_weights, nullptr));
  Call call;
  CHECK(call().code == 0);
  const int copies = fake().calls_of("cuMemcpyHtoDAsync");
  Traits::release(std::exchange(call.output, nullptr));
  CHECK(call().code == 0);
  CHECK(fake().calls_of("cuMemcpyHtoDAsync") == copies + 1);
}

TEST_CASE("what the operator refuses, each by name") {
  refused(18, "self's dtype", [](Call& c) { c.self.dtype = kFloat; });
  refused(18, "mat2's dtype", [](Call& c) { c.mat2.dtype = kBfloat16; });
  refused(18, "qScaleAndZeros's dtype", [](Call& c) { c.sz.dtype = kFloat; });
  refused(18, "self's rank is 1", [](Call& c) { c.self.sizes = {c.k}, c.self.strides = {1}; });
  refused(18, "self's rank is 9", [](Call& c) { c.self.sizes.assign(9, 1), c.self.strides.assign(9, 1); });
  refused(18, "mat2's rank is 2", [](Call& c) { c.mat2.sizes = {c.n, c.k / 8}, c.mat2.strides = {c.k / 8, 1}; });
  refused(18, "qScaleAndZeros's rank", [](Call& c) { c.sz.sizes = {c.n, 2}, c.sz.strides = {2, 1}; });
  refused(18, "self's device is cpu", [](Call& c) { c.self.cuda = false; });
  refused(18, "mat2's device is cpu", [](Call& c) { c.mat2.cuda = false; });
  refused(18, "mat2's device is cuda:1", [](Call& c) { c.mat2.device = 1; });
  refused(18, "self's stride 1 is 2", [](Call& c) { c.self.strides[1] = 2; });
  refused(18, "self's stride 0 is 260", [](Call& c) { c.self.strides[0] = 260; });
  refused(18, "mat2's stride 0", [](Call& c) { ++c.mat2.strides[0]; });
  refused(18, "qScaleAndZeros's stride 0", [](Call& c) { ++c.sz.strides[0]; });
  refused(18, "qGroupSize is 48: allowed is 32, 64, 128 or 256", [](Call& c) { c.group_size = 48; });
  refused(18, "qScaleAndZeros' shape", [](Call& c) { c.group_size = 128; });
  refused(18, "qGroupSize is 256: allowed is a divisor of K = 320", [](Call& c) {
    c.self.sizes[1] = c.self.strides[0] = 320;
    c.group_size = 256;
  });
  refused(18, "mat2's shape is [6, 4, 32, 2]: allowed is weights of K = 192",
          [](Call& c) { c.self.sizes[1] = c.self.strides[0] = 192; });
  refused(18, "T 2, 4 or 8", [](Call& c) { c.mat2.sizes = {6, 4, 16, 4}, c.mat2.strides = {256, 64, 4, 1}; });
  refused(18, "mat2's data is null", [](Call& c) { c.mat2.data = nullptr; });
  std::vector<std::uint16_t> host(Call::m * Call::k + 8);
  refused(18, "x is no device pointer", [&](Call& c) {
    c.self.data = reinterpret_cast<void*>((reinterpret_cast<std::uintptr_t>(host.data()) + 15) / 16 * 16);
  });
  refused(18, "aligned to 16 bytes", [](Call& c) { c.self.data = static_cast<char*>(c.self.data) + 2; });
  Call call;
  CHECK(aoti_torch_cuda__weight_int4pack_mm(nullptr, &call.mat2, 64, &call.sz, &call.output)
            .message.find("self is null") != std::string::npos);
  const RuntimeError error = aoti_torch_cuda__weight_int4pack_mm(&call.self, &call.mat2, 64, &call.sz, nullptr);
  CHECK(error.code == 18);
  CHECK(error.message.find("the output is null") != std::string::npos);
}

TEST_CASE("a launch that fails is an internal error and gives the output back; so is a runtime without memory") {
  Call call;
  fake().failures["cuLaunchKernel"] = {719};
  fake().failures["cuLaunchKernelEx"] = {719};
  const RuntimeError error = call();
  fake().failures.clear();
  CHECK(error.code == 1);
  CHECK(error.message.find("CUDA_ERROR_LAUNCH_FAILED") != std::string::npos);
  CHECK(call.output == nullptr);
  out_of_memory = true;
  CHECK(call().code == 1);
  out_of_memory = false;
  CHECK(call().code == 0);
}
