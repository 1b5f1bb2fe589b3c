#include "cache/entry.h"

#include <algorithm>
#include <fmt/format.h>

namespace kiln {
namespace {

/// One of the row's texts, with the longest that may travel.
struct TextColumn {
  const char* name;
  std::string StoreRow::*text;
  std::size_t most_bytes;
};
constexpr TextColumn text_columns[] = {
    {"op", &StoreRow::op, EntryLimits::short_text_bytes},
    {"desc", &StoreRow::desc, EntryLimits::text_bytes},
    {"isa", &StoreRow::isa, EntryLimits::short_text_bytes},
    {"target", &StoreRow::target, EntryLimits::text_bytes},
    {"generator", &StoreRow::generator, EntryLimits::short_text_bytes},
};

} // namespace

std::string fault_of_texts(const StoreRow& row) {
  for (const TextColumn& column : text_columns) {
    const std::string& text = row.*column.text;
    if (text.empty() || text.size() > column.most_bytes)
      return fmt::format("its {} has {} bytes; allowed are 1 to {}", column.name, text.size(), column.most_bytes);
    if (!std::all_of(text.begin(), text.end(), [](char c) { return c >= 0x20 && c < 0x7f; }))
      return fmt::format("its {} has characters that are not printable ASCII", column.name);
  }
  return {};
}

Bytes entry_of(const StoreRow& row) {
  Writer writer;
  for (const TextColumn& column : text_columns)
    writer.string(row.*column.text);
  writer.blob(row.code);
  return writer.take();
}

std::string read_entry(ByteSpan bytes, StoreRow& row) {
  Reader in(bytes);
  for (const TextColumn& column : text_columns)
    row.*column.text = in.string();
  const ByteSpan code = in.blob();
  if (!in.finished())
    return "its columns do not fill it";
  row.code.assign(code.begin(), code.end());
  return fault_of_texts(row);
}

} // namespace kiln
