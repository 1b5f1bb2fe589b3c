#pragma once
#include <algorithm>
#include <chrono>

namespace kiln {

/// Leaves alone what does not work, for a time that grows while it keeps failing.
///
///            ┌── a call works ──┐
///            ▼                  │
///         closed ──────────── calls go out
///            │  ▲
///    a call  │  │ the trial works
///    fails   ▼  │
///          open ── the pause is over ──▶ half open ── one call goes out as a trial, the others do not
///            ▲                              │
///            └──── the trial fails: twice the pause, up to the longest ──┘
///
/// The caller guards it by a mutex, and tells of every call that it admitted how that ended.
class CircuitBreaker {
public:
  using Clock = std::chrono::steady_clock;
  static constexpr std::chrono::seconds first_pause{1}, longest_pause{300};

  bool is_closed() const { return pause_ == std::chrono::seconds(0); }
  /// When a trial may go out; in the past while closed.
  Clock::time_point open_until() const { return open_until_; }
  bool admits(Clock::time_point now) const { return is_closed() || (now >= open_until_ && !trying_); }

  /// A call that was admitted goes out.
  void begin() { trying_ = !is_closed(); }
  void worked() { *this = CircuitBreaker(); }
  /// One that was under way already when another one failed changes nothing.
  void failed(Clock::time_point now) {
    trying_ = false;
    if (!is_closed() && now < open_until_)
      return;
    pause_ = is_closed() ? first_pause : std::min(2 * pause_, longest_pause);
    open_until_ = now + pause_;
  }
  /// It ended in a way that tells nothing.
  void abandoned() { trying_ = false; }

private:
  std::chrono::seconds pause_{0}; ///< 0: closed
  Clock::time_point open_until_ = Clock::time_point::min();
  bool trying_ = false;
};

} // namespace kiln
