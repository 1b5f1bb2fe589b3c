#pragma once
#include <atomic>
#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

/// What the benches need of the machine: its name, pinned threads, memory on huge pages.
namespace kiln::bench {

std::string cpu_name();          ///< as the system names it
std::vector<int> allowed_cpus(); ///< that this process may run on

/// Keeps the calling thread on `cpu`; threads it makes meanwhile stay there too.
void pin_to(int cpu);
/// Lets the calling thread run on all of `cpus` again.
void unpin(const std::vector<int>& cpus);

/// Pinned threads for calibrations. They sleep between runs; a run's time begins when all of them are awake.
class Team {
public:
  explicit Team(std::vector<int> cpus);
  ~Team();
  Team(const Team&) = delete;
  Team& operator=(const Team&) = delete;

  std::size_t size() const { return threads_.size(); }
  /// Runs work(member) on every member; returns the seconds from the moment that all were ready to the end of the last.
  double run(const std::function<void(std::size_t member)>& work);

private:
  void serve(std::size_t member, int cpu);

  std::mutex mutex_;
  std::condition_variable changed_;
  const std::function<void(std::size_t)>* work_ = nullptr;
  std::size_t generation_ = 0, done_ = 0;
  bool stop_ = false;
  std::vector<double> begin_, end_;
  std::atomic<std::size_t> ready_{0};
  std::vector<std::thread> threads_;
};

/// Zeroed memory on huge pages where the system has them, so that no side of a comparison pays for address translation.
class HugeBuffer {
public:
  explicit HugeBuffer(std::size_t bytes);
  HugeBuffer(HugeBuffer&& other) noexcept;
  HugeBuffer& operator=(HugeBuffer&&) = delete;
  ~HugeBuffer();

  std::size_t size() const { return bytes_; }
  template <class T> T* as() const { return static_cast<T*>(data_); }

private:
  void* data_;
  std::size_t bytes_, reserved_;
};

/// Bytes from a seeded generator (splitmix64): no pattern that a power-saving multiplier could profit from.
void fill_random(const HugeBuffer& buffer, std::uint64_t seed);

} // namespace kiln::bench
