#pragma once
#include <cstddef>
#include <cstdint>

/// What Kiln uses of the CUDA Driver API, declared here so that neither building nor running needs a toolkit. Sections
/// named are those of the CUDA Driver API Reference Manual, 13.0; values are fixed by NVIDIA's ABI promise.
namespace kiln::cuda {

// "Data types used by CUDA driver"
using CUresult = int;
using CUdevice = int;
using CUdeviceptr = std::uint64_t;
using CUcontext = struct CUctx_st*;
using CUmodule = struct CUmod_st*;
using CUfunction = struct CUfunc_st*;
using CUlibrary = struct CUlib_st*;
using CUkernel = struct CUkern_st*;
using CUstream = struct CUstream_st*;
using CUlinkState = struct CUlinkState_st*;
using CUevent = struct CUevent_st*;

inline constexpr CUresult CUDA_SUCCESS = 0;
inline constexpr CUresult CUDA_ERROR_INVALID_VALUE = 1;
inline constexpr CUresult CUDA_ERROR_OUT_OF_MEMORY = 2;
inline constexpr CUresult CUDA_ERROR_NOT_INITIALIZED = 3;
inline constexpr CUresult CUDA_ERROR_NO_DEVICE = 100;
inline constexpr CUresult CUDA_ERROR_INVALID_DEVICE = 101;
inline constexpr CUresult CUDA_ERROR_INVALID_IMAGE = 200;
inline constexpr CUresult CUDA_ERROR_INVALID_CONTEXT = 201;
inline constexpr CUresult CUDA_ERROR_NO_BINARY_FOR_GPU = 209;
inline constexpr CUresult CUDA_ERROR_INVALID_PTX = 218;
inline constexpr CUresult CUDA_ERROR_UNSUPPORTED_PTX_VERSION = 222;
inline constexpr CUresult CUDA_ERROR_NOT_FOUND = 500;
inline constexpr CUresult CUDA_ERROR_STREAM_CAPTURE_IMPLICIT = 906;

// CUdevice_attribute
inline constexpr int CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT = 16;
inline constexpr int CU_DEVICE_ATTRIBUTE_L2_CACHE_SIZE = 38;
inline constexpr int CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR = 75;
inline constexpr int CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR = 76;
inline constexpr int CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN = 97;
// CUfunction_attribute
inline constexpr int CU_FUNC_ATTRIBUTE_LOCAL_SIZE_BYTES = 3;
inline constexpr int CU_FUNC_ATTRIBUTE_NUM_REGS = 4;
inline constexpr int CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES = 8;
// CUpointer_attribute
inline constexpr int CU_POINTER_ATTRIBUTE_CONTEXT = 1;
inline constexpr int CU_POINTER_ATTRIBUTE_MEMORY_TYPE = 2;
inline constexpr int CU_POINTER_ATTRIBUTE_IS_MANAGED = 8;
inline constexpr int CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL = 9;
// CUmemorytype
inline constexpr unsigned CU_MEMORYTYPE_HOST = 1;
inline constexpr unsigned CU_MEMORYTYPE_DEVICE = 2;
// CUjitInputType
inline constexpr int CU_JIT_INPUT_PTX = 1;
// CUjit_option
inline constexpr int CU_JIT_INFO_LOG_BUFFER = 3;
inline constexpr int CU_JIT_INFO_LOG_BUFFER_SIZE_BYTES = 4;
inline constexpr int CU_JIT_ERROR_LOG_BUFFER = 5;
inline constexpr int CU_JIT_ERROR_LOG_BUFFER_SIZE_BYTES = 6;
inline constexpr int CU_JIT_LOG_VERBOSE = 12;
// CUstream_flags
inline constexpr unsigned CU_STREAM_NON_BLOCKING = 1;
// CUstreamCaptureStatus, CUstreamCaptureMode
inline constexpr int CU_STREAM_CAPTURE_STATUS_NONE = 0;
inline constexpr int CU_STREAM_CAPTURE_MODE_RELAXED = 2;
// CUlaunchAttributeID
inline constexpr int CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION = 4;
// CUtensorMapDataType
inline constexpr int CU_TENSOR_MAP_DATA_TYPE_UINT8 = 0;
inline constexpr int CU_TENSOR_MAP_DATA_TYPE_FLOAT16 = 6;
inline constexpr int CU_TENSOR_MAP_DATA_TYPE_FLOAT32 = 7;
inline constexpr int CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 = 9;
// CUtensorMapInterleave, CUtensorMapFloatOOBfill
inline constexpr int CU_TENSOR_MAP_INTERLEAVE_NONE = 0;
inline constexpr int CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE = 0; ///< zeros
// Special streams
inline const CUstream CU_STREAM_LEGACY = reinterpret_cast<CUstream>(std::uintptr_t{1});
inline const CUstream CU_STREAM_PER_THREAD = reinterpret_cast<CUstream>(std::uintptr_t{2});
// "Driver Entry Point Access": cuGetProcAddress flags
inline constexpr std::uint64_t CU_GET_PROC_ADDRESS_LEGACY_STREAM = 1;

/// CUlaunchAttribute: an id, padding, and 64 bytes of value.
struct LaunchAttribute {
  int id = 0;
  char pad[4] = {};
  union {
    char bytes[64];
    struct {
      unsigned x, y, z;
    } cluster;
  } value = {};
};
static_assert(sizeof(LaunchAttribute) == 72);

/// CUlaunchConfig
struct LaunchConfig {
  unsigned grid_x = 1, grid_y = 1, grid_z = 1, block_x = 1, block_y = 1, block_z = 1, shared_bytes = 0;
  CUstream stream = nullptr;
  LaunchAttribute* attributes = nullptr;
  unsigned attribute_count = 0;
};

/// CUtensorMap: opaque.
struct alignas(64) TensorMap {
  static constexpr std::size_t kWords = 16;
  std::uint64_t words[kWords] = {};
};
static_assert(sizeof(TensorMap) == 128);

/// The entry points: name, CUDA version whose ABI is declared, result and parameters. Those of KILN_CUDA_OPTIONAL are
/// null with drivers older than that version.
#define KILN_CUDA_REQUIRED(X)                                                                                          \
  /* "Error Handling", "Initialization", "Version Management" */                                                       \
  X(cuGetErrorName, 6000, (CUresult error, const char** name))                                                         \
  X(cuGetErrorString, 6000, (CUresult error, const char** text))                                                       \
  X(cuInit, 2000, (unsigned flags))                                                                                    \
  X(cuDriverGetVersion, 2020, (int* version))                                                                          \
  /* "Device Management", "Primary Context Management", "Context Management" */                                        \
  X(cuDeviceGetCount, 2000, (int* count))                                                                              \
  X(cuDeviceGet, 2000, (CUdevice * device, int ordinal))                                                               \
  X(cuDeviceGetName, 2000, (char* name, int length, CUdevice device))                                                  \
  X(cuDeviceGetAttribute, 2000, (int* value, int attribute, CUdevice device))                                          \
  X(cuDeviceTotalMem, 3020, (std::size_t * bytes, CUdevice device))                                                    \
  X(cuDevicePrimaryCtxRetain, 7000, (CUcontext * context, CUdevice device))                                            \
  X(cuCtxGetCurrent, 4000, (CUcontext * context))                                                                      \
  X(cuCtxPushCurrent, 4000, (CUcontext context))                                                                       \
  X(cuCtxPopCurrent, 4000, (CUcontext * context))                                                                      \
  X(cuCtxGetDevice, 2000, (CUdevice * device))                                                                         \
  /* "Module Management" */                                                                                            \
  X(cuModuleLoadData, 2000, (CUmodule * module, const void* image))                                                    \
  X(cuModuleUnload, 2000, (CUmodule module))                                                                           \
  X(cuModuleGetFunction, 2000, (CUfunction * function, CUmodule module, const char* name))                             \
  X(cuLinkCreate, 6050, (unsigned options, int* names, void** values, CUlinkState* state))                             \
  X(cuLinkAddData, 6050,                                                                                               \
    (CUlinkState state, int type, void* data, std::size_t size, const char* name, unsigned options, int* names,        \
     void** values))                                                                                                   \
  X(cuLinkComplete, 5050, (CUlinkState state, void** cubin, std::size_t* size))                                        \
  X(cuLinkDestroy, 5050, (CUlinkState state))                                                                          \
  /* "Memory Management", "Unified Addressing" */                                                                      \
  X(cuMemAlloc, 3020, (CUdeviceptr * address, std::size_t bytes))                                                      \
  X(cuMemFree, 3020, (CUdeviceptr address))                                                                            \
  X(cuMemcpyHtoDAsync, 3020, (CUdeviceptr to, const void* from, std::size_t bytes, CUstream stream))                   \
  X(cuMemcpyDtoHAsync, 3020, (void* to, CUdeviceptr from, std::size_t bytes, CUstream stream))                         \
  X(cuMemsetD8Async, 3020, (CUdeviceptr to, unsigned char value, std::size_t bytes, CUstream stream))                  \
  X(cuPointerGetAttributes, 7000, (unsigned count, int* attributes, void** values, CUdeviceptr address))               \
  /* "Stream Management" */                                                                                            \
  X(cuStreamGetCtx, 9020, (CUstream stream, CUcontext * context))                                                      \
  X(cuStreamSynchronize, 2000, (CUstream stream))                                                                      \
  X(cuStreamIsCapturing, 10000, (CUstream stream, int* status))                                                        \
  X(cuThreadExchangeStreamCaptureMode, 10010, (int* mode))                                                             \
  /* "Execution Control" */                                                                                            \
  X(cuFuncGetAttribute, 2020, (int* value, int attribute, CUfunction function))                                        \
  X(cuFuncSetAttribute, 9000, (CUfunction function, int attribute, int value))                                         \
  X(cuLaunchKernel, 4000,                                                                                              \
    (CUfunction function, unsigned grid_x, unsigned grid_y, unsigned grid_z, unsigned block_x, unsigned block_y,       \
     unsigned block_z, unsigned shared_bytes, CUstream stream, void** parameters, void** extra))

#define KILN_CUDA_OPTIONAL(X)                                                                                          \
  /* "Stream Ordered Memory Allocator" */                                                                              \
  X(cuMemAllocAsync, 11020, (CUdeviceptr * address, std::size_t bytes, CUstream stream))                               \
  X(cuMemFreeAsync, 11020, (CUdeviceptr address, CUstream stream))                                                     \
  /* "Event Management" */                                                                                             \
  X(cuEventCreate, 2000, (CUevent * event, unsigned flags))                                                            \
  X(cuEventDestroy, 4000, (CUevent event))                                                                             \
  X(cuEventRecord, 2000, (CUevent event, CUstream stream))                                                             \
  X(cuEventElapsedTime, 2000, (float* milliseconds, CUevent start, CUevent end))                                       \
  X(cuStreamCreate, 2000, (CUstream * stream, unsigned flags))                                                         \
  X(cuStreamDestroy, 4000, (CUstream stream))                                                                          \
  X(cuLaunchKernelEx, 11060, (const LaunchConfig* config, CUfunction function, void** parameters, void** extra))       \
  /* "Library Management": needs no context, serves every one */                                                       \
  X(cuLibraryLoadData, 12000,                                                                                          \
    (CUlibrary * library, const void* code, int* jit_options, void** jit_values, unsigned jit_count, int* options,     \
     void** values, unsigned count))                                                                                   \
  X(cuLibraryUnload, 12000, (CUlibrary library))                                                                       \
  X(cuLibraryGetKernel, 12000, (CUkernel * kernel, CUlibrary library, const char* name))                               \
  X(cuKernelGetFunction, 12000, (CUfunction * function, CUkernel kernel))                                              \
  X(cuKernelSetAttribute, 12000, (int attribute, int value, CUkernel kernel, CUdevice device))                         \
  X(cuStreamGetId, 12000, (CUstream stream, unsigned long long* id))                                                   \
  X(cuFuncLoad, 12040, (CUfunction function))                                                                          \
  /* "Tensor Map Object Management": for the tensor memory accelerator of sm_90 and later */                           \
  X(cuTensorMapEncodeTiled, 12000,                                                                                     \
    (TensorMap * map, int type, unsigned rank, void* address, const std::uint64_t* extents,                            \
     const std::uint64_t* strides, const std::uint32_t* box, const std::uint32_t* element_strides, int interleave,     \
     int swizzle, int l2_promotion, int fill))

struct Api {
#define KILN_CUDA_DECLARE(name, version, parameters) CUresult(*name) parameters = nullptr;
  KILN_CUDA_REQUIRED(KILN_CUDA_DECLARE)
  KILN_CUDA_OPTIONAL(KILN_CUDA_DECLARE)
#undef KILN_CUDA_DECLARE
};

} // namespace kiln::cuda
