#include "jit/ops/fp8_block_bmm.h"

#include <algorithm>

#include <fmt/format.h>

#include "jit/bf16.h"
#include "jit/f8.h"
#include "jit/ops/bound_plan.h"

namespace kiln::fp8_block_bmm {
namespace {

/// Sizes stay below 2^31: they are u32 in a GPU kernel. Batches are blocks along z there (CUDA C++ Programming Guide,
/// technical specifications per compute capability).
constexpr std::int64_t kMaxSize = (std::int64_t{1} << 31) - 1, kMaxBatches = 65535;
/// What 16 bytes hold, as the tensor memory accelerator takes rows: of X and Y, and of Z in bf16.
constexpr std::int64_t kKStep = 16, kNStep = 8;

constexpr std::string_view kFloat8Names[] = {"e4m3", "e5m2"};
constexpr std::string_view kZNames[] = {"bf16", "f16", "f32"};

constexpr FieldSpec kFields[] = {
    {.name = "b", .min = 0, .max = kMaxBatches, .required = true, .small = 2},
    {.name = "m", .min = 0, .max = kMaxSize, .required = true, .any_allowed = true, .small = 64},
    {.name = "n", .min = 0, .max = kMaxSize, .required = true},
    {.name = "k", .min = 0, .max = kMaxSize, .required = true},
    {.name = "x_dtype", .choices = kFloat8Names},
    {.name = "y_dtype", .choices = kFloat8Names},
    {.name = "z_dtype", .choices = kZNames},
    {.name = "batch_invariant", .min = 0, .max = 1},
};
static_assert(std::size(kFields) == kFieldCount);

Dtype dtype_of(Float8 type) {
  return type == Float8::e4m3 ? Dtype::e4m3 : Dtype::e5m2;
}
Dtype dtype_of(ZDtype type) {
  constexpr Dtype dtypes[] = {Dtype::bf16, Dtype::f16, Dtype::f32};
  return dtypes[static_cast<int>(type)];
}

const TensorSpec kTensors[] = {
    {.name = "x",
     .dtype = [](const KernelDesc& d) { return dtype_of(x_of(d)); },
     .shape =
         [](const KernelDesc& d) {
           return std::vector{d.value[kB], d.value[kM], d.value[kK]};
         }},
    {.name = "y",
     .dtype = [](const KernelDesc& d) { return dtype_of(y_of(d)); },
     .shape =
         [](const KernelDesc& d) {
           return std::vector{d.value[kB], d.value[kN], d.value[kK]};
         }},
    {.name = "xs",
     .dtype = [](const KernelDesc&) { return Dtype::f32; },
     .shape =
         [](const KernelDesc& d) {
           return std::vector{d.value[kB], d.value[kM], blocks_of(d.value[kK])};
         }},
    {.name = "ys",
     .dtype = [](const KernelDesc&) { return Dtype::f32; },
     .shape =
         [](const KernelDesc& d) {
           return std::vector{d.value[kB], blocks_of(d.value[kN]), blocks_of(d.value[kK])};
         }},
    {.name = "z",
     .output = true,
     .dtype = [](const KernelDesc& d) { return dtype_of(z_of(d)); },
     .shape =
         [](const KernelDesc& d) {
           return std::vector{d.value[kB], d.value[kM], d.value[kN]};
         }},
};

Status bad(std::string_view field, std::int64_t value, std::string_view allowed) {
  return Status::error(Code::invalid_argument,
                       fmt::format("fp8_block_bmm: {}={}: allowed is {}", field, value, allowed));
}

Status check(const KernelDesc& d) {
  const std::int64_t n = d.value[kN], k = d.value[kK];
  if (n % kNStep != 0)
    return bad("n", n, fmt::format("a multiple of {}", kNStep));
  if (k % kKStep != 0)
    return bad("k", k, fmt::format("a multiple of {}", kKStep));
  constexpr double kMostBytes = 0x1p61; // every size in bytes fits an int64
  const double rows = static_cast<double>(d.value[kB]) * static_cast<double>(std::max(d.value[kM], n));
  if (rows * 4.0 * static_cast<double>(std::max(n, k)) > kMostBytes)
    return Status::error(Code::invalid_argument,
                         fmt::format("fp8_block_bmm: b={} m={} n={} k={}: allowed are tensors of at most 2^61 bytes",
                                     d.value[kB], d.value[kM], n, k));
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
  for (const std::int64_t bound : kMClasses) {
    if (bound == kAny)
      break;
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
  return out;
}

MRange m_range(const KernelDesc& d) {
  const Class found = class_of(d);
  return {found.previous == 0 ? 0 : found.previous + 1, found.bound == kAny ? kMaxSize : found.bound};
}

double operations(const KernelDesc& d) {
  return 2.0 * static_cast<double>(d.value[kB]) * static_cast<double>(d.value[kM]) * static_cast<double>(d.value[kN]) *
         static_cast<double>(d.value[kK]);
}

double bytes(const KernelDesc& d) {
  const double m = static_cast<double>(d.value[kM]), n = static_cast<double>(d.value[kN]),
               k = static_cast<double>(d.value[kK]);
  const double k_blocks = static_cast<double>(blocks_of(d.value[kK])),
               n_blocks = static_cast<double>(blocks_of(d.value[kN]));
  return static_cast<double>(d.value[kB]) *
         ((m + n) * k + 4 * (m + n_blocks) * k_blocks + static_cast<double>(bytes_of(z_of(d))) * m * n);
}

/// Rounded to nearest even once, beyond the range ±infinity: to the nearest odd f32 first, which a later rounding to
/// fewer bits cannot mistake for a tie.
float odd_float_of(double value) {
  float toward_zero = static_cast<float>(value);
  if (std::isnan(value) || std::isinf(toward_zero))
    return toward_zero;
  if (std::fabs(static_cast<double>(toward_zero)) > std::fabs(value))
    toward_zero = std::nextafterf(toward_zero, 0.0f);
  std::uint32_t bits = std::bit_cast<std::uint32_t>(toward_zero);
  if (static_cast<double>(toward_zero) != value)
    bits |= 1;
  return std::bit_cast<float>(bits);
}

void store(ZDtype type, double value, void* z, std::int64_t index) {
  switch (type) {
  case ZDtype::bf16:
    static_cast<std::uint16_t*>(z)[index] = bf16_of_double(value);
    break;
  case ZDtype::f16:
    static_cast<std::uint16_t*>(z)[index] = f16_of_float(odd_float_of(value));
    break;
  case ZDtype::f32:
    static_cast<float*>(z)[index] = std::isnan(value) ? std::bit_cast<float>(0x7FC00000u) : static_cast<float>(value);
    break;
  }
}

const std::array<float, 256>& table_of(Float8 type) {
  return type == Float8::e4m3 ? f8_table<float_of_e4m3>() : f8_table<float_of_e5m2>();
}

} // namespace

const OpSpec& op() {
  static const OpSpec spec = {.id = OpId::fp8_block_bmm,
                              .name = "fp8_block_bmm",
                              .fields = kFields,
                              .tensors = kTensors,
                              .check = check,
                              .canonical = canonical,
                              .m_range = m_range,
                              .bind_plan = bound_plan<Plan>,
                              .pack_layout = nullptr,
                              .pack_desc = nullptr,
                              .operations = operations,
                              .bytes = bytes,
                              .timing_problem = timing_problem};
  return spec;
}

KernelDesc make_desc(std::int64_t b, std::int64_t m, std::int64_t n, std::int64_t k, Float8 x, Float8 y, ZDtype z,
                     bool batch_invariant) {
  KernelDesc d;
  d.op = OpId::fp8_block_bmm;
  d.value[kB] = b;
  d.value[kM] = m;
  d.value[kN] = n;
  d.value[kK] = k;
  d.value[kXDtype] = static_cast<std::int64_t>(x);
  d.value[kYDtype] = static_cast<std::int64_t>(y);
  d.value[kZDtype] = static_cast<std::int64_t>(z);
  d.value[kBatchInvariant] = batch_invariant ? 1 : 0;
  return d;
}

std::vector<std::pair<std::string, std::int64_t>> Plan::values() const {
  std::vector<std::pair<std::string, std::int64_t>> values;
  if (!gpu)
    return values;
  gpu->launch.append_to(values);
  gpu->boxes.x.append_to("x", values);
  gpu->boxes.y.append_to("y", values);
  gpu->boxes.z.append_to("z", values);
  return values;
}

Result<Plan> Plan::from(std::span<const std::pair<std::string, std::int64_t>> values) {
  Plan plan;
  if (values.empty())
    return plan;
  const auto named = [](const Status& why) {
    return Status::error(why.code(), fmt::format("fp8_block_bmm: {}", why.message()));
  };
  const Result<cuda::LaunchPlan> launch = cuda::LaunchPlan::from(values);
  if (!launch)
    return named(launch.status());
  plan.gpu.emplace().launch = *launch;
  Boxes& boxes = plan.gpu->boxes;
  for (const auto& [prefix, box] : {std::pair{"x", &boxes.x}, {"y", &boxes.y}, {"z", &boxes.z}}) {
    const Result<cuda::TensorBox> found = cuda::TensorBox::from(prefix, values);
    if (!found)
      return named(found.status());
    *box = *found;
  }
  // No kernel of this op needs either; of any number of batches their sizes would not fit an int64.
  if (launch->workspace_fixed != 0 || launch->workspace_per_row != 0 || launch->workspace_per_block != 0 ||
      launch->workspace_zeroed != 0 || launch->reduce_threads != 0)
    return Status::error(Code::integrity, "fp8_block_bmm: a launch plan with a workspace or a second kernel");
  return plan;
}

std::array<void*, GpuParameters::kCount> GpuParameters::pointers() {
  return {&x_map,      &y_map,      &z_map,       &x, &y,   &xs,  &ys,          &z,          &workspace,
          &x_stride_b, &z_stride_b, &xs_stride_b, &m, &ldx, &ldz, &xs_stride_m, &xs_stride_k};
}

void reference(const Call& call) {
  const KernelDesc& desc = *call.desc;
  const Tensors& t = call.tensors;
  const std::int64_t n = desc.value[kN], k = desc.value[kK], k_blocks = blocks_of(k), b = call.b;
  const std::array<float, 256>&x_values = table_of(x_of(desc)), &y_values = table_of(y_of(desc));
  for (std::int64_t j = call.n_begin; j < call.n_end; ++j) {
    const std::uint8_t* const y = t.y + (b * n + j) * k;
    const float* const ys = t.ys + (b * blocks_of(n) + j / kBlock) * k_blocks;
    for (std::int64_t i = 0; i < t.m; ++i) {
      const std::uint8_t* const x = t.x + b * t.x_stride_b + i * t.ldx;
      const float* const xs = t.xs + b * t.xs_stride_b + i * t.xs_stride_m;
      double sum = 0;
      for (std::int64_t block = 0; block < k_blocks; ++block) {
        double products = 0;
        for (std::int64_t p = block * kBlock; p < std::min(k, (block + 1) * kBlock); ++p)
          products += static_cast<double>(x_values[x[p]]) * static_cast<double>(y_values[y[p]]);
        sum += static_cast<double>(static_cast<float>(products)) * static_cast<double>(xs[block * t.xs_stride_k]) *
               static_cast<double>(ys[block]);
      }
      store(z_of(desc), sum, t.z, b * t.z_stride_b + i * t.ldz + j);
    }
  }
}

void reference(const KernelDesc& desc, const Tensors& tensors) {
  for (std::int64_t b = 0; b < desc.value[kB]; ++b)
    reference({.desc = &desc, .tensors = tensors, .b = b, .n_begin = 0, .n_end = desc.value[kN]});
}

} // namespace kiln::fp8_block_bmm
