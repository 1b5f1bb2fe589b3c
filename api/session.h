#pragma once
#include <memory>
#include <optional>
#include <string>

#include "cache/status.h"
#include "jit/engine.h"

namespace kiln {

/// Where table and engine meet: an engine over the implementation table on this machine, as the C API and the command make it.
/// `host` fields that are set override the environment (and say so in Config::origins).
struct HostOptions {
  std::optional<std::string> cache_dir;
  std::optional<CacheMode> cache_mode;
  int threads = 0;
  ParallelForFn parallel_for = nullptr;
  void* parallel_context = nullptr;
  Log::Sink log_sink = nullptr;
  void* log_context = nullptr;
  std::uint64_t max_code_bytes = 0;
};

Result<std::unique_ptr<Engine>> make_engine(const HostOptions& host);

} // namespace kiln
