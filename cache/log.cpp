#include "cache/log.h"

#include <spdlog/details/null_mutex.h>
#include <spdlog/logger.h>
#include <spdlog/sinks/base_sink.h>

#include <algorithm>
#include <array>
#include <cstdio>
#include <mutex>

#include "cache/per_process.h"
#include "cache/readable.h"

namespace kiln {
namespace {

struct LevelName {
  LogLevel level;
  spdlog::level::level_enum spdlog_level;
  const char* name;
};
constexpr std::array<LevelName, 6> level_names = {{
    {LogLevel::trace, spdlog::level::trace, "trace"},
    {LogLevel::debug, spdlog::level::debug, "debug"},
    {LogLevel::info, spdlog::level::info, "info"},
    {LogLevel::warn, spdlog::level::warn, "warn"},
    {LogLevel::error, spdlog::level::err, "error"},
    {LogLevel::off, spdlog::level::off, "off"},
}};

const LevelName& row_of(LogLevel level) {
  return *std::find_if(level_names.begin(), level_names.end(),
                       [&](const LevelName& row) { return row.level == level; });
}

const LevelName& row_of(spdlog::level::level_enum level) {
  return *std::find_if(level_names.begin(), level_names.end(),
                       [&](const LevelName& row) { return row.spdlog_level == level; });
}

/// A mutex that a child made by fork finds free, whichever thread of its parent was logging.
class MutexOfProcess {
public:
  void lock() {
    std::mutex& mutex = mutexes_.get();
    mutex.lock();
    locked_ = &mutex;
  }
  /// Of what lock() locked, also when the host's sink forked in between.
  void unlock() { locked_->unlock(); }

private:
  PerProcess<std::mutex> mutexes_;
  std::mutex* locked_ = nullptr; ///< guarded by it
};

/// Gives each message to a function, as one line.
template <class Mutex> class FunctionSink final : public spdlog::sinks::base_sink<Mutex> {
public:
  FunctionSink(Log::Sink sink, void* context) : sink_(sink), context_(context) {}

private:
  void sink_it_(const spdlog::details::log_msg& message) override {
    // Text from outside (a path, a database's error) must not be able to forge a second line or move the cursor.
    std::string line = readable({message.payload.data(), message.payload.size()});
    std::replace(line.begin(), line.end(), '\n', ' ');
    sink_(context_, row_of(message.level).level, line.c_str());
  }
  void flush_() override {}

  Log::Sink sink_;
  void* context_;
};

/// Needs no mutex of Kiln's: stdio locks stderr for the call, and makes that lock usable again in a child made by fork.
void write_to_stderr(void*, LogLevel level, const char* message) {
  std::fprintf(stderr, "kiln: [%s] %s\n", row_of(level).name, message);
}

} // namespace

/// Made directly, never through spdlog's registry, which belongs to the host.
struct Log::Impl {
  Impl(LogLevel level, spdlog::sink_ptr sink) : logger("kiln", std::move(sink)) {
    logger.set_level(row_of(level).spdlog_level);
  }
  void log(spdlog::level::level_enum level, std::string_view message) {
    logger.log(level, spdlog::string_view_t(message.data(), message.size()));
  }
  spdlog::logger logger;
};

Log::Log(LogLevel level)
    : level_(level), impl_(std::make_unique<Impl>(level, std::make_shared<FunctionSink<spdlog::details::null_mutex>>(
                                                             &write_to_stderr, nullptr))) {}

Log::Log(LogLevel level, Sink sink, void* context) : Log(level) {
  if (sink != nullptr)
    impl_ = std::make_unique<Impl>(level, std::make_shared<FunctionSink<MutexOfProcess>>(sink, context));
}

Log::~Log() = default;

void Log::debug(std::string_view message) const {
  impl_->log(spdlog::level::debug, message);
}
void Log::info(std::string_view message) const {
  impl_->log(spdlog::level::info, message);
}
void Log::warn(std::string_view message) const {
  impl_->log(spdlog::level::warn, message);
}
void Log::error(std::string_view message) const {
  impl_->log(spdlog::level::err, message);
}

bool parse_log_level(std::string_view text, LogLevel& level) {
  const auto row =
      std::find_if(level_names.begin(), level_names.end(), [&](const LevelName& r) { return text == r.name; });
  if (row == level_names.end())
    return false;
  level = row->level;
  return true;
}

} // namespace kiln
