#pragma once
#include <cstdint>
#include <string>
#include <string_view>

#include "cache/status.h"

namespace kiln {

/// Where a remote tier is, as a value:
///   redis://[[USER]:PASSWORD@]HOST[:PORT][/DATABASE][?OPTIONS]
///   unix://[[USER]:PASSWORD@]/PATH[?OPTIONS]
/// OPTIONS are NAME=VALUE joined by &: `db` (of a unix socket), `timeout_ms`, `ttl_s`. The password is percent-decoded.
struct RemoteUrl {
  std::string host;             ///< a name, an IPv4 address, or an IPv6 address (in brackets in the text); empty: path
  std::uint16_t port = 6379;    ///< of the host
  std::string path;             ///< absolute, of a unix socket
  std::string user, password;   ///< empty: none
  std::int32_t database = 0;    ///< 0 to 65535
  std::int32_t timeout_ms = 3;  ///< for one look, from finding the host to the last byte; 1 to 1000
  std::int32_t ttl_seconds = 0; ///< how long a row that is written lives; 0: until Redis evicts it

  /// Code::invalid_argument says what is wrong, and quotes nothing: any part may be a password in the wrong place.
  static Result<RemoteUrl> parse(std::string_view text);
  /// In its one form, `***` in the place of the password.
  std::string text() const;

  bool operator==(const RemoteUrl&) const = default;
};

} // namespace kiln
