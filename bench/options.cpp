#include "bench/options.h"

#include <algorithm>
#include <cstdlib>
#include <utility>

#include <CLI/CLI.hpp>
#include <fmt/format.h>
#include <fmt/ranges.h>

namespace kiln::bench {

Options::Options(const std::string& name, const std::string& what, std::vector<std::string> groups)
    : app_(std::make_unique<CLI::App>(what, name)), groups_(std::move(groups)) {
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
  app_->add_option("--json", json_, "also write the figures there")->type_name("FILE");
  app_->add_flag("--smoke", smoke_, "run in small; figures are not judged");
}

Options::~Options() = default;

void Options::add(const std::string& name, bool& value, const std::string& help) {
  app_->add_flag(name, value, help);
}

void Options::add(const std::string& name, std::string& value, const std::string& type, const std::string& help) {
  app_->add_option(name, value, help)->type_name(type);
}

void Options::add(const std::string& name, std::size_t& value, const std::string& help) {
  app_->add_option(name, value, help)->check(CLI::PositiveNumber);
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
