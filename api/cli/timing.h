#pragma once
#include <chrono>
#include <optional>

#include "api/cli/op_runner.h"
#include "api/cli/output.h"
#include "cache/status.h"
#include "jit/desc.h"
#include "jit/kernel.h"

namespace kiln::cli {

struct Timing {
  double min_us = 0, median_us = 0;
  std::size_t calls = 0;
  std::optional<Invocation::Work> work{}; ///< of a call, where it is not that of the desc
};

/// Calls at least `calls` times and for at least `duration`, after one call that is not counted.
Result<Timing> time_calls(const Invocation& invocation, std::size_t calls, std::chrono::microseconds duration);

/// Rates of the fastest call; 0 for an empty problem.
double gops(const KernelDesc& desc, const Timing& timing);
double gbps(const KernelDesc& desc, const Timing& timing);

/// `op, key, backend, isa, source, compile_us, load_us, run_us{min,median}, gops, gbps`
Json run_report(const KernelDesc& desc, const Kernel& kernel, const Timing& timing);
/// The same for people; `check` may be null.
void print_run_report(const KernelDesc& desc, const Kernel& kernel, const Timing& timing, const Check* check);

} // namespace kiln::cli
