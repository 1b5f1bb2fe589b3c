#include "jit/loadable_code.h"

#include "jit/cuda/assemble.h"

namespace kiln {

Result<LoadableCode> LoadableCode::compile(const Implementation& implementation, const KernelDesc& canonical,
                                           const Target& target, std::string_view pack_layout) {
  Result<CodeObject> code = implementation.compile(canonical, target, pack_layout);
  if (!code)
    return code.status();
  return LoadableCode(std::move(*code));
}

Result<LoadableCode> LoadableCode::compile(const Implementation& implementation, const KernelDesc& canonical,
                                           const Target& target, std::string_view pack_layout,
                                           std::string_view configuration, std::string_view tuned_for) {
  if (implementation.compile_configured == nullptr)
    return Status::error(Code::unsupported, "this implementation has but one configuration");
  Result<CodeObject> code = implementation.compile_configured(canonical, target, pack_layout, configuration);
  if (!code)
    return code.status();
  code->tuned_for = tuned_for;
  return LoadableCode(std::move(*code));
}

Result<LoadableCode> LoadableCode::assemble(const LoadableCode& ptx, cuda::Driver& driver, int device_index,
                                            std::string& said) {
  Result<cuda::Assembled> made = cuda::assemble_with_driver(driver, device_index, *ptx);
  if (!made)
    return made.status();
  said = std::move(made->log);
  return LoadableCode(std::move(made->cubin));
}

Result<LoadableCode> LoadableCode::assemble(const LoadableCode& ptx, const std::string& ptxas, std::string& said) {
  Result<cuda::Assembled> made = cuda::assemble_with_ptxas(ptxas, *ptx);
  if (!made)
    return made.status();
  said = std::move(made->log);
  return LoadableCode(std::move(made->cubin));
}

Result<LoadableCode> LoadableCode::parse(const VerifiedRow& row) {
  Result<CodeObject> code = CodeObject::parse(row->code);
  if (!code)
    return code.status();
  return LoadableCode(std::move(*code));
}

} // namespace kiln
