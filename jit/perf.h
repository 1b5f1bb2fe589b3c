#pragma once
#include <cstddef>
#include <memory>
#include <string>
#include <string_view>

#include "cache/log.h"
#include "jit/config.h"

namespace kiln {

/// Makes loaded kernels visible to `perf`: `/tmp/perf-PID.map`, or a jitdump file
/// (tools/perf/Documentation/jitdump-specification.txt of the Linux sources). Off: does nothing. Thread-safe. Failures
/// are logged once.
class PerfReporter {
public:
  PerfReporter(PerfMode mode, const Log& log);
  ~PerfReporter();
  void loaded(const void* code, std::size_t size, std::string_view name);

private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

} // namespace kiln
