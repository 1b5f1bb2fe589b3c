#include <memory>
#include <optional>

#include <fmt/format.h>

#include "api/cli/command.h"
#include "api/cli/operands.h"
#include "api/cli/output.h"
#include "api/session.h"
#include "backends/llvm/disassemble.h"

namespace kiln::cli {
namespace {

struct Options {
  std::vector<std::string> words;
  std::optional<std::string> target;
  bool json = false;
};

Result<Exit> disasm(const Options& options) {
  Result<KernelDesc> desc = desc_from_words(options.words);
  if (!desc)
    return desc.status();
  const Result<std::optional<Target>> target = parse_target(options.target);
  if (!target)
    return target.status();
  take_device_of(*target, *desc);
  const Result<std::unique_ptr<Engine>> engine = make_engine({});
  if (!engine)
    return engine.status();
  const Result<Engine::Made> made = (*engine)->code(*desc, *target ? &**target : nullptr);
  if (!made)
    return made.status();
  const CodeObject& code = made->code;
  const Result<std::string> listing = code.format == CodeFormat::ptx
                                          ? Result<std::string>(std::string(code.image.begin(), code.image.end()))
                                          : disassemble(code.arch, code.image, code.entries);
  if (!listing)
    return listing.status();
  if (options.json) {
    print_json({{"op", find_op(desc->op)->name},
                {"desc", made->canonical.text()},
                {"key", made->key.hex()},
                {"isa", name_of(made->implementation->isa)},
                {"code_bytes", made->code.image.size()},
                {"listing", *listing}});
    return Exit::ok;
  }
  print_line(fmt::format("{0} {1} ({2}), {3} bytes\n{0} {4}", code.format == CodeFormat::ptx ? "//" : ";",
                         made->canonical.text(), name_of(made->implementation->isa), made->code.image.size(),
                         made->key.hex()));
  print_line(listing->ends_with('\n') ? listing->substr(0, listing->size() - 1) : *listing);
  return Exit::ok;
}

} // namespace

Command disasm_command(Arguments kiln) {
  const auto options = std::make_shared<Options>();
  const Arguments arguments = kiln.add_command("disasm", "Listing of a kernel's code, or its PTX");
  arguments.required_words("OP", options->words, "The op, then field=value");
  arguments.option("--target", options->target, "Another machine, as for warmup; default: this one");
  arguments.flag("--json", options->json, "Print one JSON object");
  return {arguments, [options] { return disasm(*options); }};
}

} // namespace kiln::cli
