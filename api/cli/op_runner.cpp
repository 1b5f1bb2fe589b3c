#include "api/cli/op_runner.h"

#include <algorithm>
#include <cassert>
#include <memory>

#include <fmt/format.h>

#include "jit/ops/int8_mm.h"
#include "jit/ops/int8_mm_driver.h"

namespace kiln::cli {
namespace {

enum Int8MmTensor { kA, kB, kC };

std::int64_t row_length(const Tensor& matrix) {
  return matrix.shape[1];
}

Result<Invocation> prepare_int8_mm(const Kernel& kernel, const KernelDesc& desc, std::span<Tensor> tensors) {
  const auto& plan = *static_cast<const int8_mm::Plan*>(kernel.plan());
  const auto b_layout = static_cast<int8_mm::BLayout>(desc.value[int8_mm::kBLayout]);
  Result<int8_mm::Pack> made =
      int8_mm::Pack::make(plan.layout, tensors[kB].as<std::int8_t>(), row_length(tensors[kB]), b_layout,
                          desc.value[int8_mm::kN], desc.value[int8_mm::kK], kernel.runtime().parallel);
  if (!made)
    return made.status();
  const auto pack = std::make_shared<const int8_mm::Pack>(std::move(*made));
  const int8_mm::Args args = {.m = desc.value[int8_mm::kM],
                              .a = tensors[kA].as<std::int8_t>(),
                              .lda = row_length(tensors[kA]),
                              .pack = pack.get(),
                              .c = tensors[kC].as<std::int32_t>(),
                              .ldc = row_length(tensors[kC])};
  return Invocation([&kernel, pack, args] { return int8_mm::run(kernel, args); });
}

void reference_int8_mm(const KernelDesc& desc, std::span<Tensor> tensors) {
  int8_mm::reference(desc.value[int8_mm::kM], desc.value[int8_mm::kN], desc.value[int8_mm::kK],
                     tensors[kA].as<std::int8_t>(), row_length(tensors[kA]), tensors[kB].as<std::int8_t>(),
                     row_length(tensors[kB]), static_cast<int8_mm::BLayout>(desc.value[int8_mm::kBLayout]),
                     tensors[kC].as<std::int32_t>(), row_length(tensors[kC]));
}

constexpr OpRunner kRunners[] = {
    {.op = OpId::int8_mm, .prepare = prepare_int8_mm, .reference = reference_int8_mm, .relative_bound = 0},
};

} // namespace

const OpRunner& runner_of(OpId op) {
  const auto runner =
      std::find_if(std::begin(kRunners), std::end(kRunners), [&](const OpRunner& row) { return row.op == op; });
  assert(runner != std::end(kRunners));
  return *runner;
}

Result<std::vector<Tensor>> random_tensors(const KernelDesc& desc) {
  std::vector<Tensor> tensors;
  for (const TensorSpec& spec : find_op(desc.op)->tensors) {
    Result<Tensor> tensor = make_tensor(spec.dtype(desc), spec.shape(desc));
    if (!tensor)
      return Status::error(tensor.status().code(),
                           fmt::format("tensor {} of {}: {}", spec.name, desc.text(), tensor.status().message()));
    if (!spec.output)
      fill_random(*tensor, tensors.size());
    tensors.push_back(std::move(*tensor));
  }
  return tensors;
}

Result<Check> check_outputs(const KernelDesc& desc, std::span<Tensor> tensors) {
  const OpSpec& op = *find_op(desc.op);
  const OpRunner& runner = runner_of(desc.op);
  std::vector<Tensor> actual;
  for (std::size_t i = 0; i < tensors.size(); ++i) {
    if (!op.tensors[i].output)
      continue;
    Result<Tensor> expected = make_tensor(tensors[i].dtype, tensors[i].shape);
    if (!expected)
      return expected.status();
    actual.push_back(std::exchange(tensors[i], std::move(*expected)));
  }
  runner.reference(desc, tensors);
  Check check{.ok = true};
  auto output = actual.begin();
  for (std::size_t i = 0; i < tensors.size(); ++i) {
    if (!op.tensors[i].output)
      continue;
    const Difference found = difference(*output, tensors[i]);
    check.ok = check.ok && found.relative <= runner.relative_bound;
    check.difference.max_abs = std::max(check.difference.max_abs, found.max_abs);
    check.difference.relative = std::max(check.difference.relative, found.relative);
    tensors[i] = std::move(*output++);
  }
  return check;
}

} // namespace kiln::cli
