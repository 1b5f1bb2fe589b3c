#pragma once
#include <string>
#include <string_view>

namespace kiln {

/// `text`, which may quote anything, as a terminal, a log and a JSON document can take it: valid UTF-8, every control
/// character but the line feed a space, every byte that is no UTF-8 a U+FFFD. Of more than 16 KiB the middle is left
/// out.
std::string readable(std::string_view text);

} // namespace kiln
