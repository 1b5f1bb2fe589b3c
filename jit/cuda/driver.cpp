#include "jit/cuda/driver.h"

#include <algorithm>
#include <atomic>

#include <dlfcn.h>
#include <fmt/format.h>

#include "cache/per_process.h"
#include "cache/process.h"
#include "jit/cuda/module.h"
#include "jit/os.h"

namespace kiln::cuda {
namespace {

/// The generation of the process in which Kiln ran cuInit, plus 1; 0 before.
std::atomic<unsigned> g_initialised_in{0};

Status forked() {
  return Status::error(Code::unsupported, "CUDA cannot be used in a child made by fork from a process that had "
                                          "initialised it: fork before the first use, or exec in the child");
}

struct Drivers {
  std::mutex mutex;
  std::map<std::string, std::unique_ptr<Driver>> by_library;
};

/// libcuda and what it holds are the process's, so their handles are too; never destroyed.
Drivers& drivers() {
  static auto* const all = new PerProcess<Drivers>;
  return all->get();
}

bool has_context_of_its_own(CUstream stream) {
  return stream != nullptr && stream != CU_STREAM_LEGACY && stream != CU_STREAM_PER_THREAD;
}

} // namespace

// ---------------------------------------------------------------- opening

Result<Driver*> Driver::open(const std::string& library) {
  const unsigned generation = process_generation();
  if (const unsigned initialised = g_initialised_in.load(); initialised != 0 && initialised != generation + 1)
    return forked();
  Drivers& all = drivers();
  std::lock_guard lock(all.mutex);
  if (const auto found = all.by_library.find(library); found != all.by_library.end())
    return found->second.get();
  std::unique_ptr<Driver> driver(new Driver);
  if (Status status = driver->start(library); !status)
    return status;
  return all.by_library.emplace(library, std::move(driver)).first->second.get();
}

Status Driver::start(const std::string& library) {
  void* const handle = dlopen(library.c_str(), RTLD_NOW | RTLD_LOCAL); // kept open: CUDA cannot be unloaded
  if (handle == nullptr)
    return Status::error(Code::unsupported, fmt::format("no NVIDIA driver: {}", dlerror()));
  get_proc_address_ = dlsym(handle, "cuGetProcAddress_v2");
  has_query_result_ = get_proc_address_ != nullptr;
  if (get_proc_address_ == nullptr)
    get_proc_address_ = dlsym(handle, "cuGetProcAddress");
  if (get_proc_address_ == nullptr)
    return Status::error(Code::unsupported,
                         fmt::format("{} is of a driver older than CUDA 11.3: it lacks cuGetProcAddress", library));
  std::string missing;
  const auto resolve = [&](auto& pointer, const char* name, int version, bool required) {
    pointer = reinterpret_cast<std::remove_reference_t<decltype(pointer)>>(find(name, version));
    if (pointer == nullptr && required)
      missing += fmt::format("{}{}", missing.empty() ? "" : ", ", name);
  };
#define KILN_CUDA_RESOLVE_REQUIRED(name, version, parameters) resolve(api_.name, #name, version, true);
#define KILN_CUDA_RESOLVE_OPTIONAL(name, version, parameters) resolve(api_.name, #name, version, false);
  KILN_CUDA_REQUIRED(KILN_CUDA_RESOLVE_REQUIRED)
  KILN_CUDA_OPTIONAL(KILN_CUDA_RESOLVE_OPTIONAL)
#undef KILN_CUDA_RESOLVE_REQUIRED
#undef KILN_CUDA_RESOLVE_OPTIONAL
  if (!missing.empty())
    return Status::error(Code::unsupported, fmt::format("{} lacks {}", library, missing));

  if (const CUresult result = api_.cuInit(0); result != CUDA_SUCCESS) {
    const Status why = status(result, "cuInit");
    const bool in_child = result == CUDA_ERROR_NOT_INITIALIZED && process_generation() > 0;
    return Status::error(Code::unsupported,
                         fmt::format("{}{}", why.message(),
                                     in_child ? "; this is a child made by fork, perhaps of a process that had "
                                                "initialised CUDA"
                                              : ""));
  }
  generation_ = process_generation();
  g_initialised_in = generation_ + 1;
  if (Status s = status(api_.cuDriverGetVersion(&version_), "cuDriverGetVersion"); !s)
    return s;
  return read_devices();
}

Status Driver::read_devices() {
  int count = 0;
  if (Status s = status(api_.cuDeviceGetCount(&count), "cuDeviceGetCount"); !s)
    return s;
  if (count == 0)
    return Status::error(Code::unsupported, "no NVIDIA GPU that this process may use");
  for (int i = 0; i < count; ++i) {
    DeviceInfo info;
    if (Status s = status(api_.cuDeviceGet(&info.device, i), "cuDeviceGet"); !s)
      return s;
    char name[256] = {};
    std::size_t memory = 0;
    int major = 0, minor = 0;
    const auto attribute = [&](int& value, int which) {
      return status(api_.cuDeviceGetAttribute(&value, which, info.device), "cuDeviceGetAttribute");
    };
    for (const Status& s : {status(api_.cuDeviceGetName(name, sizeof(name) - 1, info.device), "cuDeviceGetName"),
                            status(api_.cuDeviceTotalMem(&memory, info.device), "cuDeviceTotalMem"),
                            attribute(major, CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR),
                            attribute(minor, CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR),
                            attribute(info.sm_count, CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT),
                            attribute(info.max_shared_bytes, CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN)})
      if (!s)
        return s;
    info.name = name;
    info.memory_bytes = memory;
    info.sm = 10 * major + minor;
    devices_.push_back(std::move(info));
  }
  primary_.resize(devices_.size());
  return {};
}

void* Driver::find(const char* name, int version) const {
  void* found = nullptr;
  CUresult result = CUDA_SUCCESS;
  int query = 0; // CUdriverProcAddressQueryResult: 0 is success
  if (has_query_result_)
    result = reinterpret_cast<CUresult (*)(const char*, void**, int, std::uint64_t, int*)>(get_proc_address_)(
        name, &found, version, CU_GET_PROC_ADDRESS_LEGACY_STREAM, &query);
  else
    result = reinterpret_cast<CUresult (*)(const char*, void**, int, std::uint64_t)>(get_proc_address_)(
        name, &found, version, CU_GET_PROC_ADDRESS_LEGACY_STREAM);
  return result == CUDA_SUCCESS && query == 0 ? found : nullptr;
}

std::string Driver::version_text() const {
  return fmt::format("{}.{}", version_ / 1000, version_ % 1000 / 10);
}

Result<const DeviceInfo*> Driver::device(int index) const {
  if (index >= 0 && index < static_cast<int>(devices_.size()))
    return &devices_[static_cast<std::size_t>(index)];
  return Status::error(
      Code::unsupported,
      fmt::format("device=cuda:{}: this process may use cuda:0{}", index,
                  devices_.size() > 1 ? fmt::format(" to cuda:{}", devices_.size() - 1) : std::string(" only")));
}

Status Driver::usable() const {
  return generation_ == process_generation() ? Status() : forked();
}

Status Driver::status(CUresult result, std::string_view what) const {
  if (result == CUDA_SUCCESS)
    return {};
  const char *name = nullptr, *text = nullptr;
  if (api_.cuGetErrorName(result, &name) != CUDA_SUCCESS || name == nullptr)
    name = "an unknown CUDA error";
  if (api_.cuGetErrorString(result, &text) != CUDA_SUCCESS || text == nullptr)
    text = "";
  Code code = Code::internal;
  switch (result) {
  case CUDA_ERROR_OUT_OF_MEMORY:
    code = Code::out_of_memory;
    break;
  case CUDA_ERROR_NO_DEVICE:
  case CUDA_ERROR_INVALID_DEVICE:
  case CUDA_ERROR_INVALID_IMAGE:
  case CUDA_ERROR_NO_BINARY_FOR_GPU:
  case CUDA_ERROR_INVALID_PTX:
  case CUDA_ERROR_UNSUPPORTED_PTX_VERSION:
    code = Code::unsupported;
    break;
  default:
    break;
  }
  return Status::error(code, fmt::format("{}: {} ({}{}{})", what, name, result, *text != '\0' ? ": " : "", text));
}

// ---------------------------------------------------------------- contexts

Result<CUcontext> Driver::primary_context(int device_index) {
  const Result<const DeviceInfo*> info = device(device_index);
  if (!info)
    return info.status();
  std::lock_guard lock(mutex_);
  CUcontext& context = primary_[static_cast<std::size_t>(device_index)];
  if (context == nullptr)
    if (Status s = status(api_.cuDevicePrimaryCtxRetain(&context, (*info)->device), "cuDevicePrimaryCtxRetain"); !s) {
      context = nullptr;
      return s;
    }
  return context;
}

Result<ContextScope> ContextScope::enter(Driver& driver, int device_index, CUstream stream) {
  if (Status s = driver.usable(); !s)
    return s;
  const Result<const DeviceInfo*> info = driver.device(device_index);
  if (!info)
    return info.status();
  const Api& api = driver.api();
  CUcontext current = nullptr;
  if (Status s = driver.status(api.cuCtxGetCurrent(&current), "cuCtxGetCurrent"); !s)
    return s;
  CUcontext wanted = current;
  if (has_context_of_its_own(stream))
    if (const CUresult result = api.cuStreamGetCtx(stream, &wanted); result != CUDA_SUCCESS)
      return Status::error(Code::invalid_argument, fmt::format("stream is {}: {}", static_cast<void*>(stream),
                                                               driver.status(result, "cuStreamGetCtx").message()));
  CUdevice device = -1;
  const auto push = [&](CUcontext context) { return driver.status(api.cuCtxPushCurrent(context), "cuCtxPushCurrent"); };
  if (wanted != nullptr) {
    if (wanted != current)
      if (Status s = push(wanted); !s)
        return s;
    ContextScope scope(driver, wanted, wanted != current);
    if (Status s = driver.status(api.cuCtxGetDevice(&device), "cuCtxGetDevice"); !s)
      return s;
    if (device == (*info)->device)
      return scope;
    if (wanted != current || has_context_of_its_own(stream))
      return Status::error(Code::invalid_argument,
                           fmt::format("stream is one of another device: allowed is one of cuda:{}", device_index));
  }
  const Result<CUcontext> primary = driver.primary_context(device_index);
  if (!primary)
    return primary.status();
  if (Status s = push(*primary); !s)
    return s;
  return ContextScope(driver, *primary, true);
}

ContextScope::~ContextScope() {
  CUcontext popped = nullptr;
  if (pushed_)
    static_cast<void>(driver_->api().cuCtxPopCurrent(&popped)); // nothing to be done about a failure
}

Result<bool> is_capturing(const Driver& driver, CUstream stream) {
  int capture = CU_STREAM_CAPTURE_STATUS_NONE;
  const CUresult result = driver.api().cuStreamIsCapturing(stream, &capture);
  if (result == CUDA_ERROR_STREAM_CAPTURE_IMPLICIT)
    return true;
  if (Status s = driver.status(result, "cuStreamIsCapturing"); !s)
    return s;
  return capture != CU_STREAM_CAPTURE_STATUS_NONE;
}

RelaxedCapture::RelaxedCapture(const Driver& driver) : driver_(driver), mode_(CU_STREAM_CAPTURE_MODE_RELAXED) {
  if (driver_.api().cuThreadExchangeStreamCaptureMode(&mode_) != CUDA_SUCCESS)
    mode_ = CU_STREAM_CAPTURE_MODE_RELAXED; // then nothing was changed, and nothing will be
}

RelaxedCapture::~RelaxedCapture() {
  static_cast<void>(driver_.api().cuThreadExchangeStreamCaptureMode(&mode_));
}

// ---------------------------------------------------------------- modules

Result<Module*> Driver::load(const CodeObject& cubin, int device_index) {
  if (Status s = usable(); !s)
    return s;
  // The entries' names and the plan's shared memory are read from the code object, so they are part of what is the
  // same.
  const std::pair<int, Digest> which{device_index, digest_of(cubin.serialise())};
  {
    std::lock_guard lock(mutex_);
    if (const auto found = modules_.find(which); found != modules_.end())
      return found->second.get();
  }
  Result<std::unique_ptr<Module>> loaded = Module::load(*this, cubin, device_index);
  if (!loaded)
    return loaded.status();
  std::lock_guard lock(mutex_); // another thread may have been first: then its module stays, and this one goes unseen
  return modules_.emplace(which, std::move(*loaded)).first->second.get();
}

// ---------------------------------------------------------------- memory

Result<CUdeviceptr> Driver::stream_workspace(CUcontext context, CUstream stream, std::uint64_t bytes) {
  // Handles of streams are reused, ids are not.
  unsigned long long id = reinterpret_cast<std::uintptr_t>(stream);
  if (api_.cuStreamGetId != nullptr)
    if (Status s = status(api_.cuStreamGetId(stream, &id), "cuStreamGetId"); !s)
      return s;
  std::lock_guard lock(mutex_);
  Workspace& workspace = workspaces_[{context, id}];
  if (workspace.bytes >= bytes)
    return workspace.address;
  // Earlier launches may still use the old buffer, so that it stays: doubling bounds all of them by twice the largest.
  const std::uint64_t size = std::max(bytes, 2 * workspace.bytes);
  CUdeviceptr address = 0;
  RelaxedCapture relaxed(*this);
  if (const CUresult result = api_.cuMemAlloc(&address, size); result != CUDA_SUCCESS) {
    const Status why = status(result, "cuMemAlloc");
    return Status::error(why.code(), fmt::format("{} bytes of workspace for a stream: {}", size, why.message()));
  }
  workspace = {address, size};
  return address;
}

Status check_pointer(const Driver& driver, CUcontext context, int device_index, std::string_view op,
                     std::string_view name, const void* address) {
  CUcontext owner = nullptr;
  unsigned type = 0, managed = 0;
  int ordinal = -2;
  int attributes[] = {CU_POINTER_ATTRIBUTE_CONTEXT, CU_POINTER_ATTRIBUTE_MEMORY_TYPE, CU_POINTER_ATTRIBUTE_IS_MANAGED,
                      CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL};
  void* values[] = {&owner, &type, &managed, &ordinal};
  const auto bad = [&](std::string_view what) {
    return Status::error(Code::invalid_argument,
                         fmt::format("{}: {} is {}: allowed is memory of cuda:{} in the context of the call", op, name,
                                     what, device_index));
  };
  // Tells nothing (zero) of an address that CUDA does not know.
  if (Status s = driver.status(
          driver.api().cuPointerGetAttributes(4, attributes, values, reinterpret_cast<std::uintptr_t>(address)),
          "cuPointerGetAttributes");
      !s)
    return s;
  if (managed != 0)
    return {};
  if (type != CU_MEMORYTYPE_DEVICE)
    return bad(type == CU_MEMORYTYPE_HOST ? "a pinned host pointer" : "no device pointer");
  if (ordinal != device_index)
    return bad(fmt::format("memory of cuda:{}", ordinal));
  if (owner != nullptr && owner != context) // null: of a pool or mapped by the host, for every context of the device
    return bad("memory of another context");
  return {};
}

Result<Buffer> Buffer::allocate(Driver& driver, int device_index, std::uint64_t bytes) {
  Result<ContextScope> scope = ContextScope::enter(driver, device_index, nullptr);
  if (!scope)
    return scope.status();
  Buffer buffer;
  buffer.driver_ = &driver;
  buffer.device_index_ = device_index;
  buffer.context_ = scope->context();
  RelaxedCapture relaxed(driver);
  const CUresult result = driver.api().cuMemAlloc(&buffer.address_, std::max<std::uint64_t>(bytes, 1));
  if (result != CUDA_SUCCESS) {
    const Status why = driver.status(result, "cuMemAlloc");
    buffer.driver_ = nullptr;
    return Status::error(why.code(), fmt::format("{} bytes of cuda:{}: {}", bytes, device_index, why.message()));
  }
  buffer.bytes_ = bytes;
  return buffer;
}

Buffer& Buffer::operator=(Buffer&& other) noexcept {
  std::swap(driver_, other.driver_);
  std::swap(device_index_, other.device_index_);
  std::swap(context_, other.context_);
  std::swap(address_, other.address_);
  std::swap(bytes_, other.bytes_);
  return *this;
}

Buffer::~Buffer() {
  if (driver_ == nullptr || !driver_->usable())
    return;
  const Api& api = driver_->api();
  CUcontext popped = nullptr;
  if (api.cuCtxPushCurrent(context_) != CUDA_SUCCESS)
    return; // the host has destroyed the context, and the memory with it
  static_cast<void>(api.cuMemFree(address_));
  static_cast<void>(api.cuCtxPopCurrent(&popped));
}

namespace {

/// Runs `copy` on the stream and waits for it.
template <class Copy> Status copy_now(Driver& driver, CUcontext context, CUstream stream, Copy copy) {
  const Api& api = driver.api();
  if (Status s = driver.usable(); !s)
    return s;
  if (Status s = driver.status(api.cuCtxPushCurrent(context), "cuCtxPushCurrent"); !s)
    return s;
  RelaxedCapture relaxed(driver);
  Status status = copy(api, stream);
  if (status)
    status = driver.status(api.cuStreamSynchronize(stream), "cuStreamSynchronize");
  CUcontext popped = nullptr;
  static_cast<void>(api.cuCtxPopCurrent(&popped));
  return status;
}

} // namespace

Status Buffer::write(const void* from, std::uint64_t bytes, std::uint64_t offset) {
  if (bytes == 0) // the host's pointer may then be null
    return {};
  return copy_now(*driver_, context_, CU_STREAM_PER_THREAD, [&](const Api& api, CUstream stream) {
    return driver_->status(api.cuMemcpyHtoDAsync(address_ + offset, from, bytes, stream), "cuMemcpyHtoDAsync");
  });
}

Status Buffer::read(void* to, std::uint64_t bytes, std::uint64_t offset) const {
  if (bytes == 0)
    return {};
  return copy_now(*driver_, context_, CU_STREAM_PER_THREAD, [&](const Api& api, CUstream stream) {
    return driver_->status(api.cuMemcpyDtoHAsync(to, address_ + offset, bytes, stream), "cuMemcpyDtoHAsync");
  });
}

Status copy_to_host(Driver& driver, int device_index, CUstream stream, void* to, const void* from,
                    std::uint64_t bytes) {
  const Result<ContextScope> scope = ContextScope::enter(driver, device_index, stream);
  if (!scope)
    return scope.status();
  return copy_now(driver, scope->context(), stream, [&](const Api& api, CUstream s) {
    return driver.status(api.cuMemcpyDtoHAsync(to, reinterpret_cast<std::uintptr_t>(from), bytes, s),
                         "cuMemcpyDtoHAsync");
  });
}

} // namespace kiln::cuda
