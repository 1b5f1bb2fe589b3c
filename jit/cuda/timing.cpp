#include "jit/cuda/timing.h"

#include <algorithm>
#include <cstring>

namespace kiln::cuda {
namespace {

/// Times the L2 cache: then what is left of it after as many bytes were written is little.
constexpr std::uint64_t kFlushes = 3;

/// What one measurement holds of the driver.
class Stopwatch {
public:
  explicit Stopwatch(Driver& driver) : driver_(driver), api_(driver.api()) {}
  Stopwatch(const Stopwatch&) = delete;
  Stopwatch& operator=(const Stopwatch&) = delete;
  ~Stopwatch() {
    for (const CUevent event : {begin_, end_})
      if (event != nullptr)
        static_cast<void>(api_.cuEventDestroy(event));
    if (stream_ != nullptr)
      static_cast<void>(api_.cuStreamDestroy(stream_));
  }
  /// With the context current.
  Status start(int device_index) {
    if (api_.cuEventCreate == nullptr || api_.cuEventRecord == nullptr || api_.cuEventElapsedTime == nullptr ||
        api_.cuEventDestroy == nullptr || api_.cuStreamCreate == nullptr || api_.cuStreamDestroy == nullptr)
      return Status::error(Code::unsupported, "this driver has no events to time with");
    if (Status s = driver_.status(api_.cuStreamCreate(&stream_, CU_STREAM_NON_BLOCKING), "cuStreamCreate"); !s)
      return s;
    for (CUevent* event : {&begin_, &end_})
      if (Status s = driver_.status(api_.cuEventCreate(event, 0), "cuEventCreate"); !s)
        return s;
    const Result<const DeviceInfo*> info = driver_.device(device_index);
    if (!info)
      return info.status();
    int l2_bytes = 0;
    if (Status s =
            driver_.status(api_.cuDeviceGetAttribute(&l2_bytes, CU_DEVICE_ATTRIBUTE_L2_CACHE_SIZE, (*info)->device),
                           "cuDeviceGetAttribute");
        !s)
      return s;
    Result<Buffer> flush =
        Buffer::allocate(driver_, device_index, kFlushes * static_cast<std::uint64_t>(std::max(l2_bytes, 1)));
    if (!flush)
      return flush.status();
    flush_ = std::move(*flush);
    return {};
  }
  Result<double> microseconds(const StreamWork& work) {
    const auto flush = [&] {
      return driver_.status(api_.cuMemsetD8Async(flush_.address(), 0, flush_.bytes(), stream_), "cuMemsetD8Async");
    };
    const auto record = [&](CUevent event) {
      return driver_.status(api_.cuEventRecord(event, stream_), "cuEventRecord");
    };
    if (Status s = flush(); !s)
      return s;
    if (Status s = record(begin_); !s)
      return s;
    if (Status s = work(stream_); !s)
      return s;
    if (Status s = record(end_); !s)
      return s;
    if (Status s = driver_.status(api_.cuStreamSynchronize(stream_), "cuStreamSynchronize"); !s)
      return s;
    float milliseconds = 0;
    if (Status s = driver_.status(api_.cuEventElapsedTime(&milliseconds, begin_, end_), "cuEventElapsedTime"); !s)
      return s;
    return 1e3 * static_cast<double>(milliseconds);
  }

private:
  Driver& driver_;
  const Api& api_;
  CUstream stream_ = nullptr;
  CUevent begin_ = nullptr, end_ = nullptr;
  Buffer flush_;
};

} // namespace

Result<std::vector<double>> time_on_device(Driver& driver, int device_index, std::span<const StreamWork> works,
                                           int rounds) {
  const Result<ContextScope> scope = ContextScope::enter(driver, device_index, nullptr);
  if (!scope)
    return scope.status();
  Stopwatch stopwatch(driver);
  if (Status s = stopwatch.start(device_index); !s)
    return s;
  std::vector<std::vector<double>> times(works.size());
  for (int round = -1; round < rounds; ++round) // the first does not count
    for (std::size_t i = 0; i < works.size(); ++i) {
      const Result<double> time = stopwatch.microseconds(works[i]);
      if (!time)
        return time.status();
      if (round >= 0)
        times[i].push_back(*time);
    }
  std::vector<double> medians;
  for (std::vector<double>& all : times) {
    const auto middle = all.begin() + std::ssize(all) / 2;
    std::nth_element(all.begin(), middle, all.end());
    medians.push_back(*middle);
  }
  return medians;
}

Result<Buffer> filled_buffer(Driver& driver, int device_index, std::int64_t bytes,
                             std::span<const std::uint8_t> pattern) {
  Result<Buffer> buffer =
      Buffer::allocate(driver, device_index, static_cast<std::uint64_t>(std::max<std::int64_t>(bytes, 16)));
  if (!buffer || pattern.empty())
    return buffer;
  for (std::uint64_t at = 0; at < buffer->bytes(); at += pattern.size())
    if (Status s = buffer->write(pattern.data(), std::min<std::uint64_t>(pattern.size(), buffer->bytes() - at), at); !s)
      return s;
  return buffer;
}

std::vector<std::uint8_t> random_pattern(std::uint8_t mask) {
  std::vector<std::uint8_t> values(1 << 20);
  std::uint32_t random = 1;
  for (std::uint8_t& value : values) {
    random = random * 1664525 + 1013904223; // Numerical Recipes, "An Even Quicker Generator"
    value = static_cast<std::uint8_t>(random >> 24) & mask;
  }
  return values;
}

std::vector<std::uint8_t> float_pattern(float value) {
  std::vector<std::uint8_t> bytes(1 << 20);
  for (std::size_t at = 0; at < bytes.size(); at += sizeof value)
    std::memcpy(bytes.data() + at, &value, sizeof value);
  return bytes;
}

} // namespace kiln::cuda
