#include "jit/kernel_key.h"

#include <fmt/format.h>

#include "jit/code_object.h"
#include "jit/op.h"

namespace kiln {

std::string KeyFields::text() const {
  return fmt::format("format=2\ngenerator={}\ndesc={}\nisa={}\narch={}\nfeatures={}\nvector_bits={}\npack_layout={}\n",
                     generator, desc, isa, name_of(arch), features.text(), vector_bits, pack_layout);
}

Digest key_of(std::string_view key_text) {
  return digest_of({reinterpret_cast<const std::uint8_t*>(key_text.data()), key_text.size()});
}

Status check_row(const StoreRow& row) {
  const auto not_so = [&](Code code, std::string_view what) {
    return Status::error(code, fmt::format("kernel {}: {}", row.key.hex(), what));
  };
  const Result<CodeObject> code = CodeObject::parse(row.code);
  if (!code)
    return not_so(Code::integrity, code.status().message());
  const OpSpec* op = find_op(row.op);
  if (op == nullptr)
    return not_so(Code::unsupported, fmt::format("its op '{}' is of another version of Kiln; known here are {}", row.op,
                                                 known_op_names()));
  const Result<KernelDesc> desc = parse_desc(row.desc);
  if (!desc)
    return not_so(Code::integrity, desc.status().message());
  if (desc->op != op->id || desc->text() != row.desc || op->canonical(*desc) != *desc)
    return not_so(Code::integrity, fmt::format("'{}' is no canonical desc of {}", row.desc, row.op));
  if (code->needs().text() != row.target)
    return not_so(Code::integrity,
                  fmt::format("its code is for {}, its target says {}", code->needs().text(), row.target));
  const Result<std::shared_ptr<const void>> plan = op->bind_plan(code->plan);
  if (!plan)
    return not_so(plan.status().code(), plan.status().message());

  KeyFields fields;
  fields.generator = row.generator;
  fields.desc = row.desc;
  fields.isa = row.isa;
  fields.arch = code->arch;
  fields.features = code->features;
  fields.vector_bits = code->vector_bits;
  if (op->pack_layout != nullptr)
    fields.pack_layout = op->pack_layout(plan->get());
  if (key_of(fields.text()) != row.key)
    return not_so(Code::integrity, "its key is not the digest of what it says");
  return {};
}

} // namespace kiln
