#include <doctest/doctest.h>

#include <cstring>
#include <random>
#include <thread>
#include <vector>

#include <fmt/format.h>

#if defined(__aarch64__)
#include <sys/prctl.h>
#endif

#include "backends/arm/int8_linear.h"
#include "backends/arm/rows.h"
#include "bench/arm_loops.h"
#include "jit/executable_memory.h"
#include "tests/aarch64_call.h"
#include "tests/guarded_buffer.h"
#include "tests/int8_linear_values.h"
#include "tests/int8_values.h"

/// int8_linear on aarch64, kernel by kernel: what emission promises on any host, the loop along K among it, and on
/// aarch64 the quantiser by itself and kernels with the processor's state on both sides, on a thread of another vector
/// length too. What they compute is for int8_linear_paths_test to say in full.

using namespace kiln;
using namespace kiln::test;
using int8_linear::bytes_of;
using int8_linear::Float;

namespace {

constexpr Float kFloats[] = {Float::bf16, Float::f16, Float::f32};

struct Row {
  Implementation linear, product;
  std::string layout;
  Target target;
  std::int64_t most_rows = kAny; ///< that it serves from this layout
};

std::vector<Row> rows_for(int sve_bits, int sme_bits) {
  Features features{Feature::neon, Feature::dotprod, Feature::i8mm};
  if (sve_bits > 0)
    features.add(Feature::sve);
  if (sme_bits > 0)
    features.add(Feature::sme);
  const Target target{.arch = Arch::aarch64, .features = features, .sve_bits = sve_bits, .sme_bits = sme_bits};
  std::vector<Row> rows = {{arm::int8_linear_i8mm(), arm::int8_mm_i8mm(), "n12k8", target},
                           {arm::int8_linear_sdot(), arm::int8_mm_sdot(), "n12k4", target},
                           {arm::int8_linear_sdot(), arm::int8_mm_sdot(), "n12k8", target, 2},
                           {arm::int8_linear_neon(), arm::int8_mm_neon(), "n12k8", target}};
  if (sve_bits >= 256) {
    const int block = sve_bits / 128 * 12;
    rows.push_back({arm::int8_linear_sve_i8mm(), arm::int8_mm_sve_i8mm(), fmt::format("n{}k8", block), target});
    rows.push_back({arm::int8_linear_sve_sdot(), arm::int8_mm_sve_sdot(), fmt::format("n{}k4", block), target});
    rows.push_back({arm::int8_linear_sve_sdot(), arm::int8_mm_sve_sdot(), fmt::format("n{}k8", block), target, 2});
  }
  if (sme_bits > 0)
    rows.push_back({arm::int8_linear_sme(), arm::int8_mm_sme(), fmt::format("n{}k4", sme_bits / 16), target});
  return rows;
}

KernelDesc canonical(std::int64_t m, std::int64_t n, std::int64_t k, Float x = Float::bf16, Float y = Float::bf16,
                     bool bias = true) {
  return int8_linear::op().canonical(int8_linear::make_desc(m, n, k, x, y, bias));
}

CodeObject compile(const Row& row, const KernelDesc& desc) {
  Result<CodeObject> code = row.linear.compile(desc, row.target, row.layout);
  REQUIRE_MESSAGE(code.is_ok(), (code ? "" : code.status().message()));
  return std::move(*code);
}

} // namespace

// ---------------------------------------------------------------- on any host

TEST_CASE("the same desc gives the same bytes, with the features and the plan of its row") {
  for (const Row& row : rows_for(256, 512))
    for (const std::int64_t m : int8_mm::kMClasses)
      for (const std::int64_t k : {0, 1, 100, 4096})
        for (const Float type : kFloats) {
          if (m > row.most_rows || (m == kAny && row.most_rows != kAny))
            continue;
          INFO(std::string(name_of(row.linear.isa)), " on ", row.layout, " m ", m, " k ", k);
          const KernelDesc desc = canonical(m, 100, k, type, type, m % 2 == 1);
          const CodeObject code = compile(row, desc);
          CHECK(code == compile(row, desc));
          CHECK(code.features == row.linear.features_for(desc, row.target));
          CHECK(row.linear.supports(desc, row.target).is_ok());
          CHECK(row.linear.reads(row.layout, desc, row.target));
          const Result<int8_linear::Plan> plan = int8_linear::Plan::from(code.plan);
          REQUIRE(plan.is_ok());
          CHECK(plan->layout.id() == row.layout);
        }
}

TEST_CASE("rows are those of int8_mm, and refuse what they cannot do") {
  for (const Row& row : rows_for(256, 512)) {
    INFO(std::string(name_of(row.linear.isa)));
    CHECK(row.linear.op == OpId::int8_linear);
    CHECK(row.linear.isa == row.product.isa);
    CHECK(row.linear.pack_layout(canonical(1, 9, 9), row.target) ==
          row.product.pack_layout(canonical(1, 9, 9), row.target));
    const Status too_long = row.linear.supports(canonical(1, 16, std::int64_t{1} << 30), row.target);
    CHECK(too_long.code() == Code::unsupported);
    CHECK(too_long.message().find("k=1073741824") != std::string::npos);
    if (row.linear.reads_layout != nullptr)
      CHECK(row.linear.compile(canonical(33, 16, 16), row.target, "n16k2").status().code() == Code::unsupported);
  }
  const Target short_vectors{.arch = Arch::aarch64, .features = {Feature::neon, Feature::sve}, .sve_bits = 128};
  CHECK(arm::int8_linear_sve_sdot().supports(canonical(1, 16, 16), short_vectors).message().find("256 bits") !=
        std::string::npos);
  CHECK(arm::int8_linear_sme().supports(canonical(1, 16, 16), short_vectors).message().find("streaming") !=
        std::string::npos);
}

TEST_CASE("the loop along K is that of int8_mm, which bench_arm_mca judges") {
  for (const Row& row : rows_for(256, 512))
    for (const std::int64_t m : int8_mm::kMClasses) {
      if (m > row.most_rows || (m == kAny && row.most_rows != kAny))
        continue;
      INFO(std::string(name_of(row.linear.isa)), " on ", row.layout, " m ", m);
      const KernelDesc product = int8_mm::op().canonical(int8_mm::make_desc(m, 1024, 1024));
      const Result<CodeObject> plain = row.product.compile(product, row.target, row.layout);
      REQUIRE(plain.is_ok());
      const auto loops = [](const CodeObject& code) {
        const Result<std::vector<bench::Instruction>> instructions = bench::instructions_of(code);
        REQUIRE_MESSAGE(instructions.is_ok(), (instructions ? "" : instructions.status().message()));
        std::vector<std::string> texts;
        for (const bench::Loop& loop : bench::hot_loops(*instructions)) {
          std::string text;
          for (const bench::Instruction& i : loop.body) // where it branches to is another place
            text += (i.branches_to < 0 ? i.text : std::string(i.mnemonic())) + '\n';
          texts.push_back(text);
        }
        return texts;
      };
      const std::vector<std::string> product_loops = loops(*plain);
      REQUIRE_FALSE(product_loops.empty());
      CHECK(loops(compile(row, canonical(m, 1024, 1024))) == product_loops);
    }
}

// ---------------------------------------------------------------- the quantiser

TEST_CASE("every k and type: the elements and s of the definition, and nothing beyond") {
#if defined(__aarch64__)
  constexpr unsigned kSeed = 5;
  std::mt19937 random(kSeed);
  INFO("seed ", kSeed);
  for (const int copies : {1, 2})
    for (const Float type : kFloats)
      for (std::int64_t k = 0; k <= 150; k += k < 70 ? 1 : 13) {
        const arm::QuantisedRows rows = arm::QuantisedRows::make(type, k, copies, k % 16 / 4 * 4);
        INFO("type ", static_cast<int>(type), ", k ", k, ", copies ", copies);
        arm::Assembler a;
        arm::emit_quantiser(a, rows);
        a.ret(asmjit::a64::x30);
        const Result<CodeObject> code = a.finish({Feature::neon}, 0, {});
        REQUIRE(code.is_ok());
        ExecutableMemory memory;
        const Result<const std::uint8_t*> loaded = memory.load(code->image, code->alignment);
        REQUIRE(loaded.is_ok());
        const auto entry = reinterpret_cast<int8_linear::Entry>(*loaded + code->entries.front().offset);
        for (const XValues values : kAllXValues) {
          const Guard guard = k % 2 == 0 ? Guard::after : Guard::before;
          const std::int64_t m = 2, ldx = k + 5;
          const GuardedBuffer x(static_cast<std::size_t>((ldx + k) * bytes_of(type)), guard);
          const GuardedBuffer workspace(static_cast<std::size_t>((m * rows.row_bytes + 63) / 64 * 64), guard);
          fill_x(type, x.as<void>(), m, k, ldx, values, random);
          int8_linear::Call call{};
          call.product.m = m;
          call.product.workspace = workspace.as<void>();
          call.x = x.as<void>();
          call.ldx = ldx;
          call.steps = int8_linear::kMultiply; // another's business
          entry(&call);
          CHECK(workspace.as<std::uint8_t>()[rows.scale_at()] == 0);
          call.steps = int8_linear::kQuantise;
          entry(&call);
          std::vector<std::int8_t> q(static_cast<std::size_t>(k));
          for (std::int64_t i = 0; i < m; ++i) {
            const std::uint8_t* const row = workspace.as<std::uint8_t>() + i * rows.row_bytes;
            const float expected =
                int8_linear::quantise_row(type, x.as<std::uint8_t>() + i * ldx * bytes_of(type), k, q.data());
            float s;
            std::memcpy(&s, row + rows.scale_at(), sizeof s);
            CHECK(std::bit_cast<std::uint32_t>(s) == std::bit_cast<std::uint32_t>(expected));
            std::int64_t wrong = 0;
            for (std::int64_t p = 0; p < (k + 15) / 16 * 16; ++p)
              for (int copy = 0; copy < copies; ++copy) {
                const std::int64_t at = rows.offset + (copies == 1 ? p : p / 8 * 16 + 8 * copy + p % 8);
                wrong += static_cast<std::int8_t>(row[at]) != (p < k ? q[static_cast<std::size_t>(p)] : 0);
              }
            CHECK(wrong == 0);
          }
        }
        memory.release(*loaded);
      }
#endif
}

// ---------------------------------------------------------------- kernels on this machine
#if defined(__aarch64__)
namespace {

std::uint64_t read_fpcr() {
  std::uint64_t value;
  asm volatile("mrs %0, fpcr" : "=r"(value));
  return value;
}

/// One call that quantises and multiplies, against the definition.
void check_kernel(const Row& row, std::int64_t m, std::int64_t n, std::int64_t k, Float x_type, Float y_type, bool bias,
                  std::mt19937& random) {
  INFO(std::string(name_of(row.linear.isa)), " on ", row.layout, " m ", m, " n ", n, " k ", k);
  const KernelDesc desc = canonical(m, n, k, x_type, y_type, bias);
  const CodeObject code = compile(row, desc);
  const int8_linear::Plan plan = *int8_linear::Plan::from(code.plan);
  const int8_mm::PackLayout layout = plan.layout;
  const auto rounded = [](std::int64_t bytes) { return static_cast<std::size_t>((bytes + 63) / 64 * 64); };
  const GuardedBuffer x(static_cast<std::size_t>(m * k * bytes_of(x_type)), Guard::after),
      y(static_cast<std::size_t>(m * n * bytes_of(y_type)), Guard::after),
      pack(static_cast<std::size_t>(layout.sums_offset(n, k)), Guard::after),
      rows(rounded(m * plan.q_row_bytes + plan.q_end_bytes), Guard::after),
      workspace(rounded(plan.workspace_bytes + m * plan.workspace_per_row), Guard::after);
  const std::int64_t columns = (n + plan.n_step - 1) / plan.n_step * plan.n_step;
  const GuardedBuffer terms(
      static_cast<std::size_t>(layout.panels(columns) * layout.n_block * int8_linear::TermsLayout::count(desc) * 4),
      Guard::after);
  std::memset(workspace.as<void>(), 0xA5, rounded(plan.workspace_bytes + m * plan.workspace_per_row));
  std::vector<std::int8_t> w(static_cast<std::size_t>(n * k));
  std::vector<std::int32_t> sums(static_cast<std::size_t>(layout.panels(n) * layout.n_block));
  std::vector<float> ws(static_cast<std::size_t>(n)), biases(ws.size());
  fill_x(x_type, x.as<void>(), m, k, k, XValues::specials, random);
  fill(w.data(), n * k, Values::random, random);
  fill_floats(ws.data(), n, true, random);
  fill_floats(biases.data(), n, true, random);
  int8_mm::pack_panels(layout, w.data(), k, int8_mm::BLayout::nk, n, k, 0, layout.panels(n), pack.as<std::int8_t>(),
                       sums.data());
  int8_linear::make_terms(desc, layout, plan.q_shift, sums.data(), ws.data(), bias ? biases.data() : nullptr, n,
                          terms.as<std::int32_t>());
  std::vector<std::uint8_t> expected(static_cast<std::size_t>(m * n * bytes_of(y_type)));
  int8_linear::reference(desc, m, x.as<void>(), k, w.data(), k, ws.data(), bias ? biases.data() : nullptr,
                         expected.data(), n);

  int8_linear::Call call{};
  call.product.b = pack.as<std::int8_t>();
  call.product.b_sums = sums.data();
  call.product.c = y.as<void>();
  call.product.ldc = n;
  call.product.m = m;
  call.product.n = n;
  call.product.workspace = rows.as<void>();
  call.product.terms = terms.as<std::int32_t>();
  call.x = x.as<void>();
  call.ldx = k;
  call.ws = ws.data();
  call.bias = bias ? biases.data() : nullptr;
  call.steps = int8_linear::kQuantise | int8_linear::kMultiply;
  call.workspace = workspace.as<void>();
  ExecutableMemory memory;
  const Result<const std::uint8_t*> loaded = memory.load(code.image, code.alignment);
  REQUIRE(loaded.is_ok());
  call_and_check_registers(reinterpret_cast<int8_mm::Entry>(*loaded + code.entries.front().offset), call.product);
  CHECK(read_fpcr() == 0); // as a call finds it
  memory.release(*loaded);
  CHECK(std::memcmp(y.as<void>(), expected.data(), expected.size()) == 0);
}

/// Those of the machine's vector lengths, whose products it computes rightly: qemu 7.2 does not those of sme.
std::vector<Row> rows_here(bool sme) {
  const Target machine = detect_machine().target;
  std::vector<Row> rows;
  for (const Row& row : rows_for(machine.sve_bits, machine.sme_bits))
    if (machine.features.contains(row.linear.needs) && (row.linear.isa != IsaPath::sme || sme))
      rows.push_back(row);
  return rows;
}

void check_rows(const std::vector<Row>& rows) {
  constexpr unsigned kSeed = 6;
  INFO("seed ", kSeed);
  std::mt19937 random(kSeed);
  int turn = 0;
  for (const Row& row : rows)
    for (const std::int64_t m : {1, 2, 3, 7, 13, 35})
      for (const std::int64_t k : {0, 5, 70}) {
        if (m > row.most_rows && row.most_rows != kAny)
          continue;
        const std::int64_t block = int8_mm::PackLayout::parse(row.layout)->n_block;
        ++turn;
        check_kernel(row, m, turn % 3 == 0 ? 1 : block + 7, k, kFloats[turn % 3], kFloats[turn / 3 % 3], turn % 2 == 0,
                     random);
      }
}

} // namespace

TEST_CASE("kernels give their caller's registers and control state back") {
  check_rows(rows_here(false));
}

TEST_CASE("on a thread that was given another vector length results are the same, without vectors") {
  const Target machine = detect_machine().target;
  if (machine.sve_bits < 256 && machine.sme_bits <= 128) {
    MESSAGE("nothing is run here: the machine has one vector length");
    return;
  }
  std::vector<Row> rows;
  for (const Row& row : rows_here(machine.sme_bits > 128)) // of the lengths that this thread has
    if (row.linear.vector_bits != nullptr)
      rows.push_back(row);
  // A thread of its own, whose lengths end with it. include/uapi/linux/prctl.h: PR_SVE_SET_VL, PR_SME_SET_VL.
  std::thread([&] {
    constexpr int kSetSve = 50, kSetSme = 63, kLengthMask = 0xffff;
    if (machine.sve_bits >= 256)
      CHECK((prctl(kSetSve, 16) & kLengthMask) == 16);
    if (machine.sme_bits > 128)
      CHECK((prctl(kSetSme, 16) & kLengthMask) == 16);
    check_rows(rows);
  }).join();
}
#endif
