#pragma once
#include <functional>
#include <vector>

#include "api/cli/arguments.h"
#include "jit/engine.h"

namespace kiln::cli {

/// Acts on an engine that has a cache on disk, then says what the cache logged; an error when the cache is off.
Result<Exit> with_cache(const std::function<Result<Exit>(Engine& engine)>& act);

/// `export`, `import` and `keygen`, added to `kiln cache`.
std::vector<Command> bundle_commands(Arguments cache);

} // namespace kiln::cli
