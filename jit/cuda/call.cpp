#include "jit/cuda/call.h"

#include <fmt/format.h>

namespace kiln::cuda {
namespace {

Status bad(std::string_view op, std::string_view argument, std::string_view given, std::string_view allowed) {
  return Status::error(Code::invalid_argument,
                       fmt::format("{}: {} is {}: allowed is {}", op, argument, given, allowed));
}

Status check_pointers(const Call& call, CUcontext context) {
  for (const PointerArgument& p : call.pointers) {
    if (p.address == nullptr)
      return bad(call.op, p.name, "null", fmt::format("memory of cuda:{}", call.module.device_index()));
    if (reinterpret_cast<std::uintptr_t>(p.address) % static_cast<unsigned>(p.alignment) != 0)
      return bad(call.op, p.name, fmt::format("{}", p.address),
                 fmt::format("an address aligned to {} bytes", p.alignment));
    if (Status s = check_pointer(call.module.driver(), context, call.module.device_index(), call.op, p.name, p.address);
        !s)
      return s;
  }
  return {};
}

/// The memory of one call, given back to the graph that it came from.
class CallWorkspace {
public:
  static Result<CallWorkspace> take(const Call& call, CUcontext context, std::uint64_t bytes) {
    Driver& driver = call.module.driver();
    CallWorkspace workspace(call);
    if (bytes == 0)
      return workspace;
    if (call.workspace != nullptr) {
      if (call.workspace_bytes < bytes)
        return bad(call.op, "workspace_bytes", std::to_string(call.workspace_bytes), fmt::format("{} or more", bytes));
      const PointerArgument argument[] = {{"workspace", call.workspace, 256}};
      Call checked = call;
      checked.pointers = argument;
      if (Status s = check_pointers(checked, context); !s)
        return s;
      workspace.address_ = reinterpret_cast<std::uintptr_t>(call.workspace);
      return workspace;
    }
    const Result<bool> capturing = is_capturing(driver, call.stream);
    if (!capturing)
      return capturing.status();
    if (!*capturing) {
      const Result<CUdeviceptr> address = driver.stream_workspace(context, call.stream, bytes);
      if (!address)
        return address.status();
      workspace.address_ = *address;
      return workspace;
    }
    const Api& api = driver.api();
    if (api.cuMemAllocAsync == nullptr || api.cuMemFreeAsync == nullptr)
      return bad(call.op, "workspace", "null while the stream is captured",
                 "memory of at least what kiln_workspace_bytes tells: this driver is older than CUDA 11.2");
    if (Status s = driver.status(api.cuMemAllocAsync(&workspace.address_, bytes, call.stream), "cuMemAllocAsync"); !s)
      return s;
    workspace.of_graph_ = true;
    return workspace;
  }
  CallWorkspace(CallWorkspace&& other) noexcept
      : call_(other.call_), address_(other.address_), of_graph_(std::exchange(other.of_graph_, false)) {}
  CallWorkspace& operator=(CallWorkspace&&) = delete;
  ~CallWorkspace() {
    if (of_graph_)
      static_cast<void>(call_.module.driver().api().cuMemFreeAsync(address_, call_.stream));
  }
  CUdeviceptr address() const { return address_; }

private:
  explicit CallWorkspace(const Call& call) : call_(call) {}
  const Call& call_;
  CUdeviceptr address_ = 0;
  bool of_graph_ = false;
};

} // namespace

Status run(const Call& call, std::span<void*> parameters, std::uint64_t& workspace) {
  const LaunchPlan& plan = call.plan;
  Driver& driver = call.module.driver();
  const Result<ContextScope> scope = ContextScope::enter(driver, call.module.device_index(), call.stream);
  if (!scope)
    return Status::error(scope.status().code(), fmt::format("{}: {}", call.op, scope.status().message()));
  if (Status s = check_pointers(call, scope->context()); !s)
    return s;
  if (call.prepare != nullptr)
    if (Status s = call.prepare(call.prepare_context); !s)
      return Status::error(s.code(), fmt::format("{}: {}", call.op, s.message()));
  const Result<Module::Ready> ready = call.module.ready(scope->context(), call.stream);
  if (!ready)
    return Status::error(ready.status().code(), fmt::format("{}: {}", call.op, ready.status().message()));
  const std::uint64_t bytes =
      static_cast<std::uint64_t>(plan.workspace_bytes(call.m, call.n, call.module.device().sm_count, call.batches));
  const Result<CallWorkspace> taken = CallWorkspace::take(call, scope->context(), bytes);
  if (!taken)
    return taken.status();
  workspace = taken->address();
  if (plan.workspace_zeroed > 0)
    if (Status s = driver.status(
            driver.api().cuMemsetD8Async(workspace, 0, static_cast<std::size_t>(plan.workspace_zeroed), call.stream),
            "cuMemsetD8Async");
        !s)
      return s;
  const LaunchPlan::Grid grid = plan.grid(call.m, call.n, call.module.device().sm_count, call.batches);
  if (Status s = launch(call.module, *ready, 0, grid, plan.threads, plan.smem_bytes, plan.cluster_x, call.stream,
                        parameters.data());
      !s)
    return s;
  if (plan.reduce_threads == 0)
    return {};
  return launch(call.module, *ready, 1, plan.reduce_grid(call.m, call.n), plan.reduce_threads, 0, 0, call.stream,
                parameters.data());
}

} // namespace kiln::cuda
