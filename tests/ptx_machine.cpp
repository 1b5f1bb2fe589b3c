#include "tests/ptx_machine.h"

#include <algorithm>
#include <bit>
#include <charconv>
#include <cmath>
#include <cstring>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <random>
#include <stdexcept>
#include <unordered_map>
#include <utility>

#include <fmt/format.h>

#include "jit/bf16.h"
#include "jit/f16.h"
#include "jit/f8.h"

namespace kiln::test::ptx {
namespace {

constexpr int kLanes = 32;
constexpr std::uint32_t kSharedBase = 1024; // of each block's window; other blocks' lie above, by rank
constexpr int kRankBit = 24;
constexpr std::uint64_t kMapBase = 0xA000000000000000;

[[noreturn]] void fail(std::string message) {
  throw std::runtime_error(std::move(message));
}

// ---------------------------------------------------------------- the text

/// A register by its letter and number, a constant, an address or a list.
struct Operand {
  char kind = 0; // p h r d f: registers; i: integer; F: f32 bits; s: symbol; v: list; a: address
  int id = 0;
  std::int64_t value = 0;
  std::string name;
  std::vector<Operand> parts; // of a list; of an address its base and, of a tensor, its coordinates
};

struct Instruction {
  std::string line, opcode;
  std::vector<std::string_view> words; // of the opcode
  int guard = -1;
  bool guard_negated = false;
  std::vector<Operand> operands;
  int target = -1;
  std::function<void(struct Warp&, std::uint32_t mask)> run;
};

std::string_view trimmed(std::string_view s) {
  while (!s.empty() && (s.front() == ' ' || s.front() == '\t'))
    s.remove_prefix(1);
  while (!s.empty() && (s.back() == ' ' || s.back() == '\t' || s.back() == ';'))
    s.remove_suffix(1);
  return s;
}

std::vector<std::string_view> split(std::string_view s) {
  std::vector<std::string_view> parts;
  int depth = 0;
  std::size_t begin = 0;
  for (std::size_t i = 0; i < s.size(); ++i) {
    depth += s[i] == '[' || s[i] == '{';
    depth -= s[i] == ']' || s[i] == '}';
    if (s[i] == ',' && depth == 0) {
      parts.push_back(trimmed(s.substr(begin, i - begin)));
      begin = i + 1;
    }
  }
  if (const std::string_view last = trimmed(s.substr(begin)); !last.empty())
    parts.push_back(last);
  return parts;
}

Operand operand_of(std::string_view s) {
  Operand o;
  s = trimmed(s);
  if (s.empty())
    fail("an empty operand");
  if (s.front() == '{' || s.front() == '[') {
    o.kind = s.front() == '{' ? 'v' : 'a';
    for (const std::string_view part : split(s.substr(1, s.size() - 2))) {
      if (o.kind == 'a' && o.parts.empty()) {
        const std::size_t plus = part.find_first_of("+-", 1);
        if (plus != std::string_view::npos) {
          o.parts.push_back(operand_of(part.substr(0, plus)));
          const std::string_view rest = trimmed(part.substr(plus + 1));
          std::from_chars(rest.data(), rest.data() + rest.size(), o.value);
          if (part[plus] == '-')
            o.value = -o.value;
          continue;
        }
      }
      o.parts.push_back(operand_of(part));
    }
    return o;
  }
  if (s.front() == '%' && s.size() > 2 && std::isdigit(static_cast<unsigned char>(s[2])) != 0) {
    o.kind = s[1];
    std::from_chars(s.data() + 2, s.data() + s.size(), o.id);
    return o;
  }
  if (s.starts_with("0f") || s.starts_with("0F")) {
    std::uint32_t bits = 0;
    std::from_chars(s.data() + 2, s.data() + s.size(), bits, 16);
    o.kind = 'F';
    o.value = bits;
    return o;
  }
  if (s.starts_with("0x")) {
    std::uint64_t bits = 0;
    std::from_chars(s.data() + 2, s.data() + s.size(), bits, 16);
    o.kind = 'i';
    o.value = static_cast<std::int64_t>(bits);
    return o;
  }
  if (s.front() == '-' || std::isdigit(static_cast<unsigned char>(s.front())) != 0) {
    o.kind = 'i';
    std::from_chars(s.data(), s.data() + s.size(), o.value);
    return o;
  }
  o.kind = 's';
  o.name = s;
  return o;
}

struct Program {
  std::vector<Instruction> code;
  std::vector<std::string> parameters;
  int threads = 0, cluster = 1;
  std::array<int, 128> registers{};
};

Program parse(std::string_view text) {
  Program program;
  std::unordered_map<std::string, int> labels;
  std::vector<std::pair<int, std::string>> jumps;
  bool in_body = false;
  while (!text.empty()) {
    const std::size_t end = text.find('\n');
    std::string_view line = text.substr(0, end);
    text.remove_prefix(end == std::string_view::npos ? text.size() : end + 1);
    if (const std::size_t comment = line.find("//"); comment != std::string_view::npos)
      line = line.substr(0, comment);
    line = trimmed(line);
    if (line.empty() || line == "(" || line == ")" || line == "}")
      continue;
    if (line == "{") {
      in_body = true;
      continue;
    }
    if (!in_body) {
      if (line.starts_with(".param")) {
        std::string_view name = line.substr(line.rfind(' ') + 1);
        name = name.substr(0, name.find_first_of("[,"));
        program.parameters.emplace_back(name);
      } else if (line.starts_with(".reqntid")) {
        program.threads = std::stoi(std::string(line.substr(9)));
      } else if (line.starts_with(".reqnctapercluster")) {
        program.cluster = std::stoi(std::string(line.substr(19)));
      }
      continue;
    }
    if (line.starts_with(".reg")) {
      const std::size_t percent = line.find('%'), angle = line.find('<');
      program.registers[static_cast<std::size_t>(line[percent + 1])] = std::stoi(std::string(line.substr(angle + 1)));
      continue;
    }
    if (line.front() == '$') {
      labels[std::string(line.substr(0, line.find(':')))] = static_cast<int>(program.code.size());
      continue;
    }
    Instruction in;
    in.line = line;
    if (line.front() == '@') {
      in.guard_negated = line[1] == '!';
      line.remove_prefix(in.guard_negated ? 4 : 3);
      const std::size_t space = line.find(' ');
      in.guard = std::stoi(std::string(line.substr(0, space)));
      line = trimmed(line.substr(space));
    }
    const std::size_t space = line.find(' ');
    in.opcode = line.substr(0, space);
    if (in.opcode == "bra")
      jumps.emplace_back(static_cast<int>(program.code.size()), std::string(trimmed(line.substr(space))));
    else if (space != std::string_view::npos)
      for (const std::string_view part : split(line.substr(space)))
        in.operands.push_back(operand_of(part));
    program.code.push_back(std::move(in));
  }
  for (const auto& [at, label] : jumps) {
    if (!labels.contains(label))
      fail("no label " + label);
    program.code[static_cast<std::size_t>(at)].target = labels[label];
  }
  return program;
}

// ---------------------------------------------------------------- state

struct Mbarrier {
  int count = 0, pending = 0;
  std::int64_t bytes = 0;
  std::uint32_t phase = 0; // completed ones
  void check_complete() {
    if (pending < 0)
      fail("more arrivals at a mbarrier than it was made for");
    if (pending == 0 && bytes == 0) {
      pending = count;
      ++phase;
    }
  }
};

template <class T> using Lanes = std::array<T, kLanes>;

/// Part of a warp in flight: 16 rows of wgmma.
struct Product {
  std::uint64_t a = 0, b = 0;
  int n = 0;
  bool accumulates = false, a_e5m2 = false, b_e5m2 = false;
  std::vector<int> d;
};

struct Block;

struct Warp {
  Block* block = nullptr;
  int index = 0;
  std::uint32_t live = ~std::uint32_t{0};
  Lanes<int> pc{};
  std::vector<Lanes<std::uint8_t>> p;
  std::vector<Lanes<std::uint16_t>> h;
  std::vector<Lanes<std::uint32_t>> r;
  std::vector<Lanes<std::uint64_t>> d;
  std::vector<Lanes<float>> f;
  std::vector<Product> uncommitted;
  std::deque<std::vector<Product>> groups;
  std::vector<std::uint8_t> in_flight; // by number of an f register
  // Why it does not go on.
  const Mbarrier* waits_for = nullptr;
  std::uint32_t waits_phase = 0;
  int bar = -1;
  unsigned bar_generation = 0, cluster_generation = 0;
  bool waits_for_cluster = false, arrived_in_cluster = false;
  unsigned arrived_generation = ~0u;                             // of the cluster's barrier
  Lanes<std::vector<std::function<void()>>> stores, stores_open; // bulk groups of each lane
  Lanes<std::vector<std::function<void()>>> copies;              // cp.async not yet tied to a mbarrier
};

struct NamedBarrier {
  int arrived = 0;
  unsigned generation = 0;
};

struct Block {
  int rank = 0, number = 0;
  std::vector<std::uint8_t> shared;
  std::map<std::uint32_t, Mbarrier> mbarriers;
  std::array<NamedBarrier, 16> bars;
  std::vector<std::unique_ptr<Warp>> warps;
};

class Machine {
public:
  Machine(std::string_view text, const Launch& launch) : program_(parse(text)), launch_(launch), random_(launch.seed) {
    if (launch.parameters.size() != program_.parameters.size())
      fail(fmt::format("{} parameters, the entry has {}", launch.parameters.size(), program_.parameters.size()));
    lateness_ = static_cast<int>(random_() % 3);
    for (int i = 0; i < 256; ++i) {
      values_[0][static_cast<std::size_t>(i)] = float_of_e4m3(static_cast<std::uint8_t>(i));
      values_[1][static_cast<std::size_t>(i)] = float_of_e5m2(static_cast<std::uint8_t>(i));
    }
    for (Instruction& in : program_.code)
      prepare(in);
  }
  void run() {
    const auto cluster = static_cast<unsigned>(program_.cluster);
    if (launch_.blocks % cluster != 0)
      fail("the grid is not a multiple of the cluster");
    for (unsigned first = 0; first < launch_.blocks; first += cluster)
      run_cluster(static_cast<int>(first));
  }

private:
  using Mask = std::uint32_t;
  template <class Body> static void each(Mask mask, Body body) {
    for (; mask != 0; mask &= mask - 1)
      body(static_cast<std::size_t>(std::countr_zero(mask)));
  }

  // ---- the clusters, one after the other

  void run_cluster(int first) {
    blocks_.clear();
    events_.clear();
    cluster_generation_ = 0;
    cluster_arrived_ = 0;
    for (int rank = 0; rank < program_.cluster; ++rank) {
      auto block = std::make_unique<Block>();
      block->rank = rank;
      block->number = first + rank;
      block->shared.assign(launch_.shared_bytes, 0xFF); // NaN of either type
      for (int w = 0; w < program_.threads / kLanes; ++w) {
        auto warp = std::make_unique<Warp>();
        warp->block = block.get();
        warp->index = w;
        const auto size = [&](char kind) {
          return static_cast<std::size_t>(program_.registers[static_cast<std::size_t>(kind)]);
        };
        warp->p.resize(size('p'));
        warp->h.resize(size('h'));
        warp->r.resize(size('r'));
        warp->d.resize(size('d'));
        warp->f.resize(size('f'));
        warp->in_flight.resize(size('f'));
        for (auto& lanes : warp->r)
          lanes.fill(0xDEADBEEF);
        for (auto& lanes : warp->f)
          lanes.fill(std::nanf(""));
        block->warps.push_back(std::move(warp));
      }
      blocks_.push_back(std::move(block));
    }
    std::vector<Warp*> warps;
    for (const auto& block : blocks_)
      for (const auto& warp : block->warps)
        warps.push_back(warp.get());
    for (;;) {
      std::vector<Warp*> runnable;
      bool any = false;
      for (Warp* warp : warps)
        if (warp->live != 0) {
          any = true;
          if (can_run(*warp))
            runnable.push_back(warp);
        }
      if (!any)
        break;
      const bool deliver = !events_.empty() &&
                           (runnable.empty() || (lateness_ != 0 && random_() % 4 < static_cast<unsigned>(lateness_)));
      if (deliver) {
        deliver_one();
        continue;
      }
      if (runnable.empty())
        fail(deadlock(warps));
      Warp& warp = *runnable[random_() % runnable.size()];
      for (unsigned budget = 1 + random_() % 200; budget != 0 && warp.live != 0 && can_run(warp); --budget)
        step(warp);
    }
    while (!events_.empty()) {
      if (!events_.front().may_outlive)
        fail("a block left before all that was sent to it had come");
      deliver_one();
    }
  }
  bool can_run(const Warp& warp) {
    if (warp.waits_for != nullptr)
      return warp.waits_for->phase != warp.waits_phase;
    if (warp.bar >= 0)
      return warp.block->bars[static_cast<std::size_t>(warp.bar)].generation != warp.bar_generation;
    return !warp.waits_for_cluster || cluster_generation_ != warp.cluster_generation;
  }
  std::string deadlock(const std::vector<Warp*>& warps) {
    std::string text = "deadlock:";
    for (const Warp* warp : warps)
      if (warp->live != 0)
        text += fmt::format(" [block {} warp {}: {}]", warp->block->rank, warp->index,
                            program_.code[static_cast<std::size_t>(first_pc(*warp))].line);
    return text;
  }
  static int first_pc(const Warp& warp) {
    int least = 1 << 30;
    each(warp.live, [&](std::size_t lane) { least = std::min(least, warp.pc[lane]); });
    return least;
  }
  void step(Warp& warp) {
    warp.waits_for = nullptr;
    warp.bar = -1;
    warp.waits_for_cluster = false;
    const int pc = first_pc(warp);
    Mask mask = 0;
    each(warp.live, [&](std::size_t lane) { mask |= warp.pc[lane] == pc ? Mask{1} << lane : 0; });
    const Instruction& in = program_.code[static_cast<std::size_t>(pc)];
    each(mask, [&](std::size_t lane) { ++warp.pc[lane]; });
    Mask active = mask;
    if (in.guard >= 0)
      each(mask, [&](std::size_t lane) {
        if ((warp.p[static_cast<std::size_t>(in.guard)][lane] != 0) == in.guard_negated)
          active &= ~(Mask{1} << lane);
      });
    try {
      if (active != 0)
        in.run(warp, active);
    } catch (const std::runtime_error& e) {
      fail(fmt::format("block {} warp {}: {}: {}", warp.block->number, warp.index, in.line, e.what()));
    }
  }

  // ---- what happens later

  struct Event {
    std::function<void()> body;
    bool may_outlive = false; // the block that it is for
  };
  void later(std::function<void()> body, bool may_outlive = false) {
    events_.push_back({std::move(body), may_outlive});
  }
  void deliver_one() {
    const std::size_t at = random_() % events_.size();
    const Event event = std::move(events_[at]);
    events_.erase(events_.begin() + static_cast<std::ptrdiff_t>(at));
    event.body();
  }

  // ---- operands

  std::uint64_t integer(const Warp& warp, const Operand& o, std::size_t lane) const {
    const auto id = static_cast<std::size_t>(o.id);
    switch (o.kind) {
    case 'r':
      return warp.r[id][lane];
    case 'd':
      return warp.d[id][lane];
    case 'h':
      return warp.h[id][lane];
    case 'p':
      return warp.p[id][lane];
    case 'i':
      return static_cast<std::uint64_t>(o.value);
    case 'f':
      touch(warp, o);
      return std::bit_cast<std::uint32_t>(warp.f[id][lane]);
    case 'F':
      return static_cast<std::uint64_t>(o.value);
    default:
      fail("no integer operand");
    }
  }
  float real(const Warp& warp, const Operand& o, std::size_t lane) const {
    return std::bit_cast<float>(static_cast<std::uint32_t>(integer(warp, o, lane)));
  }
  static void touch(const Warp& warp, const Operand& o) {
    if (warp.in_flight[static_cast<std::size_t>(o.id)] != 0)
      fail(fmt::format("%f{} belongs to products in flight", o.id));
  }
  void set(Warp& warp, const Operand& o, std::size_t lane, std::uint64_t value) const {
    const auto id = static_cast<std::size_t>(o.id);
    switch (o.kind) {
    case 'r':
      warp.r[id][lane] = static_cast<std::uint32_t>(value);
      return;
    case 'd':
      warp.d[id][lane] = value;
      return;
    case 'h':
      warp.h[id][lane] = static_cast<std::uint16_t>(value);
      return;
    case 'p':
      warp.p[id][lane] = value != 0 ? 1 : 0;
      return;
    case 'f':
      touch(warp, o);
      warp.f[id][lane] = std::bit_cast<float>(static_cast<std::uint32_t>(value));
      return;
    case 's':
      if (o.name == "_")
        return;
      [[fallthrough]];
    default:
      fail("no destination");
    }
  }
  void set(Warp& warp, const Operand& o, std::size_t lane, float value) const {
    set(warp, o, lane, std::uint64_t{std::bit_cast<std::uint32_t>(value)});
  }
  std::uint64_t address(const Warp& warp, const Operand& o, std::size_t lane) const {
    return integer(warp, o.parts.front(), lane) + static_cast<std::uint64_t>(o.value);
  }
  /// In this block's window or, of an address that mapa gave, in another's.
  Block& block_at(const Warp& warp, std::uint64_t at) const {
    const std::uint64_t rank = at >> kRankBit;
    return rank == 0 ? *warp.block : *blocks_.at(rank - 1);
  }
  static std::uint32_t offset_at(std::uint64_t at) { return static_cast<std::uint32_t>(at) & ((1u << kRankBit) - 1); }
  static std::uint8_t* shared(Block& block, std::uint32_t at, std::size_t bytes) {
    if (at < kSharedBase || at - kSharedBase + bytes > block.shared.size())
      fail(fmt::format("shared memory at {} of {} bytes", std::int64_t{at} - kSharedBase, block.shared.size()));
    return block.shared.data() + (at - kSharedBase);
  }
  static Mbarrier& mbarrier(Block& block, std::uint32_t at) {
    const auto found = block.mbarriers.find(at);
    if (found == block.mbarriers.end())
      fail(fmt::format("no mbarrier at {} of block {}", at - kSharedBase, block.rank));
    return found->second;
  }
  std::uint8_t* global(std::uint64_t at, std::size_t bytes, bool writes) const {
    for (const Range& range : launch_.memory) {
      const auto begin = reinterpret_cast<std::uintptr_t>(range.begin);
      if (at >= begin && at + bytes <= begin + range.bytes && (range.writable || !writes))
        return reinterpret_cast<std::uint8_t*>(at);
    }
    fail(fmt::format("global memory at {:#x}", at));
  }
  static void all_lanes(const Warp& warp, Mask mask) {
    if (mask != warp.live)
      fail("not all lanes are here");
  }

  // ---- instructions

  void prepare(Instruction& in) {
    std::string_view rest = in.opcode;
    while (!rest.empty()) {
      const std::size_t dot = rest.find('.');
      in.words.push_back(rest.substr(0, dot));
      rest.remove_prefix(dot == std::string_view::npos ? rest.size() : dot + 1);
    }
    const std::string& op = in.opcode;
    const std::vector<Operand>& o = in.operands;
    const auto starts = [&](std::string_view prefix) { return op.starts_with(prefix); };
    const auto integers = [this, &o, &in](auto function) {
      in.run = [this, &o, function](Warp& warp, Mask mask) {
        each(mask, [&](std::size_t lane) {
          const auto at = [&](std::size_t i) { return i < o.size() ? integer(warp, o[i], lane) : 0; };
          set(warp, o[0], lane, function(at(1), at(2), at(3)));
        });
      };
    };
    const auto reals = [this, &o, &in](auto function) {
      in.run = [this, &o, function](Warp& warp, Mask mask) {
        each(mask, [&](std::size_t lane) {
          const auto at = [&](std::size_t i) { return i < o.size() ? real(warp, o[i], lane) : 0.0f; };
          set(warp, o[0], lane, function(at(1), at(2), at(3)));
        });
      };
    };
    using U = std::uint64_t;
    using W = std::uint32_t;
    const auto nothing = [](Warp&, Mask) {};
    if (op == "bra") {
      in.run = [target = in.target](Warp& warp, Mask mask) { each(mask, [&](std::size_t l) { warp.pc[l] = target; }); };
    } else if (op == "exit") {
      in.run = [this](Warp& warp, Mask mask) { leave(warp, mask); };
    } else if (starts("mov.")) {
      prepare_mov(in);
    } else if (starts("cvta.param") || starts("cvt.u64.u32")) {
      integers([](U a, U, U) { return a; });
    } else if (starts("ld.param")) {
      const std::size_t at = parameter(o[1].parts.front().name);
      in.run = [this, &o, at](Warp& warp, Mask mask) {
        each(mask, [&](std::size_t lane) { set(warp, o[0], lane, launch_.parameters[at].value); });
      };
    } else if (op == "add.s32" || op == "add.s64" || op == "add.u64") {
      integers([](U a, U b, U) { return a + b; });
    } else if (op == "sub.s32") {
      integers([](U a, U b, U) { return a - b; });
    } else if (starts("mul.lo")) {
      integers([](U a, U b, U) { return a * b; });
    } else if (starts("mad.lo")) {
      integers([](U a, U b, U c) { return a * b + c; });
    } else if (op == "mul.wide.u32") {
      integers([](U a, U b, U) { return U{static_cast<W>(a)} * static_cast<W>(b); });
    } else if (op == "mad.wide.u32") {
      integers([](U a, U b, U c) { return U{static_cast<W>(a)} * static_cast<W>(b) + c; });
    } else if (op == "div.u32") {
      integers([](U a, U b, U) {
        if (static_cast<W>(b) == 0)
          fail("division by zero");
        return U{static_cast<W>(a) / static_cast<W>(b)};
      });
    } else if (op == "min.u32") {
      integers([](U a, U b, U) { return U{std::min(static_cast<W>(a), static_cast<W>(b))}; });
    } else if (op == "min.s32" || op == "max.s32") {
      integers([is_min = op == "min.s32"](U a, U b, U) {
        const auto x = static_cast<std::int32_t>(a), y = static_cast<std::int32_t>(b);
        return static_cast<U>(is_min ? std::min(x, y) : std::max(x, y));
      });
    } else if (op == "and.b32" || op == "and.pred") {
      integers([](U a, U b, U) { return a & b; });
    } else if (op == "or.b32" || op == "or.pred") {
      integers([](U a, U b, U) { return a | b; });
    } else if (op == "xor.b32") {
      integers([](U a, U b, U) { return a ^ b; });
    } else if (op == "shl.b32") {
      integers([](U a, U b, U) { return U{static_cast<W>(a) << b}; });
    } else if (op == "shr.u32") {
      integers([](U a, U b, U) { return U{static_cast<W>(a) >> b}; });
    } else if (starts("setp.")) {
      integers([how = std::string(in.words[1]), is_signed = in.words[2] == "s32"](U a, U b, U) {
        const std::int64_t x = is_signed ? std::int64_t{static_cast<std::int32_t>(a)} : std::int64_t{static_cast<W>(a)},
                           y = is_signed ? std::int64_t{static_cast<std::int32_t>(b)} : std::int64_t{static_cast<W>(b)};
        return U{how == "eq"   ? x == y
                 : how == "ne" ? x != y
                 : how == "lt" ? x < y
                 : how == "le" ? x <= y
                 : how == "gt" ? x > y
                               : x >= y};
      });
    } else if (op == "selp.b32") {
      integers([](U a, U b, U c) { return c != 0 ? a : b; });
    } else if (op == "fma.rn.f32") {
      reals([](float a, float b, float c) { return std::fma(a, b, c); });
    } else if (op == "mul.rn.f32") {
      reals([](float a, float b, float) { return a * b; });
    } else if (op == "add.rn.f32") {
      reals([](float a, float b, float) { return a + b; });
    } else if (op == "cvt.rn.bf16x2.f32" || op == "cvt.rn.f16x2.f32") {
      in.run = [this, &o, bf = op == "cvt.rn.bf16x2.f32"](Warp& warp, Mask mask) {
        each(mask, [&](std::size_t lane) {
          const auto half = [&](std::size_t i) -> U {
            return bf ? bf16_of_float(real(warp, o[i], lane)) : f16_of_float(real(warp, o[i], lane));
          };
          set(warp, o[0], lane, half(1) << 16 | half(2));
        });
      };
    } else if (starts("ld.") || starts("st.")) {
      prepare_transfer(in);
    } else if (starts("shfl.sync")) {
      in.run = [this, &o, idx = in.words[2] == "idx"](Warp& warp, Mask mask) {
        all_lanes(warp, mask);
        Lanes<U> values{};
        each(mask, [&](std::size_t lane) {
          const std::size_t from =
              idx ? static_cast<std::size_t>(o[2].value) : lane ^ static_cast<std::size_t>(o[2].value);
          values[lane] = integer(warp, o[1], from);
        });
        each(mask, [&](std::size_t lane) { set(warp, o[0], lane, values[lane]); });
      };
    } else if (starts("movmatrix")) {
      in.run = [this, &o](Warp& warp, Mask mask) {
        all_lanes(warp, mask);
        std::array<std::array<std::uint16_t, 8>, 8> matrix{};
        for (std::size_t lane = 0; lane < kLanes; ++lane)
          for (std::size_t i = 0; i < 2; ++i)
            matrix[lane / 4][2 * (lane % 4) + i] = static_cast<std::uint16_t>(integer(warp, o[1], lane) >> (16 * i));
        for (std::size_t lane = 0; lane < kLanes; ++lane)
          set(warp, o[0], lane, U{matrix[2 * (lane % 4)][lane / 4]} | U{matrix[2 * (lane % 4) + 1][lane / 4]} << 16);
      };
    } else if (starts("stmatrix")) {
      in.run = [this, &o, trans = op.find(".trans") != std::string::npos](Warp& warp, Mask mask) {
        all_lanes(warp, mask);
        for (std::size_t i = 0; i < o[1].parts.size(); ++i)
          for (std::size_t lane = 0; lane < kLanes; ++lane)
            for (std::size_t e = 0; e < 2; ++e) {
              const std::size_t row = trans ? 2 * (lane % 4) + e : lane / 4,
                                column = trans ? lane / 4 : 2 * (lane % 4) + e;
              const std::uint64_t at = address(warp, o[0], 8 * i + row);
              if (at % 16 != 0)
                fail("a row that is not aligned");
              const auto value = static_cast<std::uint16_t>(integer(warp, o[1].parts[i], lane) >> (16 * e));
              std::memcpy(shared(*warp.block, offset_at(at) + static_cast<std::uint32_t>(2 * column), 2), &value, 2);
            }
      };
    } else if (starts("mapa")) {
      integers([](U a, U rank, U) { return a | (rank + 1) << kRankBit; });
    } else if (starts("createpolicy")) {
      integers([](U, U, U) { return U{1}; });
    } else if (starts("prefetch.tensormap")) {
      in.run = [this, &o](Warp& warp, Mask mask) {
        each(mask, [&](std::size_t l) { map_at(address(warp, o[0], l)); });
      };
    } else if (starts("cp.async.ca")) {
      in.run = [this, &o](Warp& warp, Mask mask) {
        each(mask, [&](std::size_t lane) {
          const auto bytes = static_cast<std::size_t>(integer(warp, o[3], lane));
          const std::uint64_t from = address(warp, o[1], lane);
          const std::uint32_t to = offset_at(address(warp, o[0], lane));
          if (bytes != 0)
            global(from, bytes, false);
          shared(*warp.block, to, 4);
          Block* const block = warp.block;
          warp.copies[lane].emplace_back([block, from, to, bytes] {
            std::uint8_t* const at = shared(*block, to, 4);
            std::memset(at, 0, 4);
            if (bytes != 0)
              std::memcpy(at, reinterpret_cast<const void*>(from), bytes);
          });
        });
      };
    } else if (starts("cp.async.mbarrier.arrive.noinc")) {
      in.run = [this, &o](Warp& warp, Mask mask) {
        each(mask, [&](std::size_t lane) {
          Block* const block = warp.block;
          const std::uint32_t at = offset_at(address(warp, o[0], lane));
          mbarrier(*block, at);
          later([block, at, copies = std::exchange(warp.copies[lane], {})] {
            for (const auto& copy : copies)
              copy();
            Mbarrier& barrier = mbarrier(*block, at);
            --barrier.pending;
            barrier.check_complete();
          });
        });
      };
    } else if (starts("cp.async.bulk.prefetch.tensor")) {
      in.run = [this, &o](Warp& warp, Mask mask) {
        each(mask, [&](std::size_t lane) { map_at(integer(warp, o[0].parts[0], lane)); });
      };
    } else if (starts("cp.async.bulk.tensor.3d.shared::cluster")) {
      prepare_copy(in);
    } else if (starts("cp.async.bulk.tensor.3d.global")) {
      in.run = [this, &o](Warp& warp, Mask mask) {
        each(mask, [&](std::size_t lane) {
          const TensorMap& map = map_at(integer(warp, o[0].parts[0], lane));
          const std::array<std::int64_t, 3> at = coordinates(warp, o[0].parts[1], lane);
          const std::uint32_t from = offset_at(address(warp, o[1], lane));
          Block* const block = warp.block;
          warp.stores_open[lane].emplace_back([this, &map, at, from, block] { store_box(map, at, *block, from); });
        });
      };
    } else if (starts("cp.async.bulk.commit_group")) {
      in.run = [](Warp& warp, Mask mask) {
        each(mask, [&](std::size_t lane) {
          for (auto& store : warp.stores_open[lane])
            warp.stores[lane].push_back(std::move(store));
          warp.stores_open[lane].clear();
        });
      };
    } else if (starts("cp.async.bulk.wait_group.read")) {
      in.run = [](Warp& warp, Mask mask) {
        each(mask, [&](std::size_t lane) {
          for (const auto& store : std::exchange(warp.stores[lane], {}))
            store();
        });
      };
    } else if (starts("mbarrier.init")) {
      in.run = [this, &o](Warp& warp, Mask mask) {
        each(mask, [&](std::size_t lane) {
          const std::uint32_t at = offset_at(address(warp, o[0], lane));
          shared(*warp.block, at, 8);
          if (at % 8 != 0 || warp.block->mbarriers.contains(at))
            fail("a mbarrier that is not aligned, or made twice");
          const int count = static_cast<int>(o[1].value);
          warp.block->mbarriers[at] = {.count = count, .pending = count};
        });
      };
    } else if (starts("mbarrier.try_wait.parity")) {
      in.run = [this, &o](Warp& warp, Mask mask) {
        each(mask, [&](std::size_t lane) {
          const Mbarrier& barrier = mbarrier(*warp.block, offset_at(address(warp, o[1], lane)));
          const bool done = (barrier.phase & 1) != (integer(warp, o[2], lane) & 1);
          set(warp, o[0], lane, std::uint64_t{done});
          if (!done) {
            warp.waits_for = &barrier;
            warp.waits_phase = barrier.phase;
          }
        });
      };
    } else if (starts("mbarrier.arrive")) {
      const bool expects = op.find("expect_tx") != std::string::npos;
      in.run = [this, &o, expects](Warp& warp, Mask mask) {
        each(mask, [&](std::size_t lane) {
          const std::uint64_t at = address(warp, o[1], lane);
          Block& block = block_at(warp, at);
          if (&block == warp.block) {
            Mbarrier& barrier = mbarrier(block, offset_at(at));
            if (expects)
              barrier.bytes += static_cast<std::int64_t>(integer(warp, o[2], lane));
            --barrier.pending;
            barrier.check_complete();
            return;
          }
          later([&block, at] {
            Mbarrier& barrier = mbarrier(block, offset_at(at));
            --barrier.pending;
            barrier.check_complete();
          });
        });
      };
    } else if (starts("bar.warp.sync")) {
      in.run = [](Warp& warp, Mask mask) { all_lanes(warp, mask); };
    } else if (starts("bar.")) {
      in.run = [this, &o, waits = op == "bar.sync"](Warp& warp, Mask mask) {
        all_lanes(warp, mask);
        const int threads = o.size() > 1 ? static_cast<int>(o[1].value) : program_.threads;
        NamedBarrier& bar = warp.block->bars[static_cast<std::size_t>(o[0].value)];
        if (waits) {
          warp.bar = static_cast<int>(o[0].value);
          warp.bar_generation = bar.generation;
        }
        bar.arrived += kLanes;
        if (bar.arrived > threads)
          fail("more threads at a barrier than it is for");
        if (bar.arrived == threads) {
          bar.arrived = 0;
          ++bar.generation;
        }
      };
    } else if (starts("barrier.cluster.arrive")) {
      in.run = [this](Warp& warp, Mask mask) {
        all_lanes(warp, mask);
        if (warp.arrived_in_cluster)
          fail("a second arrival");
        warp.arrived_in_cluster = true;
        warp.cluster_generation = warp.arrived_generation = cluster_generation_;
        ++cluster_arrived_;
        check_cluster();
      };
    } else if (starts("barrier.cluster.wait")) {
      in.run = [this](Warp& warp, Mask mask) {
        all_lanes(warp, mask);
        if (!warp.arrived_in_cluster)
          fail("a wait without an arrival");
        warp.arrived_in_cluster = false;
        warp.waits_for_cluster = true;
      };
    } else if (starts("fence.") || op == "wgmma.fence.sync.aligned") {
      in.run = nothing;
    } else if (starts("wgmma.mma_async")) {
      prepare_wgmma(in);
    } else if (starts("wgmma.commit_group")) {
      in.run = [](Warp& warp, Mask mask) {
        all_lanes(warp, mask);
        warp.groups.push_back(std::exchange(warp.uncommitted, {}));
      };
    } else if (starts("wgmma.wait_group")) {
      in.run = [this, &o](Warp& warp, Mask mask) {
        all_lanes(warp, mask);
        while (warp.groups.size() > static_cast<std::size_t>(o[0].value)) {
          for (const Product& product : warp.groups.front())
            multiply(warp, product);
          for (const Product& product : warp.groups.front())
            for (const int d : product.d)
              warp.in_flight[static_cast<std::size_t>(d)] = 0;
          warp.groups.pop_front();
        }
      };
    } else {
      fail("unknown instruction: " + in.line);
    }
  }

  std::size_t parameter(std::string_view name) const {
    const auto at = std::find(program_.parameters.begin(), program_.parameters.end(), name);
    if (at == program_.parameters.end())
      fail(fmt::format("no parameter {}", name));
    return static_cast<std::size_t>(at - program_.parameters.begin());
  }
  const TensorMap& map_at(std::uint64_t at) const {
    const std::uint64_t index = at - kMapBase;
    if (index >= launch_.parameters.size() || launch_.parameters[index].map == nullptr)
      fail("not the address of a tensor map");
    return *launch_.parameters[index].map;
  }
  std::array<std::int64_t, 3> coordinates(const Warp& warp, const Operand& list, std::size_t lane) const {
    std::array<std::int64_t, 3> at{};
    for (std::size_t i = 0; i < 3; ++i)
      at[i] = static_cast<std::int32_t>(integer(warp, list.parts[i], lane));
    return at;
  }

  void prepare_mov(Instruction& in) {
    const std::vector<Operand>& o = in.operands;
    if (o[1].kind == 'v') { // {low, high} into 64 bits
      in.run = [this, &o](Warp& warp, Mask mask) {
        each(mask, [&](std::size_t lane) {
          set(warp, o[0], lane,
              (integer(warp, o[1].parts[0], lane) & 0xFFFFFFFF) | integer(warp, o[1].parts[1], lane) << 32);
        });
      };
      return;
    }
    if (o[1].kind == 's') {
      const std::string& name = o[1].name;
      std::function<std::uint64_t(const Warp&, std::size_t)> value;
      if (name == "%tid.x")
        value = [](const Warp& w, std::size_t lane) { return static_cast<std::uint64_t>(w.index) * kLanes + lane; };
      else if (name == "%ctaid.x")
        value = [](const Warp& w, std::size_t) { return static_cast<std::uint64_t>(w.block->number); };
      else if (name == "%nctaid.x")
        value = [this](const Warp&, std::size_t) { return std::uint64_t{launch_.blocks}; };
      else if (name == "%cluster_ctarank")
        value = [](const Warp& w, std::size_t) { return static_cast<std::uint64_t>(w.block->rank); };
      else if (name == "shared")
        value = [](const Warp&, std::size_t) { return std::uint64_t{kSharedBase}; };
      else
        value = [at = kMapBase + parameter(name)](const Warp&, std::size_t) { return at; };
      in.run = [this, &o, value](Warp& warp, Mask mask) {
        each(mask, [&](std::size_t lane) { set(warp, o[0], lane, value(warp, lane)); });
      };
      return;
    }
    in.run = [this, &o](Warp& warp, Mask mask) {
      each(mask, [&](std::size_t lane) { set(warp, o[0], lane, integer(warp, o[1], lane)); });
    };
  }

  /// ld and st of shared and global memory, ld.shared::cluster, st.async.
  void prepare_transfer(Instruction& in) {
    const std::vector<Operand>& o = in.operands;
    const bool loads = in.opcode.starts_with("ld."), async = in.opcode.starts_with("st.async");
    const bool is_shared = in.opcode.find("shared") != std::string::npos;
    if (!is_shared && in.opcode.find("global") == std::string::npos)
      fail("unknown instruction: " + in.line);
    const Operand &registers = o[loads ? 0 : 1], &where = o[loads ? 1 : 0];
    in.run = [this, &o, &registers, &where, loads, async, is_shared](Warp& warp, Mask mask) {
      each(mask, [&](std::size_t lane) {
        const std::vector<Operand> one = {registers};
        const std::vector<Operand>& list = registers.kind == 'v' ? registers.parts : one;
        const std::uint64_t at = address(warp, where, lane);
        const std::size_t bytes = 4 * list.size();
        if (at % bytes != 0)
          fail("not aligned");
        if (async) {
          std::array<std::uint32_t, 4> values{};
          for (std::size_t i = 0; i < 4; ++i)
            values[i] = static_cast<std::uint32_t>(integer(warp, list[i], lane));
          Block& block = block_at(warp, at);
          const std::uint64_t arrives = address(warp, o[2], lane);
          if (&block_at(warp, arrives) != &block)
            fail("the mbarrier is in another block");
          later([&block, at, arrives, values] {
            std::memcpy(shared(block, offset_at(at), 16), values.data(), 16);
            Mbarrier& barrier = mbarrier(block, offset_at(arrives));
            barrier.bytes -= 16;
            barrier.check_complete();
          });
          return;
        }
        std::uint8_t* const memory =
            is_shared ? shared(block_at(warp, at), offset_at(at), bytes) : global(at, bytes, !loads);
        for (std::size_t i = 0; i < list.size(); ++i) {
          std::uint32_t word = 0;
          if (loads) {
            std::memcpy(&word, memory + 4 * i, 4);
            set(warp, list[i], lane, std::uint64_t{word});
          } else {
            word = static_cast<std::uint32_t>(integer(warp, list[i], lane));
            std::memcpy(memory + 4 * i, &word, 4);
          }
        }
      });
    };
  }

  void prepare_copy(Instruction& in) {
    const std::vector<Operand>& o = in.operands;
    const bool multicasts = in.opcode.find("multicast") != std::string::npos;
    in.run = [this, &o, multicasts](Warp& warp, Mask mask) {
      each(mask, [&](std::size_t lane) {
        const TensorMap& map = map_at(integer(warp, o[1].parts[0], lane));
        const std::array<std::int64_t, 3> at = coordinates(warp, o[1].parts[1], lane);
        const std::uint32_t to = offset_at(address(warp, o[0], lane)), arrives = offset_at(address(warp, o[2], lane));
        if (to % 128 != 0)
          fail("a destination that is not aligned to 128 bytes");
        const std::uint64_t blocks = multicasts ? integer(warp, o[3], lane) : std::uint64_t{1} << warp.block->rank;
        for (std::size_t rank = 0; rank < blocks_.size(); ++rank)
          if (blocks >> rank & 1) {
            Block* const block = blocks_[rank].get();
            mbarrier(*block, arrives); // there already
            later([this, block, &map, at, to, arrives] {
              Mbarrier& barrier = mbarrier(*block, arrives);
              barrier.bytes -= load_box(map, at, *block, to);
              barrier.check_complete();
            });
          }
      });
    };
  }
  static std::uint32_t swizzled(std::uint32_t at, int swizzle) { return swizzle == 128 ? at ^ (at >> 7 & 7) << 4 : at; }
  static std::uint8_t* element_of(const TensorMap& map, std::int64_t x, std::int64_t y, std::int64_t z) {
    if (x < 0 || y < 0 || z < 0 || x >= map.extents[0] || y >= map.extents[1] || z >= map.extents[2])
      return nullptr;
    return map.base + x * map.element_bytes + y * map.strides[0] + z * map.strides[1];
  }
  static std::int64_t load_box(const TensorMap& map, const std::array<std::int64_t, 3>& at, Block& block,
                               std::uint32_t to) {
    const auto bytes = static_cast<std::uint32_t>(map.element_bytes);
    for (int y = 0; y < map.box[1]; ++y)
      for (int x = 0; x < map.box[0]; ++x) {
        const std::uint32_t linear = to + (static_cast<std::uint32_t>(y * map.box[0] + x)) * bytes;
        std::uint8_t* const place = shared(block, swizzled(linear, map.swizzle), bytes);
        if (const std::uint8_t* const from = element_of(map, at[0] + x, at[1] + y, at[2]))
          std::memcpy(place, from, bytes);
        else
          std::memset(place, 0, bytes);
      }
    return std::int64_t{map.box[0]} * map.box[1] * map.element_bytes;
  }
  void store_box(const TensorMap& map, const std::array<std::int64_t, 3>& at, Block& block, std::uint32_t from) const {
    if (from % 128 != 0)
      fail("a source that is not aligned to 128 bytes");
    const auto bytes = static_cast<std::uint32_t>(map.element_bytes);
    for (int y = 0; y < map.box[1]; ++y)
      for (int x = 0; x < map.box[0]; ++x)
        if (std::uint8_t* const to = element_of(map, at[0] + x, at[1] + y, at[2])) {
          const std::uint32_t linear = from + (static_cast<std::uint32_t>(y * map.box[0] + x)) * bytes;
          std::memcpy(to, shared(block, swizzled(linear, map.swizzle), bytes), bytes);
        }
  }

  void prepare_wgmma(Instruction& in) {
    const std::vector<Operand>& o = in.operands;
    const std::string_view shape = in.words[4]; // m64n128k32
    int n = 0;
    std::from_chars(shape.data() + 4, shape.data() + shape.size(), n);
    if (in.words[5] != "f32" || !shape.ends_with("k32") || o[0].parts.size() != static_cast<std::size_t>(n / 2))
      fail("unknown instruction: " + in.line);
    in.run = [this, &o, n, a = in.words[6] == "e5m2", b = in.words[7] == "e5m2"](Warp& warp, Mask mask) {
      all_lanes(warp, mask);
      Product product{.a = integer(warp, o[1], 0),
                      .b = integer(warp, o[2], 0),
                      .n = n,
                      .accumulates = integer(warp, o[3], 0) != 0,
                      .a_e5m2 = a,
                      .b_e5m2 = b,
                      .d = {}};
      each(mask, [&](std::size_t lane) {
        if (integer(warp, o[1], lane) != product.a || integer(warp, o[2], lane) != product.b)
          fail("descriptors that differ among lanes");
      });
      for (const Operand& d : o[0].parts) {
        product.d.push_back(d.id);
        warp.in_flight[static_cast<std::size_t>(d.id)] = 1;
      }
      warp.uncommitted.push_back(std::move(product));
    };
  }
  /// Element (row, k) of an operand: K-major, 128-byte swizzle.
  std::uint8_t operand_at(Block& block, std::uint64_t descriptor, int row, int k) const {
    if (descriptor >> 62 != 1)
      fail("a descriptor without the 128-byte swizzle");
    const auto start = static_cast<std::uint32_t>(descriptor & 0x3FFF) << 4;
    const auto eight_rows = static_cast<std::uint32_t>(descriptor >> 32 & 0x3FFF) << 4;
    const std::uint32_t linear =
        start + static_cast<std::uint32_t>(row / 8) * eight_rows + static_cast<std::uint32_t>(row % 8 * 128 + k);
    return *shared(block, swizzled(linear, 128), 1);
  }
  void multiply(Warp& warp, const Product& product) const {
    Block& block = *warp.block;
    const auto &a_values = values_[product.a_e5m2], &b_values = values_[product.b_e5m2];
    std::array<std::array<float, 32>, 16> a;
    for (int row = 0; row < 16; ++row)
      for (int k = 0; k < 32; ++k)
        a[static_cast<std::size_t>(row)][static_cast<std::size_t>(k)] =
            a_values[operand_at(block, product.a, warp.index % 4 * 16 + row, k)];
    for (int column = 0; column < product.n; ++column) {
      std::array<float, 32> b;
      for (int k = 0; k < 32; ++k)
        b[static_cast<std::size_t>(k)] = b_values[operand_at(block, product.b, column, k)];
      for (int row = 0; row < 16; ++row) {
        float sum = 0;
        for (std::size_t k = 0; k < 32; ++k)
          sum += a[static_cast<std::size_t>(row)][k] * b[k];
        const int lane = row % 8 * 4 + column % 8 / 2, e = column / 8 * 4 + row / 8 * 2 + column % 2;
        float& d =
            warp.f[static_cast<std::size_t>(product.d[static_cast<std::size_t>(e)])][static_cast<std::size_t>(lane)];
        d = product.accumulates ? d + sum : sum;
      }
    }
  }

  void leave(Warp& warp, Mask mask) {
    each(mask, [&](std::size_t lane) {
      if (!warp.stores[lane].empty() || !warp.stores_open[lane].empty())
        fail("a thread leaves before its stores have read shared memory");
      if (!warp.copies[lane].empty())
        fail("a thread leaves before its copies are awaited");
    });
    warp.live &= ~mask;
    if (warp.live == 0) {
      if (!warp.groups.empty() || !warp.uncommitted.empty())
        fail("products are in flight");
      check_cluster();
    }
  }
  void check_cluster() {
    bool all = true; // those that left count as arrived
    for (const auto& block : blocks_)
      for (const auto& warp : block->warps)
        all = all && (warp->live == 0 || warp->arrived_generation == cluster_generation_);
    if (cluster_arrived_ > 0 && all) {
      ++cluster_generation_;
      cluster_arrived_ = 0;
    }
  }

  Program program_;
  const Launch& launch_;
  std::mt19937_64 random_;
  int lateness_ = 0; // 0: nothing asynchronous happens before nothing else can
  std::array<std::array<float, 256>, 2> values_{};
  std::vector<std::unique_ptr<Block>> blocks_;
  std::vector<Event> events_;
  unsigned cluster_generation_ = 0;
  int cluster_arrived_ = 0;
};

} // namespace

std::string run(std::string_view text, const Launch& launch) {
  try {
    Machine(text, launch).run();
  } catch (const std::exception& e) {
    return e.what();
  }
  return {};
}

} // namespace kiln::test::ptx
