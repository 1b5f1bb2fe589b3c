#include "api/cli/output.h"

#include <algorithm>
#include <cstdio>
#include <ctime>

#include <fmt/format.h>

namespace kiln::cli {
namespace {

/// Characters, not bytes: `µ` and `≤` take one column.
std::size_t width(std::string_view text) {
  return static_cast<std::size_t>(std::count_if(text.begin(), text.end(), [](char c) { return (c & 0xC0) != 0x80; }));
}

/// Messages from below may list things on lines of their own.
std::string on_one_line(std::string_view message) {
  std::string line;
  for (const char c : message)
    if (c != '\n' && !(c == ' ' && line.ends_with(' ')))
      line += c;
    else if (!line.ends_with(' '))
      line += ' ';
  return line;
}

} // namespace

void print_json(const Json& object) {
  print_line(object.dump(2, ' ', false, Json::error_handler_t::replace));
}

void print_line(std::string_view line) {
  std::fwrite(line.data(), 1, line.size(), stdout);
  std::fputc('\n', stdout);
}

bool flush_results() {
  return std::fflush(stdout) == 0 && std::ferror(stdout) == 0;
}

void report_error(std::string_view message) {
  fmt::print(stderr, "kiln: {}\n", on_one_line(message));
}

Exit report_error(const Status& status) {
  report_error(status.message());
  switch (status.code()) {
  case Code::invalid_argument:
    return Exit::usage;
  case Code::integrity:
    return Exit::integrity;
  default:
    return Exit::failed;
  }
}

void Columns::row(std::vector<std::string> cells) {
  for (std::string& cell : cells)
    cell = on_one_line(cell);
  rows_.push_back(std::move(cells));
}

void Columns::print() const {
  std::vector<std::size_t> widths;
  for (const auto& row : rows_)
    for (std::size_t i = 0; i < row.size(); ++i) {
      widths.resize(std::max(widths.size(), i + 1));
      widths[i] = std::max(widths[i], width(row[i]));
    }
  for (const auto& row : rows_) {
    std::string line = indent_;
    for (std::size_t i = 0; i < row.size(); ++i) {
      line += row[i];
      if (i + 1 < row.size())
        line.append(widths[i] - width(row[i]) + 2, ' ');
    }
    line.erase(line.find_last_not_of(' ') + 1);
    print_line(line);
  }
}

std::string bytes_text(std::int64_t bytes) {
  if (bytes < 1024)
    return fmt::format("{} B", bytes);
  double value = static_cast<double>(bytes) / 1024;
  for (const char* unit : {"KiB", "MiB", "GiB"}) {
    if (value < 1024)
      return fmt::format("{:.1f} {}", value, unit);
    value /= 1024;
  }
  return fmt::format("{:.1f} TiB", value);
}

std::string count_text(std::int64_t count, std::string_view noun) {
  return fmt::format("{} {}{}", count, noun, count == 1 ? "" : "s");
}

std::string microseconds_text(double us) {
  if (us < 1e3)
    return fmt::format("{:.2f} µs", us);
  if (us < 1e6)
    return fmt::format("{:.2f} ms", us / 1e3);
  return fmt::format("{:.2f} s", us / 1e6);
}

std::string local_time_text(std::int64_t unix_seconds) {
  if (unix_seconds == 0)
    return "never";
  const std::time_t time = static_cast<std::time_t>(unix_seconds);
  std::tm parts{};
  char text[32];
  if (::localtime_r(&time, &parts) == nullptr || std::strftime(text, sizeof text, "%Y-%m-%d %H:%M:%S", &parts) == 0)
    return std::to_string(unix_seconds);
  return text;
}

std::string configuration_text(const std::string& configuration, const std::string& tuned_for) {
  return fmt::format("{} ({})", configuration, tuned_for.empty() ? "heuristic" : "tuned on " + tuned_for);
}

} // namespace kiln::cli
