#include "jit/ops/int8_mm.h"

#include <algorithm>
#include <charconv>
#include <cmath>
#include <cstring>

#include <fmt/format.h>

#include "jit/ops/bound_plan.h"
#include "jit/ops/int8_mm_epilogue.h"

namespace kiln::int8_mm {
namespace {

/// Sizes stay below 2^31 so that every row offset of a kernel fits its 32-bit displacements and every byte count an
/// int64.
constexpr std::int64_t kMaxSize = (std::int64_t{1} << 31) - 1;

constexpr std::string_view kBLayoutNames[] = {"kn", "nk"};
constexpr std::string_view kADtypeNames[] = {"s8", "u8"};
constexpr std::string_view kBDtypeNames[] = {"s8", "u8"};
constexpr std::string_view kCDtypeNames[] = {"s32", "s8", "bf16", "u8", "f32", "f16"};
constexpr std::string_view kRescaleNames[] = {"none", "scale", "q_scale", "shift_right", "shift_left"};
constexpr std::string_view kRescalePerNames[] = {"tensor", "channel"};
constexpr std::string_view kAZpNames[] = {"none", "tensor", "row"};
constexpr std::string_view kChannelNames[] = {"none", "tensor", "channel"};
constexpr std::string_view kBiasNames[] = {"none", "channel"};
constexpr std::string_view kTensorNames[] = {"none", "tensor"};
constexpr std::string_view kRoundingNames[] = {"zero", "away", "minus_inf", "plus_inf", "even", "odd"};
constexpr std::string_view kActNames[] = {"none", "relu", "leaky_relu"};

constexpr FieldSpec kFields[] = {
    {.name = "m", .min = 0, .max = kMaxSize, .required = true, .any_allowed = true},
    {.name = "n", .min = 0, .max = kMaxSize, .required = true},
    {.name = "k", .min = 0, .max = kMaxSize, .required = true},
    {.name = "b_layout", .default_value = static_cast<std::int64_t>(BLayout::nk), .choices = kBLayoutNames},
    {.name = "a_dtype", .choices = kADtypeNames},
    {.name = "c_dtype", .choices = kCDtypeNames},
    {.name = "rescale", .choices = kRescaleNames},
    {.name = "rescale_per",
     .default_value = static_cast<std::int64_t>(RescalePer::channel),
     .choices = kRescalePerNames},
    {.name = "b_dtype", .choices = kBDtypeNames},
    {.name = "a_zp", .choices = kAZpNames},
    {.name = "b_zp", .choices = kChannelNames},
    {.name = "bias", .choices = kBiasNames},
    {.name = "rounding", .choices = kRoundingNames},
    {.name = "act", .choices = kActNames},
    {.name = "c_zp", .choices = kTensorNames},
    {.name = "clamp", .choices = kTensorNames},
};
static_assert(std::size(kFields) == kFieldCount);

std::int64_t m_of(const KernelDesc& d) {
  return d.value[kM];
}
std::int64_t n_of(const KernelDesc& d) {
  return d.value[kN];
}
std::int64_t k_of(const KernelDesc& d) {
  return d.value[kK];
}

bool has_scale(const KernelDesc& d) {
  return d.value[kRescale] == static_cast<std::int64_t>(Rescale::scale);
}

Dtype dtype_of(CDtype dtype) {
  constexpr Dtype dtypes[] = {Dtype::s32, Dtype::s8, Dtype::bf16, Dtype::u8, Dtype::f32, Dtype::f16};
  return dtypes[static_cast<int>(dtype)];
}
Dtype s32_tensor(const KernelDesc&) {
  return Dtype::s32;
}
Dtype f32_tensor(const KernelDesc&) {
  return Dtype::f32;
}
/// Of lo and hi.
Dtype bound_tensor(const KernelDesc& d) {
  return Epilogue::of(d).has_float_output() ? Dtype::f32 : Dtype::s32;
}
std::vector<std::int64_t> one(const KernelDesc&) {
  return {1};
}
std::vector<std::int64_t> channels(const KernelDesc& d) {
  return {n_of(d)};
}
std::vector<std::int64_t> rescale_values(const KernelDesc& d) {
  return {Epilogue::of(d).rescale_per == RescalePer::channel ? n_of(d) : 1};
}
bool has_integer_slope(const KernelDesc& d) {
  return Epilogue::of(d).has_integer_slope();
}
bool has_clamp(const KernelDesc& d) {
  return d.value[kClamp] != 0;
}

const TensorSpec kTensors[] = {
    {.name = "a",
     .dtype =
         [](const KernelDesc& d) {
           return d.value[kADtype] == static_cast<std::int64_t>(ADtype::u8) ? Dtype::u8 : Dtype::s8;
         },
     .shape =
         [](const KernelDesc& d) {
           return std::vector{m_of(d), k_of(d)};
         }},
    {.name = "b",
     .dtype =
         [](const KernelDesc& d) {
           return d.value[kBDtype] == static_cast<std::int64_t>(BDtype::u8) ? Dtype::u8 : Dtype::s8;
         },
     .shape =
         [](const KernelDesc& d) {
           return d.value[kBLayout] == static_cast<std::int64_t>(BLayout::kn) ? std::vector{k_of(d), n_of(d)}
                                                                              : std::vector{n_of(d), k_of(d)};
         }},
    {.name = "scale", .dtype = f32_tensor, .shape = rescale_values, .present = has_scale},
    {.name = "a_zp",
     .dtype = s32_tensor,
     .shape =
         [](const KernelDesc& d) { return std::vector{Epilogue::of(d).a_zp == AZp::row ? m_of(d) : std::int64_t{1}}; },
     .present = [](const KernelDesc& d) { return d.value[kAZp] != 0; }},
    {.name = "b_zp",
     .dtype = s32_tensor,
     .shape =
         [](const KernelDesc& d) {
           return std::vector{Epilogue::of(d).b_zp == BZp::channel ? n_of(d) : std::int64_t{1}};
         },
     .present = [](const KernelDesc& d) { return d.value[kBZp] != 0; }},
    {.name = "bias",
     .dtype = s32_tensor,
     .shape = channels,
     .present = [](const KernelDesc& d) { return d.value[kBias] != 0; }},
    {.name = "mult",
     .dtype = s32_tensor,
     .shape = rescale_values,
     .present = [](const KernelDesc& d) { return Epilogue::of(d).rescale == Rescale::q_scale; }},
    {.name = "shift",
     .dtype = s32_tensor,
     .shape = rescale_values,
     .present = [](const KernelDesc& d) { return Epilogue::of(d).rescale != Rescale::none && !has_scale(d); }},
    {.name = "slope_mult", .dtype = s32_tensor, .shape = one, .present = has_integer_slope},
    {.name = "slope_shift", .dtype = s32_tensor, .shape = one, .present = has_integer_slope},
    {.name = "slope",
     .dtype = f32_tensor,
     .shape = one,
     .present = [](const KernelDesc& d) { return Epilogue::of(d).has_float_slope(); }},
    {.name = "c_zp",
     .dtype = s32_tensor,
     .shape = one,
     .present = [](const KernelDesc& d) { return d.value[kCZp] != 0; }},
    {.name = "lo", .dtype = bound_tensor, .shape = one, .present = has_clamp},
    {.name = "hi", .dtype = bound_tensor, .shape = one, .present = has_clamp},
    {.name = "c",
     .output = true,
     .dtype = [](const KernelDesc& d) { return dtype_of(static_cast<CDtype>(d.value[kCDtype])); },
     .shape =
         [](const KernelDesc& d) {
           return std::vector{m_of(d), n_of(d)};
         }},
};

Status check(const KernelDesc& d) {
  // Sizes are below 2^31, so only C in bytes can exceed an int64.
  constexpr double kMostBytes = 0x1p61;
  if (4.0 * static_cast<double>(m_of(d)) * static_cast<double>(n_of(d)) > kMostBytes)
    return Status::error(Code::invalid_argument,
                         fmt::format("int8_mm: m={} n={}: allowed is a C of at most 2^61 bytes", m_of(d), n_of(d)));
  if (const Epilogue e = Epilogue::of(d); e.has_float_output()) {
    const std::string_view c_dtype = kCDtypeNames[d.value[kCDtype]];
    if (!has_scale(d))
      return Status::error(Code::invalid_argument,
                           fmt::format("int8_mm: c_dtype={} rescale={}: allowed is rescale=scale", c_dtype,
                                       kRescaleNames[d.value[kRescale]]));
    if (e.c_zp)
      return Status::error(
          Code::invalid_argument,
          fmt::format("int8_mm: c_zp=tensor c_dtype={}: allowed is c_zp=none, or an integer c_dtype", c_dtype));
  }
  return {};
}

/// The classes of m of the kernels that serve this desc.
std::span<const std::int64_t> m_classes(const KernelDesc& d) {
  if (d.device.kind == DeviceKind::cuda)
    return kGpuMClasses;
  return kMClasses;
}

KernelDesc canonical(const KernelDesc& d) {
  KernelDesc out = d;
  out.value[kM] = kAny;
  for (const std::int64_t bound : m_classes(d))
    if (m_of(d) != kAny && m_of(d) <= bound) {
      out.value[kM] = bound;
      break;
    }
  // Packed or packed on the fly: a kernel only ever sees panels.
  out.value[kBLayout] = static_cast<std::int64_t>(BLayout::nk);
  const Epilogue e = Epilogue::of(d);
  if (e.rescale == Rescale::none)
    out.value[kRescalePer] = static_cast<std::int64_t>(RescalePer::channel);
  if (!e.rounds_wide() && !e.has_integer_slope())
    out.value[kRounding] = static_cast<std::int64_t>(Rounding::zero);
  return out;
}

MRange m_range(const KernelDesc& d) {
  std::int64_t previous = 0;
  for (const std::int64_t bound : m_classes(d)) {
    if (m_of(d) != kAny && bound != kAny && m_of(d) <= bound)
      return {previous == 0 ? 0 : previous + 1, bound};
    if (bound != kAny)
      previous = bound;
  }
  return {previous + 1, kMaxSize};
}

KernelDesc pack_desc(const KernelDesc& d) {
  // Whatever they meet, and whatever becomes of the sums: u8 weights lie as s8 ones do.
  KernelDesc out = make_desc(kAny, n_of(d), k_of(d));
  out.device = d.device;
  return canonical(out);
}

double operations(const KernelDesc& d) {
  return 2.0 * static_cast<double>(m_of(d)) * static_cast<double>(n_of(d)) * static_cast<double>(k_of(d));
}

double bytes(const KernelDesc& d) {
  const double m = static_cast<double>(m_of(d)), n = static_cast<double>(n_of(d)), k = static_cast<double>(k_of(d));
  return m * k + n * k + Epilogue::of(d).c_bytes() * m * n;
}

} // namespace

const OpSpec& op() {
  static const OpSpec spec = {
      .id = OpId::int8_mm,
      .name = "int8_mm",
      .fields = kFields,
      .tensors = kTensors,
      .check = check,
      .canonical = canonical,
      .m_range = m_range,
      .bind_plan = bound_plan<Plan>,
      .pack_layout = [](const void* plan) { return static_cast<const Plan*>(plan)->layout.id(); },
      .pack_desc = pack_desc,
      .operations = operations,
      .bytes = bytes,
      .timing_problem = timing_problem};
  return spec;
}

KernelDesc make_desc(std::int64_t m, std::int64_t n, std::int64_t k, BLayout b_layout) {
  KernelDesc d;
  d.op = OpId::int8_mm;
  d.value[kM] = m;
  d.value[kN] = n;
  d.value[kK] = k;
  d.value[kBLayout] = static_cast<std::int64_t>(b_layout);
  d.value[kRescalePer] = static_cast<std::int64_t>(RescalePer::channel);
  return d;
}

Status check_k(const KernelDesc& desc, std::int64_t max_k) {
  if (k_of(desc) > max_k)
    return Status::error(Code::unsupported, fmt::format("k={}: allowed is at most {}", k_of(desc), max_k));
  return {};
}

Status check_plain(const KernelDesc& desc, std::int64_t max_k) {
  const KernelDesc plain = make_desc(0, 0, 0);
  for (const Field field : {kADtype, kBDtype, kCDtype, kRescale, kAZp, kBZp, kBias, kAct, kCZp, kClamp})
    if (desc.value[field] != plain.value[field]) {
      const FieldSpec& spec = kFields[field];
      const auto name = [&](std::int64_t value) { return spec.choices[static_cast<std::size_t>(value)]; };
      return Status::error(Code::unsupported, fmt::format("{}={}: allowed here is {}", spec.name,
                                                          name(desc.value[field]), name(plain.value[field])));
    }
  return check_k(desc, max_k);
}

std::string PackLayout::id() const {
  return fmt::format("n{}k{}", n_block, k_block);
}

Result<PackLayout> PackLayout::parse(std::string_view id) {
  PackLayout layout;
  const char* const end = id.data() + id.size();
  if (id.starts_with('n')) {
    const auto n = std::from_chars(id.data() + 1, end, layout.n_block);
    if (n.ec == std::errc() && n.ptr < end && *n.ptr == 'k') {
      const auto k = std::from_chars(n.ptr + 1, end, layout.k_block);
      if (k.ec == std::errc() && k.ptr == end && layout.n_block >= 1 && layout.n_block <= 256 && layout.k_block >= 1 &&
          layout.k_block <= 64 && layout.id() == id) // no leading zeros: a layout has one name
        return layout;
    }
  }
  return Status::error(Code::invalid_argument,
                       fmt::format("pack layout '{}': allowed is nNkK with N 1…256 and K 1…64, as n16k4", id));
}

void reference(std::int64_t m, std::int64_t n, std::int64_t k, const std::int8_t* a, std::int64_t lda,
               const std::int8_t* b, std::int64_t ldb, BLayout b_layout, std::int32_t* c, std::int64_t ldc) {
  const std::int64_t b_n = b_layout == BLayout::nk ? ldb : 1, b_k = b_layout == BLayout::nk ? 1 : ldb;
  for (std::int64_t i = 0; i < m; ++i)
    for (std::int64_t j = 0; j < n; ++j) {
      std::uint32_t sum = 0; // unsigned: the sum wraps
      for (std::int64_t p = 0; p < k; ++p)
        sum += static_cast<std::uint32_t>(std::int32_t{a[i * lda + p]} * std::int32_t{b[j * b_n + p * b_k]});
      c[i * ldc + j] = static_cast<std::int32_t>(sum);
    }
}

std::vector<std::pair<std::string, std::int64_t>> Plan::values() const {
  if (launch) {
    std::vector<std::pair<std::string, std::int64_t>> values = {{"n_block", layout.n_block},
                                                                {"k_block", layout.k_block}};
    launch->append_to(values);
    if (boxes) {
      boxes->a.append_to("a", values);
      boxes->b.append_to("b", values);
    }
    return values;
  }
  std::vector<std::pair<std::string, std::int64_t>> values = {
      {"n_block", layout.n_block}, {"k_block", layout.k_block},          {"m_step", m_step},
      {"n_step", n_step},          {"workspace_fixed", workspace_fixed}, {"workspace_per_row", workspace_per_row}};
  if (a_shift != 0)
    values.emplace_back("a_shift", a_shift);
  return values;
}

Result<Plan> Plan::from(std::span<const std::pair<std::string, std::int64_t>> values) {
  // Then workspace_bytes of any m, rounded up by any m_step, stays within an int64.
  constexpr std::int64_t kMaxWorkspaceFixed = std::int64_t{1} << 40,
                         kMaxWorkspacePerRow = (std::int64_t{1} << 32) - (1 << 20);
  Plan plan;
  bool fine = true;
  const auto take_if_there = [&](const char* name, auto& field, std::int64_t min, std::int64_t max) {
    int found = 0;
    for (const auto& [key, value] : values)
      if (key == name) {
        ++found;
        fine = fine && value >= min && value <= max;
        field = static_cast<std::remove_reference_t<decltype(field)>>(value);
      }
    return found;
  };
  const auto take = [&](const char* name, auto& field, std::int64_t max) {
    fine = take_if_there(name, field, 0, max) == 1 && fine;
  };
  take("n_block", plan.layout.n_block, 256);
  take("k_block", plan.layout.k_block, 64);
  const bool for_gpu = std::any_of(values.begin(), values.end(), [](const auto& v) { return v.first == "tile_m"; });
  if (for_gpu) {
    const Result<cuda::LaunchPlan> launch = cuda::LaunchPlan::from(values);
    if (!launch)
      return Status::error(Code::integrity, fmt::format("int8_mm: {}", launch.status().message()));
    plan.launch = *launch;
    if (std::any_of(values.begin(), values.end(), [](const auto& v) { return v.first == "a_inner"; })) {
      const Result<cuda::TensorBox> a = cuda::TensorBox::from("a", values), b = cuda::TensorBox::from("b", values);
      for (const auto* box : {&a, &b})
        if (!*box)
          return Status::error(Code::integrity, fmt::format("int8_mm: {}", box->status().message()));
      plan.boxes = Boxes{*a, *b};
    }
    plan.n_step = plan.layout.n_block;
  } else {
    take("m_step", plan.m_step, 1 << 16);
    take("n_step", plan.n_step, 1 << 16);
    take("workspace_fixed", plan.workspace_fixed, kMaxWorkspaceFixed);
    take("workspace_per_row", plan.workspace_per_row, kMaxWorkspacePerRow);
    fine = take_if_there("a_shift", plan.a_shift, -128, 128) <= 1 && fine;
  }
  if (!fine || plan.layout.n_block < 1 || plan.layout.k_block < 1 || plan.m_step < 1 || plan.n_step < 1 ||
      plan.n_step % plan.layout.n_block != 0)
    return Status::error(Code::integrity, "int8_mm: a launch plan with missing, repeated or impossible values");
  return plan;
}

} // namespace kiln::int8_mm
