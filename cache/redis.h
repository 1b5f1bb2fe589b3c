#pragma once
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>

#include "cache/process_descriptor.h"
#include "cache/remote_url.h"
#include "cache/resolver.h"
#include "cache/status.h"

struct redisReader;

namespace kiln {

/// One reply of the Redis serialisation protocol, version 2. Arrays are none: no command of ours has one.
struct RedisReply {
  enum class Kind : std::uint8_t { status, error, integer, nil, bulk };
  Kind kind = Kind::nil;
  std::string bytes; ///< of a status, an error or a bulk string
  std::int64_t integer = 0;

  /// Its beginning, for a message.
  std::string_view shown() const { return std::string_view(bytes).substr(0, 200); }
};

/// Takes a server's bytes in any pieces. By hiredis's parser, which sees no more than `most_bytes` of a bulk string, a
/// few KiB of anything else, and no string that promises more. What it has not understood it looks through again with
/// each piece: nothing long may be of that kind.
class RedisReplyParser {
public:
  explicit RedisReplyParser(std::size_t most_bytes);
  /// The next reply, or nothing while it is not complete. Code::integrity: this is no reply, an array, or too long;
  /// nothing more can be had then.
  Result<std::optional<RedisReply>> next();
  /// More bytes from the server. Code::integrity likewise.
  Status feed(std::string_view bytes);
  /// Whether every byte fed belonged to a reply that next() gave.
  bool is_empty() const;

private:
  struct Free {
    void operator()(redisReader* reader) const;
  };
  std::unique_ptr<redisReader, Free> reader_;
  Status check_pending() const;

  std::size_t most_bytes_;
  std::size_t pending_bytes_ = 0; ///< fed since the last reply
  std::string head_;              ///< the first of these
};

/// One connection to a Redis server. Every call ends at its deadline, however the server behaves: the deadline holds
/// for the whole of it, not for each read. Raises no SIGPIPE. Closed in a child made by fork. Not thread-safe.
class RedisConnection {
public:
  using Clock = std::chrono::steady_clock;
  using Deadline = Clock::time_point;

  /// Connected, or Code::busy when the time is over, Code::io when the system says no.
  static Result<RedisConnection> open(const SocketAddress& address, const RemoteUrl& url, Deadline deadline);

  /// Sends one command and waits for its reply; with the first one, the URL's credentials and database. Code::busy when
  /// the time is over, Code::io when the connection ends or the server refuses credentials or database, Code::integrity
  /// when it does not speak Redis's protocol. After any of these, and when is_usable() says so, it is of no more use.
  Result<RedisReply> call(std::span<const std::string_view> words, Deadline deadline);

  /// Whether it could serve another call: nobody closed it, and nothing is left over from before.
  bool is_usable() const;

private:
  RedisConnection(ProcessDescriptor socket, const RemoteUrl& url);
  Status send(std::string_view bytes, Deadline deadline) const;
  Result<RedisReply> receive(Deadline deadline);

  ProcessDescriptor socket_;
  RedisReplyParser parser_;
  std::string preamble_; ///< commands to send before the first call's
  int preamble_replies_ = 0;
  bool failed_ = false;
};

} // namespace kiln
