#include "api/c_int8_linear.h"

#include "api/c_int8_pack.h"
#include "api/c_structs.h"
#include "jit/ops/int8_linear_driver.h"

namespace kiln {
namespace {

using namespace kiln::int8_linear;

Status bad(std::string_view field, std::int64_t value, std::string_view allowed) {
  return Status::error(Code::invalid_argument,
                       fmt::format("int8_linear: {} is {}: allowed is {}", field, value, allowed));
}

Status float_of(std::string_view field, std::int32_t value, Float& out) {
  switch (value) {
  case KILN_BF16:
    out = Float::bf16;
    return {};
  case KILN_F16:
    out = Float::f16;
    return {};
  case KILN_F32:
    out = Float::f32;
    return {};
  default:
    return bad(field, value, "KILN_BF16 (4), KILN_F16 (5) or KILN_F32 (3)");
  }
}

Status desc_from_c(const kiln_desc* given, KernelDesc& out) {
  kiln_int8_linear_desc copy;
  const kiln_int8_linear_desc* read = nullptr;
  if (Status s = read_sized("kiln_int8_linear_desc", given, given->size, sizeof(kiln_int8_linear_desc), copy, read); !s)
    return s;
  const kiln_int8_linear_desc& d = *read;
  Float x{}, y{};
  if (Status s = float_of("x_dtype", d.x_dtype, x); !s)
    return s;
  if (Status s = float_of("y_dtype", d.y_dtype, y); !s)
    return s;
  if (d.bias != 0 && d.bias != 1)
    return bad("bias", d.bias, "0 or 1");
  if (d.w_layout != KILN_B_KN && d.w_layout != KILN_B_NK)
    return bad("w_layout", d.w_layout, "KILN_B_KN (0) or KILN_B_NK (1)");
  out = make_desc(d.m, d.n, d.k, x, y, d.bias != 0, static_cast<WLayout>(d.w_layout));
  return {};
}

Status args_from_c(const kiln_args* given, Args& out) {
  kiln_int8_linear_args copy;
  const kiln_int8_linear_args* read = nullptr;
  if (Status s = read_sized("kiln_int8_linear_args", given, given->size, offsetof(kiln_int8_linear_args, workspace),
                            copy, read);
      !s)
    return s;
  const kiln_int8_linear_args& a = *read;
  if (Status s = read_int8_pack(a.w_pack, "int8_linear: w_pack", out.pack); !s)
    return s;
  out.m = a.m;
  out.x = a.x;
  out.ldx = a.ldx;
  out.ws = a.ws;
  out.bias = a.bias;
  out.y = a.y;
  out.ldy = a.ldy;
  out.threads = a.base.threads;
  out.workspace = a.workspace;
  out.workspace_bytes = a.workspace_bytes;
  return {};
}

Result<std::unique_ptr<AnyPack>> pack_from_c(Engine& engine, const KernelDesc& desc, const void* w, std::int64_t ldw) {
  return make_int8_pack(engine, desc, w, ldw, static_cast<WLayout>(desc.value[kWLayout]), desc.value[kN],
                        desc.value[kK]);
}

Result<std::unique_ptr<AnyPack>> load_pack_from_c(Engine& engine, const KernelDesc& desc, const std::string& path) {
  return load_int8_pack(engine, desc, path, desc.value[kN], desc.value[kK]);
}

} // namespace

COp c_int8_linear() {
  return {OpId::int8_linear,
          desc_from_c,
          with_args<Args, args_from_c, int8_linear::run>,
          with_args<Args, args_from_c, int8_linear::workspace_bytes>,
          pack_from_c,
          load_pack_from_c};
}

} // namespace kiln
