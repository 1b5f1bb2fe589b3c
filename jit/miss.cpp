#include "jit/miss.h"

#include <algorithm>
#include <ctime>
#include <vector>

#include <fmt/format.h>

namespace kiln {
namespace {

std::string join(const std::vector<std::string>& words, const char* separator) {
  std::string out;
  for (const std::string& word : words)
    out += (out.empty() ? "" : separator) + word;
  return out;
}

std::string short_text(const Digest& key) {
  return key.hex().substr(0, 16);
}

/// The fields in which two key texts (lines of name=value, the desc's fields counting each) differ, as far as the
/// readable columns tell.
std::vector<std::string> differing_fields(const StoreRow& row, const KernelDesc& canonical, const KeyFields& wanted) {
  std::vector<std::string> fields;
  if (row.generator != wanted.generator)
    fields.emplace_back("generator");
  if (row.isa != wanted.isa)
    fields.emplace_back("isa");
  const Result<KernelDesc> other = parse_desc(row.desc);
  const OpSpec& op = *find_op(canonical.op);
  for (std::size_t i = 0; i < op.fields.size(); ++i)
    if (!other || other->value[i] != canonical.value[i])
      fields.emplace_back(op.fields[i].name);
  if (fields.empty())
    fields.emplace_back("features, vector_bits or pack_layout");
  return fields;
}

std::string without_a_store(const Config& config) {
  if (config.disk_disabled)
    return "KILN_DISABLE leaves the cache on disk out";
  if (config.cache_unwanted)
    return "the cache on disk is off (KILN_CACHE)";
  return "there is no cache on disk; the log says why";
}

/// Not through fmt/chrono.h, which would tie libkiln to a shared libfmt and so to a C++ runtime.
std::string utc_text(std::time_t time) {
  std::tm parts{};
  char text[64];
  const bool known = ::gmtime_r(&time, &parts) != nullptr;
  return known && std::strftime(text, sizeof text, "%Y-%m-%d %H:%M:%S UTC", &parts) != 0 ? text : "an unknown day";
}

/// What happened to a kernel that is not there; empty when that is not remembered.
std::string what_became_of(const std::optional<UsageFile::Trace>& trace, const Config& config) {
  if (!trace)
    return {};
  const std::string when = utc_text(static_cast<std::time_t>(trace->at));
  switch (trace->event) {
  case UsageFile::Event::evicted:
    return fmt::format("it was stored, and evicted on {} as the least recently used (KILN_CACHE_MAX_MB is {} here)",
                       when, config.cache_max_mb);
  case UsageFile::Event::refused:
    return fmt::format("it was stored, and refused on {}; `kiln cache stats` has the reasons", when);
  case UsageFile::Event::removed:
    return fmt::format("it was stored, and removed on {}", when);
  case UsageFile::Event::used:
    return fmt::format("it was stored, last used on {}, and is gone with the rest of that database: cleared, damaged "
                       "or of another schema",
                       when);
  }
  return {};
}

/// Why this stored kernel of the very desc that is wanted does not serve, and in how many fields it differs.
struct SameDesc {
  std::size_t differences = 0;
  std::string why;
};
SameDesc same_desc(Store& store, const Digest& key, const KeyFields& wanted, const Explanation& explanation) {
  const std::string name = fmt::format("kernel {} of the same desc is stored", short_text(key));
  const Result<StoreRow> row = store.look(key);
  const Result<KeyFields> fields = row ? key_fields_of(*row) : Result<KeyFields>(row.status());
  if (!fields)
    return {SIZE_MAX - 1, fmt::format("{}, but {}", name, fields.status().message())};
  const std::vector<std::string> differences = fields->differences_from(wanted);
  if (differences.empty())
    return {SIZE_MAX - 1, name + " by a version of Kiln whose keys are made of other fields"};
  std::string why = fmt::format("{}: {}", name, join(differences, "; "));
  if (fields->isa != wanted.isa)
    for (const Explanation::Candidate& candidate : explanation.candidates)
      if (name_of(candidate.implementation->isa) == fields->isa)
        why += fmt::format("; {} is not taken here: {}", fields->isa, candidate.reason);
  return {differences.size(), std::move(why)};
}

} // namespace

void explain_miss(Explanation& explanation, Store* store, const Status& stored, const KeyFields& wanted,
                  const Config& config) {
  if (store == nullptr) {
    explanation.why = without_a_store(config);
    return;
  }
  explanation.why =
      stored.code() != Code::not_found ? stored.message() : what_became_of(store->trace(explanation.key), config);
  const bool is_known = !explanation.why.empty();
  const Result<std::vector<Store::Listed>> rows = store->list();
  std::size_t fewest = SIZE_MAX, fewest_of_desc = SIZE_MAX;
  for (const Store::Listed& listed : rows ? *rows : std::vector<Store::Listed>()) {
    const StoreRow& row = listed.row;
    if (row.op != find_op(explanation.canonical.op)->name || row.key == explanation.key)
      continue;
    if (row.desc == wanted.desc && !is_known) {
      SameDesc same = same_desc(*store, row.key, wanted, explanation);
      if (same.differences < fewest_of_desc) {
        fewest_of_desc = same.differences;
        explanation.why = std::move(same.why);
      }
    }
    const std::vector<std::string> fields = differing_fields(row, explanation.canonical, wanted);
    if (fields.size() < fewest) {
      fewest = fields.size();
      explanation.nearest =
          fmt::format("{} {} ({}) differs in {}", short_text(row.key), row.desc, row.isa, join(fields, ", "));
    }
  }
}

} // namespace kiln
