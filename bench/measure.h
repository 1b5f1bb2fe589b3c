#pragma once
#include <algorithm>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <span>
#include <string>
#include <thread>
#include <utility>
#include <vector>

/// Measuring on a machine whose clock drifts and whose neighbours come and go: everything that is compared runs in
/// turns, round by round, and a ratio is taken within each round. Best and median of the rounds are both kept.
namespace kiln::bench {

inline double now() { // seconds
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

/// One side of a comparison. `run(calls)` works that many times and returns the seconds it took, without what is not
/// its own (the waking of a calibration's threads).
struct Contender {
  std::string name;
  std::function<double(int calls)> run;
};

/// A contender that is timed from outside.
template <class Call> Contender timed(std::string name, Call call) {
  return {std::move(name), [call](int calls) {
            const double begin = now();
            for (int i = 0; i < calls; ++i)
              call();
            return now() - begin;
          }};
}

/// Seconds per call, one sample a round.
struct Series {
  std::string name;
  std::vector<double> seconds;

  double best() const { return *std::min_element(seconds.begin(), seconds.end()); }
  double median() const { return quantile(seconds, 0.5); }

  static double quantile(std::vector<double> values, double q) {
    const auto at = values.begin() + static_cast<std::ptrdiff_t>(q * static_cast<double>(values.size() - 1) + 0.5);
    std::nth_element(values.begin(), at, values.end());
    return *at;
  }
};

/// Median over the rounds of a's time / b's time in the same round: above 1, b is the faster.
inline double time_ratio(const Series& a, const Series& b) {
  std::vector<double> ratios;
  for (std::size_t i = 0; i < a.seconds.size(); ++i)
    ratios.push_back(a.seconds[i] / b.seconds[i]);
  return Series::quantile(std::move(ratios), 0.5);
}

struct RaceOptions {
  int rounds = 25;
  double sample_seconds = 2e-3; ///< least length of a sample
  double settle_seconds = 0;    ///< pause before each contender, for thread pools that spin a while after their work
  std::function<void(int round)> on_round; ///< before each round, untimed
};

/// The slower of the two in each round: a limit made of two.
inline Series slower(std::string name, const Series& a, const Series& b) {
  Series out{std::move(name), a.seconds};
  for (std::size_t i = 0; i < out.seconds.size(); ++i)
    out.seconds[i] = std::max(out.seconds[i], b.seconds[i]);
  return out;
}

inline Series scaled(Series series, double factor) {
  for (double& seconds : series.seconds)
    seconds *= factor;
  return series;
}

/// Runs the contenders in turns. Before each sample a contender runs untimed, so that it finds its own data in the
/// caches.
inline std::vector<Series> race(std::span<const Contender> contenders, const RaceOptions& options) {
  std::vector<Series> series;
  std::vector<int> calls;
  for (const Contender& contender : contenders) {
    contender.run(1);
    double seconds = contender.run(1);
    int n = 1;
    while (seconds < options.sample_seconds && n < 1 << 24) {
      n = seconds < options.sample_seconds / 100
              ? n * 10
              : std::max(n + 1, static_cast<int>(n * options.sample_seconds / seconds * 1.1));
      seconds = contender.run(n);
    }
    calls.push_back(n);
    series.push_back({contender.name, {}});
  }
  for (int round = 0; round < options.rounds; ++round) {
    if (options.on_round)
      options.on_round(round);
    for (std::size_t i = 0; i < contenders.size(); ++i) {
      const std::size_t turn =
          (i + static_cast<std::size_t>(round)) % contenders.size(); // nobody always follows the same
      if (options.settle_seconds > 0)
        std::this_thread::sleep_for(std::chrono::duration<double>(options.settle_seconds));
      contenders[turn].run(std::max(3, calls[turn] / 4));
      series[turn].seconds.push_back(contenders[turn].run(calls[turn]) / calls[turn]);
    }
  }
  return series;
}

} // namespace kiln::bench
