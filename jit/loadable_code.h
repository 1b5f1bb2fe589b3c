#pragma once
#include <string>
#include <string_view>

#include "cache/store.h"
#include "jit/code_object.h"
#include "jit/implementation.h"

namespace kiln {

namespace cuda {
class Driver;
} // namespace cuda

/// A code object that may be made executable: compiled just now by an implementation of this library (and
/// assembled, for a GPU), or of a row that the cache authenticated. There is no other way to make one, and Kernel::load
/// takes nothing else. The code is that of the very bytes that were authenticated: they are parsed where they are, and
/// never read again.
class LoadableCode {
public:
  static Result<LoadableCode> compile(const Implementation& implementation, const KernelDesc& canonical,
                                      const Target& target, std::string_view pack_layout);
  /// One of the row's configurations, `tuned_for` a device (CodeObject).
  static Result<LoadableCode> compile(const Implementation& implementation, const KernelDesc& canonical,
                                      const Target& target, std::string_view pack_layout,
                                      std::string_view configuration, std::string_view tuned_for);
  /// The cubin of PTX that was compiled just now, by the driver for its device, or by the program `ptxas`. `said`: what
  /// the assembler said. Errors as of cuda::assemble_with_driver and cuda::assemble_with_ptxas.
  static Result<LoadableCode> assemble(const LoadableCode& ptx, cuda::Driver& driver, int device_index,
                                       std::string& said);
  static Result<LoadableCode> assemble(const LoadableCode& ptx, const std::string& ptxas, std::string& said);
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
