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

#include "cache/file.h"
#include "cache/private_path.h"

namespace kiln {
namespace {

constexpr Damage causes[] = {Damage::not_a_database, Damage::foreign, Damage::corrupt};
constexpr std::chrono::hours keep_damaged{24}, keep_older_schema{30 * 24};
/// The lock file's bytes from here on stand for generations; below, for keys.
constexpr std::uint64_t first_use_byte = std::uint64_t{1} << 40;

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

/// 0 when there is no such file.
std::int64_t changed_at(const std::string& path) {
  struct stat info;
  return ::lstat(path.c_str(), &info) == 0 ? std::int64_t{info.st_mtim.tv_sec} : 0;
}

/// A time to come was written by a clock that was wrong.
bool is_within(std::int64_t time, std::chrono::seconds span) {
  const std::int64_t now = std::time(nullptr);
  return time <= now && now - time < span.count();
}

} // namespace

std::string Generations::path(std::int64_t number) const {
  return number == 0 ? directory_ + "/kernels.db" : fmt::format("{}/kernels-{}.db", directory_, number);
}

Result<Generations::Listing> Generations::list() const {
  const std::unique_ptr<DIR, int (*)(DIR*)> directory(::opendir(directory_.c_str()), &::closedir);
  if (!directory)
    return Status::error(errno == ENOENT ? Code::not_found : Code::io,
                         fmt::format("cannot list {}: {}", directory_, std::strerror(errno)));
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
    return Status::error(Code::io, fmt::format("cannot list {}: {}", directory_, std::strerror(errno)));
  std::sort(out.databases.rbegin(), out.databases.rend());
  return out;
}

Status Generations::make(std::int64_t number) const {
  const Result<Bytes> empty = Database::empty_file();
  return empty ? create_private_file(path(number), *empty) : empty.status();
}

Result<FileLock> Generations::use(std::int64_t number, FileLock::Missing missing) const {
  return FileLock::take(lock_path(), first_use_byte + static_cast<std::uint64_t>(number), FileLock::Kind::shared,
                        std::chrono::milliseconds(0), missing);
}

Result<FileLock> Generations::compile_turn(const Digest& key, std::chrono::milliseconds patience) const {
  std::uint64_t byte = 0; // two keys of one byte, one in 2^40, would wait for each other
  for (int i = 0; i < 5; ++i)
    byte = byte << 8 | key.bytes[i];
  return FileLock::take(lock_path(), byte, FileLock::Kind::exclusive, patience, FileLock::Missing::create);
}

std::string Generations::marker(Damage cause) const {
  return fmt::format("{}/replaced-{}", directory_, name_of(cause));
}

std::int64_t Generations::replaced_lately(Damage cause) const {
  const std::int64_t time = changed_at(marker(cause));
  return time != 0 && is_within(time, between_replacements) ? time : 0;
}

Status Generations::note_replaced(Damage cause) const {
  const std::string path = marker(cause);
  if (Status status = create_private_file(path, {}); !status)
    return status;
  if (::utimensat(AT_FDCWD, path.c_str(), nullptr, AT_SYMLINK_NOFOLLOW) != 0)
    return Status::error(Code::io, fmt::format("{}: cannot set its time: {}", path, std::strerror(errno)));
  return {};
}

void Generations::forget_replaced() const {
  for (const Damage cause : causes)
    ::unlink(marker(cause).c_str());
}

void Generations::remove_before(std::int64_t newest, const Listing& listing, When when) const {
  for (const std::int64_t number : listing.databases) {
    const std::string file = path(number);
    const bool in_time = when == When::in_time;
    if (number >= newest || (in_time && is_within(changed_at(file), keep_damaged)))
      continue;
    const Result<FileLock> alone =
        FileLock::take(lock_path(), first_use_byte + static_cast<std::uint64_t>(number), FileLock::Kind::exclusive,
                       std::chrono::milliseconds(0), FileLock::Missing::create);
    if (!alone)
      continue;
    // Nobody has it open, this process included: an ordinary open and close can drop no lock of SQLite's.
    const Result<Database::Header> header = Database::read_header(file);
    if (!header || header->damage == Damage::foreign)
      continue;
    if (header->damage == Damage::none && header->schema > Database::schema_version)
      continue;
    if (header->damage == Damage::none && header->schema < Database::schema_version &&
        (!in_time || is_within(changed_at(file), keep_older_schema)))
      continue;
    ::unlink(file.c_str());
    ::unlink((file + "-journal").c_str());
  }
}

} // namespace kiln
