#define DOCTEST_CONFIG_IMPLEMENT_WITH_MAIN
#include <doctest/doctest.h>

#include <chrono>
#include <span>
#include <string>
#include <vector>

#include "backends/nvidia/fp8_block_bmm.h"
#include "backends/nvidia/int4_mm.h"
#include "backends/nvidia/int8_mm.h"
#include "backends/nvidia/ptx.h"

using namespace kiln;
using namespace kiln::nvidia;
using namespace kiln::nvidia::ptx;

namespace {

constexpr Sm kSm80{80, false}, kSm90{90, false}, kSm90a{90, true};

/// The message of the first operand that was refused; empty when none was.
template <class Body> std::string refusal(Sm sm, Body body) {
  Writer w(sm, "main", 128);
  body(w);
  const Result<std::string> text = w.finish();
  return text ? "" : text.status().message();
}

Result<std::string> fp8_text(const fp8::Shape& shape, const fp8::Config& config) {
  const Result<fp8::Emitted> made = fp8::emit(kSm90a, shape, config);
  return made ? Result<std::string>(made->text) : made.status();
}

bool contains(const std::string& text, std::string_view part) {
  return text.find(part) != std::string::npos;
}

} // namespace

TEST_CASE("a whole kernel reads as it was written") {
  Writer w(kSm80, "add", 64);
  const B64 x = w.parameter_b64("x");
  const B32 n = w.parameter_b32("n");
  w.comment("one element a thread");
  const B32 i = w.thread();
  w.if_(w.compare_u32(Compare::lt, i, n), [&] {
    const B64 at = w.mad_wide(i, 4, x);
    const std::array<F32, 1> v = w.make<F32, 1>();
    w.load_global(std::span<const F32>(v), {at, 8});
    const F32 sum = w.add(v[0], 1.5f);
    w.store_global({at}, std::span<const F32>(&sum, 1));
  });
  const Result<std::string> text = w.finish();
  REQUIRE(text);
  CHECK(*text == R"(.version 7.0
.target sm_80
.address_size 64

.visible .entry add(
  .param .u64 x,
  .param .u32 n
)
.reqntid 64, 1, 1
.minnctapersm 1
{
  .reg .pred %p<1>;
  .reg .b32 %r<2>;
  .reg .b64 %d<2>;
  .reg .f32 %f<2>;

  ld.param.u64 %d0, [x];
  ld.param.u32 %r0, [n];
  // one element a thread
  mov.u32 %r1, %tid.x;
  setp.lt.u32 %p0, %r1, %r0;
  @!%p0 bra $L0;
  mad.wide.u32 %d1, %r1, 4, %d0;
  ld.global.f32 %f0, [%d1 + 8];
  add.rn.f32 %f1, %f0, 0f3FC00000;
  st.global.f32 [%d1], %f1;
$L0:
  exit;
}
)");
}

TEST_CASE("the version is the lowest that the instructions need") {
  const auto version = [](Sm sm, auto body) {
    Writer w(sm, "main", 32);
    body(w);
    const Result<std::string> text = w.finish();
    REQUIRE(text);
    return text->substr(0, text->find('\n'));
  };
  const auto nothing = [](Writer&) {};
  CHECK(version(kSm80, nothing) == ".version 7.0");
  CHECK(version({86, false}, nothing) == ".version 7.1");
  CHECK(version({89, false}, nothing) == ".version 7.8");
  CHECK(version(kSm90, nothing) == ".version 7.8");
  CHECK(version(kSm90a, nothing) == ".version 8.0");
  CHECK(version({120, true}, nothing) == ".version 8.7");
  CHECK(version(kSm80, [](Writer& w) { w.evict_first_policy(); }) == ".version 7.4");
  CHECK(version(kSm90, [](Writer& w) { w.barrier_cluster_arrive(); }) == ".version 8.0");
}

TEST_CASE("an instruction that the target lacks is refused by name") {
  CHECK(contains(refusal(kSm80, [](Writer& w) { w.rank_in_cluster(); }),
                 "cluster_ctarank needs sm_90, the target is sm_80"));
  CHECK(contains(refusal(kSm90, [](Writer& w) { w.wgmma_fence(); }), "wgmma.fence needs sm_90a, the target is sm_90"));
  CHECK(contains(refusal({100, true}, [](Writer& w) { w.wgmma_commit(); }), "needs sm_90a, the target is sm_100a"));
  CHECK(contains(refusal({75, false}, [](Writer&) {}), "sm_75: the least is sm_80"));
  CHECK(refusal(kSm90a, [](Writer& w) { w.wgmma_fence(); }) == "");
}

TEST_CASE("operands are checked") {
  struct Case {
    const char* message;
    void (*body)(Writer&);
  };
  const Case cases[] = {
      {"shl by 32", [](Writer& w) { w.shl(w.b32(), 32); }},
      {"lop3 table 256", [](Writer& w) { w.lop3(w.b32(), 0, 0, 256); }},
      {"no register yet", [](Writer& w) { w.add(B32{}, 1); }},
      {"of 3 registers",
       [](Writer& w) { w.load_shared(std::span<const B32>(w.make<B32, 3>()), SharedAddress{w.b32()}); }},
      {"not aligned to 16",
       [](Writer& w) {
         w.load_global(std::span<const B32>(w.make<B32, 4>()), {w.b64(), 8});
       }},
      {"multiples of 16",
       [](Writer& w) {
         w.cp_async({w.b32(), 4}, {w.b64()});
       }},
      {"cp.async of 8 bytes", [](Writer& w) { w.cp_async({w.b32()}, {w.b64()}, 8); }},
      {"barrier 16", [](Writer& w) { w.barrier(16, 32); }},
      {"of 160 threads", [](Writer& w) { w.barrier(1, 160); }},
      {"barrier 2 of 48 threads", [](Writer& w) { w.barrier_arrive(2, 48); }},
      {"ldmatrix of 3", [](Writer& w) { w.ldmatrix(w.make<B32, 3>(), {w.b32()}); }},
      {"m64n12k16",
       [](Writer& w) {
         const auto d = w.make<F32, 6>();
         w.wgmma_bf16(d, w.make<B32, 4>(), w.b64(), 12, w.pred());
       }},
      {"m64n16k16 with 4 accumulators",
       [](Writer& w) {
         const auto d = w.make<F32, 4>();
         w.wgmma_bf16(d, w.make<B32, 4>(), w.b64(), 16, w.pred());
       }},
      {"m64n40k32",
       [](Writer& w) {
         const auto d = w.make<B32, 20>();
         w.wgmma_s8(d, w.b64(), w.b64(), 40, w.pred());
       }},
      {"setmaxnreg 100", [](Writer& w) { w.setmaxnreg(true, 100); }},
      {"not a multiple of 128",
       [](Writer& w) {
         w.copy_tensor_2d({w.b32(), 64}, w.b64(), 0, 0, {w.b32()});
       }},
      {"m64n12k32 with 6 accumulators",
       [](Writer& w) {
         const auto d = w.make<F32, 6>();
         w.wgmma_fp8(d, w.b64(), w.b64(), 12, w.always(false), true, false);
       }},
      {"shared offset 64 is not a multiple of 128",
       [](Writer& w) {
         w.store_tensor_3d(w.b64(), 0, 0, 0, {w.b32(), 64});
       }},
      {"to blocks 0x100", [](Writer& w) { w.copy_tensor_3d({w.b32()}, w.b64(), 0, 0, 0, {w.b32()}, 256); }},
      {"stmatrix of 3", [](Writer& w) { w.stmatrix({w.b32()}, w.make<B32, 3>()); }},
      {"st.async: offset 8",
       [](Writer& w) {
         w.store_async({w.b32(), 8}, w.make<F32, 4>(), {w.b32()});
       }},
      {"st.async: offset 4",
       [](Writer& w) {
         w.store_async({w.b32(), 4}, w.make<B32, 4>(), {w.b32()});
       }},
      {"multiples of 4",
       [](Writer& w) {
         w.cp_async_word({w.b32(), 2}, {w.b64()}, w.b32());
       }},
      {"shfl.bfly by 32", [](Writer& w) { w.shuffle_xor(w.b32(), 32); }},
      {"declared once",
       [](Writer& w) {
         w.shared_memory();
         w.shared_memory();
       }},
      {"not printable ASCII", [](Writer& w) { w.comment("a\nb"); }},
  };
  for (const Case& c : cases) {
    CAPTURE(c.message);
    const std::string message = refusal(kSm90a, c.body);
    CHECK(contains(message, c.message));
  }
  CHECK(contains(Writer(kSm80, "main", 100).finish().status().message(), "100 threads"));
  CHECK(contains(Writer(kSm90, "main", 128, 9).finish().status().message(), "9 blocks per cluster"));
}

TEST_CASE("kernels: the same text each time, within a millisecond, and refused where the configuration does not suit") {
  struct Kernel {
    const char* name;
    Result<std::string> (*emit)();
  };
  const Kernel kernels[] = {
      {"int4 skinny",
       [] {
         return int4::emit_skinny(kSm80, {8192, 8192, 128}, {});
       }},
      {"int4 skinny, cluster",
       [] {
         return int4::emit_skinny(kSm90a, {4096, 14336, 32},
                                  {.token_tiles = 2, .row_tiles = 2, .warps = 8, .cluster = 4});
       }},
      {"int4 tile",
       [] {
         return int4::emit_tile(kSm80, {8192, 8192, 128}, {});
       }},
      {"int4 tile, wgmma",
       [] {
         return int4::emit_tile(
             kSm90a, {8192, 8192, 128},
             {.row_tiles = 1, .token_tiles = 32, .warps_n = 8, .warps_m = 1, .cluster = 2, .stages = 5, .wgmma = true});
       }},
      {"int4 grouped",
       [] {
         return int4::emit_grouped(kSm90a, {8192, 8192, 128},
                                   {.token_tiles = 8, .warps_n = 8, .warps_k = 2, .cluster = 2, .stages = 8});
       }},
      {"int8 tile",
       [] {
         return int8::emit_tile(kSm80, {4096, 4096}, {});
       }},
      {"int8 tile, wgmma",
       [] {
         return int8::emit_tile(kSm90a, {4096, 4096},
                                {.column_tiles = 1, .row_tiles = 32, .warps_n = 8, .warps_m = 1, .wgmma = true});
       }},
      {"int4 through a tensor map",
       [] {
         const Result<int4::Emitted> made = int4::emit_tma(
             kSm90a, {8192, 8192, 128}, {{.swapped = true, .waves = 1, .stages = 9, .share = nvidia::Share::columns}});
         return made ? Result<std::string>(made->text) : Result<std::string>(made.status());
       }},
      {"int8 through tensor maps",
       [] {
         const Result<int8::Emitted> made = int8::emit_tma(
             kSm90a, {.n = 4096, .k = 4096}, {{.waves = 1, .columns = 256, .share = nvidia::Share::columns}});
         return made ? Result<std::string>(made->text) : Result<std::string>(made.status());
       }},
      {"fp8 tile",
       [] { return fp8_text({.n = 4096, .k = 7168}, {{.waves = 1, .stages = 5, .share = nvidia::Share::rows}}); }},
      {"fp8 tile, few rows of X",
       [] {
         return fp8_text({.n = 4096, .k = 7168},
                         {{.swapped = true, .warpgroups = 1, .waves = 1, .columns = 8, .stages = 24, .split = 2}});
       }},
  };
  for (const Kernel& kernel : kernels) {
    CAPTURE(kernel.name);
    const Result<std::string> first = kernel.emit();
    REQUIRE(first);
    double best = 1e9; // of several: other work on the machine is not the writer's
    for (int i = 0; i < 20; ++i) {
      const auto begin = std::chrono::steady_clock::now();
      const Result<std::string> again = kernel.emit();
      best =
          std::min(best, std::chrono::duration<double, std::milli>(std::chrono::steady_clock::now() - begin).count());
      REQUIRE(again);
      CHECK(*again == *first);
    }
#ifdef NDEBUG // a sanitizer's or an emulator's time says nothing
    if (std::getenv("TEST_EMULATOR") == nullptr)
      CHECK(best <= 1.0);
#endif
    for (const char c : *first)
      if (c != '\n' && (c < ' ' || c > '~')) {
        FAIL("not printable ASCII: " << static_cast<int>(c));
        break;
      }
  }
  CHECK_FALSE(int4::emit_skinny(kSm80, {8, 256, 256}, {.row_tiles = 2}));   // one row tile there is
  CHECK_FALSE(int4::emit_skinny(kSm80, {8192, 8192, 128}, {.cluster = 2})); // no clusters before sm_90
  CHECK_FALSE(int4::emit_tile(kSm90, {8192, 8192, 128}, {.row_tiles = 1, .warps_n = 4, .warps_m = 1, .wgmma = true}));
  CHECK_FALSE(int4::emit_tile(kSm80, {8192, 8192, 128}, {.stages = 1}));
  CHECK_FALSE(int4::emit_grouped(kSm90, {8192, 8192, 128}, {})); // wgmma is sm_90a's
  CHECK_FALSE(
      int4::emit_grouped(kSm90a, {8192, 8192, 128}, {.warps_n = 8, .warps_k = 2, .stages = 7})); // phases would alias
  CHECK_FALSE(int8::emit_tile(kSm80, {.n = 64, .k = 64, .output = int8::Output::s8}, {}));       // needs the scale
  CHECK_FALSE(fp8::emit(kSm90, {.n = 4096, .k = 7168}, {}));                                     // wgmma is sm_90a's
}
