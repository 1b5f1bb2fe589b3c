#include "jit/implementation.h"

#include <array>

namespace kiln {
namespace {

constexpr std::array<std::string_view, static_cast<std::size_t>(IsaPath::count)> kIsaPaths = {
    "avx2",     "avxvnni",  "avx512vnni", "avx512bf16", "amx",      "neon",     "sdot",  "i8mm",     "bf16mm",
    "sve_sdot", "sve_i8mm", "sme",        "sme2",       "portable", "mma_sync", "wgmma", "reference"};
constexpr std::array<std::string_view, static_cast<std::size_t>(BackendId::count)> kBackends = {
    "x86", "arm", "nvidia", "portable", "reference"};
constexpr std::array<std::string_view, static_cast<std::size_t>(GeneratorId::count)> kGenerators = {"none", "asmjit",
                                                                                                    "llvm", "ptx"};

// A name that is missing from a table is an empty view at its end.
static_assert(!kIsaPaths.back().empty() && !kBackends.back().empty() && !kGenerators.back().empty());

} // namespace

std::string_view name_of(IsaPath isa) {
  return kIsaPaths[static_cast<std::size_t>(isa)];
}
std::string_view name_of(BackendId backend) {
  return kBackends[static_cast<std::size_t>(backend)];
}
std::string_view name_of(GeneratorId generator) {
  return kGenerators[static_cast<std::size_t>(generator)];
}

} // namespace kiln
