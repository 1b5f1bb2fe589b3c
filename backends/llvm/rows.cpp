#include "backends/llvm/rows.h"

#include "backends/llvm/int8_mm_layout.h"
#include "backends/llvm/shared_object.h"
#include "jit/ops/int8_mm.h"
#include <llvm_generator_id.h>

namespace kiln::portable {
namespace {

/// The widest vectors that the target has, in three steps: no more features in the key than change the code. x86_64
/// alone means SSE2. LLVM's avx512f implies fma and f16c, which integer code has no use for, so that the key need not
/// name them.
Features vector_features(const KernelDesc&, const Target& target) {
  if (target.arch == Arch::aarch64)
    return {Feature::neon};
  constexpr Features avx2{Feature::avx2};
  constexpr Features avx512{Feature::avx2, Feature::avx512f, Feature::avx512bw};
  for (const Features level : {avx512, avx2})
    if (target.features.contains(level))
      return level;
  return {};
}

std::string pack_layout(const KernelDesc&, const Target& target) {
  return int8_mm_layout(target.arch).id();
}

Result<CodeObject> compile(const KernelDesc& desc, const Target& target, std::string_view) {
  if (Status status = supports_arch(desc, target); !status)
    return status;
  const Target used{.arch = target.arch, .features = vector_features(desc, target)};
  return compile_with_llvm(desc, used);
}

Implementation row_of(OpId op) {
  return {.op = op,
          .isa = IsaPath::portable,
          .backend = BackendId::portable,
          .generator = GeneratorId::llvm,
          .generator_digest = k_llvm_generator_digest,
          .any_arch = true,
          .uses = vector_features,
          .supports = supports_arch,
          .pack_layout = pack_layout,
          .compile = compile};
}

} // namespace

Implementation int8_mm() {
  return row_of(OpId::int8_mm);
}
Implementation int8_linear() {
  return row_of(OpId::int8_linear);
}

} // namespace kiln::portable
