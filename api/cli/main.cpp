#include <cstdio>
#include <exception>
#include <new>

#include <fmt/format.h>

#include "api/cli/command.h"
#include "api/cli/output.h"
#include "api/kiln.h"

namespace kiln::cli {
namespace {

constexpr Command (*kCommands[])(CLI::App&) = {info_command,    run_command,    warmup_command, cache_command,
                                               explain_command, disasm_command, bench_command,  doctor_command};

/// What was not a command, or that none was given.
std::string missing_command(const CLI::App& app) {
  std::string known;
  for (const CLI::App* command : app.get_subcommands([](const CLI::App*) { return true; }))
    known += (known.empty() ? "" : ", ") + command->get_name();
  const std::vector<std::string> words = app.remaining();
  if (words.empty())
    return fmt::format("no command given: known are {}", known);
  return fmt::format("unknown {} '{}': known commands are {}", words.front().starts_with('-') ? "option" : "command",
                     words.front(), known);
}

Exit usage_error(const CLI::App& app, const CLI::ParseError& error) {
  const CLI::App* given = &app;
  while (!given->get_subcommands().empty())
    given = given->get_subcommands().front();
  std::string name = given->get_name();
  for (const CLI::App* parent = given->get_parent(); parent != nullptr; parent = parent->get_parent())
    name = parent->get_name() + " " + name;
  report_error(fmt::format("{} (see {} --help)",
                           given->get_require_subcommand_min() > 0 ? missing_command(*given) : error.what(), name));
  return Exit::usage;
}

Exit run(int argc, char** argv) {
  CLI::App app("Run-time compiled kernels for inference engines, kept in a persistent cache.", "kiln");
  app.set_version_flag("--version", std::string("kiln ") + kiln_version());
  app.require_subcommand(1);
  std::vector<Command> commands;
  for (const auto& make : kCommands)
    commands.push_back(make(app));
  try {
    app.parse(argc, argv);
  } catch (const CLI::Success& help_or_version) {
    app.exit(help_or_version);
    return Exit::ok;
  } catch (const CLI::ParseError& error) {
    return usage_error(app, error);
  }
  for (const Command& command : commands)
    if (command.app->parsed()) {
      const Result<Exit> exit = command.run();
      return exit ? *exit : report_error(exit.status());
    }
  return Exit::usage;
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
