#include "cache/usage.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <chrono>
#include <cmath>
#include <cstring>
#include <iterator>

#include <fmt/format.h>

namespace kiln {
namespace {

// The file, little-endian: a header of 1 KiB (magic, number of buckets, time of its beginning, sums, digest), then
// buckets of four slots.
constexpr std::array<std::uint8_t, 8> magic = {'K', 'I', 'L', 'N', 'U', 'S', 'E', 1};
constexpr std::size_t header_bytes = 1024, digest_bytes = 16, most_fields = 64;
constexpr std::size_t slot_bytes = 16, slots_in_bucket = 4, bucket_bytes = slot_bytes * slots_in_bucket;
/// One bucket for so many bytes of the cache's bound: 2 ‰ of it, and a slot for each 8 KiB.
constexpr std::int64_t cache_bytes_of_bucket = 32 << 10;
constexpr std::uint32_t fewest_buckets = 16, most_buckets = 16 << 10;
constexpr std::uint32_t most_hits = (1u << 28) - 1; ///< the event has the other four bits
constexpr double microseconds = 1e6;
/// Another process adds within microseconds.
constexpr std::chrono::milliseconds patience{5};
static_assert(std::size(usage_fields) <= most_fields);

std::uint64_t offset_of(const Digest& key, std::uint32_t buckets) {
  std::uint32_t number = 0;
  std::memcpy(&number, key.bytes.data(), sizeof number);
  return header_bytes + std::uint64_t{number % buckets} * bucket_bytes;
}

/// Tells the kernels of a bucket apart; 0 stands for a free slot.
std::uint32_t tag_of(const Digest& key) {
  std::uint32_t tag = 0;
  std::memcpy(&tag, key.bytes.data() + 4, sizeof tag);
  return tag | 1;
}

std::uint32_t buckets_for(std::int64_t max_cache_bytes) {
  return static_cast<std::uint32_t>(
      std::clamp<std::int64_t>(max_cache_bytes / cache_bytes_of_bucket, fewest_buckets, most_buckets));
}

std::int64_t file_bytes_of(std::uint32_t buckets) {
  return static_cast<std::int64_t>(header_bytes + std::uint64_t{buckets} * bucket_bytes);
}

bool read_all(int file, std::uint8_t* out, std::size_t size, std::uint64_t offset) {
  return ::pread(file, out, size, static_cast<off_t>(offset)) == static_cast<ssize_t>(size);
}

bool write_at(int file, ByteSpan bytes, std::uint64_t offset) {
  return ::pwrite(file, bytes.data(), bytes.size(), static_cast<off_t>(offset)) == static_cast<ssize_t>(bytes.size());
}

} // namespace

UsageCounts& UsageCounts::operator+=(const UsageCounts& more) {
  // Sums from a file may be anything: they wrap.
  for (const UsageField& field : usage_fields)
    this->*field.value = static_cast<std::int64_t>(static_cast<std::uint64_t>(this->*field.value) +
                                                   static_cast<std::uint64_t>(more.*field.value));
  return *this;
}

struct UsageFile::Slot {
  std::uint32_t tag = 0;
  std::uint32_t event_and_hits = 0;
  std::int64_t at_us = 0;

  std::uint32_t event() const { return event_and_hits >> 28; }
  std::uint32_t hits() const { return event_and_hits & most_hits; }
};

UsageFile::UsageFile(const std::string& directory, std::int64_t max_cache_bytes)
    : path_(directory + "/kernels.usage"), max_cache_bytes_(max_cache_bytes) {}

UsageFile::~UsageFile() {
  close();
}

/// Whether the descriptor is still the file's, and the file still has a name.
bool UsageFile::is_open() const {
  struct stat info;
  return file_ >= 0 && ::fstat(file_, &info) == 0 && info.st_dev == device_ && info.st_ino == inode_ &&
         info.st_nlink > 0;
}

void UsageFile::close() {
  if (is_open())
    ::close(file_);
  file_ = -1;
  buckets_ = 0;
}

bool UsageFile::open() {
  if (is_open())
    return true;
  close();
  constexpr int flags = O_NOFOLLOW | O_CLOEXEC | O_NONBLOCK;
  int file = ::open(path_.c_str(), O_RDWR | flags);
  if (file < 0 && (errno == EROFS || errno == EACCES))
    file = ::open(path_.c_str(), O_RDONLY | flags);
  struct stat info;
  if (file < 0)
    return false;
  if (::fstat(file, &info) != 0 || !S_ISREG(info.st_mode) || info.st_uid != ::geteuid() ||
      (info.st_mode & (S_IWGRP | S_IWOTH)) != 0) {
    ::close(file);
    return false;
  }
  file_ = file;
  device_ = info.st_dev;
  inode_ = info.st_ino;
  return true;
}

/// Nothing when it is damaged.
std::optional<UsageFile::Totals> UsageFile::read_header() {
  std::array<std::uint8_t, header_bytes> header;
  buckets_ = 0;
  if (!read_all(file_, header.data(), header.size(), 0))
    return std::nullopt;
  const ByteSpan content = ByteSpan(header).first(header_bytes - digest_bytes);
  const Digest digest = digest_of(content);
  if (!std::equal(magic.begin(), magic.end(), header.begin()) ||
      !std::equal(header.end() - digest_bytes, header.end(), digest.bytes.begin()))
    return std::nullopt;
  Reader in(content.subspan(magic.size()));
  const std::uint32_t buckets = in.u32();
  if (buckets < fewest_buckets || buckets > most_buckets)
    return std::nullopt;
  Totals totals;
  totals.since = in.i64();
  for (const UsageField& field : usage_fields)
    totals.counts.*field.value = in.i64();
  buckets_ = buckets;
  return totals;
}

/// In one call, within a page: a process that is killed leaves the old header or this one.
Status UsageFile::write_header(const Totals& totals) {
  Writer out;
  out.raw(magic);
  out.u32(buckets_);
  out.i64(totals.since);
  for (const UsageField& field : usage_fields)
    out.i64(totals.counts.*field.value);
  Bytes header = out.take();
  header.resize(header_bytes - digest_bytes);
  const Digest digest = digest_of(header);
  header.insert(header.end(), digest.bytes.begin(), digest.bytes.begin() + digest_bytes);
  if (!write_at(file_, header, 0))
    return Status::error(Code::io, fmt::format("{}: cannot write: {}", path_, std::strerror(errno)));
  return {};
}

Status UsageFile::add(const UsageCounts& counts, double now) {
  const Result<FileLock> alone =
      FileLock::take(path_, 0, FileLock::Kind::exclusive, patience, FileLock::Missing::create);
  if (!alone)
    return alone.status();
  if (!open())
    return Status::error(Code::io,
                         fmt::format("{}: needed is a file of uid {} that nobody else may write", path_, ::geteuid()));
  std::optional<Totals> totals = read_header();
  if (!totals) { // new, or damaged: the slots begin anew too
    totals.emplace().since = static_cast<std::int64_t>(now);
    if (!resize())
      return Status::error(Code::io, fmt::format("{}: cannot resize: {}", path_, std::strerror(errno)));
  } else if (bytes() < file_bytes_of(buckets_)) { // cut short: its slots begin anew
    (void)::ftruncate(file_, static_cast<off_t>(file_bytes_of(buckets_)));
  }
  totals->counts += counts;
  return write_header(*totals);
}

/// To what suits the bound, without a slot in use.
bool UsageFile::resize() {
  buckets_ = buckets_for(max_cache_bytes_);
  if (::ftruncate(file_, 0) == 0 && ::ftruncate(file_, static_cast<off_t>(file_bytes_of(buckets_))) == 0)
    return true;
  buckets_ = 0;
  return false;
}

Result<UsageFile::Totals> UsageFile::totals() {
  // Whoever adds just now writes the header that we read.
  const Result<FileLock> others = FileLock::take(path_, 0, FileLock::Kind::shared, patience, FileLock::Missing::leave);
  if (!others && others.status().code() == Code::not_found)
    return others.status();
  if (open())
    if (std::optional<Totals> totals = read_header())
      return *totals;
  return Status::error(Code::not_found, fmt::format("{} cannot be read", path_));
}

std::int64_t UsageFile::fitted_bytes() {
  if (!open())
    return 0;
  if (buckets_ / 4 > buckets_for(max_cache_bytes_) || buckets_ == 0) {
    const Result<FileLock> alone =
        FileLock::take(path_, 0, FileLock::Kind::exclusive, patience, FileLock::Missing::leave);
    const std::optional<Totals> totals = alone ? read_header() : std::nullopt;
    if (totals && buckets_ / 4 > buckets_for(max_cache_bytes_) && resize())
      (void)write_header(*totals);
  }
  return bytes();
}

std::int64_t UsageFile::bytes() const {
  struct stat info;
  return ::fstat(file_, &info) == 0 ? static_cast<std::int64_t>(info.st_size) : 0;
}

/// The kernel's slot, else the one that it gets.
std::optional<UsageFile::Place> UsageFile::find(const Digest& key, Slot& slot) {
  if (!open() || (buckets_ == 0 && !read_header()))
    return std::nullopt;
  const std::uint64_t offset = offset_of(key, buckets_);
  std::array<std::uint8_t, bucket_bytes> bucket;
  if (!read_all(file_, bucket.data(), bucket.size(), offset)) {
    buckets_ = 0; // it was made smaller
    return std::nullopt;
  }
  Reader in(bucket);
  std::optional<Place> place;
  for (std::size_t i = 0; i < slots_in_bucket; ++i) {
    Slot seen;
    seen.tag = in.u32();
    seen.event_and_hits = in.u32();
    seen.at_us = in.i64();
    const bool is_the_kernels = seen.tag == tag_of(key);
    if (place && !is_the_kernels && seen.at_us >= slot.at_us)
      continue;
    place = {offset + i * slot_bytes, is_the_kernels};
    slot = seen;
    if (is_the_kernels)
      break;
  }
  return place;
}

std::optional<UsageFile::Trace> UsageFile::trace(const Digest& key) {
  Slot slot;
  const std::optional<Place> place = find(key, slot);
  if (!place || !place->is_the_kernels || slot.event() > static_cast<std::uint32_t>(Event::removed) || slot.at_us <= 0)
    return std::nullopt;
  return Trace{static_cast<Event>(slot.event()), slot.hits(), static_cast<double>(slot.at_us) / microseconds};
}

void UsageFile::note(const Digest& key, Event event, double now) {
  Slot slot;
  if (const std::optional<Place> place = find(key, slot))
    write(key, event, 0, now, place->offset);
}

void UsageFile::note_hit(const Digest& key, double now) {
  Slot slot;
  if (const std::optional<Place> place = find(key, slot))
    write(key, Event::used, place->is_the_kernels && slot.event() == 0 ? slot.hits() + 1 : 1, now, place->offset);
}

void UsageFile::write(const Digest& key, Event event, std::int64_t hits, double now, std::uint64_t offset) {
  Writer out;
  out.u32(tag_of(key));
  out.u32(static_cast<std::uint32_t>(event) << 28 |
          static_cast<std::uint32_t>(std::min<std::int64_t>(hits, most_hits)));
  out.i64(std::llround(now * microseconds));
  (void)write_at(file_, out.bytes(), offset);
}

} // namespace kiln
