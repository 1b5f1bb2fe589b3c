#include "cache/redis.h"

#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <sys/socket.h>
#include <sys/types.h>

#include <algorithm>
#include <cerrno>
#include <charconv>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <fmt/format.h>
#include <hiredis/hiredis.h>
#include <new>
#include <vector>

#include "cache/remote_row.h"

namespace kiln {
namespace {

using Clock = RedisConnection::Clock;

/// Of a reply that is no bulk string: a server's message is a line.
constexpr std::size_t most_line_bytes = 4096;
/// Of a bulk string's first line there are fewer: its length.
constexpr std::size_t most_head_bytes = 32;
/// Reads after the deadline, of at most 16 KiB each: together more than most rows have.
constexpr int most_late_reads = 4;

// ---------------------------------------------------------------- hiredis's parser

// hiredis builds replies by these functions. Null, which it takes for a lack of memory, ends it.

void* new_reply(RedisReply reply) {
  return new (std::nothrow) RedisReply(std::move(reply));
}

void* create_string(const redisReadTask* task, char* bytes, std::size_t size) try {
  const auto kind = task->type == REDIS_REPLY_STATUS  ? RedisReply::Kind::status
                    : task->type == REDIS_REPLY_ERROR ? RedisReply::Kind::error
                                                      : RedisReply::Kind::bulk;
  return new_reply({kind, std::string(bytes, size), 0});
} catch (const std::exception&) { // C code is between here and whoever could catch it
  return nullptr;
}

/// Before anything of an array's promised size is allocated, or a nested one begun.
void* create_array(const redisReadTask*, int) {
  return nullptr;
}

void* create_integer(const redisReadTask*, long long value) {
  return new_reply({RedisReply::Kind::integer, {}, value});
}

void* create_nil(const redisReadTask*) {
  return new_reply({});
}

void free_reply(void* reply) {
  delete static_cast<RedisReply*>(reply);
}

redisReplyObjectFunctions reply_functions = {create_string, create_array, create_integer, create_nil, free_reply};

Status no_reply(std::string_view why) {
  return Status::error(Code::integrity, fmt::format("its answer is not Redis's: {}", why));
}

// ---------------------------------------------------------------- sockets

Status time_is_over(const char* doing) {
  return Status::error(Code::busy, fmt::format("it did not {} in time", doing));
}

Status failed_to(const char* doing, int error) {
  return Status::error(Code::io, fmt::format("cannot {}: {}", doing, std::strerror(error)));
}

/// Waits until the socket is ready for `events`, or has failed. False when the time is over; a last look is taken all
/// the same: the time may have gone by while this thread was not scheduled.
bool wait_until_ready(int socket, short events, RedisConnection::Deadline deadline) {
  for (;;) {
    const auto left = std::max<std::chrono::nanoseconds>(deadline - Clock::now(), std::chrono::nanoseconds(0));
    const timespec timeout = {static_cast<time_t>(left.count() / 1'000'000'000),
                              static_cast<long>(left.count() % 1'000'000'000)};
    pollfd one = {socket, events, 0};
    const int ready = ::ppoll(&one, 1, &timeout, nullptr);
    if (ready > 0 || (ready < 0 && errno != EINTR))
      return true; // what is wrong, the next call on the socket says
    if (ready == 0 || left.count() == 0)
      return false;
  }
}

/// One command, as the protocol has it.
void append_command(std::string& out, std::span<const std::string_view> words) {
  std::vector<const char*> pointers;
  std::vector<std::size_t> sizes;
  for (const std::string_view word : words) {
    pointers.push_back(word.data());
    sizes.push_back(word.size());
  }
  char* text = nullptr;
  const int size = ::redisFormatCommandArgv(&text, static_cast<int>(words.size()), pointers.data(), sizes.data());
  if (size < 0)
    throw std::bad_alloc();
  const std::unique_ptr<char, decltype(&std::free)> owner(text, &std::free);
  out.append(text, static_cast<std::size_t>(size));
}

} // namespace

void RedisReplyParser::Free::operator()(redisReader* reader) const {
  ::redisReaderFree(reader);
}

RedisReplyParser::RedisReplyParser(std::size_t most_bytes)
    : reader_(::redisReaderCreateWithFunctions(&reply_functions)), most_bytes_(most_bytes) {
  if (!reader_)
    throw std::bad_alloc();
}

Status RedisReplyParser::feed(std::string_view bytes) {
  head_ += bytes.substr(0, most_head_bytes - std::min(head_.size(), most_head_bytes));
  pending_bytes_ += bytes.size();
  if (Status status = check_pending(); !status)
    return status;
  if (::redisReaderFeed(reader_.get(), bytes.data(), bytes.size()) != REDIS_OK)
    return no_reply(reader_->errstr);
  return {};
}

/// Before hiredis looks at it.
Status RedisReplyParser::check_pending() const {
  std::size_t promised = 0;
  const std::size_t line_end = head_.find('\n');
  const bool is_bulk = head_.starts_with('$') && line_end != std::string::npos;
  if (is_bulk) // what is no number, hiredis says
    (void)std::from_chars(head_.data() + 1, head_.data() + line_end, promised);
  const std::size_t most = is_bulk ? most_bytes_ : std::min(most_bytes_, most_line_bytes);
  if (promised > most_bytes_ || pending_bytes_ > most)
    return no_reply(fmt::format("it has more than {} bytes", most));
  return {};
}

Result<std::optional<RedisReply>> RedisReplyParser::next() {
  void* reply = nullptr;
  if (::redisReaderGetReply(reader_.get(), &reply) != REDIS_OK)
    return no_reply(reader_->err == REDIS_ERR_OOM ? "it is an array, or there is no memory for it" : reader_->errstr);
  if (reply == nullptr)
    return std::optional<RedisReply>();
  const std::unique_ptr<RedisReply> owner(static_cast<RedisReply*>(reply));
  pending_bytes_ = reader_->len - reader_->pos;
  head_.assign(reader_->buf + reader_->pos, std::min(pending_bytes_, most_head_bytes));
  return std::optional(std::move(*owner));
}

bool RedisReplyParser::is_empty() const {
  return pending_bytes_ == 0;
}

RedisConnection::RedisConnection(ProcessDescriptor socket, const RemoteUrl& url)
    : socket_(std::move(socket)), parser_(RemoteRowLimits::bytes + most_line_bytes) {
  const auto add = [&](std::initializer_list<std::string_view> words) {
    append_command(preamble_, words);
    ++preamble_replies_;
  };
  if (!url.user.empty())
    add({"AUTH", url.user, url.password});
  else if (!url.password.empty())
    add({"AUTH", url.password});
  if (url.database != 0)
    add({"SELECT", std::to_string(url.database)});
}

Result<RedisConnection> RedisConnection::open(const SocketAddress& address, const RemoteUrl& url, Deadline deadline) {
  ProcessDescriptor socket = ProcessDescriptor::make(
      [&] { return ::socket(address.storage.ss_family, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0); });
  if (!socket)
    return failed_to("make a socket", errno);
  if (address.storage.ss_family != AF_UNIX) {
    const int on = 1;
    (void)::setsockopt(socket.get(), IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
  }
  int error = 0;
  if (::connect(socket.get(), reinterpret_cast<const sockaddr*>(&address.storage), address.bytes) != 0) {
    error = errno;
    if (error == EINPROGRESS || error == EINTR) {
      if (!wait_until_ready(socket.get(), POLLOUT, deadline))
        return time_is_over("connect");
      socklen_t size = sizeof error;
      if (::getsockopt(socket.get(), SOL_SOCKET, SO_ERROR, &error, &size) != 0)
        error = errno;
    }
  }
  if (error != 0)
    return failed_to("connect", error); // EAGAIN: too many wait at the unix socket already
  return RedisConnection(std::move(socket), url);
}

Status RedisConnection::send(std::string_view bytes, Deadline deadline) const {
  while (!bytes.empty()) {
    const ssize_t sent = ::send(socket_.get(), bytes.data(), bytes.size(), MSG_NOSIGNAL | MSG_DONTWAIT);
    if (sent >= 0)
      bytes.remove_prefix(static_cast<std::size_t>(sent));
    else if (errno != EAGAIN && errno != EWOULDBLOCK && errno != EINTR)
      return failed_to("send", errno);
    else if (!wait_until_ready(socket_.get(), POLLOUT, deadline))
      return time_is_over("take the command");
  }
  return {};
}

Result<RedisReply> RedisConnection::receive(Deadline deadline) {
  char buffer[16 << 10];
  // What has come in time is read, also when the time is over; not what a server sends on and on.
  for (int late_reads = 0;;) {
    Result<std::optional<RedisReply>> reply = parser_.next();
    if (!reply)
      return reply.status();
    if (*reply)
      return std::move(**reply);
    if (late_reads > most_late_reads || !wait_until_ready(socket_.get(), POLLIN, deadline))
      return time_is_over("answer");
    const ssize_t size = ::recv(socket_.get(), buffer, sizeof buffer, MSG_DONTWAIT);
    if (size == 0)
      return Status::error(Code::io, "it closed the connection");
    if (size < 0 && errno != EAGAIN && errno != EWOULDBLOCK && errno != EINTR)
      return failed_to("receive", errno);
    if (size > 0)
      if (Status status = parser_.feed({buffer, static_cast<std::size_t>(size)}); !status)
        return status;
    late_reads += Clock::now() >= deadline;
  }
}

Result<RedisReply> RedisConnection::call(std::span<const std::string_view> words, Deadline deadline) {
  failed_ = true; // until it is known better, however this ends
  std::string command = std::exchange(preamble_, {});
  append_command(command, words);
  if (Status status = send(command, deadline); !status)
    return status;
  for (; preamble_replies_ > 0; --preamble_replies_) {
    const Result<RedisReply> reply = receive(deadline);
    if (!reply)
      return reply;
    if (reply->kind == RedisReply::Kind::error)
      return Status::error(Code::io, fmt::format("it refuses the URL's credentials or database: {}", reply->shown()));
    if (reply->kind != RedisReply::Kind::status)
      return no_reply("neither yes nor no to the URL's credentials or database");
  }
  Result<RedisReply> reply = receive(deadline);
  failed_ = !reply;
  return reply;
}

bool RedisConnection::is_usable() const {
  char byte;
  return !failed_ && parser_.is_empty() && socket_.is_ours() &&
         ::recv(socket_.get(), &byte, 1, MSG_PEEK | MSG_DONTWAIT) < 0 && (errno == EAGAIN || errno == EWOULDBLOCK);
}

} // namespace kiln
