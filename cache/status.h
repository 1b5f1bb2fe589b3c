#pragma once
#include <cassert>
#include <cstdint>
#include <memory>
#include <string>
#include <string_view>
#include <utility>
#include <variant>

namespace kiln {

/// What went wrong, in the classes a host can act on. The C API's `kiln_status` has the same values.
enum class Code : std::uint8_t {
  ok = 0,
  invalid_argument, ///< the caller gave something that is never allowed; the message names it, its value and what is
                    ///< allowed
  unsupported,      ///< valid, but nothing on this machine (or under the present toggles) can do it
  not_found,        ///< a key, file or entry does not exist
  out_of_memory,
  io,             ///< file system or database trouble
  integrity,      ///< bytes that fail authentication, a damaged file
  compile_failed, ///< a generator refused or failed
  busy,           ///< a lock or a compile in progress was not available in time
  miss,           ///< KILN_MISS=error and the kernel is not cached
  internal,       ///< a defect of Kiln
};

std::string_view name_of(Code code);

/// A value: ok, or a code with a message. A message says what was given and what is allowed.
/// An ok status is a null pointer: it passes through several layers on the path of every call.
class [[nodiscard]] Status {
public:
  Status() = default;
  bool is_ok() const { return error_ == nullptr; }
  explicit operator bool() const { return is_ok(); }
  Code code() const { return error_ ? error_->code : Code::ok; }
  const std::string& message() const; ///< empty when ok

  /// Every error of Kiln is made here: a natural breakpoint. What the message quotes may hold any bytes: it is made
  /// readable (cache/readable.h).
  static Status error(Code code, std::string_view message);

private:
  struct Error {
    Code code;
    std::string message;
  };
  std::shared_ptr<const Error> error_;
};

/// A T, or the Status that says why there is none (never an ok Status).
template <class T> class [[nodiscard]] Result {
public:
  Result(T value) : state_(std::in_place_index<1>, std::move(value)) {}
  Result(Status error) : state_(std::in_place_index<0>, std::move(error)) { assert(!std::get<0>(state_).is_ok()); }

  explicit operator bool() const { return state_.index() == 1; }
  bool is_ok() const { return state_.index() == 1; }
  T& operator*() { return std::get<1>(state_); }
  const T& operator*() const { return std::get<1>(state_); }
  T* operator->() { return &std::get<1>(state_); }
  const T* operator->() const { return &std::get<1>(state_); }
  /// Requires !is_ok().
  const Status& status() const { return std::get<0>(state_); }

private:
  std::variant<Status, T> state_;
};

} // namespace kiln
