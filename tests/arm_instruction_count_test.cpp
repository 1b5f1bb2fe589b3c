#include <doctest/doctest.h>

#include <cinttypes>
#include <cstdio>
#include <cstdlib>
#include <string>
#include <unistd.h>
#include <vector>

#include <fmt/format.h>

#include "backends/table.h"
#include "bench/arm_loops.h"
#include "jit/engine.h"
#include "jit/ops/int8_linear_driver.h"
#include "jit/ops/int8_mm_driver.h"
#include "tests/guarded_buffer.h"

/// Where a whole op call of every aarch64 row spends its instructions, counted under qemu by tests/qemu_count.c: proves
/// that the loops which bench_arm_mca judges, cut from the same bytes by the same code, are the hot ones. Sums are not
/// looked at (qemu 7.2 computes SMOPA wrongly; what is executed does not depend on them). Runs with QEMU_PLUGIN as
/// tests/CMakeLists.txt sets it, and the file that the plugin writes in KILN_COUNT_FILE.

using namespace kiln;

namespace {

constexpr long kCountSyscall = 0x4b494c4e, kBegin = 1, kEnd = 2; // tests/qemu_count.c

struct Counts {
  std::uint64_t all = 0;             ///< instructions between the marks
  std::vector<std::uint64_t> kernel; ///< by word of the kernel's image
};

Counts read_counts(const char* path, const std::uint8_t* image, std::size_t bytes) {
  Counts counts;
  counts.kernel.resize(bytes / 4);
  FILE* file = std::fopen(path, "r");
  REQUIRE_MESSAGE(file != nullptr, "no counts in ", path, ": is QEMU_PLUGIN set, and qemu's?");
  const auto base = static_cast<std::uint64_t>(reinterpret_cast<std::uintptr_t>(image));
  std::uint64_t address = 0, instructions = 0, count = 0;
  while (std::fscanf(file, "%" SCNx64 " %" SCNu64 " %" SCNu64, &address, &instructions, &count) == 3) {
    counts.all += instructions * count;
    for (std::uint64_t i = 0; i < instructions; ++i)
      if (const std::uint64_t word = (address + 4 * i - base) / 4; address + 4 * i >= base && word < bytes / 4)
        counts.kernel[word] += count;
  }
  char last[11] = {};
  const bool complete = std::fscanf(file, " %10[# a-z]", last) == 1 && std::string(last) == "# complete";
  std::fclose(file);
  std::remove(path);
  REQUIRE(complete);
  return counts;
}

/// This machine without the features that the row does not use: weights are then laid out as the row likes best.
Machine machine_for(const Implementation& row) {
  Machine machine = detect_machine();
  Target target{.arch = machine.target.arch, .features = {Feature::neon}};
  for (const Feature feature : row.needs.list())
    target.features.add(feature);
  if (target.features.has(Feature::sve))
    target.sve_bits = machine.target.sve_bits;
  if (target.features.has(Feature::sme))
    target.sme_bits = machine.target.sme_bits;
  CAPTURE(machine.target.text());
  CAPTURE(target.text());
  REQUIRE(machine.target.features.contains(target.features));
  machine.target = target;
  return machine;
}

/// Of the instructions of the whole call, the driver's among them.
struct Shares {
  double hottest =
      0; ///< of the kernel's instructions: the hot loop with the most multiply-adds, which is what is judged
  double outside = 0;    ///< outside every hot loop
  std::uint64_t all = 0; ///< instructions
};

/// Per channel q_scale, ties away from zero, and a zero point of C, to s8.
KernelDesc with_epilogue(std::int64_t m, std::int64_t n, std::int64_t k) {
  KernelDesc desc = int8_mm::make_desc(m, n, k);
  const auto set = [&](int8_mm::Field field, auto value) { desc.value[field] = static_cast<std::int64_t>(value); };
  set(int8_mm::kCDtype, int8_mm::CDtype::s8);
  set(int8_mm::kRescale, int8_mm::Rescale::q_scale);
  set(int8_mm::kRescalePer, int8_mm::RescalePer::channel);
  set(int8_mm::kRounding, int8_mm::Rounding::away);
  set(int8_mm::kBias, 1);
  set(int8_mm::kCZp, 1);
  return desc;
}

/// What `call`, one call of the op by this kernel, executes. `name` and `layout` are for the reader.
template <class Call>
Shares count(const Kernel& kernel, std::string_view name, std::int64_t m, std::int64_t n, std::int64_t k,
             const std::string& layout, Call call) {
  const char* path = std::getenv("KILN_COUNT_FILE");
  REQUIRE(path != nullptr);
  syscall(kCountSyscall, kBegin);
  const Status status = call();
  syscall(kCountSyscall, kEnd);
  REQUIRE(status.is_ok());
  const Counts counts = read_counts(path, kernel.text().data(), kernel.text().size());

  CodeObject code = kernel.code();
  code.image.assign(kernel.text().begin(), kernel.text().end());
  const Result<std::vector<bench::Instruction>> instructions = bench::instructions_of(code);
  REQUIRE_MESSAGE(instructions.is_ok(), (instructions ? "" : instructions.status().message()));
  std::uint64_t in_kernel = 0, in_hottest = 0, in_hot = 0, macs = 0;
  for (const std::uint64_t executed : counts.kernel)
    in_kernel += executed;
  for (const bench::Instruction& instruction : *instructions)
    macs += instruction.is_mac() ? counts.kernel[instruction.offset / 4] : 0;
  const std::vector<bench::Loop> loops = bench::hot_loops(*instructions);
  REQUIRE(!loops.empty());
  for (const bench::Loop& loop : loops) {
    std::uint64_t executed = 0;
    for (const bench::Instruction& instruction : loop.body)
      executed += counts.kernel[instruction.offset / 4];
    in_hot += executed;
    if (&loop == &loops.front())
      in_hottest = executed;
  }
  REQUIRE(in_kernel > 0);
  REQUIRE(counts.all >= in_kernel);
  const auto share = [](std::uint64_t part, std::uint64_t whole) {
    return static_cast<double>(part) / static_cast<double>(whole);
  };
  const Shares shares = {share(in_hottest, counts.all), 1 - share(in_hot, counts.all), counts.all};
  fmt::print("{:<9} {} {:>4}×{}×{} {:<7} {:>11} instructions, {:>10} in the kernel, {:6.3f} per MAC instruction, "
             "{:7.3f} per 1000 products; hot loop {:#x}–{:#x} {:5.1f} %, outside hot loops {:5.2f} %\n",
             name_of(kernel.implementation().isa), name, m, n, k, layout, counts.all, in_kernel,
             share(counts.all, macs), 1000 * share(counts.all, static_cast<std::uint64_t>(m * n * k)),
             loops.front().begin(), loops.front().end(), 100 * shares.hottest, 100 * shares.outside);
  std::fflush(stdout);
  return shares;
}

Shares count(Engine& engine, const Implementation& row, const KernelDesc& desc) {
  const std::int64_t m = desc.value[int8_mm::kM], n = desc.value[int8_mm::kN], k = desc.value[int8_mm::kK];
  const bool finishes = desc.value[int8_mm::kRescale] != 0;
  const Result<KernelRef> got = engine.get(desc);
  REQUIRE_MESSAGE(got.is_ok(), (got ? "" : got.status().message()));
  const Kernel& kernel = **got;
  REQUIRE(kernel.implementation().isa == row.isa);
  const auto& plan = *static_cast<const int8_mm::Plan*>(kernel.plan());
  const std::vector<std::int8_t> a(static_cast<std::size_t>(m * k), 1), b(static_cast<std::size_t>(n * k), 1);
  std::vector<std::int32_t> c(static_cast<std::size_t>(m * n));
  const Result<int8_mm::Pack> pack =
      int8_mm::Pack::make(plan.layout, b.data(), k, int8_mm::BLayout::nk, n, k, engine.runtime().parallel);
  REQUIRE(pack.is_ok());
  const std::vector<std::int32_t> bias(static_cast<std::size_t>(n), 100), mult(bias.size(), 1 << 30),
      shift(bias.size(), -5);
  int8_mm::Args args = {.m = m, .a = a.data(), .lda = k, .pack = &*pack, .c = c.data(), .ldc = n};
  if (finishes)
    args.values = {.bias = bias.data(), .mult = mult.data(), .shift = shift.data(), .c_zp = 3};
  const Result<std::uint64_t> workspace_bytes = int8_mm::workspace_bytes(kernel, args);
  REQUIRE(workspace_bytes.is_ok());
  const test::GuardedBuffer workspace((*workspace_bytes + 63) / 64 * 64, test::Guard::after);
  args.workspace = workspace.as<void>();
  args.workspace_bytes = *workspace_bytes;

  return count(kernel, finishes ? "int8_mm with an epilogue" : "int8_mm", m, n, k, plan.layout.id(),
               [&] { return int8_mm::run(kernel, args); });
}

/// int8_linear, bf16 in and out, with a bias.
Shares count_linear(Engine& engine, const Implementation& row, std::int64_t m, std::int64_t n, std::int64_t k) {
  using int8_linear::Float;
  const Result<KernelRef> got = engine.get(int8_linear::make_desc(m, n, k, Float::bf16, Float::bf16, true));
  REQUIRE_MESSAGE(got.is_ok(), (got ? "" : got.status().message()));
  const Kernel& kernel = **got;
  REQUIRE(kernel.implementation().isa == row.isa);
  const auto& plan = *static_cast<const int8_linear::Plan*>(kernel.plan());
  constexpr std::uint16_t kOne = 0x3F80;
  const std::vector<std::uint16_t> x(static_cast<std::size_t>(m * k), kOne);
  const std::vector<std::int8_t> w(static_cast<std::size_t>(n * k), 1);
  const std::vector<float> ws(static_cast<std::size_t>(n), 1), bias(ws.size(), 1);
  std::vector<std::uint16_t> y(static_cast<std::size_t>(m * n));
  const Result<int8_mm::Pack> pack =
      int8_mm::Pack::make(plan.layout, w.data(), k, int8_mm::BLayout::nk, n, k, engine.runtime().parallel);
  REQUIRE(pack.is_ok());
  int8_linear::Args args = {
      .m = m, .x = x.data(), .ldx = k, .pack = &*pack, .ws = ws.data(), .bias = bias.data(), .y = y.data(), .ldy = n};
  const Result<std::uint64_t> workspace_bytes = int8_linear::workspace_bytes(kernel, args);
  REQUIRE(workspace_bytes.is_ok());
  const test::GuardedBuffer workspace((*workspace_bytes + 63) / 64 * 64, test::Guard::after);
  args.workspace = workspace.as<void>();
  args.workspace_bytes = *workspace_bytes;
  return count(kernel, "int8_linear", m, n, k, plan.layout.id(), [&] { return int8_linear::run(kernel, args); });
}

/// A little above what was counted: registers of four, eight (SVE of 256 bits) and sixteen sums (SME of 512); tiles of
/// eight rows, four with NEON's own products.
double most_for_four_sums(const Implementation& row) {
  return row.isa == IsaPath::sme ? 6 : row.needs.has(Feature::sve) ? 10 : row.isa == IsaPath::neon ? 21 : 18;
}

} // namespace

TEST_CASE("the loop that is judged is the hot one, and little is executed outside") {
  int rows = 0;
  for (const Implementation& row : implementation_table()) {
    if (row.op != OpId::int8_mm || row.compile == nullptr || (!row.any_arch && row.arch != Arch::aarch64))
      continue;
    CAPTURE(std::string(name_of(row.isa)));
    EngineOptions options;
    options.config.cache = CacheMode::off;
    options.config.threads = 1;
    options.config.forced.push_back({OpId::int8_mm, row.isa});
    options.machine = machine_for(row);
    options.implementations = implementation_table();
    Result<std::unique_ptr<Engine>> engine = Engine::create(std::move(options));
    REQUIRE_MESSAGE(engine.is_ok(), (engine ? "" : engine.status().message()));
    for (const std::int64_t m : {1, 4, 16, 32})
      count(**engine, row, int8_mm::make_desc(m, 512, 512)); // for the reader
    const Shares whole = count(**engine, row, int8_mm::make_desc(64, 512, 512)),
                 large = count(**engine, row, int8_mm::make_desc(256, 1024, 1024));
    // What an epilogue adds, its terms in the driver among it, for four sums.
    for (const std::int64_t m : {1, 64}) {
      const Shares plain = count(**engine, row, int8_mm::make_desc(m, 512, 512)),
                   finished = count(**engine, row, with_epilogue(m, 512, 512));
      const double added = static_cast<double>(finished.all) - static_cast<double>(plain.all);
      const double per_vector = added / static_cast<double>(m * 512 / 4);
      fmt::print("{:<9} an epilogue adds {:.1f} % to {}×512×512, {:.2f} instructions for four sums\n", name_of(row.isa),
                 100 * added / static_cast<double>(plain.all), m, per_vector);
      std::fflush(stdout);
      if (row.generator == GeneratorId::asmjit && m == 64)
        CHECK(per_vector <= most_for_four_sums(row));
    }
    if (row.generator != GeneratorId::asmjit) // LLVM's loops are as they are
      continue;
    CHECK(large.hottest >= 0.9);
    CHECK(whole.outside <= (row.isa == IsaPath::sme ? 0.2 : 0.08));
    ++rows;
  }
  CHECK(rows >= 4); // neon, sdot, i8mm, sme at least
}

TEST_CASE("int8_linear: the loop along K is int8_mm's, and what it adds is small") {
  int rows = 0;
  for (const Implementation& row : implementation_table()) {
    if (row.op != OpId::int8_linear || row.generator != GeneratorId::asmjit || row.arch != Arch::aarch64)
      continue;
    CAPTURE(std::string(name_of(row.isa)));
    EngineOptions options;
    options.config.cache = CacheMode::off;
    options.config.threads = 1;
    options.config.forced.push_back({OpId::int8_mm, row.isa});
    options.config.forced.push_back({OpId::int8_linear, row.isa});
    options.machine = machine_for(row);
    options.implementations = implementation_table();
    Result<std::unique_ptr<Engine>> engine = Engine::create(std::move(options));
    REQUIRE_MESSAGE(engine.is_ok(), (engine ? "" : engine.status().message()));
    for (const std::int64_t m : {1, 64}) {
      const Shares plain = count(**engine, row, int8_mm::make_desc(m, 512, 512)),
                   linear = count_linear(**engine, row, m, 512, 512);
      const double added = static_cast<double>(linear.all) - static_cast<double>(plain.all);
      fmt::print("{:<9} int8_linear adds {:.1f} % to {}×512×512\n", name_of(row.isa),
                 100 * added / static_cast<double>(plain.all), m);
      std::fflush(stdout);
    }
    const Shares large = count_linear(**engine, row, 64, 1024, 1024);
    // The products of sme are few beside what NEON does with a row.
    CHECK(large.hottest >= (row.isa == IsaPath::sme ? 0.4 : 0.8));
    ++rows;
  }
  CHECK(rows >= 4);
}
