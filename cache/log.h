#pragma once
#include <cstdint>
#include <memory>
#include <string>
#include <string_view>

namespace kiln {

enum class LogLevel : int { trace, debug, info, warn, error, off };

/// One engine's log. spdlog behind it; a host can give a sink of its own. Any thread may log.
class Log {
public:
  /// `message` has no newline and is valid only during the call. Called from any thread, one call at a time; must not
  /// call into Kiln, which would log from inside its own log.
  using Sink = void (*)(void* context, LogLevel level, const char* message);

  /// To stderr, at `level`.
  explicit Log(LogLevel level = LogLevel::warn);
  /// To `sink`; to stderr when it is null.
  Log(LogLevel level, Sink sink, void* context);
  ~Log();
  Log(const Log&) = delete;
  Log& operator=(const Log&) = delete;

  bool enabled(LogLevel level) const { return level >= level_; }
  void debug(std::string_view message) const;
  void info(std::string_view message) const;
  void warn(std::string_view message) const;
  void error(std::string_view message) const;

private:
  struct Impl;
  LogLevel level_;
  std::unique_ptr<Impl> impl_;
};

/// `trace`, `debug`, `info`, `warn`, `error`, `off` (spdlog's names); false when it is none of them.
bool parse_log_level(std::string_view text, LogLevel& level);

} // namespace kiln
