#include "jit/kernel_key.h"

#include <fmt/format.h>

#include "jit/code_object.h"
#include "jit/op.h"

namespace kiln {

std::string KeyFields::text() const {
  return fmt::format("format=3\ngenerator={}\ndesc={}\nisa={}\narch={}\nfeatures={}\nvector_bits={}\nsm={}\n"
                     "pack_layout={}\n{}",
                     generator, desc, isa, name_of(arch), features.text(), vector_bits, sm, pack_layout,
                     tuning.empty() ? "" : fmt::format("tuning={}\n", tuning));
}

Digest key_of(std::string_view key_text) {
  return digest_of({reinterpret_cast<const std::uint8_t*>(key_text.data()), key_text.size()});
}

std::vector<std::string> KeyFields::differences_from(const KeyFields& wanted) const {
  std::vector<std::string> out;
  const auto compare = [&](std::string_view name, const std::string& there, const std::string& here) {
    const auto shown = [](const std::string& text) { return text.empty() ? std::string("none") : text; };
    if (there != here)
      out.push_back(fmt::format("{} {} there, {} here", name, shown(there), shown(here)));
  };
  constexpr std::size_t short_digest = 16;
  compare("generator", generator.substr(0, short_digest), wanted.generator.substr(0, short_digest));
  compare("desc", desc, wanted.desc);
  compare("isa", isa, wanted.isa);
  compare("arch", std::string(name_of(arch)), std::string(name_of(wanted.arch)));
  compare("features", features.text(), wanted.features.text());
  compare("vector_bits", std::to_string(vector_bits), std::to_string(wanted.vector_bits));
  compare("sm", std::to_string(sm), std::to_string(wanted.sm));
  compare("pack_layout", pack_layout, wanted.pack_layout);
  compare("tuning", tuning, wanted.tuning);
  return out;
}

namespace {

Status not_so(const StoreRow& row, Code code, std::string_view what) {
  return Status::error(code, fmt::format("kernel {}: {}", row.key.hex(), what));
}

} // namespace

Result<KeyFields> key_fields_of(const StoreRow& row) {
  const Result<CodeObject> code = CodeObject::parse(row.code);
  if (!code)
    return not_so(row, Code::integrity, code.status().message());
  const OpSpec* op = find_op(row.op);
  if (op == nullptr)
    return not_so(
        row, Code::unsupported,
        fmt::format("its op '{}' is of another version of Kiln; known here are {}", row.op, known_op_names()));
  if (code->needs().text() != row.target)
    return not_so(row, Code::integrity,
                  fmt::format("its code is for {}, its target says {}", code->needs().text(), row.target));
  const Result<std::shared_ptr<const void>> plan = op->bind_plan(code->plan);
  if (!plan)
    return not_so(row, plan.status().code(), plan.status().message());
  KeyFields fields;
  fields.generator = row.generator;
  fields.desc = row.desc;
  fields.isa = row.isa;
  fields.arch = code->arch;
  fields.features = code->features;
  fields.vector_bits = code->vector_bits;
  fields.sm = code->sm;
  fields.tuning = code->tuned_for;
  if (op->pack_layout != nullptr)
    fields.pack_layout = op->pack_layout(plan->get());
  return fields;
}

Status check_row(const StoreRow& row) {
  const Result<KeyFields> fields = key_fields_of(row);
  if (!fields)
    return fields.status();
  const Result<KernelDesc> desc = parse_desc(row.desc);
  if (!desc)
    return not_so(row, Code::integrity, desc.status().message());
  const OpSpec& op = *find_op(row.op);
  if (desc->op != op.id || desc->text() != row.desc || op.canonical(*desc) != *desc)
    return not_so(row, Code::integrity, fmt::format("'{}' is no canonical desc of {}", row.desc, row.op));
  if (key_of(fields->text()) != row.key)
    return not_so(row, Code::integrity, "its key is not the digest of what it says");
  return {};
}

} // namespace kiln
