#include <algorithm>
#include <memory>

#include <fmt/format.h>

#include "api/cli/cache.h"
#include "api/cli/command.h"
#include "api/cli/output.h"
#include "api/session.h"
#include "cache/remote_row.h"
#include "jit/code_object.h"
#include "jit/kernel_key.h"
#include "jit/loadable_code.h"

namespace kiln::cli {
namespace {

struct Options {
  std::string key;
  bool recompile = false, dry_run = false, json = false;
};

/// Digits of a key that are enough for people.
constexpr std::size_t kShortKey = 16;

/// The implementation that made this row, or null: another version of Kiln did.
const Implementation* implementation_of(const Engine& engine, const StoreRow& row) {
  const OpSpec* op = find_op(row.op);
  const std::string_view arch = std::string_view(row.target).substr(0, row.target.find(':'));
  for (const Implementation& candidate : engine.implementations())
    if (op != nullptr && candidate.op == op->id && name_of(candidate.isa) == row.isa && candidate.compile != nullptr &&
        (candidate.any_arch || name_of(candidate.arch) == arch) && candidate.generator_digest == row.generator)
      return &candidate;
  return nullptr;
}

Result<Exit> path(Engine& engine, const Options& options) {
  if (options.json)
    print_json({{"path", engine.store()->path()}});
  else
    print_line(engine.store()->path());
  return Exit::ok;
}

/// What lies under the user's cache; null without KILN_CACHE_SYSTEM_DIR.
Json system_json(Engine& engine) {
  if (engine.system_cache() == nullptr)
    return {};
  const Result<SystemCache::Contents> contents = engine.system_cache()->contents(false);
  return {{"path", engine.system_cache()->path()},
          {"rows", contents ? contents->kernels : 0},
          {"file_bytes", contents ? contents->file_bytes : 0},
          {"signed_by", contents ? Json(contents->signer) : Json()},
          {"error", contents ? "" : contents.status().message()}};
}

std::string system_text(SystemCache& system) {
  const Result<SystemCache::Contents> contents = system.contents(false);
  return contents ? fmt::format("{}: {}, {}, signed by {}", system.path(), count_text(contents->kernels, "kernel"),
                                bytes_text(contents->file_bytes), contents->signer)
                  : "not used: " + contents.status().message();
}

/// What lies behind them; null without KILN_REMOTE.
Json remote_json(Engine& engine) {
  if (engine.remote_cache() == nullptr)
    return {};
  const Result<RemoteCache::Probe> probe = engine.remote_cache()->probe(0);
  return {{"url", engine.remote_cache()->url().text()},
          {"names", probe ? Json(probe->names) : Json()},
          {"error", probe ? "" : probe.status().message()}};
}

std::string remote_text(RemoteCache& remote) {
  const Result<RemoteCache::Probe> probe = remote.probe(0);
  return fmt::format("{}: {}", remote.url().text(),
                     probe ? count_text(probe->names, "name") : probe.status().message());
}

/// Of all processes that used this cache; null when nothing is known.
Json usage_json(const Result<UsageFile::Totals>& totals) {
  if (!totals)
    return {};
  Json json = {{"since", totals->since}};
  for (const UsageField& field : usage_fields)
    json[field.name] = totals->counts.*field.value;
  return json;
}

/// `12 (10 fail authentication, 2 for another machine)`
std::string refused_text(const UsageCounts& counts) {
  constexpr std::pair<std::int64_t UsageCounts::*, const char*> reasons[] = {
      {&UsageCounts::refused_mac, "changed or of another key"},
      {&UsageCounts::refused_key_file, "of another key file"},
      {&UsageCounts::refused_code, "no code of this build"},
      {&UsageCounts::refused_features, "for another machine"},
      {&UsageCounts::refused_size, "too large"},
      {&UsageCounts::refused_system, "of the system cache"},
      {&UsageCounts::refused_remote, "of the remote tier"},
  };
  std::string parts;
  for (const auto& [count, text] : reasons)
    if (counts.*count != 0)
      parts += fmt::format("{}{} {}", parts.empty() ? "" : ", ", counts.*count, text);
  return parts.empty() ? std::to_string(counts.refused) : fmt::format("{} ({})", counts.refused, parts);
}

void usage_rows(const UsageFile::Totals& totals, Columns& columns) {
  const UsageCounts& counts = totals.counts;
  const std::int64_t hits = counts.memory_hits + counts.disk_hits + counts.system_hits + counts.remote_hits;
  columns.row({"", ""});
  columns.row({"all processes", "since " + local_time_text(totals.since)});
  columns.row({"hits", fmt::format("{}: {} in memory, {} on disk, {} in the system cache, {} in the remote tier", hits,
                                   counts.memory_hits, counts.disk_hits, counts.system_hits, counts.remote_hits)});
  columns.row({"misses", std::to_string(counts.misses)});
  columns.row(
      {"compiles", fmt::format("{} in {}; {} failed", counts.compiles,
                               microseconds_text(static_cast<double>(counts.compile_us)), counts.compile_failures)});
  columns.row({"fallbacks", std::to_string(counts.fallbacks)});
  columns.row({"stored", fmt::format("{}, {}", count_text(counts.puts, "kernel"), bytes_text(counts.put_bytes))});
  columns.row(
      {"evicted", fmt::format("{}, {}", count_text(counts.evictions, "kernel"), bytes_text(counts.evicted_bytes))});
  columns.row({"refused", refused_text(counts)});
  columns.row({"gone without", fmt::format("{} times busy, {} errors, {} in the remote tier", counts.busy,
                                           counts.errors, counts.remote_errors)});
}

Result<Exit> stats(Engine& engine, const Options& options) {
  const Result<StoreStats> stats = engine.store()->stats();
  if (!stats)
    return stats.status();
  const Result<UsageFile::Totals> totals = engine.store()->totals();
  const std::int64_t max_bytes = engine.config().cache_max_mb << 20;
  if (options.json) {
    print_json({{"path", engine.store()->path()},
                {"rows", stats->rows},
                {"bytes", stats->bytes},
                {"file_bytes", stats->file_bytes},
                {"max_bytes", max_bytes},
                {"usage", usage_json(totals)},
                {"system", system_json(engine)},
                {"remote", remote_json(engine)}});
    return Exit::ok;
  }
  Columns columns;
  columns.row({"path", engine.store()->path()});
  columns.row({"kernels", std::to_string(stats->rows)});
  columns.row({"size", fmt::format("{} of at most {}; the file has {}", bytes_text(stats->bytes), bytes_text(max_bytes),
                                   bytes_text(stats->file_bytes))});
  if (engine.system_cache() != nullptr)
    columns.row({"under it", system_text(*engine.system_cache())});
  if (engine.remote_cache() != nullptr)
    columns.row({"behind it", remote_text(*engine.remote_cache())});
  if (totals)
    usage_rows(*totals, columns);
  columns.print();
  return Exit::ok;
}

Json row_json(const Store::Listed& listed) {
  const StoreRow& row = listed.row;
  return {{"key", row.key.hex()},
          {"op", row.op},
          {"desc", row.desc},
          {"isa", row.isa},
          {"target", row.target},
          {"generator", row.generator},
          {"bytes", listed.code_bytes},
          {"compile_us", row.compile_us},
          {"created_at", row.created_at},
          {"last_hit_at", row.last_hit_at},
          {"hits", row.hits}};
}

Result<Exit> list(Engine& engine, const Options& options) {
  const Result<std::vector<Store::Listed>> rows = engine.store()->list();
  if (!rows)
    return rows.status();
  if (options.json) {
    Json kernels = Json::array();
    for (const Store::Listed& listed : *rows)
      kernels.push_back(row_json(listed));
    print_json({{"kernels", kernels}});
    return Exit::ok;
  }
  Columns columns;
  columns.row({"key", "isa", "arch", "size", "hits", "last hit", "desc"});
  for (const Store::Listed& listed : *rows)
    columns.row({listed.row.key.hex().substr(0, kShortKey), listed.row.isa,
                 listed.row.target.substr(0, listed.row.target.find(':')), bytes_text(listed.code_bytes),
                 std::to_string(listed.row.hits), local_time_text(listed.row.last_hit_at), listed.row.desc});
  columns.print();
  return Exit::ok;
}

Result<Digest> key_with_prefix(Store& store, const std::string& prefix) {
  const bool is_hex = !prefix.empty() && prefix.size() <= 2 * sizeof(Digest) &&
                      prefix.find_first_not_of("0123456789abcdef") == std::string::npos;
  if (!is_hex)
    return Status::error(
        Code::invalid_argument,
        fmt::format("key '{}': give the first digits of one that `kiln cache list` shows (0-9, a-f)", prefix));
  const Result<std::vector<Digest>> keys = store.find(prefix);
  if (!keys)
    return keys.status();
  if (keys->empty())
    return Status::error(Code::not_found, fmt::format("no kernel has a key that begins with {}", prefix));
  if (keys->size() > 1)
    return Status::error(Code::invalid_argument,
                         fmt::format("key '{}': {} kernels begin with it: give more digits", prefix, keys->size()));
  return keys->front();
}

Result<Exit> inspect(Engine& engine, const Options& options) {
  Store& store = *engine.store();
  const Result<Digest> key = key_with_prefix(store, options.key);
  if (!key)
    return key.status();
  const Result<StoreRow> row = store.look(*key);
  if (!row)
    return row.status();
  const Result<CodeObject> code = CodeObject::parse(row->code);
  if (!code)
    return code.status();
  const Implementation* implementation = implementation_of(engine, *row);
  const std::optional<PublicKey> signer = signer_of(*row); // of a row that came from a remote tier
  const std::string signed_by = signer ? signer->id() : "";

  if (options.json) {
    Json report = row_json({*row, static_cast<std::int64_t>(row->code.size())});
    Json entries = Json::object(), plan = Json::object();
    for (const CodeObject::Entry& entry : code->entries)
      entries[entry.name] = entry.offset;
    for (const auto& [name, value] : code->plan)
      plan[name] = value;
    report.update({{"image_bytes", code->image.size()},
                   {"alignment", code->alignment},
                   {"format", name_of(code->format)},
                   {"compiler", code->compiler},
                   {"driver_version", code->driver_version},
                   {"configuration", code->configuration},
                   {"tuned_for", code->tuned_for},
                   {"vector_registers", code->vector_registers},
                   {"general_registers", code->general_registers},
                   {"entries", entries},
                   {"plan_version", code->plan_version},
                   {"plan", plan},
                   {"of_this_version", implementation != nullptr},
                   {"signed_by", signed_by.empty() ? Json() : Json(signed_by)}});
    print_json(report);
    return Exit::ok;
  }
  std::string entries, plan;
  for (const CodeObject::Entry& entry : code->entries)
    entries += fmt::format("{}{} at {}", entries.empty() ? "" : ", ", entry.name, entry.offset);
  for (const auto& [name, value] : code->plan)
    plan += fmt::format("{}{}={}", plan.empty() ? "" : " ", name, value);
  Columns columns;
  columns.row({"key", row->key.hex()});
  columns.row({"desc", row->desc});
  columns.row({"path", row->isa});
  columns.row({"needs", row->target});
  columns.row({"generator", row->generator + (implementation ? "" : " (of another version)")});
  columns.row({"image", fmt::format("{} bytes, {}-byte aligned", code->image.size(), code->alignment)});
  if (code->format != CodeFormat::flat)
    columns.row(
        {"format", fmt::format("{}{}{}", name_of(code->format), code->compiler.empty() ? "" : " by ", code->compiler)});
  if (!code->configuration.empty())
    columns.row({"configuration", configuration_text(code->configuration, code->tuned_for)});
  columns.row({"entries", entries});
  columns.row({"plan", plan});
  columns.row({"registers", fmt::format("{} vector, {} general", code->vector_registers, code->general_registers)});
  columns.row({"compiled", fmt::format("{} in {}", local_time_text(row->created_at),
                                       microseconds_text(static_cast<double>(row->compile_us)))});
  columns.row({"hits", fmt::format("{}, last {}", row->hits, local_time_text(row->last_hit_at))});
  if (!signed_by.empty())
    columns.row({"signed by", signed_by});
  columns.print();
  return Exit::ok;
}

struct Recompiled {
  std::int64_t same = 0;
  std::int64_t skipped = 0; ///< made by another version, which nothing here can repeat
  std::vector<std::string> different;
  std::vector<std::string> failed; ///< why each could not be compiled: without LLVM's shared object, say
};

/// Whether the generator makes what is stored. Of a cubin, which assemblers differ in, that is its PTX and all else.
bool is_same_code(const CodeObject& stored, CodeObject again) {
  if (stored.format == CodeFormat::cubin && again.format == CodeFormat::ptx) {
    again.ptx_digest = digest_of(again.image);
    again.format = stored.format;
    again.image = stored.image;
    again.compiler = stored.compiler;
    again.driver_version = stored.driver_version;
  }
  return again == stored;
}

/// Emission is deterministic, so a row of this version's generators must come out byte for byte, whatever machine it is
/// for.
Result<Recompiled> recompile(Engine& engine) {
  const Result<std::vector<Store::Listed>> rows = engine.store()->list();
  if (!rows)
    return rows.status();
  Recompiled recompiled;
  for (const Store::Listed& listed : *rows) {
    const Result<StoreRow> row = engine.store()->look(listed.row.key);
    if (!row)
      continue; // evicted meanwhile, or bad, which verify has counted
    const std::string key = row->key.hex();
    const Implementation* const implementation = implementation_of(engine, *row);
    if (implementation == nullptr) {
      ++recompiled.skipped;
      continue;
    }
    const Result<KernelDesc> desc = parse_desc(row->desc);
    const Result<CodeObject> code = CodeObject::parse(row->code);
    const Result<KeyFields> fields = key_fields_of(*row);
    if (!desc || !code || !fields) { // this version does not write such rows
      recompiled.different.push_back(key);
      continue;
    }
    const Result<CodeObject> again = [&]() -> Result<CodeObject> {
      if (code->tuned_for.empty())
        return implementation->compile(*desc, code->needs(), fields->pack_layout);
      Result<LoadableCode> made = LoadableCode::compile(*implementation, *desc, code->needs(), fields->pack_layout,
                                                        code->configuration, code->tuned_for);
      return made ? Result<CodeObject>(std::move(*made).take()) : made.status();
    }();
    if (!again)
      recompiled.failed.push_back(fmt::format("{}: {}", key, again.status().message()));
    else if (is_same_code(*code, *again))
      ++recompiled.same;
    else
      recompiled.different.push_back(key);
  }
  return recompiled;
}

Result<Exit> verify(Engine& engine, const Options& options) {
  const Result<Store::Verified> verified = engine.store()->verify(!options.dry_run);
  if (!verified)
    return verified.status();
  Recompiled recompiled;
  if (options.recompile) {
    Result<Recompiled> result = recompile(engine);
    if (!result)
      return result.status();
    recompiled = std::move(*result);
  }
  if (options.json) {
    Json report = {{"ok", verified->ok},
                   {"bad", verified->bad},
                   {"bad_keys", verified->bad_keys},
                   {"removed", options.dry_run ? 0 : verified->bad}};
    if (options.recompile)
      report["recompiled"] = {{"same", recompiled.same},
                              {"different", recompiled.different},
                              {"failed", recompiled.failed},
                              {"skipped", recompiled.skipped}};
    print_json(report);
  } else {
    print_line(fmt::format("{} authentic, {} bad{}", verified->ok, verified->bad,
                           verified->bad == 0 ? ""
                           : options.dry_run  ? " (kept)"
                                              : " (removed)"));
    for (const std::string& key : verified->bad_keys)
      print_line("  bad        " + key);
    if (options.recompile)
      print_line(fmt::format("{} compiled again to the same bytes, {} to others, {} of another version, {} failed",
                             recompiled.same, recompiled.different.size(), recompiled.skipped,
                             recompiled.failed.size()));
    for (const std::string& key : recompiled.different)
      print_line("  different  " + key);
  }
  for (const std::string& failure : recompiled.failed)
    report_error(failure);
  if (verified->bad > 0 || !recompiled.different.empty())
    return Exit::integrity;
  return recompiled.failed.empty() ? Exit::ok : Exit::failed;
}

Result<Exit> report_pruned(const Result<Store::Pruned>& pruned, const Options& options) {
  if (!pruned)
    return pruned.status();
  if (options.json)
    print_json({{"rows", pruned->rows}, {"bytes", pruned->bytes}, {"dry_run", options.dry_run}});
  else
    print_line(fmt::format("{} {}, {}", options.dry_run ? "would remove" : "removed",
                           count_text(pruned->rows, "kernel"), bytes_text(pruned->bytes)));
  return Exit::ok;
}

Result<Exit> prune(Engine& engine, const Options& options) {
  return report_pruned(engine.store()->prune(engine.config().cache_max_mb << 20, options.dry_run), options);
}

Result<Exit> clear(Engine& engine, const Options& options) {
  return report_pruned(engine.store()->clear(options.dry_run), options);
}

struct Action {
  const char* name;
  const char* description;
  Result<Exit> (*run)(Engine& engine, const Options& options);
  bool removes; ///< takes --dry-run
};
constexpr Action kActions[] = {
    {"path", "The path of the database", path, false},
    {"stats", "How many kernels, how large; hits, compiles and refusals of all processes", stats, false},
    {"list", "Every kernel, most recently used first", list, false},
    {"inspect", "All about one kernel", inspect, false},
    {"verify", "Authenticate every kernel, and remove the bad ones", verify, true},
    {"prune", "Remove least recently used kernels beyond KILN_CACHE_MAX_MB", prune, true},
    {"clear", "Remove every kernel", clear, true},
};

} // namespace

Result<Exit> with_cache(const std::function<Result<Exit>(Engine& engine)>& act) {
  CollectedLog log; // an error of the store would be said twice
  const Result<std::unique_ptr<Engine>> engine = make_engine({.log_sink = CollectedLog::sink, .log_context = &log});
  if (!engine)
    return engine.status();
  if ((*engine)->store() == nullptr)
    return Status::error(Code::unsupported,
                         fmt::format("there is no cache to look at{}",
                                     log.lines.empty() ? ": it is off (see KILN_CACHE and KILN_DISABLE in `kiln info`)"
                                                       : "; " + log.lines.back()));
  Result<Exit> exit = act(**engine);
  for (const std::string& line : exit ? log.lines : std::vector<std::string>())
    report_error(line);
  return exit;
}

Command cache_command(Arguments kiln) {
  const auto options = std::make_shared<Options>();
  const Arguments arguments = kiln.add_command("cache", "Look after the kernels on disk");
  std::vector<Command> commands;
  for (const Action& action : kActions) {
    const Arguments own = arguments.add_command(action.name, action.description);
    if (action.run == inspect)
      own.required_word("KEY", options->key, "The key, or its first digits");
    if (action.run == verify)
      own.flag("--recompile", options->recompile, "Also compile each again and compare byte for byte");
    if (action.removes)
      own.flag("--dry-run", options->dry_run, "Remove nothing");
    own.flag("--json", options->json, "Print one JSON object");
    commands.push_back(
        {own, [&action, options] { return with_cache([&](Engine& engine) { return action.run(engine, *options); }); }});
  }
  for (Command& command : bundle_commands(arguments))
    commands.push_back(std::move(command));
  return {arguments, [commands] { return run_given(commands); }};
}

} // namespace kiln::cli
