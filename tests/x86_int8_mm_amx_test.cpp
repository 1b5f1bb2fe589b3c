#include <doctest/doctest.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <immintrin.h>
#include <optional>
#include <random>
#include <string>
#include <sys/mman.h>
#include <vector>

#include "backends/x86/emit.h"
#include "backends/x86/rows.h"
#include "jit/executable_memory.h"
#include "jit/ops/int8_mm.h"
#include "tests/amx_emulator.h"

using namespace kiln;

namespace {

const Implementation kRow = x86::int8_mm_amx();

Result<CodeObject> compile(std::int64_t m, std::int64_t n, std::int64_t k) {
  return kRow.compile(int8_mm::op().canonical(int8_mm::make_desc(m, n, k)), Target{}, kRow.pack_layout({}, {}));
}

/// Memory of exactly `bytes` bytes that ends at, or begins after, an inaccessible page.
class Guarded {
public:
  Guarded(std::size_t bytes, bool at_end, std::size_t alignment) : bytes_(bytes) {
    constexpr std::size_t kPage = 4096;
    usable_ = (bytes + alignment + kPage - 1) / kPage * kPage;
    map_ =
        static_cast<std::uint8_t*>(mmap(nullptr, usable_ + 2 * kPage, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
    REQUIRE(map_ != MAP_FAILED);
    REQUIRE(mprotect(map_ + kPage, usable_, PROT_READ | PROT_WRITE) == 0);
    mapped_ = usable_ + 2 * kPage;
    // An aligned buffer may leave a gap before the page behind it: the caller gives sizes that leave none, where that
    // matters.
    data_ = at_end ? map_ + kPage + (usable_ - bytes) / alignment * alignment : map_ + kPage;
  }
  ~Guarded() { munmap(map_, mapped_); }
  Guarded(const Guarded&) = delete;
  Guarded& operator=(const Guarded&) = delete;
  template <class T> T* as() { return reinterpret_cast<T*>(data_); }
  std::size_t size() const { return bytes_; }
  void fill(int value) { std::memset(data_, value, bytes_); }

private:
  std::uint8_t *map_ = nullptr, *data_ = nullptr;
  std::size_t bytes_, usable_ = 0, mapped_ = 0;
};

enum class Values { random, lowest, highest, alternating };

void fill(std::int8_t* data, std::size_t count, Values values, std::mt19937& random, bool flip) {
  for (std::size_t i = 0; i < count; ++i)
    switch (values) {
    case Values::random:
      data[i] = static_cast<std::int8_t>(random());
      break;
    case Values::lowest:
      data[i] = -128;
      break;
    case Values::highest:
      data[i] = 127;
      break;
    case Values::alternating:
      data[i] = (i % 2 == 0) != flip ? -128 : 127;
      break;
    }
}

/// Calls the entry with a sentinel in every register that it must keep; true when each came back.
bool call_keeps_registers(int8_mm::Entry entry, const int8_mm::Call* call) {
  static std::uint64_t sentinels[6] = {0x1111, 0x2222, 0x3333, 0x4444, 0x5555, 0x6666};
  std::uint64_t differ = 0;
  // The red zone below the stack pointer may hold the compiler's own values.
  asm volatile("lea -128(%%rsp), %%rsp\n\t"
               "push %%rbp\n\t"
               "mov 0(%%rsi), %%rbx\n\t"
               "mov 8(%%rsi), %%rbp\n\t"
               "mov 16(%%rsi), %%r12\n\t"
               "mov 24(%%rsi), %%r13\n\t"
               "mov 32(%%rsi), %%r14\n\t"
               "mov 40(%%rsi), %%r15\n\t"
               "push %%rsi\n\t"
               "sub $8, %%rsp\n\t"
               "call *%%rax\n\t"
               "add $8, %%rsp\n\t"
               "pop %%rsi\n\t"
               "xor 0(%%rsi), %%rbx\n\t"
               "xor 8(%%rsi), %%rbp\n\t"
               "xor 16(%%rsi), %%r12\n\t"
               "xor 24(%%rsi), %%r13\n\t"
               "xor 32(%%rsi), %%r14\n\t"
               "xor 40(%%rsi), %%r15\n\t"
               "mov %%rbx, %%rdx\n\t"
               "or %%rbp, %%rdx\n\t"
               "or %%r12, %%rdx\n\t"
               "or %%r13, %%rdx\n\t"
               "or %%r14, %%rdx\n\t"
               "or %%r15, %%rdx\n\t"
               "pop %%rbp\n\t"
               "lea 128(%%rsp), %%rsp"
               : "=d"(differ), "+a"(entry), "+D"(call)
               : "S"(sentinels)
               : "rbx", "rcx", "r8", "r9", "r10", "r11", "r12", "r13", "r14", "r15", "cc", "memory", "xmm0", "xmm1",
                 "xmm2", "xmm3", "xmm4", "xmm5", "xmm6", "xmm7", "xmm8", "xmm9", "xmm10", "xmm11", "xmm12", "xmm13",
                 "xmm14", "xmm15");
  return differ == 0;
}

struct Case {
  std::int64_t m, n, k;
  Values values = Values::random;
  bool at_end = true; ///< buffers end at an inaccessible page, else begin after one
  std::int64_t lda_extra = 0, ldc_extra = 0;
  std::int64_t split = 0; ///< columns of a first call, 0 for one call; a multiple of n_step
};

/// Runs one case and returns what is wrong, empty when nothing is.
std::string run(const Case& c, ExecutableMemory& memory, std::mt19937& random) {
  const Result<CodeObject> object = compile(c.m, c.n, c.k);
  if (!object)
    return object.status().message();
  const Result<int8_mm::Plan> plan = int8_mm::Plan::from(object->plan);
  const Result<const std::uint8_t*> code = memory.load(object->image, object->alignment);
  if (!plan || !code)
    return "no plan or no executable memory";
  const auto entry = reinterpret_cast<int8_mm::Entry>(reinterpret_cast<std::uintptr_t>(*code));

  const std::int64_t lda = c.k + c.lda_extra, ldc = c.n + c.ldc_extra;
  const auto bytes = [](std::int64_t count) { return static_cast<std::size_t>(std::max<std::int64_t>(count, 0)); };
  // The last row of A and C ends with its last element: nothing of the stride behind it is accessible.
  Guarded a(bytes((c.m - 1) * lda + c.k), c.at_end, 1);
  Guarded sums(bytes(((c.m - 1) * ldc + c.n) * 4), c.at_end, 4);
  Guarded pack(bytes(plan->layout.bytes(c.n, c.k)), c.at_end, 64);
  Guarded workspace(bytes((plan->workspace_bytes(c.m) + 63) / 64 * 64), c.at_end, 64);
  std::vector<std::int8_t> b(bytes(c.n * c.k));
  fill(a.as<std::int8_t>(), a.size(), c.values, random, false);
  fill(b.data(), b.size(), c.values, random, true);
  int8_mm::pack_panels(plan->layout, b.data(), c.k, int8_mm::BLayout::nk, c.n, c.k, 0, plan->layout.panels(c.n),
                       pack.as<std::int8_t>(),
                       reinterpret_cast<std::int32_t*>(pack.as<std::int8_t>() + plan->layout.sums_offset(c.n, c.k)));
  constexpr int kUntouched = 0x5a;
  sums.fill(kUntouched);
  workspace.fill(0xa5);

  for (std::int64_t column = 0; column < c.n;) {
    const std::int64_t columns = column == 0 && c.split > 0 && c.split < c.n ? c.split : c.n - column;
    const int8_mm::Call call = {.a = a.as<std::int8_t>(),
                                .lda = lda,
                                .b = pack.as<std::int8_t>() +
                                     column / plan->layout.n_block * plan->layout.panel_bytes(c.k),
                                .b_sums = nullptr,
                                .c = sums.as<std::int32_t>() + column,
                                .ldc = ldc,
                                .m = c.m,
                                .n = columns,
                                .workspace = workspace.as<std::uint8_t>()};
    if (!call_keeps_registers(entry, &call))
      return "a callee-saved register was lost";
    column += columns;
  }
  memory.release(*code);

  std::vector<std::int32_t> expected(static_cast<std::size_t>(c.m * c.n));
  int8_mm::reference(c.m, c.n, c.k, a.as<std::int8_t>(), lda, b.data(), c.k, int8_mm::BLayout::nk, expected.data(),
                     c.n);
  for (std::int64_t i = 0; i < c.m; ++i)
    for (std::int64_t j = 0; j < (i + 1 < c.m ? ldc : c.n); ++j) {
      const std::int32_t got = sums.as<std::int32_t>()[i * ldc + j];
      const std::int32_t want = j < c.n ? expected[static_cast<std::size_t>(i * c.n + j)] : 0x5a5a5a5a;
      if (got != want)
        return "row " + std::to_string(i) + " column " + std::to_string(j) + ": " + std::to_string(got) +
               ", expected " + std::to_string(want);
    }
  return {};
}

/// Hardware, else the emulator where the machine has the AVX-512 that the kernels also use, else nothing.
struct Tiles {
  std::optional<test::AmxEmulator> emulator;
  bool usable = false;
  Tiles() {
    if (test::amx_available()) {
      usable = true;
      MESSAGE("AMX: hardware");
    } else if (__builtin_cpu_supports("avx512bw")) {
      emulator.emplace();
      usable = true;
      MESSAGE("AMX: emulated");
    } else {
      MESSAGE("AMX: skipped, this machine has neither AMX nor AVX-512");
    }
  }
};

__attribute__((target("amx-tile"))) void load_tile_config(const void* from) {
  _tile_loadconfig(from);
}
__attribute__((target("amx-tile"))) void store_tile_config(void* to) {
  _tile_storeconfig(to);
}

} // namespace

TEST_CASE("tile instructions are encoded as llvm-mc-19 encodes them") {
  // llvm-mc-19 --triple=x86_64 --mattr=+amx-int8,+amx-tile -show-encoding
  namespace r = asmjit::x86;
  const std::vector<std::uint8_t> expected = {
      0xc4, 0xe2, 0x7b, 0x4b, 0x24, 0x16,                         // tileloadd (%rsi,%rdx), %tmm4
      0xc4, 0x82, 0x7b, 0x4b, 0xb4, 0x0d, 0x00, 0x04, 0x00, 0x00, // tileloadd 1024(%r13,%r9), %tmm6
      0xc4, 0xe2, 0x4b, 0x5e, 0xc4,                               // tdpbssd %tmm6, %tmm4, %tmm0
      0xc4, 0xe2, 0x43, 0x5e, 0xdd,                               // tdpbssd %tmm7, %tmm5, %tmm3
      0xc4, 0xe2, 0x41, 0x5e, 0xdd,                               // tdpbusd %tmm7, %tmm5, %tmm3
      0xc4, 0x82, 0x7a, 0x4b, 0x5c, 0x1a, 0x40,                   // tilestored %tmm3, 64(%r10,%r11)
      0xc4, 0xe2, 0x7b, 0x49, 0xd0,                               // tilezero %tmm2
      0xc4, 0xc2, 0x78, 0x49, 0x07,                               // ldtilecfg (%r15)
      0xc4, 0xe2, 0x79, 0x49, 0x43, 0x40,                         // sttilecfg 64(%rbx)
  };
  x86::Assembler a;
  const auto tile = [](std::uint32_t i) { return r::Tmm(i); };
  a.tileloadd(tile(4), r::ptr(r::rsi, r::rdx));
  a.tileloadd(tile(6), r::ptr(r::r13, r::r9, 0, 1024));
  a.tdpbssd(tile(0), tile(4), tile(6));
  a.tdpbssd(tile(3), tile(5), tile(7));
  a.tdpbusd(tile(3), tile(5), tile(7));
  a.tilestored(r::ptr(r::r10, r::r11, 0, 64), tile(3));
  a.tilezero(tile(2));
  a.ldtilecfg(r::ptr(r::r15));
  a.sttilecfg(r::ptr(r::rbx, 64));
  const Result<CodeObject> object = a.finish({}, {});
  REQUIRE(object);
  CHECK(object->image == expected);
}

TEST_CASE("emission is deterministic and names what it needs") {
  for (const std::int64_t m : int8_mm::kMClasses)
    for (const std::int64_t k : {0, 1, 60, 63, 100, 4096}) {
      CAPTURE(m);
      CAPTURE(k);
      const Result<CodeObject> first = compile(m, 100, k), second = compile(m, 100, k);
      REQUIRE(first);
      REQUIRE(second);
      CHECK(*first == *second);
      CHECK(first->features == kRow.needs);
      const Result<int8_mm::Plan> plan = int8_mm::Plan::from(first->plan);
      REQUIRE(plan);
      CHECK(plan->layout.id() == kRow.pack_layout({}, {}));
    }
}

TEST_CASE("results equal the reference for every remainder of M, N and K") {
  const Tiles tiles;
  if (!tiles.usable)
    return;
  const auto seed = std::random_device{}();
  INFO("seed ", seed);
  std::mt19937 random(seed);
  ExecutableMemory memory;
  const auto check = [&](const Case& c) {
    INFO("m=", c.m, " n=", c.n, " k=", c.k, " values=", static_cast<int>(c.values), " at_end=", c.at_end, " lda+",
         c.lda_extra, " ldc+", c.ldc_extra, " split=", c.split);
    CHECK(run(c, memory, random) == "");
  };

  SUBCASE("K around the tile's 64") {
    for (std::int64_t k = 0; k <= 131; ++k)
      for (const bool at_end : {true, false})
        check({.m = 1 + k % 40, .n = 17, .k = k, .at_end = at_end, .lda_extra = k % 3});
  }
  SUBCASE("M through every class") {
    for (std::int64_t m = 1; m <= 100; ++m)
      check({.m = m, .n = 33 + m % 3 * 16, .k = m % 2 == 0 ? 64 : 70, .at_end = m % 3 != 0, .ldc_extra = m % 5});
  }
  SUBCASE("N around the group's 64") {
    for (std::int64_t n = 1; n <= 132; ++n)
      check({.m = n % 2 == 0 ? 5 : 49, .n = n, .k = 66, .at_end = n % 3 != 0});
  }
  SUBCASE("a call for each range of columns") {
    for (const std::int64_t n : {65, 100, 128, 200})
      for (const std::int64_t m : {3, 17, 40})
        check({.m = m, .n = n, .k = 130, .split = 64});
  }
  SUBCASE("sampled shapes and values") {
    constexpr std::int64_t kSizes[] = {1, 2, 3, 7, 8, 15, 16, 17, 31, 33, 63, 64, 65, 100, 255, 257};
    const auto any_size = [&] { return kSizes[random() % std::size(kSizes)]; };
    for (int i = 0; i < 120; ++i)
      check({.m = any_size(),
             .n = any_size(),
             .k = any_size(),
             .values = static_cast<Values>(i % 4),
             .at_end = i % 3 != 0,
             .lda_extra = static_cast<std::int64_t>(random() % 70),
             .ldc_extra = static_cast<std::int64_t>(random() % 20)});
  }
  SUBCASE("chunks of K and blocks of columns") {
    for (const std::int64_t k : {513, 1024, 1090, 8200})
      for (const std::int64_t m : {17, 33, 50})
        for (const std::int64_t n : {64, 70, 96, 130, 200})
          check({.m = m, .n = n, .k = k, .at_end = m != 33, .ldc_extra = 3});
  }
  SUBCASE("rows that become tiles during the block before") {
    // One row or two for each pair of panels, one block of columns or more, and calls with too few columns to finish
    // the copy.
    for (const std::int64_t m : {48, 49, 64, 65, 97, 113})
      for (const std::int64_t n : {512, 550, 1024})
        check({.m = m, .n = n, .k = 256, .at_end = m % 2 == 0, .lda_extra = m % 3 * 7, .ldc_extra = 2});
    for (const std::int64_t m : {70, 100})
      check({.m = m, .n = 1104, .k = 1024, .lda_extra = 5});
    for (const std::int64_t split : {64, 448, 512})
      check({.m = 100, .n = 600, .k = 320, .split = split});
    check({.m = 100, .n = 1200, .k = 1024, .split = 1088});
  }
  SUBCASE("sums that wrap") {
    check({.m = 2, .n = 3, .k = 140000, .values = Values::lowest});
  }
  if (tiles.emulator)
    CHECK(tiles.emulator->executed() > 0);
}

TEST_CASE("a call gives the caller's tile configuration back") {
  const Tiles tiles;
  if (!tiles.usable)
    return;
  ExecutableMemory memory;
  std::mt19937 random(1);
  alignas(64) std::uint8_t initial[64] = {}, ours[64] = {}, after[64];
  ours[0] = 1;
  ours[16] = 32;
  ours[48] = 7;
  for (const std::uint8_t* config : {initial, ours}) {
    load_tile_config(config);
    CHECK(run({.m = 3, .n = 20, .k = 70}, memory, random) == "");
    store_tile_config(after);
    CHECK(std::memcmp(after, config, sizeof after) == 0);
  }
  load_tile_config(initial);
}
