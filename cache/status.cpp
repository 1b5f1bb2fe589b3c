#include "cache/status.h"

#include "cache/readable.h"

namespace kiln {

std::string_view name_of(Code code) {
  switch (code) {
  case Code::ok:
    return "ok";
  case Code::invalid_argument:
    return "invalid_argument";
  case Code::unsupported:
    return "unsupported";
  case Code::not_found:
    return "not_found";
  case Code::out_of_memory:
    return "out_of_memory";
  case Code::io:
    return "io";
  case Code::integrity:
    return "integrity";
  case Code::compile_failed:
    return "compile_failed";
  case Code::busy:
    return "busy";
  case Code::miss:
    return "miss";
  case Code::internal:
    return "internal";
  }
  return "unknown";
}

const std::string& Status::message() const {
  static const std::string none;
  return error_ ? error_->message : none;
}

Status Status::error(Code code, std::string_view message) {
  assert(code != Code::ok);
  Status status;
  status.error_ = std::make_shared<const Error>(Error{code, readable(message)});
  return status;
}

} // namespace kiln
