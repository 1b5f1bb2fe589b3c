#include "cache/remote_cache.h"

#include <algorithm>
#include <condition_variable>
#include <fmt/format.h>
#include <mutex>
#include <set>
#include <utility>

#include "cache/circuit_breaker.h"
#include "cache/process.h"
#include "cache/remote_row.h"
#include "cache/trusted_file.h"

namespace kiln {
namespace {

using Clock = std::chrono::steady_clock;
using Kind = RedisReply::Kind;

constexpr std::chrono::seconds batch_time{1};
/// How often, at most, a look at the file of trusted keys is taken.
constexpr std::chrono::seconds look_again{1};
/// So many rows refused without a good one between them, and the server counts as one that does not work.
constexpr int most_refused_in_a_row = 8;

/// Why a server that failed is not asked. No failure itself.
Status left_alone() {
  return Status::error(Code::busy, "it failed lately and is left alone");
}

} // namespace

/// All that belongs to one process. A child made by fork leaves its parent's alone: a thread that does not exist in the
/// child may have held the lock. (Its connections were closed when the child was made.)
struct RemoteCache::Session {
  explicit Session(const RemoteOptions& options) : resolver(options.url, options.lookup) {}

  const ProcessId process = current_process();
  Resolver resolver;
  std::atomic<std::size_t> first_address = 0; ///< which of several is tried first
  std::mutex mutex;
  std::condition_variable changed; ///< a call ended
  // Below: guarded by the mutex.
  CircuitBreaker breaker;
  int calls = 0; ///< under way
  std::optional<RedisConnection> idle;
  std::shared_ptr<const TrustedKeys> trusted; ///< null: nobody
  FileIdentity trusted_file;
  Clock::time_point next_look = Clock::time_point::min();
  int refused_in_a_row = 0;
  Stats counts;
  std::set<std::string, std::less<>> warned;

  /// The first time for each cause, else for who wants to know more.
  void log_once(const Log& log, std::string_view cause, std::string_view message) {
    if (warned.emplace(cause).second)
      log.warn(message);
    else
      log.debug(message);
  }
};

RemoteCache::RemoteCache(RemoteOptions options, const Log& log)
    : options_(std::move(options)), log_(log), session_(new Session(options_)) {}

RemoteCache::~RemoteCache() {
  if (Session* session = session_; session->process == current_process())
    delete session;
}

RemoteCache::Session& RemoteCache::current_session() {
  Session* session = session_.load();
  while (session->process != current_process()) {
    auto fresh = std::make_unique<Session>(options_);
    if (session_.compare_exchange_strong(session, fresh.get()))
      session = fresh.release();
  }
  return *session;
}

std::optional<PublicKey> RemoteCache::signer() const {
  return options_.signing_key ? std::optional(options_.signing_key->public_key()) : std::nullopt;
}

RemoteCache::Stats RemoteCache::stats() {
  Session& session = current_session();
  const std::lock_guard lock(session.mutex);
  return session.counts;
}

/// Null when nobody is trusted: then there is no row worth asking for.
std::shared_ptr<const TrustedKeys> RemoteCache::trusted_keys(Session& session) {
  const std::lock_guard lock(session.mutex);
  const Clock::time_point now = Clock::now();
  if (now < session.next_look)
    return session.trusted;
  session.next_look = now + look_again;
  const FileIdentity identity = identity_of(options_.trusted_keys_file); // before it is read: a later change is noticed
  if (session.trusted && identity == session.trusted_file)
    return session.trusted;
  session.trusted.reset();
  session.trusted_file = identity;
  Result<TrustedKeys> keys = TrustedKeys::read(options_.trusted_keys_file, Ownership::path);
  if (keys && !keys->keys.empty())
    session.trusted = std::make_shared<const TrustedKeys>(std::move(*keys));
  else if (!writes() || (!keys && keys.status().code() != Code::not_found)) // who writes need not read
    session.log_once(
        log_, "trusted",
        fmt::format("{}: nothing is taken from there: {}", options_.url.text(),
                    keys ? fmt::format("{} lists no key", options_.trusted_keys_file) : keys.status().message()));
  return session.trusted;
}

/// One admitted call. Whatever ends it, exceptions too, makes room for the next.
class RemoteCache::Turn {
public:
  /// Waits for it. `host` waits for other calls until `time` is over, and not for a pause.
  static Status wait(Session& session, std::unique_lock<std::mutex>& lock, Patience patience, Clock::duration time) {
    const Clock::time_point give_up =
        Clock::now() + time + (patience != Patience::host ? CircuitBreaker::first_pause : std::chrono::seconds(0));
    for (;;) {
      const Clock::time_point now = Clock::now(), open_until = session.breaker.open_until();
      if (!session.breaker.admits(now)) {
        if (patience == Patience::host || open_until >= give_up || now >= give_up)
          return left_alone();
        session.changed.wait_until(lock, open_until > now ? open_until : give_up);
      } else if (session.calls < most_calls) {
        return {};
      } else if (now >= give_up) {
        return Status::error(Code::busy, "other calls take all the time");
      } else {
        session.changed.wait_until(lock, give_up);
      }
    }
  }

  /// With the mutex held.
  explicit Turn(Session& session) : session_(session) {
    ++session.calls;
    session.breaker.begin();
  }
  ~Turn() {
    {
      const std::lock_guard lock(session_.mutex);
      --session_.calls;
      if (!is_told_)
        session_.breaker.abandoned();
    }
    session_.changed.notify_all();
  }
  Turn(const Turn&) = delete;
  Turn& operator=(const Turn&) = delete;
  /// The breaker knows how it ended.
  void told() { is_told_ = true; }

private:
  Session& session_;
  bool is_told_ = false;
};

/// A command and its reply, one of the `wanted` kinds. Whoever has time tries once more.
Result<RedisReply> RemoteCache::call(Session& session, std::initializer_list<std::string_view> words,
                                     std::initializer_list<Kind> wanted, Patience patience,
                                     std::chrono::microseconds time) {
  Result<RedisReply> reply = call_once(session, words, wanted, patience, time);
  return reply || patience == Patience::host ? reply : call_once(session, words, wanted, patience, time);
}

/// What fails is counted, logged, and makes the server be left alone.
Result<RedisReply> RemoteCache::call_once(Session& session, std::initializer_list<std::string_view> words,
                                          std::initializer_list<Kind> wanted, Patience patience,
                                          std::chrono::microseconds time) {
  const Clock::time_point begun = Clock::now();
  std::optional<RedisConnection> connection;
  std::optional<Turn> turn;
  {
    std::unique_lock lock(session.mutex);
    if (Status status = Turn::wait(session, lock, patience, time); !status)
      return status;
    turn.emplace(session);
    connection = std::exchange(session.idle, std::nullopt);
  }
  const Clock::time_point turn_begun = Clock::now();
  const Clock::time_point deadline = (patience == Patience::host ? begun : turn_begun) + time;
  bool is_verdict = true;
  Status status = connect(session, connection, deadline, time, is_verdict);
  Result<RedisReply> reply =
      status ? connection->call({words.begin(), words.size()}, deadline) : Result<RedisReply>(status);
  if (!reply && reply.status().code() == Code::busy && deadline - turn_begun < time / 2)
    is_verdict = false; // most of the time went by before its turn
  if (reply && std::find(wanted.begin(), wanted.end(), reply->kind) == wanted.end())
    reply = reply->kind == Kind::error ? Status::error(Code::io, fmt::format("it answers: {}", reply->shown()))
                                       : Status::error(Code::integrity, "its answer is of another type than asked for");
  if (connection && (!connection->is_usable() || (!reply && reply.status().code() == Code::integrity)))
    connection.reset();

  const std::lock_guard lock(session.mutex);
  if (connection && !session.idle)
    session.idle = std::move(connection);
  if (reply) {
    if (!session.breaker.is_closed())
      log_.info(fmt::format("{}: it works again", options_.url.text()));
    session.breaker.worked();
    turn->told();
  } else if (is_verdict) {
    session.counts.errors += patience != Patience::probe;
    ++session.first_address;
    session.resolver.forget(); // it may have moved
    session.breaker.failed(Clock::now());
    turn->told();
    const std::string message =
        fmt::format("{}: {}{}", options_.url.text(), reply.status().message(),
                    reply.status().code() == Code::busy ? fmt::format(" ({} ms)", time.count() / 1e3) : "");
    if (session.breaker.is_closed())
      log_.debug(message);
    else
      session.log_once(log_, "failed",
                       fmt::format("{}; it is left alone for {} s, and longer while it keeps failing", message,
                                   CircuitBreaker::first_pause.count()));
  } else {
    log_.debug(fmt::format("{}: {}", options_.url.text(), reply.status().message()));
  }
  return reply;
}

/// The connection that was kept, if it is still good, else another. `is_verdict`: whether a failure tells anything of
/// the server.
Status RemoteCache::connect(Session& session, std::optional<RedisConnection>& connection,
                            RedisConnection::Deadline deadline, std::chrono::microseconds time, bool& is_verdict) {
  if (connection && connection->is_usable())
    return {};
  connection.reset();
  const Result<std::vector<SocketAddress>> addresses = session.resolver.addresses(deadline, time);
  if (!addresses) {
    is_verdict = addresses.status().code() != Code::busy;
    return addresses.status();
  }
  Status status;
  for (std::size_t i = 0; i < addresses->size(); ++i) {
    Result<RedisConnection> opened =
        RedisConnection::open((*addresses)[(session.first_address + i) % addresses->size()], options_.url, deadline);
    if (opened) {
      connection.emplace(std::move(*opened));
      return {};
    }
    status = opened.status();
    if (status.code() == Code::busy)
      break;
  }
  return status;
}

Result<StoreRow> RemoteCache::authenticated(std::string_view bytes, const Digest& key,
                                            const TrustedKeys& trusted) const {
  Result<StoreRow> row =
      read_remote_row({reinterpret_cast<const std::uint8_t*>(bytes.data()), bytes.size()}, key, trusted);
  if (row && options_.check_row != nullptr)
    if (Status status = options_.check_row(*row); !status)
      return status;
  return row;
}

std::optional<VerifiedRow> RemoteCache::get(const Digest& key, Patience patience) {
  Session& session = current_session();
  const std::shared_ptr<const TrustedKeys> trusted = trusted_keys(session);
  if (!trusted)
    return std::nullopt;
  const Result<RedisReply> reply =
      call(session, {"GET", remote_name_of(key)}, {Kind::bulk, Kind::nil}, patience,
           patience == Patience::host ? options_.url.timeout()
                                      : std::max<std::chrono::microseconds>(batch_time, options_.url.timeout()));
  if (!reply)
    return std::nullopt;
  std::optional<Result<StoreRow>> row;
  if (reply->kind == Kind::bulk)
    row.emplace(authenticated(reply->bytes, key, *trusted));

  const std::lock_guard lock(session.mutex);
  if (!row) {
    ++session.counts.misses;
    return std::nullopt;
  }
  if (!*row) {
    refuse(session, row->status());
    return std::nullopt;
  }
  ++session.counts.hits;
  session.refused_in_a_row = 0;
  return VerifiedRow(std::move(**row));
}

/// With the mutex held.
void RemoteCache::refuse(Session& session, const Status& why) {
  ++session.counts.refused;
  ++session.counts.misses;
  session.log_once(log_, "refused",
                   fmt::format("{}: a row is refused: {}; the kernel is compiled (further such rows are counted, not "
                               "logged)",
                               options_.url.text(), why.message()));
  if (++session.refused_in_a_row < most_refused_in_a_row)
    return;
  session.refused_in_a_row = 0;
  session.breaker.open(Clock::now());
}

Status RemoteCache::put(const StoreRow& row, Patience patience) {
  if (!options_.signing_key)
    return Status::error(Code::unsupported, fmt::format("{}: there is no key to sign rows with", options_.url.text()));
  const Result<Bytes> bytes = make_remote_row(row, *options_.signing_key);
  if (!bytes) {
    log_.debug(bytes.status().message());
    return bytes.status();
  }
  Session& session = current_session();
  const std::string name = remote_name_of(row.key), ttl = std::to_string(options_.url.ttl_seconds);
  const std::string_view value(reinterpret_cast<const char*>(bytes->data()), bytes->size());
  const std::chrono::microseconds time = patience == Patience::host ? options_.url.timeout() * 2 / 3 : batch_time;
  const Result<RedisReply> reply = options_.url.ttl_seconds > 0
                                       ? call(session, {"SET", name, value, "EX", ttl}, {Kind::status}, patience, time)
                                       : call(session, {"SET", name, value}, {Kind::status}, patience, time);
  if (!reply)
    return reply.status();
  const std::lock_guard lock(session.mutex);
  ++session.counts.written;
  return {};
}

Result<RemoteCache::Probe> RemoteCache::probe(int samples) {
  Session& session = current_session();
  const auto ask = [&](std::initializer_list<std::string_view> words, Kind wanted) {
    return call(session, words, {wanted, Kind::nil, Kind::error}, Patience::probe, batch_time);
  };
  Probe out;
  for (int i = 0; i < 2; ++i) { // the second on an open connection
    const Clock::time_point begun = Clock::now();
    const Result<RedisReply> reply = ask({"PING"}, Kind::status);
    if (!reply)
      return reply.status();
    if (reply->kind == Kind::error)
      return Status::error(Code::io, fmt::format("it answers: {}", reply->shown()));
    out.answer_ms = std::chrono::duration<double, std::milli>(Clock::now() - begun).count();
  }
  const Result<RedisReply> size = ask({"DBSIZE"}, Kind::integer);
  if (!size)
    return size.status();
  out.names = size->integer;

  const std::shared_ptr<const TrustedKeys> trusted = trusted_keys(session);
  if (!trusted) {
    out.not_sampled = fmt::format("{} has no key", options_.trusted_keys_file);
    return out;
  }
  std::set<std::string> seen;
  for (int i = 0; i < samples; ++i) {
    const Result<RedisReply> name = ask({"RANDOMKEY"}, Kind::bulk);
    if (!name)
      return name.status();
    if (name->kind == Kind::error) {
      out.not_sampled = name->shown();
      return out;
    }
    const std::optional<Digest> key = key_of_remote_name(name->bytes);
    if (!key || !seen.insert(name->bytes).second)
      continue;
    const Result<RedisReply> value = ask({"GET", name->bytes}, Kind::bulk);
    if (!value)
      return value.status();
    if (value->kind == Kind::nil)
      continue;
    ++out.sampled;
    const Result<StoreRow> row = value->kind == Kind::bulk ? authenticated(value->bytes, *key, *trusted)
                                                           : Result<StoreRow>(Status::error(Code::io, value->shown()));
    if (!row && row.status().code() == Code::unsupported)
      ++out.other;
    else if (!row)
      out.refused.push_back(row.status());
  }
  return out;
}

} // namespace kiln
