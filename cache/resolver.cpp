#include "cache/resolver.h"

#include <arpa/inet.h>
#include <dlfcn.h>
#include <netdb.h>
#include <netinet/in.h>
#include <pthread.h>
#include <signal.h>
#include <sys/un.h>

#include <cerrno>
#include <cstring>
#include <fmt/format.h>
#include <optional>
#include <system_error>

namespace kiln {
namespace {

template <class Address> SocketAddress socket_address(const Address& address) {
  static_assert(sizeof address <= sizeof(sockaddr_storage));
  SocketAddress out;
  std::memcpy(&out.storage, &address, sizeof address);
  out.bytes = sizeof address;
  return out;
}

/// What needs no looking up; empty for a name.
std::vector<SocketAddress> fixed_addresses(const RemoteUrl& url) {
  if (!url.path.empty()) {
    sockaddr_un unix_address{};
    unix_address.sun_family = AF_UNIX;
    url.path.copy(unix_address.sun_path, sizeof unix_address.sun_path - 1);
    return {socket_address(unix_address)};
  }
  sockaddr_in v4{};
  v4.sin_family = AF_INET;
  v4.sin_port = htons(url.port);
  if (::inet_pton(AF_INET, url.host.c_str(), &v4.sin_addr) == 1)
    return {socket_address(v4)};
  sockaddr_in6 v6{};
  v6.sin6_family = AF_INET6;
  v6.sin6_port = htons(url.port);
  if (::inet_pton(AF_INET6, url.host.c_str(), &v6.sin6_addr) == 1)
    return {socket_address(v6)};
  return {};
}

/// A thread that nobody waits for returns into this library some day: it must still be there.
void keep_this_library_loaded() {
  Dl_info info;
  if (::dladdr(reinterpret_cast<const void*>(&keep_this_library_loaded), &info) != 0 && info.dli_fname != nullptr)
    (void)::dlopen(info.dli_fname, RTLD_NOW | RTLD_NOLOAD | RTLD_NODELETE); // fails for the program itself, which stays
}

/// The host's signals are not for its libraries' threads, which begin with the mask of whoever starts them.
class SignalsBlocked {
public:
  SignalsBlocked() {
    sigset_t all;
    ::sigfillset(&all);
    ::pthread_sigmask(SIG_SETMASK, &all, &before_);
  }
  ~SignalsBlocked() { ::pthread_sigmask(SIG_SETMASK, &before_, nullptr); }

private:
  sigset_t before_;
};

} // namespace

Result<std::vector<SocketAddress>> look_up(const std::string& host, std::uint16_t port) {
  addrinfo wanted{};
  wanted.ai_socktype = SOCK_STREAM;
  wanted.ai_flags = AI_NUMERICSERV;
  addrinfo* list = nullptr;
  const int error = ::getaddrinfo(host.c_str(), std::to_string(port).c_str(), &wanted, &list);
  if (error != 0)
    return Status::error(Code::io, fmt::format("cannot find {}: {}", host,
                                               error == EAI_SYSTEM ? std::strerror(errno) : ::gai_strerror(error)));
  const std::unique_ptr<addrinfo, decltype(&::freeaddrinfo)> owner(list, &::freeaddrinfo);
  std::vector<SocketAddress> out;
  for (const addrinfo* one = list; one != nullptr; one = one->ai_next)
    if ((one->ai_family == AF_INET || one->ai_family == AF_INET6) && one->ai_addrlen <= sizeof(sockaddr_storage)) {
      SocketAddress& address = out.emplace_back();
      std::memcpy(&address.storage, one->ai_addr, one->ai_addrlen);
      address.bytes = one->ai_addrlen;
    }
  if (out.empty())
    return Status::error(Code::io, fmt::format("{} has no IP address", host));
  return out;
}

/// Shared with the thread, which may outlive the resolver.
struct Resolver::Query {
  const Clock::time_point begun = Clock::now();
  std::mutex mutex;
  std::condition_variable landed;
  std::optional<Result<std::vector<SocketAddress>>> result;

  bool is_done() {
    const std::lock_guard lock(mutex);
    return result.has_value();
  }
};

Resolver::Resolver(const RemoteUrl& url, Lookup lookup)
    : host_(url.host), port_(url.port), lookup_(lookup), fixed_(fixed_addresses(url)) {}

Resolver::~Resolver() {
  if (!thread_.joinable())
    return;
  if (query_->is_done()) {
    thread_.join(); // it has nothing left to do
  } else {
    keep_this_library_loaded();
    thread_.detach();
  }
}

Result<std::vector<SocketAddress>> Resolver::addresses(Clock::time_point deadline, Clock::duration patience) {
  if (!fixed_.empty())
    return fixed_;
  std::shared_ptr<Query> query;
  {
    const std::lock_guard lock(mutex_);
    if (!query_)
      if (Status status = start(); !status)
        return status;
    query = query_;
  }
  std::unique_lock lock(query->mutex);
  if (!query->landed.wait_until(lock, std::min(deadline, query->begun + patience),
                                [&] { return query->result.has_value(); }))
    return Status::error(Code::busy, fmt::format("{} is still being looked up", host_));
  return *query->result;
}

Status Resolver::start() {
  auto query = std::make_shared<Query>();
  const SignalsBlocked blocked;
  try {
    thread_ = std::thread([query, lookup = lookup_, host = host_, port = port_] {
      std::optional<Result<std::vector<SocketAddress>>> result;
      try {
        result = lookup(host, port);
      } catch (const std::exception& e) { // must not end the process
        result = Status::error(Code::out_of_memory, e.what());
      }
      const std::lock_guard lock(query->mutex);
      query->result = std::move(result);
      query->landed.notify_all();
    });
  } catch (const std::system_error& e) {
    return Status::error(Code::out_of_memory,
                         fmt::format("no thread to look {} up can be started: {}", host_, e.what()));
  }
  query_ = std::move(query);
  return {};
}

void Resolver::forget() {
  const std::lock_guard lock(mutex_);
  if (!query_ || !query_->is_done())
    return;
  thread_.join();
  query_.reset();
}

} // namespace kiln
