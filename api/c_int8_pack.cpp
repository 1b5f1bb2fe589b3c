#include "api/c_int8_pack.h"

#include <utility>

#include "jit/ops/int8_linear.h"

namespace kiln {
namespace {

using int8_mm::Pack;
using int8_mm::PackLayout;

class CPack final : public AnyPack {
public:
  explicit CPack(Pack pack) : pack_(std::move(pack)), layout_(pack_.id()) {}
  OpId op() const override { return OpId::int8_mm; }
  Status save(const std::string& path) const override { return pack_.save(path); }
  Info info() const override {
    return {"int8_mm", layout_.c_str(), pack_.n(), pack_.k(), static_cast<std::uint64_t>(pack_.bytes())};
  }
  const Pack& pack() const { return pack_; }

private:
  Pack pack_;
  std::string layout_;
};

/// A pack serves every m, so its layout is that of the unbounded class.
Result<PackLayout> layout_for(Engine& engine, KernelDesc desc) {
  static_assert(static_cast<int>(int8_mm::kM) == static_cast<int>(int8_linear::kM));
  desc.value[int8_mm::kM] = kAny;
  const Result<std::string> id = engine.pack_layout(desc);
  return id ? PackLayout::parse(*id) : Result<PackLayout>(id.status());
}

Result<std::unique_ptr<AnyPack>> moved_to(Device device, Engine& engine, Pack pack) {
  if (device.kind == DeviceKind::cuda)
    if (Status s = pack.move_to(device, engine.runtime()); !s)
      return s;
  return std::unique_ptr<AnyPack>(std::make_unique<CPack>(std::move(pack)));
}

} // namespace

Result<std::unique_ptr<AnyPack>> make_int8_pack(Engine& engine, const KernelDesc& desc, const void* b, std::int64_t ldb,
                                                int8_mm::BLayout b_layout, std::int64_t n, std::int64_t k,
                                                int8_mm::BDtype b_dtype) {
  const Result<PackLayout> layout = layout_for(engine, desc);
  if (!layout)
    return layout.status();
  Result<Pack> pack = Pack::make(*layout, b, ldb, b_layout, n, k, engine.runtime().parallel, b_dtype);
  if (!pack)
    return pack.status();
  return moved_to(desc.device, engine, std::move(*pack));
}

Result<std::unique_ptr<AnyPack>> load_int8_pack(Engine& engine, const KernelDesc& desc, const std::string& path,
                                                std::int64_t n, std::int64_t k, int8_mm::BDtype b_dtype) {
  const Result<PackLayout> layout = layout_for(engine, desc);
  if (!layout)
    return layout.status();
  Result<Pack> pack = Pack::load(path);
  if (!pack)
    return pack.status();
  if (!(pack->layout() == *layout) || pack->b_dtype() != b_dtype || pack->n() != n || pack->k() != k)
    return Status::error(Code::invalid_argument,
                         fmt::format("{}: a pack of layout {} n={} k={}: allowed here is layout {}{} n={} k={}", path,
                                     pack->id(), pack->n(), pack->k(), layout->id(),
                                     b_dtype == int8_mm::BDtype::u8 ? "/u8" : "", n, k));
  return moved_to(desc.device, engine, std::move(*pack));
}

Status read_int8_pack(const kiln_pack* handle, std::string_view name, const Pack*& out) {
  out = nullptr;
  if (handle == nullptr)
    return {};
  if (Status s = check_pack_op(*handle->pack, OpId::int8_mm, name); !s)
    return s;
  out = &static_cast<const CPack&>(*handle->pack).pack();
  return {};
}

} // namespace kiln
