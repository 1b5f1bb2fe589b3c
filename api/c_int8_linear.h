#pragma once
#include "api/c_ops.h"

namespace kiln {

COp c_int8_linear();

} // namespace kiln
