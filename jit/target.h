#pragma once
#include <compare>
#include <cstdint>
#include <initializer_list>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "cache/status.h"

namespace kiln {

enum class Arch : std::uint8_t { x86_64, aarch64, nvptx };
std::string_view name_of(Arch arch);

/// CPU features that some kernel needs. Names (target.cpp's table) are those of LLVM's `target-features`.
enum class Feature : std::uint8_t {
  // x86_64
  avx2,
  fma,
  f16c,
  bmi2,
  avxvnni,
  avx512f,
  avx512bw,
  avx512vl,
  avx512dq,
  avx512vnni,
  avx512bf16,
  amx_tile,
  amx_int8,
  amx_bf16,
  // aarch64
  neon,
  dotprod,
  i8mm,
  bf16,
  fp16,
  sve,
  sve2,
  sme,
  sme2,
  count
};
std::string_view name_of(Feature feature);

/// A set of features, as a plain value.
class Features {
public:
  constexpr Features() = default;
  constexpr Features(std::initializer_list<Feature> list) {
    for (Feature f : list)
      add(f);
  }
  constexpr void add(Feature f) { bits_ |= bit(f); }
  constexpr void remove(Feature f) { bits_ &= ~bit(f); }
  constexpr bool has(Feature f) const { return (bits_ & bit(f)) != 0; }
  constexpr bool contains(Features other) const { return (bits_ & other.bits_) == other.bits_; }
  constexpr Features without(Features other) const {
    Features f;
    f.bits_ = bits_ & ~other.bits_;
    return f;
  }
  constexpr bool empty() const { return bits_ == 0; }
  constexpr auto operator<=>(const Features&) const = default;
  std::vector<Feature> list() const;
  /// `avx2,fma`, in the order of the enum; empty for none.
  std::string text() const;
  /// Of what text() gives. Names an unknown feature and the known ones.
  static Result<Features> parse(std::string_view text);

private:
  static constexpr std::uint64_t bit(Feature f) { return std::uint64_t{1} << static_cast<int>(f); }
  std::uint64_t bits_ = 0;
};

/// Every feature that a machine of this architecture may have.
Features features_of(Arch arch);

/// From compute capability 9.0 on, what the kernels use is specific to the architecture, which PTX names with an `a`:
/// no other SM runs it.
inline constexpr std::int32_t kFirstArchSpecificSm = 90;

/// A whole machine as far as code generation can tell: `x86_64:avx2,fma,...`, `aarch64:neon,dotprod;sve=256;sme=512`,
/// `nvptx:sm_90a`. A kernel's key holds only what the kernel uses of it.
struct Target {
  Arch arch = Arch::x86_64;
  Features features;
  int sve_bits = 0; ///< SVE vector length, 0 without SVE
  int sme_bits = 0; ///< streaming vector length, 0 without SME
  int sm = 0;       ///< NVIDIA: 10·major + minor, 0 otherwise
  bool operator==(const Target&) const = default;

  std::string text() const;
  /// Of what text() gives, or the name of a known class of machines (known_targets()). Lists the valid names otherwise.
  static Result<Target> parse(std::string_view text);
};

struct KnownTarget {
  std::string_view name; ///< `x86-64-v3`, `sapphirerapids`, …
  std::string_view text;
};
std::span<const KnownTarget> known_targets();

/// What the running machine is: its Target, and what steers the drivers at run time but is never part of a key.
struct Machine {
  Target target;
  std::string cpu_name;
  int cores = 1;                                                       ///< that this process may run on
  std::int64_t l1d_bytes = 32 << 10, l2_bytes = 1 << 20, l3_bytes = 0; ///< per core, per core, shared
};
/// Asks CPU and operating system (one file per system). Requests what a feature needs from the system (AMX tile data)
/// and leaves out a feature that the system refuses. Costs about 0.2 ms: CPUID traps in virtual machines.
Machine detect_machine();

} // namespace kiln
