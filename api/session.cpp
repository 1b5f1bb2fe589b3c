#include "api/session.h"

#include <cstdlib>

#include "backends/llvm/disassemble.h"
#include "backends/table.h"

namespace kiln {

Result<std::unique_ptr<Engine>> make_engine(const HostOptions& host) {
  Result<Config> config =
      Config::from_environment([](const char* name) -> const char* { return std::getenv(name); }, host.settings);
  if (!config)
    return config.status();
  EngineOptions options;
  options.machine = detect_machine();
  options.config = std::move(*config);
  options.implementations = implementation_table();
  options.log_sink = host.log_sink;
  options.log_context = host.log_context;
  options.parallel_for = host.parallel_for;
  options.parallel_context = host.parallel_context;
  if (host.max_code_bytes > 0)
    options.max_code_bytes = static_cast<std::size_t>(host.max_code_bytes);
  options.gpu_target = host.gpu_target;
  options.disassemble = [](const CodeObject& code) { return disassemble(code.arch, code.image, code.entries); };
  return Engine::create(std::move(options));
}

} // namespace kiln
