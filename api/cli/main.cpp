#include <cstdio>
#include <exception>
#include <new>

#include "api/cli/command.h"
#include "api/cli/output.h"
#include "api/kiln.h"

namespace kiln::cli {
namespace {

constexpr Command (*kCommands[])(Arguments) = {info_command,    run_command,    warmup_command, cache_command,
                                               explain_command, disasm_command, bench_command,  doctor_command};

Exit run(int argc, char** argv) {
  CommandLine line("kiln", "Run-time compiled kernels for inference engines, kept in a persistent cache.",
                   std::string("kiln ") + kiln_version());
  std::vector<Command> commands;
  for (const auto& make : kCommands)
    commands.push_back(make(line.arguments()));
  if (const std::optional<Exit> exit = line.parse(argc, argv))
    return *exit;
  const Result<Exit> exit = run_given(commands);
  return exit ? *exit : report_error(exit.status());
}

} // namespace
} // namespace kiln::cli

int main(int argc, char** argv) {
  using namespace kiln::cli;
  Exit exit = Exit::failed;
  try {
    exit = run(argc, argv);
  } catch (const std::bad_alloc&) {
    report_error("out of memory");
  } catch (const std::exception& error) {
    report_error(error.what());
  }
  if (!flush_results()) {
    report_error("cannot write to standard output");
    exit = Exit::failed;
  }
  return static_cast<int>(exit);
}
