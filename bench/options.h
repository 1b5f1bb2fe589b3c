#pragma once
#include <cstddef>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

namespace CLI {
class App;
}

/// The command line that all benches share: `--only GROUP,…`, `--json FILE`, mostly `--smoke`, and what a bench adds of
/// its own.
namespace kiln::bench {

/// What `--smoke` runs, once and in small, so that only errors count and no figure: there is no such flag; everything,
/// without --only and --json; the groups of --only.
enum class Smoke { none, everything, groups };

struct Options {
  /// `name`: of the program. `what`: it measures, for --help. `groups`: names of what it can do by itself, in their
  /// order.
  Options(const std::string& name, const std::string& what, std::vector<std::string> groups,
          Smoke smoke = Smoke::groups);
  ~Options();
  Options(const Options&) = delete;
  Options& operator=(const Options&) = delete;

  /// A bench's own options, before parse(): a flag, a text, a count of at least 1. `value` outlives parse().
  void add(const std::string& name, bool& value, const std::string& help);
  void add(const std::string& name, std::string& value, const std::string& type, const std::string& help);
  void add(const std::string& name, std::size_t& value, const std::string& help);

  /// Ends the program after --help, and with a message and exit code 2 on what is not understood.
  void parse(int argc, const char* const* argv);

  bool wants(std::string_view group) const;
  const std::string& json() const { return json_; } ///< "": no file is wanted
  bool smoke() const { return smoke_; }

private:
  std::unique_ptr<CLI::App> app_; // its headers are slow to compile: options.cpp alone has them
  std::vector<std::string> groups_, only_;
  std::string json_;
  bool smoke_ = false;
};

} // namespace kiln::bench
