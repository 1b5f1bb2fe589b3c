#include "jit/loadable_code.h"

namespace kiln {

Result<LoadableCode> LoadableCode::compile(const Implementation& implementation, const KernelDesc& canonical,
                                           const Target& target, std::string_view pack_layout) {
  Result<CodeObject> code = implementation.compile(canonical, target, pack_layout);
  if (!code)
    return code.status();
  return LoadableCode(std::move(*code));
}

Result<LoadableCode> LoadableCode::parse(const VerifiedRow& row) {
  Result<CodeObject> code = CodeObject::parse(row->code);
  if (!code)
    return code.status();
  return LoadableCode(std::move(*code));
}

} // namespace kiln
