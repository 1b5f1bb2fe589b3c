#pragma once
#include <cstddef>
#include <string>

#include "cache/bytes.h"
#include "cache/store.h"

namespace kiln {

/// What of a row travels, in bundles and in a remote tier: op, desc, ISA path, target, generator and code. Its bytes
/// are described in api/doc/bundle.md. Not its key, which the carrier binds to it, nor times and hits.
struct EntryLimits {
  static constexpr std::size_t short_text_bytes = 256;
  static constexpr std::size_t text_bytes = 4096; ///< of a desc or a target; of the other texts short_text_bytes
};

/// Empty, or why the row's texts cannot travel: each must be printable ASCII within the limits.
std::string fault_of_texts(const StoreRow& row);

/// The same bytes for the same kernel, whenever and wherever it was compiled. The texts must have no fault.
Bytes entry_of(const StoreRow& row);

/// Fills what travels of `row`. Empty, or why these bytes are no entry.
std::string read_entry(ByteSpan bytes, StoreRow& row);

} // namespace kiln
