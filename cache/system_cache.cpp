#include "cache/system_cache.h"

#include <chrono>
#include <fmt/format.h>
#include <memory>
#include <mutex>
#include <set>

#include "cache/bundle.h"
#include "cache/process.h"

namespace kiln {
namespace {

using Clock = std::chrono::steady_clock;

Result<Bundle> open_trusted_bundle(const std::string& path, const std::string& trusted_keys_file) {
  Result<FileDescriptor> file = open_for_reading(path, Ownership::path);
  if (!file)
    return file.status();
  Result<Bundle> bundle = Bundle::open(std::move(*file), path);
  if (!bundle)
    return bundle;
  if (!bundle->signer())
    return Status::error(Code::integrity, fmt::format("{} is unsigned: a system cache needs a signature", path));
  const Result<TrustedKeys> trusted = TrustedKeys::read(trusted_keys_file, Ownership::path);
  // A missing list trusts nobody: it must not read as a missing cache.
  if (!trusted && trusted.status().code() != Code::not_found)
    return trusted.status();
  if (!trusted || !trusted->contains(*bundle->signer()))
    return Status::error(Code::integrity,
                         fmt::format("{} is signed by key {}, which is not in the list of trusted keys {}{}: "
                                     "KILN_TRUSTED_KEYS names another list",
                                     path, bundle->signer()->id(), trusted_keys_file,
                                     trusted ? "" : ", which does not exist"));
  return bundle;
}

} // namespace

/// All that belongs to one process. A child made by fork leaves its parent's alone: a thread that does not exist in the
/// child may have held the lock.
struct SystemCache::Session {
  const ProcessId process = current_process();
  std::mutex mutex;
  // Below: guarded by the mutex. The bundle itself is read without it.
  std::shared_ptr<const Bundle> bundle; ///< null: there is none, or none that may be used
  FileIdentity identity;                ///< of the bundle's file, when there is one
  Clock::time_point next_look = Clock::time_point::min();
  Stats counts;
  std::set<std::string, std::less<>> warned;

  void warn_once(const Log& log, const std::string& message) {
    if (warned.insert(message).second)
      log.warn(fmt::format("{}; going on without it", message));
  }
};

SystemCache::SystemCache(std::string directory, std::string trusted_keys_file, const Log& log)
    : path_(std::move(directory) + "/kernels.bundle"), trusted_keys_file_(std::move(trusted_keys_file)), log_(log),
      session_(new Session) {}

SystemCache::~SystemCache() {
  if (Session* session = session_; session->process == current_process())
    delete session;
}

SystemCache::Session& SystemCache::current_session() {
  Session* session = session_.load();
  while (session->process != current_process()) {
    auto fresh = std::make_unique<Session>();
    if (session_.compare_exchange_strong(session, fresh.get()))
      session = fresh.release();
  }
  return *session;
}

std::optional<VerifiedRow> SystemCache::get(const Digest& key) {
  Session& session = current_session();
  std::shared_ptr<const Bundle> bundle;
  {
    const std::lock_guard lock(session.mutex);
    if (const Clock::time_point now = Clock::now(); now >= session.next_look) {
      session.next_look = now + std::chrono::milliseconds(look_again_ms);
      if (!session.bundle || identity_of(path_) != session.identity) {
        session.bundle.reset();
        Result<Bundle> opened = open_trusted_bundle(path_, trusted_keys_file_);
        if (opened) {
          session.identity = identity_of(opened->file());
          session.bundle = std::make_shared<const Bundle>(std::move(*opened));
        } else if (opened.status().code() == Code::not_found) {
          log_.debug(opened.status().message());
        } else {
          session.warn_once(log_, opened.status().message());
          session.next_look = now + std::chrono::milliseconds(retry_ms);
        }
      }
    }
    bundle = session.bundle;
  }
  const Bundle::Entry* entry = bundle ? bundle->find(key) : nullptr;
  std::optional<Result<StoreRow>> row;
  if (entry != nullptr)
    row.emplace(bundle->read(*entry));

  const std::lock_guard lock(session.mutex);
  if (row && *row) {
    ++session.counts.hits;
    return VerifiedRow(std::move(**row));
  }
  ++session.counts.misses;
  if (row) {
    ++session.counts.refused;
    session.warn_once(log_, row->status().message());
  }
  return std::nullopt;
}

SystemCache::Stats SystemCache::stats() {
  Session& session = current_session();
  const std::lock_guard lock(session.mutex);
  return session.counts;
}

Result<SystemCache::Contents> SystemCache::contents(bool read_every_kernel) const {
  const Result<Bundle> bundle = open_trusted_bundle(path_, trusted_keys_file_);
  if (!bundle)
    return bundle.status();
  Contents out;
  out.kernels = std::ssize(bundle->entries());
  out.file_bytes = static_cast<std::int64_t>(size_of(bundle->file()));
  out.signer = bundle->signer()->id();
  if (read_every_kernel)
    for (const Bundle::Entry& entry : bundle->entries())
      out.bad += !bundle->read(entry);
  return out;
}

} // namespace kiln
