#include "api/c_fp8_block_bmm.h"

#include "api/c_structs.h"
#include "jit/ops/fp8_block_bmm_driver.h"

namespace kiln {
namespace {

using namespace kiln::fp8_block_bmm;

Status bad(std::string_view field, std::int64_t value, std::string_view allowed) {
  return Status::error(Code::invalid_argument,
                       fmt::format("fp8_block_bmm: {} is {}: allowed is {}", field, value, allowed));
}

Status float8_of(std::string_view field, std::int32_t value, Float8& out) {
  if (value != KILN_E4M3 && value != KILN_E5M2)
    return bad(field, value, "KILN_E4M3 (6) or KILN_E5M2 (7)");
  out = value == KILN_E4M3 ? Float8::e4m3 : Float8::e5m2;
  return {};
}

Status desc_from_c(const kiln_desc* given, KernelDesc& out) {
  kiln_fp8_block_bmm_desc copy;
  const kiln_fp8_block_bmm_desc* read = nullptr;
  if (Status s = read_sized("kiln_fp8_block_bmm_desc", given, given->size, sizeof(kiln_fp8_block_bmm_desc), copy, read);
      !s)
    return s;
  const kiln_fp8_block_bmm_desc& d = *read;
  Float8 x{}, y{};
  if (Status s = float8_of("x_dtype", d.x_dtype, x); !s)
    return s;
  if (Status s = float8_of("y_dtype", d.y_dtype, y); !s)
    return s;
  if (d.z_dtype != KILN_BF16 && d.z_dtype != KILN_F16 && d.z_dtype != KILN_F32)
    return bad("z_dtype", d.z_dtype, "KILN_BF16 (4), KILN_F16 (5) or KILN_F32 (3)");
  const ZDtype z = d.z_dtype == KILN_BF16 ? ZDtype::bf16 : d.z_dtype == KILN_F16 ? ZDtype::f16 : ZDtype::f32;
  if (d.batch_invariant != 0 && d.batch_invariant != 1)
    return bad("batch_invariant", d.batch_invariant, "0 or 1");
  out = make_desc(d.b, d.m, d.n, d.k, x, y, z, d.batch_invariant != 0);
  return {};
}

Status args_from_c(const kiln_args* given, Args& out) {
  kiln_fp8_block_bmm_args copy;
  const kiln_fp8_block_bmm_args* read = nullptr;
  if (Status s = read_sized("kiln_fp8_block_bmm_args", given, given->size, offsetof(kiln_fp8_block_bmm_args, stream),
                            copy, read);
      !s)
    return s;
  const kiln_fp8_block_bmm_args& a = *read;
  Tensors& t = out.tensors;
  t.m = a.m;
  t.x = static_cast<const std::uint8_t*>(a.x);
  t.x_stride_b = a.x_stride_b;
  t.ldx = a.ldx;
  t.y = static_cast<const std::uint8_t*>(a.y);
  t.xs = a.xs;
  t.xs_stride_b = a.xs_stride_b;
  t.xs_stride_m = a.xs_stride_m;
  t.xs_stride_k = a.xs_stride_k;
  t.ys = a.ys;
  t.z = a.z;
  t.z_stride_b = a.z_stride_b;
  t.ldz = a.ldz;
  out.threads = a.base.threads;
  out.stream = a.stream;
  return {};
}

Status no_packs() {
  return Status::error(Code::invalid_argument, "fp8_block_bmm: it takes no packed weights: give Y as it is");
}
Result<std::unique_ptr<AnyPack>> pack_from_c(Engine&, const KernelDesc&, const void*, std::int64_t) {
  return no_packs();
}
Result<std::unique_ptr<AnyPack>> load_pack_from_c(Engine&, const KernelDesc&, const std::string&) {
  return no_packs();
}

} // namespace

COp c_fp8_block_bmm() {
  return {OpId::fp8_block_bmm,
          desc_from_c,
          with_args<Args, args_from_c, fp8_block_bmm::run>,
          with_args<Args, args_from_c, fp8_block_bmm::workspace_bytes>,
          pack_from_c,
          load_pack_from_c};
}

} // namespace kiln
