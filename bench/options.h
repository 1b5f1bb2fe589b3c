#pragma once
#include <string>
#include <string_view>
#include <vector>

#include <CLI/CLI.hpp>

/// The command line that all benches share: `--only GROUP,…`, `--json FILE`, `--smoke`, and what a bench adds of its
/// own.
namespace kiln::bench {

struct Options {
  CLI::App app; ///< a bench adds its own options before parse()

  /// `name`: of the program. `what`: it measures, for --help. `groups`: names of what it can do by itself, in their
  /// order.
  Options(const std::string& name, const std::string& what, std::vector<std::string> groups);
  Options(const Options&) = delete;
  Options& operator=(const Options&) = delete;

  /// Ends the program after --help, and with a message and exit code 2 on what is not understood.
  void parse(int argc, const char* const* argv);

  bool wants(std::string_view group) const;
  const std::string& json() const { return json_; } ///< "": no file is wanted
  bool smoke() const { return smoke_; }

private:
  std::vector<std::string> groups_, only_;
  std::string json_;
  bool smoke_ = false;
};

} // namespace kiln::bench
