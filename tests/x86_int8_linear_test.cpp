#include <doctest/doctest.h>

#include <cstring>
#include <vector>

#include <fmt/format.h>

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
    {"512 s8", x86::emit_quantiser_512, QuantisedRows::Form::s8, {Feature::avx512f, Feature::avx512bw}},
    {"512 u8", x86::emit_quantiser_512, QuantisedRows::Form::u8, {Feature::avx512f, Feature::avx512bw}},
    {"256 u8", x86::emit_quantiser_256, QuantisedRows::Form::u8, {Feature::avx2, Feature::f16c}},
    {"256 s16", x86::emit_quantiser_256, QuantisedRows::Form::s16, {Feature::avx2, Feature::f16c}},
};

/// As many as a tile that ends with the panel's last 16 rows wants in front of K's last elements.
int tail_zeros_for(QuantisedRows::Form form, std::int64_t k) {
  return form == QuantisedRows::Form::s8 && k > 64 ? static_cast<int>((64 - (k + 3) / 4 * 4 % 64) % 64) : 0;
}

int element(const QuantisedRows& rows, const std::uint8_t* row, std::int64_t i) {
  if (rows.form == QuantisedRows::Form::u8)
    return row[i] - 128;
  if (rows.form == QuantisedRows::Form::s8)
    return static_cast<std::int8_t>(row[i + (i >= rows.k / 64 * 64 ? rows.tail_zeros : 0)]);
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
        const std::int64_t element_bytes = quantiser.form == QuantisedRows::Form::s16 ? 2 : 1;
        const QuantisedRows rows{.form = quantiser.form,
                                 .x = type,
                                 .k = k,
                                 .row_stride = x86::workspace_row_stride(element_bytes * k),
                                 .tail_zeros = tail_zeros_for(quantiser.form, k)};
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
                wrong += element(rows, row, p) != q[static_cast<std::size_t>(p)];
              if (rows.form == QuantisedRows::Form::s8) // and nothing but zeros beside the last of them
                for (std::int64_t line = k / 64 * 64, p = line; k % 64 != 0 && p < line + 64; ++p)
                  wrong += (p < line + rows.tail_zeros || p >= k + rows.tail_zeros) && row[p] != 0;
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
       {x86::int8_linear_amx(), x86::int8_linear_avx512vnni(), x86::int8_linear_avxvnni(), x86::int8_linear_avx2()}) {
    const Result<CodeObject> one = row.compile(desc, Target{}, "n16k4"), two = row.compile(desc, Target{}, "n16k4");
    REQUIRE(one.is_ok());
    CHECK(one->image == two->image);
    CHECK(row.features_for(desc, Target{}).contains(one->features));
    CHECK(int8_linear::Plan::from(one->plan).is_ok());
    KernelDesc large = desc;
    const std::int64_t most = std::int64_t{1} << (row.isa == IsaPath::amx ? 24 : 26);
    large.value[int8_linear::kK] = most + 1;
    CHECK(row.supports(large, Target{}).message() == fmt::format("k={}: allowed is at most {}", most + 1, most));
  }
}
