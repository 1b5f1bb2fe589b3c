#include "backends/table.h"

#include <vector>

#include "backends/arm/rows.h"
#include "backends/llvm/rows.h"
#include "backends/nvidia/rows.h"
#include "backends/reference/rows.h"
#include "backends/x86/rows.h"

namespace kiln {

std::span<const Implementation> implementation_table() {
  static const std::vector<Implementation> table = {
      x86::int8_mm_amx(),
      x86::int8_mm_avx512vnni(),
      x86::int8_mm_avxvnni(),
      x86::int8_mm_avx2(),
      arm::int8_mm_sme(),
      arm::int8_mm_sve_i8mm(),
      arm::int8_mm_i8mm(),
      arm::int8_mm_sve_sdot(),
      arm::int8_mm_sdot(),
      arm::int8_mm_neon(),
      portable::int8_mm(),
      nvidia::int8_mm_wgmma(),
      nvidia::int8_mm_mma_sync(),
      reference::int8_mm(),
      x86::int8_linear_amx(),
      x86::int8_linear_avx512vnni(),
      x86::int8_linear_avxvnni(),
      x86::int8_linear_avx2(),
      arm::int8_linear_sme(),
      arm::int8_linear_sve_i8mm(),
      arm::int8_linear_i8mm(),
      arm::int8_linear_sve_sdot(),
      arm::int8_linear_sdot(),
      arm::int8_linear_neon(),
      portable::int8_linear(),
      reference::int8_linear(),
      nvidia::int4_mm_wgmma(),
      nvidia::int4_mm_mma_sync(),
      reference::int4_mm(),
      nvidia::fp8_block_bmm_wgmma(),
      reference::fp8_block_bmm(),
      portable::attention_amx(),
      portable::attention_avx512bf16(),
      portable::attention_bf16mm(),
      portable::attention(),
      reference::attention(),
  };
  return table;
}

} // namespace kiln
