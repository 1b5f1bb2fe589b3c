#include "api/c_int4_mm.h"

#include <algorithm>

#include "api/c_structs.h"
#include "jit/ops/int4_mm_driver.h"

namespace kiln {
namespace {

using namespace kiln::int4_mm;

Status bad(std::string_view field, std::int64_t value, std::string_view allowed) {
  return Status::error(Code::invalid_argument, fmt::format("int4_mm: {} is {}: allowed is {}", field, value, allowed));
}

template <class List> bool is_in(const List& list, std::int64_t value) {
  return std::find(std::begin(list), std::end(list), value) != std::end(list);
}

Status desc_from_c(const kiln_desc* given, KernelDesc& out) {
  kiln_int4_mm_desc copy;
  const kiln_int4_mm_desc* read = nullptr;
  if (Status s = read_sized("kiln_int4_mm_desc", given, given->size, sizeof(kiln_int4_mm_desc), copy, read); !s)
    return s;
  const kiln_int4_mm_desc& d = *read;
  if (!is_in(kGroups, d.group))
    return bad("group", d.group, "32, 64, 128 or 256");
  if (!is_in(kInnerKTileCounts, d.inner_k_tiles))
    return bad("inner_k_tiles", d.inner_k_tiles, "0 (uint8 [n][k/2]), 2, 4 or 8");
  if (d.batch_invariant != 0 && d.batch_invariant != 1)
    return bad("batch_invariant", d.batch_invariant, "0 or 1");
  if (d.reserved != 0)
    return bad("reserved", d.reserved, "0");
  out = make_desc(d.m, d.n, d.k, d.group, d.batch_invariant != 0, d.inner_k_tiles);
  return {};
}

class CPack final : public AnyPack {
public:
  explicit CPack(Pack pack) : pack_(std::move(pack)), layout_(pack_.layout_text()) {}
  OpId op() const override { return OpId::int4_mm; }
  Status save(const std::string& path) const override { return pack_.save(path); }
  Info info() const override {
    return {"int4_mm", layout_.c_str(), pack_.n(), pack_.k(), static_cast<std::uint64_t>(pack_.bytes())};
  }
  const Pack& pack() const { return pack_; }

private:
  Pack pack_;
  std::string layout_;
};

Status args_from_c(const kiln_args* given, Args& out) {
  kiln_int4_mm_args copy;
  const kiln_int4_mm_args* read = nullptr;
  if (Status s =
          read_sized("kiln_int4_mm_args", given, given->size, offsetof(kiln_int4_mm_args, workspace), copy, read);
      !s)
    return s;
  const kiln_int4_mm_args& a = *read;
  if (a.w_pack != nullptr) {
    if (Status s = check_pack_op(*a.w_pack->pack, OpId::int4_mm, "int4_mm: w_pack"); !s)
      return s;
    out.pack = &static_cast<const CPack&>(*a.w_pack->pack).pack();
  }
  out.m = a.m;
  out.x = static_cast<const std::uint16_t*>(a.x);
  out.ldx = a.ldx;
  out.y = static_cast<std::uint16_t*>(a.y);
  out.ldy = a.ldy;
  out.threads = a.base.threads;
  out.stream = a.stream;
  out.workspace = a.workspace;
  out.workspace_bytes = a.workspace_bytes;
  return {};
}

Result<std::unique_ptr<AnyPack>> pack_from_c(Engine&, const KernelDesc&, const void*, std::int64_t) {
  return Status::error(Code::invalid_argument,
                       "int4_mm: its weights have scales and zeros: pack them with kiln_int4_mm_pack_create");
}

Result<const PackLayout*> layout_for(Engine& engine, const KernelDesc& desc) {
  const Result<std::string> id = engine.pack_layout(desc);
  if (!id)
    return id.status();
  if (const PackLayout* layout = find_pack_layout(*id))
    return layout;
  return Status::error(Code::internal, fmt::format("int4_mm: no pack layout '{}'", *id));
}

Result<std::unique_ptr<AnyPack>> load_pack_from_c(Engine& engine, const KernelDesc& desc, const std::string& path) {
  const Result<const PackLayout*> layout = layout_for(engine, desc);
  if (!layout)
    return layout.status();
  Result<Pack> pack = Pack::load(path, desc.device, engine.runtime());
  if (!pack)
    return pack.status();
  if (&pack->layout() != *layout || pack->n() != desc.value[kN] || pack->k() != desc.value[kK] ||
      pack->group() != group_of(desc))
    return Status::error(Code::invalid_argument,
                         fmt::format("{}: a pack of layout {} n={} k={}: allowed here is layout {}/g{} n={} k={}", path,
                                     pack->layout_text(), pack->n(), pack->k(), (*layout)->id, group_of(desc),
                                     desc.value[kN], desc.value[kK]));
  return std::unique_ptr<AnyPack>(std::make_unique<CPack>(std::move(*pack)));
}

} // namespace

COp c_int4_mm() {
  return {OpId::int4_mm,
          desc_from_c,
          with_args<Args, args_from_c, int4_mm::run>,
          with_args<Args, args_from_c, int4_mm::workspace_bytes>,
          pack_from_c,
          load_pack_from_c};
}

Result<std::unique_ptr<AnyPack>> make_int4_mm_pack(Engine& engine, const KernelDesc& desc,
                                                   const kiln_int4_mm_weights* given) {
  if (given == nullptr)
    return Status::error(Code::invalid_argument, "weights is null");
  kiln_int4_mm_weights copy;
  const kiln_int4_mm_weights* read = nullptr;
  if (Status s = read_sized("kiln_int4_mm_weights", given, given->size, sizeof(kiln_int4_mm_weights), copy, read); !s)
    return s;
  if (read->device != KILN_DEVICE_CPU && read->device != KILN_DEVICE_CUDA)
    return bad("weights.device", read->device, "KILN_DEVICE_CPU (0) or KILN_DEVICE_CUDA (1)");
  if (read->reserved != 0)
    return bad("weights.reserved", read->reserved, "0");
  const Result<const PackLayout*> layout = layout_for(engine, desc);
  if (!layout)
    return layout.status();
  Result<Pack> pack = Pack::make(**layout,
                                 {.w = read->w,
                                  .sz = read->sz,
                                  .inner_k_tiles = inner_k_tiles_of(desc),
                                  .place = static_cast<DeviceKind>(read->device),
                                  .stream = read->stream},
                                 desc, engine.runtime());
  if (!pack)
    return pack.status();
  return std::unique_ptr<AnyPack>(std::make_unique<CPack>(std::move(*pack)));
}

Status convert_int4_weights(bool to_tensor_core, const void* from, std::int64_t n, std::int64_t k,
                            std::int32_t inner_k_tiles, void* to) {
  constexpr std::int64_t kMaxSize = (std::int64_t{1} << 31) - 1;
  if (inner_k_tiles == 0 || !is_in(kInnerKTileCounts, inner_k_tiles))
    return bad("inner_k_tiles", inner_k_tiles, "2, 4 or 8");
  if (n < 0 || n > kMaxSize || n % 8 != 0)
    return bad("n", n, "a multiple of 8 from 0 to 2^31 - 1");
  if (k < 0 || k > kMaxSize || k % (16 * inner_k_tiles) != 0)
    return bad("k", k, fmt::format("a multiple of 16 · inner_k_tiles, {}, from 0 to 2^31 - 1", 16 * inner_k_tiles));
  if (n == 0 || k == 0)
    return {};
  if (from == nullptr || to == nullptr)
    return Status::error(Code::invalid_argument,
                         fmt::format("int4_mm: {} is null: allowed is {} bytes",
                                     (from == nullptr) == to_tensor_core ? "plain" : "packed", n * k / 2));
  if (to_tensor_core)
    plain_to_tensor_core(static_cast<const std::uint8_t*>(from), n, k, inner_k_tiles, static_cast<std::int32_t*>(to));
  else
    tensor_core_to_plain(static_cast<const std::int32_t*>(from), n, k, inner_k_tiles, static_cast<std::uint8_t*>(to));
  return {};
}

} // namespace kiln
