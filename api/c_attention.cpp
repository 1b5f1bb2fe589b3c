#include "api/c_attention.h"

#include "api/c_structs.h"
#include "jit/ops/attention_driver.h"

namespace kiln {
namespace {

using namespace kiln::attention;

Status bad(std::string_view field, std::int64_t value, std::string_view allowed) {
  return Status::error(Code::invalid_argument,
                       fmt::format("attention: {} is {}: allowed is {}", field, value, allowed));
}

Status desc_from_c(const kiln_desc* given, KernelDesc& out) {
  kiln_attention_desc copy;
  const kiln_attention_desc* read = nullptr;
  if (Status s = read_sized("kiln_attention_desc", given, given->size, sizeof(kiln_attention_desc), copy, read); !s)
    return s;
  const kiln_attention_desc& d = *read;
  static_assert(static_cast<int>(Causal::none) == KILN_CAUSAL_NONE &&
                static_cast<int>(Causal::top_left) == KILN_CAUSAL_TOP_LEFT &&
                static_cast<int>(Causal::bottom_right) == KILN_CAUSAL_BOTTOM_RIGHT);
  if (d.causal < KILN_CAUSAL_NONE || d.causal > KILN_CAUSAL_BOTTOM_RIGHT)
    return bad("causal", d.causal, "KILN_CAUSAL_NONE (0), KILN_CAUSAL_TOP_LEFT (1) or KILN_CAUSAL_BOTTOM_RIGHT (2)");
  if (d.lse != 0 && d.lse != 1)
    return bad("lse", d.lse, "0 or 1");
  if (d.batch_invariant != 0 && d.batch_invariant != 1)
    return bad("batch_invariant", d.batch_invariant, "0 or 1");
  if (d.reserved != 0)
    return bad("reserved", d.reserved, "0");
  out = make_desc(d.b, d.hq, d.hkv, d.m, d.n, d.d, d.dv, static_cast<Causal>(d.causal));
  out.value[kLse] = d.lse;
  out.value[kBatchInvariant] = d.batch_invariant;
  return {};
}

Strides strides_from_c(const kiln_attention_strides& s) {
  return {.batch = s.batch, .head = s.head, .row = s.row};
}

Status args_from_c(const kiln_args* given, Args& out) {
  kiln_attention_args copy;
  const kiln_attention_args* read = nullptr;
  if (Status s =
          read_sized("kiln_attention_args", given, given->size, offsetof(kiln_attention_args, workspace), copy, read);
      !s)
    return s;
  const kiln_attention_args& a = *read;
  if (a.reserved != 0)
    return bad("reserved", a.reserved, "0");
  out.b = a.b;
  out.hq = a.hq;
  out.hkv = a.hkv;
  out.m = a.m;
  out.n = a.n;
  out.q = static_cast<const std::uint16_t*>(a.q);
  out.q_strides = strides_from_c(a.q_strides);
  out.k = static_cast<const std::uint16_t*>(a.k);
  out.k_strides = strides_from_c(a.k_strides);
  out.v = static_cast<const std::uint16_t*>(a.v);
  out.v_strides = strides_from_c(a.v_strides);
  out.o = static_cast<std::uint16_t*>(a.o);
  out.o_strides = strides_from_c(a.o_strides);
  out.lse = a.lse;
  out.kv_len = a.kv_len;
  if (a.scale != 0) // a NaN is given, and the driver refuses it by name
    out.scale = a.scale;
  out.threads = a.base.threads;
  out.workspace = a.workspace;
  out.workspace_bytes = a.workspace_bytes;
  return {};
}

Status no_weights() {
  return Status::error(Code::invalid_argument, "attention: it has no weights to pack");
}

} // namespace

COp c_attention() {
  return {
      OpId::attention,
      desc_from_c,
      with_args<Args, args_from_c, attention::run>,
      with_args<Args, args_from_c, attention::workspace_bytes>,
      [](Engine&, const KernelDesc&, const void*, std::int64_t) -> Result<std::unique_ptr<AnyPack>> {
        return no_weights();
      },
      [](Engine&, const KernelDesc&, const std::string&) -> Result<std::unique_ptr<AnyPack>> { return no_weights(); }};
}

} // namespace kiln
