#include "jit/kernel.h"

#include <chrono>

#include <fmt/format.h>

namespace kiln {

std::string_view name_of(Source source) {
  constexpr std::string_view names[] = {"memory", "disk", "compiled", "builtin"};
  return names[static_cast<int>(source)];
}

Runtime::Runtime(Machine m, int threads, ParallelForFn host_function, void* host)
    : machine(std::move(m)), parallel(threads, host_function, host) {}

Result<Kernel> Kernel::load(Runtime& runtime, const Implementation& implementation, const KernelDesc& canonical,
                            const Digest& key, CodeObject code) {
  const auto start = std::chrono::steady_clock::now();
  const Target& target = runtime.machine.target;
  if (code.arch != target.arch)
    return Status::error(Code::unsupported, fmt::format("{}: code for {} on a machine of {}", canonical.text(), name_of(code.arch), name_of(target.arch)));
  if (!target.features.contains(code.features))
    return Status::error(Code::unsupported, fmt::format("{}: the code needs {}, which this machine lacks", canonical.text(),
                                                        code.features.without(target.features).text()));
  Kernel kernel;
  kernel.op_ = find_op(canonical.op);
  kernel.implementation_ = &implementation;
  kernel.desc_ = canonical;
  kernel.m_range_ = kernel.op_->m_range(canonical);
  kernel.key_ = key;
  Result<std::shared_ptr<const void>> plan = kernel.op_->bind_plan(code.plan);
  if (!plan)
    return plan.status();
  kernel.plan_ = std::move(*plan);
  if (code.entries.empty() || code.image.empty())
    return Status::error(Code::integrity, fmt::format("{}: a code object without code", canonical.text()));
  Result<const std::uint8_t*> text = runtime.memory.load(code.image, code.alignment);
  if (!text)
    return text.status();
  kernel.runtime_ = &runtime;
  kernel.text_ = *text;
  kernel.text_bytes_ = code.image.size();
  kernel.entry_ = kernel.text_ + code.entries.front().offset;
  code.image = {};
  kernel.code_ = std::move(code);
  kernel.load_us = std::chrono::duration_cast<std::chrono::microseconds>(std::chrono::steady_clock::now() - start).count();
  return kernel;
}

Result<Kernel> Kernel::builtin(Runtime& runtime, const Implementation& implementation, const KernelDesc& canonical,
                               std::string_view pack_layout) {
  Kernel kernel;
  kernel.op_ = find_op(canonical.op);
  kernel.implementation_ = &implementation;
  kernel.desc_ = canonical;
  kernel.m_range_ = kernel.op_->m_range(canonical);
  kernel.code_.arch = runtime.machine.target.arch;
  kernel.code_.plan = implementation.builtin_plan(canonical, pack_layout);
  Result<std::shared_ptr<const void>> plan = kernel.op_->bind_plan(kernel.code_.plan);
  if (!plan)
    return plan.status();
  kernel.plan_ = std::move(*plan);
  kernel.runtime_ = &runtime;
  kernel.entry_ = implementation.builtin;
  kernel.source = Source::builtin;
  return kernel;
}

Kernel::Kernel(Kernel&& other) noexcept
    : source(other.source), compile_us(other.compile_us), load_us(other.load_us), runtime_(other.runtime_), op_(other.op_),
      implementation_(other.implementation_), desc_(other.desc_), m_range_(other.m_range_), key_(other.key_),
      code_(std::move(other.code_)), text_(std::exchange(other.text_, nullptr)), text_bytes_(other.text_bytes_),
      entry_(other.entry_), plan_(std::move(other.plan_)) {}

Kernel::~Kernel() {
  if (text_ != nullptr)
    runtime_->memory.release(text_);
}

} // namespace kiln
