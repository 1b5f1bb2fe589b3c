#include "cache/remote_url.h"

#include <arpa/inet.h>
#include <sys/un.h>

#include <algorithm>
#include <charconv>
#include <fmt/format.h>
#include <utility>

namespace kiln {
namespace {

constexpr std::string_view redis_scheme = "redis://", unix_scheme = "unix://", tls_scheme = "rediss://";
constexpr std::size_t most_host_bytes = 253; // of a name in the DNS (RFC 1035, 2.3.4)
constexpr std::size_t most_path_bytes = sizeof(sockaddr_un::sun_path) - 1;
constexpr std::size_t most_password_bytes = 512;

Status refused(std::string why) {
  return Status::error(Code::invalid_argument, std::move(why));
}

bool is_word(char c) {
  return (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || (c >= '0' && c <= '9') || c == '-' || c == '.' || c == '_';
}

/// Printable, and nothing that ends or escapes a path in a URL.
bool is_path_character(char c) {
  return c > 0x20 && c < 0x7f && c != '?' && c != '#' && c != '%' && c != '@';
}

/// Cuts off what stands before the first `mark`, and the mark; everything when it is not there.
std::string_view cut(std::string_view& text, char mark) {
  const std::string_view before = text.substr(0, text.find(mark));
  text.remove_prefix(std::min(before.size() + 1, text.size()));
  return before;
}

Status parse_integer(std::string_view name, std::string_view text, std::int32_t min, std::int32_t max,
                     std::int32_t& value) {
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
  if (error != std::errc() || end != text.data() + text.size() || value < min || value > max)
    return refused(fmt::format("its {} is no integer from {} to {}", name, min, max));
  return {};
}

bool percent_decode(std::string_view text, std::string& out) {
  out.clear();
  while (!text.empty()) {
    if (text.front() != '%') {
      out += text.front();
      text.remove_prefix(1);
      continue;
    }
    unsigned byte = 0;
    if (text.size() < 3 || std::from_chars(text.data() + 1, text.data() + 3, byte, 16).ptr != text.data() + 3)
      return false;
    out += static_cast<char>(byte);
    text.remove_prefix(3);
  }
  return true;
}

/// `[USER]:PASSWORD@` at the beginning, if there is one.
Status parse_credentials(std::string_view& rest, RemoteUrl& url) {
  const std::size_t at = rest.rfind('@');
  if (at == std::string_view::npos)
    return {};
  std::string_view password = rest.substr(0, at);
  rest.remove_prefix(at + 1);
  if (password.find(':') == std::string_view::npos)
    return refused("before its @ there is no ':'; allowed is :PASSWORD@ or USER:PASSWORD@");
  url.user = cut(password, ':');
  if (!std::all_of(url.user.begin(), url.user.end(), is_word))
    return refused("its user has characters other than letters, digits, '-', '.' and '_'");
  if (!percent_decode(password, url.password))
    return refused("its password has a % that no two hexadecimal digits follow: write %25");
  if (url.password.empty() || url.password.size() > most_password_bytes)
    return refused(
        fmt::format("its password has {} bytes; allowed are 1 to {}", url.password.size(), most_password_bytes));
  return {};
}

Status parse_host(std::string_view rest, RemoteUrl& url) {
  std::string_view host_and_port = cut(rest, '/');
  const std::string_view database = rest;
  std::string_view port;
  bool has_port = false;
  if (host_and_port.starts_with('[')) {
    host_and_port.remove_prefix(1);
    const std::size_t bracket = host_and_port.find(']');
    in6_addr unused;
    url.host = host_and_port.substr(0, bracket);
    if (bracket == std::string_view::npos || ::inet_pton(AF_INET6, url.host.c_str(), &unused) != 1)
      return refused("its host is no IPv6 address in brackets");
    port = host_and_port.substr(bracket + 1);
    if (!port.empty() && port.front() != ':')
      return refused("something else than :PORT follows its host");
    has_port = !port.empty();
    port.remove_prefix(has_port);
  } else {
    has_port = host_and_port.find(':') != std::string_view::npos;
    url.host = cut(host_and_port, ':');
    port = host_and_port;
    if (url.host.empty() || url.host.size() > most_host_bytes || url.host.front() == '-' ||
        !std::all_of(url.host.begin(), url.host.end(), is_word))
      return refused("its host is no name and no IP address (IPv6: in brackets)");
  }
  std::int32_t number = url.port;
  if (has_port)
    if (Status status = parse_integer("port", port, 1, 65535, number); !status)
      return status;
  url.port = static_cast<std::uint16_t>(number);
  return database.empty() ? Status() : parse_integer("database", database, 0, 65535, url.database);
}

Status parse_option(std::string_view option, RemoteUrl& url) {
  const std::string_view name = cut(option, '=');
  if (name == "db" && !url.path.empty())
    return parse_integer(name, option, 0, 65535, url.database);
  if (name == "timeout_ms")
    return parse_integer(name, option, 1, 1000, url.timeout_ms);
  if (name == "ttl_s")
    return parse_integer(name, option, 0, INT32_MAX, url.ttl_seconds);
  return refused(fmt::format("it has an unknown option; allowed are {}timeout_ms and ttl_s, joined by &",
                             url.path.empty() ? "" : "db, "));
}

} // namespace

Result<RemoteUrl> RemoteUrl::parse(std::string_view text) {
  if (text.starts_with(tls_scheme))
    return refused(
        "rediss:// (TLS) is not supported; allowed are redis:// and unix://. Rows are signed, so that nobody "
        "on the way can change one; where they or the password must not be read, use a tunnel (stunnel, a "
        "service mesh) and its local end");
  RemoteUrl url;
  const bool is_unix = text.starts_with(unix_scheme);
  if (!is_unix && !text.starts_with(redis_scheme))
    return refused("allowed is redis://[[USER]:PASSWORD@]HOST[:PORT][/DATABASE] or unix://[[USER]:PASSWORD@]/PATH");
  std::string_view rest = text.substr((is_unix ? unix_scheme : redis_scheme).size());
  if (Status status = parse_credentials(rest, url); !status)
    return status;
  std::string_view options = rest;
  const std::string_view place = cut(options, '?');
  if (is_unix) {
    url.path = place;
    if (!place.starts_with('/') || place.size() > most_path_bytes ||
        !std::all_of(place.begin(), place.end(), is_path_character))
      return refused(fmt::format("its path must be absolute, of at most {} printable characters without ? # % @",
                                 most_path_bytes));
  } else if (Status status = parse_host(place, url); !status) {
    return status;
  }
  while (!options.empty())
    if (Status status = parse_option(cut(options, '&'), url); !status)
      return status;
  return url;
}

std::string RemoteUrl::text() const {
  const std::string credentials = password.empty() ? "" : user + ":***@";
  const bool is_ipv6 = host.find(':') != std::string::npos;
  std::string out = !path.empty() ? fmt::format("unix://{}{}", credentials, path)
                                  : fmt::format("redis://{}{}{}{}:{}/{}", credentials, is_ipv6 ? "[" : "", host,
                                                is_ipv6 ? "]" : "", port, database);
  char mark = '?';
  const auto option = [&](std::string_view name, std::int32_t value, std::int32_t default_value) {
    if (value != default_value)
      out += fmt::format("{}{}={}", std::exchange(mark, '&'), name, value);
  };
  const RemoteUrl defaults;
  if (!path.empty())
    option("db", database, defaults.database);
  option("timeout_ms", timeout_ms, defaults.timeout_ms);
  option("ttl_s", ttl_seconds, defaults.ttl_seconds);
  return out;
}

} // namespace kiln
