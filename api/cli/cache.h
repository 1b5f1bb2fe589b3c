#pragma once
#include <functional>
#include <vector>

#include "api/cli/command.h"
#include "jit/engine.h"

namespace kiln::cli {

/// Acts on an engine that has a cache on disk, then says what the cache logged; an error when the cache is off.
Result<Exit> with_cache(const std::function<Result<Exit>(Engine& engine)>& act);

/// `export`, `import` and `keygen`, added to `kiln cache`.
std::vector<Command> bundle_commands(CLI::App& cache);

} // namespace kiln::cli
