#include "bench/options.h"

#include <algorithm>
#include <cstdlib>
#include <utility>

#include <CLI/CLI.hpp>
#include <fmt/format.h>
#include <fmt/ranges.h>

namespace kiln::bench {

Options::Options(const std::string& name, const std::string& what, std::vector<std::string> groups, Smoke smoke)
    : app_(std::make_unique<CLI::App>(what, name)), groups_(std::move(groups)) {
  CLI::Option* only =
      app_->add_option("--only", only_, fmt::format("groups to run, of: {}", fmt::join(groups_, ", ")))
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
  CLI::Option* json = app_->add_option("--json", json_, "also write the figures there")->type_name("FILE");
  if (smoke == Smoke::none)
    return;
  CLI::Option* flag = app_->add_flag("--smoke", smoke_, "run once and in small: errors count, figures do not");
  if (smoke == Smoke::everything)
    flag->excludes(only)->excludes(json);
}

Options::~Options() = default;

void Options::add(const std::string& name, bool& value, const std::string& help) {
  app_->add_flag(name, value, help);
}

void Options::add(const std::string& name, std::string& value, const std::string& type, const std::string& help) {
  app_->add_option(name, value, help)->type_name(type);
}

void Options::add(const std::string& name, std::size_t& value, const std::string& help) {
  app_->add_option(name, value, help)->check(CLI::Range(1, 1000000000));
}

void Options::parse(int argc, const char* const* argv) {
  try {
    app_->parse(argc, argv);
  } catch (const CLI::Success& help) {
    std::exit(app_->exit(help));
  } catch (const CLI::ParseError& error) {
    fmt::print(stderr, "{}: {} (see {} --help)\n", app_->get_name(), error.what(), app_->get_name());
    std::exit(2);
  }
}

bool Options::wants(std::string_view group) const {
  return only_.empty() || std::find(only_.begin(), only_.end(), group) != only_.end();
}

} // namespace kiln::bench
