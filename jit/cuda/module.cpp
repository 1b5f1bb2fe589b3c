#include "jit/cuda/module.h"

#include <algorithm>

#include <fmt/format.h>

namespace kiln::cuda {
namespace {

/// The driver's word on an image that it does not take, so that another can be made.
Status refused(const Status& why) {
  return Status::error(why.code() == Code::internal ? Code::unsupported : why.code(),
                       fmt::format("the driver refuses the cubin: {}", why.message()));
}

} // namespace

Module::Module(Driver& driver, int device_index)
    : driver_(driver), device_index_(device_index), device_(*driver.device(device_index)) {}

Result<std::unique_ptr<Module>> Module::load(Driver& driver, const CodeObject& cubin, int device_index) {
  const Result<const DeviceInfo*> info = driver.device(device_index);
  if (!info)
    return info.status();
  if (cubin.format != CodeFormat::cubin || cubin.entries.empty() || cubin.entries.size() > kMostEntries)
    return Status::error(Code::integrity, fmt::format("a {} with {} entries: expected is a cubin with 1 to {}",
                                                      name_of(cubin.format), cubin.entries.size(), kMostEntries));
  if (cubin.sm != (*info)->sm)
    return Status::error(Code::unsupported, fmt::format("code for sm_{} on a device of sm_{}", cubin.sm, (*info)->sm));
  std::unique_ptr<Module> module(new Module(driver, device_index));
  for (const CodeObject::Entry& entry : cubin.entries)
    module->entries_.push_back(entry.name);
  for (const auto& [name, value] : cubin.plan)
    if (name == "smem_bytes")
      module->smem_bytes_ = static_cast<int>(std::clamp<std::int64_t>(value, 0, 1 << 24));
  if (module->smem_bytes_ > (*info)->max_shared_bytes)
    return Status::error(Code::unsupported, fmt::format("the kernel needs {} bytes of shared memory a block, {} has {}",
                                                        module->smem_bytes_, (*info)->name, (*info)->max_shared_bytes));
  const Api& api = driver.api();
  RelaxedCapture relaxed(driver);
  if (api.cuLibraryLoadData == nullptr) {
    module->image_ = cubin.image;
    // The driver sees it now, so that a refusal is found while another cubin can still be made.
    const Result<ContextScope> scope = ContextScope::enter(driver, device_index, nullptr);
    if (!scope)
      return scope.status();
    if (const Result<Ready> ready = module->ready(scope->context(), nullptr); !ready)
      return ready.status();
    return module;
  }
  if (Status s = driver.status(
          api.cuLibraryLoadData(&module->library_, cubin.image.data(), nullptr, nullptr, 0, nullptr, nullptr, 0),
          "cuLibraryLoadData");
      !s)
    return s.code() == Code::out_of_memory ? s : refused(s);
  for (std::size_t i = 0; i < module->entries_.size(); ++i) {
    const std::string& name = module->entries_[i];
    if (Status s = driver.status(api.cuLibraryGetKernel(&module->kernels_[i], module->library_, name.c_str()),
                                 fmt::format("cuLibraryGetKernel({})", name));
        !s)
      return refused(s);
    if (module->smem_bytes_ > 0)
      if (Status s = driver.status(api.cuKernelSetAttribute(CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES,
                                                            module->smem_bytes_, module->kernels_[i], (*info)->device),
                                   fmt::format("cuKernelSetAttribute({})", name));
          !s)
        return refused(s);
  }
  return module;
}

Module::~Module() {
  if (library_ != nullptr)
    static_cast<void>(driver_.api().cuLibraryUnload(library_));
  for (Place* place = places_.load(); place != nullptr;) {
    if (place->module != nullptr)
      static_cast<void>(driver_.api().cuModuleUnload(place->module));
    delete std::exchange(place, place->next);
  }
}

Result<Module::Ready> Module::ready(CUcontext context, CUstream stream) {
  const auto find = [&]() -> const Place* {
    for (const Place* place = places_.load(std::memory_order_acquire); place != nullptr; place = place->next)
      if (place->context == context)
        return place;
    return nullptr;
  };
  if (const Place* place = find()) [[likely]]
    return place->ready;
  const Result<bool> capturing = is_capturing(driver_, stream);
  if (!capturing)
    return capturing.status();
  if (*capturing)
    return Status::error(Code::busy,
                         "the stream is being captured and the kernel is not loaded in its context yet: run "
                         "it there once before the capture");
  std::lock_guard lock(mutex_);
  if (const Place* place = find())
    return place->ready;
  auto place = std::make_unique<Place>();
  place->context = context;
  RelaxedCapture relaxed(driver_);
  const Api& api = driver_.api();
  if (library_ == nullptr)
    if (Status s = driver_.status(api.cuModuleLoadData(&place->module, image_.data()), "cuModuleLoadData"); !s)
      return s.code() == Code::out_of_memory ? s : refused(s);
  for (std::size_t i = 0; i < entries_.size(); ++i) {
    CUfunction& function = place->ready.functions[i];
    Status s;
    if (library_ != nullptr) {
      s = driver_.status(api.cuKernelGetFunction(&function, kernels_[i]), "cuKernelGetFunction");
      if (s && api.cuFuncLoad != nullptr)
        s = driver_.status(api.cuFuncLoad(function), "cuFuncLoad");
    } else {
      s = driver_.status(api.cuModuleGetFunction(&function, place->module, entries_[i].c_str()),
                         fmt::format("cuModuleGetFunction({})", entries_[i]));
      if (s && smem_bytes_ > 0)
        s = driver_.status(
            api.cuFuncSetAttribute(function, CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES, smem_bytes_),
            "cuFuncSetAttribute");
    }
    if (!s) {
      if (place->module != nullptr)
        static_cast<void>(api.cuModuleUnload(place->module));
      return s;
    }
    if (library_ != nullptr)
      place->ready.launchable[i] = reinterpret_cast<CUfunction>(kernels_[i]);
    else
      place->ready.launchable[i] = function;
  }
  const Ready ready = place->ready;
  place->next = places_.load(std::memory_order_relaxed);
  places_.store(place.release(), std::memory_order_release);
  return ready;
}

Result<int> Module::attribute(const Ready& ready, std::size_t entry, int attribute) const {
  int value = 0;
  if (Status s = driver_.status(driver_.api().cuFuncGetAttribute(&value, attribute, ready.functions[entry]),
                                "cuFuncGetAttribute");
      !s)
    return s;
  return value;
}

Status launch(const Module& module, const Module::Ready& ready, std::size_t index, LaunchPlan::Grid grid, int threads,
              int smem_bytes, int cluster_x, CUstream stream, void** parameters) {
  const Driver& driver = module.driver();
  const Api& api = driver.api();
  const CUfunction function = ready.launchable[index];
  if (cluster_x == 0)
    return driver.status(api.cuLaunchKernel(function, grid.x, grid.y, grid.z, static_cast<unsigned>(threads), 1, 1,
                                            static_cast<unsigned>(smem_bytes), stream, parameters, nullptr),
                         "cuLaunchKernel");
  if (api.cuLaunchKernelEx == nullptr)
    return Status::error(Code::unsupported, "this driver is older than CUDA 11.6: it launches no clusters");
  LaunchAttribute cluster;
  cluster.id = CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION;
  cluster.value.cluster = {static_cast<unsigned>(cluster_x), 1, 1};
  LaunchConfig config;
  config.grid_x = grid.x;
  config.grid_y = grid.y;
  config.grid_z = grid.z;
  config.block_x = static_cast<unsigned>(threads);
  config.shared_bytes = static_cast<unsigned>(smem_bytes);
  config.stream = stream;
  config.attributes = &cluster;
  config.attribute_count = 1;
  return driver.status(api.cuLaunchKernelEx(&config, function, parameters, nullptr), "cuLaunchKernelEx");
}

} // namespace kiln::cuda
