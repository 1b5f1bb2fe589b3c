#pragma once
#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include <nlohmann/json.hpp>

#include "api/cli/exit.h"
#include "cache/log.h"
#include "cache/status.h"

/// Results go to stdout, everything else to stderr.
namespace kiln::cli {

/// Keys keep the order in which they were written.
using Json = nlohmann::ordered_json;

/// One object on stdout. Bytes that are not UTF-8 (paths may hold any) become U+FFFD.
void print_json(const Json& object);
/// A line on stdout.
void print_line(std::string_view line);
/// False when something of stdout could not be written.
bool flush_results();

/// `kiln: message` on stderr, one line.
void report_error(std::string_view message);
/// The same, and the exit code that goes with the status.
Exit report_error(const Status& status);

/// Rows of text whose columns line up on stdout; the last column is not padded.
class Columns {
public:
  explicit Columns(std::string indent = "") : indent_(std::move(indent)) {}
  void row(std::vector<std::string> cells);
  void print() const;

private:
  std::string indent_;
  std::vector<std::vector<std::string>> rows_;
};

/// Keeps what an engine logs, for a command that says it elsewhere. Must outlive the engine.
struct CollectedLog {
  std::vector<std::string> lines;
  /// Log::Sink: called by one thread at a time.
  static void sink(void* collected, LogLevel, const char* message) {
    static_cast<CollectedLog*>(collected)->lines.emplace_back(message);
  }
};

std::string bytes_text(std::int64_t bytes);                        ///< `16.0 KiB`
std::string count_text(std::int64_t count, std::string_view noun); ///< `1 kernel`, `2 kernels`
std::string microseconds_text(double us);                          ///< `12.3 µs`, `4.56 ms`
std::string local_time_text(std::int64_t unix_seconds);            ///< `2026-01-31 12:00:00`, `never` for 0

/// `x2n128s4 (heuristic)` or `x2n128s4 (tuned on NVIDIA H200)`.
std::string configuration_text(const std::string& configuration, const std::string& tuned_for);

} // namespace kiln::cli
