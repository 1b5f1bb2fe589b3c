#pragma once
#include "api/c_ops.h"

namespace kiln {

COp c_int8_mm();

} // namespace kiln
