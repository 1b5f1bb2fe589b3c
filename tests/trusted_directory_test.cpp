#include <doctest/doctest.h>

#include <sched.h>
#include <sys/mount.h>
#include <sys/stat.h>
#include <unistd.h>

#include <chrono>
#include <fstream>

#include "cache/database.h"
#include "cache/trusted_directory.h"
#include "tests/child_process.h"
#include "tests/emulator.h"
#include "tests/fuse_mount.h"
#include "tests/store_fixture.h"

/// Where a cache and its key may lie: every directory above them counts.

using namespace kiln;
using namespace kiln::test;
namespace fs = std::filesystem;

namespace {

constexpr uid_t nobody = 65534, someone = 12345;

bool is_root() {
  return ::geteuid() == 0;
}

/// `opened`, or why not.
std::string says(const std::string& path, TrustedDirectory::Owner owner = TrustedDirectory::Owner::user,
                 TrustedDirectory::Missing missing = TrustedDirectory::Missing::leave) {
  const Result<TrustedDirectory> directory = TrustedDirectory::open(path, owner, missing);
  return directory ? "opened " + directory->path() : directory.status().message();
}

void check_mentions(const std::string& text, std::initializer_list<std::string_view> parts) {
  INFO(text);
  for (const std::string_view part : parts) {
    INFO(part);
    CHECK(text.find(part) != std::string::npos);
  }
}

void set_mode(const fs::path& path, mode_t mode) {
  REQUIRE(::chmod(path.c_str(), mode) == 0);
}

void set_owner(const fs::path& path, uid_t owner) {
  REQUIRE(::lchown(path.c_str(), owner, owner) == 0);
}

} // namespace

TEST_CASE("trusted directory: what is missing is made, closed to others, and only when told to") {
  const TemporaryDirectory root;
  const std::string path = root.path() / "a/b/c";
  CHECK(TrustedDirectory::open(path, TrustedDirectory::Owner::user, TrustedDirectory::Missing::leave).status().code() ==
        Code::not_found);
  CHECK(!fs::exists(root.path() / "a"));
  const mode_t before = ::umask(0);
  CHECK(says(path, TrustedDirectory::Owner::user, TrustedDirectory::Missing::create) == "opened " + path);
  ::umask(before);
  for (const char* part : {"a", "a/b", "a/b/c"}) {
    struct stat info;
    REQUIRE(::stat((root.path() / part).c_str(), &info) == 0);
    CHECK((info.st_mode & 07777) == 0700);
  }
  CHECK(says(path + "//./") == "opened " + path);
  CHECK(says((root.path() / "a/../a/b/../b/c").string()) == "opened " + path);
  CHECK(says("relative") == "'relative' is no absolute path");
  CHECK(says("/../../..", TrustedDirectory::Owner::user_or_superuser) == "opened /");
}

TEST_CASE("trusted directory: nothing is made under a directory that is not trusted") {
  const TemporaryDirectory root;
  fs::create_directory(root.path() / "a");
  set_mode(root.path() / "a", 0777);
  check_mentions(says(root.path() / "a/b/c", TrustedDirectory::Owner::user, TrustedDirectory::Missing::create),
                 {"/a is not trusted", "0777"});
  CHECK(fs::is_empty(root.path() / "a"));
}

TEST_CASE("trusted directory: a directory above that others may write, and the command that mends it") {
  const TemporaryDirectory root;
  const std::string above = root.path() / "it's a home", path = above + "/.cache/kiln";
  fs::create_directories(path);
  set_mode(path, 0700);
  for (const mode_t mode : {0775, 0757, 0777, 02775}) {
    set_mode(above, mode);
    check_mentions(says(path), {above + " is not trusted: it is a directory of uid", fmt::format("{:04o}", mode),
                                "`chmod go-w '" + root.path().string() + "/it'\\''s a home'` mends it"});
    // It does.
    set_mode(above, mode & ~022);
    CHECK(says(path) == "opened " + path);
  }
  // As /tmp: others may write there, but nobody can rename what is the user's.
  set_mode(above, 01777);
  CHECK(says(path) == "opened " + path);
  // The last one may not be so.
  set_mode(path, 01777);
  check_mentions(says(path), {"kiln is not trusted", "1777", "mode 0700"});
  set_mode(path, 0755);
  CHECK(says(path) == "opened " + path);
}

TEST_CASE("trusted directory: links that the user made are followed, the last part is none") {
  const TemporaryDirectory root;
  const fs::path base = root.path();
  fs::create_directories(base / "real/deep/kiln");
  const std::string path = base / "real/deep/kiln", opened = "opened " + path;
  fs::create_directory_symlink(base / "real", base / "absolute");
  fs::create_directory_symlink("real/deep", base / "relative");
  fs::create_directory_symlink("absolute/../relative/../deep", base / "chain");
  fs::create_directory_symlink("..", base / "real/deep/up");
  CHECK(says(base / "absolute/deep/kiln") == opened);
  CHECK(says(base / "relative/kiln") == opened);
  CHECK(says(base / "chain/kiln") == opened);
  CHECK(says(base / "relative/up/deep/up/deep/kiln") == opened);
  CHECK(says(base / "absolute/deep/up/../real/deep/kiln") == opened); // `..` of what the link led to
  fs::create_directory_symlink(path, base / "last");
  check_mentions(says(base / "last"), {"/last is not trusted: it is a symbolic link", "needed is a directory"});
  check_mentions(says(base / "last/"), {"symbolic link"}); // a slash must not hide it
  fs::create_directory_symlink("loop", base / "loop");
  check_mentions(says(base / "loop/x"), {"loop", "Too many levels of symbolic links"});
  // Where a link leads is walked by the same rules.
  set_mode(base / "real", 0775);
  check_mentions(says(base / "relative/kiln"), {(base / "real").string() + " is not trusted", "0775"});
  set_mode(base / "real", 0755);
  // Nobody knows who made a link where others may.
  fs::create_directory(base / "tmp");
  fs::create_directory_symlink(base / "real/deep", base / "tmp/link");
  set_mode(base / "tmp", 01777);
  check_mentions(says(base / "tmp/link/kiln"), {"link is not trusted: it is a symbolic link", "mode 1777"});
  set_mode(base / "tmp", 0755);
  CHECK(says(base / "tmp/link/kiln") == opened);
  // What is not there is made where the link says.
  fs::create_directory_symlink(base / "scratch", base / "dangling");
  CHECK(says(base / "dangling/kiln", TrustedDirectory::Owner::user, TrustedDirectory::Missing::create) ==
        "opened " + (base / "scratch/kiln").string());
}

TEST_CASE("trusted directory: other users' directories and links") {
  if (!is_root()) {
    MESSAGE("needs the superuser to make another user's files: not run");
    return;
  }
  const TemporaryDirectory root;
  const fs::path base = root.path();
  fs::create_directories(base / "a/b/kiln");
  const std::string path = base / "a/b/kiln";
  set_mode(base, 0755);
  for (const char* part : {"a", "a/b", "a/b/kiln"}) {
    set_owner(base / part, someone);
    check_mentions(says(path), {(base / part).string() + " is not trusted", "uid 12345", "0755"});
    CHECK(says(path).find("chmod") == std::string::npos); // does not mend it
    set_owner(base / part, 0);
  }
  fs::create_directory_symlink("b", base / "a/link");
  set_owner(base / "a/link", someone);
  check_mentions(says(base / "a/link/kiln"), {"a symbolic link of uid 12345"});
  set_owner(base / "a/link", 0);
  CHECK(says(base / "a/link/kiln") == "opened " + path);

  // The superuser's, seen by a user: on the way, but not the cache itself.
  CHECK(exit_status_in_child([&] {
          set_owner(base / "a/b/kiln", someone);
          if (::setresuid(someone, someone, someone) != 0)
            return 1;
          return says(base / "a/link/kiln") == "opened " + path ? 0 : 2;
        }) == 0);
  set_owner(base / "a/b/kiln", 0);
  CHECK(exit_status_in_child([&] {
          if (::setresuid(someone, someone, someone) != 0)
            return 1;
          const std::string why = says(path);
          if (why.find("kiln is not trusted: it is a directory of uid 0") == std::string::npos ||
              why.find("needed is a directory of uid 12345") == std::string::npos)
            return 2;
          return says(path, TrustedDirectory::Owner::user_or_superuser) == "opened " + path ? 0 : 3;
        }) == 0);
  // Only the superuser can mend his.
  set_mode(base / "a", 0777);
  CHECK(exit_status_in_child([&] {
          if (::setresuid(someone, someone, someone) != 0)
            return 1;
          return says(path).find("the superuser's `chmod go-w") != std::string::npos ? 0 : 2;
        }) == 0);
}

TEST_CASE("trusted directory: a file system of another user's in a directory for all, which says it is the user's own" *
          doctest::skip(is_emulated())) {
  const TemporaryDirectory root;
  fs::create_directories(root.path() / "tmp/kiln");
  fs::create_directories(root.path() / "home/kiln");
  const int status = exit_status_in_child([&] {
    if (::unshare(CLONE_NEWNS) != 0 || ::mount("none", "/", nullptr, MS_REC | MS_PRIVATE, nullptr) != 0)
      return 77;
    const std::string planted = root.path() / "tmp/kiln", own = root.path() / "home/kiln";
    const FuseMount first(planted, "fuse", ::geteuid()), second(own, "fuse", ::geteuid());
    if (!first.is_mounted() || !second.is_mounted())
      return 77;
    if (says(planted) != "opened " + planted) // nobody else could have mounted it there
      return 1;
    if (::chmod((root.path() / "tmp").c_str(), 01777) != 0)
      return 2;
    const std::string why = says(planted);
    std::fprintf(stderr, "%s\n", why.c_str());
    if (why.find("is a file system in user space") == std::string::npos || says(planted + "/cache").find(why) != 0)
      return 3;
    return says(own) == "opened " + own ? 0 : 4;
  });
  if (status == 77)
    MESSAGE("nothing in user space can be mounted here: not run");
  else
    CHECK(status == 0);
}

TEST_CASE("trusted directory: in a user namespace that does not map the superuser, his directories still count as his" *
          doctest::skip(is_emulated())) {
  if (!is_root()) {
    MESSAGE("needs the superuser to become another user: not run");
    return;
  }
  const TemporaryDirectory root;
  const fs::path path = root.path() / "kiln";
  fs::create_directory(path);
  set_mode(root.path(), 0755);
  set_owner(path, someone);
  const int status = exit_status_in_child([&] {
    if (::setresuid(someone, someone, someone) != 0 || ::unshare(CLONE_NEWUSER) != 0)
      return 77;
    std::ofstream("/proc/self/uid_map") << someone << " " << someone << " 1\n";
    struct stat info;
    if (::geteuid() != someone || ::stat("/", &info) != 0 || info.st_uid != nobody)
      return 77;
    if (says(path) != "opened " + path.string())
      return 1;
    // A sandbox that maps 65534 shows nobody's directories under that number.
    return says(root.path()).find("is not trusted") != std::string::npos ? 0 : 2; // not the user's own
  });
  if (status == 77)
    MESSAGE("no user namespaces here: not run");
  else
    CHECK(status == 0);
  // Elsewhere that is a user like any other.
  set_owner(path, 0);
  set_owner(root.path(), nobody);
  check_mentions(says(path), {"is not trusted", "uid 65534"});
}

TEST_CASE("trusted directory: what takes the place of a checked file is not opened") {
  Place place;
  REQUIRE(place.open()->put(row_of(0)));
  const Result<TrustedDirectory> directory =
      TrustedDirectory::open(place.options.directory, TrustedDirectory::Owner::user, TrustedDirectory::Missing::leave);
  REQUIRE(directory);
  const Result<FileIdentity> checked = directory->check_file("kernels.db", TrustedDirectory::Privacy::own);
  REQUIRE(checked);
  Damage damage;
  const auto open = [&] { return Database::open(place.database(), *checked, Database::Access::write, 0, damage); };
  CHECK(open());
  // The same bytes, another file.
  fs::copy_file(place.database(), place.root.path() / "planted");
  fs::rename(place.root.path() / "planted", place.database());
  const Result<std::unique_ptr<Database>> refused = open();
  REQUIRE(!refused);
  CHECK(refused.status().code() == Code::io);
  CHECK(damage == Damage::none);
  // The directory that was checked is the one that is used, whatever bears its name by now.
  fs::rename(place.options.directory, place.root.path() / "moved");
  fs::create_directory(place.options.directory);
  CHECK(directory->create_file("note", {}));
  CHECK(fs::exists(place.root.path() / "moved/note"));
}

TEST_CASE("poisoned places: each is refused with one warning, and the host goes on without the cache") {
  int placed = 0, refused = 0;
  const auto with = [&](const char* what, auto poison) {
    Place place;
    const fs::path root = place.root.path();
    place.options.directory = root / "home/.cache/kiln";
    place.options.key_directory = root / "home/.local/share/kiln";
    REQUIRE(place.open()->put(row_of(0)));
    REQUIRE(place.open()->get(row_of(0).key)); // it is a good cache
    poison(root);
    INFO(what);
    const std::unique_ptr<Store> store = place.open();
    bool good = true;
    for (int i = 0; i < 3; ++i) {
      good = good && !store->get(row_of(0).key);
      good = good && !store->put(row_of(0));
      good = good && !store->compile_turn(key_of(i), std::chrono::milliseconds(0)).waited();
    }
    CHECK(good);
    CHECK(place.warnings.size() == 1);
    if (!place.warnings.empty())
      check_mentions(place.warnings[0], {"is not trusted", "needed is"});
    ++placed;
    refused += good && place.warnings.size() == 1;
  };
  const char* const above[] = {"home", "home/.cache", "home/.local", "home/.local/share"};
  const char* const own[] = {"home/.cache/kiln", "home/.local/share/kiln"};
  const char* const files[] = {"home/.cache/kiln/kernels.db", "home/.local/share/kiln/cache.key"};
  const std::vector<const char*> own_and_files = {own[0], own[1], files[0], files[1]};
  std::vector<const char*> all(std::begin(above), std::end(above));
  all.insert(all.end(), own_and_files.begin(), own_and_files.end());
  for (const char* part : all) {
    for (const mode_t bits : {020, 002, 022})
      with(part, [&](const fs::path& root) {
        struct stat info;
        REQUIRE(::stat((root / part).c_str(), &info) == 0);
        set_mode(root / part, (info.st_mode & 07777) | bits);
      });
    if (is_root())
      with(part, [&](const fs::path& root) { set_owner(root / part, someone); });
  }
  for (const char* part : own_and_files)
    with(part, [&](const fs::path& root) { // a link in the place of what is Kiln's own
      fs::rename(root / part, root / "elsewhere");
      fs::create_symlink(root / "elsewhere", root / part);
    });
  for (const char* part : above)
    with(part, [&](const fs::path& root) { // a link on the way that others could have made
      fs::create_directory(root / "tmp");
      set_mode(root / "tmp", 01777);
      fs::rename(root / part, root / "elsewhere");
      fs::create_directory_symlink(root / "elsewhere", root / "tmp/link");
      fs::create_directory_symlink(root / "tmp/link", root / part);
    });
  if (is_root())
    for (const char* part : above)
      with(part, [&](const fs::path& root) {
        fs::rename(root / part, root / "elsewhere");
        fs::create_directory_symlink(root / "elsewhere", root / part);
        set_owner(root / part, someone);
      });
  for (const char* part : own) // a FIFO and a file in the place of a directory, a FIFO in that of a file
    for (const bool fifo : {true, false})
      with(part, [&](const fs::path& root) {
        fs::remove_all(root / part);
        REQUIRE(::mknod((root / part).c_str(), fifo ? S_IFIFO | 0600 : S_IFREG | 0600, 0) == 0);
      });
  for (const char* part : files)
    with(part, [&](const fs::path& root) {
      fs::remove(root / part);
      REQUIRE(::mkfifo((root / part).c_str(), 0600) == 0);
    });
  with("key that others may read", [&](const fs::path& root) { set_mode(root / files[1], 0604); });
  MESSAGE(placed, " poisoned places, ", refused, " refused with one warning each");
  CHECK(refused == placed);
}

TEST_CASE("read-only and unreachable places: one warning at most, and what is there serves" *
          doctest::skip(is_emulated())) {
  if (!is_root()) {
    MESSAGE("needs the superuser to mount: not run");
    return;
  }
  Place place;
  REQUIRE(place.open()->put(row_of(0)));
  const auto in_namespace = [&](auto body) {
    return exit_status_in_child([&] {
      const char* const root = place.root.path().c_str();
      if (::unshare(CLONE_NEWNS) != 0 || ::mount("none", "/", nullptr, MS_REC | MS_PRIVATE, nullptr) != 0 ||
          ::mount(root, root, nullptr, MS_BIND, nullptr) != 0 ||
          ::mount(root, root, nullptr, MS_BIND | MS_REMOUNT | MS_RDONLY, nullptr) != 0)
        return 77;
      return body();
    });
  };
  const int status = in_namespace([&] {
    const std::unique_ptr<Store> store = place.open();
    if (!store->get(row_of(0).key) || !place.warnings.empty())
      return 1;
    for (int i = 0; i < 3; ++i)
      if (store->put(row_of(1)) || store->get(row_of(1).key) || !store->get(row_of(0).key))
        return 2;
    return place.warnings.size() == 1 ? 0 : 3;
  });
  if (status == 77) {
    MESSAGE("no mount namespaces here: not run");
    return;
  }
  CHECK(status == 0);
  place.options.directory += "-none"; // cannot be made
  CHECK(in_namespace([&] {
          const std::unique_ptr<Store> store = place.open();
          for (int i = 0; i < 3; ++i)
            if (store->get(row_of(0).key) || store->put(row_of(0)))
              return 1;
          return place.warnings.size() == 1 ? 0 : 2;
        }) == 0);
}

TEST_CASE("opening, with every directory above looked at, and the first get stay below half a millisecond") {
  Place place;
  const fs::path root = place.root.path();
  place.options.directory = root / "home/user/.cache/kiln"; // eight parts from the root, as a home has
  place.options.key_directory = root / "home/user/.local/share/kiln";
  {
    const std::unique_ptr<Store> store = place.open();
    for (int i = 0; i < 50; ++i)
      REQUIRE(store->put(row_of(i, 16384)));
  }
  using Clock = std::chrono::steady_clock;
  double best = 1e9, walk = 1e9;
  for (int i = 0; i < 50; ++i) {
    auto start = Clock::now();
    {
      const std::unique_ptr<Store> store = place.open(CacheMode::read_only);
      REQUIRE(store->get(row_of(i).key));
      best = std::min(best, std::chrono::duration<double, std::micro>(Clock::now() - start).count());
    }
    start = Clock::now();
    REQUIRE(says(place.options.directory) != "");
    walk = std::min(walk, std::chrono::duration<double, std::micro>(Clock::now() - start).count());
  }
  MESSAGE("open and first get ", best, " us, of it ", walk, " us for each of the two walks");
#if !defined(__SANITIZE_THREAD__) && !defined(__SANITIZE_ADDRESS__)
  if (!is_emulated())
    CHECK(best < 500);
#endif
}
