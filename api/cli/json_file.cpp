#include "api/cli/json_file.h"

#include <algorithm>
#include <array>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <vector>

#include <fmt/format.h>

namespace kiln::cli {
namespace {

using nlohmann::json;

constexpr std::uintmax_t kMaxBytes = 64 << 20;
/// What no manifest or config needs: a hostile file must not make us take memory, or stack where JSON is copied or
/// printed, far beyond its size.
constexpr std::size_t kMaxDepth = 64, kMaxValues = 1 << 20;
/// Parts that are deeper or have longer pointers are reported with the line of what holds them.
constexpr std::size_t kMaxPointerDepth = 6, kMaxPointerBytes = 128;

/// Walks over text for the parser and counts the lines that it has taken.
class CountingIterator {
public:
  using iterator_category = std::input_iterator_tag;
  using value_type = char;
  using difference_type = std::ptrdiff_t;
  using pointer = const char*;
  using reference = const char&;

  CountingIterator(const char* at, int* line) : at_(at), line_(line) {}
  reference operator*() const { return *at_; }
  CountingIterator& operator++() {
    *line_ += *at_ == '\n';
    ++at_;
    return *this;
  }
  CountingIterator operator++(int) {
    CountingIterator before = *this;
    ++*this;
    return before;
  }
  bool operator==(const CountingIterator& other) const { return at_ == other.at_; }
  bool operator!=(const CountingIterator& other) const { return at_ != other.at_; }

private:
  const char* at_;
  int* line_;
};

std::string escaped(std::string_view key) {
  std::string out;
  for (const char c : key)
    out += c == '~' ? "~0" : c == '/' ? "~1" : std::string(1, c);
  return out;
}

/// Thrown through the parser, which cannot be stopped in another way.
struct TooMuch {
  std::string what;
};

/// Follows the parser's events and notes the line of every key and element near the root. Throws TooMuch.
class LineRecorder {
public:
  LineRecorder(const int& line, std::map<std::string, int>& lines, std::string& twice)
      : line_(line), lines_(lines), twice_(twice) {}

  bool operator()(int, json::parse_event_t event, json& value) {
    using Event = json::parse_event_t;
    switch (event) {
    case Event::key:
      note_member(escaped(value.get_ref<const std::string&>()));
      break;
    case Event::value:
      note_element();
      break;
    case Event::object_start:
    case Event::array_start:
      note_element();
      if (open_.size() == kMaxDepth)
        throw TooMuch{fmt::format("has more than {} lists and objects within one another", kMaxDepth)};
      open_.push_back({.is_array = event == Event::array_start,
                       .is_noted = open_.empty() || open_.back().member_is_noted,
                       .pointer = open_.empty() ? "" : open_.back().member});
      break;
    case Event::object_end:
    case Event::array_end:
      open_.pop_back();
      break;
    }
    return true;
  }

private:
  struct Open {
    bool is_array;
    bool is_noted;                ///< its pointer is neither too deep nor too long
    bool member_is_noted = false; ///< the member's being read
    std::size_t next = 0;
    std::string pointer; ///< of the container
    std::string member;  ///< of the member being read, where noted
  };
  void note_member(const std::string& name) {
    if (++values_ > kMaxValues)
      throw TooMuch{fmt::format("has more than {} values", kMaxValues)};
    Open& holder = open_.back();
    holder.member_is_noted = holder.is_noted && open_.size() <= kMaxPointerDepth &&
                             holder.pointer.size() + 1 + name.size() <= kMaxPointerBytes;
    if (!holder.member_is_noted)
      return;
    holder.member = holder.pointer + "/" + name;
    const auto [place, is_new] = lines_.emplace(holder.member, line_);
    if (!is_new && twice_.empty()) {
      twice_ = holder.member;
      place->second = line_;
    }
  }
  void note_element() {
    if (!open_.empty() && open_.back().is_array)
      note_member(std::to_string(open_.back().next++));
  }

  const int& line_;
  std::map<std::string, int>& lines_;
  std::string& twice_; ///< the first member that an object has twice
  std::vector<Open> open_;
  std::size_t values_ = 0;
};

/// nlohmann's texts are `[json.exception.parse_error.101] parse error at line 3, column 5: what` and
/// `[json.exception.out_of_range.406] what`.
std::string what_of(const json::exception& error) {
  const std::string text = error.what();
  const std::size_t colon = text.find(": "), bracket = text.find("] ");
  if (colon != std::string::npos)
    return text.substr(colon + 2);
  return bracket == std::string::npos ? text : text.substr(bracket + 2);
}

} // namespace

Result<JsonFile> JsonFile::read(const std::string& path) {
  const auto failed = [&](std::string_view why) {
    return Status::error(Code::invalid_argument, fmt::format("{}: {}", path, why));
  };
  std::error_code error;
  if (std::filesystem::is_directory(path, error))
    return failed("cannot be read: it is a directory");
  std::ifstream in(path, std::ios::binary);
  if (!in)
    return failed(fmt::format("cannot be read: {}", std::strerror(errno)));
  std::string text;
  std::array<char, 1 << 16> chunk;
  while (text.size() <= kMaxBytes && (in.read(chunk.data(), chunk.size()), in.gcount() > 0))
    text.append(chunk.data(), static_cast<std::size_t>(in.gcount()));
  if (in.bad())
    return failed("cannot be read");
  if (text.size() > kMaxBytes)
    return failed(fmt::format("is larger than {} MiB", kMaxBytes >> 20));

  JsonFile file(path);
  int line = 1;
  std::string twice;
  try {
    file.root_ = json::parse(CountingIterator(text.data(), &line), CountingIterator(text.data() + text.size(), &line),
                             LineRecorder(line, file.lines_, twice));
  } catch (const json::parse_error& parse_error) {
    const std::size_t taken = std::min(parse_error.byte > 0 ? parse_error.byte - 1 : 0, text.size());
    const auto at = 1 + std::count(text.begin(), text.begin() + static_cast<std::ptrdiff_t>(taken), '\n');
    return Status::error(Code::invalid_argument, fmt::format("{}:{}: not JSON: {}", path, at, what_of(parse_error)));
  } catch (const TooMuch& too_much) {
    return Status::error(Code::invalid_argument, fmt::format("{}:{}: {}", path, line, too_much.what));
  } catch (const json::exception& other) { // a number that no type holds
    return Status::error(Code::invalid_argument, fmt::format("{}:{}: {}", path, line, what_of(other)));
  }
  if (!twice.empty())
    return file.error(twice, "is given twice");
  return file;
}

Status JsonFile::error(const std::string& pointer, std::string_view message) const {
  int line = 1;
  for (std::string at = pointer; !at.empty(); at.erase(at.rfind('/')))
    if (const auto found = lines_.find(at); found != lines_.end()) {
      line = found->second;
      break;
    }
  return Status::error(Code::invalid_argument,
                       fmt::format("{}:{}: {}{}{}", path_, line, pointer, pointer.empty() ? "" : ": ", message));
}

} // namespace kiln::cli
