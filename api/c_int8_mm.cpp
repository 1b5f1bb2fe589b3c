#include "api/c_int8_mm.h"

#include "api/c_int8_pack.h"
#include "api/c_structs.h"
#include "jit/ops/int8_mm_driver.h"

namespace kiln {
namespace {

using namespace kiln::int8_mm;

Status bad(std::string_view field, std::int64_t value, std::string_view allowed) {
  return Status::error(Code::invalid_argument, fmt::format("int8_mm: {} is {}: allowed is {}", field, value, allowed));
}

Status b_layout_of(std::int32_t value, BLayout& out) {
  if (value != KILN_B_KN && value != KILN_B_NK)
    return bad("b_layout", value, "KILN_B_KN (0) or KILN_B_NK (1)");
  out = static_cast<BLayout>(value);
  return {};
}

Status desc_from_c(const kiln_desc* given, KernelDesc& out) {
  kiln_int8_mm_desc copy;
  const kiln_int8_mm_desc* read = nullptr;
  if (Status s = read_sized("kiln_int8_mm_desc", given, given->size, offsetof(kiln_int8_mm_desc, b_layout), copy, read);
      !s)
    return s;
  const kiln_int8_mm_desc& d = *read;
  BLayout b_layout{};
  if (Status s = b_layout_of(d.b_layout, b_layout); !s)
    return s;
  for (const auto& [name, value] : {std::pair{"a_dtype", d.a_dtype}, {"b_dtype", d.b_dtype}})
    if (value != KILN_S8 && value != KILN_U8)
      return bad(name, value, "KILN_S8 (0) or KILN_U8 (1)");
  CDtype c_dtype{};
  switch (d.c_dtype) {
  case KILN_S32:
    c_dtype = CDtype::s32;
    break;
  case KILN_S8:
    c_dtype = CDtype::s8;
    break;
  case KILN_U8:
    c_dtype = CDtype::u8;
    break;
  case KILN_F32:
    c_dtype = CDtype::f32;
    break;
  case KILN_BF16:
    c_dtype = CDtype::bf16;
    break;
  case KILN_F16:
    c_dtype = CDtype::f16;
    break;
  default:
    return bad("c_dtype", d.c_dtype,
               "KILN_S32 (2), KILN_S8 (0), KILN_U8 (1), KILN_F32 (3), KILN_BF16 (4) or KILN_F16 (5)");
  }
  if (d.reserved != 0)
    return bad("reserved", d.reserved, "0");
  struct Named {
    const char* name;
    std::int32_t value, max;
    const char* allowed;
  };
  for (const Named& field :
       {Named{"rescale", d.rescale, KILN_RESCALE_SHIFT_LEFT,
              "KILN_RESCALE_NONE (0), _SCALE (1), _Q_SCALE (2), _SHIFT_RIGHT (3) or _SHIFT_LEFT (4)"},
        Named{"rescale_per", d.rescale_per, KILN_PER_CHANNEL, "KILN_PER_TENSOR (0) or KILN_PER_CHANNEL (1)"},
        Named{"a_zp", d.a_zp, KILN_EACH, "KILN_ABSENT (0), KILN_ONE (1) or KILN_EACH (2)"},
        Named{"b_zp", d.b_zp, KILN_EACH, "KILN_ABSENT (0), KILN_ONE (1) or KILN_EACH (2)"},
        Named{"rounding", d.rounding, KILN_ROUND_ODD,
              "KILN_ROUND_ZERO (0), _AWAY (1), _MINUS_INF (2), _PLUS_INF (3), _EVEN (4) or _ODD (5)"},
        Named{"act", d.act, KILN_ACT_LEAKY_RELU, "KILN_ACT_NONE (0), _RELU (1) or _LEAKY_RELU (2)"},
        Named{"c_zp", d.c_zp, KILN_ONE, "KILN_ABSENT (0) or KILN_ONE (1)"},
        Named{"clamp", d.clamp, KILN_ONE, "KILN_ABSENT (0) or KILN_ONE (1)"}})
    if (field.value < 0 || field.value > field.max)
      return bad(field.name, field.value, field.allowed);
  if (d.bias != KILN_ABSENT && d.bias != KILN_EACH)
    return bad("bias", d.bias, "KILN_ABSENT (0) or KILN_EACH (2)");
  out = make_desc(d.m, d.n, d.k, b_layout);
  out.value[kCDtype] = static_cast<std::int64_t>(c_dtype);
  out.value[kRescale] = d.rescale;
  out.value[kRescalePer] = d.rescale_per;
  out.value[kADtype] = d.a_dtype;
  out.value[kBDtype] = d.b_dtype;
  out.value[kAZp] = d.a_zp;
  out.value[kBZp] = d.b_zp;
  out.value[kBias] = d.bias != KILN_ABSENT;
  out.value[kRounding] = d.rounding;
  out.value[kAct] = d.act;
  out.value[kCZp] = d.c_zp;
  out.value[kClamp] = d.clamp;
  return {};
}

Status args_from_c(const kiln_args* given, Args& out) {
  kiln_int8_mm_args copy;
  const kiln_int8_mm_args* read = nullptr;
  if (Status s =
          read_sized("kiln_int8_mm_args", given, given->size, offsetof(kiln_int8_mm_args, workspace), copy, read);
      !s)
    return s;
  const kiln_int8_mm_args& a = *read;
  if (Status s = b_layout_of(a.b_layout, out.b_layout); !s)
    return s;
  if (a.reserved != 0)
    return bad("reserved", a.reserved, "0");
  out.m = a.m;
  out.a = a.a;
  out.lda = a.lda;
  if (Status s = read_int8_pack(a.b_pack, "int8_mm: b_pack", out.pack); !s)
    return s;
  out.b = a.b;
  out.ldb = a.ldb;
  out.c = a.c;
  out.ldc = a.ldc;
  out.values = {.a_zp = a.a_zp,
                .b_zp = a.b_zp,
                .bias = a.bias,
                .mult = a.mult,
                .shift = a.shift,
                .scale = a.scale,
                .slope_mult = a.slope_mult,
                .slope_shift = a.slope_shift,
                .slope = a.slope,
                .c_zp = a.c_zp,
                .lo = a.lo,
                .hi = a.hi};
  out.stream = a.stream;
  out.threads = a.base.threads;
  out.workspace = a.workspace;
  out.workspace_bytes = a.workspace_bytes;
  return {};
}

Result<std::unique_ptr<AnyPack>> pack_from_c(Engine& engine, const KernelDesc& desc, const void* b, std::int64_t ldb) {
  return make_int8_pack(engine, desc, b, ldb, static_cast<BLayout>(desc.value[kBLayout]), desc.value[kN],
                        desc.value[kK], static_cast<BDtype>(desc.value[kBDtype]));
}

Result<std::unique_ptr<AnyPack>> load_pack_from_c(Engine& engine, const KernelDesc& desc, const std::string& path) {
  return load_int8_pack(engine, desc, path, desc.value[kN], desc.value[kK], static_cast<BDtype>(desc.value[kBDtype]));
}

} // namespace

COp c_int8_mm() {
  return {OpId::int8_mm,
          desc_from_c,
          with_args<Args, args_from_c, int8_mm::run>,
          with_args<Args, args_from_c, int8_mm::workspace_bytes>,
          pack_from_c,
          load_pack_from_c};
}

} // namespace kiln
