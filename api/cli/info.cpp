#include <algorithm>
#include <memory>
#include <optional>

#include <fmt/format.h>

#include "api/cli/command.h"
#include "api/cli/operands.h"
#include "api/cli/output.h"
#include "api/kiln.h"
#include "api/session.h"
#include "jit/cuda/driver.h"

namespace kiln::cli {
namespace {

struct Options {
  bool json = false, target = false;
};

struct Availability {
  bool available = false;
  std::string reason; ///< empty when available
};

/// For some desc at least: a row may still refuse this or that shape, which `kiln explain` tells.
Availability availability(const Implementation& row, Engine& engine) {
  KernelDesc desc;
  if (const Result<KernelDesc> small = small_desc(*find_op(row.op)))
    desc = find_op(row.op)->canonical(*small);
  desc.device.kind = row.device;
  const Result<Target> found = engine.target_of(desc);
  if (!found)
    return {false, found.status().message()};
  const Target& target = *found;
  if (!row.any_arch && row.arch != target.arch)
    return {false, fmt::format("made for {}", name_of(row.arch))};
  if (const Features missing = row.needs.without(target.features); !missing.empty())
    return {false, fmt::format("the machine lacks {}", missing.text())};
  if (row.supports != nullptr)
    if (const Status status = row.supports(desc, target); !status)
      return {false, status.message()};
  if (engine.config().disables(row))
    return {false, "left out by KILN_DISABLE"};
  if (const auto forced = engine.config().forced_path(row.op, row.device, engine.implementations());
      forced && *forced != row.isa)
    return {false, fmt::format("KILN_FORCE takes {} only", name_of(*forced))};
  return {true, ""};
}

Json paths_json(const OpSpec& op, Engine& engine) {
  Json paths = Json::array();
  for (const Implementation& row : engine.implementations()) {
    if (row.op != op.id)
      continue;
    const Availability state = availability(row, engine);
    Json needs = Json::array();
    for (const Feature feature : row.needs.list())
      needs.push_back(name_of(feature));
    paths.push_back({{"isa", name_of(row.isa)},
                     {"backend", name_of(row.backend)},
                     {"generator", name_of(row.generator)},
                     {"arch", row.any_arch ? "any" : name_of(row.arch)},
                     {"device", row.device == DeviceKind::cuda ? "cuda" : "cpu"},
                     {"needs", needs},
                     {"available", state.available},
                     {"reason", state.reason}});
  }
  return paths;
}

Json ops_json(Engine& engine) {
  Json ops = Json::array();
  for (const OpSpec& op : op_table()) {
    Json fields = Json::array(), tensors = Json::array();
    for (const FieldSpec& field : op.fields) {
      Json one = {{"name", field.name}, {"required", field.required}};
      if (!field.choices.empty()) {
        one["choices"] = field.choices;
        one["default"] = field.choices[static_cast<std::size_t>(field.default_value)];
      } else {
        one["min"] = field.min;
        one["max"] = field.max;
        one["any"] = field.any_allowed;
        if (!field.required)
          one["default"] = field.default_value;
      }
      fields.push_back(std::move(one));
    }
    for (const TensorSpec& tensor : op.tensors)
      tensors.push_back({{"name", tensor.name}, {"output", tensor.output}, {"optional", tensor.optional}});
    ops.push_back({{"op", op.name}, {"fields", fields}, {"tensors", tensors}, {"paths", paths_json(op, engine)}});
  }
  return ops;
}

/// Opens the driver, if there is one.
Json gpus_json(const Engine& engine, const Result<cuda::Driver*>& driver) {
  if (!driver)
    return {{"available", false}, {"reason", driver.status().message()}};
  Json devices = Json::array();
  for (const cuda::DeviceInfo& device : (*driver)->devices())
    devices.push_back({{"name", device.name},
                       {"target", device.target().text()},
                       {"sms", device.sm_count},
                       {"memory_bytes", device.memory_bytes}});
  const bool disabled =
      std::any_of(engine.implementations().begin(), engine.implementations().end(), [&](const Implementation& row) {
        return row.device == DeviceKind::cuda && engine.config().disables(row);
      });
  return {{"available", true},
          {"reason", disabled ? "KILN_DISABLE leaves out kernels for them" : ""},
          {"driver", (*driver)->version_text()},
          {"devices", devices}};
}

Json info_json(Engine& engine) {
  const Machine& machine = engine.machine();
  Json environment = Json::array(), targets = Json::array();
  for (const Config::Origin& row : engine.config().origins)
    environment.push_back({{"name", row.name}, {"value", row.value}, {"origin", row.origin}});
  for (const KnownTarget& known : known_targets())
    targets.push_back({{"name", known.name}, {"target", known.text}});
  return {{"version", kiln_version()},
          {"target", machine.target.text()},
          {"machine",
           {{"cpu", machine.cpu_name},
            {"cores", machine.cores},
            {"l1d_bytes", machine.l1d_bytes},
            {"l2_bytes", machine.l2_bytes},
            {"l3_bytes", machine.l3_bytes}}},
          {"cache",
           {{"path", engine.store() ? engine.store()->path() : ""},
            {"system_path", engine.system_cache() ? engine.system_cache()->path() : ""},
            {"remote", engine.remote_cache() ? engine.remote_cache()->url().text() : ""}}},
          {"gpus", gpus_json(engine, engine.runtime().cuda())},
          {"ops", ops_json(engine)},
          {"environment", environment},
          {"known_targets", targets}};
}

/// What a field takes, its default first.
std::string field_text(const FieldSpec& field) {
  if (field.choices.empty())
    return fmt::format("{} to {}{}", field.min, field.max, field.any_allowed ? " or any" : "");
  std::string text(field.choices[static_cast<std::size_t>(field.default_value)]);
  for (const std::string_view choice : field.choices)
    if (choice != field.choices[static_cast<std::size_t>(field.default_value)])
      text += fmt::format(", {}", choice);
  return text;
}

void print_info(Engine& engine) {
  const Machine& machine = engine.machine();
  Columns facts;
  facts.row({"version", kiln_version()});
  facts.row({"machine", fmt::format("{}, {} cores", machine.cpu_name, machine.cores)});
  facts.row({"caches", fmt::format("L1d {}, L2 {} per core, L3 {} shared", bytes_text(machine.l1d_bytes),
                                   bytes_text(machine.l2_bytes), bytes_text(machine.l3_bytes))});
  facts.row({"target", machine.target.text()});
  if (const Result<cuda::Driver*> driver = engine.runtime().cuda(); !driver) {
    facts.row({"GPUs", driver.status().message()});
  } else {
    int index = 0;
    for (const cuda::DeviceInfo& device : (*driver)->devices())
      facts.row(
          {fmt::format("cuda:{}", index++),
           fmt::format("{}, {}, {} SMs, {}; driver for CUDA {}", device.name, device.target().text(), device.sm_count,
                       bytes_text(static_cast<std::int64_t>(device.memory_bytes)), (*driver)->version_text())});
  }
  facts.row({"cache", engine.store() ? engine.store()->path() : "off"});
  if (engine.system_cache() != nullptr)
    facts.row({"under it", engine.system_cache()->path()});
  if (engine.remote_cache() != nullptr)
    facts.row({"behind it", engine.remote_cache()->url().text()});
  facts.print();
  for (const OpSpec& op : op_table()) {
    print_line(fmt::format("\n{}: fields", op.name));
    Columns fields("  ");
    for (const FieldSpec& field : op.fields)
      fields.row({std::string(field.name), field_text(field)});
    fields.print();
    print_line(fmt::format("\n{}: paths in order of preference", op.name));
    Columns paths("  ");
    for (const Implementation& row : engine.implementations()) {
      if (row.op != op.id)
        continue;
      const Availability state = availability(row, engine);
      paths.row({std::string(name_of(row.isa)), std::string(name_of(row.backend)), std::string(name_of(row.generator)),
                 state.available ? "available" : state.reason});
    }
    paths.print();
  }
  print_line("\nenvironment");
  Columns environment("  ");
  for (const Config::Origin& row : engine.config().origins)
    environment.row({row.name, row.value.empty() ? "-" : row.value, row.origin});
  environment.print();
  print_line("\nnamed targets");
  Columns targets("  ");
  for (const KnownTarget& known : known_targets())
    targets.row({std::string(known.name), std::string(known.text)});
  targets.print();
}

Result<Exit> info(const Options& options) {
  const Result<std::unique_ptr<Engine>> engine = make_engine({});
  if (!engine)
    return engine.status();
  if (options.target && options.json)
    print_json({{"target", (*engine)->machine().target.text()}});
  else if (options.target)
    print_line((*engine)->machine().target.text());
  else if (options.json)
    print_json(info_json(**engine));
  else
    print_info(**engine);
  return Exit::ok;
}

} // namespace

Command info_command(Arguments kiln) {
  const auto options = std::make_shared<Options>();
  const Arguments arguments =
      kiln.add_command("info", "This machine, the ops and their paths, the environment in force");
  arguments.flag("--target", options->target,
                 "Only the string that names this machine (for warmup --target elsewhere)");
  arguments.flag("--json", options->json, "Print one JSON object");
  return {arguments, [options] { return info(*options); }};
}

} // namespace kiln::cli
