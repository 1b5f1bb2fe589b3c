#pragma once
#include <cstdint>
#include <map>
#include <memory>
#include <mutex>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "cache/digest.h"
#include "cache/status.h"
#include "jit/code_object.h"
#include "jit/cuda/api.h"
#include "jit/cuda/tensor_map.h"
#include "jit/target.h"

/// NVIDIA GPUs through libcuda.so.1, which is opened when the first desc for a GPU is asked for and not before.
namespace kiln::cuda {

class Module;

/// One GPU as CUDA counts them (CUDA_VISIBLE_DEVICES holds).
struct DeviceInfo {
  CUdevice device = 0;
  std::string name;
  int sm = 0; ///< 10·major + minor
  int sm_count = 0;
  int max_shared_bytes = 0; ///< of a block, opted in to
  std::uint64_t memory_bytes = 0;
  Target target() const { return {.arch = Arch::nvptx, .sm = sm}; }
};

/// libcuda.so.1 of this process, initialised. Thread-safe. Never destroyed: what a stream or a captured graph may still
/// use stays loaded. A child made by fork cannot use CUDA (CUDA's own rule): every call there is Code::unsupported.
class Driver {
public:
  /// Opens the library on the first call with its name (`libcuda.so.1`, or the file of a test's own) and runs cuInit;
  /// later calls give the same driver. Code::unsupported: no such library, no device, a driver older than CUDA 11.3, or
  /// a child of a process that had initialised CUDA. A failure is not remembered.
  static Result<Driver*> open(const std::string& library);

  const Api& api() const { return api_; }
  int version() const { return version_; } ///< 1000·major + 10·minor of CUDA
  std::string version_text() const;        ///< `13.0`
  std::span<const DeviceInfo> devices() const { return devices_; }
  /// Code::unsupported names the devices there are.
  Result<const DeviceInfo*> device(int index) const;

  /// Ok when the process may use CUDA: it is not a child of the one that initialised it.
  Status usable() const;

  /// An entry point that Kiln's own table lacks (benches, tests); null when the driver has none of that version.
  void* find(const char* name, int version) const;

  /// Ok, or `what` with the error's CUDA name and text: `cuMemAlloc: CUDA_ERROR_OUT_OF_MEMORY (out of memory)`.
  Status status(CUresult result, std::string_view what) const;

  /// The device's primary context, retained once and kept.
  Result<CUcontext> primary_context(int device_index);

  /// The cubin's kernels, loaded: the same module for the same bytes, for the life of the process. What stays loaded is
  /// thus bounded by the distinct kernels that the process ever used. Code::unsupported when this driver refuses it.
  Result<Module*> load(const CodeObject& cubin, int device_index);

  /// Device memory for launches on `stream` that bring no workspace of their own: one buffer a stream, which grows and
  /// is kept. The context of the stream must be current; not for a stream that is capturing. Growing allocates.
  Result<CUdeviceptr> stream_workspace(CUcontext context, CUstream stream, std::uint64_t bytes);

  /// Of this process's launches, on any device.
  TensorMapCache& tensor_maps() { return tensor_maps_; }

private:
  Driver() = default;
  Status start(const std::string& library);
  Status read_devices();

  void* get_proc_address_ = nullptr; ///< cuGetProcAddress of CUDA 11.3, or
  bool has_query_result_ = false;    ///< that of 12.0, which tells more
  Api api_;
  int version_ = 0;
  unsigned generation_ = 0; ///< process_generation() of cuInit
  std::vector<DeviceInfo> devices_;
  TensorMapCache tensor_maps_;

  std::mutex mutex_;
  std::vector<CUcontext> primary_;                                    ///< by device; null until retained
  std::map<std::pair<int, Digest>, std::unique_ptr<Module>> modules_; ///< by device, digest of the cubin
  struct Workspace {
    CUdeviceptr address = 0;
    std::uint64_t bytes = 0;
  };
  std::map<std::pair<CUcontext, std::uint64_t>, Workspace> workspaces_;
};

/// Makes a context of the device current for as long as it lives: that of `stream` if one is given, else the caller's
/// current one if it is of this device, else the device's primary one. Changes nothing when it is current already.
class ContextScope {
public:
  /// Code::invalid_argument when the stream is another device's.
  static Result<ContextScope> enter(Driver& driver, int device_index, CUstream stream);
  ContextScope(ContextScope&& other) noexcept
      : driver_(other.driver_), context_(other.context_), pushed_(std::exchange(other.pushed_, false)) {}
  ContextScope& operator=(ContextScope&&) = delete;
  ~ContextScope();
  CUcontext context() const { return context_; }

private:
  ContextScope(Driver& driver, CUcontext context, bool pushed) : driver_(&driver), context_(context), pushed_(pushed) {}
  Driver* driver_;
  CUcontext context_;
  bool pushed_;
};

/// Whether work on the stream goes into a graph now. For the legacy default stream also true while any blocking stream
/// of the current context captures (cuStreamIsCapturing says so without harm to the capture).
Result<bool> is_capturing(const Driver& driver, CUstream stream);

/// While it lives, calls of this thread that the manual names potentially unsafe for captures (loading a module,
/// allocating) neither fail nor end a capture on another thread: cuThreadExchangeStreamCaptureMode, relaxed.
class RelaxedCapture {
public:
  explicit RelaxedCapture(const Driver& driver);
  ~RelaxedCapture();
  RelaxedCapture(const RelaxedCapture&) = delete;
  RelaxedCapture& operator=(const RelaxedCapture&) = delete;

private:
  const Driver& driver_;
  int mode_;
};

/// Ok when [address, …) is memory of this device that kernels of the context may use. Else Code::invalid_argument:
/// "op: name is a host pointer: allowed is …".
Status check_pointer(const Driver& driver, CUcontext context, int device_index, std::string_view op,
                     std::string_view name, const void* address);

/// Device memory, freed with its context current. Moves.
class Buffer {
public:
  Buffer() = default;
  /// Code::out_of_memory says how many bytes. At least one byte is taken.
  static Result<Buffer> allocate(Driver& driver, int device_index, std::uint64_t bytes);
  Buffer(Buffer&& other) noexcept { *this = std::move(other); }
  Buffer& operator=(Buffer&& other) noexcept;
  ~Buffer();
  CUdeviceptr address() const { return address_; }
  std::uint64_t bytes() const { return bytes_; }
  CUcontext context() const { return context_; }
  /// Waits until the copy is done.
  Status write(const void* from, std::uint64_t bytes, std::uint64_t offset = 0);
  Status read(void* to, std::uint64_t bytes, std::uint64_t offset = 0) const;

private:
  Driver* driver_ = nullptr;
  int device_index_ = 0;
  CUcontext context_ = nullptr;
  CUdeviceptr address_ = 0;
  std::uint64_t bytes_ = 0;
};

/// Copies device memory of any context to the host and waits for it. Work on `stream` comes first.
Status copy_to_host(Driver& driver, int device_index, CUstream stream, void* to, const void* from, std::uint64_t bytes);

} // namespace kiln::cuda
