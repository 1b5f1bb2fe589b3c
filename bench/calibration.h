#pragma once
#include <cstddef>
#include <cstdint>
#include <span>
#include <string>
#include <string_view>

/// The machine's limits, from loops that do nothing else: multiply-adds between registers, and plain reads.
/// x86-64; a loop that the CPU lacks instructions for is not offered.
namespace kiln::bench {

/// Runs a chain of `links` dependent 64-bit `imul`, three cycles each on every x86-64 core since 2008 (Intel
/// optimisation manual, Agner Fog's tables). Not a chain of `add`: cores of 2023 and later fold those. Clock = 3 ·
/// links / seconds.
void run_clock_chain(std::uint64_t links);
inline constexpr double kCyclesPerLink = 3;

/// A register-only loop over one ISA path's multiply-add, on random data.
struct ComputeLoop {
  std::string_view isa;         ///< of the Kiln path whose limit this is
  std::string_view instruction; ///< what it repeats
  double operations;            ///< a step of the loop: multiply and add each count one
  double operations_per_cycle;  ///< that this core can do (its manual, unless a comment says otherwise), 0 where it is
                                ///< not known
  void (*run)(std::uint64_t steps);
};
/// Of int8_mm's paths, those that this CPU can run.
std::span<const ComputeLoop> compute_loops();
/// Those of attention's paths, f32 sums of bf16 pairs or f32 values.
std::span<const ComputeLoop> float_compute_loops();
/// Null when the CPU lacks the path.
const ComputeLoop* compute_loop(std::string_view isa);

/// A loop that reads `bytes` (a multiple of 4096) from `data` (64-byte aligned) once and does nothing with them.
struct ReadLoop {
  std::string_view name;
  void (*run)(const void* data, std::size_t bytes);
};
/// Those that this CPU can run, to take the fastest of.
std::span<const ReadLoop> read_loops();

} // namespace kiln::bench
