#pragma once
#include <cstdint>
#include <functional>
#include <map>
#include <mutex>
#include <set>
#include <string>
#include <vector>

#include "jit/cuda/api.h"

/// A libcuda.so.1 without a GPU: the entry points that Kiln uses, over host memory. It records calls, fails when told,
/// and runs a host function in a kernel's place. Tests open it by its path (EngineOptions::cuda_library), the command
/// finds it through LD_LIBRARY_PATH.
namespace kiln::test::fake_cuda {

struct Device {
  std::string name = "Fake H100";
  int major = 9, minor = 0, sms = 4, shared_optin = 232448;
};

struct Launch {
  std::string kernel; ///< entry's name
  unsigned grid[3] = {}, threads = 0, shared_bytes = 0, cluster_x = 0;
  cuda::CUstream stream = nullptr;
  cuda::CUcontext context = nullptr;
  bool captured = false;
};

/// What a map of the fake's cuTensorMapEncodeTiled holds: what it was made of.
struct TensorMapContent {
  std::uint64_t address = 0, extents[3] = {}, strides[2] = {};
  std::uint32_t box[3] = {};
  std::uint8_t element = 0, swizzle = 0, l2_promotion = 0;

  /// Where {column, row, plane} lies; null outside.
  template <class T> T* at(std::uint64_t column, std::uint64_t row, std::uint64_t plane) const {
    if (column >= extents[0] || row >= extents[1] || plane >= extents[2])
      return nullptr;
    return reinterpret_cast<T*>(address + column * sizeof(T) + row * strides[0] + plane * strides[1]);
  }
};
static_assert(sizeof(TensorMapContent) <= sizeof(cuda::TensorMap));

struct State {
  std::mutex mutex; ///< held by every entry point; a test that changes things between calls needs none

  // What there is. Read by cuInit and cuDeviceGetCount: change them before the driver is opened.
  int version = 13000;
  std::vector<Device> devices = {Device(), Device()};
  std::set<std::string> missing; ///< cuGetProcAddress does not know these

  /// The result of the next calls of an entry point, first to last; then it works again.
  std::map<std::string, std::vector<cuda::CUresult>> failures;
  std::string jit_log = "ptxas info    : Used 32 registers"; ///< of every link
  int links = 0;                                             ///< cubins made so far, never reset: no two are the same
  bool rejects_ptx = false;
  std::string refuses_cubin_of; ///< images with this text are CUDA_ERROR_NO_BINARY_FOR_GPU

  std::map<std::string, int> calls; ///< by entry point
  std::vector<Launch> launches;
  /// In place of every kernel: the launch and its parameters.
  std::function<void(const Launch&, void** parameters)> kernel;

  double clock_us = 0; ///< what events see; a kernel advances it by what it takes

  std::uint64_t bytes_left = std::uint64_t{1} << 32; ///< beyond: CUDA_ERROR_OUT_OF_MEMORY
  std::set<cuda::CUstream> capturing;
  int capture_mode = 0; ///< of the thread: global
  /// Calls that would have ended a capture: loading or allocating in another mode than relaxed while one is on.
  std::vector<std::string> capture_violations;

  int calls_of(const std::string& name) { return calls[name]; }
};

/// Exported as fake_cuda_state(), fake_cuda_context(device) and so on; a test finds them by dlsym.
using StateFunction = State* (*)();
/// A new context of a device, not its primary one.
using ContextFunction = cuda::CUcontext (*)(int device);
/// The calling thread's current context.
using CurrentFunction = cuda::CUcontext (*)();
/// A new stream of a context.
using StreamFunction = cuda::CUstream (*)(cuda::CUcontext context);

} // namespace kiln::test::fake_cuda
