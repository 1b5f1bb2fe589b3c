#include "jit/ops/fp8_block_bmm.h"
#include "backends/reference/rows.h"

namespace kiln::reference {
namespace {

using namespace kiln::fp8_block_bmm;

void multiply(const Call* call) {
  fp8_block_bmm::reference(*call);
}

} // namespace

Implementation fp8_block_bmm() {
  Implementation row;
  row.op = OpId::fp8_block_bmm;
  row.isa = IsaPath::reference;
  row.backend = BackendId::reference;
  row.generator = GeneratorId::none;
  row.any_arch = true;
  row.builtin = reinterpret_cast<const void*>(&multiply);
  row.builtin_plan = [](const KernelDesc&, std::string_view) { return Plan().values(); };
  return row;
}

} // namespace kiln::reference
