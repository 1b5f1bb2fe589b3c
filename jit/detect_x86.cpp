#ifdef __x86_64__
#include <cpuid.h>
#include <cstring>

#include "jit/os.h"
#include "jit/target.h"

namespace kiln {
namespace {

// Leaves, bits and state components: Intel SDM volume 2 (CPUID) and volume 1 chapter 13 (XSAVE); AMD APM volume 3
// appendix E.
struct Leaf {
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
};

Leaf execute_cpuid(unsigned leaf, unsigned subleaf) {
  Leaf out;
  __cpuid_count(leaf, subleaf, out.eax, out.ebx, out.ecx, out.edx);
  return out;
}

/// Zeros when the processor does not have the leaf. (Under a hypervisor each CPUID is a trap of some 4 µs: hence no
/// __get_cpuid_count, which asks twice.)
Leaf cpuid(unsigned leaf, unsigned subleaf = 0) {
  static const unsigned last_basic = execute_cpuid(0, 0).eax, last_extended = execute_cpuid(0x80000000, 0).eax;
  return leaf <= (leaf < 0x80000000 ? last_basic : last_extended) ? execute_cpuid(leaf, subleaf) : Leaf{};
}

constexpr bool bit(unsigned value, int index) {
  return (value >> index & 1) != 0;
}

/// XCR0: which register state the system saves, without which an instruction set is not to be used.
std::uint64_t saved_state() {
  unsigned low, high;
  __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return std::uint64_t{high} << 32 | low;
}

Features detect_features() {
  constexpr std::uint64_t kAvxState = 0x6, kAvx512State = 0xe6, kTileState = 0x60000;
  Features features;
  const auto add_if = [&](bool has, Feature feature) {
    if (has)
      features.add(feature);
  };
  const Leaf leaf1 = cpuid(1);
  const bool has_xgetbv = bit(leaf1.ecx, 27), has_avx = bit(leaf1.ecx, 28);
  if (!has_xgetbv || !has_avx)
    return features;
  const std::uint64_t saved = saved_state();
  const auto saves = [&](std::uint64_t state) { return (saved & state) == state; };
  if (!saves(kAvxState))
    return features;

  const Leaf leaf7 = cpuid(7, 0);
  const Leaf leaf7_1 = leaf7.eax >= 1 ? cpuid(7, 1) : Leaf{};
  add_if(bit(leaf7.ebx, 5), Feature::avx2);
  add_if(bit(leaf1.ecx, 12), Feature::fma);
  add_if(bit(leaf1.ecx, 29), Feature::f16c);
  add_if(bit(leaf7.ebx, 8), Feature::bmi2);
  add_if(bit(leaf7_1.eax, 4), Feature::avxvnni);
  if (saves(kAvx512State) && bit(leaf7.ebx, 16)) {
    features.add(Feature::avx512f);
    add_if(bit(leaf7.ebx, 30), Feature::avx512bw);
    add_if(bit(leaf7.ebx, 31), Feature::avx512vl);
    add_if(bit(leaf7.ebx, 17), Feature::avx512dq);
    add_if(bit(leaf7.ecx, 11), Feature::avx512vnni);
    add_if(bit(leaf7_1.eax, 5), Feature::avx512bf16);
  }
  if (saves(kTileState) && bit(leaf7.edx, 24) && os::request_amx_tiles()) {
    features.add(Feature::amx_tile);
    add_if(bit(leaf7.edx, 25), Feature::amx_int8);
    add_if(bit(leaf7.edx, 22), Feature::amx_bf16);
  }
  return features;
}

std::string brand() {
  char text[49] = {};
  for (unsigned i = 0; i < 3; ++i) {
    const Leaf leaf = cpuid(0x80000002 + i);
    std::memcpy(text + 16 * i, &leaf, sizeof leaf);
  }
  std::string name = text;
  name.erase(0, name.find_first_not_of(' '));
  name.erase(name.find_last_not_of(' ') + 1);
  return name;
}

/// Deterministic cache parameters: leaf 4 (Intel), or 0x8000001D with the same layout (AMD).
os::CacheSizes caches_by_cpuid(unsigned leaf_number) {
  os::CacheSizes sizes;
  for (unsigned i = 0; i < 8; ++i) {
    const Leaf leaf = cpuid(leaf_number, i);
    const unsigned type = leaf.eax & 31, level = leaf.eax >> 5 & 7;
    if (type == 0)
      break;
    constexpr unsigned kInstruction = 2;
    if (type == kInstruction)
      continue;
    const std::int64_t ways = (leaf.ebx >> 22) + 1, partitions = (leaf.ebx >> 12 & 0x3ff) + 1,
                       line = (leaf.ebx & 0xfff) + 1, sets = std::int64_t{leaf.ecx} + 1;
    (level == 1 ? sizes.l1d : level == 2 ? sizes.l2 : sizes.l3) = ways * partitions * line * sets;
  }
  return sizes;
}

os::CacheSizes detect_caches() {
  for (unsigned leaf : {0x8000001Du, 4u})
    if (const os::CacheSizes sizes = caches_by_cpuid(leaf); sizes.l1d > 0 && sizes.l2 > 0)
      return sizes;
  return os::cache_sizes();
}

} // namespace

Machine detect_machine() {
  Machine machine;
  machine.target.arch = Arch::x86_64;
  machine.target.features = detect_features();
  machine.cpu_name = brand();
  machine.cores = os::usable_cores();
  const os::CacheSizes caches = detect_caches();
  if (caches.l1d > 0)
    machine.l1d_bytes = caches.l1d;
  if (caches.l2 > 0)
    machine.l2_bytes = caches.l2;
  machine.l3_bytes = caches.l3;
  return machine;
}

} // namespace kiln
#endif
