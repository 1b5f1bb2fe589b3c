#pragma once
#include <cstdint>
#include <span>
#include <string_view>

#include "cache/status.h"
#include "jit/cuda/launch_plan.h"
#include "jit/cuda/module.h"

namespace kiln::cuda {

/// A tensor argument of a GPU call.
struct PointerArgument {
  std::string_view name;
  const void* address = nullptr;
  int alignment = 1; ///< bytes
};

/// What one call of an op gives to its kernels.
struct Call {
  std::string_view op;
  Module& module;
  const LaunchPlan& plan;
  std::int64_t m = 0, n = 0; ///< of the output; > 0
  std::int64_t batches = 1;  ///< such outputs
  CUstream stream = nullptr;
  std::span<const PointerArgument> pointers; ///< checked: not null, aligned, memory of the device
  /// Null, or what completes the parameters once the pointers are checked, in the call's context.
  Status (*prepare)(void* context) = nullptr;
  void* prepare_context = nullptr;
  void* workspace = nullptr; ///< null: of Kiln's own, by stream
  std::uint64_t workspace_bytes = 0;
};

/// Puts the kernel, and the second one of a split K, on the stream; returns before they have run. `parameters` are
/// pointers to the kernel's own, of which `workspace` is set here. A call without a workspace uses the stream's
/// buffer, or, while the stream is captured, memory that the graph allocates and frees.
/// Code::invalid_argument before anything is on the stream; Code::busy see Module::ready; Code::internal: the launch
/// failed, the message has the CUDA name.
Status run(const Call& call, std::span<void*> parameters, std::uint64_t& workspace);

} // namespace kiln::cuda
