#include "jit/config.h"

#include <algorithm>
#include <array>
#include <charconv>
#include <filesystem>
#include <optional>
#include <set>

#include <fmt/format.h>
#include <fmt/ranges.h>

#include "jit/op.h"
#include "jit/os.h"

namespace kiln {
namespace {

constexpr std::array<std::string_view, 3> kCacheModes = {"rw", "ro", "off"};
constexpr std::array<std::string_view, 3> kMissPolicies = {"compile", "error", "fallback"};
constexpr std::array<std::string_view, 3> kPerfModes = {"off", "map", "jitdump"};
constexpr std::array<std::string_view, 6> kLogLevels = {"trace", "debug", "info", "warn", "error", "off"};
constexpr std::string_view kDiskTier = "disk", kRemoteTier = "remote";
constexpr const char* kCacheDirectory = "KILN_CACHE_DIR";
constexpr std::int64_t kMostCacheMb = 1 << 20;
constexpr std::int64_t kMostThreads = 1024;

Status refused(std::string_view variable, std::string_view value, std::string_view allowed) {
  return Status::error(Code::invalid_argument, fmt::format("{}={}: allowed is {}", variable, value, allowed));
}

std::vector<std::string_view> comma_items(std::string_view text) {
  std::vector<std::string_view> items;
  for (;;) {
    const std::size_t comma = text.find(',');
    std::string_view item = text.substr(0, comma);
    const std::size_t begin = std::min(item.find_first_not_of(' '), item.size());
    item = item.substr(begin, item.find_last_not_of(' ') + 1 - begin);
    items.push_back(item);
    if (comma == std::string_view::npos)
      return items;
    text.remove_prefix(comma + 1);
  }
}

/// The enumerator with this name, or nothing. The enum ends in `count`.
template <class Enum> std::optional<Enum> named(std::string_view name) {
  for (int i = 0; i < static_cast<int>(Enum::count); ++i)
    if (name_of(static_cast<Enum>(i)) == name)
      return static_cast<Enum>(i);
  return std::nullopt;
}

template <class Enum> std::vector<std::string_view> names_from(Enum first) {
  std::vector<std::string_view> names;
  for (int i = static_cast<int>(first); i < static_cast<int>(Enum::count); ++i)
    names.push_back(name_of(static_cast<Enum>(i)));
  return names;
}

/// Sets `value` to the enumerator whose name stands at its index in `names`.
template <class Enum, std::size_t count>
Status choose(std::string_view variable, std::string_view text, const std::array<std::string_view, count>& names,
              Enum& value) {
  const auto name = std::find(names.begin(), names.end(), text);
  if (name == names.end())
    return refused(variable, text, fmt::format("{}", fmt::join(names, ", ")));
  value = static_cast<Enum>(name - names.begin());
  return {};
}

template <class Integer>
Status parse_integer(std::string_view variable, std::string_view text, std::int64_t min, std::int64_t max,
                     Integer& value) {
  std::int64_t parsed = 0;
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), parsed);
  if (error != std::errc() || end != text.data() + text.size() || parsed < min || parsed > max)
    return refused(variable, text, fmt::format("an integer from {} to {}", min, max));
  value = static_cast<Integer>(parsed);
  return {};
}

/// Absolute, so that a later chdir() of the host changes nothing.
Status parse_path(std::string_view variable, std::string_view text, std::string& path) {
  std::error_code error;
  const std::filesystem::path absolute = std::filesystem::absolute(std::filesystem::path(text), error);
  if (error)
    return refused(variable, text, "an absolute path, since there is no current directory");
  path = absolute.lexically_normal().string();
  return {};
}

Status parse_disable(Config& config, std::string_view variable, std::string_view text) {
  std::vector<std::string_view> unknown;
  for (std::string_view name : comma_items(text)) {
    if (name.empty())
      continue;
    const auto path = named<IsaPath>(name);
    const auto backend = named<BackendId>(name);
    const auto generator = named<GeneratorId>(name);
    if (path)
      config.disabled_paths.push_back(*path);
    if (backend)
      config.disabled_backends.push_back(*backend);
    if (generator && *generator != GeneratorId::none)
      config.disabled_generators.push_back(*generator);
    if (name == kDiskTier)
      config.disk_disabled = true;
    else if (name == kRemoteTier)
      config.remote_disabled = true;
    else if (!path && !backend && (!generator || *generator == GeneratorId::none))
      unknown.push_back(name);
  }
  if (!unknown.empty())
    config.warnings.push_back(
        fmt::format("{}: unknown {} ignored; valid are the paths {}, the backends {}, the generators {} "
                    "and the tiers {}, {}",
                    variable, fmt::join(unknown, ", "), fmt::join(names_from(IsaPath::avx2), ", "),
                    fmt::join(names_from(BackendId::x86), ", "), fmt::join(names_from(GeneratorId::asmjit), ", "),
                    kDiskTier, kRemoteTier));
  return {};
}

Status parse_force(Config& config, std::string_view variable, std::string_view text) {
  for (std::string_view item : comma_items(text)) {
    Config::Force force;
    std::string_view path_name = item;
    if (const std::size_t colon = item.find(':'); colon != std::string_view::npos) {
      const OpSpec* op = find_op(item.substr(0, colon));
      if (!op)
        return refused(variable, text, fmt::format("PATH or OP:PATH with OP one of {}", known_op_names()));
      force.op = op->id;
      path_name = item.substr(colon + 1);
    }
    const auto path = named<IsaPath>(path_name);
    if (!path)
      return refused(variable, text,
                     fmt::format("a comma list of PATH or OP:PATH with PATH one of {}",
                                 fmt::join(names_from(IsaPath::avx2), ", ")));
    force.path = *path;
    if (std::any_of(config.forced.begin(), config.forced.end(),
                    [&](const auto& other) { return other.op == force.op; }))
      return refused(variable, text, "one path for an op, and one for all others");
    config.forced.push_back(force);
  }
  return {};
}

/// The value is not quoted: it may hold a password in the wrong place.
Status parse_remote(Config& config, std::string_view variable, std::string_view text) {
  Result<RemoteUrl> url = RemoteUrl::parse(text);
  if (!url)
    return Status::error(url.status().code(), fmt::format("{}: {}", variable, url.status().message()));
  config.remote = std::move(*url);
  return {};
}

std::string shown_disable(const Config& config) {
  std::vector<std::string_view> names;
  const auto add = [&](std::string_view name) {
    if (std::find(names.begin(), names.end(), name) == names.end())
      names.push_back(name);
  };
  for (IsaPath path : config.disabled_paths)
    add(name_of(path));
  for (BackendId backend : config.disabled_backends)
    add(name_of(backend));
  for (GeneratorId generator : config.disabled_generators)
    add(name_of(generator));
  if (config.disk_disabled)
    add(kDiskTier);
  if (config.remote_disabled)
    add(kRemoteTier);
  return fmt::format("{}", fmt::join(names, ","));
}

std::string shown_force(const Config& config) {
  std::vector<std::string> items;
  for (const Config::Force& force : config.forced) {
    const OpSpec* op = find_op(force.op);
    items.push_back(op ? fmt::format("{}:{}", op->name, name_of(force.path)) : std::string(name_of(force.path)));
  }
  return fmt::format("{}", fmt::join(items, ","));
}

template <std::size_t count, class Enum>
std::string shown_choice(const std::array<std::string_view, count>& names, Enum value) {
  return std::string(names[static_cast<std::size_t>(value)]);
}

/// One variable: how its text changes the configuration, and how `kiln info` shows what is in force.
struct Variable {
  const char* name;
  Status (*parse)(Config& config, std::string_view variable, std::string_view text);
  std::string (*shown)(const Config& config);
};

using View = std::string_view;
constexpr Variable kVariables[] = {
    {"KILN_DISABLE", parse_disable, shown_disable},
    {"KILN_FORCE", parse_force, shown_force},
    {"KILN_CACHE", [](Config& c, View name, View text) { return choose(name, text, kCacheModes, c.cache); },
     [](const Config& c) { return shown_choice(kCacheModes, c.cache); }},
    {kCacheDirectory, [](Config& c, View name, View text) { return parse_path(name, text, c.cache_dir); },
     [](const Config& c) { return c.cache_dir; }},
    {"KILN_CACHE_MAX_MB",
     [](Config& c, View name, View text) { return parse_integer(name, text, 1, kMostCacheMb, c.cache_max_mb); },
     [](const Config& c) { return std::to_string(c.cache_max_mb); }},
    {"KILN_CACHE_SYSTEM_DIR",
     [](Config& c, View name, View text) { return parse_path(name, text, c.cache_system_dir); },
     [](const Config& c) { return c.cache_system_dir; }},
    {"KILN_TRUSTED_KEYS", [](Config& c, View name, View text) { return parse_path(name, text, c.trusted_keys); },
     [](const Config& c) { return c.trusted_keys; }},
    {"KILN_REMOTE", parse_remote, [](const Config& c) { return c.remote ? c.remote->text() : std::string(); }},
    {"KILN_REMOTE_SIGNING_KEY",
     [](Config& c, View name, View text) { return parse_path(name, text, c.remote_signing_key); },
     [](const Config& c) { return c.remote_signing_key; }},
    {"KILN_MISS", [](Config& c, View name, View text) { return choose(name, text, kMissPolicies, c.miss); },
     [](const Config& c) { return shown_choice(kMissPolicies, c.miss); }},
    {"KILN_THREADS",
     [](Config& c, View name, View text) { return parse_integer(name, text, 1, kMostThreads, c.threads); },
     [](const Config& c) { return c.threads == 0 ? "all" : std::to_string(c.threads); }},
    {"KILN_LOG", [](Config& c, View name, View text) { return choose(name, text, kLogLevels, c.log); },
     [](const Config& c) { return shown_choice(kLogLevels, c.log); }},
    {"KILN_DUMP_DIR", [](Config& c, View name, View text) { return parse_path(name, text, c.dump_dir); },
     [](const Config& c) { return c.dump_dir; }},
    {"KILN_PERF", [](Config& c, View name, View text) { return choose(name, text, kPerfModes, c.perf); },
     [](const Config& c) { return shown_choice(kPerfModes, c.perf); }},
};

using GetVariable = const char* (*)(const char* name);

/// Empty when unset: an empty value counts as none.
std::string_view value_of(GetVariable get, const char* name) {
  const char* value = get(name);
  return value ? value : "";
}

/// `$VARIABLE/kiln`, else `$HOME/DEFAULT/kiln`, else empty. The XDG base directory specification has relative values
/// ignored.
std::string xdg_directory(GetVariable get, const char* variable, std::string_view default_under_home) {
  if (const std::string_view base = value_of(get, variable); base.starts_with('/'))
    return fmt::format("{}/kiln", base);
  if (const std::string_view home = value_of(get, "HOME"); home.starts_with('/'))
    return fmt::format("{}/{}/kiln", home, default_under_home);
  return {};
}

} // namespace

Result<Config> Config::from_environment(const char* (*get)(const char* name), const HostSettings& host,
                                        FileSystemOf file_system_of) {
  Config config;
  if (os::runs_privileged()) {
    get = [](const char*) -> const char* { return nullptr; };
    config.warnings.push_back("the environment is ignored: this process has rights that its caller does not have");
  }
  config.program_path = value_of(get, "PATH");
  config.cache_dir = xdg_directory(get, "XDG_CACHE_HOME", ".cache");
  config.key_dir = xdg_directory(get, "XDG_DATA_HOME", ".local/share");
  if (!config.key_dir.empty())
    config.trusted_keys = config.key_dir + "/trusted.keys";
  for (const Variable& variable : kVariables)
    if (const std::string_view text = value_of(get, variable.name); !text.empty())
      if (Status status = variable.parse(config, variable.name, text); !status)
        return status;

  std::set<std::string_view> set_by_host;
  if (host.cache_dir) {
    config.cache_dir = *host.cache_dir;
    set_by_host.insert(kCacheDirectory);
  }
  if (host.cache) {
    config.cache = *host.cache;
    set_by_host.insert("KILN_CACHE");
  }
  if (host.threads && (config.threads == 0 || *host.threads < config.threads)) {
    config.threads = *host.threads;
    set_by_host.insert("KILN_THREADS");
  }
  bool moved = false;
  config.cache_unwanted = config.cache == CacheMode::off;
  if (config.cache != CacheMode::off && (config.cache_dir.empty() || config.key_dir.empty())) {
    config.cache = CacheMode::off;
    config.warnings.push_back(fmt::format("the kernel cache is off: there is no place for {}; set HOME{}",
                                          config.cache_dir.empty() ? "it" : "its key",
                                          config.cache_dir.empty() ? " or KILN_CACHE_DIR" : " or XDG_DATA_HOME"));
  }
  if (config.cache != CacheMode::off) {
    CachePlace place =
        place_cache(config.cache_dir, config.key_dir, std::string(value_of(get, "XDG_RUNTIME_DIR")), file_system_of);
    moved = !place.moved.empty();
    if (moved)
      config.warnings.push_back(std::move(place.moved));
    if (place.none)
      config.cache = CacheMode::off;
    config.cache_dir = std::move(place.directory);
    config.key_dir = std::move(place.key_directory);
  }
  if (!config.remote_signing_key.empty() && !config.remote)
    config.warnings.push_back("KILN_REMOTE_SIGNING_KEY has no effect without KILN_REMOTE");
  for (const Variable& variable : kVariables)
    config.origins.push_back({variable.name, variable.shown(config),
                              moved && variable.name == kCacheDirectory ? "moved"
                              : set_by_host.contains(variable.name)     ? "host"
                              : value_of(get, variable.name).empty()    ? "default"
                                                                        : "environment"});
  return config;
}

bool Config::disables(const Implementation& implementation) const {
  const auto has = [](const auto& list, auto value) {
    return std::find(list.begin(), list.end(), value) != list.end();
  };
  return has(disabled_paths, implementation.isa) || has(disabled_backends, implementation.backend) ||
         has(disabled_generators, implementation.generator);
}

bool Config::forced_path(OpId op, IsaPath& path) const {
  for (OpId named_op : {op, OpId::none})
    for (const Force& force : forced)
      if (force.op == named_op) {
        path = force.path;
        return true;
      }
  return false;
}

std::optional<IsaPath> Config::forced_path(OpId op, DeviceKind device, std::span<const Implementation> rows) const {
  IsaPath path{};
  if (!forced_path(op, path))
    return std::nullopt;
  const bool names_the_op = std::any_of(forced.begin(), forced.end(), [&](const Force& f) { return f.op == op; });
  bool here = false, elsewhere = false;
  for (const Implementation& row : rows)
    if (row.op == op && row.isa == path)
      (row.device == device ? here : elsewhere) = true;
  return here || (names_the_op && !elsewhere) ? std::optional(path) : std::nullopt;
}

} // namespace kiln
