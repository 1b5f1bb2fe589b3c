#include <memory>

#include "api/cli/command.h"
#include "api/cli/op_runner.h"
#include "api/cli/operands.h"
#include "api/cli/output.h"
#include "api/cli/timing.h"
#include "api/session.h"

namespace kiln::cli {
namespace {

/// Long enough for a clock that has to speed up, and for the median to settle.
constexpr std::chrono::milliseconds kDuration{1000};
constexpr std::size_t kFewestCalls = 5;

struct Options {
  std::vector<std::string> words;
  bool json = false;
};

Result<Exit> bench(const Options& options) {
  const Result<Operands> operands = parse_operands(options.words);
  if (!operands)
    return operands.status();
  if (!operands->files.empty())
    return Status::error(Code::invalid_argument, "bench makes its own tensors: give fields only");
  const Result<KernelDesc> desc = desc_from_shapes(*operands, [](std::string_view) { return nullptr; });
  if (!desc)
    return desc.status();
  const Result<std::unique_ptr<Engine>> engine = make_engine({});
  if (!engine)
    return engine.status();
  const Result<KernelRef> kernel = (*engine)->get(*desc);
  if (!kernel)
    return kernel.status();
  Result<std::vector<Tensor>> tensors = random_tensors(*desc, *operands);
  if (!tensors)
    return tensors.status();
  const Result<Invocation> invocation = runner_of(desc->op).prepare(**kernel, *desc, *tensors);
  if (!invocation)
    return invocation.status();
  const Result<Timing> timing = time_calls(*invocation, kFewestCalls, kDuration);
  if (!timing)
    return timing.status();
  if (options.json)
    print_json(run_report(*desc, **kernel, *timing));
  else
    print_run_report(*desc, **kernel, *timing, nullptr);
  return Exit::ok;
}

} // namespace

Command bench_command(Arguments kiln) {
  const auto options = std::make_shared<Options>();
  const Arguments arguments = kiln.add_command("bench", "Time a kernel for a second on random tensors that stay warm");
  arguments.required_words("OP", options->words, "The op, then field=value");
  arguments.flag("--json", options->json, "Print one JSON object");
  return {arguments, [options] { return bench(*options); }};
}

} // namespace kiln::cli
