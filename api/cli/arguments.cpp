#include "api/cli/arguments.h"

#include <CLI/CLI.hpp>
#include <fmt/format.h>

#include "api/cli/output.h"

namespace kiln::cli {
namespace {

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

} // namespace

Arguments Arguments::add_command(const std::string& name, const std::string& description) const {
  app_->require_subcommand(1);
  return Arguments(*app_->add_subcommand(name, description));
}

void Arguments::required_word(const std::string& name, std::string& value, const std::string& description) const {
  app_->add_option(name, value, description)->required();
}

void Arguments::required_words(const std::string& name, std::vector<std::string>& values,
                               const std::string& description) const {
  app_->add_option(name, values, description)->required();
}

void Arguments::words(const std::string& name, std::vector<std::string>& values, const std::string& description) const {
  app_->add_option(name, values, description);
}

void Arguments::flag(const std::string& name, bool& value, const std::string& description) const {
  app_->add_flag(name, value, description);
}

void Arguments::option(const std::string& name, std::string& value, const std::string& description) const {
  app_->add_option(name, value, description);
}

void Arguments::option(const std::string& name, std::optional<std::string>& value,
                       const std::string& description) const {
  app_->add_option(name, value, description);
}

void Arguments::option(const std::string& name, std::vector<std::string>& values,
                       const std::string& description) const {
  app_->add_option(name, values, description)->allow_extra_args(false);
}

void Arguments::option(const std::string& name, int& value, int lowest, int highest,
                       const std::string& description) const {
  app_->add_option(name, value, description)->check(CLI::Range(lowest, highest));
}

void Arguments::option(const std::string& name, std::size_t& value, int lowest, int highest,
                       const std::string& description) const {
  app_->add_option(name, value, description)->check(CLI::Range(lowest, highest))->capture_default_str();
}

void Arguments::option(const std::string& name, std::vector<std::int64_t>& values, std::int64_t lowest,
                       std::int64_t highest, const std::string& description) const {
  app_->add_option(name, values, description)
      ->delimiter(',')
      ->allow_extra_args(false)
      ->check(CLI::Range(lowest, highest));
}

bool Arguments::given() const {
  return app_->parsed();
}

Result<Exit> run_given(const std::vector<Command>& commands) {
  for (const Command& command : commands)
    if (command.arguments.given())
      return command.run();
  return Exit::usage; // parsing asked for one
}

CommandLine::CommandLine(const std::string& name, const std::string& description, const std::string& version)
    : app_(std::make_unique<CLI::App>(description, name)) {
  app_->set_version_flag("--version", version);
}

CommandLine::~CommandLine() = default;

std::optional<Exit> CommandLine::parse(int argc, char** argv) {
  try {
    app_->parse(argc, argv);
  } catch (const CLI::Success& help_or_version) {
    app_->exit(help_or_version);
    return Exit::ok;
  } catch (const CLI::ParseError& error) {
    return usage_error(*app_, error);
  }
  return std::nullopt;
}

} // namespace kiln::cli
