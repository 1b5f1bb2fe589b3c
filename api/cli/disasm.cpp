#include <memory>

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
  bool json = false;
};

Result<Exit> disasm(const Options& options) {
  const Result<KernelDesc> desc = desc_from_words(options.words);
  if (!desc)
    return desc.status();
  const Result<std::unique_ptr<Engine>> engine = make_engine({});
  if (!engine)
    return engine.status();
  const Result<KernelRef> kernel = (*engine)->get(*desc);
  if (!kernel)
    return kernel.status();
  const Kernel& k = **kernel;
  if (k.text().empty())
    return Status::error(Code::unsupported,
                         fmt::format("the path {} is part of the library: it has no generated code to list",
                                     name_of(k.implementation().isa)));
  const Result<std::string> listing = disassemble(k.code().arch, k.text(), k.code().entries);
  if (!listing)
    return listing.status();
  if (options.json) {
    print_json({{"op", k.op().name},
                {"desc", k.desc().text()},
                {"key", k.key().hex()},
                {"isa", name_of(k.implementation().isa)},
                {"code_bytes", k.text().size()},
                {"listing", *listing}});
    return Exit::ok;
  }
  print_line(fmt::format("; {} ({}), {} bytes\n; {}", k.desc().text(), name_of(k.implementation().isa), k.text().size(),
                         k.key().hex()));
  print_line(listing->ends_with('\n') ? listing->substr(0, listing->size() - 1) : *listing);
  return Exit::ok;
}

} // namespace

Command disasm_command(CLI::App& kiln) {
  const auto options = std::make_shared<Options>();
  CLI::App* app = kiln.add_subcommand("disasm", "Listing of a kernel's code");
  app->add_option("OP", options->words, "The op, then field=value")->required();
  app->add_flag("--json", options->json, "Print one JSON object");
  return {app, [options] { return disasm(*options); }};
}

} // namespace kiln::cli
