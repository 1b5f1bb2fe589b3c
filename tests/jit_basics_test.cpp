#include <algorithm>
#include <fstream>
#include <random>
#include <set>
#include <sstream>

#include <doctest/doctest.h>

#include "jit/code_object.h"
#include "jit/implementation.h"
#include "jit/os.h"
#include "jit/target.h"

using namespace kiln;

namespace {

template <class Enum> void check_names() {
  std::set<std::string_view> names;
  for (int i = 0; i < static_cast<int>(Enum::count); ++i)
    names.insert(name_of(static_cast<Enum>(i)));
  CHECK(names.size() == static_cast<std::size_t>(Enum::count));
  CHECK(!names.contains(""));
}

CodeObject sample() {
  CodeObject object;
  object.image = {0x90, 0x90, 0x90, 0x90, 0xb8, 1, 0, 0, 0, 0xc3};
  object.alignment = 128;
  object.entries = {{"main", 0}, {"reduce", 4}};
  object.features = {Feature::avx2, Feature::avx512vnni};
  object.vector_registers = 32;
  object.general_registers = 9;
  object.plan_version = 3;
  object.plan = {{"m_step", 6}, {"workspace_fixed", -1}};
  return object;
}

bool mentions(const Status& status, std::string_view text) {
  return status.message().find(text) != std::string::npos;
}

} // namespace

TEST_CASE("every path, backend, generator and feature has a name of its own") {
  check_names<IsaPath>();
  check_names<BackendId>();
  check_names<GeneratorId>();
  check_names<Feature>();
  CHECK(name_of(IsaPath::sve_i8mm) == "sve_i8mm");
  CHECK(name_of(IsaPath::reference) == "reference");
  CHECK(name_of(BackendId::nvidia) == "nvidia");
  CHECK(name_of(GeneratorId::ptx) == "ptx");
}

TEST_CASE("features: text and parse are inverse, and unknown names list the known") {
  CHECK(Features{}.text().empty());
  CHECK(Features{Feature::fma, Feature::avx2}.text() == "avx2,fma");
  for (int i = 0; i < static_cast<int>(Feature::count); ++i) {
    const Features one{static_cast<Feature>(i)};
    const auto parsed = Features::parse(one.text());
    REQUIRE(parsed.is_ok());
    CHECK(*parsed == one);
  }
  CHECK(*Features::parse("fma,avx2") == Features{Feature::avx2, Feature::fma});
  CHECK(*Features::parse("") == Features{});
  for (const char* bad : {"avx3", "avx2,", ",avx2", "AVX2", "avx2,avx2", " avx2"}) {
    const auto parsed = Features::parse(bad);
    REQUIRE(!parsed.is_ok());
    CHECK(parsed.status().code() == Code::invalid_argument);
  }
  CHECK(mentions(Features::parse("avx3").status(), "avx3"));
  CHECK(mentions(Features::parse("avx3").status(), "amx-int8"));
}

TEST_CASE("targets: text and parse are inverse") {
  for (const char* text : {"x86_64:", "x86_64:avx2,fma", "aarch64:neon", "aarch64:neon,sve;sve=384",
                           "aarch64:neon,sve,sme;sve=256;sme=512", "aarch64:neon,sme,sme2;sme=512", "nvptx:sm_80",
                           "nvptx:sm_89", "nvptx:sm_90a", "nvptx:sm_100a"}) {
    CAPTURE(text);
    const auto target = Target::parse(text);
    REQUIRE(target.is_ok());
    CHECK(target->text() == text);
  }
  CHECK(Target::parse("nvptx:sm_90a")->sm == 90);
  CHECK(Target::parse("aarch64:neon,sve,sme;sve=256;sme=512")->sve_bits == 256);
}

TEST_CASE("known targets are valid, distinct by name, and made of features of their architecture") {
  std::set<std::string_view> names;
  for (const KnownTarget& known : known_targets()) {
    CAPTURE(known.name);
    const auto target = Target::parse(known.name);
    REQUIRE(target.is_ok());
    CHECK(target->text() == known.text);
    CHECK(features_of(target->arch).contains(target->features));
    CHECK(names.insert(known.name).second);
  }
  CHECK(Target::parse("zen5")->features.has(Feature::avxvnni));
  CHECK(!Target::parse("zen4")->features.has(Feature::avxvnni));
  CHECK(Target::parse("sapphirerapids")->features.has(Feature::amx_int8));
  CHECK(!Target::parse("neoverse-n1")->features.has(Feature::i8mm));
}

TEST_CASE("a target that is not one is refused with what is allowed") {
  for (const char* bad : {"",
                          "x86_64",
                          "x86",
                          "avx2",
                          "x86-64-v5",
                          "x86_64:avx2,",
                          "x86_64:neon",
                          "aarch64:avx2",
                          "x86_64:avx2;sve=128",
                          "x86_64:avx2 ",
                          "aarch64:neon,sve",
                          "aarch64:neon;sve=128",
                          "aarch64:neon,sve;sve=100",
                          "aarch64:neon,sve;sve=4096",
                          "aarch64:neon,sve;sve=",
                          "aarch64:neon,sve;sve=0128",
                          "aarch64:neon,sve;sve=128;sve=128",
                          "aarch64:neon,sme;sme=384",
                          "aarch64:neon,sve2",
                          "aarch64:neon,sme2",
                          "aarch64:neon;",
                          "nvptx:",
                          "nvptx:sm_",
                          "nvptx:sm_a",
                          "nvptx:sm_90",
                          "nvptx:sm_80a",
                          "nvptx:sm_090a",
                          "nvptx:sm_9999a",
                          "nvptx:90",
                          "x86_64:sm_90a"}) {
    CAPTURE(bad);
    const auto target = Target::parse(bad);
    REQUIRE(!target.is_ok());
    CHECK(target.status().code() == Code::invalid_argument);
    CHECK(mentions(target.status(), bad));
    CHECK(mentions(target.status(), "sapphirerapids"));
  }
}

TEST_CASE("the machine is described, and its target is a valid one") {
  const Machine machine = detect_machine();
  CHECK(machine.cores >= 1);
  CHECK(machine.l1d_bytes >= 8 << 10);
  CHECK(machine.l2_bytes > machine.l1d_bytes);
  CHECK(!machine.cpu_name.empty());
  const auto parsed = Target::parse(machine.target.text());
  REQUIRE(parsed.is_ok());
  CHECK(*parsed == machine.target);
  CHECK(detect_machine().target == machine.target);
}

TEST_CASE("detected features are those that the kernel lists") {
#ifdef __x86_64__
  constexpr std::string_view kLine = "flags";
#else
  constexpr std::string_view kLine = "Features"; // under qemu the file is that of the machine below
#endif
  std::ifstream cpuinfo("/proc/cpuinfo");
  std::set<std::string> flags;
  for (std::string line; flags.empty() && std::getline(cpuinfo, line);)
    if (line.starts_with(kLine)) {
      std::istringstream words(line.substr(line.find(':') + 1));
      for (std::string word; words >> word;)
        flags.insert(word);
    }
  if (flags.empty()) {
    MESSAGE("skipped: /proc/cpuinfo lists no features");
    return;
  }
  const std::pair<const char*, Feature> names[] = {
#ifdef __x86_64__
      {"avx2", Feature::avx2},
      {"fma", Feature::fma},
      {"f16c", Feature::f16c},
      {"bmi2", Feature::bmi2},
      {"avx_vnni", Feature::avxvnni},
      {"avx512f", Feature::avx512f},
      {"avx512bw", Feature::avx512bw},
      {"avx512vl", Feature::avx512vl},
      {"avx512dq", Feature::avx512dq},
      {"avx512_vnni", Feature::avx512vnni},
      {"avx512_bf16", Feature::avx512bf16},
      {"amx_tile", Feature::amx_tile},
      {"amx_int8", Feature::amx_int8},
      {"amx_bf16", Feature::amx_bf16},
#else
      {"asimd", Feature::neon}, {"asimddp", Feature::dotprod}, {"i8mm", Feature::i8mm},
      {"bf16", Feature::bf16},  {"asimdhp", Feature::fp16},    {"sve", Feature::sve},
      {"sve2", Feature::sve2},  {"sme", Feature::sme},         {"sme2", Feature::sme2},
#endif
  };
  const Features detected = detect_machine().target.features;
  for (const auto& [flag, feature] : names) {
    CAPTURE(flag);
    CHECK(detected.has(feature) == flags.contains(flag));
  }
}

TEST_CASE("code objects: serialised form and parse are inverse, and the form is deterministic") {
  const CodeObject object = sample();
  const Bytes bytes = object.serialise();
  CHECK(sample().serialise() == bytes);
  const auto parsed = CodeObject::parse(bytes);
  REQUIRE(parsed.is_ok());
  CHECK(*parsed == object);

  CodeObject arm = sample();
  arm.arch = Arch::aarch64;
  arm.features = {Feature::neon, Feature::sve};
  arm.vector_bits = 256;
  const auto parsed_arm = CodeObject::parse(arm.serialise());
  REQUIRE(parsed_arm.is_ok());
  CHECK(*parsed_arm == arm);
}

TEST_CASE("every prefix of a code object, and any byte after it, is refused") {
  Bytes bytes = sample().serialise();
  for (std::size_t size = 0; size < bytes.size(); ++size) {
    const auto parsed = CodeObject::parse(ByteSpan(bytes).first(size));
    REQUIRE(!parsed.is_ok());
    CHECK(parsed.status().code() == Code::integrity);
  }
  bytes.push_back(0);
  CHECK(!CodeObject::parse(bytes).is_ok());
}

TEST_CASE("a code object has one form: features in another order are refused") {
  Bytes bytes = sample().serialise();
  const std::string_view names = "avx2,avx512vnni", other = "avx512vnni,avx2";
  const auto at = std::search(bytes.begin(), bytes.end(), names.begin(), names.end());
  REQUIRE(at != bytes.end());
  std::copy(other.begin(), other.end(), at);
  const auto parsed = CodeObject::parse(bytes);
  REQUIRE(!parsed.is_ok());
  CHECK(parsed.status().code() == Code::integrity);
  CHECK(mentions(parsed.status(), "not in their order"));
}

TEST_CASE("damaged code objects never parse into what could not be written") {
  const Bytes original = sample().serialise();
  const unsigned seed = std::random_device{}();
  INFO("seed ", seed);
  std::mt19937 random(seed);
  const auto check = [](const Bytes& bytes) {
    const auto parsed = CodeObject::parse(bytes);
    if (parsed.is_ok())
      REQUIRE(CodeObject::parse(parsed->serialise()).is_ok());
    else
      REQUIRE(parsed.status().code() == Code::integrity);
  };
  for (std::size_t bit = 0; bit < 8 * original.size(); ++bit) {
    Bytes bytes = original;
    bytes[bit / 8] ^= static_cast<std::uint8_t>(1u << bit % 8);
    check(bytes);
  }
  for (int round = 0; round < 20000; ++round) {
    Bytes bytes = original;
    for (unsigned n = 1 + random() % 6; n > 0; --n)
      bytes[random() % bytes.size()] = static_cast<std::uint8_t>(random());
    bytes.resize(random() % 4 != 0 ? bytes.size() : random() % bytes.size());
    check(bytes);
  }
}

TEST_CASE("what a code object may not hold is refused by name") {
  const std::pair<void (*)(CodeObject&), const char*> rows[] = {
      {[](CodeObject& o) { o.image.clear(); }, "image"},
      {[](CodeObject& o) { o.alignment = 0; }, "alignment 0"},
      {[](CodeObject& o) { o.alignment = 96; }, "alignment 96"},
      {[](CodeObject& o) { o.alignment = 8192; }, "alignment 8192"},
      {[](CodeObject& o) { o.entries.clear(); }, "no entry"},
      {[](CodeObject& o) { o.entries[1].offset = o.image.size(); }, "reduce at offset 10"},
      {[](CodeObject& o) { o.entries[1].offset = ~std::uint64_t{0}; }, "reduce"},
      {[](CodeObject& o) { o.entries[1].name = "main"; }, "main is there twice"},
      {[](CodeObject& o) { o.entries[1].name = ""; }, "entry name"},
      {[](CodeObject& o) { o.entries[1].name = "a\nb"; }, "entry name"},
      {[](CodeObject& o) { o.entries[1].name = std::string(65, 'a'); }, "entry name"},
      {[](CodeObject& o) {
         o.entries.assign(65, {"main", 0});
       },
       "65 entries"},
      {[](CodeObject& o) { o.plan[1].first = "m_step"; }, "m_step is there twice"},
      {[](CodeObject& o) { o.plan[1].first = "a b"; }, "launch plan name"},
      {[](CodeObject& o) {
         o.plan.assign(257, {"x", 0});
       },
       "257 launch plan values"},
      {[](CodeObject& o) { o.features.add(Feature::neon); }, "neon is no feature of x86_64"},
      {[](CodeObject& o) { o.vector_bits = 100; }, "vector length 100"},
      {[](CodeObject& o) { o.vector_bits = -128; }, "vector length -128"},
      {[](CodeObject& o) { o.vector_registers = 257; }, "257 vector"},
      {[](CodeObject& o) { o.arch = static_cast<Arch>(9); }, "architecture number 9"},
      {[](CodeObject& o) {
         o.arch = Arch::aarch64;
         o.features = {};
         o.entries[1].offset = 6;
       },
       "not a multiple of 4"},
  };
  for (const auto& [change, message] : rows) {
    CodeObject object = sample();
    change(object);
    const auto parsed = CodeObject::parse(object.serialise());
    CAPTURE(message);
    REQUIRE(!parsed.is_ok());
    CHECK(parsed.status().code() == Code::integrity);
    CHECK(mentions(parsed.status(), message));
  }
}
