#include <algorithm>
#include <map>

#include "jit/config.h"
#include "tests/fuzz/fuzz.h"

/// The environment, given as `NAME=value` lines.
namespace kiln::fuzz {
namespace {

std::map<std::string, std::string, std::less<>> environment;

const char* get_variable(const char* name) {
  const auto found = environment.find(name);
  return found == environment.end() ? nullptr : found->second.c_str();
}

void set_environment(std::string_view text) {
  environment.clear();
  while (!text.empty()) {
    const std::string_view line = text.substr(0, text.find('\n'));
    text.remove_prefix(std::min(line.size() + 1, text.size()));
    const std::size_t equals = std::min(line.find('='), line.size());
    environment.emplace(line.substr(0, equals), line.substr(std::min(equals + 1, line.size())));
  }
}

bool accepts(ByteSpan input) {
  set_environment(text_of(input));
  const Result<Config> config = Config::from_environment(get_variable);
  if (!config) {
    expect_refusal(config.status(), Code::invalid_argument);
    return false;
  }
  expect(config->cache == CacheMode::off || (config->cache_dir.starts_with('/') && config->key_dir.starts_with('/')),
         "a cache has absolute directories");
  expect(config->cache_max_mb >= 1 && config->threads >= 0 && config->threads <= 1024, "integers are in range");
  // What `kiln info` shows of a variable sets it to what is in force.
  for (const Config::Origin& origin : config->origins)
    if (origin.origin == "environment")
      environment[origin.name] = origin.value;
  const Result<Config> again = Config::from_environment(get_variable);
  expect(again.is_ok(), "what is shown is taken");
  expect(std::equal(again->origins.begin(), again->origins.end(), config->origins.begin(), config->origins.end(),
                    [](const auto& a, const auto& b) { return a.name == b.name && a.value == b.value; }),
         "what is shown means the same");
  return true;
}

std::vector<Seed> seeds() {
  return {
      accepted("HOME=/home/u\nKILN_DISABLE=amx,llvm,disk,portable,bogus\nKILN_FORCE=int8_mm:avx2, amx\nKILN_CACHE=ro\n"
               "KILN_CACHE_DIR=/c/../d//e/.\nKILN_CACHE_MAX_MB=64\nKILN_CACHE_SYSTEM_DIR=/s\n"
               "KILN_REMOTE=redis://h:1/2\nKILN_MISS=error\nKILN_THREADS=3\nKILN_LOG=debug\nKILN_DUMP_DIR=d/\n"
               "KILN_PERF=map\nXDG_CACHE_HOME=/xc\nXDG_DATA_HOME=xd\n"),
      accepted("KILN_DISABLE=,x86, reference\nKILN_PERF=jitdump\nKILN_MISS=fallback\nKILN_CACHE=rw"),
      accepted("KILN_REMOTE=unix://u:%70w@/r.sock?db=3&ttl_s=9&timeout_ms=7\nKILN_REMOTE_SIGNING_KEY=k"),
      accepted("KILN_REMOTE=redis://:p:w@@[::1]"),
      refused("KILN_REMOTE=redis://h:"),
      accepted(""),
      refused("KILN_THREADS=0"),
      refused("KILN_FORCE=avx2,avx2"),
      refused("KILN_CACHE_MAX_MB=99999999999999999999"),
      refused("KILN_LOG=\xff\x1b[2J")};
}

} // namespace
const Target target = {accepts, seeds};
} // namespace kiln::fuzz
