#include "jit/ops/int4_mm.h"

#include <algorithm>

#include <fmt/format.h>

#include "jit/bf16.h"
#include "jit/ops/bound_plan.h"

namespace kiln::int4_mm {
namespace {

/// Sizes stay below 2^31: they are u32 in a GPU kernel, and every byte count fits an int64.
constexpr std::int64_t kMaxSize = (std::int64_t{1} << 31) - 1;

constexpr std::string_view kGroupNames[] = {"32", "64", "128", "256"};
constexpr std::string_view kInnerKTileNames[] = {"0", "2", "4", "8"};
static_assert(std::size(kGroupNames) == std::size(kGroups));
static_assert(std::size(kInnerKTileNames) == std::size(kInnerKTileCounts));

constexpr FieldSpec kFields[] = {
    {.name = "m", .min = 0, .max = kMaxSize, .required = true, .any_allowed = true},
    {.name = "n", .min = 0, .max = kMaxSize, .required = true},
    {.name = "k", .min = 0, .max = kMaxSize, .required = true},
    {.name = "group", .default_value = 2, .choices = kGroupNames},
    {.name = "inner_k_tiles", .choices = kInnerKTileNames},
    {.name = "batch_invariant", .min = 0, .max = 1},
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
bool in_tensor_core_layout(const KernelDesc& d) {
  return d.value[kInnerKTiles] != 0;
}

const TensorSpec kTensors[] = {
    {.name = "x",
     .dtype = [](const KernelDesc&) { return Dtype::bf16; },
     .shape =
         [](const KernelDesc& d) {
           return std::vector{m_of(d), k_of(d)};
         }},
    {.name = "w",
     .dtype = [](const KernelDesc&) { return Dtype::u8; },
     .shape =
         [](const KernelDesc& d) {
           return std::vector{n_of(d), k_of(d) / 2};
         },
     .present = [](const KernelDesc& d) { return !in_tensor_core_layout(d); }},
    {.name = "w_packed",
     .dtype = [](const KernelDesc&) { return Dtype::s32; },
     .shape =
         [](const KernelDesc& d) {
           const std::int64_t tiles = std::max<std::int64_t>(inner_k_tiles_of(d), 2);
           return std::vector<std::int64_t>{n_of(d) / 8, k_of(d) / (16 * tiles), 32, tiles / 2};
         },
     .present = in_tensor_core_layout},
    {.name = "sz",
     .dtype = [](const KernelDesc&) { return Dtype::bf16; },
     .shape =
         [](const KernelDesc& d) {
           return std::vector<std::int64_t>{k_of(d) / group_of(d), n_of(d), 2};
         }},
    {.name = "y",
     .output = true,
     .dtype = [](const KernelDesc&) { return Dtype::bf16; },
     .shape =
         [](const KernelDesc& d) {
           return std::vector{m_of(d), n_of(d)};
         }},
};

Status bad(std::string_view field, std::int64_t value, std::string_view allowed) {
  return Status::error(Code::invalid_argument, fmt::format("int4_mm: {}={}: allowed is {}", field, value, allowed));
}

Status check(const KernelDesc& d) {
  const std::int64_t group = group_of(d), tiles = inner_k_tiles_of(d);
  if (n_of(d) % 8 != 0)
    return bad("n", n_of(d), "a multiple of 8");
  if (k_of(d) % group != 0)
    return bad("k", k_of(d), fmt::format("a multiple of the group, {}", group));
  if (tiles != 0 && k_of(d) % (16 * tiles) != 0)
    return bad("k", k_of(d), fmt::format("a multiple of 16 · inner_k_tiles, {}", 16 * tiles));
  return {};
}

KernelDesc canonical(const KernelDesc& d) {
  KernelDesc out = d;
  out.value[kM] = kAny;
  if (d.value[kBatchInvariant] == 0)
    for (const std::int64_t bound : kMClasses)
      if (m_of(d) != kAny && m_of(d) <= bound) {
        out.value[kM] = bound;
        break;
      }
  out.value[kInnerKTiles] = 0; // kernels only ever see packs
  return out;
}

MRange m_range(const KernelDesc& d) {
  if (d.value[kBatchInvariant] != 0)
    return {0, kMaxSize};
  std::int64_t previous = 0;
  for (const std::int64_t bound : kMClasses) {
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
  out.value[kBatchInvariant] = 0; // one pack serves both
  return canonical(out);
}

double operations(const KernelDesc& d) {
  return 2.0 * static_cast<double>(m_of(d)) * static_cast<double>(n_of(d)) * static_cast<double>(k_of(d));
}

double bytes(const KernelDesc& d) {
  const double m = static_cast<double>(m_of(d)), n = static_cast<double>(n_of(d)), k = static_cast<double>(k_of(d));
  return 2 * m * k + n * k / 2 + 4 * n * k / static_cast<double>(group_of(d)) + 2 * m * n;
}

} // namespace

const OpSpec& op() {
  static const OpSpec spec = {
      .id = OpId::int4_mm,
      .name = "int4_mm",
      .fields = kFields,
      .tensors = kTensors,
      .check = check,
      .canonical = canonical,
      .m_range = m_range,
      .bind_plan = bound_plan<Plan>,
      .pack_layout = [](const void* plan) { return std::string(static_cast<const Plan*>(plan)->layout->id); },
      .pack_desc = pack_desc,
      .operations = operations,
      .bytes = bytes,
      .timing_problem = timing_problem};
  return spec;
}

KernelDesc make_desc(std::int64_t m, std::int64_t n, std::int64_t k, std::int64_t group, bool batch_invariant,
                     std::int64_t inner_k_tiles) {
  const auto index_in = [](const auto& list, std::int64_t value) {
    return std::find(std::begin(list), std::end(list), value) - std::begin(list); // beyond the end: refused
  };
  KernelDesc d;
  d.op = OpId::int4_mm;
  d.value[kM] = m;
  d.value[kN] = n;
  d.value[kK] = k;
  d.value[kGroup] = index_in(kGroups, group);
  d.value[kInnerKTiles] = index_in(kInnerKTileCounts, inner_k_tiles);
  d.value[kBatchInvariant] = batch_invariant ? 1 : 0;
  return d;
}

std::int64_t group_of(const KernelDesc& desc) {
  return kGroups[desc.value[kGroup]];
}

std::int64_t inner_k_tiles_of(const KernelDesc& desc) {
  return kInnerKTileCounts[desc.value[kInnerKTiles]];
}

std::vector<std::pair<std::string, std::int64_t>> Plan::values() const {
  std::vector<std::pair<std::string, std::int64_t>> values = {{"layout", layout->number}};
  if (launch)
    launch->append_to(values);
  if (boxes) {
    boxes->x.append_to("x", values);
    boxes->y.append_to("y", values);
  }
  return values;
}

Result<Plan> Plan::from(std::span<const std::pair<std::string, std::int64_t>> values) {
  Plan plan;
  if (!values.empty() && values.front().first == "layout")
    plan.layout = find_pack_layout(values.front().second);
  if (plan.layout == nullptr)
    return Status::error(Code::integrity, "int4_mm: a launch plan without a known layout of packs");
  if (values.size() == 1)
    return plan;
  const Result<cuda::LaunchPlan> launch = cuda::LaunchPlan::from(values);
  if (!launch)
    return Status::error(Code::integrity, fmt::format("int4_mm: {}", launch.status().message()));
  plan.launch = *launch;
  if (std::none_of(values.begin(), values.end(), [](const auto& value) { return value.first == "x_inner"; }))
    return plan;
  const Result<cuda::TensorBox> x = cuda::TensorBox::from("x", values), y = cuda::TensorBox::from("y", values);
  for (const auto* box : {&x, &y})
    if (!*box)
      return Status::error(Code::integrity, fmt::format("int4_mm: {}", box->status().message()));
  plan.boxes = Boxes{*x, *y};
  return plan;
}

void reference(std::int64_t m, std::int64_t n, std::int64_t k, std::int64_t group, const std::uint16_t* x,
               std::int64_t ldx, const std::uint8_t* w, const std::uint16_t* sz, std::uint16_t* y, std::int64_t ldy) {
  std::vector<double> row(static_cast<std::size_t>(k));
  for (std::int64_t j = 0; j < n; ++j) {
    for (std::int64_t p = 0; p < k; ++p) {
      const std::uint16_t* const scale_zero = sz + (p / group * n + j) * 2;
      row[static_cast<std::size_t>(p)] =
          (plain_q(w, k, j, p) - 8) * double{float_of_bf16(scale_zero[0])} + double{float_of_bf16(scale_zero[1])};
    }
    for (std::int64_t i = 0; i < m; ++i) {
      double sum = 0;
      for (std::int64_t p = 0; p < k; ++p)
        sum += row[static_cast<std::size_t>(p)] * double{float_of_bf16(x[i * ldx + p])};
      y[i * ldy + j] = bf16_of_double(sum);
    }
  }
}

} // namespace kiln::int4_mm
