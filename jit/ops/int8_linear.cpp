#include "jit/ops/int8_linear.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include <fmt/format.h>

#include "jit/bf16.h"
#include "jit/f16.h"
#include "jit/ops/bound_plan.h"

namespace kiln::int8_linear {
namespace {

/// As of int8_mm.
constexpr std::int64_t kMaxSize = (std::int64_t{1} << 31) - 1;

constexpr std::string_view kFloatNames[] = {"bf16", "f16", "f32"};
constexpr std::string_view kWLayoutNames[] = {"kn", "nk"};

constexpr FieldSpec kFields[] = {
    {.name = "m", .min = 0, .max = kMaxSize, .required = true, .any_allowed = true},
    {.name = "n", .min = 0, .max = kMaxSize, .required = true},
    {.name = "k", .min = 0, .max = kMaxSize, .required = true},
    {.name = "x_dtype", .choices = kFloatNames},
    {.name = "y_dtype", .choices = kFloatNames},
    {.name = "bias", .min = 0, .max = 1},
    {.name = "w_layout", .default_value = static_cast<std::int64_t>(WLayout::nk), .choices = kWLayoutNames},
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

Dtype dtype_of(Float type) {
  constexpr Dtype dtypes[] = {Dtype::bf16, Dtype::f16, Dtype::f32};
  return dtypes[static_cast<int>(type)];
}

const TensorSpec kTensors[] = {
    {.name = "x",
     .dtype = [](const KernelDesc& d) { return dtype_of(x_of(d)); },
     .shape =
         [](const KernelDesc& d) {
           return std::vector{m_of(d), k_of(d)};
         }},
    {.name = "w",
     .dtype = [](const KernelDesc&) { return Dtype::s8; },
     .shape =
         [](const KernelDesc& d) {
           return d.value[kWLayout] == static_cast<std::int64_t>(WLayout::kn) ? std::vector{k_of(d), n_of(d)}
                                                                              : std::vector{n_of(d), k_of(d)};
         }},
    {.name = "ws",
     .dtype = [](const KernelDesc&) { return Dtype::f32; },
     .shape = [](const KernelDesc& d) { return std::vector{n_of(d)}; }},
    {.name = "bias",
     .dtype = [](const KernelDesc&) { return Dtype::f32; },
     .shape = [](const KernelDesc& d) { return std::vector{n_of(d)}; },
     .present = has_bias},
    {.name = "y",
     .output = true,
     .dtype = [](const KernelDesc& d) { return dtype_of(y_of(d)); },
     .shape =
         [](const KernelDesc& d) {
           return std::vector{m_of(d), n_of(d)};
         }},
};

Status check(const KernelDesc& d) {
  // Sizes are below 2^31, so only X and Y in bytes can exceed an int64.
  constexpr double kMostBytes = 0x1p61;
  const double m = static_cast<double>(m_of(d)), row = 4.0 * static_cast<double>(std::max(n_of(d), k_of(d)));
  if (m * row > kMostBytes)
    return Status::error(Code::invalid_argument,
                         fmt::format("int8_linear: m={} n={} k={}: allowed are an X and a Y of at most 2^61 bytes",
                                     m_of(d), n_of(d), k_of(d)));
  return {};
}

/// The classes of m are int8_mm's.
KernelDesc canonical(const KernelDesc& d) {
  KernelDesc out = d;
  out.value[kM] = int8_mm::op().canonical(product_desc(d)).value[int8_mm::kM];
  out.value[kWLayout] = static_cast<std::int64_t>(WLayout::nk); // a kernel only ever sees panels
  return out;
}

MRange m_range(const KernelDesc& d) {
  return int8_mm::op().m_range(product_desc(d));
}

KernelDesc pack_desc(const KernelDesc& d) {
  // Whatever X and Y are.
  KernelDesc out = make_desc(kAny, n_of(d), k_of(d));
  out.device = d.device;
  return out;
}

double operations(const KernelDesc& d) {
  return int8_mm::op().operations(product_desc(d));
}

double bytes(const KernelDesc& d) {
  const double m = static_cast<double>(m_of(d)), n = static_cast<double>(n_of(d)), k = static_cast<double>(k_of(d));
  return static_cast<double>(bytes_of(x_of(d))) * m * k + n * k + (has_bias(d) ? 8 : 4) * n +
         static_cast<double>(bytes_of(y_of(d))) * m * n;
}

float element(Float type, const void* x, std::int64_t index) {
  switch (type) {
  case Float::bf16:
    return float_of_bf16(static_cast<const std::uint16_t*>(x)[index]);
  case Float::f16:
    return float_of_f16(static_cast<const std::uint16_t*>(x)[index]);
  case Float::f32:
    break;
  }
  return static_cast<const float*>(x)[index];
}

} // namespace

const OpSpec& op() {
  static const OpSpec spec = {
      .id = OpId::int8_linear,
      .name = "int8_linear",
      .fields = kFields,
      .tensors = kTensors,
      .check = check,
      .canonical = canonical,
      .m_range = m_range,
      .bind_plan = bound_plan<Plan>,
      .pack_layout = [](const void* plan) { return static_cast<const Plan*>(plan)->layout.id(); },
      .pack_desc = pack_desc,
      .operations = operations,
      .bytes = bytes};
  return spec;
}

KernelDesc make_desc(std::int64_t m, std::int64_t n, std::int64_t k, Float x, Float y, bool bias, WLayout w_layout) {
  KernelDesc d;
  d.op = OpId::int8_linear;
  d.value[kM] = m;
  d.value[kN] = n;
  d.value[kK] = k;
  d.value[kXDtype] = static_cast<std::int64_t>(x);
  d.value[kYDtype] = static_cast<std::int64_t>(y);
  d.value[kBias] = bias ? 1 : 0;
  d.value[kWLayout] = static_cast<std::int64_t>(w_layout);
  return d;
}

KernelDesc product_desc(const KernelDesc& d) {
  KernelDesc out = int8_mm::make_desc(m_of(d), n_of(d), k_of(d));
  out.device = d.device;
  return out;
}

Status check_k(const KernelDesc& desc, std::int64_t max_k) {
  if (k_of(desc) > max_k)
    return Status::error(Code::unsupported, fmt::format("k={}: allowed is at most {}", k_of(desc), max_k));
  return {};
}

std::vector<std::pair<std::string, std::int64_t>> Plan::values() const {
  return {{"n_block", layout.n_block},
          {"k_block", layout.k_block},
          {"m_step", m_step},
          {"n_step", n_step},
          {"q_row_bytes", q_row_bytes},
          {"q_end_bytes", q_end_bytes},
          {"workspace", workspace_bytes},
          {"workspace_per_row", workspace_per_row},
          {"q_shift", q_shift},
          {"terms", terms}};
}

Result<Plan> Plan::from(std::span<const std::pair<std::string, std::int64_t>> values) {
  // Then the bytes of any m quantised rows, rounded up by any m_step, stay within an int64.
  constexpr std::int64_t kMaxRowBytes = (std::int64_t{1} << 32) - (1 << 20), kMaxBytes = std::int64_t{1} << 40;
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
  take("m_step", plan.m_step, 1 << 16);
  take("n_step", plan.n_step, 1 << 16);
  take("q_row_bytes", plan.q_row_bytes, kMaxRowBytes);
  take("q_end_bytes", plan.q_end_bytes, kMaxBytes);
  take("workspace", plan.workspace_bytes, kMaxBytes);
  take("workspace_per_row", plan.workspace_per_row, kMaxRowBytes);
  take("q_shift", plan.q_shift, 128);
  take("terms", plan.terms, 1);
  if (!fine || plan.layout.n_block < 1 || plan.layout.k_block < 1 || plan.m_step < 1 || plan.n_step < 1 ||
      plan.n_step % plan.layout.n_block != 0)
    return Status::error(Code::integrity, "int8_linear: a launch plan with missing, repeated or impossible values");
  return plan;
}

int8_mm::Epilogue output_of(const KernelDesc& desc) {
  using int8_mm::CDtype;
  constexpr CDtype types[] = {CDtype::bf16, CDtype::f16, CDtype::f32};
  int8_mm::Epilogue epilogue;
  epilogue.c_dtype = types[static_cast<int>(y_of(desc))];
  epilogue.rescale = int8_mm::Rescale::scale;
  return epilogue;
}

int8_mm::TermsLayout terms_of(const KernelDesc& desc) {
  int8_mm::TermsLayout terms;
  terms.offset = TermsLayout::kOffset;
  terms.multiplier = TermsLayout::kWs;
  terms.count = TermsLayout::count(desc);
  return terms;
}

void make_terms(const KernelDesc& desc, const int8_mm::PackLayout& pack, int q_shift, const std::int32_t* w_sums,
                const float* ws, const float* bias, std::int64_t count, std::int32_t* terms) {
  const std::int64_t panel = pack.n_block, arrays = TermsLayout::count(desc);
  for (std::int64_t first = 0; first < count; first += panel, terms += arrays * panel) {
    const std::int64_t here = std::min(panel, count - first);
    if (here < panel)
      std::fill_n(terms, arrays * panel, 0);
    std::int32_t* const offset = terms + TermsLayout::kOffset * panel;
    for (std::int64_t j = 0; j < here; ++j) // wraps
      offset[j] = static_cast<std::int32_t>(0u - static_cast<std::uint32_t>(q_shift) *
                                                     static_cast<std::uint32_t>(w_sums[first + j]));
    std::memcpy(terms + TermsLayout::kWs * panel, ws + first, static_cast<std::size_t>(here) * 4);
    if (bias != nullptr)
      std::memcpy(terms + TermsLayout::kBias * panel, bias + first, static_cast<std::size_t>(here) * 4);
  }
}

float quantise_row(Float type, const void* x, std::int64_t k, std::int8_t* q) {
  float a = 0;
  bool finite = true;
  for (std::int64_t i = 0; i < k; ++i) {
    const float value = element(type, x, i);
    finite = finite && std::isfinite(value);
    a = std::max(a, std::fabs(value));
  }
  const float r = 127.0f / a;
  if (!finite || a == 0 || !std::isfinite(r)) {
    std::fill_n(q, k, std::int8_t{0});
    return finite ? 0.0f : std::numeric_limits<float>::quiet_NaN();
  }
  for (std::int64_t i = 0; i < k; ++i)
    q[i] = static_cast<std::int8_t>(std::clamp(std::nearbyint(element(type, x, i) * r), -127.0f, 127.0f));
  return a / 127.0f;
}

void store_result(Float type, std::int32_t sum, float s, float ws, float bias, void* y, std::int64_t index) {
  const float t = s * ws;
  const float value = std::fma(static_cast<float>(sum), t, bias);
  switch (type) {
  case Float::bf16:
    static_cast<std::uint16_t*>(y)[index] = bf16_of_float(value);
    break;
  case Float::f16:
    static_cast<std::uint16_t*>(y)[index] = f16_of_float(value);
    break;
  case Float::f32: // a NaN of one sign and payload, whatever the processor makes
    static_cast<float*>(y)[index] = std::isnan(value) ? std::bit_cast<float>(0x7FC00000u) : value;
    break;
  }
}

void reference(const KernelDesc& desc, std::int64_t m, const void* x, std::int64_t ldx, const std::int8_t* w,
               std::int64_t ldw, const float* ws, const float* bias, void* y, std::int64_t ldy) {
  const std::int64_t n = n_of(desc), k = k_of(desc);
  const auto w_layout = static_cast<WLayout>(desc.value[kWLayout]);
  std::vector<std::int8_t> q(static_cast<std::size_t>(k));
  std::vector<std::int32_t> sums(static_cast<std::size_t>(n));
  for (std::int64_t i = 0; i < m; ++i) {
    const float s =
        quantise_row(x_of(desc), static_cast<const std::uint8_t*>(x) + i * ldx * bytes_of(x_of(desc)), k, q.data());
    int8_mm::reference(1, n, k, q.data(), k, w, ldw, w_layout, sums.data(), n);
    for (std::int64_t j = 0; j < n; ++j)
      store_result(y_of(desc), sums[static_cast<std::size_t>(j)], s, ws[j], bias != nullptr ? bias[j] : 0.0f, y,
                   i * ldy + j);
  }
}

} // namespace kiln::int8_linear
