#pragma once
#include <doctest/doctest.h>

#include <algorithm>
#include <cstring>
#include <random>
#include <vector>

#include "jit/code_object.h"
#include "jit/executable_memory.h"
#include "jit/ops/int8_mm_epilogue.h"
#include "tests/guarded_buffer.h"
#include "tests/int8_values.h"

namespace kiln::test {

struct KernelCase {
  std::int64_t m, n, k;
  std::int64_t n_cut; ///< columns of one call
  Values values;
  Guard guard;
};

/// One compiled kernel against the reference, called as its plan says and without the driver: every buffer guarded, the
/// workspace filled with garbage, nothing written between the rows of C. `enter` calls the entry: a test may look at
/// the processor's state on both sides.
inline void check_int8_mm_kernel(
    const CodeObject& code, const KernelCase& c, std::mt19937& random,
    void (*enter)(int8_mm::Entry, const int8_mm::Call&) = [](int8_mm::Entry entry, const int8_mm::Call& call) {
      entry(&call);
    }) {
  CAPTURE(c.m);
  CAPTURE(c.n);
  CAPTURE(c.k);
  CAPTURE(c.n_cut);
  INFO("values ", std::string(name_of(c.values)), ", guard ", c.guard == Guard::after ? "after" : "before");
  const Result<int8_mm::Plan> plan = int8_mm::Plan::from(code.plan);
  REQUIRE(plan.is_ok());
  const int8_mm::PackLayout layout = plan->layout;
  const std::int64_t lda = c.k + 3, ldc = c.n + 5;
  const std::int64_t a_size = c.k == 0 ? 0 : (c.m - 1) * lda + c.k, c_size = (c.m - 1) * ldc + c.n;
  const GuardedBuffer a(static_cast<std::size_t>(a_size), c.guard), out(static_cast<std::size_t>(c_size) * 4, c.guard);
  const GuardedBuffer pack(static_cast<std::size_t>(layout.sums_offset(c.n, c.k)), c.guard);
  const std::size_t workspace_bytes = static_cast<std::size_t>(plan->workspace_bytes(c.m) + 63) / 64 * 64;
  const GuardedBuffer workspace(workspace_bytes, c.guard);
  std::memset(workspace.as<void>(), 0x5a, workspace_bytes);
  std::vector<std::int8_t> b(static_cast<std::size_t>(c.n * c.k));
  std::vector<std::int32_t> sums(static_cast<std::size_t>(layout.panels(c.n) * layout.n_block));
  fill(a.as<std::int8_t>(), a_size, c.values, random);
  fill(b.data(), c.n * c.k, c.values, random);
  int8_mm::pack_panels(layout, b.data(), c.k, int8_mm::BLayout::nk, c.n, c.k, 0, layout.panels(c.n),
                       pack.as<std::int8_t>(), sums.data());

  constexpr std::int32_t kUntouched = 0x7eadbeef;
  std::vector<std::int32_t> expected(static_cast<std::size_t>(c_size), kUntouched);
  std::copy(expected.begin(), expected.end(), out.as<std::int32_t>());
  int8_mm::reference(c.m, c.n, c.k, a.as<std::int8_t>(), lda, b.data(), c.k, int8_mm::BLayout::nk, expected.data(),
                     ldc);

  ExecutableMemory memory;
  const Result<const std::uint8_t*> loaded = memory.load(code.image, code.alignment);
  REQUIRE(loaded.is_ok());
  const auto entry = reinterpret_cast<int8_mm::Entry>(*loaded + code.entries.front().offset);
  for (std::int64_t column = 0; column < c.n; column += c.n_cut) {
    const int8_mm::Call call{.a = a.as<std::int8_t>(),
                             .lda = lda,
                             .b = pack.as<std::int8_t>() + column / layout.n_block * layout.panel_bytes(c.k),
                             .b_sums = sums.data() + column,
                             .c = out.as<std::int32_t>() + column,
                             .ldc = ldc,
                             .m = c.m,
                             .n = std::min(c.n_cut, c.n - column),
                             .workspace = workspace.as<void>()};
    enter(entry, call);
  }
  memory.release(*loaded);
  const bool equal = std::equal(expected.begin(), expected.end(), out.as<std::int32_t>());
  CHECK(equal);
}

/// Descs whose epilogues have every stage and type between them.
inline std::vector<KernelDesc> finished_descs(std::int64_t m, std::int64_t n, std::int64_t k) {
  using namespace int8_mm;
  const auto desc = [&](ADtype a, BDtype b, CDtype c, Rescale rescale, Rounding rounding, Act act) {
    KernelDesc d = make_desc(m, n, k);
    const auto set = [&](Field field, auto value) { d.value[field] = static_cast<std::int64_t>(value); };
    set(kADtype, a);
    set(kBDtype, b);
    set(kCDtype, c);
    set(kRescale, rescale);
    set(kRescalePer, RescalePer::channel);
    set(kRounding, rounding);
    set(kAct, act);
    set(kBias, 1);
    set(kAZp, AZp::row);
    set(kBZp, BZp::channel);
    return d;
  };
  std::vector<KernelDesc> all = {
      desc(ADtype::s8, BDtype::s8, CDtype::s8, Rescale::q_scale, Rounding::even, Act::leaky_relu),
      desc(ADtype::u8, BDtype::u8, CDtype::u8, Rescale::shift_right, Rounding::away, Act::relu),
      desc(ADtype::s8, BDtype::u8, CDtype::s32, Rescale::shift_left, Rounding::zero, Act::none),
      desc(ADtype::u8, BDtype::s8, CDtype::bf16, Rescale::scale, Rounding::zero, Act::leaky_relu),
      desc(ADtype::s8, BDtype::s8, CDtype::f32, Rescale::scale, Rounding::zero, Act::relu),
      desc(ADtype::s8, BDtype::s8, CDtype::f16, Rescale::scale, Rounding::zero, Act::none)};
  KernelDesc plain_u8 = make_desc(m, n, k);
  plain_u8.value[kADtype] = static_cast<std::int64_t>(ADtype::u8);
  all.push_back(plain_u8);
  all[0].value[kCZp] = 1;
  all[1].value[kClamp] = 1;
  all[1].value[kBZp] = static_cast<std::int64_t>(BZp::none);
  for (KernelDesc& d : all)
    d = op().canonical(d);
  return all;
}

/// One compiled kernel with an epilogue, likewise, all columns in one call.
inline void check_finished_kernel(
    const CodeObject& code, const KernelDesc& desc, const KernelCase& c, std::mt19937& random,
    void (*enter)(int8_mm::Entry, const int8_mm::Call&) = [](int8_mm::Entry entry, const int8_mm::Call& call) {
      entry(&call);
    }) {
  using namespace int8_mm;
  CAPTURE(c.m);
  INFO(desc.text());
  const Result<Plan> plan = Plan::from(code.plan);
  REQUIRE(plan.is_ok());
  const PackLayout layout = plan->layout;
  const Epilogue e = Epilogue::of(desc);
  const std::int64_t lda = c.k + 3, ldc = c.n + 5, c_size = ((c.m - 1) * ldc + c.n) * e.c_bytes(),
                     a_size = c.k == 0 ? 0 : (c.m - 1) * lda + c.k;
  const GuardedBuffer a(static_cast<std::size_t>(a_size), c.guard), out(static_cast<std::size_t>(c_size), c.guard);
  const GuardedBuffer pack(static_cast<std::size_t>(layout.sums_offset(c.n, c.k)), c.guard);
  const GuardedBuffer workspace(static_cast<std::size_t>(plan->workspace_bytes(c.m) + 63) / 64 * 64, c.guard);
  const GuardedBuffer a_zp(static_cast<std::size_t>(4 * c.m), c.guard);
  std::vector<std::int8_t> b(static_cast<std::size_t>(c.n * c.k));
  fill(a.as<std::int8_t>(), a_size, c.values, random);
  fill(b.data(), c.n * c.k, c.values, random);
  std::vector<std::int32_t> b_sums(static_cast<std::size_t>(layout.panels(c.n) * layout.n_block));
  pack_panels(layout, b.data(), c.k, BLayout::nk, c.n, c.k, 0, layout.panels(c.n), pack.as<std::int8_t>(),
              b_sums.data(), e.b_dtype);

  const auto between = [&](int least, int most) { return std::uniform_int_distribution(least, most)(random); };
  const auto columns = [&](auto make) {
    std::vector<decltype(make())> all(static_cast<std::size_t>(c.n));
    std::generate(all.begin(), all.end(), make);
    return all;
  };
  std::generate_n(a_zp.as<std::int32_t>(), c.m, [&] { return between(-300, 300); });
  const auto b_zp = columns([&] { return between(-300, 300); }), bias = columns([&] { return between(-5000, 5000); }),
             mult = columns([&] { return between(1 << 20, 1 << 30); }),
             shift = columns([&] { return e.rescale == Rescale::q_scale ? between(-9, 2) : between(0, 12); });
  const auto scale = columns([&] { return static_cast<float>(between(-1000, 1000)) / 4096; });
  const EpilogueValues values = {.a_zp = a_zp.as<std::int32_t>(),
                                 .b_zp = b_zp.data(),
                                 .bias = bias.data(),
                                 .mult = mult.data(),
                                 .shift = shift.data(),
                                 .scale = scale.data(),
                                 .slope_mult = 1 << 30,
                                 .slope_shift = 0,
                                 .slope = 0.125f,
                                 .c_zp = 5,
                                 .lo = 3,
                                 .hi = 200};
  const TermsLayout terms_layout = TermsLayout::of(e);
  const std::int64_t columns_read =
      (c.n + plan->n_step - 1) / plan->n_step * plan->n_step; // kernels may read a whole step
  std::vector<std::int32_t> terms(
      static_cast<std::size_t>(layout.panels(columns_read) * terms_layout.panel_bytes(layout) / 4));
  make_terms(e, values, layout, c.k, plan->a_shift, b_sums.data(), 0, c.n, terms.data());
  const Scalars scalars = scalars_of(e, values);

  constexpr std::uint8_t kUntouched = 0x5A;
  std::vector<std::uint8_t> expected(static_cast<std::size_t>(c_size), kUntouched);
  std::copy(expected.begin(), expected.end(), out.as<std::uint8_t>());
  reference(e, values, c.m, c.n, c.k, a.as<void>(), lda, b.data(), c.k, BLayout::nk, expected.data(), ldc);

  ExecutableMemory memory;
  const Result<const std::uint8_t*> loaded = memory.load(code.image, code.alignment);
  REQUIRE(loaded.is_ok());
  const Call call{.a = a.as<std::int8_t>(),
                  .lda = lda,
                  .b = pack.as<std::int8_t>(),
                  .b_sums = b_sums.data(),
                  .c = out.as<void>(),
                  .ldc = ldc,
                  .m = c.m,
                  .n = c.n,
                  .workspace = workspace.as<void>(),
                  .terms = terms.data(),
                  .scalars = &scalars,
                  .a_zp = a_zp.as<std::int32_t>()};
  enter(reinterpret_cast<Entry>(*loaded + code.entries.front().offset), call);
  memory.release(*loaded);
  const bool equal = std::equal(expected.begin(), expected.end(), out.as<std::uint8_t>());
  CHECK(equal);
}

} // namespace kiln::test
