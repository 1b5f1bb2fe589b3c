#pragma once
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

} // namespace kiln::cuda
