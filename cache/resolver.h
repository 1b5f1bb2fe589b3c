#pragma once
#include <sys/socket.h>

#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "cache/remote_url.h"
#include "cache/status.h"

namespace kiln {

/// What connect(2) takes.
struct SocketAddress {
  sockaddr_storage storage{};
  socklen_t bytes = 0;
};

/// Every address of a host name, as the system knows them; takes as long as that takes (getaddrinfo has no time-out).
Result<std::vector<SocketAddress>> look_up(const std::string& host, std::uint16_t port);

/// The addresses of a remote tier's URL, without ever making its caller wait for a name server: names are looked up in
/// a thread of their own, which nobody waits for, not even the destructor. Thread-safe. Belongs to one process.
class Resolver {
public:
  using Clock = std::chrono::steady_clock;
  using Lookup = Result<std::vector<SocketAddress>> (*)(const std::string& host, std::uint16_t port);

  explicit Resolver(const RemoteUrl& url, Lookup lookup = look_up);
  ~Resolver();
  Resolver(const Resolver&) = delete;
  Resolver& operator=(const Resolver&) = delete;

  /// At least one address. A name's are looked up once, until forget(). Code::busy while they are still on their way at
  /// `deadline`, or `patience` after the lookup began, whichever is first: later callers do not wait for a slow one.
  Result<std::vector<SocketAddress>> addresses(Clock::time_point deadline, Clock::duration patience);
  /// The next call looks a name up anew, unless it is still being looked up.
  void forget();

private:
  struct Query;
  Status start(); ///< with the mutex held

  const std::string host_;
  const std::uint16_t port_;
  const Lookup lookup_;
  std::vector<SocketAddress> fixed_; ///< of an IP address or a path, which need no looking up
  std::mutex mutex_;
  std::shared_ptr<Query> query_; ///< the last; null before the first, and after forget()
  std::thread thread_;           ///< of the last query
};

} // namespace kiln
