#pragma once
#include <span>

#include "jit/implementation.h"

namespace kiln {

/// Every implementation of every op on every architecture, in order of preference.
std::span<const Implementation> implementation_table();

} // namespace kiln
