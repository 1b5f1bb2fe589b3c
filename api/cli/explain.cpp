#include <memory>
#include <optional>

#include <fmt/format.h>

#include "api/cli/command.h"
#include "api/cli/operands.h"
#include "api/cli/output.h"
#include "api/session.h"

namespace kiln::cli {
namespace {

struct Options {
  std::vector<std::string> words;
  std::optional<std::string> target;
  bool json = false;
};

bool has_key(const Explanation& e) {
  return !e.key_text.empty();
}

Json explanation_json(const KernelDesc& desc, const Explanation& e) {
  Json candidates = Json::array();
  for (const Explanation::Candidate& candidate : e.candidates)
    candidates.push_back({{"isa", name_of(candidate.implementation->isa)},
                          {"backend", name_of(candidate.implementation->backend)},
                          {"generator", name_of(candidate.implementation->generator)},
                          {"taken", candidate.taken},
                          {"reason", candidate.reason}});
  Json without = Json::array();
  for (const IsaPath isa : e.without_implementation)
    without.push_back(name_of(isa));
  return {{"op", find_op(desc.op)->name},
          {"desc", desc.text()},
          {"canonical", e.canonical.text()},
          {"m_range", {e.m_range.min, e.m_range.max}},
          {"candidates", candidates},
          {"without_implementation", without},
          {"isa", e.taken ? Json(name_of(e.taken->isa)) : Json()},
          {"key", has_key(e) ? e.key.hex() : ""},
          {"key_text", e.key_text},
          {"pack_layout", e.pack_layout},
          {"assumes", e.assumes},
          {"configuration", e.configuration},
          {"configuration_from", e.configuration.empty() ? ""
                                 : e.tuned_for.empty()   ? "heuristic"
                                                         : "tuned"},
          {"tuned_for", e.tuned_for},
          {"tier", e.tier},
          {"nearest", e.nearest},
          {"why", e.why}};
}

/// What a get would do.
std::string outcome_text(const Explanation& e) {
  if (e.taken == nullptr)
    return "refused: no candidate is left";
  if (!has_key(e))
    return "part of the library: nothing to cache";
  return e.tier == "none" ? "miss: a get would compile it" : fmt::format("hit: {}", e.tier);
}

void print_explanation(const KernelDesc& desc, const Explanation& e) {
  Columns facts;
  facts.row({"desc", desc.text()});
  facts.row({"kernel", e.canonical.text()});
  facts.row({"serves", fmt::format("m from {} to {}", e.m_range.min, e.m_range.max)});
  if (!e.pack_layout.empty())
    facts.row({"pack", e.pack_layout});
  if (!e.assumes.empty())
    facts.row({"assumes", e.assumes});
  if (!e.configuration.empty())
    facts.row({"configuration", configuration_text(e.configuration, e.tuned_for)});
  facts.row({"cache", outcome_text(e)});
  if (!e.nearest.empty())
    facts.row({"nearest", e.nearest});
  if (!e.why.empty())
    facts.row({"why", e.why});
  if (has_key(e))
    facts.row({"key", e.key.hex()});
  facts.print();
  if (has_key(e)) {
    print_line("\nthe key is the digest of");
    for (std::size_t start = 0, end; start < e.key_text.size(); start = end + 1) {
      end = std::min(e.key_text.find('\n', start), e.key_text.size());
      print_line("  " + e.key_text.substr(start, end - start));
    }
  }
  print_line("\ncandidates in order of preference");
  Columns candidates("  ");
  for (const Explanation::Candidate& candidate : e.candidates)
    candidates.row({candidate.taken ? "→" : " ", std::string(name_of(candidate.implementation->isa)),
                    std::string(name_of(candidate.implementation->backend)),
                    candidate.taken ? "taken" : candidate.reason});
  candidates.print();
  if (e.without_implementation.empty())
    return;
  std::string names;
  for (const IsaPath isa : e.without_implementation)
    names += (names.empty() ? "" : ", ") + std::string(name_of(isa));
  print_line(fmt::format("\nother paths here, without an implementation of {}: {}", find_op(desc.op)->name, names));
}

Result<Exit> explain(const Options& options) {
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
  const Explanation explanation = (*engine)->explain(*desc, *target ? &**target : nullptr);
  if (options.json)
    print_json(explanation_json(*desc, explanation));
  else
    print_explanation(*desc, explanation);
  return explanation.taken ? Exit::ok : Exit::failed;
}

} // namespace

Command explain_command(Arguments kiln) {
  const auto options = std::make_shared<Options>();
  const Arguments arguments =
      kiln.add_command("explain", "Every candidate, taken or refused and why; hit or miss, and what differs");
  arguments.required_words("OP", options->words, "The op, then field=value");
  arguments.option("--target", options->target, "Another machine, as for warmup; default: this one");
  arguments.flag("--json", options->json, "Print one JSON object");
  return {arguments, [options] { return explain(*options); }};
}

} // namespace kiln::cli
