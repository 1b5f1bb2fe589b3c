#pragma once
#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "api/cli/exit.h"
#include "cache/status.h"

namespace CLI {
class App;
}

/// The command line. CLI11 parses it; only arguments.cpp includes that, as its headers take seconds to compile.
namespace kiln::cli {

/// What one command takes. A handle: copies are of the same command. What parsing stores to must live as long as the
/// command line.
class Arguments {
public:
  explicit Arguments(CLI::App& app) : app_(&app) {}
  /// A command under this one, as `kiln cache` and `kiln cache list`. When there are any, one of them must be given.
  Arguments add_command(const std::string& name, const std::string& description) const;

  // Words that do not begin with a dash. In messages and in help, `name` stands for them.
  void required_word(const std::string& name, std::string& value, const std::string& description) const;
  void required_words(const std::string& name, std::vector<std::string>& values, const std::string& description) const;
  void words(const std::string& name, std::vector<std::string>& values, const std::string& description) const;

  /// True when `name` (`--json`) is given.
  void flag(const std::string& name, bool& value, const std::string& description) const;
  // `name` (`--target`, or `-j,--jobs`) and a value; what is not given is left as it is.
  void option(const std::string& name, std::string& value, const std::string& description) const;
  void option(const std::string& name, std::optional<std::string>& value, const std::string& description) const;
  /// One value each time it is given.
  void option(const std::string& name, std::vector<std::string>& values, const std::string& description) const;
  // Numbers within lowest…highest; the second's help says the default that is in `value`, the third is a comma list.
  void option(const std::string& name, int& value, int lowest, int highest, const std::string& description) const;
  void option(const std::string& name, std::size_t& value, int lowest, int highest,
              const std::string& description) const;
  void option(const std::string& name, std::vector<std::int64_t>& values, std::int64_t lowest, std::int64_t highest,
              const std::string& description) const;

  /// After parsing.
  bool given() const;

private:
  CLI::App* app_;
};

/// One command. `run` is called after parsing when `arguments` are those given; an error's message becomes the one line
/// on stderr.
struct Command {
  Arguments arguments;
  std::function<Result<Exit>()> run;
};

/// Runs the one command that was given.
Result<Exit> run_given(const std::vector<Command>& commands);

/// The whole of it.
class CommandLine {
public:
  CommandLine(const std::string& name, const std::string& description, const std::string& version);
  ~CommandLine();
  Arguments arguments() const { return Arguments(*app_); }
  /// Nothing when a command is to run; else help, version or what is wrong was printed, and the exit code is this.
  std::optional<Exit> parse(int argc, char** argv);

private:
  std::unique_ptr<CLI::App> app_;
};

} // namespace kiln::cli
