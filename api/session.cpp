#include "api/session.h"

#include <algorithm>
#include <cstdlib>

#include "backends/llvm/disassemble.h"
#include "backends/table.h"

namespace kiln {
namespace {

void set_origin(Config& config, std::string_view name, std::string value) {
  for (Config::Origin& origin : config.origins)
    if (origin.name == name) {
      origin.value = std::move(value);
      origin.origin = "host";
    }
}

std::string_view name_of(CacheMode mode) {
  constexpr std::string_view names[] = {"rw", "ro", "off"};
  return names[static_cast<int>(mode)];
}

} // namespace

Result<std::unique_ptr<Engine>> make_engine(const HostOptions& host) {
  Result<Config> config = Config::from_environment([](const char* name) -> const char* { return std::getenv(name); });
  if (!config)
    return config.status();
  if (host.cache_dir) {
    config->cache_dir = *host.cache_dir;
    set_origin(*config, "KILN_CACHE_DIR", *host.cache_dir);
  }
  if (host.cache_mode) {
    config->cache = *host.cache_mode;
    set_origin(*config, "KILN_CACHE", std::string(name_of(*host.cache_mode)));
  }
  EngineOptions options;
  options.machine = detect_machine();
  const int most = config->threads > 0 ? config->threads : options.machine.cores;
  config->threads = host.threads > 0 ? std::min(host.threads, most) : most;
  if (host.threads > 0)
    set_origin(*config, "KILN_THREADS", std::to_string(config->threads));
  options.config = std::move(*config);
  options.implementations = implementation_table();
  options.log_sink = host.log_sink;
  options.log_context = host.log_context;
  options.parallel_for = host.parallel_for;
  options.parallel_context = host.parallel_context;
  if (host.max_code_bytes > 0)
    options.max_code_bytes = static_cast<std::size_t>(host.max_code_bytes);
  options.disassemble = [](const CodeObject& code) { return disassemble(code.arch, code.image, code.entries); };
  return Engine::create(std::move(options));
}

} // namespace kiln
