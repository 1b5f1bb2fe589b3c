#include <doctest/doctest.h>

#include <atomic>
#include <filesystem>
#include <thread>
#include <type_traits>
#include <vector>

#include "cache/bundle.h"
#include "cache/file.h"
#include "jit/engine.h"
#include "jit/kernel_key.h"
#include "jit/ops/int8_mm_driver.h"
#include "tests/child_process.h"
#include "tests/emulator.h"

/// The path of a call with a null backend: rows whose "kernels" return at once, so that everything above the hardware
/// is tested anywhere.

using namespace kiln;
using namespace kiln::test;

namespace {

std::atomic<int> compiles{0};
std::atomic<bool> compile_fails{false}, compile_hangs{false};

std::vector<std::pair<std::string, std::int64_t>> plan_for(std::string_view layout) {
  int8_mm::Plan plan{.layout = *int8_mm::PackLayout::parse(layout)};
  plan.n_step = plan.layout.n_block;
  return plan.values();
}

Result<CodeObject> compile_return(const KernelDesc&, const Target& target, std::string_view layout) {
  ++compiles;
  do
    std::this_thread::sleep_for(std::chrono::milliseconds(5));
  while (compile_hangs);
  if (compile_fails)
    return Status::error(Code::compile_failed, "the null backend was told to fail");
  CodeObject code;
  code.arch = target.arch;
  code.image = target.arch == Arch::aarch64 ? Bytes{0xC0, 0x03, 0x5F, 0xD6} : Bytes{0xC3};
  code.entries = {{"main", 0}};
  code.plan = plan_for(layout);
  return code;
}

void do_nothing(const int8_mm::Call*) {}

Implementation null_row(IsaPath isa, std::string_view digest = "generator-1") {
  Implementation row;
  row.op = OpId::int8_mm;
  row.isa = isa;
  row.backend = BackendId::portable;
  row.generator = GeneratorId::llvm;
  row.generator_digest = digest;
  row.any_arch = true;
  row.pack_layout = [](const KernelDesc&, const Target&) { return std::string("n16k4"); };
  row.compile = compile_return;
  return row;
}

Implementation builtin_row() {
  Implementation row = null_row(IsaPath::reference);
  row.backend = BackendId::reference;
  row.generator = GeneratorId::none;
  row.compile = nullptr;
  row.builtin = reinterpret_cast<const void*>(&do_nothing);
  row.builtin_plan = [](const KernelDesc&, std::string_view layout) { return plan_for(layout); };
  return row;
}

/// A cache directory of its own, and what was logged.
struct Fixture {
  std::filesystem::path directory = std::filesystem::temp_directory_path() /
                                    ("kiln-engine-test-" + std::to_string(::getpid()) + "-" + std::to_string(++count));
  std::vector<Implementation> rows = {null_row(IsaPath::portable), builtin_row()};
  std::vector<std::string> logged;
  Config config;
  std::size_t max_code_bytes = 64 << 20;
  static inline int count = 0;

  Fixture() {
    compiles = 0;
    compile_fails = compile_hangs = false;
    config.cache_dir = directory / "cache";
    config.key_dir = directory / "keys";
    config.threads = 1;
  }
  ~Fixture() { std::filesystem::remove_all(directory); }

  std::unique_ptr<Engine> engine() {
    EngineOptions options;
    options.config = config;
    options.machine = detect_machine();
    options.implementations = rows;
    options.max_code_bytes = max_code_bytes;
    options.log_context = this;
    options.log_sink = [](void* self, LogLevel, const char* message) {
      static_cast<Fixture*>(self)->logged.emplace_back(message);
    };
    Result<std::unique_ptr<Engine>> made = Engine::create(std::move(options));
    REQUIRE(made.is_ok());
    return std::move(*made);
  }
};

KernelDesc desc(std::int64_t m = 1, std::int64_t n = 64) {
  return int8_mm::make_desc(m, n, 64);
}

Source source_of(Engine& engine, const KernelDesc& d) {
  const Result<KernelRef> kernel = engine.get(d);
  REQUIRE_MESSAGE(kernel.is_ok(), (kernel ? "" : kernel.status().message()));
  return (*kernel)->source;
}

} // namespace

TEST_CASE_FIXTURE(Fixture, "compiled, then from memory, then in another engine from disk") {
  {
    const auto first = engine();
    CHECK(source_of(*first, desc()) == Source::compiled);
    CHECK(source_of(*first, desc()) == Source::compiled);
    CHECK(first->stats().memory_hits == 1);
    CHECK(compiles == 1);
  }
  const auto second = engine();
  CHECK(second->explain(desc(), nullptr).tier == "disk");
  CHECK(source_of(*second, desc()) == Source::disk);
  CHECK(second->explain(desc(), nullptr).tier == "memory");
  CHECK(compiles == 1);
  CHECK(second->stats().disk_hits == 1);
  CHECK(logged.empty());
}

TEST_CASE_FIXTURE(Fixture, "m of one class and both layouts of B share a kernel") {
  const auto e = engine();
  for (const std::int64_t m : {33, 34, 100, 100000})
    source_of(*e, desc(m));
  source_of(*e, int8_mm::make_desc(kAny, 64, 64, int8_mm::BLayout::kn));
  CHECK(compiles == 1);
}

TEST_CASE_FIXTURE(Fixture, "another generator, another n: other kernels") {
  source_of(*engine(), desc());
  source_of(*engine(), desc(1, 65));
  CHECK(compiles == 2);
  rows[0] = null_row(IsaPath::portable, "generator-2");
  CHECK(source_of(*engine(), desc()) == Source::compiled);
  CHECK(compiles == 3);
}

TEST_CASE_FIXTURE(Fixture, "64 threads on one cold key: one compile") {
  const auto e = engine();
  std::vector<std::thread> threads;
  std::atomic<int> failures{0};
  for (int i = 0; i < 64; ++i)
    threads.emplace_back([&] { failures += !e->get(desc()).is_ok(); });
  for (std::thread& thread : threads)
    thread.join();
  CHECK(failures == 0);
  CHECK(compiles == 1);
}

TEST_CASE_FIXTURE(Fixture, "kernels live on after eviction and after their engine") {
  max_code_bytes = 1; // at most the newest stays
  auto e = engine();
  Result<KernelRef> held = e->get(desc());
  REQUIRE(held.is_ok());
  for (std::int64_t n = 1; n < 20; ++n)
    source_of(*e, desc(1, n));
  CHECK(e->stats().evictions >= 18);
  CHECK(e->stats().kernels <= 2);
  e.reset();
  const auto entry = reinterpret_cast<int8_mm::Entry>(reinterpret_cast<std::uintptr_t>((*held)->entry()));
  entry(nullptr); // a single return: still mapped and executable
  CHECK((*held)->desc() == int8_mm::op().canonical(desc()));
}

TEST_CASE_FIXTURE(Fixture, "KILN_MISS=error compiles nothing and says so") {
  config.miss = MissPolicy::error;
  const auto e = engine();
  const Result<KernelRef> kernel = e->get(desc());
  REQUIRE(!kernel.is_ok());
  CHECK(kernel.status().code() == Code::miss);
  CHECK(kernel.status().message().find("int8_mm m=1") != std::string::npos);
  CHECK(compiles == 0);
}

TEST_CASE_FIXTURE(Fixture, "KILN_MISS=fallback runs the reference now and the compiled kernel later") {
  config.miss = MissPolicy::fallback;
  const auto e = engine();
  CHECK(source_of(*e, desc()) == Source::builtin);
  REQUIRE(e->wait_prefetched(std::chrono::seconds(10)));
  CHECK(source_of(*e, desc()) == Source::compiled);
  CHECK(e->stats().fallbacks == 1);
}

TEST_CASE_FIXTURE(Fixture, "KILN_MISS=fallback does not wait for the compile in the background") {
  config.miss = MissPolicy::fallback;
  const auto e = engine();
  compile_hangs = true;
  const auto start = std::chrono::steady_clock::now();
  for (int i = 0; i < 3; ++i)
    CHECK(source_of(*e, desc()) == Source::builtin);
  CHECK(std::chrono::steady_clock::now() - start < std::chrono::seconds(1)); // less than the patience of others
  compile_hangs = false;
  REQUIRE(e->wait_prefetched(std::chrono::seconds(10)));
  CHECK(source_of(*e, desc()) == Source::compiled);
  CHECK(compiles == 1);
}

TEST_CASE_FIXTURE(Fixture, "KILN_MISS=fallback: a compile that fails in the background is not tried at each call") {
  config.miss = MissPolicy::fallback;
  const auto e = engine();
  compile_fails = true;
  for (int i = 0; i < 5; ++i) {
    CHECK(source_of(*e, desc()) == Source::builtin);
    REQUIRE(e->wait_prefetched(std::chrono::seconds(10)));
  }
  CHECK(compiles == 1);
  CHECK(logged.size() == 1);
  CHECK(e->stats().fallbacks == 2); // the second is resident
}

TEST_CASE_FIXTURE(Fixture, "KILN_MISS=fallback compiles at once where the toggles leave no fallback") {
  config.miss = MissPolicy::fallback;
  SUBCASE("another path is forced") {
    config.forced.push_back({OpId::none, IsaPath::portable});
  }
  SUBCASE("reference is disabled") {
    config.disabled_paths = {IsaPath::reference};
  }
  CHECK(source_of(*engine(), desc()) == Source::compiled);
}

TEST_CASE_FIXTURE(Fixture, "prefetch compiles nothing under KILN_MISS=error") {
  config.miss = MissPolicy::error;
  const auto e = engine();
  const KernelDesc d = desc();
  REQUIRE(e->prefetch({&d, 1}).is_ok());
  REQUIRE(e->wait_prefetched(std::chrono::seconds(10)));
  CHECK(compiles == 0);
  CHECK(logged.size() == 1);
}

TEST_CASE_FIXTURE(Fixture, "without executable memory the reference serves, found out and said once" *
                               doctest::skip(is_emulated())) {
  SUBCASE("nothing forced") {
    CHECK(exit_status_in_child([&] {
            if (!refuse_executable_mappings())
              return 1;
            const auto e = engine();
            for (int i = 0; i < 3; ++i) {
              const Result<KernelRef> kernel = e->get(desc(1 + 2 * i));
              if (!kernel || (*kernel)->source != Source::builtin || !e->get(desc(1 + 2 * i)))
                return 2;
            }
            return compiles == 1 && logged.size() == 1 && e->stats().kernels == 3 ? 0 : 3;
          }) == 0);
  }
  SUBCASE("a path is forced: that or nothing") {
    config.forced.push_back({OpId::none, IsaPath::portable});
    CHECK(exit_status_in_child([&] {
            if (!refuse_executable_mappings())
              return 1;
            const auto e = engine();
            for (int i = 0; i < 3; ++i)
              if (e->get(desc()).status().code() != Code::unsupported)
                return 2;
            return compiles == 1 && logged.size() == 1 ? 0 : 3;
          }) == 0);
  }
}

// Neither sanitizer follows a fork among threads: AddressSanitizer's allocator of GCC 12 may stay locked in the child.
#if !defined(__SANITIZE_THREAD__) && !defined(__SANITIZE_ADDRESS__)
TEST_CASE_FIXTURE(
    Fixture, "a child made by fork gets, prefetches and ends its engine, whatever the parent's threads were doing" *
                 doctest::skip(is_emulated())) {
  auto e = engine();
  Result<KernelRef> held = e->get(desc());
  REQUIRE(held.is_ok());
  const KernelDesc before[] = {desc(1, 32)}, after[] = {desc(1, 48), desc(2, 48)};
  REQUIRE(e->prefetch(before).is_ok()); // the parent has its background thread
  std::atomic<bool> stop{false};
  std::vector<std::thread> threads;
  max_code_bytes = 1; // every get makes, evicts and frees
  config.cache = CacheMode::off;
  rows = {builtin_row()};
  auto busy = engine();
  for (int t = 0; t < 3; ++t)
    threads.emplace_back([&, t] {
      for (std::int64_t n = 1; !stop; ++n)
        if (const Result<KernelRef> kernel = busy->get(desc(1, 1 + (n * 7 + t) % 500)); !kernel)
          stop = true;
    });
  for (int i = 0; i < 30; ++i)
    CHECK(exit_status_in_child([&] {
            if (!e->get(desc()) || !e->prefetch(after).is_ok() || !e->wait_prefetched(std::chrono::seconds(30)))
              return 1;
            for (std::int64_t n = 1; n < 200; ++n)
              if (!busy->get(desc(1, n)))
                return 2;
            busy.reset();
            e.reset();
            KernelRef(std::move(*held));
            return 0;
          }) == 0);
  CHECK(!stop);
  stop = true;
  for (std::thread& thread : threads)
    thread.join();
}
#endif

TEST_CASE_FIXTURE(Fixture, "prefetch compiles in the background") {
  const auto e = engine();
  const std::vector<KernelDesc> list = {desc(1), desc(2), desc(100)};
  REQUIRE(e->prefetch(list).is_ok());
  REQUIRE(e->wait_prefetched(std::chrono::seconds(10)));
  CHECK(compiles == 3);
  CHECK(e->stats().kernels == 3);
  KernelDesc bad = desc();
  bad.value[int8_mm::kN] = -5;
  CHECK(e->prefetch({&bad, 1}).code() == Code::invalid_argument);
}

TEST_CASE_FIXTURE(Fixture, "warmup is idempotent, and fills a cache for another architecture") {
  const auto e = engine();
  const bool on_arm = detect_machine().target.arch == Arch::aarch64;
  const Target other{.arch = on_arm ? Arch::x86_64 : Arch::aarch64};
  CHECK(*e->warmup(desc(), nullptr) == Engine::Warmed::compiled);
  CHECK(*e->warmup(desc(), nullptr) == Engine::Warmed::hit);
  CHECK(*e->warmup(desc(), &other) == Engine::Warmed::compiled);
  CHECK(*e->warmup(desc(), &other) == Engine::Warmed::hit);
  CHECK(source_of(*e, desc()) == Source::disk);
  config.cache = CacheMode::off;
  CHECK(engine()->warmup(desc(), nullptr).status().code() == Code::unsupported);
}

TEST_CASE_FIXTURE(Fixture, "a compile that fails is the caller's error, and is tried again") {
  const auto e = engine();
  compile_fails = true;
  CHECK(e->get(desc()).status().code() == Code::compile_failed);
  compile_fails = false;
  CHECK(source_of(*e, desc()) == Source::compiled);
  CHECK(e->stats().failed == 1);
}

TEST_CASE_FIXTURE(Fixture, "forced and disabled paths") {
  rows.insert(rows.begin(), null_row(IsaPath::avx2));
  CHECK(engine()->explain(desc(), nullptr).taken->isa == IsaPath::avx2);
  config.disabled_paths = {IsaPath::avx2};
  CHECK(engine()->explain(desc(), nullptr).taken->isa == IsaPath::portable);
  config.forced.push_back({OpId::none, IsaPath::avx2});
  const Result<KernelRef> kernel = engine()->get(desc());
  REQUIRE(!kernel.is_ok());
  CHECK(kernel.status().code() == Code::unsupported);
  CHECK(kernel.status().message().find("avx2: left out by KILN_DISABLE") != std::string::npos);
  config.forced = {{OpId::none, IsaPath::wgmma}}; // a path that this op does not have holds for others only
  CHECK(engine()->get(desc()).is_ok());
}

TEST_CASE_FIXTURE(Fixture, "a row whose features the machine lacks is never taken") {
  Implementation sme = null_row(IsaPath::sme);
  sme.needs = {Feature::sme, Feature::amx_int8, Feature::sve2}; // no machine has all three
  rows.insert(rows.begin(), sme);
  const Explanation e = engine()->explain(desc(), nullptr);
  CHECK(e.taken->isa == IsaPath::portable);
  CHECK(e.candidates[0].reason.find("the machine lacks") != std::string::npos);
}

TEST_CASE_FIXTURE(Fixture, "a row that declines in favour of a later one serves where no other code is left") {
  Implementation matrix = null_row(IsaPath::i8mm), vector = null_row(IsaPath::sdot);
  matrix.declines = [](const KernelDesc& d, const Target&) {
    return std::string(d.value[int8_mm::kM] == 1 ? "memory bound" : "");
  };
  rows = {matrix, vector, builtin_row()};
  const auto isa_of = [&] {
    const auto e = engine();
    const IsaPath isa = (*e->get(desc(1)))->implementation().isa;
    CHECK(e->explain(desc(1), nullptr).taken->isa == isa);
    return isa;
  };
  CHECK(isa_of() == IsaPath::sdot);
  config.disabled_paths = {IsaPath::sdot};
  CHECK(isa_of() == IsaPath::i8mm);
  const Explanation explained = engine()->explain(desc(1), nullptr);
  CHECK(explained.candidates[0].taken);
  CHECK(explained.candidates[2].reason == "i8mm is preferred");
  config.disabled_paths = {IsaPath::sdot, IsaPath::i8mm};
  CHECK(isa_of() == IsaPath::reference);
}

TEST_CASE_FIXTURE(Fixture, "weights are packed once, as the first row for every m likes them") {
  // For many rows, for few that read the same packs, and one with packs of its own.
  Implementation matrix = null_row(IsaPath::i8mm), vector = null_row(IsaPath::sdot), other = null_row(IsaPath::neon);
  matrix.pack_layout = [](const KernelDesc&, const Target&) { return std::string("n12k8"); };
  matrix.declines = [](const KernelDesc& d, const Target&) {
    return std::string(d.value[int8_mm::kM] == 1 ? "memory bound" : "");
  };
  vector.pack_layout = [](const KernelDesc&, const Target&) { return std::string("n12k4"); };
  vector.reads_layout = [](std::string_view layout, const KernelDesc&, const Target&) { return layout == "n12k8"; };
  other.pack_layout = [](const KernelDesc&, const Target&) { return std::string("n16k1"); };
  rows = {matrix, other, vector, builtin_row()};
  const auto layout_of = [](const KernelRef& kernel) {
    return static_cast<const int8_mm::Plan*>(kernel->plan())->layout.id();
  };
  std::string shared_key;
  {
    const auto e = engine();
    const KernelRef one = std::move(*e->get(desc(1))), many = std::move(*e->get(desc(100)));
    CHECK(one->implementation().isa == IsaPath::sdot); // neon stands before it and cannot read the packs
    CHECK(many->implementation().isa == IsaPath::i8mm);
    CHECK(layout_of(one) == "n12k8");
    CHECK(layout_of(many) == "n12k8");
    CHECK(*e->pack_layout(desc(1)) == "n12k8");
    CHECK(*e->pack_layout(desc(100)) == "n12k8");
    const Explanation why = e->explain(desc(1), nullptr);
    CHECK(why.candidates[1].reason == "reads packs of n16k1, these weights are packed as n12k8 here");
    CHECK(why.pack_layout == "n12k8");
    shared_key = one->key().hex();
  }
  config.disabled_paths = {IsaPath::i8mm};
  {
    const auto e = engine(); // neon leads now
    CHECK(*e->pack_layout(desc(1)) == "n16k1");
    CHECK((*e->get(desc(1)))->implementation().isa == IsaPath::neon);
  }
  config.disabled_paths.push_back(IsaPath::neon);
  const auto e = engine();
  const KernelRef one = std::move(*e->get(desc(1)));
  CHECK(one->implementation().isa == IsaPath::sdot);
  CHECK(layout_of(one) == "n12k4");
  CHECK(one->key().hex() != shared_key); // the layout is part of the key
}

// What reaches executable memory was authenticated or compiled here: the types leave no other way.
static_assert(!std::is_constructible_v<VerifiedRow, StoreRow> && !std::is_default_constructible_v<VerifiedRow>);
static_assert(!std::is_assignable_v<decltype(*std::declval<VerifiedRow&>()), StoreRow>);
static_assert(!std::is_constructible_v<LoadableCode, CodeObject> && !std::is_default_constructible_v<LoadableCode>);
static_assert(!std::is_invocable_v<decltype(LoadableCode::parse), StoreRow>);
static_assert(std::is_invocable_v<decltype(LoadableCode::parse), VerifiedRow>);
static_assert(!std::is_invocable_v<decltype(Kernel::load), Runtime&, const Implementation&, const KernelDesc&,
                                   const Digest&, CodeObject>);

TEST_CASE_FIXTURE(Fixture, "a stored kernel that is not a code object is passed over") {
  const auto e = engine();
  source_of(*e, desc());
  StoreRow row = *e->store()->get(e->explain(desc(), nullptr).key);
  row.code.resize(row.code.size() / 2); // authentic, but of a broken writer
  REQUIRE(e->store()->put(row).is_ok());
  CHECK(source_of(*engine(), desc()) == Source::compiled);
  CHECK(logged.size() == 1);
}

TEST_CASE_FIXTURE(Fixture, "a stored kernel that this machine cannot run is a miss, with a debug line only") {
  rows[0].vector_bits = [](const Target&) -> std::int32_t { return 256; };
  rows[0].compile = [](const KernelDesc& d, const Target& target, std::string_view layout) {
    Result<CodeObject> code = compile_return(d, target, layout);
    if (code)
      code->vector_bits = 256;
    return code;
  };
  const Target machine = detect_machine().target;
  const Features missing = features_of(machine.arch).without(machine.features);
  const auto store = [&](auto change) {
    const auto e = engine();
    StoreRow row = *e->store()->get(e->explain(desc(), nullptr).key);
    CodeObject code = *CodeObject::parse(row.code);
    change(code);
    row.code = code.serialise();
    REQUIRE(e->store()->put(row).is_ok());
  };
  const auto check = [&](const char* reason, auto change) {
    INFO(reason);
    config.log = LogLevel::warn;
    store(change);
    CHECK(source_of(*engine(), desc()) == Source::compiled); // and stored again
    CHECK(logged.empty());
    CHECK(source_of(*engine(), desc()) == Source::disk);
    store(change);
    config.log = LogLevel::debug;
    CHECK(source_of(*engine(), desc()) == Source::compiled);
    CHECK(std::any_of(logged.begin(), logged.end(), [&](const std::string& line) {
      return line.find("is passed over") != std::string::npos && line.find(reason) != std::string::npos;
    }));
    logged.clear();
  };
  source_of(*engine(), desc());
  check("code for vectors of 512 bits on a machine of 256", [](CodeObject& code) { code.vector_bits = 512; });
  if (!missing.empty())
    check("which this machine lacks", [&](CodeObject& code) { code.features = missing; });
}

TEST_CASE_FIXTURE(Fixture, "explain names the nearest stored kernel and the differing field") {
  const auto e = engine();
  source_of(*e, desc(1, 64));
  const Explanation explanation = e->explain(desc(1, 80), nullptr);
  CHECK(explanation.tier == "none");
  CHECK(explanation.nearest.find("differs in n") != std::string::npos);
}

TEST_CASE_FIXTURE(Fixture, "explain says why a hit that was expected is none") {
  rows[0].vector_bits = [](const Target&) -> std::int32_t { return 256; };
  rows[0].compile = [](const KernelDesc& d, const Target& target, std::string_view layout) {
    Result<CodeObject> code = compile_return(d, target, layout);
    if (code)
      code->vector_bits = 256;
    return code;
  };
  source_of(*engine(), desc());
  const auto check_why = [&](std::initializer_list<std::string_view> parts) {
    const auto e = engine();
    const Explanation explanation = e->explain(desc(), nullptr);
    CHECK(explanation.tier == "none");
    for (const std::string_view part : parts)
      CHECK_MESSAGE(explanation.why.find(part) != std::string::npos, explanation.why, " lacks ", part);
  };
  const auto key = [&] { return engine()->explain(desc(), nullptr).key; };
  CHECK(engine()->explain(desc(), nullptr).why.empty());
  SUBCASE("another generator") {
    rows[0].generator_digest = "generator-2";
    check_why({"of the same desc is stored", "generator generator-1 there, generator-2 here"});
  }
  SUBCASE("another vector length") {
    rows[0].vector_bits = [](const Target&) -> std::int32_t { return 512; };
    check_why({"vector_bits 256 there, 512 here"});
  }
  SUBCASE("another layout of packs") {
    rows[0].pack_layout = [](const KernelDesc&, const Target&) { return std::string("n8k4"); };
    check_why({"pack_layout n16k4 there, n8k4 here"});
  }
  SUBCASE("other features") {
    rows[0].needs.add(detect_machine().target.features.list().front());
    check_why({"features none there, ", "here"});
  }
  SUBCASE("the path that made it is left out") {
    Implementation other = null_row(IsaPath::avx2);
    other.vector_bits = rows[0].vector_bits;
    rows.insert(rows.begin() + 1, other);
    config.disabled_paths = {IsaPath::portable};
    check_why({"isa portable there, avx2 here", "portable is not taken here: left out by KILN_DISABLE"});
  }
  SUBCASE("of several the one that differs least is named") {
    rows[0].generator_digest = "generator-2";
    rows[0].pack_layout = [](const KernelDesc&, const Target&) { return std::string("n8k4"); };
    source_of(*engine(), desc());
    rows[0].pack_layout = [](const KernelDesc&, const Target&) { return std::string("n4k4"); };
    check_why({"pack_layout n8k4 there, n4k4 here"});
    CHECK(engine()->explain(desc(), nullptr).why.find("generator") == std::string::npos);
  }
  SUBCASE("evicted") {
    const auto e = engine();
    REQUIRE(e->store()->prune(0, false));
    check_why({"evicted on 20", "KILN_CACHE_MAX_MB is 512"});
  }
  SUBCASE("removed") {
    REQUIRE(engine()->store()->remove(key()));
    check_why({"it was stored, and removed on 20"});
  }
  SUBCASE("cleared") {
    REQUIRE(engine()->store()->clear(false));
    check_why({"it was stored, last used on 20", "cleared"});
  }
  SUBCASE("there, but not authentic") {
    std::filesystem::remove(config.key_dir + "/cache.key");
    source_of(*engine(), desc(1, 128)); // makes another key
    logged.clear();
    for (int look = 0; look < 2; ++look) // and looking removes nothing
      check_why({"the row of kernel", key().hex(), "was stored under another key file"});
    CHECK(engine()->store()->list()->size() == 2);
    CHECK(logged.empty());
    CHECK(source_of(*engine(), desc()) == Source::compiled);
    CHECK(engine()->explain(desc(), nullptr).tier == "disk");
  }
  SUBCASE("toggles leave the disk out") {
    config.disk_disabled = true;
    check_why({"KILN_DISABLE leaves the cache on disk out"});
    config.disk_disabled = false;
    config.cache = CacheMode::off;
    config.cache_unwanted = true;
    check_why({"KILN_CACHE"});
  }
  SUBCASE("a cache that cannot be read") {
    std::filesystem::permissions(config.cache_dir, std::filesystem::perms(0777));
    check_why({"is not trusted", "0777"});
  }
}

TEST_CASE_FIXTURE(Fixture, "whoever only looks is no use of the cache") {
  source_of(*engine(), desc());
  const auto before = engine()->store()->totals();
  REQUIRE(before);
  {
    const auto e = engine();
    for (int i = 0; i < 3; ++i) {
      e->explain(desc(), nullptr);
      e->explain(desc(1, 128), nullptr);
      REQUIRE(e->code(desc(), nullptr));
    }
    CHECK(e->stats().store.misses == 0);
  }
  const auto after = engine()->store()->totals();
  REQUIRE(after);
  CHECK(after->counts == before->counts);
  CHECK(engine()->store()->list()->front().row.hits == 0);
}

TEST_CASE_FIXTURE(Fixture, "every outcome is counted, for the process and for all") {
  {
    const auto e = engine();
    source_of(*e, desc(1, 64));
    source_of(*e, desc(1, 128));
    for (int i = 0; i < 5; ++i)
      source_of(*e, desc(1, 64));
    compile_fails = true;
    CHECK(!e->get(desc(1, 192)));
    compile_fails = false;
    const StoreStats stats = e->stats().store;
    CHECK(stats.memory_hits == 5);
    CHECK(stats.misses == 3);
    CHECK(stats.compiles == 2);
    CHECK(stats.compile_us >= 2 * 5000);
    CHECK(stats.compile_failures == 1);
    CHECK(stats.puts == 2);
  }
  {
    const auto e = engine();
    source_of(*e, desc(1, 64));
    source_of(*e, desc(1, 64));
    CHECK(e->stats().store.disk_hits == 1);
    StoreRow row = *e->store()->look(e->explain(desc(1, 128), nullptr).key);
    row.code.resize(row.code.size() / 2);
    REQUIRE(e->store()->put(row));
    source_of(*e, desc(1, 128));
    CHECK(e->stats().store.refused_code == 1);
  }
  config.miss = MissPolicy::fallback;
  source_of(*engine(), desc(1, 256));
  const auto totals = engine()->store()->totals();
  REQUIRE(totals);
  const UsageCounts& all = totals->counts;
  CHECK(all.memory_hits == 6);
  CHECK(all.disk_hits == 1);
  // The one in the background looks once more, unless it is dropped before.
  CHECK((all.misses == 5 || all.misses == 6));
  CHECK(all.compiles >= 3);
  CHECK(all.compile_failures == 1);
  CHECK(all.fallbacks == 1);
  CHECK(all.refused == 1);
  CHECK(all.refused_code == 1);
  CHECK(all.errors == 0);
}

TEST_CASE_FIXTURE(Fixture, "bad descs are refused before anything else") {
  const auto e = engine();
  KernelDesc bad = desc();
  bad.value[int8_mm::kK] = std::int64_t{1} << 31;
  CHECK(e->get(bad).status().code() == Code::invalid_argument);
  CHECK(e->get(bad).status().message().find("k=2147483648") != std::string::npos);
  bad.op = OpId::none;
  CHECK(e->get(bad).status().code() == Code::invalid_argument);
  CHECK(compiles == 0);
}

TEST_CASE("a desc's text comes back as the same desc, and says what is wrong with it") {
  for (const char* text :
       {"int8_mm m=1 n=2 k=3", "int8_mm k=3 n=2 m=any b_layout=kn", "int8_mm m=0 n=0 k=0 device=cuda:2"}) {
    const Result<KernelDesc> parsed = parse_desc(text);
    REQUIRE(parsed.is_ok());
    CHECK(*parse_desc(parsed->text()) == *parsed);
  }
  const auto message = [](const char* text) { return std::string(parse_desc(text).status().message()); };
  CHECK(message("int9_mm m=1").find("known are int8_mm") != std::string::npos);
  CHECK(message("int8_mm m=1 n=2").find("field k is missing") != std::string::npos);
  CHECK(message("int8_mm m=1 n=2 k=3 z=1").find("unknown field 'z'") != std::string::npos);
  CHECK(message("int8_mm m=1 n=2 k=-3").find("k=-3") != std::string::npos);
  CHECK(message("int8_mm m=1 n=2 k=99999999999999999999").find("k=99999999999999999999") != std::string::npos);
  CHECK(message("int8_mm m=1 n=2 k=3 b_layout=nn").find("one of kn, nk") != std::string::npos);
  CHECK(message("int8_mm m=1 m=1 n=2 k=3").find("twice") != std::string::npos);
  CHECK(message("int8_mm m").find("field=value") != std::string::npos);
  CHECK(message("int8_mm m=1 n=1 k=1 device=tpu").find("device=tpu") != std::string::npos);
}

TEST_CASE("the classes of m cover every m once, in at most eight kernels") {
  std::int64_t expected = 0;
  for (const std::int64_t bound : int8_mm::kMClasses) {
    const MRange range = int8_mm::op().m_range(int8_mm::make_desc(bound, 1, 1));
    CHECK(range.min == expected);
    if (bound != kAny)
      CHECK(range.max == bound);
    expected = bound + 1;
  }
  for (std::int64_t m = 0; m < 600; ++m) {
    const KernelDesc canonical = int8_mm::op().canonical(int8_mm::make_desc(m, 1, 1));
    CHECK(canonical == int8_mm::op().canonical(canonical));
    const MRange range = int8_mm::op().m_range(canonical);
    CHECK((range.min <= m && m <= range.max));
  }
  CHECK(std::size(int8_mm::kMClasses) <= 8);
}

TEST_CASE("a row from elsewhere is what it says, or is refused") {
  Fixture f;
  const std::unique_ptr<Engine> e = f.engine();
  REQUIRE(e->warmup(desc(), nullptr));
  const auto rows = e->store()->list();
  REQUIRE((rows && rows->size() == 1));
  const std::optional<StoreRow> stored = e->store()->get(rows->front().row.key);
  REQUIRE(stored);
  const StoreRow good = *stored;
  CHECK(check_row(good));

  const auto refused = [&](const char* what, void (*change)(StoreRow&), Code code = Code::integrity) {
    INFO(what);
    StoreRow bad = good;
    change(bad);
    CHECK(check_row(bad).code() == code);
  };
  refused("another key", [](StoreRow& r) { r.key.bytes[31] ^= 1; });
  refused("another generator", [](StoreRow& r) { r.generator = "generator-2"; });
  refused("another path", [](StoreRow& r) { r.isa = "avx2"; });
  refused("another desc", [](StoreRow& r) { r.desc = desc(1, 128).text(); });
  refused("a desc that is not canonical", [](StoreRow& r) { r.desc = desc(100).text(); });
  refused("no desc", [](StoreRow& r) { r.desc = "int8_mm"; });
  refused(
      "an op of a later version", [](StoreRow& r) { r.op = "int9_mm"; }, Code::unsupported);
  refused("another target", [](StoreRow& r) { r.target = "x86_64:avx512f"; });
  refused("no code", [](StoreRow& r) { r.code.clear(); });
  refused("code that needs more", [](StoreRow& r) {
    CodeObject code = *CodeObject::parse(r.code);
    code.features.add(code.arch == Arch::aarch64 ? Feature::dotprod : Feature::avx2);
    r.target = code.needs().text();
    r.code = code.serialise();
  });
  refused("code for packs of another layout", [](StoreRow& r) {
    CodeObject code = *CodeObject::parse(r.code);
    code.plan = plan_for("n8k4");
    r.code = code.serialise();
  });
  refused("a launch plan that is none", [](StoreRow& r) {
    CodeObject code = *CodeObject::parse(r.code);
    code.plan.clear();
    r.code = code.serialise();
  });
}

/// Where the kernels that one process asked for came from.
struct Outcome {
  int from_disk = 0, compiled = 0, other = 0;
};

TEST_CASE_FIXTURE(Fixture,
                  "the next process on the same host has 100 % hits; after an upgrade of the generator none is stale") {
  constexpr int kernels = 60;
  // In a child, which begins with an engine of its own; the parent's process never compiles.
  const auto run = [&](std::string_view generator) {
    rows[0].generator_digest = generator;
    Outcome outcome;
    int results[2];
    REQUIRE(::pipe(results) == 0);
    CHECK(exit_status_in_child([&] {
            const auto e = engine();
            for (int i = 0; i < kernels; ++i) {
              const Source source = source_of(*e, desc(1, 16 * (i + 1)));
              ++(source == Source::disk       ? outcome.from_disk
                 : source == Source::compiled ? outcome.compiled
                                              : outcome.other);
            }
            const StoreStats stats = e->stats().store;
            outcome.other += stats.disk_hits != outcome.from_disk || stats.compiles != outcome.compiled;
            return ::write(results[1], &outcome, sizeof outcome) == sizeof outcome && logged.empty() ? 0 : 1;
          }) == 0);
    REQUIRE(::read(results[0], &outcome, sizeof outcome) == sizeof outcome);
    ::close(results[0]);
    ::close(results[1]);
    return outcome;
  };
  struct Step {
    const char* what;
    std::string_view generator;
    int hits;
  };
  constexpr Step steps[] = {{"cold", "generator-1", 0},
                            {"the next process", "generator-1", kernels},
                            {"the one after that", "generator-1", kernels},
                            {"after an upgrade of the generator", "generator-2", 0},
                            {"the next process", "generator-2", kernels},
                            {"after going back", "generator-1", kernels}};
  for (const Step& step : steps) {
    const Outcome outcome = run(step.generator);
    MESSAGE(std::string(step.what), ": ", outcome.from_disk, " of ", kernels, " from disk, ", outcome.compiled,
            " compiled");
    CHECK(outcome.from_disk == step.hits);
    CHECK(outcome.compiled == kernels - step.hits);
    CHECK(outcome.other == 0);
  }
}

TEST_CASE("the system cache serves what the user's does not, and counts apart") {
  Fixture f;
  std::filesystem::create_directories(f.directory / "system");
  f.directory = std::filesystem::canonical(f.directory);
  f.config.cache_dir = f.directory / "cache";
  f.config.key_dir = f.directory / "keys";
  const Result<SecretKey> key = SecretKey::generate();
  REQUIRE(key);
  std::vector<StoreRow> rows;
  {
    const std::unique_ptr<Engine> e = f.engine();
    REQUIRE(e->warmup(desc(), nullptr));
    const auto listed = e->store()->list();
    REQUIRE((listed && listed->size() == 1));
    rows.push_back(*e->store()->get(listed->front().row.key));
    REQUIRE(e->store()->clear(false));
  }
  const Result<Bytes> bundle = make_bundle(rows, &*key);
  REQUIRE(bundle);
  REQUIRE(write_file_atomically(f.directory / "system/kernels.bundle", {*bundle}, 0644));
  const std::string line = key->public_key().line();
  REQUIRE(write_file_atomically(f.directory / "trusted.keys",
                                {{reinterpret_cast<const std::uint8_t*>(line.data()), line.size()}}));
  f.config.cache_system_dir = f.directory / "system";
  f.config.trusted_keys = f.directory / "trusted.keys";
  f.config.miss = MissPolicy::error;

  compiles = 0;
  const std::unique_ptr<Engine> e = f.engine();
  CHECK(e->explain(desc(), nullptr).tier == "system");
  CHECK(source_of(*e, desc()) == Source::disk);
  CHECK(e->get(desc()));
  CHECK(e->explain(desc(), nullptr).tier == "memory");
  CHECK(*e->warmup(desc(), nullptr) == Engine::Warmed::hit);
  CHECK(!e->get(desc(1, 128)));
  const EngineStats stats = e->stats();
  CHECK((stats.disk_hits == 1 && stats.system_hits == 1 && stats.system_refused == 0 && stats.memory_hits >= 1));
  CHECK(compiles == 0);
  CHECK(stats.store.rows == 0);                                                                   // nothing was copied
  CHECK((stats.store.disk_hits == 0 && stats.store.system_hits == 2 && stats.store.misses == 1)); // warmup is a use
  CHECK(f.logged.empty());
}
