#include "api/cli/timing.h"

#include <algorithm>
#include <vector>

#include <fmt/format.h>

namespace kiln::cli {
namespace {

double per_nanosecond(double amount, double us) {
  return us > 0 ? amount / (us * 1e3) : 0;
}

} // namespace

Result<Timing> time_calls(const Invocation& invocation, std::size_t calls, std::chrono::microseconds duration) {
  using Clock = std::chrono::steady_clock;
  std::vector<double> us;
  if (Status status = invocation.call(); !status)
    return status;
  const auto start = Clock::now();
  for (auto before = start; us.size() < calls || before - start < duration;) {
    if (Status status = invocation.call(); !status)
      return status;
    const auto after = Clock::now();
    us.push_back(std::chrono::duration<double, std::micro>(after - before).count());
    before = after;
  }
  const auto middle = us.begin() + static_cast<std::ptrdiff_t>(us.size() / 2);
  std::nth_element(us.begin(), middle, us.end());
  return Timing{*std::min_element(us.begin(), us.end()), *middle, us.size(), invocation.work};
}

double gops(const KernelDesc& desc, const Timing& timing) {
  return per_nanosecond(timing.work ? timing.work->operations : find_op(desc.op)->operations(desc), timing.min_us);
}

double gbps(const KernelDesc& desc, const Timing& timing) {
  return per_nanosecond(timing.work ? timing.work->bytes : find_op(desc.op)->bytes(desc), timing.min_us);
}

Json run_report(const KernelDesc& desc, const Kernel& kernel, const Timing& timing) {
  const Implementation& implementation = kernel.implementation();
  return {{"op", kernel.op().name},
          {"desc", desc.text()},
          {"key", implementation.builtin ? "" : kernel.key().hex()},
          {"backend", name_of(implementation.backend)},
          {"isa", name_of(implementation.isa)},
          {"source", name_of(kernel.source)},
          {"compile_us", kernel.compile_us},
          {"load_us", kernel.load_us},
          {"run_us", {{"min", timing.min_us}, {"median", timing.median_us}}},
          {"gops", gops(desc, timing)},
          {"gbps", gbps(desc, timing)}};
}

void print_run_report(const KernelDesc& desc, const Kernel& kernel, const Timing& timing, const Check* check) {
  const Implementation& implementation = kernel.implementation();
  Columns columns;
  columns.row({"desc", desc.text()});
  columns.row({"path", fmt::format("{} ({})", name_of(implementation.isa), name_of(implementation.backend))});
  if (!implementation.builtin) {
    columns.row({"key", kernel.key().hex()});
    columns.row({"kernel", fmt::format("{}; compiled in {}, loaded in {}", name_of(kernel.source),
                                       microseconds_text(static_cast<double>(kernel.compile_us)),
                                       microseconds_text(static_cast<double>(kernel.load_us)))});
  }
  columns.row({"run", fmt::format("{} fastest, {} median of {}", microseconds_text(timing.min_us),
                                  microseconds_text(timing.median_us), timing.calls)});
  columns.row({"rate", fmt::format("{:.1f} GOPS, {:.2f} GB/s", gops(desc, timing), gbps(desc, timing))});
  if (check != nullptr)
    columns.row({"check", fmt::format("{}; largest error {:g}, relative {:g}", check->ok ? "ok" : "FAILED",
                                      check->difference.max_abs, check->difference.relative)});
  columns.print();
}

} // namespace kiln::cli
