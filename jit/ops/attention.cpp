#include "jit/ops/attention.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include <fmt/format.h>

#include "jit/bf16.h"
#include "jit/ops/bound_plan.h"

namespace kiln::attention {
namespace {

constexpr std::int64_t kMaxSize = (std::int64_t{1} << 31) - 1;
constexpr std::int64_t kMaxHeadSize = 256, kHeadSizeStep = 8;

constexpr std::string_view kCausalNames[] = {"none", "top_left", "bottom_right"};

constexpr FieldSpec kFields[] = {
    {.name = "b", .min = 0, .max = kMaxSize, .default_value = 1, .any_allowed = true},
    {.name = "hq", .min = 0, .max = 1 << 16, .required = true, .small = 4},
    {.name = "hkv", .min = 0, .max = 1 << 16, .required = true, .small = 2},
    {.name = "m", .min = 0, .max = kMaxSize, .required = true, .any_allowed = true, .small = 32},
    {.name = "n", .min = 0, .max = kMaxSize, .required = true, .any_allowed = true, .small = 64},
    {.name = "d", .min = kHeadSizeStep, .max = kMaxHeadSize, .required = true, .small = 64},
    {.name = "dv", .min = kHeadSizeStep, .max = kMaxHeadSize, .required = true, .small = 64},
    {.name = "causal", .choices = kCausalNames},
    {.name = "lse", .min = 0, .max = 1},
    {.name = "batch_invariant", .min = 0, .max = 1},
};
static_assert(std::size(kFields) == kFieldCount);

std::vector<std::int64_t> shape_of(const KernelDesc& d, Field heads, Field rows, Field columns) {
  return {d.value[kB], d.value[heads], d.value[rows], d.value[columns]};
}

const TensorSpec kTensors[] = {
    {.name = "q",
     .dtype = [](const KernelDesc&) { return Dtype::bf16; },
     .shape = [](const KernelDesc& d) { return shape_of(d, kHq, kM, kD); }},
    {.name = "k",
     .dtype = [](const KernelDesc&) { return Dtype::bf16; },
     .shape = [](const KernelDesc& d) { return shape_of(d, kHkv, kN, kD); }},
    {.name = "v",
     .dtype = [](const KernelDesc&) { return Dtype::bf16; },
     .shape = [](const KernelDesc& d) { return shape_of(d, kHkv, kN, kDv); }},
    {.name = "o",
     .output = true,
     .dtype = [](const KernelDesc&) { return Dtype::bf16; },
     .shape = [](const KernelDesc& d) { return shape_of(d, kHq, kM, kDv); }},
    {.name = "lse",
     .output = true,
     .dtype = [](const KernelDesc&) { return Dtype::f32; },
     .shape =
         [](const KernelDesc& d) {
           return std::vector{d.value[kB], d.value[kHq], d.value[kM]};
         },
     .present = [](const KernelDesc& d) { return d.value[kLse] != 0; }},
    {.name = "kv_len",
     .dtype = [](const KernelDesc&) { return Dtype::s32; },
     .shape = [](const KernelDesc& d) { return std::vector{d.value[kB]}; },
     .optional = true},
    {.name = "scale",
     .dtype = [](const KernelDesc&) { return Dtype::f32; },
     .shape = [](const KernelDesc&) { return std::vector<std::int64_t>{1}; },
     .optional = true},
};

Status bad(std::string_view field, std::int64_t value, std::string_view allowed) {
  return Status::error(Code::invalid_argument, fmt::format("attention: {}={}: allowed is {}", field, value, allowed));
}

Status check(const KernelDesc& d) {
  for (const Field field : {kD, kDv})
    if (d.value[field] % kHeadSizeStep != 0)
      return bad(kFields[field].name, d.value[field],
                 fmt::format("a multiple of {} from {} to {}", kHeadSizeStep, kHeadSizeStep, kMaxHeadSize));
  const std::int64_t hq = d.value[kHq], hkv = d.value[kHkv];
  if (hkv == 0 ? hq != 0 : hq % hkv != 0)
    return bad("hq", hq, fmt::format("a multiple of hkv, {}", hkv));
  // The tensors in bytes stay within an int64; the other sizes are far below it.
  constexpr double kMostBytes = 0x1p61;
  const double rows = static_cast<double>(std::max(hq, hkv)) * static_cast<double>(std::max(d.value[kM], d.value[kN])) *
                      static_cast<double>(std::max<std::int64_t>(d.value[kB], 1));
  if (rows * kMaxHeadSize * 2 > kMostBytes)
    return Status::error(Code::invalid_argument,
                         fmt::format("attention: b={} hq={} m={} n={}: allowed are tensors of at most 2^61 bytes",
                                     d.value[kB], hq, d.value[kM], d.value[kN]));
  return {};
}

/// The class of m by its bound, and the bound of the class before it.
struct Class {
  std::int64_t bound = kAny, previous = 0;
};
Class class_of(const KernelDesc& d) {
  Class found;
  if (d.value[kBatchInvariant] != 0)
    return found;
  const std::int64_t group = group_of(d);
  for (const std::int64_t rows : {group, kFewRows, kMostFewRows}) {
    const std::int64_t bound = std::min(rows, kMostFewRows) / group;
    if (bound <= found.previous)
      continue;
    if (d.value[kM] != kAny && d.value[kM] <= bound) {
      found.bound = bound;
      break;
    }
    found.previous = bound;
  }
  return found;
}

KernelDesc canonical(const KernelDesc& d) {
  KernelDesc out = d;
  out.value[kM] = class_of(d).bound;
  out.value[kHq] = group_of(d);
  out.value[kHkv] = 1;
  out.value[kB] = out.value[kN] = kAny;
  return out;
}

MRange m_range(const KernelDesc& d) {
  const Class found = class_of(d);
  return {found.previous == 0 ? 0 : found.previous + 1, found.bound == kAny ? kMaxSize : found.bound};
}

/// Visible pairs of query and key of one head.
double visible_pairs(const KernelDesc& d) {
  const double m = static_cast<double>(d.value[kM]), n = static_cast<double>(d.value[kN]);
  if (d.value[kCausal] == static_cast<std::int64_t>(Causal::none) || m <= 0 || n <= 0)
    return m * n;
  const double first = d.value[kCausal] == static_cast<std::int64_t>(Causal::top_left) ? 1 : n - m + 1;
  // Query i sees first + i keys, between 0 and n.
  const double from = std::clamp(-first, 0.0, m), full = std::clamp(n - first, from, m);
  const double growing = full - from;
  return growing * (first + from) + growing * (growing - 1) / 2 + (m - full) * n;
}

double operations(const KernelDesc& d) {
  return 2.0 * static_cast<double>(d.value[kB]) * static_cast<double>(d.value[kHq]) * visible_pairs(d) *
         static_cast<double>(d.value[kD] + d.value[kDv]);
}

double bytes(const KernelDesc& d) {
  const double per_row = 2.0 * static_cast<double>(d.value[kD] + d.value[kDv]);
  return static_cast<double>(d.value[kB]) * per_row *
         (static_cast<double>(d.value[kHq]) * static_cast<double>(d.value[kM]) +
          static_cast<double>(d.value[kHkv]) * static_cast<double>(d.value[kN]));
}

} // namespace

const OpSpec& op() {
  static const OpSpec spec = {.id = OpId::attention,
                              .name = "attention",
                              .fields = kFields,
                              .tensors = kTensors,
                              .check = check,
                              .canonical = canonical,
                              .m_range = m_range,
                              .bind_plan = bound_plan<Plan>,
                              .pack_layout = nullptr,
                              .pack_desc = nullptr,
                              .operations = operations,
                              .bytes = bytes};
  return spec;
}

KernelDesc make_desc(std::int64_t b, std::int64_t hq, std::int64_t hkv, std::int64_t m, std::int64_t n, std::int64_t d,
                     std::int64_t dv, Causal causal) {
  KernelDesc desc;
  desc.op = OpId::attention;
  desc.value = {b, hq, hkv, m, n, d, dv, static_cast<std::int64_t>(causal)};
  return desc;
}

std::int64_t group_of(const KernelDesc& desc) {
  return desc.value[kHkv] == 0 ? 1 : std::max<std::int64_t>(desc.value[kHq] / desc.value[kHkv], 1);
}

std::vector<std::pair<std::string, std::int64_t>> Plan::values() const {
  return {{"block_rows", block_rows}, {"workspace_bytes", workspace_bytes}, {"makes_partials", makes_partials ? 1 : 0}};
}

Result<Plan> Plan::from(std::span<const std::pair<std::string, std::int64_t>> values) {
  constexpr std::int64_t kMaxBlockRows = 1 << 16, kMaxWorkspace = std::int64_t{1} << 40;
  Plan plan;
  bool fine = true;
  const auto take = [&](const char* name, auto& field, std::int64_t min, std::int64_t max) {
    int found = 0;
    for (const auto& [key, value] : values)
      if (key == name) {
        ++found;
        fine = fine && value >= min && value <= max;
        field = static_cast<std::remove_reference_t<decltype(field)>>(value);
      }
    fine = fine && found == 1;
  };
  take("block_rows", plan.block_rows, 1, kMaxBlockRows);
  take("workspace_bytes", plan.workspace_bytes, 0, kMaxWorkspace);
  take("makes_partials", plan.makes_partials, 0, 1);
  if (!fine)
    return Status::error(Code::integrity, "attention: a launch plan with missing, repeated or impossible values");
  return plan;
}

double reference_row(const std::uint16_t* q, const std::uint16_t* k, std::int64_t k_row_stride, const std::uint16_t* v,
                     std::int64_t v_row_stride, std::int64_t visible, std::int64_t d, std::int64_t dv, double scale,
                     double* o) {
  std::fill(o, o + dv, 0.0);
  double max = -std::numeric_limits<double>::infinity(), sum = 0;
  for (std::int64_t n = 0; n < visible; ++n) {
    double score = 0;
    for (std::int64_t i = 0; i < d; ++i)
      score += double{float_of_bf16(q[i])} * double{float_of_bf16(k[n * k_row_stride + i])};
    score *= scale;
    if (score > max) { // what there is, in terms of the new maximum
      const double factor = std::exp(max - score);
      sum *= factor;
      for (std::int64_t i = 0; i < dv; ++i)
        o[i] *= factor;
      max = score;
    }
    const double p = std::exp(score - max);
    sum += p;
    for (std::int64_t i = 0; i < dv; ++i)
      o[i] += p * double{float_of_bf16(v[n * v_row_stride + i])};
  }
  if (visible > 0)
    for (std::int64_t i = 0; i < dv; ++i)
      o[i] /= sum;
  return max + std::log(sum);
}

} // namespace kiln::attention
