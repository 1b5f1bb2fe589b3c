#include "cache/trusted_directory.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <sys/vfs.h>
#include <unistd.h>

#include <array>
#include <cerrno>
#include <climits>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <memory>
#include <vector>

#include <fmt/format.h>
#include <fmt/ranges.h>

#include "cache/digest.h"
#include "cache/file.h"
#include "cache/random.h"

namespace kiln {
namespace {

constexpr mode_t others_write = S_IWGRP | S_IWOTH;
constexpr int most_links = 40; // as path_resolution(7)

Status system_error(std::string_view what, const std::string& path, int error) {
  const Code code = error == ENOENT || error == ENOTDIR ? Code::not_found : Code::io;
  return Status::error(code, fmt::format("cannot {} {}: {}", what, path, std::strerror(error)));
}

/// Whether this is what a user namespace shows for owners that it does not map: include/linux/highuid.h has 65534.
/// Elsewhere it is an ordinary user, `nobody`.
bool is_unmapped(uid_t uid) {
  constexpr uid_t overflow = 65534;
  if (uid != overflow)
    return false;
  // Lines of three numbers: the first id inside, the first outside, how many.
  const std::unique_ptr<std::FILE, int (*)(std::FILE*)> map(std::fopen("/proc/self/uid_map", "re"), &std::fclose);
  long long inside = 0, outside = 0, count = 0;
  int lines = 0;
  for (; map && std::fscanf(map.get(), "%lld %lld %lld", &inside, &outside, &count) == 3; ++lines)
    if (inside <= overflow && overflow < inside + count)
      return false;
  return lines > 0;
}

bool is_user(uid_t uid) {
  return uid == ::geteuid() && !is_unmapped(uid);
}

bool is_superuser(uid_t uid) {
  return uid == 0 || is_unmapped(uid);
}

/// For people to copy: quoted for the shell where that is needed.
std::string shell_word(const std::string& path) {
  constexpr const char* plain = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789/._+-";
  if (path.find_first_not_of(plain) == std::string::npos)
    return path;
  std::string out = "'";
  for (const char c : path)
    out += c == '\'' ? std::string("'\\''") : std::string(1, c);
  return out + "'";
}

/// What mends a directory whose owner is right; empty when its owner is not.
std::string remedy(const std::string& path, const struct stat& info) {
  if (is_user(info.st_uid))
    return fmt::format(": `chmod go-w {}` mends it", shell_word(path));
  if (is_superuser(info.st_uid))
    return fmt::format(": the superuser's `chmod go-w {0}` mends it, or, where others must write, `chmod +t {0}`",
                       shell_word(path));
  return {};
}

Status check_last(const std::string& path, const struct stat& info, TrustedDirectory::Owner owner) {
  const bool own = is_user(info.st_uid);
  if (owner == TrustedDirectory::Owner::user) {
    if (own && (info.st_mode & others_write) == 0)
      return {};
    return not_trusted(path, info,
                       fmt::format("a directory of uid {} not writable by group or others (mode 0700){}", ::geteuid(),
                                   own ? remedy(path, info) : ""));
  }
  if ((own || is_superuser(info.st_uid)) && (info.st_mode & others_write) == 0)
    return {};
  return not_trusted(path, info,
                     fmt::format("a directory of {} that group and others may not write{}", trusted_owners(),
                                 own ? remedy(path, info) : ""));
}

/// What a link in the directory points to, when nobody else can have made the link.
Result<std::string> read_link(const std::string& path, const FileDescriptor& link, const struct stat& info,
                              const struct stat& directory) {
  if ((!is_user(info.st_uid) && !is_superuser(info.st_uid)) || (directory.st_mode & others_write) != 0)
    return Status::error(
        Code::io, fmt::format("{} is not trusted: it is a symbolic link of uid {} in a directory of uid {} with "
                              "mode {:04o}; needed is a link of {} in a directory that group and others may not "
                              "write",
                              path, info.st_uid, directory.st_uid, directory.st_mode & 07777u, trusted_owners()));
  std::array<char, PATH_MAX> target{};
  const ssize_t size = ::readlinkat(link.get(), "", target.data(), target.size());
  if (size <= 0 || size == std::ssize(target))
    return system_error("read the symbolic link", path, size < 0 ? errno : ENAMETOOLONG);
  return std::string(target.data(), static_cast<std::size_t>(size));
}

std::vector<std::string> parts_of(std::string_view path) {
  std::vector<std::string> parts;
  while (!path.empty()) {
    const std::size_t end = std::min(path.find('/'), path.size());
    if (end > 0 && path.substr(0, end) != ".")
      parts.emplace_back(path.substr(0, end));
    path.remove_prefix(std::min(end + 1, path.size()));
  }
  return parts;
}

/// A place on the way: a directory that is open, and how it was reached.
struct Place {
  FileDescriptor directory;
  struct stat info {};
  std::vector<std::string> names; ///< from the root

  std::string path() const { return fmt::format("/{}", fmt::join(names, "/")); }
  std::string path_of(const std::string& name) const { return names.empty() ? "/" + name : path() + "/" + name; }

  static Result<Place> root() {
    Place place;
    place.directory = FileDescriptor(::open("/", O_PATH | O_DIRECTORY | O_CLOEXEC));
    if (!place.directory || ::fstat(place.directory.get(), &place.info) != 0)
      return system_error("open", "/", errno);
    return place;
  }

  /// Opens the directory of this name and goes there. False, with errno, when that is no directory or cannot be opened.
  bool enter(const std::string& name) {
    // O_DIRECTORY has an automounter mount what it watches over.
    FileDescriptor next(::openat(directory.get(), name.c_str(), O_PATH | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC));
    if (!next || ::fstat(next.get(), &info) != 0)
      return false;
    directory = std::move(next);
    names.push_back(name);
    return true;
  }
};

/// Where others may write, an entry of the user's is one that he made. Not so a mounted file system whose owners and
/// modes are what its server says: any user may mount one over a directory of his own (fusermount, `allow_other`).
bool is_mounted_by_anybody(const Place& place, const struct stat& above) {
  constexpr std::uint32_t fuse = 0x65735546; // statfs(2)
  struct statfs file_system;
  return (above.st_mode & others_write) != 0 && place.info.st_dev != above.st_dev &&
         ::fstatfs(place.directory.get(), &file_system) == 0 && static_cast<std::uint32_t>(file_system.f_type) == fuse;
}

/// Of a directory on the way to another.
Status check_above(const Place& place) {
  const struct stat& info = place.info;
  const bool trusted_owner = is_user(info.st_uid) || is_superuser(info.st_uid);
  if (trusted_owner && ((info.st_mode & others_write) == 0 || (info.st_mode & S_ISVTX) != 0))
    return {};
  return not_trusted(place.path(), info,
                     fmt::format("a directory of {} that group and others may not write{}", trusted_owners(),
                                 remedy(place.path(), info)));
}

} // namespace

bool others_may_write(const struct stat& info) {
  return (info.st_uid != 0 && !is_user(info.st_uid)) || (info.st_mode & others_write) != 0;
}

std::string trusted_owners() {
  return ::geteuid() == 0 ? "uid 0" : fmt::format("uid 0 or {}", ::geteuid());
}

Status not_trusted(const std::string& path, const struct stat& info, std::string_view needed) {
  const char* kind = S_ISLNK(info.st_mode)   ? "a symbolic link"
                     : S_ISDIR(info.st_mode) ? "a directory"
                     : S_ISREG(info.st_mode) ? "a file"
                                             : "a special file";
  return Status::error(Code::io, fmt::format("{} is not trusted: it is {} of uid {} with mode {:04o}; needed is {}",
                                             path, kind, info.st_uid, info.st_mode & 07777u, needed));
}

Result<TrustedDirectory> TrustedDirectory::open(const std::string& path, Owner owner, Missing missing) {
  if (!path.starts_with('/'))
    return Status::error(Code::invalid_argument, fmt::format("'{}' is no absolute path", path));
  Result<Place> start = Place::root();
  if (!start)
    return start.status();
  Place place = std::move(*start);
  std::deque<std::string> rest;
  const auto put_before_rest = [&](const std::vector<std::string>& parts) {
    rest.insert(rest.begin(), parts.begin(), parts.end());
  };
  put_before_rest(parts_of(path));
  const auto back_to_root = [&]() -> Status {
    Result<Place> root = Place::root();
    if (root)
      place = std::move(*root);
    return root ? Status() : root.status();
  };

  int links = 0;
  bool made = false;
  while (!rest.empty()) {
    const std::string part = std::move(rest.front());
    rest.pop_front();
    if (part == "..") { // above the directory reached, links resolved; by its name, as nothing proves what `..` opens
      std::vector<std::string> names = std::move(place.names);
      if (!names.empty())
        names.pop_back();
      put_before_rest(names);
      if (Status status = back_to_root(); !status)
        return status;
      continue;
    }
    if (Status status = check_above(place); !status)
      return status;
    const std::string next = place.path_of(part);
    const struct stat above = place.info;
    if (place.enter(part)) {
      made = false;
      if (is_mounted_by_anybody(place, above))
        return Status::error(Code::io, fmt::format("{} is not trusted: it is a file system in user space, which any of "
                                                   "those who may write the directory above may have mounted; needed "
                                                   "is a directory",
                                                   next));
      continue;
    }
    const int error = errno;
    if (error == ENOENT && missing == Missing::create && !made) {
      if (::mkdirat(place.directory.get(), part.c_str(), 0700) != 0 && errno != EEXIST)
        return Status::error(Code::io, fmt::format("cannot make the directory {}: {}", next, std::strerror(errno)));
      made = true; // once, lest somebody who removes it keep us here
      rest.push_front(part);
      continue;
    }
    if (error != ENOTDIR && error != ELOOP)
      return system_error("open", next, error);
    const FileDescriptor other(::openat(place.directory.get(), part.c_str(), O_PATH | O_NOFOLLOW | O_CLOEXEC));
    struct stat info;
    if (!other || ::fstat(other.get(), &info) != 0)
      return system_error("open", next, errno);
    if (!S_ISLNK(info.st_mode) || rest.empty())
      return not_trusted(next, info, "a directory");
    if (++links > most_links)
      return system_error("open", next, ELOOP);
    const Result<std::string> target = read_link(next, other, info, place.info);
    if (!target)
      return target.status();
    put_before_rest(parts_of(*target));
    if (target->starts_with('/'))
      if (Status status = back_to_root(); !status)
        return status;
  }
  if (Status status = check_last(place.path(), place.info, owner); !status)
    return status;
  TrustedDirectory out;
  out.path_ = place.path();
  out.directory_ = std::move(place.directory);
  return out;
}

namespace {

Status check_private(const std::string& path, const struct stat& info, TrustedDirectory::Privacy privacy) {
  const bool secret = privacy == TrustedDirectory::Privacy::secret;
  const mode_t forbidden = secret ? S_IRWXG | S_IRWXO : others_write;
  if (S_ISREG(info.st_mode) && is_user(info.st_uid) && (info.st_mode & forbidden) == 0)
    return {};
  return not_trusted(path, info,
                     fmt::format("a file of uid {} {} group {} others (mode 0600)", ::geteuid(),
                                 secret ? "closed to" : "not writable by", secret ? "and" : "or"));
}

} // namespace

Result<FileIdentity> TrustedDirectory::check_file(const char* name, Privacy privacy) const {
  struct stat info;
  if (::fstatat(descriptor(), name, &info, AT_SYMLINK_NOFOLLOW) != 0)
    return system_error("look at", path_of(name), errno);
  if (Status status = check_private(path_of(name), info, privacy); !status)
    return status;
  return identity_of(info);
}

Result<FileDescriptor> TrustedDirectory::open_file(const char* name, Privacy privacy) const {
  // First by its name: to open some special files is to do something.
  if (const Result<FileIdentity> checked = check_file(name, privacy); !checked)
    return checked.status();
  FileDescriptor file(::openat(descriptor(), name, O_RDONLY | O_NOFOLLOW | O_CLOEXEC | O_NONBLOCK | O_NOCTTY));
  struct stat info;
  if (!file || ::fstat(file.get(), &info) != 0)
    return system_error("open", path_of(name), errno);
  if (Status status = check_private(path_of(name), info, privacy); !status)
    return status;
  return file;
}

Status TrustedDirectory::create_file(const char* name, ByteSpan content) const {
  const Result<Digest> unique = random_digest();
  if (!unique)
    return unique.status();
  const std::string path = path_of(name), temporary = fmt::format("{}.{}", name, unique->hex().substr(0, 16));
  Status status;
  {
    const FileDescriptor file(
        ::openat(descriptor(), temporary.c_str(), O_WRONLY | O_CREAT | O_EXCL | O_NOFOLLOW | O_CLOEXEC, 0600));
    if (!file)
      return system_error("make", path, errno); // not the temporary name: each would be another cause in the log
    // Unsynced, a power cut could leave the name without the content.
    if (!write_all(file.get(), content) || ::fsync(file.get()) != 0)
      status = system_error("write", path, errno);
  }
  // link, unlike rename, leaves a file that is there already.
  if (status && ::linkat(descriptor(), temporary.c_str(), descriptor(), name, 0) != 0 && errno != EEXIST)
    status = system_error("make", path, errno);
  ::unlinkat(descriptor(), temporary.c_str(), 0);
  return status;
}

} // namespace kiln
