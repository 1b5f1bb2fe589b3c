#include "jit/ops/int8_mm.h"

#include <algorithm>
#include <charconv>
#include <cmath>
#include <cstring>

#include <fmt/format.h>

#include "jit/bf16.h"

namespace kiln::int8_mm {
namespace {

/// Sizes stay below 2^31 so that every row offset of a kernel fits its 32-bit displacements and every byte count an
/// int64.
constexpr std::int64_t kMaxSize = (std::int64_t{1} << 31) - 1;

constexpr std::string_view kBLayoutNames[] = {"kn", "nk"};
constexpr std::string_view kADtypeNames[] = {"s8", "u8"};
constexpr std::string_view kCDtypeNames[] = {"s32", "s8", "bf16"};
constexpr std::string_view kRescaleNames[] = {"none", "scale"};
constexpr std::string_view kRescalePerNames[] = {"tensor", "channel"};

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
std::int64_t scales_of(const KernelDesc& d) {
  return d.value[kRescalePer] == static_cast<std::int64_t>(RescalePer::channel) ? n_of(d) : 1;
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
     .dtype = [](const KernelDesc&) { return Dtype::s8; },
     .shape =
         [](const KernelDesc& d) {
           return d.value[kBLayout] == static_cast<std::int64_t>(BLayout::kn) ? std::vector{k_of(d), n_of(d)}
                                                                              : std::vector{n_of(d), k_of(d)};
         }},
    {.name = "scale",
     .dtype = [](const KernelDesc&) { return Dtype::f32; },
     .shape = [](const KernelDesc& d) { return std::vector{scales_of(d)}; },
     .present = has_scale},
    {.name = "c",
     .output = true,
     .dtype =
         [](const KernelDesc& d) {
           switch (static_cast<CDtype>(d.value[kCDtype])) {
           case CDtype::s8:
             return Dtype::s8;
           case CDtype::bf16:
             return Dtype::bf16;
           case CDtype::s32:
             break;
           }
           return Dtype::s32;
         },
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
  if (d.value[kCDtype] == static_cast<std::int64_t>(CDtype::bf16) && !has_scale(d))
    return Status::error(Code::invalid_argument, "int8_mm: c_dtype=bf16 rescale=none: allowed is rescale=scale");
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
  if (!has_scale(d))
    out.value[kRescalePer] = static_cast<std::int64_t>(RescalePer::channel);
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
  KernelDesc out = d;
  out.value[kM] = kAny;
  // Whatever becomes of the sums.
  out.value[kCDtype] = static_cast<std::int64_t>(CDtype::s32);
  out.value[kRescale] = static_cast<std::int64_t>(Rescale::none);
  return canonical(out);
}

double operations(const KernelDesc& d) {
  return 2.0 * static_cast<double>(m_of(d)) * static_cast<double>(n_of(d)) * static_cast<double>(k_of(d));
}

double bytes(const KernelDesc& d) {
  const double m = static_cast<double>(m_of(d)), n = static_cast<double>(n_of(d)), k = static_cast<double>(k_of(d));
  return m * k + n * k + 4 * m * n;
}

Result<std::shared_ptr<const void>> bind_plan(std::span<const std::pair<std::string, std::int64_t>> values) {
  Result<Plan> plan = Plan::from(values);
  if (!plan)
    return plan.status();
  return std::shared_ptr<const void>(std::make_shared<const Plan>(*plan));
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
      .bind_plan = bind_plan,
      .pack_layout = [](const void* plan) { return static_cast<const Plan*>(plan)->layout.id(); },
      .pack_desc = pack_desc,
      .operations = operations,
      .bytes = bytes};
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

Status check_s8(const KernelDesc& desc, std::int64_t max_k) {
  if (desc.value[kADtype] != static_cast<std::int64_t>(ADtype::s8))
    return Status::error(Code::unsupported, "a_dtype=u8: allowed is s8");
  if (desc.value[kCDtype] != static_cast<std::int64_t>(CDtype::s32) ||
      desc.value[kRescale] != static_cast<std::int64_t>(Rescale::none))
    return Status::error(Code::unsupported, "c_dtype and rescale: allowed on CPUs is c_dtype=s32 without rescale");
  if (k_of(desc) > max_k)
    return Status::error(Code::unsupported, fmt::format("k={}: allowed is at most {}", k_of(desc), max_k));
  return {};
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

void rescale_reference(const KernelDesc& desc, const std::int32_t* sums, std::int64_t m, const float* scale, void* c) {
  const std::int64_t n = n_of(desc);
  const bool per_channel = scales_of(desc) == n && desc.value[kRescalePer] != 0;
  for (std::int64_t i = 0; i < m; ++i)
    for (std::int64_t j = 0; j < n; ++j) {
      const float y = static_cast<float>(sums[i * n + j]) * scale[per_channel ? j : 0]; // each rounded to nearest even
      // The integers round once, half to even, and saturate.
      const auto integer = [&](double lo, double hi) {
        return std::clamp(std::nearbyint(static_cast<double>(y)), lo, hi);
      };
      switch (static_cast<CDtype>(desc.value[kCDtype])) {
      case CDtype::s32:
        static_cast<std::int32_t*>(c)[i * n + j] = static_cast<std::int32_t>(integer(-0x1p31, 0x1p31 - 1));
        break;
      case CDtype::s8:
        static_cast<std::int8_t*>(c)[i * n + j] = static_cast<std::int8_t>(integer(-128, 127));
        break;
      case CDtype::bf16:
        static_cast<std::uint16_t*>(c)[i * n + j] = bf16_of_float(y);
        break;
      }
    }
}

std::vector<std::pair<std::string, std::int64_t>> Plan::values() const {
  if (launch) {
    std::vector<std::pair<std::string, std::int64_t>> values = {{"n_block", layout.n_block},
                                                                {"k_block", layout.k_block}};
    launch->append_to(values);
    return values;
  }
  return {{"n_block", layout.n_block}, {"k_block", layout.k_block},          {"m_step", m_step},
          {"n_step", n_step},          {"workspace_fixed", workspace_fixed}, {"workspace_per_row", workspace_per_row}};
}

Result<Plan> Plan::from(std::span<const std::pair<std::string, std::int64_t>> values) {
  // Then workspace_bytes of any m, rounded up by any m_step, stays within an int64.
  constexpr std::int64_t kMaxWorkspaceFixed = std::int64_t{1} << 40,
                         kMaxWorkspacePerRow = (std::int64_t{1} << 32) - (1 << 20);
  Plan plan;
  bool fine = true;
  const auto take = [&](const char* name, auto& field, std::int64_t max) {
    int found = 0;
    for (const auto& [key, value] : values)
      if (key == name) {
        ++found;
        fine = fine && value >= 0 && value <= max;
        field = static_cast<std::remove_reference_t<decltype(field)>>(value);
      }
    fine = fine && found == 1;
  };
  take("n_block", plan.layout.n_block, 256);
  take("k_block", plan.layout.k_block, 64);
  const bool for_gpu = std::any_of(values.begin(), values.end(), [](const auto& v) { return v.first == "tile_m"; });
  if (for_gpu) {
    const Result<cuda::LaunchPlan> launch = cuda::LaunchPlan::from(values);
    if (!launch)
      return Status::error(Code::integrity, fmt::format("int8_mm: {}", launch.status().message()));
    plan.launch = *launch;
    plan.n_step = plan.layout.n_block;
  } else {
    take("m_step", plan.m_step, 1 << 16);
    take("n_step", plan.n_step, 1 << 16);
    take("workspace_fixed", plan.workspace_fixed, kMaxWorkspaceFixed);
    take("workspace_per_row", plan.workspace_per_row, kMaxWorkspacePerRow);
  }
  if (!fine || plan.layout.n_block < 1 || plan.layout.k_block < 1 || plan.m_step < 1 || plan.n_step < 1 ||
      plan.n_step % plan.layout.n_block != 0)
    return Status::error(Code::integrity, "int8_mm: a launch plan with missing, repeated or impossible values");
  return plan;
}

} // namespace kiln::int8_mm
