#include "bench/calibration.h"

#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <array>
#include <cstring>
#include <vector>

/// Inline assembly throughout: a compiler would fold, spill or vectorise differently what must be exactly these
/// instructions.
namespace kiln::bench {
namespace {

/// Fixed random bytes for the operand registers: constants of few bits would save power and raise the clock.
alignas(64) constexpr std::array<std::uint8_t, 4096> kNoise = [] {
  std::array<std::uint8_t, 4096> noise{};
  std::uint64_t state = 1;
  for (std::uint8_t& byte : noise) {
    state = state * 6364136223846793005ull + 1442695040888963407ull;
    byte = static_cast<std::uint8_t>(state >> 56);
  }
  return noise;
}();

/// The same as floats and as pairs of bf16 between 1 and 2 in size, of either sign: sums stay finite.
alignas(64) constexpr std::array<std::uint32_t, 32> kFloatNoise = [] {
  std::array<std::uint32_t, 32> noise{};
  for (std::size_t i = 0; i < noise.size(); ++i) {
    const std::uint32_t bits = kNoise[4 * i] | std::uint32_t{kNoise[4 * i + 1]} << 8 |
                               std::uint32_t{kNoise[4 * i + 2]} << 16 | std::uint32_t{kNoise[4 * i + 3]} << 24;
    noise[i] = (bits & 0x807F807F) | 0x3F803F80;
  }
  return noise;
}();

/// Likewise, for tiles.
alignas(64) constexpr std::array<std::uint8_t, 4096> kTileFloatNoise = [] {
  std::array<std::uint8_t, 4096> noise{};
  for (std::size_t i = 0; i < noise.size(); ++i)
    noise[i] = i % 2 == 0 ? kNoise[i] | 0x80 : (kNoise[i] & 0x80) | 0x3F;
  return noise;
}();

#define SIXTEEN(F) F(0) F(1) F(2) F(3) F(4) F(5) F(6) F(7) F(8) F(9) F(10) F(11) F(12) F(13) F(14) F(15)
#define FOURTEEN(F) F(0) F(1) F(2) F(3) F(4) F(5) F(6) F(7) F(8) F(9) F(10) F(11) F(12) F(13)

#define VECTOR_CLOBBERS                                                                                                \
  "xmm0", "xmm1", "xmm2", "xmm3", "xmm4", "xmm5", "xmm6", "xmm7", "xmm8", "xmm9", "xmm10", "xmm11", "xmm12", "xmm13",  \
      "xmm14", "xmm15"

// As many accumulators as registers allow: latency 4–5 times two pipes is at most ten.

__attribute__((target("avx512f"))) void run_vnni512(std::uint64_t steps) {
#define CLEAR(i) "vpxord %%zmm" #i ", %%zmm" #i ", %%zmm" #i "\n"
#define DOT(i) "vpdpbusd %%zmm31, %%zmm30, %%zmm" #i "\n"
  asm volatile("vmovdqa64 (%1), %%zmm30\n vmovdqa64 64(%1), %%zmm31\n" SIXTEEN(
                   CLEAR) ".p2align 6\n"
                          "1:\n" SIXTEEN(DOT) SIXTEEN(DOT) "dec %0\n jnz 1b\n vzeroupper"
               : "+r"(steps)
               : "r"(kNoise.data())
               : VECTOR_CLOBBERS, "xmm30", "xmm31", "cc");
#undef DOT
}

__attribute__((target("avx512f"))) void run_bf16(std::uint64_t steps) {
#define DOT(i) "vdpbf16ps %%zmm31, %%zmm30, %%zmm" #i "\n"
  asm volatile("vmovdqa64 (%1), %%zmm30\n vmovdqa64 64(%1), %%zmm31\n" SIXTEEN(
                   CLEAR) ".p2align 6\n"
                          "1:\n" SIXTEEN(DOT) SIXTEEN(DOT) "dec %0\n jnz 1b\n vzeroupper"
               : "+r"(steps)
               : "r"(kFloatNoise.data())
               : VECTOR_CLOBBERS, "xmm30", "xmm31", "cc");
#undef DOT
}

__attribute__((target("avx512f"))) void run_fma512(std::uint64_t steps) {
#define FMA(i) "vfmadd231ps %%zmm31, %%zmm30, %%zmm" #i "\n"
  asm volatile("vmovdqa64 (%1), %%zmm30\n vmovdqa64 64(%1), %%zmm31\n" SIXTEEN(
                   CLEAR) ".p2align 6\n"
                          "1:\n" SIXTEEN(FMA) SIXTEEN(FMA) "dec %0\n jnz 1b\n vzeroupper"
               : "+r"(steps)
               : "r"(kFloatNoise.data())
               : VECTOR_CLOBBERS, "xmm30", "xmm31", "cc");
#undef FMA
#undef CLEAR
}

__attribute__((target("avx2,fma"))) void run_fma256(std::uint64_t steps) {
#define CLEAR(i) "vpxor %%ymm" #i ", %%ymm" #i ", %%ymm" #i "\n"
#define FMA(i) "vfmadd231ps %%ymm15, %%ymm14, %%ymm" #i "\n"
  asm volatile("vmovdqa (%1), %%ymm14\n vmovdqa 32(%1), %%ymm15\n" FOURTEEN(
                   CLEAR) ".p2align 6\n"
                          "1:\n" FOURTEEN(FMA) FOURTEEN(FMA) "dec %0\n jnz 1b\n vzeroupper"
               : "+r"(steps)
               : "r"(kFloatNoise.data())
               : VECTOR_CLOBBERS, "cc");
#undef FMA
#undef CLEAR
}

__attribute__((target("avx2"))) void run_vnni256(std::uint64_t steps) {
#define CLEAR(i) "vpxor %%ymm" #i ", %%ymm" #i ", %%ymm" #i "\n"
#define DOT(i) "%{vex%} vpdpbusd %%ymm15, %%ymm14, %%ymm" #i "\n"
  asm volatile("vmovdqa (%1), %%ymm14\n vmovdqa 32(%1), %%ymm15\n" FOURTEEN(
                   CLEAR) ".p2align 6\n"
                          "1:\n" FOURTEEN(DOT) FOURTEEN(DOT) "dec %0\n jnz 1b\n vzeroupper"
               : "+r"(steps)
               : "r"(kNoise.data())
               : VECTOR_CLOBBERS, "cc");
#undef DOT
}

/// A product is added two instructions late, from the register that is written next: of some 200,000 random orders,
/// with up to five registers for products, none was faster on Zen 5.
__attribute__((target("avx2"))) void run_madd256(std::uint64_t steps) {
#define MADD_ADD(product, older, sum)                                                                                  \
  "vpmaddwd %%ymm15, %%ymm14, %%ymm" #product "\n vpaddd %%ymm" #older ", %%ymm" #sum ", %%ymm" #sum "\n"
#define FOUR_PAIRS(s0, s1, s2, s3) MADD_ADD(10, 11, s0) MADD_ADD(11, 12, s1) MADD_ADD(12, 13, s2) MADD_ADD(13, 10, s3)
  asm volatile("vmovdqa (%1), %%ymm14\n vmovdqa 32(%1), %%ymm15\n" FOURTEEN(
                   CLEAR) ".p2align 6\n"
                          "1:\n" FOUR_PAIRS(0, 1, 2, 3) FOUR_PAIRS(4, 5, 6, 7) "dec %0\n jnz 1b\n vzeroupper"
               : "+r"(steps)
               : "r"(kNoise.data())
               : VECTOR_CLOBBERS, "cc");
#undef FOUR_PAIRS
#undef MADD_ADD
#undef CLEAR
}

/// Palette 1, eight tiles of 16 rows × 64 bytes (Intel SDM, LDTILECFG). Four accumulators: 52 cycles of latency, one
/// tile per 16.
struct alignas(64) TileConfig {
  std::uint8_t palette = 1, start_row = 0, reserved[14] = {};
  std::uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  std::uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};
constexpr TileConfig kTileConfig;

#define TILE_LOOP(product)                                                                                             \
  "ldtilecfg (%1)\n"                                                                                                   \
  "tilezero %%tmm0\n tilezero %%tmm1\n tilezero %%tmm2\n tilezero %%tmm3\n"                                            \
  "tileloadd (%2,%3), %%tmm4\n tileloadd 1024(%2,%3), %%tmm5\n"                                                        \
  "tileloadd 2048(%2,%3), %%tmm6\n tileloadd 3072(%2,%3), %%tmm7\n"                                                    \
  "1:\n" product " %%tmm6, %%tmm4, %%tmm0\n " product " %%tmm7, %%tmm4, %%tmm1\n" product                              \
  " %%tmm6, %%tmm5, %%tmm2\n " product " %%tmm7, %%tmm5, %%tmm3\n"                                                     \
  "dec %0\n jnz 1b\n tilerelease"

void run_amx(std::uint64_t steps) {
  asm volatile(TILE_LOOP("tdpbssd")
               : "+r"(steps)
               : "r"(&kTileConfig), "r"(kNoise.data()), "r"(std::uint64_t{64})
               : "cc", "memory");
}

void run_amx_bf16(std::uint64_t steps) {
  asm volatile(TILE_LOOP("tdpbf16ps")
               : "+r"(steps)
               : "r"(&kTileConfig), "r"(kTileFloatNoise.data()), "r"(std::uint64_t{64})
               : "cc", "memory");
}
#undef TILE_LOOP

struct Cpu {
  bool avx2 = false, avxvnni = false, avx512 = false, avx512vnni = false, avx512bf16 = false, amx = false,
       amx_bf16 = false;
  bool zen5 = false, golden_cove = false;
};

Cpu detect() {
  Cpu cpu;
  unsigned a = 0, b = 0, c = 0, d = 0;
  __get_cpuid(1, &a, &b, &c, &d);
  if ((c >> 27 & 1) == 0) // OSXSAVE
    return cpu;
  const unsigned family = (a >> 8 & 15) + (a >> 20 & 255), model = (a >> 4 & 15) | (a >> 12 & 0xF0);
  unsigned vendor = 0;
  __get_cpuid(0, &a, &vendor, &c, &d);
  unsigned enabled = 0, high = 0;
  asm("xgetbv" : "=a"(enabled), "=d"(high) : "c"(0));
  const bool ymm = (enabled & 0x6) == 0x6, zmm = (enabled & 0xE6) == 0xE6, tiles = (enabled & 0x60000) == 0x60000;
  __get_cpuid_count(7, 0, &a, &b, &c, &d);
  cpu.avx2 = ymm && (b >> 5 & 1);
  cpu.avx512 = zmm && (b >> 16 & 1);
  cpu.avx512vnni = cpu.avx512 && (c >> 11 & 1);
  constexpr int kRequestPermission = 0x1023, kTileData = 18; // arch_prctl, Documentation/arch/x86/xstate.rst
  cpu.amx = tiles && (d >> 24 & 3) == 3 && syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
  cpu.amx_bf16 = cpu.amx && (d >> 22 & 1);
  unsigned more = 0;
  __get_cpuid_count(7, 1, &more, &b, &c, &d);
  cpu.avxvnni = cpu.avx2 && (more >> 4 & 1);
  cpu.avx512bf16 = cpu.avx512 && (more >> 5 & 1);
  constexpr unsigned kAmd = 0x68747541, kIntel = 0x756E6547; // "Auth", "Genu"
  cpu.zen5 = vendor == kAmd && family == 0x1A;
  cpu.golden_cove = vendor == kIntel && family == 6 && (model == 0x8F || model == 0xCF); // Sapphire, Emerald Rapids
  return cpu;
}

const Cpu& cpu() {
  static const Cpu detected = detect();
  return detected;
}

// Reads. The data is not used; the loads are volatile assembly, so they are made.

template <int streams> __attribute__((target("avx512f"))) void read512(const void* data, std::size_t bytes) {
  const auto* at = static_cast<const char*>(data);
  const std::size_t stride = bytes / streams;
  for (std::size_t i = 0; i < stride; i += 1024 / streams)
    for (int stream = 0; stream < streams; ++stream)
      for (int line = 0; line < 16 / streams; ++line)
        asm volatile("vmovdqa64 %0, %%zmm0"
                     :
                     : "m"(*(at + i + static_cast<std::size_t>(stream) * stride + line * 64))
                     : "xmm0");
}

template <int ahead> __attribute__((target("avx512f"))) void read512_prefetched(const void* data, std::size_t bytes) {
  const auto* at = static_cast<const char*>(data);
  for (std::size_t i = 0; i < bytes; i += 512)
    for (int line = 0; line < 8; ++line) {
      asm volatile("prefetcht0 %0" : : "m"(*(at + i + line * 64 + ahead)));
      asm volatile("vmovdqa64 %0, %%zmm0" : : "m"(*(at + i + line * 64)) : "xmm0");
    }
}

template <int streams> __attribute__((target("avx2"))) void read256(const void* data, std::size_t bytes) {
  const auto* at = static_cast<const char*>(data);
  const std::size_t stride = bytes / streams;
  for (std::size_t i = 0; i < stride; i += 1024 / streams)
    for (int stream = 0; stream < streams; ++stream)
      for (int half = 0; half < 32 / streams; ++half)
        asm volatile("vmovdqa %0, %%ymm0"
                     :
                     : "m"(*(at + i + static_cast<std::size_t>(stream) * stride + half * 32))
                     : "xmm0");
}

} // namespace

void run_clock_chain(std::uint64_t links) {
  std::uint64_t value = 3, steps = (links + 15) / 16;
#define LINK(i) "imul %0, %0\n"
  asm volatile("1:\n" SIXTEEN(LINK) "dec %1\n jnz 1b" : "+r"(value), "+r"(steps) : : "cc");
#undef LINK
}

std::span<const ComputeLoop> compute_loops() {
  static const std::vector<ComputeLoop> loops = [] {
    // Zen 5: software optimisation guide 58455, two multiply and four add pipes; an add that consumes a product keeps
    // it from two pairs a cycle (1.99 with adds of anything else, 1.85 at best with them). Golden Cove: uops.info;
    // vpaddd shares ports 0 and 1 with vpmaddwd and has port 5 beside: three operations for two pairs.
    std::vector<ComputeLoop> list;
    const auto pipes = [](double zen5, double golden_cove) {
      return cpu().zen5 ? zen5 : cpu().golden_cove ? golden_cove : 0.0;
    };
    if (cpu().amx)
      list.push_back(
          {"amx", "tdpbssd, random tiles", 4 * 2 * 16 * 16 * 64, pipes(0, 2 * 16 * 16 * 64 / 16.0), run_amx});
    if (cpu().avx512vnni)
      list.push_back({"avx512vnni", "vpdpbusd zmm", 32 * 2 * 64, 128 * pipes(2, 2), run_vnni512});
    if (cpu().avxvnni)
      list.push_back({"avxvnni", "vpdpbusd ymm", 28 * 2 * 32, 64 * pipes(2, 2), run_vnni256});
    if (cpu().avx2)
      list.push_back({"avx2", "vpmaddwd + vpaddd ymm", 8 * 2 * 16, 32 * pipes(1.85, 1.5), run_madd256});
    return list;
  }();
  return loops;
}

std::span<const ComputeLoop> float_compute_loops() {
  static const std::vector<ComputeLoop> loops = [] {
    std::vector<ComputeLoop> list;
    if (cpu().amx_bf16)
      list.push_back(
          {"amx", "tdpbf16ps, random tiles", 4 * 2 * 16 * 16 * 32, cpu().golden_cove ? 1024.0 : 0.0, run_amx_bf16});
    if (cpu().avx512bf16)
      list.push_back({"avx512bf16", "vdpbf16ps zmm", 32 * 2 * 32, 0, run_bf16});
    if (cpu().avx512)
      list.push_back({"portable", "vfmadd231ps zmm", 32 * 2 * 16, 0, run_fma512});
    else if (cpu().avx2)
      list.push_back({"portable", "vfmadd231ps ymm", 28 * 2 * 8, 0, run_fma256});
    return list;
  }();
  return loops;
}

const ComputeLoop* compute_loop(std::string_view isa) {
  for (const ComputeLoop& loop : compute_loops())
    if (loop.isa == isa)
      return &loop;
  return nullptr;
}

std::span<const ReadLoop> read_loops() {
  static const std::vector<ReadLoop> loops = [] {
    std::vector<ReadLoop> list;
    if (cpu().avx512)
      list = {{"512-bit", read512<1>},
              {"512-bit, 2 streams", read512<2>},
              {"512-bit, 4 streams", read512<4>},
              {"512-bit, prefetch 1 KiB ahead", read512_prefetched<1024>},
              {"512-bit, prefetch 4 KiB ahead", read512_prefetched<4096>}};
    if (cpu().avx2) {
      list.push_back({"256-bit", read256<1>});
      list.push_back({"256-bit, 4 streams", read256<4>});
    }
    return list;
  }();
  return loops;
}

} // namespace kiln::bench
