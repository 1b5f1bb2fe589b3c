#pragma once
#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "cache/digest.h"
#include "cache/status.h"
#include "cache/store.h"
#include "jit/target.h"

namespace kiln {

/// Every difference that changes a kernel's code, and nothing else.
struct KeyFields {
  std::string generator; ///< digest of the generator's sources and of its library's version
  std::string desc;      ///< canonical, of device 0
  std::string isa;
  Arch arch = Arch::x86_64;
  Features features; ///< that the code uses
  std::int32_t vector_bits = 0;
  std::int32_t sm = 0;     ///< NVIDIA: of the target
  std::string pack_layout; ///< empty for an op without packs
  /// Of a kernel whose configuration was chosen by timing: the device timed on. Its configuration is no part of the
  /// key, so that a lookup finds whichever was the fastest. Empty where the row chose.
  std::string tuning;

  std::string text() const; ///< one `name=value` a line, for people; the key is its digest

  /// One `features avx2 there, avx2,avxvnni here` for each field in which this stored kernel and the wanted one differ.
  std::vector<std::string> differences_from(const KeyFields& wanted) const;
};
Digest key_of(std::string_view key_text);

/// Of a stored row: its texts, and what only its code tells. Code::integrity when it has no such code,
/// Code::unsupported when another version of Kiln made it.
Result<KeyFields> key_fields_of(const StoreRow& row);

/// Whether a row from elsewhere is what it says: its code parses, its texts are those of the code, and its key is the
/// digest of all that. Runs nothing. Code::integrity says what is wrong; Code::unsupported: another version of Kiln
/// made it, and this one cannot tell.
Status check_row(const StoreRow& row);

} // namespace kiln
