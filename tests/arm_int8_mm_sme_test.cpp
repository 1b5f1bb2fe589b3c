#define DOCTEST_CONFIG_IMPLEMENT_WITH_MAIN
#include <doctest/doctest.h>

#include <algorithm>
#include <chrono>
#include <cstring>
#include <memory>
#include <random>
#include <set>
#include <string>
#include <vector>

#include <fmt/format.h>

#include "backends/arm/rows.h"
#include "tests/aarch64_call.h"
#include "tests/int8_mm_kernel_check.h"
#include "tests/llvm_mc.h"
#include "tests/smopa_shim.h"

/// The path `sme` of int8_mm, kernel by kernel: on any host what emission promises, with the words that hardware would
/// run; on a machine with SME the results, through SmopaShim where the machine is an emulator that needs it.

using namespace kiln;
using namespace kiln::test;

namespace {

const Implementation kRow = arm::int8_mm_sme();
constexpr int kVectorBits[] = {128, 256, 512, 1024, 2048};

Target target_of(int sme_bits) {
  return {.arch = Arch::aarch64, .features = {Feature::neon, Feature::dotprod, Feature::sme}, .sme_bits = sme_bits};
}

KernelDesc canonical(std::int64_t m, std::int64_t n, std::int64_t k) {
  return int8_mm::op().canonical(int8_mm::make_desc(m, n, k));
}

CodeObject compile(std::int64_t m, std::int64_t n, std::int64_t k, int sme_bits) {
  const KernelDesc desc = canonical(m, n, k);
  const Target target = target_of(sme_bits);
  Result<CodeObject> code = kRow.compile(desc, target, kRow.pack_layout(desc, target));
  REQUIRE_MESSAGE(code.is_ok(), (code ? "" : code.status().message()));
  return std::move(*code);
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
  KernelDesc desc = int8_mm::make_desc(16, 64, 64);
  CHECK(kRow.supports(desc, target_of(512)).is_ok());
  desc.value[int8_mm::kADtype] = static_cast<std::int64_t>(int8_mm::ADtype::u8);
  CHECK(kRow.supports(desc, target_of(512)).message().find("a_dtype=u8") != std::string::npos);
  desc = int8_mm::make_desc(16, 64, 64);
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
  // Without sdot nothing better is there for one row.
  Target without_dotprod = target_of(512);
  without_dotprod.features.remove(Feature::dotprod);
  CHECK(kRow.declines(canonical(1, 512, 512), without_dotprod).empty());
  CHECK(kRow.assumes(target_of(512)).find("512 bits") != std::string::npos);
}

namespace {

std::vector<std::string> listing(const CodeObject& code) {
  std::vector<std::uint32_t> words(code.image.size() / 4);
  std::memcpy(words.data(), code.image.data(), code.image.size());
  return disassemble(words);
}

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
std::vector<Loop> k_loops(const std::vector<std::string>& lines) {
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
  for (const int bits : kVectorBits) {
    CAPTURE(bits);
    const std::int64_t tile = bits / 32;
    // m unknown: two by two tiles, then one by four for the rest of m, one by two for a last panel.
    const std::vector<Loop> loops = k_loops(listing(compile(kAny, 5 * 2 * tile, 512, bits)));
    REQUIRE(loops.size() == 3);
    CHECK(loops[0].tiles().size() == 4);
    CHECK(loops[0].loads() == loops[0].products());
    CHECK(loops[0].useful() >= 0.9);
    CHECK(loops[1].tiles().size() == 4);
    CHECK(4 * loops[1].loads() == 5 * loops[1].products()); // a vector of A serves four, one of B a single tile
    CHECK(loops[1].useful() >= 0.9);
    CHECK(loops[2].tiles().size() == 2);
    for (const Loop& loop : loops)
      MESSAGE(fmt::format("SVL {}: {} tiles, {} instructions, {} SMOPA, {} loads: {:.3f} useful", bits,
                          loop.tiles().size(), loop.body.size(), loop.products(), loop.loads(), loop.useful()));
  }
}

TEST_CASE("the loop's words are those that llvm-mc makes of its text") {
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
  for (const int bits : kVectorBits)
    for (const std::int64_t m : {std::int64_t{4}, std::int64_t{32}, kAny})
      for (const std::int64_t k : {0, 7, 512}) {
        CAPTURE(bits);
        CAPTURE(m);
        CAPTURE(k);
        const std::vector<std::string> lines = listing(compile(m, 200, k, bits));
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

TEST_CASE("compile time") {
  const Target target = target_of(512);
  for (const std::int64_t m : {std::int64_t{16}, std::int64_t{32}, kAny}) {
    const KernelDesc desc = canonical(m, 528, 500);
    std::vector<double> microseconds;
    for (int i = 0; i < 300; ++i) {
      const auto start = std::chrono::steady_clock::now();
      const Result<CodeObject> code = kRow.compile(desc, target, "n32k4");
      microseconds.push_back(
          std::chrono::duration<double, std::micro>(std::chrono::steady_clock::now() - start).count());
      REQUIRE(code.is_ok());
    }
    std::nth_element(microseconds.begin(), microseconds.begin() + 150, microseconds.end());
    MESSAGE(fmt::format("m={}: {:.1f} us p50, {} bytes", m, microseconds[150], compile(m, 528, 500, 512).image.size()));
  }
}

// ---------------------------------------------------------------- on a machine with SME
#if defined(__aarch64__) && defined(__linux__)
namespace {

/// The machine's streaming vectors, and the shim where its SMOPA is wrong.
struct SmeMachine {
  int bits = detect_machine().target.sme_bits;
  std::unique_ptr<SmopaShim> shim;

  SmeMachine() {
    if (bits == 0) {
      MESSAGE("not run here, the machine lacks SME");
      return;
    }
    if (smopa_is_right()) {
      MESSAGE("SVL ", bits, ": this machine's own SMOPA");
    } else {
      shim = std::make_unique<SmopaShim>();
      MESSAGE("SVL ", bits, ": this machine computes SMOPA wrongly (as qemu 7.2 does): products through SmopaShim");
    }
  }

  CodeObject compile(std::int64_t m, std::int64_t n, std::int64_t k) const {
    CodeObject code = ::compile(m, n, k, bits);
    if (shim)
      CHECK((k == 0 || SmopaShim::rewrite(code) > 0));
    return code;
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
    const CodeObject code = machine.compile(m, n, k);
    if (n_cut == kAny)
      n_cut = n;
    check_int8_mm_kernel(code, {m, n, k, n_cut, values, ++count % 2 == 0 ? Guard::before : Guard::after}, random,
                         checked_call);
  }
};

} // namespace

TEST_CASE("results equal the reference: every class and remainder of m, n and k, between inaccessible pages") {
  const SmeMachine machine;
  if (machine.bits == 0)
    return;
  constexpr unsigned kSeed = 30;
  INFO("seed ", kSeed);
  Checks check{machine, std::mt19937(kSeed)};
  const std::int64_t tile = machine.bits / 32, panel = 2 * tile, vector = 4 * tile;
  const auto products = [&] { return machine.shim ? SmopaShim::executed() : 0; };

  // m: all of the small classes, then around multiples of the tile.
  for (std::int64_t m = 1; m <= 33; ++m)
    check(m, panel + 1 + m % tile, 5 + m % 7);
  for (const std::int64_t blocks : {2, 3, 4})
    for (const std::int64_t around : {-1, 0, 1})
      check(std::max<std::int64_t>(33, blocks * tile + around), 3 * panel, 9);
  // n: around tiles and panels, one call and calls of a group of panels each.
  for (const std::int64_t n : {std::int64_t{1}, tile - 1, tile, tile + 1, panel - 1, panel, panel + 1, 2 * panel - 1,
                               2 * panel, 2 * panel + 1, 3 * panel, 4 * panel + tile + 1, 5 * panel}) {
    check(4, n, 6);
    check(40, n, 3, Values::random, 2 * panel);
  }
  // k: each remainder of the unrolled loop and of the word, and around the vectors that A's copy takes at once.
  for (std::int64_t k = 0; k <= 75; ++k)
    check(k % 5 == 0 ? 37 : 3, tile + 3, k);
  for (const std::int64_t vectors : {1, 2, 3, 4, 5})
    for (const std::int64_t around : {-5, -1, 0, 1, 4})
      check(3, tile, vectors * vector + around);
  // Values that would saturate or overflow 16 bits.
  for (const Values values : kAllValues)
    for (const std::int64_t m : {3, 17, 35})
      check(m, panel + 3, 70, values);
  MESSAGE(check.count, " kernels, ", products(), " products through the shim");
  if (machine.shim)
    CHECK(products() > 0);
}

TEST_CASE("sums wrap") {
  const SmeMachine machine;
  if (machine.bits == 0)
    return;
  // 131073 · (−128)² = 2³¹ + 2¹⁴. The larger vectors take their time under the shim.
  if (machine.shim && machine.bits > 512) {
    MESSAGE("left to SVL up to 512: 130 thousand products through the shim take minutes");
    return;
  }
  Checks check{machine, std::mt19937(1)};
  check(3, 2, 131073, Values::all_lowest);
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
        }
    }
  if (machine.shim)
    CHECK(SmopaShim::executed() == before);
}
#endif
