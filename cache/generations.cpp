#include "cache/generations.h"

#include <dirent.h>
#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <charconv>
#include <cstring>
#include <ctime>
#include <memory>
#include <optional>
#include <string_view>

#include <fmt/format.h>

namespace kiln {
namespace {

constexpr Damage causes[] = {Damage::not_a_database, Damage::foreign, Damage::corrupt};
constexpr std::chrono::hours keep_damaged{24}, keep_older_schema{30 * 24};
/// The lock file's bytes from here on stand for generations; below, for keys.
constexpr std::uint64_t first_use_byte = std::uint64_t{1} << 40;
/// Beyond every generation's.
constexpr std::uint64_t trial_byte = std::uint64_t{1} << 61;

/// The generation of a file of this name, and what follows `.db` in it.
std::optional<std::int64_t> number_in(std::string_view name, std::string_view& suffix) {
  constexpr std::string_view stem = "kernels", ending = ".db";
  if (!name.starts_with(stem))
    return std::nullopt;
  name.remove_prefix(stem.size());
  std::int64_t number = 0;
  if (name.starts_with('-')) {
    const char* const first = name.data() + 1;
    const auto [last, error] = std::from_chars(first, name.data() + name.size(), number);
    // One spelling for each number, and far from overflow.
    if (error != std::errc() || *first < '1' || *first > '9' || last - first > 15)
      return std::nullopt;
    name.remove_prefix(static_cast<std::size_t>(last - name.data()));
  }
  if (!name.starts_with(ending))
    return std::nullopt;
  suffix = name.substr(ending.size());
  return number;
}

/// Of the file that says when a database was last replaced for this cause.
std::string marker(Damage cause) {
  return fmt::format("replaced-{}", name_of(cause));
}

/// A time to come was written by a clock that was wrong; but the system stamps files by another clock than std::time
/// reads, some milliseconds ahead of it.
bool is_within(std::int64_t time, std::chrono::seconds span) {
  const std::int64_t now = std::time(nullptr);
  return time <= now + 1 && now - time < span.count();
}

} // namespace

std::string Generations::name_of(std::int64_t number) {
  return number == 0 ? "kernels.db" : fmt::format("kernels-{}.db", number);
}

std::int64_t Generations::changed_at(const std::string& name) const {
  struct stat info;
  const bool found = ::fstatat(directory_.descriptor(), name.c_str(), &info, AT_SYMLINK_NOFOLLOW) == 0;
  return found ? std::int64_t{info.st_mtim.tv_sec} : 0;
}

void Generations::remove(const std::string& name) const {
  ::unlinkat(directory_.descriptor(), name.c_str(), 0);
}

Result<Generations::Listing> Generations::list() const {
  const int file = ::openat(directory_.descriptor(), ".", O_RDONLY | O_DIRECTORY | O_CLOEXEC);
  const std::unique_ptr<DIR, int (*)(DIR*)> directory(file >= 0 ? ::fdopendir(file) : nullptr, &::closedir);
  if (!directory) {
    const int error = errno;
    if (file >= 0)
      ::close(file);
    return Status::error(error == ENOENT ? Code::not_found : Code::io,
                         fmt::format("cannot list {}: {}", directory_.path(), std::strerror(error)));
  }
  Listing out;
  errno = 0;
  while (const dirent* entry = ::readdir(directory.get())) {
    std::string_view suffix;
    const std::optional<std::int64_t> number = number_in(entry->d_name, suffix);
    if (!number || (!suffix.empty() && suffix != "-journal"))
      continue;
    if (suffix.empty())
      out.databases.push_back(*number);
    // An old journal would be played back into a new database of its name.
    out.next = std::max(out.next, *number + 1);
  }
  if (errno != 0)
    return Status::error(Code::io, fmt::format("cannot list {}: {}", directory_.path(), std::strerror(errno)));
  std::sort(out.databases.rbegin(), out.databases.rend());
  return out;
}

Status Generations::make(std::int64_t number) const {
  const Result<Bytes> empty = Database::empty_file();
  return empty ? directory_.create_file(name_of(number).c_str(), *empty) : empty.status();
}

Result<FileLock> Generations::use(std::int64_t number, FileLock::Missing missing) const {
  return lock(first_use_byte + static_cast<std::uint64_t>(number), FileLock::Kind::shared, std::chrono::milliseconds(0),
              missing);
}

Result<FileLock> Generations::compile_turn(const Digest& key, std::chrono::milliseconds patience) const {
  std::uint64_t byte = 0; // two keys of one byte, one in 2^40, would wait for each other
  for (int i = 0; i < 5; ++i)
    byte = byte << 8 | key.bytes[i];
  return lock(byte, FileLock::Kind::exclusive, patience, FileLock::Missing::create);
}

Status Generations::check_locks() const {
  const auto take = [&] {
    return lock(trial_byte, FileLock::Kind::exclusive, std::chrono::milliseconds(200), FileLock::Missing::leave);
  };
  const Result<FileLock> first = take();
  if (!first) // another process may be trying just now, which proves it too
    return first.status().code() == Code::busy ? Status() : first.status();
  const Result<FileLock> second = take();
  if (!second && second.status().code() == Code::busy)
    return {};
  return second ? Status::error(Code::io,
                                fmt::format("{}: two holders have the same lock", directory_.path_of("kernels.lock")))
                : second.status();
}

std::int64_t Generations::replaced_lately(Damage cause) const {
  const std::int64_t time = changed_at(marker(cause));
  return time != 0 && is_within(time, between_replacements) ? time : 0;
}

Status Generations::note_replaced(Damage cause) const {
  const std::string name = marker(cause);
  if (Status status = directory_.create_file(name.c_str(), {}); !status)
    return status;
  if (::utimensat(directory_.descriptor(), name.c_str(), nullptr, AT_SYMLINK_NOFOLLOW) != 0)
    return Status::error(Code::io,
                         fmt::format("{}: cannot set its time: {}", directory_.path_of(name), std::strerror(errno)));
  return {};
}

void Generations::forget_replaced() const {
  for (const Damage cause : causes)
    remove(marker(cause));
}

void Generations::remove_before(std::int64_t newest, const Listing& listing, When when) const {
  for (const std::int64_t number : listing.databases) {
    const std::string file = name_of(number);
    const bool in_time = when == When::in_time;
    if (number >= newest || (in_time && is_within(changed_at(file), keep_damaged)))
      continue;
    const Result<FileLock> alone = lock(first_use_byte + static_cast<std::uint64_t>(number), FileLock::Kind::exclusive,
                                        std::chrono::milliseconds(0), FileLock::Missing::create);
    if (!alone)
      continue;
    // Nobody has it open, this process included: an ordinary open and close can drop no lock of SQLite's.
    const FileDescriptor opened(
        ::openat(directory_.descriptor(), file.c_str(), O_RDONLY | O_NOFOLLOW | O_NONBLOCK | O_CLOEXEC));
    const Result<Database::Header> header = Database::read_header(opened, path(number));
    if (!header || header->damage == Damage::foreign)
      continue;
    if (header->damage == Damage::none && header->schema > Database::schema_version)
      continue;
    if (header->damage == Damage::none && header->schema < Database::schema_version &&
        (!in_time || is_within(changed_at(file), keep_older_schema)))
      continue;
    remove(file);
    remove(file + "-journal");
  }
}

} // namespace kiln
