#include "bench/machine.h"

#include <sched.h>
#include <sys/mman.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <utility>

#include "bench/measure.h"

namespace kiln::bench {

std::string cpu_name() {
  std::ifstream cpuinfo("/proc/cpuinfo");
  for (std::string line; std::getline(cpuinfo, line);)
    if (line.starts_with("model name"))
      return line.substr(line.find(':') + 2);
  return "unknown";
}

std::vector<int> allowed_cpus() {
  cpu_set_t set;
  CPU_ZERO(&set);
  sched_getaffinity(0, sizeof set, &set);
  std::vector<int> cpus;
  for (int cpu = 0; cpu < CPU_SETSIZE; ++cpu)
    if (CPU_ISSET(cpu, &set))
      cpus.push_back(cpu);
  return cpus;
}

void pin_to(int cpu) {
  unpin({cpu});
}

void unpin(const std::vector<int>& cpus) {
  cpu_set_t set;
  CPU_ZERO(&set);
  for (const int cpu : cpus)
    CPU_SET(cpu, &set);
  sched_setaffinity(0, sizeof set, &set);
}

Team::Team(std::vector<int> cpus) : begin_(cpus.size()), end_(cpus.size()) {
  for (std::size_t member = 0; member < cpus.size(); ++member)
    threads_.emplace_back(&Team::serve, this, member, cpus[member]);
}

Team::~Team() {
  {
    std::lock_guard lock(mutex_);
    stop_ = true;
  }
  changed_.notify_all();
  for (std::thread& thread : threads_)
    thread.join();
}

double Team::run(const std::function<void(std::size_t)>& work) {
  std::unique_lock lock(mutex_);
  work_ = &work;
  done_ = 0;
  ready_ = 0;
  ++generation_;
  changed_.notify_all();
  changed_.wait(lock, [&] { return done_ == threads_.size(); });
  return *std::max_element(end_.begin(), end_.end()) - *std::min_element(begin_.begin(), begin_.end());
}

void Team::serve(std::size_t member, int cpu) {
  pin_to(cpu);
  std::size_t seen = 0;
  for (;;) {
    const std::function<void(std::size_t)>* work;
    {
      std::unique_lock lock(mutex_);
      changed_.wait(lock, [&] { return stop_ || generation_ != seen; });
      if (stop_)
        return;
      seen = generation_;
      work = work_;
    }
    ready_.fetch_add(1);
    while (ready_.load() < threads_.size()) {
    }
    begin_[member] = now();
    (*work)(member);
    end_[member] = now();
    std::lock_guard lock(mutex_);
    if (++done_ == threads_.size())
      changed_.notify_all();
  }
}

namespace {
constexpr std::size_t kHugePage = std::size_t{2} << 20;
}

HugeBuffer::HugeBuffer(std::size_t bytes) : bytes_(bytes), reserved_((bytes + kHugePage - 1) / kHugePage * kHugePage) {
  data_ = std::aligned_alloc(kHugePage, reserved_);
  if (data_ == nullptr) {
    std::fprintf(stderr, "bench: no memory for a buffer of %zu bytes\n", bytes);
    std::exit(1);
  }
  madvise(data_, reserved_, MADV_HUGEPAGE);
  std::memset(data_, 0, reserved_);
}

HugeBuffer::HugeBuffer(HugeBuffer&& other) noexcept
    : data_(std::exchange(other.data_, nullptr)), bytes_(other.bytes_), reserved_(other.reserved_) {}

HugeBuffer::~HugeBuffer() {
  std::free(data_);
}

void fill_random(const HugeBuffer& buffer, std::uint64_t seed) {
  std::uint64_t state = seed;
  const auto next = [&state] {
    std::uint64_t z = (state += 0x9E3779B97F4A7C15ull);
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9ull;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EBull;
    return z ^ (z >> 31);
  };
  std::size_t at = 0;
  for (; at + 8 <= buffer.size(); at += 8) {
    const std::uint64_t word = next();
    std::memcpy(buffer.as<char>() + at, &word, 8);
  }
  const std::uint64_t word = next();
  std::memcpy(buffer.as<char>() + at, &word, buffer.size() - at);
}

} // namespace kiln::bench
