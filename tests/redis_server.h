#pragma once
#include <arpa/inet.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <poll.h>
#include <signal.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <functional>
#include <mutex>
#include <string>
#include <string_view>
#include <thread>
#include <vector>

#include <doctest/doctest.h>
#include <fmt/format.h>

#include "cache/redis.h"
#include "tests/store_fixture.h"

/// Servers for the remote tier's tests: Redis itself, and ones that misbehave.
namespace kiln::test {

/// A TCP socket that listens on a free port of this machine.
class Listener {
public:
  explicit Listener(int backlog = 64) : socket_(::socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0)) {
    sockaddr_in address{};
    address.sin_family = AF_INET;
    address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    socklen_t size = sizeof address;
    REQUIRE(::bind(socket_, reinterpret_cast<sockaddr*>(&address), size) == 0);
    REQUIRE(::listen(socket_, backlog) == 0);
    REQUIRE(::getsockname(socket_, reinterpret_cast<sockaddr*>(&address), &size) == 0);
    port_ = ntohs(address.sin_port);
  }
  ~Listener() { ::close(socket_); }
  Listener(const Listener&) = delete;
  Listener& operator=(const Listener&) = delete;
  int socket() const { return socket_; }
  int port() const { return port_; }

private:
  int socket_, port_;
};

/// Accepts every connection and treats it as it is told, each in a thread of its own.
class FakeServer {
public:
  class Connection {
  public:
    Connection(int socket, const std::atomic<bool>& ends) : socket_(socket), ends_(ends) {}
    /// Waits for the next bytes. False when the client has gone or the server ends.
    bool receive(std::string& bytes) const {
      char buffer[4096];
      while (!ends_) {
        pollfd one = {socket_, POLLIN, 0};
        if (::poll(&one, 1, 5) <= 0)
          continue;
        const ssize_t size = ::recv(socket_, buffer, sizeof buffer, MSG_DONTWAIT);
        if (size <= 0)
          return false;
        bytes.assign(buffer, static_cast<std::size_t>(size));
        return true;
      }
      return false;
    }
    bool send(std::string_view bytes) const {
      while (!bytes.empty() && !ends_) {
        pollfd one = {socket_, POLLOUT, 0};
        if (::poll(&one, 1, 5) <= 0)
          continue;
        const ssize_t size = ::send(socket_, bytes.data(), bytes.size(), MSG_NOSIGNAL | MSG_DONTWAIT);
        if (size < 0)
          return false;
        bytes.remove_prefix(static_cast<std::size_t>(size));
      }
      return !ends_;
    }
    /// Closes with an RST: what was sent is lost.
    void reset() const {
      const linger now = {1, 0};
      ::setsockopt(socket_, SOL_SOCKET, SO_LINGER, &now, sizeof now);
    }
    bool server_ends() const { return ends_; }

  private:
    int socket_;
    const std::atomic<bool>& ends_;
  };
  using Behaviour = std::function<void(const Connection&)>;

  explicit FakeServer(Behaviour behaviour) : behaviour_(std::move(behaviour)), acceptor_([this] { accept_all(); }) {}
  ~FakeServer() {
    ends_ = true;
    acceptor_.join();
    for (std::thread& thread : threads_)
      thread.join();
  }
  int port() const { return listener_.port(); }
  int connections() const { return connections_; }
  std::string url(std::string_view options = "") const {
    return fmt::format("redis://127.0.0.1:{}/0{}", port(), options);
  }

  /// Answers each command with the same bytes.
  static Behaviour answers(std::string bytes) {
    return [bytes = std::move(bytes)](const Connection& connection) {
      for (std::string command; connection.receive(command) && connection.send(bytes);)
        continue;
    };
  }
  /// Takes commands and never answers.
  static Behaviour hangs() {
    return [](const Connection& connection) {
      for (std::string command; connection.receive(command);)
        continue;
    };
  }
  /// One byte each millisecond, over and over.
  static Behaviour drips(std::string bytes) {
    return [bytes = std::move(bytes)](const Connection& connection) {
      std::string command;
      if (!connection.receive(command))
        return;
      for (std::size_t i = 0; connection.send(bytes.substr(i % bytes.size(), 1)); ++i)
        std::this_thread::sleep_for(std::chrono::milliseconds(1));
    };
  }
  /// `first`, then `again` without an end.
  static Behaviour floods(std::string first, std::string again) {
    return [first = std::move(first), again = std::move(again)](const Connection& connection) {
      std::string command;
      if (!connection.receive(command) || !connection.send(first))
        return;
      while (connection.send(again))
        continue;
    };
  }

  static std::string bulk(std::string_view bytes) { return fmt::format("${}\r\n{}\r\n", bytes.size(), bytes); }

private:
  void accept_all() {
    while (!ends_) {
      pollfd one = {listener_.socket(), POLLIN, 0};
      if (::poll(&one, 1, 5) <= 0)
        continue;
      const int socket = ::accept4(listener_.socket(), nullptr, nullptr, SOCK_CLOEXEC);
      if (socket < 0)
        continue;
      ++connections_;
      threads_.emplace_back([this, socket] {
        behaviour_(Connection(socket, ends_));
        ::close(socket);
      });
    }
  }

  const Behaviour behaviour_;
  Listener listener_;
  std::atomic<bool> ends_ = false;
  std::atomic<int> connections_ = 0;
  std::vector<std::thread> threads_; ///< of the acceptor until it ends
  std::thread acceptor_;
};

/// Redis itself, on a free port and a socket of its own, empty; ends with the test, however that ends.
class RealRedis {
public:
  static bool is_installed() { return std::string_view(KILN_REDIS_SERVER).starts_with('/'); }

  RealRedis() {
    int status = 0;
    for (int turn = 0; turn < 5 && child_ <= 0; ++turn) {
      { port_ = Listener().port(); } // free again now, and unlikely to be taken at once
      start();
      for (const auto give_up = std::chrono::steady_clock::now() + std::chrono::seconds(20);
           std::chrono::steady_clock::now() < give_up; std::this_thread::sleep_for(std::chrono::milliseconds(10))) {
        if (::waitpid(child_, &status, WNOHANG) == child_) {
          child_ = -1; // the port was taken
          break;
        }
        if (Result<RedisReply> reply = tell({"PING"}); reply && reply->bytes == "PONG")
          return;
      }
    }
    FAIL("Redis does not start");
  }
  ~RealRedis() { stop(); }
  RealRedis(const RealRedis&) = delete;
  RealRedis& operator=(const RealRedis&) = delete;

  void stop() {
    if (child_ <= 0)
      return;
    ::kill(child_, SIGKILL);
    ::waitpid(child_, nullptr, 0);
    child_ = -1;
  }
  void signal(int number) const { ::kill(child_, number); }
  int port() const { return port_; }
  std::string url(std::string_view credentials = "", std::string_view options = "") const {
    return fmt::format("redis://{}127.0.0.1:{}/0{}", credentials, port_, options);
  }
  std::string unix_path() const { return directory_.path() / "redis.sock"; }
  std::string unix_url(std::string_view options = "") const { return fmt::format("unix://{}{}", unix_path(), options); }

  /// One command by a connection of its own, to database 0 unless the URL says otherwise.
  Result<RedisReply> tell(std::initializer_list<std::string_view> words, std::string_view options = "?db=0") const {
    const RemoteUrl url = *RemoteUrl::parse(unix_url(options));
    Resolver resolver(url);
    const auto deadline = std::chrono::steady_clock::now() + std::chrono::seconds(20);
    const auto addresses = resolver.addresses(deadline, std::chrono::seconds(20));
    Result<RedisConnection> connection = RedisConnection::open(addresses->front(), url, deadline);
    return connection ? connection->call({words.begin(), words.size()}, deadline)
                      : Result<RedisReply>(connection.status());
  }

private:
  void start() {
    const std::string port = std::to_string(port_), socket = unix_path(), directory = directory_.path();
    // Debian's redis-tools has the server's program under another name: it is what its own name says.
    const char* const words[] = {"redis-server",    "--port",       port.c_str(), "--bind", "127.0.0.1",
                                 "--unixsocket",    socket.c_str(), "--save",     "",       "--dir",
                                 directory.c_str(), "--logfile",    "redis.log",  nullptr};
    child_ = ::fork();
    if (child_ != 0)
      return;
    ::prctl(PR_SET_PDEATHSIG, SIGKILL);
    ::execv(KILN_REDIS_SERVER, const_cast<char* const*>(words));
    ::_exit(127);
  }

  TemporaryDirectory directory_;
  int port_ = 0;
  pid_t child_ = -1;
};

} // namespace kiln::test
