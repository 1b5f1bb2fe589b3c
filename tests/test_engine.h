#pragma once
#include <doctest/doctest.h>

#include <cstdint>
#include <cstdlib>
#include <memory>
#include <optional>
#include <span>

#include "backends/table.h"
#include "jit/engine.h"

namespace kiln::test {

/// An engine over the whole implementation table, without a cache on disk.
struct EngineSpec {
  int threads = 1;
  std::optional<Config::Force> forced;
  std::optional<Features> features; ///< in place of the machine's
  std::int64_t l2_bytes = 0;        ///< likewise: small, so that drivers cut rows and columns
  std::span<const Implementation> implementations = implementation_table();
};

inline std::unique_ptr<Engine> make_engine(const EngineSpec& spec) {
  EngineOptions options;
  options.config.cache = CacheMode::off;
  options.config.threads = spec.threads;
  if (spec.forced)
    options.config.forced.push_back(*spec.forced);
  options.machine = detect_machine();
  if (spec.features)
    options.machine.target.features = *spec.features;
  if (spec.l2_bytes > 0)
    options.machine.l2_bytes = spec.l2_bytes;
  options.implementations = spec.implementations;
  Result<std::unique_ptr<Engine>> engine = Engine::create(std::move(options));
  REQUIRE_MESSAGE(engine.is_ok(), (engine ? "" : engine.status().message()));
  return std::move(*engine);
}

/// How many random cases: `usual`, enough to take every branch, or what KILN_TEST_SAMPLES asks for.
inline int samples(int usual) {
  const char* text = std::getenv("KILN_TEST_SAMPLES");
  return text != nullptr ? std::atoi(text) : usual;
}

} // namespace kiln::test
