#pragma once
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <span>
#include <sstream>
#include <stdexcept>
#include <string>
#include <unistd.h>
#include <vector>

/// LLVM's own opinion of aarch64 instructions, by the program llvm-mc-19: independent of asmjit and of Kiln's encoder.
namespace kiln::test {

namespace detail {

/// Lines that `llvm-mc-19 ARGUMENTS` prints for this input.
inline std::vector<std::string> llvm_mc(const std::string& arguments, const std::string& input) {
  std::string path = (std::filesystem::temp_directory_path() / "kiln-llvm-mc-XXXXXX").string();
  const int file = ::mkstemp(path.data());
  if (file < 0)
    throw std::runtime_error("no temporary file");
  ::close(file);
  std::ofstream(path) << input;
  const std::string command = "llvm-mc-19 --triple=aarch64 --mattr=+v8.6a,+sve2,+sme " + arguments + " " + path;
  std::FILE* const pipe = ::popen(command.c_str(), "r");
  std::string output;
  if (pipe != nullptr) {
    char buffer[4096];
    for (std::size_t got; (got = std::fread(buffer, 1, sizeof buffer, pipe)) > 0;)
      output.append(buffer, got);
  }
  const bool done = pipe != nullptr && ::pclose(pipe) == 0;
  std::filesystem::remove(path);
  if (!done)
    throw std::runtime_error("failed: " + command);
  std::vector<std::string> lines;
  std::istringstream stream(output);
  for (std::string line; std::getline(stream, line);)
    lines.push_back(line);
  return lines;
}

} // namespace detail

/// One word for each line of assembly. Throws when llvm-mc refuses a line (it says which on stderr) or cannot be run.
inline std::vector<std::uint32_t> assemble(const std::vector<std::string>& instructions) {
  std::string input;
  for (const std::string& instruction : instructions)
    input += instruction + "\n";
  std::vector<std::uint32_t> words;
  for (const std::string& line : detail::llvm_mc("--show-encoding", input)) {
    unsigned b[4];
    const std::size_t at = line.find("encoding: [");
    if (at != std::string::npos &&
        std::sscanf(line.c_str() + at, "encoding: [0x%x,0x%x,0x%x,0x%x]", &b[0], &b[1], &b[2], &b[3]) == 4)
      words.push_back(b[0] | b[1] << 8 | b[2] << 16 | b[3] << 24);
  }
  if (words.size() != instructions.size())
    throw std::runtime_error("llvm-mc-19 gave " + std::to_string(words.size()) + " words for " +
                             std::to_string(instructions.size()) + " lines");
  return words;
}

/// One line of assembly for each word, single spaces, without comments: `smopa za0.s, p0/m, p0/m, z0.b, z4.b`. Throws
/// when a word is no instruction.
inline std::vector<std::string> disassemble(std::span<const std::uint32_t> words) {
  std::string input;
  char text[32];
  for (const std::uint32_t word : words) {
    std::snprintf(text, sizeof text, "0x%02x 0x%02x 0x%02x 0x%02x\n", word & 255, word >> 8 & 255, word >> 16 & 255,
                  word >> 24);
    input += text;
  }
  std::vector<std::string> lines;
  for (const std::string& line : detail::llvm_mc("--disassemble", input)) {
    std::string squeezed;
    for (const char c : line.substr(0, line.find("//"))) {
      const char plain = c == '\t' ? ' ' : c;
      if (plain != ' ' || (!squeezed.empty() && squeezed.back() != ' '))
        squeezed += plain;
    }
    while (!squeezed.empty() && squeezed.back() == ' ')
      squeezed.pop_back();
    if (!squeezed.empty() && squeezed[0] != '.')
      lines.push_back(squeezed);
  }
  if (lines.size() != words.size())
    throw std::runtime_error("llvm-mc-19 read " + std::to_string(lines.size()) + " instructions in " +
                             std::to_string(words.size()) + " words");
  return lines;
}

} // namespace kiln::test
