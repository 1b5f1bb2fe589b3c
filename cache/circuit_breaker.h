#pragma once
#include <algorithm>
#include <chrono>

namespace kiln {

/// Leaves alone what does not work, for a time that grows while it keeps failing.
///
///                     a call works: failures are forgotten
///            ┌───────────────────────────────────────────────────────┐
///            ▼                                                       │
///         closed ── calls go out; `tolerated` + 1 fail in a row ──▶ open ── the pause is over ──▶ half open
///                                                                    ▲                               │
///                                                                    │   one call goes out as a      │
///                                                                    └── trial, the others do not; ──┘
///                                                                        it fails: twice the pause
///
/// One failure is tolerated: a thread that is not scheduled for some milliseconds sees a time-out that nobody else has
/// caused. The caller guards the breaker by a mutex, and tells of every call that it admitted how that ended.
class CircuitBreaker {
public:
  using Clock = std::chrono::steady_clock;
  static constexpr int tolerated = 1;
  static constexpr std::chrono::seconds first_pause{1}, longest_pause{300};

  bool is_closed() const { return pause_ == std::chrono::seconds(0); }
  /// When a trial may go out; in the past while closed.
  Clock::time_point open_until() const { return open_until_; }
  bool admits(Clock::time_point now) const { return is_closed() || (now >= open_until_ && !trying_); }

  /// A call that was admitted goes out.
  void begin() { trying_ = !is_closed(); }
  void worked() { *this = CircuitBreaker(); }
  void failed(Clock::time_point now) {
    if (is_closed() && ++failures_ <= tolerated)
      return;
    open(now);
  }
  /// At once. A call that was under way already when another one opened it changes nothing.
  void open(Clock::time_point now) {
    trying_ = false;
    if (!is_closed() && now < open_until_)
      return;
    pause_ = is_closed() ? first_pause : std::min(2 * pause_, longest_pause);
    open_until_ = now + pause_;
  }
  /// The call ended in a way that tells nothing.
  void abandoned() { trying_ = false; }

private:
  int failures_ = 0;              ///< in a row, while closed
  std::chrono::seconds pause_{0}; ///< 0: closed
  Clock::time_point open_until_ = Clock::time_point::min();
  bool trying_ = false;
};

} // namespace kiln
