#pragma once
#include <string_view>

#include "cache/store.h"
#include "jit/code_object.h"
#include "jit/implementation.h"

namespace kiln {

/// A code object that may be made executable: compiled just now by an implementation of this library, or of a row that
/// the cache authenticated. There is no other way to make one, and Kernel::load takes nothing else. The code is that of
/// the very bytes that were authenticated: they are parsed where they are, and never read again.
class LoadableCode {
public:
  static Result<LoadableCode> compile(const Implementation& implementation, const KernelDesc& canonical,
                                      const Target& target, std::string_view pack_layout);
  /// Code::integrity when the row holds no code object.
  static Result<LoadableCode> parse(const VerifiedRow& row);

  const CodeObject& operator*() const { return code_; }
  const CodeObject* operator->() const { return &code_; }
  CodeObject take() && { return std::move(code_); }

private:
  explicit LoadableCode(CodeObject code) : code_(std::move(code)) {}
  CodeObject code_;
};

} // namespace kiln
