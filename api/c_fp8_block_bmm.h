#pragma once
#include "api/c_ops.h"

namespace kiln {

COp c_fp8_block_bmm();

} // namespace kiln
