#include "jit/config.h"

#include <algorithm>
#include <filesystem>
#include <map>
#include <sched.h>
#include <sys/mount.h>
#include <sys/stat.h>
#include <unistd.h>

#include <doctest/doctest.h>

#include "jit/op.h"
#include "tests/child_process.h"
#include "tests/emulator.h"
#include "tests/fuse_mount.h"

using namespace kiln;
using namespace kiln::test;

namespace {

std::map<std::string, std::string> g_environment;

const char* get_variable(const char* name) {
  const auto found = g_environment.find(name);
  return found == g_environment.end() ? nullptr : found->second.c_str();
}

/// With HOME=/home/u unless the environment says otherwise.
Result<Config> config_of(std::map<std::string, std::string> environment) {
  environment.emplace("HOME", "/home/u");
  g_environment = std::move(environment);
  return Config::from_environment(get_variable);
}

Config::Origin origin_of(const Config& config, std::string_view name) {
  for (const Config::Origin& origin : config.origins)
    if (origin.name == name)
      return origin;
  return {};
}

bool contains(const std::string& text, std::string_view part) {
  return text.find(part) != std::string::npos;
}

} // namespace

TEST_CASE("defaults") {
  const auto config = config_of({});
  REQUIRE(config.is_ok());
  CHECK(config->cache == CacheMode::read_write);
  CHECK(config->cache_dir == "/home/u/.cache/kiln");
  CHECK(config->key_dir == "/home/u/.local/share/kiln");
  CHECK(config->cache_max_mb == 512);
  CHECK(config->miss == MissPolicy::compile);
  CHECK(config->threads == 0);
  CHECK(config->log == LogLevel::warn);
  CHECK(config->perf == PerfMode::off);
  CHECK(config->forced.empty());
  CHECK(config->warnings.empty());
}

TEST_CASE("every variable of the design has a row that tells value and origin") {
  const std::vector<std::pair<std::string, std::string>> table = {{"KILN_DISABLE", "amx,llvm,disk"},
                                                                  {"KILN_FORCE", "avx2"},
                                                                  {"KILN_CACHE", "ro"},
                                                                  {"KILN_CACHE_DIR", "/c"},
                                                                  {"KILN_CACHE_MAX_MB", "64"},
                                                                  {"KILN_CACHE_SYSTEM_DIR", "/s"},
                                                                  {"KILN_TRUSTED_KEYS", "/t"},
                                                                  {"KILN_REMOTE", "redis://h:1/2"},
                                                                  {"KILN_REMOTE_SIGNING_KEY", "/s"},
                                                                  {"KILN_MISS", "error"},
                                                                  {"KILN_THREADS", "3"},
                                                                  {"KILN_LOG", "debug"},
                                                                  {"KILN_DUMP_DIR", "/d"},
                                                                  {"KILN_PERF", "map"}};
  const auto unset = config_of({}), set = config_of({table.begin(), table.end()});
  REQUIRE(unset.is_ok());
  REQUIRE(set.is_ok());
  CHECK(unset->origins.size() == table.size());
  for (std::size_t i = 0; i < table.size(); ++i) {
    CHECK(set->origins[i].name == table[i].first);
    CHECK(set->origins[i].value == table[i].second);
    CHECK(set->origins[i].origin == "environment");
    CHECK(unset->origins[i].origin == "default");
    CHECK(unset->origins[i].value != table[i].second);
  }
  CHECK(set->disabled_paths == std::vector{IsaPath::amx});
  CHECK(set->disabled_generators == std::vector{GeneratorId::llvm});
  CHECK(set->disk_disabled);
  CHECK(set->cache == CacheMode::read_only);
  CHECK(set->miss == MissPolicy::error);
  CHECK(set->log == LogLevel::debug);
  CHECK(set->perf == PerfMode::map);
}

TEST_CASE("an empty value counts as unset") {
  const auto config = config_of({{"KILN_CACHE", ""}, {"KILN_THREADS", ""}, {"KILN_FORCE", ""}, {"XDG_CACHE_HOME", ""}});
  REQUIRE(config.is_ok());
  CHECK(config->cache == CacheMode::read_write);
  CHECK(config->cache_dir == "/home/u/.cache/kiln");
  CHECK(origin_of(*config, "KILN_CACHE").origin == "default");
}

TEST_CASE("directories follow the XDG base directory specification") {
  const auto absolute = config_of({{"XDG_CACHE_HOME", "/xc"}, {"XDG_DATA_HOME", "/xd"}});
  REQUIRE(absolute.is_ok());
  CHECK(absolute->cache_dir == "/xc/kiln");
  CHECK(absolute->key_dir == "/xd/kiln");
  const auto relative = config_of({{"XDG_CACHE_HOME", "xc"}, {"XDG_DATA_HOME", "../xd"}});
  REQUIRE(relative.is_ok());
  CHECK(relative->cache_dir == "/home/u/.cache/kiln");
  CHECK(relative->key_dir == "/home/u/.local/share/kiln");
}

TEST_CASE("without a home there is no cache, and a warning says so") {
  const auto homeless = config_of({{"HOME", ""}});
  REQUIRE(homeless.is_ok());
  CHECK(homeless->cache == CacheMode::off);
  REQUIRE(homeless->warnings.size() == 1);
  CHECK(contains(homeless->warnings[0], "HOME"));
  CHECK(origin_of(*homeless, "KILN_CACHE").value == "off");

  const auto no_key = config_of({{"HOME", ""}, {"KILN_CACHE_DIR", "/c"}});
  REQUIRE(no_key.is_ok());
  CHECK(no_key->cache == CacheMode::off);
  CHECK(contains(no_key->warnings.at(0), "XDG_DATA_HOME"));

  const auto asked_off = config_of({{"HOME", ""}, {"KILN_CACHE", "off"}});
  REQUIRE(asked_off.is_ok());
  CHECK(asked_off->warnings.empty());

  const auto by_xdg = config_of({{"HOME", ""}, {"XDG_CACHE_HOME", "/x"}, {"XDG_DATA_HOME", "/y"}});
  REQUIRE(by_xdg.is_ok());
  CHECK(by_xdg->cache == CacheMode::read_write);
}

TEST_CASE("a relative directory is taken from the current one, once") {
  const auto config = config_of({{"KILN_CACHE_DIR", "x/../kernels"}});
  REQUIRE(config.is_ok());
  char here[4096];
  REQUIRE(getcwd(here, sizeof here));
  CHECK(config->cache_dir == std::string(here) + "/kernels");
}

TEST_CASE("an unknown name in KILN_DISABLE is a warning that lists the valid ones") {
  const auto config = config_of({{"KILN_DISABLE", "avx1024, amx,,none,avx2"}});
  REQUIRE(config.is_ok());
  CHECK(config->disabled_paths == std::vector{IsaPath::amx, IsaPath::avx2});
  REQUIRE(config->warnings.size() == 1);
  for (std::string_view name : {"avx1024", "none", "avx512vnni", "reference", "nvidia", "asmjit", "llvm", "disk"})
    CHECK(contains(config->warnings[0], name));
}

TEST_CASE("KILN_DISABLE leaves out rows by path, backend and generator") {
  Implementation row{
      .op = OpId::int8_mm, .isa = IsaPath::avx2, .backend = BackendId::x86, .generator = GeneratorId::asmjit};
  for (const char* name : {"avx2", "x86", "asmjit", "amx,x86"})
    CHECK(config_of({{"KILN_DISABLE", name}})->disables(row));
  for (const char* name : {"amx", "arm", "llvm", "disk", "portable"})
    CHECK(!config_of({{"KILN_DISABLE", name}})->disables(row));
  row = {.op = OpId::int8_mm, .isa = IsaPath::portable, .backend = BackendId::portable, .generator = GeneratorId::llvm};
  CHECK(config_of({{"KILN_DISABLE", "portable"}})->disables(row));
}

TEST_CASE("KILN_FORCE takes a path for all ops and pairs for single ones") {
  const auto config = config_of({{"KILN_FORCE", "int8_mm:avx2, amx"}});
  REQUIRE(config.is_ok());
  IsaPath path = IsaPath::reference;
  CHECK(config->forced_path(OpId::int8_mm, path));
  CHECK(path == IsaPath::avx2);
  CHECK(config->forced_path(OpId::attention, path));
  CHECK(path == IsaPath::amx);
  CHECK(origin_of(*config, "KILN_FORCE").value == "int8_mm:avx2,amx");

  const auto one = config_of({{"KILN_FORCE", "int8_mm:avx2"}});
  REQUIRE(one.is_ok());
  CHECK(!one->forced_path(OpId::attention, path));
}

TEST_CASE("errors name the variable, the value and what is allowed") {
  struct Row {
    const char *variable, *value, *allowed;
  };
  for (const Row& row : {Row{"KILN_FORCE", "avx1024", "avx512vnni"}, Row{"KILN_FORCE", "nothing_mm:avx2", "int8_mm"},
                         Row{"KILN_FORCE", "avx2,", "avx512vnni"}, Row{"KILN_FORCE", "avx2,amx", "one path"},
                         Row{"KILN_FORCE", "int8_mm:", "wgmma"}, Row{"KILN_CACHE", "RW", "rw, ro, off"},
                         Row{"KILN_CACHE_MAX_MB", "0", "1 to 1048576"}, Row{"KILN_CACHE_MAX_MB", "1.5", "1 to 1048576"},
                         Row{"KILN_CACHE_MAX_MB", "99999999999999999999", "1 to 1048576"},
                         Row{"KILN_MISS", "fail", "compile, error, fallback"}, Row{"KILN_THREADS", "0", "1 to 1024"},
                         Row{"KILN_THREADS", "-1", "1 to 1024"}, Row{"KILN_THREADS", "2x", "1 to 1024"},
                         Row{"KILN_LOG", "loud", "trace, debug, info, warn, error, off"},
                         Row{"KILN_PERF", "yes", "off, map, jitdump"}}) {
    const auto config = config_of({{row.variable, row.value}});
    CAPTURE(row.variable);
    CAPTURE(row.value);
    REQUIRE(!config.is_ok());
    CHECK(config.status().code() == Code::invalid_argument);
    const std::string& message = config.status().message();
    CAPTURE(message);
    CHECK(contains(message, row.variable));
    CHECK(contains(message, row.value));
    CHECK(contains(message, row.allowed));
  }
}

TEST_CASE("the remote cache: its URL is checked at once, and its password never shown") {
  const auto config = config_of({{"KILN_REMOTE", "redis://ci:hunter%32@h:7000/3?ttl_s=60"}, {"HOME", "/h"}});
  REQUIRE(config.is_ok());
  CHECK(config->serves_remote_cache());
  CHECK(config->remote->password == "hunter2");
  CHECK(config->warnings.empty());
  for (const auto& origin : config->origins)
    if (origin.name == "KILN_REMOTE")
      CHECK(origin.value == "redis://ci:***@h:7000/3?ttl_s=60");

  for (const char* url : {"redis//h", "redis://hunter2@h", "redis://u:hunter2", "rediss://:hunter2@h", "unix://r.sock",
                          "redis://h?hunter2", "redis://u:hunter2@h:x"}) {
    const auto bad = config_of({{"KILN_REMOTE", url}});
    REQUIRE(!bad.is_ok());
    CHECK(bad.status().code() == Code::invalid_argument);
    CHECK(contains(bad.status().message(), "KILN_REMOTE: "));
    CHECK(!contains(bad.status().message(), "hunter2"));
  }

  const auto with = [](std::map<std::string, std::string> variables) {
    variables.insert({{"KILN_REMOTE", "redis://h"}, {"HOME", "/h"}});
    return *config_of(std::move(variables));
  };
  CHECK(!with({{"KILN_CACHE", "off"}}).serves_remote_cache());
  CHECK(!with({{"KILN_DISABLE", "remote"}}).serves_remote_cache());
  CHECK(with({{"KILN_DISABLE", "disk"}}).serves_remote_cache());
  CHECK(with({{"KILN_CACHE", "ro"}}).serves_remote_cache());
  CHECK(with({{"HOME", ""}}).serves_remote_cache()); // no place for a cache of its own
  CHECK(contains(config_of({{"KILN_REMOTE_SIGNING_KEY", "/k"}, {"HOME", "/h"}})->warnings.at(0), "KILN_REMOTE"));
}

TEST_CASE("the system cache and its keys") {
  const auto of = [](std::map<std::string, std::string> variables) {
    variables["KILN_CACHE_SYSTEM_DIR"] = "/usr/share/kiln";
    const auto config = config_of(std::move(variables));
    REQUIRE(config.is_ok());
    CHECK(config->cache_system_dir == "/usr/share/kiln");
    return *config;
  };
  CHECK(of({{"HOME", "/h"}}).serves_system_cache());
  CHECK(of({{"HOME", "/h"}}).trusted_keys == "/h/.local/share/kiln/trusted.keys");
  CHECK(of({{"HOME", "/h"}, {"XDG_DATA_HOME", "/x"}}).trusted_keys == "/x/kiln/trusted.keys");
  CHECK(of({{"HOME", "/h"}, {"KILN_TRUSTED_KEYS", "/etc/kiln/keys"}}).trusted_keys == "/etc/kiln/keys");
  CHECK(!of({{"HOME", "/h"}, {"KILN_CACHE", "off"}}).serves_system_cache());
  CHECK(!of({{"HOME", "/h"}, {"KILN_DISABLE", "disk"}}).serves_system_cache());
  const Config homeless = of({{"HOME", ""}});
  CHECK(homeless.cache == CacheMode::off);
  CHECK(homeless.serves_system_cache());
  CHECK(homeless.trusted_keys.empty());
}

namespace {

std::map<std::string, os::FileSystem> g_mounts; ///< by what a path begins with

os::FileSystem mounted(const std::string& path) {
  os::FileSystem found{"local"};
  std::size_t longest = 0;
  for (const auto& [prefix, file_system] : g_mounts)
    if (path.starts_with(prefix) && prefix.size() > longest) {
      longest = prefix.size();
      found = file_system;
    }
  return found;
}

const os::FileSystem kNfs{"nfs", true};

} // namespace

TEST_CASE("a cache on a network file system is moved to this machine, said once, and its key goes with it") {
  std::string pattern = (std::filesystem::temp_directory_path() / "kiln_config_test.XXXXXX").string();
  REQUIRE(mkdtemp(pattern.data()) != nullptr);
  const std::filesystem::path runtime = std::filesystem::canonical(pattern);
  const auto moved = [&](std::map<std::string, std::string> environment, std::map<std::string, os::FileSystem> mounts,
                         const HostSettings& host = {}) {
    environment.emplace("HOME", "/home/u");
    environment.emplace("XDG_RUNTIME_DIR", runtime.string());
    g_environment = std::move(environment);
    // So that what is on this machine is a directory of this test.
    mounts.emplace("/var/tmp", kNfs);
    mounts.emplace("/tmp/kiln-" + std::to_string(geteuid()), kNfs);
    g_mounts = std::move(mounts);
    const auto config = Config::from_environment(get_variable, host, mounted);
    REQUIRE(config.is_ok());
    return *config;
  };
  const std::string base = runtime / "kiln";
  {
    const Config config = moved({}, {{"/home", kNfs}});
    CHECK(config.cache == CacheMode::read_write);
    CHECK(config.cache_dir == base + "/cache");
    CHECK(config.key_dir == base + "/key");
    CHECK(config.trusted_keys == "/home/u/.local/share/kiln/trusted.keys"); // a list of the user's, not the cache's
    REQUIRE(config.warnings.size() == 1);
    for (const char* part : {"/home/u/.cache/kiln is on nfs", "KILN_CACHE_DIR"})
      CHECK(contains(config.warnings[0], part));
    CHECK(contains(config.warnings[0], base + "/cache"));
    CHECK(origin_of(config, "KILN_CACHE_DIR").value == base + "/cache");
    CHECK(origin_of(config, "KILN_CACHE_DIR").origin == "moved");
    CHECK(!std::filesystem::exists(base)); // made when something is stored
  }
  { // A key that is on this machine stays.
    const Config config = moved({{"XDG_DATA_HOME", "/local/u"}}, {{"/home", kNfs}});
    CHECK(config.cache_dir == base + "/cache");
    CHECK(config.key_dir == "/local/u/kiln");
  }
  { // So does the key of a cache that is: it must not be gone before the cache.
    const Config config = moved({{"KILN_CACHE_DIR", "/scratch/u"}}, {{"/home", kNfs}});
    CHECK(config.cache_dir == "/scratch/u");
    CHECK(config.key_dir == "/home/u/.local/share/kiln");
    CHECK(config.warnings.empty());
    CHECK(origin_of(config, "KILN_CACHE_DIR").origin == "environment");
  }
  { // Wherever the wish comes from.
    CHECK(moved({{"KILN_CACHE_DIR", "/lustre/u"}}, {{"/lustre", {"lustre", true}}}).cache_dir == base + "/cache");
    HostSettings host;
    host.cache_dir = "/lustre/u";
    const Config config = moved({}, {{"/lustre", {"lustre", true}}}, host);
    CHECK(config.cache_dir == base + "/cache");
    CHECK(config.key_dir == "/home/u/.local/share/kiln");
    CHECK(config.warnings.size() == 1);
  }
  { // Not where others may write, and not where nothing can be made.
    REQUIRE(chmod(runtime.c_str(), 0777) == 0);
    const Config config = moved({}, {{"/home", kNfs}});
    CHECK(config.cache == CacheMode::off);
    REQUIRE(config.warnings.size() == 1);
    CHECK(contains(config.warnings[0], "no directory of this machine serves instead: the kernel cache is off"));
    CHECK(moved({{"XDG_RUNTIME_DIR", "/nothing/of/this/name"}}, {{"/home", kNfs}}).cache == CacheMode::off);
    CHECK(moved({{"XDG_RUNTIME_DIR", "relative"}}, {{"/home", kNfs}}).cache == CacheMode::off);
    REQUIRE(chmod(runtime.c_str(), 0700) == 0);
  }
  { // Nobody looks where no cache is wanted.
    const Config config = moved({{"KILN_CACHE", "off"}}, {{"/home", kNfs}});
    CHECK(config.warnings.empty());
    CHECK(config.cache_dir == "/home/u/.cache/kiln");
  }
  std::filesystem::remove_all(runtime);
}

TEST_CASE("the first directory of this machine is the one that outlives a restart") {
  g_environment = {{"HOME", "/home/u"}, {"XDG_RUNTIME_DIR", "/run"}};
  g_mounts = {{"/home", kNfs}};
  const auto config = Config::from_environment(get_variable, {}, mounted);
  REQUIRE(config.is_ok());
  const std::string var = "/var/tmp/kiln-" + std::to_string(geteuid());
  struct stat info;
  if (stat("/var/tmp", &info) == 0 && access("/var/tmp", W_OK) == 0 && (info.st_mode & 01000) != 0)
    CHECK(config->cache_dir == var + "/cache");
}

TEST_CASE("a mounted file system in user space is told by its type, and moves the cache" *
          doctest::skip(is_emulated())) {
  std::string pattern = (std::filesystem::temp_directory_path() / "kiln_config_test.XXXXXX").string();
  REQUIRE(mkdtemp(pattern.data()) != nullptr);
  const int status = exit_status_in_child([&] {
    if (unshare(CLONE_NEWNS) != 0 || mount("none", "/", nullptr, MS_REC | MS_PRIVATE, nullptr) != 0)
      return 77;
    {
      const FuseMount remote(pattern, "fuse.sshfs", geteuid());
      if (!remote.is_mounted())
        return 77;
      const os::FileSystem found = os::file_system_of(pattern + "/.cache/kiln"); // does not exist yet
      if (found.name != "fuse.sshfs" || !found.over_network)
        return 1;
      const auto config = config_of({{"HOME", pattern}});
      if (!config || config->warnings.size() != 1 || config->cache_dir.starts_with(pattern) ||
          !contains(config->warnings[0], pattern + "/.cache/kiln is on fuse.sshfs"))
        return 2;
    }
    const FuseMount local(pattern, "fuse.fuse-overlayfs", geteuid());
    const os::FileSystem found = os::file_system_of(pattern);
    return found.name == "fuse.fuse-overlayfs" && !found.over_network ? 0 : 3;
  });
  std::filesystem::remove(pattern);
  if (status == 77)
    MESSAGE("nothing in user space can be mounted here: not run");
  else
    CHECK(status == 0);
}

TEST_CASE("file systems over a network are known by their numbers, those in user space by their types") {
  struct Row {
    std::uint32_t number;
    const char* type;
    const char* name;
    bool over_network, in_memory;
  };
  for (const Row& row : {Row{0x6969, "", "nfs", true, false},
                         {0xFF534D42, "", "cifs", true, false},
                         {0xFE534D42, "", "smb2", true, false},
                         {0x01021997, "", "9p", true, false},
                         {0x5346414F, "", "afs", true, false},
                         {0x0BD00BD0, "", "lustre", true, false},
                         {0x00C36400, "", "ceph", true, false},
                         {0x65735546, "", "fuse", true, false}, // /proc does not tell more
                         {0x65735546, "fuse.sshfs", "fuse.sshfs", true, false},
                         {0x65735546, "fuse.something-new", "fuse.something-new", true, false},
                         {0x65735546, "virtiofs", "virtiofs", true, false},
                         {0x65735546, "fuse.fuse-overlayfs", "fuse.fuse-overlayfs", false, false},
                         {0x65735546, "fuseblk", "fuseblk", false, false},
                         {0x01021994, "", "tmpfs", false, true},
                         {0xEF53, "", "ext4", false, false},
                         {0x12345678, "", "local", false, false}}) {
    CAPTURE(row.name);
    const os::FileSystem found = os::describe_file_system(row.number, row.type);
    CHECK(found.name == row.name);
    CHECK(found.over_network == row.over_network);
    CHECK(found.in_memory == row.in_memory);
  }
  // What does not exist is where it would be made.
  CHECK(os::file_system_of("/proc/self/none/at/all").name == os::file_system_of("/proc").name);
  CHECK(os::file_system_of("/nothing/of/this/name").name == os::file_system_of("/").name);
  CHECK(os::file_system_of("relative").name == "local");
}
