#define DOCTEST_CONFIG_IMPLEMENT_WITH_MAIN
#include <doctest/doctest.h>

#include <algorithm>
#include <string>
#include <vector>

#include "backends/nvidia/int4_mm.h"
#include "backends/nvidia/int8_mm.h"
#include "backends/nvidia/rows.h"
#include "jit/ops/int4_mm.h"
#include "jit/ops/int8_mm.h"

/// Which configurations of int4_mm and int8_mm on Hopper are chosen and offered for timing.

using namespace kiln;
using namespace kiln::nvidia;

namespace {

constexpr Target kHopper = {.arch = Arch::nvptx, .sm = 90};

bool contains(const std::string& text, std::string_view part) {
  return text.find(part) != std::string::npos;
}

/// What each configuration of a row must be, whatever the op: printed once, made again from its text, within the GPU's
/// limits, the first that of compile().
void check_row(const Implementation& row, const KernelDesc& desc, std::string_view layout) {
  CAPTURE(desc.text());
  REQUIRE(row.supports(desc, kHopper));
  const std::vector<std::string> texts = row.configurations(desc, kHopper);
  REQUIRE(!texts.empty());
  CHECK(texts.size() <= 24);
  const Result<CodeObject> chosen = row.compile(desc, kHopper, layout);
  REQUIRE_MESSAGE(chosen.is_ok(), (chosen ? "" : chosen.status().message()));
  CHECK(chosen->configuration == texts.front());
  for (const std::string& text : texts) {
    CAPTURE(text);
    CHECK(std::count(texts.begin(), texts.end(), text) == 1);
    CHECK(text.size() <= 64);
    CHECK(text.find_first_not_of("abcdefghijklmnopqrstuvwxyz0123456789") == std::string::npos);
    const Result<CodeObject> made = row.compile_configured(desc, kHopper, layout, text);
    REQUIRE_MESSAGE(made.is_ok(), (made ? "" : made.status().message()));
    CHECK(made->configuration == text);
    if (text == texts.front())
      CHECK(made->image == chosen->image);
    const Result<cuda::LaunchPlan> launch = cuda::LaunchPlan::from(made->plan);
    REQUIRE(launch.is_ok());
    CHECK(launch->smem_bytes <= 227 * 1024);
    CHECK(launch->threads <= 1024);
    CHECK(launch->cluster_x <= 8);
  }
  for (const char* text : {"", "y2v1n128s9k1g8q", "nothing", "y9v9n256s2k1g8"}) {
    const Result<CodeObject> refused = row.compile_configured(desc, kHopper, layout, text);
    CHECK(refused.status().code() == Code::invalid_argument);
  }
}

} // namespace

TEST_CASE("int4_mm: every class of m, all groups: what is offered is printed, unique, and made") {
  const Implementation row = int4_mm_wgmma();
  for (const auto& [n, k, group] : {std::tuple{8192, 8192, 128},
                                    {1280, 5120, 128},
                                    {264, 384, 128},
                                    {8, 32, 32},
                                    {1032, 544, 32},
                                    {14336, 4096, 256}})
    for (const std::int64_t m : {std::int64_t{32}, std::int64_t{64}, std::int64_t{128}, std::int64_t{256}, kAny}) {
      KernelDesc desc = int4_mm::op().canonical(int4_mm::make_desc(m, n, k, group));
      desc.device = {DeviceKind::cuda, 0};
      check_row(row, desc, row.pack_layout(desc, kHopper));
    }
}

TEST_CASE("int8_mm: every class of m and each output") {
  const Implementation row = int8_mm_wgmma();
  for (const auto& [n, k] : {std::pair{8192, 8192}, {33, 70}, {4096, 16}, {1, 1}})
    for (const std::int64_t m : int8_mm::kGpuMClasses)
      for (const int8_mm::CDtype output : {int8_mm::CDtype::s32, int8_mm::CDtype::s8, int8_mm::CDtype::bf16}) {
        if (output != int8_mm::CDtype::s32 && n != 33)
          continue;
        KernelDesc desc = int8_mm::make_desc(m, n, k);
        desc.device = {DeviceKind::cuda, 0};
        desc.value[int8_mm::kCDtype] = static_cast<std::int64_t>(output);
        if (output != int8_mm::CDtype::s32)
          desc.value[int8_mm::kRescale] = static_cast<std::int64_t>(int8_mm::Rescale::scale);
        check_row(row, int8_mm::op().canonical(desc), row.pack_layout(desc, kHopper));
      }
}

TEST_CASE("int8_mm without K has no maps: another path serves it") {
  KernelDesc desc = int8_mm::make_desc(3, 64, 0);
  desc.device = {DeviceKind::cuda, 0};
  const Status status = int8_mm_wgmma().supports(int8_mm::op().canonical(desc), kHopper);
  CHECK(status.code() == Code::unsupported);
  CHECK(contains(status.message(), "k=0"));
  CHECK(int8_mm_mma_sync().supports(int8_mm::op().canonical(desc), kHopper));
}

TEST_CASE("a call of any m compiles eight kernels at most for one (N, K)") {
  CHECK(std::size(int4_mm::kMClasses) <= 8);
  CHECK(std::size(int8_mm::kGpuMClasses) <= 8);
}

TEST_CASE("the chosen fill the GPU where the shape allows it") {
  const auto blocks = [](const cuda::LaunchPlan& l, std::int64_t m, std::int64_t n) {
    return (n + l.tile_n - 1) / l.tile_n * ((m + l.tile_m - 1) / l.tile_m) * l.split_k;
  };
  const auto int4_blocks = [&](std::int64_t m_class, std::int64_t m, std::int64_t n, std::int64_t k) {
    const int4::Shape shape{n, k, 128};
    const Result<int4::Emitted> made = int4::emit_tma({90, true}, shape, int4::candidates(shape, m_class, 1).front());
    REQUIRE(made);
    return blocks(made->launch, m, n);
  };
  const auto int8_blocks = [&](std::int64_t m_class, std::int64_t m, std::int64_t n, std::int64_t k) {
    const int8::Shape shape{.n = n, .k = k};
    const Result<int8::Emitted> made = int8::emit_tma({90, true}, shape, int8::candidates(shape, m_class).front());
    REQUIRE(made);
    return blocks(made->launch, m, n);
  };
  CHECK(int4_blocks(128, 128, 8192, 8192) >= 120);
  CHECK(int4_blocks(256, 256, 8192, 8192) >= 120);
  CHECK(int4_blocks(kAny, 1024, 8192, 8192) >= 120);
  CHECK(int8_blocks(16, 1, 4096, 4096) >= 120);
  CHECK(int8_blocks(64, 64, 8192, 8192) >= 120);
  CHECK(int8_blocks(128, 100, 4096, 4096) >= 100);
}

TEST_CASE("configurations that no kernel is made of are refused with the reason") {
  const int4::Shape four{4096, 4096, 128};
  const int8::Shape eight{.n = 4096, .k = 4096};
  const auto why4 = [&](const char* text, std::int64_t m_class = kAny, int operands = 1) {
    const Status status = int4::check(four, m_class, {*PersistentConfig::parse(text), operands});
    CHECK(status.code() == Code::invalid_argument);
    return status.message();
  };
  const auto why8 = [&](const char* text, std::int64_t m_class = kAny) {
    const Status status = int8::check(eight, m_class, {*PersistentConfig::parse(text)});
    CHECK(status.code() == Code::invalid_argument);
    return status.message();
  };
  CHECK(int4::check(four, kAny, {*PersistentConfig::parse("y2v1n128s9k1g8c"), 1}));
  CHECK(contains(why4("x2v1n128s4k1g8"), "weights are the 64-row operand"));
  CHECK(contains(why4("y2v1n128s4k1g8r"), "not shared"));
  CHECK(contains(why4("y1v4n64s4k1g8"), "two waves"));
  CHECK(contains(why4("y2v1n256s4k1g8"), "registers"));
  CHECK(contains(why4("y2v1n128s4k1g8", kAny, 3), "registers"));
  CHECK(contains(why4("y2v1n128s4k1g8", kAny, 4), "out of its range"));
  CHECK(contains(why4("y2v1n132s4k1g8"), "out of its range"));
  CHECK(contains(why4("y2v1n128s2k1g8"), "fewer than three stages"));
  CHECK(contains(why4("y2v1n128s12k1g8"), "shared memory"));
  CHECK(contains(why4("y2v1n128s4k1g0", 256), "a tile has 128 rows"));
  CHECK(int8::check(eight, 64, {*PersistentConfig::parse("y1v1n64s14k1g0")}));
  CHECK(contains(why8("x2v1n40s4k1g8"), "out of its range")); // no wgmma on s8 has 40 columns
  CHECK(contains(why8("x2v2n256s4k1g8"), "shared memory"));
  CHECK(contains(why8("x2v2n192s2k1g8"), "registers"));
  CHECK(contains(why8("x2v1n64s4k2g8c"), "K is not to be split"));
  CHECK(contains(why8("y1v1n8s4k1g0c", 8), "multiple of eight"));
  CHECK(contains(int8::check({.n = 8, .k = 0}, kAny, {*PersistentConfig::parse("x2v1n64s4k1g8")}).message(), "K is 0"));
}
