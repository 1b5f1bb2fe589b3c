#include <doctest/doctest.h>

#include <dlfcn.h>
#include <filesystem>
#include <memory>
#include <string>
#include <unistd.h>

#include "api/kiln.h"
#include "tests/fake_cuda/fake_cuda.h"

/// kiln_tune through the C API, with this library's own kernels on a driver without a GPU: what it counts, keeps and
/// leaves. Which configuration wins is for tuning_test.

namespace {

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

struct Fixture {
  const std::string directory = (std::filesystem::temp_directory_path() /
                                 ("kiln-c-tune-test-" + std::to_string(getpid()) + "-" + std::to_string(++count)))
                                    .string();
  static inline int count = 0;

  Fixture() {
    setenv("XDG_DATA_HOME", directory.c_str(), 1); // the keys that sign rows
    setenv("HOME", directory.c_str(), 1);
    fake().kernel = nullptr;
    fake().calls.clear();
  }
  ~Fixture() { std::filesystem::remove_all(directory); }
  Fixture(const Fixture&) = delete;
  Fixture& operator=(const Fixture&) = delete;

  using Engine = std::unique_ptr<kiln_engine, decltype(&kiln_engine_destroy)>;
  Engine engine(const char* mode = "rw") const {
    const std::string cache = directory + "/cache";
    kiln_engine_options options = KILN_ENGINE_OPTIONS_INIT;
    options.cache_dir = cache.c_str();
    options.cache_mode = mode;
    options.threads = 1;
    kiln_engine* made = nullptr;
    REQUIRE_MESSAGE(kiln_engine_create(&options, &made) == KILN_OK, kiln_last_error());
    return {made, &kiln_engine_destroy};
  }
  static kiln_fp8_block_bmm_desc fp8(int64_t m, int64_t n) {
    kiln_fp8_block_bmm_desc desc = KILN_FP8_BLOCK_BMM_DESC_INIT;
    desc.base.device = KILN_DEVICE_CUDA;
    desc.b = 1;
    desc.m = m;
    desc.n = n;
    desc.k = 512;
    return desc;
  }
  /// By an engine of its own: what a later process gets.
  std::string tuned_for(const kiln_fp8_block_bmm_desc& desc) const {
    const Engine e = engine();
    kiln_kernel* kernel = nullptr;
    REQUIRE_MESSAGE(kiln_get(e.get(), &desc.base, &kernel) == KILN_OK, kiln_last_error());
    kiln_kernel_info info = KILN_KERNEL_INFO_INIT;
    CHECK(kiln_kernel_get_info(kernel, &info) == KILN_OK);
    CHECK(info.configuration != std::string());
    std::string name = info.tuned_for;
    kiln_kernel_release(kernel);
    return name;
  }
};

} // namespace

TEST_CASE_FIXTURE(Fixture, "what is tuned is counted and kept for the GPU's name; what has one configuration is left") {
  const kiln_fp8_block_bmm_desc one = fp8(5, 136), same_kernel = fp8(6, 136), other = fp8(64, 256);
  kiln_int8_mm_desc on_cpu = KILN_INT8_MM_DESC_INIT;
  on_cpu.m = 3;
  on_cpu.n = 16;
  on_cpu.k = 32;
  const kiln_desc* const list[] = {&one.base, &on_cpu.base, &other.base, &same_kernel.base};
  CHECK(tuned_for(one) == "");
  const Engine e = engine();
  kiln_tune_result result = KILN_TUNE_RESULT_INIT;
  REQUIRE_MESSAGE(kiln_tune(e.get(), list, 4, &result) == KILN_OK, kiln_last_error());
  CHECK(result.tuned == 2);
  CHECK(result.without == 1);
  CHECK(result.failed == 0);
  CHECK(result.size == sizeof result);
  CHECK(fake().calls_of("cuEventElapsedTime") > 0);
  for (const kiln_fp8_block_bmm_desc& desc : {one, same_kernel, other})
    CHECK(tuned_for(desc) == "Fake H100");
  CHECK(kiln_tune(e.get(), list, 1, nullptr) == KILN_OK); // no result wanted
  CHECK(kiln_tune(e.get(), nullptr, 0, &result) == KILN_OK);
  CHECK(result.tuned + result.without + result.failed == 0);
}

TEST_CASE_FIXTURE(Fixture, "a failure is counted and told, and the others are tuned") {
  kiln_fp8_block_bmm_desc bad = fp8(5, 136);
  bad.base.device_index = 9;
  const kiln_fp8_block_bmm_desc good = fp8(5, 264);
  const kiln_desc* const list[] = {&bad.base, &good.base};
  const Engine e = engine();
  kiln_tune_result result = KILN_TUNE_RESULT_INIT;
  CHECK(kiln_tune(e.get(), list, 2, &result) == KILN_UNSUPPORTED);
  CHECK_MESSAGE(std::string(kiln_last_error()).find("cuda:9") != std::string::npos, kiln_last_error());
  CHECK(result.tuned == 1);
  CHECK(result.failed == 1);
  CHECK(tuned_for(good) == "Fake H100");
}

TEST_CASE_FIXTURE(Fixture, "nothing is timed where nothing could be kept, or told") {
  const kiln_fp8_block_bmm_desc desc = fp8(5, 136);
  const kiln_desc* const list[] = {&desc.base};
  for (const char* mode : {"ro", "off"}) {
    CAPTURE(mode);
    const Engine e = engine(mode);
    kiln_tune_result result = KILN_TUNE_RESULT_INIT;
    CHECK(kiln_tune(e.get(), list, 1, &result) == KILN_UNSUPPORTED);
    CHECK(result.tuned == 0);
    CHECK(result.failed == 1);
  }
  const Engine e = engine();
  kiln_tune_result result = {4, 0, 0, 0};
  CHECK(kiln_tune(e.get(), list, 1, &result) == KILN_INVALID_ARGUMENT);
  CHECK_MESSAGE(std::string(kiln_last_error()).find("result.size is 4") != std::string::npos, kiln_last_error());
  CHECK(fake().calls_of("cuLaunchKernel") + fake().calls_of("cuLaunchKernelEx") == 0);
}
