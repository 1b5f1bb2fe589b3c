#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <filesystem>
#include <memory>

#include <fmt/format.h>

#include "api/cli/command.h"
#include "api/cli/op_runner.h"
#include "api/cli/operands.h"
#include "api/cli/output.h"
#include "api/session.h"
#include "backends/llvm/disassemble.h"
#include "cache/database.h"
#include "cache/key_file.h"
#include "cache/private_path.h"
#include "jit/cuda/driver.h"
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
  const Result<std::string> cache = private_directory(config.cache_dir, false);
  if (cache)
    report.add(State::ok, "cache directory", *cache);
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
  const Status ran = invocation ? invocation->call() : invocation.status();
  const Result<Check> check = ran ? check_outputs(desc, *tensors) : Result<Check>(ran);
  const std::string_view isa = name_of((*kernel)->implementation().isa);
  if (!check || !check->ok)
    return report.add(State::fail, name,
                      check ? fmt::format("{0} gives a wrong result (KILN_DISABLE={0} leaves it out)", isa)
                            : check.status().message());
  const bool generated = !(*kernel)->text().empty();
  const auto& rows = engine.implementations();
  if (!generated && std::none_of(rows.begin(), rows.end(), [&](const Implementation& row) {
        return row.op == desc.op && row.device == DeviceKind::cpu && row.compile != nullptr;
      }))
    return report.add(State::ok, name, fmt::format("{}: right; CPUs have nothing faster for it", isa));
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

/// A machine without a GPU is fine, and so is one whose driver serves.
void check_gpus(Report& report, const Runtime& runtime) {
  const Result<cuda::Driver*> driver = runtime.cuda();
  if (!driver)
    return report.add(State::ok, "NVIDIA driver", fmt::format("none that serves: {}", driver.status().message()));
  for (int i = 0; i < static_cast<int>((*driver)->devices().size()); ++i) {
    const Result<cuda::ContextScope> context = cuda::ContextScope::enter(**driver, i, nullptr);
    report.add(context ? State::ok : State::fail, fmt::format("cuda:{}", i),
               context ? fmt::format("{}, {}, CUDA {}", (*driver)->devices()[static_cast<std::size_t>(i)].name,
                                     (*driver)->devices()[static_cast<std::size_t>(i)].target().text(),
                                     (*driver)->version_text())
                       : context.status().message());
  }
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
  check_gpus(report, engine.runtime());
  if (engine.system_cache() != nullptr)
    check_system_cache(report, *engine.system_cache());
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
