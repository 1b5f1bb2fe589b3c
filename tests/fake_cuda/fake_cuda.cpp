#include "tests/fake_cuda/fake_cuda.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <string_view>
#include <unistd.h>

using namespace kiln::cuda;
using kiln::test::fake_cuda::Launch;
using kiln::test::fake_cuda::State;
using kiln::test::fake_cuda::TensorMapContent;

// The handles of the real API are opaque; these are what lies behind them here.
struct kiln::cuda::CUctx_st {
  int device;
};
struct kiln::cuda::CUstream_st {
  CUcontext context;
  unsigned long long id;
};
struct kiln::cuda::CUfunc_st {
  std::string name;
  CUcontext context; ///< null: of a library
};
struct kiln::cuda::CUkern_st : kiln::cuda::CUfunc_st {};
struct kiln::cuda::CUmod_st {
  std::string image;
  CUcontext context;
  std::vector<std::unique_ptr<CUfunc_st>> functions;
};
struct kiln::cuda::CUlib_st {
  std::string image;
  std::vector<std::unique_ptr<CUkern_st>> kernels;
};
struct kiln::cuda::CUevent_st {
  double microseconds; ///< of the device's clock, when it was recorded
};
struct kiln::cuda::CUlinkState_st {
  std::string ptx, cubin;
  char *info = nullptr, *error = nullptr;
};

namespace {

constexpr std::string_view kMagic = "FAKECUBIN ";

State& state() {
  static State s;
  return s;
}

struct Block {
  std::uint64_t bytes;
  CUcontext context;
  int device;
};
std::map<CUdeviceptr, Block> blocks; ///< by the mutex of the state
std::vector<std::unique_ptr<CUctx_st>> contexts;
std::vector<std::unique_ptr<CUstream_st>> streams;
std::map<int, CUcontext> primaries;
thread_local std::vector<CUcontext> stack;
pid_t initialised_in = 0;

/// Counts the call, and whether it is to fail.
class Entered {
public:
  explicit Entered(const char* name) : lock_(state().mutex) {
    ++state().calls[name];
    auto& list = state().failures[name];
    if (!list.empty()) {
      result = list.front();
      list.erase(list.begin());
    } else if (initialised_in != getpid() && std::string_view(name) != "cuInit" &&
               std::string_view(name) != "cuDriverGetVersion") {
      result = CUDA_ERROR_NOT_INITIALIZED;
    }
  }
  CUresult result = CUDA_SUCCESS;

private:
  std::lock_guard<std::mutex> lock_;
};

#define ENTER(name)                                                                                                    \
  Entered entered(#name);                                                                                              \
  if (entered.result != CUDA_SUCCESS)                                                                                  \
    return entered.result;

CUcontext current() {
  return stack.empty() ? nullptr : stack.back();
}

/// A call that is unsafe while some stream captures.
void unsafe(const char* name) {
  if (!state().capturing.empty() && state().capture_mode != CU_STREAM_CAPTURE_MODE_RELAXED)
    state().capture_violations.push_back(name);
}

std::vector<std::string> entries_of(const std::string& image) {
  std::vector<std::string> names;
  for (std::size_t at = image.find(".entry "); at != std::string::npos; at = image.find(".entry ", at + 1)) {
    const std::size_t begin = at + 7;
    names.push_back(image.substr(begin, image.find_first_of("( \n", begin) - begin));
  }
  return names;
}

CUresult check_image(const void* data, std::string& image) {
  image = static_cast<const char*>(data); // ends in NUL here
  if (!image.starts_with(kMagic))
    return CUDA_ERROR_INVALID_IMAGE;
  const std::string& refused = state().refuses_cubin_of;
  return !refused.empty() && image.find(refused) != std::string::npos ? CUDA_ERROR_NO_BINARY_FOR_GPU : CUDA_SUCCESS;
}

CUresult launch(const CUfunc_st* function, const unsigned grid[3], unsigned threads, unsigned shared, unsigned cluster,
                CUstream stream, void** parameters) {
  Launch record{.kernel = function->name,
                .grid = {grid[0], grid[1], grid[2]},
                .threads = threads,
                .shared_bytes = shared,
                .cluster_x = cluster,
                .stream = stream,
                .context = reinterpret_cast<std::uintptr_t>(stream) > 2 ? stream->context : current(),
                .captured = state().capturing.contains(stream)};
  if (record.context == nullptr || (function->context != nullptr && function->context != record.context))
    return CUDA_ERROR_INVALID_CONTEXT;
  state().launches.push_back(record);
  if (state().kernel)
    state().kernel(record, parameters);
  return CUDA_SUCCESS;
}

template <class T> T* made(std::vector<std::unique_ptr<T>>& list, T value) {
  list.push_back(std::make_unique<T>(std::move(value)));
  return list.back().get();
}

} // namespace

extern "C" {
#define EXPORT __attribute__((visibility("default")))

EXPORT State* fake_cuda_state() {
  return &state();
}
EXPORT CUcontext fake_cuda_context(int device) {
  return made(contexts, CUctx_st{device});
}
EXPORT CUcontext fake_cuda_current() {
  return current();
}
EXPORT CUstream fake_cuda_stream(CUcontext context) {
  return made(streams, CUstream_st{context, 100 + streams.size()});
}

static CUresult cuGetErrorName(CUresult error, const char** name) {
  static const std::map<CUresult, const char*> names = {
      {1, "CUDA_ERROR_INVALID_VALUE"},       {2, "CUDA_ERROR_OUT_OF_MEMORY"},   {3, "CUDA_ERROR_NOT_INITIALIZED"},
      {100, "CUDA_ERROR_NO_DEVICE"},         {200, "CUDA_ERROR_INVALID_IMAGE"}, {201, "CUDA_ERROR_INVALID_CONTEXT"},
      {209, "CUDA_ERROR_NO_BINARY_FOR_GPU"}, {218, "CUDA_ERROR_INVALID_PTX"},   {500, "CUDA_ERROR_NOT_FOUND"},
      {719, "CUDA_ERROR_LAUNCH_FAILED"}};
  const auto found = names.find(error);
  *name = found == names.end() ? nullptr : found->second;
  return *name == nullptr ? CUDA_ERROR_INVALID_VALUE : CUDA_SUCCESS;
}
static CUresult cuGetErrorString(CUresult, const char** text) {
  *text = "as told";
  return CUDA_SUCCESS;
}
static CUresult cuInit(unsigned) {
  ENTER(cuInit)
  if (initialised_in != 0 && initialised_in != getpid())
    return CUDA_ERROR_NOT_INITIALIZED;
  if (state().devices.empty())
    return CUDA_ERROR_NO_DEVICE;
  initialised_in = getpid();
  return CUDA_SUCCESS;
}
static CUresult cuDriverGetVersion(int* version) {
  ENTER(cuDriverGetVersion)
  *version = state().version;
  return CUDA_SUCCESS;
}
static CUresult cuDeviceGetCount(int* count) {
  ENTER(cuDeviceGetCount)
  *count = static_cast<int>(state().devices.size());
  return CUDA_SUCCESS;
}
static CUresult cuDeviceGet(CUdevice* device, int ordinal) {
  ENTER(cuDeviceGet)
  *device = ordinal;
  return CUDA_SUCCESS;
}
static CUresult cuDeviceGetName(char* name, int length, CUdevice device) {
  ENTER(cuDeviceGetName)
  std::strncpy(name, state().devices[static_cast<std::size_t>(device)].name.c_str(), static_cast<std::size_t>(length));
  return CUDA_SUCCESS;
}
static CUresult cuDeviceGetAttribute(int* value, int attribute, CUdevice device) {
  ENTER(cuDeviceGetAttribute)
  const auto& d = state().devices[static_cast<std::size_t>(device)];
  const std::map<int, int> values = {{16, d.sms}, {38, 1 << 16}, {75, d.major}, {76, d.minor}, {97, d.shared_optin}};
  const auto found = values.find(attribute);
  if (found == values.end())
    return CUDA_ERROR_INVALID_VALUE;
  *value = found->second;
  return CUDA_SUCCESS;
}
static CUresult cuDeviceTotalMem(std::size_t* bytes, CUdevice) {
  ENTER(cuDeviceTotalMem)
  *bytes = std::size_t{1} << 32;
  return CUDA_SUCCESS;
}
static CUresult cuDevicePrimaryCtxRetain(CUcontext* context, CUdevice device) {
  ENTER(cuDevicePrimaryCtxRetain)
  CUcontext& primary = primaries[device];
  if (primary == nullptr)
    primary = made(contexts, CUctx_st{device});
  *context = primary;
  return CUDA_SUCCESS;
}
static CUresult cuCtxGetCurrent(CUcontext* context) {
  ENTER(cuCtxGetCurrent)
  *context = current();
  return CUDA_SUCCESS;
}
static CUresult cuCtxPushCurrent(CUcontext context) {
  ENTER(cuCtxPushCurrent)
  stack.push_back(context);
  return CUDA_SUCCESS;
}
static CUresult cuCtxPopCurrent(CUcontext* context) {
  ENTER(cuCtxPopCurrent)
  if (stack.empty())
    return CUDA_ERROR_INVALID_CONTEXT;
  *context = stack.back();
  stack.pop_back();
  return CUDA_SUCCESS;
}
static CUresult cuCtxGetDevice(CUdevice* device) {
  ENTER(cuCtxGetDevice)
  if (current() == nullptr)
    return CUDA_ERROR_INVALID_CONTEXT;
  *device = current()->device;
  return CUDA_SUCCESS;
}
static CUresult cuModuleLoadData(CUmodule* module, const void* data) {
  ENTER(cuModuleLoadData)
  unsafe("cuModuleLoadData");
  std::string image;
  if (const CUresult result = check_image(data, image); result != CUDA_SUCCESS)
    return result;
  *module = new CUmod_st{image, current(), {}};
  return CUDA_SUCCESS;
}
static CUresult cuModuleUnload(CUmodule module) {
  ENTER(cuModuleUnload)
  delete module;
  return CUDA_SUCCESS;
}
static CUresult cuModuleGetFunction(CUfunction* function, CUmodule module, const char* name) {
  ENTER(cuModuleGetFunction)
  const auto names = entries_of(module->image);
  if (std::find(names.begin(), names.end(), name) == names.end())
    return CUDA_ERROR_NOT_FOUND;
  *function = made(module->functions, CUfunc_st{name, module->context});
  return CUDA_SUCCESS;
}
static CUresult cuLinkCreate(unsigned count, int* names, void** values, CUlinkState* out) {
  ENTER(cuLinkCreate)
  if (current() == nullptr)
    return CUDA_ERROR_INVALID_CONTEXT;
  *out = new CUlinkState_st;
  for (unsigned i = 0; i < count; ++i)
    if (names[i] == CU_JIT_INFO_LOG_BUFFER)
      (*out)->info = static_cast<char*>(values[i]);
    else if (names[i] == CU_JIT_ERROR_LOG_BUFFER)
      (*out)->error = static_cast<char*>(values[i]);
  return CUDA_SUCCESS;
}
static CUresult cuLinkAddData(CUlinkState link, int type, void* data, std::size_t size, const char*, unsigned, int*,
                              void**) {
  ENTER(cuLinkAddData)
  if (type != CU_JIT_INPUT_PTX || size == 0 || static_cast<char*>(data)[size - 1] != '\0')
    return CUDA_ERROR_INVALID_VALUE;
  if (state().rejects_ptx) {
    std::strcpy(link->error, "ptxas kernel.ptx, line 3; error : Unknown opcode");
    return CUDA_ERROR_INVALID_PTX;
  }
  link->ptx = static_cast<char*>(data);
  return CUDA_SUCCESS;
}
static CUresult cuLinkComplete(CUlinkState link, void** cubin, std::size_t* size) {
  ENTER(cuLinkComplete)
  unsafe("cuLinkComplete");
  std::strcpy(link->info, state().jit_log.c_str());
  link->cubin = std::string(kMagic) + std::to_string(++state().links) + "\n" + link->ptx;
  *cubin = link->cubin.data();
  *size = link->cubin.size() + 1;
  return CUDA_SUCCESS;
}
static CUresult cuLinkDestroy(CUlinkState link) {
  ENTER(cuLinkDestroy)
  delete link;
  return CUDA_SUCCESS;
}
static CUresult cuMemAlloc(CUdeviceptr* address, std::size_t bytes) {
  ENTER(cuMemAlloc)
  unsafe("cuMemAlloc");
  if (current() == nullptr)
    return CUDA_ERROR_INVALID_CONTEXT;
  if (bytes > state().bytes_left)
    return CUDA_ERROR_OUT_OF_MEMORY;
  *address = reinterpret_cast<std::uintptr_t>(std::aligned_alloc(256, (bytes + 255) / 256 * 256));
  std::memset(reinterpret_cast<void*>(*address), 0x5a, bytes); // of any content
  blocks[*address] = {bytes, current(), current()->device};
  return CUDA_SUCCESS;
}
static CUresult cuMemFree(CUdeviceptr address) {
  ENTER(cuMemFree)
  if (blocks.erase(address) == 0)
    return CUDA_ERROR_INVALID_VALUE;
  std::free(reinterpret_cast<void*>(address));
  return CUDA_SUCCESS;
}
static CUresult cuMemAllocAsync(CUdeviceptr* address, std::size_t bytes, CUstream stream) {
  ENTER(cuMemAllocAsync)
  *address = reinterpret_cast<std::uintptr_t>(std::aligned_alloc(256, (bytes + 255) / 256 * 256));
  blocks[*address] = {bytes, nullptr, stream->context->device};
  return CUDA_SUCCESS;
}
static CUresult cuMemFreeAsync(CUdeviceptr address, CUstream) {
  ENTER(cuMemFreeAsync)
  if (blocks.erase(address) == 0)
    return CUDA_ERROR_INVALID_VALUE;
  std::free(reinterpret_cast<void*>(address));
  return CUDA_SUCCESS;
}
static CUresult cuMemcpyHtoDAsync(CUdeviceptr to, const void* from, std::size_t bytes, CUstream) {
  ENTER(cuMemcpyHtoDAsync)
  std::memcpy(reinterpret_cast<void*>(to), from, bytes);
  return CUDA_SUCCESS;
}
static CUresult cuMemcpyDtoHAsync(void* to, CUdeviceptr from, std::size_t bytes, CUstream) {
  ENTER(cuMemcpyDtoHAsync)
  std::memcpy(to, reinterpret_cast<const void*>(from), bytes);
  return CUDA_SUCCESS;
}
static CUresult cuMemsetD8Async(CUdeviceptr to, unsigned char value, std::size_t bytes, CUstream) {
  ENTER(cuMemsetD8Async)
  std::memset(reinterpret_cast<void*>(to), value, bytes);
  return CUDA_SUCCESS;
}
static CUresult cuPointerGetAttributes(unsigned count, int* attributes, void** values, CUdeviceptr address) {
  ENTER(cuPointerGetAttributes)
  const Block* block = nullptr;
  if (auto after = blocks.upper_bound(address); after != blocks.begin())
    if (const auto at = std::prev(after); address < at->first + std::max<std::uint64_t>(at->second.bytes, 1))
      block = &at->second;
  for (unsigned i = 0; i < count; ++i)
    switch (attributes[i]) {
    case CU_POINTER_ATTRIBUTE_CONTEXT:
      *static_cast<CUcontext*>(values[i]) = block ? block->context : nullptr;
      break;
    case CU_POINTER_ATTRIBUTE_MEMORY_TYPE:
      *static_cast<unsigned*>(values[i]) = block ? CU_MEMORYTYPE_DEVICE : 0;
      break;
    case CU_POINTER_ATTRIBUTE_IS_MANAGED:
      *static_cast<unsigned*>(values[i]) = 0;
      break;
    case CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL:
      *static_cast<int*>(values[i]) = block ? block->device : -2;
      break;
    default:
      return CUDA_ERROR_INVALID_VALUE;
    }
  return CUDA_SUCCESS;
}
static CUresult cuStreamGetCtx(CUstream stream, CUcontext* context) {
  ENTER(cuStreamGetCtx)
  *context = stream->context;
  return CUDA_SUCCESS;
}
static CUresult cuStreamGetId(CUstream stream, unsigned long long* id) {
  ENTER(cuStreamGetId)
  *id = reinterpret_cast<std::uintptr_t>(stream) > 2 ? stream->id : reinterpret_cast<std::uintptr_t>(stream);
  return CUDA_SUCCESS;
}
static CUresult cuStreamSynchronize(CUstream) {
  ENTER(cuStreamSynchronize)
  return CUDA_SUCCESS;
}
static CUresult cuStreamIsCapturing(CUstream stream, int* status) {
  ENTER(cuStreamIsCapturing)
  *status = state().capturing.contains(stream) ? 1 : 0;
  return CUDA_SUCCESS;
}
static CUresult cuThreadExchangeStreamCaptureMode(int* mode) {
  ENTER(cuThreadExchangeStreamCaptureMode)
  std::swap(*mode, state().capture_mode);
  return CUDA_SUCCESS;
}
static CUresult cuFuncGetAttribute(int* value, int, CUfunction) {
  ENTER(cuFuncGetAttribute)
  *value = 0;
  return CUDA_SUCCESS;
}
static CUresult cuFuncSetAttribute(CUfunction, int, int) {
  ENTER(cuFuncSetAttribute)
  return CUDA_SUCCESS;
}
static CUresult cuFuncLoad(CUfunction) {
  ENTER(cuFuncLoad)
  unsafe("cuFuncLoad");
  return CUDA_SUCCESS;
}
static CUresult cuLaunchKernel(CUfunction function, unsigned x, unsigned y, unsigned z, unsigned threads, unsigned,
                               unsigned, unsigned shared, CUstream stream, void** parameters, void**) {
  ENTER(cuLaunchKernel)
  const unsigned grid[] = {x, y, z};
  return launch(function, grid, threads, shared, 0, stream, parameters);
}
static CUresult cuLaunchKernelEx(const LaunchConfig* c, CUfunction function, void** parameters, void**) {
  ENTER(cuLaunchKernelEx)
  const unsigned grid[] = {c->grid_x, c->grid_y, c->grid_z};
  unsigned cluster = 0;
  for (unsigned i = 0; i < c->attribute_count; ++i)
    if (c->attributes[i].id == CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION)
      cluster = c->attributes[i].value.cluster.x;
  return launch(function, grid, c->block_x, c->shared_bytes, cluster, c->stream, parameters);
}
static CUresult cuLibraryLoadData(CUlibrary* library, const void* data, int*, void**, unsigned, int*, void**,
                                  unsigned) {
  ENTER(cuLibraryLoadData)
  unsafe("cuLibraryLoadData");
  std::string image;
  if (const CUresult result = check_image(data, image); result != CUDA_SUCCESS)
    return result;
  *library = new CUlib_st{image, {}};
  return CUDA_SUCCESS;
}
static CUresult cuLibraryUnload(CUlibrary library) {
  ENTER(cuLibraryUnload)
  delete library;
  return CUDA_SUCCESS;
}
static CUresult cuLibraryGetKernel(CUkernel* kernel, CUlibrary library, const char* name) {
  ENTER(cuLibraryGetKernel)
  const auto names = entries_of(library->image);
  if (std::find(names.begin(), names.end(), name) == names.end())
    return CUDA_ERROR_NOT_FOUND;
  *kernel = made(library->kernels, CUkern_st{{name, nullptr}});
  return CUDA_SUCCESS;
}
static CUresult cuKernelGetFunction(CUfunction* function, CUkernel kernel) {
  ENTER(cuKernelGetFunction)
  *function = kernel;
  return CUDA_SUCCESS;
}
static CUresult cuKernelSetAttribute(int, int, CUkernel, CUdevice) {
  ENTER(cuKernelSetAttribute)
  return CUDA_SUCCESS;
}
static CUresult cuEventCreate(CUevent* event, unsigned) {
  ENTER(cuEventCreate)
  *event = new CUevent_st{0};
  return CUDA_SUCCESS;
}
static CUresult cuEventDestroy(CUevent event) {
  ENTER(cuEventDestroy)
  delete event;
  return CUDA_SUCCESS;
}
static CUresult cuEventRecord(CUevent event, CUstream) {
  ENTER(cuEventRecord)
  event->microseconds = state().clock_us;
  return CUDA_SUCCESS;
}
static CUresult cuEventElapsedTime(float* milliseconds, CUevent start, CUevent end) {
  ENTER(cuEventElapsedTime)
  *milliseconds = static_cast<float>((end->microseconds - start->microseconds) / 1e3);
  return CUDA_SUCCESS;
}
static CUresult cuStreamCreate(CUstream* stream, unsigned) {
  ENTER(cuStreamCreate)
  if (current() == nullptr)
    return CUDA_ERROR_INVALID_CONTEXT;
  *stream = made(streams, CUstream_st{current(), 100 + streams.size()});
  return CUDA_SUCCESS;
}
static CUresult cuStreamDestroy(CUstream) {
  ENTER(cuStreamDestroy)
  return CUDA_SUCCESS;
}
static CUresult cuTensorMapEncodeTiled(TensorMap* map, int type, unsigned rank, void* address,
                                       const std::uint64_t* extents, const std::uint64_t* strides,
                                       const std::uint32_t* box, const std::uint32_t* element_strides, int interleave,
                                       int swizzle, int l2_promotion, int fill) {
  ENTER(cuTensorMapEncodeTiled)
  if (current() == nullptr)
    return CUDA_ERROR_INVALID_CONTEXT;
  // As the manual has it, for the maps that Kiln makes.
  constexpr unsigned element_bytes[] = {1, 2, 4, 4, 8, 8, 2, 4, 8, 2};
  if (type < 0 || type >= static_cast<int>(std::size(element_bytes)) || rank != 3 || interleave != 0 || fill != 0 ||
      swizzle < 0 || swizzle > 3 || l2_promotion < 0 || l2_promotion > 3)
    return CUDA_ERROR_INVALID_VALUE;
  TensorMapContent content = {.address = reinterpret_cast<std::uintptr_t>(address)};
  if (content.address % 16 != 0 || (box[0] * element_bytes[type]) % 16 != 0 ||
      (swizzle != 0 && box[0] * element_bytes[type] > 16u << swizzle))
    return CUDA_ERROR_INVALID_VALUE;
  for (unsigned i = 0; i < 3; ++i) {
    content.extents[i] = extents[i];
    content.box[i] = box[i];
    if (extents[i] == 0 || extents[i] > std::uint64_t{1} << 32 || box[i] == 0 || box[i] > 256 ||
        element_strides[i] != 1)
      return CUDA_ERROR_INVALID_VALUE;
  }
  for (unsigned i = 0; i < 2; ++i) {
    content.strides[i] = strides[i];
    if (strides[i] % 16 != 0 || strides[i] >= std::uint64_t{1} << 40)
      return CUDA_ERROR_INVALID_VALUE;
  }
  content.element = static_cast<std::uint8_t>(type);
  content.swizzle = static_cast<std::uint8_t>(swizzle);
  content.l2_promotion = static_cast<std::uint8_t>(l2_promotion);
  std::memcpy(map->words, &content, sizeof content);
  return CUDA_SUCCESS;
}

EXPORT CUresult cuGetProcAddress(const char* symbol, void** out, int version, std::uint64_t) {
  struct Row {
    const char* name;
    int version;
    void* function;
  };
#define ROW(name, version, parameters) {#name, version, reinterpret_cast<void*>(&name)},
  static const Row rows[] = {KILN_CUDA_REQUIRED(ROW) KILN_CUDA_OPTIONAL(ROW)};
#undef ROW
  *out = nullptr;
  for (const Row& row : rows)
    if (std::string_view(row.name) == symbol && version >= row.version && row.version <= state().version &&
        !state().missing.contains(symbol))
      *out = row.function;
  return *out == nullptr ? CUDA_ERROR_NOT_FOUND : CUDA_SUCCESS;
}
EXPORT CUresult cuGetProcAddress_v2(const char* symbol, void** out, int version, std::uint64_t flags, int* status) {
  const CUresult result = cuGetProcAddress(symbol, out, version, flags);
  *status = result == CUDA_SUCCESS ? 0 : 1;
  return CUDA_SUCCESS; // the real one reports an unknown name in `status` alone
}
}
