#pragma once
#include "cache/status.h"
#include "cache/store.h"
#include "jit/config.h"
#include "jit/engine.h"
#include "jit/kernel_key.h"

namespace kiln {

/// Fills in `why` and `nearest` of an explanation whose kernel no tier has, from what the cache on disk tells: the row
/// is there and refused; it was there, and what became of it; a kernel of the same desc is there under another key, and
/// which of its fields differ. `store` is null where the toggles leave the disk out; `stored` is what looking the row
/// up in it gave. Changes and counts nothing.
void explain_miss(Explanation& explanation, Store* store, const Status& stored, const KeyFields& wanted,
                  const Config& config);

} // namespace kiln
