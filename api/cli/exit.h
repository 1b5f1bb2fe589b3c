#pragma once

namespace kiln::cli {

/// The command's exit codes.
enum class Exit : int { ok = 0, failed = 1, usage = 2, integrity = 3 };

} // namespace kiln::cli
