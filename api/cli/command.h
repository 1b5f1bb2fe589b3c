#pragma once
#include <functional>
#include <span>

#include <CLI/CLI.hpp>

#include "cache/status.h"

namespace kiln::cli {

/// The command's exit codes.
enum class Exit : int { ok = 0, failed = 1, usage = 2, integrity = 3 };

/// One subcommand. `run` is called after parsing when `app` is the one given; an error's message becomes the one line
/// on stderr.
struct Command {
  CLI::App* app;
  std::function<Result<Exit>()> run;
};

// Each adds its subcommand to `kiln`; one file per function.
Command info_command(CLI::App& kiln);
Command run_command(CLI::App& kiln);
Command warmup_command(CLI::App& kiln);
Command cache_command(CLI::App& kiln);
Command explain_command(CLI::App& kiln);
Command disasm_command(CLI::App& kiln);
Command bench_command(CLI::App& kiln);
Command doctor_command(CLI::App& kiln);

} // namespace kiln::cli
