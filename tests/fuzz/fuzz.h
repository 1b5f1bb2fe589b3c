#pragma once
#include <string>
#include <string_view>
#include <vector>

#include "cache/bytes.h"
#include "cache/status.h"

/// What every fuzz target shares. main.cpp has libFuzzer's entry points; each target is a file that defines `target`.
namespace kiln::fuzz {

struct Seed {
  Bytes bytes;
  bool is_accepted; ///< what the parser must say of it, so that a seed that a change of format spoils is noticed
};

struct Target {
  /// True when the parser takes the input. Ends the process (expect) when what it made of it is not as promised.
  bool (*accepts)(ByteSpan input);
  std::vector<Seed> (*seeds)();
  int largest_allocation_mb = 16; ///< more at once is a finding
};
extern const Target target;

/// Ends the process, which libFuzzer reports with the input, unless `holds`.
void expect(bool holds, std::string_view what);

/// Every refusal: one of Kiln's codes, and a message that any terminal or log can take, of bounded size.
void expect_refusal(const Status& status, Code code);

std::string_view text_of(ByteSpan bytes);
Seed accepted(std::string_view text);
Seed refused(std::string_view text);

/// A regular file in memory, for parsers that take a path. One for a process; its content changes.
class MemoryFile {
public:
  MemoryFile();
  /// The path of a file with this content.
  const std::string& with(ByteSpan content);

private:
  int descriptor_;
  std::string path_;
};

/// A directory in memory where there is one, closed to others, removed with its contents when the run ends well. On a
/// disk each truncation of a file may wait for a write.
class TemporaryDirectory {
public:
  TemporaryDirectory();
  ~TemporaryDirectory();
  const std::string& path() const { return path_; }

private:
  std::string path_;
};

/// Replaces the content of an open file.
void overwrite(int descriptor, ByteSpan content);

} // namespace kiln::fuzz
