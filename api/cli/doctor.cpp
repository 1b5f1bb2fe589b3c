#include "api/cli/doctor.h"

#include <unistd.h>

#include <algorithm>
#include <memory>

#include <fmt/format.h>

#include "api/cli/command.h"
#include "api/cli/op_runner.h"
#include "api/cli/operands.h"
#include "api/cli/output.h"
#include "api/session.h"
#include "backends/llvm/disassemble.h"

namespace kiln::cli {
namespace {

std::string text_of(Report::State state) {
  constexpr const char* names[] = {"ok", "warn", "fail"};
  return names[static_cast<int>(state)];
}

/// A misspelt variable has no effect, and nobody says so.
void check_environment(Report& report, const Config& config) {
  for (char** entry = environ; entry != nullptr && *entry != nullptr; ++entry) {
    const std::string_view text = *entry, name = text.substr(0, text.find('='));
    const auto is_it = [&](const Config::Origin& known) { return known.name == name; };
    if (name.starts_with("KILN_") && std::none_of(config.origins.begin(), config.origins.end(), is_it))
      report.warn("environment", fmt::format("{} is no variable of Kiln: `kiln info` lists them", name));
  }
}

/// Writes and reads a kernel as a host would.
void check_store(Report& report, Engine& engine, const KernelDesc& desc) {
  Store* store = engine.store();
  if (store == nullptr || engine.config().cache == CacheMode::off)
    return report.warn("cache",
                       "off (KILN_CACHE, KILN_DISABLE, or what is logged below): every process compiles for itself");
  if (engine.config().cache == CacheMode::read_only)
    report.ok("cache", "read-only (KILN_CACHE=ro)");
  else if (const Result<Engine::Warmed> warmed = engine.warmup(desc, nullptr); warmed)
    report.ok("cache", "a kernel was stored and found again");
  else
    report.fail("cache", warmed.status().message());
  check_stored(report, *store);
}

/// Loads generated code into executable memory and runs it.
void check_execution(Report& report, Engine& engine, const KernelDesc& desc) {
  const std::string name = "run " + std::string(find_op(desc.op)->name);
  const Result<KernelRef> kernel = engine.get(desc);
  if (!kernel)
    return report.add(kernel.status().code() == Code::miss ? Report::State::warn : Report::State::fail, name,
                      kernel.status().message());
  Result<std::vector<Tensor>> tensors = random_tensors(desc);
  if (!tensors)
    return report.fail(name, tensors.status().message());
  const Result<Invocation> invocation = runner_of(desc.op).prepare(**kernel, desc, *tensors);
  const Status ran = invocation ? invocation->call() : invocation.status();
  const Result<Check> check = ran ? check_outputs(desc, *tensors) : Result<Check>(ran);
  const std::string_view isa = name_of((*kernel)->implementation().isa);
  if (!check || !check->ok)
    return report.fail(name, check ? fmt::format("{0} gives a wrong result (KILN_DISABLE={0} leaves it out)", isa)
                                   : check.status().message());
  const bool generated = !(*kernel)->text().empty();
  const auto& rows = engine.implementations();
  if (!generated && std::none_of(rows.begin(), rows.end(), [&](const Implementation& row) {
        return row.op == desc.op && row.device == DeviceKind::cpu && row.compile != nullptr;
      }))
    return report.ok(name, fmt::format("{}: right; CPUs have nothing faster for it", isa));
  if (!generated)
    return report.warn(name, fmt::format("{}: no generated code serves; right, but slow", isa));
  report.ok(name, fmt::format("{}: generated code was loaded without a writable mapping, ran, and is right", isa));
  const Result<std::string> listing = disassemble((*kernel)->code().arch, (*kernel)->text(), (*kernel)->code().entries);
  if (listing)
    report.ok("LLVM", "its shared object is found and loads");
  else
    report.warn("LLVM", listing.status().message());
}

Result<Exit> doctor(bool json) {
  CollectedLog log; // what the engine would log becomes part of the report
  const Result<std::unique_ptr<Engine>> made = make_engine({.log_sink = CollectedLog::sink, .log_context = &log});
  if (!made)
    return made.status();
  Engine& engine = **made;
  Report report;
  check_environment(report, engine.config());
  check_machine(report, engine);
  check_places(report, engine.config());
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
  check_locks(report, engine.config());
  for (const std::string& line : log.lines)
    report.warn("log", line);
  if (json)
    report.print_as_json();
  else
    report.print();
  return report.failed() ? Exit::failed : Exit::ok;
}

} // namespace

bool Report::failed() const {
  return std::any_of(rows_.begin(), rows_.end(), [](const Row& row) { return row.state == State::fail; });
}

void Report::print() const {
  Columns columns;
  for (const Row& row : rows_)
    columns.row({text_of(row.state), row.name, row.text});
  columns.print();
}

void Report::print_as_json() const {
  Json checks = Json::array();
  for (const Row& row : rows_)
    checks.push_back({{"state", text_of(row.state)}, {"name", row.name}, {"text", row.text}});
  print_json({{"ok", !failed()}, {"checks", checks}});
}

Command doctor_command(Arguments kiln) {
  const auto json = std::make_shared<bool>(false);
  const Arguments arguments =
      kiln.add_command("doctor", "What would go wrong here: directories, permissions, executable memory, libraries");
  arguments.flag("--json", *json, "Print one JSON object");
  return {arguments, [json] { return doctor(*json); }};
}

} // namespace kiln::cli
