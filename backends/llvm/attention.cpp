#include "jit/ops/attention.h"

#include <fmt/format.h>

#include "backends/llvm/rows.h"
#include "backends/llvm/shared_object.h"
#include <llvm_generator_id.h>

namespace kiln::portable {
namespace {

constexpr Features kAvx512Bf16{Feature::avx2, Feature::fma, Feature::avx512f, Feature::avx512bw, Feature::avx512bf16};

constexpr Features kAmx{Feature::avx2,       Feature::fma,      Feature::avx512f, Feature::avx512bw,
                        Feature::avx512bf16, Feature::amx_tile, Feature::amx_bf16};

constexpr Features kArmBf16{Feature::neon, Feature::bf16};

/// f32 multiply-adds in the widest vectors that the target has, in steps: no more features in the key than change the
/// code. x86_64 alone means SSE2.
Features vector_features(const KernelDesc&, const Target& target) {
  if (target.arch == Arch::aarch64)
    return {Feature::neon};
  constexpr Features avx2{Feature::avx2, Feature::fma};
  constexpr Features avx512{Feature::avx2, Feature::fma, Feature::avx512f, Feature::avx512bw};
  for (const Features level : {avx512, avx2})
    if (target.features.contains(level))
      return level;
  return {};
}

Result<CodeObject> compile_portable(const KernelDesc& desc, const Target& target, std::string_view) {
  return compile_with_llvm(desc, {.arch = target.arch, .features = vector_features(desc, target)});
}

} // namespace

Implementation attention_amx() {
  return {
      .op = OpId::attention,
      .isa = IsaPath::amx,
      .backend = BackendId::x86,
      .generator = GeneratorId::llvm,
      .generator_digest = k_llvm_generator_digest,
      .arch = Arch::x86_64,
      .needs = kAmx,
      .declines = [](const KernelDesc& desc, const Target&) -> std::string {
        return desc.value[attention::kM] == kAny
                   ? ""
                   : "few queries: memory bound, and avx512bf16 reads K and V as they lie";
      },
      .compile = [](const KernelDesc& desc, const Target&,
                    std::string_view) { return compile_with_llvm(desc, {.arch = Arch::x86_64, .features = kAmx}); }};
}

Implementation attention_avx512bf16() {
  return {.op = OpId::attention,
          .isa = IsaPath::avx512bf16,
          .backend = BackendId::x86,
          .generator = GeneratorId::llvm,
          .generator_digest = k_llvm_generator_digest,
          .arch = Arch::x86_64,
          .needs = kAvx512Bf16,
          .compile = [](const KernelDesc& desc, const Target&, std::string_view) {
            return compile_with_llvm(desc, {.arch = Arch::x86_64, .features = kAvx512Bf16});
          }};
}

Implementation attention_bf16mm() {
  return {.op = OpId::attention,
          .isa = IsaPath::bf16mm,
          .backend = BackendId::arm,
          .generator = GeneratorId::llvm,
          .generator_digest = k_llvm_generator_digest,
          .arch = Arch::aarch64,
          .needs = kArmBf16,
          .compile = [](const KernelDesc& desc, const Target&, std::string_view) {
            return compile_with_llvm(desc, {.arch = Arch::aarch64, .features = kArmBf16});
          }};
}

Implementation attention() {
  return {.op = OpId::attention,
          .isa = IsaPath::portable,
          .backend = BackendId::portable,
          .generator = GeneratorId::llvm,
          .generator_digest = k_llvm_generator_digest,
          .any_arch = true,
          .uses = vector_features,
          .supports = supports_arch,
          .compile = compile_portable};
}

} // namespace kiln::portable
