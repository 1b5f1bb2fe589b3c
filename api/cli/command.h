#pragma once
#include "api/cli/arguments.h"

namespace kiln::cli {

// Each adds its subcommand to `kiln`; one file per function.
Command info_command(Arguments kiln);
Command run_command(Arguments kiln);
Command warmup_command(Arguments kiln);
Command cache_command(Arguments kiln);
Command explain_command(Arguments kiln);
Command disasm_command(Arguments kiln);
Command bench_command(Arguments kiln);
Command doctor_command(Arguments kiln);

} // namespace kiln::cli
