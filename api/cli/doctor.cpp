#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <filesystem>
#include <memory>
#include <ranges>

#include <fmt/format.h>

#include "api/cli/command.h"
#include "api/cli/op_runner.h"
#include "api/cli/operands.h"
#include "api/cli/output.h"
#include "api/session.h"
#include "backends/llvm/disassemble.h"
#include "cache/database.h"
#include "cache/key_file.h"
#include "cache/signing.h"
#include "cache/trusted_directory.h"
#include "jit/os.h"

namespace kiln::cli {
namespace {

enum class State { ok, warn, fail };

class Report {
public:
  void add(State state, std::string name, std::string text) {
    rows_.push_back({state, std::move(name), std::move(text)});
  }
  bool failed() const {
    return std::any_of(rows_.begin(), rows_.end(), [](const Row& row) { return row.state == State::fail; });
  }
  void print() const {
    Columns columns;
    for (const Row& row : rows_)
      columns.row({text_of(row.state), row.name, row.text});
    columns.print();
  }
  void print_as_json() const {
    Json checks = Json::array();
    for (const Row& row : rows_)
      checks.push_back({{"state", text_of(row.state)}, {"name", row.name}, {"text", row.text}});
    print_json({{"ok", !failed()}, {"checks", checks}});
  }

private:
  struct Row {
    State state;
    std::string name, text;
  };
  static std::string text_of(State state) {
    constexpr const char* names[] = {"ok", "warn", "fail"};
    return names[static_cast<int>(state)];
  }
  std::vector<Row> rows_;
};

/// The path itself, or the nearest directory above it that exists.
std::filesystem::path existing_part(std::filesystem::path path) {
  std::error_code error;
  while (!std::filesystem::exists(path, error) && path.has_relative_path())
    path = path.parent_path();
  return path;
}

void check_clock(Report& report) {
  // Kiln is younger than this day. An earlier clock puts new kernels first in line for eviction.
  constexpr std::chrono::sys_days earliest = std::chrono::year(2025) / 1 / 1;
  const auto now = std::chrono::system_clock::now();
  report.add(now < earliest ? State::warn : State::ok, "clock",
             local_time_text(std::chrono::system_clock::to_time_t(now)) +
                 (now < earliest ? ": in the past; which kernels go first when the cache is full depends on it" : ""));
}

void check_sqlite(Report& report) {
  const Result<std::string> version = sqlite_version();
  report.add(version ? State::ok : State::fail, "SQLite", version ? *version : version.status().message());
}

/// A misspelt variable has no effect, and nobody says so.
void check_environment(Report& report, const Config& config) {
  for (char** entry = environ; entry != nullptr && *entry != nullptr; ++entry) {
    const std::string_view text = *entry, name = text.substr(0, text.find('='));
    const auto is_it = [&](const Config::Origin& known) { return known.name == name; };
    if (name.starts_with("KILN_") && std::none_of(config.origins.begin(), config.origins.end(), is_it))
      report.add(State::warn, "environment", fmt::format("{} is no variable of Kiln: `kiln info` lists them", name));
  }
}

void check_directories(Report& report, const Config& config) {
  const Result<TrustedDirectory> cache =
      TrustedDirectory::open(config.cache_dir, TrustedDirectory::Owner::user, TrustedDirectory::Missing::leave);
  if (cache)
    report.add(State::ok, "cache directory", cache->path());
  else if (cache.status().code() == Code::not_found)
    report.add(State::ok, "cache directory", fmt::format("{} (will be made)", config.cache_dir));
  else
    report.add(State::fail, "cache directory", cache.status().message());

  const Result<Digest> key = read_key_file(config.key_dir, false);
  if (key)
    report.add(State::ok, "cache key", fmt::format("in {}, closed to others", config.key_dir));
  else if (key.status().code() == Code::not_found)
    report.add(State::ok, "cache key", fmt::format("in {} (will be made)", config.key_dir));
  else
    report.add(State::fail, "cache key", key.status().message());
}

void check_file_system(Report& report, const Config& config) {
  const std::filesystem::path place = existing_part(config.cache_dir);
  const os::FileSystem file_system = os::file_system_of(place);
  if (file_system.over_network)
    report.add(State::warn, "file system",
               fmt::format("{} at {}: locks between machines may not hold; give each machine its KILN_CACHE_DIR",
                           file_system.name, place.string()));
  else if (file_system.in_memory)
    report.add(State::warn, "file system",
               fmt::format("{} at {}: the cache is gone after a restart", file_system.name, place.string()));
  else
    report.add(State::ok, "file system", fmt::format("{} at {}", file_system.name, place.string()));

  // SQLite's journal needs room beside the database.
  constexpr std::int64_t least_free_bytes = 16 << 20;
  std::error_code error;
  const std::filesystem::space_info space = std::filesystem::space(place, error);
  const auto available = static_cast<std::int64_t>(std::min<std::uintmax_t>(space.available, INT64_MAX));
  if (error)
    report.add(State::fail, "free space", error.message());
  else if (available < least_free_bytes)
    report.add(State::fail, "free space",
               fmt::format("{}: needed are {}", bytes_text(available), bytes_text(least_free_bytes)));
  else if (available >> 20 < config.cache_max_mb)
    report.add(State::warn, "free space",
               fmt::format("{}, less than KILN_CACHE_MAX_MB={}", bytes_text(available), config.cache_max_mb));
  else
    report.add(State::ok, "free space", bytes_text(available));
}

/// Writes and reads a kernel as a host would.
void check_store(Report& report, Engine& engine, const KernelDesc& desc) {
  Store* store = engine.store();
  if (store == nullptr || engine.config().cache == CacheMode::off)
    return report.add(State::warn, "cache",
                      "off (KILN_CACHE, KILN_DISABLE, or what is logged below): every process compiles for itself");
  if (engine.config().cache == CacheMode::read_only)
    report.add(State::ok, "cache", "read-only (KILN_CACHE=ro)");
  else if (const Result<Engine::Warmed> warmed = engine.warmup(desc, nullptr); warmed)
    report.add(State::ok, "cache", "a kernel was stored and found again");
  else
    report.add(State::fail, "cache", warmed.status().message());
  const Result<Store::Verified> verified = store->verify(false);
  if (!verified)
    report.add(State::fail, "stored kernels", verified.status().message());
  else if (verified->bad > 0)
    report.add(State::fail, "stored kernels",
               fmt::format("{} of {} fail authentication: `kiln cache verify` removes them", verified->bad,
                           verified->ok + verified->bad));
  else
    report.add(State::ok, "stored kernels", fmt::format("{}, all authentic", verified->ok));
}

void check_system_cache(Report& report, const SystemCache& system) {
  const Result<SystemCache::Contents> contents = system.contents(true);
  if (!contents)
    return report.add(contents.status().code() == Code::not_found ? State::warn : State::fail, "system cache",
                      contents.status().message());
  if (contents->bad > 0)
    return report.add(State::fail, "system cache",
                      fmt::format("{} of {} in {} fail authentication", contents->bad,
                                  count_text(contents->kernels, "kernel"), system.path()));
  report.add(State::ok, "system cache",
             fmt::format("{}: {}, all authentic, signed by {}", system.path(), count_text(contents->kernels, "kernel"),
                         contents->signer));
}

/// Whether there is a server that can be used, and which of its rows a process here would refuse.
void check_remote_cache(Report& report, Engine& engine) {
  constexpr int samples = 64;
  RemoteCache& remote = *engine.remote_cache();
  const Config& config = engine.config();
  const std::string where = remote.url().text();
  const Result<TrustedKeys> trusted = TrustedKeys::read(config.trusted_keys, Ownership::path);
  if (!trusted || trusted->keys.empty())
    report.add(remote.writes() ? State::warn : State::fail, "trusted keys",
               fmt::format("{}: nothing is taken from {}",
                           trusted ? config.trusted_keys + " lists no key" : trusted.status().message(), where));
  else
    report.add(State::ok, "trusted keys", fmt::format("{} in {}", trusted->keys.size(), config.trusted_keys));
  if (remote.writes())
    report.add(!trusted || trusted->contains(*remote.signer()) ? State::ok : State::warn, "signing key",
               fmt::format("{}: kernels compiled here are written to {}{}", remote.signer()->id(), where,
                           !trusted || trusted->contains(*remote.signer()) ? "" : ", and are not trusted here"));
  else if (!config.remote_signing_key.empty())
    report.add(State::fail, "signing key", fmt::format("{} cannot be used: see the log", config.remote_signing_key));

  const Result<RemoteCache::Probe> probe = remote.probe(samples);
  if (!probe)
    return report.add(State::fail, "remote cache", fmt::format("{}: {}", where, probe.status().message()));
  const double most_ms = remote.url().timeout_ms;
  report.add(probe->answer_ms < most_ms ? State::ok : State::warn, "remote cache",
             fmt::format("{}: answers in {:.2f} ms ({} are waited for), holds {}", where, probe->answer_ms,
                         remote.url().timeout_ms, count_text(probe->names, "name")));
  if (!probe->not_sampled.empty())
    return report.add(State::warn, "remote kernels", fmt::format("not looked at: {}", probe->not_sampled));
  std::string text = fmt::format("{} of {} looked at would be refused", probe->refused.size(), probe->sampled);
  if (probe->other > 0)
    text += fmt::format(", {} are another version's", probe->other);
  for (const Status& why : probe->refused | std::views::take(3))
    text += fmt::format("; {}", why.message());
  report.add(probe->refused.empty() ? State::ok : State::warn, "remote kernels", text);
}

/// Loads generated code into executable memory and runs it.
void check_execution(Report& report, Engine& engine, const KernelDesc& desc) {
  const std::string name = "run " + std::string(find_op(desc.op)->name);
  const Result<KernelRef> kernel = engine.get(desc);
  if (!kernel)
    return report.add(kernel.status().code() == Code::miss ? State::warn : State::fail, name,
                      kernel.status().message());
  Result<std::vector<Tensor>> tensors = random_tensors(desc);
  if (!tensors)
    return report.add(State::fail, name, tensors.status().message());
  const Result<Invocation> invocation = runner_of(desc.op).prepare(**kernel, desc, *tensors);
  const Status ran = invocation ? (*invocation)() : invocation.status();
  const Result<Check> check = ran ? check_outputs(desc, *tensors) : Result<Check>(ran);
  const std::string_view isa = name_of((*kernel)->implementation().isa);
  if (!check || !check->ok)
    return report.add(State::fail, name,
                      check ? fmt::format("{0} gives a wrong result (KILN_DISABLE={0} leaves it out)", isa)
                            : check.status().message());
  const bool generated = !(*kernel)->text().empty();
  report.add(generated ? State::ok : State::warn, name,
             fmt::format("{}: {}", isa,
                         generated ? "generated code was loaded without a writable mapping, ran, and is right"
                                   : "no generated code serves; right, but slow"));
  if (!generated)
    return;
  const Result<std::string> listing = disassemble((*kernel)->code().arch, (*kernel)->text(), (*kernel)->code().entries);
  report.add(listing ? State::ok : State::warn, "LLVM",
             listing ? "its shared object is found and loads" : listing.status().message());
}

Result<Exit> doctor(bool json) {
  CollectedLog log; // what the engine would log becomes part of the report
  const Result<std::unique_ptr<Engine>> made = make_engine({.log_sink = CollectedLog::sink, .log_context = &log});
  if (!made)
    return made.status();
  Engine& engine = **made;
  Report report;
  report.add(State::ok, "machine", fmt::format("{}, {}", engine.machine().cpu_name, engine.machine().target.text()));
  check_environment(report, engine.config());
  check_clock(report);
  check_sqlite(report);
  if (engine.config().cache != CacheMode::off) {
    check_directories(report, engine.config());
    check_file_system(report, engine.config());
  }
  if (engine.system_cache() != nullptr)
    check_system_cache(report, *engine.system_cache());
  if (engine.remote_cache() != nullptr)
    check_remote_cache(report, engine);
  for (const OpSpec& op : op_table()) {
    const Result<KernelDesc> desc = small_desc(op);
    if (!desc)
      return desc.status();
    check_execution(report, engine, *desc);
    if (&op == op_table().data())
      check_store(report, engine, *desc);
  }
  for (const std::string& line : log.lines)
    report.add(State::warn, "log", line);
  if (json)
    report.print_as_json();
  else
    report.print();
  return report.failed() ? Exit::failed : Exit::ok;
}

} // namespace

Command doctor_command(CLI::App& kiln) {
  const auto json = std::make_shared<bool>(false);
  CLI::App* app =
      kiln.add_subcommand("doctor", "What would go wrong here: directories, permissions, executable memory, libraries");
  app->add_flag("--json", *json, "Print one JSON object");
  return {app, [json] { return doctor(*json); }};
}

} // namespace kiln::cli
