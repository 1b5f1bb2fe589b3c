#include <map>
#include <memory>
#include <optional>

#include <fmt/format.h>

#include "api/cli/command.h"
#include "api/cli/npy.h"
#include "api/cli/op_runner.h"
#include "api/cli/operands.h"
#include "api/cli/output.h"
#include "api/cli/timing.h"
#include "api/session.h"

namespace kiln::cli {
namespace {

struct Options {
  std::vector<std::string> words;
  std::optional<std::string> target;
  std::size_t repeat = 3;
  bool check = false, json = false;
};

using Arrays = std::map<std::string, NpyArray, std::less<>>;

/// The files given for inputs, by tensor.
Result<Arrays> read_inputs(const Operands& operands) {
  Arrays arrays;
  for (const TensorSpec& tensor : operands.op->tensors)
    for (const auto& [name, path] : operands.files) {
      if (name != tensor.name || tensor.output)
        continue;
      Result<NpyArray> array = read_npy(path);
      if (!array)
        return array.status();
      arrays.emplace(name, std::move(*array));
    }
  return arrays;
}

/// Puts the arrays in the places of random tensors. Their shapes have been checked.
Status take_arrays(const KernelDesc& desc, Arrays& arrays, const Operands& operands, std::vector<Tensor>& tensors) {
  const OpSpec& op = *operands.op;
  for (std::size_t i = 0; i < tensors.size(); ++i) {
    const auto array = arrays.find(op.tensors[i].name);
    if (array == arrays.end())
      continue;
    const std::string_view descr = npy_descr(tensors[i].dtype);
    if (array->second.descr != descr) {
      std::string path;
      for (const auto& [name, file] : operands.files)
        if (name == op.tensors[i].name)
          path = file;
      return Status::error(Code::invalid_argument,
                           fmt::format("{}: has dtype '{}': tensor {} of {} is {}, which travels as '{}'", path,
                                       array->second.descr, op.tensors[i].name, desc.text(), name_of(tensors[i].dtype),
                                       descr));
    }
    tensors[i].buffer = std::move(array->second.buffer);
  }
  return {};
}

Status write_outputs(const Operands& operands, const std::vector<Tensor>& tensors) {
  for (std::size_t i = 0; i < tensors.size(); ++i)
    for (const auto& [name, path] : operands.files)
      if (operands.op->tensors[i].output && name == operands.op->tensors[i].name)
        if (Status status = write_npy(path, tensors[i]); !status)
          return status;
  return {};
}

Json check_json(const Check& check) {
  return {{"ok", check.ok}, {"max_abs_err", check.difference.max_abs}, {"rel_err", check.difference.relative}};
}

Result<Exit> run(const Options& options) {
  const Result<Operands> operands = parse_operands(options.words);
  if (!operands)
    return operands.status();
  Result<Arrays> arrays = read_inputs(*operands);
  if (!arrays)
    return arrays.status();
  const Result<KernelDesc> desc = desc_from_shapes(*operands, [&](std::string_view tensor) {
    const auto array = arrays->find(tensor);
    return array == arrays->end() ? nullptr : &array->second.shape;
  });
  if (!desc)
    return desc.status();
  const Result<std::optional<Target>> target = parse_target(options.target);
  if (!target)
    return target.status();
  HostOptions host;
  if (*target) {
    if (desc->device.kind != DeviceKind::cuda || (*target)->arch != Arch::nvptx)
      return Status::error(
          Code::invalid_argument,
          fmt::format("--target {}: run takes the target of an older GPU than device=cuda names; other "
                      "machines' kernels run on those machines",
                      *options.target));
    host.gpu_target = **target;
    host.settings.cache = CacheMode::off;
  }
  const Result<std::unique_ptr<Engine>> engine = make_engine(host);
  if (!engine)
    return engine.status();
  const Result<KernelRef> kernel = (*engine)->get(*desc);
  if (!kernel)
    return kernel.status();

  Result<std::vector<Tensor>> tensors = random_tensors(*desc, *operands);
  if (!tensors)
    return tensors.status();
  if (Status status = take_arrays(*desc, *arrays, *operands, *tensors); !status)
    return status;
  const Result<Invocation> invocation = runner_of(desc->op).prepare(**kernel, *desc, *tensors);
  if (!invocation)
    return invocation.status();
  const Result<Timing> timing = time_calls(*invocation, options.repeat, {});
  if (!timing)
    return timing.status();
  if (invocation->finish)
    if (Status status = invocation->finish(); !status)
      return status;
  Check check;
  if (options.check) {
    const Result<Check> checked = check_outputs(*desc, *tensors);
    if (!checked)
      return checked.status();
    check = *checked;
  }
  if (Status status = write_outputs(*operands, *tensors); !status)
    return status;

  if (options.json) {
    Json report = run_report(*desc, **kernel, *timing);
    report["check"] = options.check ? check_json(check) : Json();
    print_json(report);
  } else {
    print_run_report(*desc, **kernel, *timing, options.check ? &check : nullptr);
  }
  return options.check && !check.ok ? Exit::failed : Exit::ok;
}

} // namespace

Command run_command(Arguments kiln) {
  const auto options = std::make_shared<Options>();
  const Arguments arguments = kiln.add_command("run", "Get a kernel and run it, on files or on random tensors");
  arguments.required_words(
      "OP", options->words,
      "The op, then field=value, tensor=@in.npy, out=@out.npy; an optional tensor also as tensor=NUMBER or =random");
  arguments.option("--target", options->target,
                   "With device=cuda: the kernel of an older GPU (sm_80), on the one that is there; without the cache");
  arguments.flag("--check", options->check, "Compare with the reference op");
  arguments.option("--repeat", options->repeat, 1, 1'000'000, "Timed calls, after one that is not timed");
  arguments.flag("--json", options->json, "Print one JSON object");
  return {arguments, [options] { return run(*options); }};
}

} // namespace kiln::cli
