#pragma once
#include <array>
#include <atomic>
#include <cstdint>
#include <mutex>
#include <string>
#include <vector>

#include "cache/status.h"
#include "jit/cuda/driver.h"
#include "jit/cuda/launch_plan.h"

namespace kiln::cuda {

/// The kernels of one cubin on one device, in every context that launches them: a CUlibrary (CUDA 12.0 and later),
/// which serves all contexts, else a CUmodule a context. Thread-safe, lives as long as the process.
///
/// With modules a context that the host destroys takes its module along; Kiln cannot see that: a host with such a
/// driver must not launch in a new context at the same address. Libraries have no such limit.
class Module {
public:
  static constexpr std::size_t kMostEntries = 4;

  static Result<std::unique_ptr<Module>> load(Driver& driver, const CodeObject& cubin, int device_index);
  ~Module(); ///< only of one that nobody has seen
  Module(const Module&) = delete;
  Module& operator=(const Module&) = delete;

  Driver& driver() const { return driver_; }
  const DeviceInfo& device() const { return *device_; }
  int device_index() const { return device_index_; }

  /// Makes the kernels ready in this context, which is current, so that launching loads nothing. For a stream that is
  /// capturing, Code::busy instead of loading. Cheap and without a lock when they are ready.
  struct Ready {
    std::array<CUfunction, kMostEntries> functions{}; ///< of this context
    std::array<CUfunction, kMostEntries>
        launchable{}; ///< what to launch: a CUkernel, which outlives contexts, if it can be
  };
  Result<Ready> ready(CUcontext context, CUstream stream);

  /// Bytes of local memory (spills) and registers of an entry; the context of a Ready must be current.
  Result<int> attribute(const Ready& ready, std::size_t entry, int attribute) const;

private:
  Module(Driver& driver, int device_index);

  Driver& driver_;
  int device_index_;
  const DeviceInfo* device_;
  std::vector<std::string> entries_;
  Bytes image_;        ///< for contexts to come, where there are no libraries
  int smem_bytes_ = 0; ///< dynamic shared memory that the plan asks for
  CUlibrary library_ = nullptr;
  std::array<CUkernel, kMostEntries> kernels_{};

  /// Contexts in which the kernels are ready: appended under the mutex, read without.
  struct Place {
    CUcontext context = nullptr;
    Ready ready;
    CUmodule module = nullptr;
    Place* next = nullptr; ///< an older one
  };
  std::atomic<Place*> places_{nullptr};
  std::mutex mutex_;
};

/// Launches entry `index` on the stream; parameters point to the kernel's, in order. The context of `ready` is current.
Status launch(const Module& module, const Module::Ready& ready, std::size_t index, LaunchPlan::Grid grid, int threads,
              int smem_bytes, int cluster_x, CUstream stream, void** parameters);

} // namespace kiln::cuda
