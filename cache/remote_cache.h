#pragma once
#include <atomic>
#include <chrono>
#include <cstdint>
#include <initializer_list>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "cache/digest.h"
#include "cache/log.h"
#include "cache/redis.h"
#include "cache/remote_url.h"
#include "cache/resolver.h"
#include "cache/signing.h"
#include "cache/status.h"
#include "cache/store.h"

namespace kiln {

struct RemoteOptions {
  RemoteUrl url;
  std::string trusted_keys_file;        ///< absolute; whose rows are taken
  std::optional<SecretKey> signing_key; ///< without, nothing is written
  /// Whether a row that is authentic is also what it says; null: not asked.
  Status (*check_row)(const StoreRow& row) = nullptr;
  Resolver::Lookup lookup = look_up;
};

/// The tier that machines share: a Redis server, behind the caches on disk. It is trusted with nothing: a row is taken
/// when one of the trusted keys signed it for the very kernel that is asked for. Whatever the server does, and whether
/// there is one, a call ends in time; after one that failed, the server is left alone for a time that grows
/// (CircuitBreaker). api/doc/remote.md has the format, what is waited for, and how to set it up.
///
/// Thread-safe; no call throws but for want of memory. At most `most_calls` connections at once, of which one is kept.
/// A child made by fork has connections of its own.
class RemoteCache {
public:
  static constexpr int most_calls = 4;

  /// Connects to nothing yet. `log` must outlive the cache.
  RemoteCache(RemoteOptions options, const Log& log);
  ~RemoteCache();
  RemoteCache(const RemoteCache&) = delete;
  RemoteCache& operator=(const RemoteCache&) = delete;

  /// For how long a call may take. `host`: the URL's time-out for a look, two thirds of it for a write. `batch`: a
  /// second, and as much again for the end of the server's first pause, for whoever fills a cache. `probe`: like
  /// that, for whoever asks what is wrong, and what he finds is not counted.
  enum class Patience : std::uint8_t { host, batch, probe };

  /// The row with this key, authenticated, or nothing: it is not there, is refused, or the server does not answer.
  std::optional<VerifiedRow> get(const Digest& key, Patience patience);

  bool writes() const { return options_.signing_key.has_value(); }
  /// Signs the row and stores it, in the place of what is there. A failure is counted, logged and returned.
  /// Code::unsupported without a signing key.
  Status put(const StoreRow& row, Patience patience);

  struct Stats { ///< of this process
    std::int64_t hits = 0, misses = 0, refused = 0, errors = 0, written = 0;
  };
  Stats stats();

  /// What a process would meet now.
  struct Probe {
    double answer_ms = 0;        ///< of a call on an open connection
    std::int64_t names = 0;      ///< in the database, of whatever
    std::int64_t sampled = 0;    ///< rows of Kiln's that were looked at, chosen at random
    std::int64_t other = 0;      ///< of them those that another version of Kiln made
    std::vector<Status> refused; ///< of them those that would be refused, and why
    std::string not_sampled;     ///< why none was looked at; may be empty
  };
  /// An error when the server cannot be used, or the list of trusted keys.
  Result<Probe> probe(int samples);

  const RemoteUrl& url() const { return options_.url; }
  /// Whose signature rows written here carry.
  std::optional<PublicKey> signer() const;

private:
  struct Session;
  class Turn;
  Session& current_session();
  std::shared_ptr<const TrustedKeys> trusted_keys(Session& session);
  Result<StoreRow> authenticated(std::string_view bytes, const Digest& key, const TrustedKeys& trusted) const;
  Result<RedisReply> call(Session& session, std::initializer_list<std::string_view> words,
                          std::initializer_list<RedisReply::Kind> wanted, Patience patience,
                          std::chrono::microseconds time);
  Result<RedisReply> call_once(Session& session, std::initializer_list<std::string_view> words,
                               std::initializer_list<RedisReply::Kind> wanted, Patience patience,
                               std::chrono::microseconds time);
  Status connect(Session& session, std::optional<RedisConnection>& connection, RedisConnection::Deadline deadline,
                 std::chrono::microseconds time, bool& is_verdict);
  void refuse(Session& session, const Status& why);

  const RemoteOptions options_;
  const Log& log_;
  std::atomic<Session*> session_;
};

} // namespace kiln
