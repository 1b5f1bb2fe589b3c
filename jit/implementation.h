#pragma once
#include <cstdint>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "cache/status.h"
#include "jit/code_object.h"
#include "jit/desc.h"
#include "jit/target.h"

namespace kiln {

enum class IsaPath : std::uint8_t {
  avx2,
  avxvnni,
  avx512vnni,
  avx512bf16,
  amx,
  neon,
  sdot,
  i8mm,
  bf16mm,
  sve_sdot,
  sve_i8mm,
  sme,
  sme2,
  portable,
  mma_sync,
  wgmma,
  reference,
  count
};
enum class BackendId : std::uint8_t { x86, arm, nvidia, portable, reference, count };
enum class GeneratorId : std::uint8_t { none, asmjit, llvm, ptx, count };
std::string_view name_of(IsaPath isa);
std::string_view name_of(BackendId backend);
std::string_view name_of(GeneratorId generator);

/// One way to compute an op on one ISA path: a row of the implementation table. Rows stand in order of preference.
struct Implementation {
  OpId op;
  IsaPath isa;
  BackendId backend;
  GeneratorId generator;
  /// Digest of the generator's sources and of its library's version (generator_id.cmake); empty for `reference`.
  std::string_view generator_digest;
  DeviceKind device = DeviceKind::cpu;
  Arch arch = Arch::x86_64;
  bool any_arch = false; ///< `portable` and `reference`
  /// Features of the code this row makes: part of the key. Null where they depend on nothing but `needs`.
  Features needs;
  Features (*uses)(const KernelDesc&, const Target&) = nullptr;
  std::int32_t (*vector_bits)(const Target&) = nullptr; ///< in the key when not null

  /// Ok, or why this row cannot serve the desc on the target (features apart: the engine checks those).
  Status (*supports)(const KernelDesc&, const Target&) = nullptr;
  /// Null, or an empty text when this row is worth taking, else why a later row is the better one (`M ≤ 4: memory
  /// bound`). Ignored when the path is forced, or toggles leave no generated code but this row's.
  std::string (*declines)(const KernelDesc&, const Target&) = nullptr;
  /// Layout id of the packed weights that suits this row best (`n16k4`), the same for every m; null for ops without a
  /// pack. The engine lays weights out as the first row does that serves every m of them (OpSpec::pack_desc).
  std::string (*pack_layout)(const KernelDesc&, const Target&) = nullptr;
  /// Whether this row serves the desc from weights laid out for another; null: from its own layout only.
  bool (*reads_layout)(std::string_view layout, const KernelDesc&, const Target&) = nullptr;
  /// Null, or what the row takes for granted about the machine and nothing can ask: for `kiln explain`.
  std::string (*assumes)(const Target&) = nullptr;
  /// Pure: sees only what is in the key; any host, any thread. `pack_layout` is empty for ops without a pack, else one
  /// that this row reads. Null for `reference`.
  Result<CodeObject> (*compile)(const KernelDesc&, const Target&, std::string_view pack_layout) = nullptr;
  /// Null, or the configurations (CodeObject::configuration) that may be the fastest for the desc, that of `compile`
  /// first: for Engine::tune, which times them. Any of them gives results that are equal from run to run.
  std::vector<std::string> (*configurations)(const KernelDesc&, const Target&) = nullptr;
  /// Like compile, of one of these. Distrusts the text: Code::invalid_argument.
  Result<CodeObject> (*compile_configured)(const KernelDesc&, const Target&, std::string_view pack_layout,
                                           std::string_view configuration) = nullptr;
  /// A function of this library instead of generated code (`reference`): the entry that the op's driver calls.
  const void* builtin = nullptr;
  /// The launch plan of `builtin` for a pack of this layout (it reads every layout).
  std::vector<std::pair<std::string, std::int64_t>> (*builtin_plan)(const KernelDesc&,
                                                                    std::string_view pack_layout) = nullptr;

  Features features_for(const KernelDesc& desc, const Target& target) const {
    return uses ? uses(desc, target) : needs;
  }
  bool reads(std::string_view layout, const KernelDesc& desc, const Target& target) const {
    return pack_layout == nullptr || builtin_plan != nullptr || pack_layout(desc, target) == layout ||
           (reads_layout != nullptr && reads_layout(layout, desc, target));
  }
};

} // namespace kiln
