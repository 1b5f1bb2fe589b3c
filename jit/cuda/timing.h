#pragma once
#include <cstdint>
#include <functional>
#include <span>
#include <vector>

#include "cache/status.h"
#include "jit/cuda/driver.h"

namespace kiln::cuda {

/// Work that is put on a stream.
using StreamWork = std::function<Status(CUstream)>;

/// Microseconds that each work takes on the device: medians by events over `rounds` turns, in which every work has its
/// own, so that a clock that drifts meets all alike. The L2 cache is flushed before each. Runs on a stream of its own
/// and waits. Not in a capture. The first status that is not Code::ok ends it.
Result<std::vector<double>> time_on_device(Driver& driver, int device_index, std::span<const StreamWork> works,
                                           int rounds);

/// Of problems to time: device memory of at least 16 bytes that has `pattern` again and again, or with an empty one
/// whatever it had. Waits until it is there.
Result<Buffer> filled_buffer(Driver& driver, int device_index, std::int64_t bytes,
                             std::span<const std::uint8_t> pattern = {});
/// A pattern for it, 1 MiB: random bytes without the bits that `mask` lacks, the same always. What multiplies zeros
/// draws less power, and runs at a higher clock.
std::vector<std::uint8_t> random_pattern(std::uint8_t mask = 0xFF);
/// A pattern of one f32.
std::vector<std::uint8_t> float_pattern(float value);

} // namespace kiln::cuda
