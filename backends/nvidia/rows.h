#pragma once
#include "jit/implementation.h"

/// The NVIDIA rows of the implementation table. All emission works on any host.
namespace kiln::nvidia {

Implementation int4_mm_wgmma();
Implementation int4_mm_mma_sync();
Implementation fp8_block_bmm_wgmma();
Implementation int8_mm_wgmma();
Implementation int8_mm_mma_sync();

} // namespace kiln::nvidia
