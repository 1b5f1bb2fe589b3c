#include "jit/kernel.h"

#include <chrono>
#include <utility>

#include <fmt/format.h>

#include "jit/cuda/module.h"

namespace kiln {

std::string_view name_of(Source source) {
  constexpr std::string_view names[] = {"memory", "disk", "compiled", "builtin", "remote"};
  return names[static_cast<int>(source)];
}

Runtime::Runtime(Machine m, bool for_perf_map, int threads, ParallelForFn host_function, void* host, std::string cuda)
    : machine(std::move(m)), memory(for_perf_map), parallel(threads, host_function, host),
      cuda_library(std::move(cuda)) {}

Result<cuda::Driver*> Runtime::cuda() const {
  return cuda::Driver::open(cuda_library);
}

/// All but the code in memory.
Status Kernel::bind(Runtime& runtime, const Implementation& implementation, const KernelDesc& canonical,
                    CodeObject code) {
  runtime_ = &runtime;
  op_ = find_op(canonical.op);
  implementation_ = &implementation;
  desc_ = canonical;
  m_range_ = op_->m_range(canonical);
  Result<std::shared_ptr<const void>> plan = op_->bind_plan(code.plan);
  if (!plan)
    return plan.status();
  plan_ = std::move(*plan);
  texts_ = {canonical.text(), code.features.text(), "", op_->pack_layout ? op_->pack_layout(plan_.get()) : ""};
  code_ = std::move(code);
  return {};
}

Status Kernel::check_machine(const Target& target, const Implementation& implementation, const KernelDesc& canonical,
                             const CodeObject& code) {
  if (code.format == CodeFormat::ptx) // stored without a driver; making it anew costs less than a look
    return Status::error(Code::unsupported,
                         fmt::format("{}: it is PTX that has not been assembled yet", canonical.text()));
  if (code.format == CodeFormat::cubin)
    return {};
  if (code.arch != target.arch)
    return Status::error(Code::unsupported, fmt::format("{}: code for {} on a machine of {}", canonical.text(),
                                                        name_of(code.arch), name_of(target.arch)));
  if (!target.features.contains(code.features))
    return Status::error(Code::unsupported,
                         fmt::format("{}: the code needs {}, which this machine lacks", canonical.text(),
                                     code.features.without(target.features).text()));
  if (implementation.vector_bits != nullptr && implementation.vector_bits(target) != code.vector_bits)
    return Status::error(Code::unsupported,
                         fmt::format("{}: code for vectors of {} bits on a machine of {}", canonical.text(),
                                     code.vector_bits, implementation.vector_bits(target)));
  return {};
}

Result<Kernel> Kernel::load(Runtime& runtime, const Implementation& implementation, const KernelDesc& canonical,
                            const Digest& key, LoadableCode loadable) {
  const auto start = std::chrono::steady_clock::now();
  const auto microseconds = [&] {
    return std::chrono::duration_cast<std::chrono::microseconds>(std::chrono::steady_clock::now() - start).count();
  };
  CodeObject code = std::move(loadable).take();
  if (code.format != CodeFormat::flat) {
    const Result<cuda::Driver*> driver = runtime.cuda();
    if (!driver)
      return driver.status();
    const auto named = [&](const Status& status) {
      return Status::error(status.code(), fmt::format("{}: {}", canonical.text(), status.message()));
    };
    const Result<cuda::Module*> module = (*driver)->load(code, canonical.device.index);
    if (!module)
      return named(module.status());
    // In the caller's context already: its first call loads nothing.
    const Result<cuda::ContextScope> scope = cuda::ContextScope::enter(**driver, canonical.device.index, nullptr);
    if (!scope)
      return named(scope.status());
    if (const auto ready = (*module)->ready(scope->context(), nullptr); !ready)
      return named(ready.status());
    Kernel kernel;
    kernel.code_bytes_ = std::exchange(code.image, {}).size();
    if (Status status = kernel.bind(runtime, implementation, canonical, std::move(code)); !status)
      return status;
    kernel.key_ = key;
    kernel.texts_.key = key.hex();
    kernel.module_ = *module;
    kernel.load_us = microseconds();
    return kernel;
  }
  if (Status status = check_machine(runtime.machine.target, implementation, canonical, code); !status)
    return status;
  if (code.entries.empty() || code.image.empty())
    return Status::error(Code::integrity, fmt::format("{}: a code object without code", canonical.text()));
  const Bytes image = std::exchange(code.image, {});
  Kernel kernel;
  if (Status status = kernel.bind(runtime, implementation, canonical, std::move(code)); !status)
    return status;
  kernel.key_ = key;
  kernel.texts_.key = key.hex();
  Result<const std::uint8_t*> text = runtime.memory.load(image, kernel.code_.alignment);
  if (!text)
    return text.status();
  kernel.text_ = *text;
  kernel.code_bytes_ = image.size();
  kernel.entry_ = kernel.text_ + kernel.code_.entries.front().offset;
  kernel.load_us = microseconds();
  return kernel;
}

Result<Kernel> Kernel::builtin(Runtime& runtime, const Implementation& implementation, const KernelDesc& canonical,
                               std::string_view pack_layout) {
  CodeObject no_code;
  no_code.arch = runtime.machine.target.arch;
  no_code.plan = implementation.builtin_plan(canonical, pack_layout);
  Kernel kernel;
  if (Status status = kernel.bind(runtime, implementation, canonical, std::move(no_code)); !status)
    return status;
  kernel.entry_ = implementation.builtin;
  kernel.source = Source::builtin;
  return kernel;
}

Kernel::Kernel(Kernel&& other) noexcept
    : source(other.source), compile_us(other.compile_us), load_us(other.load_us), runtime_(other.runtime_),
      op_(other.op_), implementation_(other.implementation_), desc_(other.desc_), m_range_(other.m_range_),
      key_(other.key_), code_(std::move(other.code_)), text_(std::exchange(other.text_, nullptr)),
      code_bytes_(other.code_bytes_), module_(other.module_), entry_(other.entry_), plan_(std::move(other.plan_)),
      texts_(std::move(other.texts_)) {}

Kernel::~Kernel() {
  if (text_ != nullptr)
    runtime_->memory.release(text_);
}

} // namespace kiln
