#pragma once
#include "api/c_ops.h"

namespace kiln {

COp c_attention();

} // namespace kiln
