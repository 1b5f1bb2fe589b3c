#define DOCTEST_CONFIG_IMPLEMENT_WITH_MAIN
#include <doctest/doctest.h>

#include <cstring>
#include <vector>

#include "backends/x86/int8_linear.h"
#include "backends/x86/rows.h"
#include "jit/executable_memory.h"
#include "tests/guarded_buffer.h"
#include "tests/int8_linear_values.h"

/// The quantisers of the x86 paths by themselves, in every form that some path reads: also those of paths that this
/// machine does not have.

using namespace kiln;
using namespace kiln::test;
using int8_linear::bytes_of;
using int8_linear::Float;
using x86::QuantisedRows;

namespace {

struct Quantiser {
  const char* name;
  void (*emit)(x86::Assembler&, const QuantisedRows&);
  QuantisedRows::Form form;
  Features needs;
};
const Quantiser kQuantisers[] = {
    {"512 u8", x86::emit_quantiser_512, QuantisedRows::Form::u8, {Feature::avx512f, Feature::avx512bw}},
    {"256 u8", x86::emit_quantiser_256, QuantisedRows::Form::u8, {Feature::avx2, Feature::f16c}},
    {"256 s16", x86::emit_quantiser_256, QuantisedRows::Form::s16, {Feature::avx2, Feature::f16c}},
};

int element(QuantisedRows::Form form, const std::uint8_t* row, std::int64_t i) {
  if (form == QuantisedRows::Form::u8)
    return row[i] - 128;
  std::int16_t value;
  std::memcpy(&value, row + 2 * i, sizeof value);
  return value;
}

} // namespace

TEST_CASE("every k, type and form: the elements and s of the definition, and nothing beyond") {
#if defined(__x86_64__)
  const Features have = detect_machine().target.features;
#else
  const Features have;
#endif
  std::mt19937 random(5);
  for (const Quantiser& quantiser : kQuantisers)
    for (const Float type : {Float::bf16, Float::f16, Float::f32})
      for (std::int64_t k = 0; k <= 200; k += k < 70 ? 1 : 13) {
        const std::int64_t element_bytes = quantiser.form == QuantisedRows::Form::u8 ? 1 : 2;
        const QuantisedRows rows{
            .form = quantiser.form, .x = type, .k = k, .row_stride = x86::workspace_row_stride(element_bytes * k)};
        const auto compile = [&] {
          x86::Assembler a;
          quantiser.emit(a, rows);
          a.ret();
          return a.finish(quantiser.needs, {});
        };
        const Result<CodeObject> code = compile();
        REQUIRE(code.is_ok());
        CHECK(code->image == compile()->image);
        if (!have.contains(quantiser.needs))
          continue;
        INFO(quantiser.name, ", type ", static_cast<int>(type), ", k ", k);
        ExecutableMemory memory;
        const Result<const std::uint8_t*> loaded = memory.load(code->image, code->alignment);
        REQUIRE(loaded.is_ok());
        const auto entry = reinterpret_cast<int8_linear::Entry>(*loaded + code->entries.front().offset);
        for (const XValues values : kAllXValues)
          for (const Guard guard : {Guard::after, Guard::before}) {
            const std::int64_t m = 3, ldx = k + 5;
            const GuardedBuffer x(static_cast<std::size_t>(((m - 1) * ldx + k) * bytes_of(type)), guard);
            const GuardedBuffer workspace(static_cast<std::size_t>((m * rows.row_stride + 63) / 64 * 64), guard);
            fill_x(type, x.as<void>(), m, k, ldx, values, random);
            int8_linear::Call call{};
            call.product.m = m;
            call.product.workspace = workspace.as<void>();
            call.x = x.as<void>();
            call.ldx = ldx;
            call.steps = int8_linear::kMultiply; // another's business
            entry(&call);
            CHECK(workspace.as<std::uint8_t>()[rows.row_stride - 4] == 0);
            call.steps = int8_linear::kQuantise;
            entry(&call);
            std::vector<std::int8_t> q(static_cast<std::size_t>(k));
            for (std::int64_t i = 0; i < m; ++i) {
              const std::uint8_t* const row = workspace.as<std::uint8_t>() + i * rows.row_stride;
              const float expected =
                  int8_linear::quantise_row(type, x.as<std::uint8_t>() + i * ldx * bytes_of(type), k, q.data());
              float s;
              std::memcpy(&s, row + rows.row_stride - 4, sizeof s);
              CHECK(std::bit_cast<std::uint32_t>(s) == std::bit_cast<std::uint32_t>(expected));
              std::int64_t wrong = 0;
              for (std::int64_t p = 0; p < k && !std::isnan(expected); ++p)
                wrong += element(quantiser.form, row, p) != q[static_cast<std::size_t>(p)];
              CHECK(wrong == 0);
            }
          }
        memory.release(*loaded);
      }
}

TEST_CASE("a kernel is the same bytes each time, on any machine") {
  const KernelDesc desc =
      int8_linear::op().canonical(int8_linear::make_desc(5, 100, 70, Float::f16, Float::bf16, true));
  for (const Implementation& row :
       {x86::int8_linear_avx512vnni(), x86::int8_linear_avxvnni(), x86::int8_linear_avx2()}) {
    const Result<CodeObject> one = row.compile(desc, Target{}, "n16k4"), two = row.compile(desc, Target{}, "n16k4");
    REQUIRE(one.is_ok());
    CHECK(one->image == two->image);
    CHECK(row.features_for(desc, Target{}).contains(one->features));
    CHECK(int8_linear::Plan::from(one->plan).is_ok());
    KernelDesc large = desc;
    large.value[int8_linear::kK] = (std::int64_t{1} << 26) + 1;
    CHECK(row.supports(large, Target{}).message() == "k=67108865: allowed is at most 67108864");
  }
}
