#include "bench/arm_loops.h"

#include <algorithm>
#include <array>
#include <cctype>
#include <charconv>
#include <map>
#include <set>

#include "backends/llvm/disassemble.h"

namespace kiln::bench {
namespace {

std::string_view next_line(std::string_view& text) {
  const std::size_t end = text.find('\n');
  const std::string_view line = text.substr(0, end);
  text.remove_prefix(end == std::string_view::npos ? text.size() : end + 1);
  return line;
}

constexpr std::size_t kVectorRegisters = 32;

/// Numbers of the vector registers (b, h, s, d, q, v and z name the same files) in an operand list, in order.
std::vector<std::size_t> vector_registers(std::string_view operands) {
  std::vector<std::size_t> numbers;
  for (std::size_t i = 0; i < operands.size(); ++i) {
    const bool begins_word = i == 0 || std::isalnum(static_cast<unsigned char>(operands[i - 1])) == 0;
    const bool after_dot = i > 0 && operands[i - 1] == '.'; // a lane width
    if (!begins_word || after_dot || std::string_view("bhsdqvz").find(operands[i]) == std::string_view::npos)
      continue;
    std::size_t number = 0;
    const auto [end, error] = std::from_chars(operands.data() + i + 1, operands.data() + operands.size(), number);
    if (error == std::errc{} && number < kVectorRegisters &&
        (end == operands.data() + operands.size() || std::isalnum(static_cast<unsigned char>(*end)) == 0))
      numbers.push_back(number);
  }
  return numbers;
}

/// What a load writes: the registers before its address. (The governing predicate is none of them.)
std::vector<std::size_t> loaded_registers(const Instruction& load) {
  const std::string_view operands = std::string_view(load.text).substr(load.mnemonic().size());
  return vector_registers(operands.substr(0, operands.find('[')));
}

/// What a vector instruction reads beside its first operand, and with it where that is an accumulator's tile.
std::vector<std::size_t> source_registers(const Instruction& instruction) {
  const std::string_view operands = std::string_view(instruction.text).substr(instruction.mnemonic().size());
  const std::size_t comma = operands.find(',');
  return comma == std::string_view::npos ? std::vector<std::size_t>{} : vector_registers(operands.substr(comma));
}

} // namespace

std::string_view Instruction::mnemonic() const {
  return std::string_view(text).substr(0, text.find(' '));
}

bool Instruction::is_mac() const {
  static constexpr std::string_view kMnemonics[] = {
      "sdot",   "udot",   "usdot",  "sudot",  "smmla",  "ummla",  "usmmla", "smopa", "umopa",
      "usmopa", "sumopa", "smull",  "umull",  "smull2", "umull2", "smlal",  "umlal", "smlal2",
      "umlal2", "sadalp", "uadalp", "smullb", "smullt", "mla",    "bfdot",  "bfmmla"};
  if (std::find(std::begin(kMnemonics), std::end(kMnemonics), mnemonic()) == std::end(kMnemonics))
    return false;
  const std::string_view first = std::string_view(text).substr(mnemonic().size()); // SMULL has a scalar form
  const std::size_t at = first.find_first_not_of(' ');
  return at != std::string_view::npos && (first[at] == 'v' || first[at] == 'z');
}

bool Instruction::is_load() const {
  return mnemonic().starts_with("ld");
}

std::size_t Loop::macs() const {
  return static_cast<std::size_t>(std::count_if(body.begin(), body.end(), [](auto& i) { return i.is_mac(); }));
}

std::size_t Loop::loads() const {
  return static_cast<std::size_t>(std::count_if(body.begin(), body.end(), [](auto& i) { return i.is_load(); }));
}

std::size_t Loop::accumulators() const {
  std::set<std::string_view> names;
  for (const Instruction& instruction : body)
    if (instruction.is_mac())
      names.insert(std::string_view(instruction.text)
                       .substr(0, instruction.text.find(','))
                       .substr(instruction.mnemonic().size()));
  return names.size();
}

std::size_t Loop::loads_used_once() const {
  constexpr std::size_t kNone = ~std::size_t{0};
  std::array<std::size_t, kVectorRegisters> loader; // index in the body of the load whose value the register holds
  loader.fill(kNone);
  std::map<std::pair<std::size_t, std::size_t>, std::set<std::size_t>> users; // by load and register
  for (int round = 0; round < 2; ++round) // twice: a register may be loaded in one iteration and used in the next
    for (std::size_t i = 0; i < body.size(); ++i) {
      const Instruction& instruction = body[i];
      if (instruction.is_mac())
        for (const std::size_t source : source_registers(instruction))
          if (loader[source] != kNone)
            users[{loader[source], source}].insert(i);
      const bool load = instruction.is_load();
      const std::vector<std::size_t> written =
          load ? loaded_registers(instruction)
               : vector_registers(std::string_view(instruction.text)
                                      .substr(0, std::min(instruction.text.find(','), instruction.text.size())));
      for (const std::size_t target : written)
        loader[target] = load ? i : kNone;
    }
  std::size_t count = 0;
  for (std::size_t i = 0; i < body.size(); ++i) {
    if (!body[i].is_load())
      continue;
    const std::vector<std::size_t> registers = loaded_registers(body[i]);
    count += !registers.empty() && std::all_of(registers.begin(), registers.end(), [&](std::size_t r) {
      const auto found = users.find({i, r});
      return found == users.end() || found->second.size() <= 1;
    });
  }
  return count;
}

Result<std::vector<Instruction>> instructions_of(const CodeObject& code) {
  const Result<std::string> listing = disassemble(code.arch, code.image, code.entries);
  if (!listing)
    return listing.status();
  const auto bad = [](std::string_view line) {
    return Status::error(Code::internal, "not understood in a listing: " + std::string(line));
  };
  std::vector<Instruction> instructions;
  std::map<std::string, std::int64_t, std::less<>> label_offsets;
  std::vector<std::string> pending; // labels of the next line's offset
  std::string_view rest = *listing;
  while (!rest.empty()) {
    const std::string_view line = next_line(rest);
    if (line.empty())
      continue;
    if (line.front() != ' ' && line.back() == ':') {
      pending.emplace_back(line.substr(0, line.size() - 1));
      continue;
    }
    // `    b4: f6 03 1f aa                       mov x22, xzr`
    const std::size_t colon = line.find(':'), digits = line.find_first_not_of(' ');
    Instruction instruction;
    if (colon == std::string_view::npos ||
        std::from_chars(line.data() + digits, line.data() + colon, instruction.offset, 16).ptr != line.data() + colon)
      return bad(line);
    for (std::string& label : pending)
      label_offsets[std::move(label)] = static_cast<std::int64_t>(instruction.offset);
    pending.clear();
    constexpr std::string_view kGap = "  "; // between bytes and text; none of the two holds it
    const std::size_t bytes_end = line.find(kGap, colon);
    const std::size_t text = bytes_end == std::string_view::npos ? bytes_end : line.find_first_not_of(' ', bytes_end);
    if (text == std::string_view::npos) {
      if (line.ends_with(".byte")) // a full line of constants
        continue;
      return bad(line);
    }
    instruction.text = line.substr(text);
    if (instruction.text != ".byte")
      instructions.push_back(std::move(instruction));
  }
  for (Instruction& instruction : instructions) {
    const std::string_view operands = std::string_view(instruction.text);
    const std::string_view last = operands.substr(operands.rfind(' ') + 1);
    const bool branch = instruction.text.starts_with("b.") || instruction.mnemonic() == "b" ||
                        instruction.mnemonic().starts_with("cb") || instruction.mnemonic().starts_with("tb");
    if (const auto found = label_offsets.find(last); branch && found != label_offsets.end())
      instruction.branches_to = found->second;
    else if (branch)
      return bad(instruction.text);
  }
  return instructions;
}

std::vector<Loop> innermost_loops(const std::vector<Instruction>& instructions) {
  const auto goes_back = [](const Instruction& i) {
    return i.branches_to >= 0 && static_cast<std::uint64_t>(i.branches_to) <= i.offset;
  };
  std::vector<Loop> loops;
  for (std::size_t last = 0; last < instructions.size(); ++last) {
    if (!goes_back(instructions[last]))
      continue;
    std::size_t first = last;
    bool innermost = true;
    while (first > 0 && instructions[first].offset > static_cast<std::uint64_t>(instructions[last].branches_to)) {
      --first;
      innermost &= !goes_back(instructions[first]);
    }
    if (innermost)
      loops.push_back({{instructions.begin() + static_cast<std::ptrdiff_t>(first),
                        instructions.begin() + static_cast<std::ptrdiff_t>(last) + 1}});
  }
  return loops;
}

std::vector<Loop> hot_loops(const std::vector<Instruction>& instructions) {
  std::vector<Loop> loops = innermost_loops(instructions);
  std::erase_if(loops, [](const Loop& loop) { return loop.macs() == 0; });
  std::stable_sort(loops.begin(), loops.end(), [](const Loop& a, const Loop& b) { return a.macs() > b.macs(); });
  return loops;
}

} // namespace kiln::bench
