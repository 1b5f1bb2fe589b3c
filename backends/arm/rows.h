#pragma once
#include "jit/implementation.h"

/// The aarch64 rows of the implementation table. All emission works on any host.
namespace kiln::arm {} // namespace kiln::arm
