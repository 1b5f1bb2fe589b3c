#pragma once
#include <functional>
#include <optional>
#include <span>

#include "api/cli/operands.h"
#include "api/cli/tensors.h"
#include "cache/status.h"
#include "jit/desc.h"
#include "jit/kernel.h"

namespace kiln::cli {

/// One call of a kernel on fixed tensors. The kernel and the tensors must outlive it.
struct Invocation {
  /// Of one call, where its arguments leave less to do than the desc says.
  struct Work {
    double operations = 0, bytes = 0;
  };
  std::function<Status()> call;   ///< returns when the result is there, on a GPU too
  std::function<Status()> finish; ///< brings the outputs from the GPU to their tensors; empty on CPUs
  std::optional<Work> work{};
};

/// What the command must know of an op to run it: one row an op. `tensors` stand in the order of the op's table.
struct OpRunner {
  OpId op;
  /// Does what a host does once (packs weights), so that the invocation is the call that a host repeats.
  Result<Invocation> (*prepare)(const Kernel&, const KernelDesc&, std::span<Tensor> tensors);
  /// Fills the outputs with the reference op's result.
  void (*reference)(const KernelDesc&, std::span<Tensor> tensors);
  /// Largest Difference::relative of an output that OPS.md allows.
  double relative_bound;
  /// An output, by its name, that has a bound on Difference::element instead.
  struct {
    std::string_view tensor;
    double bound = 0;
  } element_bound{};
  /// Null, or brings random inputs into the ranges that the op allows.
  void (*make_sensible)(const KernelDesc&, std::span<Tensor> tensors) = nullptr;
};

const OpRunner& runner_of(OpId op);

/// Every tensor of the op for this desc; inputs are random (seeded by their place). Of the optional ones those that
/// `operands` gives, with the number that it fills them with, if any.
Result<std::vector<Tensor>> random_tensors(const KernelDesc& desc, const Operands& operands = {});

struct Check {
  bool ok = false;
  Difference difference; ///< the worst output's; `relative` of those that are held against it
};
/// Compares the outputs with what the reference op makes of the same inputs.
Result<Check> check_outputs(const KernelDesc& desc, std::span<Tensor> tensors);

} // namespace kiln::cli
