#include <doctest/doctest.h>

#include <dlfcn.h>
#include <filesystem>
#include <vector>

#include "jit/engine.h"
#include "jit/kernel_key.h"
#include "jit/ops/fp8_block_bmm_driver.h"
#include "tests/fake_cuda/fake_cuda.h"

/// Engine::tune over a driver without a GPU, whose kernels take as long as a test says: which configuration is kept,
/// and what later engines make of it.

using namespace kiln;
using namespace kiln::test;

namespace {

constexpr const char* kLibrary = KILN_FAKE_CUDA; // path, by the build

fake_cuda::State& fake() {
  static fake_cuda::State& state = [&]() -> fake_cuda::State& {
    void* const library = dlopen(kLibrary, RTLD_NOW | RTLD_LOCAL);
    REQUIRE(library != nullptr);
    fake_cuda::State& s = *reinterpret_cast<fake_cuda::StateFunction>(dlsym(library, "fake_cuda_state"))();
    s.devices = {fake_cuda::Device(), fake_cuda::Device{.name = "Another GPU"}};
    return s;
  }();
  return state;
}

/// What the row below offers: a name, and the threads by which the fake kernel tells them apart.
struct Configuration {
  std::string name;
  int threads;
  bool compiles = true;
};
std::vector<Configuration> offered;
std::vector<std::string> compiled; ///< configurations, in order

Result<CodeObject> compile_configured(const KernelDesc& desc, const Target& target, std::string_view,
                                      std::string_view configuration) {
  compiled.emplace_back(configuration);
  for (const Configuration& c : offered)
    if (c.name == configuration) {
      if (!c.compiles)
        return Status::error(Code::compile_failed, "no registers left");
      const std::string text = "// " + desc.text() + " " + c.name + "\n.visible .entry main()\n";
      CodeObject code;
      code.format = CodeFormat::ptx;
      code.arch = Arch::nvptx;
      code.sm = target.sm;
      code.image.assign(text.begin(), text.end());
      code.entries = {{"main", 0}};
      code.configuration = c.name;
      code.plan =
          fp8_block_bmm::Plan{.gpu = fp8_block_bmm::Plan::Gpu{.launch = {.threads = c.threads}, .boxes = {}}}.values();
      return code;
    }
  return Status::error(Code::invalid_argument, "unknown configuration");
}
std::vector<std::string> configurations(const KernelDesc&, const Target&) {
  std::vector<std::string> names;
  for (const Configuration& c : offered)
    names.push_back(c.name);
  return names;
}
Result<CodeObject> compile(const KernelDesc& desc, const Target& target, std::string_view layout) {
  return compile_configured(desc, target, layout, offered.front().name);
}

struct Fixture {
  std::filesystem::path directory = std::filesystem::temp_directory_path() /
                                    ("kiln-tuning-test-" + std::to_string(::getpid()) + "-" + std::to_string(++count));
  Implementation row;
  std::vector<std::string> logged;
  Config config;
  std::map<int, double> us_of_threads = {{32, 90}, {64, 50}, {96, 70}};
  static inline int count = 0;

  Fixture() {
    row.op = OpId::fp8_block_bmm;
    row.isa = IsaPath::wgmma;
    row.backend = BackendId::nvidia;
    row.generator = GeneratorId::ptx;
    row.generator_digest = "generator-1";
    row.device = DeviceKind::cuda;
    row.arch = Arch::nvptx;
    row.compile = compile;
    row.configurations = configurations;
    row.compile_configured = compile_configured;
    offered = {{"slow", 32}, {"fast", 64}, {"middling", 96}};
    compiled.clear();
    fake_cuda::State& f = fake();
    f.failures.clear();
    f.calls.clear();
    f.launches.clear();
    f.kernel = [this](const fake_cuda::Launch& launch, void**) {
      fake().clock_us += us_of_threads.at(static_cast<int>(launch.threads));
    };
    config.cache_dir = directory / "cache";
    config.key_dir = directory / "keys";
    config.threads = 1;
  }
  ~Fixture() {
    fake().kernel = nullptr;
    std::filesystem::remove_all(directory);
  }
  std::unique_ptr<Engine> engine() {
    EngineOptions options;
    options.config = config;
    options.machine = detect_machine();
    options.implementations = {&row, 1};
    options.cuda_library = kLibrary;
    options.log_context = this;
    options.log_sink = [](void* self, LogLevel, const char* message) {
      static_cast<Fixture*>(self)->logged.emplace_back(message);
    };
    Result<std::unique_ptr<Engine>> made = Engine::create(std::move(options));
    REQUIRE(made.is_ok());
    return std::move(*made);
  }
  static KernelDesc desc(std::int64_t m = 5, std::uint8_t device = 0, bool batch_invariant = false) {
    using namespace fp8_block_bmm;
    KernelDesc d = make_desc(2, m, 24, 144, Float8::e4m3, Float8::e4m3, ZDtype::bf16, batch_invariant);
    d.device = {DeviceKind::cuda, device};
    return d;
  }
  Engine::Tuned tuned(Engine& e, const KernelDesc& d) {
    Result<Engine::Tuned> result = e.tune(d);
    REQUIRE_MESSAGE(result.is_ok(), (result ? "" : result.status().message()));
    return std::move(*result);
  }
  /// By an engine of its own: what a later process gets.
  std::string configuration_got(const KernelDesc& d, std::string* tuned_for = nullptr, Source* source = nullptr) {
    const auto e = engine();
    const Result<KernelRef> kernel = e->get(d);
    REQUIRE_MESSAGE(kernel.is_ok(), (kernel ? "" : kernel.status().message()));
    if (tuned_for != nullptr)
      *tuned_for = (*kernel)->code().tuned_for;
    if (source != nullptr)
      *source = (*kernel)->source;
    return (*kernel)->code().configuration;
  }
};

void check_error(const Status& status, Code code, const std::string& says) {
  CHECK(status.code() == code);
  CHECK_MESSAGE(status.message().find(says) != std::string::npos, status.message());
}

} // namespace

TEST_CASE_FIXTURE(Fixture, "the fastest configuration is kept, and later engines get it without timing or compiling") {
  CHECK(configuration_got(desc()) == "slow"); // the heuristic's
  {
    const auto e = engine();
    const Explanation before = e->explain(desc(), nullptr);
    CHECK(before.configuration == "slow");
    CHECK(before.tuned_for.empty());
    CHECK(before.tier == "disk");
    const Engine::Tuned result = tuned(*e, desc());
    REQUIRE(result.candidates.size() == 3);
    CHECK(result.candidates[result.fastest].configuration == "fast");
    CHECK(result.candidates[0].us == doctest::Approx(90));
    CHECK(result.candidates[1].us == doctest::Approx(50));
    CHECK(result.candidates[2].us == doctest::Approx(70));
    CHECK(result.device == "Fake H100");
  }
  compiled.clear();
  fake().calls.clear();
  std::string tuned_for;
  Source source{};
  CHECK(configuration_got(desc(), &tuned_for, &source) == "fast");
  CHECK(tuned_for == "Fake H100");
  CHECK(source == Source::disk);
  CHECK(compiled.empty());
  CHECK(fake().calls_of("cuEventRecord") == 0);
  CHECK(fake().calls_of("cuLinkCreate") == 0);

  const auto e = engine();
  const Explanation after = e->explain(desc(), nullptr);
  CHECK(after.configuration == "fast");
  CHECK(after.tuned_for == "Fake H100");
  CHECK(after.tier == "disk");
  CHECK(after.key_text.find("tuning=Fake H100\n") != std::string::npos);
  const Result<Engine::Warmed> warmed = e->warmup(desc(), nullptr);
  REQUIRE(warmed.is_ok());
  CHECK(*warmed == Engine::Warmed::hit);
  const Result<Engine::Made> made = e->code(desc(), nullptr); // the PTX of the tuned one
  REQUIRE(made.is_ok());
  CHECK(made->code.configuration == "fast");
  CHECK(made->key == after.key);
  CHECK(e->explain(desc(100), nullptr).configuration == "slow"); // another class of m
  CHECK(e->stats().store.misses == 0);
}

TEST_CASE_FIXTURE(Fixture, "both rows are what they say: verified, and each the key of its texts") {
  const auto e = engine();
  REQUIRE(e->get(desc()).is_ok());
  tuned(*e, desc());
  const Result<std::vector<Store::Listed>> rows = e->store()->list();
  REQUIRE(rows.is_ok());
  REQUIRE(rows->size() == 2);
  int with_tuning = 0;
  for (const Store::Listed& listed : *rows) {
    const Result<StoreRow> row = e->store()->look(listed.row.key);
    REQUIRE(row.is_ok());
    const Status status = check_row(*row);
    CHECK_MESSAGE(status.is_ok(), status.message());
    const Result<KeyFields> fields = key_fields_of(*row);
    REQUIRE(fields.is_ok());
    with_tuning += fields->tuning == "Fake H100";
    const Result<CodeObject> code = CodeObject::parse(row->code);
    REQUIRE(code.is_ok());
    CHECK(code->serialise() == row->code);
  }
  CHECK(with_tuning == 1);
}

TEST_CASE_FIXTURE(Fixture, "the heuristic's own choice stays where nothing is faster by more than noise") {
  us_of_threads = {{32, 50.4}, {64, 50}, {96, 70}};
  const auto e = engine();
  CHECK(tuned(*e, desc()).fastest == 0);
  std::string tuned_for;
  CHECK(configuration_got(desc(), &tuned_for) == "slow");
  CHECK(tuned_for == "Fake H100"); // it has been timed
  us_of_threads[32] = 51;
  CHECK(tuned(*e, desc()).fastest == 1); // tuned anew: the later result holds
  CHECK(configuration_got(desc()) == "fast");
}

TEST_CASE_FIXTURE(
    Fixture, "a kernel in memory stays; results of a tuned one come from one configuration for every m of a class") {
  const auto e = engine();
  const Result<KernelRef> held = e->get(desc());
  REQUIRE(held.is_ok());
  tuned(*e, desc());
  const Result<KernelRef> again = e->get(desc());
  REQUIRE(again.is_ok());
  CHECK(&**held == &**again);
  tuned(*e, desc(64, 0, true)); // batch_invariant: one kernel, tile and K split for every m
  for (const std::int64_t m : {1, 7, 64, 5000})
    CHECK(configuration_got(desc(m, 0, true)) == "fast");
}

TEST_CASE_FIXTURE(Fixture, "what fails is left out; when all fail, so does tuning") {
  offered[1].compiles = false;
  {
    const auto e = engine();
    const Engine::Tuned result = tuned(*e, desc());
    CHECK(result.candidates[1].status.code() == Code::compile_failed);
    CHECK(result.candidates[result.fastest].configuration == "middling");
    REQUIRE_FALSE(logged.empty());
    CHECK(logged.back().find("fast is left out: no registers left") != std::string::npos);
  }
  offered[0].compiles = false;
  CHECK(tuned(*engine(), desc(100)).fastest == 2); // the heuristic's own is among those that fail
  offered[2].compiles = false;
  check_error(engine()->tune(desc(200)).status(), Code::compile_failed, "no registers left");
  CHECK(configuration_got(desc()) == "middling"); // as before
  offered[1].compiles = true;
  fake().failures["cuEventRecord"] = {999};
  check_error(engine()->tune(desc(200)).status(), Code::internal, "cuEventRecord");
  fake().failures["cuLaunchKernel"] = {719};
  check_error(engine()->tune(desc(200)).status(), Code::internal, "CUDA_ERROR_LAUNCH_FAILED");
  // A configuration that this GPU compiles but does not launch.
  offered[0].compiles = offered[2].compiles = true;
  fake().failures["cuLaunchKernel"] = {701}; // out of resources: once, so for the first
  const auto e = engine();
  const Engine::Tuned result = tuned(*e, desc(200));
  CHECK_FALSE(result.candidates[0].status.is_ok());
  CHECK(result.candidates[result.fastest].configuration == "fast");
}

TEST_CASE_FIXTURE(Fixture, "of another GPU, of another generator, damaged: a miss") {
  tuned(*engine(), desc());
  CHECK(configuration_got(desc()) == "fast");
  CHECK(configuration_got(desc(5, 1)) == "slow"); // cuda:1 has another name
  row.generator_digest = "generator-2";
  CHECK(configuration_got(desc()) == "slow");
  row.generator_digest = "generator-1";
  CHECK(configuration_got(desc()) == "fast");
  {
    const auto e = engine();
    const Digest key = e->explain(desc(), nullptr).key;
    Result<StoreRow> stored = e->store()->look(key);
    REQUIRE(stored.is_ok());
    stored->code.resize(stored->code.size() / 2);
    REQUIRE(e->store()->put(*stored).is_ok());
  }
  logged.clear();
  CHECK(configuration_got(desc()) == "slow");
  REQUIRE_FALSE(logged.empty());
  CHECK(logged.front().find("is passed over: damaged code object") != std::string::npos);
  tuned(*engine(), desc());
  CHECK(configuration_got(desc()) == "fast");
}

TEST_CASE_FIXTURE(Fixture, "what cannot be tuned says why") {
  {
    const auto e = engine();
    KernelDesc on_cpu = desc();
    on_cpu.device = {};
    CHECK_FALSE(e->can_tune(on_cpu).is_ok()); // nothing computes it here
    CHECK(*e->can_tune(desc()));
    check_error(e->tune(fp8_block_bmm::make_desc(1, 1, 8, 24)).status(), Code::invalid_argument, "k=24");
  }
  row.configurations = nullptr;
  CHECK_FALSE(*engine()->can_tune(desc()));
  check_error(engine()->tune(desc()).status(), Code::unsupported, "has but one configuration");
  row.configurations = configurations;
  config.miss = MissPolicy::error;
  check_error(engine()->tune(desc()).status(), Code::miss, "forbids compiling");
  config.miss = MissPolicy::compile;
  tuned(*engine(), desc());
  config.miss = MissPolicy::error;
  CHECK(configuration_got(desc()) == "fast"); // stored: nothing is compiled
  config.miss = MissPolicy::compile;
  config.cache = CacheMode::read_only;
  check_error(engine()->tune(desc()).status(), Code::unsupported, "needs a cache on disk that may be written");
}

TEST_CASE("code objects with a configuration: round trip, one form each, damage is refused") {
  CodeObject code;
  code.format = CodeFormat::ptx;
  code.arch = Arch::nvptx;
  code.sm = 90;
  code.image = {1, 2, 3};
  code.entries = {{"main", 0}};
  const Bytes plain = code.serialise();
  code.configuration = "x2n128";
  const Bytes configured = code.serialise();
  code.tuned_for = "NVIDIA H200";
  const Bytes tuned = code.serialise();
  CHECK(plain[4] == 2); // what earlier versions of Kiln read
  CHECK(configured[4] == 3);
  for (const Bytes& bytes : {plain, configured, tuned}) {
    const Result<CodeObject> back = CodeObject::parse(bytes);
    REQUIRE(back.is_ok());
    CHECK(back->serialise() == bytes);
    for (std::size_t size = 0; size < bytes.size(); ++size)
      CHECK(CodeObject::parse({bytes.data(), size}).status().code() == Code::integrity);
  }
  const auto refused = [](const CodeObject& object) {
    CHECK(CodeObject::parse(object.serialise()).status().code() == Code::integrity);
  };
  CodeObject bad = code;
  bad.configuration.clear();
  refused(bad); // tuned, but what?
  bad = code;
  bad.configuration = std::string(65, 'x');
  refused(bad);
  bad = code;
  bad.tuned_for = "\x1b[2J";
  refused(bad);
}
