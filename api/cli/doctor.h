#pragma once
#include <string>
#include <vector>

#include "jit/engine.h"

namespace kiln::cli {

/// What `kiln doctor` found: one line a check. A warning is what costs speed or persistence, a failure what a host
/// would meet as an error or do without; either says what to do.
class Report {
public:
  enum class State { ok, warn, fail };
  void ok(std::string name, std::string text) { add(State::ok, std::move(name), std::move(text)); }
  void warn(std::string name, std::string text) { add(State::warn, std::move(name), std::move(text)); }
  void fail(std::string name, std::string text) { add(State::fail, std::move(name), std::move(text)); }
  void add(State state, std::string name, std::string text) {
    rows_.push_back({state, std::move(name), std::move(text)});
  }

  bool failed() const;
  void print() const;
  void print_as_json() const; ///< {"ok", "checks": [{"state", "name", "text"}]}

private:
  struct Row {
    State state;
    std::string name, text;
  };
  std::vector<Row> rows_;
};

/// The processor, the clock, SQLite, executable memory, the NVIDIA driver. Loads no kernel.
void check_machine(Report& report, Engine& engine);
/// Where the cache and its key lie, and what they lie on: owners and modes of every directory above, file system, room.
void check_places(Report& report, const Config& config);
/// Whether locks hold in a cache that something was stored in.
void check_locks(Report& report, const Config& config);
/// What is stored, by an engine that has stored something; and the clock against it.
void check_stored(Report& report, Store& store);
void check_system_cache(Report& report, const SystemCache& system);
/// Whether there is a server that can be used, and which of its rows a process here would refuse.
void check_remote_cache(Report& report, Engine& engine);

} // namespace kiln::cli
