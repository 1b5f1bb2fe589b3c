#include "bench/options.h"

#include <algorithm>
#include <cstdlib>
#include <utility>

#include <fmt/format.h>
#include <fmt/ranges.h>

namespace kiln::bench {

Options::Options(const std::string& name, const std::string& what, std::vector<std::string> groups)
    : app(what, name), groups_(std::move(groups)) {
  app.add_option("--only", only_, fmt::format("groups to run, of: {}", fmt::join(groups_, ", ")))
      ->type_name("GROUP,...")
      ->delimiter(',')
      ->allow_extra_args(false)
      ->check(CLI::Validator(
          [this](std::string& given) {
            return std::find(groups_.begin(), groups_.end(), given) != groups_.end()
                       ? std::string()
                       : fmt::format("'{}' is not a group: allowed is {}", given, fmt::join(groups_, ", "));
          },
          ""));
  app.add_option("--json", json_, "also write the figures there")->type_name("FILE");
  app.add_flag("--smoke", smoke_, "run in small; figures are not judged");
}

void Options::parse(int argc, const char* const* argv) {
  try {
    app.parse(argc, argv);
  } catch (const CLI::Success& help) {
    std::exit(app.exit(help));
  } catch (const CLI::ParseError& error) {
    fmt::print(stderr, "{}: {} (see {} --help)\n", app.get_name(), error.what(), app.get_name());
    std::exit(2);
  }
}

bool Options::wants(std::string_view group) const {
  return only_.empty() || std::find(only_.begin(), only_.end(), group) != only_.end();
}

} // namespace kiln::bench
