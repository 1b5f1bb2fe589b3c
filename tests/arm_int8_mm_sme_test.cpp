#include <doctest/doctest.h>

#include <algorithm>
#include <csignal>
#include <cstring>
#include <filesystem>
#include <memory>
#include <random>
#include <set>
#include <string>
#include <vector>

#include <fmt/format.h>
#include <unistd.h>

#include "backends/arm/rows.h"
#include "jit/engine.h"
#include "jit/ops/int8_mm_driver.h"
#include "tests/arm_int8_mm_check.h"
#include "tests/smopa_shim.h"

/// The path `sme` of int8_mm, kernel by kernel: on any host what emission promises, with the words that hardware would
/// run; on a machine with SME the results, through SmopaShim where the machine is an emulator that needs it, and once
/// through engine, cache and driver.

using namespace kiln;
using namespace kiln::test;

namespace {

const Implementation kRow = arm::int8_mm_sme();
constexpr int kVectorBits[] = {128, 256, 512, 1024, 2048};

Target target_of(int sme_bits) {
  return {.arch = Arch::aarch64, .features = {Feature::neon, Feature::dotprod, Feature::sme}, .sme_bits = sme_bits};
}

ArmPath path_of(int sme_bits) {
  return {.row = kRow, .layout = kRow.pack_layout({}, target_of(sme_bits)), .target = target_of(sme_bits)};
}

CodeObject compile(std::int64_t m, std::int64_t n, std::int64_t k, int sme_bits) {
  return kiln::test::compile(path_of(sme_bits), m, n, k);
}

int8_mm::Plan plan_of(const CodeObject& code) {
  const Result<int8_mm::Plan> plan = int8_mm::Plan::from(code.plan);
  REQUIRE(plan.is_ok());
  return *plan;
}

} // namespace

// ---------------------------------------------------------------- on any host

TEST_CASE("emission is deterministic and says what it needs") {
  for (const int bits : kVectorBits)
    for (const std::int64_t m : int8_mm::kMClasses)
      for (const std::int64_t k : {0, 1, 31, 32, 100, 4096}) {
        CAPTURE(bits);
        CAPTURE(m);
        CAPTURE(k);
        const CodeObject first = compile(m, 100, k, bits), second = compile(m, 100, k, bits);
        CHECK(first == second);
        CHECK(first.features == Features{Feature::neon, Feature::sme});
        CHECK(first.vector_bits == bits);
        CHECK(first.arch == Arch::aarch64);
        const int8_mm::Plan plan = plan_of(first);
        CHECK(plan.layout == int8_mm::PackLayout{.n_block = bits / 16, .k_block = 4});
        CHECK(plan.layout.id() == kRow.pack_layout({}, target_of(bits)));
        CHECK(plan.n_step % plan.layout.n_block == 0);
      }
}

TEST_CASE("what it refuses, and what it leaves to others") {
  const KernelDesc desc = int8_mm::make_desc(16, 64, 64);
  CHECK(kRow.supports(desc, target_of(512)).is_ok());
  const KernelDesc long_rows = int8_mm::make_desc(16, 64, (std::int64_t{1} << 24) + 1);
  CHECK(kRow.supports(long_rows, target_of(512)).code() == Code::unsupported);
  for (const int bits : {0, 64, 384, 4096}) {
    CAPTURE(bits);
    CHECK(kRow.supports(desc, target_of(bits)).code() == Code::unsupported);
    CHECK(kRow.supports(desc, target_of(bits)).message().find(std::to_string(bits)) != std::string::npos);
  }
  const auto declines = [](std::int64_t m, std::int64_t n, std::int64_t k) {
    return kRow.declines(canonical(m, n, k), target_of(512));
  };
  CHECK(declines(1, 512, 512).find("memory bound") != std::string::npos);
  CHECK(declines(2, 512, 512).find("memory bound") != std::string::npos);
  CHECK(declines(3, 512, 512).empty());
  CHECK(declines(kAny, 512, 512).empty());
  // Few weights: for every m, since the path of m unknown decides the layout for all.
  for (const std::int64_t m : int8_mm::kMClasses)
    CHECK(declines(m, 16, 64).find("too few products") != std::string::npos);
  CHECK(kRow.assumes(target_of(512)).find("512 bits") != std::string::npos);
}

namespace {

bool contains(const std::string& line, const char* text) {
  return line.find(text) != std::string::npos;
}
bool is_smopa(const std::string& line) {
  return line.starts_with("smopa ");
}
/// Of streaming SVE or of ZA, by its operands; smstart, smstop and rdsvl have none.
bool is_vector_instruction(const std::string& line) {
  static constexpr const char* kOperands[] = {" z", "{ z", " p", "za"};
  if (line.starts_with("b.") || line.starts_with("cb"))
    return false;
  return std::any_of(std::begin(kOperands), std::end(kOperands),
                     [&](const char* operand) { return contains(line, operand); });
}

/// Of a v, q, d … register, by its operands.
bool is_neon_instruction(const std::string& line) {
  for (std::size_t at = line.find(' '); at != std::string::npos && at + 2 < line.size(); at = line.find(' ', at + 1))
    if (std::strchr("vqdsh", line[at + 1]) != nullptr && line[at + 2] >= '0' && line[at + 2] <= '9')
      return true;
  return false;
}

struct Loop {
  std::vector<std::string> body;
  double useful() const {
    const auto is_load_or_product = [](const std::string& line) { return is_smopa(line) || line.starts_with("ld1b "); };
    return static_cast<double>(std::count_if(body.begin(), body.end(), is_load_or_product)) /
           static_cast<double>(body.size());
  }
  std::ptrdiff_t products() const { return std::count_if(body.begin(), body.end(), is_smopa); }
  std::ptrdiff_t loads() const {
    return std::count_if(body.begin(), body.end(), [](const std::string& line) { return line.starts_with("ld1b "); });
  }
  std::set<std::string> tiles() const {
    std::set<std::string> names;
    for (const std::string& line : body)
      if (is_smopa(line))
        names.insert(line.substr(6, 5));
    return names;
  }
};

/// Bodies of the innermost loops with products: what a branch back leads through without another branch.
std::vector<Loop> product_loops(const std::vector<std::string>& lines) {
  std::vector<Loop> loops;
  for (std::size_t i = 0; i < lines.size(); ++i) {
    long offset = 0; // in bytes, as llvm-mc prints it
    if (std::sscanf(lines[i].c_str(), "b.ne #%ld", &offset) != 1 || offset >= 0)
      continue;
    const std::size_t first = i - static_cast<std::size_t>(-offset / 4);
    Loop loop{{lines.begin() + static_cast<std::ptrdiff_t>(first), lines.begin() + static_cast<std::ptrdiff_t>(i) + 1}};
    const bool innermost = std::none_of(loop.body.begin(), loop.body.end() - 1, [](const std::string& line) {
      return line.starts_with("b.") || line.starts_with("b ");
    });
    if (innermost && loop.products() > 0)
      loops.push_back(std::move(loop));
  }
  return loops;
}

} // namespace

TEST_CASE("hot loops: products and their loads, four tiles, by llvm-mc's reading of the words") {
  if (!has_llvm_mc())
    return;
  for (const int bits : kVectorBits) {
    CAPTURE(bits);
    const std::int64_t tile = bits / 32;
    // m unknown: two by two tiles, then one by four for the rest of m, one by two for a last panel.
    const std::vector<Loop> loops = product_loops(listing(compile(kAny, 5 * 2 * tile, 512, bits)));
    REQUIRE(loops.size() == 3);
    CHECK(loops[0].tiles().size() == 4);
    CHECK(loops[0].loads() == loops[0].products());
    CHECK(loops[0].useful() >= 0.9);
    CHECK(loops[1].tiles().size() == 4);
    CHECK(4 * loops[1].loads() == 5 * loops[1].products()); // a vector of A serves four, one of B a single tile
    CHECK(loops[1].useful() >= 0.9);
    CHECK(loops[2].tiles().size() == 2);
    for (const Loop& loop : loops)
      if (bits == 512)
        MESSAGE(fmt::format("SVL {}: {} tiles, {} instructions, {} SMOPA, {} loads: {:.3f} useful", bits,
                            loop.tiles().size(), loop.body.size(), loop.products(), loop.loads(), loop.useful()));
  }
}

TEST_CASE("the loop's words are those that llvm-mc makes of its text") {
  if (!has_llvm_mc())
    return;
  const std::vector<std::string> expected = {
      // Four vectors of step i + 3 go to registers 4 ((i + 3) mod 4) …, among the products of step i.
      "ld1b { z12.b }, p0/z, [x6, #-2, mul vl]", "smopa za0.s, p0/m, p0/m, z0.b, z2.b",
      "ld1b { z13.b }, p0/z, [x6, #-1, mul vl]", "smopa za1.s, p0/m, p0/m, z0.b, z3.b",
      "ld1b { z14.b }, p0/z, [x7, #-2, mul vl]", "smopa za2.s, p0/m, p0/m, z1.b, z2.b",
      "ld1b { z15.b }, p0/z, [x7, #-1, mul vl]", "smopa za3.s, p0/m, p0/m, z1.b, z3.b",
  };
  const std::vector<std::uint32_t> words = assemble(expected);
  const CodeObject code = compile(kAny, 512, 512, 512);
  std::vector<std::uint8_t> bytes(4 * words.size());
  std::memcpy(bytes.data(), words.data(), bytes.size());
  CHECK(std::search(code.image.begin(), code.image.end(), bytes.begin(), bytes.end()) != code.image.end());
}

TEST_CASE("every instruction of a vector is between smstart and smstop, once a call") {
  if (!has_llvm_mc())
    return;
  for (const int bits : kVectorBits)
    for (const std::int64_t m : {std::int64_t{4}, std::int64_t{32}, kAny})
      for (const std::int64_t k : {0, 7, 512}) {
        CAPTURE(bits);
        CAPTURE(m);
        CAPTURE(k);
        std::vector<CodeObject> codes = {compile(m, 200, k, bits)};
        if (bits == 512)
          for (const KernelDesc& desc : finished_descs(m, 200, k))
            codes.push_back(kiln::test::compile(path_of(bits), desc));
        for (const CodeObject& code : codes) {
          const std::vector<std::string> lines = listing(code);
          CHECK(std::count(lines.begin(), lines.end(), "smstart") == 1);
          CHECK(std::count(lines.begin(), lines.end(), "smstop") == 1);
          bool streaming = false;
          for (const std::string& line : lines) {
            INFO(line);
            streaming = (streaming || line == "smstart") && line != "smstop";
            // The lazy save stores another function's ZA before: legal with ZA on (Arm ARM, STR (array vector)).
            if (is_vector_instruction(line))
              CHECK((streaming || line.starts_with("str za[")));
            // Of NEON only the saves and restores of d8 … d15, outside.
            if (is_neon_instruction(line))
              CHECK(!streaming);
          }
          CHECK(!streaming);
        }
      }
}

// ---------------------------------------------------------------- on a machine with SME
#if defined(__aarch64__) && defined(__linux__)
namespace {

/// The path as this machine can run it: with the shim where its SMOPA is wrong.
struct SmeMachine {
  int bits = detect_machine().target.sme_bits;
  std::unique_ptr<SmopaShim> shim;
  ArmPath path;
  std::vector<ArmPath> paths; ///< it alone, or none

  SmeMachine() {
    if (bits == 0) {
      MESSAGE("not run here, the machine lacks SME");
      return;
    }
    path = path_of(bits);
    if (smopa_is_right()) {
      MESSAGE("SVL ", bits, ": this machine's own SMOPA");
    } else {
      shim = std::make_unique<SmopaShim>();
      path.row.compile = [](const KernelDesc& desc, const Target& target, std::string_view layout) {
        Result<CodeObject> code = kRow.compile(desc, target, layout);
        if (code)
          CHECK((SmopaShim::rewrite(*code) > 0) == (desc.value[int8_mm::kK] > 0));
        return code;
      };
      MESSAGE("SVL ", bits, ": this machine computes SMOPA wrongly (as qemu 7.2 does): products through SmopaShim");
    }
    paths.push_back(path);
  }
  ~SmeMachine() {
    if (shim)
      MESSAGE(SmopaShim::executed(), " products through SmopaShim");
  }

  CodeObject compile(std::int64_t m, std::int64_t n, std::int64_t k) const {
    return kiln::test::compile(path, m, n, k);
  }

private:
  /// One product of ones: each of the T × T sums is 4.
  bool smopa_is_right() const {
    const std::int64_t size = bits / 32, columns = 2 * size;
    const CodeObject code = ::compile(4, columns, 4, bits);
    const int8_mm::Plan plan = plan_of(code);
    std::vector<std::int8_t> a(16, 1);
    alignas(64) static std::int8_t pack[128 * 4 + 128 * 4];
    alignas(64) static std::uint8_t workspace[1 << 16];
    REQUIRE(static_cast<std::size_t>(plan.workspace_bytes(4)) <= sizeof workspace);
    std::memset(pack, 1, sizeof pack);
    std::vector<std::int32_t> c(static_cast<std::size_t>(4 * columns));
    ExecutableMemory memory;
    const Result<const std::uint8_t*> loaded = memory.load(code.image, code.alignment);
    REQUIRE(loaded.is_ok());
    const int8_mm::Call call{.a = a.data(),
                             .lda = 4,
                             .b = pack,
                             .c = c.data(),
                             .ldc = columns,
                             .m = 4,
                             .n = columns,
                             .workspace = workspace};
    reinterpret_cast<int8_mm::Entry> (*loaded)(&call);
    return std::all_of(c.begin(), c.end(), [](std::int32_t sum) { return sum == 4; });
  }
};

std::uint64_t read_fpsr() {
  std::uint64_t value;
  asm volatile("mrs %0, fpsr" : "=r"(value));
  return value;
}
/// PSTATE.SM at bit 0, PSTATE.ZA at bit 1.
std::uint64_t read_svcr() {
  std::uint64_t value;
  asm volatile("mrs %0, s3_3_c4_c2_2" : "=r"(value));
  return value;
}
std::uint64_t read_tpidr2() {
  std::uint64_t value;
  asm volatile("mrs %0, s3_3_c13_c0_5" : "=r"(value));
  return value;
}

/// With all that a caller may rely on checked around the call.
void checked_call(int8_mm::Entry entry, const int8_mm::Call& call) {
  const std::uint64_t fpsr = read_fpsr();
  call_and_check_registers(entry, call);
  CHECK(read_fpsr() == fpsr);
  CHECK(read_svcr() == 0);
  CHECK(read_tpidr2() == 0);
}

struct Checks {
  const SmeMachine& machine;
  std::mt19937 random;
  int count = 0;

  void operator()(std::int64_t m, std::int64_t n, std::int64_t k, Values values = Values::random,
                  std::int64_t n_cut = kAny) {
    check_int8_mm_kernel(machine.compile(m, n, k),
                         {m, n, k, n_cut == kAny ? n : n_cut, values, ++count % 2 == 0 ? Guard::before : Guard::after},
                         random, checked_call);
  }
};

} // namespace

TEST_CASE("every m") {
  check_every_m(SmeMachine().paths);
}
TEST_CASE("all values") {
  check_all_values(SmeMachine().paths);
}
TEST_CASE("every remainder of n and k") {
  check_every_remainder(SmeMachine().paths);
}
TEST_CASE("a call for each range of columns") {
  check_column_ranges(SmeMachine().paths);
}

TEST_CASE("epilogues of all stages and types") {
  check_epilogues(SmeMachine().paths);
}

TEST_CASE("around the sizes of tiles, panels and vectors, with the processor's state on both sides of a call") {
  const SmeMachine machine;
  if (machine.bits == 0)
    return;
  constexpr unsigned kSeed = 30;
  INFO("seed ", kSeed);
  Checks check{machine, std::mt19937(kSeed)};
  const std::int64_t tile = machine.bits / 32, panel = 2 * tile, vector = 4 * tile;
  for (const std::int64_t blocks : {2, 3, 4})
    for (const std::int64_t around : {-1, 0, 1})
      check(std::max<std::int64_t>(33, blocks * tile + around), 3 * panel, 9);
  for (const std::int64_t n : {std::int64_t{1}, tile - 1, tile, tile + 1, panel - 1, panel, panel + 1, 2 * panel - 1,
                               2 * panel, 2 * panel + 1, 3 * panel, 4 * panel + tile + 1, 5 * panel}) {
    check(4, n, 6);
    check(40, n, 3, Values::random, 2 * panel);
  }
  // Vectors that the copy of A takes at once: four, then the rest.
  for (const std::int64_t vectors : {1, 2, 3, 4, 5, 8, 9})
    for (const std::int64_t around : {-5, -1, 0, 1, 4})
      check(3, tile, vectors * vector + around);
  for (const std::int64_t around : {-1, 0, 5})
    check(std::max<std::int64_t>(33, tile + 3), panel + 1, 4 * vector + around);
}

TEST_CASE("sums wrap") {
  const SmeMachine machine;
  if (machine.bits == 0)
    return;
  // 2^17 products of (−128)·(−128) are 2^31: one more than s32 holds. Larger vectors take a quarter of a minute.
  if (machine.shim && machine.bits > 512) {
    MESSAGE("left to SVL up to 512: 65536 products take the emulator too long");
    return;
  }
  Checks check{machine, std::mt19937(34)};
  check(3, 2, std::int64_t{1} << 17, Values::all_lowest);
}

TEST_CASE("another function's ZA is saved as the lazy saving scheme demands") {
  const SmeMachine machine;
  if (machine.bits == 0)
    return;
  const std::size_t vector = static_cast<std::size_t>(machine.bits) / 8, za_bytes = vector * vector;
  struct {
    void* za_save_buffer;
    std::uint16_t num_za_save_slices;
    std::uint8_t reserved[6];
  } static block; // AAPCS64, "TPIDR2_EL0"
  static std::vector<std::uint8_t> live, saved;
  const auto call = [](int8_mm::Entry entry, const int8_mm::Call& call) {
    // ZA on, not streaming, full of `live`; then the call with ZA dormant.
    const std::uint8_t* from = live.data();
    const std::uint8_t* const end = live.data() + live.size();
    asm volatile(".arch_extension sme\n\t"
                 "smstart za\n\t"
                 "mov w12, #0\n\t"
                 "0: ldr za[w12, 0], [%[from]]\n\t"
                 "addsvl %[from], %[from], #1\n\t"
                 "add w12, w12, #1\n\t"
                 "cmp %[from], %[end]\n\t"
                 "b.ne 0b\n\t"
                 "msr s3_3_c13_c0_5, %[block]\n\t"
                 : [from] "+r"(from)
                 : [end] "r"(end), [block] "r"(&block)
                 : "x12", "cc", "memory");
    call_and_check_registers(entry, call);
    CHECK(read_tpidr2() == 0);
    CHECK(read_svcr() == 0);
  };
  std::mt19937 random(2);
  const CodeObject code = machine.compile(5, 20, 33);
  for (const std::size_t slices : {vector, std::size_t{1}, vector / 2, std::size_t{0}}) {
    CAPTURE(slices);
    live.resize(za_bytes);
    for (std::uint8_t& byte : live)
      byte = static_cast<std::uint8_t>(random());
    saved.assign(za_bytes, 0xa5);
    block = {saved.data(), static_cast<std::uint16_t>(slices), {}};
    check_int8_mm_kernel(code, {5, 20, 33, 20, Values::random, Guard::after}, random, call);
    const auto saved_end = static_cast<std::ptrdiff_t>(slices * vector);
    CHECK(std::equal(saved.begin(), saved.begin() + saved_end, live.begin()));
    CHECK(std::all_of(saved.begin() + saved_end, saved.end(), [](std::uint8_t byte) { return byte == 0xa5; }));
  }
  block = {nullptr, static_cast<std::uint16_t>(vector), {}}; // a caller that has no use for its ZA
  check_int8_mm_kernel(code, {5, 20, 33, 20, Values::random, Guard::after}, random, call);
}

TEST_CASE("code for another vector length than the thread's is exact, without vectors") {
  const SmeMachine machine;
  if (machine.bits == 0)
    return;
  const std::int64_t before = machine.shim ? SmopaShim::executed() : 0;
  std::mt19937 random(3);
  for (const int bits : kVectorBits)
    if (bits != machine.bits) {
      CAPTURE(bits);
      for (const std::int64_t m : {4, 40})
        for (const std::int64_t k : {0, 1, 70}) {
          CodeObject code = ::compile(m, 3 * bits / 32 + 1, k, bits);
          check_int8_mm_kernel(code, {m, 3 * bits / 32 + 1, k, 4 * bits / 32, Values::random, Guard::after}, random,
                               checked_call);
          // NEON's stages leave their flags in FPSR, as they may (AAPCS64, 6.1.3).
          for (const KernelDesc& desc : finished_descs(m, bits / 32 + 3, k))
            check_finished_kernel(kiln::test::compile(path_of(bits), desc), desc,
                                  {std::min<std::int64_t>(m, 4), bits / 32 + 3, k, kAny, Values::random, Guard::after},
                                  random, call_and_check_registers);
        }
    }
  if (machine.shim)
    CHECK(SmopaShim::executed() == before);
}

TEST_CASE("the shim leaves other illegal instructions to the handler before it, and SIGILL as it was") {
  static int caught;
  caught = 0;
  struct sigaction action {
  }, former{}, after{};
  action.sa_flags = SA_SIGINFO;
  action.sa_sigaction = [](int, siginfo_t*, void* context) {
    ++caught;
    static_cast<ucontext_t*>(context)->uc_mcontext.pc += 4;
  };
  ::sigaction(SIGILL, &action, &former);
  {
    const SmopaShim shim;
    asm volatile(".inst 0x0000ffff"); // UDF #65535
    CHECK(caught == 1);
    CHECK(shim.executed() == 0);
  }
  ::sigaction(SIGILL, &former, &after);
  const bool is_back = after.sa_sigaction == action.sa_sigaction;
  CHECK(is_back);
}

TEST_CASE("engine, cache and driver: one pack serves every m, by sdot for one and two rows") {
  const SmeMachine machine;
  if (machine.bits == 0)
    return;
  const std::vector<Implementation> rows = {machine.path.row, arm::int8_mm_sdot()};
  const std::filesystem::path directory =
      std::filesystem::temp_directory_path() / fmt::format("kiln-sme-test-{}", ::getpid());
  const auto make_engine = [&] {
    EngineOptions options;
    options.config.cache_dir = directory / "cache";
    options.config.key_dir = directory / "keys";
    options.config.threads = 3;
    options.machine = detect_machine();
    options.implementations = rows;
    Result<std::unique_ptr<Engine>> engine = Engine::create(std::move(options));
    REQUIRE_MESSAGE(engine.is_ok(), (engine ? "" : engine.status().message()));
    return std::move(*engine);
  };
  std::mt19937 random(35);
  struct Weights {
    std::int64_t n, k, most_rows;
  };
  // The second is worth three threads at its largest m.
  for (const auto& [n, k, most_rows] : {Weights{75, 50, 70}, Weights{610, 190, 80}})
    for (const Source source : {Source::compiled, Source::disk}) {
      const auto engine = make_engine();
      const Result<std::string> layout = engine->pack_layout(int8_mm::make_desc(kAny, n, k));
      REQUIRE(layout.is_ok());
      CHECK(*layout == machine.path.layout);
      std::vector<std::int8_t> a(static_cast<std::size_t>(most_rows * k)), b(static_cast<std::size_t>(n * k));
      fill(a.data(), most_rows * k, Values::random, random);
      fill(b.data(), n * k, Values::random, random);
      std::vector<std::int32_t> expected(static_cast<std::size_t>(most_rows * n));
      int8_mm::reference(most_rows, n, k, a.data(), k, b.data(), k, int8_mm::BLayout::nk, expected.data(), n);
      const Result<int8_mm::Pack> pack = int8_mm::Pack::make(*int8_mm::PackLayout::parse(*layout), b.data(), k,
                                                             int8_mm::BLayout::nk, n, k, engine->runtime().parallel);
      REQUIRE(pack.is_ok());
      for (std::int64_t m = 1; m <= most_rows; m += most_rows > 70 ? 79 : 1) {
        CAPTURE(m);
        const Result<KernelRef> kernel = engine->get(int8_mm::make_desc(m, n, k));
        REQUIRE_MESSAGE(kernel.is_ok(), (kernel ? "" : kernel.status().message()));
        CHECK((*kernel)->implementation().isa == (m <= 2 ? IsaPath::sdot : IsaPath::sme));
        CHECK((*kernel)->source == source);
        CHECK((*kernel)->code().vector_bits == (m <= 2 ? 0 : machine.bits));
        for (const bool packed : {true, false}) {
          if (!packed && m % 7 != 3)
            continue;
          std::vector<std::int32_t> c(static_cast<std::size_t>(m * n), 0x5a5a5a5a);
          const Status status = int8_mm::run(**kernel, {.m = m,
                                                        .a = a.data(),
                                                        .lda = k,
                                                        .pack = packed ? &*pack : nullptr,
                                                        .b = packed ? nullptr : b.data(),
                                                        .ldb = k,
                                                        .c = c.data(),
                                                        .ldc = n});
          CHECK_MESSAGE(status.is_ok(), status.message());
          const bool equal = std::equal(c.begin(), c.end(), expected.begin());
          CHECK(equal);
        }
      }
    }
  const auto engine = make_engine();
  const Explanation explained = engine->explain(int8_mm::make_desc(16, 75, 50), nullptr);
  CHECK(explained.assumes.find("SME unit") != std::string::npos);
  CHECK(explained.key_text.find(fmt::format("vector_bits={}", machine.bits)) != std::string::npos);
  std::filesystem::remove_all(directory);
}
#endif
