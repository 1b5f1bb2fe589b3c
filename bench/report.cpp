#include "bench/report.h"

#include <algorithm>
#include <fstream>

#include <fmt/format.h>
#include <nlohmann/json.hpp>

#include "bench/machine.h"

namespace kiln::bench {
namespace {

std::string shown(double value, const std::string& unit) {
  const int digits = value >= 1000 ? 0 : value >= 100 ? 1 : 3;
  return fmt::format("{:.{}f}{}{}", value, digits, unit.empty() ? "" : " ", unit);
}

std::string_view sign(Figure::Bound bound) {
  switch (bound) {
  case Figure::Bound::at_least:
    return "≥";
  case Figure::Bound::at_most:
    return "≤";
  case Figure::Bound::none:
    break;
  }
  return "";
}

} // namespace

bool Figure::met() const {
  return bound == Bound::none || (bound == Bound::at_least ? measured >= reach : measured <= reach);
}

Report::Report(double clock_hz)
    : machine_(fmt::format("{}, {} cores, {:.2f} GHz", cpu_name(), allowed_cpus().size(), clock_hz / 1e9)),
      clock_hz_(clock_hz) {
  fmt::print("{}\n{:<58} {:>13}  {:>10}  {:<4}\n", machine_, "what", "measured", "reach", "met?");
}

void Report::add(Figure figure) {
  if (figure.group != last_group_)
    fmt::print("{}\n", figure.group);
  last_group_ = figure.group;
  const bool bound = figure.bound != Figure::Bound::none;
  const std::string reach = bound ? fmt::format("{} {:g}", sign(figure.bound), figure.reach) : "";
  fmt::print("  {:<56} {:>13}  {:>10}  {:<4}  {}\n", figure.what, shown(figure.measured, figure.unit), reach,
             bound ? figure.met() ? "yes" : "NO" : "", figure.detail);
  std::fflush(stdout);
  figures_.push_back(std::move(figure));
}

bool Report::all_met() const {
  return std::all_of(figures_.begin(), figures_.end(), [](const Figure& figure) { return figure.met(); });
}

bool Report::write_json(const std::string& path) const {
  nlohmann::ordered_json figures = nlohmann::ordered_json::array();
  for (const Figure& f : figures_) {
    nlohmann::ordered_json row = {{"group", f.group}, {"what", f.what}, {"measured", f.measured}, {"unit", f.unit}};
    if (f.bound != Figure::Bound::none) {
      row["bound"] = f.bound == Figure::Bound::at_least ? "at_least" : "at_most";
      row["reach"] = f.reach;
      row["met"] = f.met();
    }
    row["detail"] = f.detail;
    figures.push_back(std::move(row));
  }
  const nlohmann::ordered_json all = {
      {"machine", {{"cpu", cpu_name()}, {"cores", allowed_cpus().size()}, {"clock_hz", clock_hz_}}},
      {"figures", std::move(figures)}};
  std::ofstream file(path);
  file << all.dump(1) << '\n';
  file.close();
  if (!file)
    fmt::print(stderr, "bench: cannot write {}\n", path);
  return static_cast<bool>(file);
}

} // namespace kiln::bench
