/// bench_arm_mca: how near the hot loops of the aarch64 kernels come to what a core's pipes can do, by LLVM's model of
/// that core (llvm-mca-19). Runs on any host: kernels are emitted, not run.
///
///   bench_arm_mca [--only PATH,…] [--plot FILE] [--json FILE] [--loops]
///
/// Every aarch64 row of the implementation table for int8_mm, for every class of machines in known_targets() that it
/// serves, every class of m, N = K = 1024; kernels of the same bytes once. The hot loop is cut from the emitted bytes
/// by its back edge (bench/arm_loops.h; tests/arm_instruction_count_test proves under qemu that it is where a call
/// spends its instructions). And attention's rows of bf16 instructions, D = 128, for one row and for many: the loops of
/// both products, Q·K and P·V. Per kernel and core:
///   instr       instructions of one iteration, MACs of them multiply-add instructions, on that many registers or tiles
///   loads/MAC   load instructions per MAC instruction; `once` those whose registers feed one MAC only (weights in a
///               GEMV)
///   cycles      per iteration, steady state: what 100 iterations take beyond 40
///   bound       cycles that the same model takes for the loop's MAC instructions alone, made independent of each
///   other;
///               for m ≤ 2, where weights stream, or for the loop's loads alone, if those take longer
///   ratio       bound / cycles
/// No model schedules SME: for `sme` the mix of instructions only. --loops prints the loops. Exit code: 0 all figures
/// reached, 1 one fell short or failed, 2 usage.
#include <algorithm>
#include <cctype>
#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <map>
#include <optional>
#include <string>
#include <string_view>
#include <tuple>
#include <vector>

#include <fmt/format.h>
#include <nlohmann/json.hpp>
#include <unistd.h>

#include "backends/table.h"
#include "bench/arm_loops.h"
#include "bench/options.h"
#include "bench/plot.h"
#include "jit/implementation.h"
#include "jit/ops/attention.h"
#include "jit/ops/int8_mm.h"

namespace kiln::bench {
namespace {

constexpr std::int64_t kSize = 1024; ///< N and K

/// A model of llvm-mca and the class of machines that it stands for.
struct Core {
  std::string_view mcpu, target;
  bool judged = true; ///< else told only: cortex-a55 runs in order, and the a64fx has twice the others' latencies
};
constexpr Core kCores[] = {{"cortex-a55", "cortex-a55", false}, {"cortex-a72", "cortex-a72"},
                           {"cortex-a76", "cortex-a76"},        {"neoverse-n1", "neoverse-n1"},
                           {"neoverse-n2", "neoverse-n2"},      {"neoverse-v1", "neoverse-v1"},
                           {"neoverse-v2", "neoverse-v2"},      {"a64fx", "a64fx", false}};

[[noreturn]] void fail(const std::string& message) {
  fmt::print(stderr, "bench_arm_mca: {}\n", message);
  std::exit(1);
}

template <class T> T take(Result<T> result) {
  if (!result)
    fail(result.status().message());
  return std::move(*result);
}

std::string m_text(std::int64_t m) {
  return m == kAny ? "any" : std::to_string(m);
}

// ---------------------------------------------------------------- kernels

struct Kernel {
  const Implementation* row;
  std::int64_t m;
  std::string pack_layout; ///< of attention: which product
  CodeObject code;
  std::vector<std::string> taken_by; ///< names of the known targets that take it for this m
  Loop hot;

  std::string name() const { return fmt::format("{} m={} {}", name_of(row->isa), m_text(m), pack_layout); }
  bool runs_on(const Target& target) const {
    const int bits = code.features.has(Feature::sme) ? target.sme_bits : target.sve_bits;
    return target.features.contains(code.features) && (code.vector_bits == 0 || code.vector_bits == bits);
  }
};

bool serves(const Implementation& row, const KernelDesc& desc, const Target& target) {
  return row.op == desc.op && row.compile != nullptr && (row.any_arch || row.arch == target.arch) &&
         target.features.contains(row.features_for(desc, target)) &&
         (row.supports == nullptr || row.supports(desc, target).is_ok());
}

/// The kernels that one class of machines may run, with the layout of weights that the engine chooses for it and the
/// one that suits the row best; `failures` for what cannot be compiled.
void add_kernels(const KnownTarget& known, std::vector<Kernel>& kernels, std::vector<std::string>& failures) {
  const Target target = take(Target::parse(known.text));
  const std::span<const Implementation> rows = implementation_table();
  const OpSpec& op = int8_mm::op();
  const KernelDesc any = op.canonical(int8_mm::make_desc(kAny, kSize, kSize));
  const auto first = std::find_if(rows.begin(), rows.end(), [&](auto& row) { return serves(row, any, target); });
  if (first == rows.end())
    fail(fmt::format("no row serves {}", known.name));
  const std::string chosen = first->pack_layout(any, target);
  for (const std::int64_t m : int8_mm::kMClasses) {
    const KernelDesc desc = op.canonical(int8_mm::make_desc(m, kSize, kSize));
    bool is_taken = false;
    for (const Implementation& row : rows) {
      if (!serves(row, desc, target))
        continue;
      std::vector<std::string> layouts = {row.pack_layout(desc, target)};
      if (chosen != layouts.front() && row.reads(chosen, desc, target))
        layouts.push_back(chosen);
      for (const std::string& layout : layouts) {
        Result<CodeObject> code = row.compile(desc, target, layout);
        if (!code) {
          failures.push_back(fmt::format("{} m={} {} for {}: {}", name_of(row.isa), m_text(m), layout, known.name,
                                         code.status().message()));
          continue;
        }
        Kernel kernel = {&row, m, layout, std::move(*code), {}, {}};
        auto same = std::find_if(kernels.begin(), kernels.end(), [&](const Kernel& k) {
          return k.row == kernel.row && k.m == kernel.m && k.code == kernel.code;
        });
        if (same == kernels.end()) {
          const std::vector<Loop> loops = hot_loops(take(instructions_of(kernel.code)));
          if (loops.empty())
            fail(fmt::format("{} for {}: no loop with multiply-adds", kernel.name(), known.name));
          kernel.hot = loops.front();
          same = kernels.insert(kernels.end(), std::move(kernel));
        }
        if (!is_taken && layout == chosen && (row.declines == nullptr || row.declines(desc, target).empty())) {
          same->taken_by.emplace_back(known.name);
          is_taken = true;
        }
      }
    }
  }
}

/// attention's loops of bf16 instructions for one class of machines: of each kernel the two with the most of them, in
/// the order in which they run.
void add_attention(const KnownTarget& known, std::vector<Kernel>& kernels, std::vector<std::string>& failures) {
  constexpr std::int64_t kHeadSize = 128;
  const Target target = take(Target::parse(known.text));
  for (const std::int64_t m : {std::int64_t{1}, kAny}) {
    const KernelDesc desc = attention::op().canonical(attention::make_desc(kAny, 1, 1, m, kAny, kHeadSize, kHeadSize));
    const std::span<const Implementation> rows = implementation_table();
    const auto row = std::find_if(rows.begin(), rows.end(), [&](auto& r) { return serves(r, desc, target); });
    if (row == rows.end() || row->isa != IsaPath::bf16mm)
      continue;
    Result<CodeObject> code = row->compile(desc, target, "");
    if (!code) {
      failures.push_back(fmt::format("attention m={} for {}: {}", m_text(m), known.name, code.status().message()));
      continue;
    }
    std::vector<Loop> loops = hot_loops(take(instructions_of(*code)));
    loops.resize(std::min<std::size_t>(loops.size(), 2));
    std::sort(loops.begin(), loops.end(), [](const Loop& a, const Loop& b) { return a.begin() < b.begin(); });
    if (loops.size() < 2)
      failures.push_back(fmt::format("attention m={} for {}: less than two loops of products", m_text(m), known.name));
    for (std::size_t i = 0; i < loops.size(); ++i) {
      Kernel kernel = {&*row, m, i == 0 ? "attention Q·K" : "attention P·V", *code, {}, loops[i]};
      auto same = std::find_if(kernels.begin(), kernels.end(), [&](const Kernel& k) {
        return k.row == kernel.row && k.m == kernel.m && k.pack_layout == kernel.pack_layout && k.code == kernel.code;
      });
      if (same == kernels.end())
        same = kernels.insert(kernels.end(), std::move(kernel));
      same->taken_by.emplace_back(known.name);
    }
  }
}

std::vector<Kernel> emit_all(std::vector<std::string>& failures) {
  std::vector<Kernel> kernels;
  for (const KnownTarget& known : known_targets())
    if (take(Target::parse(known.text)).arch == Arch::aarch64) {
      add_kernels(known, kernels, failures);
      add_attention(known, kernels, failures);
    }
  for (const Implementation& row : implementation_table())
    if (row.op == OpId::int8_mm && row.arch == Arch::aarch64 && !row.any_arch &&
        std::none_of(kernels.begin(), kernels.end(),
                     [&](const Kernel& kernel) { return kernel.row == &row && !kernel.taken_by.empty(); }))
      failures.push_back(fmt::format("{}: no class of machines in known_targets() takes it", name_of(row.isa)));
  std::stable_sort(kernels.begin(), kernels.end(), [](const Kernel& a, const Kernel& b) {
    return std::tuple(a.row, a.pack_layout) < std::tuple(b.row, b.pack_layout);
  });
  return kernels;
}

// ---------------------------------------------------------------- the model

/// Assembly that llvm-mca runs over and over, `repeats` times what is asked about. `@` stands for a label's number, so
/// that equal loops of several kernels are one region.
struct Region {
  std::string assembly;
  int repeats = 1;
};

Region loop_region(const Loop& loop) {
  Region region = {".L@:\n"};
  for (const Instruction& i : loop.body)
    region.assembly += i.branches_to < 0 ? i.text + '\n' : i.text.substr(0, i.text.rfind(' ')) + " .L@\n";
  return region;
}

/// The text with its vector registers numbered anew, in order of appearance.
std::string renamed(const std::string& text, std::size_t target, std::size_t first_source) {
  std::string out;
  std::size_t next = 0;
  for (std::size_t i = 0; i < text.size(); ++i) {
    out += text[i];
    const bool is_register = i > 0 && (text[i - 1] == ' ' || text[i - 1] == '{') &&
                             (text[i] == 'v' || text[i] == 'z') && i + 1 < text.size() &&
                             std::isdigit(static_cast<unsigned char>(text[i + 1])) != 0;
    if (!is_register)
      continue;
    out += std::to_string(next == 0 ? target : first_source + next - 1);
    ++next;
    while (i + 1 < text.size() && std::isdigit(static_cast<unsigned char>(text[i + 1])) != 0)
      ++i;
  }
  return out;
}

/// The loop's MAC instructions, in its order and proportion, each on an accumulator that is free again when it comes
/// round: latency × rate stays below 24 on every core of the list.
Region mac_region(const Loop& loop) {
  constexpr std::size_t kFirstAccumulator = 8, kAccumulators = 24, kAtLeast = 48;
  Region region;
  region.repeats = static_cast<int>((kAtLeast + loop.macs() - 1) / loop.macs());
  std::size_t next = 0;
  for (int i = 0; i < region.repeats; ++i)
    for (const Instruction& instruction : loop.body)
      if (instruction.is_mac())
        region.assembly += renamed(instruction.text, kFirstAccumulator + next++ % kAccumulators, 0) + '\n';
  return region;
}

/// The loop's loads without the writes to their address registers.
Region load_region(const Loop& loop) {
  constexpr std::size_t kAtLeast = 48;
  Region region;
  region.repeats = static_cast<int>((kAtLeast + loop.loads() - 1) / std::max<std::size_t>(loop.loads(), 1));
  for (int i = 0; i < region.repeats; ++i)
    for (const Instruction& instruction : loop.body)
      if (instruction.is_load())
        region.assembly += instruction.text.substr(0, instruction.text.rfind(']') + 1) + '\n';
  return region;
}

/// A file that is gone at the end.
class TemporaryFile {
public:
  explicit TemporaryFile(std::string_view content) {
    const int file = mkstemp(path_.data());
    if (file < 0)
      fail("no temporary file can be made");
    close(file);
    std::ofstream(path_) << content;
  }
  TemporaryFile(const TemporaryFile&) = delete;
  TemporaryFile& operator=(const TemporaryFile&) = delete;
  ~TemporaryFile() { std::remove(path_.c_str()); }
  const std::string& path() const { return path_; }

private:
  std::string path_ = std::filesystem::temp_directory_path().string() + "/kiln-mca-XXXXXX";
};

/// Total cycles of each region.
std::vector<double> simulate(std::string_view mcpu, const std::string& path, std::size_t regions, int iterations) {
  const std::string command = fmt::format(
      "llvm-mca-19 -mtriple=aarch64 -mcpu={} -iterations={} -instruction-info=0 -resource-pressure=0 -json {}", mcpu,
      iterations, path);
  std::string output;
  FILE* pipe = popen(command.c_str(), "r");
  if (pipe == nullptr)
    fail("cannot start llvm-mca-19");
  char buffer[4096];
  for (std::size_t n = 0; (n = std::fread(buffer, 1, sizeof buffer, pipe)) > 0;)
    output.append(buffer, n);
  if (pclose(pipe) != 0)
    fail(fmt::format("failed (package llvm-19): {}", command));
  const nlohmann::json answer = nlohmann::json::parse(output, nullptr, false);
  std::vector<double> cycles;
  if (!answer.is_discarded() && answer.contains("CodeRegions"))
    for (const nlohmann::json& region : answer["CodeRegions"])
      cycles.push_back(region.at("SummaryView").at("TotalCycles").get<double>());
  if (cycles.size() != regions)
    fail(fmt::format("{} regions answered, {} asked: {}", cycles.size(), regions, command));
  return cycles;
}

/// Cycles of each region, once through, in the long run.
std::vector<double> steady_cycles(std::string_view mcpu, const std::vector<Region>& regions) {
  constexpr int kFew = 40, kMany = 100;
  std::map<std::string, std::size_t> numbers;
  std::string assembly;
  for (const Region& region : regions) {
    const std::size_t number = numbers.size();
    if (!numbers.emplace(region.assembly, number).second)
      continue;
    std::string text = region.assembly;
    for (std::size_t at = 0; (at = text.find('@', at)) != std::string::npos;)
      text.replace(at, 1, std::to_string(number));
    assembly += fmt::format("# LLVM-MCA-BEGIN {0}\n{1}# LLVM-MCA-END {0}\n", number, text);
  }
  if (numbers.empty())
    return {};
  const TemporaryFile file(assembly);
  const std::vector<double> few = simulate(mcpu, file.path(), numbers.size(), kFew),
                            many = simulate(mcpu, file.path(), numbers.size(), kMany);
  std::vector<double> cycles;
  for (const Region& region : regions) {
    const std::size_t number = numbers.at(region.assembly);
    cycles.push_back((many[number] - few[number]) / (kMany - kFew) / region.repeats);
  }
  return cycles;
}

struct Modelled {
  const Kernel* kernel;
  const Core* core;
  double cycles, mac_bound, load_bound;

  bool is_gemv() const { return kernel->m == 1 || kernel->m == 2; }
  double bound() const { return is_gemv() ? std::max(mac_bound, load_bound) : mac_bound; }
  double ratio() const { return bound() / cycles; }
};

std::vector<Modelled> model(const std::vector<Kernel>& kernels, const Core& core) {
  const Target target = take(Target::parse(core.target));
  std::vector<Modelled> modelled;
  std::vector<Region> regions;
  for (const Kernel& kernel : kernels)
    if (kernel.runs_on(target)) {
      modelled.push_back({&kernel, &core, 0, 0, 0});
      regions.push_back(loop_region(kernel.hot));
      regions.push_back(mac_region(kernel.hot));
      regions.push_back(load_region(kernel.hot));
    }
  const std::vector<double> cycles = steady_cycles(core.mcpu, regions);
  for (std::size_t i = 0; i < modelled.size(); ++i) {
    modelled[i].cycles = cycles[3 * i];
    modelled[i].mac_bound = cycles[3 * i + 1];
    modelled[i].load_bound = cycles[3 * i + 2];
  }
  return modelled;
}

// ---------------------------------------------------------------- figures

bool is_judged_for(std::int64_t m) {
  return m == kAny || m == 1 || m >= 8;
}

/// Of the SDOT and SMMLA loops that some machine takes, those of matrix kernels and of the GEMV for m = 1; of attention
/// those of BFMMLA; 0 where a ratio is only told.
double ratio_to_reach(const Kernel& kernel) {
  const IsaPath isa = kernel.row->isa;
  if (kernel.row->op == OpId::attention)
    return kernel.m == kAny ? 0.85 : 0;
  const bool judged =
      isa == IsaPath::sdot || isa == IsaPath::i8mm || isa == IsaPath::sve_i8mm || isa == IsaPath::sve_sdot;
  return judged && is_judged_for(kernel.m) && !kernel.taken_by.empty() ? 0.95 : 0;
}

/// Ratios that must be among those judged: the largest matrix kernel of a path on a core.
struct Required {
  IsaPath isa;
  std::string_view mcpu;
};
constexpr Required kRequired[] = {
    {IsaPath::sdot, "cortex-a76"},    {IsaPath::sdot, "neoverse-n1"},  {IsaPath::sdot, "neoverse-n2"},
    {IsaPath::sdot, "neoverse-v1"},   {IsaPath::sdot, "neoverse-v2"},  {IsaPath::i8mm, "neoverse-n2"},
    {IsaPath::i8mm, "neoverse-v1"},   {IsaPath::i8mm, "neoverse-v2"},  {IsaPath::bf16mm, "neoverse-n2"},
    {IsaPath::bf16mm, "neoverse-v1"}, {IsaPath::bf16mm, "neoverse-v2"}};

/// A GEMV, the smallest matrix kernel, the largest.
bool is_plotted(std::int64_t m) {
  return m == 1 || m == 4 || m == kAny;
}

/// Figures of the loop itself, the same on every core. Counts one that falls short.
int judge_mix(const Kernel& kernel) {
  const Loop& loop = kernel.hot;
  const auto macs = static_cast<double>(loop.macs()), loads = static_cast<double>(loop.loads());
  const auto once = static_cast<double>(loop.loads_used_once());
  int short_of = 0;
  const auto at_most = [&](std::string_view what, double value, double reach) {
    if (value <= reach)
      return;
    fmt::print("  SHORT {}: {} {:.3f}, to reach ≤ {:g}\n", kernel.name(), what, value, reach);
    ++short_of;
  };
  if (kernel.row->generator != GeneratorId::asmjit || kernel.taken_by.empty())
    return 0;
  if (kernel.m == 1) {
    at_most("loads of weights per MAC", once / macs, 1);
    at_most("other loads per MAC", (loads - once) / macs, 0.25);
  }
  if (kernel.row->isa == IsaPath::sme && (kernel.m == 32 || kernel.m == kAny)) {
    if (loop.accumulators() != 4) {
      fmt::print("  SHORT {}: {} ZA tiles live, to reach 4\n", kernel.name(), loop.accumulators());
      ++short_of;
    }
    at_most("loads per SMOPA", loads / macs, 1);
    at_most("instructions that are neither SMOPA nor load", 1 - (macs + loads) / static_cast<double>(loop.body.size()),
            0.1);
  }
  return short_of;
}

void print_kernel(const Kernel& kernel, bool with_loop) {
  const Loop& loop = kernel.hot;
  const auto macs = static_cast<double>(loop.macs());
  std::string taken_by;
  for (const std::string& name : kernel.taken_by)
    taken_by += (taken_by.empty() ? "" : ", ") + name;
  fmt::print("{}: bytes {:#x}–{:#x}, {} instr, {} MACs on {} accumulators, {:.3f} loads/MAC ({:.3f} once), MACs + "
             "loads {:.1f} %; {}\n",
             kernel.name(), loop.begin(), loop.end(), loop.body.size(), loop.macs(), loop.accumulators(),
             static_cast<double>(loop.loads()) / macs, static_cast<double>(loop.loads_used_once()) / macs,
             100.0 * (macs + static_cast<double>(loop.loads())) / static_cast<double>(loop.body.size()),
             taken_by.empty() ? "taken by no class of machines" : "taken by " + taken_by);
  if (with_loop)
    for (const Instruction& instruction : loop.body)
      fmt::print("    {:5x}: {}\n", instruction.offset, instruction.text);
}

int run(const Options& options, bool loops, const std::string& plot) {
  const auto wants = [&](IsaPath isa) { return options.wants(name_of(isa)); };
  std::vector<std::string> failures;
  std::vector<Kernel> kernels = emit_all(failures);
  std::erase_if(kernels, [&](const Kernel& kernel) { return !wants(kernel.row->isa); });
  std::vector<Modelled> modelled;
  for (const Core& core : kCores)
    for (Modelled& one : model(kernels, core))
      modelled.push_back(one);

  int short_of = static_cast<int>(failures.size()), judged = 0;
  for (const std::string& failure : failures)
    fmt::print("SHORT {}\n", failure);
  for (const Required& required : kRequired) {
    const auto found = std::find_if(modelled.begin(), modelled.end(), [&](const Modelled& one) {
      return one.kernel->row->isa == required.isa && one.kernel->m == kAny && one.core->mcpu == required.mcpu &&
             one.core->judged && ratio_to_reach(*one.kernel) > 0;
    });
    if (found != modelled.end() || !wants(required.isa))
      continue;
    fmt::print("SHORT {} m=any on {}: nothing to judge\n", name_of(required.isa), required.mcpu);
    ++short_of;
  }
  std::vector<PlotPoint> points;
  nlohmann::ordered_json rows = nlohmann::ordered_json::array();
  for (const Kernel& kernel : kernels) {
    print_kernel(kernel, loops);
    short_of += judge_mix(kernel);
    for (const Modelled& one : modelled) {
      if (one.kernel != &kernel)
        continue;
      const double reach = one.core->judged ? ratio_to_reach(kernel) : 0;
      const bool met = one.ratio() >= reach;
      judged += reach > 0;
      short_of += !met;
      fmt::print("  {:<12} {:8.2f} cycles, bound {:8.2f} ({}), ratio {:.3f}  {}\n", one.core->mcpu, one.cycles,
                 one.bound(), one.bound() > one.mac_bound ? "loads" : "MACs", one.ratio(),
                 reach == 0 ? "" : fmt::format("≥ {:g} {}", reach, met ? "yes" : "NO"));
      rows.push_back({{"path", name_of(kernel.row->isa)},
                      {"m", m_text(kernel.m)},
                      {"pack_layout", kernel.pack_layout},
                      {"core", one.core->mcpu},
                      {"instructions", kernel.hot.body.size()},
                      {"macs", kernel.hot.macs()},
                      {"loads", kernel.hot.loads()},
                      {"loads_used_once", kernel.hot.loads_used_once()},
                      {"cycles", one.cycles},
                      {"mac_bound", one.mac_bound},
                      {"load_bound", one.load_bound},
                      {"ratio", one.ratio()}});
      if (!kernel.taken_by.empty() && kernel.row->op == OpId::int8_mm && is_plotted(kernel.m))
        points.push_back({fmt::format("{} {}", name_of(kernel.row->isa), kernel.pack_layout),
                          fmt::format("m={} {}", m_text(kernel.m), one.core->mcpu), one.ratio(), 0, reach});
    }
  }
  fmt::print("{} kernels on {} cores; {} ratios had to be reached; {} figures fell short\n", kernels.size(),
             std::size(kCores), judged, short_of);
  bool written =
      plot.empty() ||
      write_plot(plot,
                 "int8_mm on aarch64: bound / cycles of the hot loops, by the models of llvm-mca-19 (none knows SME)",
                 points);
  if (!options.json().empty()) {
    std::ofstream file(options.json());
    file << rows.dump(1) << '\n';
    file.close();
    written &= static_cast<bool>(file);
  }
  return written && short_of == 0 ? 0 : 1;
}

} // namespace
} // namespace kiln::bench

int main(int argc, char** argv) {
  using namespace kiln::bench;
  std::vector<std::string> paths;
  for (const kiln::Implementation& row : kiln::implementation_table())
    if (const std::string path(kiln::name_of(row.isa));
        (row.arch == kiln::Arch::aarch64 || row.any_arch) && std::find(paths.begin(), paths.end(), path) == paths.end())
      paths.push_back(path);
  Options options("bench_arm_mca", "Hot loops of the aarch64 kernels by LLVM's models of cores.", paths, Smoke::none);
  bool loops = false;
  std::string plot;
  options.add("--loops", loops, "print the loops too");
  options.add("--plot", plot, "FILE.svg", "also draw the ratios there");
  options.parse(argc, argv);
  return run(options, loops, plot);
}
