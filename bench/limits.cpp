/// machine_limits: prints what this machine computes (s8 multiply-adds by its fastest instruction, GOPS) and reads
/// (memory, GB/s), on all cores at once: two numbers, each the best of several samples. scripts/run puts them beside
/// the example host's figures.
#include <algorithm>
#include <cstdio>

#include "bench/calibration.h"
#include "bench/machine.h"

using namespace kiln::bench;

int main() {
  if (compute_loops().empty() || read_loops().empty()) {
    std::fprintf(stderr, "machine_limits: no calibration loop for this CPU\n");
    return 1;
  }
  Team team(allowed_cpus());
  const auto threads = static_cast<double>(team.size());
  constexpr int samples = 20;

  double gops = 0;
  for (const ComputeLoop& loop : compute_loops()) {
    constexpr std::uint64_t steps = 50000; // a few milliseconds
    for (int i = 0; i < samples; ++i) {
      const double seconds = team.run([&](std::size_t) { loop.run(steps); });
      gops = std::max(gops, threads * loop.operations * static_cast<double>(steps) / seconds / 1e9);
    }
  }

  const HugeBuffer buffer(std::size_t{512} << 20); // beyond every cache
  fill_random(buffer, 1);
  const std::size_t share = buffer.size() / team.size() / 4096 * 4096;
  double gbps = 0;
  for (const ReadLoop& loop : read_loops())
    for (int i = 0; i < samples; ++i) {
      const double seconds = team.run([&](std::size_t member) { loop.run(buffer.as<char>() + member * share, share); });
      gbps = std::max(gbps, threads * static_cast<double>(share) / seconds / 1e9);
    }
  std::printf("%.0f %.1f\n", gops, gbps);
  return 0;
}
