#include "cache/readable.h"

#include <algorithm>
#include <cstdint>

namespace kiln {
namespace {

/// Of either end of a text that is too long. A message names what was given first and what is allowed last.
constexpr std::size_t kEndBytes = 8 << 10;

/// Bytes of the UTF-8 sequence (Unicode 15, table 3-7) that `text`, which is not empty, begins with; 0 when it is none.
std::size_t sequence_bytes(std::string_view text) {
  const auto at = [&](std::size_t i) { return i < text.size() ? static_cast<std::uint8_t>(text[i]) : std::uint8_t{0}; };
  const auto continues = [&](std::size_t i) { return (at(i) & 0xc0) == 0x80; };
  const std::uint8_t first = at(0), second = at(1);
  if (first < 0x80)
    return 1;
  if (first >= 0xc2 && first <= 0xdf)
    return continues(1) ? 2 : 0;
  if (first >= 0xe0 && first <= 0xef) {
    const bool overlong = first == 0xe0 && second < 0xa0, surrogate = first == 0xed && second > 0x9f;
    return continues(1) && continues(2) && !overlong && !surrogate ? 3 : 0;
  }
  if (first >= 0xf0 && first <= 0xf4) {
    const bool overlong = first == 0xf0 && second < 0x90, beyond = first == 0xf4 && second > 0x8f;
    return continues(1) && continues(2) && continues(3) && !overlong && !beyond ? 4 : 0;
  }
  return 0;
}

/// C0 without the line feed, DEL, and C1 (U+0080 to U+009F), which some terminals obey too.
bool is_control(std::string_view sequence) {
  const auto first = static_cast<std::uint8_t>(sequence[0]);
  if (sequence.size() == 2)
    return first == 0xc2 && static_cast<std::uint8_t>(sequence[1]) < 0xa0;
  return sequence.size() == 1 && ((first < ' ' && first != '\n') || first == 0x7f);
}

void append_readable(std::string& out, std::string_view text) {
  while (!text.empty()) {
    const std::size_t bytes = sequence_bytes(text);
    const std::string_view sequence = text.substr(0, std::max<std::size_t>(bytes, 1));
    if (bytes == 0)
      out += "\xef\xbf\xbd"; // U+FFFD
    else if (is_control(sequence))
      out += ' ';
    else
      out += sequence;
    text.remove_prefix(sequence.size());
  }
}

} // namespace

std::string readable(std::string_view text) {
  std::string out;
  out.reserve(std::min(text.size(), 2 * kEndBytes));
  if (text.size() <= 2 * kEndBytes) {
    append_readable(out, text);
    return out;
  }
  // Cut between characters.
  const auto continues = [&](std::size_t i) { return (static_cast<std::uint8_t>(text[i]) & 0xc0) == 0x80; };
  std::size_t head = kEndBytes, tail = text.size() - kEndBytes;
  for (int i = 0; i < 3 && continues(head); ++i)
    --head;
  for (int i = 0; i < 3 && continues(tail); ++i)
    ++tail;
  append_readable(out, text.substr(0, head));
  out += " … ";
  append_readable(out, text.substr(tail));
  return out;
}

} // namespace kiln
