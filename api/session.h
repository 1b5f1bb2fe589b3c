#pragma once
#include <memory>
#include <optional>
#include <string>

#include "cache/status.h"
#include "jit/engine.h"

namespace kiln {

/// Where table and engine meet: an engine over the implementation table on this machine, as the C API and the command
/// make it.
struct HostOptions {
  HostSettings settings;
  ParallelForFn parallel_for = nullptr;
  void* parallel_context = nullptr;
  Log::Sink log_sink = nullptr;
  void* log_context = nullptr;
  std::uint64_t max_code_bytes = 0; ///< 0: the engine's default
  std::optional<Target> gpu_target; ///< see EngineOptions
};

Result<std::unique_ptr<Engine>> make_engine(const HostOptions& host);

} // namespace kiln
